//! SGLs: data in any pieces, on every store, and the status of each mistake.

use guest_tests::daemon::{Disk, Plan, TestDaemon};
use guest_tests::io::{self, LIMIT};
use guest_tests::raw::{self, Guest, RawCq, RawSq};
use guest_tests::rng::Rng;
use nvme_spec::nvm::{DatasetManagement, DsmRange, Flush, ReadWrite};
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::sgl::Descriptor;
use nvme_spec::{Sqe, Status};
use vhost_user_nvme::driver::Dma;
use zerocopy::IntoBytes as _;

struct Bench {
    _daemon: TestDaemon,
    guest: Guest,
    sq: RawSq,
    cq: RawCq,
    data: Dma,
    lists: Dma,
}

impl Bench {
    fn new(plan: Plan) -> Self {
        let daemon = TestDaemon::one(plan);
        let mut guest = daemon.guest();
        let (sq, cq) = raw::create_pair(&mut guest, 1, 16).unwrap();
        let data = guest.device().memory().allocate(2 << 20).unwrap();
        let lists = guest.device().memory().allocate(32 * 4096).unwrap();
        Self {
            _daemon: daemon,
            guest,
            sq,
            cq,
            data,
            lists,
        }
    }

    fn run(&mut self, sqe: Sqe) -> Status {
        self.sq.submit(&[sqe.with_cid(0x1234)]);
        let cqe = self.cq.wait(LIMIT).expect("an answer");
        assert_eq!((cqe.cid, cqe.sqhd), (0x1234, self.sq.tail));
        cqe.status()
    }

    /// A read of a block by this descriptor.
    fn read(&mut self, first: Descriptor) -> Status {
        self.run(first.put(read()))
    }

    /// Pieces of 512 bytes altogether, that do not touch.
    fn pieces(&self, count: u32) -> Vec<(u64, u32)> {
        let rest = 512 - (count - 1) * 4;
        let each = |i| (self.data.addr() + 64 + u64::from(i) * 8, 4);
        let mut pieces: Vec<_> = (0..count - 1).map(each).collect();
        pieces.push((self.data.addr() + (1 << 20), rest));
        pieces
    }
}

fn read() -> Sqe {
    ReadWrite::new(1, 0, 0).to_sqe(NvmOpcode::READ, 0, 0)
}

/// Pieces of dwords that add up to `bytes`, in any order in memory, never touching: offset and length.
fn scatter(rng: &mut Rng, bytes: u32, most: u64) -> Vec<(usize, u32)> {
    let count = 1 + rng.below(most.min(u64::from(bytes / 4)));
    let mut cuts: Vec<u32> = (1..count)
        .map(|_| 4 * (1 + rng.below(u64::from(bytes) / 4 - 1)) as u32)
        .collect();
    cuts.extend([0, bytes]);
    cuts.sort_unstable();
    cuts.dedup();
    let mut pieces: Vec<(usize, u32)> = cuts.windows(2).map(|w| (0, w[1] - w[0])).collect();
    let mut order: Vec<usize> = (0..pieces.len()).collect();
    for i in (1..order.len()).rev() {
        order.swap(i, rng.below(i as u64 + 1) as usize);
    }
    let mut at = 0;
    for i in order {
        at += 4 * (1 + rng.below(64)) as usize;
        pieces[i].0 = at;
        at += pieces[i].1 as usize;
    }
    pieces
}

