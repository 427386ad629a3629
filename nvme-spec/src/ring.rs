//! Queue arithmetic: sizes, indexes and the phase tag, for any queue of 2 to 65536 entries.
//!
//! NVMe Base 2.x, section "Memory-based Transport Queue Model" (empty and full queues). Every
//! function is total: an index at or beyond the queue's size (a foreign number nobody checked) gives
//! a useless but defined result below the size, never a panic.

/// Entries in a queue: 2..=65536. One of them always stays empty, so that full differs from empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RingSize(u32);

impl RingSize {
    /// The smallest queue the specification allows.
    pub const MIN: Self = Self(2);
    /// The largest queue the specification allows for I/O queues.
    pub const MAX: Self = Self(65536);

    /// From a zero-based size as commands and AQA carry it; `None` for 0 (a queue of one entry).
    pub const fn from_z(size_z: u16) -> Option<Self> {
        match size_z {
            0 => None,
            z => Some(Self((z as u32).saturating_add(1))),
        }
    }

    /// From a number of entries; `None` outside 2..=65536.
    pub const fn new(entries: u32) -> Option<Self> {
        match entries {
            2..=65536 => Some(Self(entries)),
            _ => None,
        }
    }

    /// Number of entries.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// Number of entries, zero-based.
    pub const fn size_z(self) -> u16 {
        self.0.saturating_sub(1) as u16
    }

    /// Most entries the queue can hold at once: one less than its size.
    pub const fn capacity(self) -> u32 {
        self.0.saturating_sub(1)
    }

    /// Whether a doorbell's whole 32-bit value is an index of this queue.
    pub const fn is_valid_index(self, value: u32) -> bool {
        value < self.0
    }

    /// A doorbell's whole 32-bit value as an index of this queue; `None` if it is not one.
    pub const fn index(self, value: u32) -> Option<u16> {
        if value < self.0 {
            Some(value as u16)
        } else {
            None
        }
    }

    /// The index after `index`.
    pub const fn next(self, index: u16) -> u16 {
        let next = (index as u32).saturating_add(1);
        if next < self.0 { next as u16 } else { 0 }
    }

    /// The index `n` places after `index`.
    pub const fn advance(self, index: u16, n: u32) -> u16 {
        let sum = (index as u64).saturating_add(n as u64);
        match sum.checked_rem(self.0 as u64) {
            Some(at) => at as u16,
            None => 0,
        }
    }

    /// How many entries lie from `from` (included) to `to` (excluded): with head and tail, the number
    /// of entries in the queue. Always below the size.
    pub const fn distance(self, from: u16, to: u16) -> u32 {
        let (from, to) = (from as u32, to as u32);
        let distance = if to >= from {
            to.saturating_sub(from)
        } else {
            to.saturating_add(self.0).saturating_sub(from)
        };
        if distance < self.0 {
            distance
        } else {
            self.capacity()
        }
    }

    /// How many more entries fit into a queue with this head and tail.
    pub const fn free(self, head: u16, tail: u16) -> u32 {
        self.capacity().saturating_sub(self.distance(head, tail))
    }

    /// Whether the queue holds nothing.
    pub const fn is_empty(self, head: u16, tail: u16) -> bool {
        head == tail
    }

    /// Whether no further entry fits: the tail is just behind the head.
    pub const fn is_full(self, head: u16, tail: u16) -> bool {
        self.next(tail) == head
    }

    /// The completion queue position after `index` and the phase that belongs to it.
    pub const fn next_with_phase(self, index: u16, phase: Phase) -> (u16, Phase) {
        match self.next(index) {
            0 => (0, phase.toggled()),
            next => (next, phase),
        }
    }
}

/// The phase tag of one pass through a completion queue (Base, section "Completion Queue Entry").
///
/// The host clears the queue's memory before it creates the queue; the controller posts with
/// [`Phase::FIRST`] on its first pass and toggles at each wrap. An entry is new when its phase is
/// the one of the host's current pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Phase(bool);

impl Phase {
    /// The phase of the first pass: 1.
    pub const FIRST: Self = Self(true);

    /// From the bit.
    pub const fn from_bit(bit: bool) -> Self {
        Self(bit)
    }

    /// The bit as it stands in [`crate::StatusField`].
    pub const fn bit(self) -> bool {
        self.0
    }

    /// The phase of the next pass.
    pub const fn toggled(self) -> Self {
        Self(!self.0)
    }
}

impl Default for Phase {
    fn default() -> Self {
        Self::FIRST
    }
}
