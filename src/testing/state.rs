//! A [`Model`](super::Model) from the inside: its queues, admin commands, and what it does wrong.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use nvme_spec::admin::{
    Abort, CreateIoCq, CreateIoSq, DeleteQueue, GetLogPage, Identify, SetFeatures,
};
use nvme_spec::doorbell::Doorbell as Which;
use nvme_spec::event::AsyncEvent;
use nvme_spec::feature::FeatureId;
use nvme_spec::identify::{
    Cns, IdentifyController, IdentifyNamespace, NamespaceList, NvmControllerIdentify, Oncs, ascii,
};
use nvme_spec::log::{ChangedNamespaceList, CriticalWarning, ErrorLogEntry, LogId, SmartLog};
use nvme_spec::opcode::AdminOpcode;
use nvme_spec::regs::{Aqa, Cc, Csts, Shn, Shst};
use nvme_spec::ring::{Phase, RingSize};
use nvme_spec::{Cqe, Sqe, Status, StatusField};
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::disk::{Disk, transfer};
use super::mischief::{Act, Mischief, Random};
use super::model::{Core, ModelOptions};
use super::space::FakeSpace;
use crate::memory::Ring;

/// A submission queue with its completion queue.
pub(super) struct Queue {
    sq: Ring<8>,
    cq: Ring<2>,
    sq_size: RingSize,
    cq_size: RingSize,
    sq_head: u16,
    cq_tail: u16,
    phase: Phase,
    vector: Option<u16>,
}

impl Queue {
    fn new(space: &FakeSpace, cq: &CreateIoCq, sq: &CreateIoSq) -> Result<Self, Status> {
        let size = |z| RingSize::from_z(z).ok_or(Status::INVALID_QUEUE_SIZE);
        let (sq_size, cq_size) = (size(sq.qsize_z)?, size(cq.qsize_z)?);
        let no_memory = Status::INVALID_PRP_OFFSET;
        Ok(Self {
            sq: Ring::new(&space.readable(), sq.prp1, sq_size.get()).ok_or(no_memory)?,
            cq: Ring::new(&space.writable(), cq.prp1, cq_size.get()).ok_or(no_memory)?,
            sq_size,
            cq_size,
            sq_head: 0,
            cq_tail: 0,
            phase: Phase::FIRST,
            vector: cq.ien.then_some(cq.iv),
        })
    }

    /// The next command, if the tail is not reached.
    fn next(&mut self, tail: u32) -> Option<Sqe> {
        if u32::from(self.sq_head) == tail || !self.sq_size.is_valid_index(tail) {
            return None;
        }
        let words = self.sq.read(u32::from(self.sq_head));
        self.sq_head = self.sq_size.next(self.sq_head);
        Sqe::read_from_bytes(words.as_bytes()).ok()
    }

    fn post(&mut self, mut cqe: Cqe) {
        cqe.status.set_p(self.phase.bit());
        self.cq.write(u32::from(self.cq_tail), cqe.to_halves());
        (self.cq_tail, self.phase) = self.cq_size.next_with_phase(self.cq_tail, self.phase);
    }

    /// Complete all commands up to the tail with success, looking at nothing but their identifiers.
    #[inline]
    pub(super) fn complete_all(&mut self, qid: u16, tail: u32) {
        while u32::from(self.sq_head) != tail && self.sq_size.is_valid_index(tail) {
            let [first, ..] = self.sq.read(u32::from(self.sq_head));
            self.sq_head = self.sq_size.next(self.sq_head);
            self.post(Cqe {
                sqhd: self.sq_head,
                sqid: qid,
                cid: (first >> 16) as u16,
                ..Cqe::default()
            });
        }
    }
}

