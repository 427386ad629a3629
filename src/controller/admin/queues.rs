//! Create and Delete I/O Submission and Completion Queue.

use std::sync::Arc;

use nvme_spec::admin::{CreateIoCq, CreateIoSq, DeleteQueue};
use nvme_spec::ring::RingSize;
use nvme_spec::{Sqe, Status};

use super::refusal::{Field, Refusal, invalid};
use super::{Actor, Done};
use crate::controller::image::{CqImage, SqImage};
use crate::controller::pending::{AdminKind, Work};
use crate::controller::queues::{Cq, Sq, State};
use crate::poller::{Attachment, CqConfig, Journal, Message, SqConfig};

/// CC.IOSQES and CC.IOCQES: log2 of the entry sizes.
const SQ_ENTRY: u8 = 6;
const CQ_ENTRY: u8 = 4;

fn bad_id(field: Field) -> Refusal {
    Refusal::of(Status::INVALID_QUEUE_ID, field)
}

impl Actor {
    pub(super) fn create_cq(&mut self, sqe: &Sqe) -> Result<Done, Refusal> {
        let command = CreateIoCq::from_sqe(sqe);
        let qid = command.qid;
        if qid == 0 || qid > self.features.completion_queues() || self.queues.cq(qid).is_some() {
            return Err(bad_id(Field::Cdw10));
        }
        let entry = self.shared.registers.cc().iocqes();
        let size =
            self.queue_memory(command.prp1, command.qsize_z, command.pc, entry == CQ_ENTRY)?;
        let vector = match command.ien {
            false => None,
            true => match self.shared.vectors.get(usize::from(command.iv)) {
                Some(vector) => Some(Arc::clone(vector)),
                None => {
                    return Err(Refusal::of(
                        Status::INVALID_INTERRUPT_VECTOR,
                        Field::Cdw11High,
                    ));
                }
            },
        };
        let poller = self
            .choose_poller(command.prp1)
            .ok_or(Status::INTERNAL_ERROR)?;
        let number = self.next_number().ok_or(Status::INTERNAL_ERROR)?;
        self.introduce(poller);
        if let Some(slot) = self.queues.cq_slot(qid) {
            let state = State::Creating;
            let image = CqImage {
                qid,
                base: command.prp1,
                entries: size.get(),
                vector: command.ien.then_some(command.iv),
                number,
            };
            *slot = Some(Cq {
                state,
                poller,
                image,
            });
        }
        if vector.is_some() {
            self.shared.pin.add(qid, command.prp1, size);
        }
        let cq = CqConfig {
            qid,
            number,
            base: command.prp1,
            size,
            vector,
            kick: self.kicks.get(usize::from(qid)).cloned().flatten(),
            stats: self.queues.cq_stats(qid),
        };
        let token = self.begin(sqe, poller, AdminKind::CreateCq(qid));
        let key = self.key;
        self.tell(poller, Message::CreateCq { token, key, cq });
        Ok(Done::Later)
    }

    pub(super) fn create_sq(&mut self, sqe: &Sqe) -> Result<Done, Refusal> {
        let command = CreateIoSq::from_sqe(sqe);
        let (qid, cqid) = (command.qid, command.cqid);
        if qid == 0 || qid > self.features.submission_queues() || self.queues.sq(qid).is_some() {
            return Err(bad_id(Field::Cdw10));
        }
        let entry = self.shared.registers.cc().iosqes();
        let size =
            self.queue_memory(command.prp1, command.qsize_z, command.pc, entry == SQ_ENTRY)?;
        if cqid == 0 || cqid > self.features.completion_queues() {
            return Err(bad_id(Field::Cdw11High));
        }
        let poller = match self.queues.cq(cqid) {
            Some(cq) if cq.state == State::Live => cq.poller,
            _ => {
                return Err(Refusal::of(
                    Status::COMPLETION_QUEUE_INVALID,
                    Field::Cdw11High,
                ));
            }
        };
        let number = self.next_number().ok_or(Status::INTERNAL_ERROR)?;
        if let Some(slot) = self.queues.sq_slot(qid) {
            let state = State::Creating;
            let image = SqImage {
                qid,
                base: command.prp1,
                entries: size.get(),
                cqid,
                number,
            };
            *slot = Some(Sq {
                state,
                poller,
                cqid,
                image,
            });
        }
        let sq = SqConfig {
            qid,
            number,
            base: command.prp1,
            size,
            cqid,
            kick: self.kicks.get(usize::from(qid)).cloned().flatten(),
            stats: self.queues.sq_stats(qid),
        };
        let token = self.begin(sqe, poller, AdminKind::CreateSq(qid));
        let key = self.key;
        self.tell(poller, Message::CreateSq { token, key, sq });
        Ok(Done::Later)
    }

