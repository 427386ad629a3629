//! The data plane: threads that own queues and run each command from fetch to completion.
//!
//! A controller reaches a poller only through its mailbox ([`PollerHandle::send`]); the poller answers and reports through
//! the controller's [`ControlSink`]. Neither side ever waits for the other while it holds something.

mod bell;
mod carry;
mod cq;
mod done;
mod engine;
mod front;
mod hand_over;
mod idle;
mod interrupt;
mod journal;
mod lifecycle;
mod look;
mod mailbox;
pub mod message;
mod quiet;
mod run;
mod served;
pub(crate) mod sleep;
mod slot;
mod sq;
pub mod stats;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod thread;
mod topology;
mod work;

#[cfg(test)]
mod models;
mod pace;
mod patience;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_deallocate;
#[cfg(test)]
mod tests_doorbells;
#[cfg(test)]
mod tests_journal;

pub use hand_over::{Carried, CqPlace, HandOver};
pub use interrupt::Coalescing;
pub use journal::{Copied, Fetched, Journal, LAST_NUMBER, Posted};
pub use message::{
    Attachment, ControlSink, ControllerKey, CqConfig, DoorbellMode, IoFailure, Message,
    PollerEvent, Reply, ShadowConfig, SqConfig, Vector,
};
pub use run::CARRIED;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use mailbox::{Sending, mailbox};
use rustix::thread::{CpuSet, sched_setaffinity};
use stats::PollerStats;
use thread::Thread;
pub(crate) use topology::node_of;

/// How a poller waits when there is nothing to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IdlePolicy {
    /// Never sleep: lowest latency, a core at 100 %.
    Poll,
    /// Look for a while, then sleep until somebody rings.
    #[default]
    Adaptive,
    /// Sleep as soon as there is nothing to do.
    Interrupt,
}

/// A poller to be started.
#[derive(Clone, Debug)]
pub struct PollerConfig {
    /// The core it is bound to; `None` = wherever the scheduler likes.
    pub core: Option<usize>,
    /// How it waits.
    pub idle: IdlePolicy,
    /// How long an adaptive poller looks before it sleeps.
    pub poll_for: std::time::Duration,
    /// Commands that can be out at a time, over all queues.
    pub slots: usize,
}

/// The way to a poller. Cloning it is cheap; the thread ends when its [`PollerPool`] is dropped.
#[derive(Clone)]
pub struct PollerHandle {
    /// Which poller it is, counted from 0.
    pub index: usize,
    /// Its counters.
    pub stats: Arc<PollerStats>,
    /// Commands that can be out at a time.
    pub slots: usize,
    /// The NUMA node of its core, if it has one and the kernel says so.
    pub node: Option<u32>,
    /// Queues that controllers have put on it.
    queues: Arc<AtomicUsize>,
    mailbox: Sending,
}

impl PollerHandle {
    /// Put a message into its mailbox and wake it. Never blocks. To a poller that has ended, nothing happens.
    pub fn send(&self, message: Message) {
        self.mailbox.send(message);
    }

    /// How many queues it has, of all controllers.
    pub fn queues(&self) -> usize {
        self.queues.load(Ordering::Relaxed)
    }

    /// A controller that had put `before` queues on it has put `now` there.
    pub fn count_queues(&self, before: usize, now: usize) {
        let more = now.wrapping_sub(before);
        self.queues.fetch_add(more, Ordering::Relaxed);
    }
}

/// All pollers of a daemon. Dropping it ends their threads; controllers are to be detached before.
pub struct PollerPool {
    handles: Vec<PollerHandle>,
    threads: Vec<JoinHandle<()>>,
}

impl PollerPool {
    /// Start a thread for each configuration.
    ///
    /// # Errors
    ///
    /// A core that this process may not use, or what the kernel says when threads or file descriptors run out.
    pub fn start(configs: &[PollerConfig]) -> io::Result<Self> {
        let mut pool = Self {
            handles: Vec::new(),
            threads: Vec::new(),
        };
        for (index, config) in configs.iter().enumerate() {
            let (sending, mailbox) = mailbox()?;
            let stats = Arc::new(PollerStats::default());
            let thread = Thread::new(index, config.clone(), mailbox, Arc::clone(&stats))?;
            let core = config.core;
            let (ready, started) = std::sync::mpsc::channel();
            let handle = std::thread::Builder::new()
                .name(format!("nvme-poller-{index}"))
                .spawn(move || {
                    let pinned = core.map_or(Ok(()), pin);
                    let ok = pinned.is_ok();
                    let _ = ready.send(pinned);
                    if ok {
                        thread.run();
                    }
                })?;
            pool.threads.push(handle);
            pool.handles.push(PollerHandle {
                index,
                stats,
                slots: config.slots,
                node: core.and_then(node_of),
                queues: Arc::default(),
                mailbox: sending,
            });
            started
                .recv()
                .map_err(|_| io::Error::other("a poller thread ended at its start"))??;
        }
        Ok(pool)
    }

    /// The pollers, in order.
    pub fn handles(&self) -> &[PollerHandle] {
        &self.handles
    }
}

impl Drop for PollerPool {
    fn drop(&mut self) {
        for handle in &self.handles {
            handle.send(Message::Stop);
        }
        for thread in self.threads.drain(..) {
            // A panic has been reported by the thread that had it.
            let _ = thread.join();
        }
    }
}

/// Bind this thread to a core.
fn pin(core: usize) -> io::Result<()> {
    let mut cpus = CpuSet::new();
    if core >= CpuSet::MAX_CPU {
        return Err(io::Error::other(format!("core {core} does not exist")));
    }
    cpus.set(core);
    sched_setaffinity(None, &cpus).map_err(|error| {
        io::Error::new(
            io::Error::from(error).kind(),
            format!("cannot use core {core}: {error}"),
        )
    })
}