/// All of the SSD that changes.
pub(super) struct State {
    pub(super) cc: Cc,
    cfs: bool,
    ready: bool,
    shut_down: bool,
    /// A shutdown has begun, and does not end.
    shutting_down: bool,
    pub(super) aqa: u32,
    pub(super) asq: u64,
    pub(super) acq: u64,
    pub(super) queues: HashMap<u16, Queue>,
    cqs: HashMap<u16, CreateIoCq>,
    /// Doorbells that were given out, and how often each was written.
    pub(super) bells: Vec<(Which, Arc<AtomicU64>)>,
    disks: Vec<Disk>,
    /// What it says of them.
    pub(super) namespaces: Vec<IdentifyNamespace>,
    events: Vec<u16>,
    /// Commands that are not answered yet: queue, command, whether an Abort ends them, and in how many rounds they are done.
    held: Vec<(u16, Sqe, bool, Option<u32>)>,
    pub(super) mischief: Mischief,
    random: Random,
    pub(super) serial: String,
    pub(super) gone: bool,
    pub(super) never_ready: bool,
    pub(super) never_stops: bool,
    pub(super) never_shuts_down: bool,
    pub(super) refuses_deletion: bool,
    pub(super) isolated: bool,
    /// Letting go of it takes until this is taken back.
    pub(super) held_open: bool,
    pub(super) closed: bool,
    pub(super) smart: SmartLog,
    /// How often that was read.
    pub(super) smart_reads: u32,
    /// I/O commands by opcode.
    pub(super) counts: [u32; 256],
    pub(super) enables: u32,
    pub(super) shutdowns: u32,
    pub(super) hard_resets: u32,
}

/// Identify Namespace of a model.
pub(super) fn identify_namespace(options: &ModelOptions) -> IdentifyNamespace {
    let mut id = IdentifyNamespace {
        nsze: options.blocks,
        ncap: options.blocks,
        nuse: options.blocks,
        noiob: options.noiob,
        ..IdentifyNamespace::default()
    };
    id.dlfeat = id
        .dlfeat
        .with_read(nvme_spec::identify::DeallocatedRead::ZEROES);
    if let Some(format) = id.lbaf.first_mut() {
        format.lbads = options.block_shift as u8;
    }
    id
}

impl State {
    pub(super) fn new(options: &ModelOptions) -> Self {
        // An instant SSD has no data: it may be of any size.
        let blocks = if options.instant { 0 } else { options.blocks };
        Self {
            cc: Cc::new(),
            cfs: false,
            ready: false,
            shut_down: false,
            shutting_down: false,
            aqa: 0,
            asq: 0,
            acq: 0,
            queues: HashMap::new(),
            cqs: HashMap::new(),
            bells: Vec::new(),
            disks: (0..options.namespaces)
                .map(|_| Disk::new(blocks, options.block_shift))
                .collect(),
            namespaces: vec![identify_namespace(options); options.namespaces as usize],
            events: Vec::new(),
            held: Vec::new(),
            mischief: options.mischief.clone(),
            random: Random(options.seed),
            serial: "MODEL1".into(),
            gone: false,
            never_ready: false,
            never_stops: false,
            never_shuts_down: false,
            refuses_deletion: false,
            isolated: false,
            held_open: false,
            closed: false,
            smart: SmartLog {
                critical_warning: CriticalWarning::new().with_temperature(true),
                ..SmartLog::default()
            },
            smart_reads: 0,
            counts: [0; 256],
            enables: 0,
            shutdowns: 0,
            hard_resets: 0,
        }
    }

    pub(super) fn csts(&self) -> Csts {
        let shst = match (self.shut_down, self.shutting_down) {
            (true, _) => Shst::COMPLETE,
            (false, true) => Shst::OCCURRING,
            (false, false) => Shst::NORMAL,
        };
        Csts::new()
            .with_rdy(self.ready)
            .with_cfs(self.cfs)
            .with_shst(shst)
    }

    pub(super) fn fill(&mut self, nsid: u32, byte: u8) {
        if let Some(disk) = self.disks.get_mut((nsid as usize).wrapping_sub(1)) {
            disk.fill(byte);
        }
    }

    pub(super) fn bytes(&self, nsid: u32) -> Vec<u8> {
        let disk = self.disks.get((nsid as usize).wrapping_sub(1));
        disk.map_or_else(Vec::new, |d| d.bytes().to_vec())
    }

