//! Flush commands that a lane sends for the keeper, between those of its owner, who does not see them.

use nvme_spec::Status;
use nvme_spec::nvm::Flush;

use super::super::link::Wish;
use super::Lane;

/// Flush commands of a lane.
#[derive(Default)]
pub(super) struct Flushes {
    /// Not sent yet.
    wanted: Vec<Wish>,
    /// Sent, with their slots.
    out: Vec<(u16, Wish)>,
    /// Slots whose command is done, and what came of it.
    pub(super) done: Vec<(u16, Status)>,
}

impl Flushes {
    pub(super) fn want(&mut self, wishes: Vec<Wish>) {
        self.wanted.extend(wishes);
    }

    /// Whether there is anything to do.
    pub(super) fn any(&self) -> bool {
        !self.wanted.is_empty() || !self.out.is_empty()
    }

    /// Tell those who wait.
    pub(super) fn tell(&mut self) {
        for (index, status) in self.done.drain(..) {
            if let Some(at) = self.out.iter().position(|(i, _)| *i == index) {
                let (_, wish) = self.out.swap_remove(at);
                // Whoever waits no longer does not want to know.
                let _ = wish.answer.try_send(status);
            }
        }
    }
}

impl Lane {
    /// Take what the device has completed: whoever has us look may not want results now, so that those of others wait.
    pub(super) fn reap_aside(&mut self) {
        if !self.flushes.any() {
            return;
        }
        let mut deferred = std::mem::take(&mut self.deferred);
        self.reap(u32::MAX, &mut |completion| deferred.push(completion));
        self.deferred = deferred;
    }

    /// Send what is wanted, as far as there is room.
    pub(super) fn send_flushes(&mut self) {
        if self.flushes.wanted.is_empty() {
            return;
        }
        if self.refuses.is_some() {
            // Whoever waits is told by the end of the sender.
            return self.flushes.wanted.clear();
        }
        while let Some(wish) = self.flushes.wanted.pop() {
            let Ok(index) = self.claim() else {
                self.flushes.wanted.push(wish);
                break;
            };
            self.send_new(index, Flush { nsid: wish.nsid }.to_sqe(), 0);
            if let Some(slot) = self.slots.get_mut(usize::from(index)) {
                slot.own = true;
            }
            self.flushes.out.push((index, wish));
        }
        self.ring();
    }
}
