//! One doorbell as a poller reads it: the register, or the guest's shadow of it, never both.

use std::cell::Cell;

use nvme_spec::doorbell;
use nvme_spec::ring::RingSize;

use super::idle::Word;
use crate::memory::SharedWord;

/// The guest's copy of a doorbell and the word that tells it when to ring (Base, Doorbell Buffer Config).
pub(super) struct Shadow<W = SharedWord> {
    pub value: W,
    pub event_idx: W,
}

/// A doorbell. With a shadow, that is the truth, and the register is only rung to wake us.
pub(super) struct Bell<W = SharedWord> {
    register: W,
    shadow: Option<Shadow<W>>,
    size: RingSize,
    /// The value EventIdx was told last to keep quiet after; `None` if it says something else.
    hushed: Cell<Option<u16>>,
}

impl<W: Word> Bell<W> {
    /// A doorbell of a queue of this size.
    pub fn new(register: W, shadow: Option<Shadow<W>>, size: RingSize) -> Self {
        Self {
            register,
            shadow,
            size,
            hushed: Cell::new(None),
        }
    }

    /// Swap the truth as a whole. What the guest has written so far is carried over, so that no ring is lost on the way.
    pub fn set_shadow(&mut self, shadow: Option<Shadow<W>>) {
        self.shadow = shadow;
        self.hushed.set(None);
    }

    pub fn has_shadow(&self) -> bool {
        self.shadow.is_some()
    }

    /// Where the guest writes its value.
    #[inline]
    pub fn word(&self) -> &W {
        match &self.shadow {
            None => &self.register,
            Some(shadow) => &shadow.value,
        }
    }

    /// The value the guest wrote last. It may be anything.
    #[inline]
    pub fn load(&self) -> u32 {
        self.word().load()
    }

    /// Whether the guest has also rung for the value `seen` of its shadow.
    pub fn has_rung(&self, seen: u16) -> bool {
        self.shadow.is_none() || self.register.load() == u32::from(seen)
    }

    /// Tell the guest that we look by ourselves.
    ///
    /// What was told holds for a lap of the queue, and the guest reads it at each of its rings: so it is told twice in a lap and not
    /// at each call, which would take the line away from the guest's processor every time.
    #[inline]
    pub fn suppress(&self, seen: u16) {
        let Some(shadow) = &self.shadow else { return };
        let lasts = self
            .hushed
            .get()
            .is_some_and(|told| self.size.distance(told, seen) < self.size.get() / 2);
        if !lasts {
            shadow
                .event_idx
                .store(u32::from(doorbell::suppressed(seen)));
            self.hushed.set(Some(seen));
        }
    }

    /// Ask the guest to ring at its next change. A full fence and another look must follow before anyone sleeps.
    pub fn arm(&self, seen: u16) {
        if let Some(shadow) = &self.shadow {
            shadow.event_idx.store(u32::from(doorbell::armed(seen)));
            self.hushed.set(None);
        }
    }
}
