//! A small NVMe device in process, honest or hostile, for the driver's unit tests.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use nvme_spec::admin::{CreateIoCq, CreateIoSq, DoorbellBufferConfig, Identify};
use nvme_spec::doorbell::{Doorbell as Which, DoorbellStride};
use nvme_spec::event::AsyncEvent;
use nvme_spec::identify::{Cns, IdentifyController};
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::{AdminOpcode, NvmOpcode};
use nvme_spec::prp::{PageSize, ReadList, walk};
use nvme_spec::regs::{Cap, Cc, Csts, Shn, Shst, css, offset};
use nvme_spec::ring::{Phase, RingSize};
use nvme_spec::{Cqe, Sqe, Status, StatusField};
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::dma::{DmaPool, Mapping, shared_memory};
use super::*;
use crate::memory::{GuestMap, Ring, SharedWord};

/// What is wrong with the device.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) enum Wrong {
    #[default]
    Nothing,
    NeverReady,
    Fatal,
    Gone,
    Silent,
    CompletesTwice,
    UnknownTag,
    OtherQueue,
    BadHead,
}

struct Queue {
    sq: Ring<8>,
    cq: Ring<2>,
    sq_size: RingSize,
    cq_size: RingSize,
    sq_head: u16,
    cq_tail: u16,
    phase: Phase,
    shadow: Option<SharedWord>,
}

pub(super) struct State {
    pub(super) wrong: Wrong,
    pub(super) cc: Cc,
    pub(super) csts: Csts,
    pub(super) writes: Vec<(u32, u64)>,
    aqa: u32,
    asq: u64,
    acq: u64,
    map: Arc<GuestMap>,
    queues: HashMap<u16, Queue>,
    cqs: HashMap<u16, CreateIoCq>,
    disk: Vec<u8>,
    aers: Vec<u16>,
    pub(super) shadow: Option<DoorbellBufferConfig>,
    pub(super) rings: u64,
}

#[derive(Clone)]
pub(super) struct Fake {
    pub(super) state: Arc<Mutex<State>>,
    pool: Arc<DmaPool>,
}

const STRIDE: DoorbellStride = DoorbellStride::PACKED;
pub(super) const BLOCKS: u64 = 4096;

