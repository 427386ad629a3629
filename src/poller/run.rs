//! The way of a command on its poller: fetch, begin, finish, post.

#![expect(
    unsafe_code,
    reason = "the one place where a channel is promised that guest memory stays"
)]

use nvme_spec::{Cqe, Sqe, Status, StatusField};

use super::cq::Cq;
use super::interrupt::GRACE;
use super::message::{IoFailure, PollerEvent};
use super::served::Served;
use super::slot::{Rest, Slot, Slots};
use super::sq::Sq;
use super::stats::NamespaceStats;
use crate::backend::{AnyChannel, Channel as _, Finished, Operation, Request, Submitted};
use crate::io::{self, Fill, Namespace, Plan, Range, Refusal};
use crate::memory::{Buffers, GuestMap, HostSeg};

/// Commands taken from one queue before the next queue has its turn.
const BURST: u32 = 32;

/// What all controllers of a poller share.
pub(super) struct Core {
    pub slots: Slots,
    /// Results of a channel, taken in one go.
    pub finished: Vec<Finished>,
    /// Ranges of the Dataset Management command at hand.
    ranges: Vec<Range>,
    /// Commands one controller may have out at a time.
    pub quota: usize,
}

impl Core {
    pub fn new(slots: usize) -> Self {
        Self {
            slots: Slots::new(slots),
            finished: Vec::with_capacity(slots),
            ranges: Vec::with_capacity(io::MAX_RANGES),
            quota: slots,
        }
    }
}

/// What became of a command at once.
enum Begun {
    Done(Refusal),
    Pending,
}

impl From<Status> for Begun {
    fn from(status: Status) -> Self {
        Self::Done(status.into())
    }
}

impl Served {
    /// Look at everything once: results, new commands, then one flush and one interrupt each. Whether there was anything.
    pub fn pass(&mut self, core: &mut Core) -> bool {
        let mut busy = self.collect(core);
        for i in 0..self.active.len() {
            if let Some(qid) = self.active.get(i).copied() {
                busy |= self.fetch(core, qid);
            }
        }
        if self.submitted {
            self.submitted = false;
            for channel in &mut self.channels {
                channel.flush();
            }
        }
        if busy || self.held_back {
            self.signal(GRACE);
        }
        busy |= self.look_at_admin();
        busy
    }

    /// Take the results that channels have.
    pub fn collect(&mut self, core: &mut Core) -> bool {
        let mut busy = false;
        for i in 0..self.channels.len() {
            let Some(channel) = self.channels.get_mut(i) else {
                continue;
            };
            if channel.pending() == 0 {
                continue;
            }
            channel.poll(&mut core.finished);
            while let Some(finished) = core.finished.pop() {
                busy = true;
                self.finished(core, finished);
            }
        }
        busy
    }

    /// A request of a command is finished: go on with the next one, or complete the command.
    pub fn finished(&mut self, core: &mut Core, finished: Finished) {
        let Some((slot, room)) = core.slots.with_segments(finished.tag) else {
            tracing::error!(
                tag = finished.tag,
                "a backend finished a request that is not out"
            );
            return;
        };
        let mut status = finished.status;
        if status.is_success() && !slot.mute && !matches!(slot.rest, Rest::Nothing) {
            let rest = std::mem::take(&mut slot.rest);
            let work = Work {
                tag: finished.tag,
                namespaces: &self.at.namespaces,
                channels: &mut self.channels,
                map: &self.at.map,
            };
            match work.go_on(slot, room, rest) {
                Begun::Pending => {
                    self.submitted = true;
                    return;
                }
                Begun::Done(refusal) => status = refusal.status,
            }
        }
        self.complete(core, finished.tag, status);
    }

