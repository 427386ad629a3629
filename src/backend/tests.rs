//! The conformance suite on each backend, and what only the file backend can get wrong.

#![expect(
    unsafe_code,
    reason = "one test hands the kernel memory that is not there"
)]

mod devices;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nvme_spec::Status;
use tempfile::TempDir;

use super::conformance::{self, Client, Layout, Promise};
use super::*;

const MIB: u64 = 1 << 20;
const STORES: Promise = Promise {
    stores: true,
    streams: 12,
};
const WRITE: Operation = Operation::Write { fua: false };

fn memory(block_shift: u32, bytes: u64) -> Backend {
    Backend::memory(MemoryOptions {
        block_shift,
        blocks: bytes >> block_shift,
        read_only: false,
        huge_pages: HugePages::IfFree,
    })
    .unwrap()
}

fn null(read_only: bool) -> Backend {
    Backend::null(NullOptions {
        block_shift: 9,
        blocks: 1 << 40,
        read_only,
    })
    .unwrap()
}

fn make(dir: &Path, name: &str, bytes: u64) -> PathBuf {
    let path = dir.join(name);
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

fn file_options(path: &Path, block_shift: u32, direct: bool) -> FileOptions {
    FileOptions {
        path: path.to_owned(),
        block_shift,
        read_only: false,
        direct,
        iopoll: IoPoll::Auto,
        after: Default::default(),
    }
}

fn open(path: &Path, block_shift: u32, direct: bool) -> Backend {
    Backend::file(file_options(path, block_shift, direct)).unwrap()
}

fn is_direct(backend: &Backend) -> bool {
    matches!(backend, Backend::File(f) if f.is_direct())
}

/// A directory on a disk's file system: next to this test program, which `/tmp` need not be.
fn on_disk() -> TempDir {
    let program = std::env::current_exe().unwrap();
    tempfile::tempdir_in(program.parent().unwrap()).unwrap()
}

fn on_tmpfs() -> TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

#[test]
fn null_conforms() {
    let promise = Promise {
        stores: false,
        streams: 0,
    };
    conformance::run(&null(false), promise);
    conformance::run(&null(true), promise);
}

#[test]
fn memory_conforms() {
    for (block_shift, bytes) in [(9, 8 * MIB), (12, 16 * MIB), (9, 3 * MIB + 512)] {
        conformance::run(&memory(block_shift, bytes), STORES);
    }
}

#[test]
fn wrappers_pass_through() {
    let (backend, faults) = memory(9, 4 * MIB).with_faults();
    conformance::run(&backend, STORES);
    let (backend, delays) = backend.with_delays();
    conformance::run(&backend, STORES);
    // Everything waits a little, and everything is as it was.
    delays.add(Rule::always(
        Operations::ALL,
        Delay(Duration::from_micros(50)),
    ));
    faults.add(Rule::always(Operations::ALL, Fault::Fail(Status::INTERNAL_ERROR)).after(u64::MAX));
    let few = Promise {
        streams: 2,
        ..STORES
    };
    conformance::run(&backend, few);
    assert!(
        backend
            .describe()
            .starts_with("delays over faults over memory")
    );
}

#[test]
fn files_on_disk_conform() {
    let dir = on_disk();
    let path = make(dir.path(), "disk", 8 * MIB);
    for block_shift in [9, 12] {
        for direct in [true, false] {
            let backend = open(&path, block_shift, direct);
            if direct && !is_direct(&backend) {
                eprintln!("NOT TESTED: O_DIRECT with blocks of 2^{block_shift} bytes on this disk");
            }
            conformance::run(&backend, STORES);
        }
    }
}

#[test]
fn files_on_tmpfs_conform() {
    let dir = on_tmpfs();
    let path = make(dir.path(), "disk", 3 * MIB + 512);
    for direct in [true, false] {
        conformance::run(&open(&path, 9, direct), STORES);
    }
    File::create(&path).unwrap().set_len(4 * MIB).unwrap();
    conformance::run(&open(&path, 12, true), STORES);
}

#[test]
fn read_only_files_conform() {
    let dir = on_disk();
    let path = make(dir.path(), "disk", 2 * MIB);
    let backend = Backend::file(FileOptions {
        read_only: true,
        ..file_options(&path, 9, true)
    })
    .unwrap();
    conformance::run(&backend, STORES);
}

#[test]
fn more_requests_than_the_ring_has_room_for_wait() {
    let dir = on_disk();
    let path = make(dir.path(), "disk", 2 * MIB);
    let depth = 5000;
    let mut c = Client::new(&open(&path, 9, true), depth);
    for round in 0..2 {
        for tag in 0..depth {
            let done = c.start(tag, Operation::Flush, 0, 0, None, Layout::Whole(0));
            assert_eq!(done, None);
        }
        // The last ones never got into the ring.
        assert_eq!(c.cancel(depth - 1), Cancelled::Gone);
        let statuses = c.wait_all();
        assert_eq!(statuses.len() as u32, depth - 1, "round {round}");
        assert!(statuses.iter().all(|s| *s == Status::SUCCESS));
    }
}

#[test]
fn data_is_where_others_expect_it() {
    use std::os::unix::fs::FileExt;
    let dir = on_disk();
    let path = make(dir.path(), "disk", 2 * MIB);
    let mut c = Client::new(&open(&path, 12, true), 1);
    c.write(3, &[0x5a; 8192], Layout::Pages(4));
    assert_eq!(c.plain(Operation::Flush, 0, 0), Status::SUCCESS);
    let mut bytes = [0; 8194];
    let file = File::open(&path).unwrap();
    file.read_exact_at(&mut bytes, 3 * 4096 - 1).unwrap();
    assert_eq!((bytes[0], bytes[8193]), (0, 0));
    assert!(bytes[1..8193].iter().all(|b| *b == 0x5a));
}

#[test]
fn a_file_cut_short_is_an_error_and_no_stale_success() {
    let dir = on_disk();
    for (direct, layout) in [
        (true, Layout::Whole(0)),
        (true, Layout::Whole(4)),
        (false, Layout::Pages(8)),
    ] {
        let path = make(dir.path(), "disk", 2 * MIB);
        let mut c = Client::new(&open(&path, 9, direct), 1);
        // In the middle of block 2000, which no aligned read can reach.
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(2000 * 512 + 100).unwrap();
        let failed = Status::UNRECOVERED_READ_ERROR;
        for (slba, blocks) in [(1990, 30), (1000, 2048), (2000, 1), (2001, 1), (4095, 1)] {
            let status = c.run(Operation::Read, slba, blocks, None, layout);
            assert_eq!(status, failed, "{blocks}@{slba} {layout:?}");
            let blocks = blocks.min(100);
            assert_eq!(c.plain(Operation::Verify, 2000, blocks), failed);
            let data = vec![0; (blocks as usize) << 9];
            let compare = c.run(Operation::Compare, 2000, blocks, Some(&data), layout);
            assert_eq!(compare, failed);
        }
        assert_eq!(c.read(1999, 1, layout), vec![0; 512]);
        // A write makes it longer again.
        c.write(2000, &[1; 512], layout);
        assert_eq!(c.read(2000, 1, layout), vec![1; 512]);
    }
}

#[test]
fn a_file_on_tmpfs_cut_short_is_an_error_too() {
    let dir = on_tmpfs();
    let path = make(dir.path(), "disk", 2 * MIB);
    let mut c = Client::new(&open(&path, 12, true), 1);
    c.write(0, &vec![3; MIB as usize], Layout::Whole(0));
    c.read(0, 256, Layout::Whole(0));
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(100 * 4096).unwrap();
    let failed = Status::UNRECOVERED_READ_ERROR;
    for layout in [Layout::Whole(0), Layout::Pages(8)] {
        for (slba, blocks) in [(99, 2), (100, 1), (150, 100), (511, 1)] {
            assert_eq!(c.run(Operation::Read, slba, blocks, None, layout), failed);
            assert_eq!(c.plain(Operation::Verify, slba, blocks), failed);
        }
        assert_eq!(c.read(99, 1, layout), vec![3; 4096]);
    }
    // A write makes it longer again, and is where others look for it.
    c.write(200, &[4; 4096], Layout::Whole(0));
    assert_eq!(c.read(200, 1, Layout::Whole(0)), vec![4; 4096]);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 201 * 4096);
    assert_eq!(c.read(150, 1, Layout::Whole(0)), vec![0; 4096]);
}

