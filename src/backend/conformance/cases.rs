//! The cases of the suite, one function each.

use std::time::Duration;

use nvme_spec::Status;

use super::Promise;
use super::client::{Client, Layout, pattern};
use crate::backend::{Backend, Cancelled, Operation};

const WRITE: Operation = Operation::Write { fua: false };

fn zeroes(deallocate: bool, fua: bool) -> Operation {
    Operation::WriteZeroes { deallocate, fua }
}

/// Every operation works on the first and on the last block, and touches no other.
pub(super) fn boundaries(backend: &Backend, promise: Promise) {
    let g = backend.geometry();
    let block = g.block_size() as usize;
    let mut c = Client::new(backend, 4);
    c.wipe();
    for (seed, slba) in [(1, 0), (2, g.blocks - 1)] {
        let data = pattern(seed, block);
        for layout in [
            Layout::Whole(0),
            Layout::Pages(block / 2),
            Layout::Crumbs(100),
        ] {
            c.write(slba, &data, layout);
            let fua = Operation::Write { fua: true };
            assert_eq!(c.run(fua, slba, 1, Some(&data), layout), Status::SUCCESS);
            let read = c.read(slba, 1, layout);
            let same = c.run(Operation::Compare, slba, 1, Some(&data), layout);
            assert_eq!(same, Status::SUCCESS);
            assert_eq!(c.plain(Operation::Verify, slba, 1), Status::SUCCESS);
            assert_eq!(c.plain(Operation::Flush, 0, 0), Status::SUCCESS);
            if promise.stores {
                assert_eq!(read, data);
                let neighbour = if slba == 0 { 1 } else { slba - 1 };
                assert_eq!(c.read(neighbour, 1, layout), vec![0; block]);
            } else {
                assert_eq!(read, vec![0xa5; block], "memory stays as it is");
            }
        }
        assert_eq!(c.plain(Operation::Deallocate, slba, 1), Status::SUCCESS);
        assert_eq!(c.plain(zeroes(true, true), slba, 1), Status::SUCCESS);
    }
    if promise.stores {
        let all = c.read(g.blocks - 8, 8, Layout::Whole(0));
        assert_eq!(all, vec![0; 8 * block]);
    }
}

/// What no checked caller asks for is refused, and nothing breaks.
pub(super) fn nonsense_is_refused(backend: &Backend) {
    let g = backend.geometry();
    let mut c = Client::new(backend, 2);
    let outside = Status::LBA_OUT_OF_RANGE;
    for (slba, blocks) in [
        (g.blocks, 1),
        (g.blocks - 1, 2),
        (u64::MAX, 1),
        (1, u32::MAX),
    ] {
        for operation in [
            Operation::Verify,
            Operation::Deallocate,
            zeroes(false, false),
        ] {
            if slba
                .checked_add(blocks.into())
                .is_some_and(|end| end <= g.blocks)
            {
                continue;
            }
            assert_eq!(c.plain(operation, slba, blocks), outside);
        }
    }
    assert_eq!(c.plain(Operation::Verify, 0, 0), Status::INVALID_FIELD);
    let short = pattern(1, g.block_size() as usize);
    for operation in [Operation::Read, WRITE, Operation::Compare] {
        let status = c.run(operation, 0, 2, Some(&short), Layout::Whole(0));
        assert_eq!(status, Status::DATA_TRANSFER_ERROR);
    }
    assert_eq!(c.cancel(0), Cancelled::Gone, "nothing is there to cancel");
    assert_eq!(c.cancel(u32::MAX), Cancelled::Gone);
}

/// 1 MiB, in one piece, in 257 segments, and in segments that fit no alignment.
pub(super) fn largest_transfer(backend: &Backend, promise: Promise) {
    let g = backend.geometry();
    let blocks = (1u32 << 20) >> g.block_shift;
    let mut c = Client::new(backend, 1);
    let layouts = [
        Layout::Whole(0),
        Layout::Pages(0),
        Layout::Pages(512),
        Layout::Pages(4),
        Layout::Whole(3),
        Layout::Crumbs(4096),
        Layout::Crumbs(513),
    ];
    for (i, layout) in layouts.into_iter().enumerate() {
        let slba = g.blocks - u64::from(blocks) - (i as u64 % 2);
        let data = pattern(i as u64 + 7, 1 << 20);
        c.write(slba, &data, layout);
        let back = c.read(slba, blocks, layouts[layouts.len() - 1 - i]);
        assert!(!promise.stores || back == data, "{layout:?}");
        assert_eq!(
            c.run(Operation::Compare, slba, blocks, Some(&data), layout),
            Status::SUCCESS
        );
        assert_eq!(c.plain(Operation::Verify, slba, blocks), Status::SUCCESS);
    }
}

