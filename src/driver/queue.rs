//! One submission queue with its completion queue: the data path.

use std::fs::File;
use std::io::{self, Read as _};
use std::time::Duration;

use nvme_spec::prp::BuildError;
use nvme_spec::ring::{Phase, RingSize};
use nvme_spec::{Cqe, Sqe, Status};
use rustix::event::{PollFd, PollFlags, Timespec};

use super::lists::Lists;
use super::shadow::{Bell, Shadow};
use super::tags::{BadTag, Tags};
use super::{Dma, Doorbell};
use crate::memory::Ring;

/// A queue pair to be made.
#[derive(Clone, Copy, Debug)]
pub struct QueueConfig {
    /// Queue identifier of both queues.
    pub qid: u16,
    /// Entries of the submission queue.
    pub sq_size: RingSize,
    /// Entries of the completion queue.
    pub cq_size: RingSize,
    /// Commands that can be out at a time, at most one less than either size; 0 = as many as that, but not above 1024.
    pub depth: u32,
    /// Largest transfer in bytes; 0 = what the controller allows. Each command that can be out has memory for its PRP list.
    pub max_transfer: u32,
    /// Interrupt vector of the completion queue; `None` = it is polled only (IEN = 0).
    pub vector: Option<u16>,
}

/// Why a command was not submitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// As many commands are out as can be.
    #[error("the queue is full")]
    Full,
    /// Longer than the device transfers at once.
    #[error("the transfer is longer than the controller allows")]
    TooLong,
    /// The data is no transfer.
    #[error("the data cannot be described by PRPs: {0}")]
    Prp(#[from] BuildError),
}

/// A command that is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// What the command was submitted with.
    pub user: u64,
    /// The entry of the device.
    pub cqe: Cqe,
}

impl Completion {
    /// What came of it.
    pub fn status(&self) -> Status {
        self.cqe.status()
    }
}

/// What a device did that no device may do. The owner should reset it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It completed a command identifier no command of this queue can have.
    UnknownCommand(u16),
    /// It completed a command that is not out: late, or twice.
    StaleCommand(u16),
    /// It named another submission queue.
    WrongQueue(u16),
    /// It named a submission queue head the queue does not have.
    BadHead(u16),
}

/// What happened on a queue pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Commands submitted.
    pub submitted: u64,
    /// Commands completed.
    pub completed: u64,
    /// Entries of the device that were wrong: see [`Fault`].
    pub faults: u64,
}

/// A queue pair, owned by one thread.
pub struct QueuePair<B> {
    sq: Ring<8>,
    cq: Ring<2>,
    sq_size: RingSize,
    cq_size: RingSize,
    tail: u16,
    rung: u16,
    head: u16,
    phase: Phase,
    tags: Tags,
    sq_bell: Bell<B>,
    cq_bell: Bell<B>,
    counters: Counters,
    // What follows is not needed for a small transfer.
    lists: Lists,
    qid: u16,
    fault: Option<Fault>,
    interrupt: Option<File>,
    _memory: [Dma; 2],
}

/// What a [`QueuePair`] is made of.
pub(super) struct Parts<B> {
    pub(super) config: QueueConfig,
    pub(super) sq: Dma,
    pub(super) cq: Dma,
    pub(super) lists: Lists,
    pub(super) sq_bell: B,
    pub(super) cq_bell: B,
    pub(super) interrupt: Option<File>,
}

/// Commands that can be out on a queue of this configuration.
pub(super) fn depth_of(config: &QueueConfig) -> u32 {
    let most = config.sq_size.capacity().min(config.cq_size.capacity());
    match config.depth {
        0 => most.min(1024),
        wanted => wanted.min(most),
    }
}

impl<B: Doorbell> QueuePair<B> {
    /// A queue pair the device does not know of yet. `None` if its memory is not what the configuration needs.
    pub(super) fn new(parts: Parts<B>) -> Option<Self> {
        let QueueConfig {
            qid,
            sq_size,
            cq_size,
            ..
        } = parts.config;
        Some(Self {
            sq: Ring::new(parts.sq.map(), parts.sq.addr(), sq_size.get())?,
            cq: Ring::new(parts.cq.map(), parts.cq.addr(), cq_size.get())?,
            sq_size,
            cq_size,
            tail: 0,
            rung: 0,
            head: 0,
            phase: Phase::FIRST,
            tags: Tags::new(depth_of(&parts.config)),
            sq_bell: Bell::new(parts.sq_bell),
            cq_bell: Bell::new(parts.cq_bell),
            counters: Counters::default(),
            lists: parts.lists,
            qid,
            fault: None,
            interrupt: parts.interrupt,
            _memory: [parts.sq, parts.cq],
        })
    }

    /// Queue identifier.
    pub fn qid(&self) -> u16 {
        self.qid
    }

    /// Commands that are out.
    pub fn out(&self) -> u32 {
        self.tags.out()
    }

    /// Commands that can be out at a time.
    pub fn depth(&self) -> u32 {
        self.tags.depth()
    }

    /// Entries of the completion queue: no more completions can be there at once.
    pub fn entries(&self) -> u32 {
        self.cq_size.get()
    }

    /// Largest transfer in bytes.
    pub fn max_transfer(&self) -> u32 {
        self.lists.max_transfer()
    }

    /// What happened so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// How often the tail and the head register were written.
    pub fn doorbell_writes(&self) -> (u64, u64) {
        (self.sq_bell.rings, self.cq_bell.rings)
    }

    /// The first thing the device did wrong since the last call.
    pub fn take_fault(&mut self) -> Option<Fault> {
        self.fault.take()
    }

