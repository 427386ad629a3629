//! What every backend must do: one suite, run on all of them.
//!
//! [`run`] takes a backend of a few MiB, whose content it destroys. A failure is a panic that says what was expected.

mod cases;
mod client;
mod stream;

pub use client::{Client, Layout, pattern};

use super::Backend;

/// What cannot be seen from the geometry.
#[derive(Clone, Copy, Debug)]
pub struct Promise {
    /// It gives back what was written (`null` does not).
    pub stores: bool,
    /// How many random streams of operations to run.
    pub streams: u32,
}

/// Run the suite on a backend of at least 2 MiB.
pub fn run(backend: &Backend, promise: Promise) {
    let geometry = backend.geometry();
    assert!(geometry.bytes() >= 2 << 20, "too small for this suite");
    assert!(backend.allocated_blocks() <= geometry.blocks);
    assert!(
        backend
            .describe()
            .contains(&format!("{} blocks", geometry.blocks))
    );
    if geometry.read_only {
        cases::read_only(backend);
        return;
    }
    cases::boundaries(backend, promise);
    cases::nonsense_is_refused(backend);
    cases::largest_transfer(backend, promise);
    cases::tags_in_any_number(backend, promise, 1);
    cases::tags_in_any_number(backend, promise, 300);
    cases::results_one_at_a_time(backend);
    cases::cancel(backend);
    cases::drop_with_pending(backend);
    cases::two_channels(backend, promise);
    if promise.stores {
        cases::compare_everywhere(backend);
        cases::zeroing(backend);
        stream::run(backend, promise.streams);
    }
}
