//! Nothing is allocated for an I/O once a channel is open: no backend may surprise a poller with a lock inside `malloc`.

#![expect(unsafe_code, reason = "calls the unsafe `Channel::submit`")]

#[path = "common/counting.rs"]
mod counting;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme_spec::Status;
use nvme_spec::prp::{self, PageSize, Prps, WriteList};
use vhost_user_nvme::backend::nvme::Window;
use vhost_user_nvme::backend::{
    Backend, Channel, FileOptions, GuestData, HugePages, IoPoll, MemoryOptions, NullOptions,
    Operation, Request, Submitted,
};
use vhost_user_nvme::driver::dma::{Mapping, shared_memory};
use vhost_user_nvme::memory::{Buffers, GuestMap, HostSeg};
use zerocopy::IntoBytes as _;

const DEPTH: u32 = 16;
const BLOCKS: u32 = 512;

/// A guest's memory with a transfer of [`BLOCKS`] blocks in it, for a store that forwards.
struct Guest {
    map: Arc<GuestMap>,
    prps: Prps,
}

/// Writes PRP lists into a guest's memory.
struct Writer<'a>(&'a GuestMap);

impl WriteList for Writer<'_> {
    fn write(&mut self, addr: u64, entries: &[u64]) {
        assert!(self.0.write(addr, entries.as_bytes()));
    }
}

fn guest(window: &Window) -> Guest {
    let file = shared_memory("guest", 1 << 20).unwrap();
    let region = Mapping::map(&file, 0, 1 << 20, 0).unwrap();
    let shown = window.show(&region).unwrap();
    let map = GuestMap::keeping(vec![region], vec![Arc::new(shown)]).unwrap();
    // Every other page, so that none can be merged with the next.
    let pages = (0..).map(|i| i * 8192);
    let len = BLOCKS << 9;
    let prps = prp::build(
        PageSize::K4,
        pages,
        512,
        len,
        [0xF_E000, 0xF_F000],
        &mut Writer(&map),
    );
    let prps = prps.unwrap();
    Guest { map, prps }
}

fn allocations_per_steady_state(backend: &Backend) -> u64 {
    let guest = backend.window().map(|window| guest(window));
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
                let moves = operation.moves_data();
                let guest = guest.as_ref().filter(|_| moves);
                let data = if moves && guest.is_none() {
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
                    guest: guest.map(|guest| GuestData {
                        prp1: guest.prps.prp1,
                        prp2: guest.prps.prp2,
                        bytes: BLOCKS << 9,
                        cdw12: 0,
                        cdw13: 0,
                        map: &guest.map,
                    }),
                };
                // SAFETY: as above.
                match unsafe { channel.submit(tag, &request) } {
                    Submitted::Done(status) => assert_eq!(status, Status::SUCCESS),
                    Submitted::Pending => waiting += 1,
                }
            }
            while waiting > 0 {
                assert!(start.elapsed() < Duration::from_secs(60), "{operation:?}");
                channel.flush();
                out.clear();
                channel.poll(&mut out);
                assert!(out.iter().all(|f| f.status.is_success()));
                waiting -= out.len();
                std::thread::yield_now();
            }
        }
    };
    round(&mut channel);
    counting::allocations(|| {
        for _ in 0..5 {
            round(&mut channel);
        }
    })
}

#[test]
fn a_poller_never_allocates() {
    let probe = || drop(std::hint::black_box(Box::new(1)));
    assert_eq!(counting::allocations(probe), 1, "the counter counts");

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

    let folders = [Path::new("/dev/shm"), &std::env::temp_dir()];
    for (folder, name) in folders.into_iter().zip(["tmpfs", "file"]) {
        let file = tempfile::NamedTempFile::new_in(folder).unwrap();
        file.as_file().set_len(4 << 20).unwrap();
        let file = Backend::file(FileOptions {
            path: file.path().to_owned(),
            block_shift: 9,
            read_only: false,
            direct: true,
            iopoll: IoPoll::Auto,
            after: Default::default(),
        });
        assert_eq!(allocations_per_steady_state(&file.unwrap()), 0, "{name}");
    }
}

#[cfg(feature = "testing")]
#[test]
fn a_poller_that_forwards_never_allocates() {
    use vhost_user_nvme::backend::NvmeOptions;
    use vhost_user_nvme::driver::{Ssd, SsdOptions};
    use vhost_user_nvme::testing::{Model, ModelOptions};

    // Whole transfers, and such as are cut.
    for (mdts, shared) in [(8, false), (8, true), (4, false), (4, true)] {
        let model = Model::new(ModelOptions {
            instant: true,
            mdts,
            ..ModelOptions::default()
        });
        let options = SsdOptions::default();
        let ssd = Ssd::start("instant".into(), model.device(), model.space(), options).unwrap();
        let window = match shared {
            true => Window::shared(ssd.space(), "instant", 2).unwrap().remove(1),
            false => Window::sole(ssd.space(), "instant").unwrap(),
        };
        let backend = Backend::nvme(&NvmeOptions {
            ssd,
            window,
            nsid: 1,
            offset: 0,
            size: None,
            read_only: false,
            pass: Default::default(),
        });
        let n = allocations_per_steady_state(&backend.unwrap());
        assert_eq!(n, 0, "transfers of 2^{mdts} pages, shared: {shared}");
    }
}
