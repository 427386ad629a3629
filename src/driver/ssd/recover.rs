//! Resets, giving up, and the end.
//!
//! The order matters: lanes may fail a command, and its owner use the memory again, only when the device cannot reach it any more.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::keeper::{Handle, Keeper, Trouble, driver_options, interrupt_of, set_up, trouble_of};
use super::link::{Order, Pair, count, lock};
use super::{SsdEvent, SsdState, expect};
use crate::driver::{Device as _, Driver, DriverError, bringup};

/// How long lanes are given to stop before the controller is stopped under them.
const PARK_LIMIT: Duration = Duration::from_millis(500);

/// How long lanes are given to let go of a device that is gone, before the device itself is let go of.
const LEAVE_LIMIT: Duration = Duration::from_secs(1);

/// How long a controller has to save its cache, and then to stop, before it is cut off.
#[derive(Clone, Copy)]
struct Patience {
    save: Duration,
    stop: Duration,
}

/// With one that is given up: guests wait for their errors.
const GIVEN_UP: Patience = Patience {
    save: Duration::from_secs(2),
    stop: Duration::from_secs(2),
};

/// At the end: nobody waits, and it may take the time it says it needs.
const AT_THE_END: Patience = Patience {
    save: Duration::MAX,
    stop: Duration::from_secs(10),
};

/// How often a lane that does not stop is woken.
const NUDGE: Duration = Duration::from_millis(50);

const MINUTE: Duration = Duration::from_secs(60);

impl Keeper {
    /// Do what the trouble asks for.
    pub(super) fn recover(&mut self, trouble: Trouble) {
        if self.driver.is_none() {
            return;
        }
        match trouble {
            Trouble::Gone(why) => self.give_up(&why),
            Trouble::Reset(why) => self.reset(&why),
        }
        // What was noted on the way is of a controller that is no more.
        if self.driver.is_none() {
            self.trouble = None;
        }
    }

    fn reset(&mut self, why: &str) {
        let now = Instant::now();
        self.resets
            .retain(|at| now.saturating_duration_since(*at) < MINUTE);
        if self.resets.len() >= self.shared.options.resets_per_minute as usize {
            let n = self.resets.len();
            return self.give_up(&format!("{why}, after {n} resets within a minute"));
        }
        self.resets.push_back(now);
        count(&self.shared.counts.resets, 1);
        tracing::warn!(ssd = self.shared.name, why, "the controller is reset");
        self.shared.set_state(SsdState::Resetting);
        self.shared.publish(&SsdEvent::Resetting);

        // What the device still may write to lives until it has stopped.
        let mut pairs: Vec<Pair> = Vec::new();
        self.order_all(|| Order::Park, &mut pairs);
        self.collect(Some(PARK_LIMIT), &mut pairs);
        let old = self.driver.take();
        let stopped = self.stop_device();
        // Lanes that are slow, and lanes that are made or dropped meanwhile.
        if stopped.is_ok() {
            self.tell_stopped();
            self.let_droppers_go();
            self.collect(None, &mut pairs);
        }
        if stopped.is_ok() && self.shared.stop.load(Ordering::Acquire) {
            self.driver = old;
            return;
        }
        let up = stopped.and_then(|()| self.bring_up_again());
        // From here on either the controller is a new one, or it is isolated before anything is used again.
        match up {
            Ok(driver) => {
                drop((old, pairs));
                self.aborts.clear();
                if !matches!(self.trouble, Some(Trouble::Gone(_))) {
                    self.trouble = None;
                }
                self.driver = Some(driver);
                self.resume();
            }
            Err(error) => {
                self.driver = old;
                self.give_up(&format!("it does not come back: {error}"));
                drop(pairs);
            }
        }
    }

