//! Nothing is allocated for an I/O once a channel is open: no backend may surprise a poller with a lock inside `malloc`.

#![expect(unsafe_code, reason = "an allocator, and the unsafe `Channel::submit`")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::{Duration, Instant};

use nvme_spec::Status;
use vhost_user_nvme::backend::{
    Backend, Channel, FileOptions, HugePages, IoPoll, MemoryOptions, NullOptions, Operation,
    Request, Submitted,
};
use vhost_user_nvme::memory::{Buffers, HostSeg};

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

/// Counts what this thread allocates.
struct Counting;

// SAFETY: all is done by `System`.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.set(COUNT.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const DEPTH: u32 = 16;
const BLOCKS: u32 = 512;

fn allocations_per_steady_state(backend: &Backend) -> u64 {
    let mut channel = backend.channel(DEPTH).unwrap();
    let mut bytes = vec![0u8; (BLOCKS as usize) << 9];
    // In odd pieces, so that the file needs its bounce buffers.
    let mut segs: Vec<_> = bytes.chunks_mut(1000).map(HostSeg::of_slice).collect();
    segs.reserve(1);
    let mut out = Vec::with_capacity(DEPTH as usize);
    let zeroes = Operation::WriteZeroes {
        deallocate: true,
        fua: true,
    };
    let operations = [
        Operation::Write { fua: false },
        Operation::Read,
        Operation::Compare,
        Operation::Verify,
        Operation::Flush,
        zeroes,
        Operation::Deallocate,
    ];
    let start = Instant::now();
    let mut round = |channel: &mut vhost_user_nvme::backend::AnyChannel| {
        for operation in operations {
            let mut waiting = 0;
            for tag in 0..DEPTH {
                let data = if operation.moves_data() {
                    // SAFETY: `bytes` and `segs` outlive the channel's use of them, and are not looked at meanwhile.
                    unsafe { Buffers::new(&segs) }
                } else {
                    Buffers::NONE
                };
                let request = Request {
                    operation,
                    slba: 0,
                    blocks: if operation == Operation::Flush {
                        0
                    } else {
                        BLOCKS
                    },
                    data,
                };
                // SAFETY: as above.
                match unsafe { channel.submit(tag, &request) } {
                    Submitted::Done(status) => assert_eq!(status, Status::SUCCESS),
                    Submitted::Pending => waiting += 1,
                }
            }
            channel.flush();
            while waiting > 0 {
                assert!(start.elapsed() < Duration::from_secs(60), "{operation:?}");
                out.clear();
                channel.poll(&mut out);
                assert!(out.iter().all(|f| f.status == Status::SUCCESS));
                waiting -= out.len();
                std::thread::yield_now();
            }
        }
    };
    round(&mut channel);
    let before = COUNT.get();
    for _ in 0..5 {
        round(&mut channel);
    }
    COUNT.get() - before
}

#[test]
fn a_poller_never_allocates() {
    let probe = COUNT.get();
    drop(std::hint::black_box(Box::new(1)));
    assert_eq!(COUNT.get(), probe + 1, "the counter counts");

    let null = Backend::null(NullOptions {
        block_shift: 9,
        blocks: 1 << 20,
        read_only: false,
    });
    assert_eq!(allocations_per_steady_state(&null.unwrap()), 0, "null");

    let memory = Backend::memory(MemoryOptions {
        block_shift: 9,
        blocks: 8192,
        read_only: false,
        huge_pages: HugePages::Never,
    });
    assert_eq!(allocations_per_steady_state(&memory.unwrap()), 0, "memory");

    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.as_file().set_len(4 << 20).unwrap();
    let file = Backend::file(FileOptions {
        path: file.path().to_owned(),
        block_shift: 9,
        read_only: false,
        direct: true,
        iopoll: IoPoll::Auto,
    });
    assert_eq!(allocations_per_steady_state(&file.unwrap()), 0, "tmpfs");

    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4 << 20).unwrap();
    let file = Backend::file(FileOptions {
        path: file.path().to_owned(),
        block_shift: 9,
        read_only: false,
        direct: true,
        iopoll: IoPoll::Auto,
    });
    assert_eq!(allocations_per_steady_state(&file.unwrap()), 0, "file");
}
