//! A command of an I/O queue: its check, and where its data is.

use std::sync::{Arc, OnceLock};

use nvme_spec::Sqe;
use nvme_spec::command::Psdt;
use nvme_spec::nvm::{DatasetManagement, DsmRange, ReadWrite};
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::sgl::Descriptor;
use vhost_user_nvme::backend::{Backend, NullOptions};
use vhost_user_nvme::driver::dma::{Mapping, shared_memory};
use vhost_user_nvme::io::{
    Fill, Limits, MAX_RANGES, MAX_SEGMENTS, Namespace, Plan, parse, read_ranges, resolve,
    resolve_sgl, walk_data,
};
use vhost_user_nvme::memory::{GuestMap, HostSeg, Near};
use zerocopy::{FromBytes as _, IntoBytes as _};

use crate::Input;

/// Bytes of each of two regions, with a hole between them.
const REGION: u64 = 64 << 10;
/// Where the second one begins.
const SECOND: u64 = 2 * REGION;
const BLOCKS: u64 = 1 << 20;

struct World {
    namespaces: [Namespace; 3],
    map: Arc<GuestMap>,
}

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        let namespace = |nsid, block_shift, read_only| {
            let options = NullOptions {
                block_shift,
                blocks: BLOCKS,
                read_only,
            };
            let backend = Backend::null(options).expect("a backend");
            Namespace::new(nsid, Arc::new(backend), read_only)
        };
        let file = shared_memory("fuzz", 2 * REGION).expect("memory");
        let region =
            |offset, gpa| Mapping::map(&file, offset, REGION as usize, gpa).expect("memory");
        World {
            namespaces: [
                namespace(1, 9, false),
                namespace(2, 12, false),
                namespace(4, 9, true),
            ],
            map: GuestMap::new(vec![region(0, 0), region(REGION, SECOND)]).expect("a map"),
        }
    })
}

/// One input: flags, the command, what is in memory.
///
/// # Panics
///
/// What was let pass cannot be, or its data is not all there.
pub fn run(data: &[u8]) {
    let World { namespaces, map } = world();
    let mut input = Input(data);
    let sgls = input.byte() & 1 == 0;
    let sqe = Sqe::read_from_bytes(&input.array::<64>()).expect("64 bytes");
    let bytes = input.bytes(REGION as usize);
    assert!(map.write(0, bytes));
    let limits = Limits {
        max_transfer: 1 << 20,
        max_namespaces: 8,
        sgls,
    };
    let Ok(plan) = parse(&sqe, namespaces, limits) else {
        return;
    };
    let mut room = vec![HostSeg::EMPTY; MAX_SEGMENTS];
    let found = match plan {
        Plan::Transfer { bytes, .. } => {
            let fill = Fill::new(&mut room);
            let found = if sqe.psdt() == Psdt::PRP {
                resolve(map, &mut Near::default(), sqe.prp1, sqe.prp2, bytes, fill)
            } else {
                assert!(sgls && sqe.psdt() == Psdt::SGL_MPTR_BUFFER);
                resolve_sgl(map, &sqe, bytes, fill)
            };
            let mut sum = 0;
            let walked = walk_data(map, &sqe, bytes, |piece| {
                sum += u64::from(piece.len);
                Ok(())
            });
            // The same walk, where it does not matter whether there is memory at its end.
            assert!(walked.is_err() || sum == u64::from(bytes));
            assert!(walked.is_ok() || found.is_err());
            found.ok().map(|n| (n, bytes))
        }
        Plan::Deallocate { ranges, .. } => {
            let mut out = Vec::with_capacity(MAX_RANGES);
            if read_ranges(map, &sqe, ranges, BLOCKS, &mut out).is_ok() {
                assert!(out.len() <= ranges as usize);
                for range in out {
                    let end = range.slba.checked_add(range.blocks.into());
                    assert!(range.blocks > 0 && end.is_some_and(|end| end <= BLOCKS));
                }
            }
            None
        }
        Plan::Blocks { slba, blocks, .. } => {
            assert!(slba + u64::from(blocks) <= BLOCKS);
            None
        }
        Plan::Forward { .. } | Plan::Pass { .. } => unreachable!("no store here forwards"),
        Plan::FlushAll | Plan::Nothing => None,
    };
    if let Some((n, bytes)) = found {
        let sum: usize = room[..n].iter().map(HostSeg::len).sum();
        assert_eq!(sum, bytes as usize);
    }
}

/// A command of each kind.
pub fn seeds() -> Vec<Vec<u8>> {
    let read = ReadWrite::new(1, 8, 15);
    let list: [u64; 4] = [0x2000, 0x3000, 0x4000, 0x5000];
    let sgl = [
        Descriptor::data(0x2000, 4096),
        Descriptor::data(SECOND, 4096),
    ];
    let range = DsmRange {
        cattr: 0,
        nlb: 8,
        slba: 64,
    };
    let trim = DatasetManagement {
        nsid: 1,
        ad: true,
        ..DatasetManagement::default()
    };
    let of = |sqe: Sqe, memory: &[u8]| [&[0], sqe.as_bytes(), memory].concat();
    vec![
        of(read.to_sqe(NvmOpcode::READ, 0x1000, SECOND), &[]),
        of(
            ReadWrite::new(2, 0, 3).to_sqe(NvmOpcode::WRITE, 0x1000, 0),
            list.as_bytes(),
        ),
        of(
            Descriptor::data(0x1000, 8192).put(read.to_sqe(NvmOpcode::COMPARE, 0, 0)),
            &[],
        ),
        of(
            Descriptor::last_segment(0, 2).put(read.to_sqe(NvmOpcode::READ, 0, 0)),
            sgl.as_bytes(),
        ),
        of(trim.to_sqe(0, 0), range.as_bytes()),
        of(read.to_sqe(NvmOpcode::WRITE_ZEROES, 0, 0), &[]),
        of(read.to_sqe(NvmOpcode::FLUSH, 0, 0), &[]),
    ]
}