impl Fake {
    pub(super) fn new(wrong: Wrong) -> Self {
        let file = shared_memory("fake", 32 << 20).unwrap();
        let region = Mapping::map(&file, 0, 32 << 20, 0x4000_0000).unwrap();
        let pool = DmaPool::new(region).unwrap();
        Self {
            state: Arc::new(Mutex::new(State {
                wrong,
                cc: Cc::new(),
                csts: Csts::new(),
                writes: Vec::new(),
                aqa: 0,
                asq: 0,
                acq: 0,
                map: Arc::clone(pool.map()),
                queues: HashMap::new(),
                cqs: HashMap::new(),
                disk: vec![0; (BLOCKS * 512) as usize],
                aers: Vec::new(),
                shadow: None,
                rings: 0,
            })),
            pool,
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

pub(super) struct FakeBell {
    state: Arc<Mutex<State>>,
    which: Which,
}

impl Doorbell for FakeBell {
    fn ring(&self, value: u32) {
        let mut state = self.state.lock().unwrap();
        state.rings += 1;
        if let Which::Sq(qid) = self.which {
            state.fetch(qid, value);
        }
    }
}

impl Device for Fake {
    type Bell = FakeBell;

    fn read32(&mut self, at: u32) -> io::Result<u32> {
        let state = self.lock();
        Ok(match (state.wrong, at) {
            (Wrong::Gone, _) => u32::MAX,
            (_, offset::CC) => state.cc.into_bits(),
            (_, offset::CSTS) => state.csts.into_bits(),
            (_, offset::VS) => 0x0002_0000,
            _ => 0,
        })
    }

    fn read64(&mut self, at: u32) -> io::Result<u64> {
        if self.lock().wrong == Wrong::Gone {
            return Ok(u64::MAX);
        }
        Ok(match at {
            offset::CAP => Cap::new()
                .with_mqes_z(255)
                .with_to(1)
                .with_css(css::NVM)
                .into_bits(),
            _ => 0,
        })
    }

    fn write32(&mut self, at: u32, value: u32) -> io::Result<()> {
        let mut state = self.lock();
        state.writes.push((at, u64::from(value)));
        match at {
            offset::CC => state.set_cc(Cc::from_bits(value)),
            offset::AQA => state.aqa = value,
            _ => {}
        }
        Ok(())
    }

    fn write64(&mut self, at: u32, value: u64) -> io::Result<()> {
        let mut state = self.lock();
        state.writes.push((at, value));
        match at {
            offset::ASQ => state.asq = value,
            offset::ACQ => state.acq = value,
            _ => {}
        }
        Ok(())
    }

    fn doorbell(&mut self, at: u64) -> io::Result<FakeBell> {
        Ok(FakeBell {
            state: Arc::clone(&self.state),
            which: STRIDE.decode(at).ok_or(io::ErrorKind::InvalidInput)?,
        })
    }

    fn allocate(&mut self, bytes: usize, _: Access) -> io::Result<Dma> {
        self.pool.allocate(bytes)
    }

    fn interrupt(&mut self, _: u16) -> io::Result<Option<File>> {
        Ok(None)
    }
}

struct Lists<'a>(&'a GuestMap);

impl ReadList for Lists<'_> {
    fn read(&mut self, addr: u64, entries: &mut [u64]) -> Result<(), Status> {
        if self.0.read(addr, entries.as_mut_bytes()) {
            Ok(())
        } else {
            Err(Status::DATA_TRANSFER_ERROR)
        }
    }
}

impl State {
    fn set_cc(&mut self, cc: Cc) {
        let was = std::mem::replace(&mut self.cc, cc);
        if cc.en() && !was.en() {
            match self.wrong {
                Wrong::NeverReady => return,
                Wrong::Fatal => self.csts = Csts::new().with_cfs(true),
                _ => self.csts = Csts::new().with_rdy(true),
            }
            let aqa = nvme_spec::regs::Aqa::from_bits(self.aqa);
            let (asq, acq) = (self.asq, self.acq);
            self.add_queue(0, asq, acq, aqa.asqs_z(), aqa.acqs_z());
        } else if !cc.en() && was.en() {
            self.csts = Csts::new();
            self.queues.clear();
            self.cqs.clear();
            self.shadow = None;
            self.aers.clear();
        }
        if cc.shn() != Shn::NONE {
            self.csts.set_shst(Shst::COMPLETE);
        }
    }

    fn add_queue(&mut self, qid: u16, sq: u64, cq: u64, sq_z: u16, cq_z: u16) {
        let (sq_size, cq_size) = (
            RingSize::from_z(sq_z).unwrap(),
            RingSize::from_z(cq_z).unwrap(),
        );
        let shadow = self.shadow.filter(|_| qid != 0).map(|s| {
            SharedWord::in_guest(&self.map, s.shadow + STRIDE.shadow_offset(Which::Sq(qid)))
                .unwrap()
        });
        let queue = Queue {
            sq: Ring::new(&self.map, sq, sq_size.get()).unwrap(),
            cq: Ring::new(&self.map, cq, cq_size.get()).unwrap(),
            sq_size,
            cq_size,
            sq_head: 0,
            cq_tail: 0,
            phase: Phase::FIRST,
            shadow,
        };
        self.queues.insert(qid, queue);
    }

    fn fetch(&mut self, qid: u16, value: u32) {
        let Some(queue) = self.queues.get_mut(&qid) else {
            return;
        };
        let tail = queue.shadow.as_ref().map_or(value, SharedWord::load);
        let mut commands = Vec::new();
        while u32::from(queue.sq_head) != tail {
            let words = queue.sq.read(u32::from(queue.sq_head));
            commands.push(Sqe::read_from_bytes(words.as_bytes()).unwrap());
            queue.sq_head = queue.sq_size.next(queue.sq_head);
        }
        for sqe in commands {
            let answer = match qid {
                0 => self.admin(&sqe),
                _ => Some((self.io(&sqe), 0)),
            };
            if let Some((status, dw0)) = answer {
                self.post(qid, sqe.cid, status, dw0);
            }
        }
    }

