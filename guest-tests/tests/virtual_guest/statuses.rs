//! Every NVM command with every kind of wrong number in it: the exact status, and a completion that names its command.

use guest_tests::daemon::{Disk, Plan, TestDaemon, queue};
use guest_tests::io::{Io, LIMIT};
use guest_tests::raw::{self, RawCq, RawSq};
use nvme_spec::command::NSID_BROADCAST;
use nvme_spec::nvm::{DatasetManagement, DsmRange, Flush, ReadWrite};
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::{Sqe, Status, StatusField};
use vhost_user_nvme::driver::Dma;
use zerocopy::IntoBytes as _;

const BLOCKS: u64 = 4096;

struct Bench {
    _daemon: TestDaemon,
    _guest: raw::Guest,
    sq: RawSq,
    cq: RawCq,
    data: Dma,
    cid: u16,
}

impl Bench {
    /// NSID 1 is plain, NSID 2 has blocks of 4096 bytes, NSID 3 does not exist, NSID 4 is read-only; NN is 5.
    fn new() -> Self {
        let daemon = TestDaemon::one(Plan {
            max_namespaces: 5,
            max_transfer: 128 << 10,
            ..Plan::many(vec![
                (1, Disk::memory(9, BLOCKS)),
                (2, Disk::memory(12, BLOCKS)),
                (4, Disk::memory(9, BLOCKS).read_only()),
            ])
        });
        let mut guest = daemon.guest();
        let (sq, cq) = raw::create_pair(&mut guest, 3, 7).unwrap();
        let data = guest.device().memory().allocate(256 << 10).unwrap();
        Self {
            _daemon: daemon,
            _guest: guest,
            sq,
            cq,
            data,
            cid: 0x7F00,
        }
    }

    fn run(&mut self, sqe: Sqe) -> StatusField {
        self.cid = self.cid.wrapping_add(77);
        self.sq.submit(&[sqe.with_cid(self.cid)]);
        let cqe = self.cq.wait(LIMIT).expect("an answer");
        assert_eq!(
            (cqe.cid, cqe.sqid, cqe.sqhd),
            (self.cid, 3, self.sq.tail),
            "the completion names its command"
        );
        cqe.status
    }

    #[track_caller]
    fn expect(&mut self, what: &str, sqe: Sqe, status: Status) {
        let field = self.run(sqe);
        assert_eq!(field.status(), status, "{what}");
        if status.is_success() {
            assert!(!field.dnr() && !field.m(), "{what}: {field:?}");
        } else {
            assert_eq!(field.dnr(), status.default_dnr(), "{what}: Do Not Retry");
        }
    }
}

const ON_BLOCKS: [NvmOpcode; 5] = [
    NvmOpcode::READ,
    NvmOpcode::WRITE,
    NvmOpcode::COMPARE,
    NvmOpcode::VERIFY,
    NvmOpcode::WRITE_ZEROES,
];

fn moves(opcode: NvmOpcode) -> bool {
    [NvmOpcode::READ, NvmOpcode::WRITE, NvmOpcode::COMPARE].contains(&opcode)
}

fn on_blocks(opcode: NvmOpcode, nsid: u32, slba: u64, nlb_z: u16, prp1: u64) -> Sqe {
    ReadWrite::new(nsid, slba, nlb_z).to_sqe(opcode, prp1, 0)
}

#[test]
fn block_ranges() {
    let mut b = Bench::new();
    let data = b.data.addr();
    for opcode in ON_BLOCKS {
        let ok = Status::SUCCESS;
        let out = Status::LBA_OUT_OF_RANGE;
        for (slba, nlb_z, status) in [
            (0, 0, ok),
            (BLOCKS - 1, 0, ok),
            (BLOCKS - 8, 7, ok),
            (BLOCKS, 0, out),
            (BLOCKS - 1, 1, out),
            (BLOCKS - 8, 8, out),
            (u64::MAX, 0, out),
            (u64::MAX - 5, 10, out),
            (u64::MAX - 7, 7, out),
            (1 << 63, 0, out),
            (1 << 55, 0, out),
            (BLOCKS | 1 << 32, 0, out),
        ] {
            let sqe = on_blocks(opcode, 1, slba, nlb_z, data);
            b.expect(&format!("{opcode:?} {slba:#x} {nlb_z}"), sqe, status);
        }
        // The largest number of blocks is beyond MDTS where data moves, else beyond the namespace.
        let huge = on_blocks(opcode, 1, 0, 0xFFFF, data);
        let status = if moves(opcode) {
            Status::INVALID_FIELD
        } else {
            out
        };
        b.expect("NLB FFFFh", huge, status);
        let wrap = on_blocks(opcode, 1, u64::MAX - 0xFFFF, 0xFFFF, data);
        b.expect("NLB FFFFh up to 2^64", wrap, status);
    }
}

#[test]
fn transfers_above_mdts() {
    let mut b = Bench::new();
    let data = b.data.addr();
    for opcode in ON_BLOCKS.into_iter().filter(|o| moves(*o)) {
        // 128 KiB + one block, in both block sizes.
        for (nsid, nlb_z) in [(1, 256), (2, 32)] {
            let sqe = on_blocks(opcode, nsid, 0, nlb_z, data);
            b.expect("above MDTS", sqe, Status::INVALID_FIELD);
        }
    }
}

