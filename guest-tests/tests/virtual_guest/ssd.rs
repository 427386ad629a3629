//! Guests on an SSD that the daemon drives through VFIO, from the side of one that wants more than its own. They need such a daemon:
//! `VHOST_USER_NVME_TEST_NEIGHBOUR` is a socket with a part of an SSD that others share, `VHOST_USER_NVME_TEST_ALONE` one with a whole SSD,
//! of which block 49152 must be the same afterwards. The guest case `ssd-shared` has both.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use guest_tests::FrontEnd;
use guest_tests::daemon::{bring_up, queue};
use guest_tests::io::{Io, LIMIT};
use guest_tests::raw::{self, Guest, RawCq, RawSq};
use guest_tests::rng::Rng;
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::{Sqe, Status};
use vhost_user_nvme::driver::Dma;
use zerocopy::IntoBytes as _;

const PAGE: u64 = 4096;
/// Blocks of one transfer of ours.
const MANY: u32 = 16;

fn connect(variable: &str) -> Option<Guest> {
    let Some(path) = std::env::var_os(variable).map(PathBuf::from) else {
        eprintln!("NOT TESTED: ssd: there is no {variable}");
        return None;
    };
    Some(bring_up(FrontEnd::connect(&path).expect("a daemon")))
}

/// A queue pair of our own making, to say any address with.
struct Raw {
    sq: RawSq,
    cq: RawCq,
}

impl Raw {
    fn run(&mut self, opcode: NvmOpcode, slba: u64, prp1: u64, prp2: u64) -> Status {
        let sqe = ReadWrite::new(1, slba, (MANY - 1) as u16).to_sqe(opcode, prp1, prp2);
        self.sq.submit(&[sqe]);
        self.cq.wait(LIMIT).expect("an answer").status()
    }
}

/// Addresses that are nobody's, or somebody else's: where a neighbour's memory, windows and the driver's own memory can lie.
fn foreign() -> Vec<u64> {
    let mut all = vec![
        8 << 20,
        64 << 20,
        511 << 20,
        0xFEE0_0000,
        0x1_0000_0000 + (16 << 20),
        u64::MAX - 0xFFF,
    ];
    for bit in 33..64 {
        all.extend([1u64 << bit, (1 << bit) + (1 << 20), (1 << bit) - PAGE]);
    }
    all
}

fn list(memory: &Dma, entries: &[u64]) {
    let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_le_bytes()).collect();
    memory.write(0, &bytes);
}

#[test]
fn a_neighbour_gets_at_nothing_of_the_other() {
    let Some(mut guest) = connect("VHOST_USER_NVME_TEST_NEIGHBOUR") else {
        return;
    };
    let (sq, cq) = raw::create_pair(&mut guest, 1, 16).expect("a queue pair");
    let mut raw = Raw { sq, cq };
    let memory = |guest: &mut Guest, pages: u64| {
        let bytes = (pages * PAGE) as usize;
        guest.device().memory().allocate(bytes).expect("memory")
    };
    let (data, lists) = (memory(&mut guest, 32), memory(&mut guest, 1));
    let mut io = Io::new(&mut guest, queue(2, 64), 1);
    let blocks = guest.identify_namespace(1).expect("a namespace").nsze;
    assert_eq!(io.block, 4096, "what the script has set up");

    // Our first and last blocks are ours.
    let mut ours = vec![0; 128 << 10];
    Rng::new(7).fill(&mut ours);
    let last = blocks - 32;
    for slba in [0, last] {
        assert_eq!(io.write(slba, &ours), Status::SUCCESS);
        assert!(io.read(slba, 32).expect("a read") == ours);
    }

    // Other blocks, also such as wrap around when an offset is added.
    let out = Status::LBA_OUT_OF_RANGE;
    for slba in [
        blocks,
        blocks - 1,
        2 * blocks,
        1 << 32,
        1 << 52,
        1 << 63,
        u64::MAX - 1,
        u64::MAX - 31,
        0u64.wrapping_sub(blocks),
        0u64.wrapping_sub(2 * blocks),
    ] {
        for opcode in [NvmOpcode::READ, NvmOpcode::WRITE, NvmOpcode::COMPARE] {
            assert_eq!(io.transfer(opcode, slba, 2), out, "{opcode:?} {slba:#x}");
        }
        assert_eq!(
            io.blocks(NvmOpcode::WRITE_ZEROES, slba, 2),
            out,
            "{slba:#x}"
        );
        assert_eq!(io.deallocate(&[(0, 1), (slba, 2)]), out, "{slba:#x}");
    }
    assert_eq!(io.write(0, &ours), Status::SUCCESS);

    // Other namespaces.
    for nsid in [0, 2, 3, 4, 1025] {
        io.nsid = nsid;
        let status = io.read(0, 1).map(|_| ());
        assert_eq!(status, Err(Status::INVALID_NAMESPACE_OR_FORMAT), "{nsid}");
    }
    io.nsid = 1;

    // Other memory: as first page, second page, list, and entry of a list.
    let (at, lists_at) = (data.addr(), lists.addr());
    let error = Status::DATA_TRANSFER_ERROR;
    for hole in foreign() {
        for opcode in [NvmOpcode::READ, NvmOpcode::WRITE] {
            let entries: Vec<u64> = (1..MANY.into()).map(|i| at + i * PAGE).collect();
            list(&lists, &entries);
            assert_eq!(raw.run(opcode, 64, hole, lists_at), error, "PRP1 {hole:#x}");
            assert_eq!(raw.run(opcode, 64, at, hole), error, "PRP2 {hole:#x}");
            let mut entries = entries;
            entries[11] = hole;
            list(&lists, &entries);
            assert_eq!(raw.run(opcode, 64, at, lists_at), error, "entry {hole:#x}");
        }
    }

    // A list that changes while the command is out. Whichever entry the daemon saw is what the SSD gets.
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for hole in foreign().into_iter().cycle() {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                for entry in [hole, at + 11 * PAGE] {
                    lists.write(11 * 8, &entry.to_le_bytes());
                    std::thread::sleep(Duration::from_micros(20));
                }
            }
        });
        let start = Instant::now();
        let mut seen = [0; 2];
        while start.elapsed() < Duration::from_secs(2) {
            match raw.run(NvmOpcode::READ, 64, at, lists_at) {
                Status::SUCCESS => seen[0] += 1,
                status => {
                    assert_eq!(status, error);
                    seen[1] += 1;
                }
            }
        }
        stop.store(true, Ordering::Relaxed);
        eprintln!("a changing list: {} good, {} refused", seen[0], seen[1]);
        assert!(seen[0] + seen[1] > 10, "hardly any");
    });

    // Commands for the SSD as a whole.
    for opcode in [0x0D, 0x10, 0x11, 0x80, 0x81, 0x84, 0xC0, 0xFF] {
        let sqe = Sqe {
            opcode,
            nsid: 1,
            prp1: at,
            ..Sqe::default()
        };
        let cqe = guest.admin("not for a guest", sqe).expect("an answer");
        assert_eq!(cqe.status(), Status::INVALID_OPCODE, "{opcode:#x}");
    }

    for slba in [0, last] {
        assert!(io.read(slba, 32).expect("a read") == ours, "at {slba}");
    }
    assert_eq!(io.flush(), Status::SUCCESS);
}

