//! The admin queue pair: fetch, room in the completion queue, post.
//!
//! A completion is not posted when it is made, but by [`AdminQueue::post`], after what follows from it has been written down.

use std::sync::Arc;

use nvme_spec::doorbell::{Doorbell, DoorbellStride};
use nvme_spec::regs::Aqa;
use nvme_spec::ring::{Phase, RingSize};
use nvme_spec::{Cqe, Sqe, Status, StatusField};
use serde::{Deserialize, Serialize};

use crate::controller::registers::AdminRegisters;
use crate::memory::{DoorbellWindow, GuestMap, Ring, SharedWord};

/// The admin submission and completion queue.
pub(in crate::controller) struct AdminQueue {
    at: AdminRegisters,
    sq: Ring<8>,
    cq: Ring<2>,
    sq_size: RingSize,
    cq_size: RingSize,
    tail_bell: SharedWord,
    head_bell: SharedWord,
    sq_head: u16,
    sq_tail: u16,
    cq_head: u16,
    cq_tail: u16,
    phase: Phase,
    /// Completion queue entries promised to commands that were fetched.
    reserved: u32,
    /// The completions that were made last: index and entry.
    batch: Vec<(u16, [u64; 2])>,
    /// They are posted.
    posted: bool,
}

/// Where the queue is, for whoever goes on with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::controller) struct AdminImage {
    aqa: u32,
    asq: u64,
    acq: u64,
    sq_head: u16,
    cq_tail: u16,
    phase: bool,
    /// Completions that may not have been posted; to post them again does no harm.
    batch: Vec<(u16, [u64; 2])>,
}

/// A doorbell holds a value its queue does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::controller) struct BadDoorbell(pub(in crate::controller) u32);

impl AdminQueue {
    /// The queues the guest set up; `None` if sizes, addresses or memory are not right.
    pub(in crate::controller) fn new(
        map: &Arc<GuestMap>,
        window: &Arc<DoorbellWindow>,
        stride: DoorbellStride,
        at: AdminRegisters,
    ) -> Option<Self> {
        let sq_size = RingSize::from_z(at.aqa.asqs_z())?;
        let cq_size = RingSize::from_z(at.aqa.acqs_z())?;
        let (sq, cq) = rings(map, at, sq_size, cq_size)?;
        let bell = |doorbell| {
            let offset = usize::try_from(stride.window_offset(doorbell)).ok()?;
            SharedWord::in_window(window, offset)
        };
        Some(Self {
            at,
            sq,
            cq,
            sq_size,
            cq_size,
            tail_bell: bell(Doorbell::Sq(0))?,
            head_bell: bell(Doorbell::Cq(0))?,
            sq_head: 0,
            sq_tail: 0,
            cq_head: 0,
            cq_tail: 0,
            phase: Phase::FIRST,
            reserved: 0,
            batch: Vec::new(),
            posted: true,
        })
    }

    /// The queues as they were left, with room for so many commands that were fetched. `None` as of [`Self::new`], or if they cannot have been left
    /// like that.
    pub(in crate::controller) fn resume(
        map: &Arc<GuestMap>,
        window: &Arc<DoorbellWindow>,
        stride: DoorbellStride,
        image: &AdminImage,
        fetched: usize,
    ) -> Option<Self> {
        let at = AdminRegisters {
            aqa: Aqa::from_bits(image.aqa),
            asq: image.asq,
            acq: image.acq,
        };
        let mut queue = Self::new(map, window, stride, at)?;
        let (sq_size, cq_size) = (queue.sq_size, queue.cq_size);
        queue.sq_head = sq_size.index(image.sq_head.into())?;
        queue.cq_tail = cq_size.index(image.cq_tail.into())?;
        queue.phase = Phase::from_bit(image.phase);
        if !image
            .batch
            .iter()
            .all(|(at, _)| cq_size.is_valid_index((*at).into()))
        {
            return None;
        }
        queue.batch.clone_from(&image.batch);
        queue.posted = false;
        // What is no index is found at the next look.
        let head = cq_size.index(queue.head_bell.load());
        queue.cq_head = head.unwrap_or(queue.cq_tail);
        queue.sq_tail = queue.sq_head;
        queue.reserved = u32::try_from(fetched).ok()?;
        let used = cq_size.distance(queue.cq_head, queue.cq_tail);
        (used.checked_add(queue.reserved)? <= cq_size.capacity()).then_some(queue)
    }

