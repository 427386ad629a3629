//! What a poller knows of one controller: its queues, its channels, its memory.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme_spec::Status;
use nvme_spec::doorbell::Doorbell;
use nvme_spec::ring::RingSize;

use super::bell::{Bell, Shadow};
use super::cq::Cq;
use super::front::Front;
use super::hand_over::{Carried, HandOver};
use super::idle::Awaited;
use super::journal::{Fetched, Journal};
use super::message::{
    Attachment, CqConfig, DoorbellMode, IoFailure, PollerEvent, Reply, ShadowConfig, SqConfig,
};
use super::run::bits;
use super::sq::{Sq, State};
use crate::backend::{AnyChannel, Channel, OpenError};
use crate::io::Limits;
use crate::memory::{GuestMap, Place, Ring, SharedWord};

/// Queue identifiers are below this: vectors and kicks are one eventfd each, of which vhost-user has 64.
pub(super) const MAX_QUEUES: usize = 64;

/// Failures that are reported one by one between two looks at the clock; the counters count all.
const REPORTS: u32 = 64;

/// A change that waits for commands that are out.
pub(super) enum Waiting {
    /// The old memory goes when no slot uses its lost regions any more.
    Memory {
        token: u64,
        old: Arc<GuestMap>,
        new: Arc<GuestMap>,
        /// The number of this change.
        epoch: u64,
    },
    /// All queues are forgotten when nothing is out.
    Reset { token: u64, detach: bool },
    /// A completion queue is handed over, with its submission queues, when nothing of them is out.
    Release { token: u64, cqid: u16, ticks: u32 },
    /// The controller is forgotten when nothing is out; what the journal says stays true.
    Suspend { token: u64 },
}

/// One controller on one poller.
///
/// Channels come first, so that they are dropped first: dropping them ends all use of guest memory.
pub(super) struct Served {
    pub channels: Vec<AnyChannel>,
    pub index: u32,
    pub poller: usize,
    pub at: Attachment,
    /// What is left of its commands if this process ends; `None` = nothing.
    pub journal: Option<Journal>,
    pub sqs: Vec<Option<Sq>>,
    pub cqs: Vec<Option<Cq>>,
    /// Identifiers of the submission queues that exist, for the pass.
    pub active: Vec<u16>,
    /// Identifiers of the completion queues that exist.
    pub active_cqs: Vec<u16>,
    pub shadow: Option<ShadowConfig>,
    pub limits: Limits,
    /// Changes of the guest's memory so far.
    pub epoch: u64,
    /// Commands that are out.
    pub outstanding: usize,
    pub waiting: Vec<Waiting>,
    /// Commands of a process before us that have not begun yet. Their queues fetch nothing until there are none.
    pub carried: VecDeque<Carried>,
    /// Nothing is fetched any more.
    pub suspended: bool,
    /// Queues that leave at the end of this pass. Empty between passes.
    pub leaving: Vec<(u64, HandOver)>,
    /// A queue is being deleted, or something waits.
    pub unsettled: bool,
    /// Completion queues that have something the guest was not interrupted for: one bit each.
    pub posted: u64,
    /// Something came of this controller in the present pass.
    pub touched: bool,
    /// Its commands that are out are looked for.
    pub awaited: bool,
    /// Commands were handed to channels in this pass.
    pub submitted: bool,
    /// Batches found on queues without shadow doorbells since the last look at the clock.
    pub unshadowed_batches: u32,
    pub reports_left: u32,
    /// The admin doorbells as last seen, while watched.
    pub admin: Option<[(SharedWord, u32); 2]>,
    /// What was asked of the controller last, so as not to ask again.
    pub wanted: Option<DoorbellMode>,
}

