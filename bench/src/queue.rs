//! One queue pair kept at its depth: the hot loop of the load generator. No allocation, no fence, two doorbell stores a batch.

use std::fs::File;

use guest_tests::frontend::GuestBell;
use hdrhistogram::Histogram;

use crate::fence::{CqRing, Line, SqRing, ticks};
use crate::pattern::Pattern;

/// What a device did that it must not, or that a measurement cannot go on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// A command failed: status code type and status code.
    Status(u16),
    /// A completion for a command that is not out.
    Stranger(u16),
}

impl std::fmt::Display for Wrong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Status(s) => write!(f, "a command failed with status {s:#x} (SCT and SC)"),
            Self::Stranger(cid) => write!(f, "a completion for command {cid}, which is not out"),
        }
    }
}

/// What a queue pair is made of.
pub struct Parts {
    pub sq: SqRing,
    pub cq: CqRing,
    pub entries: u32,
    pub sq_bell: GuestBell,
    pub cq_bell: GuestBell,
    pub interrupt: Option<File>,
    pub pattern: Pattern,
    /// Commands kept out, below `entries`.
    pub depth: u32,
    /// Completions taken at a time, at most.
    pub batch: u32,
}

/// A queue pair with `depth` commands out.
pub struct Queue {
    sq: SqRing,
    cq: CqRing,
    entries: u32,
    batch: u32,
    tail: u32,
    head: u32,
    phase: bool,
    sq_bell: GuestBell,
    cq_bell: GuestBell,
    /// When the command of each identifier was submitted; 0: it is not out.
    started: Box<[u64]>,
    pattern: Pattern,
    times: Histogram<u64>,
    out: u32,
    interrupt: Option<File>,
}

impl Queue {
    /// A queue pair with nothing out yet.
    pub fn new(parts: Parts) -> Self {
        // A minute at 5 GHz. Longer times are counted as that.
        let times = Histogram::new_with_bounds(1, 300_000_000_000, 3).expect("bounds in order");
        Self {
            sq: parts.sq,
            cq: parts.cq,
            entries: parts.entries,
            batch: parts.batch.clamp(1, parts.entries),
            tail: 0,
            head: 0,
            phase: true,
            sq_bell: parts.sq_bell,
            cq_bell: parts.cq_bell,
            started: vec![0; parts.depth as usize].into_boxed_slice(),
            pattern: parts.pattern,
            times,
            out: 0,
            interrupt: parts.interrupt,
        }
    }

    /// Commands that are out.
    pub fn out(&self) -> u32 {
        self.out
    }

    /// The eventfd of its vector, if it interrupts.
    pub fn interrupt(&self) -> Option<&File> {
        self.interrupt.as_ref()
    }

    /// Times of commands, in ticks, since the last [`Self::forget`].
    pub fn times(&self) -> &Histogram<u64> {
        &self.times
    }

    /// Begin to count anew.
    pub fn forget(&mut self) {
        self.times.reset();
    }

    /// Submit as many commands as the depth says.
    pub fn fill(&mut self) {
        let now = ticks();
        for cid in 0..self.started.len() {
            if self.started[cid] == 0 {
                self.issue(cid as u16, now);
                self.out += 1;
            }
        }
        self.sq_bell.ring_plainly(self.tail);
    }

    /// Submit one command, of identifier 0.
    pub fn one(&mut self) {
        self.issue(0, ticks());
        self.out += 1;
        self.sq_bell.ring_plainly(self.tail);
    }

    #[inline]
    fn issue(&mut self, cid: u16, now: u64) {
        let entry: Line = self.pattern.next(cid);
        self.sq.put(self.tail, entry);
        self.started[usize::from(cid)] = now;
        let next = self.tail + 1;
        self.tail = if next == self.entries { 0 } else { next };
    }

    /// Take the completions there are, at most a batch; with `again` submit a command for each. Both doorbells are stored once.
    ///
    /// # Errors
    ///
    /// [`Wrong`]: the measurement is over.
    #[inline]
    pub fn pass(&mut self, again: bool) -> Result<u32, Wrong> {
        let mut high = self.cq.high_half(self.head);
        if (high >> 48) & 1 != u64::from(self.phase) {
            return Ok(0);
        }
        let now = ticks();
        let mut taken = 0;
        loop {
            let cid = (high >> 32) as u16;
            // SC and SCT; then CRD, More and Do Not Retry.
            let status = (high >> 49) as u16 & 0x7FF;
            if status != 0 {
                return Err(Wrong::Status(status));
            }
            match self.started.get(usize::from(cid)) {
                Some(&start) if start != 0 => {
                    self.times.saturating_record(now.saturating_sub(start))
                }
                _ => return Err(Wrong::Stranger(cid)),
            }
            self.head += 1;
            if self.head == self.entries {
                self.head = 0;
                self.phase = !self.phase;
            }
            taken += 1;
            if again {
                self.issue(cid, now);
            } else {
                self.started[usize::from(cid)] = 0;
                self.out -= 1;
            }
            high = self.cq.high_half(self.head);
            if (high >> 48) & 1 != u64::from(self.phase) || taken == self.batch {
                break;
            }
        }
        if again {
            self.sq_bell.ring_plainly(self.tail);
        }
        self.cq_bell.ring_plainly(self.head);
        Ok(taken)
    }
}