    /// Where it is.
    pub(in crate::controller) fn image(&self) -> AdminImage {
        AdminImage {
            aqa: self.at.aqa.into_bits(),
            asq: self.at.asq,
            acq: self.at.acq,
            sq_head: self.sq_head,
            cq_tail: self.cq_tail,
            phase: self.phase.bit(),
            batch: self.batch.clone(),
        }
    }

    /// Find the queues again in other memory; `false` if they are not in it.
    #[must_use]
    pub(in crate::controller) fn rebind(&mut self, map: &Arc<GuestMap>) -> bool {
        match rings(map, self.at, self.sq_size, self.cq_size) {
            None => false,
            Some((sq, cq)) => {
                self.sq = sq;
                self.cq = cq;
                true
            }
        }
    }

    /// Entries of the completion queue.
    pub(in crate::controller) fn cq_size(&self) -> RingSize {
        self.cq_size
    }

    /// Look at both doorbells.
    pub(in crate::controller) fn look(&mut self) -> Result<(), BadDoorbell> {
        let head = self.head_bell.load();
        let new = self.cq_size.index(head).ok_or(BadDoorbell(head))?;
        // The guest can free no more than was posted.
        let used = self.cq_size.distance(self.cq_head, self.cq_tail);
        if self.cq_size.distance(self.cq_head, new) > used {
            return Err(BadDoorbell(head));
        }
        self.cq_head = new;
        let tail = self.tail_bell.load();
        self.sq_tail = self.sq_size.index(tail).ok_or(BadDoorbell(tail))?;
        Ok(())
    }

    fn room(&self) -> u32 {
        self.cq_size
            .free(self.cq_head, self.cq_tail)
            .saturating_sub(self.reserved)
    }

    /// Whether commands wait for room in the completion queue.
    #[cfg(test)]
    pub(in crate::controller) fn is_blocked(&self) -> bool {
        self.sq_head != self.sq_tail && self.room() == 0
    }

    /// Copy the next command out, if there is one and its completion has room. It must be ended by [`Self::complete`] or
    /// [`Self::park`].
    pub(in crate::controller) fn fetch(&mut self) -> Option<Sqe> {
        if self.sq_head == self.sq_tail || self.room() == 0 {
            return None;
        }
        let words = self.sq.read(u32::from(self.sq_head));
        self.sq_head = self.sq_size.next(self.sq_head);
        self.reserved = self.reserved.saturating_add(1);
        Some(zerocopy::transmute!(words))
    }

    /// A command has been fetched that may stay for ever: its room is free again.
    pub(in crate::controller) fn park(&mut self) {
        self.reserved = self.reserved.saturating_sub(1);
    }

    /// Take room for a parked command; `false` if there is none now.
    #[must_use]
    pub(in crate::controller) fn unpark(&mut self) -> bool {
        if self.room() == 0 {
            return false;
        }
        self.reserved = self.reserved.saturating_add(1);
        true
    }

    /// Make the completion of a command that was fetched. `more`: the error log has an entry for it.
    pub(in crate::controller) fn complete(
        &mut self,
        cid: u16,
        dw0: u32,
        status: Status,
        more: bool,
    ) {
        let status = StatusField::from_status(status)
            .with_dnr(status.default_dnr())
            .with_m(more)
            .with_p(self.phase.bit());
        let cqe = Cqe {
            dw0,
            dw1: 0,
            sqhd: self.sq_head,
            sqid: 0,
            cid,
            status,
        };
        if std::mem::take(&mut self.posted) {
            self.batch.clear();
        }
        self.batch.push((self.cq_tail, cqe.to_halves()));
        (self.cq_tail, self.phase) = self.cq_size.next_with_phase(self.cq_tail, self.phase);
        self.reserved = self.reserved.saturating_sub(1);
    }

    /// Post what was made since the last call; whether there was anything.
    pub(in crate::controller) fn post(&mut self) -> bool {
        if std::mem::replace(&mut self.posted, true) {
            return false;
        }
        for (at, halves) in &self.batch {
            self.cq.write(u32::from(*at), *halves);
        }
        !self.batch.is_empty()
    }
}

fn rings(
    map: &Arc<GuestMap>,
    at: AdminRegisters,
    sq_size: RingSize,
    cq_size: RingSize,
) -> Option<(Ring<8>, Ring<2>)> {
    if !at.asq.is_multiple_of(4096) || !at.acq.is_multiple_of(4096) {
        return None;
    }
    Some((
        Ring::new(map, at.asq, sq_size.get())?,
        Ring::new(map, at.acq, cq_size.get())?,
    ))
}
