//! How long an adaptive poller looks before it sleeps: longer while work comes soon after it has gone to sleep.

use std::time::Duration;

/// It looks at most this many times longer than it was configured to.
const MOST: u32 = 10;

/// The learned time.
#[derive(Debug)]
pub(super) struct Patience {
    least: Duration,
    most: Duration,
    now: Duration,
}

impl Patience {
    /// Begin with, and never look shorter than, the configured time.
    pub fn new(least: Duration) -> Self {
        Self {
            least,
            most: least.saturating_mul(MOST),
            now: least,
        }
    }

    /// How long to look.
    pub fn now(&self) -> Duration {
        self.now
    }

    /// There is work again, `gap` after the last, and the poller slept in between.
    pub fn woken(&mut self, gap: Duration) {
        self.now = if gap <= self.most {
            // Twice, since the next gap will not be the same.
            self.now.max(gap.saturating_mul(2)).min(self.most)
        } else {
            (self.now / 2).max(self.least)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_that_comes_soon_is_waited_for_and_work_that_does_not_is_not() {
        let us = Duration::from_micros;
        let mut p = Patience::new(us(50));
        p.woken(us(120));
        assert_eq!(p.now(), us(240));
        p.woken(us(60));
        assert_eq!(p.now(), us(240), "one that came sooner changes nothing");
        p.woken(us(499));
        assert_eq!(p.now(), us(500));
        for left in [250, 125, 62, 50, 50] {
            p.woken(Duration::from_secs(1));
            assert!(p.now() >= us(left) && p.now() < us(left + 1), "{p:?}");
        }
        let mut never = Patience::new(Duration::ZERO);
        never.woken(us(1));
        never.woken(Duration::ZERO);
        assert_eq!(never.now(), Duration::ZERO);
        let mut forever = Patience::new(Duration::MAX);
        forever.woken(Duration::MAX);
        assert_eq!(forever.now(), Duration::MAX);
    }
}
