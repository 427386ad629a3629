//! A completion queue on its poller: room, posting, interrupts.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme_spec::ring::{Phase, RingSize};
use nvme_spec::{Cqe, StatusField};

use super::bell::Bell;
use super::interrupt::{Interrupts, Verdict};
use super::journal::{Fetched, Journal, Posted};
use super::message::Vector;
use super::pace::{self, Pace};
use super::stats::QueueStats;
use crate::memory::Ring;

/// A completion queue.
///
/// `owed + unread < size` always: each fetched command has its place here before it is fetched, so that a completion
/// never finds the queue full. What a completion touches comes first, in the order of declaration.
#[repr(C)]
pub(super) struct Cq {
    /// `None` while its memory is not there.
    pub ring: Option<Ring<2>>,
    pub size: RingSize,
    /// Where the next entry goes.
    tail: u16,
    /// The guest's head, as of the last look.
    head: u16,
    /// Commands that were fetched and have not completed.
    owed: u32,
    phase: Phase,
    /// The guest wrote a head that cannot be; nothing is fetched for this queue any more.
    pub broken: bool,
    pub qid: u16,
    /// Of the creation or move that brought it here.
    number: u32,
    /// What its record in the journal names: a submission queue (0 is none), how far that was, and its number.
    last: (u16, u16, u32),
    pub stats: Arc<QueueStats>,
    pub vector: Option<Arc<Vector>>,
    interrupts: Interrupts,
    /// Where interrupts are dear.
    pace: Option<Box<Pace>>,
    pub bell: Bell,
    pub kick: Option<Arc<File>>,
    pub base: u64,
}

const _: () = assert!(
    std::mem::offset_of!(Cq, stats) <= 64,
    "what a completion touches lies on one cache line"
);

/// What has become of a completion queue, without its memory.
pub(super) struct CqState {
    /// Its memory was not there.
    gone: bool,
    tail: u16,
    head: u16,
    phase: Phase,
    broken: bool,
    interrupts: Interrupts,
    pace: Option<Box<Pace>>,
}

impl CqState {
    /// That of a queue of a process before us, which was so far. The guest may have been told of any of its entries, or not.
    pub fn resumed(size: RingSize, tail: u16, phase: Phase, head: u16, dear: bool) -> Self {
        let mut interrupts = Interrupts::default();
        interrupts.posted_many(size.distance(head, tail));
        Self {
            gone: false,
            tail,
            head,
            phase,
            broken: false,
            interrupts,
            pace: dear.then(Box::default),
        }
    }

    /// Whether its memory was not there when it was on a poller last.
    pub fn gone(&self) -> bool {
        self.gone
    }
}

/// A guest's head doorbell holds a value that its queue does not have.
pub(super) struct InvalidHead;

impl Cq {
    pub fn new(config: super::CqConfig, ring: Ring<2>, bell: Bell) -> Self {
        bell.suppress(0);
        Self {
            qid: config.qid,
            number: config.number,
            last: (0, 0, 0),
            base: config.base,
            size: config.size,
            ring: Some(ring),
            bell,
            pace: config
                .vector
                .as_ref()
                .is_some_and(|vector| vector.is_dear())
                .then(Box::default),
            vector: config.vector,
            kick: config.kick,
            stats: config.stats,
            tail: 0,
            phase: Phase::from_bit(true),
            head: 0,
            owed: 0,
            interrupts: Interrupts::default(),
            broken: false,
        }
    }

    /// Leave this poller. No command is owed a completion.
    pub fn pack(self) -> (super::CqConfig, CqState) {
        let config = super::CqConfig {
            qid: self.qid,
            number: self.number,
            base: self.base,
            size: self.size,
            vector: self.vector,
            kick: self.kick,
            stats: self.stats,
        };
        let state = CqState {
            gone: self.ring.is_none(),
            tail: self.tail,
            head: self.head,
            phase: self.phase,
            broken: self.broken,
            interrupts: self.interrupts,
            pace: self.pace,
        };
        (config, state)
    }

    /// Go on with a queue of another poller.
    pub fn unpack(
        config: super::CqConfig,
        state: CqState,
        ring: Option<Ring<2>>,
        bell: Bell,
    ) -> Self {
        Self {
            qid: config.qid,
            number: config.number,
            last: (0, 0, 0),
            base: config.base,
            size: config.size,
            ring,
            bell,
            vector: config.vector,
            kick: config.kick,
            stats: config.stats,
            tail: state.tail,
            phase: state.phase,
            head: state.head,
            owed: 0,
            interrupts: state.interrupts,
            pace: state.pace,
            broken: state.broken,
        }
    }

    /// Places that are neither taken nor promised, as of the last look at the head.
    #[inline]
    fn room(&self) -> u32 {
        self.size
            .free(self.head, self.tail)
            .saturating_sub(self.owed)
    }

    /// Room for up to `wanted` more commands; looks at the guest's head only when there seems to be less.
    #[inline]
    pub fn reserve(&mut self, wanted: u32) -> Result<u32, InvalidHead> {
        let room = self.room();
        if room >= wanted {
            return Ok(wanted);
        }
        self.look()?;
        Ok(self.room().min(wanted))
    }

