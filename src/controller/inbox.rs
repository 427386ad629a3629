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
use nvme_spec::log::CriticalWarning;
use rustix::event::{EventfdFlags, eventfd};

use super::FrontEnd;
use super::moving::{MoveError, Placed};
use crate::memory::GuestMap;
use crate::poller::{ControlSink, DoorbellMode, HandOver, IoFailure, PollerEvent, Reply};

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
    /// The front-end has sent everything, for a guest that has used the device before or not. The sender is dropped when that is done.
    Go(bool, Sender<()>),
    /// The front-end has gone, or is to be served by another process: keep the state only. The sender is dropped when no I/O can touch its memory.
    Suspend(Sender<()>),
    /// What is out when suspending takes too long.
    Abandon,
    /// Forget what was kept: the front-end uses the controller without asking for it.
    Fresh(Sender<()>),
    /// Drop the sender at the end of a turn: registers that were written before are in the state then.
    Sync(Sender<()>),
    /// New memory. The sender is dropped when nothing uses memory that is not in it.
    Memory(Arc<GuestMap>, Sender<()>),
    /// A kick has changed.
    Kick(usize, Option<File>),
    /// The front-end has acknowledged a switch.
    Doorbells(DoorbellMode),
    /// A poller answers.
    Reply(usize, Reply),
    /// A poller has released queues that are to move; the token of the message that asked for it.
    Released(usize, u64, Box<HandOver>),
    /// Move a completion queue to a poller, and send what comes of it.
    Move(u16, usize, Sender<Result<(), MoveError>>),
    /// Send where the queues are.
    Placement(Sender<Vec<Placed>>),
    /// A poller reports that a queue has stopped.
    Stopped(PollerEvent),
    /// The attributes of a namespace have changed.
    NamespaceChanged(u32),
    /// An SSD below has reported on its health.
    Health(CriticalWarning),
    /// The volatile caches have been flushed for the shutdown of this number.
    Flushed(u64),
    /// Show that the thread looks at its mail: it drops this.
    Ping(Sender<()>),
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

    /// Written when the actor should look; never read.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// To be called by the actor before it looks: what comes after this wakes it again.
    pub(super) fn awake(&self) {
        self.woken.swap(false, Ordering::AcqRel);
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
    fn reply(&self, poller: usize, reply: Reply) {
        self.send(Mail::Reply(poller, reply));
    }

    fn released(&self, poller: usize, token: u64, queues: Box<HandOver>) {
        self.send(Mail::Released(poller, token, queues));
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
            // The actor looks at the admin doorbells whenever it is awake.
            PollerEvent::AdminRung => self.wake(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvme_spec::Status;

    /// Whether the eventfd was written since the last call.
    fn woken(inbox: &Inbox) -> bool {
        rustix::io::read(&inbox.wake, &mut [0u8; 8]).is_ok()
    }

    #[test]
    fn every_kind_of_news_wakes_and_floods_do_not_grow() {
        let (inbox, out) = Inbox::new(2).unwrap();
        assert!(!woken(&inbox));
        let failure = IoFailure {
            sqid: 1,
            cid: 2,
            status: Status::INTERNAL_ERROR.into(),
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
        assert!(woken(&inbox));
        assert!(!woken(&inbox), "once is enough");
        inbox.awake();
        assert_eq!(out.failures.len(), FAILURES);
        assert_eq!((inbox.take_lost(), inbox.take_lost()), (10, 0));
        assert_eq!(out.mail.len(), 0);
        assert_eq!(inbox.take_want(1), Some(DoorbellMode::Mapped));
        assert_eq!((inbox.take_want(1), inbox.take_want(9)), (None, None));
        inbox.reply(
            0,
            Reply {
                token: 1,
                result: Ok(true),
            },
        );
        assert!(woken(&inbox));
    }
}
