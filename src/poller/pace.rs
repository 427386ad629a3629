//! How many completions one interrupt tells of, where an interrupt is dear: learned from what the guest does meanwhile.
//!
//! A guest that has more to submit goes on while completions wait for it; one that has not, sleeps until it is told. So now and
//! then an interrupt is held back to see which it is: if as many completions as hoped for come together, that is the number from then
//! on; if the guest falls silent before, it is half of what came, and at 1 nothing is held back.

use std::time::{Duration, Instant};

/// The most completions for one interrupt.
const MOST: u32 = 8;

/// A guest that submits nothing for so long waits for us. An emulated one takes half of it from one command to the next.
const SILENCE: Duration = Duration::from_micros(100);

/// No completion waits longer.
pub(super) const LONGEST: Duration = Duration::from_micros(400);

/// A guest rings so soon after it has stored its shadow doorbell, unless it was interrupted in between.
const RING: Duration = Duration::from_micros(30);

/// Interrupts between two tries for more; twice as many after each that failed, up to `TRIES_APART << 5`.
const TRIES_APART: u32 = 32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// This many interrupts to go until a try.
    Settled(u32),
    /// The next but one is a try. Whoever rings for the next one may watch for its completion, so that is not held back.
    Before,
    Trying,
}

/// What was learned of one completion queue's guest.
#[derive(Debug)]
pub(super) struct Pace {
    goal: u32,
    stage: Stage,
    failures: u32,
    /// Completions that were held back at the last look, and since when none was added.
    held: u32,
    quiet_since: Option<Instant>,
    held_since: Option<Instant>,
    /// Since when a ring is waited for.
    ring_since: Option<Instant>,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            goal: 1,
            stage: Stage::Settled(TRIES_APART),
            failures: 0,
            held: 0,
            quiet_since: None,
            held_since: None,
            ring_since: None,
        }
    }
}

impl Pace {
    /// Completions that the next interrupt is to tell of.
    #[inline]
    pub fn goal(&self) -> u32 {
        match self.stage {
            Stage::Trying => (self.goal * 2).min(MOST),
            _ => self.goal,
        }
    }

    /// Whether a ring for the next command is welcome: its completion will be told of at once.
    pub fn wants_ring(&self) -> bool {
        self.goal == 1 && matches!(self.stage, Stage::Settled(_))
    }

    /// `fresh` completions, fewer than the goal, wait for an interrupt: until when, if they go on to.
    pub fn holds(&mut self, fresh: u32, now: Instant) -> Option<Instant> {
        if fresh != self.held || self.quiet_since.is_none() {
            self.held = fresh;
            self.quiet_since = Some(now);
        }
        let held_since = *self.held_since.get_or_insert(now);
        let quiet_since = self.quiet_since.unwrap_or(now);
        let until = (quiet_since + SILENCE).min(held_since + LONGEST);
        (now < until).then_some(until)
    }

    /// The completion is there before its command was rung for: until when the interrupt waits for somebody to watch, if it does.
    pub fn awaits_ring(&mut self, now: Instant) -> Option<Instant> {
        let until = *self.ring_since.get_or_insert(now) + RING;
        (now < until).then_some(until)
    }

    /// The guest was told of `fresh` completions.
    pub fn told(&mut self, fresh: u32) {
        self.seen();
        let apart = TRIES_APART << self.failures;
        if fresh >= self.goal() {
            self.stage = match self.stage {
                Stage::Settled(0) if self.goal < MOST => Stage::Before,
                Stage::Settled(n) => Stage::Settled(n.saturating_sub(1)),
                Stage::Before => Stage::Trying,
                Stage::Trying => {
                    self.goal = self.goal();
                    self.failures = 0;
                    // One success is soon followed by the next try.
                    Stage::Settled(1)
                }
            };
        } else {
            if self.stage == Stage::Trying {
                self.failures = (self.failures + 1).min(5);
            }
            self.goal = (fresh / 2).max(1);
            self.stage = Stage::Settled(apart);
        }
    }

    /// What waited need not be told: the guest has seen it.
    pub fn seen(&mut self) {
        self.held = 0;
        (self.quiet_since, self.held_since, self.ring_since) = (None, None, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that keeps `depth` commands going, each submitted `step` after the one before; completed at once. Returns
    /// interrupts and completions.
    fn run(pace: &mut Pace, depth: u32, completions: u32) -> (u32, u32) {
        let mut now = Instant::now();
        let (mut done, mut interrupts) = (0, 0);
        while done < completions {
            let mut fresh = 0;
            loop {
                if fresh < depth {
                    fresh += 1;
                }
                if fresh >= pace.goal() || pace.holds(fresh, now).is_none() {
                    break;
                }
                now += SILENCE / 2;
            }
            pace.told(fresh);
            done += fresh;
            interrupts += 1;
        }
        (interrupts, done)
    }

    #[test]
    fn a_guest_of_one_command_is_told_of_each_at_once() {
        let mut pace = Pace::default();
        run(&mut pace, 1, 2000);
        assert_eq!((pace.goal, pace.failures), (1, 5));
        assert_eq!(run(&mut pace, 1, 1000), (1000, 1000));
        let tries = (0..10_000)
            .filter(|_| {
                let trying = pace.stage == Stage::Trying;
                pace.told(1);
                trying
            })
            .count();
        assert!((5..=20).contains(&tries), "{tries} tries in 10000");
    }

    #[test]
    fn a_guest_of_many_is_told_of_many_at_a_time() {
        let mut pace = Pace::default();
        run(&mut pace, 32, 2000);
        assert_eq!(pace.goal, MOST);
        let (interrupts, done) = run(&mut pace, 32, 8000);
        assert!(interrupts <= done / (MOST - 1), "{interrupts} for {done}");
        // and when it changes its ways, that is learned
        run(&mut pace, 1, 5000);
        assert_eq!(pace.goal, 1);
    }

    #[test]
    fn nothing_is_held_for_long() {
        let mut pace = Pace {
            goal: MOST,
            ..Pace::default()
        };
        let begin = Instant::now();
        let mut now = begin;
        let mut fresh = 1;
        while pace.holds(fresh, now).is_some() {
            now += SILENCE - Duration::from_micros(1);
            fresh = (fresh + 1).min(MOST - 1);
        }
        assert!(now - begin <= LONGEST + SILENCE);
        pace.told(0);
        assert_eq!(pace.goal, 1);
    }

    #[test]
    fn a_ring_is_welcome_when_its_completion_is_told_at_once() {
        let mut pace = Pace::default();
        for _ in 0..1000 {
            let welcome = pace.wants_ring();
            pace.told(1);
            assert!(!welcome || pace.goal() == 1);
        }
        pace.goal = 2;
        assert!(!pace.wants_ring());
    }
}
