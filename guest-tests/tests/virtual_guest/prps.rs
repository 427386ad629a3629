//! Data pointers: every shape that is allowed, and the status of each that is not.

use guest_tests::daemon::{Disk, Plan, TestDaemon};
use guest_tests::io::LIMIT;
use guest_tests::raw::{self, Guest, RawCq, RawSq};
use guest_tests::rng::Rng;
use nvme_spec::Status;
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use vhost_user_nvme::driver::Dma;

const PAGE: u64 = 4096;

struct Bench {
    _daemon: TestDaemon,
    guest: Guest,
    sq: RawSq,
    cq: RawCq,
    data: Dma,
    lists: Dma,
}

impl Bench {
    fn new() -> Self {
        let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 8192)));
        let mut guest = daemon.guest();
        let (sq, cq) = raw::create_pair(&mut guest, 1, 16).unwrap();
        let data = guest.device().memory().allocate(2 << 20).unwrap();
        let lists = guest.device().memory().allocate(16 * 4096).unwrap();
        Self {
            _daemon: daemon,
            guest,
            sq,
            cq,
            data,
            lists,
        }
    }

    fn run(&mut self, opcode: NvmOpcode, blocks: u32, prp1: u64, prp2: u64) -> Status {
        let sqe = ReadWrite::new(1, 8, (blocks - 1) as u16).to_sqe(opcode, prp1, prp2);
        self.sq.submit(&[sqe.with_cid(0x4321)]);
        let cqe = self.cq.wait(LIMIT).expect("an answer");
        assert_eq!((cqe.cid, cqe.sqid, cqe.sqhd), (0x4321, 1, self.sq.tail));
        cqe.status()
    }

    fn list(&self, offset: usize, entries: &[u64]) {
        let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_le_bytes()).collect();
        self.lists.write(offset, &bytes);
    }
}

#[test]
fn misaligned_pointers_have_their_status() {
    let mut b = Bench::new();
    let (data, lists) = (b.data.addr(), b.lists.addr());
    let bad = Status::INVALID_PRP_OFFSET;
    for opcode in [NvmOpcode::READ, NvmOpcode::WRITE, NvmOpcode::COMPARE] {
        for low in 1..4 {
            assert_eq!(b.run(opcode, 1, data + low, 0), bad, "PRP1 + {low}");
        }
        for low in [1, 2, 3, 4, 8, 512, 2048] {
            let two = b.run(opcode, 16, data, data + PAGE + low);
            assert_eq!(two, bad, "PRP2 as a page, + {low}");
        }
        for low in [1, 2, 4, 7] {
            let many = b.run(opcode, 64, data, lists + low);
            assert_eq!(many, bad, "PRP2 as a list, + {low}");
        }
        for (at, low) in [(0, 1), (3, 4), (6, 2048)] {
            let mut entries: Vec<u64> = (1..8).map(|i| data + i * PAGE).collect();
            entries[at] += low;
            b.list(0, &entries);
            assert_eq!(b.run(opcode, 64, data, lists), bad, "entry {at} + {low}");
        }
        // Two entries left in the list page: the second points to the next list, and not to its beginning.
        b.list(4096 - 16, &[data + PAGE, lists + PAGE + 8]);
        b.list(4096, &[data + 2 * PAGE; 8]);
        let chained = b.run(opcode, 64, data, lists + PAGE - 16);
        assert_eq!(chained, bad, "a chain to the middle of a page");
    }
}

#[test]
fn pointers_outside_memory_have_their_status() {
    let mut b = Bench::new();
    let (data, lists) = (b.data.addr(), b.lists.addr());
    let error = Status::DATA_TRANSFER_ERROR;
    for hole in [
        0xFFFF_F000_0000,
        u64::MAX - 0xFFF,
        0x1_0000_0000 + (16 << 20),
    ] {
        for opcode in [NvmOpcode::READ, NvmOpcode::WRITE] {
            assert_eq!(b.run(opcode, 1, hole, 0), error, "PRP1 {hole:#x}");
            assert_eq!(b.run(opcode, 16, data, hole), error, "PRP2 {hole:#x}");
            assert_eq!(b.run(opcode, 64, data, hole), error, "list {hole:#x}");
            let mut entries: Vec<u64> = (1..8).map(|i| data + i * PAGE).collect();
            entries[5] = hole;
            b.list(0, &entries);
            assert_eq!(b.run(opcode, 64, data, lists), error, "entry {hole:#x}");
            b.list(4096 - 8, &[hole]);
            let chain = b.run(opcode, 64, data, lists + PAGE - 8);
            assert_eq!(chain, error, "chain {hole:#x}");
        }
    }
    // The last bytes of memory are memory; what begins there and goes on is not.
    let top = (8 << 20) - PAGE;
    assert_eq!(b.run(NvmOpcode::WRITE, 8, top, 0), Status::SUCCESS);
    assert_eq!(b.run(NvmOpcode::WRITE, 16, top, top + PAGE), error);
}