    fn post(&mut self, qid: u16, cid: u16, status: Status, dw0: u32) {
        let wrong = if qid == 0 { Wrong::Nothing } else { self.wrong };
        let queue = self.queues.get_mut(&qid).unwrap();
        let mut cqe = Cqe {
            dw0,
            dw1: 0,
            sqhd: queue.sq_head,
            sqid: qid,
            cid,
            status: StatusField::from_status(status),
        };
        match wrong {
            Wrong::Silent => return,
            Wrong::UnknownTag => cqe.cid |= 0x3F,
            Wrong::OtherQueue => cqe.sqid = 77,
            Wrong::BadHead => cqe.sqhd = 60_000,
            _ => {}
        }
        for _ in 0..if wrong == Wrong::CompletesTwice { 2 } else { 1 } {
            cqe.status.set_p(queue.phase.bit());
            queue.cq.write(u32::from(queue.cq_tail), cqe.to_halves());
            (queue.cq_tail, queue.phase) =
                queue.cq_size.next_with_phase(queue.cq_tail, queue.phase);
        }
    }

    pub(super) fn event(&mut self, event: AsyncEvent) {
        let cid = self.aers.pop().unwrap();
        self.post(0, cid, Status::SUCCESS, event.to_dw0());
    }

    fn admin(&mut self, sqe: &Sqe) -> Option<(Status, u32)> {
        match AdminOpcode(sqe.opcode) {
            AdminOpcode::IDENTIFY if Identify::from_sqe(sqe).cns == Cns::CONTROLLER => {
                let id = IdentifyController {
                    mdts: 5,
                    aerl_z: 1,
                    nn: 1,
                    ..IdentifyController::default()
                };
                assert!(self.map.write(sqe.prp1, id.as_bytes()));
            }
            AdminOpcode::CREATE_IO_CQ => {
                let cq = CreateIoCq::from_sqe(sqe);
                self.cqs.insert(cq.qid, cq);
            }
            AdminOpcode::CREATE_IO_SQ => {
                let sq = CreateIoSq::from_sqe(sqe);
                let Some(cq) = self.cqs.get(&sq.cqid).copied() else {
                    return Some((Status::COMPLETION_QUEUE_INVALID, 0));
                };
                self.add_queue(sq.qid, sq.prp1, cq.prp1, sq.qsize_z, cq.qsize_z);
            }
            AdminOpcode::DELETE_IO_SQ | AdminOpcode::DELETE_IO_CQ => {}
            AdminOpcode::ABORT => return Some((Status::SUCCESS, 1)),
            AdminOpcode::SET_FEATURES => return Some((Status::SUCCESS, 0x0003_0001)),
            AdminOpcode::ASYNC_EVENT_REQUEST => {
                self.aers.push(sqe.cid);
                return None;
            }
            AdminOpcode::DOORBELL_BUFFER_CONFIG => {
                self.shadow = Some(DoorbellBufferConfig::from_sqe(sqe));
            }
            _ => return Some((Status::INVALID_OPCODE, 0)),
        }
        Some((Status::SUCCESS, 0))
    }