    /// Check what both kinds of queue have in common; the size.
    fn queue_memory(
        &self,
        base: u64,
        size_z: u16,
        contiguous: bool,
        entry_size: bool,
    ) -> Result<RingSize, Refusal> {
        let bad_size = Refusal::of(Status::INVALID_QUEUE_SIZE, Field::Cdw10High);
        let size = RingSize::from_z(size_z).ok_or(bad_size)?;
        if size.get() > self.shared.info.max_queue_entries || !entry_size {
            return Err(bad_size);
        }
        // CAP.CQR: only queues in one piece.
        if !contiguous {
            return Err(invalid(Field::Cdw11));
        }
        if !base.is_multiple_of(4096) {
            return Err(Refusal::of(Status::INVALID_PRP_OFFSET, Field::Prp1));
        }
        Ok(size)
    }

    /// Tell a poller of this controller, if it does not know it.
    pub(in crate::controller) fn introduce(&mut self, poller: usize) {
        match self.attached.get_mut(poller) {
            Some(attached @ false) => *attached = true,
            _ => return,
        }
        let info = &self.shared.info;
        let attachment = Attachment {
            key: self.key,
            sink: self.sink(),
            namespaces: Arc::clone(&self.namespaces),
            stats: self.health.stats_for(poller, info.namespaces.len()),
            map: Arc::clone(&self.map),
            window: Arc::clone(&self.shared.window),
            stride: info.stride,
            max_transfer: info.max_transfer,
            max_namespaces: info.max_namespaces,
            sgls: info.sgls,
            doorbells: self.doorbell_mode(),
            journal: self.state.clone().map(|state| Journal::new(state, poller)),
        };
        let token = self.pending.begin(vec![poller], Work::Attach(poller));
        let attachment = Box::new(attachment);
        self.tell(poller, Message::Attach { token, attachment });
        if let Some(shadow) = self.shadow {
            let token = self.pending.begin(vec![poller], Work::Nothing);
            let key = self.key;
            self.tell(poller, Message::SetShadow { token, key, shadow });
        }
        self.watch_admin();
    }

    pub(super) fn delete_cq(&mut self, sqe: &Sqe) -> Result<Done, Refusal> {
        let DeleteQueue { qid } = DeleteQueue::from_sqe(sqe);
        let used = self.queues.is_used(qid);
        let live = self.queues.cq_slot(qid).and_then(Option::as_mut);
        let Some(cq) = live.filter(|cq| cq.state == State::Live) else {
            return Err(bad_id(Field::Cdw10));
        };
        if used {
            return Err(Refusal::of(Status::INVALID_QUEUE_DELETION, Field::Cdw10));
        }
        cq.state = State::Deleting;
        let poller = cq.poller;
        let token = self.begin(sqe, poller, AdminKind::DeleteCq(qid));
        let key = self.key;
        self.tell(poller, Message::DeleteCq { token, key, qid });
        Ok(Done::Later)
    }

    pub(super) fn delete_sq(&mut self, sqe: &Sqe) -> Result<Done, Refusal> {
        let DeleteQueue { qid } = DeleteQueue::from_sqe(sqe);
        let live = self.queues.sq_slot(qid).and_then(Option::as_mut);
        let Some(sq) = live.filter(|sq| sq.state == State::Live) else {
            return Err(bad_id(Field::Cdw10));
        };
        sq.state = State::Deleting;
        let poller = sq.poller;
        let token = self.begin(sqe, poller, AdminKind::DeleteSq(qid));
        let key = self.key;
        self.tell(poller, Message::DeleteSq { token, key, qid });
        Ok(Done::Later)
    }

    /// A poller has ended an admin command: write down what became of the queue.
    pub(super) fn settle(&mut self, kind: AdminKind, done: bool) {
        match kind {
            AdminKind::CreateCq(qid) => {
                let slot = self.queues.cq_slot(qid);
                after_create(slot, done, |cq| cq.state = State::Live);
                if !done {
                    self.shared.pin.remove(qid);
                }
            }
            AdminKind::CreateSq(qid) => {
                let slot = self.queues.sq_slot(qid);
                after_create(slot, done, |sq| sq.state = State::Live);
            }
            AdminKind::DeleteCq(qid) => {
                let slot = self.queues.cq_slot(qid);
                after_delete(slot, done, |cq| cq.state = State::Live);
                if done {
                    self.shared.pin.remove(qid);
                }
            }
            AdminKind::DeleteSq(qid) => {
                let slot = self.queues.sq_slot(qid);
                after_delete(slot, done, |sq| sq.state = State::Live);
            }
            AdminKind::Shadow if !done => (self.shadow, self.shadow_used) = (None, None),
            AdminKind::Shadow => self.shadow_used = self.shadow,
            AdminKind::Abort => {}
        }
    }
}

fn after_create<Q>(slot: Option<&mut Option<Q>>, done: bool, live: impl FnOnce(&mut Q)) {
    match slot {
        Some(Some(queue)) if done => live(queue),
        Some(slot) => *slot = None,
        None => {}
    }
}

/// A queue that could not be deleted is still there.
fn after_delete<Q>(slot: Option<&mut Option<Q>>, done: bool, live: impl FnOnce(&mut Q)) {
    match slot {
        Some(slot) if done => *slot = None,
        Some(Some(queue)) => live(queue),
        _ => {}
    }
}