    /// Look at the guest's head.
    pub fn look(&mut self) -> Result<(), InvalidHead> {
        if self.broken {
            return Ok(());
        }
        let value = self.bell.load();
        self.interrupts.saw(value);
        let posted = self.size.distance(self.head, self.tail);
        match self.size.index(value) {
            Some(head) if self.size.distance(self.head, head) <= posted => {
                self.head = head;
                self.bell.suppress(head);
                Ok(())
            }
            _ => {
                self.broken = true;
                Err(InvalidHead)
            }
        }
    }

    /// A command has been fetched: it has a place here until it is posted or given up.
    #[inline]
    pub fn promise(&mut self) {
        self.owed += 1;
    }

    /// Post the completion of a promised command.
    #[inline]
    pub fn post(&mut self, mut cqe: Cqe, status: StatusField) {
        self.owed = self.owed.saturating_sub(1);
        let Some(ring) = &self.ring else {
            // The guest took its own queue's memory away; nobody can be told.
            return;
        };
        cqe.status = status.with_p(self.phase.bit());
        ring.write(u32::from(self.tail), cqe.to_halves());
        (self.tail, self.phase) = self.size.next_with_phase(self.tail, self.phase);
        self.interrupts.posted();
    }

    /// Interrupt the guest if it has to be. Returns when it will be at the latest, if that has to wait; somebody has to
    /// call again in the next pass then, and at that time. `grace`: see [`Interrupts::step`]. `ring_is_due`: see [`super::sq::Sq::ring_is_due`].
    #[inline]
    pub fn signal(
        &mut self,
        grace: Duration,
        ring_is_due: impl FnOnce() -> bool,
    ) -> Option<Instant> {
        if !self.interrupts.waiting() {
            return None;
        }
        let Some(vector) = &self.vector else {
            self.interrupts.forget();
            return None;
        };
        let value = self.bell.load();
        let mut unread = u32::MAX;
        if let Some(head) = self.size.index(value) {
            unread = self.size.distance(head, self.tail);
            if !self.broken && unread <= self.size.distance(self.head, self.tail) {
                // It spares the next `reserve` its look.
                self.head = head;
                self.bell.suppress(head);
            }
        }
        let (mut grace, mut fresh) = (grace, 0);
        if let Some(pace) = &mut self.pace {
            fresh = self.interrupts.count().min(unread);
            if !grace.is_zero() {
                let until = match fresh {
                    0 => None,
                    n if n < pace.goal() => pace.holds(n, Instant::now()),
                    _ if ring_is_due() => pace.awaits_ring(Instant::now()),
                    _ => None,
                };
                if until.is_some() {
                    return until;
                }
                // Its handler takes longer, too.
                grace = pace::LONGEST;
            }
        }
        let (verdict, spared) =
            self.interrupts
                .step(value, unread, vector.coalescing(), grace, Instant::now);
        self.stats.suppressed.add(spared);
        match verdict {
            Verdict::Settled => {
                self.pace.iter_mut().for_each(|pace| pace.seen());
                None
            }
            Verdict::Wait(until) => Some(until),
            Verdict::Signal => {
                self.pace.iter_mut().for_each(|pace| pace.told(fresh));
                self.stats.interrupts.add(1);
                if let Err(error) = vector.signal() {
                    tracing::debug!(cq = self.qid, %error, "interrupt not delivered");
                }
                None
            }
        }
    }

    /// Whether the next completion will be told of at once, so that it pays to watch for it.
    pub fn wants_ring(&self) -> bool {
        self.pace.as_ref().is_some_and(|pace| pace.wants_ring())
    }

    /// Whether commands wait for the guest to make room here.
    pub fn is_full(&self) -> bool {
        !self.broken && self.ring.is_some() && self.room() == 0
    }

    /// Write down how far this queue has come, and that a submission queue of this number has come so far with it.
    #[inline]
    pub fn record_batch(&mut self, journal: &Journal, sqid: u16, number: u32, head: u16) {
        if self.last.0 != sqid {
            self.unname(journal);
        }
        self.last = (sqid, head, number);
        self.record(journal);
    }

    /// Write down how far this queue has come.
    #[inline]
    pub fn record(&self, journal: &Journal) {
        let (sqid, head, _) = self.last;
        let posted = Posted {
            number: self.number,
            tail: self.tail,
            phase: self.phase,
            last: (sqid, head),
        };
        journal.record(self.qid, posted);
    }

    /// Give the submission queue that is named in the record a record of its own: the next one names another.
    #[cold]
    fn unname(&mut self, journal: &Journal) {
        let (sqid, head, number) = self.last;
        if sqid != 0 {
            journal.fetched(sqid, Fetched { number, head });
        }
        self.last = (0, 0, 0);
    }

    /// A submission queue goes, and its identifier may be used again: it is named no more.
    pub fn forget(&mut self, journal: &Journal, sqid: u16) {
        if self.last.0 == sqid {
            self.unname(journal);
            self.record(journal);
        }
    }

    /// The head as of the last look.
    pub fn head(&self) -> u16 {
        self.head
    }
}