/// A difference is found wherever it is.
pub(super) fn compare_everywhere(backend: &Backend) {
    let g = backend.geometry();
    let blocks = (512u32 << 10) >> g.block_shift;
    let mut c = Client::new(backend, 1);
    let mut data = pattern(99, 512 << 10);
    c.write(1, &data, Layout::Whole(0));
    let layout = Layout::Pages(64);
    for at in [
        0,
        1,
        511,
        4031,
        4032,
        4096,
        131_071,
        131_072,
        300_000,
        data.len() - 1,
    ] {
        data[at] ^= 0x80;
        let status = c.run(Operation::Compare, 1, blocks, Some(&data), layout);
        assert_eq!(status, Status::COMPARE_FAILURE, "difference at {at}");
        data[at] ^= 0x80;
    }
    let status = c.run(Operation::Compare, 1, blocks, Some(&data), layout);
    assert_eq!(status, Status::SUCCESS);
    assert_eq!(c.take(0), data, "compare only looks");
}

/// Write Zeroes, with and without leave to deallocate, and Deallocate: on and off page boundaries.
pub(super) fn zeroing(backend: &Backend) {
    let g = backend.geometry();
    let block = g.block_size() as usize;
    let total = (1u32 << 20) >> g.block_shift;
    let mut c = Client::new(backend, 1);
    let operations = [
        (zeroes(false, false), true),
        (zeroes(true, false), true),
        (zeroes(false, true), true),
        (zeroes(true, true), true),
        (Operation::Deallocate, g.deallocate_reads_zero),
    ];
    for (operation, becomes_zero) in operations {
        for (from, n) in [(0, total), (1, total - 2), (3, 1), (7, 40), (8, 16)] {
            let mut data = pattern(u64::from(n), 1 << 20);
            c.write(0, &data, Layout::Whole(0));
            assert_eq!(c.plain(operation, from.into(), n), Status::SUCCESS);
            let back = c.read(0, total, Layout::Whole(0));
            let range = from as usize * block..(from + n) as usize * block;
            if becomes_zero {
                data[range].fill(0);
                assert!(back == data, "{operation:?} {n}@{from}");
            } else {
                assert_eq!(back[..range.start], data[..range.start]);
                assert_eq!(back[range.end..], data[range.end..]);
            }
        }
    }
    // More than fits into one write or one step.
    c.wipe();
    for slba in [0, g.blocks / 2, g.blocks - 1] {
        assert_eq!(c.read(slba, 1, Layout::Whole(0)), vec![0; block]);
    }
    if g.thin {
        let before = backend.allocated_blocks();
        c.write(0, &pattern(5, 1 << 20), Layout::Whole(0));
        assert_eq!(c.plain(Operation::Flush, 0, 0), Status::SUCCESS);
        let full = backend.allocated_blocks();
        assert!(full > before, "{before} -> {full}");
        assert_eq!(c.plain(Operation::Deallocate, 0, total), Status::SUCCESS);
        assert!(backend.allocated_blocks() < full, "space comes back");
    }
}

/// As many requests as there are tags, each answered once, in any order, again and again.
pub(super) fn tags_in_any_number(backend: &Backend, promise: Promise, depth: u32) {
    let g = backend.geometry();
    let block = g.block_size() as usize;
    let mut c = Client::new(backend, depth);
    let layouts = [Layout::Whole(0), Layout::Pages(8), Layout::Crumbs(77)];
    for round in 0..3u64 {
        let place = |tag: u32| (u64::from(tag) * 7 + round) % g.blocks;
        // Places of different tags must differ: the order of overlapping commands is nobody's promise.
        let distinct = u64::from(depth) * 7 < g.blocks;
        let data = |tag: u32| pattern(round << 32 | u64::from(tag), block);
        let layout = |tag: u32| layouts[tag as usize % 3];
        for tag in 0..depth {
            let done = c.start(tag, WRITE, place(tag), 1, Some(&data(tag)), layout(tag));
            assert!(done.is_none_or(|s| s == Status::SUCCESS));
        }
        assert!(c.wait_all().iter().all(|s| *s == Status::SUCCESS));
        for tag in 0..depth {
            let done = c.start(tag, Operation::Read, place(tag), 1, None, layout(tag));
            assert!(done.is_none_or(|s| s == Status::SUCCESS));
        }
        assert!(c.wait_all().iter().all(|s| *s == Status::SUCCESS));
        for tag in 0..depth {
            assert!(!promise.stores || !distinct || c.take(tag) == data(tag));
        }
    }
    assert_eq!(c.pending(), 0);
    assert_eq!(c.poll(usize::MAX), 0);
    assert!(
        c.wakes_by_edges() || !c.wakes_within(Duration::ZERO),
        "idle, and awake"
    );
}

