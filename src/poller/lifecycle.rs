//! Endings on a poller: of a command by Abort, of a queue by Delete, of everything by a reset, of memory by hotplug.

use std::sync::Arc;
use std::time::Duration;

use super::interrupt::GRACE;
use super::run::Core;
use super::served::{Served, Waiting};
use super::slot::Slot;
use super::sq::{Sq, State};
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
            None if self.give_up_carried(Status::ABORT_REQUESTED, |c| c.is(sqid, cid)) => {
                self.signal(GRACE);
                self.reply(token, Ok(true));
            }
            Some((_, _, true)) => self.reply(token, Ok(false)),
            Some((tag, namespace, false)) => match self.cancel(tag, namespace) {
                Cancelled::Gone => {
                    self.complete(core, tag, Status::ABORT_REQUESTED.into());
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
                let mut sq = self.sq(sqid);
                match sq.as_mut().is_some_and(|sq| sq.abort_unfetched(cid, token)) {
                    true => self.unsettled = true,
                    false => self.reply(token, Ok(false)),
                }
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
        self.give_up_carried(Status::ABORTED_SQ_DELETION, |c| c.sqid == qid);
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
                self.complete(core, tag, Status::ABORT_REQUESTED.into());
            }
        }
        self.signal(GRACE);
    }

    /// Stop everything. What is out is cancelled where it can be, and finishes without being told.
    pub fn begin_reset(&mut self, core: &mut Core, token: u64, detach: bool) {
        // First of all: the pages are not ours any more as soon as the guest sees the reset.
        self.drop_queues();
        self.admin = None;
        for carried in self.carried.drain(..) {
            if let Some(journal) = &self.journal {
                journal.strike(carried.place);
            }
        }
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
                self.complete(core, tag, Status::ABORT_REQUESTED.into());
            }
        }
        self.waiting.push(Waiting::Reset { token, detach });
        self.unsettled = true;
    }

    /// Fetch nothing any more, and go when nothing is out. What is not done then is in the journal.
    pub fn begin_suspend(&mut self, token: u64) {
        self.admin = None;
        self.suspended = true;
        self.carried.clear();
        for sq in self.sqs.iter_mut().flatten() {
            if let State::Running | State::Resuming = sq.state {
                sq.state = State::Paused;
            }
        }
        self.waiting.push(Waiting::Suspend { token });
        self.unsettled = true;
    }

    /// Whether the store has a command as the guest wrote it.
    fn is_forwarded(&self, slot: &Slot) -> bool {
        let namespace = self.at.namespaces.get(slot.namespace as usize);
        namespace.is_some_and(|ns| ns.forwards)
    }

    /// Use other memory.
    pub fn begin_memory(&mut self, token: u64, map: Arc<GuestMap>) {
        let old = self.set_map(Arc::clone(&map));
        self.epoch += 1;
        self.waiting.push(Waiting::Memory {
            token,
            old,
            new: map,
            epoch: self.epoch,
        });
        self.unsettled = true;
    }

    /// Answer Aborts of commands that were fetched since.
    fn settle_aborts(&mut self, qid: u16) {
        while let Some((token, aborted)) = self.sq(qid).and_then(Sq::ended_abort) {
            self.reply(token, Ok(aborted));
        }
        let waits = self.sq(qid).is_some_and(|sq| !sq.aborts.is_empty());
        self.unsettled |= waits;
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
            self.settle_aborts(qid);
            if let Some(sq) = self.sq(qid)
                && let State::Deleting { token } = sq.state
            {
                if sq.outstanding > 0 {
                    self.unsettled = true;
                    continue;
                }
                let cqid = sq.cqid;
                let place = self.sqs.get_mut(usize::from(qid));
                for abort in place
                    .and_then(Option::take)
                    .into_iter()
                    .flat_map(|sq| sq.aborts)
                {
                    // Its command ends with the queue, and is not completed.
                    self.reply(abort.token, Ok(true));
                }
                if let Some(journal) = &self.journal
                    && let Some(Some(cq)) = self.cqs.get_mut(usize::from(cqid))
                {
                    cq.forget(journal, qid);
                }
                self.active.swap_remove(i);
                self.reply(token, Ok(true));
            }
        }
        let mut forget = false;
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.retain_mut(|w| match w {
            Waiting::Memory {
                token,
                old,
                new,
                epoch,
            } => {
                let lost = old.lost_in(new);
                let used = !lost.is_empty()
                    && core.slots.of_controller(self.index).any(|(tag, slot)| {
                        // Nobody read the PRP lists of a forwarded command: it may use any region there was when it was begun.
                        if self.is_forwarded(slot) && slot.epoch < *epoch {
                            return true;
                        }
                        let segs = core.slots.segments(tag);
                        lost.iter().any(|r| segs.iter().any(|s| r.holds(s)))
                    });
                if !used {
                    // Whoever waits for the answer counts on it that we hold nothing of the old memory.
                    old.clone_from(new);
                    self.reply(*token, Ok(true));
                }
                used
            }
            Waiting::Release { token, cqid, .. } => self.settle_release(*token, *cqid),
            Waiting::Suspend { token } => {
                let done = self.outstanding == 0;
                if done {
                    // Nobody will look whether the guest is consuming anyway.
                    self.signal(Duration::ZERO);
                    self.reply(*token, Ok(true));
                    forget = true;
                }
                !done
            }
            Waiting::Reset { token, detach } => {
                let done = self.outstanding == 0;
                if done {
                    self.reply(*token, Ok(true));
                    forget |= *detach;
                }
                !done
            }
        });
        self.waiting = waiting;
        self.unsettled |= !self.waiting.is_empty();
        forget
    }
}
