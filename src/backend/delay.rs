//! A backend around another one that keeps requests waiting before it passes them on.

#![expect(
    unsafe_code,
    reason = "implements the unsafe `Channel::submit`, and hands its promise on"
)]

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nvme_spec::{Sqe, Status};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use super::guest::HeldGuest;
use super::rules::Rules;
use super::{
    AnyChannel, Backend, Cancelled, Channel, Finished, OpenError, Operation, Request, Submitted,
    Tag, wake,
};
use crate::memory::Held;

/// A request waits so long before the store gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delay(pub Duration);

/// The store with delays.
pub struct DelayBackend {
    pub(super) inner: Backend,
    rules: Rules<Delay>,
}

impl DelayBackend {
    /// `inner`, with these delays.
    pub fn new(inner: Backend, rules: Rules<Delay>) -> Self {
        Self { inner, rules }
    }

    pub(super) fn channel(&self, depth: u32) -> Result<DelayChannel, OpenError> {
        let inner = self.inner.channel(depth)?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags);
        let timer = timer.map_err(|e| {
            OpenError::io(
                "cannot make a timer",
                "raise the limit of open files (ulimit -n)",
                e,
            )
        })?;
        let wake = match inner.wake_fd() {
            Some(fd) => Some(wake::either(fd, timer.as_fd())?),
            None => None,
        };
        Ok(DelayChannel {
            inner,
            rules: self.rules.clone(),
            waiting: (0..depth).map(|_| None).collect(),
            due: BinaryHeap::with_capacity(depth as usize),
            timer,
            wake,
        })
    }
}

/// A request that waits.
struct Waiting {
    until: Instant,
    operation: Operation,
    slba: u64,
    blocks: u32,
    memory: Held,
    guest: Option<HeldGuest>,
}

/// The data side of a [`DelayBackend`].
pub struct DelayChannel {
    inner: AnyChannel,
    rules: Rules<Delay>,
    /// By tag.
    waiting: Vec<Option<Waiting>>,
    /// The tags that wait, soonest first.
    due: BinaryHeap<Reverse<(Instant, Tag)>>,
    /// Expires when the first of them is due.
    timer: OwnedFd,
    /// The timer and the inner channel, where that has something to wake for.
    wake: Option<OwnedFd>,
}

impl DelayChannel {
    /// Set the timer to the first request that waits, or stop it.
    fn set_timer(&self) {
        let left = match self.due.peek() {
            // Zero would stop it.
            Some(Reverse((at, _))) => at
                .saturating_duration_since(Instant::now())
                .max(Duration::from_nanos(1)),
            None => Duration::ZERO,
        };
        let at = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: left.as_secs().min(1 << 40) as i64,
                tv_nsec: left.subsec_nanos().into(),
            },
        };
        // Cannot fail: the descriptor is a timer and the time is a time.
        let _ = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &at);
    }

    /// Pass on what has waited long enough.
    fn pass_on(&mut self, out: &mut Vec<Finished>) {
        let now = Instant::now();
        let mut changed = false;
        while out.len() < out.capacity() {
            match self.due.peek() {
                Some(Reverse((at, _))) if *at <= now => {}
                _ => break,
            }
            let Some(Reverse((_, tag))) = self.due.pop() else {
                break;
            };
            changed = true;
            let Some(w) = self.waiting.get_mut(tag as usize).and_then(Option::take) else {
                continue;
            };
            let request = Request {
                operation: w.operation,
                slba: w.slba,
                blocks: w.blocks,
                data: w.memory.buffers(),
                guest: w.guest.as_ref().map(HeldGuest::data),
            };
            // SAFETY: the memory and its list stay by the contract of our own `submit` until this request is finished.
            if let Submitted::Done(status) = unsafe { self.inner.submit(tag, &request) } {
                let status = status.into();
                out.push(Finished { tag, status });
            }
        }
        if changed {
            self.inner.flush();
            self.set_timer();
        }
    }
}

impl Channel for DelayChannel {
    unsafe fn submit(&mut self, tag: Tag, request: &Request<'_>) -> Submitted {
        let Some(Delay(delay)) = self.rules.decide(request) else {
            // SAFETY: our own contract.
            return unsafe { self.inner.submit(tag, request) };
        };
        let Some(slot) = self.waiting.get_mut(tag as usize) else {
            return Submitted::Done(Status::INTERNAL_ERROR);
        };
        if slot.is_some() {
            return Submitted::Done(Status::COMMAND_ID_CONFLICT);
        }
        // A delay nobody will see the end of is a long one.
        let until = Instant::now() + delay.min(Duration::from_secs(1 << 30));
        *slot = Some(Waiting {
            until,
            operation: request.operation,
            slba: request.slba,
            blocks: request.blocks,
            // SAFETY: our own contract; used once, in `pass_on`, before the request is finished.
            memory: unsafe { Held::new(&request.data) },
            guest: request.guest.as_ref().map(HeldGuest::of),
        });
        self.due.push(Reverse((until, tag)));
        self.set_timer();
        Submitted::Pending
    }

    unsafe fn pass(&mut self, tag: Tag, sqe: &Sqe) -> Submitted {
        // SAFETY: our own contract.
        unsafe { self.inner.pass(tag, sqe) }
    }

    fn flush(&mut self) {
        self.inner.flush();
    }

    fn poll(&mut self, out: &mut Vec<Finished>) {
        if !self.due.is_empty() {
            self.pass_on(out);
        }
        self.inner.poll(out);
    }

    fn unsent(&self) -> bool {
        self.inner.unsent()
    }

    fn cancel(&mut self, tag: Tag) -> Cancelled {
        let Some(slot) = self.waiting.get_mut(tag as usize) else {
            return Cancelled::Gone;
        };
        match slot.take() {
            Some(w) => {
                self.due.retain(|Reverse(e)| *e != (w.until, tag));
                self.set_timer();
                Cancelled::Gone
            }
            None => self.inner.cancel(tag),
        }
    }

    fn pending(&self) -> usize {
        self.due.len() + self.inner.pending()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(match &self.wake {
            Some(both) => both.as_fd(),
            None => self.timer.as_fd(),
        })
    }

    fn wakes_by_edges(&self) -> bool {
        self.inner.wakes_by_edges()
    }

    fn tend(&mut self) {
        self.inner.tend();
    }
}
