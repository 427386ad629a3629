//! Enable, reset, shutdown, attach, detach: CC and CSTS, and what must be quiet before either may say so.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use nvme_spec::regs::{Arbitration, Cc, CommandSetSelected, Csts, Shn, Shst};

use super::FrontEnd;
use super::actor::Actor;
use super::admin::queue::AdminQueue;
use super::pending::Work;
use crate::memory::GuestMap;
use crate::poller::{DoorbellMode, Message};

/// Where the controller is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// CSTS.RDY = 0.
    Disabled,
    /// CSTS.RDY = 1.
    Ready,
    /// CSTS.CFS = 1: only a reset helps.
    Failed,
    /// All there is is in the state; nothing is served until a front-end goes on with it, or another one comes.
    Suspended,
}

/// A reset that waits for pollers.
pub(super) struct Drain {
    /// Pollers forget the controller as well.
    detach: bool,
    /// Detach them when this is done.
    then_detach: bool,
    /// Pollers forget the controller, and what was out and is not done stays in the journal.
    suspend: bool,
    /// Suspend it when this is done.
    pub(super) then_suspend: bool,
    since: Instant,
    warned: bool,
    /// Dropped when all is quiet.
    pub(super) waiters: Vec<Sender<()>>,
}

impl Drain {
    /// The end of serving a controller whose state is kept.
    pub(super) fn suspend(waiters: Vec<Sender<()>>) -> Self {
        Self {
            detach: true,
            then_detach: false,
            suspend: true,
            then_suspend: false,
            since: Instant::now(),
            warned: false,
            waiters,
        }
    }

    /// Whether that is what it is.
    pub(super) fn is_suspend(&self) -> bool {
        self.suspend
    }

    /// Whether the controller is suspended in the end.
    pub(super) fn ends_suspended(&self) -> bool {
        self.suspend || self.then_suspend
    }

    /// Whether it takes longer than `limit`; `true` once.
    pub(super) fn is_slow(&mut self, limit: Duration) -> bool {
        let slow = !self.warned && self.since.elapsed() >= limit;
        self.warned |= slow;
        slow
    }
}

