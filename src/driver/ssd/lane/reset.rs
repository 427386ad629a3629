//! What a lane does when the controller is reset under it, and when it is refused to go on.

use nvme_spec::Status;

use super::super::OnReset;
use super::super::link::{Pair, count};
use super::{Lane, Place, STRIKES};
use crate::driver::Completion;

impl Lane {
    /// Give the queue pair back. What the device has completed is kept.
    pub(super) fn park(&mut self) {
        if let Some(mut pair) = self.pair.take() {
            let (slots, free, deferred) = (&mut self.slots, &mut self.free, &mut self.deferred);
            let flushed = &mut self.flushes.done;
            pair.poll(pair.entries(), |c| {
                let index = c.user as u16;
                if let Some(slot) = slots.get_mut(usize::from(index)) {
                    if slot.asked && c.status() == Status::ABORT_REQUESTED {
                        return; // to be submitted again, or to fail, as all that is out
                    }
                    slot.place = Place::Free;
                    free.push(index);
                    match slot.own {
                        true => flushed.push((index, c.status())),
                        false => deferred.push(Completion {
                            user: slot.user,
                            cqe: c.cqe,
                        }),
                    }
                }
            });
            let faults = pair.counters().faults;
            count(&self.shared.counts.bad_completions, faults - self.faults);
            self.faults = 0;
            self.link.mail().returned = Some(pair);
        }
        self.link.mail().parked = true;
        self.shared.tell();
    }

    /// The device has been stopped. What nobody wants any more ends now; the rest waits for a new queue pair. If there is one already, all of
    /// this was done with it.
    pub(super) fn device_stopped(&mut self) {
        if self.pair.is_some() {
            return;
        }
        for index in 0..self.slots.len() as u16 {
            let Some(slot) = self.slots.get_mut(usize::from(index)) else {
                continue;
            };
            if slot.place == Place::Out {
                slot.place = Place::Stopped;
                if slot.cancelled {
                    self.fail(index, Status::ABORT_REQUESTED, false);
                }
            }
        }
    }

    /// Go on with a new queue pair.
    pub(super) fn resume(&mut self, pair: Box<Pair>) {
        self.pair = Some(pair);
        self.faults = 0;
        let mut waiting: Vec<(u64, u16)> = (0u16..)
            .zip(self.slots.iter())
            .filter(|(_, s)| s.place != Place::Free)
            .map(|(i, s)| (s.order, i))
            .collect();
        waiting.sort_unstable();
        let resubmit = self.shared.options.on_reset == OnReset::Resubmit;
        for (_, index) in waiting {
            let Some(slot) = self.slots.get(usize::from(index)) else {
                continue;
            };
            let was_out = matches!(slot.place, Place::Out | Place::Stopped);
            let overdue = slot.overdue;
            let again = resubmit && !slot.once;
            if self.is_cancelled(index) {
                self.fail(index, Status::ABORT_REQUESTED, false);
            } else if let Some(status) = self.refuses {
                self.fail(index, status, true);
            } else if was_out && !again {
                self.fail(index, Status::COMMAND_INTERRUPTED, false);
            } else if was_out && overdue && self.strike(index) >= STRIKES {
                self.fail_for_good(index);
            } else {
                self.send_again(index);
            }
        }
        self.ring();
    }

    /// Take no commands any more. What waits fails; what is out is the device's, and ends as that says.
    pub(super) fn refuse(&mut self, status: Status) {
        if self.refuses.is_some() {
            return;
        }
        self.refuses = Some(status);
        for index in 0..self.slots.len() as u16 {
            if self
                .slots
                .get(usize::from(index))
                .is_some_and(|s| s.place == Place::Held)
            {
                self.fail(index, status, true);
            }
        }
    }

    /// The device is gone.
    pub(super) fn give_up(&mut self) {
        self.refuses = Some(Status::INTERNAL_ERROR);
        for index in 0..self.slots.len() as u16 {
            if self
                .slots
                .get(usize::from(index))
                .is_some_and(|s| s.place != Place::Free)
            {
                self.fail(index, Status::INTERNAL_ERROR, true);
            }
        }
    }
}