    /// Disable the controller, by a reset of the whole function if it does not listen.
    fn stop_device(&mut self) -> Result<(), DriverError> {
        let options = driver_options(&self.shared);
        match bringup::stop(&mut self.handle, &options) {
            Err(error) if !matches!(error, DriverError::Gone) => {
                tracing::warn!(ssd = self.shared.name, %error, "the controller does not stop");
                self.hard_reset(error)
            }
            result => result,
        }
    }

    fn hard_reset(&mut self, error: DriverError) -> Result<(), DriverError> {
        match self.handle.hard_reset() {
            Ok(true) => bringup::stop(&mut self.handle, &driver_options(&self.shared)),
            Ok(false) => Err(error),
            Err(source) => Err(DriverError::Device {
                what: "resetting the function",
                source,
            }),
        }
    }

    fn bring_up_again(&mut self) -> Result<Driver<Handle>, DriverError> {
        let options = driver_options(&self.shared);
        let mut driver = match Driver::bring_up(self.handle.clone(), options) {
            Err(error) if !matches!(error, DriverError::Gone) => {
                self.hard_reset(error)?;
                Driver::bring_up(self.handle.clone(), options)?
            }
            result => result?,
        };
        let (was, is) = (&self.facts.identify, driver.identify());
        if (was.vid, was.sn, was.mn) != (is.vid, is.sn, is.mn) {
            return Err(DriverError::Unsupported("another SSD in its place"));
        }
        if driver.max_transfer() < self.facts.max_transfer {
            return Err(DriverError::Unsupported("transfers as large as before"));
        }
        let granted = set_up(&mut driver, self.shared.options.queue_pairs.max(1))?;
        let highest = self.lanes.iter().map(|l| l.config.qid).max().unwrap_or(0);
        if granted < highest {
            return Err(DriverError::Unsupported("as many queue pairs as before"));
        }
        self.facts.queue_pairs = granted.min(self.facts.queue_pairs);
        lock(&self.shared.seats).granted = self.facts.queue_pairs;
        // Before anything is submitted again.
        expect::look(&mut driver, &self.shared, |_| true)?;
        Ok(driver)
    }

    /// New queue pairs for all lanes.
    fn resume(&mut self) {
        self.admin_interrupt = self
            .driver
            .as_mut()
            .and_then(|d| interrupt_of(d.admin_queue()));
        self.shared.set_state(SsdState::Ready);
        // Those that were dropped while we were at it need none.
        self.remove_dropped();
        self.refuse_changed();
        for i in 0..self.lanes.len() {
            let Some(config) = self.lanes.get(i).map(|l| l.config) else {
                break;
            };
            let pair = self
                .driver
                .as_mut()
                .ok_or(DriverError::Gone)
                .and_then(|d| d.create_queue_pair(config));
            match pair {
                Ok(pair) => {
                    if let Some(lane) = self.lanes.get(i) {
                        lane.link.order(Order::Resume(Box::new(pair)));
                    }
                }
                Err(error) => {
                    let why = format!("a queue pair could not be made again: {error}");
                    return match trouble_of(&error) {
                        Some(Trouble::Reset(_)) => self.note(Trouble::Reset(why)),
                        _ => self.note(Trouble::Gone(why)),
                    };
                }
            }
        }
        let so_far = self.shared.counters();
        tracing::info!(
            ssd = self.shared.name,
            ?so_far,
            "the controller serves again"
        );
        self.shared.publish(&SsdEvent::Ready);
    }

    /// Give an order to every lane; queue pairs that come back by that go to `pairs`.
    fn order_all(&self, order: impl Fn() -> Order, pairs: &mut Vec<Pair>) {
        for lane in &self.lanes {
            pairs.extend(lane.link.order(order()).map(|p| *p));
        }
    }

