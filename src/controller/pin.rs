//! Whether the interrupt pin is due: completions that the guest has not looked at, as its memory and its head doorbells tell.
//!
//! The pin is a level (Base, section "Pin Based, Single MSI, and Multiple MSI Behavior"): a VMM that is told of it once more than needed has
//! the guest run its handler for nothing, and Linux turns a pin off that does so all the time.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nvme_spec::Cqe;
use nvme_spec::doorbell::{Doorbell, DoorbellStride};
use nvme_spec::ring::RingSize;

use crate::memory::{DoorbellWindow, GuestMap};

/// Bytes of a completion queue entry, and where its half with the phase begins.
const ENTRY: u64 = 16;
const HIGH: u64 = 8;

/// A completion queue with interrupts.
#[derive(Clone, Copy, Debug)]
struct Place {
    base: u64,
    size: RingSize,
}

/// The pin of a controller. Of all queues it knows only where they lie.
#[derive(Default)]
pub(super) struct Pin {
    used: AtomicBool,
    queues: Mutex<BTreeMap<u16, Place>>,
}

impl Pin {
    fn queues(&self) -> MutexGuard<'_, BTreeMap<u16, Place>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the guest has no other interrupts.
    pub(super) fn is_used(&self) -> bool {
        self.used.load(Ordering::Acquire)
    }

    pub(super) fn set_used(&self, used: bool) {
        self.used.store(used, Ordering::Release);
    }

    /// There is a completion queue with interrupts.
    pub(super) fn add(&self, qid: u16, base: u64, size: RingSize) {
        self.queues().insert(qid, Place { base, size });
    }

    /// It is gone.
    pub(super) fn remove(&self, qid: u16) {
        self.queues().remove(&qid);
    }

    /// All are gone.
    pub(super) fn clear(&self) {
        self.queues().clear();
    }

    /// Whether there is an entry the guest has not taken.
    pub(super) fn is_due(
        &self,
        map: &GuestMap,
        window: &DoorbellWindow,
        stride: DoorbellStride,
    ) -> bool {
        let unread = |(qid, place): (&u16, &Place)| {
            let offset = usize::try_from(stride.window_offset(Doorbell::Cq(*qid))).ok();
            let bell = offset.and_then(|offset| window.register(offset));
            bell.is_some_and(|bell| place.has_unread(map, bell.load(Ordering::Acquire)))
        };
        self.queues().iter().any(unread)
    }
}

impl Place {
    /// Whether the entry at `head` is new. That before it was taken: a new one has the same phase, and the other one where a new round begins.
    fn has_unread(&self, map: &GuestMap, head: u32) -> bool {
        let last = self.size.get().saturating_sub(1);
        if head > last {
            return false;
        }
        let before = head.checked_sub(1).unwrap_or(last);
        match (self.phase(map, head), self.phase(map, before)) {
            (Some(phase), Some(before)) => (phase == before) == (head > 0),
            _ => false,
        }
    }

    fn phase(&self, map: &GuestMap, index: u32) -> Option<bool> {
        let at = u64::from(index) * ENTRY + HIGH;
        let mut high = [0; 8];
        let read = map.read(self.base.checked_add(at)?, &mut high);
        read.then(|| Cqe::phase_of_high_half(u64::from_le_bytes(high)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::test_memory;
    use nvme_spec::Status;
    use nvme_spec::ring::Phase;

    #[test]
    fn entries_are_unread_until_the_head_has_passed_them() {
        const BASE: u64 = 0x1000;
        let map = test_memory(0x4000);
        let window = DoorbellWindow::new(4096).unwrap();
        let size = RingSize::new(4).unwrap();
        let pin = Pin::default();
        let due = || pin.is_due(&map, &window, DoorbellStride::PACKED);
        pin.add(1, BASE, size);
        let bell = window.register(12).unwrap();
        let (mut tail, mut head, mut phase) = (0u16, 0u16, Phase::FIRST);
        let mut left = 0;
        // Rounds that begin anywhere, with one to three entries at a time.
        for n in [1, 1, 1, 1, 2, 3, 3, 3, 1, 2, 2, 3] {
            assert!(!due(), "head {head}");
            for _ in 0..n {
                let status = nvme_spec::StatusField::from_status(Status::SUCCESS);
                let cqe = Cqe {
                    status: status.with_p(phase.bit()),
                    ..Cqe::default()
                };
                let [_, high] = cqe.to_halves();
                assert!(map.write(BASE + u64::from(tail) * 16 + 8, &high.to_le_bytes()));
                (tail, phase) = size.next_with_phase(tail, phase);
                left += 1;
            }
            while left > 0 {
                assert!(due(), "head {head}, tail {tail}");
                head = size.next(head);
                bell.store(head.into(), Ordering::Release);
                left -= 1;
            }
        }
        // A value that cannot be, no memory, no queue.
        bell.store(4, Ordering::Release);
        assert!(!due());
        bell.store(u32::from(head), Ordering::Release);
        pin.add(2, u64::MAX - 0xFFF, size);
        pin.add(3, 0x10_0000, size);
        assert!(!due());
        assert!(map.write(BASE + u64::from(head) * 16 + 8, &[0; 8]));
        let other = |p: bool| u64::from(!p) << 48;
        assert!(map.write(
            BASE + u64::from(head) * 16 + 8,
            &other(!phase.bit()).to_le_bytes()
        ));
        assert!(due());
        pin.remove(1);
        assert!(!due());
        pin.clear();
    }
}
