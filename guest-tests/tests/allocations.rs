//! No allocation on the way of a command: not in the daemon, not in the driver.

#![expect(unsafe_code, reason = "the fence: a global allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use guest_tests::daemon::{Disk, Plan, TestDaemon, pollers, queue};
use guest_tests::io::{Io, LIMIT};
use nvme_spec::Status;
use nvme_spec::opcode::NvmOpcode;
use vhost_user_nvme::poller::IdlePolicy;

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: all is handed to the system's allocator as it comes; counting touches no memory of theirs.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: our caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: our caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: our caller's promise.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// `count` commands, `depth` at a time, of `blocks` blocks.
fn run(io: &mut Io, opcode: NvmOpcode, count: u64, depth: u64, blocks: u32) {
    let sqe = io.command(8, blocks).to_sqe(opcode, 0, 0);
    let (addr, len) = (io.data.addr(), blocks * io.block);
    let (mut begun, mut done) = (0, 0);
    let start = Instant::now();
    while done < count {
        while begun < count && begun - done < depth {
            io.pair.submit_data(sqe, addr, len, begun).unwrap();
            begun += 1;
        }
        io.pair.ring();
        done += u64::from(
            io.pair
                .poll(64, |c| assert_eq!(c.status(), Status::SUCCESS)),
        );
        assert!(start.elapsed() < LIMIT);
    }
}

/// One test: there is one counter.
#[test]
fn commands_allocate_nothing() {
    for idle in [IdlePolicy::Poll, IdlePolicy::Adaptive] {
        allocate_nothing(idle);
    }
}

fn allocate_nothing(idle: IdlePolicy) {
    let dir = tempfile::tempdir().unwrap();
    let disks = vec![
        (1, Disk::memory(9, 4096)),
        (2, Disk::null(9, 4096)),
        (3, Disk::file(&dir.path().join("disk"), 9, 4096)),
    ];
    let daemon = TestDaemon::start(vec![Plan::many(disks)], &pollers(1, idle));
    let mut guest = daemon.guest();
    guest.enable_doorbell_buffer(&mut []).unwrap();
    let mut all: Vec<_> = (1..=3)
        .map(|nsid| Io::new(&mut guest, queue(nsid as u16, 64), nsid))
        .collect();
    // Once through everything: what is made when it is first needed is made.
    let round = |all: &mut Vec<Io>, count| {
        for io in all {
            for opcode in [NvmOpcode::WRITE, NvmOpcode::READ, NvmOpcode::COMPARE] {
                for (depth, blocks) in [(1, 1), (32, 8), (8, 2048)] {
                    run(
                        io,
                        opcode,
                        count / u64::from(blocks).min(count / 8).max(1),
                        depth,
                        blocks,
                    );
                }
            }
        }
    };
    round(&mut all, 400);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    round(&mut all, 800);
    let made = ALLOCATIONS.load(Ordering::Relaxed) - before;
    assert_eq!(made, 0, "allocations in steady I/O ({idle:?})");
}