    /// Wait until every lane has stopped, at most `limit`. Lanes are made meanwhile, as their pollers may wait for them.
    fn collect(&mut self, limit: Option<Duration>, pairs: &mut Vec<Pair>) {
        let start = Instant::now();
        let mut warned = false;
        loop {
            let mut all = true;
            for lane in &self.lanes {
                let mut mail = lane.link.mail();
                pairs.extend(mail.returned.take().map(|p| *p));
                all &= mail.parked || mail.dropped.is_some();
            }
            let waited = start.elapsed();
            if all
                || limit.is_some_and(|limit| waited >= limit)
                || self.shared.stop.load(Ordering::Acquire)
            {
                return;
            }
            if waited > Duration::from_secs(5) && !warned {
                warned = true;
                tracing::error!(ssd = self.shared.name, "a poller does not stop for a reset");
            }
            self.wait(NUDGE);
            self.answer_lanes();
            for lane in &self.lanes {
                let idle = {
                    let mail = lane.link.mail();
                    mail.parked || mail.dropped.is_some()
                };
                if !idle {
                    lane.link.look.store(true, Ordering::Release);
                    lane.link.wake_lane();
                }
            }
            if limit.is_none() {
                self.let_droppers_go();
            }
        }
    }

    /// The device reaches no memory of ours or of a guest: what lanes had out may end.
    fn tell_stopped(&self) {
        for lane in &self.lanes {
            lane.link.mail().stopped = true;
            lane.link.look.store(true, Ordering::Release);
            lane.link.wake_lane();
        }
    }

    /// The device reaches no memory of ours or of a guest: whoever dropped a lane need not wait.
    fn let_droppers_go(&mut self) {
        for lane in &self.lanes {
            let mut mail = lane.link.mail();
            if let Some(done) = mail.dropped.as_mut() {
                // The mark stays until the lane is removed; the one who waits is told by the end of its sender.
                let (mark, _) = crossbeam_channel::bounded(0);
                *done = mark;
            }
        }
    }

    /// The SSD is not there any more, or not for us: stop it as well as can be, fail everything, let go of it.
    fn give_up(&mut self, why: &str) {
        tracing::error!(ssd = self.shared.name, why, "the SSD is given up");
        self.isolate(GIVEN_UP);
        self.fail_all();
        self.shared.publish(&SsdEvent::Gone);
    }

    /// Keep the device from memory, whatever state it is in.
    fn isolate(&mut self, patience: Patience) {
        if let Some(driver) = &mut self.driver {
            // Cached data goes to the media, if the controller listens.
            if matches!(driver.csts(), Ok(csts) if csts.rdy() && !csts.cfs()) {
                let _ = driver.shut_down_within(false, patience.save);
            }
        }
        let mut options = driver_options(&self.shared);
        options.most_ready_timeout = options.most_ready_timeout.min(patience.stop);
        let stopped = bringup::stop(&mut self.handle, &options);
        if !matches!(stopped, Ok(()) | Err(DriverError::Gone))
            && let Err(error) = self.handle.isolate()
        {
            tracing::error!(
                ssd = self.shared.name, %error,
                "the SSD does not stop, and cannot be kept from memory"
            );
        }
    }

    /// Have every lane fail what it has; then let go of the device.
    fn fail_all(&mut self) {
        self.shared.set_state(SsdState::Gone);
        // Those that nobody has seen yet fail too, before letting go takes its time.
        self.answer_lanes();
        let mut pairs = Vec::new();
        self.order_all(|| Order::Gone, &mut pairs);
        self.let_droppers_go();
        self.collect(Some(LEAVE_LIMIT), &mut pairs);
        self.driver = None;
        drop(pairs);
        (self.admin_interrupt, self.removal) = (None, None);
        self.aborts.clear();
        self.handle.release();
    }

    /// The SSD is not needed any more.
    pub(super) fn end(&mut self) {
        if self.driver.is_some() {
            self.isolate(AT_THE_END);
            self.fail_all();
        }
        let in_all = self.shared.counters();
        tracing::info!(ssd = self.shared.name, ?in_all, "the SSD is let go of");
        self.shared.ended.store(true, Ordering::Release);
        for lane in &self.lanes {
            lane.link.mail().dropped = None;
        }
    }
}
