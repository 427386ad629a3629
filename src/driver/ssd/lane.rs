//! A queue pair of an SSD for one poller, which survives resets of the SSD.

mod flush;
mod reset;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nvme_spec::{Cqe, Sqe, Status, StatusField};

use super::OnReset;
use super::link::{Link, Order, Pair, Shared, count};
use crate::driver::lists::Lists;
use crate::driver::{Completion, Fault, SubmitError};
use flush::Flushes;

/// How long dropping a lane with commands out waits until the device cannot touch their memory any more.
const DROP_LIMIT: Duration = Duration::from_secs(60);

/// Commands that run into their timeout this often fail.
const STRIKES: u8 = 2;

/// Where a command is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Free,
    /// Submitted to the device.
    Out,
    /// Was submitted; the device has been stopped since, and reaches none of its memory.
    Stopped,
    /// Waits for a queue pair, and was not submitted.
    Held,
}

/// A command, kept for the case that it must be submitted again.
#[derive(Clone, Copy)]
struct Slot {
    sqe: Sqe,
    user: u64,
    /// Counts submissions: the order in which commands are submitted again.
    order: u64,
    /// The epoch in which it was submitted.
    stamp: u32,
    cid: u16,
    place: Place,
    /// Its time is up.
    overdue: bool,
    /// The keeper has been asked to abort it.
    asked: bool,
    /// Its owner does not want it any more.
    cancelled: bool,
    /// It is one of [`Flushes`].
    own: bool,
    /// It is not submitted again once the device may have done it.
    once: bool,
    /// How often it ran into its timeout.
    strikes: u8,
}

/// A lane: see [`super::Ssd::lane`]. It belongs to one thread, and is polled.
///
/// Dropping it with commands out waits until the device has let go of them.
pub struct Lane {
    slots: Box<[Slot]>,
    free: Vec<u16>,
    pair: Option<Box<Pair>>,
    shared: Arc<Shared>,
    link: Arc<Link>,
    order: u64,
    /// Faults of the queue pairs that were reported.
    faults: u64,
    /// [`Self::deferred`], [`Self::aborted`] or [`Self::flushes`] holds something.
    attention: bool,
    /// It takes no commands any more: the SSD is gone, or the namespace has changed. What they fail with, Do Not Retry set.
    refuses: Option<Status>,
    /// Commands the device aborted because the keeper asked for it.
    aborted: Vec<u16>,
    /// Completions that do not come from a queue.
    deferred: Vec<Completion>,
    flushes: Flushes,
    /// None until the keeper has seen it.
    lists: Option<Lists>,
    max_transfer: u32,
    /// Ticks after which a command is overdue, and after which it is not waited for any more.
    limits: [u32; 2],
}

/// What a lane is made of.
pub(super) struct Parts {
    pub(super) shared: Arc<Shared>,
    pub(super) link: Arc<Link>,
    pub(super) depth: u32,
    pub(super) max_transfer: u32,
    pub(super) limits: [u32; 2],
}

/// A completion nobody posted.
fn made_up(user: u64, status: Status, dnr: bool) -> Completion {
    Completion {
        user,
        cqe: Cqe {
            status: StatusField::from_status(status).with_dnr(dnr),
            ..Cqe::default()
        },
    }
}

impl Lane {
    /// One without a queue pair: that comes with the mail.
    pub(super) fn new(parts: Parts) -> Self {
        let depth = parts.depth.clamp(1, 65535);
        let free = Slot {
            sqe: Sqe::default(),
            user: 0,
            order: 0,
            stamp: 0,
            cid: 0,
            place: Place::Free,
            overdue: false,
            asked: false,
            cancelled: false,
            own: false,
            once: false,
            strikes: 0,
        };
        Self {
            slots: vec![free; depth as usize].into_boxed_slice(),
            free: (0..depth).rev().map(|i| i as u16).collect(),
            pair: None,
            shared: parts.shared,
            link: parts.link,
            order: 0,
            faults: 0,
            attention: false,
            refuses: None,
            aborted: Vec::with_capacity(depth as usize),
            deferred: Vec::with_capacity(depth as usize),
            flushes: Flushes::default(),
            lists: None,
            max_transfer: parts.max_transfer,
            limits: parts.limits,
        }
    }

    /// Commands that can be submitted now.
    #[inline]
    pub fn room(&self) -> u32 {
        self.free.len() as u32
    }

    /// Commands that are not finished.
    #[inline]
    pub fn pending(&self) -> usize {
        self.slots.len() - self.free.len() + self.deferred.len()
    }

    /// Commands that can be out at a time.
    pub fn depth(&self) -> u32 {
        self.slots.len() as u32
    }

