//! What others tell the actor: one channel, a few flags, and an eventfd that wakes it.
//!
//! Nothing here grows with what a guest does: register writes, rings and wishes are flags, reports of failed commands have a
//! bounded channel, and the rest is bounded by the messages that were sent out and by the transport, one request at a time.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use crossbeam_channel::{Receiver, Sender, TrySendError};
use rustix::event::{EventfdFlags, eventfd};

use super::FrontEnd;
use crate::memory::GuestMap;
use crate::poller::{ControlSink, DoorbellMode, IoFailure, PollerEvent, Reply};

/// Reports of failed commands that may wait. What does not fit is counted.
const FAILURES: usize = 256;

/// A message to the actor.
pub(super) enum Mail {
    /// A front-end has come.
    Attach(Arc<dyn FrontEnd>),
    /// It has gone. The sender is dropped when no I/O can touch its memory.
    Detach(Sender<()>),
    /// Reset from outside. The sender is dropped when no I/O can touch guest memory.
    Reset(Sender<()>),
    /// New memory. The sender is dropped when nothing uses memory that is not in it.
    Memory(Arc<GuestMap>, Sender<()>),
    /// A kick has changed.
    Kick(usize, Option<File>),
    /// The front-end has acknowledged a switch.
    Doorbells(DoorbellMode),
    /// A poller answers.
    Reply(Reply),
    /// A poller reports that a queue has stopped.
    Stopped(PollerEvent),
    /// The attributes of a namespace have changed.
    NamespaceChanged(u32),
    /// The volatile caches have been flushed for the shutdown of this number.
    Flushed(u64),
    /// End the thread.
    Stop,
}

/// The senders' side.
pub(super) struct Inbox {
    mail: Sender<Mail>,
    failures: Sender<IoFailure>,
    lost: AtomicU64,
    wake: OwnedFd,
    /// The eventfd has been written and the actor has not looked yet.
    woken: AtomicBool,
    /// The admin doorbells have been rung while mapped.
    rung: AtomicBool,
    /// What each poller wants: 0 = nothing new, 1 = trapped, 2 = mapped.
    wants: Vec<AtomicU8>,
}

/// The actor's side.
pub(super) struct Outbox {
    pub(super) mail: Receiver<Mail>,
    pub(super) failures: Receiver<IoFailure>,
}

impl Inbox {
    /// An inbox for a controller on so many pollers.
    pub(super) fn new(pollers: usize) -> io::Result<(Arc<Self>, Outbox)> {
        let (mail, mail_out) = crossbeam_channel::unbounded();
        let (failures, failures_out) = crossbeam_channel::bounded(FAILURES);
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let inbox = Self {
            mail,
            failures,
            lost: AtomicU64::new(0),
            wake,
            woken: AtomicBool::new(false),
            rung: AtomicBool::new(false),
            wants: (0..pollers).map(|_| AtomicU8::new(0)).collect(),
        };
        let outbox = Outbox {
            mail: mail_out,
            failures: failures_out,
        };
        Ok((Arc::new(inbox), outbox))
    }

    /// Send a message and wake the actor.
    pub(super) fn send(&self, mail: Mail) {
        // An error means the actor has ended: nobody is left to be told.
        let _ = self.mail.send(mail);
        self.wake();
    }

    /// Make the actor look at everything.
    pub(super) fn wake(&self) {
        if !self.woken.swap(true, Ordering::AcqRel) {
            // A full counter is a pending wake-up as well.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }

    /// Readable when the actor should look.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// To be called by the actor before it looks.
    pub(super) fn awake(&self) {
        let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
        // Swap, not store: what was put in before the wake-up we clear is to be seen after it.
        self.woken.swap(false, Ordering::AcqRel);
    }

    /// Whether the admin doorbells were rung since the last call.
    pub(super) fn take_rung(&self) -> bool {
        self.rung.swap(false, Ordering::AcqRel)
    }

    /// Reports of failures that were lost since the last call.
    pub(super) fn take_lost(&self) -> u64 {
        self.lost.swap(0, Ordering::AcqRel)
    }

    /// A new wish of a poller.
    pub(super) fn take_want(&self, poller: usize) -> Option<DoorbellMode> {
        match self.wants.get(poller)?.swap(0, Ordering::AcqRel) {
            1 => Some(DoorbellMode::Trapped),
            2 => Some(DoorbellMode::Mapped),
            _ => None,
        }
    }
}

impl ControlSink for Inbox {
    fn reply(&self, _poller: usize, reply: Reply) {
        self.send(Mail::Reply(reply));
    }

    fn event(&self, poller: usize, event: PollerEvent) {
        match event {
            PollerEvent::InvalidDoorbell { .. } | PollerEvent::QueueMemoryGone { .. } => {
                self.send(Mail::Stopped(event));
            }
            PollerEvent::Failed(failure) => {
                if let Err(TrySendError::Full(_)) = self.failures.try_send(failure) {
                    self.lost.fetch_add(1, Ordering::AcqRel);
                }
                self.wake();
            }
            PollerEvent::Wants(mode) => {
                if let Some(want) = self.wants.get(poller) {
                    let code = match mode {
                        DoorbellMode::Trapped => 1,
                        DoorbellMode::Mapped => 2,
                    };
                    want.store(code, Ordering::Release);
                    self.wake();
                }
            }
            PollerEvent::AdminRung => {
                self.rung.store(true, Ordering::Release);
                self.wake();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvme_spec::Status;
    use rustix::event::{PollFd, PollFlags, poll};

    fn readable(inbox: &Inbox) -> bool {
        let mut fds = [PollFd::new(&inbox.wake, PollFlags::IN)];
        poll(&mut fds, Some(&rustix::event::Timespec::default())).unwrap() == 1
    }

    #[test]
    fn every_kind_of_news_wakes_and_floods_do_not_grow() {
        let (inbox, out) = Inbox::new(2).unwrap();
        assert!(!readable(&inbox));
        let failure = IoFailure {
            sqid: 1,
            cid: 2,
            status: Status::INTERNAL_ERROR,
            nsid: 1,
            lba: 0,
            parameter: 0xFFFF,
        };
        for _ in 0..FAILURES + 10 {
            inbox.event(0, PollerEvent::Failed(failure));
            inbox.event(0, PollerEvent::AdminRung);
            inbox.event(1, PollerEvent::Wants(DoorbellMode::Mapped));
            inbox.event(9, PollerEvent::Wants(DoorbellMode::Mapped));
        }
        assert!(readable(&inbox));
        inbox.awake();
        assert!(!readable(&inbox));
        assert_eq!(out.failures.len(), FAILURES);
        assert_eq!((inbox.take_lost(), inbox.take_lost()), (10, 0));
        assert_eq!(out.mail.len(), 0);
        assert!(inbox.take_rung() && !inbox.take_rung());
        assert_eq!(inbox.take_want(1), Some(DoorbellMode::Mapped));
        assert_eq!((inbox.take_want(1), inbox.take_want(9)), (None, None));
        inbox.reply(
            0,
            Reply {
                token: 1,
                result: Ok(true),
            },
        );
        assert!(readable(&inbox));
    }
}
