//! A poller without a thread, whose passes the caller runs: for benchmarks, and tests that count.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use nvme_spec::Status;

use super::mailbox::{Sending, mailbox};
use super::message::Message;
use super::stats::PollerStats;
use super::thread::Thread;
use super::work::{Begun, Prepared, work};
use super::{IdlePolicy, PollerConfig, done};

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

    /// The first stage of a command alone, `n` times: its copy out of queue 1 of the first controller, which must be full of them. Returns
    /// what came of them, so that they are not left out.
    ///
    /// # Panics
    ///
    /// There is no such queue.
    #[inline]
    pub fn fetch(&mut self, n: u32) -> u64 {
        let (served, _) = self.thread.first().expect("a controller");
        let sq = served.sqs[1].as_mut().expect("a queue");
        (0..n).fold(0, |all, _| all ^ sq.take().expect("memory of a queue")[0])
    }

    /// The third stage alone (the second is its check), `n` times: the next command of queue 1, on its way to a store that does it at once.
    ///
    /// # Panics
    ///
    /// There is no such queue, the command is refused, or the store takes its time.
    #[inline]
    pub fn submit(&mut self, n: u32) {
        let (served, core) = self.thread.first().expect("a controller");
        let sq = served.sqs[1].as_mut().expect("a queue");
        let mut command = Prepared::default();
        assert!(work!(served).prepare(&mut core.slots, sq, &mut command));
        let (slot, room) = core.slots.with_segments(command.tag).expect("a slot");
        for _ in 0..n {
            let begun = work!(served).begin(slot, room, &command, &mut core.ranges);
            assert!(matches!(begun, Begun::Done(refusal) if refusal.status.is_success()));
        }
        core.slots.release(command.tag);
    }

    /// The last stage alone, `n` times: a completion into queue 1.
    ///
    /// # Panics
    ///
    /// There is no such queue.
    #[inline]
    pub fn post(&mut self, n: u32) {
        let (served, _) = self.thread.first().expect("a controller");
        let sq = served.sqs[1].as_ref().expect("a queue");
        let cq = served.cqs[1].as_mut().expect("a queue");
        for cid in 0..n {
            cq.promise();
            done::post(sq, cq, cid as u16, sq.head, Status::SUCCESS);
        }
    }
}
