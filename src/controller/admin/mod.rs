//! Admin commands: fetch, check what all have in common, do, complete.

pub(super) mod data;
pub(super) mod events;
pub(super) mod features;
mod identify;
mod log;
pub(super) mod queue;
mod queues;
mod refusal;
mod shadow;

use std::borrow::Cow;

use nvme_spec::admin::{Abort, GetFeatures, GetLogPage, Identify, SetFeatures};
use nvme_spec::command::{Fuse, Psdt};
use nvme_spec::event::AsyncEvent;
use nvme_spec::feature::{FeatureId, Timestamp};
use nvme_spec::log::{ErrorLogEntry, LogId};
use nvme_spec::opcode::AdminOpcode;
use nvme_spec::{Sqe, Status};

use super::actor::Actor;
use super::health::SsdHealth;
use super::info::Info;
use super::pending::{AdminKind, AdminWork, Work};
use crate::poller::{IoFailure, Message, Reply};
use queue::BadDoorbell;
use refusal::{Field, Refusal, invalid};

/// Aborts that may wait at a time (Identify ACL + 1).
const ABORT_LIMIT: usize = 4;

/// Commands served in a turn before others have their say.
const BATCH: usize = 32;

/// What became of a command.
enum Done {
    /// It succeeded, with this completion dword 0.
    Now(u32),
    /// It is in [`Pending`](super::pending::Pending).
    Later,
    /// It waits among the asynchronous event requests.
    Parked,
}

impl Actor {
    /// Serve the admin queue; whether there is more to do right away.
    pub(super) fn serve_admin(&mut self) -> bool {
        let Some(queue) = &mut self.admin else {
            return false;
        };
        let looked = queue.look();
        let mut more = looked.is_ok();
        if looked.is_ok() {
            for _ in 0..BATCH {
                let Some(sqe) = self.admin.as_mut().and_then(queue::AdminQueue::fetch) else {
                    more = false;
                    break;
                };
                self.execute(&sqe);
            }
        } else {
            self.events.raise(AsyncEvent::INVALID_DOORBELL_VALUE);
        }
        self.deliver_events();
        if let Err(BadDoorbell(value)) = looked {
            self.errors.record_queue(0);
            self.fail(&format!(
                "the guest wrote {value:#x} to a doorbell of the admin queues"
            ));
        }
        more
    }

    fn deliver_events(&mut self) {
        let Some(queue) = &mut self.admin else { return };
        loop {
            if !queue.unpark() {
                return;
            }
            let Some((cid, event)) = self.events.take() else {
                queue.park();
                return;
            };
            queue.complete(cid, event.to_dw0(), Status::SUCCESS, false);
        }
    }

    /// Begin a command that was fetched.
    pub(super) fn execute(&mut self, sqe: &Sqe) {
        self.commands.push(zerocopy::transmute!(*sqe));
        self.execute_again(sqe);
    }

    /// Begin a command that is under way, and was not begun before, or in another process.
    pub(super) fn execute_again(&mut self, sqe: &Sqe) {
        match self.command(sqe) {
            Ok(Done::Now(dw0)) => self.complete(sqe.cid, dw0, Ok(())),
            Ok(Done::Later) => {}
            Ok(Done::Parked) => {
                self.end_command(sqe.cid);
                if let Some(queue) = &mut self.admin {
                    queue.park();
                }
            }
            Err(refusal) => {
                tracing::debug!(
                    controller = self.shared.info.name.as_str(),
                    opcode = ?AdminOpcode(sqe.opcode),
                    "admin command refused: {} at {:#x}",
                    refusal.status,
                    refusal.location
                );
                self.note(sqe.cid, sqe.nsid, refusal);
                self.complete(sqe.cid, 0, Err(refusal.status));
            }
        }
    }

    /// Complete a command that was fetched. An error is in the error log already.
    fn complete(&mut self, cid: u16, dw0: u32, result: Result<(), Status>) {
        self.end_command(cid);
        if let Some(queue) = &mut self.admin {
            let status = result.err().unwrap_or(Status::SUCCESS);
            queue.complete(cid, dw0, status, result.is_err());
        }
    }

    /// A command is not under way any more.
    fn end_command(&mut self, cid: u16) {
        let is = |words: &[u64; 8]| {
            let sqe: Sqe = zerocopy::transmute!(*words);
            sqe.cid == cid
        };
        if let Some(at) = self.commands.iter().position(is) {
            self.commands.remove(at);
        }
    }

    fn note(&mut self, cid: u16, nsid: u32, refusal: Refusal) {
        self.errors.record(&IoFailure {
            sqid: 0,
            cid,
            status: refusal.status.into(),
            nsid,
            lba: 0,
            parameter: refusal.location,
        });
    }

