//! The data side: from a guest's command to the SSD's, and back.

#![expect(unsafe_code, reason = "implements the unsafe `Channel::submit`")]

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use nvme_spec::nvm::{DatasetManagement, DsmRange, Flush, ReadWrite};
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::{Sqe, Status, StatusField};
use zerocopy::IntoBytes as _;

use super::Shared;
use super::job::{Job, Limits, MOST_RANGES};
use super::pages::{self, PAGE};
use super::stats::Stats;
use crate::backend::{
    BlockRange, Cancelled, Channel, Finished, Geometry, GuestData, Operation, Request, Submitted,
    Tag,
};
use crate::driver::{Completion, Lane, SubmitError};
use crate::memory::Buffers;

/// Marks what the lane gives back as belonging to a [`Job`], not to a request that is one command.
const JOB: u64 = 1 << 32;

/// Of a guest's command dword 12: Force Unit Access and Limited Retry. Never protection information, directives, or what is reserved.
const CDW12: u32 = 1 << 30 | 1 << 31;

/// Of a guest's command dword 13: the Dataset Management hints.
const CDW13: u32 = 0xFF;

/// What is known of a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    /// One command, which is out.
    Out,
    /// See its [`Job`].
    Job,
}

/// The data side of an [`NvmeBackend`](super::NvmeBackend).
pub struct NvmeChannel {
    // First, so that it is dropped before anything the device may still use.
    lane: Lane,
    sole: bool,
    nsid: u32,
    /// First block of the namespace in the SSD's.
    first: u64,
    /// Device address of guest address 0.
    base: u64,
    limits: Limits,
    geometry: Geometry,
    pending: usize,
    /// By tag.
    states: Vec<State>,
    stats: Arc<Stats>,
    /// By tag.
    jobs: Vec<Option<Job>>,
    /// Jobs that wait for room in the lane, first come first.
    waiting: VecDeque<Tag>,
    /// Some of them were sent, and the SSD was not told.
    unsent: bool,
    /// Pages of the transfer at hand.
    pages: Vec<u64>,
    shared: Arc<Shared>,
}

/// Pages of the largest transfer.
const MOST_PAGES: usize = (1 << 20) / 4096 + 1;

/// The opcode of an operation, and the flags it has in command dword 12.
#[inline]
fn opcode(operation: Operation) -> (NvmOpcode, u32) {
    const FUA: u32 = 1 << 30;
    const DEAC: u32 = 1 << 25;
    let flag = |on: bool, bit: u32| if on { bit } else { 0 };
    match operation {
        Operation::Read => (NvmOpcode::READ, 0),
        Operation::Write { fua } => (NvmOpcode::WRITE, flag(fua, FUA)),
        Operation::Compare => (NvmOpcode::COMPARE, 0),
        Operation::Verify => (NvmOpcode::VERIFY, 0),
        Operation::WriteZeroes { deallocate, fua } => (
            NvmOpcode::WRITE_ZEROES,
            flag(fua, FUA) | flag(deallocate, DEAC),
        ),
        Operation::Deallocate => (NvmOpcode::DATASET_MANAGEMENT, 0),
        Operation::Flush => (NvmOpcode::FLUSH, 0),
    }
}

/// What the guest is told of what the SSD said: the status, Do Not Retry and More. The phase is another queue's, and a retry delay is an index
/// into times the guest was not told.
#[inline]
fn status(completion: &Completion) -> StatusField {
    completion.cqe.status.with_p(false).with_crd(0)
}

/// Why a command was not sent.
enum Unsent {
    /// There is no room now.
    Full,
    /// It cannot be.
    Refused(Status),
}

impl From<SubmitError> for Unsent {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::Full => Self::Full,
            // Neither can be: transfers were cut, and pages are pages.
            SubmitError::TooLong | SubmitError::Prp(_) => Self::Refused(Status::INTERNAL_ERROR),
        }
    }
}

impl From<Status> for Unsent {
    fn from(status: Status) -> Self {
        Self::Refused(status)
    }
}

impl NvmeChannel {
    pub(super) fn new(
        geometry: Geometry,
        shared: Arc<Shared>,
        lane: Lane,
        depth: u32,
        stats: Arc<Stats>,
    ) -> Self {
        Self {
            lane,
            sole: shared.window.is_sole(),
            nsid: shared.nsid,
            first: shared.first,
            base: shared.window.base(),
            limits: shared.limits,
            geometry,
            pending: 0,
            states: vec![State::Free; depth as usize],
            stats,
            jobs: (0..depth).map(|_| None).collect(),
            waiting: VecDeque::with_capacity(depth as usize),
            unsent: false,
            pages: Vec::with_capacity(MOST_PAGES),
            shared,
        }
    }

