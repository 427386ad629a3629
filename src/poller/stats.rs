//! Counters that a poller writes and anyone may read.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter with one writer: adding to it is a load and a store, not a locked instruction.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Add; only ever called by the one writer.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(
            self.0.load(Ordering::Relaxed).wrapping_add(n),
            Ordering::Relaxed,
        );
    }

    /// The value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a poller did on a namespace. The SMART log is made of the sums over the pollers.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct NamespaceStats {
    /// Read, Compare and Verify commands that completed without error.
    pub reads: Counter,
    /// Blocks moved or examined by them.
    pub blocks_read: Counter,
    /// Write commands that completed without error.
    pub writes: Counter,
    /// Blocks written by them.
    pub blocks_written: Counter,
    /// Other commands that completed without error.
    pub others: Counter,
    /// Commands that failed with a media or data integrity status.
    pub media_errors: Counter,
}

/// What happened on a queue.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct QueueStats {
    /// Passes that found commands.
    pub batches: Counter,
    /// Commands fetched.
    pub fetched: Counter,
    /// Commands completed.
    pub completed: Counter,
    /// Commands completed with an error.
    pub failed: Counter,
    /// Interrupts signalled.
    pub interrupts: Counter,
    /// Interrupts that were not: passes that posted something and needed none, or shared one with others.
    pub suppressed: Counter,
    /// Times a fetch waited for room in the completion queue.
    pub cq_full: Counter,
}

/// What a poller does.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct PollerStats {
    /// Passes over all queues.
    pub passes: Counter,
    /// Passes that found nothing to do.
    pub empty: Counter,
    /// Times it went to sleep.
    pub sleeps: Counter,
    /// Times it found work in the second look, after arming.
    pub races_won: Counter,
}
