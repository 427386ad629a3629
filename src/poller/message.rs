//! What a controller and a poller say to each other.

use std::fs::File;
use std::io::{self, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use arc_swap::ArcSwapOption;
use crossbeam_channel::Sender;
use nvme_spec::doorbell::DoorbellStride;
use nvme_spec::ring::RingSize;
use nvme_spec::{Status, StatusField};
use rustix::fs::OFlags;

use super::front::Side;
use super::hand_over::HandOver;
use super::interrupt::Coalescing;
use super::journal::Journal;
use super::stats::{NamespaceStats, QueueStats};
use crate::io::Namespace;
use crate::memory::{DoorbellWindow, GuestMap};

/// Names a controller among those of a daemon; never used again after the controller has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ControllerKey(pub u64);

/// All a poller has to know to serve queues of a controller.
pub struct Attachment {
    /// The controller's name.
    pub key: ControllerKey,
    /// Who is told what happens.
    pub sink: Arc<dyn ControlSink>,
    /// The controller's namespaces, by ascending NSID.
    pub namespaces: Arc<[Namespace]>,
    /// Counters, one for each namespace in the same order: this poller is their only writer.
    pub stats: Arc<[NamespaceStats]>,
    /// The guest's memory.
    pub map: Arc<GuestMap>,
    /// Its doorbells.
    pub window: Arc<DoorbellWindow>,
    /// CAP.DSTRD.
    pub stride: DoorbellStride,
    /// The largest transfer in bytes (Identify MDTS), a multiple of 4096.
    pub max_transfer: u32,
    /// NN: higher NSIDs cannot be.
    pub max_namespaces: u32,
    /// SGLs are offered.
    pub sgls: bool,
    /// How doorbells reach us now.
    pub doorbells: DoorbellMode,
    /// Where this poller writes down what another process needs to go on; `None` = nowhere. It has a place for each slot.
    pub journal: Option<Journal>,
}

/// An interrupt vector: the eventfd behind it may be exchanged at any time.
#[derive(Default)]
pub struct Vector {
    call: ArcSwapOption<File>,
    side: Option<Side>,
    /// [`Coalescing`], the time in the high byte.
    coalescing: AtomicU16,
}

impl Vector {
    /// Vector number `vring` of the front-end that maps this window.
    pub fn new(window: &Arc<DoorbellWindow>, vring: u16) -> Self {
        Self {
            side: Some(Side::new(Arc::clone(window), usize::from(vring))),
            ..Self::default()
        }
    }

    /// Whether an interrupt is dear: the front-end has to wake up for it, unless it is looking.
    pub fn is_dear(&self) -> bool {
        self.side.as_ref().is_some_and(Side::is_attentive)
    }

    /// Use this eventfd from now on; `None` = nobody listens.
    ///
    /// It is made non-blocking: a front-end that lets its counter run full must not stop a poller.
    pub fn set(&self, eventfd: Option<File>) {
        if let Some(file) = &eventfd
            && let Ok(flags) = rustix::fs::fcntl_getfl(file)
            && let Err(error) = rustix::fs::fcntl_setfl(file, flags | OFlags::NONBLOCK)
        {
            tracing::warn!(%error, "cannot make an interrupt's eventfd non-blocking");
        }
        self.call.store(eventfd.map(Arc::new));
    }

    /// Delay interrupts like this from now on.
    pub fn set_coalescing(&self, coalescing: Coalescing) {
        let bits = u16::from_le_bytes([coalescing.thr_z, coalescing.time]);
        self.coalescing.store(bits, Ordering::Relaxed);
    }

    /// How interrupts are delayed.
    #[inline]
    pub fn coalescing(&self) -> Coalescing {
        let [thr_z, time] = self.coalescing.load(Ordering::Relaxed).to_le_bytes();
        Coalescing { thr_z, time }
    }

    /// Signal it.
    ///
    /// # Errors
    ///
    /// What the kernel says of the eventfd. A counter that is full already is not an error: the interrupt is pending.
    pub fn signal(&self) -> io::Result<()> {
        if let Some(side) = &self.side
            && side.is_attentive()
            && side.tell()
        {
            return Ok(());
        }
        match self.call.load().as_deref() {
            None => Ok(()),
            Some(mut file) => match file.write(&1u64.to_ne_bytes()) {
                Ok(_) => Ok(()),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
                Err(e) => Err(e),
            },
        }
    }
}

/// A completion queue to be made. The controller has checked the numbers against its own limits.
pub struct CqConfig {
    /// Queue identifier, not 0.
    pub qid: u16,
    /// Number of its creation, higher than those of all creations and moves before: 1 to [`LAST_NUMBER`](super::journal::LAST_NUMBER).
    pub number: u32,
    /// Guest physical address, page aligned.
    pub base: u64,
    /// Entries.
    pub size: RingSize,
    /// The vector to signal, if interrupts are enabled (IEN).
    pub vector: Option<Arc<Vector>>,
    /// Eventfd that is signalled when the trapped doorbells of this identifier are rung: a full queue waits for its head.
    pub kick: Option<Arc<File>>,
    /// Counters.
    pub stats: Arc<QueueStats>,
}

/// A submission queue to be made.
pub struct SqConfig {
    /// Queue identifier, not 0.
    pub qid: u16,
    /// As that of a completion queue.
    pub number: u32,
    /// Guest physical address, page aligned.
    pub base: u64,
    /// Entries.
    pub size: RingSize,
    /// Its completion queue; the same poller owns it.
    pub cqid: u16,
    /// Eventfd that is signalled when the queue's trapped doorbells are rung.
    pub kick: Option<Arc<File>>,
    /// Counters.
    pub stats: Arc<QueueStats>,
}

/// Doorbell Buffer Config: where the guest keeps its shadow doorbells and EventIdx values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShadowConfig {
    /// Guest physical address of the shadow doorbell page.
    pub doorbells: u64,
    /// Guest physical address of the EventIdx page.
    pub event_idx: u64,
}

