//! A guest made of raw memory against a real poller thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use nvme_spec::doorbell::{Doorbell, DoorbellStride, need_event};
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::ring::RingSize;
use nvme_spec::{Cqe, Sqe, Status};

use super::*;
use crate::backend::{Backend, HugePages, MemoryOptions};
use crate::io::{Namespace, test_memory};
use crate::memory::{DoorbellWindow, GuestMap, Ring, SharedWord, SideWord};
use crate::poller::stats::{NamespaceStats, QueueStats};

mod attentive;
mod forwarding;
mod queues;
mod waking;

const KEY: ControllerKey = ControllerKey(7);
const SQ: u64 = 0x1_0000;
const CQ: u64 = 0x2_0000;
const SHADOW: ShadowConfig = ShadowConfig {
    doorbells: 0x3_0000,
    event_idx: 0x3_1000,
};
const DATA: u64 = 0x4_0000;

struct Sink {
    replies: Sender<Reply>,
    events: Sender<PollerEvent>,
    released: Sender<(u64, Box<HandOver>)>,
}

impl ControlSink for Sink {
    fn reply(&self, _: usize, reply: Reply) {
        let _ = self.replies.send(reply);
    }
    fn released(&self, _: usize, token: u64, queues: Box<HandOver>) {
        let _ = self.released.send((token, queues));
    }
    fn event(&self, _: usize, event: PollerEvent) {
        let _ = self.events.send(event);
    }
}

/// A guest with one queue pair.
struct Guest {
    pool: PollerPool,
    map: Arc<GuestMap>,
    window: Arc<DoorbellWindow>,
    replies: Receiver<Reply>,
    events: Receiver<PollerEvent>,
    released: Receiver<(u64, Box<HandOver>)>,
    size: RingSize,
    shadow: bool,
    /// Of the submission queue.
    kick: std::fs::File,
    /// Of the completion queue: another one, as if the two had different identifiers.
    head_kick: std::fs::File,
    vector: Arc<Vector>,
    calls: std::fs::File,
    cq_stats: Arc<QueueStats>,
    tail: u16,
    head: u16,
    phase: bool,
    token: u64,
    /// Times the guest had to ring by register.
    rings: u32,
    /// Counters of the submission queue.
    stats: Arc<QueueStats>,
}

fn eventfd() -> (std::fs::File, std::fs::File) {
    use rustix::event::{EventfdFlags, eventfd};
    let a: std::fs::File = eventfd(0, EventfdFlags::NONBLOCK).unwrap().into();
    let b = a.try_clone().unwrap();
    (a, b)
}

impl Guest {
    fn new(size: u32, idle: IdlePolicy, shadow: bool) -> Self {
        Self::behind(size, idle, shadow, false)
    }

    /// A guest whose front-end may be attentive.
    fn behind(size: u32, idle: IdlePolicy, shadow: bool, attentive: bool) -> Self {
        let backend = Backend::memory(MemoryOptions {
            block_shift: 12,
            blocks: 256,
            read_only: false,
            huge_pages: HugePages::Never,
        })
        .unwrap();
        Self::on(backend, size, idle, shadow, attentive)
    }

