//! The admin queue pair: fetch, room in the completion queue, post.

use std::sync::Arc;

use nvme_spec::doorbell::{Doorbell, DoorbellStride};
use nvme_spec::ring::{Phase, RingSize};
use nvme_spec::{Cqe, Sqe, Status, StatusField};

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
    /// Entries posted since the last interrupt.
    posted: bool,
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
            posted: false,
        })
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

    /// Post the completion of a command that was fetched. `more`: the error log has an entry for it.
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
        self.cq.write(u32::from(self.cq_tail), cqe.to_halves());
        (self.cq_tail, self.phase) = self.cq_size.next_with_phase(self.cq_tail, self.phase);
        self.reserved = self.reserved.saturating_sub(1);
        self.posted = true;
    }

    /// Whether entries were posted since the last call.
    pub(in crate::controller) fn take_posted(&mut self) -> bool {
        std::mem::take(&mut self.posted)
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