    /// Tell the guest, and free the slot.
    pub fn complete(&mut self, core: &mut Core, tag: u32, status: Status) {
        let Some(slot) = core.slots.get(tag) else {
            return;
        };
        let status = if slot.queue_deleted && status == Status::ABORT_REQUESTED {
            Status::ABORTED_SQ_DELETION
        } else {
            status
        };
        let done = Done::of(slot, status);
        if let Some(token) = slot.abort.take() {
            let aborted = status == Status::ABORT_REQUESTED;
            self.reply(token, Ok(aborted));
        }
        let mute = slot.mute;
        core.slots.release(tag);
        self.outstanding = self.outstanding.saturating_sub(1);
        if mute {
            return;
        }
        let sq = self
            .sqs
            .get_mut(usize::from(done.sqid))
            .and_then(Option::as_mut);
        let cq = self
            .cqs
            .get_mut(usize::from(done.cqid))
            .and_then(Option::as_mut);
        if let (Some(sq), Some(cq)) = (sq, cq) {
            done.post(sq, cq);
            sq.outstanding = sq.outstanding.saturating_sub(1);
        }
        done.count(&self.at.stats);
        if let Some(failure) = done.failure() {
            self.report(failure);
        }
    }

    /// Fetch commands of one queue and begin them. Whether there were any.
    fn fetch(&mut self, core: &mut Core, qid: u16) -> bool {
        let Some(sq) = self.sqs.get_mut(usize::from(qid)).and_then(Option::as_mut) else {
            return false;
        };
        let waiting = match sq.look() {
            Ok(0) => return false,
            Ok(n) => n,
            Err(_) => {
                self.event(PollerEvent::InvalidDoorbell { qid });
                return true;
            }
        };
        let Some(cq) = self
            .cqs
            .get_mut(usize::from(sq.cqid))
            .and_then(Option::as_mut)
        else {
            return false;
        };
        if cq.broken || cq.ring.is_none() {
            return false;
        }
        let share = core.quota.saturating_sub(self.outstanding);
        let wanted = waiting
            .min(BURST)
            .min(u32::try_from(core.slots.available().min(share)).unwrap_or(u32::MAX));
        let granted = match cq.reserve(wanted) {
            Ok(n) => n,
            Err(_) => {
                let qid = cq.qid;
                self.event(PollerEvent::InvalidDoorbell { qid });
                return true;
            }
        };
        if granted == 0 {
            sq.stats.cq_full.add(1);
            return false;
        }
        if !sq.bell.has_shadow() {
            self.unshadowed_batches = self.unshadowed_batches.saturating_add(1);
        }
        sq.stats.batches.add(1);
        sq.stats.fetched.add(u64::from(granted));
        for _ in 0..granted {
            // The permit: a place in the completion queue and a slot are in hand before the command is taken.
            let Some(tag) = core.slots.take() else { break };
            let Some((slot, room)) = core.slots.with_segments(tag) else {
                break;
            };
            let Some(words) = sq.take() else {
                core.slots.release(tag);
                break;
            };
            let sqe: Sqe = zerocopy::transmute!(words);
            slot.sqe = words;
            slot.served = self.index;
            slot.sqid = qid;
            slot.cqid = sq.cqid;
            slot.cid = sqe.cid;
            cq.promise();
            let begun = if sq.was_aborted(sqe.cid) {
                Status::ABORT_REQUESTED.into()
            } else {
                let work = Work {
                    tag,
                    namespaces: &self.at.namespaces,
                    channels: &mut self.channels,
                    map: &self.at.map,
                };
                match io::parse(&sqe, &self.at.namespaces, self.limits) {
                    Ok(plan) => work.begin(slot, room, &sqe, plan, &mut core.ranges),
                    Err(refusal) => Begun::Done(refusal),
                }
            };
            match begun {
                Begun::Pending => {
                    sq.outstanding += 1;
                    self.outstanding += 1;
                    self.submitted = true;
                }
                Begun::Done(refusal) => {
                    let mut done = Done::of(slot, refusal.status);
                    done.parameter = refusal.parameter;
                    core.slots.release(tag);
                    done.post(sq, cq);
                    done.count(&self.at.stats);
                    if let Some(failure) = done.failure()
                        && self.reports_left > 0
                    {
                        self.reports_left -= 1;
                        self.at
                            .sink
                            .event(self.poller, PollerEvent::Failed(failure));
                    }
                }
            }
        }
        true
    }
}