    /// The same on any store.
    fn on(backend: Backend, size: u32, idle: IdlePolicy, shadow: bool, attentive: bool) -> Self {
        let pool = PollerPool::start(&[PollerConfig {
            core: None,
            idle,
            poll_for: Duration::from_micros(20),
            slots: 64,
        }])
        .unwrap();
        let (replies_tx, replies) = unbounded();
        let (events_tx, events) = unbounded();
        let (released_tx, released) = unbounded();
        let map = test_memory(0x10_0000);
        let window = DoorbellWindow::new(4096).unwrap();
        let (kick, kick_theirs) = eventfd();
        let (head_kick, head_kick_theirs) = eventfd();
        let (calls, call_theirs) = eventfd();
        let vector = Arc::new(Vector::new(&window, 1));
        let word = window.side(1, SideWord::Attentive).unwrap();
        word.store(u32::from(attentive), Ordering::Release);
        vector.set(Some(call_theirs));
        let mut guest = Self {
            pool,
            map,
            window,
            replies,
            events,
            released,
            size: RingSize::new(size).unwrap(),
            shadow,
            kick,
            head_kick,
            vector,
            calls,
            cq_stats: Arc::default(),
            tail: 0,
            head: 0,
            phase: true,
            token: 0,
            rings: 0,
            stats: Arc::default(),
        };
        let attachment = Box::new(Attachment {
            key: KEY,
            sink: Arc::new(Sink {
                replies: replies_tx,
                events: events_tx,
                released: released_tx,
            }),
            namespaces: Arc::new([Namespace::new(1, Arc::new(backend), false)]),
            stats: Arc::new([NamespaceStats::default()]),
            map: Arc::clone(&guest.map),
            window: Arc::clone(&guest.window),
            stride: DoorbellStride::new(3),
            max_transfer: 1 << 20,
            max_namespaces: 1,
            sgls: true,
            doorbells: DoorbellMode::Trapped,
            journal: None,
        });
        assert_eq!(
            guest.ask(|token| Message::Attach { token, attachment }),
            Ok(true)
        );
        if shadow {
            let made = guest.ask(|token| Message::SetShadow {
                token,
                key: KEY,
                shadow: SHADOW,
            });
            assert_eq!(made, Ok(true));
        }
        guest.create(Arc::new(kick_theirs), Arc::new(head_kick_theirs));
        guest
    }

    fn create(&mut self, kick: Arc<std::fs::File>, head_kick: Arc<std::fs::File>) {
        let (size, vector) = (self.size, Arc::clone(&self.vector));
        let cq = CqConfig {
            qid: 1,
            number: 1,
            base: CQ,
            size,
            vector: Some(vector),
            kick: Some(head_kick),
            stats: Arc::clone(&self.cq_stats),
        };
        let made = self.ask(|token| Message::CreateCq {
            token,
            key: KEY,
            cq,
        });
        assert_eq!(made, Ok(true));
        let sq = SqConfig {
            qid: 1,
            number: 2,
            base: SQ,
            size,
            cqid: 1,
            kick: Some(kick),
            stats: Arc::clone(&self.stats),
        };
        let made = self.ask(|token| Message::CreateSq {
            token,
            key: KEY,
            sq,
        });
        assert_eq!(made, Ok(true));
    }

    fn ask(&mut self, make: impl FnOnce(u64) -> Message) -> Result<bool, Status> {
        self.token += 1;
        self.pool.handles()[0].send(make(self.token));
        let reply = self.replies.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(reply.token, self.token);
        reply.result
    }

    fn register(&self, doorbell: Doorbell) -> &AtomicU32 {
        let offset = DoorbellStride::new(3).window_offset(doorbell) as usize;
        self.window.register(offset).unwrap()
    }

    /// Put commands in without ringing.
    fn push(&mut self, sqe: Sqe) {
        let ring = Ring::<8>::new(&self.map, SQ, self.size.get()).unwrap();
        ring.write(u32::from(self.tail), zerocopy::transmute!(sqe));
        self.tail = self.size.next(self.tail);
    }

    /// Ring a doorbell as Linux does.
    fn ring(&mut self, doorbell: Doorbell, value: u16) {
        if self.shadow {
            let at = DoorbellStride::new(3).shadow_offset(doorbell);
            let word = SharedWord::in_guest(&self.map, SHADOW.doorbells + at).unwrap();
            let event = SharedWord::in_guest(&self.map, SHADOW.event_idx + at).unwrap();
            let old = word.load() as u16;
            word.store(u32::from(value));
            std::sync::atomic::fence(Ordering::SeqCst);
            if !need_event(event.load() as u16, value, old) {
                return;
            }
        }
        self.rings += 1;
        self.register(doorbell)
            .store(u32::from(value), Ordering::Release);
        use std::io::Write as _;
        let mut kick = match doorbell {
            Doorbell::Sq(_) => &self.kick,
            Doorbell::Cq(_) => &self.head_kick,
        };
        kick.write_all(&1u64.to_ne_bytes()).unwrap();
    }

