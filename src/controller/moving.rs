//! Moving a completion queue, with its submission queues, to another poller while the guest uses it.
//!
//! One move at a time, in three steps, each of which is a message and its answer: the new poller says that it serves this
//! controller, the old one releases the queues, the new one adopts them. Admin commands
//! that have to do with queues wait until the move has ended, and end it at once where it waits for I/O: nothing but mailboxes is ever
//! waited for by the guest. A reset forgets the move; queues that arrive after that are dropped.

use std::sync::Arc;

use crossbeam_channel::Sender;
use nvme_spec::event::AsyncEvent;
use nvme_spec::opcode::AdminOpcode;
use nvme_spec::{Sqe, Status};

use super::actor::Actor;
use super::lifecycle::Phase;
use super::pending::Work;
use super::queues::State;
use crate::poller::stats::QueueStats;
use crate::poller::{HandOver, Message, Reply};

/// Why a queue was not moved. It stays where it was, and works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MoveError {
    /// There is no such completion queue.
    #[error("there is no such completion queue")]
    NoSuchQueue,
    /// There is no such poller, or it may not serve this controller.
    #[error("there is no such poller, or it may not serve this controller")]
    NoSuchPoller,
    /// Another move, or a command on these queues, is under way.
    #[error("another move, or a command on these queues, is under way")]
    Busy,
    /// Commands were out for too long, the guest changed its queues, or the controller was reset.
    #[error("commands were out for too long, or the guest changed its queues")]
    GivenUp,
    /// The controller does not answer.
    #[error("the controller does not answer")]
    NoAnswer,
}

/// Where a completion queue is served, with all its submission queues.
#[derive(Clone, Debug)]
pub struct Placed {
    /// The completion queue.
    pub cqid: u16,
    /// The poller.
    pub poller: usize,
    /// The submission queues, and their counters.
    pub sqs: Vec<(u16, Arc<QueueStats>)>,
}

/// What a move waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// The new poller is ready.
    Preparing,
    /// The old poller lets go.
    Releasing,
    /// The new poller takes over.
    Adopting,
}

/// A move that is under way.
pub(super) struct Move {
    number: u32,
    cqid: u16,
    from: usize,
    to: usize,
    step: Step,
    /// Something has come that cannot wait for I/O.
    cancelled: bool,
    /// Admin commands that are executed when the move has ended: no more than have room in their completion queue.
    deferred: Vec<Sqe>,
    done: Sender<Result<(), MoveError>>,
}

impl Actor {
    /// Begin to move a completion queue. What comes of it is sent to `done`.
    pub(super) fn move_queue(&mut self, cqid: u16, to: usize, done: Sender<Result<(), MoveError>>) {
        let from = match self.movable(cqid, to) {
            Ok(from) if from == to => {
                let _ = done.try_send(Ok(()));
                return;
            }
            Ok(found) => found,
            Err(error) => {
                let _ = done.try_send(Err(error));
                return;
            }
        };
        let Some(number) = self.next_number() else {
            let _ = done.try_send(Err(MoveError::GivenUp));
            return;
        };
        self.introduce(to);
        self.moving = Some(Move {
            number,
            cqid,
            from,
            to,
            step: Step::Preparing,
            cancelled: false,
            deferred: Vec::new(),
            done,
        });
        let token = self.pending.begin(vec![to], Work::Move(number));
        let key = self.key;
        self.tell(to, Message::Hello { token, key });
    }

    /// Where a completion queue is, if it can be moved now with all its submission queues.
    fn movable(&self, cqid: u16, to: usize) -> Result<usize, MoveError> {
        if to >= self.ports.len() || !self.placement.allows(to) {
            return Err(MoveError::NoSuchPoller);
        }
        if self.phase != Phase::Ready || self.drain.is_some() {
            return Err(MoveError::NoSuchQueue);
        }
        // An Abort may wait on a poller for a command of these queues.
        if self.moving.is_some() || self.pending.aborts() > 0 {
            return Err(MoveError::Busy);
        }
        let cq = self.queues.cq(cqid).ok_or(MoveError::NoSuchQueue)?;
        let mut sqs = self.queues.sqs_of(cqid);
        if cq.state != State::Live || sqs.any(|(_, sq)| sq.state != State::Live) {
            return Err(MoveError::Busy);
        }
        Ok(cq.poller)
    }

