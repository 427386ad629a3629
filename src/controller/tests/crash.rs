//! The crash model: a controller on real pollers, whose process ends after each single store that another process could see, and a guest that must
//! not notice. Pollers and actor run by turns on the thread of the test, so that a store is a point in one order.
//!
//! The guest counts: each command it gave is completed once, with a status it may have; what it wrote is there; a waiting event comes.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use super::*;
use crate::backend::{Delay, HugePages, MemoryOptions, Operations, Rule};
use crate::controller::FrontEnd;
use crate::io::Namespace;
use crate::memory::crash_point::Crash;
use crate::poller::testing::Passes;
use crate::poller::{DoorbellMode, ShadowConfig};
use nvme_spec::admin::{Abort, DeleteQueue, DoorbellBufferConfig};
use nvme_spec::event::AsyncEvent;
use nvme_spec::nvm::{DatasetManagement, DsmRange, ReadWrite};
use nvme_spec::opcode::NvmOpcode;
use std::time::Duration;

mod losing;
mod scenarios;

const INSTANCE: [u8; 16] = [9; 16];
const BLOCKS: u64 = 64;
const SLOTS: usize = 8;
const SHADOW: ShadowConfig = ShadowConfig {
    doorbells: BASE + 0x80000,
    event_idx: BASE + 0x81000,
};
/// Entries of I/O queues: they wrap soon.
const SMALL: u16 = 5;

struct Front;

impl FrontEnd for Front {
    fn request_doorbells(&self, _: DoorbellMode) {}
}

type Post = Arc<Mutex<Vec<(usize, Message)>>>;

struct DirectPort(usize, Post);

impl Port for DirectPort {
    fn send(&self, message: Message) {
        self.1.lock().unwrap().push((self.0, message));
    }
    fn queues(&self) -> usize {
        0
    }
    fn count_queues(&self, _: usize, _: usize) {}
    fn slots(&self) -> usize {
        SLOTS
    }
    fn node(&self) -> Option<u32> {
        None
    }
}

/// A daemon. Dropping it is its death.
struct Process {
    actor: Actor,
    shared: Arc<Shared>,
    post: Post,
    pollers: Vec<Passes>,
}

impl Process {
    fn step(&mut self) {
        self.actor.turn();
        let post = std::mem::take(&mut *self.post.lock().unwrap());
        for (poller, message) in post {
            self.pollers[poller].send(message);
        }
        for poller in &mut self.pollers {
            poller.pass();
        }
    }
}

/// A queue pair of the guest.
struct Pair {
    sqid: u16,
    cqid: u16,
    sq: u64,
    entries: u16,
    tail: u16,
}

struct Cq {
    base: u64,
    entries: u16,
    head: u16,
    phase: bool,
}

/// What survives a process: the guest, its memory, the doorbells, the state, the store.
struct World {
    process: Option<Process>,
    crash: Option<Crash>,
    /// After how many stores of its own each recovery ends, too.
    again: Vec<u64>,
    crashes: usize,
    dir: tempfile::TempDir,
    backend: Arc<Backend>,
    map: Arc<GuestMap>,
    pairs: Vec<Pair>,
    cqs: HashMap<u16, Cq>,
    /// By submission queue and command identifier: the status it may have.
    out: HashMap<(u16, u16), Vec<Status>>,
    /// The completions of the commands that are not out any more.
    done: HashMap<(u16, u16), Cqe>,
    /// Asynchronous event requests that wait.
    aers: Vec<u16>,
    events: Vec<AsyncEvent>,
    shadow: bool,
    cid: u16,
}