impl Served {
    pub fn new(
        mut at: Attachment,
        index: u32,
        poller: usize,
        depth: usize,
    ) -> Result<Self, OpenError> {
        let depth = u32::try_from(depth).unwrap_or(u32::MAX);
        let channels = at
            .namespaces
            .iter()
            .map(|ns| ns.backend.channel(depth))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            channels,
            index,
            poller,
            limits: Limits {
                max_transfer: at.max_transfer,
                max_namespaces: at.max_namespaces,
                sgls: at.sgls,
            },
            journal: at.journal.take(),
            at,
            sqs: (0..MAX_QUEUES).map(|_| None).collect(),
            cqs: (0..MAX_QUEUES).map(|_| None).collect(),
            active: Vec::with_capacity(MAX_QUEUES),
            active_cqs: Vec::with_capacity(MAX_QUEUES),
            shadow: None,
            epoch: 0,
            outstanding: 0,
            waiting: Vec::new(),
            carried: VecDeque::new(),
            suspended: false,
            leaving: Vec::new(),
            unsettled: false,
            posted: 0,
            touched: false,
            awaited: false,
            submitted: false,
            unshadowed_batches: 0,
            reports_left: REPORTS,
            admin: None,
            wanted: None,
        })
    }

    pub fn reply(&self, token: u64, result: Result<bool, Status>) {
        self.at.sink.reply(self.poller, Reply { token, result });
    }

    pub fn event(&self, event: PollerEvent) {
        self.at.sink.event(self.poller, event);
    }

    /// Report a failed command, unless there have been too many of late.
    pub fn report(&mut self, failure: IoFailure) {
        if self.reports_left > 0 {
            self.reports_left -= 1;
            self.event(PollerEvent::Failed(failure));
        }
    }

    /// Let channels see to what is not the doing of a request.
    pub fn tend(&mut self) {
        self.channels.iter_mut().for_each(Channel::tend);
    }

    /// Some time has passed.
    pub fn tick(&mut self) {
        self.reports_left = REPORTS;
        self.unshadowed_batches = 0;
    }

    /// The doorbell of a queue that is being made, with its shadow, if there is one. Both may still hold what an
    /// earlier queue of this identifier left there; with a new queue they begin at 0.
    fn bell(&self, doorbell: Doorbell, size: RingSize) -> Result<Bell, Status> {
        let offset = self.at.stride.window_offset(doorbell) as usize;
        let register =
            SharedWord::in_window(&self.at.window, offset).ok_or(Status::INVALID_QUEUE_ID)?;
        register.store(0);
        let shadow = match self.shadow {
            None => None,
            Some(config) => {
                let shadow = self.shadow_of(config, doorbell)?;
                shadow.value.store(0);
                Some(shadow)
            }
        };
        Ok(Bell::new(register, shadow, size))
    }

    pub(super) fn shadow_of(
        &self,
        config: ShadowConfig,
        doorbell: Doorbell,
    ) -> Result<Shadow, Status> {
        let offset = self.at.stride.shadow_offset(doorbell);
        let word = |page: u64| {
            page.checked_add(offset)
                .and_then(|gpa| SharedWord::in_guest(&self.at.map, gpa))
                .ok_or(Status::DATA_TRANSFER_ERROR)
        };
        Ok(Shadow {
            value: word(config.doorbells)?,
            event_idx: word(config.event_idx)?,
        })
    }

    pub fn create_cq(&mut self, config: CqConfig) -> Result<(), Status> {
        let ring = Ring::new(&self.at.map, config.base, config.size.get())
            .ok_or(Status::DATA_TRANSFER_ERROR)?;
        let bell = self.bell(Doorbell::Cq(config.qid), config.size)?;
        let place = self
            .cqs
            .get_mut(usize::from(config.qid))
            .filter(|place| place.is_none() && config.qid != 0)
            .ok_or(Status::INVALID_QUEUE_ID)?;
        self.active_cqs.push(config.qid);
        let cq = Cq::new(config, ring, bell);
        if let Some(journal) = &self.journal {
            cq.record(journal);
        }
        *place = Some(cq);
        Ok(())
    }

    pub fn create_sq(&mut self, config: SqConfig) -> Result<(), Status> {
        if self.cq(config.cqid).is_none() {
            return Err(Status::COMPLETION_QUEUE_INVALID);
        }
        let ring = Ring::new(&self.at.map, config.base, config.size.get())
            .ok_or(Status::DATA_TRANSFER_ERROR)?;
        let bell = self.bell(Doorbell::Sq(config.qid), config.size)?;
        let place = self
            .sqs
            .get_mut(usize::from(config.qid))
            .filter(|place| place.is_none() && config.qid != 0)
            .ok_or(Status::INVALID_QUEUE_ID)?;
        self.active.push(config.qid);
        if let Some(journal) = &self.journal {
            let (number, head) = (config.number, 0);
            journal.fetched(config.qid, Fetched { number, head });
        }
        let mut sq = Sq::new(config, ring, bell);
        // The front-end's word is that of the identifier, which is the completion queue's too: only if it is the same poller's.
        if sq.cqid == sq.qid {
            sq.front = Front::of(&self.at.window, sq.qid);
        }
        *place = Some(sq);
        Ok(())
    }

    /// Forget a completion queue; its kick, which nobody waits for any more.
    pub fn delete_cq(&mut self, qid: u16) -> Result<Option<Arc<File>>, Status> {
        if self.sqs.iter().flatten().any(|sq| sq.cqid == qid) {
            return Err(Status::INVALID_QUEUE_DELETION);
        }
        let place = self
            .cqs
            .get_mut(usize::from(qid))
            .filter(|place| place.is_some())
            .ok_or(Status::INVALID_QUEUE_ID)?;
        let kick = place.take().and_then(|cq| cq.kick);
        self.active_cqs.retain(|q| *q != qid);
        self.posted &= !(1 << (qid & 63));
        Ok(kick)
    }

    pub fn sq(&mut self, qid: u16) -> Option<&mut Sq> {
        place(&mut self.sqs, qid)
    }

    /// Where the next command of a queue will be.
    #[inline]
    pub fn next_command(&self, qid: u16) -> Place {
        match self.sqs.get(usize::from(qid)) {
            Some(Some(sq)) => sq.next_command(),
            _ => Place::default(),
        }
    }

    pub fn cq(&mut self, qid: u16) -> Option<&mut Cq> {
        place(&mut self.cqs, qid)
    }

    /// Use shadow doorbells, for the queues that exist too. All or nothing.
    pub fn set_shadow(&mut self, config: ShadowConfig) -> Result<(), Status> {
        let mut sqs = Vec::new();
        for sq in self.sqs.iter().flatten() {
            sqs.push((sq.qid, self.shadow_of(config, Doorbell::Sq(sq.qid))?));
        }
        let mut cqs = Vec::new();
        for cq in self.cqs.iter().flatten() {
            cqs.push((cq.qid, self.shadow_of(config, Doorbell::Cq(cq.qid))?));
        }
        self.shadow = Some(config);
        // What was rung so far is carried over: the guest has not written its copy yet.
        for (qid, shadow) in sqs {
            if let Some(sq) = self.sq(qid) {
                shadow.value.store(sq.bell.load());
                sq.bell.set_shadow(Some(shadow));
            }
        }
        for (qid, shadow) in cqs {
            if let Some(cq) = self.cq(qid) {
                shadow.value.store(cq.bell.load());
                cq.bell.set_shadow(Some(shadow));
            }
        }
        Ok(())
    }

    /// Forget the shadow doorbells: first of all at a reset, since their pages will be somebody else's.
    pub fn drop_shadow(&mut self) {
        self.shadow = None;
        for sq in self.sqs.iter_mut().flatten() {
            sq.bell.set_shadow(None);
        }
        for cq in self.cqs.iter_mut().flatten() {
            cq.bell.set_shadow(None);
        }
    }

    /// Forget every queue.
    pub fn drop_queues(&mut self) {
        self.drop_shadow();
        self.sqs.iter_mut().for_each(|sq| *sq = None);
        self.cqs.iter_mut().for_each(|cq| *cq = None);
        self.active.clear();
        self.active_cqs.clear();
        self.posted = 0;
    }

    /// The doorbells of this controller, with the identifier of their queue; 0 stands for both of the admin queue.
    pub fn bells(&self) -> impl Iterator<Item = (SharedWord, u8)> {
        let io = self.sqs.iter().flatten();
        let io = io.map(|sq| (sq.bell.word().clone(), sq.qid as u8));
        let admin = self.admin.iter().flatten();
        io.chain(admin.map(|(word, _)| (word.clone(), 0)))
    }

    /// Use other memory; returns what was used so far. Queues whose memory is not there any more stop until it is.
    pub fn set_map(&mut self, map: Arc<GuestMap>) -> Arc<GuestMap> {
        let old = std::mem::replace(&mut self.at.map, map);
        let mut gone = Vec::new();
        let map = Arc::clone(&self.at.map);
        for sq in self.sqs.iter_mut().flatten() {
            sq.ring = Ring::new(&map, sq.base, sq.size.get());
            if sq.ring.is_none() {
                gone.push(sq.qid);
            }
        }
        for cq in self.cqs.iter_mut().flatten() {
            cq.ring = Ring::new(&map, cq.base, cq.size.get());
            if cq.ring.is_none() {
                gone.push(cq.qid);
            }
        }
        if let Some(config) = self.shadow
            && self.renew_shadow(config).is_err()
        {
            // The pages are gone. The registers still work: a guest that can ring at all rings them.
            self.drop_shadow();
            self.shadow = Some(config);
            gone.extend(self.active.iter().copied());
        }
        for qid in gone {
            self.event(PollerEvent::QueueMemoryGone { qid });
        }
        old
    }

    /// Find the shadow words again after a memory change; their contents stay.
    fn renew_shadow(&mut self, config: ShadowConfig) -> Result<(), Status> {
        for qid in self.active.clone() {
            let shadow = self.shadow_of(config, Doorbell::Sq(qid))?;
            if let Some(sq) = self.sq(qid) {
                sq.bell.set_shadow(Some(shadow));
            }
        }
        for qid in self.active_cqs.clone() {
            let shadow = self.shadow_of(config, Doorbell::Cq(qid))?;
            if let Some(cq) = self.cq(qid) {
                cq.bell.set_shadow(Some(shadow));
            }
        }
        Ok(())
    }

    /// Watch the admin doorbells, or stop to.
    pub fn watch_admin(&mut self, on: bool) {
        self.admin = None;
        if !on {
            return;
        }
        let word = |doorbell| {
            let offset = self.at.stride.window_offset(doorbell) as usize;
            SharedWord::in_window(&self.at.window, offset)
        };
        if let (Some(sq), Some(cq)) = (word(Doorbell::Sq(0)), word(Doorbell::Cq(0))) {
            let seen = [sq.load(), cq.load()];
            self.admin = Some([(sq, seen[0]), (cq, seen[1])]);
            // Between the controller's last look and ours something may have been rung.
            self.event(PollerEvent::AdminRung);
        }
    }

    /// Report a ring of the admin doorbells.
    pub fn look_at_admin(&mut self) -> bool {
        let Some(words) = &mut self.admin else {
            return false;
        };
        let mut rung = false;
        for (word, seen) in words {
            let now = word.load();
            rung |= now != *seen;
            *seen = now;
        }
        if rung {
            self.event(PollerEvent::AdminRung);
        }
        rung
    }

    /// Whether a guest can give us work.
    pub fn has_queues(&self) -> bool {
        !self.active.is_empty() || self.admin.is_some()
    }

    /// Whether some queue can only be rung by its register.
    pub fn has_unshadowed(&self) -> bool {
        self.admin.is_some() || self.sqs.iter().flatten().any(|sq| !sq.bell.has_shadow())
    }

    /// Whether the guest can ring without waking anybody. A shadow makes no difference: the ring that EventIdx asks for is a store to the
    /// same doorbell.
    pub fn is_mapped(&self) -> bool {
        self.at.doorbells == DoorbellMode::Mapped && self.has_queues()
    }

    /// Interrupt the guest for each completion queue that has something new, unless that can wait: until then, if so, and
    /// somebody has to call again in the next pass.
    #[inline]
    pub fn signal(&mut self, grace: Duration) -> Option<Instant> {
        let mut until: Option<Instant> = None;
        for cqid in bits(self.posted) {
            let Some(Some(cq)) = self.cqs.get_mut(usize::from(cqid)) else {
                continue;
            };
            let ring_is_due = || place(&mut self.sqs, cqid).is_some_and(|sq| sq.ring_is_due());
            match cq.signal(grace, ring_is_due) {
                None => self.posted &= !(1 << cqid),
                held => until = until.into_iter().chain(held).min(),
            }
        }
        until
    }

    /// What the queues that run wait for.
    fn awaited(&self) -> impl Iterator<Item = Awaited<'_, SharedWord>> {
        let running = |sq: &&Sq| sq.state == State::Running && sq.ring.is_some();
        self.sqs.iter().flatten().filter(running).map(|sq| Awaited {
            tail: (&sq.bell, sq.tail),
            room: self
                .cqs
                .get(usize::from(sq.cqid))
                .and_then(Option::as_ref)
                .filter(|cq| sq.head != sq.tail && cq.is_full())
                .map(|cq| (&cq.bell, cq.head())),
        })
    }

    /// Ask the guest to ring for everything we wait for. A full fence and [`Self::has_work`] must follow.
    pub fn arm(&mut self) {
        let fronts = self.sqs.iter_mut().flatten().flat_map(|sq| &mut sq.front);
        fronts.for_each(Front::asleep);
        self.awaited().for_each(|awaited| awaited.arm());
    }

    /// Whether there is something a pass would do, seen without doing it.
    pub fn has_work(&self) -> bool {
        let mut admin = self.admin.iter().flatten();
        self.awaited().any(|awaited| awaited.has_come())
            || admin.any(|(word, seen)| word.load() != *seen)
    }
}

/// The queue of this identifier.
fn place<Q>(queues: &mut [Option<Q>], qid: u16) -> Option<&mut Q> {
    queues.get_mut(usize::from(qid))?.as_mut()
}