    fn ring_tail(&mut self) {
        self.ring(Doorbell::Sq(1), self.tail);
    }

    /// The next completion, if there is one; the head is not rung.
    fn take(&mut self) -> Option<Cqe> {
        let ring = Ring::<2>::new(&self.map, CQ, self.size.get()).unwrap();
        let cqe = Cqe::from_halves(ring.read_published(u32::from(self.head)));
        if cqe.status.p() != self.phase {
            return None;
        }
        self.head = self.size.next(self.head);
        if self.head == 0 {
            self.phase = !self.phase;
        }
        Some(cqe)
    }

    fn wait(&mut self) -> Cqe {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(cqe) = self.take() {
                return cqe;
            }
            assert!(Instant::now() < until, "a command was never completed");
            std::thread::yield_now();
        }
    }

    fn done(&mut self) {
        self.ring(Doorbell::Cq(1), self.head);
    }

    fn run(&mut self, sqe: Sqe) -> Status {
        self.push(sqe);
        self.ring_tail();
        let cqe = self.wait();
        self.done();
        assert_eq!((cqe.cid, cqe.sqid, cqe.sqhd), (sqe.cid, 1, self.tail));
        cqe.status()
    }
}

fn io(opcode: NvmOpcode, cid: u16, slba: u64, blocks: u16, prp1: u64, prp2: u64) -> Sqe {
    let mut sqe = Sqe {
        opcode: opcode.0,
        cid,
        nsid: 1,
        prp1,
        prp2,
        cdw12: u32::from(blocks - 1),
        ..Sqe::default()
    };
    sqe.set_slba(slba);
    sqe
}

#[test]
fn data_makes_the_round_trip() {
    for shadow in [false, true] {
        let mut g = Guest::new(16, IdlePolicy::Adaptive, shadow);
        assert!(g.map.write(DATA, &[0x5a; 8192]));
        for cid in 0..40 {
            let at = u64::from(cid) * 2;
            assert_eq!(
                g.run(io(NvmOpcode::WRITE, cid, at, 2, DATA, DATA + 4096)),
                Status::SUCCESS
            );
            let back = DATA + 0x1_0000;
            assert_eq!(
                g.run(io(NvmOpcode::READ, cid, at, 2, back, back + 4096)),
                Status::SUCCESS
            );
        }
        let mut out = [0; 8192];
        assert!(g.map.read(DATA + 0x1_0000, &mut out));
        assert!(out.iter().all(|b| *b == 0x5a));
        use std::io::Read as _;
        let mut count = [0; 8];
        (&g.calls).read_exact(&mut count).unwrap();
        assert!(u64::from_ne_bytes(count) >= 1, "interrupts were signalled");
    }
}

