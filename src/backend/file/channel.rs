//! The data side of a file: each request is a series of steps of the kernel, one at a time.

#![expect(
    unsafe_code,
    reason = "implements the unsafe `Channel::submit`; what it promises is handed on to the ring"
)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nvme_spec::Status;

use super::at_once::cut_short;
use super::helper::Helper;
use super::ring::{Memory, Op, Ring};
use super::slot::{Next, Place, Slot, Step};
use super::{Shared, known};
use crate::backend::uring::{CANCEL_KEY, no_ring};
use crate::backend::{
    Cancelled, Channel, Finished, Geometry, OpenError, Operation, Request, Submitted, Tag, error,
    wake,
};
use crate::memory::{Copier, Held, HostSeg};

/// Bounce buffers of a channel at most: requests that need one and find none wait.
const MAX_BOUNCES: u32 = 16;

/// How often a step is tried again when the kernel had no resources for it.
const MAX_RETRIES: u8 = 16;

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// The data side of a [`super::FileBackend`]: a ring of its own, and nothing allocated after it was made.
pub struct FileChannel {
    // These end what they have begun when they are dropped, while the file is still open and locked.
    ring: Ring,
    /// For reads and writes of the request's own memory, where the device is polled for completions.
    polled: Option<Ring>,
    /// For discards, on block devices.
    helper: Option<Helper>,
    geometry: Geometry,
    shared: Arc<Shared>,
    /// For files that are memory.
    copier: Copier,
    slots: Vec<Slot>,
    for_bounce: VecDeque<Tag>,
    for_room: VecDeque<Tag>,
    pending: usize,
    helping: usize,
    /// The ring and `nudge`.
    wake: OwnedFd,
    /// Signalled by the helper, and by us when the kernel did not take what we have for it.
    nudge: Arc<OwnedFd>,
    nudged: bool,
}

impl FileChannel {
    pub(super) fn new(
        geometry: Geometry,
        shared: &Arc<Shared>,
        depth: u32,
    ) -> Result<Self, OpenError> {
        let bounces = depth.clamp(1, MAX_BOUNCES) as usize;
        let ring = Ring::new(&shared.file, shared.fence.as_deref(), depth, bounces, false)
            .map_err(no_ring)?;
        let polled = match known(&shared.iopoll) {
            true => Some(
                Ring::new(&shared.file, shared.fence.as_deref(), depth, 0, true)
                    .map_err(no_ring)?,
            ),
            false => None,
        };
        let nudge = Arc::new(wake::event_fd()?);
        let wake = wake::either(ring.fd(), nudge.as_fd())?;
        let helper = if known(&shared.discard) && !geometry.read_only {
            let helper = Helper::start(shared, depth, Arc::clone(&nudge));
            Some(helper.map_err(|e| {
                OpenError::io("cannot start a thread", "raise the limit of processes", e)
            })?)
        } else {
            None
        };
        Ok(Self {
            geometry,
            shared: Arc::clone(shared),
            ring,
            polled,
            copier: Copier::default(),
            slots: (0..depth).map(|_| Slot::new()).collect(),
            for_bounce: VecDeque::with_capacity(depth as usize),
            for_room: VecDeque::with_capacity(depth as usize),
            pending: 0,
            helper,
            helping: 0,
            wake,
            nudge,
            nudged: false,
        })
    }

    /// How a request begins; `None` if there is nothing to do for it.
    fn first_step(&self, request: &Request<'_>, offset: u64, len: u64) -> Option<Step> {
        let shared = &self.shared;
        match request.operation {
            Operation::Read | Operation::Write { .. } => {
                let data = &request.data;
                let fits =
                    !shared.direct || data.is_aligned_as(shared.memory_align, shared.length_align);
                Some(if fits { Step::Direct } else { Step::Bounced })
            }
            Operation::Compare | Operation::Verify => Some(Step::Bounced),
            Operation::WriteZeroes { deallocate, .. } => {
                Some(self.zero_step(deallocate, offset, len))
            }
            // Advice: what the file cannot do is not done.
            Operation::Deallocate if !self.on_granules(offset, len) => None,
            Operation::Deallocate if shared.device => {
                (known(&shared.discard) && self.helper.is_some()).then_some(Step::Discard)
            }
            Operation::Deallocate => known(&shared.punch).then_some(Step::Punch),
            Operation::Flush => (!self.geometry.read_only).then_some(Step::Sync),
        }
    }

