//! The data side of a passed-through namespace: each request is one NVMe command, or a series of them, one at a time.

#![expect(
    unsafe_code,
    reason = "implements the unsafe `Channel::submit`; what it promises is handed on to the ring"
)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nvme_spec::Status;
use nvme_spec::nvm::DsmRange;
use nvme_spec::opcode::NvmOpcode;

use super::Shared;
use super::command::Command;
use super::ring::{Data, MEMORY_ALIGN, Piece, Ring};
use crate::backend::bounce::{BOUNCE_BYTES, Bounce};
use crate::backend::uring::no_ring;
use crate::backend::{
    Cancelled, Channel, Finished, Geometry, OpenError, Operation, Request, Submitted, Tag, error,
    wake,
};
use crate::memory::Held;

/// Bounce buffers of a channel at most: requests that need one and find none wait.
const MAX_BOUNCES: u32 = 16;

/// How often a command is sent again when the kernel had no resources for it.
const MAX_RETRIES: u8 = 16;

/// The most blocks of one command: NLB has 16 bits.
const MAX_BLOCKS: u64 = 1 << 16;

/// Force Unit Access and Deallocate in dword 12, Deallocate in dword 11 of Dataset Management.
const FUA: u32 = 1 << 30;
const DEAC: u32 = 1 << 25;
const AD: u32 = 1 << 2;

/// Who has a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Nobody: the tag is free.
    Free,
    /// We, until there is a bounce buffer or room in the ring.
    Waiting,
    /// The kernel, under this key.
    Kernel(u64),
}

/// How the commands of a request move data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Not at all.
    Plain,
    /// Between device and the request's memory.
    Direct,
    /// Between device and a bounce buffer.
    Bounced,
}

struct Slot {
    place: Place,
    operation: Operation,
    way: Way,
    slba: u64,
    /// Blocks altogether, done, and of the command that is out.
    blocks: u64,
    done: u64,
    now: u64,
    memory: Held,
    bounce: Option<Bounce>,
    cancelled: bool,
    retries: u8,
    /// Uses of this tag so far: tells a result of this use from any other.
    generation: u32,
}

impl Slot {
    fn new() -> Self {
        Self {
            place: Place::Free,
            operation: Operation::Flush,
            way: Way::Plain,
            slba: 0,
            blocks: 0,
            done: 0,
            now: 0,
            memory: Held::NONE,
            bounce: None,
            cancelled: false,
            retries: 0,
            generation: 0,
        }
    }
}

/// What came of a command.
enum Next {
    /// Another one.
    Again,
    /// That was the last.
    End(Status),
}

/// The data side of a [`super::PassthroughBackend`]: a ring of its own, and nothing allocated after it was made.
pub struct PassthroughChannel {
    // Ends what it has begun when it is dropped, while the device is still open and locked.
    ring: Ring,
    geometry: Geometry,
    shared: Arc<Shared>,
    slots: Vec<Slot>,
    for_bounce: VecDeque<Tag>,
    for_room: VecDeque<Tag>,
    pending: usize,
    /// The ring and `nudge`.
    wake: OwnedFd,
    /// Signalled by us when the kernel did not take what we have for it.
    nudge: OwnedFd,
    nudged: bool,
}

impl PassthroughChannel {
    pub(super) fn new(
        geometry: Geometry,
        shared: &Arc<Shared>,
        depth: u32,
    ) -> Result<Self, OpenError> {
        let bounces = depth.clamp(1, MAX_BOUNCES) as usize;
        let ring = Ring::new(&shared.device.file, shared.fence.as_deref(), depth, bounces)
            .map_err(no_ring)?;
        let nudge = wake::event_fd()?;
        let wake = wake::either(ring.fd(), nudge.as_fd())?;
        Ok(Self {
            ring,
            geometry,
            shared: Arc::clone(shared),
            slots: (0..depth).map(|_| Slot::new()).collect(),
            for_bounce: VecDeque::with_capacity(depth as usize),
            for_room: VecDeque::with_capacity(depth as usize),
            pending: 0,
            wake,
            nudge,
            nudged: false,
        })
    }

