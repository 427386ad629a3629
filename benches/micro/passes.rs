//! Whole passes of a poller: fetch to completion of a batch, and passes with nothing to do; and the stages of a pass by themselves.

use std::hint::black_box;

use criterion::{Criterion, Throughput};

use crate::rig::{Kind, Rig};
use crate::ticks::Ticks;

/// Fetch, check, do and complete batches of reads.
pub fn commands(c: &mut Criterion<Ticks>) {
    let mut group = c.benchmark_group("pass");
    for (name, kind, bytes) in [
        ("null-4K", Kind::Null, 4096),
        ("null-512", Kind::Null, 512),
        ("memory-512", Kind::Memory, 512),
        ("memory-4K", Kind::Memory, 4096),
        ("forward-4K", Kind::Forward, 4096),
        ("forward-shared-4K", Kind::ForwardShared, 4096),
    ] {
        for batch in [1, 32] {
            for journal in [true, false] {
                let mut rig = Rig::new(kind, bytes, 0);
                if !journal {
                    rig = rig.without_journal();
                }
                rig.commands(batch);
                rig.check();
                let suffix = if journal { "" } else { "-without-journal" };
                group.throughput(Throughput::Elements(u64::from(batch)));
                group.bench_function(format!("{name}-batch-{batch}{suffix}"), |b| {
                    b.iter(|| rig.commands(batch));
                });
                rig.check();
            }
        }
    }
    group.finish();
}

/// Passes over queues that nobody rings, and what they cost one that is rung.
pub fn idle(c: &mut Criterion<Ticks>) {
    let mut group = c.benchmark_group("idle");
    for queues in [1, 16, 256, 1024] {
        let mut rig = Rig::new(Kind::Null, 4096, queues - 1);
        group.throughput(Throughput::Elements(1));
        group.bench_function(format!("pass-over-{queues}"), |b| b.iter(|| rig.idle()));
        group.bench_function(format!("command-beside-{}", queues - 1), |b| {
            b.iter(|| rig.commands(1));
        });
        rig.check();
    }
    group.finish();
}

/// What a pass is made of besides the check of a command and its PRPs.
pub fn stages(c: &mut Criterion<Ticks>) {
    const BATCH: u32 = 32;
    let mut group = c.benchmark_group("stage");
    group.throughput(Throughput::Elements(BATCH.into()));
    let mut rig = Rig::new(Kind::Null, 4096, 0);
    group.bench_function("fetch", |b| b.iter(|| black_box(rig.stages().fetch(BATCH))));
    group.bench_function("post", |b| b.iter(|| rig.stages().post(BATCH)));
    for (name, kind, bytes) in [
        ("submit-null-4K", Kind::Null, 4096),
        ("submit-memory-512", Kind::Memory, 512),
        ("submit-memory-4K", Kind::Memory, 4096),
    ] {
        let mut rig = Rig::new(kind, bytes, 0);
        group.bench_function(name, |b| b.iter(|| rig.stages().submit(BATCH)));
    }
    group.finish();
}
