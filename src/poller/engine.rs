//! All that a poller serves, and one pass over it.

use super::hand_over::HandOver;
use super::interrupt::GRACE;
use super::look::{Looks, Seen};
use super::message::ControllerKey;
use super::run::{Core, Fetched};
use super::served::Served;
use crate::backend::Channel as _;

/// What leaves a poller.
pub(super) enum Left<'a> {
    /// A controller has come to its end.
    Controller(Box<Served>),
    /// Queues of a controller go to another poller; the token of the message that asked for it.
    Queues(&'a Served, u64, HandOver),
}

/// The controllers of a poller.
pub(super) struct Engine {
    // Controllers before the core: their channels end all use of the slots' segments.
    pub served: Vec<Option<Served>>,
    pub core: Core,
    looks: Looks,
    /// Controllers that something came of in this pass.
    touched: Vec<u32>,
    /// Of those, the ones whose interrupts wait: they are looked at again in the next pass. Empty between passes.
    held_back: Vec<u32>,
    /// Controllers that have commands out.
    awaited: Vec<u32>,
}

impl Engine {
    pub fn new(slots: usize) -> Self {
        Self {
            served: Vec::new(),
            core: Core::new(slots),
            looks: Looks::default(),
            touched: Vec::new(),
            held_back: Vec::new(),
            awaited: Vec::new(),
        }
    }

    /// Look at everything once: results, new commands, then one flush each and one interrupt for each completion queue. Whether
    /// there was anything. `left` is called with what leaves this poller.
    #[inline]
    pub fn pass(&mut self, left: impl FnMut(Left)) -> bool {
        let mut busy = false;
        if !self.awaited.is_empty() {
            busy |= self.collect();
        }
        let Self {
            served,
            core,
            looks,
            touched,
            ..
        } = self;
        core.expect(looks.busy());
        let mut stalled = false;
        looks.pass(|index, qid, value| {
            let Some(Some(served)) = served.get_mut(usize::from(index)) else {
                return Seen::default();
            };
            if qid == 0 {
                busy |= served.look_at_admin();
                return Seen::default();
            }
            let fetched = served.fetch(core, u16::from(qid), value);
            stalled |= fetched == Fetched::STALLED;
            if fetched.busy {
                busy = true;
                touch(touched, served);
            }
            Seen {
                again: fetched.more,
                next: served.next_command(u16::from(qid)),
            }
        });
        if stalled {
            // Slots that come free are given to those who look first: that is not always the same one.
            self.looks.rotate();
        }
        if !self.touched.is_empty() {
            self.finish(left);
        }
        busy
    }

    /// Take the results of all channels that owe some.
    fn collect(&mut self) -> bool {
        let mut busy = false;
        for at in (0..self.awaited.len()).rev() {
            let Some(&index) = self.awaited.get(at) else {
                continue;
            };
            let Some(Some(served)) = self.served.get_mut(index as usize) else {
                self.awaited.swap_remove(at);
                continue;
            };
            if served.collect(&mut self.core) {
                busy = true;
                touch(&mut self.touched, served);
            }
            if served.outstanding == 0 {
                served.awaited = false;
                self.awaited.swap_remove(at);
            }
        }
        busy
    }

    /// The end of a pass, for those that had something.
    fn finish(&mut self, mut left: impl FnMut(Left)) {
        while let Some(index) = self.touched.pop() {
            let Some(place) = self.served.get_mut(index as usize) else {
                continue;
            };
            let Some(served) = place else { continue };
            served.touched = false;
            let resumed = !served.carried.is_empty() && served.carry_on(&mut self.core);
            if std::mem::take(&mut served.submitted) {
                for channel in &mut served.channels {
                    channel.flush();
                }
            }
            if served.outstanding > 0 && !served.awaited {
                served.awaited = true;
                self.awaited.push(index);
            }
            let held = served.posted != 0 && served.signal(GRACE).is_some();
            if held || !served.carried.is_empty() {
                served.touched = true;
                self.held_back.push(index);
            }
            if served.unsettled {
                let queues = served.active.len();
                let forget = served.settle(&self.core);
                for (token, queues) in std::mem::take(&mut served.leaving) {
                    left(Left::Queues(served, token, queues));
                }
                if forget {
                    if let Some(served) = place.take() {
                        left(Left::Controller(Box::new(served)));
                    }
                    self.look_again();
                } else if served.active.len() != queues {
                    self.look_again();
                }
            }
            if resumed {
                self.look_again();
            }
        }
        std::mem::swap(&mut self.touched, &mut self.held_back);
    }

    /// Something was changed from outside: see to it at the end of the next pass, and find the doorbells anew.
    pub fn changed(&mut self) {
        for served in self.served.iter_mut().flatten() {
            touch(&mut self.touched, served);
        }
        self.look_again();
    }

    /// Find the doorbells anew, and look at each of them.
    fn look_again(&mut self) {
        self.looks.clear();
        for served in self.served.iter().flatten() {
            for (bell, qid) in served.bells() {
                self.looks.add(bell, served.index as u16, qid);
            }
        }
    }

    /// Look at every doorbell in the next pass, also at those that have been quiet.
    pub fn woken(&mut self) {
        self.looks.all_busy();
        self.served.iter_mut().flatten().for_each(Served::tend);
    }

    pub fn find(&mut self, key: ControllerKey) -> Option<(&mut Served, &mut Core)> {
        let served = self.served.iter_mut().flatten().find(|s| s.at.key == key)?;
        Some((served, &mut self.core))
    }

    /// No controller may take all slots while there are others.
    pub fn share_out(&mut self) {
        self.core.shared = self.served.iter().flatten().count() > 1;
    }
}

#[inline]
fn touch(touched: &mut Vec<u32>, served: &mut Served) {
    if !served.touched {
        served.touched = true;
        touched.push(served.index);
    }
}