impl World {
    fn new(wait: bool, shadow: bool) -> Self {
        let backend = Backend::memory(MemoryOptions {
            block_shift: 9,
            blocks: BLOCKS,
            read_only: false,
            huge_pages: HugePages::Never,
        })
        .unwrap();
        let (backend, delays) = backend.with_delays();
        if wait {
            delays.add(Rule::always(Operations::ALL, Delay(Duration::ZERO)));
        } else {
            // Some wait anyway: both kinds in a batch.
            let some = Rule::always(Operations::ALL, Delay(Duration::ZERO));
            delays.add(some.on_blocks(32..BLOCKS));
        }
        let shm = std::path::Path::new("/dev/shm");
        let dir = match shm.is_dir() {
            true => tempfile::tempdir_in(shm),
            false => tempfile::tempdir(),
        };
        let mut world = Self {
            process: None,
            crash: None,
            again: Vec::new(),
            crashes: 0,
            dir: dir.unwrap(),
            backend: Arc::new(backend),
            map: memory(BASE, LEN),
            pairs: Vec::new(),
            cqs: HashMap::new(),
            out: HashMap::new(),
            done: HashMap::new(),
            aers: Vec::new(),
            events: Vec::new(),
            shadow,
            cid: 0,
        };
        world.start();
        world.connect(false);
        world
    }

    /// A new daemon, with the same configuration.
    fn start(&mut self) {
        let mut info = sample();
        info.namespaces.truncate(1);
        info.namespaces[0].geometry = self.backend.geometry();
        let socket = std::path::Path::new("/crash/socket");
        let keep = Keep::open(self.dir.path(), socket, Duration::ZERO).unwrap();
        let keep = Arc::new(keep);
        let (shared, outbox) = Shared::new(info, 2, &keep).unwrap();
        let post = Post::default();
        let ports = (0..2)
            .map(|i| Box::new(DirectPort(i, Arc::clone(&post))) as Box<dyn Port>)
            .collect();
        let namespace = Namespace::new(1, Arc::clone(&self.backend), false);
        let actor = Actor::new(Parts {
            shared: Arc::clone(&shared),
            outbox,
            key: ControllerKey(0),
            ports,
            placement: Placement::default(),
            namespaces: Arc::new([namespace]),
            volatile: Vec::new(),
            bed: Bed::new().unwrap(),
            keep,
        });
        self.process = Some(Process {
            actor,
            shared,
            post,
            pollers: (0..2)
                .map(|i| Passes::numbered(i, SLOTS).unwrap())
                .collect(),
        });
    }

    fn process(&mut self) -> &mut Process {
        self.process.as_mut().unwrap()
    }

    fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.process.as_ref().unwrap().shared)
    }

    /// The front-end comes; with `used`, it wants the guest's queues back, and gets them. `false` if the process died meanwhile.
    fn connect(&mut self, used: bool) -> bool {
        let came = self.come(used);
        assert!(!came || !used || !self.csts().cfs(), "it cannot go on");
        came
    }

    /// As [`Self::connect`], but it may be told that the controller has failed.
    fn come(&mut self, used: bool) -> bool {
        let shared = self.shared();
        shared.set_instance(Some(INSTANCE));
        shared.inbox.send(Mail::Attach(Arc::new(Front)));
        let (sender, memory) = crossbeam_channel::bounded(0);
        let map = Arc::clone(&self.map);
        shared.inbox.send(Mail::Memory(map, sender));
        let (sender, gone) = crossbeam_channel::bounded(0);
        shared.inbox.send(Mail::Go(used, sender));
        for _ in 0..100 {
            self.process().step();
            if self.is_dead() {
                return false;
            }
            if is_done(&memory) && is_done(&gone) {
                return true;
            }
        }
        panic!("the front-end is not served");
    }

    fn is_dead(&self) -> bool {
        self.crash.as_ref().is_some_and(Crash::happened)
    }

    /// One step of everybody.
    fn step(&mut self) {
        self.process().step();
        if self.is_dead() {
            self.recover();
        }
        self.look();
    }

    /// The process is dead: another one takes over.
    fn recover(&mut self) {
        loop {
            self.crashes += 1;
            // What it still does on its way out has no effect either.
            self.process = None;
            self.crash = None;
            self.crash = self.again.pop().map(Crash::after);
            self.start();
            if !self.is_dead() && self.connect(true) {
                return;
            }
        }
    }

    /// Let everybody do as they like until this is so.
    fn until(&mut self, what: &str, mut is: impl FnMut(&mut Self) -> bool) {
        for _ in 0..400 {
            if is(self) {
                return;
            }
            self.step();
        }
        panic!("{what}: never, out are {:?}", self.out);
    }

    fn settle(&mut self) {
        self.until("all commands complete", |w| w.out.is_empty());
        // Whatever comes twice comes now.
        (0..4).for_each(|_| self.step());
    }

    /// Read all completions.
    fn look(&mut self) {
        let mut found = Vec::new();
        for (cqid, cq) in &mut self.cqs {
            loop {
                let mut bytes = [0; 16];
                assert!(self.map.read(cq.base + u64::from(cq.head) * 16, &mut bytes));
                let cqe: Cqe = zerocopy::transmute!(bytes);
                if cqe.status.p() != cq.phase {
                    break;
                }
                cq.head = (cq.head + 1) % cq.entries;
                cq.phase ^= cq.head == 0;
                found.push((*cqid, cq.head, cqe));
            }
        }
        for (cqid, head, cqe) in found {
            self.ring(Doorbell::Cq(cqid), head);
            if cqid == 0
                && let Some(at) = self.aers.iter().position(|cid| *cid == cqe.cid)
            {
                self.aers.remove(at);
                assert_eq!(cqe.status(), Status::SUCCESS);
                self.events.push(AsyncEvent::from_dw0(cqe.dw0));
                continue;
            }
            let Entry::Occupied(known) = self.out.entry((cqe.sqid, cqe.cid)) else {
                panic!("a completion of nothing that is out: {cqe:?}");
            };
            let may = known.remove();
            assert!(may.contains(&cqe.status()), "{cqe:?} is none of {may:?}");
            self.done.insert((cqe.sqid, cqe.cid), cqe);
        }
    }

    /// As the guest does it: not a store of the daemon.
    fn ring(&self, doorbell: Doorbell, value: u16) {
        let stride = self.shared().info.stride;
        if self.shadow && doorbell.qid() != 0 {
            let gpa = SHADOW.doorbells + stride.shadow_offset(doorbell);
            assert!(self.map.write(gpa, &u32::from(value).to_le_bytes()));
        }
        let at = stride.window_offset(doorbell) as usize;
        let window = &self.process.as_ref().unwrap().shared.window;
        let register = window.register(at).unwrap();
        register.store(value.into(), Ordering::Release);
    }

    fn submit(&mut self, sqid: u16, mut sqe: Sqe, may: &[Status]) -> u16 {
        self.cid = self.cid.wrapping_add(1);
        sqe.cid = self.cid;
        let pair = self.pairs.iter_mut().find(|p| p.sqid == sqid).unwrap();
        let at = pair.sq + u64::from(pair.tail) * 64;
        assert!(self.map.write(at, sqe.as_bytes()));
        pair.tail = (pair.tail + 1) % pair.entries;
        let tail = pair.tail;
        if AdminOpcode(sqe.opcode) == AdminOpcode::ASYNC_EVENT_REQUEST && sqid == 0 {
            self.aers.push(sqe.cid);
        } else {
            self.out.insert((sqid, sqe.cid), may.to_vec());
        }
        self.ring(Doorbell::Sq(sqid), tail);
        self.cid
    }

    fn run(&mut self, sqid: u16, sqe: Sqe) {
        self.submit(sqid, sqe, &[Status::SUCCESS]);
        self.settle();
    }

    /// A register write, sent again until it is acknowledged.
    fn write(&mut self, at: u32, bytes: &[u8]) {
        loop {
            let (sender, done) = crossbeam_channel::bounded(0);
            let shared = self.shared();
            shared.registers.write(at, bytes);
            shared.inbox.send(Mail::Sync(sender));
            let before = self.crashes;
            self.until("a register is written", |w| {
                is_done(&done) || w.crashes != before
            });
            if self.crashes == before {
                return;
            }
        }
    }

    fn csts(&self) -> Csts {
        self.shared().registers.csts()
    }

    fn enable(&mut self) {
        let z = ENTRIES - 1;
        let aqa = Aqa::new().with_asqs_z(z).with_acqs_z(z);
        self.write(offset::AQA, &aqa.into_bits().to_le_bytes());
        self.write(offset::ASQ, &ASQ.to_le_bytes());
        self.write(offset::ACQ, &ACQ.to_le_bytes());
        assert!(self.map.write(ACQ, &[0; 4096]));
        self.pairs = vec![Pair {
            sqid: 0,
            cqid: 0,
            sq: ASQ,
            entries: ENTRIES,
            tail: 0,
        }];
        self.cqs.clear();
        let cc = Cc::new().with_en(true).with_iosqes(6).with_iocqes(4);
        self.write(offset::CC, &cc.into_bits().to_le_bytes());
        self.until("RDY", |w| w.csts().rdy());
        let (base, entries, head, phase) = (ACQ, ENTRIES, 0, true);
        let cq = Cq {
            base,
            entries,
            head,
            phase,
        };
        self.cqs.insert(0, cq);
    }

    fn disable(&mut self) {
        self.write(offset::CC, &0u32.to_le_bytes());
        self.until("RDY = 0", |w| !w.csts().rdy());
        // Nothing of before comes after this.
        self.cqs.clear();
        self.out.clear();
        self.aers.clear();
        (0..4).for_each(|_| self.step());
    }

    fn create_cq(&mut self, cqid: u16) {
        let mut sqe = create_cq(cqid);
        sqe.cdw10 = u32::from(cqid) | u32::from(SMALL - 1) << 16;
        let (base, entries, head, phase) = (sqe.prp1, SMALL, 0, true);
        assert!(self.map.write(base, &[0; 0x1000]));
        self.run(0, sqe);
        let cq = Cq {
            base,
            entries,
            head,
            phase,
        };
        self.cqs.insert(cqid, cq);
    }

    fn create_sq(&mut self, sqid: u16, cqid: u16) {
        let mut sqe = create_sq(sqid, cqid);
        sqe.cdw10 = u32::from(sqid) | u32::from(SMALL - 1) << 16;
        let sq = sqe.prp1;
        self.run(0, sqe);
        self.pairs.push(Pair {
            sqid,
            cqid,
            sq,
            entries: SMALL,
            tail: 0,
        });
    }

    /// Have a completion queue served by another poller.
    fn move_queue(&mut self, cqid: u16, to: usize) {
        let (sender, outcome) = crossbeam_channel::bounded(1);
        self.shared().inbox.send(Mail::Move(cqid, to, sender));
        let before = self.crashes;
        // Who is dead moves nothing: the next one serves it wherever it likes.
        self.until("a queue is moved", |w| {
            w.crashes != before || outcome.try_recv().is_ok_and(|moved| moved.is_ok())
        });
    }

    fn delete(&mut self, sqid: u16) {
        let pair = self.pairs.iter().position(|p| p.sqid == sqid).unwrap();
        let may = [Status::SUCCESS, Status::ABORTED_SQ_DELETION];
        for ((qid, _), status) in &mut self.out {
            if *qid == sqid {
                *status = may.to_vec();
            }
        }
        let sqe = DeleteQueue { qid: sqid }.to_sq_sqe();
        let cid = self.submit(0, sqe, &[Status::SUCCESS]);
        self.until("the queue is deleted", |w| !w.out.contains_key(&(0, cid)));
        // What was not fetched is not completed.
        self.out.retain(|(qid, _), _| *qid != sqid);
        self.pairs.remove(pair);
    }

    /// Two submission queues on one completion queue, and a pair; some I/O, so that they are about to wrap; an event request waits.
    fn bring_up(&mut self) {
        self.enable();
        if self.shadow {
            let config = DoorbellBufferConfig {
                shadow: SHADOW.doorbells,
                event_idx: SHADOW.event_idx,
            };
            self.run(0, config.to_sqe());
        }
        self.create_cq(1);
        self.create_sq(1, 1);
        self.create_sq(2, 1);
        self.create_cq(3);
        self.create_sq(3, 3);
        self.submit(0, aer(), &[]);
        for n in 0..3u8 {
            for sqid in [1, 2, 3] {
                self.run(sqid, self.fill(u64::from(n) + 50, n + 1));
            }
        }
    }

    /// A Write of this byte.
    fn fill(&self, slba: u64, byte: u8) -> Sqe {
        let at = DATA + slba * 512;
        assert!(self.map.write(at, &[byte; 512]));
        ReadWrite::new(1, slba, 0).to_sqe(NvmOpcode::WRITE, at, 0)
    }

    /// What a block holds, all of it the same.
    fn block(&mut self, sqid: u16, slba: u64) -> u8 {
        let at = DATA + 0x20000;
        assert!(self.map.write(at, &[0xEE; 512]));
        let read = ReadWrite::new(1, slba, 0).to_sqe(NvmOpcode::READ, at, 0);
        self.run(sqid, read);
        let mut bytes = [0; 512];
        assert!(self.map.read(at, &mut bytes));
        assert!(bytes.iter().all(|b| *b == bytes[0]), "half a block");
        bytes[0]
    }

    /// All works: every queue, and the event that was waited for comes once.
    fn check(&mut self) {
        self.settle();
        let sqids: Vec<_> = self.pairs.iter().map(|p| p.sqid).collect();
        for sqid in sqids.into_iter().filter(|q| *q != 0) {
            for round in 0..6 {
                let byte = round * 8 + sqid as u8 + 100;
                self.run(sqid, self.fill(60, byte));
                assert_eq!(self.block(sqid, 60), byte);
            }
        }
        if self.aers.is_empty() {
            self.submit(0, aer(), &[]);
        }
        let before = self.events.len();
        // Read the page, so that nothing is masked.
        let mut sqe = command(AdminOpcode::GET_LOG_PAGE);
        sqe.cdw10 = 1 | 15 << 16;
        sqe.nsid = u32::MAX;
        self.run(0, sqe);
        if self.events.len() == before {
            self.process()
                .actor
                .events
                .raise(AsyncEvent::TRANSIENT_INTERNAL_ERROR);
            self.until("an event", |w| w.events.len() > before);
        }
        self.run(0, identify_controller());
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.process = None;
    }
}