    /// A command on blocks of the SSD, without data.
    #[inline]
    fn command(&self, operation: Operation, slba: u64, blocks: u32) -> Sqe {
        let (opcode, flags) = opcode(operation);
        // At most 65536 blocks.
        let nlb_z = blocks.saturating_sub(1) as u16;
        let mut sqe = ReadWrite::new(self.nsid, slba, nlb_z).to_sqe(opcode, 0, 0);
        sqe.cdw12 |= flags;
        sqe
    }

    /// A command on blocks of the SSD with what a guest's command said besides.
    #[inline]
    fn transfer(&self, operation: Operation, slba: u64, blocks: u32, guest: &GuestData<'_>) -> Sqe {
        let mut sqe = self.command(operation, slba, blocks);
        sqe.cdw12 |= guest.cdw12 & CDW12;
        if operation != Operation::Compare {
            sqe.cdw13 = guest.cdw13 & CDW13;
        }
        sqe
    }

    /// Send a transfer that is one command.
    #[inline]
    fn send_whole(&mut self, sqe: Sqe, guest: &GuestData<'_>, user: u64) -> Result<(), Unsent> {
        if self.sole && !self.shared.window.is_stale() {
            self.lane
                .submit(sqe.with_prps(guest.prp1, guest.prp2), user)?;
            self.stats.untouched.one();
            return Ok(());
        }
        self.send_checked(sqe, guest, user)
    }

    /// Send a transfer that is one command, with every page looked at.
    fn send_checked(&mut self, sqe: Sqe, guest: &GuestData<'_>, user: u64) -> Result<(), Unsent> {
        if guest.prp1 & 3 == 0 && guest.bytes <= PAGE.rest(guest.prp1) {
            if !pages::is_guest(guest.map, guest.prp1, guest.bytes) {
                return Err(Status::DATA_TRANSFER_ERROR.into());
            }
            // No sum wraps: the window holds all of the guest's memory.
            let prp1 = self.base.wrapping_add(guest.prp1);
            self.lane.submit(sqe.with_prps(prp1, 0), user)?;
        } else {
            if self.lane.room() == 0 {
                return Err(Unsent::Full);
            }
            let offset = pages::read(guest, &mut self.pages)?;
            let base = self.base;
            let pages = self.pages.iter().map(|page| base.wrapping_add(*page));
            self.lane
                .submit_pages(sqe, pages, offset, guest.bytes, user)?;
        }
        self.stats.rebuilt.one();
        Ok(())
    }

    /// Send what can be sent of a job. `Full` = the rest has to wait.
    fn advance(&mut self, tag: Tag, job: &mut Job) -> Result<(), Unsent> {
        let user = u64::from(tag) | JOB;
        // Where the transfer begins in the first of `self.pages`, once these have been read.
        let mut offset = None;
        while !job.complete {
            let slba = self
                .first
                .wrapping_add(job.slba)
                .wrapping_add(u64::from(job.sent));
            let left = job.blocks - job.sent;
            let n = self.limits.piece(job.operation, slba, left);
            if self.lane.room() == 0 {
                return Err(Unsent::Full);
            }
            match (&job.guest, job.operation) {
                (Some(guest), operation) => {
                    let guest = guest.data();
                    let sqe = self.transfer(operation, slba, n, &guest);
                    if n == job.blocks {
                        self.send_whole(sqe, &guest, user)?;
                    } else {
                        let offset = match offset {
                            Some(offset) => offset,
                            None => *offset.insert(pages::read(&guest, &mut self.pages)?),
                        };
                        self.send_part(sqe, offset, job.sent, n, user)?;
                    }
                }
                (None, Operation::Flush) => {
                    self.lane.submit(Flush { nsid: self.nsid }.to_sqe(), user)?;
                }
                (None, Operation::Deallocate) => {
                    let range = DsmRange {
                        cattr: 0,
                        nlb: n,
                        slba,
                    };
                    self.send_ranges(&[range], user)?;
                }
                (None, operation) => {
                    let sqe = self.command(operation, slba, n);
                    self.lane.submit(sqe, user)?;
                }
            }
            if job.sent == 0 {
                match &job.guest {
                    None => self.stats.without_data.one(),
                    Some(_) if n < job.blocks => self.stats.split.one(),
                    // Counted as what it was sent as.
                    Some(_) => {}
                }
            }
            job.out += 1;
            job.sent += n;
            job.complete = job.sent == job.blocks;
        }
        Ok(())
    }

