//! When the guest is interrupted for what a completion queue holds: at once, later, or not at all because it is consuming anyway.
//!
//! A state machine without I/O. It promises: each entry is consumed, or followed by an interrupt, within [`GRACE`] or the
//! coalescing time of its posting, whatever the guest does with its head doorbell (`docs/adr/0005`).

use std::time::{Duration, Instant};

/// How long an interrupt waits for a guest that was interrupted before and has not moved its head since. A handler that takes
/// longer is interrupted once more than needed.
pub(super) const GRACE: Duration = Duration::from_micros(32);

/// The Interrupt Coalescing feature as it applies to one vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coalescing {
    /// Aggregation Threshold, zero-based: entries that make an interrupt.
    pub thr_z: u8,
    /// Aggregation Time in units of 100 µs: how long an interrupt may be delayed. 0 = not at all.
    pub time: u8,
}

impl Coalescing {
    /// How long an interrupt for so many entries may be delayed.
    fn delay(self, entries: u32) -> Option<Duration> {
        let few = entries <= u32::from(self.thr_z);
        (few && self.time > 0).then(|| Duration::from_micros(u64::from(self.time) * 100))
    }
}

/// What is to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing: all entries are consumed or signalled.
    Settled,
    /// Look again in the next pass; at this time at the latest there will be an interrupt.
    Wait(Instant),
    /// Interrupt the guest.
    Signal,
}

/// The interrupts of one completion queue.
#[derive(Debug, Default)]
pub(super) struct Interrupts {
    /// Entries that were posted since the last interrupt.
    unsignalled: u32,
    /// Some of them since the last step.
    fresh: bool,
    /// When the first of them was found to wait.
    since: Option<Instant>,
    /// The guest was interrupted when its head doorbell held this, and has not moved it since.
    asked: Option<u32>,
    /// Steps with fresh entries since the last interrupt: so many interrupts there would be without this machine.
    steps: u64,
}

impl Interrupts {
    /// An entry was posted.
    #[inline]
    pub fn posted(&mut self) {
        self.unsignalled = self.unsignalled.saturating_add(1);
        self.fresh = true;
    }

    /// So many entries are there that the guest may not have been told of.
    pub fn posted_many(&mut self, entries: u32) {
        self.unsignalled = entries;
        self.fresh = entries > 0;
    }

    /// Entries that were posted since the last interrupt; the guest may have seen some.
    #[inline]
    pub fn count(&self) -> u32 {
        self.unsignalled
    }

    /// Whether [`Self::step`] has anything to decide.
    #[inline]
    pub fn waiting(&self) -> bool {
        self.unsignalled > 0
    }

    /// The head doorbell was looked at.
    #[inline]
    pub fn saw(&mut self, head: u32) {
        if self.asked.is_some_and(|asked| asked != head) {
            self.asked = None;
        }
    }

    /// Decide. `head` is what the head doorbell holds, be it right or wrong, and `unread` how many entries lie between it and the tail.
    /// `grace` is [`GRACE`], or nothing when nobody is going to look again soon. Returns the verdict and how many
    /// interrupts were spared.
    ///
    /// A guest that was interrupted runs its handler, which takes what it finds and then moves the head. Until the head
    /// moves, further entries may yet be found by the handler; when it has moved, they were found or were missed.
    #[inline]
    pub fn step(
        &mut self,
        head: u32,
        unread: u32,
        coalescing: Coalescing,
        grace: Duration,
        now: impl FnOnce() -> Instant,
    ) -> (Verdict, u64) {
        self.steps += u64::from(std::mem::take(&mut self.fresh));
        self.saw(head);
        self.unsignalled = self.unsignalled.min(unread);
        if self.unsignalled == 0 {
            return (Verdict::Settled, self.settle(0));
        }
        let hold = match coalescing.delay(self.unsignalled) {
            None if self.asked.is_some() && !grace.is_zero() => Some(grace),
            delay => delay,
        };
        if let Some(hold) = hold {
            let now = now();
            let until = *self.since.get_or_insert(now) + hold;
            if now < until {
                return (Verdict::Wait(until), 0);
            }
        }
        self.asked = Some(head);
        (Verdict::Signal, self.settle(1))
    }

    /// Nothing waits any more. How many interrupts were spared, `sent` of them having been sent.
    fn settle(&mut self, sent: u64) -> u64 {
        self.unsignalled = 0;
        self.since = None;
        std::mem::take(&mut self.steps).saturating_sub(sent)
    }

