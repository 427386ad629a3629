//! How commands went to the SSD.

use std::ops::AddAssign;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How commands went to the SSD.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forwarded {
    /// Transfers whose PRPs were passed through as the guest wrote them.
    pub untouched: u64,
    /// Transfers whose PRPs were checked and built anew, in one command.
    pub rebuilt: u64,
    /// Transfers that became several commands, with PRPs built anew, because they are larger than the SSD takes or cross a boundary of it.
    pub split: u64,
    /// Commands without data.
    pub without_data: u64,
    /// Commands nobody here understands.
    pub passed: u64,
}

impl AddAssign for Forwarded {
    fn add_assign(&mut self, other: Self) {
        self.untouched += other.untouched;
        self.rebuilt += other.rebuilt;
        self.split += other.split;
        self.without_data += other.without_data;
        self.passed += other.passed;
    }
}

/// A counter whose one writer is the poller of a channel.
#[derive(Default)]
pub(super) struct Count(AtomicU64);

impl Count {
    #[inline]
    pub fn one(&self) {
        let n = self.0.load(Ordering::Relaxed);
        self.0.store(n.wrapping_add(1), Ordering::Relaxed);
    }
}

/// Of one channel.
#[derive(Default)]
pub(super) struct Stats {
    pub untouched: Count,
    pub rebuilt: Count,
    pub split: Count,
    pub without_data: Count,
    pub passed: Count,
}

impl Stats {
    fn get(&self) -> Forwarded {
        let get = |c: &Count| c.0.load(Ordering::Relaxed);
        Forwarded {
            untouched: get(&self.untouched),
            rebuilt: get(&self.rebuilt),
            split: get(&self.split),
            without_data: get(&self.without_data),
            passed: get(&self.passed),
        }
    }
}

/// The sum of all channels there are and were.
pub(super) fn sum(all: &[Arc<Stats>]) -> Forwarded {
    let mut total = Forwarded::default();
    all.iter().for_each(|stats| total += stats.get());
    total
}

/// Of the channels that have gone, keep only the sum, in one entry that nobody writes.
pub(super) fn retire(all: &mut Vec<Arc<Stats>>) {
    let (gone, live): (Vec<_>, Vec<_>) = all
        .drain(..)
        .partition(|stats| Arc::strong_count(stats) == 1);
    let total = sum(&gone);
    let of = |n| Count(AtomicU64::new(n));
    all.extend(live);
    all.push(Arc::new(Stats {
        untouched: of(total.untouched),
        rebuilt: of(total.rebuilt),
        split: of(total.split),
        without_data: of(total.without_data),
        passed: of(total.passed),
    }));
}
