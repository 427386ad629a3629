//! Micro-benchmarks of a command's way on the `null` backend, in ticks of the time stamp counter: `scripts/bench micro`.

mod parts;
mod passes;
mod rig;
mod ticks;

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};

use ticks::Ticks;

criterion_group! {
    name = benches;
    config = Criterion::default()
        .with_measurement(Ticks)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(700))
        .sample_size(30);
    targets = parts::checks, parts::prps, passes::stages, passes::commands, passes::idle
}
criterion_main!(benches);