#[test]
fn namespaces() {
    let mut b = Bench::new();
    let data = b.data.addr();
    let invalid = Status::INVALID_NAMESPACE_OR_FORMAT;
    for nsid in [0, 6, 7, 0x1000, 0x7FFF_FFFF, 0xFFFF_FFFE, NSID_BROADCAST] {
        for opcode in ON_BLOCKS {
            let sqe = on_blocks(opcode, nsid, 0, 0, data);
            b.expect(&format!("{opcode:?} on NSID {nsid:#x}"), sqe, invalid);
        }
        let dsm = DatasetManagement {
            nsid,
            ad: true,
            ..DatasetManagement::default()
        };
        b.expect("Dataset Management", dsm.to_sqe(data, 0), invalid);
        if nsid != NSID_BROADCAST {
            b.expect("Flush", Flush { nsid }.to_sqe(), invalid);
        }
    }
    // Inactive, but possible: NSID 3 and 5 (Base, "Namespace Identifiers": Invalid Field in Command).
    for nsid in [3, 5] {
        for opcode in ON_BLOCKS {
            let sqe = on_blocks(opcode, nsid, 0, 0, data);
            b.expect("inactive", sqe, Status::INVALID_FIELD);
        }
        b.expect("inactive", Flush { nsid }.to_sqe(), Status::INVALID_FIELD);
    }
}

#[test]
fn write_protection() {
    let mut b = Bench::new();
    let data = b.data.addr();
    let refused = Status::NAMESPACE_WRITE_PROTECTED;
    for opcode in ON_BLOCKS {
        let sqe = on_blocks(opcode, 4, 0, 0, data);
        let status = match opcode {
            NvmOpcode::WRITE | NvmOpcode::WRITE_ZEROES => refused,
            _ => Status::SUCCESS,
        };
        b.expect(&format!("{opcode:?}"), sqe, status);
    }
    let range = DsmRange {
        cattr: 0,
        nlb: 8,
        slba: 0,
    };
    b.data.write(0, range.as_bytes());
    let dsm = DatasetManagement {
        nsid: 4,
        ad: true,
        ..DatasetManagement::default()
    };
    b.expect("Deallocate", dsm.to_sqe(data, 0), refused);
    b.expect("Flush", Flush { nsid: 4 }.to_sqe(), Status::SUCCESS);
}

#[test]
fn opcodes_and_flags() {
    let mut b = Bench::new();
    let data = b.data.addr();
    let known = [0x00, 0x01, 0x02, 0x05, 0x08, 0x09, 0x0C];
    for opcode in (0..=0xFFu8).filter(|o| !known.contains(o)) {
        let sqe = on_blocks(NvmOpcode(opcode), 1, 0, 0, data);
        b.expect(&format!("opcode {opcode:#x}"), sqe, Status::INVALID_OPCODE);
    }
    for opcode in ON_BLOCKS {
        for flags in [0x01, 0x02, 0x03, 0x41, 0x80, 0xC0] {
            let mut sqe = on_blocks(opcode, 1, 0, 0, data);
            sqe.flags = flags;
            b.expect(&format!("flags {flags:#x}"), sqe, Status::INVALID_FIELD);
        }
        // Reserved bits are none of our business.
        let mut sqe = on_blocks(opcode, 1, 0, 0, data);
        sqe.flags = 0x3C;
        b.expect("reserved flags", sqe, Status::SUCCESS);
    }
}

#[test]
fn flush_and_write_through() {
    let mut b = Bench::new();
    let data = b.data.addr();
    for nsid in [1, 2, 4] {
        b.expect("Flush", Flush { nsid }.to_sqe(), Status::SUCCESS);
    }
    for opcode in ON_BLOCKS {
        let mut command = ReadWrite::new(1, 0, 0);
        command.fua = true;
        command.lr = true;
        let sqe = command.to_sqe(opcode, data, 0);
        b.expect("FUA and limited retry", sqe, Status::SUCCESS);
    }
}

#[test]
fn dataset_management_ranges() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, BLOCKS)));
    let mut guest = daemon.guest();
    let mut io = Io::new(&mut guest, queue(1, 16), 1);
    let full = vec![0xC3; 64 * 512];
    let out = Status::LBA_OUT_OF_RANGE;
    for (ranges, status) in [
        (vec![(0, 8)], Status::SUCCESS),
        (vec![(8, 8), (24, 8), (0, 1)], Status::SUCCESS),
        (vec![(0, 0)], Status::SUCCESS),
        (vec![(0, BLOCKS as u32)], Status::SUCCESS),
        (vec![(BLOCKS - 1, 1); 256], Status::SUCCESS),
        (vec![(BLOCKS, 1)], out),
        (vec![(BLOCKS - 1, 2)], out),
        (vec![(0, 8), (u64::MAX, 1)], out),
        (vec![(u64::MAX - 3, 8)], out),
        (vec![(0, u32::MAX)], out),
        (vec![(u64::MAX, u32::MAX); 256], out),
    ] {
        assert_eq!(io.write(0, &full), Status::SUCCESS);
        assert_eq!(io.deallocate(&ranges), status, "{:?}", ranges[0]);
        if status.is_success() {
            let got = io.read(0, 64).unwrap();
            for (block, bytes) in got.chunks(512).enumerate() {
                let block = block as u64;
                let gone = ranges
                    .iter()
                    .any(|&(slba, n)| (slba..slba + u64::from(n)).contains(&block));
                let want = if gone { 0 } else { 0xC3 };
                assert!(bytes.iter().all(|b| *b == want), "block {block}");
            }
        }
    }
}

#[test]
fn read_only_namespaces_say_so() {
    let daemon = TestDaemon::one(Plan::many(vec![
        (1, Disk::memory(9, 64)),
        (2, Disk::memory(9, 64).read_only()),
    ]));
    let mut guest = daemon.guest();
    assert!(
        !guest
            .identify_namespace(1)
            .unwrap()
            .nsattr
            .write_protected()
    );
    assert!(
        guest
            .identify_namespace(2)
            .unwrap()
            .nsattr
            .write_protected()
    );
}
