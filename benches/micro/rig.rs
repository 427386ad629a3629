//! A poller in this thread, and queue pairs full of reads for it.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nvme_spec::doorbell::{Doorbell, DoorbellStride};
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::ring::RingSize;
use vhost_user_nvme::backend::nvme::Window;
use vhost_user_nvme::backend::{Backend, HugePages, MemoryOptions, NullOptions, NvmeOptions};
use vhost_user_nvme::driver::dma::{Mapping, shared_memory};
use vhost_user_nvme::driver::{Ssd, SsdOptions};
use vhost_user_nvme::io::Namespace;
use vhost_user_nvme::memory::{DoorbellWindow, GuestMap, Ring};
use vhost_user_nvme::poller::stats::{NamespaceStats, QueueStats};
use vhost_user_nvme::poller::testing::Passes;
use vhost_user_nvme::poller::{
    Attachment, ControlSink, ControllerKey, CqConfig, DoorbellMode, HandOver, Journal, Message,
    PollerEvent, Reply, SqConfig,
};
use vhost_user_nvme::state::{Shape, StateFile};
use vhost_user_nvme::testing::Model;

/// Entries of each queue.
const ENTRIES: u32 = 256;

/// Queue pairs of a controller.
const QUEUES: u16 = 63;

const STRIDE: u8 = 4;

/// Bytes of the memory namespace and of the buffers: they fit into a cache, copies cost what they cost there.
const DATA: u64 = 128 << 10;

/// What a command reads from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing is moved.
    Null,
    /// Memory.
    Memory,
    /// An SSD that completes at once, with the guest's own PRPs.
    Forward,
    /// The same, shared: PRPs are checked and built anew.
    ForwardShared,
}

impl Kind {
    /// Passes until a command that was rung for is completed.
    fn passes(self) -> u32 {
        match self {
            Self::Null | Self::Memory => 1,
            Self::Forward | Self::ForwardShared => 2,
        }
    }
}

struct Sink;

impl ControlSink for Sink {
    fn released(&self, _: usize, _: u64, _: Box<HandOver>) {}
    fn reply(&self, _: usize, reply: Reply) {
        assert_eq!(reply.result, Ok(true));
    }
    fn event(&self, _: usize, event: PollerEvent) {
        assert!(matches!(event, PollerEvent::Wants(_)), "{event:?}");
    }
}

/// A poller with `queues` queue pairs, of which the first is the one that is used.
pub struct Rig {
    passes: Passes,
    window: Arc<DoorbellWindow>,
    /// The completion queue that is used.
    cq: Ring<2>,
    size: RingSize,
    tail: u16,
    /// Passes of a batch.
    rounds: u32,
}

impl Rig {
    /// One queue pair on `kind` for reads of `bytes` bytes; `more` that are idle.
    pub fn new(kind: Kind, bytes: u32, more: u32) -> Self {
        let mut passes = Passes::new(1024).expect("a poller");
        let mut left = more + 1;
        let mut first = None;
        for key in 0.. {
            let queues = left.min(u32::from(QUEUES)) as u16;
            let made = controller(&mut passes, key, kind, bytes, queues);
            first.get_or_insert(made);
            left -= u32::from(queues);
            if left == 0 {
                break;
            }
        }
        let (map, window) = first.expect("a controller");
        let mut rig = Self {
            passes,
            window,
            cq: Ring::new(&map, cq_at(1), ENTRIES).expect("memory of a queue"),
            size: RingSize::new(ENTRIES).expect("a size"),
            tail: 0,
            rounds: kind.passes(),
        };
        // An SSD's lane comes when its keeper has made it.
        rig.commands(1);
        let patience = Instant::now() + Duration::from_secs(60);
        while rig.last_head() != rig.tail {
            assert!(Instant::now() < patience, "the first command is not done");
            // Not passes as fast as they go: as many as there is time for would be among the instructions that are counted.
            std::thread::sleep(Duration::from_millis(10));
            rig.passes.pass();
        }
        rig
    }

    /// SQHD of the completion that belongs to the last command.
    fn last_head(&self) -> u16 {
        let last = self.size.advance(self.tail, ENTRIES - 1);
        self.cq.read_published(u32::from(last))[1] as u16
    }

    /// Write no journal.
    pub fn without_journal(mut self) -> Self {
        self.passes.without_journal();
        self
    }

    fn register(&self, which: Doorbell) -> &AtomicU32 {
        let offset = DoorbellStride::new(STRIDE).window_offset(which) as usize;
        self.window.register(offset).expect("a doorbell")
    }

    /// Ring for `n` commands, run one pass, ring for their completions.
    #[inline]
    pub fn commands(&mut self, n: u32) {
        self.tail = self.size.advance(self.tail, n);
        let tail = u32::from(self.tail);
        self.register(Doorbell::Sq(1))
            .store(tail, Ordering::Release);
        for _ in 0..self.rounds {
            self.passes.pass();
        }
        self.register(Doorbell::Cq(1))
            .store(tail, Ordering::Release);
    }