    /// Submit a command as it is, but for its identifier, which is returned. `user` comes back with the completion. The device
    /// is told by [`Self::ring`].
    ///
    /// # Errors
    ///
    /// [`SubmitError::Full`].
    #[inline]
    pub fn submit(&mut self, sqe: Sqe, user: u64) -> Result<u16, SubmitError> {
        let (_, cid) = self.tags.claim(user).ok_or(SubmitError::Full)?;
        self.push(sqe.with_cid(cid));
        Ok(cid)
    }

    /// Submit a command with `len` bytes of data at device address `addr` (contiguous there, dword aligned).
    ///
    /// # Errors
    ///
    /// [`SubmitError`]; nothing was submitted then.
    #[inline]
    pub fn submit_data(
        &mut self,
        sqe: Sqe,
        addr: u64,
        len: u32,
        user: u64,
    ) -> Result<u16, SubmitError> {
        let page = self.lists.page();
        let offset = page.offset(addr);
        let first = addr - u64::from(offset);
        let step = u64::from(page.bytes());
        let pages = (0..).map(move |i: u64| first.wrapping_add(i.wrapping_mul(step)));
        self.submit_pages(sqe, pages, offset, len, user)
    }

    /// Submit a command with `len` bytes of data that begin `offset` bytes into the first of `pages`.
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
    ) -> Result<u16, SubmitError> {
        let (slot, cid) = self.tags.claim(user).ok_or(SubmitError::Full)?;
        match self.lists.describe(slot, pages, offset, len) {
            Ok(prps) => {
                self.push(sqe.with_cid(cid).with_prps(prps.prp1, prps.prp2));
                Ok(cid)
            }
            Err(e) => {
                let _ = self.tags.release(cid);
                Err(e)
            }
        }
    }

    /// There is room: at most `size - 1` commands are out.
    #[inline]
    fn push(&mut self, sqe: Sqe) {
        self.sq
            .write(u32::from(self.tail), zerocopy::transmute!(sqe));
        self.tail = self.sq_size.next(self.tail);
        self.counters.submitted += 1;
    }

    /// Tell the device of all that was submitted since the last call.
    #[inline]
    pub fn ring(&mut self) {
        if self.rung != self.tail {
            self.rung = self.tail;
            self.sq_bell.update(self.tail);
        }
    }

    /// Hand at most `max` completions to `f`; tell the device once. Returns their number, wrong ones not counted.
    #[inline]
    pub fn poll(&mut self, max: u32, mut f: impl FnMut(Completion)) -> u32 {
        let mut seen = 0;
        let mut good = 0;
        while seen < max {
            let halves = self.cq.read_published(u32::from(self.head));
            if Cqe::phase_of_high_half(halves[1]) != self.phase.bit() {
                break;
            }
            seen += 1;
            (self.head, self.phase) = self.cq_size.next_with_phase(self.head, self.phase);
            let cqe = Cqe::from_halves(halves);
            match self.check(&cqe) {
                Ok(user) => {
                    good += 1;
                    f(Completion { user, cqe });
                }
                Err(fault) => {
                    self.counters.faults += 1;
                    self.fault.get_or_insert(fault);
                }
            }
        }
        if seen > 0 {
            self.counters.completed += u64::from(good);
            self.cq_bell.update(self.head);
        }
        good
    }

    #[inline]
    fn check(&mut self, cqe: &Cqe) -> Result<u64, Fault> {
        if cqe.sqid != self.qid {
            return Err(Fault::WrongQueue(cqe.sqid));
        }
        if !self.sq_size.is_valid_index(u32::from(cqe.sqhd)) {
            // The command is done all the same, if it is one of ours.
            let _ = self.tags.release(cqe.cid);
            return Err(Fault::BadHead(cqe.sqhd));
        }
        self.tags.release(cqe.cid).map_err(|bad| match bad {
            BadTag::Unknown => Fault::UnknownCommand(cqe.cid),
            BadTag::Stale => Fault::StaleCommand(cqe.cid),
        })
    }

    /// Sleep until the queue's vector is signalled, at most `limit`: how often it was since the last call, 0 if not. A queue without
    /// a vector is not waited for.
    ///
    /// # Errors
    ///
    /// What the kernel says of the eventfd.
    pub fn wait(&self, limit: Duration) -> io::Result<u64> {
        match &self.interrupt {
            Some(eventfd) => wait_for(eventfd, limit),
            None => Ok(0),
        }
    }

    /// The eventfd of the queue's vector.
    pub fn interrupt(&self) -> Option<&File> {
        self.interrupt.as_ref()
    }

    /// Put what the doorbells hold into shadows the device does not use yet.
    pub(super) fn seed(&self, sq: &Shadow, cq: &Shadow) {
        self.sq_bell.seed(sq);
        self.cq_bell.seed(cq);
    }

    pub(super) fn set_shadow(&mut self, sq: Shadow, cq: Shadow) {
        self.sq_bell.set_shadow(Some(sq));
        self.cq_bell.set_shadow(Some(cq));
    }
}

/// Sleep until an eventfd is signalled, at most `limit`: its count, 0 if it was not.
///
/// # Errors
///
/// What the kernel says of it.
pub fn wait_for(eventfd: &File, limit: Duration) -> io::Result<u64> {
    let timeout = Timespec::try_from(limit).map_err(io::Error::other)?;
    let mut fds = [PollFd::new(eventfd, PollFlags::IN)];
    match rustix::event::poll(&mut fds, Some(&timeout)) {
        Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(0),
        Ok(_) => {}
        Err(e) => return Err(e.into()),
    }
    let mut count = [0; 8];
    let mut file = eventfd;
    match file.read(&mut count) {
        Ok(_) => Ok(u64::from_ne_bytes(count)),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(0),
        Err(e) => Err(e),
    }
}
