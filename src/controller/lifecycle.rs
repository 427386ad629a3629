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
}

/// A reset that waits for pollers.
pub(super) struct Drain {
    /// Pollers forget the controller as well.
    detach: bool,
    /// Detach them when this is done.
    then_detach: bool,
    since: Instant,
    warned: bool,
    /// Dropped when all is quiet.
    waiters: Vec<Sender<()>>,
}

impl Drain {
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
        let queue = match legal {
            true => AdminQueue::new(&self.map, &shared.window, shared.info.stride, admin),
            false => None,
        };
        match queue {
            Some(queue) => {
                // What was rung while there was no queue was rung for nothing.
                shared.window.clear();
                self.admin = Some(queue);
                self.phase = Phase::Ready;
                // A shutdown of the time before is over, however far it came.
                self.shutdowns = self.shutdowns.wrapping_add(1);
                shared.registers.set_csts(Csts::new().with_rdy(true));
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
        self.admin = None;
        self.pending.forget_admin();
        self.forget_deferred();
        self.phase = Phase::Failed;
        let registers = &self.shared.registers;
        registers.set_csts(registers.csts().with_cfs(true));
    }

    fn shut_down(&mut self, shn: Shn) {
        let shared = Arc::clone(&self.shared);
        let csts = shared.registers.csts();
        if csts.shst() != Shst::NORMAL {
            return;
        }
        self.shutdowns = self.shutdowns.wrapping_add(1);
        if shn == Shn::ABRUPT || self.volatile.is_empty() {
            shared.registers.set_csts(csts.with_shst(Shst::COMPLETE));
            return;
        }
        shared.registers.set_csts(csts.with_shst(Shst::OCCURRING));
        let name = shared.info.name.as_str();
        super::flush::begin(name, self.volatile.clone(), &shared.inbox, self.shutdowns);
    }

    /// The caches have been flushed.
    pub(super) fn flushed(&mut self, shutdown: u64) {
        let registers = &self.shared.registers;
        // A reset in between has made this shutdown pointless.
        if shutdown == self.shutdowns && registers.csts().shst() == Shst::OCCURRING {
            registers.set_csts(registers.csts().with_shst(Shst::COMPLETE));
        }
    }

    /// Forget everything the guest set up, and have pollers do so. `detach`: they forget the controller as well.
    fn start_drain(&mut self, detach: bool, waiter: Option<Sender<()>>) {
        self.admin = None;
        self.shadow = None;
        self.shutdowns = self.shutdowns.wrapping_add(1);
        self.pending.forget_admin();
        self.forget_move();
        self.queues.clear();
        self.features.reset(&self.shared.info);
        self.set_coalescing();
        self.events = super::admin::events::Events::default();
        if let Some(drain) = &mut self.drain {
            // A reset is under way: nothing has been set up since.
            drain.then_detach |= detach && !drain.detach;
            drain.waiters.extend(waiter);
            return;
        }
        self.drain = Some(Drain {
            detach,
            then_detach: false,
            since: Instant::now(),
            warned: false,
            waiters: waiter.into_iter().collect(),
        });
        let pollers = self.attached_pollers();
        if pollers.is_empty() {
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
        if drain.then_detach {
            let mut waiters = drain.waiters.into_iter();
            self.start_drain(true, waiters.next());
            if let Some(next) = &mut self.drain {
                next.waiters.extend(waiters);
            }
            return;
        }
        self.shared.window.clear();
        self.phase = Phase::Disabled;
        self.shared.registers.set_csts(Csts::new());
        drop(drain.waiters);
        self.advance();
    }

    /// A front-end has come.
    pub(super) fn attach(&mut self, front: Arc<dyn FrontEnd>) {
        self.shared.registers.reset();
        self.map = GuestMap::empty();
        self.front = Some(front);
        self.switch.reset();
        self.health.power_on();
        self.start_drain(true, None);
    }

    /// The front-end has gone.
    pub(super) fn detach(&mut self, done: Sender<()>) {
        let shut_down = self.shared.registers.csts().shst() != Shst::NORMAL;
        if self.phase == Phase::Ready && !shut_down {
            self.health.unsafe_shutdown();
        }
        self.shared.registers.reset();
        self.front = None;
        self.map = GuestMap::empty();
        self.forget_kicks();
        self.switch.reset();
        self.start_drain(true, Some(done));
    }

    /// Reset from outside: the registers too.
    pub(super) fn reset_from_outside(&mut self, done: Sender<()>) {
        self.shared.registers.reset();
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