    fn on_granules(&self, offset: u64, len: u64) -> bool {
        (offset | len).is_multiple_of(self.shared.granule)
    }

    /// The best way to zero that is left.
    fn zero_step(&self, deallocate: bool, offset: u64, len: u64) -> Step {
        if !self.on_granules(offset, len) {
            Step::WriteZeroes
        } else if deallocate && known(&self.shared.punch) {
            Step::Punch
        } else if known(&self.shared.zero_range) {
            Step::ZeroRange
        } else {
            Step::WriteZeroes
        }
    }

    /// Give the next step of a request to the kernel, or let it wait.
    fn advance(&mut self, tag: Tag) {
        let Some(slot) = self.slots.get_mut(tag as usize) else {
            return;
        };
        slot.place = Place::Waiting;
        if slot.step == Step::Bounced && slot.bounce.is_none() {
            slot.bounce = self.ring.bounces().take();
            if slot.bounce.is_none() {
                self.for_bounce.push_back(tag);
                return;
            }
        }
        let at = slot.offset + slot.done;
        let from = slot.done as usize;
        let write = slot.operation.writes();
        let fua = slot.fua();
        let op = match (slot.step, &slot.bounce) {
            (Step::Direct, _) if write => Op::Write(Memory::Request(&slot.memory, from), at, fua),
            (Step::Direct, _) => Op::Read(Memory::Request(&slot.memory, from), at),
            (Step::Bounced, Some(bounce)) => {
                let n = slot.piece();
                if write {
                    // SAFETY: the bounce buffer is this slot's, which is not with the kernel.
                    unsafe { self.ring.bounces().fill(bounce, &slot.memory, from, n) };
                    Op::Write(Memory::Bounce(bounce, n), at, fua)
                } else {
                    Op::Read(Memory::Bounce(bounce, n), at)
                }
            }
            (Step::WriteZeroes, _) => {
                Op::Write(Memory::Zeroes(slot.left().min(1 << 30) as usize), at, fua)
            }
            (Step::Punch, _) => Op::Allocate(PUNCH, slot.offset, slot.len),
            (Step::ZeroRange, _) => Op::Allocate(ZERO, slot.offset, slot.len),
            (Step::Discard, _) => {
                let helper = self.helper.as_ref();
                if helper.is_some_and(|h| h.discard(tag, slot.offset, slot.len)) {
                    slot.place = Place::Helper;
                    self.helping += 1;
                    return;
                }
                // The thread is gone. Advice may stay undone; a sync brings the request to its end.
                slot.step = Step::Sync;
                Op::Sync
            }
            (Step::Bounced, None) | (Step::Sync, _) => Op::Sync,
        };
        let key = u64::from(slot.generation) << 32 | u64::from(tag);
        // What was tried once goes the way that always works.
        slot.polled = slot.step == Step::Direct && slot.retries == 0 && known(&self.shared.iopoll);
        let ring = match &mut self.polled {
            Some(polled) if slot.polled => polled,
            _ => {
                slot.polled = false;
                &mut self.ring
            }
        };
        // SAFETY: the request's memory stays by the contract of `Channel::submit`, which ends when we finish the request (only
        // after the result of this key), let it go (only while it is not with the kernel), or are dropped, and the rings with us. The
        // bounce buffer stays with the slot as long.
        if unsafe { ring.queue(key, &op, slot.retries > 0) } {
            slot.place = Place::Kernel(key);
        } else {
            self.for_room.push_back(tag);
        }
    }

