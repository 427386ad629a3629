//! Endings on a poller: of a command by Abort, of a queue by Delete, of everything by a reset, of memory by hotplug.

use std::sync::Arc;

use super::interrupt::GRACE;
use super::run::Core;
use super::served::{Served, Waiting};
use super::sq::{MAX_ABORTS_WAITING, State};
use crate::backend::{Cancelled, Channel as _};
use crate::memory::GuestMap;
use nvme_spec::Status;

impl Served {
    /// Abort one command; the reply comes when it is known what became of it.
    pub fn abort(&mut self, core: &mut Core, token: u64, sqid: u16, cid: u16) {
        let out = core
            .slots
            .of_controller(self.index)
            .find(|(_, s)| s.sqid == sqid && s.cid == cid && !s.mute)
            .map(|(tag, s)| (tag, s.namespace, s.abort.is_some()));
        match out {
            Some((_, _, true)) => self.reply(token, Ok(false)),
            Some((tag, namespace, false)) => match self.cancel(tag, namespace) {
                Cancelled::Gone => {
                    self.complete(core, tag, Status::ABORT_REQUESTED);
                    self.signal(GRACE);
                    self.reply(token, Ok(true));
                }
                Cancelled::ResultComes => {
                    if let Some(slot) = core.slots.get(tag) {
                        slot.abort = Some(token);
                    }
                }
            },
            None => {
                let marked = self.sq(sqid).is_some_and(|sq| {
                    // What the guest has queued by now counts, not what we saw last.
                    let _ = sq.look();
                    let room = sq.aborts.len() < MAX_ABORTS_WAITING;
                    let there = room && sq.holds_unfetched(cid);
                    if there {
                        sq.aborts.push(cid);
                    }
                    there
                });
                self.reply(token, Ok(marked));
            }
        }
    }

    fn cancel(&mut self, tag: u32, namespace: u32) -> Cancelled {
        match self.channels.get_mut(namespace as usize) {
            Some(channel) => {
                self.submitted = true;
                channel.cancel(tag)
            }
            None => Cancelled::ResultComes,
        }
    }

    /// Stop a queue and everything of it that is out.
    pub fn delete_sq(&mut self, core: &mut Core, token: u64, qid: u16) {
        let Some(sq) = self.sq(qid) else {
            return self.reply(token, Err(Status::INVALID_QUEUE_ID));
        };
        if let State::Deleting { .. } = sq.state {
            return self.reply(token, Err(Status::INVALID_QUEUE_ID));
        }
        sq.state = State::Deleting { token };
        self.unsettled = true;
        let out: Vec<_> = core
            .slots
            .of_controller(self.index)
            .filter(|(_, s)| s.sqid == qid)
            .map(|(tag, s)| (tag, s.namespace))
            .collect();
        for (tag, namespace) in out {
            if let Some(slot) = core.slots.get(tag) {
                slot.queue_deleted = true;
            }
            if self.cancel(tag, namespace) == Cancelled::Gone {
                self.complete(core, tag, Status::ABORT_REQUESTED);
            }
        }
        self.signal(GRACE);
    }

    /// Stop everything. What is out is cancelled where it can be, and finishes without being told.
    pub fn begin_reset(&mut self, core: &mut Core, token: u64, detach: bool) {
        // First of all: the pages are not ours any more as soon as the guest sees the reset.
        self.drop_queues();
        self.admin = None;
        let out: Vec<_> = core
            .slots
            .of_controller(self.index)
            .map(|(tag, s)| (tag, s.namespace))
            .collect();
        for (tag, namespace) in out {
            if let Some(slot) = core.slots.get(tag) {
                slot.mute = true;
            }
            if self.cancel(tag, namespace) == Cancelled::Gone {
                self.complete(core, tag, Status::ABORT_REQUESTED);
            }
        }
        self.waiting.push(Waiting::Reset { token, detach });
        self.unsettled = true;
    }

    /// Use other memory.
    pub fn begin_memory(&mut self, token: u64, map: Arc<GuestMap>) {
        let old = self.set_map(Arc::clone(&map));
        self.waiting.push(Waiting::Memory {
            token,
            old,
            new: map,
        });
        self.unsettled = true;
    }

    /// Answer what has come to its end. `true` if the controller is to be forgotten.
    pub fn settle(&mut self, core: &Core) -> bool {
        if !self.unsettled {
            return false;
        }
        self.unsettled = false;
        for i in (0..self.active.len()).rev() {
            let Some(qid) = self.active.get(i).copied() else {
                continue;
            };
            if let Some(sq) = self.sq(qid)
                && let State::Deleting { token } = sq.state
            {
                if sq.outstanding > 0 {
                    self.unsettled = true;
                    continue;
                }
                if let Some(place) = self.sqs.get_mut(usize::from(qid)) {
                    *place = None;
                }
                if let Some(journal) = &self.journal {
                    journal.forget_sq(qid);
                }
                self.active.swap_remove(i);
                self.reply(token, Ok(true));
            }
        }
        let mut forget = false;
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.retain(|w| match w {
            Waiting::Memory { token, old, new } => {
                let lost = old.lost_in(new);
                let used = !lost.is_empty()
                    && core.slots.of_controller(self.index).any(|(tag, _)| {
                        let segs = core.slots.segments(tag);
                        lost.iter().any(|r| segs.iter().any(|s| r.holds(s)))
                    });
                if !used {
                    self.reply(*token, Ok(true));
                }
                used
            }
            Waiting::Release { token, cqid, .. } => self.settle_release(*token, *cqid),
            Waiting::Reset { token, detach } => {
                let done = self.outstanding == 0;
                if done {
                    self.reply(*token, Ok(true));
                    forget |= detach;
                }
                !done
            }
        });
        self.waiting = waiting;
        self.unsettled |= !self.waiting.is_empty();
        forget
    }
}