/// A guest that has an SSD to itself names device addresses in its PRPs, and nobody looks into its lists. So it has the SSD write what looks
/// like commands to wherever the daemon's queues can be: at the top of what an IOMMU can address.
#[test]
fn a_wild_guest_harms_only_itself() {
    let Some(mut guest) = connect("VHOST_USER_NVME_TEST_ALONE") else {
        return;
    };
    let (sq, cq) = raw::create_pair(&mut guest, 1, 16).expect("a queue pair");
    let mut raw = Raw { sq, cq };
    let pages = |guest: &mut Guest, pages: u64| {
        let bytes = (pages * PAGE) as usize;
        guest.device().memory().allocate(bytes).expect("memory")
    };
    let (data, lists) = (pages(&mut guest, MANY.into()), pages(&mut guest, 1));
    let at = data.addr();
    let forged = ReadWrite::new(1, 49_152, 0).to_sqe(NvmOpcode::WRITE, at, 0);
    for offset in (0..data.len()).step_by(64) {
        data.write(offset, forged.as_bytes());
    }
    let straight: Vec<u64> = (1..MANY.into()).map(|i| at + i * PAGE).collect();
    list(&lists, &straight);
    let (first, lists_at) = (1024, lists.addr());
    let status = raw.run(NvmOpcode::WRITE, first, at, lists_at);
    assert_eq!(status, Status::SUCCESS);
    let mut refused = 0;
    for bits in [39, 47, 48] {
        let mut page = (1u64 << bits) - (4 << 20);
        while page < 1 << bits {
            let entries: Vec<u64> = (0..u64::from(MANY) - 1).map(|i| page + i * PAGE).collect();
            list(&lists, &entries);
            if !raw.run(NvmOpcode::READ, first, at, lists_at).is_success() {
                refused += 1;
            }
            page += entries.len() as u64 * PAGE;
        }
    }
    list(&lists, &straight);
    data.fill(0);
    let after = raw.run(NvmOpcode::READ, first, at, lists_at);
    eprintln!("{refused} commands refused; afterwards: {after}");
    // Whatever was spoiled cost resets: the SSD serves it still, and with its own data, or was given up for it. Nothing hangs, and the daemon
    // answers.
    let all = data.bytes((u64::from(MANY) * PAGE) as usize);
    match after {
        Status::SUCCESS => assert!(all.chunks_exact(64).all(|sqe| sqe == forged.as_bytes())),
        status => assert_eq!(status, Status::INTERNAL_ERROR),
    }
    assert_eq!(guest.namespaces().expect("an answer"), [1]);
}