    /// One pass with nothing to do.
    #[allow(dead_code, reason = "not every program that has this module wants it")]
    #[inline]
    pub fn idle(&mut self) {
        self.passes.pass();
    }

    /// The poller alone, for one stage after another: queue 1 is full of commands, whatever has been fetched.
    #[allow(dead_code, reason = "not every program that has this module wants it")]
    pub fn stages(&mut self) -> &mut Passes {
        &mut self.passes
    }

    /// That a pass did all of the commands it was rung for, and well.
    pub fn check(&self) {
        let last = self.size.advance(self.tail, ENTRIES - 1);
        let [_, high] = self.cq.read_published(u32::from(last));
        assert_eq!(self.last_head(), self.tail, "SQHD of the last completion");
        assert_eq!(high >> 49, 0, "its status");
    }
}

/// An SSD that completes at once, and a guest's place there.
fn ssd_window(kind: Kind) -> (Arc<Ssd>, Arc<Window>) {
    let model = Model::instant();
    let options = SsdOptions {
        interrupts: false,
        ..SsdOptions::default()
    };
    let ssd = Ssd::start("instant".into(), model.device(), model.space(), options);
    let ssd = ssd.expect("an SSD");
    let window = match kind {
        Kind::ForwardShared => Window::shared(ssd.space(), "instant", 2).map(|mut w| w.remove(1)),
        _ => Window::sole(ssd.space(), "instant"),
    };
    (ssd, window.expect("a window"))
}

fn sq_at(qid: u16) -> u64 {
    DATA + u64::from(qid - 1) * 0x8000
}

fn cq_at(qid: u16) -> u64 {
    sq_at(qid) + 0x4000
}

/// A controller with queues that are full of reads.
fn controller(
    passes: &mut Passes,
    key: u64,
    kind: Kind,
    bytes: u32,
    queues: u16,
) -> (Arc<GuestMap>, Arc<DoorbellWindow>) {
    let key = ControllerKey(key);
    let memory = sq_at(queues + 1);
    let file = shared_memory("micro", memory).expect("memory");
    let region = Mapping::map(&file, 0, memory as usize, 0).expect("memory");
    let stride = DoorbellStride::new(STRIDE);
    let window = DoorbellWindow::new(stride.window_len(QUEUES) as usize).expect("a window");
    let mut guards: Vec<Arc<dyn Any + Send + Sync>> = Vec::new();
    let backend = match kind {
        Kind::Forward | Kind::ForwardShared => {
            let window = ssd_window(kind);
            guards.push(Arc::new(window.1.show(&region).expect("a window")));
            Backend::nvme(&NvmeOptions {
                ssd: window.0,
                window: window.1,
                nsid: 1,
                offset: 0,
                size: None,
                read_only: false,
                pass: Default::default(),
            })
        }
        Kind::Null => Backend::null(NullOptions {
            block_shift: 9,
            blocks: DATA / 512,
            read_only: false,
        }),
        Kind::Memory => Backend::memory(MemoryOptions {
            block_shift: 9,
            blocks: DATA / 512,
            read_only: false,
            huge_pages: HugePages::Never,
        }),
    };
    let map = GuestMap::keeping(vec![region], guards).expect("a region");
    let backend = Arc::new(backend.expect("a backend"));
    let attachment = Box::new(Attachment {
        key,
        sink: Arc::new(Sink),
        namespaces: Arc::new([Namespace::new(1, backend, false)]),
        stats: Arc::new([NamespaceStats::default()]),
        map: Arc::clone(&map),
        window: Arc::clone(&window),
        stride,
        max_transfer: 1 << 20,
        max_namespaces: 1,
        sgls: true,
        doorbells: DoorbellMode::Mapped,
        journal: Some(Journal::new(
            StateFile::anonymous(Shape {
                pollers: 1,
                slots: 1024,
            })
            .expect("a state file"),
            0,
        )),
    });
    passes.send(Message::Attach {
        token: 1,
        attachment,
    });
    let size = RingSize::new(ENTRIES).expect("a size");
    for qid in 1..=queues {
        let cq = CqConfig {
            qid,
            number: u32::from(qid) * 2,
            base: cq_at(qid),
            size,
            vector: None,
            kick: None,
            stats: Arc::new(QueueStats::default()),
        };
        passes.send(Message::CreateCq { token: 2, key, cq });
        let sq = SqConfig {
            qid,
            number: u32::from(qid) * 2 + 1,
            base: sq_at(qid),
            size,
            cqid: qid,
            kick: None,
            stats: Arc::new(QueueStats::default()),
        };
        passes.send(Message::CreateSq { token: 3, key, sq });
        let ring = Ring::<8>::new(&map, sq_at(qid), ENTRIES).expect("memory of a queue");
        for index in 0..ENTRIES {
            let at = u64::from(index) * 4096 * 7 % DATA;
            let blocks = bytes / 512;
            let read = ReadWrite::new(1, at / 512, (blocks - 1) as u16);
            let sqe = read.to_sqe(NvmOpcode::READ, at, 0).with_cid(index as u16);
            ring.write(index, zerocopy::transmute!(sqe));
        }
    }
    (map, window)
}