/// How a ring of a doorbell reaches the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DoorbellMode {
    /// Stored by the front-end, which then signals the kick: a poller may sleep.
    Trapped,
    /// A plain store of the guest: somebody has to look. Also the state while a switch is under way.
    Mapped,
}

/// To a poller. Each message with a `token` is answered by exactly one [`Reply`] with the same token ([`Message::Release`]: or by
/// the queues).
pub enum Message {
    /// Serve this controller. A second one with the same key replaces nothing and is answered with an error.
    Attach {
        /// Goes back in the reply.
        token: u64,
        /// The controller.
        attachment: Box<Attachment>,
    },
    /// Make a completion queue.
    CreateCq {
        /// Goes back in the reply.
        token: u64,
        /// Which controller.
        key: ControllerKey,
        /// The queue.
        cq: CqConfig,
    },
    /// Make a submission queue; its completion queue exists on this poller.
    CreateSq {
        /// Goes back in the reply.
        token: u64,
        /// Which controller.
        key: ControllerKey,
        /// The queue.
        sq: SqConfig,
    },
    /// Fetch no more from a submission queue, complete or abort what is out, then forget the queue and answer.
    DeleteSq {
        /// Goes back in the reply.
        token: u64,
        /// Which controller.
        key: ControllerKey,
        /// Its identifier.
        qid: u16,
    },
    /// Forget a completion queue that no submission queue uses any more.
    DeleteCq {
        /// Goes back in the reply.
        token: u64,
        /// Which controller.
        key: ControllerKey,
        /// Its identifier.
        qid: u16,
    },
    /// Abort one command. Answered when it is known what became of it.
    Abort {
        /// Goes back in the reply.
        token: u64,
        /// Which controller.
        key: ControllerKey,
        /// Its submission queue.
        sqid: u16,
        /// Its command identifier.
        cid: u16,
    },
    /// Use this memory from now on; answered when nothing of this poller uses memory that is not in it.
    SetMemory {
        /// Goes back in the reply.
        token: u64,
        /// Which controller.
        key: ControllerKey,
        /// The new map.
        map: Arc<GuestMap>,
    },
    /// Use shadow doorbells for all queues that exist and will.
    SetShadow {
        /// Goes back in the reply.
        token: u64,
        /// Which controller.
        key: ControllerKey,
        /// Where they are.
        shadow: ShadowConfig,
    },
    /// Fetch no more for a completion queue; when nothing of its submission queues is out, hand all of them over
    /// ([`ControlSink::released`] instead of a reply). `Ok(false)` = it cannot be done, or not soon: the queues go on here.
    Release {
        /// Goes back in the answer.
        token: u64,
        /// Which controller.
        key: ControllerKey,
        /// The completion queue.
        cqid: u16,
    },
    /// Go on with a completion queue that was to be handed over, if it has not been; the release is answered with `Ok(false)`.
    Keep {
        /// Which controller.
        key: ControllerKey,
        /// The completion queue.
        cqid: u16,
    },
    /// Go on with queues of another poller, or of another process.
    Adopt {
        /// Goes back in the reply.
        token: u64,
        /// Which controller.
        key: ControllerKey,
        /// The number of this move: higher than of all before of this controller, and not 0.
        number: u32,
        /// The queues.
        queues: Box<HandOver>,
    },
    /// Answer, if this controller is served here.
    Hello {
        /// Goes back in the reply.
        token: u64,
        /// Which controller.
        key: ControllerKey,
    },
    /// The eventfd of a queue's kick has changed.
    SetKick {
        /// Which controller.
        key: ControllerKey,
        /// The queue identifier.
        qid: u16,
        /// The new one.
        kick: Option<Arc<File>>,
    },
    /// Doorbells reach us in this way now.
    SetDoorbells {
        /// Which controller.
        key: ControllerKey,
        /// The mode; `Trapped` only once the front-end has acknowledged it.
        mode: DoorbellMode,
    },
    /// Watch the admin queue's tail doorbell while doorbells are mapped, and report each change.
    WatchAdmin {
        /// Which controller.
        key: ControllerKey,
        /// Whether to.
        on: bool,
    },
    /// Drop shadow doorbells, fetch nothing more, let what is out finish without completing it to the guest, forget all
    /// queues, and answer when nothing can touch guest memory any more. The controller stays attached.
    Reset {
        /// Goes back in the reply.
        token: u64,
        /// Which controller.
        key: ControllerKey,
    },
    /// Fetch no more, let what is out finish and tell the guest, then forget the queues and the controller, and answer. What the journal says stays
    /// true. [`Message::Detach`] after it gives up what takes too long, and leaves it in the journal.
    Suspend {
        /// Goes back in the reply.
        token: u64,
        /// Which controller.
        key: ControllerKey,
    },
    /// As `Reset`, but write nothing into the journal any more; then forget the controller.
    Detach {
        /// Goes back in the reply.
        token: u64,
        /// Which controller.
        key: ControllerKey,
    },
    /// Show that the thread looks at its mail: it drops this.
    Ping(Sender<()>),
    /// Do nothing else until the sender of this is dropped.
    #[cfg(test)]
    Stuck(crossbeam_channel::Receiver<()>),
    /// End the thread. Controllers are detached first.
    Stop,
}

