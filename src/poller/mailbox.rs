//! The way into a poller: a queue of messages, a flag that costs the poller one load, and an eventfd that wakes it.

use std::fs::File;
use std::io::{self, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use crossbeam_channel::{Receiver, Sender};
use crossbeam_utils::CachePadded;
use rustix::event::{EventfdFlags, eventfd};

use super::idle::Word;
use super::message::Message;

/// Put something into a queue, and raise the flag that says so; whether it could be put in.
pub(super) fn post<W: Word>(flag: &W, push: impl FnOnce() -> bool) -> bool {
    let done = push();
    if done {
        // In `take` it is the other way round: the flag, a fence, the queue.
        W::full_fence();
        flag.store(1);
    }
    done
}

/// Take something out of a queue. With `None` the flag is down, and raised again by whatever is put in later.
pub(super) fn take<T, W: Word>(flag: &W, mut pop: impl FnMut() -> Option<T>) -> Option<T> {
    if let Some(item) = pop() {
        return Some(item);
    }
    flag.store(0);
    // One may have come between the look and the store, with its flag lost to it.
    W::full_fence();
    let late = pop();
    if late.is_some() {
        flag.store(1);
    }
    late
}

impl Word for AtomicU32 {
    #[inline]
    fn load(&self) -> u32 {
        AtomicU32::load(self, Ordering::Acquire)
    }

    #[inline]
    fn store(&self, value: u32) {
        AtomicU32::store(self, value, Ordering::Release);
    }

    #[inline]
    fn full_fence() {
        fence(Ordering::SeqCst);
    }
}

struct Flag {
    mail: CachePadded<AtomicU32>,
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
        mail: CachePadded::new(AtomicU32::new(0)),
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
        if post(&*self.flag.mail, || self.queue.send(message).is_ok()) {
            // Full is as good as signalled.
            let _ = (&self.flag.wake).write(&1u64.to_ne_bytes());
        }
    }
}

impl Mailbox {
    /// Whether there is mail.
    #[inline]
    pub fn has_mail(&self) -> bool {
        Word::load(&*self.flag.mail) != 0
    }

    /// The next message. After `None`, a later message raises the flag again.
    pub fn next(&self) -> Option<Message> {
        take(&*self.flag.mail, || self.queue.try_recv().ok())
    }

    /// What wakes the poller.
    pub fn wake(&self) -> &File {
        &self.flag.wake
    }
}