#[test]
fn holes_of_a_file_on_tmpfs_are_read_without_being_filled() {
    use std::os::unix::fs::MetadataExt;
    let dir = on_tmpfs();
    let path = make(dir.path(), "disk", 64 * MIB);
    let backend = open(&path, 12, true);
    let mut c = Client::new(&backend, 1);
    let blocks = || std::fs::metadata(&path).unwrap().blocks();
    for _ in 0..2 {
        assert_eq!(c.read(0, 256, Layout::Pages(0)), vec![0; MIB as usize]);
    }
    assert_eq!(blocks(), 0);
    c.write(5, &[6; 8192], Layout::Whole(0));
    assert_eq!((blocks(), backend.allocated_blocks()), (16, 2));
    // Small ranges at once, large ones by the ring; then they are holes again.
    for n in [8, 16 * 1024 - 8] {
        c.write(5, &[6; 8192], Layout::Whole(0));
        assert_eq!(c.plain(Operation::Deallocate, 0, n), Status::SUCCESS);
        assert_eq!(c.read(0, 8, Layout::Whole(0)), vec![0; 8 * 4096]);
        assert_eq!(blocks(), 0);
    }
}

#[test]
fn polling_is_refused_where_there_is_nothing_to_poll() {
    let dir = on_tmpfs();
    let path = make(dir.path(), "disk", MIB);
    let required = FileOptions {
        iopoll: IoPoll::Required,
        ..file_options(&path, 9, true)
    };
    let e = Backend::file(required).err().unwrap().to_string();
    assert!(e.contains("page cache") && e.contains("iopoll"), "{e}");
}