    pub(super) fn set_cc(&mut self, core: &Core, cc: Cc) {
        let was = std::mem::replace(&mut self.cc, cc);
        if cc.en() && !was.en() {
            self.enables += 1;
            if self.never_ready {
                return;
            }
            let aqa = Aqa::from_bits(self.aqa);
            let cq = CreateIoCq {
                prp1: self.acq,
                qsize_z: aqa.acqs_z(),
                ien: true,
                ..CreateIoCq::default()
            };
            let sq = CreateIoSq {
                prp1: self.asq,
                qsize_z: aqa.asqs_z(),
                ..CreateIoSq::default()
            };
            match Queue::new(&core.space, &cq, &sq) {
                Ok(queue) => {
                    self.queues.insert(0, queue);
                    self.ready = true;
                }
                Err(_) => self.cfs = true,
            }
        } else if !cc.en() && was.en() && !self.never_stops {
            self.disabled();
        }
        if cc.shn() != Shn::NONE && was.shn() == Shn::NONE {
            self.shutdowns += 1;
            self.shutting_down = self.never_shuts_down;
            self.shut_down = !self.never_shuts_down;
        }
    }

    fn disabled(&mut self) {
        (self.ready, self.cfs) = (false, false);
        (self.shut_down, self.shutting_down) = (false, false);
        self.queues.clear();
        self.cqs.clear();
        self.events.clear();
        self.held.clear();
    }

    pub(super) fn hard_reset(&mut self) {
        self.hard_resets += 1;
        self.cc = Cc::new();
        self.never_stops = false;
        self.disabled();
    }

    /// Commands up to `tail`.
    pub(super) fn fetch(&mut self, core: &Core, qid: u16, tail: u32) {
        if self.gone || self.isolated || !self.ready {
            return;
        }
        while let Some(sqe) = self.queues.get_mut(&qid).and_then(|q| q.next(tail)) {
            let fate = match qid {
                0 if !self.mischief.admin => None,
                _ => self.mischief.fate(self.random.next()),
            };
            match fate {
                Some(Act::Stall) => self.held.push((qid, sqe, true, None)),
                Some(Act::Deaf) => self.held.push((qid, sqe, false, None)),
                Some(Act::Late) => {
                    let rounds = (self.random.next() % 20) as u32;
                    self.held.push((qid, sqe, true, Some(rounds)));
                }
                fate => self.execute(core, qid, &sqe, fate),
            }
            if self.gone || !self.ready {
                return;
            }
        }
    }

    /// Some of what was held up is done now.
    pub(super) fn answer_late(&mut self, core: &Core) {
        let held = std::mem::take(&mut self.held);
        for (qid, sqe, abortable, rounds) in held {
            match rounds {
                Some(0) => self.execute(core, qid, &sqe, None),
                rounds => {
                    let rounds = rounds.map(|n| n - 1);
                    self.held.push((qid, sqe, abortable, rounds));
                }
            }
        }
    }

    fn execute(&mut self, core: &Core, qid: u16, sqe: &Sqe, fate: Option<Act>) {
        match fate {
            Some(Act::Fatal) => {
                self.cfs = true;
                return;
            }
            Some(Act::Disable) => {
                self.cc.set_en(false);
                return self.disabled();
            }
            Some(Act::Vanish) => {
                self.gone = true;
                return;
            }
            _ => {}
        }
        let answer = match qid {
            0 if self.mischief.garbage => self.garbage(core, sqe),
            0 => self.admin(core, sqe),
            _ => Some((self.io(core, sqe), 0)),
        };
        let Some((result, dw0)) = answer else { return };
        let status = result.err().unwrap_or(Status::SUCCESS);
        let field = match fate {
            Some(Act::AnyStatus) => StatusField::from_bits(self.random.next() as u16),
            _ => StatusField::from_status(status),
        };
        self.answer(core, qid, sqe.cid, field, dw0, fate);
    }

    fn answer(
        &mut self,
        core: &Core,
        qid: u16,
        cid: u16,
        status: StatusField,
        dw0: u32,
        fate: Option<Act>,
    ) {
        let random = self.random.next();
        let Some(queue) = self.queues.get_mut(&qid) else {
            return;
        };
        let good = Cqe {
            dw0,
            dw1: 0,
            sqhd: queue.sq_head,
            sqid: qid,
            cid,
            status,
        };
        let bad = match fate {
            Some(Act::Twice) => Some(good),
            Some(Act::UnknownTag) => Some(Cqe {
                // Of another life of its slot, far away.
                cid: good.cid ^ 0x8000,
                ..good
            }),
            Some(Act::OtherQueue) => Some(Cqe {
                sqid: qid.wrapping_add(1 + random as u16 % 100),
                ..good
            }),
            Some(Act::BadHead) => Some(Cqe {
                sqhd: queue
                    .sq_size
                    .size_z()
                    .saturating_add(1 + random as u16 % 100),
                ..good
            }),
            _ => None,
        };
        match (fate, bad) {
            (Some(Act::Twice | Act::UnknownTag), Some(bad)) => {
                queue.post(bad);
                queue.post(good);
            }
            (Some(Act::OddHead), None) => queue.post(Cqe {
                sqhd: (random % u64::from(queue.sq_size.get())) as u16,
                ..good
            }),
            (_, Some(bad)) => queue.post(bad),
            (Some(Act::WrongPhase), None) => {
                // Nobody sees it, and it takes no place.
                let mut stale = good;
                stale.status.set_p(!queue.phase.bit());
                queue.cq.write(u32::from(queue.cq_tail), stale.to_halves());
            }
            (_, None) => queue.post(good),
        }
        if let Some(vector) = queue.vector {
            core.interrupt(vector);
        }
    }