/// A command that is over.
struct Done {
    sqid: u16,
    cqid: u16,
    cid: u16,
    status: Status,
    namespace: u32,
    blocks: u32,
    parameter: u16,
    opcode: u8,
    nsid: u32,
    slba: u64,
}

impl Done {
    fn of(slot: &Slot, status: Status) -> Self {
        let sqe: Sqe = zerocopy::transmute!(slot.sqe);
        Self {
            sqid: slot.sqid,
            cqid: slot.cqid,
            cid: slot.cid,
            status,
            namespace: slot.namespace,
            blocks: slot.blocks,
            parameter: 0xffff,
            opcode: sqe.opcode,
            nsid: sqe.nsid,
            slba: sqe.slba(),
        }
    }

    #[inline]
    fn post(&self, sq: &Sq, cq: &mut Cq) {
        sq.stats.completed.add(1);
        let field = if self.status.is_success() {
            StatusField::from_status(self.status)
        } else {
            sq.stats.failed.add(1);
            StatusField::from_status(self.status).with_dnr(self.status.default_dnr())
        };
        cq.post(
            Cqe {
                sqhd: sq.head,
                sqid: self.sqid,
                cid: self.cid,
                ..Cqe::default()
            },
            field,
        );
    }

    #[inline]
    fn count(&self, stats: &[NamespaceStats]) {
        use nvme_spec::opcode::NvmOpcode as O;
        let Some(stats) = stats.get(self.namespace as usize) else {
            return;
        };
        if !self.status.is_success() {
            // Media and data integrity errors are status code type 2.
            if self.status.sct() == 2 && self.status != Status::COMPARE_FAILURE {
                stats.media_errors.add(1);
            }
            return;
        }
        match O(self.opcode) {
            O::READ | O::COMPARE | O::VERIFY => {
                stats.reads.add(1);
                stats.blocks_read.add(u64::from(self.blocks));
            }
            O::WRITE => {
                stats.writes.add(1);
                stats.blocks_written.add(u64::from(self.blocks));
            }
            _ => stats.others.add(1),
        }
    }

    fn failure(&self) -> Option<IoFailure> {
        let told = [
            Status::SUCCESS,
            Status::ABORT_REQUESTED,
            Status::ABORTED_SQ_DELETION,
        ];
        (!told.contains(&self.status)).then_some(IoFailure {
            sqid: self.sqid,
            cid: self.cid,
            status: self.status,
            nsid: self.nsid,
            lba: self.slba,
            parameter: self.parameter,
        })
    }
}

/// What a command needs to get done.
struct Work<'a> {
    tag: u32,
    namespaces: &'a [Namespace],
    channels: &'a mut [AnyChannel],
    map: &'a GuestMap,
}

