//! A limit on log lines that a guest can provoke.

use std::time::{Duration, Instant};

const WINDOW: Duration = Duration::from_secs(10);
const LINES: u32 = 10;

/// Lets ten lines pass every ten seconds.
pub(super) struct Throttle {
    since: Instant,
    passed: u32,
    missed: u64,
}

impl Throttle {
    pub(super) fn new() -> Self {
        Self {
            since: Instant::now(),
            passed: 0,
            missed: 0,
        }
    }

    /// Whether a line may be written now, and then how many were left out since the last one.
    pub(super) fn pass(&mut self) -> Option<u64> {
        self.pass_at(Instant::now())
    }

    fn pass_at(&mut self, now: Instant) -> Option<u64> {
        if now.saturating_duration_since(self.since) >= WINDOW {
            self.since = now;
            self.passed = 0;
        }
        if self.passed >= LINES {
            self.missed = self.missed.saturating_add(1);
            return None;
        }
        self.passed = self.passed.saturating_add(1);
        Some(std::mem::take(&mut self.missed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_lines_then_silence_then_the_number_left_out() {
        let mut t = Throttle::new();
        let now = Instant::now();
        assert_eq!((0..25).filter_map(|_| t.pass_at(now)).count(), 10);
        assert_eq!(t.pass_at(now + WINDOW), Some(15));
        assert_eq!(t.pass_at(now + WINDOW), Some(0));
    }
}
