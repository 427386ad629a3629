//! The doorbells a poller looks at, side by side: what a pass costs when nobody has rung.

use crate::memory::{Place, SharedWord};

/// Passes after which a queue that was not rung is looked at less often.
const QUIET_AFTER: u32 = 1 << 14;

/// Quiet doorbells are looked at in turn, this part of them each pass.
const QUIET_SHARE: usize = 16;

/// What came of a doorbell that was rung.
#[derive(Clone, Copy, Default)]
pub(super) struct Seen {
    /// There is more to do, whatever the doorbell holds.
    pub again: bool,
    /// Where the next command will be.
    pub next: Place,
}

/// A doorbell, and what it held when everything behind it was done.
pub(super) struct Look {
    bell: SharedWord,
    /// Where the next command will be: asked for with each look at the doorbell, so that both come at the same time and not one
    /// after the other. It costs the guest nothing: its own stores have to fetch the line from us in any case.
    next: Place,
    seen: u32,
    /// Index of the controller on this poller.
    pub served: u16,
    /// The submission queue; 0 is the admin queue, whose two doorbells are only reported.
    pub qid: u8,
    /// There is more to do, whatever the doorbell holds.
    again: bool,
    /// The pass in which it was rung last.
    rung: u32,
}

const _: () = assert!(size_of::<Look>() <= 48, "several on a few cache lines");

/// All doorbells of a poller: the busy ones first.
#[derive(Default)]
pub(super) struct Looks {
    all: Vec<Look>,
    busy: usize,
    /// Where among the quiet ones the next pass goes on.
    turn: usize,
    pass: u32,
}

impl Looks {
    /// Forget all.
    pub fn clear(&mut self) {
        self.all.clear();
        self.busy = 0;
    }

    /// Look at one more, at least once.
    pub fn add(&mut self, bell: SharedWord, served: u16, qid: u8) {
        self.all.push(Look {
            bell,
            next: Place::default(),
            seen: 0,
            served,
            qid,
            again: true,
            rung: self.pass,
        });
        let last = self.all.len() - 1;
        self.all.swap(self.busy, last);
        self.busy += 1;
    }

    /// Look at all busy doorbells and some of the quiet ones. `rung` is called for each that has changed or has more to do, with the
    /// value it holds now.
    #[inline]
    pub fn pass(&mut self, mut rung: impl FnMut(u16, u8, u32) -> Seen) {
        self.pass = self.pass.wrapping_add(1);
        let now = self.pass;
        let (busy, quiet) = self.all.split_at_mut(self.busy);
        for look in busy {
            look.look(now, &mut rung);
        }
        if !quiet.is_empty() {
            let share = quiet.len().div_ceil(QUIET_SHARE);
            let start = if self.turn < quiet.len() {
                self.turn
            } else {
                0
            };
            let end = (start + share).min(quiet.len());
            self.turn = end;
            for at in start..end {
                if quiet.get_mut(at).is_some_and(|l| l.look(now, &mut rung)) {
                    // It was rung: among the busy ones with it.
                    let from = self.busy + at;
                    self.all.swap(self.busy, from);
                    self.busy += 1;
                    // The next one has moved up into its place.
                    self.turn = at;
                    break;
                }
            }
        }
        if now.is_multiple_of(QUIET_AFTER) {
            self.sort();
        }
    }

    /// How many were rung of late.
    #[inline]
    pub fn busy(&self) -> usize {
        self.busy
    }

    /// Let another one of the busy doorbells be looked at first.
    #[cold]
    pub fn rotate(&mut self) {
        if let Some(busy) = self.all.get_mut(..self.busy)
            && busy.len() > 1
        {
            busy.rotate_left(1);
        }
    }

    /// Look at every doorbell, for an empty pass that may be the last before a sleep.
    pub fn all_busy(&mut self) {
        self.busy = self.all.len();
    }

    /// Put those that were not rung of late behind the others.
    #[cold]
    fn sort(&mut self) {
        let now = self.pass;
        let mut at = 0;
        while at < self.busy {
            let quiet = self
                .all
                .get(at)
                .is_some_and(|l| !l.again && now.wrapping_sub(l.rung) >= QUIET_AFTER);
            if quiet {
                self.busy -= 1;
                self.all.swap(at, self.busy);
            } else {
                at += 1;
            }
        }
    }
}

impl Look {
    /// Whether it was rung.
    #[inline]
    fn look(&mut self, now: u32, rung: &mut impl FnMut(u16, u8, u32) -> Seen) -> bool {
        self.next.prefetch();
        let value = self.bell.load();
        if value == self.seen && !self.again {
            return false;
        }
        self.seen = value;
        self.rung = now;
        let Seen { again, next } = rung(self.served, self.qid, value);
        (self.again, self.next) = (again, next);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::DoorbellWindow;
    use std::collections::HashSet;

    fn looks(n: usize) -> (Looks, Vec<SharedWord>) {
        let window = DoorbellWindow::new(n * 4).unwrap();
        let mut looks = Looks::default();
        let words: Vec<_> = (0..n)
            .map(|i| SharedWord::in_window(&window, i * 4).unwrap())
            .collect();
        for (i, word) in words.iter().enumerate() {
            looks.add(word.clone(), i as u16, 1);
        }
        (looks, words)
    }

    fn rung(looks: &mut Looks) -> Vec<(u16, u32)> {
        let mut out = Vec::new();
        looks.pass(|served, _, value| {
            out.push((served, value));
            Seen::default()
        });
        out
    }

    #[test]
    fn each_change_is_seen_once_and_more_work_is_seen_again() {
        let (mut looks, words) = looks(3);
        assert_eq!(rung(&mut looks), [(0, 0), (1, 0), (2, 0)]);
        assert_eq!(rung(&mut looks), []);
        words[1].store(5);
        let mut calls = 0;
        looks.pass(|_, _, _| {
            calls += 1;
            Seen {
                again: true,
                ..Seen::default()
            }
        });
        assert_eq!((calls, rung(&mut looks)), (1, vec![(1, 5)]));
        assert_eq!(rung(&mut looks), []);
    }

    #[test]
    fn a_quiet_doorbell_is_found_within_a_few_passes_and_costs_little_until_then() {
        let (mut looks, words) = looks(100);
        for i in 1..=QUIET_AFTER * 2 {
            words[7].store(i);
            rung(&mut looks);
        }
        assert_eq!(looks.busy, 1, "one is rung all the time");
        let ringers = [3, 50, 99];
        for i in ringers {
            words[i].store(77);
        }
        let mut seen = HashSet::new();
        for _ in 0..2 * QUIET_SHARE {
            seen.extend(rung(&mut looks).into_iter().map(|(served, _)| served));
        }
        for i in ringers {
            assert!(seen.contains(&(i as u16)), "{i}");
        }
        assert_eq!(looks.busy, 4);
        for i in QUIET_AFTER * 2..QUIET_AFTER * 5 {
            words[50].store(i);
            rung(&mut looks);
        }
        assert_eq!(looks.busy, 1);
        looks.all_busy();
        words[99].store(1);
        assert_eq!(rung(&mut looks), [(99, 1)]);
    }
}