    /// How a request begins; `None` if there is nothing to do for it.
    fn way(&self, request: &Request<'_>) -> Option<Way> {
        let can = self.shared.device.abilities;
        let direct = || match request.data.is_aligned(MEMORY_ALIGN) {
            true => Way::Direct,
            false => Way::Bounced,
        };
        Some(match request.operation {
            Operation::Read | Operation::Write { .. } => direct(),
            Operation::Compare if can.compare => direct(),
            Operation::Verify if can.verify => Way::Plain,
            Operation::WriteZeroes { .. } if can.write_zeroes => Way::Plain,
            Operation::Compare | Operation::Verify | Operation::WriteZeroes { .. } => Way::Bounced,
            // Advice: what the device cannot do is not done.
            Operation::Deallocate => can.deallocate.then_some(Way::Plain)?,
            // Without a cache that forgets, all that completed is on stable media.
            Operation::Flush if !self.geometry.volatile_write_cache => return None,
            Operation::Flush if self.geometry.read_only => return None,
            Operation::Flush => Way::Plain,
        })
    }

    /// Send the next command of a request, or let it wait.
    fn advance(&mut self, tag: Tag) {
        let Some(slot) = self.slots.get_mut(tag as usize) else {
            return;
        };
        slot.place = Place::Waiting;
        let device = &self.shared.device;
        let shift = self.geometry.block_shift;
        let left = slot.blocks - slot.done;
        let from = (slot.done << shift) as usize;
        let mut piece = None;
        if slot.way == Way::Direct {
            let most = Piece::of(&slot.memory, from, &device.limits, 1 << shift);
            match most {
                Some(p) => piece = Some(p),
                // It is cut up in a way no command can name.
                None => slot.way = Way::Bounced,
            }
        }
        if slot.way == Way::Bounced && slot.bounce.is_none() {
            slot.bounce = self.ring.memory_mut().take();
            if slot.bounce.is_none() {
                self.for_bounce.push_back(tag);
                return;
            }
        }
        let (opcode, most, dword12) = command_of(slot.operation, slot.way, device);
        slot.now = match &piece {
            Some(piece) => (piece.bytes() >> shift) as u64,
            None if slot.way == Way::Bounced => {
                (BOUNCE_BYTES.min(device.limits.bytes) >> shift) as u64
            }
            None => most,
        }
        .min(left);
        let slba = slot.slba + slot.done;
        let mut command = Command::new(opcode.0, device.nsid);
        let bytes = (slot.now << shift) as usize;
        let data = match (slot.operation, &piece, &slot.bounce) {
            (Operation::Flush, ..) => Data::None,
            (Operation::Deallocate, ..) => {
                // One range, which is 0 in the zero-based dword 10.
                command.cdw11 = AD;
                let range = DsmRange {
                    cattr: 0,
                    nlb: u32::try_from(slot.now).unwrap_or(u32::MAX),
                    slba,
                };
                // SAFETY: the range is this tag's, which has no command with the kernel.
                unsafe { self.ring.set_range(tag, range) };
                Data::Range(tag)
            }
            _ => {
                command.cdw10 = slba as u32;
                command.cdw11 = (slba >> 32) as u32;
                command.cdw12 = (slot.now.saturating_sub(1) as u32 & 0xffff) | dword12;
                match (&piece, &slot.bounce) {
                    (Some(piece), _) => Data::Piece(piece),
                    (None, Some(bounce)) if slot.way == Way::Bounced => {
                        if opcode == NvmOpcode::WRITE || opcode == NvmOpcode::COMPARE {
                            let memory = self.ring.memory_mut();
                            // SAFETY: the bounce buffer is this slot's, which has no command with the kernel.
                            unsafe {
                                match slot.operation {
                                    Operation::WriteZeroes { .. } => memory.zero(bounce, bytes),
                                    _ => memory.fill(bounce, &slot.memory, from, bytes),
                                }
                            }
                        }
                        Data::Bounce(bounce, bytes)
                    }
                    _ => Data::None,
                }
            }
        };
        let key = u64::from(slot.generation) << 32 | u64::from(tag);
        // SAFETY: the request's memory stays by the contract of `Channel::submit`, which ends when we finish the request (only after the
        // result of this key), let it go (only while it is not with the kernel), or are dropped, and the ring with us. The bounce
        // buffer and the range stay with the slot as long.
        if unsafe { self.ring.queue(key, &command, &data, slot.retries > 0) } {
            slot.place = Place::Kernel(key);
        } else {
            self.for_room.push_back(tag);
        }
    }

