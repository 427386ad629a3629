//! A controller with its thread, real pollers and a real store: what a transport does, without one.

use super::*;
use crate::backend::{HugePages, MemoryOptions};
use crate::controller::{Controller, ControllerConfig, FrontEnd};
use crate::poller::{DoorbellMode, IdlePolicy, PollerConfig, PollerPool};
use crate::testing::controller_config;
use nvme_spec::admin::DeleteQueue;
use nvme_spec::regs::{Shn, Shst};
use std::fs::File;
use std::io::Write as _;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(10);

struct Front;

impl FrontEnd for Front {
    fn request_doorbells(&self, _mode: DoorbellMode) {}
}

/// A queue pair of the guest: where it is, and how far.
struct Pair {
    qid: u16,
    sq: u64,
    cq: u64,
    entries: u16,
    tail: u16,
    head: u16,
    phase: bool,
}

struct Guest {
    controller: Arc<Controller>,
    map: Arc<GuestMap>,
    kicks: Vec<File>,
    calls: Vec<File>,
    admin: Pair,
}

fn eventfd() -> File {
    use rustix::event::{EventfdFlags, eventfd};
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
    File::from(eventfd(0, flags).unwrap())
}

fn until(what: &str, mut f: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !f() {
        assert!(begun.elapsed() < LIMIT, "{what} takes too long");
        std::thread::sleep(Duration::from_micros(200));
    }
}

impl Pair {
    fn new(qid: u16, sq: u64, cq: u64, entries: u16) -> Self {
        let (tail, head, phase) = (0, 0, true);
        Self {
            qid,
            sq,
            cq,
            entries,
            tail,
            head,
            phase,
        }
    }
}

impl Guest {
    fn new(pool: &PollerPool) -> Self {
        let store = Backend::memory(MemoryOptions {
            block_shift: 9,
            blocks: 2048,
            read_only: false,
            huge_pages: HugePages::Never,
        });
        let config = ControllerConfig {
            queues: 3,
            max_queue_entries: 64,
            pci_ids: [1, 2, 3, 4],
            ..controller_config("vm1", vec![Arc::new(store.unwrap())])
        };
        Self {
            controller: Controller::new(config, pool).unwrap(),
            map: memory(BASE, LEN),
            kicks: Vec::new(),
            calls: Vec::new(),
            admin: Pair::new(0, ASQ, ACQ, ENTRIES),
        }
    }

    fn connect(&mut self) {
        self.controller.attach(Arc::new(Front));
        self.controller
            .set_memory(Arc::clone(&self.map), LIMIT)
            .unwrap();
        (self.kicks, self.calls) = (0..3).map(|_| (eventfd(), eventfd())).unzip();
        for i in 0..3 {
            let call = self.calls[i].try_clone().unwrap();
            let kick = self.kicks[i].try_clone().unwrap();
            self.controller.set_call(i, Some(call));
            self.controller.set_kick(i, Some(kick));
        }
    }

    fn csts(&self) -> Csts {
        let mut bytes = [0; 4];
        self.controller.read(offset::CSTS, &mut bytes);
        Csts::from_bits(u32::from_le_bytes(bytes))
    }

    fn enable(&mut self) {
        let aqa = Aqa::new().with_asqs_z(ENTRIES - 1).with_acqs_z(ENTRIES - 1);
        let cc = Cc::new().with_en(true).with_iosqes(6).with_iocqes(4);
        assert!(self.map.write(ACQ, &[0; 4096]));
        self.admin = Pair::new(0, ASQ, ACQ, ENTRIES);
        self.controller
            .write(offset::AQA, &aqa.into_bits().to_le_bytes());
        self.controller.write(offset::ASQ, &ASQ.to_le_bytes());
        self.controller.write(offset::ACQ, &ACQ.to_le_bytes());
        self.controller
            .write(offset::CC, &cc.into_bits().to_le_bytes());
        until("RDY", || self.csts().rdy());
    }

    fn ring(&mut self, doorbell: Doorbell, value: u16) {
        let register = self
            .controller
            .window()
            .register((doorbell.index() * 4) as usize);
        register.unwrap().store(value.into(), Ordering::Release);
        self.kicks[usize::from(doorbell.qid())]
            .write_all(&1u64.to_ne_bytes())
            .unwrap();
    }

    fn run_on(&mut self, mut pair: Pair, sqe: Sqe) -> (Pair, Cqe) {
        assert!(
            self.map
                .write(pair.sq + u64::from(pair.tail) * 64, sqe.as_bytes())
        );
        pair.tail = (pair.tail + 1) % pair.entries;
        self.ring(Doorbell::Sq(pair.qid), pair.tail);
        let call = &self.calls[usize::from(pair.qid)];
        until("an interrupt", || {
            rustix::io::read(call, &mut [0u8; 8]).is_ok()
        });
        let mut bytes = [0; 16];
        assert!(
            self.map
                .read(pair.cq + u64::from(pair.head) * 16, &mut bytes)
        );
        let cqe: Cqe = zerocopy::transmute!(bytes);
        assert_eq!(cqe.status.p(), pair.phase, "interrupt without completion");
        pair.head = (pair.head + 1) % pair.entries;
        pair.phase ^= pair.head == 0;
        self.ring(Doorbell::Cq(pair.qid), pair.head);
        assert_eq!(cqe.cid, sqe.cid);
        (pair, cqe)
    }