    /// What the result of a step means for its request.
    fn judge(&mut self, tag: Tag, result: i32) -> Next {
        let Some(slot) = self.slots.get_mut(tag as usize) else {
            return Next::Again;
        };
        if result < 0 {
            return self.judge_error(tag, -result);
        }
        slot.retries = 0;
        let moved = u64::from(result.unsigned_abs()).min(slot.left());
        match slot.step {
            Step::Sync | Step::Discard => return Next::End(Status::SUCCESS),
            Step::Punch | Step::ZeroRange => slot.done = slot.len,
            Step::Direct | Step::WriteZeroes => slot.done += moved,
            Step::Bounced => {
                let n = moved.min(slot.piece() as u64) as usize;
                if let Some(bounce) = &slot.bounce
                    && !slot.operation.writes()
                {
                    // SAFETY: its result is here, so the kernel does not have the buffer.
                    let bytes = unsafe { self.ring.bounces().bytes(bounce, n) };
                    let memory = slot.memory.buffers();
                    match slot.operation {
                        Operation::Compare if !memory.equals(slot.done as usize, bytes) => {
                            return Next::End(Status::COMPARE_FAILURE);
                        }
                        Operation::Read => {
                            memory.write(slot.done as usize, bytes);
                        }
                        _ => {}
                    }
                }
                slot.done += n as u64;
            }
        }
        if slot.left() == 0 {
            if slot.fua() && matches!(slot.step, Step::Punch | Step::ZeroRange) {
                slot.step = Step::Sync;
                return if slot.cancelled {
                    aborted()
                } else {
                    Next::Again
                };
            }
            return Next::End(Status::SUCCESS);
        }
        // Short. What O_DIRECT left in the middle of a block is the end of the file.
        let whole = !self.shared.direct || moved.is_multiple_of(self.shared.length_align as u64);
        if moved == 0 || !whole {
            let (operation, at) = (slot.operation, slot.offset + slot.done);
            return Next::End(self.shared.failed(operation, at, &cut_short()));
        }
        if slot.cancelled {
            aborted()
        } else {
            Next::Again
        }
    }

    fn judge_error(&mut self, tag: Tag, errno: i32) -> Next {
        let Some(slot) = self.slots.get_mut(tag as usize) else {
            return Next::Again;
        };
        if slot.cancelled {
            return aborted();
        }
        let unsupported = matches!(
            errno,
            libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::ENOTTY | libc::EINVAL
        );
        match slot.step {
            _ if matches!(errno, libc::EAGAIN | libc::EINTR) && slot.retries < MAX_RETRIES => {
                slot.retries += 1;
                return Next::Again;
            }
            _ if slot.polled && matches!(errno, libc::EOPNOTSUPP | libc::EINVAL) => {
                slot.retries += 1;
                if self.shared.iopoll.swap(false, Ordering::Relaxed) {
                    let path = self.shared.path.display();
                    tracing::warn!(%path, errno, "this device cannot be polled for completions after all");
                }
                return Next::Again;
            }
            // The file system wants more alignment than it said.
            Step::Direct if errno == libc::EINVAL && self.shared.direct => {
                slot.step = Step::Bounced;
                return Next::Again;
            }
            Step::Punch | Step::ZeroRange if unsupported => {
                let flag = if slot.step == Step::Punch {
                    &self.shared.punch
                } else {
                    &self.shared.zero_range
                };
                flag.store(false, Ordering::Relaxed);
                let Operation::WriteZeroes { deallocate, .. } = slot.operation else {
                    return Next::End(Status::SUCCESS);
                };
                let (offset, len) = (slot.offset, slot.len);
                let step = self.zero_step(deallocate, offset, len);
                if let Some(slot) = self.slots.get_mut(tag as usize) {
                    slot.step = step;
                }
                return Next::Again;
            }
            Step::Discard if unsupported => {
                self.shared.discard.store(false, Ordering::Relaxed);
                return Next::End(Status::SUCCESS);
            }
            _ => {}
        }
        let status = error::status_of(errno, slot.operation);
        if status != Status::ABORT_REQUESTED {
            let cause = io::Error::from_raw_os_error(errno);
            let at = slot.offset + slot.done;
            self.shared
                .log
                .report(&self.shared.path, slot.operation, at, &cause);
        }
        Next::End(status)
    }