/// A caller with room for one result gets one, and is woken for the next.
pub(super) fn results_one_at_a_time(backend: &Backend) {
    let mut c = Client::new(backend, 8);
    let mut pending = 0;
    for tag in 0..8 {
        let done = c.start(tag, Operation::Read, tag.into(), 1, None, Layout::Whole(0));
        pending += usize::from(done.is_none());
    }
    c.flush();
    assert_eq!(c.poll(0), 0);
    while pending > 0 {
        assert!(c.wakes_within(Duration::from_secs(30)));
        let n = c.poll(1);
        assert!(n <= 1);
        pending -= n;
    }
    c.wait_all();
    assert_eq!(c.pending(), 0);
}

/// Cancelled requests are gone, or have a result; the others and their tags are as before.
pub(super) fn cancel(backend: &Backend) {
    let mut c = Client::new(backend, 64);
    for round in 0..4 {
        let mut expected = 0;
        for tag in 0..64 {
            let layout = if tag % 2 == 0 {
                Layout::Whole(0)
            } else {
                Layout::Whole(3)
            };
            let done = c.start(tag, Operation::Read, 0, 16, None, layout);
            expected += usize::from(done.is_none());
        }
        if round % 2 == 1 {
            c.flush();
        }
        for tag in (0..64).step_by(1 + round) {
            let pending = c.pending();
            if c.cancel(tag) == Cancelled::Gone {
                expected -= pending - c.pending();
            }
        }
        let results = c.wait_all();
        assert_eq!(results.len(), expected, "each request ends once");
        for status in results {
            assert!(status == Status::SUCCESS || status == Status::ABORT_REQUESTED);
        }
        assert_eq!(c.pending(), 0);
    }
    c.read(0, 16, Layout::Pages(0));
}

/// A channel that is dropped in the middle of its work leaves memory alone, and the store usable.
pub(super) fn drop_with_pending(backend: &Backend) {
    for flushed in [false, true] {
        let mut c = Client::new(backend, 128);
        for tag in 0..128 {
            let operation = match tag % 4 {
                0 => zeroes(true, true),
                1 => Operation::Deallocate,
                _ => Operation::Read,
            };
            let layout = Layout::Pages(tag as usize % 8);
            let _ = c.start(tag, operation, u64::from(tag), 32, None, layout);
        }
        if flushed {
            c.flush();
        }
        c.drop_channel();
    }
    Client::new(backend, 1).read(0, 8, Layout::Whole(0));
}

/// What one channel wrote the other reads; both at once, on threads of their own, do not disturb each other.
pub(super) fn two_channels(backend: &Backend, promise: Promise) {
    let g = backend.geometry();
    let block = g.block_size() as usize;
    let mut a = Client::new(backend, 4);
    let mut b = Client::new(backend, 4);
    let data = pattern(1234, 3 * block);
    a.write(5, &data, Layout::Whole(0));
    let back = b.read(5, 3, Layout::Pages(0));
    assert!(!promise.stores || back == data);
    let half = (1u64 << 20) >> g.block_shift;
    std::thread::scope(|s| {
        for (mut c, base) in [(a, 0), (b, half)] {
            s.spawn(move || {
                for i in 0..200u64 {
                    let slba = base + i * 13 % (half - 8);
                    let data = pattern(base + i, 8 * block);
                    c.write(slba, &data, Layout::Pages(16 * (i as usize % 4)));
                    let back = c.read(slba, 8, Layout::Whole(0));
                    assert!(!promise.stores || back == data);
                }
            });
        }
    });
}

/// A read-only store reads, and refuses all that writes.
pub(super) fn read_only(backend: &Backend) {
    let block = backend.geometry().block_size() as usize;
    let mut c = Client::new(backend, 2);
    let before = c.read(0, 4, Layout::Whole(0));
    let data = pattern(3, 4 * block);
    let refused = Status::ATTEMPTED_WRITE_TO_READ_ONLY;
    for fua in [false, true] {
        let write = Operation::Write { fua };
        assert_eq!(c.run(write, 0, 4, Some(&data), Layout::Whole(0)), refused);
        assert_eq!(c.plain(zeroes(fua, !fua), 0, 4), refused);
    }
    assert_eq!(c.plain(Operation::Deallocate, 0, 4), refused);
    assert_eq!(c.plain(Operation::Flush, 0, 0), Status::SUCCESS);
    assert_eq!(c.plain(Operation::Verify, 0, 4), Status::SUCCESS);
    assert_eq!(c.read(0, 4, Layout::Pages(0)), before);
}