impl Actor {
    /// Follow CC, as far as nothing is in the way.
    pub(super) fn advance(&mut self) {
        if self.phase == Phase::Suspended {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let (cc, disabled) = shared.registers.take_cc();
        if (disabled || !cc.en()) && self.phase != Phase::Disabled && self.drain.is_none() {
            self.start_drain(false, None);
        }
        if self.drain.is_some() {
            // Enabling waits for the end of the reset; `finish_drain` comes back here.
            return;
        }
        if cc.en() && self.phase == Phase::Disabled {
            self.enable(cc);
        }
        if cc.shn() == Shn::NORMAL || cc.shn() == Shn::ABRUPT {
            self.shut_down(cc.shn());
        }
    }

    fn enable(&mut self, cc: Cc) {
        let shared = Arc::clone(&self.shared);
        let admin = shared.registers.admin();
        let legal = cc.css() == CommandSetSelected::NVM
            && cc.mps() == 0
            && cc.ams() == Arbitration::ROUND_ROBIN;
        if self.stale {
            self.forget_state();
        }
        if self.stale {
            return self.fail("old state is in the way that would be taken for this guest's");
        }
        let queue = match legal {
            true => AdminQueue::new(&self.map, &shared.window, shared.info.stride, admin),
            false => None,
        };
        match queue {
            Some(queue) => {
                shared.pin.add(0, admin.acq, queue.cq_size());
                // What was rung while there was no queue was rung for nothing.
                shared.window.clear();
                self.admin = Some(queue);
                self.phase = Phase::Ready;
                // A shutdown of the time before is over, however far it came.
                self.shutdowns = self.shutdowns.wrapping_add(1);
                self.csts = Csts::new().with_rdy(true);
                tracing::debug!(controller = shared.info.name.as_str(), "enabled");
            }
            None => {
                let why = format!("cannot be enabled with {cc:?}, {admin:x?}");
                self.fail(&why);
            }
        }
    }

    /// Controller Fatal Status: nothing of the admin queue is served until the guest resets the controller.
    pub(super) fn fail(&mut self, why: &str) {
        self.complain(&format!("controller fatal status: {why}"));
        self.post_admin();
        self.admin = None;
        self.commands.clear();
        self.pending.forget_admin();
        self.forget_deferred();
        self.phase = Phase::Failed;
        self.csts = self.csts.with_cfs(true);
    }

    fn shut_down(&mut self, shn: Shn) {
        let shared = Arc::clone(&self.shared);
        let csts = self.csts;
        if csts.shst() != Shst::NORMAL {
            return;
        }
        self.shutdowns = self.shutdowns.wrapping_add(1);
        if shn == Shn::ABRUPT || self.volatile.is_empty() {
            self.csts = csts.with_shst(Shst::COMPLETE);
            return;
        }
        self.csts = csts.with_shst(Shst::OCCURRING);
        let name = shared.info.name.as_str();
        super::flush::begin(name, self.volatile.clone(), &shared.inbox, self.shutdowns);
    }

    /// The caches have been flushed.
    pub(super) fn flushed(&mut self, shutdown: u64) {
        // A reset in between has made this shutdown pointless.
        if shutdown == self.shutdowns && self.csts.shst() == Shst::OCCURRING {
            self.csts = self.csts.with_shst(Shst::COMPLETE);
        }
    }

    /// Forget everything the guest set up, and have pollers do so. `detach`: they forget the controller as well.
    fn start_drain(&mut self, detach: bool, waiter: Option<Sender<()>>) {
        self.admin = None;
        self.commands.clear();
        self.shadow = None;
        self.shadow_used = None;
        self.shutdowns = self.shutdowns.wrapping_add(1);
        self.pending.forget_admin();
        self.forget_move();
        self.queues.clear();
        self.shared.pin.clear();
        self.features.reset(&self.shared.info);
        self.set_coalescing();
        self.events = super::admin::events::Events::default();
        if let Some(drain) = &mut self.drain {
            // A reset is under way: nothing has been set up since.
            drain.then_detach |= detach && !drain.detach;
            drain.waiters.extend(waiter);
            return;
        }
        // Their numbers begin anew with a new generation, for which pollers have to come anew. So does what is kept, if nothing is.
        let detach = detach || self.is_old() || self.state.is_none();
        self.drain = Some(Drain {
            detach,
            then_detach: false,
            suspend: false,
            then_suspend: false,
            since: Instant::now(),
            warned: false,
            waiters: waiter.into_iter().collect(),
        });
        let pollers = self.attached_pollers();
        if pollers.is_empty() {
            // Before the doorbells are cleared: whoever took that for the guest's doing would fetch commands of before once more.
            self.write_down();
            self.finish_drain();
            return;
        }
        // A poller that resets stops watching.
        self.watcher = None;
        let token = self.pending.begin(pollers.clone(), Work::Drain);
        for poller in pollers {
            let key = self.key;
            let message = match detach {
                true => Message::Detach { token, key },
                false => Message::Reset { token, key },
            };
            self.tell(poller, message);
        }
    }

    /// No poller touches anything of the guest any more.
    pub(super) fn finish_drain(&mut self) {
        let Some(drain) = self.drain.take() else {
            return;
        };
        if drain.detach {
            self.attached.fill(false);
            self.watcher = None;
            self.switch.forget_wants();
        }
        if drain.suspend {
            self.done.extend(drain.waiters);
            if let Some((used, done)) = self.going.take() {
                self.go(used, done);
            }
            return;
        }
        // It could not be written down meanwhile: the next generation has to begin.
        let lost = self.state.is_none() && !drain.detach && !drain.then_suspend;
        if drain.then_detach || lost {
            let mut waiters = drain.waiters.into_iter();
            self.start_drain(true, waiters.next());
            if let Some(next) = &mut self.drain {
                next.waiters.extend(waiters);
            }
            return;
        }
        self.clear_doorbells();
        self.phase = Phase::Disabled;
        self.csts = Csts::new();
        if drain.detach {
            self.begin_generation();
        }
        if drain.then_suspend {
            self.begin_suspend(drain.waiters);
            return;
        }
        self.done.extend(drain.waiters);
        self.advance();
    }

    /// A front-end has come.
    pub(super) fn attach(&mut self, front: Arc<dyn FrontEnd>) {
        self.map = GuestMap::empty();
        self.front = Some(front);
        self.gone = false;
        self.switch.reset();
        let suspending = self.drain.as_ref().is_some_and(Drain::ends_suspended);
        if self.phase == Phase::Suspended || suspending {
            // It says what becomes of what was kept.
            return;
        }
        self.shared.registers.reset();
        self.csts = Csts::new();
        self.health.power_on();
        self.start_drain(true, None);
    }

    /// The front-end has gone.
    pub(super) fn detach(&mut self, done: Sender<()>) {
        if self.phase == Phase::Suspended {
            self.kept = None;
            if self.drain.is_none() {
                self.start_afresh(None);
            }
        }
        let shut_down = self.csts.shst() != Shst::NORMAL;
        if self.phase == Phase::Ready && !shut_down {
            self.health.unsafe_shutdown();
        }
        self.shared.registers.reset();
        self.csts = Csts::new();
        self.front = None;
        self.map = GuestMap::empty();
        self.forget_kicks();
        self.switch.reset();
        self.start_drain(true, Some(done));
    }

    /// Reset from outside: the registers too.
    pub(super) fn reset_from_outside(&mut self, done: Sender<()>) {
        if self.phase == Phase::Suspended {
            match &mut self.drain {
                Some(drain) => drain.waiters.push(done),
                None => {
                    self.start_afresh(None);
                    self.done.push(done);
                }
            }
            return;
        }
        self.shared.registers.reset();
        self.csts = Csts::new();
        // The front-end traps doorbells after this: say so, and let pollers ask anew.
        self.switch.forget_wants();
        self.start_drain(false, Some(done));
    }

    /// The guest's memory has changed.
    pub(super) fn set_memory(&mut self, map: Arc<GuestMap>, done: Sender<()>) {
        self.map = Arc::clone(&map);
        if let Some(admin) = &mut self.admin
            && !admin.rebind(&map)
        {
            self.fail("the memory of the admin queues has gone");
        }
        if let Some(drain) = &mut self.drain
            && drain.detach
        {
            // These pollers will forget all memory; those that come later get the new one.
            drain.waiters.push(done);
            return;
        }
        let pollers = self.attached_pollers();
        if pollers.is_empty() {
            return;
        }
        let token = self
            .pending
            .begin(pollers.clone(), Work::Memory { _done: done });
        for poller in pollers {
            let (key, map) = (self.key, Arc::clone(&map));
            self.tell(poller, Message::SetMemory { token, key, map });
        }
    }

    /// How doorbells may reach us, for a poller that is told of us now.
    pub(super) fn doorbell_mode(&self) -> DoorbellMode {
        self.switch.mode()
    }
}