    /// Take a request's tag back.
    fn release(&mut self, tag: Tag) {
        if let Some(slot) = self.slots.get_mut(tag as usize) {
            if let Some(resident) = &self.shared.resident {
                resident.forget(slot.offset..slot.offset + slot.len);
            }
            slot.place = Place::Free;
            slot.memory = Held::NONE;
            if let Some(bounce) = slot.bounce.take() {
                self.ring.bounces().put(bounce);
            }
            self.pending -= 1;
        }
    }

    /// Go on with a request whose step has a result.
    fn stepped(&mut self, tag: Tag, result: i32, out: &mut Vec<Finished>) {
        match self.judge(tag, result) {
            Next::Again => self.advance(tag),
            Next::End(status) => {
                self.release(tag);
                let status = status.into();
                out.push(Finished { tag, status });
            }
        }
    }

    /// The next result of the kernel, of either ring.
    #[inline]
    fn next(&mut self) -> Option<(u64, i32)> {
        if let Some(polled) = &mut self.polled
            && let Some(result) = polled.next()
        {
            return Some(result);
        }
        self.ring.next()
    }

    /// Results of the kernel.
    fn reap(&mut self, out: &mut Vec<Finished>) {
        while out.len() < out.capacity() {
            let Some((key, result)) = self.next() else {
                break;
            };
            let tag = key as u32;
            let slot = self.slots.get(tag as usize);
            // Each key is used once, so anything else is not a result of ours.
            if slot.is_some_and(|s| s.place == Place::Kernel(key)) {
                self.stepped(tag, result, out);
            }
        }
    }

    /// Operations for which the kernel has to be entered again and again.
    #[inline]
    fn polling(&self) -> bool {
        self.polled.as_ref().is_some_and(|p| p.operations() > 0)
    }

    /// Results of the helper thread, and the end of a nudge.
    fn reap_helper(&mut self, out: &mut Vec<Finished>) {
        // First the signal, then the results: what comes in between signals again.
        wake::clear(&*self.nudge);
        self.nudged = false;
        while self.helping > 0 {
            if out.len() >= out.capacity() {
                wake::signal(&*self.nudge);
                break;
            }
            let Some((tag, errno)) = self.helper.as_ref().and_then(Helper::next) else {
                break;
            };
            self.helping -= 1;
            self.stepped(tag, -errno, out);
        }
    }

    /// Requests that waited and need not any more.
    fn admit(&mut self) {
        // `advance` may put a request back at the end: each gets one chance.
        for _ in 0..self.for_bounce.len() {
            if !self.ring.bounces().has_free() {
                break;
            }
            if let Some(tag) = self.for_bounce.pop_front() {
                self.advance(tag);
            }
        }
        for _ in 0..self.for_room.len() {
            if !self.ring.has_room() && self.polled.as_ref().is_none_or(|p| !p.has_room()) {
                break;
            }
            if let Some(tag) = self.for_room.pop_front() {
                self.advance(tag);
            }
        }
    }
}

fn aborted() -> Next {
    Next::End(Status::ABORT_REQUESTED)
}

