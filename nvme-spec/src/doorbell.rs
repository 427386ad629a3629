//! Where doorbells are, and when a host with shadow doorbells rings them (EventIdx).
//!
//! NVMe over PCIe Transport 1.x, sections "Submission Queue y Tail Doorbell" and "Completion Queue y
//! Head Doorbell"; NVMe Base 2.x, section "Doorbell Buffer Config command" and annex "Host
//! considerations: updating controller doorbell properties using a shadow doorbell buffer".

use crate::regs::offset::DOORBELLS;

/// One doorbell: which kind, and the identifier of its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Doorbell {
    /// The tail of submission queue `qid`.
    Sq(u16),
    /// The head of completion queue `qid`.
    Cq(u16),
}

impl Doorbell {
    /// The queue's identifier.
    pub const fn qid(self) -> u16 {
        match self {
            Self::Sq(qid) | Self::Cq(qid) => qid,
        }
    }

    /// Position among all doorbells: SQ0, CQ0, SQ1, CQ1, ...
    pub const fn index(self) -> u32 {
        match self {
            Self::Sq(qid) => (qid as u32) << 1,
            Self::Cq(qid) => (qid as u32) << 1 | 1,
        }
    }

    /// The doorbell at a position; `None` beyond CQ 65535.
    pub const fn from_index(index: u64) -> Option<Self> {
        let qid = index >> 1;
        match (qid <= 0xFFFF, index & 1) {
            (false, _) => None,
            (true, 0) => Some(Self::Sq(qid as u16)),
            (true, _) => Some(Self::Cq(qid as u16)),
        }
    }
}

/// CAP.DSTRD: neighbouring doorbells are 4 << DSTRD bytes apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DoorbellStride(u8);

impl DoorbellStride {
    /// Doorbells packed at 4 bytes.
    pub const PACKED: Self = Self(0);

    /// From the field of CAP, which is four bits wide; higher bits are ignored.
    pub const fn new(dstrd: u8) -> Self {
        Self(dstrd & 0xF)
    }

    /// The field of CAP.
    pub const fn dstrd(self) -> u8 {
        self.0
    }

    /// Bytes from one doorbell to the next: 4 to 131072.
    pub const fn bytes(self) -> u32 {
        4 << (self.0 & 0xF)
    }

    /// Byte offset of a doorbell from the beginning of the doorbell window.
    pub const fn window_offset(self, doorbell: Doorbell) -> u64 {
        (doorbell.index() as u64) << (self.0 as u32 & 0xF).saturating_add(2)
    }

    /// Byte offset of a doorbell from the beginning of BAR0.
    pub const fn bar_offset(self, doorbell: Doorbell) -> u64 {
        self.window_offset(doorbell)
            .saturating_add(DOORBELLS as u64)
    }

    /// The doorbell that begins at this offset of the doorbell window; `None` between doorbells and
    /// beyond the last.
    pub const fn decode(self, window_offset: u64) -> Option<Doorbell> {
        let shift = (self.0 as u32 & 0xF).saturating_add(2);
        let index = window_offset >> shift;
        if index << shift != window_offset {
            return None;
        }
        Doorbell::from_index(index)
    }

    /// The doorbell that begins at this offset of BAR0; `None` for anything else.
    pub const fn decode_bar(self, bar_offset: u64) -> Option<Doorbell> {
        match bar_offset.checked_sub(DOORBELLS as u64) {
            Some(window_offset) => self.decode(window_offset),
            None => None,
        }
    }

    /// Byte offset of a doorbell's 32-bit word in the shadow doorbell buffer, and of its EventIdx in
    /// the EventIdx buffer: both are laid out like the doorbell window (Base, figures "Shadow
    /// Doorbell Buffer" and "EventIdx Buffer").
    ///
    /// Each buffer is one memory page: compare with [`Self::window_len`] before relying on it.
    pub const fn shadow_offset(self, doorbell: Doorbell) -> u64 {
        self.window_offset(doorbell)
    }

    /// Bytes from the first doorbell to the end of the 32-bit word of CQ `max_qid`.
    pub const fn window_len(self, max_qid: u16) -> u64 {
        self.window_offset(Doorbell::Cq(max_qid)).saturating_add(4)
    }
}

/// The host's rule: after changing a shadow doorbell from `old` to `new`, does it ring the real one?
///
/// Yes when the change passed the EventIdx: when `event_idx + 1` lies in the half-open arc
/// `(old, new]` of the 16-bit circle. The circle is 2^16 long whatever the queue's size, so a step
/// over the end of a smaller queue (from `size - 1` to 0) passes all the unused numbers as well.
pub const fn need_event(event_idx: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event_idx).wrapping_sub(1) < new.wrapping_sub(old)
}

/// The EventIdx to publish so that the host's *next* change of this doorbell rings it, where
/// `last_seen` is the value the controller has read from the shadow doorbell most recently.
///
/// That is `last_seen` itself: the next change starts there, and `last_seen + 1` is on every arc that
/// starts at `last_seen`, wherever it ends and however it wraps.
///
/// It holds only for a change that starts *at* `last_seen`. A host that moved on before it could see
/// the new EventIdx decided by the old one, and a later change, starting elsewhere, does not ring
/// either: the wake-up would be lost for good. Hence the order: publish, full fence, read the shadow
/// doorbell again; only if it still holds `last_seen` is the controller armed. Otherwise it has
/// work to do, and must arm again with the new value before it sleeps.
pub const fn armed(last_seen: u16) -> u16 {
    last_seen
}

/// The EventIdx to publish so that the host does *not* ring while the controller is polling, where
/// `last_seen` is the value most recently read from the shadow doorbell.
///
/// That is one less than `last_seen`: the host rings when it arrives at or passes `last_seen` again,
/// the one index a queue cannot reach without the other side having moved, since a full queue ends
/// one short of it. No constant does this: whichever number is chosen, some change passes it, and in
/// a queue of 65536 entries every number is an index.
///
/// A controller that keeps polling should publish it again every now and then: left alone it costs
/// one needless ring per lap of the queue, never a missed one (nobody sleeps).
pub const fn suppressed(last_seen: u16) -> u16 {
    last_seen.wrapping_sub(1)
}