impl Work<'_> {
    fn begin(
        mut self,
        slot: &mut Slot,
        room: &mut [HostSeg],
        sqe: &Sqe,
        plan: Plan,
        ranges: &mut Vec<Range>,
    ) -> Begun {
        match plan {
            Plan::Transfer {
                namespace,
                operation,
                slba,
                blocks,
                bytes,
            } => {
                slot.namespace = namespace as u32;
                slot.blocks = blocks;
                let n = match io::resolve(self.map, sqe.prp1, sqe.prp2, bytes, Fill::new(room)) {
                    Ok(n) => n,
                    Err(status) => return status.into(),
                };
                slot.segments = n as u32;
                self.submit(slot, room, operation, slba, blocks)
            }
            Plan::Blocks {
                namespace,
                operation,
                slba,
                blocks,
            } => {
                slot.namespace = namespace as u32;
                slot.blocks = blocks;
                self.submit(slot, room, operation, slba, blocks)
            }
            Plan::FlushAll => self.go_on(slot, room, Rest::FlushFrom(0)),
            Plan::Deallocate {
                namespace,
                ranges: count,
            } => {
                slot.namespace = namespace as u32;
                let Some(ns) = self.namespaces.get(namespace) else {
                    return Status::INTERNAL_ERROR.into();
                };
                if let Err(status) =
                    io::read_ranges(self.map, sqe, count, ns.geometry.blocks, ranges)
                {
                    return status.into();
                }
                for i in 0..ranges.len() {
                    let Some(range) = ranges.get(i).copied() else {
                        break;
                    };
                    match self.submit(slot, room, Operation::Deallocate, range.slba, range.blocks) {
                        Begun::Done(refusal) if refusal.status.is_success() => {}
                        Begun::Pending if i + 1 < ranges.len() => {
                            // Only a backend that takes its time gets here: the one command that remembers more than fits its slot.
                            slot.rest =
                                Rest::Ranges(ranges.iter().skip(i + 1).rev().copied().collect());
                            return Begun::Pending;
                        }
                        other => return other,
                    }
                }
                Status::SUCCESS.into()
            }
            Plan::Nothing => Status::SUCCESS.into(),
        }
    }

    /// The next requests of a command that has several.
    fn go_on(mut self, slot: &mut Slot, room: &mut [HostSeg], rest: Rest) -> Begun {
        match rest {
            Rest::Nothing => Status::SUCCESS.into(),
            Rest::Ranges(mut ranges) => {
                while let Some(range) = ranges.pop() {
                    match self.submit(slot, room, Operation::Deallocate, range.slba, range.blocks) {
                        Begun::Done(refusal) if refusal.status.is_success() => {}
                        Begun::Pending => {
                            slot.rest = Rest::Ranges(ranges);
                            return Begun::Pending;
                        }
                        failed @ Begun::Done(_) => return failed,
                    }
                }
                Status::SUCCESS.into()
            }
            Rest::FlushFrom(first) => {
                for namespace in first..self.namespaces.len() {
                    slot.namespace = namespace as u32;
                    match self.submit(slot, room, Operation::Flush, 0, 0) {
                        Begun::Done(refusal) if refusal.status.is_success() => {}
                        Begun::Pending => {
                            slot.rest = Rest::FlushFrom(namespace + 1);
                            return Begun::Pending;
                        }
                        failed @ Begun::Done(_) => return failed,
                    }
                }
                Status::SUCCESS.into()
            }
        }
    }

    #[inline]
    fn submit(
        &mut self,
        slot: &Slot,
        room: &[HostSeg],
        operation: Operation,
        slba: u64,
        blocks: u32,
    ) -> Begun {
        let (Some(channel), Some(segs)) = (
            self.channels.get_mut(slot.namespace as usize),
            room.get(..slot.segments as usize),
        ) else {
            return Status::INTERNAL_ERROR.into();
        };
        // SAFETY: the segments were resolved in the controller's present map, which is held by `Served` and, when it is
        // replaced, by `Waiting::Memory` until no slot uses a region that went (`lifecycle.rs`). No reference into
        // guest memory exists outside the fence.
        let data = unsafe { Buffers::new(segs) };
        // SAFETY: as above for the memory; the list of segments is the slot's own, which stays until the slot is released,
        // which is after the request finished or was cancelled. `Served` drops its channels before its maps, and
        // the thread drops controllers before slots.
        let submitted = unsafe {
            channel.submit(
                self.tag,
                &Request {
                    operation,
                    slba,
                    blocks,
                    data,
                },
            )
        };
        match submitted {
            Submitted::Done(status) => status.into(),
            Submitted::Pending => Begun::Pending,
        }
    }
}