    /// What the result of a command means for its request: a status of the device, or an error of the kernel.
    fn judge(&mut self, tag: Tag, result: i32) -> Next {
        let Some(slot) = self.slots.get_mut(tag as usize) else {
            return Next::Again;
        };
        if result != 0 {
            return self.judge_error(tag, result);
        }
        slot.retries = 0;
        if let (Way::Bounced, Some(bounce)) = (slot.way, &slot.bounce) {
            let shift = self.geometry.block_shift;
            let (from, bytes) = ((slot.done << shift) as usize, (slot.now << shift) as usize);
            // SAFETY: the command's result is here, so the kernel does not have the buffer.
            let ours = unsafe { self.ring.memory().bytes(bounce, bytes) };
            let memory = slot.memory.buffers();
            match slot.operation {
                Operation::Read => {
                    memory.write(from, ours);
                }
                // A device that compares by itself has done so; this buffer then is what it compared with.
                Operation::Compare
                    if !self.shared.device.abilities.compare && !memory.equals(from, ours) =>
                {
                    return Next::End(Status::COMPARE_FAILURE);
                }
                _ => {}
            }
        }
        slot.done += slot.now;
        match slot.done >= slot.blocks {
            true => Next::End(Status::SUCCESS),
            false if slot.cancelled => Next::End(Status::ABORT_REQUESTED),
            false => Next::Again,
        }
    }

    fn judge_error(&mut self, tag: Tag, result: i32) -> Next {
        let Some(slot) = self.slots.get_mut(tag as usize) else {
            return Next::Again;
        };
        if slot.cancelled {
            return Next::End(Status::ABORT_REQUESTED);
        }
        let at = slot.slba + slot.done;
        let (status, cause) = if result > 0 {
            // The status field of the completion without its phase; retry delay, More and Do Not Retry are above bit 10.
            let status = Status(result as u16 & 0x7ff);
            let told = match status.sct() {
                // Path related: about the way to the device, which is this host's affair.
                3 => Status::INTERNAL_ERROR,
                _ => status,
            };
            if status == Status::COMPARE_FAILURE || status == Status::ABORT_REQUESTED {
                return Next::End(status);
            }
            (told, io::Error::other(Refused(status)))
        } else {
            let errno = result.wrapping_neg();
            match errno {
                libc::EAGAIN if slot.retries < MAX_RETRIES => {
                    slot.retries += 1;
                    return Next::Again;
                }
                // More segments, or others, than the kernel takes.
                libc::EINVAL if slot.way == Way::Direct => {
                    slot.way = Way::Bounced;
                    return Next::Again;
                }
                _ => {}
            }
            let cause = io::Error::from_raw_os_error(errno);
            (error::status_of(errno, slot.operation), cause)
        };
        let operation = slot.operation;
        let offset = at << self.geometry.block_shift;
        self.shared
            .log
            .report(&self.shared.path, operation, offset, &cause);
        Next::End(status)
    }

    /// Take a request's tag back.
    fn release(&mut self, tag: Tag) {
        if let Some(slot) = self.slots.get_mut(tag as usize) {
            slot.place = Place::Free;
            slot.memory = Held::NONE;
            if let Some(bounce) = slot.bounce.take() {
                self.ring.memory_mut().put(bounce);
            }
            self.pending -= 1;
        }
    }