    fn command(&mut self, sqe: &Sqe) -> Result<Done, Refusal> {
        let opcode = AdminOpcode(sqe.opcode);
        let known = matches!(
            opcode,
            AdminOpcode::DELETE_IO_SQ
                | AdminOpcode::CREATE_IO_SQ
                | AdminOpcode::GET_LOG_PAGE
                | AdminOpcode::DELETE_IO_CQ
                | AdminOpcode::CREATE_IO_CQ
                | AdminOpcode::IDENTIFY
                | AdminOpcode::ABORT
                | AdminOpcode::SET_FEATURES
                | AdminOpcode::GET_FEATURES
                | AdminOpcode::ASYNC_EVENT_REQUEST
        ) || opcode == AdminOpcode::DOORBELL_BUFFER_CONFIG
            && self.info().doorbell_buffer;
        if !known {
            return Err(Refusal::of(Status::INVALID_OPCODE, Field::Opcode));
        }
        if sqe.fuse() != Fuse::NORMAL {
            return Err(invalid(Field::Flags));
        }
        if sqe.psdt() != Psdt::PRP {
            return Err(Refusal::at(Status::INVALID_FIELD, Field::Flags, 6));
        }
        if self.wait_for_move(opcode, sqe) {
            return Ok(Done::Later);
        }
        match opcode {
            AdminOpcode::IDENTIFY => self.identify(sqe),
            AdminOpcode::GET_LOG_PAGE => self.get_log_page(sqe),
            AdminOpcode::GET_FEATURES => self.get_features(sqe),
            AdminOpcode::SET_FEATURES => self.set_features(sqe),
            AdminOpcode::CREATE_IO_CQ => self.create_cq(sqe),
            AdminOpcode::CREATE_IO_SQ => self.create_sq(sqe),
            AdminOpcode::DELETE_IO_CQ => self.delete_cq(sqe),
            AdminOpcode::DELETE_IO_SQ => self.delete_sq(sqe),
            AdminOpcode::ABORT => self.abort(sqe),
            AdminOpcode::ASYNC_EVENT_REQUEST => match self.events.request(sqe.cid) {
                true => Ok(Done::Parked),
                false => Err(Status::AER_LIMIT_EXCEEDED.into()),
            },
            _ => self.doorbell_buffer_config(sqe),
        }
    }

