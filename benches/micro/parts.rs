//! Steps of a command that can be taken alone: the check of its 64 bytes, and the way from PRPs to host memory.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput};
use nvme_spec::Sqe;
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::prp::PageSize;
use vhost_user_nvme::backend::{Backend, NullOptions};
use vhost_user_nvme::driver::dma::{Mapping, shared_memory};
use vhost_user_nvme::io::{Limits, Namespace, parse, walk};
use vhost_user_nvme::memory::GuestMap;

use crate::ticks::Ticks;

/// Commands of one iteration.
const BATCH: u64 = 64;

fn namespace() -> Namespace {
    let backend = Backend::null(NullOptions {
        block_shift: 9,
        blocks: 1 << 31,
        read_only: false,
    });
    let backend = Arc::new(backend.expect("a null backend"));
    Namespace::new(1, backend, false)
}

/// The check of reads of 4 KiB at places of all sorts.
pub fn checks(c: &mut Criterion<Ticks>) {
    let namespaces = [namespace()];
    let limits = Limits {
        max_transfer: 1 << 20,
        max_namespaces: 1,
        sgls: true,
    };
    let sqes: Vec<Sqe> = (0..BATCH)
        .map(|i| ReadWrite::new(1, i * 7919 * 8, 7).to_sqe(NvmOpcode::READ, 4096 * i, 0))
        .collect();
    let mut group = c.benchmark_group("parse");
    group.throughput(Throughput::Elements(BATCH));
    group.bench_function("read", |b| {
        b.iter(|| {
            for sqe in &sqes {
                black_box(parse(black_box(sqe), &namespaces, limits).is_ok());
            }
        });
    });
    group.finish();
}

/// From PRPs to pieces of memory, for transfers of one page, two, and a list.
pub fn prps(c: &mut Criterion<Ticks>) {
    const BYTES: usize = 64 << 20;
    const STRIDE: u64 = 128 << 10;
    // The lists lie in the last 2 MiB.
    const LISTS: u64 = (62 << 20) as u64;
    let file = shared_memory("micro", BYTES as u64).expect("memory");
    let region = Mapping::map(&file, 0, BYTES, 0).expect("memory");
    let map = GuestMap::new(vec![region]).expect("a region");
    let page = u64::from(PageSize::K4.bytes());
    for i in 0..BATCH {
        let first = i * STRIDE;
        for entry in 1..STRIDE / page {
            let at = LISTS + i * page + (entry - 1) * 8;
            assert!(map.write(at, &(first + entry * page).to_le_bytes()));
        }
    }
    let mut group = c.benchmark_group("prp");
    group.throughput(Throughput::Elements(BATCH));
    for (name, bytes) in [("4K", 4096u32), ("8K", 8192), ("128K", 131_072)] {
        group.bench_function(name, |b| {
            b.iter(|| {
                for i in 0..BATCH {
                    let first = black_box(i * STRIDE);
                    let second = match bytes {
                        4096 => 0,
                        8192 => first + page,
                        _ => LISTS + i * page,
                    };
                    let walked = walk(&map, first, second, bytes, |segment| {
                        let seg = map.resolve(segment.addr, segment.len as usize);
                        black_box(seg.is_some());
                        Ok(())
                    });
                    assert!(walked.is_ok());
                }
            });
        });
    }
    group.finish();
}
