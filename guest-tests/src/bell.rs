//! A doorbell of the virtual guest.

use std::fs::File;
use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence, fence};

use vhost_user_nvme::driver::Doorbell;
use vhost_user_nvme::memory::SharedWord;

use crate::handler::Doorbells;

/// A doorbell as the guest sees it: a store, and an exit with a kick when it is trapped.
pub struct GuestBell {
    pub(crate) word: SharedWord,
    pub(crate) kick: Option<File>,
    pub(crate) doorbells: Arc<Doorbells>,
}

impl GuestBell {
    /// What the window holds.
    pub fn value(&self) -> u32 {
        self.word.load()
    }

    /// Store without a kick, whatever the mode.
    pub fn store(&self, value: u32) {
        self.word.store(value);
    }

    /// Kick without a store.
    pub fn kick(&self) {
        if let Some(mut kick) = self.kick.as_ref() {
            // It is full only if it is signalled already.
            let _ = kick.write(&1u64.to_ne_bytes());
        }
    }
}

impl GuestBell {
    /// As [`Doorbell::ring`], as cheap as a guest does it: with mapped doorbells one plain store. The fence that is missing is made by
    /// whoever unmaps them, where the kernel lets it (`membarrier`).
    #[inline]
    pub fn ring_plainly(&self, value: u32) {
        self.word.store(value);
        compiler_fence(Ordering::SeqCst);
        if !self.doorbells.mapped_for_plain_rings() {
            fence(Ordering::SeqCst);
            if !self.doorbells.mapped() {
                self.kick();
            }
        }
    }
}

impl Doorbell for GuestBell {
    #[inline]
    fn ring(&self, value: u32) {
        self.word.store(value);
        fence(Ordering::SeqCst);
        if !self.doorbells.mapped() {
            self.kick();
        }
    }
}
