//! Commands that a process before us fetched and did not complete: they come first, in order, and each keeps its copy in the journal until
//! its completion is posted.

use nvme_spec::opcode::NvmOpcode;
use nvme_spec::{Sqe, Status};

use super::done;
use super::hand_over::Carried;
use super::message::PollerEvent;
use super::run::Core;
use super::served::Served;
use super::sq::State;
use super::work::{Begun, Prepared, work};

impl Carried {
    /// Whether it is the one with these identifiers.
    pub(super) fn is(&self, sqid: u16, cid: u16) -> bool {
        self.sqid == sqid && self.command().cid == cid
    }

    fn command(&self) -> Sqe {
        zerocopy::transmute!(self.sqe)
    }
}

/// Whether a command may be done twice, when nobody was told of the first time. Of all others nobody knows what they do.
fn is_idempotent(opcode: NvmOpcode) -> bool {
    matches!(
        opcode,
        NvmOpcode::FLUSH
            | NvmOpcode::WRITE
            | NvmOpcode::READ
            | NvmOpcode::WRITE_UNCORRECTABLE
            | NvmOpcode::COMPARE
            | NvmOpcode::WRITE_ZEROES
            | NvmOpcode::DATASET_MANAGEMENT
            | NvmOpcode::VERIFY
    )
}

impl Served {
    /// Begin as many carried commands as there are slots for; whether the last has begun, so that their queues go on.
    #[cold]
    pub fn carry_on(&mut self, core: &mut Core) -> bool {
        let mut prepared = Prepared::default();
        while let Some(carried) = self.carried.front().copied() {
            let sqe = carried.command();
            // A Flush is for all that was there before it.
            let waits = NvmOpcode(sqe.opcode) == NvmOpcode::FLUSH && self.outstanding > 0;
            if waits || core.share(self.outstanding) == 0 {
                return false;
            }
            self.carried.pop_front();
            self.carry(core, &carried, sqe, &mut prepared);
        }
        self.let_resumed_run();
        true
    }

    /// No carried command is left: their queues go on.
    fn let_resumed_run(&mut self) {
        for sq in self.sqs.iter_mut().flatten() {
            if sq.state == State::Resuming {
                sq.state = State::Running;
            }
        }
    }

    fn carry(&mut self, core: &mut Core, carried: &Carried, sqe: Sqe, prepared: &mut Prepared) {
        let Some(Some(sq)) = self.sqs.get_mut(usize::from(carried.sqid)) else {
            return;
        };
        let Some(Some(cq)) = self.cqs.get_mut(usize::from(sq.cqid)) else {
            return;
        };
        let Some(tag) = core.slots.take() else { return };
        work!(self).check(&mut core.slots, sq, tag, carried.sqe, prepared);
        if !is_idempotent(NvmOpcode(sqe.opcode)) && prepared.plan.is_ok() {
            prepared.plan = Err(Status::COMMAND_INTERRUPTED.into());
        }
        cq.promise();
        let start = sq.stats.service.start();
        let Some((slot, room)) = core.slots.with_segments(tag) else {
            return;
        };
        match work!(self).begin(slot, room, prepared, &mut core.ranges) {
            Begun::Pending => {
                slot.served = self.index;
                slot.sqid = sq.qid;
                slot.cqid = cq.qid;
                slot.cid = sqe.cid;
                slot.mute = false;
                slot.queue_deleted = false;
                slot.journal_at = carried.place;
                slot.start = start;
                slot.abort = None;
                slot.epoch = self.epoch;
                slot.sqe = carried.sqe;
                sq.outstanding += 1;
                self.outstanding += 1;
                self.submitted = true;
            }
            Begun::Done(refusal) => {
                core.slots.release(tag);
                if let Some(failure) =
                    done::failure(sq.qid, &sqe, refusal.status.into(), refusal.parameter)
                    && self.reports_left > 0
                {
                    self.reports_left -= 1;
                    self.at
                        .sink
                        .event(self.poller, PollerEvent::Failed(failure));
                }
                done::post(sq, cq, sqe.cid, sq.head, refusal.status);
                sq.stats.completed.add(1);
                self.posted |= 1 << (cq.qid & 63);
                if let Some(journal) = &self.journal {
                    journal.strike(carried.place);
                    cq.record(journal);
                }
            }
        }
    }

    /// Complete carried commands that have not begun, with this status. Whether there were any.
    pub fn give_up_carried(
        &mut self,
        status: Status,
        mut which: impl FnMut(&Carried) -> bool,
    ) -> bool {
        let mut any = false;
        let mut at = 0;
        while let Some(carried) = self.carried.get(at).copied() {
            if !which(&carried) {
                at += 1;
                continue;
            }
            self.carried.remove(at);
            any = true;
            let Some(Some(sq)) = self.sqs.get_mut(usize::from(carried.sqid)) else {
                continue;
            };
            let Some(Some(cq)) = self.cqs.get_mut(usize::from(sq.cqid)) else {
                continue;
            };
            cq.promise();
            done::post(sq, cq, carried.command().cid, sq.head, status);
            self.posted |= 1 << (cq.qid & 63);
            if let Some(journal) = &self.journal {
                journal.strike(carried.place);
                cq.record(journal);
            }
        }
        if any && self.carried.is_empty() {
            // Whoever gave them up looks at the doorbells again.
            self.let_resumed_run();
        }
        any
    }
}