    /// A poller has answered for this move.
    pub(super) fn go_on_moving(&mut self, number: u32, result: Result<bool, Status>) {
        let Some(moving) = self.moving.as_mut().filter(|m| m.number == number) else {
            return;
        };
        match (moving.step, result) {
            (Step::Preparing, Ok(_)) if !moving.cancelled => {
                moving.step = Step::Releasing;
                let (from, cqid, key) = (moving.from, moving.cqid, self.key);
                let token = self.pending.begin(vec![from], Work::Move(number));
                self.tell(from, Message::Release { token, key, cqid });
            }
            (Step::Preparing | Step::Releasing, _) => self.end_move(Err(MoveError::GivenUp)),
            (Step::Adopting, Ok(_)) => self.end_move(Ok(())),
            (Step::Adopting, Err(status)) => {
                let (cqid, controller) = (moving.cqid, self.shared.info.name.as_str());
                tracing::error!(controller, cqid, "a poller did not take a queue: {status}");
                self.events.raise(AsyncEvent::TRANSIENT_INTERNAL_ERROR);
                self.end_move(Err(MoveError::GivenUp));
            }
        }
    }

    /// A poller has released queues.
    pub(super) fn released(&mut self, poller: usize, token: u64, mut queues: Box<HandOver>) {
        let result = Ok(true);
        let Some((Work::Move(number), _)) = self.pending.answer(poller, &Reply { token, result })
        else {
            return;
        };
        // Otherwise they are of the time before a reset.
        let Some(moving) = self.moving.as_mut().filter(|m| m.number == number) else {
            return;
        };
        moving.step = Step::Adopting;
        let to = moving.to;
        self.queues.moved(moving.cqid, to);
        // They may have changed in between, and then nobody was told.
        queues.set_kicks(|qid| self.kicks.get(usize::from(qid)).cloned().flatten());
        let key = self.key;
        let token = self.pending.begin(vec![to], Work::Move(number));
        let message = Message::Adopt {
            token,
            key,
            number,
            queues,
        };
        self.tell(to, message);
    }

    /// Whether an admin command has to wait for a move. It ends the move at once, if that waits for I/O.
    pub(super) fn wait_for_move(&mut self, opcode: AdminOpcode, sqe: &Sqe) -> bool {
        let Some(moving) = &mut self.moving else {
            return false;
        };
        let about_queues = [
            AdminOpcode::CREATE_IO_SQ,
            AdminOpcode::DELETE_IO_SQ,
            AdminOpcode::DELETE_IO_CQ,
            AdminOpcode::ABORT,
            AdminOpcode::DOORBELL_BUFFER_CONFIG,
        ];
        if !about_queues.contains(&opcode) {
            return false;
        }
        moving.deferred.push(*sqe);
        if !std::mem::replace(&mut moving.cancelled, true) && moving.step == Step::Releasing {
            let (from, cqid, key) = (moving.from, moving.cqid, self.key);
            self.tell(from, Message::Keep { key, cqid });
        }
        true
    }

    fn end_move(&mut self, result: Result<(), MoveError>) {
        let Some(moving) = self.moving.take() else {
            return;
        };
        let controller = self.shared.info.name.as_str();
        let (cqid, from, to) = (moving.cqid, moving.from, moving.to);
        tracing::debug!(controller, cqid, from, to, ?result, "queue moved");
        let _ = moving.done.try_send(result);
        for sqe in &moving.deferred {
            self.execute_again(sqe);
        }
    }

    /// The guest's queues are gone, and with them the commands that wait for a move of one.
    pub(super) fn forget_move(&mut self) {
        if let Some(moving) = self.moving.take() {
            let _ = moving.done.try_send(Err(MoveError::GivenUp));
        }
    }

    /// The admin queue is gone: nobody waits for what would have been done after the move.
    pub(super) fn forget_deferred(&mut self) {
        if let Some(moving) = &mut self.moving {
            moving.deferred.clear();
        }
    }

    /// Where the guest's queues are.
    pub(super) fn placed(&self) -> Vec<Placed> {
        let live = self.queues.cqs().filter(|(_, cq)| cq.state == State::Live);
        live.map(|(cqid, cq)| Placed {
            cqid,
            poller: cq.poller,
            sqs: self
                .queues
                .sqs_of(cqid)
                .map(|(qid, _)| (qid, self.queues.sq_stats(qid)))
                .collect(),
        })
        .collect()
    }
}