fn aer() -> Sqe {
    command(AdminOpcode::ASYNC_EVENT_REQUEST)
}

/// Run a scenario once without a crash, and once for each store it makes, which is the last; then with two crashes, the second while the
/// first is recovered from.
fn exhaust(wait: bool, shadow: bool, scenario: impl Fn(&mut World)) {
    exhaust_from(|| World::new(wait, shadow), World::bring_up, scenario);
}

/// As [`exhaust`], of a guest that was brought up in another way.
fn exhaust_from(
    new: impl Fn() -> World,
    bring_up: impl Fn(&mut World),
    scenario: impl Fn(&mut World),
) {
    let run = |stop: u64, again: Vec<u64>| {
        let mut world = new();
        bring_up(&mut world);
        world.again = again;
        world.crash = Some(Crash::after(stop));
        scenario(&mut world);
        let crash = world.crash.take();
        let asked = crash.map_or(0, |c| c.asked());
        world.again.clear();
        world.check();
        (asked, world.crashes)
    };
    let (stores, crashes) = run(u64::MAX / 2, Vec::new());
    assert_eq!(crashes, 0);
    assert!(stores > 0);
    let (mut stop, mut died, mut tried) = (0, 0, 0);
    while stop < stores {
        let (_, crashes) = run(stop, Vec::new());
        assert!(crashes <= 1, "stop {stop}");
        (died, tried) = (died + crashes, tried + 1);
        // The second one, somewhere in the recovery. Of long runs, which are images mostly, after every third store: it takes as long again.
        if stores < 300 || stop % 3 == 0 {
            run(stop, vec![(stop * 131) % 701]);
        }
        stop += 1;
    }
    assert!(died * 10 >= tried * 9, "{died} deaths in {tried} runs");
}
