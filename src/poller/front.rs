//! What a poller and a front-end without irqfd tell each other beside the doorbells: who is looking at what, so that nobody
//! has to be woken (`docs/VHOST_USER.md`, side words).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::idle::Word;
use crate::memory::{DoorbellWindow, SharedWord, SideWord};

/// Tells the front-end whether a submission queue is looked at without a kick.
///
/// The front-end stores the doorbell, fences, and reads the word; a poller that goes to sleep clears the word, fences, and reads the
/// doorbell. When this goes, nobody looks any more.
pub(super) struct Front<W: Word = SharedWord> {
    awake: W,
    told: bool,
    /// The guest rings for what comes next, and for what came last.
    rings: [bool; 2],
}

impl Front {
    /// That of a queue, if the front-end of this window makes use of it.
    pub fn of(window: &Arc<DoorbellWindow>, qid: u16) -> Option<Self> {
        let word = |word| SharedWord::of_vring(window, usize::from(qid), word);
        let attentive = word(SideWord::Attentive)?.load() != 0;
        Some(Self::new(word(SideWord::Awake)?)).filter(|_| attentive)
    }
}

impl<W: Word> Front<W> {
    /// That of a queue nobody looks at yet, with this *awake* word.
    pub fn new(awake: W) -> Self {
        Self {
            awake,
            told: false,
            rings: [false; 2],
        }
    }

    /// This queue will be looked at until [`Self::asleep`].
    #[inline]
    pub fn awake(&mut self) {
        if !self.told {
            self.awake.store(1);
            self.told = true;
        }
    }

    /// There are new commands; whether the guest rings for the ones after them, too.
    #[inline]
    pub fn fetched(&mut self, rings: bool) {
        self.rings = [rings, self.rings[0]];
    }

    /// Whether the guest rings for the last commands, be it that we have seen them before that.
    pub fn expects_ring(&self) -> bool {
        self.rings[1]
    }

    /// From now on it is looked at after a kick only. A full fence and another look must follow.
    pub fn asleep(&mut self) {
        self.awake.store(0);
        self.told = false;
    }
}

impl<W: Word> Drop for Front<W> {
    fn drop(&mut self) {
        self.asleep();
    }
}

/// The side of a vector that spares its eventfd while the front-end looks.
pub(super) struct Side {
    window: Arc<DoorbellWindow>,
    vring: usize,
}

impl Side {
    pub fn new(window: Arc<DoorbellWindow>, vring: usize) -> Self {
        Self { window, vring }
    }

    /// Whether the front-end looks for interrupts itself now and then.
    pub fn is_attentive(&self) -> bool {
        self.window
            .side(self.vring, SideWord::Attentive)
            .is_some_and(|word| word.load(Ordering::Relaxed) != 0)
    }

    /// Count an interrupt; whether the front-end sees it without its eventfd.
    ///
    /// The front-end clears `Watching`, fences, and reads `Calls` once more; we count, fence, and read `Watching`.
    pub fn tell(&self) -> bool {
        let word = |word| self.window.side(self.vring, word);
        let (Some(calls), Some(watching)) = (word(SideWord::Calls), word(SideWord::Watching))
        else {
            return false;
        };
        tell::<SharedWord>(
            // Several pollers and the controller may share a vector.
            || calls.fetch_add(1, Ordering::Release),
            || watching.load(Ordering::Acquire),
        )
    }
}

/// The order of [`Side::tell`]: count, fence, look whether somebody watches.
pub(super) fn tell<W: Word>(count: impl FnOnce() -> u32, watching: impl FnOnce() -> u32) -> bool {
    count();
    W::full_fence();
    watching() != 0
}