    fn admin(&mut self, sqe: Sqe) {
        let pair = std::mem::replace(&mut self.admin, Pair::new(0, 0, 0, 2));
        let (pair, cqe) = self.run_on(pair, sqe);
        self.admin = pair;
        assert_eq!(cqe.status(), Status::SUCCESS, "{sqe:?}");
    }
}

#[test]
fn a_whole_life() {
    let pool = PollerPool::start(&[PollerConfig {
        core: None,
        idle: IdlePolicy::Interrupt,
        poll_for: Duration::ZERO,
        slots: 64,
    }])
    .unwrap();
    let mut guest = Guest::new(&pool);
    assert_eq!(
        (guest.controller.queues(), guest.controller.pci_ids()),
        (3, [1, 2, 3, 4])
    );
    for round in 0..3u8 {
        guest.connect();
        guest.enable();
        for life in 0..2u8 {
            guest.admin(identify_controller());
            let cq = create_cq(1);
            let sq = create_sq(1, 1);
            assert!(guest.map.write(cq.prp1, &[0; 512]));
            guest.admin(cq);
            guest.admin(sq);
            let mut pair = Pair::new(1, sq.prp1, cq.prp1, 32);
            let mark = [round * 2 + life + 1; 512];
            assert!(guest.map.write(DATA, &mark));
            for (opcode, at) in [(1, DATA), (2, DATA + 0x2000), (0, 0)] {
                let sqe = Sqe {
                    opcode,
                    cid: 9,
                    nsid: 1,
                    prp1: at,
                    ..Sqe::default()
                };
                let cqe;
                (pair, cqe) = guest.run_on(pair, sqe);
                assert_eq!(cqe.status(), Status::SUCCESS, "{opcode}");
            }
            let mut back = [0; 512];
            assert!(guest.map.read(DATA + 0x2000, &mut back));
            assert_eq!(back, mark);
            guest.admin(DeleteQueue { qid: 1 }.to_sq_sqe());
            guest.admin(DeleteQueue { qid: 1 }.to_cq_sqe());
        }
        guest.admin(create_cq(2));
        guest.admin(create_sq(2, 2));
        match round {
            0 => {
                guest.controller.write(offset::CC, &0u32.to_le_bytes());
                until("RDY = 0", || !guest.csts().rdy());
                guest.enable();
            }
            1 => {
                let cc = Cc::new().with_en(true).with_shn(Shn::NORMAL);
                guest
                    .controller
                    .write(offset::CC, &cc.into_bits().to_le_bytes());
                until("shutdown", || guest.csts().shst() == Shst::COMPLETE);
            }
            _ => {
                assert!(guest.controller.reset(LIMIT));
                assert_eq!(guest.csts(), Csts::new());
            }
        }
        assert!(guest.controller.detach(LIMIT));
        assert_eq!(guest.csts(), Csts::new());
        // A poller answers, and then drops what it had.
        until("letting go of the guest's memory", || {
            Arc::strong_count(&guest.map) == 1
        });
    }
    drop(guest);
}

#[test]
fn a_front_end_that_lost_its_connection_goes_on() {
    let pool = PollerPool::start(&[PollerConfig {
        core: None,
        idle: IdlePolicy::Interrupt,
        poll_for: Duration::ZERO,
        slots: 64,
    }])
    .unwrap();
    let id = [5; 16];
    let mut guest = Guest::new(&pool);
    guest.connect();
    guest.controller.set_instance(id);
    assert_eq!(guest.controller.kept(), 0);
    assert!(guest.controller.go(false, LIMIT));
    guest.enable();
    let (cq, sq) = (create_cq(1), create_sq(1, 1));
    guest.admin(cq);
    guest.admin(sq);
    let mut pair = Pair::new(1, sq.prp1, cq.prp1, 32);
    for round in 0..5u8 {
        for (opcode, at) in [(1, DATA), (2, DATA + 0x2000)] {
            assert!(guest.map.write(DATA, &[round; 512]));
            let sqe = Sqe {
                opcode,
                cid: round.into(),
                nsid: 1,
                prp1: at,
                ..Sqe::default()
            };
            let cqe;
            (pair, cqe) = guest.run_on(pair, sqe);
            assert_eq!(cqe.status(), Status::SUCCESS);
        }
        let mut back = [0; 512];
        assert!(guest.map.read(DATA + 0x2000, &mut back));
        assert_eq!(back, [round; 512]);
        assert!(guest.controller.suspend(LIMIT));
        until("letting go of the guest's memory", || {
            Arc::strong_count(&guest.map) == 1
        });
        guest.connect();
        assert_eq!(guest.controller.kept(), 0, "nobody said who it is");
        guest.controller.set_instance(id);
        assert_eq!(guest.controller.kept(), 1);
        assert!(guest.controller.go(true, LIMIT));
        assert!(guest.csts().rdy());
        // The admin queue's last interrupt may have been lost: it comes once more.
        assert!(rustix::io::read(&guest.calls[0], &mut [0u8; 8]).is_ok());
        guest.admin(identify_controller());
    }
    // It does not want it any more.
    assert!(guest.controller.suspend(LIMIT));
    guest.connect();
    guest.enable();
    guest.admin(create_cq(1));
}
