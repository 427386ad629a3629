//! Going to sleep without losing a wake-up: who publishes, fences and looks in which order.
//!
//! Everything here is generic over the memory it works on. Pollers run it on memory shared with guests; the models in
//! `models.rs` run the same code on the memory of `loom`, which tries every order that two processors can see.

use std::sync::atomic::{Ordering, fence};

use super::bell::Bell;
use crate::memory::SharedWord;

/// A word that two sides share, and the fence that orders accesses to several of them.
pub(super) trait Word {
    /// The value, Acquire.
    fn load(&self) -> u32;
    /// Store a value, Release.
    fn store(&self, value: u32);
    /// A full fence: of two sides that each store, fence and load, one sees what the other stored.
    fn full_fence();
}

impl Word for SharedWord {
    #[inline]
    fn load(&self) -> u32 {
        SharedWord::load(self)
    }

    #[inline]
    fn store(&self, value: u32) {
        SharedWord::store(self, value);
    }

    #[inline]
    fn full_fence() {
        fence(Ordering::SeqCst);
    }
}

/// What a submission queue waits for: its tail, and the head of its completion queue if commands wait for room there.
pub(super) struct Awaited<'a, W> {
    /// The tail doorbell, and the value seen last.
    pub tail: (&'a Bell<W>, u16),
    /// The head doorbell, and the value seen last.
    pub room: Option<(&'a Bell<W>, u16)>,
}

impl<W: Word> Awaited<'_, W> {
    /// Ask the guest to ring for it.
    pub fn arm(&self) {
        self.tail.0.arm(self.tail.1);
        if let Some((head, seen)) = self.room {
            head.arm(seen);
        }
    }

    /// Whether it is there.
    pub fn has_come(&self) -> bool {
        let moved = |(bell, seen): (&Bell<W>, u16)| bell.load() != u32::from(seen);
        moved(self.tail) || self.room.is_some_and(moved)
    }
}

/// Somebody who wants to sleep.
pub(super) trait Sleeper {
    /// Ask everybody who can bring work to wake us from now on.
    fn arm(&mut self);
    /// A full fence.
    fn full_fence(&self);
    /// Whether there is work already.
    fn has_work(&self) -> bool;
    /// Sleep until woken. A wake-up since [`Self::arm`] ends it at once.
    fn block(&mut self);
}

/// Sleep, unless there is work after all; whether it slept.
///
/// Who brings work stores it and then looks whether we want to be woken; we say so and then look for work. With a
/// full fence between the two on both sides, one sees the other. Without either fence both can look too early.
pub(super) fn doze(sleeper: &mut impl Sleeper) -> bool {
    sleeper.arm();
    sleeper.full_fence();
    if sleeper.has_work() {
        return false;
    }
    sleeper.block();
    true
}
