//! The way into a poller: a queue of messages, a flag that costs the poller one load, and an eventfd that wakes it.

use std::fs::File;
use std::io::{self, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Receiver, Sender};
use crossbeam_utils::CachePadded;
use rustix::event::{EventfdFlags, eventfd};

use super::message::Message;

struct Flag {
    mail: CachePadded<AtomicBool>,
    wake: File,
}

/// The sender's end.
#[derive(Clone)]
pub(super) struct Sending {
    queue: Sender<Message>,
    flag: Arc<Flag>,
}

/// The poller's end.
pub(super) struct Mailbox {
    queue: Receiver<Message>,
    flag: Arc<Flag>,
}

/// A new mailbox.
pub(super) fn mailbox() -> io::Result<(Sending, Mailbox)> {
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let flag = Arc::new(Flag {
        mail: CachePadded::new(AtomicBool::new(false)),
        wake: wake.into(),
    });
    let (tx, rx) = crossbeam_channel::unbounded();
    Ok((
        Sending {
            queue: tx,
            flag: Arc::clone(&flag),
        },
        Mailbox { queue: rx, flag },
    ))
}

impl Sending {
    /// Put a message in and wake the poller. Nothing happens if it has ended.
    pub fn send(&self, message: Message) {
        if self.queue.send(message).is_ok() {
            self.flag.mail.store(true, Ordering::SeqCst);
            // Full is as good as signalled.
            let _ = (&self.flag.wake).write(&1u64.to_ne_bytes());
        }
    }
}

impl Mailbox {
    /// Whether there is mail.
    #[inline]
    pub fn has_mail(&self) -> bool {
        self.flag.mail.load(Ordering::SeqCst)
    }

    /// The next message. After `None`, a later message raises the flag again.
    pub fn next(&self) -> Option<Message> {
        match self.queue.try_recv() {
            Ok(message) => Some(message),
            Err(_) => {
                self.flag.mail.store(false, Ordering::SeqCst);
                // One may have come between the look and the store, with its flag lost to it.
                let late = self.queue.try_recv().ok();
                if late.is_some() {
                    self.flag.mail.store(true, Ordering::SeqCst);
                }
                late
            }
        }
    }

    /// What wakes the poller.
    pub fn wake(&self) -> &File {
        &self.flag.wake
    }
}
