//! How long a poller has found nothing, known without asking the clock in every pass.
//!
//! A look at the clock costs as much as an empty pass or more, and an empty pass is what a command that comes alone waits for. So
//! passes are counted, and the clock is looked at every so many of them: as many as take a few microseconds, which follows the
//! cost of a pass.

use std::time::{Duration, Instant};

/// Looks at the clock are further apart than this, as long as passes are short.
const LEAST: Duration = Duration::from_micros(2);

/// And closer together than this, as long as passes do not suddenly take longer.
const MOST: Duration = Duration::from_micros(8);

/// Passes between two looks, at most.
const MAX_STRIDE: u32 = 1024;

/// Counts passes, and tells when to look at the clock.
pub(super) struct Quiet {
    /// Passes until the next look.
    left: u32,
    /// Passes between two looks.
    stride: u32,
    /// A pass since the last look found something.
    busy: bool,
    /// The time since the last look was not all passes.
    slept: bool,
    now: Instant,
    /// When the first of the empty passes we are in may have been: no earlier than the last busy one.
    since: Instant,
}

impl Quiet {
    pub fn new(now: Instant) -> Self {
        Self {
            left: 1,
            stride: 1,
            busy: false,
            slept: false,
            now,
            since: now,
        }
    }

    /// A pass is over; whether [`Self::look`] is to be called.
    #[inline]
    pub fn passed(&mut self, busy: bool) -> bool {
        self.busy |= busy;
        self.left = self.left.saturating_sub(1);
        self.left == 0
    }

    /// Since when nothing was found, as of the last look.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// The clock was looked at. How long nothing was found.
    pub fn look(&mut self, now: Instant) -> Duration {
        let passed = now.duration_since(self.now);
        if !std::mem::take(&mut self.slept) {
            if passed < LEAST {
                self.stride = (self.stride * 2).min(MAX_STRIDE);
            } else if passed > MOST {
                self.stride = (self.stride / 2).max(1);
            }
        }
        self.left = self.stride;
        self.now = now;
        if std::mem::take(&mut self.busy) {
            self.since = now;
        }
        now.duration_since(self.since)
    }

    /// The thread has slept: the clock is to be looked at after the next pass. A quiet time goes on: who is woken for nothing goes
    /// back to sleep at once.
    pub fn slept(&mut self) {
        self.slept = true;
        self.left = 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `passes` passes of `cost` each; the looks there were, and the last quiet time.
    fn run(
        quiet: &mut Quiet,
        clock: &mut Instant,
        passes: u32,
        cost: Duration,
        busy: bool,
    ) -> (u32, Duration) {
        let (mut looks, mut last) = (0, Duration::ZERO);
        for _ in 0..passes {
            *clock += cost;
            if quiet.passed(busy) {
                looks += 1;
                last = quiet.look(*clock);
            }
        }
        (looks, last)
    }

    #[test]
    fn looks_are_a_few_microseconds_apart_whatever_a_pass_costs() {
        let mut clock = Instant::now();
        let mut quiet = Quiet::new(clock);
        for (nanos, passes, most) in [(20, 100_000, 1000), (500, 10_000, 2600), (50_000, 100, 110)]
        {
            let cost = Duration::from_nanos(nanos);
            run(&mut quiet, &mut clock, 2000, cost, false);
            let (looks, _) = run(&mut quiet, &mut clock, passes, cost, false);
            assert!(looks <= most, "{nanos} ns: {looks} looks");
            let apart = cost * passes / looks.max(1);
            assert!(
                apart >= LEAST && apart <= MOST.max(cost * 2),
                "{nanos} ns: {apart:?}"
            );
        }
    }

    #[test]
    fn quiet_begins_after_the_last_busy_pass() {
        let mut clock = Instant::now();
        let mut quiet = Quiet::new(clock);
        let cost = Duration::from_nanos(100);
        assert_eq!(
            run(&mut quiet, &mut clock, 10_000, cost, true).1,
            Duration::ZERO
        );
        let (_, last) = run(&mut quiet, &mut clock, 1000, cost, false);
        assert!(
            last <= cost * 1000 && last + 2 * MOST >= cost * 1000,
            "{last:?}"
        );
        run(&mut quiet, &mut clock, 1, cost, true);
        let (_, last) = run(&mut quiet, &mut clock, 200, cost, false);
        assert!(last <= cost * 200, "{last:?}");
    }

    #[test]
    fn a_sleep_is_no_pass_and_does_not_end_the_quiet() {
        let mut clock = Instant::now();
        let mut quiet = Quiet::new(clock);
        let cost = Duration::from_nanos(100);
        run(&mut quiet, &mut clock, 10_000, cost, false);
        let stride = quiet.stride;
        clock += Duration::from_secs(1);
        quiet.slept();
        let (looks, last) = run(&mut quiet, &mut clock, 1, cost, false);
        assert_eq!((looks, quiet.stride), (1, stride));
        assert!(last >= Duration::from_secs(1));
    }
}
