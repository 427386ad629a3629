//! The places of commands that are out: fixed, reused, named by their index, which is the backend's tag.

use std::time::Instant;

use crate::backend::BlockRange;
use crate::io::MAX_SEGMENTS;
use crate::memory::HostSeg;

/// What a command still has to do when its present request is finished.
#[derive(Default)]
pub(super) enum Rest {
    #[default]
    Nothing,
    /// Deallocate these ranges.
    Ranges(Vec<BlockRange>),
    /// Flush the namespaces from this index on.
    FlushFrom(usize),
}

/// Where a slot is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SlotState {
    Free,
    /// Fetched, being worked on.
    Busy,
}

/// A command that was fetched.
///
/// Only a command that has to wait is written down here; of one that is done at once, only `state` is.
#[repr(C, align(64))]
pub(super) struct Slot {
    pub state: SlotState,
    /// Nobody is to be told: the controller was reset under it.
    pub mute: bool,
    /// Its submission queue is being deleted: tell [`nvme_spec::Status::ABORTED_SQ_DELETION`] if it is cancelled.
    pub queue_deleted: bool,
    /// Index of the controller on this poller.
    pub served: u32,
    /// Namespace index of the present request.
    pub namespace: u32,
    pub sqid: u16,
    pub cqid: u16,
    pub cid: u16,
    /// Where its copy is in the journal.
    pub journal_at: u32,
    /// Number of segments.
    pub segments: u32,
    /// How many blocks it moves or examines, for the counters.
    pub blocks: u32,
    /// When it was fetched, if somebody asks.
    pub start: Option<Instant>,
    /// The reply that waits for what becomes of it.
    pub abort: Option<u64>,
    /// How many changes of the guest's memory there had been when it was begun.
    pub epoch: u64,
    /// What the guest asked for.
    pub sqe: [u64; 8],
    pub rest: Rest,
}

/// All slots of a poller.
pub(super) struct Slots {
    slots: Vec<Slot>,
    segments: Vec<HostSeg>,
    free: Vec<u32>,
}

impl Slots {
    pub fn new(count: usize) -> Self {
        let slots = (0..count)
            .map(|_| Slot {
                served: 0,
                namespace: 0,
                sqid: 0,
                cqid: 0,
                cid: 0,
                state: SlotState::Free,
                mute: false,
                queue_deleted: false,
                journal_at: 0,
                segments: 0,
                blocks: 0,
                start: None,
                abort: None,
                epoch: 0,
                sqe: [0; 8],
                rest: Rest::Nothing,
            })
            .collect();
        Self {
            slots,
            segments: vec![HostSeg::EMPTY; count * MAX_SEGMENTS],
            free: (0..count as u32).rev().collect(),
        }
    }

    /// Slots that are free.
    #[inline]
    pub fn available(&self) -> usize {
        self.free.len()
    }

    /// Take a free slot.
    #[inline]
    pub fn take(&mut self) -> Option<u32> {
        let index = self.free.pop()?;
        if let Some(slot) = self.slots.get_mut(index as usize) {
            slot.state = SlotState::Busy;
        }
        Some(index)
    }

    /// Give a slot back.
    #[inline]
    pub fn release(&mut self, index: u32) {
        if let Some(slot) = self.slots.get_mut(index as usize)
            && slot.state == SlotState::Busy
        {
            slot.state = SlotState::Free;
            self.free.push(index);
        }
    }

    /// A slot that is busy; `None` for any other number.
    #[inline]
    pub fn get(&mut self, index: u32) -> Option<&mut Slot> {
        self.slots
            .get_mut(index as usize)
            .filter(|s| s.state == SlotState::Busy)
    }

    /// A busy slot and all the room it has for segments.
    #[inline]
    pub fn with_segments(&mut self, index: u32) -> Option<(&mut Slot, &mut [HostSeg])> {
        let at = index as usize * MAX_SEGMENTS;
        let slot = self.slots.get_mut(index as usize)?;
        if slot.state != SlotState::Busy {
            return None;
        }
        Some((slot, self.segments.get_mut(at..at + MAX_SEGMENTS)?))
    }

    /// The indices of busy slots of a controller.
    pub fn of_controller(&self, served: u32) -> impl Iterator<Item = (u32, &Slot)> {
        self.slots
            .iter()
            .enumerate()
            .filter(move |(_, s)| s.state == SlotState::Busy && s.served == served)
            .map(|(i, s)| (i as u32, s))
    }

    /// The segments a busy slot uses.
    pub fn segments(&self, index: u32) -> &[HostSeg] {
        let at = index as usize * MAX_SEGMENTS;
        let n = self.slots.get(index as usize).map_or(0, |s| s.segments) as usize;
        self.segments.get(at..at + n).unwrap_or(&[])
    }
}