    /// Largest transfer in bytes.
    pub fn max_transfer(&self) -> u32 {
        self.max_transfer
    }

    /// An eventfd that is written when [`Self::poll`] should be called. It is never read: wait for its edges. The device writes it
    /// only if it interrupts ([`super::SsdOptions::interrupts`]).
    pub fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.link.fd())
    }

    /// How often the tail and the head register of the present queue pair were written.
    pub fn doorbell_writes(&self) -> (u64, u64) {
        self.pair.as_ref().map_or((0, 0), |p| p.doorbell_writes())
    }

    /// Submit a command as it is, but for its identifier: its data pointers are device addresses. `user` comes back with the
    /// completion. The device is told by [`Self::ring`].
    ///
    /// # Errors
    ///
    /// [`SubmitError::Full`].
    #[inline]
    pub fn submit(&mut self, sqe: Sqe, user: u64) -> Result<(), SubmitError> {
        let index = self.claim()?;
        self.send_new(index, sqe, user);
        Ok(())
    }

    /// As [`Self::submit`], a command of which nobody knows whether it may be done twice: if it was out when the device aborted it or was
    /// reset, it fails with Command Interrupted.
    ///
    /// # Errors
    ///
    /// [`SubmitError::Full`].
    pub fn submit_once(&mut self, sqe: Sqe, user: u64) -> Result<(), SubmitError> {
        let index = self.claim()?;
        self.send_new(index, sqe, user);
        if let Some(slot) = self.slots.get_mut(usize::from(index)) {
            slot.once = true;
        }
        Ok(())
    }

    /// Submit a command with `len` bytes of data that begin `offset` bytes into the first of `pages`, which are device addresses.
    ///
    /// # Errors
    ///
    /// [`SubmitError`]; nothing was submitted then.
    pub fn submit_pages(
        &mut self,
        sqe: Sqe,
        pages: impl IntoIterator<Item = u64>,
        offset: u32,
        len: u32,
        user: u64,
    ) -> Result<(), SubmitError> {
        let index = self.claim()?;
        let Some(lists) = &mut self.lists else {
            self.free.push(index);
            return self.without_lists(sqe, user);
        };
        match lists.describe(index, pages, offset, len) {
            Ok(prps) => {
                self.send_new(index, sqe.with_prps(prps.prp1, prps.prp2), user);
                Ok(())
            }
            Err(e) => {
                self.free.push(index);
                Err(e)
            }
        }
    }

    /// Submit a command with a payload that the device reads: at most one memory page, of which a copy is made.
    ///
    /// # Errors
    ///
    /// [`SubmitError`]; nothing was submitted then.
    pub fn submit_bytes(&mut self, sqe: Sqe, bytes: &[u8], user: u64) -> Result<(), SubmitError> {
        let index = self.claim()?;
        let Some(lists) = &mut self.lists else {
            self.free.push(index);
            return self.without_lists(sqe, user);
        };
        if bytes.len() > lists.page().bytes() as usize {
            self.free.push(index);
            return Err(SubmitError::TooLong);
        }
        let at = lists.put(index, bytes);
        self.send_new(index, sqe.with_prps(at, 0), user);
        Ok(())
    }

    /// The keeper has not seen this lane yet, or never will: then it fails.
    #[cold]
    fn without_lists(&mut self, sqe: Sqe, user: u64) -> Result<(), SubmitError> {
        match self.refuses {
            Some(_) => self.submit(sqe, user),
            None => Err(SubmitError::Full),
        }
    }

    #[inline]
    fn claim(&mut self) -> Result<u16, SubmitError> {
        let index = self.free.pop().ok_or(SubmitError::Full)?;
        if self.free.len() + 1 == self.slots.len() {
            self.link.busy.store(true, Ordering::Relaxed);
        }
        Ok(index)
    }

    #[inline]
    fn send_new(&mut self, index: u16, sqe: Sqe, user: u64) {
        let stamp = self.shared.epoch.load(Ordering::Relaxed);
        self.order += 1;
        let Some(slot) = self.slots.get_mut(usize::from(index)) else {
            return; // all indexes in `free` are slots
        };
        *slot = Slot {
            sqe,
            user,
            order: self.order,
            stamp,
            cid: 0,
            place: Place::Held,
            overdue: false,
            asked: false,
            cancelled: false,
            own: false,
            once: false,
            strikes: 0,
        };
        match &mut self.pair {
            Some(pair) if self.refuses.is_none() => {
                // There is room: the queue has as many slots as we have.
                if let Ok(cid) = pair.submit(sqe, u64::from(index)) {
                    slot.cid = cid;
                    slot.place = Place::Out;
                }
            }
            _ => self.without_a_queue(index),
        }
    }

    #[cold]
    fn without_a_queue(&mut self, index: u16) {
        if let Some(status) = self.refuses {
            self.fail(index, status, true);
            self.link.wake_lane();
        }
    }

    /// What was submitted with this user value is not wanted any more. What the device does not have ends at once; what is not done by the
    /// next tick (a quarter of a second at most) is aborted, or ends when the device has been stopped for a reset. Completions come in any case: the device's own, or Command Abort Requested. A device that does not listen
    /// is not reset for that before the command's time is up: otherwise a guest could have the SSD of others reset.
    pub fn cancel(&mut self, user: u64) {
        let mut any = false;
        for index in 0..self.slots.len() as u16 {
            let Some(slot) = self.slots.get_mut(usize::from(index)) else {
                continue;
            };
            if slot.place == Place::Free || slot.user != user || slot.own {
                continue;
            }
            slot.cancelled = true;
            if slot.place != Place::Out {
                self.fail(index, Status::ABORT_REQUESTED, false);
                any = true;
            }
        }
        if any {
            self.link.wake_lane();
        }
    }

    /// Tell the device of all that was submitted since the last call.
    #[inline]
    pub fn ring(&mut self) {
        if let Some(pair) = &mut self.pair {
            pair.ring();
        }
    }

    /// Hand at most `max` completions to `f`, and do what the keeper wants. Returns their number.
    #[inline]
    pub fn poll(&mut self, max: u32, mut f: impl FnMut(Completion)) -> u32 {
        let mut done = self.reap(max, &mut f);
        if self.attention || self.link.look.load(Ordering::Relaxed) {
            done += self.attend(max - done, &mut f);
        }
        done
    }

    #[inline]
    fn reap(&mut self, max: u32, f: &mut impl FnMut(Completion)) -> u32 {
        let Some(pair) = &mut self.pair else {
            return 0;
        };
        let (slots, free, aborted) = (&mut self.slots, &mut self.free, &mut self.aborted);
        let flushed = &mut self.flushes.done;
        let mut done = 0;
        let seen = pair.poll(max, |c| {
            let index = c.user as u16;
            let Some(slot) = slots.get_mut(usize::from(index)) else {
                return; // the user values of our queue pair are slots
            };
            if slot.asked && c.status() == Status::ABORT_REQUESTED {
                aborted.push(index);
                return;
            }
            slot.place = Place::Free;
            free.push(index);
            if slot.own {
                flushed.push((index, c.status()));
                return;
            }
            done += 1;
            f(Completion {
                user: slot.user,
                cqe: c.cqe,
            });
        });
        if seen > 0 && self.free.len() == self.slots.len() {
            self.link.busy.store(false, Ordering::Relaxed);
        }
        if seen != done {
            self.attention = true;
        }
        if pair.counters().faults != self.faults {
            self.report_faults();
        }
        done
    }

    #[cold]
    fn report_faults(&mut self) {
        let Some(pair) = &mut self.pair else { return };
        let faults = pair.counters().faults;
        count(&self.shared.counts.bad_completions, faults - self.faults);
        self.faults = faults;
        let fault: Option<Fault> = pair.take_fault();
        let mut mail = self.link.mail();
        mail.fault = mail.fault.or(fault);
        drop(mail);
        self.shared.tell();
    }

    /// All that is out of the ordinary.
    #[cold]
    fn attend(&mut self, max: u32, f: &mut impl FnMut(Completion)) -> u32 {
        self.reap_aside();
        self.look_after_aborted();
        if self.link.look.swap(false, Ordering::AcqRel) {
            let (order, check, flush, refuse, stopped) = {
                let mut mail = self.link.mail();
                let flush = std::mem::take(&mut mail.flush);
                let check = std::mem::take(&mut mail.check);
                self.lists = mail.lists.take().or(self.lists.take());
                let stopped = std::mem::take(&mut mail.stopped);
                (mail.order.take(), check, flush, mail.refuse, stopped)
            };
            self.flushes.want(flush);
            // Before anything is submitted again.
            if refuse {
                self.refuse(Status::NAMESPACE_NOT_READY);
            }
            match order {
                Some(Order::Park) => self.park(),
                Some(Order::Resume(pair)) => self.resume(pair),
                Some(Order::Gone) => {
                    self.park();
                    self.give_up();
                }
                None => {}
            }
            if stopped {
                self.device_stopped();
            }
            if check {
                self.check();
            }
        }
        self.send_flushes();
        self.flushes.tell();
        let n = self.deferred.len().min(max as usize);
        self.deferred.drain(..n).for_each(f);
        let more = !self.deferred.is_empty();
        self.attention = more || self.flushes.any();
        let busy = self.free.len() < self.slots.len();
        self.link.busy.store(busy, Ordering::Relaxed);
        if more {
            self.link.wake_lane();
        }
        n as u32
    }

    /// End a command without the device.
    fn fail(&mut self, index: u16, status: Status, dnr: bool) {
        if let Some(slot) = self.slots.get_mut(usize::from(index)) {
            slot.place = Place::Free;
            match slot.own {
                true => self.flushes.done.push((index, status)),
                false => self.deferred.push(made_up(slot.user, status, dnr)),
            }
            self.free.push(index);
            self.attention = true;
            count(&self.shared.counts.failed, 1);
        }
    }

    fn look_after_aborted(&mut self) {
        while let Some(index) = self.aborted.pop() {
            count(&self.shared.counts.aborted, 1);
            if self.is_cancelled(index) {
                self.fail(index, Status::ABORT_REQUESTED, false);
                continue;
            }
            if let Some(status) = self.refuses {
                self.fail(index, status, true);
                continue;
            }
            let again = self.shared.options.on_reset == OnReset::Resubmit;
            let strikes = self.strike(index);
            if self.is_once(index) || !again {
                self.fail(index, Status::COMMAND_INTERRUPTED, false);
            } else if strikes < STRIKES {
                self.send_again(index);
                self.ring();
            } else {
                self.fail_for_good(index);
            }
        }
    }

    /// It had its chances. Command Interrupted always invites another try (Base Specification, status 21h).
    fn fail_for_good(&mut self, index: u16) {
        self.fail(index, Status::INTERNAL_ERROR, true);
    }

    fn is_cancelled(&self, index: u16) -> bool {
        let slot = self.slots.get(usize::from(index));
        slot.is_some_and(|s| s.cancelled)
    }

    fn is_once(&self, index: u16) -> bool {
        let slot = self.slots.get(usize::from(index));
        slot.is_some_and(|s| s.once)
    }

    fn strike(&mut self, index: u16) -> u8 {
        self.slots.get_mut(usize::from(index)).map_or(0, |slot| {
            slot.strikes = slot.strikes.saturating_add(1);
            slot.strikes
        })
    }

    /// Submit a command anew.
    fn send_again(&mut self, index: u16) {
        let stamp = self.shared.epoch.load(Ordering::Relaxed);
        let Some(slot) = self.slots.get_mut(usize::from(index)) else {
            return;
        };
        slot.stamp = stamp;
        (slot.overdue, slot.asked) = (false, false);
        if matches!(slot.place, Place::Out | Place::Stopped) {
            count(&self.shared.counts.resubmitted, 1);
        }
        slot.place = Place::Held;
        if let Some(pair) = &mut self.pair
            && let Ok(cid) = pair.submit(slot.sqe, u64::from(index))
        {
            slot.cid = cid;
            slot.place = Place::Out;
        }
    }

    /// Report what is overdue.
    fn check(&mut self) {
        let now = self.shared.epoch.load(Ordering::Relaxed);
        let [overdue, expired] = self.limits;
        let (mut to_abort, mut late, mut over) = (Vec::new(), 0, false);
        for slot in self.slots.iter_mut().filter(|s| s.place == Place::Out) {
            let age = now.wrapping_sub(slot.stamp);
            if (age > overdue || slot.cancelled) && !slot.asked {
                slot.asked = true;
                to_abort.push(slot.cid);
            }
            if age > overdue && !slot.overdue {
                slot.overdue = true;
                late += 1;
            }
            over |= age > expired;
        }
        if to_abort.is_empty() && late == 0 && !over {
            return;
        }
        count(&self.shared.counts.timeouts, late);
        let mut mail = self.link.mail();
        mail.to_abort.extend(to_abort);
        mail.late += late;
        mail.expired |= over;
        drop(mail);
        self.shared.tell();
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        let pair = self.pair.take();
        let out = pair.as_ref().is_some_and(|p| p.out() > 0)
            || self.slots.iter().any(|s| s.place == Place::Out);
        let (sender, done) = crossbeam_channel::bounded::<()>(0);
        {
            let mut mail = self.link.mail();
            // A queue pair that was on its way to us, or the one we have.
            if let Some(Order::Resume(new)) = mail.order.take() {
                mail.returned = Some(new);
            }
            if pair.is_some() {
                mail.returned = pair;
            }
            mail.parked = true;
            mail.dropped = Some(sender);
        }
        self.shared.tell();
        if out && !self.shared.ended.load(Ordering::Acquire) {
            let _ = done.recv_timeout(DROP_LIMIT);
        }
    }
}
