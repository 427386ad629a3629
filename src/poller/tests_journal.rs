//! An engine without a thread, many queues, and what its journal holds between passes.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use nvme_spec::doorbell::{Doorbell, DoorbellStride};
use nvme_spec::nvm::ReadWrite;
use nvme_spec::nvm::{DatasetManagement, DsmRange};
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::ring::{Phase, RingSize};
use nvme_spec::{Sqe, Status};
use zerocopy::IntoBytes as _;

use super::engine::Engine;
use super::hand_over::HandOver;
use super::journal::Journal;
use super::message::{
    Attachment, ControlSink, ControllerKey, CqConfig, DoorbellMode, PollerEvent, Reply, SqConfig,
};
use super::served::Served;
use super::stats::{NamespaceStats, QueueStats};
use crate::backend::{Backend, Delay, Fault, NullOptions, Operations, Rule};
use crate::driver::dma::{Dma, DmaPool, Mapping, shared_memory};
use crate::io::Namespace;
use crate::memory::{DoorbellWindow, Ring, SharedWord};
use crate::state::{Shape, StateFile};

/// I/O queues of a controller here.
const QUEUES: usize = 63;

struct Silent;

impl ControlSink for Silent {
    fn reply(&self, _: usize, _: Reply) {}
    fn released(&self, _: usize, _: u64, _: Box<HandOver>) {}
    fn event(&self, _: usize, _: PollerEvent) {}
}

/// A guest's side of one queue pair.
struct Pair {
    sq: Ring<8>,
    cq: Ring<2>,
    tail_bell: SharedWord,
    head_bell: SharedWord,
    tail: u16,
    head: u16,
    phase: Phase,
}

/// A poller without a thread, and a guest that uses it.
pub(super) struct Bench {
    engine: Engine,
    pairs: Vec<Pair>,
    size: RingSize,
    data: Dma,
}

