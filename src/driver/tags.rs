//! Command identifiers: a slot number with a sequence above it, so that a completion that comes late or twice is noticed.

/// Why a command identifier belongs to no command that is out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadTag {
    /// There is no such slot.
    Unknown,
    /// The slot is free, or holds a later command.
    Stale,
}

struct Slot {
    user: u64,
    sequence: u16,
    out: bool,
}

/// The slots of a queue.
pub(super) struct Tags {
    slots: Box<[Slot]>,
    free: Vec<u16>,
    /// Bits of a command identifier that number the slot.
    bits: u32,
}

impl Tags {
    /// Slots for `depth` commands, 1 to 65536.
    pub(super) fn new(depth: u32) -> Self {
        let depth = depth.clamp(1, 65536);
        Self {
            slots: (0..depth)
                .map(|_| Slot {
                    user: 0,
                    sequence: 0,
                    out: false,
                })
                .collect(),
            free: (0..depth).rev().map(|i| i as u16).collect(),
            bits: depth.next_power_of_two().trailing_zeros(),
        }
    }

    /// Take a slot for a command of this user value: its number and the identifier. `None` if all are out.
    #[inline]
    pub(super) fn claim(&mut self, user: u64) -> Option<(u16, u16)> {
        let index = self.free.pop()?;
        let slot = self.slots.get_mut(usize::from(index))?;
        slot.user = user;
        slot.out = true;
        Some((
            index,
            (u32::from(slot.sequence) << self.bits) as u16 | index,
        ))
    }

    /// The command with this identifier is done: its user value.
    #[inline]
    pub(super) fn release(&mut self, cid: u16) -> Result<u64, BadTag> {
        let index = (u32::from(cid) & ((1u32 << self.bits) - 1)) as u16;
        let sequence = (u32::from(cid) >> self.bits) as u16;
        let mask = (0xFFFFu32 >> self.bits) as u16;
        let slot = self
            .slots
            .get_mut(usize::from(index))
            .ok_or(BadTag::Unknown)?;
        if !slot.out || slot.sequence & mask != sequence {
            return Err(BadTag::Stale);
        }
        slot.out = false;
        slot.sequence = slot.sequence.wrapping_add(1);
        self.free.push(index);
        Ok(slot.user)
    }

    /// Commands that are out.
    pub(super) fn out(&self) -> u32 {
        (self.slots.len() - self.free.len()) as u32
    }

    /// Slots in all.
    pub(super) fn depth(&self) -> u32 {
        self.slots.len() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn late_double_and_unknown_identifiers_are_noticed() {
        let mut tags = Tags::new(3);
        let (_, a) = tags.claim(10).unwrap();
        let (_, b) = tags.claim(11).unwrap();
        let (_, c) = tags.claim(12).unwrap();
        assert!(tags.claim(13).is_none());
        assert_eq!(tags.release(3), Err(BadTag::Unknown), "slot 3 of 3");
        assert_eq!(tags.release(b), Ok(11));
        assert_eq!(tags.release(b), Err(BadTag::Stale), "twice");
        let (_, again) = tags.claim(20).unwrap();
        assert_ne!(again, b, "the sequence moved");
        assert_eq!(tags.release(b), Err(BadTag::Stale), "late");
        assert_eq!(tags.release(again), Ok(20));
        assert_eq!(tags.out(), 2);
        assert_eq!((tags.release(a), tags.release(c)), (Ok(10), Ok(12)));
    }

    #[test]
    fn every_depth_has_distinct_identifiers() {
        for depth in [1, 2, 5, 255, 4096, 32769, 65536] {
            let mut tags = Tags::new(depth);
            let mut seen = vec![false; 65536];
            for i in 0..depth {
                let (_, cid) = tags.claim(u64::from(i)).unwrap();
                assert!(!std::mem::replace(&mut seen[usize::from(cid)], true));
            }
            for cid in (0..=u16::MAX).filter(|c| seen[usize::from(*c)]) {
                assert!(tags.release(cid).is_ok());
            }
            assert_eq!(tags.out(), 0);
        }
    }
}