    pub(super) fn report(&mut self, core: &Core, event: AsyncEvent) -> bool {
        let Some(cid) = self.events.pop() else {
            return false;
        };
        let status = StatusField::from_status(Status::SUCCESS);
        self.answer(core, 0, cid, status, event.to_dw0(), None);
        true
    }

    fn io(&mut self, core: &Core, sqe: &Sqe) -> Result<(), Status> {
        let index = (sqe.nsid as usize).wrapping_sub(1);
        let disk = self
            .disks
            .get_mut(index)
            .ok_or(Status::INVALID_NAMESPACE_OR_FORMAT)?;
        if let Some(count) = self.counts.get_mut(usize::from(sqe.opcode)) {
            *count += 1;
        }
        disk.command(&core.space, sqe, &core.options)
    }

    fn admin(&mut self, core: &Core, sqe: &Sqe) -> Option<(Result<(), Status>, u32)> {
        let result = match AdminOpcode(sqe.opcode) {
            AdminOpcode::IDENTIFY => self.identify(core, sqe),
            AdminOpcode::GET_LOG_PAGE => self.log_page(core, sqe),
            AdminOpcode::CREATE_IO_CQ => {
                let cq = CreateIoCq::from_sqe(sqe);
                match cq.qid {
                    1.. if cq.qid <= core.options.queue_pairs => {
                        self.cqs.insert(cq.qid, cq);
                        Ok(())
                    }
                    _ => Err(Status::INVALID_QUEUE_ID),
                }
            }
            AdminOpcode::CREATE_IO_SQ => {
                let sq = CreateIoSq::from_sqe(sqe);
                match self.cqs.get(&sq.cqid) {
                    Some(cq) if !self.queues.contains_key(&sq.qid) => {
                        Queue::new(&core.space, cq, &sq).map(|queue| {
                            self.queues.insert(sq.qid, queue);
                        })
                    }
                    _ => Err(Status::COMPLETION_QUEUE_INVALID),
                }
            }
            AdminOpcode::DELETE_IO_SQ if self.refuses_deletion => Err(Status::INTERNAL_ERROR),
            AdminOpcode::DELETE_IO_SQ => {
                let qid = DeleteQueue::from_sqe(sqe).qid;
                self.held.retain(|h| h.0 != qid);
                self.queues.remove(&qid);
                Ok(())
            }
            AdminOpcode::DELETE_IO_CQ => {
                self.cqs.remove(&DeleteQueue::from_sqe(sqe).qid);
                Ok(())
            }
            AdminOpcode::ABORT => {
                let abort = Abort::from_sqe(sqe);
                let found = self.held.iter().position(|(qid, sqe, can, _)| {
                    *can && (*qid, sqe.cid) == (abort.sqid, abort.cid)
                });
                if let Some(at) = found {
                    let (qid, held, ..) = self.held.swap_remove(at);
                    let status = StatusField::from_status(Status::ABORT_REQUESTED);
                    self.answer(core, qid, held.cid, status, 0, None);
                }
                return Some((Ok(()), u32::from(found.is_none())));
            }
            AdminOpcode::SET_FEATURES => {
                let n = u32::from(core.options.queue_pairs.max(1)) - 1;
                return Some(match SetFeatures::from_sqe(sqe).fid {
                    FeatureId::NUMBER_OF_QUEUES => (Ok(()), n | n << 16),
                    FeatureId::ASYNC_EVENT_CONFIG => (Ok(()), 0),
                    _ => (Err(Status::INVALID_FIELD), 0),
                });
            }
            AdminOpcode::ASYNC_EVENT_REQUEST => {
                self.events.push(sqe.cid);
                return None;
            }
            _ => Err(Status::INVALID_OPCODE),
        };
        Some((result, 0))
    }