fn round_trips(disk: Disk, block: u32) {
    let mut b = Bench::new(Plan::of(disk));
    let mut rng = Rng::new(u64::from(block));
    for round in 0..60 {
        let blocks = match round % 6 {
            0 => (1 << 20) / block,
            _ => 1 + rng.below(32) as u32,
        };
        let bytes = blocks * block;
        let most = [1, 3, 40, 250][rng.below(4) as usize];
        let pieces = scatter(&mut rng, bytes, most);
        let list: Vec<(u64, u32)> = pieces
            .iter()
            .map(|&(at, n)| (b.data.addr() + at as u64, n))
            .collect();
        // Segments of any size, not aligned to more than they must be.
        let segment = 1 + rng.below(100) as usize;
        let first = io::sgl(&b.lists, 8 * rng.below(64) as usize, &list, segment);
        let mut want = vec![0; bytes as usize];
        rng.fill(&mut want);
        let put = |data: &Dma, want: &[u8]| {
            let mut done = 0;
            for &(at, n) in &pieces {
                data.write(at, &want[done..done + n as usize]);
                done += n as usize;
            }
        };
        put(&b.data, &want);
        let command = ReadWrite::new(1, rng.below(64), (blocks - 1) as u16);
        let said = format!("round {round}: {blocks} blocks in {} pieces", pieces.len());
        let status = b.run(first.put(command.to_sqe(NvmOpcode::WRITE, 0, 0)));
        assert_eq!(status, Status::SUCCESS, "{said}");
        let status = b.run(first.put(command.to_sqe(NvmOpcode::COMPARE, 0, 0)));
        assert_eq!(status, Status::SUCCESS, "{said}");
        b.data.fill(0xEE);
        let status = b.run(first.put(command.to_sqe(NvmOpcode::READ, 0, 0)));
        assert_eq!(status, Status::SUCCESS, "{said}");
        let mut got = Vec::with_capacity(want.len());
        for &(at, n) in &pieces {
            let mut piece = vec![0; n as usize + 4];
            b.data.read(at, &mut piece);
            assert_eq!(piece[n as usize..], [0xEE; 4], "{said}: beyond the piece");
            got.extend_from_slice(&piece[..n as usize]);
        }
        assert!(got == want, "{said}");
        // What is not the same is seen in any piece.
        let (at, _) = pieces[rng.below(pieces.len() as u64) as usize];
        put(&b.data, &want);
        let mut other = [0; 1];
        b.data.read(at, &mut other);
        b.data.write(at, &[other[0] ^ 0x80]);
        let status = b.run(first.put(command.to_sqe(NvmOpcode::COMPARE, 0, 0)));
        assert_eq!(status, Status::COMPARE_FAILURE, "{said}");
    }
}

#[test]
fn memory_in_any_pieces() {
    round_trips(Disk::memory(9, 8192), 512);
    round_trips(Disk::memory(12, 1024), 4096);
}

#[test]
fn files_in_any_pieces() {
    let dir = tempfile::tempdir().unwrap();
    round_trips(Disk::file(&dir.path().join("small"), 9, 8192), 512);
    round_trips(Disk::file(&dir.path().join("large"), 12, 1024), 4096);
}

#[test]
fn mistakes_have_their_status() {
    let mut b = Bench::new(Plan::of(Disk::memory(9, 8192)));
    let (data, lists) = (b.data.addr(), b.lists.addr());
    let one = Descriptor::data(data, 512);
    let (segment, number) = (
        Status::INVALID_SGL_SEGMENT_DESCRIPTOR,
        Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS,
    );
    let length = Status::DATA_SGL_LENGTH_INVALID;
    let hole = 0xFFFF_F000_0000;
    for (first, list, status) in [
        (one, vec![], Status::SUCCESS),
        (Descriptor::data(data, 508), vec![], length),
        (Descriptor::data(data, 1024), vec![], length),
        (
            Descriptor::data(data + 1, 512),
            vec![],
            Status::SGL_DATA_BLOCK_GRANULARITY_INVALID,
        ),
        (
            Descriptor::data(hole, 512),
            vec![],
            Status::DATA_TRANSFER_ERROR,
        ),
        (
            Descriptor::last_segment(hole, 1),
            vec![],
            Status::DATA_TRANSFER_ERROR,
        ),
        (Descriptor::segment(lists, 1), vec![one], segment),
        (Descriptor::last_segment(lists + 4, 1), vec![one], segment),
        (Descriptor::last_segment(lists, 0), vec![one], segment),
        (
            Descriptor::last_segment(lists, 1),
            vec![Descriptor::last_segment(lists, 1)],
            segment,
        ),
        (
            Descriptor::segment(lists, 1),
            vec![Descriptor::segment(lists, 1)],
            number,
        ),
        (
            Descriptor::last_segment(lists, 2),
            vec![Descriptor::last_segment(lists, 1), one],
            number,
        ),
        (Descriptor::last_segment(lists, 1025), vec![one], number),
        (
            Descriptor {
                identifier: 0x10,
                ..one
            },
            vec![],
            Status::SGL_DESCRIPTOR_TYPE_INVALID,
        ),
        (
            Descriptor {
                identifier: 0x01,
                ..one
            },
            vec![],
            Status::SGL_DESCRIPTOR_TYPE_INVALID,
        ),
        (
            Descriptor {
                identifier: 0xF0,
                ..one
            },
            vec![],
            Status::SGL_DESCRIPTOR_TYPE_INVALID,
        ),
    ] {
        b.lists.write(0, list.as_bytes());
        for opcode in [NvmOpcode::READ, NvmOpcode::WRITE, NvmOpcode::COMPARE] {
            let sqe = ReadWrite::new(1, 0, 0).to_sqe(opcode, 0, 0);
            let got = b.run(first.put(sqe));
            assert_eq!(got, status, "{opcode:?} {first:?} {list:?}");
        }
    }
    // Where the data is more pieces than a transfer can have; blocks of nothing do not count.
    let pieces = b.pieces(100);
    let few = io::sgl(&b.lists, 0, &pieces, 128);
    assert_eq!(b.read(few), Status::SUCCESS);
    let mut many: Vec<_> = (0..257).map(|i| (data + i * 16, 4)).collect();
    let blocks = 3;
    many.push((data + (1 << 20), blocks * 512 - 257 * 4));
    let sqe = ReadWrite::new(1, 0, blocks as u16 - 1).to_sqe(NvmOpcode::READ, 0, 0);
    let first = io::sgl(&b.lists, 0, &many, 300);
    assert_eq!(b.run(first.put(sqe)), number);
    many[1].1 = 0;
    many[2].1 = 8;
    many[3].0 += 4;
    let first = io::sgl(&b.lists, 0, &many, 300);
    assert_eq!(b.run(first.put(sqe)), Status::SUCCESS);

    // PSDT 10b says that the metadata pointer is an SGL, which is not offered; 11b says nothing. Nor are there fused commands.
    for flags in [0x80, 0xC0, 0x41, 0x42, 0x01] {
        let sqe = Sqe {
            flags,
            ..one.put(read())
        };
        assert_eq!(b.run(sqe), Status::INVALID_FIELD, "{flags:#x}");
    }
    b.guest.identify_controller().unwrap();
}

