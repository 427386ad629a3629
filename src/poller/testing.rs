//! A poller without a thread, whose passes the caller runs: for benchmarks, and tests that count.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::mailbox::{Sending, mailbox};
use super::message::Message;
use super::stats::PollerStats;
use super::thread::Thread;
use super::{IdlePolicy, PollerConfig};

/// All of a poller but the loop around it. It never sleeps.
pub struct Passes {
    thread: Thread,
    mailbox: Sending,
}

impl Passes {
    /// A poller with so many slots that serves nothing yet.
    ///
    /// # Errors
    ///
    /// What the kernel says when file descriptors run out.
    pub fn new(slots: usize) -> io::Result<Self> {
        Self::numbered(0, slots)
    }

    /// The same for the poller of this number.
    ///
    /// # Errors
    ///
    /// As [`Self::new`].
    pub fn numbered(index: usize, slots: usize) -> io::Result<Self> {
        let (sending, mailbox) = mailbox()?;
        let config = PollerConfig {
            core: None,
            idle: IdlePolicy::Poll,
            poll_for: Duration::ZERO,
            slots,
        };
        let stats = Arc::new(PollerStats::default());
        Ok(Self {
            thread: Thread::new(index, config, mailbox, stats)?,
            mailbox: sending,
        })
    }

    /// Hand it a message, which it reads at once. Answers go to the sink of the controller, on this thread.
    pub fn send(&mut self, message: Message) {
        self.mailbox.send(message);
        self.thread.read_mail();
    }

    /// Look at everything once: results, new commands, completions, interrupts. Whether there was anything.
    #[inline]
    pub fn pass(&mut self) -> bool {
        self.thread.pass()
    }

    /// Write no journal for the controllers that there are.
    pub fn without_journal(&mut self) {
        self.thread.without_journal();
    }
}
