//! The data plane: threads that own queues and run each command from fetch to completion.
//!
//! A controller reaches a poller only through its mailbox ([`PollerHandle::send`]); the poller answers and reports through
//! the controller's [`ControlSink`]. Neither side ever waits for the other while it holds something.

pub mod message;
pub mod stats;

pub use message::{
    Attachment, ControlSink, ControllerKey, CqConfig, DoorbellMode, IoFailure, Message, Namespace,
    PollerEvent, Reply, ShadowConfig, SqConfig, Vector,
};

use std::io;
use std::sync::Arc;

use stats::PollerStats;

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

/// The way to a poller. Cloning it is cheap; the thread ends when [`PollerPool`] is dropped.
#[derive(Clone)]
pub struct PollerHandle {
    /// Which poller it is, counted from 0.
    pub index: usize,
    /// Its counters.
    pub stats: Arc<PollerStats>,
}

impl PollerHandle {
    /// Put a message into its mailbox and wake it. Never blocks. To a poller that has ended, nothing happens.
    pub fn send(&self, message: Message) {
        let _ = message;
    }
}

/// All pollers of a daemon.
pub struct PollerPool {
    handles: Vec<PollerHandle>,
}

impl PollerPool {
    /// Start a thread for each configuration.
    ///
    /// # Errors
    ///
    /// A core that this process may not use, or what the kernel says when threads or file descriptors run out.
    pub fn start(configs: &[PollerConfig]) -> io::Result<Self> {
        let _ = configs;
        Ok(Self {
            handles: Vec::new(),
        })
    }

    /// The pollers, in order.
    pub fn handles(&self) -> &[PollerHandle] {
        &self.handles
    }
}
