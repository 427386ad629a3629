//! What the keeper looks after while the SSD serves: overdue commands, events, the controller's status.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nvme_spec::admin::Abort;
use nvme_spec::command::NSID_BROADCAST;
use nvme_spec::event::{AsyncEvent, AsyncEventConfig, EventType};
use nvme_spec::feature::FeatureId;
use nvme_spec::log::{ChangedNamespaceList, ErrorLogEntry, LogId, SmartLog};

use zerocopy::FromBytes as _;

use super::keeper::{Handle, Keeper, Trouble, read_error_log};
use super::link::{Order, count, lock};
use super::{SsdEvent, SsdState};
use crate::driver::{Driver, DriverError};

/// Events that are listened to in a tick.
const EVENTS_PER_TICK: u32 = 8;

/// Asynchronous Event Requests to have out.
const EVENTS: u32 = 4;

/// Entries of the error log that are told of at a time.
const ERRORS_TOLD: usize = 4;

/// How often the health is read.
const HEALTH: Duration = Duration::from_secs(60);

/// Abort commands that are out at a time, whatever the SSD allows.
const MOST_ABORTS: u8 = 15;

/// Have the SSD report what it can.
pub(super) fn ask_for_events(driver: &mut Driver<Handle>) -> Result<(), DriverError> {
    let oaes = driver.identify().oaes;
    let config = AsyncEventConfig::new()
        .with_smart(0x1F)
        .with_namespace_attribute(oaes.namespace_attribute());
    let cdw11 = config.into_bits();
    match driver.set_feature(FeatureId::ASYNC_EVENT_CONFIG, 0, cdw11) {
        // An old one may know fewer bits, or none: it still reports errors.
        Ok(_) | Err(DriverError::Refused { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

impl Keeper {
    /// A tick of the clock has passed.
    pub(super) fn ticked(&mut self) {
        self.shared.epoch.fetch_add(1, Ordering::Relaxed);
        self.events_heard = 0;
        let interrupts = self.interrupts;
        for lane in &self.lanes {
            if !lane.link.busy.load(Ordering::Relaxed) {
                continue;
            }
            let asleep = std::mem::replace(&mut lane.link.mail().check, true);
            lane.link.look.store(true, Ordering::Release);
            // It has not looked since the last tick: its poller sleeps.
            if asleep || !interrupts {
                lane.link.wake_lane();
            }
        }
        if self.driver.is_some() {
            self.look_at_status();
            self.look_at_health();
            // Not whenever one is answered: a device that refuses them would keep us busy.
            let _ = self.with_driver(|d| d.arm_events(EVENTS));
        }
        let late = self.shared.options.admin_timeout;
        if self.aborts.iter().any(|(_, since)| since.elapsed() > late) {
            self.note(Trouble::Reset("an Abort command was not answered".into()));
        }
    }

    /// Read the SMART / Health log now and then. Nobody waits for it.
    fn look_at_health(&mut self) {
        let now = Instant::now();
        if self.driver.is_some() && now >= self.next_health {
            self.next_health = now + HEALTH;
            // Not so that it counts as the answer to an event.
            let _ = self.read_health(true);
        }
    }

    /// Read the SMART / Health log, and keep a copy. `retain`: events about it stay masked.
    pub(super) fn read_health(&mut self, retain: bool) -> Result<SmartLog, DriverError> {
        let len = size_of::<SmartLog>();
        let bytes = self.with_driver(|d| d.log_page(LogId::SMART, NSID_BROADCAST, len, retain))?;
        let log = SmartLog::read_from_bytes(&bytes)
            .map_err(|_| DriverError::Unsupported("a log page of this size"))?;
        *lock(&self.shared.health) = Some(log);
        Ok(log)
    }

    fn look_at_status(&mut self) {
        match self.with_driver(|d| d.csts()) {
            Ok(csts) if csts.cfs() => {
                self.note(Trouble::Reset("it reports a fatal status".into()));
            }
            Ok(csts) if !csts.rdy() => {
                self.note(Trouble::Reset("it was disabled by somebody else".into()));
            }
            Ok(_) | Err(DriverError::Gone) => {}
            Err(error) => self.note(Trouble::Gone(error.to_string())),
        }
    }

    /// Read what the lanes report.
    pub(super) fn read_mail(&mut self) {
        if !self.shared.news.swap(false, Ordering::AcqRel) {
            return;
        }
        let mut to_abort = Vec::new();
        let mut late = 0;
        let mut trouble = None;
        for lane in &self.lanes {
            let mut mail = lane.link.mail();
            to_abort.extend(mail.to_abort.drain(..).map(|cid| (lane.config.qid, cid)));
            late += std::mem::take(&mut mail.late);
            if std::mem::take(&mut mail.expired) {
                trouble = Some(Trouble::Reset("a command was not done in time".into()));
            }
            if let Some(fault) = mail.fault.take() {
                let qid = lane.config.qid;
                trouble = Some(Trouble::Reset(format!(
                    "a wrong completion on queue {qid}: {fault:?}"
                )));
            }
        }
        if let Some(trouble) = trouble {
            self.note(trouble);
        }
        if self.shared.state() == SsdState::Ready {
            self.remove_dropped();
            if late > 0 {
                tracing::warn!(ssd = self.shared.name, commands = late, "overdue");
            }
            for (qid, cid) in to_abort {
                self.abort(qid, cid);
            }
        }
    }

    /// Delete the queues of lanes that have been dropped. During a reset they stay: their identifiers must not be used before its end.
    pub(super) fn remove_dropped(&mut self) {
        let mut i = 0;
        while let Some(lane) = self.lanes.get(i) {
            let (pair, done) = {
                let mut mail = lane.link.mail();
                let Some(done) = mail.dropped.take() else {
                    i += 1;
                    continue;
                };
                let new = match mail.order.take() {
                    Some(Order::Resume(pair)) => Some(pair),
                    _ => None,
                };
                (new.or(mail.returned.take()), done)
            };
            let lane = self.lanes.swap_remove(i);
            if let (Some(pair), Some(_)) = (pair, &self.driver)
                && let Err(error) = self.with_driver(|d| d.delete_queue_pair(*pair))
            {
                self.note(Trouble::Reset(format!(
                    "a queue pair could not be deleted: {error}"
                )));
                // Whoever waits does so until the controller has been reset.
                lane.link.mail().dropped = Some(done);
                self.lanes.push(lane);
                return;
            }
        }
    }

    fn abort(&mut self, sqid: u16, cid: u16) {
        // Abort Command Limit: what is beyond it waits for the grace to end.
        if self.aborts.len() > usize::from(self.facts.identify.acl_z.min(MOST_ABORTS)) {
            return;
        }
        let sqe = Abort { sqid, cid }.to_sqe();
        if let Ok((_, user)) = self.with_driver(|d| d.admin_submit("Abort", sqe)) {
            count(&self.shared.counts.aborts, 1);
            self.aborts.push((user, Instant::now()));
        }
    }

    /// Look at the admin queue: answers to Abort, events, faults.
    pub(super) fn admin_news(&mut self) {
        let Some(driver) = &mut self.driver else {
            return;
        };
        driver.admin_poll();
        self.aborts
            .retain(|(user, _)| driver.admin_finished(*user).is_none());
        let fault = driver.admin_queue().take_fault();
        let mut heard = false;
        while self.events_heard < EVENTS_PER_TICK
            && let Some(event) = self.driver.as_mut().and_then(Driver::next_event)
        {
            self.events_heard += 1;
            heard = true;
            count(&self.shared.counts.events, 1);
            self.heard(event);
        }
        if heard && self.events_heard < EVENTS_PER_TICK {
            let _ = self.with_driver(|d| d.arm_events(EVENTS));
        }
        if let Some(fault) = fault {
            count(&self.shared.counts.bad_completions, 1);
            let what = format!("a wrong completion on the admin queue: {fault:?}");
            self.note(Trouble::Reset(what));
        }
    }

    /// The newest entries of the error log that nobody was told of. Reading it lets the next event of its kind come.
    fn new_errors(&mut self) -> Vec<ErrorLogEntry> {
        let entries = usize::from(self.facts.identify.elpe_z) + 1;
        let log = self.with_driver(|d| read_error_log(d, entries, false));
        let mut log = log.unwrap_or_default();
        let told = self.errors_told;
        log.retain(|entry| entry.error_count > told);
        log.truncate(ERRORS_TOLD);
        let newest = log.iter().map(|entry| entry.error_count).max();
        self.errors_told = newest.unwrap_or(told);
        log
    }

    /// An event: reading the log page it names lets the next of its kind come.
    fn heard(&mut self, event: AsyncEvent) {
        // One line a tick, however many there are.
        if self.events_heard == 1 {
            tracing::info!(ssd = self.shared.name, ?event, "asynchronous event");
        }
        let news = match (event.kind, event.log_page) {
            (EventType::NOTICE, LogId::CHANGED_NAMESPACES) => {
                let list = self
                    .with_driver(|d| d.log_as::<ChangedNamespaceList>(LogId::CHANGED_NAMESPACES, 0))
                    // One that does not say which: any.
                    .unwrap_or_else(|_| ChangedNamespaceList::from_ids([NSID_BROADCAST]));
                let ids = list.0.iter().copied().take_while(|id| *id != 0);
                Some(SsdEvent::NamespacesChanged(ids.collect()))
            }
            (EventType::SMART_HEALTH, _) => self
                .read_health(false)
                .ok()
                .map(|log| SsdEvent::Health(log.critical_warning)),
            (EventType::ERROR, _) => Some(SsdEvent::Error {
                info: event.info,
                entries: self.new_errors(),
            }),
            (kind, page) => {
                if !matches!(kind, EventType::IMMEDIATE | EventType::ONE_SHOT) {
                    let _ = self.with_driver(|d| d.log_page(page, NSID_BROADCAST, 512, false));
                }
                None
            }
        };
        if let Some(news) = news {
            self.look_at_namespaces(&news);
            self.shared.publish(&news);
        }
    }
}