#[test]
fn commands_with_other_data_or_none() {
    let mut b = Bench::new(Plan::of(Disk::memory(9, 8192)));
    let data = b.data.addr();
    b.data.fill(0x5A);
    let write = ReadWrite::new(1, 8, 15).to_sqe(NvmOpcode::WRITE, 0, 0);
    let status = b.run(Descriptor::data(data, 8192).put(write));
    assert_eq!(status, Status::SUCCESS);

    // A range of Dataset Management, in two halves.
    let range = DsmRange {
        cattr: 0,
        nlb: 8,
        slba: 8,
    };
    let (one, two) = range.as_bytes().split_at(8);
    b.data.write(0x4000, one);
    b.data.write(0x3000, two);
    let pieces = [(data + 0x4000, 8), (data + 0x3000, 8)];
    let dsm = DatasetManagement {
        nsid: 1,
        nr_z: 0,
        ad: true,
        ..DatasetManagement::default()
    };
    let first = io::sgl(&b.lists, 0, &pieces, 1);
    assert_eq!(b.run(first.put(dsm.to_sqe(0, 0))), Status::SUCCESS);
    let short = Descriptor::data(data + 0x4000, 8);
    let status = b.run(short.put(dsm.to_sqe(0, 0)));
    assert_eq!(status, Status::DATA_SGL_LENGTH_INVALID);
    let read = ReadWrite::new(1, 8, 15).to_sqe(NvmOpcode::READ, 0, 0);
    let status = b.run(Descriptor::data(data, 8192).put(read));
    assert_eq!(status, Status::SUCCESS);
    let got = b.data.bytes(8192);
    assert!(got[..4096].iter().all(|b| *b == 0), "deallocated");
    assert!(got[4096..].iter().all(|b| *b == 0x5A), "and no more");

    // Without data there is nothing to be judged.
    let nothing = Descriptor {
        identifier: 0xFF,
        ..Descriptor::default()
    };
    let zeroes = ReadWrite::new(1, 12, 0).to_sqe(NvmOpcode::WRITE_ZEROES, 0, 0);
    for sqe in [zeroes, Flush { nsid: 1 }.to_sqe()] {
        assert_eq!(b.run(nothing.put(sqe)), Status::SUCCESS);
    }
}

#[test]
fn where_they_are_not_offered_they_are_refused() {
    let mut offered = Bench::new(Plan::of(Disk::memory(9, 64)));
    let sgls = offered.guest.identify_controller().unwrap().sgls;
    assert_eq!((sgls.supported(), sgls.threshold()), (2, 255));
    assert!(!sgls.bit_bucket() && !sgls.larger_than_data() && !sgls.mptr_sgl());

    let mut b = Bench::new(Plan {
        sgls: false,
        ..Plan::of(Disk::memory(9, 64))
    });
    assert_eq!(b.guest.identify_controller().unwrap().sgls.into_bits(), 0);
    let first = Descriptor::data(b.data.addr(), 512);
    assert_eq!(b.read(first), Status::INVALID_FIELD);
    let prp = read().with_prps(b.data.addr(), 0);
    assert_eq!(b.run(prp), Status::SUCCESS);
}
