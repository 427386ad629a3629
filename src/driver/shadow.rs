//! A doorbell, with or without its shadow (Doorbell Buffer Config).

use std::sync::atomic::{Ordering, fence};

use nvme_spec::doorbell::{self, DoorbellStride, need_event};

use super::{Dma, Doorbell};
use crate::memory::SharedWord;

/// The two pages of Doorbell Buffer Config.
pub(super) struct ShadowBuffers {
    pub(super) doorbells: Dma,
    pub(super) event_idx: Dma,
}

impl ShadowBuffers {
    /// The words of one doorbell; `None` if it does not lie inside the pages.
    pub(super) fn words(
        &self,
        stride: DoorbellStride,
        doorbell: doorbell::Doorbell,
        page: u32,
    ) -> Option<Shadow> {
        let offset = stride.shadow_offset(doorbell);
        if offset.checked_add(4)? > u64::from(page) {
            return None;
        }
        Some(Shadow {
            value: SharedWord::in_guest(self.doorbells.map(), self.doorbells.addr() + offset)?,
            event: SharedWord::in_guest(self.event_idx.map(), self.event_idx.addr() + offset)?,
        })
    }
}

/// A shadow doorbell and its EventIdx.
pub(super) struct Shadow {
    value: SharedWord,
    event: SharedWord,
}

/// A doorbell of a queue.
pub(super) struct Bell<B> {
    real: B,
    shadow: Option<Shadow>,
    last: u16,
    /// How often the register was written.
    pub(super) rings: u64,
}

impl<B: Doorbell> Bell<B> {
    pub(super) fn new(real: B) -> Self {
        Self {
            real,
            shadow: None,
            last: 0,
            rings: 0,
        }
    }

    /// Put the present value into a shadow the device does not look at yet.
    pub(super) fn seed(&self, shadow: &Shadow) {
        shadow.value.store(u32::from(self.last));
    }

    /// Use the shadow from now on, or go back to the register alone.
    pub(super) fn set_shadow(&mut self, shadow: Option<Shadow>) {
        self.shadow = shadow;
    }

    /// Tell the device the new value: by the shadow, by the register, or both.
    #[inline]
    pub(super) fn update(&mut self, value: u16) {
        if let Some(shadow) = &self.shadow {
            let old = std::mem::replace(&mut self.last, value);
            shadow.value.store(u32::from(value));
            // The device publishes EventIdx, fences, and looks at the value; we do the reverse. One of us sees the other.
            fence(Ordering::SeqCst);
            if !need_event(shadow.event.load() as u16, value, old) {
                return;
            }
        } else {
            self.last = value;
        }
        self.rings += 1;
        self.real.ring(u32::from(value));
    }
}
