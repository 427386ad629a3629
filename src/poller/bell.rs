//! One doorbell as a poller reads it: the register, or the guest's shadow of it, never both.

use nvme_spec::doorbell;

use crate::memory::SharedWord;

/// The guest's copy of a doorbell and the word that tells it when to ring (Base, Doorbell Buffer Config).
pub(super) struct Shadow {
    pub value: SharedWord,
    pub event_idx: SharedWord,
}

/// A doorbell. With a shadow, that is the truth, and the register is only rung to wake us.
pub(super) struct Bell {
    register: SharedWord,
    shadow: Option<Shadow>,
}

impl Bell {
    pub fn new(register: SharedWord, shadow: Option<Shadow>) -> Self {
        Self { register, shadow }
    }

    /// Swap the truth as a whole. What the guest has written so far is carried over, so that no ring is lost on the way.
    pub fn set_shadow(&mut self, shadow: Option<Shadow>) {
        self.shadow = shadow;
    }

    pub fn has_shadow(&self) -> bool {
        self.shadow.is_some()
    }

    /// The value the guest wrote last. It may be anything.
    #[inline]
    pub fn load(&self) -> u32 {
        match &self.shadow {
            None => self.register.load(),
            Some(shadow) => shadow.value.load(),
        }
    }

    /// Tell the guest that we look by ourselves.
    #[inline]
    pub fn suppress(&self, seen: u16) {
        if let Some(shadow) = &self.shadow {
            shadow
                .event_idx
                .store(u32::from(doorbell::suppressed(seen)));
        }
    }

    /// Ask the guest to ring at its next change. A full fence and another look must follow before anyone sleeps.
    pub fn arm(&self, seen: u16) {
        if let Some(shadow) = &self.shadow {
            shadow.event_idx.store(u32::from(doorbell::armed(seen)));
        }
    }
}