impl Channel for FileChannel {
    #[inline]
    unsafe fn submit(&mut self, tag: Tag, request: &Request<'_>) -> Submitted {
        let extent = match self.geometry.extent(request) {
            Ok(extent) => extent,
            Err(status) => return Submitted::Done(status),
        };
        let len = extent.end - extent.start;
        if let Some(status) = self.shared.at_once(request, &extent, &mut self.copier) {
            return Submitted::Done(status);
        }
        let Some(step) = self.first_step(request, extent.start, len) else {
            return Submitted::Done(Status::SUCCESS);
        };
        let Some(slot) = self.slots.get_mut(tag as usize) else {
            return Submitted::Done(Status::INTERNAL_ERROR);
        };
        if slot.place != Place::Free {
            return Submitted::Done(Status::COMMAND_ID_CONFLICT);
        }
        *slot = Slot {
            // 31 bits, so that no key is that of a cancel.
            generation: slot.generation.wrapping_add(1) & (u32::MAX >> 1),
            operation: request.operation,
            step,
            offset: extent.start,
            len,
            // SAFETY: our own contract, until the request is finished, gone, or the channel dropped: `release` ends it in the
            // first two cases, and nobody is left to use it in the third.
            memory: unsafe { Held::new(&request.data) },
            ..Slot::new()
        };
        self.pending += 1;
        self.advance(tag);
        Submitted::Pending
    }

    #[inline]
    fn prefetch(&mut self, operation: Operation, slba: u64, memory: &[HostSeg]) {
        if let Some(resident) = &self.shared.resident {
            resident.prefetch(
                operation,
                slba << self.geometry.block_shift,
                memory,
                &mut self.copier,
            );
        }
    }

    #[inline]
    fn flush(&mut self) {
        for ring in [Some(&mut self.ring), self.polled.as_mut()]
            .into_iter()
            .flatten()
        {
            if ring.has_unsubmitted()
                && let Err(cause) = ring.submit()
            {
                // It stays queued, and the next poll tries again; nobody may sleep before that.
                if !self.nudged {
                    tracing::debug!(%cause, "io_uring takes nothing at the moment");
                    self.nudged = true;
                    wake::signal(&*self.nudge);
                }
            }
        }
        // Nor may anybody sleep while completions do not wake him.
        if self.polling() && !self.nudged {
            self.nudged = true;
            wake::signal(&*self.nudge);
        }
    }

    #[inline]
    fn poll(&mut self, out: &mut Vec<Finished>) {
        if self.pending == 0 && !self.nudged {
            return;
        }
        if self.ring.operations() > 0 {
            self.ring.run_tasks();
        }
        if let Some(polled) = &mut self.polled
            && polled.operations() > 0
        {
            polled.enter();
        }
        self.reap(out);
        if self.helping > 0 || self.nudged && !self.polling() {
            self.reap_helper(out);
        }
        self.admit();
        self.flush();
    }

    fn cancel(&mut self, tag: Tag) -> Cancelled {
        let Some(slot) = self.slots.get_mut(tag as usize) else {
            return Cancelled::Gone;
        };
        match slot.place {
            Place::Free => Cancelled::Gone,
            Place::Waiting => {
                self.for_bounce.retain(|t| *t != tag);
                self.for_room.retain(|t| *t != tag);
                self.release(tag);
                Cancelled::Gone
            }
            Place::Helper => {
                slot.cancelled = true;
                Cancelled::ResultComes
            }
            Place::Kernel(key) => {
                // What is polled for cannot be cancelled, and does not take long.
                if !slot.cancelled && !slot.polled {
                    // SAFETY: a cancel names no memory. If there is no room for it, the request ends with its step.
                    let _ = unsafe { self.ring.queue(CANCEL_KEY, &Op::Cancel(key), false) };
                    self.flush();
                }
                if let Some(slot) = self.slots.get_mut(tag as usize) {
                    slot.cancelled = true;
                }
                Cancelled::ResultComes
            }
        }
    }

    fn pending(&self) -> usize {
        self.pending
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wake.as_fd())
    }
}

impl Drop for FileChannel {
    fn drop(&mut self) {
        for slot in &self.slots {
            if let Place::Kernel(key) = slot.place
                && !slot.polled
            {
                // SAFETY: a cancel names no memory.
                let _ = unsafe { self.ring.queue(CANCEL_KEY, &Op::Cancel(key), false) };
            }
        }
        // The fields do the rest: `Ring` waits until the kernel has given everything back, `Helper` until its discard is done.
    }
}