    /// As [`Self::admin`], but what is told is noise.
    fn garbage(&mut self, core: &Core, sqe: &Sqe) -> Option<(Result<(), Status>, u32)> {
        let (result, _) = self.admin(core, sqe)?;
        let tells = [AdminOpcode::IDENTIFY, AdminOpcode::GET_LOG_PAGE];
        if tells.contains(&AdminOpcode(sqe.opcode)) && !self.random.next().is_multiple_of(4) {
            let noise: Vec<u8> = (0..512)
                .flat_map(|_| self.random.next().to_le_bytes())
                .collect();
            let len = match AdminOpcode(sqe.opcode) {
                AdminOpcode::IDENTIFY => 4096,
                _ => (GetLogPage::from_sqe(sqe).numd_z.min(1023) + 1) * 4,
            };
            let _ = transfer(&core.space, sqe, len, |s, at| {
                core.space.write(s.addr, &noise[at..at + s.len as usize])
            });
        }
        Some((result, self.random.next() as u32))
    }

    fn identify(&self, core: &Core, sqe: &Sqe) -> Result<(), Status> {
        let command = Identify::from_sqe(sqe);
        let send = |bytes: &[u8]| {
            transfer(&core.space, sqe, bytes.len() as u32, |s, at| {
                core.space.write(s.addr, &bytes[at..at + s.len as usize])
            })
        };
        match command.cns {
            Cns::CONTROLLER => {
                let mut id = IdentifyController {
                    vid: 0x1234,
                    sn: ascii(&self.serial),
                    mn: ascii("A model of an SSD"),
                    mdts: core.options.mdts,
                    acl_z: 3,
                    aerl_z: 3,
                    elpe_z: 3,
                    nn: core.options.namespaces,
                    oncs: Oncs::new()
                        .with_compare(true)
                        .with_dataset_management(true)
                        .with_write_zeroes(true)
                        .with_verify(true),
                    ..IdentifyController::default()
                };
                id.oaes.set_namespace_attribute(true);
                id.vwc.set_present(core.options.volatile_write_cache);
                send(id.as_bytes())
            }
            Cns::ACTIVE_NAMESPACES => {
                let list = NamespaceList::from_ids(command.nsid, 1..=core.options.namespaces);
                send(list.as_bytes())
            }
            Cns::CSI_CONTROLLER => {
                let limits = NvmControllerIdentify {
                    dmrl: core.options.dmrl,
                    dmrsl: core.options.dmrsl,
                    dmsl: core.options.dmsl,
                    ..NvmControllerIdentify::default()
                };
                send(limits.as_bytes())
            }
            Cns::NAMESPACE => {
                let index = (command.nsid as usize).wrapping_sub(1);
                match self.namespaces.get(index) {
                    Some(namespace) => send(namespace.as_bytes()),
                    None => Err(Status::INVALID_NAMESPACE_OR_FORMAT),
                }
            }
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn log_page(&mut self, core: &Core, sqe: &Sqe) -> Result<(), Status> {
        let command = GetLogPage::from_sqe(sqe);
        let mut page = match command.lid {
            LogId::SMART => {
                self.smart_reads += 1;
                self.smart.as_bytes().to_vec()
            }
            LogId::ERROR => {
                let entry = ErrorLogEntry {
                    error_count: 7,
                    ..ErrorLogEntry::default()
                };
                entry.as_bytes().to_vec()
            }
            LogId::CHANGED_NAMESPACES => ChangedNamespaceList::from_ids([1]).as_bytes().to_vec(),
            _ => return Err(Status::INVALID_LOG_PAGE),
        };
        let len = (command.numd_z.min(0xFFFF) + 1) * 4;
        page.resize((command.offset as usize + len as usize).max(page.len()), 0);
        let page = &page[command.offset as usize..];
        transfer(&core.space, sqe, len, |s, at| {
            core.space.write(s.addr, &page[at..at + s.len as usize])
        })
    }
}
