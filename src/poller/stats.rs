//! Counters that a poller writes and anyone may read.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

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
    /// The same by their size: 1, 2 to 3, 4 to 7, 8 to 15, 16 to 31, 32.
    pub batch_sizes: [Counter; 6],
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
    /// How long commands took from their fetch to their completion, while somebody asks.
    pub service: ServiceTimes,
}

/// A histogram of times in nanoseconds by powers of two, filled only while it is asked for.
#[derive(Debug, Default)]
pub struct ServiceTimes {
    wanted: AtomicBool,
    counts: [Counter; Self::BUCKETS],
}

impl ServiceTimes {
    /// The last one holds all from 2^31 ns, about two seconds, on.
    pub const BUCKETS: usize = 32;

    /// Measure from now on, or do not any more. What was measured stays.
    pub fn ask(&self, on: bool) {
        self.wanted.store(on, Ordering::Relaxed);
    }

    /// The time, if it is asked for.
    #[inline]
    pub(super) fn start(&self) -> Option<Instant> {
        self.wanted.load(Ordering::Relaxed).then(Instant::now)
    }

    /// A command is done that was fetched then.
    #[inline]
    pub(super) fn done(&self, start: Option<Instant>) {
        if let Some(start) = start {
            let ns = start.elapsed().as_nanos().max(1);
            let bucket = (ns.ilog2() as usize).min(Self::BUCKETS - 1);
            if let Some(count) = self.counts.get(bucket) {
                count.add(1);
            }
        }
    }

    /// How many commands took from 2^i to 2^(i+1) ns, for each i.
    pub fn counts(&self) -> [u64; Self::BUCKETS] {
        self.counts.each_ref().map(Counter::get)
    }
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
    /// Times it found work in the second look, after arming: a sleep was spared.
    pub races_won: Counter,
    /// Times it slept and the pass afterwards found nothing: somebody rang for what was done already, or a time was over.
    pub races_lost: Counter,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_are_counted_only_while_somebody_asks() {
        let times = ServiceTimes::default();
        times.done(times.start());
        assert_eq!(times.counts(), [0; ServiceTimes::BUCKETS]);
        times.ask(true);
        let start = times.start().unwrap();
        times.done(start.checked_sub(Duration::from_micros(3)));
        times.done(start.checked_sub(Duration::from_secs(100)));
        let counts = times.counts();
        assert_eq!((counts.iter().sum::<u64>(), counts[31]), (2, 1));
        assert_eq!(
            counts[..11].iter().sum::<u64>(),
            0,
            "3 us are more than 2^11 ns"
        );
        times.ask(false);
        assert!(times.start().is_none());
    }
}