    /// What the guest is told of the controller. A guest that has the interrupt pin rings by registers (see [`super::Controller::use_pin`]).
    fn info(&self) -> Cow<'_, Info> {
        let info = &self.shared.info;
        match info.doorbell_buffer && self.shared.pin.is_used() {
            false => Cow::Borrowed(info),
            true => Cow::Owned(Info {
                doorbell_buffer: false,
                ..info.clone()
            }),
        }
    }

    fn identify(&mut self, sqe: &Sqe) -> Result<Done, Refusal> {
        let store = |at: usize| self.namespaces.get(at).map(|ns| &ns.backend);
        let used = |at| store(at).map(|store| store.allocated_blocks());
        let data = identify::identify(&self.info(), used, &Identify::from_sqe(sqe))?;
        data::to_guest(&self.map, sqe, &data, 4096)?;
        Ok(Done::Now(0))
    }

    fn get_log_page(&mut self, sqe: &Sqe) -> Result<Done, Refusal> {
        // Failures reported before this command was fetched belong into its answer.
        self.collect_failures();
        let command = GetLogPage::from_sqe(sqe);
        let ssds = SsdHealth::of(&self.namespaces);
        let sources = log::Sources {
            info: &self.shared.info,
            errors: &self.errors,
            health: &self.health,
            warning: self.features.warning(ssds.temperature(None)),
            ssds: &ssds,
            changed: &self.changed,
        };
        let data = log::read(&sources, &command)?;
        let len = u32::try_from(command.byte_len()).unwrap_or(u32::MAX);
        data::to_guest(&self.map, sqe, &data, len)?;
        if !command.rae {
            self.events.log_read(command.lid);
            if command.lid == LogId::CHANGED_NAMESPACES {
                self.changed.clear();
            }
        }
        Ok(Done::Now(0))
    }

    fn get_features(&mut self, sqe: &Sqe) -> Result<Done, Refusal> {
        let command = GetFeatures::from_sqe(sqe);
        let got = self
            .features
            .get(&self.shared.info, self.events.config, &command)?;
        if let Ok(len @ 1..) = u32::try_from(got.data.len()) {
            data::to_guest(&self.map, sqe, &got.data, len)?;
        }
        Ok(Done::Now(got.dw0))
    }

    fn set_features(&mut self, sqe: &Sqe) -> Result<Done, Refusal> {
        let command = SetFeatures::from_sqe(sqe);
        let data = match command.fid {
            _ if command.sv => Vec::new(),
            FeatureId::TIMESTAMP => {
                data::from_guest::<{ size_of::<Timestamp>() }>(&self.map, sqe)?.to_vec()
            }
            FeatureId::HOST_BEHAVIOR => data::from_guest::<512>(&self.map, sqe)?.to_vec(),
            _ => Vec::new(),
        };
        let queues = !self.queues.is_empty();
        let info = &self.shared.info;
        let dw0 = self
            .features
            .set(info, &mut self.events.config, &command, &data, queues)?;
        if matches!(
            command.fid,
            FeatureId::INTERRUPT_COALESCING | FeatureId::INTERRUPT_VECTOR_CONFIG
        ) {
            self.set_coalescing();
        }
        let temperature = || SsdHealth::of(&self.namespaces).temperature(None);
        if matches!(
            command.fid,
            FeatureId::TEMPERATURE_THRESHOLD | FeatureId::ASYNC_EVENT_CONFIG
        ) && self.features.warning(temperature()).temperature()
        {
            self.events.raise(AsyncEvent::TEMPERATURE_THRESHOLD);
        }
        Ok(Done::Now(dw0))
    }

    /// Tell pollers, by way of the vectors, how the guest wants its interrupts.
    pub(super) fn set_coalescing(&self) {
        for (i, vector) in self.shared.vectors.iter().enumerate() {
            vector.set_coalescing(self.features.coalescing(i));
        }
    }

    fn abort(&mut self, sqe: &Sqe) -> Result<Done, Refusal> {
        let Abort { sqid, cid } = Abort::from_sqe(sqe);
        if sqid == 0 {
            return Ok(Done::Now(self.abort_admin(cid)));
        }
        let Some(sq) = self.queues.sq(sqid) else {
            return Err(invalid(Field::Cdw10));
        };
        if self.pending.aborts() >= ABORT_LIMIT {
            return Err(Status::ABORT_LIMIT_EXCEEDED.into());
        }
        let poller = sq.poller;
        let token = self.begin(sqe, poller, AdminKind::Abort);
        let key = self.key;
        let message = Message::Abort {
            token,
            key,
            sqid,
            cid,
        };
        self.tell(poller, message);
        Ok(Done::Later)
    }

    /// Abort an admin command: one that waits for an event is completed here. Those that wait for pollers end by themselves, soon, and
    /// half of what they do is done: they are not aborted.
    fn abort_admin(&mut self, cid: u16) -> u32 {
        let Some(queue) = &mut self.admin else {
            return Abort::NOT_ABORTED;
        };
        // Its completion needs room beside that of the Abort.
        if !queue.unpark() {
            return Abort::NOT_ABORTED;
        }
        if !self.events.cancel(cid) {
            queue.park();
            return Abort::NOT_ABORTED;
        }
        queue.complete(cid, 0, Status::ABORT_REQUESTED, false);
        Abort::ABORTED
    }

    /// A token for one message of an admin command that waits for this poller's answer.
    fn begin(&mut self, sqe: &Sqe, poller: usize, kind: AdminKind) -> u64 {
        let cid = sqe.cid;
        let work = Work::Admin(AdminWork { cid, kind });
        self.pending.begin(vec![poller], work)
    }

    /// A poller has answered.
    pub(super) fn answered(&mut self, poller: usize, reply: &Reply) {
        if let Some((work, result)) = self.pending.answer(poller, reply) {
            self.end(work, result);
        }
    }

    fn end(&mut self, work: Work, result: Result<bool, Status>) {
        match work {
            Work::Drain => self.finish_drain(),
            Work::Move(number) => self.go_on_moving(number, result),
            Work::Memory { .. } | Work::Nothing => {}
            Work::Resume => {
                if let Err(status) = result {
                    self.fail(&format!("a poller did not take a queue: {status}"));
                }
            }
            Work::Attach(poller) => {
                if let Err(status) = result {
                    self.refused_by(poller, status);
                }
            }
            Work::Admin(AdminWork { cid, kind }) => {
                self.settle(kind, result.is_ok());
                if let Err(status) = result {
                    let location = ErrorLogEntry::NO_LOCATION;
                    self.note(cid, 0, Refusal { status, location });
                }
                let dw0 = match (kind, result) {
                    (AdminKind::Abort, Ok(false)) => Abort::NOT_ABORTED,
                    _ => 0,
                };
                self.complete(cid, dw0, result.map(|_| ()));
            }
        }
    }

    /// A poller cannot serve this controller. What was sent to it after that is not answered: end it here.
    fn refused_by(&mut self, poller: usize, status: Status) {
        let controller = self.shared.info.name.as_str();
        tracing::error!(controller, poller, "poller cannot serve: {status}");
        if let Some(attached) = self.attached.get_mut(poller) {
            *attached = false;
        }
        self.watcher = self.watcher.filter(|watcher| *watcher != poller);
        for (work, result) in self.pending.lost(poller) {
            self.end(work, result);
        }
    }
}