impl Bench {
    /// Serve `queues` queue pairs of `entries` entries each, 63 to a controller, all on one namespace; with or without a
    /// journal. The guest has `data` bytes of memory for data.
    pub(super) fn new(
        backend: Backend,
        queues: usize,
        entries: u32,
        data: usize,
        journal: bool,
    ) -> io::Result<Self> {
        let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what);
        let size = RingSize::new(entries).ok_or_else(|| wrong("a queue of this size"))?;
        let ring_bytes = (entries as usize * 80).next_multiple_of(4096) + 4096;
        let bytes = (queues * ring_bytes + data).next_multiple_of(2 << 20) + (2 << 20);
        let file = shared_memory("bench-guest", bytes as u64)?;
        let pool = DmaPool::new(Mapping::map(&file, 0, bytes, 0)?)?;
        let map = pool.map();
        let (backend, slots) = (Arc::new(backend), 1024);
        let stride = DoorbellStride::new(3);
        let (mut engine, mut pairs) = (Engine::new(slots), Vec::new());
        for index in 0..queues.div_ceil(QUEUES) {
            let window = DoorbellWindow::new(stride.window_len(QUEUES as u16) as usize)?;
            let attachment = Attachment {
                key: ControllerKey(index as u64),
                sink: Arc::new(Silent),
                namespaces: Arc::new([Namespace::new(1, Arc::clone(&backend), false)]),
                stats: Arc::new([NamespaceStats::default()]),
                map: Arc::clone(map),
                window: Arc::clone(&window),
                stride,
                max_transfer: 1 << 20,
                max_namespaces: 1,
                sgls: true,
                doorbells: DoorbellMode::Mapped,
                journal: journal
                    .then(|| StateFile::anonymous(Shape { pollers: 1, slots }))
                    .transpose()?
                    .map(|state| Journal::new(state, 0)),
            };
            let mut served =
                Served::new(attachment, index as u32, 0, slots).map_err(io::Error::other)?;
            for qid in 1..=QUEUES.min(queues - index * QUEUES) as u16 {
                let sq = pool.allocate(entries as usize * 64)?;
                let cq = pool.allocate(entries as usize * 16)?;
                let refused = |_| wrong("a queue here");
                let stats = Arc::new(QueueStats::default());
                served
                    .create_cq(CqConfig {
                        qid,
                        number: u32::from(qid) * 2,
                        base: cq.addr(),
                        size,
                        vector: None,
                        kick: None,
                        stats: Arc::clone(&stats),
                    })
                    .map_err(refused)?;
                served
                    .create_sq(SqConfig {
                        qid,
                        number: u32::from(qid) * 2 + 1,
                        base: sq.addr(),
                        size,
                        cqid: qid,
                        kick: None,
                        stats,
                    })
                    .map_err(refused)?;
                let bell = |doorbell| {
                    SharedWord::in_window(&window, stride.window_offset(doorbell) as usize)
                        .ok_or_else(|| wrong("a doorbell here"))
                };
                pairs.push(Pair {
                    sq: Ring::new(map, sq.addr(), entries).ok_or_else(|| wrong("a ring here"))?,
                    cq: Ring::new(map, cq.addr(), entries).ok_or_else(|| wrong("a ring here"))?,
                    tail_bell: bell(Doorbell::Sq(qid))?,
                    head_bell: bell(Doorbell::Cq(qid))?,
                    tail: 0,
                    head: 0,
                    phase: Phase::FIRST,
                });
                // The rings stay for good: this is a bench.
                std::mem::forget((sq, cq));
            }
            engine.served.push(Some(served));
        }
        engine.changed();
        let data = pool.allocate(data.max(4096))?;
        Ok(Self {
            engine,
            pairs,
            size,
            data,
        })
    }

    /// The memory for data.
    pub(super) fn data(&self) -> &Dma {
        &self.data
    }

    /// Put commands into a queue and ring, as a guest does.
    pub(super) fn submit(&mut self, queue: usize, commands: impl IntoIterator<Item = Sqe>) {
        let Some(pair) = self.pairs.get_mut(queue) else {
            return;
        };
        for sqe in commands {
            pair.sq
                .write(u32::from(pair.tail), zerocopy::transmute!(sqe));
            pair.tail = self.size.next(pair.tail);
        }
        pair.tail_bell.store(u32::from(pair.tail));
    }

    /// One pass of the poller; whether it found anything.
    pub(super) fn pass(&mut self) -> bool {
        self.engine.pass(|_| {})
    }

    /// Take the completions of a queue and ring, as a guest does; how many there were, and whether all were successes.
    pub(super) fn complete(&mut self, queue: usize) -> (u32, bool) {
        let Some(pair) = self.pairs.get_mut(queue) else {
            return (0, false);
        };
        let (mut taken, mut good) = (0, true);
        loop {
            let [low, high] = pair.cq.read_published(u32::from(pair.head));
            if nvme_spec::Cqe::phase_of_high_half(high) != pair.phase.bit() {
                break;
            }
            good &= nvme_spec::Cqe::from_halves([low, high])
                .status()
                .is_success();
            (pair.head, pair.phase) = self.size.next_with_phase(pair.head, pair.phase);
            taken += 1;
        }
        if taken > 0 {
            pair.head_bell.store(u32::from(pair.head));
        }
        (taken, good)
    }
}

#[test]
fn every_queue_of_many_controllers_is_served() {
    let backend = Backend::null(NullOptions {
        block_shift: 12,
        blocks: 1000,
        read_only: false,
    });
    let mut bench = Bench::new(backend.unwrap(), 130, 16, 8192, true).unwrap();
    while bench.pass() {}
    let prp1 = bench.data().addr();
    let read = |slba| ReadWrite::new(1, slba, 0).to_sqe(NvmOpcode::READ, prp1, 0);
    for queue in 0..130 {
        for _ in 0..3 {
            // Other queues are busy too: so many at a time.
            bench.submit(queue, (0..15).map(read));
            assert!(bench.pass());
            assert_eq!(bench.complete(queue), (8, true), "queue {queue}");
            assert!(bench.pass());
            assert_eq!(bench.complete(queue), (7, true), "queue {queue}");
        }
    }
    bench.submit(129, [read(1000)]);
    assert!(bench.pass());
    assert_eq!(bench.complete(129), (1, false), "out of range");
    assert!(!bench.pass());
}