    fn reap(&mut self, out: &mut Vec<Finished>) {
        while out.len() < out.capacity() {
            let Some((key, result)) = self.ring.next() else {
                break;
            };
            let tag = key as u32;
            let slot = self.slots.get(tag as usize);
            // Each key is used once, so anything else is not a result of ours.
            if slot.is_none_or(|s| s.place != Place::Kernel(key)) {
                continue;
            }
            match self.judge(tag, result) {
                Next::Again => self.advance(tag),
                Next::End(status) => {
                    self.release(tag);
                    let status = status.into();
                    out.push(Finished { tag, status });
                }
            }
        }
    }

    /// Requests that waited and need not any more.
    fn admit(&mut self) {
        // `advance` may put a request back at the end: each gets one chance.
        for _ in 0..self.for_bounce.len() {
            if !self.ring.memory().has_free() {
                break;
            }
            if let Some(tag) = self.for_bounce.pop_front() {
                self.advance(tag);
            }
        }
        for _ in 0..self.for_room.len() {
            if !self.ring.has_room() {
                break;
            }
            if let Some(tag) = self.for_room.pop_front() {
                self.advance(tag);
            }
        }
    }
}

/// A status as an error, for the log.
#[derive(Debug, thiserror::Error)]
#[error("the device says: {0}")]
struct Refused(Status);

/// The command that does an operation in a way: its opcode, the most blocks of one, and the flags in dword 12.
fn command_of(
    operation: Operation,
    way: Way,
    device: &super::device::Device,
) -> (NvmOpcode, u64, u32) {
    let flag = |on: bool, bit: u32| if on { bit } else { 0 };
    let limits = &device.limits;
    match operation {
        Operation::Read => (NvmOpcode::READ, MAX_BLOCKS, 0),
        Operation::Write { fua } => (NvmOpcode::WRITE, MAX_BLOCKS, flag(fua, FUA)),
        Operation::Compare if device.abilities.compare => (NvmOpcode::COMPARE, MAX_BLOCKS, 0),
        Operation::Verify if way == Way::Plain => (NvmOpcode::VERIFY, limits.verify.into(), 0),
        Operation::Compare | Operation::Verify => (NvmOpcode::READ, MAX_BLOCKS, 0),
        Operation::WriteZeroes { deallocate, fua } if way == Way::Plain => (
            NvmOpcode::WRITE_ZEROES,
            limits.zeroes.into(),
            flag(fua, FUA) | flag(deallocate, DEAC),
        ),
        Operation::WriteZeroes { fua, .. } => (NvmOpcode::WRITE, MAX_BLOCKS, flag(fua, FUA)),
        Operation::Deallocate => (NvmOpcode::DATASET_MANAGEMENT, limits.deallocate.into(), 0),
        Operation::Flush => (NvmOpcode::FLUSH, MAX_BLOCKS, 0),
    }
}

impl Channel for PassthroughChannel {
    unsafe fn submit(&mut self, tag: Tag, request: &Request<'_>) -> Submitted {
        if let Err(status) = self.geometry.extent(request) {
            return Submitted::Done(status);
        }
        let Some(way) = self.way(request) else {
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
            way,
            slba: request.slba,
            blocks: u64::from(request.blocks),
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
    fn flush(&mut self) {
        if !self.ring.has_unsubmitted() {
            return;
        }
        if let Err(cause) = self.ring.submit() {
            // It stays queued, and the next poll tries again; nobody may sleep before that.
            if !self.nudged {
                tracing::debug!(%cause, "io_uring takes nothing at the moment");
            }
            self.nudged = true;
            wake::signal(&self.nudge);
        }
    }

    fn poll(&mut self, out: &mut Vec<Finished>) {
        if self.pending == 0 && !self.nudged {
            return;
        }
        if self.nudged {
            wake::clear(&self.nudge);
            self.nudged = false;
        }
        if self.ring.operations() > 0 {
            self.ring.run_tasks();
            self.reap(out);
        }
        self.admit();
        self.flush();
    }

    /// What the device has it finishes: Linux lets nobody abort a single passed-through command.
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
            Place::Kernel(_) => {
                slot.cancelled = true;
                Cancelled::ResultComes
            }
        }
    }

    #[inline]
    fn pending(&self) -> usize {
        self.pending
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wake.as_fd())
    }
}