#[test]
fn what_is_no_ssd_is_not_passed_through() {
    let error = |path: &Path| {
        let options = PassthroughOptions {
            path: path.into(),
            read_only: true,
            after: Default::default(),
        };
        let e = Backend::passthrough(options).err().unwrap().to_string();
        assert!(e.contains("/dev/ng"), "{e}");
        e
    };
    let dir = on_disk();
    assert!(error(&make(dir.path(), "disk", 4096)).contains("no NVMe generic device"));
    assert!(error(Path::new("/dev/zero")).contains("no NVMe generic device"));
    assert!(error(&dir.path().join("none")).contains("cannot open"));
}

#[test]
fn memory_that_is_not_there_is_a_transfer_error() {
    let dir = on_disk();
    let path = make(dir.path(), "disk", 2 * MIB);
    for direct in [true, false] {
        let backend = open(&path, 9, direct);
        let mut channel = backend.channel(1).unwrap();
        // SAFETY: a new mapping without rights, never used by anybody but the kernel, which answers EFAULT. It stays, so that no other test
        // comes to have memory there.
        let segs = unsafe {
            use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
            let (none, flags) = (std::ptr::null_mut(), MapFlags::PRIVATE);
            let gone = mmap_anonymous(none, 8192, ProtFlags::empty(), flags).unwrap();
            [crate::memory::HostSeg::of_raw(gone.cast(), 4096)]
        };
        for operation in [WRITE, Operation::Read] {
            let request = Request {
                operation,
                slba: 0,
                blocks: 8,
                // SAFETY: it does not keep the promise, which is the test: only the kernel looks at it.
                data: unsafe { crate::memory::Buffers::new(&segs) },
                guest: None,
            };
            // SAFETY: as above.
            assert_eq!(unsafe { channel.submit(0, &request) }, Submitted::Pending);
            let mut out = Vec::with_capacity(1);
            let start = Instant::now();
            while out.is_empty() && start.elapsed() < Duration::from_secs(10) {
                channel.flush();
                channel.poll(&mut out);
                std::thread::yield_now();
            }
            let status = Status::DATA_TRANSFER_ERROR.into();
            assert_eq!(out, [Finished { tag: 0, status }], "{operation:?}");
        }
    }
}

#[test]
fn files_that_cannot_be_used_say_why() {
    let dir = on_disk();
    let error = |options: FileOptions| Backend::file(options).err().unwrap().to_string();
    let odd = make(dir.path(), "odd", 2 * MIB + 100);
    let e = error(file_options(&odd, 9, true));
    assert!(e.contains("odd") && e.contains("2097152 or 2097664"), "{e}");
    let e = error(file_options(&dir.path().join("none"), 9, true));
    assert!(e.contains("truncate"), "{e}");
    let e = error(file_options(dir.path(), 9, true));
    assert!(e.contains("neither a file nor a block device"), "{e}");
    let e = error(file_options(Path::new("/dev/zero"), 9, true));
    assert!(e.contains("neither a file nor a block device"), "{e}");
    let empty = make(dir.path(), "empty", 0);
    let e = error(file_options(&empty, 9, true));
    assert!(e.contains("0 bytes"), "{e}");
    let e = error(file_options(&make(dir.path(), "a", 4096), 11, true));
    assert!(e.contains("512 or 4096"), "{e}");
}