#[test]
fn lists_may_begin_in_the_middle_chain_and_scatter() {
    let mut b = Bench::new();
    let (data, lists) = (b.data.addr(), b.lists.addr());
    let mut rng = Rng::new(5);
    for offset in [0u64, 8, 2048, 4096 - 16, 4096 - 8] {
        for blocks in [24u32, 64, 2048] {
            // Pages in any order, one after the other in the transfer; the first begins anywhere in its page.
            let first = [0u64, 4, 512, 4092][rng.below(4) as usize];
            let bytes = blocks as usize * 512;
            let pages_needed = (first as usize + bytes).div_ceil(4096);
            let mut pages: Vec<u64> = (0..512).map(|i| data + i * PAGE).collect();
            for i in (1..pages.len()).rev() {
                pages.swap(i, rng.below(i as u64 + 1) as usize);
            }
            pages.truncate(pages_needed);
            // Fill list pages from `offset` of the first on.
            let (mut at, mut list) = (offset as usize, 0usize);
            let mut rest = &pages[1..];
            while !rest.is_empty() {
                let slots = (4096 - at) / 8;
                if rest.len() <= slots {
                    b.list(list * 4096 + at, rest);
                    break;
                }
                let (here, later) = rest.split_at(slots - 1);
                b.list(list * 4096 + at, here);
                list += 1;
                b.list(list * 4096 - 8, &[lists + list as u64 * PAGE]);
                (rest, at) = (later, 0);
            }
            let mut want = vec![0; bytes];
            rng.fill(&mut want);
            let spread = |b: &Bench, f: &mut dyn FnMut(&Dma, usize, std::ops::Range<usize>)| {
                let mut done = 0;
                for (i, page) in pages.iter().enumerate() {
                    let skip = if i == 0 { first as usize } else { 0 };
                    let n = (4096 - skip).min(bytes - done);
                    f(&b.data, (page - data) as usize + skip, done..done + n);
                    done += n;
                }
            };
            spread(&b, &mut |d, at, range| d.write(at, &want[range]));
            let prp1 = pages[0] + first;
            let status = b.run(NvmOpcode::WRITE, blocks, prp1, lists + offset);
            assert_eq!(status, Status::SUCCESS);
            b.data.fill(0xEE);
            let status = b.run(NvmOpcode::READ, blocks, prp1, lists + offset);
            assert_eq!(status, Status::SUCCESS);
            let mut got = vec![0; bytes];
            spread(&b, &mut |d, at, range| d.read(at, &mut got[range]));
            assert!(
                got == want,
                "list at {offset}, {blocks} blocks, data at {first}"
            );
        }
    }
}

#[test]
fn lists_that_point_to_themselves_end() {
    let mut b = Bench::new();
    let lists = b.lists.addr();
    // Every entry of the page is the page: as list, as chain, as data.
    b.list(0, &[lists; 512]);
    for offset in [0, 2048, 4096 - 16, 4096 - 8] {
        for blocks in [24, 64, 2048] {
            let status = b.run(NvmOpcode::WRITE, blocks, lists, lists + offset);
            assert_eq!(status, Status::SUCCESS, "list at {offset}, {blocks} blocks");
        }
    }
    // A read overwrites the list it is described by, while it is walked or after: any answer, but an answer.
    b.run(NvmOpcode::READ, 2048, lists, lists + PAGE - 8);
    b.guest.identify_controller().unwrap();
}

#[test]
fn a_transfer_may_cross_regions_of_memory() {
    let mut b = Bench::new();
    let top = 8 << 20;
    b.guest.device().add_memory(top, 1 << 20).unwrap();
    let status = b.run(NvmOpcode::WRITE, 16, top - PAGE, top);
    assert_eq!(status, Status::SUCCESS);
    let status = b.run(NvmOpcode::READ, 16, top - PAGE, top);
    assert_eq!(status, Status::SUCCESS);
    // An unaligned block across the border.
    let status = b.run(NvmOpcode::READ, 1, top - 4, top);
    assert_eq!(status, Status::SUCCESS);
}