    /// Nobody is to be interrupted for what was posted: the queue has no vector.
    #[inline]
    pub fn forget(&mut self) {
        self.settle(0);
        self.fresh = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OFF: Coalescing = Coalescing { thr_z: 0, time: 0 };

    /// A queue of counters that never wrap: entries posted, and consumed as the guest's head says.
    struct Queue {
        irq: Interrupts,
        posted: u32,
        head: u32,
        now: Instant,
        coalescing: Coalescing,
        /// Up to here an interrupt was sent after the posting.
        covered: u32,
        spared: u64,
        sent: u64,
    }

    impl Queue {
        fn new(coalescing: Coalescing) -> Self {
            Self {
                irq: Interrupts::default(),
                posted: 0,
                head: 0,
                now: Instant::now(),
                coalescing,
                covered: 0,
                spared: 0,
                sent: 0,
            }
        }

        fn post(&mut self, n: u32) {
            for _ in 0..n {
                self.irq.posted();
                self.posted += 1;
            }
        }

        fn look(&mut self, grace: Duration) -> Verdict {
            let (now, unread) = (self.now, self.posted - self.head);
            let (verdict, spared) =
                self.irq
                    .step(self.head, unread, self.coalescing, grace, || now);
            self.spared += spared;
            if verdict == Verdict::Signal {
                self.sent += 1;
                self.covered = self.posted;
            }
            verdict
        }
    }

    #[test]
    fn a_guest_that_waits_for_each_completion_is_interrupted_at_once() {
        let mut q = Queue::new(OFF);
        for n in 1..100 {
            q.post(1);
            assert_eq!(q.look(GRACE), Verdict::Signal);
            assert_eq!(q.look(GRACE), Verdict::Settled);
            q.head = n;
        }
        assert_eq!((q.sent, q.spared), (99, 0));
    }

    #[test]
    fn a_handler_that_runs_is_not_interrupted_again_unless_it_missed_something() {
        let mut q = Queue::new(OFF);
        q.post(1);
        assert_eq!(q.look(GRACE), Verdict::Signal);
        for _ in 0..3 {
            q.post(1);
            assert!(matches!(q.look(GRACE), Verdict::Wait(_)));
        }
        // It found all four.
        q.head = 4;
        assert_eq!(q.look(GRACE), Verdict::Settled);
        assert_eq!((q.sent, q.spared), (1, 3));
        q.post(1);
        assert_eq!(q.look(GRACE), Verdict::Signal);
        q.post(2);
        assert!(matches!(q.look(GRACE), Verdict::Wait(_)));
        // It found one of these two.
        q.head = 6;
        assert_eq!(q.look(GRACE), Verdict::Signal);
        assert_eq!((q.sent, q.spared), (3, 3));
    }

    #[test]
    fn a_guest_that_moves_its_head_late_or_never_is_interrupted_all_the_same() {
        let mut q = Queue::new(OFF);
        q.post(1);
        assert_eq!(q.look(GRACE), Verdict::Signal);
        q.post(1);
        let Verdict::Wait(until) = q.look(GRACE) else {
            panic!("it may be in its handler");
        };
        assert_eq!(until, q.now + GRACE);
        q.now = until;
        assert_eq!(q.look(GRACE), Verdict::Signal);
        // And before the poller sleeps, at once.
        q.post(1);
        assert_eq!(q.look(Duration::ZERO), Verdict::Signal);
    }

    #[test]
    fn coalescing_waits_for_its_threshold_or_its_time() {
        let mut q = Queue::new(Coalescing { thr_z: 3, time: 2 });
        q.post(3);
        let Verdict::Wait(until) = q.look(Duration::ZERO) else {
            panic!("three of four");
        };
        assert_eq!(until, q.now + Duration::from_micros(200));
        q.now += Duration::from_micros(150);
        assert_eq!(
            q.look(Duration::ZERO),
            Verdict::Wait(until),
            "since the first of them"
        );
        q.post(1);
        assert_eq!(q.look(GRACE), Verdict::Signal);
        q.head = 4;
        q.post(1);
        let Verdict::Wait(until) = q.look(GRACE) else {
            panic!("one of four");
        };
        q.now = until;
        assert_eq!(q.look(GRACE), Verdict::Signal);
        // What the guest found by itself does not count.
        q.head = 5;
        q.post(3);
        assert!(matches!(q.look(GRACE), Verdict::Wait(_)));
        q.head = 7;
        q.post(1);
        assert!(matches!(q.look(GRACE), Verdict::Wait(_)), "two are left");
        for off in [
            Coalescing { thr_z: 9, time: 0 },
            Coalescing { thr_z: 0, time: 9 },
        ] {
            let mut q = Queue::new(off);
            q.post(1);
            assert_eq!(q.look(GRACE), Verdict::Signal, "{off:?}");
        }
    }

    proptest! {
        /// Whatever a guest does with its head: an entry that is not consumed is followed by an interrupt in time.
        #[test]
        fn nothing_is_left_unsignalled(
            thr_z in 0u8..6, time in 0u8..3,
            acts in proptest::collection::vec((0u8..5, 0u32..70), 1..200),
        ) {
            let mut q = Queue::new(Coalescing { thr_z, time });
            let longest = GRACE.max(Duration::from_micros(u64::from(time) * 100));
            // When each entry was posted.
            let mut times = Vec::new();
            for (act, n) in acts {
                match act {
                    0 => {
                        q.post(n % 5);
                        times.resize(q.posted as usize, q.now);
                    }
                    1 => q.head += n.min(q.posted - q.head),
                    2 => q.head += (n % 3).min(q.posted - q.head),
                    3 => q.now += Duration::from_micros(u64::from(n)),
                    _ => {
                        q.look(Duration::ZERO);
                    }
                }
                let verdict = q.look(GRACE);
                if let Verdict::Wait(until) = verdict {
                    prop_assert!(until > q.now && until <= q.now + longest);
                } else {
                    prop_assert!(q.covered.max(q.head) == q.posted, "settled, with entries nobody was told of");
                }
                let first = q.covered.max(q.head) as usize;
                if let Some(posted) = times.get(first) {
                    prop_assert!(q.now < *posted + longest, "an entry waited too long");
                }
            }
        }
    }
}