    /// Have the SSD deallocate ranges of its blocks: one at least, and no more than a page holds.
    fn send_ranges(&mut self, ranges: &[DsmRange], user: u64) -> Result<(), Unsent> {
        let command = DatasetManagement {
            nsid: self.nsid,
            nr_z: ranges.len().saturating_sub(1) as u8,
            ad: true,
            ..DatasetManagement::default()
        };
        self.lane
            .submit_bytes(command.to_sqe(0, 0), ranges.as_bytes(), user)?;
        Ok(())
    }

    /// Send the part of a transfer that begins `sent` blocks into it.
    fn send_part(
        &mut self,
        sqe: Sqe,
        offset: u32,
        sent: u32,
        blocks: u32,
        user: u64,
    ) -> Result<(), Unsent> {
        let shift = self.geometry.block_shift;
        let at = (u64::from(sent) << shift) + u64::from(offset);
        let skip = usize::try_from(at / u64::from(PAGE.bytes())).unwrap_or(usize::MAX);
        let base = self.base;
        let pages = self.pages.iter().skip(skip);
        let pages = pages.map(|page| base.wrapping_add(*page));
        self.lane
            .submit_pages(sqe, pages, PAGE.offset(at), blocks << shift, user)?;
        Ok(())
    }

    /// Begin a request that is more than one command at once.
    fn begin(&mut self, tag: Tag, request: &Request<'_>) -> Submitted {
        let mut job = Job::of(request);
        // Who came before goes before.
        let result = match self.waiting.is_empty() {
            true => self.advance(tag, &mut job),
            false => Err(Unsent::Full),
        };
        match result {
            Ok(()) => {}
            Err(Unsent::Full) => {
                job.waits = true;
                self.waiting.push_back(tag);
            }
            Err(Unsent::Refused(status)) if job.out == 0 => return Submitted::Done(status),
            Err(Unsent::Refused(status)) => job.fail(status.into()),
        }
        self.set(tag, State::Job);
        if let Some(place) = self.jobs.get_mut(tag as usize) {
            *place = Some(job);
        }
        self.pending += 1;
        Submitted::Pending
    }

    /// Send what had to wait, as far as there is room for it and for results.
    fn go_on(&mut self, out: &mut Vec<Finished>) {
        // A lane that the SSD's keeper has not seen yet has room, but not for lists.
        let mut full = false;
        while !full
            && out.len() < out.capacity()
            && self.lane.room() > 0
            && let Some(tag) = self.waiting.pop_front()
        {
            let Some(mut job) = self.jobs.get_mut(tag as usize).and_then(Option::take) else {
                continue;
            };
            job.waits = false;
            self.unsent = true;
            match self.advance(tag, &mut job) {
                Ok(()) => {}
                Err(Unsent::Full) => {
                    job.waits = true;
                    self.waiting.push_front(tag);
                    full = true;
                }
                Err(Unsent::Refused(status)) => job.fail(status.into()),
            }
            match job.end() {
                Some(status) => {
                    self.set(tag, State::Free);
                    self.pending -= 1;
                    out.push(Finished { tag, status });
                }
                None => {
                    if let Some(place) = self.jobs.get_mut(tag as usize) {
                        *place = Some(job);
                    }
                }
            }
        }
    }

    #[inline]
    fn set(&mut self, tag: Tag, state: State) {
        if let Some(place) = self.states.get_mut(tag as usize) {
            *place = state;
        }
    }
}

/// A command of a job is done: what came of the job, if that was the last.
#[cold]
fn job_done(jobs: &mut [Option<Job>], tag: Tag, status: StatusField) -> Option<StatusField> {
    let place = jobs.get_mut(tag as usize)?;
    let job = place.as_mut()?;
    job.out = job.out.saturating_sub(1);
    if !status.is_success() {
        job.fail(status);
    }
    let end = job.end()?;
    *place = None;
    Some(end)
}

impl Channel for NvmeChannel {
    #[inline]
    unsafe fn submit(&mut self, tag: Tag, request: &Request<'_>) -> Submitted {
        // What a guest may reach of the SSD depends on this: it is looked at here once more.
        if let Err(status) = self.geometry.extent(request) {
            return Submitted::Done(status);
        }
        match self.states.get(tag as usize) {
            Some(State::Free) => {}
            Some(_) => return Submitted::Done(Status::COMMAND_ID_CONFLICT),
            None => return Submitted::Done(Status::INTERNAL_ERROR),
        }
        if !request.operation.moves_data() {
            return self.begin(tag, request);
        }
        let Some(guest) = &request.guest else {
            // Memory that is not a guest's is not shown to the SSD.
            return Submitted::Done(Status::INTERNAL_ERROR);
        };
        let slba = self.first.wrapping_add(request.slba);
        if !self.limits.is_whole(slba, request.blocks) || !self.waiting.is_empty() {
            return self.begin(tag, request);
        }
        let sqe = self.transfer(request.operation, slba, request.blocks, guest);
        match self.send_whole(sqe, guest, tag.into()) {
            Ok(()) => {
                self.set(tag, State::Out);
                self.pending += 1;
                Submitted::Pending
            }
            Err(Unsent::Full) => self.begin(tag, request),
            Err(Unsent::Refused(status)) => Submitted::Done(status),
        }
    }