/// The answer to a message with a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The message's token.
    pub token: u64,
    /// What came of it; the status is what a guest is told if it asked.
    ///
    /// For [`Message::Abort`]: `Ok(true)` = the command was aborted. For all others `Ok(true)`.
    pub result: Result<bool, Status>,
}

/// A command that failed for a reason the error log should know (Get Log Page 01h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoFailure {
    /// Submission queue.
    pub sqid: u16,
    /// Command identifier.
    pub cid: u16,
    /// What the guest was told.
    pub status: StatusField,
    /// Namespace of the command, as the guest gave it.
    pub nsid: u32,
    /// First block of the command, or of the failed part.
    pub lba: u64,
    /// Byte and bit of the SQE that was at fault, as in the Error Information log; `0xFFFF` if none is.
    pub parameter: u16,
}

/// What a poller reports without being asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PollerEvent {
    /// The guest wrote a value to a doorbell that its queue does not have; the queue has stopped.
    InvalidDoorbell {
        /// The queue.
        qid: u16,
    },
    /// A command failed. Reports may be dropped when there are too many; the counters count all.
    Failed(IoFailure),
    /// A queue's own memory went away (memory table change); the queue has stopped until it comes back or is deleted.
    QueueMemoryGone {
        /// The queue.
        qid: u16,
    },
    /// This poller would rather have mapped (it is busy on queues without shadow doorbells) or trapped doorbells (it wants to sleep).
    Wants(DoorbellMode),
    /// The admin doorbells changed while mapped.
    AdminRung,
}

/// The controller's side. Called on a poller's thread between commands: must not block, and must not call back.
pub trait ControlSink: Send + Sync {
    /// An answer.
    fn reply(&self, poller: usize, reply: Reply);
    /// Queues have been released: the answer to [`Message::Release`] with this token.
    fn released(&self, poller: usize, token: u64, queues: Box<HandOver>);
    /// A report.
    fn event(&self, poller: usize, event: PollerEvent);
}
