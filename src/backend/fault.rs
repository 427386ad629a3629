//! A backend around another one that fails, shortens or swallows requests on demand.

#![expect(
    unsafe_code,
    reason = "implements the unsafe `Channel::submit`, and hands its promise on"
)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nvme_spec::{Sqe, Status};

use super::rules::Rules;
use super::{
    AnyChannel, Backend, Cancelled, Channel, Finished, OpenError, Operation, Request, Submitted,
    Tag, wake,
};
use crate::memory::{Buffers, HostSeg};

/// What is done to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails at once with this status; the store is not touched.
    Fail(Status),
    /// Only so many of its blocks, from the first on (none, where requests are forwarded), reach the store; it ends as a real short transfer does: Unrecovered
    /// Read Error, or Write Fault.
    Shorten(u32),
    /// It never completes. It can be cancelled.
    NeverComplete,
}

/// The store with faults.
pub struct FaultBackend {
    pub(super) inner: Backend,
    rules: Rules<Fault>,
}

impl FaultBackend {
    /// `inner`, with these faults.
    pub fn new(inner: Backend, rules: Rules<Fault>) -> Self {
        Self { inner, rules }
    }

    pub(super) fn channel(&self, depth: u32) -> Result<FaultChannel, OpenError> {
        Ok(FaultChannel {
            inner: self.inner.channel(depth)?,
            block_shift: self.inner.geometry().block_shift,
            rules: self.rules.clone(),
            tags: (0..depth).map(|_| TagState::default()).collect(),
            stuck: 0,
            never: wake::event_fd()?,
        })
    }
}

/// What was done to the request under a tag.
#[derive(Default)]
struct TagState {
    /// Swallowed.
    stuck: bool,
    /// Shortened: how it will end, if the part of it that was done is.
    short: Option<Status>,
    /// The memory of that part.
    segs: Vec<HostSeg>,
}

/// The data side of a [`FaultBackend`].
pub struct FaultChannel {
    inner: AnyChannel,
    block_shift: u32,
    rules: Rules<Fault>,
    tags: Vec<TagState>,
    stuck: usize,
    /// Never readable: what to sleep on when only swallowed requests are pending.
    never: OwnedFd,
}

impl FaultChannel {
    /// Let the inner channel do the first `blocks` of a request.
    ///
    /// # Safety
    ///
    /// As [`Channel::submit`].
    unsafe fn shorten(&mut self, tag: Tag, request: &Request<'_>, blocks: u32) -> Submitted {
        let status = match request.operation {
            Operation::Read | Operation::Compare | Operation::Verify => {
                Status::UNRECOVERED_READ_ERROR
            }
            _ => Status::WRITE_FAULT,
        };
        let Some(state) = self.tags.get_mut(tag as usize) else {
            return Submitted::Done(Status::INTERNAL_ERROR);
        };
        // All of it would be no fault; and PRPs of a part are not those of the whole.
        let blocks = if request.guest.is_some() { 0 } else { blocks };
        let blocks = blocks.min(request.blocks.saturating_sub(1));
        if blocks == 0 {
            return Submitted::Done(status);
        }
        let mut left = (blocks as usize) << self.block_shift;
        state.segs.clear();
        for seg in request.data.segments() {
            let part = seg.prefix(left);
            left -= part.len();
            state.segs.push(part);
            if left == 0 {
                break;
            }
        }
        let part = Request {
            blocks,
            // SAFETY: parts of segments whose memory stays by our contract; the list stays with the tag.
            data: unsafe { Buffers::new(&state.segs) },
            ..*request
        };
        // SAFETY: our own contract.
        match unsafe { self.inner.submit(tag, &part) } {
            Submitted::Done(Status::SUCCESS) => Submitted::Done(status),
            Submitted::Done(other) => Submitted::Done(other),
            Submitted::Pending => {
                state.short = Some(status);
                Submitted::Pending
            }
        }
    }
}

impl Channel for FaultChannel {
    unsafe fn submit(&mut self, tag: Tag, request: &Request<'_>) -> Submitted {
        match self.rules.decide(request) {
            // SAFETY: our own contract.
            None => unsafe { self.inner.submit(tag, request) },
            Some(Fault::Fail(status)) => Submitted::Done(status),
            // SAFETY: our own contract.
            Some(Fault::Shorten(blocks)) => unsafe { self.shorten(tag, request, blocks) },
            Some(Fault::NeverComplete) => match self.tags.get_mut(tag as usize) {
                Some(state) => {
                    state.stuck = true;
                    self.stuck += 1;
                    Submitted::Pending
                }
                None => Submitted::Done(Status::INTERNAL_ERROR),
            },
        }
    }

    unsafe fn pass(&mut self, tag: Tag, sqe: &Sqe) -> Submitted {
        // SAFETY: our own contract.
        unsafe { self.inner.pass(tag, sqe) }
    }

    fn flush(&mut self) {
        self.inner.flush();
    }

    fn poll(&mut self, out: &mut Vec<Finished>) {
        let before = out.len();
        self.inner.poll(out);
        for finished in out.iter_mut().skip(before) {
            let state = self.tags.get_mut(finished.tag as usize);
            let short = state.and_then(|s| s.short.take());
            if let Some(status) = short
                && finished.status.is_success()
            {
                finished.status = status.into();
            }
        }
    }

    fn unsent(&self) -> bool {
        self.inner.unsent()
    }

    fn cancel(&mut self, tag: Tag) -> Cancelled {
        let state = self.tags.get_mut(tag as usize);
        if let Some(state) = state
            && state.stuck
        {
            state.stuck = false;
            self.stuck -= 1;
            return Cancelled::Gone;
        }
        let cancelled = self.inner.cancel(tag);
        if cancelled == Cancelled::Gone
            && let Some(state) = self.tags.get_mut(tag as usize)
        {
            state.short = None;
        }
        cancelled
    }

    fn pending(&self) -> usize {
        self.inner.pending() + self.stuck
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.inner.wake_fd().unwrap_or(self.never.as_fd()))
    }

    fn wakes_by_edges(&self) -> bool {
        self.inner.wakes_by_edges()
    }

    fn tend(&mut self) {
        self.inner.tend();
    }
}