    unsafe fn pass(&mut self, tag: Tag, sqe: &Sqe) -> Submitted {
        if !self.sole || !self.shared.traits.pass.contains(sqe.opcode) {
            return Submitted::Done(Status::INVALID_OPCODE);
        }
        if self.states.get(tag as usize) != Some(&State::Free) {
            return Submitted::Done(Status::COMMAND_ID_CONFLICT);
        }
        let own = Sqe {
            nsid: self.nsid,
            ..*sqe
        };
        // Who finds no room may come again.
        if !self.waiting.is_empty() || self.lane.submit_once(own, tag.into()).is_err() {
            return Submitted::Done(Status::COMMAND_INTERRUPTED);
        }
        self.stats.passed.one();
        self.set(tag, State::Out);
        self.pending += 1;
        Submitted::Pending
    }

    fn deallocate(&mut self, tag: Tag, ranges: &[BlockRange]) -> Option<(usize, Submitted)> {
        let n = self.limits.together(ranges);
        let free = self.states.get(tag as usize) == Some(&State::Free);
        // One is a request like others; and who came before goes before.
        if n < 2 || !free || !self.waiting.is_empty() || self.lane.room() == 0 {
            return None;
        }
        let mut list = [DsmRange::default(); MOST_RANGES];
        for (place, range) in list.iter_mut().zip(ranges.iter().take(n)) {
            let request = Request {
                operation: Operation::Deallocate,
                slba: range.slba,
                blocks: range.blocks,
                data: Buffers::NONE,
                guest: None,
            };
            // As in `submit`.
            if let Err(status) = self.geometry.extent(&request) {
                return Some((n, Submitted::Done(status)));
            }
            *place = DsmRange {
                cattr: 0,
                nlb: range.blocks,
                slba: self.first.wrapping_add(range.slba),
            };
        }
        let list = list.get(..n)?;
        self.send_ranges(list, tag.into()).ok()?;
        self.stats.without_data.one();
        self.set(tag, State::Out);
        self.pending += 1;
        Some((n, Submitted::Pending))
    }

    #[inline]
    fn flush(&mut self) {
        self.unsent = false;
        self.lane.ring();
    }

    #[inline]
    fn poll(&mut self, out: &mut Vec<Finished>) {
        let room = u32::try_from(out.capacity() - out.len()).unwrap_or(u32::MAX);
        let (states, jobs, pending) = (&mut self.states, &mut self.jobs, &mut self.pending);
        self.lane.poll(room, |completion| {
            let tag = completion.user as u32;
            let mut status = status(&completion);
            if completion.user & JOB != 0 {
                match job_done(jobs, tag, status) {
                    Some(end) => status = end,
                    None => return,
                }
            }
            if let Some(state) = states.get_mut(tag as usize) {
                *state = State::Free;
            }
            *pending -= 1;
            out.push(Finished { tag, status });
        });
        if !self.waiting.is_empty() {
            self.go_on(out);
        }
    }

    #[inline]
    fn unsent(&self) -> bool {
        self.unsent
    }

    fn cancel(&mut self, tag: Tag) -> Cancelled {
        let job = match self.states.get(tag as usize) {
            None | Some(State::Free) => return Cancelled::Gone,
            Some(State::Out) => {
                self.lane.cancel(tag.into());
                return Cancelled::ResultComes;
            }
            Some(State::Job) => self.jobs.get_mut(tag as usize),
        };
        if let Some(place) = job
            && let Some(job) = place
        {
            if std::mem::take(&mut job.waits) {
                self.waiting.retain(|t| *t != tag);
            }
            if job.out > 0 {
                // No more of it is sent; what is out is the SSD's.
                self.lane.cancel(u64::from(tag) | JOB);
                if !job.complete {
                    job.fail(Status::ABORT_REQUESTED.into());
                }
                return Cancelled::ResultComes;
            }
            *place = None;
        }
        self.set(tag, State::Free);
        self.pending -= 1;
        Cancelled::Gone
    }

    #[inline]
    fn pending(&self) -> usize {
        self.pending
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.lane.wake_fd()
    }

    fn wakes_by_edges(&self) -> bool {
        true
    }

    fn tend(&mut self) {
        // Nothing is asked for: what the keeper wants is done all the same.
        self.lane.poll(0, |_| {});
    }
}
