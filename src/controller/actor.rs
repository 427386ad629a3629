//! The thread of a controller: it owns all state that is not registers, and never blocks on anybody.
//!
//! One [`Actor::turn`] looks at everything: CC, the mail, reports, the admin queue. Between turns it sleeps until
//! its eventfd or the admin queue's kick is written. What needs a poller is sent, noted in [`Pending`], and ended when the answer comes.

use std::cell::RefCell;
use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crossbeam_channel::Sender;
use nvme_spec::event::AsyncEvent;
use nvme_spec::log::CriticalWarning;
use nvme_spec::regs::Csts;

use super::admin::events::Events;
use super::admin::features::Features;
use super::admin::queue::AdminQueue;
use super::doorbells::Switch;
use super::error_log::ErrorLog;
use super::health::Health;
use super::image::{Fingerprint, Image};
use super::inbox::{Inbox, Mail, Outbox};
use super::info::Info;
use super::lifecycle::{Drain, Phase};
use super::moving::Move;
use super::pending::Pending;
use super::placement::{self, Candidate, Placement, Policy};
use super::queues::Queues;
use super::registers::Registers;
use super::resume::{Keeping, Kept};
use super::throttle::Throttle;
use super::{DRAIN_LIMIT, FrontEnd};
use crate::backend::Backend;
use crate::io::Namespace;
use crate::memory::{DoorbellWindow, GuestMap};
use crate::poller::sleep::Bed;
use crate::poller::{
    ControlSink, ControllerKey, DoorbellMode, Message, PollerEvent, PollerHandle, ShadowConfig,
    Vector,
};
use crate::state::{Keep, StateFile};

/// Messages handled in a turn before the admin queue has its say.
const MAIL_BATCH: usize = 256;

/// The way to a poller: [`PollerHandle`], or a script in a test.
pub(super) trait Port: Send {
    /// Put a message into its mailbox.
    fn send(&self, message: Message);

    /// How many queues it has, of all controllers.
    fn queues(&self) -> usize;

    /// Of these, there were `before` of ours and are `now`.
    fn count_queues(&self, before: usize, now: usize);

    /// Commands that it can have out.
    fn slots(&self) -> usize;

    /// The NUMA node of its core.
    fn node(&self) -> Option<u32>;
}

impl Port for PollerHandle {
    fn send(&self, message: Message) {
        PollerHandle::send(self, message);
    }

    fn queues(&self) -> usize {
        PollerHandle::queues(self)
    }

    fn count_queues(&self, before: usize, now: usize) {
        PollerHandle::count_queues(self, before, now);
    }

    fn slots(&self) -> usize {
        self.slots
    }

    fn node(&self) -> Option<u32> {
        self.node
    }
}

/// What the actor shares with the methods of [`Controller`](super::Controller).
pub(super) struct Shared {
    pub(super) info: Info,
    pub(super) registers: Registers,
    pub(super) window: Arc<DoorbellWindow>,
    pub(super) vectors: Vec<Arc<Vector>>,
    pub(super) pin: super::pin::Pin,
    pub(super) inbox: Arc<Inbox>,
    /// The instance id that the front-end presented.
    pub(super) instance: Mutex<Option<[u8; 16]>>,
    /// What was left by a process or a front-end before.
    pub(super) keeping: Mutex<Keeping>,
    /// Nothing is served until the front-end says what it is.
    pub(super) suspended: AtomicBool,
    /// A guest may still be running whose front-end is not here, and will ask for what is kept.
    pub(super) awaited: AtomicBool,
}

impl Shared {
    pub(super) fn instance(&self) -> Option<[u8; 16]> {
        *lock(&self.instance)
    }

    pub(super) fn set_instance(&self, id: Option<[u8; 16]>) {
        *lock(&self.instance) = id;
    }

    pub(super) fn keeping(&self) -> Keeping {
        *lock(&self.keeping)
    }

    pub(super) fn set_keeping(&self, keeping: Keeping, suspended: bool) {
        *lock(&self.keeping) = keeping;
        self.suspended.store(suspended, Ordering::Release);
    }