#[test]
fn the_journal_holds_what_is_out_and_how_far_the_queues_are() {
    let options = NullOptions {
        block_shift: 12,
        blocks: 1000,
        read_only: false,
    };
    let (backend, delays) = Backend::null(options).unwrap().with_delays();
    // Commands on these blocks have to wait, all others are done at once.
    let wait = Delay(Duration::from_millis(20));
    delays.add(Rule::always(Operations::ALL, wait).on_blocks(500..1000));
    let mut bench = Bench::new(backend, 1, 16, 8192, true).unwrap();
    let prp1 = bench.data().addr();
    let read = |slba: u64| {
        ReadWrite::new(1, slba, 0)
            .to_sqe(NvmOpcode::READ, prp1, 0)
            .with_cid(slba as u16)
    };
    let words = |slba| -> [u64; 8] { zerocopy::transmute!(read(slba)) };
    for lap in 0..8u16 {
        let at = |n: u16| (lap * 7 + n) % 16;
        let posted = |n: u16| {
            let first = ((lap * 7 + n) / 16).is_multiple_of(2);
            Some((at(n), Phase::from_bit(first)))
        };
        let tail = |bench: &Bench| journal(bench).posted(1).map(|p| (p.tail, p.phase));
        let commands = [1, 501, 2, 502, 503, 3, 4];
        bench.submit(0, commands.map(read));
        assert!(bench.pass());
        let out = journal(&bench).out();
        let heads: Vec<_> = out.iter().map(|c| (c.sqid, c.head, c.sqe)).collect();
        let copied = |n: u16, slba| (1, at(n), words(slba));
        assert_eq!(heads, [copied(2, 501), copied(4, 502), copied(5, 503)]);
        assert_eq!(journal(&bench).head(1, 1), Some(at(7)));
        assert_eq!(tail(&bench), posted(4));
        let mut taken = 0;
        while taken < 7 {
            bench.pass();
            taken += bench.complete(0).0;
        }
        assert_eq!(journal(&bench).out(), []);
        assert_eq!(tail(&bench), posted(7));
    }
}

fn journal(bench: &Bench) -> &Journal {
    let served = bench.engine.served[0].as_ref().unwrap();
    served.journal.as_ref().unwrap()
}

#[test]
fn what_a_failed_command_had_still_to_do_is_not_done_by_the_next_in_its_slot() {
    let options = NullOptions {
        block_shift: 12,
        blocks: 1000,
        read_only: false,
    };
    let (backend, faults) = Backend::null(options).unwrap().with_faults();
    let (backend, delays) = backend.with_delays();
    let fail = Fault::Fail(Status::WRITE_FAULT);
    faults.add(Rule::once(Operations::DEALLOCATE, fail));
    let wait = Delay(Duration::from_millis(1));
    let deallocations = delays.add(Rule::always(Operations::DEALLOCATE, wait));
    delays.add(Rule::always(Operations::READ, wait));
    let mut bench = Bench::new(backend, 1, 16, 8192, true).unwrap();
    let prp1 = bench.data().addr();
    let ranges = [10, 20, 30].map(|slba| DsmRange {
        cattr: 0,
        nlb: 5,
        slba,
    });
    bench.data().write(0, ranges.as_bytes());
    let deallocate = DatasetManagement {
        nsid: 1,
        nr_z: 2,
        ad: true,
        ..DatasetManagement::default()
    };
    let mut run = |sqe| {
        bench.submit(0, [sqe]);
        loop {
            bench.pass();
            match bench.complete(0) {
                (0, _) => std::thread::yield_now(),
                (_, good) => return good,
            }
        }
    };
    assert!(!run(deallocate.to_sqe(prp1, 0)));
    assert_eq!(delays.hits(deallocations), Some(1));
    assert!(run(ReadWrite::new(1, 0, 0).to_sqe(
        NvmOpcode::READ,
        prp1,
        0
    )));
    assert_eq!(delays.hits(deallocations), Some(1));
    assert!(run(deallocate.to_sqe(prp1, 0)));
    assert_eq!(delays.hits(deallocations), Some(4), "three ranges");
}