#[test]
fn a_file_belongs_to_one_namespace() {
    let dir = on_disk();
    let path = make(dir.path(), "disk", MIB);
    let read_only = || FileOptions {
        read_only: true,
        ..file_options(&path, 9, true)
    };
    let first = open(&path, 9, true);
    let channel = first.channel(4).unwrap();
    let e = Backend::file(file_options(&path, 9, true)).err().unwrap();
    assert!(e.to_string().contains("in use"), "{e}");
    assert!(Backend::file(read_only()).is_err(), "a writer has it");
    drop(first);
    assert!(Backend::file(read_only()).is_err(), "a channel has it");
    drop(channel);
    let a = Backend::file(read_only()).unwrap();
    let b = Backend::file(read_only()).unwrap();
    assert!(Backend::file(file_options(&path, 9, true)).is_err());
    drop((a, b));
    open(&path, 9, true);
}

#[test]
fn faults_fail_shorten_and_swallow() {
    let dir = on_disk();
    let path = make(dir.path(), "disk", 4 * MIB);
    for backend in [memory(9, 4 * MIB), open(&path, 9, true)] {
        let (backend, faults) = backend.with_faults();
        let mut c = Client::new(&backend, 4);
        c.wipe();

        let id = faults
            .add(Rule::once(Operations::WRITE, Fault::Fail(Status::WRITE_FAULT)).on_blocks(10..11));
        let ones = vec![1; 4 * 512];
        c.write(11, &ones[..512], Layout::Whole(0));
        let status = c.run(WRITE, 8, 4, Some(&ones), Layout::Whole(0));
        assert_eq!(status, Status::WRITE_FAULT);
        assert_eq!(faults.hits(id), Some(1));
        assert_eq!(
            c.read(8, 3, Layout::Whole(0)),
            vec![0; 3 * 512],
            "untouched"
        );
        c.write(8, &ones, Layout::Whole(0));

        // A short write: the first part is there, the rest is not, and nobody is told it is.
        faults.add(Rule::once(Operations::WRITE, Fault::Shorten(3)));
        let twos = vec![2; 8 * 512];
        let status = c.run(WRITE, 20, 8, Some(&twos), Layout::Pages(512));
        assert_eq!(status, Status::WRITE_FAULT);
        let back = c.read(20, 8, Layout::Whole(0));
        assert_eq!(back, [vec![2; 3 * 512], vec![0; 5 * 512]].concat());

        faults.add(Rule::once(Operations::READ, Fault::Shorten(u32::MAX)));
        let status = c.run(Operation::Read, 20, 2, None, Layout::Whole(0));
        assert_eq!(status, Status::UNRECOVERED_READ_ERROR);
        assert_eq!(c.take(0), [vec![2; 512], vec![0xa5; 512]].concat());

        faults.add(Rule::once(Operations::READ, Fault::NeverComplete));
        let done = c.start(3, Operation::Read, 0, 1, None, Layout::Whole(0));
        assert_eq!((done, c.pending()), (None, 1));
        assert!(!c.wakes_within(Duration::from_millis(20)));
        assert_eq!(c.poll(usize::MAX), 0);
        assert_eq!(c.cancel(3), Cancelled::Gone);
        assert_eq!(c.pending(), 0);
        faults.clear();
        c.read(0, 8, Layout::Whole(0));
    }
}

#[test]
fn delays_wait_asleep_and_can_be_cancelled() {
    let dir = on_disk();
    let path = make(dir.path(), "disk", 4 * MIB);
    for backend in [null(false), memory(9, 4 * MIB), open(&path, 9, true)] {
        let (backend, delays) = backend.with_delays();
        let mut c = Client::new(&backend, 4);
        delays.add(Rule::always(
            Operations::READ,
            Delay(Duration::from_millis(30)),
        ));
        let start = Instant::now();
        assert_eq!(
            c.start(1, Operation::Read, 0, 8, None, Layout::Pages(0)),
            None
        );
        assert_eq!(
            c.start(2, Operation::Read, 0, 8, None, Layout::Pages(0)),
            None
        );
        // What is not delayed overtakes.
        c.write(100, &[3; 512], Layout::Whole(0));
        assert_eq!(c.cancel(2), Cancelled::Gone);
        assert_eq!(c.wait(1), Status::SUCCESS);
        assert!(start.elapsed() >= Duration::from_millis(30));
        assert_eq!(c.pending(), 0);
        assert!(
            !c.wakes_within(Duration::from_millis(50)),
            "the timer is off"
        );
        // A very long one, and the end of the channel in the middle of it.
        delays.clear();
        delays.add(Rule::always(Operations::ALL, Delay(Duration::MAX)));
        assert_eq!(
            c.start(0, Operation::Read, 0, 8, None, Layout::Pages(0)),
            None
        );
        assert_eq!(c.poll(usize::MAX), 0);
        c.drop_channel();
    }
}