    pub(super) fn set_awaited(&self, awaited: bool) {
        self.awaited.store(awaited, Ordering::Release);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The values are plain numbers: whoever panicked left a valid one.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the actor needs to begin with.
pub(super) struct Parts {
    pub(super) shared: Arc<Shared>,
    pub(super) outbox: Outbox,
    pub(super) key: ControllerKey,
    pub(super) ports: Vec<Box<dyn Port>>,
    /// Where queues may go.
    pub(super) placement: Placement,
    /// As pollers want them, in the order of `shared.info.namespaces`.
    pub(super) namespaces: Arc<[Namespace]>,
    /// Stores that must be flushed when the guest shuts down.
    pub(super) volatile: Vec<Arc<Backend>>,
    /// Where it sleeps; empty.
    pub(super) bed: Bed,
    /// Where its state is kept.
    pub(super) keep: Arc<Keep>,
}

/// The state of the control plane.
pub(super) struct Actor {
    pub(super) shared: Arc<Shared>,
    outbox: Outbox,
    pub(super) key: ControllerKey,
    pub(super) ports: Vec<Box<dyn Port>>,
    pub(super) placement: Placement,
    /// Our queues on each poller, as the ports were told.
    counted: Vec<usize>,
    pub(super) namespaces: Arc<[Namespace]>,
    pub(super) volatile: Vec<Arc<Backend>>,
    /// Which pollers know this controller.
    pub(super) attached: Vec<bool>,
    pub(super) front: Option<Arc<dyn FrontEnd>>,
    pub(super) map: Arc<GuestMap>,
    pub(super) kicks: Vec<Option<Arc<File>>>,
    pub(super) switch: Switch,
    /// The poller that watches the admin doorbells while they are mapped.
    pub(super) watcher: Option<usize>,
    pub(super) phase: Phase,
    pub(super) drain: Option<Drain>,
    pub(super) shutdowns: u64,
    pub(super) admin: Option<AdminQueue>,
    pub(super) queues: Queues,
    pub(super) shadow: Option<ShadowConfig>,
    pub(super) features: Features,
    pub(super) events: Events,
    pub(super) errors: ErrorLog,
    pub(super) health: Health,
    /// NSIDs that changed since the guest read the list, ascending.
    pub(super) changed: Vec<u32>,
    pub(super) pending: Pending,
    /// The queue that moves to another poller now.
    pub(super) moving: Option<Move>,
    /// How many queues were created and moved in this generation.
    pub(super) number: u32,
    pub(super) throttle: Throttle,
    bed: Bed,
    stop: bool,
    pub(super) keep: Arc<Keep>,
    pub(super) fingerprint: Fingerprint,
    /// The generation of the state that is written now.
    pub(super) state: Option<Arc<StateFile>>,
    /// What it says.
    pub(super) committed: Option<Image>,
    /// A generation that does not count any more could not be removed: nothing may happen that it does not tell of.
    pub(super) stale: bool,
    /// While suspended: what was left.
    pub(super) kept: Option<Kept>,
    /// A front-end that waits for the end of a suspension: whether its guest has used the device.
    pub(super) going: Option<(bool, Sender<()>)>,
    /// The front-end has said go.
    pub(super) gone: bool,
    /// Namespaces that changed while suspended.
    pub(super) late: Vec<u32>,
    /// Admin commands that were fetched and have not completed, oldest first; no asynchronous event requests.
    pub(super) commands: Vec<[u64; 8]>,
    /// Shadow doorbells, once all pollers use them.
    pub(super) shadow_used: Option<ShadowConfig>,
    /// CSTS, to be shown at the end of the turn.
    pub(super) csts: Csts,
    /// Messages that are sent at the end of the turn.
    pub(super) outbound: RefCell<Vec<(usize, Message)>>,
    /// Dropped at the end of the turn: what they wait for is done.
    pub(super) done: Vec<Sender<()>>,
}

impl Actor {
    pub(super) fn new(parts: Parts) -> Self {
        let info = &parts.shared.info;
        let pollers = parts.ports.len();
        let mut actor = Self {
            keep: parts.keep,
            fingerprint: Fingerprint::of(info, &parts.namespaces),
            state: None,
            committed: None,
            stale: false,
            kept: None,
            going: None,
            gone: false,
            late: Vec::new(),
            commands: Vec::new(),
            shadow_used: None,
            csts: Csts::new(),
            outbound: RefCell::default(),
            done: Vec::new(),
            attached: vec![false; pollers],
            front: None,
            map: GuestMap::empty(),
            kicks: vec![None; usize::from(info.queues)],
            switch: Switch::new(pollers),
            watcher: None,
            phase: Phase::Disabled,
            drain: None,
            shutdowns: 0,
            admin: None,
            queues: Queues::new(info.queues),
            shadow: None,
            features: Features::new(info),
            events: Events::default(),
            errors: ErrorLog::default(),
            health: Health::new(pollers),
            changed: Vec::new(),
            pending: Pending::default(),
            moving: None,
            number: 0,
            throttle: Throttle::new(),
            bed: parts.bed,
            stop: false,
            shared: parts.shared,
            outbox: parts.outbox,
            key: parts.key,
            ports: parts.ports,
            placement: parts.placement,
            counted: vec![0; pollers],
            namespaces: parts.namespaces,
            volatile: parts.volatile,
        };
        actor.look_for_state();
        actor
    }

    /// Run until told to stop.
    pub(super) fn run(mut self) {
        if let Err(error) = self.bed.add_edge(self.shared.inbox.fd()) {
            let controller = self.shared.info.name.as_str();
            tracing::error!(controller, "cannot wait for its eventfd: {error}");
            return;
        }
        loop {
            let more = self.turn();
            if self.stop {
                break;
            }
            if !more {
                self.sleep();
            }
        }
        // A transport that waits gets its answer.
        self.end_turn();
        self.queues.clear();
        self.count_queues();
        // Nobody waits for the answers: a poller keeps alive what its I/O needs.
        for poller in self.attached_pollers() {
            let token = self.pending.unanswered();
            self.tell(
                poller,
                Message::Detach {
                    token,
                    key: self.key,
                },
            );
        }
        // Nothing of this goes into the state: whoever goes on finds it as it is.
        self.phase = Phase::Suspended;
        self.end_turn();
    }

    /// Look at everything once; whether there is more to do right away.
    pub(super) fn turn(&mut self) -> bool {
        let shared = Arc::clone(&self.shared);
        shared.inbox.awake();
        let mut more = false;
        for n in 0.. {
            match self.outbox.mail.try_recv() {
                Ok(mail) => self.take(mail),
                Err(_) => break,
            }
            if n >= MAIL_BATCH {
                more = true;
                break;
            }
        }
        for poller in 0..self.ports.len() {
            if let Some(mode) = shared.inbox.take_want(poller) {
                self.switch.want(poller, mode);
            }
        }
        self.collect_failures();
        self.advance();
        self.switch_doorbells();
        more |= self.serve_admin();
        self.warn_of_slow_drain();
        self.count_queues();
        self.end_turn();
        more
    }

    /// Tell pollers, for the choices of others, how many of our queues they have.
    fn count_queues(&mut self) {
        let loads = self.queues.loads(self.ports.len());
        for ((port, before), now) in self.ports.iter().zip(&mut self.counted).zip(loads) {
            if *before != now {
                port.count_queues(*before, now);
                *before = now;
            }
        }
    }

    /// Choose a poller for a new completion queue with its ring at `base`.
    pub(super) fn choose_poller(&self, base: u64) -> Option<usize> {
        let own = self.queues.loads(self.ports.len());
        let ports = self.ports.iter().zip(&self.counted).zip(own).enumerate();
        let candidates: Vec<_> = ports
            .filter(|(poller, _)| self.placement.allows(*poller))
            .map(|(poller, ((port, counted), own))| Candidate {
                poller,
                // Ours of this turn are not counted there yet.
                queues: port.queues().saturating_sub(*counted).saturating_add(own),
                own,
                node: port.node(),
            })
            .collect();
        let memory = match self.placement.policy {
            Policy::Numa => {
                let admin = self.shared.registers.admin();
                self.map.node(&[base, admin.asq, admin.acq])
            }
            _ => None,
        };
        let start = usize::try_from(self.key.0).unwrap_or(0);
        placement::pick(self.placement.policy, &candidates, start, memory)
    }

    /// Take the reports of failed commands. A poller reports before the guest sees the completion: so a guest that asks for the
    /// log finds what it was told of.
    pub(super) fn collect_failures(&mut self) {
        while let Ok(failure) = self.outbox.failures.try_recv() {
            self.errors.record(&failure);
        }
        self.errors.lost(self.shared.inbox.take_lost());
    }

    fn take(&mut self, mail: Mail) {
        match mail {
            Mail::Ping(answer) => drop(answer),
            Mail::Stop => self.stop = true,
            Mail::Attach(front) => self.attach(front),
            Mail::Detach(done) => self.detach(done),
            Mail::Reset(done) => self.reset_from_outside(done),
            Mail::Suspend(done) => self.suspend(done),
            Mail::Abandon => self.abandon(),
            Mail::Go(used, done) => self.go(used, done),
            Mail::Fresh(done) => {
                self.done.push(done);
                if self.phase == Phase::Suspended && self.drain.is_none() {
                    self.start_afresh(None);
                }
            }
            Mail::Sync(done) => self.done.push(done),
            Mail::Memory(map, done) => self.set_memory(map, done),
            Mail::Kick(index, kick) => self.set_kick(index, kick),
            Mail::Doorbells(mode) => {
                if self.switch.acknowledged(mode) {
                    self.tell_doorbells();
                }
            }
            Mail::Released(poller, token, queues) => self.released(poller, token, queues),
            Mail::Move(cqid, to, done) => self.move_queue(cqid, to, done),
            Mail::Placement(to) => {
                let _ = to.try_send(self.placed());
            }
            Mail::Reply(poller, reply) => self.answered(poller, &reply),
            Mail::Stopped(event) => self.queue_stopped(event),
            Mail::NamespaceChanged(nsid) => self.namespace_changed(nsid),
            Mail::Health(warning) => self.health_changed(warning),
            Mail::Flushed(shutdown) => self.flushed(shutdown),
        }
    }

    /// Whether no mail waits.
    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        self.outbox.mail.is_empty()
    }

    fn queue_stopped(&mut self, event: PollerEvent) {
        let (qid, what, event) = match event {
            PollerEvent::InvalidDoorbell { qid } => (
                qid,
                "the guest wrote a value to its doorbell that the queue does not have",
                AsyncEvent::INVALID_DOORBELL_VALUE,
            ),
            PollerEvent::QueueMemoryGone { qid } => (
                qid,
                "its memory has gone",
                AsyncEvent::TRANSIENT_INTERNAL_ERROR,
            ),
            _ => return,
        };
        self.complain(&format!("I/O queue {qid} has stopped: {what}"));
        // A queue of the time before a reset is none of the guest's business any more.
        if self.admin.is_some() {
            self.errors.record_queue(qid);
            self.events.raise(event);
        }
    }

    /// An SSD reports on its health: the log has a copy by now.
    fn health_changed(&mut self, warning: CriticalWarning) {
        for (on, event) in [
            (warning.spare(), AsyncEvent::SPARE_BELOW_THRESHOLD),
            (warning.temperature(), AsyncEvent::TEMPERATURE_THRESHOLD),
            (
                warning.reliability() || warning.read_only(),
                AsyncEvent::NVM_SUBSYSTEM_RELIABILITY,
            ),
        ] {
            if on {
                self.events.raise(event);
            }
        }
    }

    pub(super) fn namespace_changed(&mut self, nsid: u32) {
        if self.phase == Phase::Suspended {
            if !self.late.contains(&nsid) {
                self.late.push(nsid);
            }
            return;
        }
        if let Err(at) = self.changed.binary_search(&nsid)
            && self.shared.info.namespace(nsid).is_some()
        {
            self.changed.insert(at, nsid);
        }
        self.events.raise(AsyncEvent::NAMESPACE_ATTRIBUTE_CHANGED);
    }

    /// Send a message to a poller, at the end of the turn.
    pub(super) fn tell(&self, poller: usize, message: Message) {
        self.outbound.borrow_mut().push((poller, message));
    }

    /// The pollers that know this controller.
    pub(super) fn attached_pollers(&self) -> Vec<usize> {
        let known = self.attached.iter().enumerate();
        known.filter_map(|(i, yes)| yes.then_some(i)).collect()
    }

    /// Ourselves, for pollers.
    pub(super) fn sink(&self) -> Arc<dyn ControlSink> {
        Arc::clone(&self.shared.inbox) as _
    }

    /// A line in the log about something the guest did; not more of them than a person can read.
    pub(super) fn complain(&mut self, what: &str) {
        if let Some(missed) = self.throttle.pass() {
            let controller = self.shared.info.name.as_str();
            match missed {
                0 => tracing::warn!(controller, "{what}"),
                missed => tracing::warn!(controller, missed, "{what}"),
            }
        }
    }

    fn set_kick(&mut self, index: usize, kick: Option<File>) {
        let kick = kick.map(Arc::new);
        if index == 0 {
            self.wait_for_kick(kick.as_deref());
        }
        let Some(slot) = self.kicks.get_mut(index) else {
            return;
        };
        slot.clone_from(&kick);
        let Ok(qid) = u16::try_from(index) else {
            return;
        };
        let key = self.key;
        for poller in self.queues.pollers_of_kick(qid) {
            let kick = kick.clone();
            self.tell(poller, Message::SetKick { key, qid, kick });
        }
    }

    /// Be woken by this kick of the admin queue, and not by the one before. It is never read: the other end of it is the
    /// front-end's, which could read first and let us wait.
    fn wait_for_kick(&mut self, kick: Option<&File>) {
        if let Some(Some(old)) = self.kicks.first() {
            self.bed.remove(old);
        }
        if let Some(kick) = kick
            && let Err(error) = self.bed.add_edge(kick)
        {
            self.complain(&format!(
                "the admin queue's kick cannot be waited for: {error}"
            ));
        }
    }

    /// Forget all kicks.
    pub(super) fn forget_kicks(&mut self) {
        self.wait_for_kick(None);
        self.kicks.fill(None);
    }

    fn switch_doorbells(&mut self) {
        // A front-end that is busy with a reset has nothing mapped that matters; ask when it is done.
        if self.drain.is_some() {
            return;
        }
        let before = self.switch.mode();
        if let Some(front) = &self.front
            && let Some(mode) = self.switch.next()
        {
            front.request_doorbells(mode);
        }
        if self.switch.mode() != before {
            self.tell_doorbells();
        }
        self.watch_admin();
    }

    /// Tell pollers how doorbells reach us now.
    fn tell_doorbells(&mut self) {
        let mode = self.switch.mode();
        for poller in self.attached_pollers() {
            let key = self.key;
            self.tell(poller, Message::SetDoorbells { key, mode });
        }
        self.watch_admin();
    }

    /// Have one poller watch the admin doorbells, exactly while nobody kicks.
    pub(super) fn watch_admin(&mut self) {
        // Doorbells that are mapped whether anyone wants it or not need a watcher before there is an I/O queue.
        if self.switch.mode() == DoorbellMode::Mapped
            && self.admin.is_some()
            && !self.attached.contains(&true)
            && let Some(poller) = self.choose_poller(self.shared.registers.admin().asq)
        {
            // It comes back here.
            return self.introduce(poller);
        }
        let wanted = match self.switch.mode() {
            DoorbellMode::Trapped => None,
            DoorbellMode::Mapped => self
                .watcher
                .filter(|w| self.attached.get(*w) == Some(&true))
                .or_else(|| self.attached_pollers().first().copied()),
        };
        if wanted == self.watcher {
            return;
        }
        let key = self.key;
        if let Some(old) = std::mem::replace(&mut self.watcher, wanted)
            && self.attached.get(old) == Some(&true)
        {
            self.tell(old, Message::WatchAdmin { key, on: false });
        }
        if let Some(new) = wanted {
            self.tell(new, Message::WatchAdmin { key, on: true });
        }
    }

    fn warn_of_slow_drain(&mut self) {
        let Some(drain) = &mut self.drain else { return };
        if drain.is_slow(DRAIN_LIMIT) {
            let controller = self.shared.info.name.as_str();
            tracing::warn!(
                controller,
                "a reset still waits for I/O that is out; the guest's memory stays mapped until it ends"
            );
        }
    }

    /// Wait for news.
    fn sleep(&mut self) {
        let sample = (self.phase == Phase::Ready)
            .then(|| self.health.sample(&self.shared.info, Instant::now()));
        let warn = self.drain.is_some().then_some(DRAIN_LIMIT);
        self.bed.sleep(sample.into_iter().chain(warn).min());
    }
}