    fn io(&mut self, sqe: &Sqe) -> Status {
        let command = ReadWrite::from_sqe(sqe);
        let mut at = (command.slba * 512) as usize;
        let len = command.blocks() * 512;
        if at + len as usize > self.disk.len() {
            return Status::LBA_OUT_OF_RANGE;
        }
        let (map, disk) = (Arc::clone(&self.map), &mut self.disk);
        let write = sqe.opcode == NvmOpcode::WRITE.0;
        let done = walk(
            PageSize::K4,
            sqe.prp1,
            sqe.prp2,
            len,
            &mut Lists(&map),
            &mut |segment| {
                let part = &mut disk[at..at + segment.len as usize];
                at += segment.len as usize;
                let ok = if write {
                    map.read(segment.addr, part)
                } else {
                    map.write(segment.addr, part)
                };
                ok.then_some(()).ok_or(Status::DATA_TRANSFER_ERROR)
            },
        );
        done.err().unwrap_or(Status::SUCCESS)
    }
}

fn options() -> Options {
    Options {
        least_ready_timeout: Duration::from_millis(50),
        admin_timeout: Duration::from_millis(200),
        ..Options::default()
    }
}

fn queue(qid: u16, entries: u32) -> QueueConfig {
    let size = RingSize::new(entries).unwrap();
    QueueConfig {
        qid,
        sq_size: size,
        cq_size: size,
        depth: 0,
        max_transfer: 0,
        vector: None,
    }
}

fn collect<B: Doorbell>(pair: &mut QueuePair<B>) -> Vec<Completion> {
    let mut out = Vec::new();
    pair.poll(1000, |c| out.push(c));
    out
}

#[test]
fn brought_up_from_any_state_in_the_right_order() {
    let fake = Fake::new(Wrong::Nothing);
    // Left enabled by somebody else, with a shutdown done.
    fake.lock().cc = Cc::new().with_en(true);
    fake.lock().csts = Csts::new().with_rdy(true).with_shst(Shst::COMPLETE);
    let mut driver = Driver::bring_up(fake.clone(), options()).unwrap();
    assert_eq!(driver.max_transfer(), 128 << 10, "MDTS 5");
    let order: Vec<u32> = fake.lock().writes.iter().map(|w| w.0).collect();
    assert_eq!(
        order,
        [
            offset::CC,
            offset::AQA,
            offset::ASQ,
            offset::ACQ,
            offset::CC,
            offset::CC
        ]
    );
    assert_eq!(driver.request_queue_pairs(8).unwrap(), 2);
    driver.shut_down(false).unwrap();
    let fake = driver.reset().unwrap();
    assert!(!fake.lock().csts.rdy());
    assert!(Driver::bring_up(fake, options()).is_ok(), "and again");
}

#[test]
fn a_device_that_never_answers_is_given_up() {
    let start = Instant::now();
    let timeout = Driver::bring_up(Fake::new(Wrong::NeverReady), options());
    assert!(matches!(timeout, Err(DriverError::Timeout { .. })));
    assert!(start.elapsed() < Duration::from_secs(5));
    let fatal = Driver::bring_up(Fake::new(Wrong::Fatal), options());
    assert!(matches!(fatal, Err(DriverError::Fatal { .. })));
    let gone = Driver::bring_up(Fake::new(Wrong::Gone), options());
    assert!(matches!(gone, Err(DriverError::Gone)));
}

#[test]
fn data_goes_there_and_back_at_every_offset_and_length() {
    let fake = Fake::new(Wrong::Nothing);
    let mut driver = Driver::bring_up(fake.clone(), options()).unwrap();
    let mut pair = driver.create_queue_pair(queue(1, 16)).unwrap();
    let from = fake.pool.allocate(200 << 10).unwrap();
    let to = fake.pool.allocate(200 << 10).unwrap();
    let pattern: Vec<u8> = (0..from.len()).map(|i| (i * 7 + i / 509) as u8).collect();
    from.write(0, &pattern);
    for (offset, blocks) in [(0, 1), (4, 8), (512, 16), (4092, 255), (0, 256), (2048, 17)] {
        let len = blocks * 512;
        let command = ReadWrite::new(1, 3, blocks as u16 - 1);
        to.fill(0xEE);
        for (user, opcode, at) in [(1, NvmOpcode::WRITE, &from), (2, NvmOpcode::READ, &to)] {
            let sqe = command.to_sqe(opcode, 0, 0);
            pair.submit_data(sqe, at.addr() + offset, len, user)
                .unwrap();
            pair.ring();
            let done = collect(&mut pair);
            assert_eq!(done.len(), 1);
            assert!(done[0].status().is_success() && done[0].user == user);
        }
        let got = to.bytes(to.len());
        let range = offset as usize..offset as usize + len as usize;
        assert!(got[range.clone()] == pattern[range.clone()]);
        assert!(
            got[..range.start]
                .iter()
                .chain(&got[range.end..])
                .all(|b| *b == 0xEE)
        );
    }
    let sqe = ReadWrite::new(1, 0, 0).to_sqe(NvmOpcode::READ, 0, 0);
    assert_eq!(
        pair.submit_data(sqe, to.addr(), (128 << 10) + 1, 0),
        Err(SubmitError::TooLong)
    );
    assert!(pair.submit_data(sqe, to.addr() + 2, 512, 0).is_err());
    assert_eq!(pair.out(), 0, "refused commands hold no slot");
    driver.delete_queue_pair(pair).unwrap();
}

#[test]
fn queues_of_odd_sizes_wrap_many_times_and_refuse_when_full() {
    let fake = Fake::new(Wrong::Nothing);
    let mut driver = Driver::bring_up(fake, options()).unwrap();
    for (qid, entries) in [(1, 2), (2, 3), (3, 7), (4, 100)] {
        let mut pair = driver.create_queue_pair(queue(qid, entries)).unwrap();
        assert_eq!(pair.depth(), entries - 1);
        let sqe = ReadWrite::new(1, BLOCKS, 0).to_sqe(NvmOpcode::READ, 0, 0);
        for round in 0..10 {
            for user in 0..u64::from(entries - 1) {
                pair.submit(sqe, round * 1000 + user).unwrap();
            }
            assert_eq!(pair.submit(sqe, 0), Err(SubmitError::Full));
            pair.ring();
            let done = collect(&mut pair);
            let users: Vec<u64> = done.iter().map(|c| c.user).collect();
            let want: Vec<u64> = (0..u64::from(entries - 1))
                .map(|u| round * 1000 + u)
                .collect();
            assert_eq!(users, want);
            assert!(done.iter().all(|c| c.status() == Status::LBA_OUT_OF_RANGE));
        }
        assert_eq!(pair.doorbell_writes(), (10, 10), "one for each batch");
    }
}

#[test]
fn what_no_device_may_do_is_counted_and_told() {
    for (wrong, fault, finished) in [
        (Wrong::CompletesTwice, Fault::StaleCommand(0), 1),
        (Wrong::UnknownTag, Fault::UnknownCommand(0x3F), 0),
        (Wrong::OtherQueue, Fault::WrongQueue(77), 0),
        (Wrong::BadHead, Fault::BadHead(60_000), 0),
    ] {
        let mut driver = Driver::bring_up(Fake::new(wrong), options()).unwrap();
        let mut pair = driver.create_queue_pair(queue(1, 64)).unwrap();
        let sqe = ReadWrite::new(1, BLOCKS, 0).to_sqe(NvmOpcode::READ, 0, 0);
        pair.submit(sqe, 5).unwrap();
        pair.ring();
        assert_eq!(collect(&mut pair).len(), finished, "{wrong:?}");
        assert_eq!(pair.take_fault(), Some(fault), "{wrong:?}");
        assert_eq!(pair.take_fault(), None);
        assert_eq!(pair.counters().faults, 1);
    }
}

#[test]
fn a_late_answer_is_an_error_and_events_are_kept_apart() {
    let fake = Fake::new(Wrong::Silent);
    let mut driver = Driver::bring_up(fake.clone(), options()).unwrap();
    driver.arm_events(5).unwrap();
    assert_eq!(driver.aers_out, 2, "AERL");
    assert!(driver.next_event().is_none());
    fake.lock().event(AsyncEvent::NAMESPACE_ATTRIBUTE_CHANGED);
    let refused = driver.admin_ok("nonsense", Sqe::default().with_prps(0, 0).with_cid(9));
    assert!(refused.is_ok(), "opcode 0 is Delete I/O Submission Queue");
    assert_eq!(
        driver.wait_event(Duration::from_millis(10)).unwrap(),
        Some(AsyncEvent::NAMESPACE_ATTRIBUTE_CHANGED)
    );
    driver.arm_events(5).unwrap();
    assert_eq!(driver.aers_out, 2, "armed again");
    let bad = Sqe {
        opcode: 0xFF,
        ..Sqe::default()
    };
    let error = driver.admin_ok("nonsense", bad).unwrap_err();
    assert_eq!(error.status(), Some(Status::INVALID_OPCODE));
}

#[test]
fn shadow_doorbells_ring_only_when_the_event_index_is_passed() {
    let fake = Fake::new(Wrong::Nothing);
    let mut driver = Driver::bring_up(fake.clone(), options()).unwrap();
    driver.enable_doorbell_buffer(&mut []).unwrap();
    let mut pair = driver.create_queue_pair(queue(1, 8)).unwrap();
    let shadow = fake.lock().shadow.unwrap();
    let map = Arc::clone(fake.pool.map());
    let word =
        |base| SharedWord::in_guest(&map, base + STRIDE.shadow_offset(Which::Sq(1))).unwrap();
    let (tail, event) = (word(shadow.shadow), word(shadow.event_idx));
    let before = fake.lock().rings;
    let sqe = ReadWrite::new(1, BLOCKS, 0).to_sqe(NvmOpcode::READ, 0, 0);
    event.store(4);
    for _ in 0..4 {
        pair.submit(sqe, 0).unwrap();
        pair.ring();
    }
    assert_eq!((tail.load(), fake.lock().rings - before), (4, 0), "not yet");
    pair.submit(sqe, 0).unwrap();
    pair.ring();
    assert_eq!(
        (tail.load(), fake.lock().rings - before),
        (5, 1),
        "passed 4"
    );
    assert_eq!(collect(&mut pair).len(), 5);
}