#[test]
fn refusals_carry_the_exact_status() {
    let mut g = Guest::new(8, IdlePolicy::Adaptive, false);
    let read = |slba, blocks| io(NvmOpcode::READ, 1, slba, blocks, DATA, DATA + 4096);
    let table: &[(Sqe, Status)] = &[
        (
            Sqe {
                opcode: 0x7f,
                ..read(0, 1)
            },
            Status::INVALID_OPCODE,
        ),
        (
            Sqe {
                flags: 1,
                ..read(0, 1)
            },
            Status::INVALID_FIELD,
        ),
        (
            Sqe {
                flags: 0x80,
                ..read(0, 1)
            },
            Status::INVALID_FIELD,
        ),
        (
            Sqe {
                nsid: 0,
                ..read(0, 1)
            },
            Status::INVALID_NAMESPACE_OR_FORMAT,
        ),
        (
            Sqe {
                nsid: 2,
                ..read(0, 1)
            },
            Status::INVALID_NAMESPACE_OR_FORMAT,
        ),
        (
            Sqe {
                nsid: u32::MAX,
                ..read(0, 1)
            },
            Status::INVALID_NAMESPACE_OR_FORMAT,
        ),
        (read(256, 1), Status::LBA_OUT_OF_RANGE),
        (read(255, 2), Status::LBA_OUT_OF_RANGE),
        (read(u64::MAX, 1), Status::LBA_OUT_OF_RANGE),
        (read(u64::MAX - 1, 4), Status::LBA_OUT_OF_RANGE),
        (
            Sqe {
                cdw12: 0xffff,
                ..read(0, 1)
            },
            Status::INVALID_FIELD,
        ),
        (
            Sqe {
                prp1: DATA + 2,
                ..read(0, 1)
            },
            Status::INVALID_PRP_OFFSET,
        ),
        (
            Sqe {
                prp2: DATA + 8,
                ..read(0, 2)
            },
            Status::INVALID_PRP_OFFSET,
        ),
        (
            Sqe {
                prp1: 0x10_0000,
                ..read(0, 1)
            },
            Status::DATA_TRANSFER_ERROR,
        ),
        (
            Sqe {
                prp1: u64::MAX - 4095,
                ..read(0, 1)
            },
            Status::DATA_TRANSFER_ERROR,
        ),
        (
            Sqe {
                opcode: NvmOpcode::FLUSH.0,
                ..read(0, 1)
            },
            Status::SUCCESS,
        ),
        (
            Sqe {
                opcode: NvmOpcode::FLUSH.0,
                nsid: u32::MAX,
                ..read(0, 1)
            },
            Status::SUCCESS,
        ),
        (read(255, 1), Status::SUCCESS),
    ];
    for (sqe, status) in table {
        assert_eq!(g.run(*sqe), *status, "{sqe:?}");
    }
}

#[test]
fn a_core_that_is_not_there_is_an_error() {
    let config = PollerConfig {
        core: Some(1_000_000),
        idle: IdlePolicy::Poll,
        poll_for: Duration::ZERO,
        slots: 1,
    };
    let error = PollerPool::start(&[config]).err().unwrap();
    assert!(error.to_string().contains("core 1000000"), "{error}");
}

#[test]
fn counters_tell_what_happened() {
    let mut g = Guest::new(64, IdlePolicy::Adaptive, true);
    g.stats.service.ask(true);
    let read = |cid, slba| io(NvmOpcode::READ, cid, slba, 1, DATA, 0);
    for cid in 0..5 {
        assert_eq!(g.run(read(cid, 1)), Status::SUCCESS);
    }
    assert_eq!(g.run(read(5, 1 << 40)), Status::LBA_OUT_OF_RANGE);
    (0..40).for_each(|cid| g.push(read(cid, 2)));
    g.ring_tail();
    (0..40).for_each(|_| assert!(g.wait().status().is_success()));
    g.done();
    g.stats.service.ask(false);
    assert_eq!(g.run(read(6, 3)), Status::SUCCESS);
    // The poller counts after it posts: ask it something, and it has.
    let asked = g.ask(|token| Message::Abort {
        token,
        key: KEY,
        sqid: 1,
        cid: 99,
    });
    assert_eq!(asked, Ok(false));
    let s = &g.stats;
    let of = [&s.fetched, &s.completed, &s.failed].map(stats::Counter::get);
    assert_eq!(of, [47, 47, 1]);
    // 40 at once are a batch of 32 and one of 8; the others came alone.
    let sizes = s.batch_sizes.each_ref().map(stats::Counter::get);
    assert_eq!(sizes, [7, 0, 0, 1, 0, 1]);
    assert_eq!(s.batches.get(), 9);
    assert_eq!(s.service.counts().iter().sum::<u64>(), 46);
    let poller = &g.pool.handles()[0].stats;
    let (passes, empty) = (poller.passes.get(), poller.empty.get());
    assert!(empty > 0 && passes >= empty + 9, "{passes} {empty}");
    assert!(poller.races_lost.get() <= poller.sleeps.get());
}
