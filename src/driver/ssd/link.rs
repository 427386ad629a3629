//! What the keeper and the lanes share.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};
use std::{fs::File, io};

use crossbeam_channel::{Receiver, Sender, TrySendError};
use nvme_spec::Status;
use nvme_spec::log::SmartLog;
use rustix::event::{EventfdFlags, eventfd};

use super::opening::Seats;
use super::{SsdCounters, SsdEvent, SsdOptions, SsdState, Watch};
use crate::driver::lists::Lists;
use crate::driver::{Doorbell, Fault, QueuePair};

/// A queue pair of any device.
pub(super) type Pair = QueuePair<Box<dyn Doorbell>>;

/// News that may wait for a subscriber.
const NEWS: usize = 64;

/// An eventfd.
pub(super) fn event_fd() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Make an eventfd readable. A counter that is full is readable already, so that no error matters.
pub(super) fn signal(fd: impl AsFd) {
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

/// Make it not readable.
pub(super) fn clear(fd: impl AsFd) {
    let _ = rustix::io::read(fd, &mut [0u8; 8]);
}

/// The counters of [`SsdCounters`].
#[derive(Default)]
pub(super) struct Counts {
    pub(super) timeouts: AtomicU64,
    pub(super) aborts: AtomicU64,
    pub(super) aborted: AtomicU64,
    pub(super) resets: AtomicU64,
    pub(super) resubmitted: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) bad_completions: AtomicU64,
    pub(super) events: AtomicU64,
}

/// Add to a counter.
pub(super) fn count(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// Of the whole SSD.
pub(super) struct Shared {
    pub(super) name: String,
    pub(super) options: SsdOptions,
    /// Counts ticks of the keeper: the clock of the lanes. It never runs ahead of time.
    pub(super) epoch: AtomicU32,
    state: AtomicU8,
    /// A lane has put something into its mail.
    pub(super) news: AtomicBool,
    pub(super) stop: AtomicBool,
    /// The keeper has ended: nobody answers any more.
    pub(super) ended: AtomicBool,
    pub(super) counts: Counts,
    /// What the SSD said of its health last.
    pub(super) health: Mutex<Option<SmartLog>>,
    /// Queue identifiers.
    pub(super) seats: Mutex<Seats>,
    /// Namespaces in use.
    pub(super) watches: Mutex<Vec<Weak<Watch>>>,
    wake: OwnedFd,
    subscribers: Mutex<Vec<Sender<SsdEvent>>>,
}

impl Shared {
    pub(super) fn new(name: String, options: SsdOptions) -> io::Result<Self> {
        Ok(Self {
            name,
            options,
            epoch: AtomicU32::new(0),
            state: AtomicU8::new(SsdState::Ready as u8),
            news: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            counts: Counts::default(),
            health: Mutex::default(),
            seats: Mutex::default(),
            watches: Mutex::default(),
            wake: event_fd()?,
            subscribers: Mutex::default(),
        })
    }

    /// Wake the keeper.
    pub(super) fn wake(&self) {
        signal(&self.wake);
    }

    /// A lane has news: wake the keeper.
    pub(super) fn tell(&self) {
        self.news.store(true, Ordering::Release);
        self.wake();
    }

    /// Readable when the keeper should look.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    pub(super) fn state(&self) -> SsdState {
        match self.state.load(Ordering::Acquire) {
            0 => SsdState::Ready,
            1 => SsdState::Resetting,
            _ => SsdState::Gone,
        }
    }

    pub(super) fn set_state(&self, state: SsdState) {
        self.state.store(state as u8, Ordering::Release);
    }

    pub(super) fn counters(&self) -> SsdCounters {
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        let counts = &self.counts;
        SsdCounters {
            timeouts: get(&counts.timeouts),
            aborts: get(&counts.aborts),
            aborted: get(&counts.aborted),
            resets: get(&counts.resets),
            resubmitted: get(&counts.resubmitted),
            failed: get(&counts.failed),
            bad_completions: get(&counts.bad_completions),
            events: get(&counts.events),
        }
    }

    pub(super) fn subscribe(&self) -> Receiver<SsdEvent> {
        let (sender, receiver) = crossbeam_channel::bounded(NEWS);
        lock(&self.subscribers).push(sender);
        receiver
    }

    pub(super) fn publish(&self, event: &SsdEvent) {
        lock(&self.subscribers).retain(|s| {
            !matches!(
                s.try_send(event.clone()),
                Err(TrySendError::Disconnected(_))
            )
        });
    }
}

/// What a lane is to do.
pub(super) enum Order {
    /// Give the queue pair back, and wait.
    Park,
    /// Go on with this queue pair.
    Resume(Box<Pair>),
    /// Give the queue pair back and fail everything.
    Gone,
}

/// A namespace is to be flushed.
pub(super) struct Wish {
    pub(super) nsid: u32,
    /// Takes one answer without waiting; dropped if there will be none.
    pub(super) answer: Sender<Status>,
}

/// What the keeper and one lane tell each other.
#[derive(Default)]
pub(super) struct Mail {
    /// For the lane.
    pub(super) order: Option<Order>,
    /// For the lane: where its PRP lists are. Once.
    pub(super) lists: Option<Lists>,
    /// For the lane: report what is overdue.
    pub(super) check: bool,
    /// For the lane: its namespace has changed, and takes no commands any more.
    pub(super) refuse: bool,
    /// For the lane: the device has been stopped since it was parked.
    pub(super) stopped: bool,
    /// For the lane: namespaces to flush.
    pub(super) flush: Vec<Wish>,
    /// For the keeper: a queue pair that was asked for.
    pub(super) returned: Option<Box<Pair>>,
    /// For the keeper: the lane holds no queue pair.
    pub(super) parked: bool,
    /// For the keeper: identifiers of commands that want to be aborted.
    pub(super) to_abort: Vec<u16>,
    /// For the keeper: commands whose time was up since it looked last.
    pub(super) late: u64,
    /// For the keeper: a command was not done even after the grace.
    pub(super) expired: bool,
    /// For the keeper: the first wrong completion.
    pub(super) fault: Option<Fault>,
    /// For the keeper: the lane has been dropped. The sender is dropped when the device cannot touch what was out any more.
    pub(super) dropped: Option<Sender<()>>,
}

/// Between the keeper and one lane.
pub(super) struct Link {
    /// The lane should read its mail. The one thing it looks at in each pass.
    pub(super) look: AtomicBool,
    /// Commands are out. Written by the lane.
    pub(super) busy: AtomicBool,
    mail: Mutex<Mail>,
    /// What wakes the lane's poller: its interrupt, if it has one.
    wake: File,
}

impl Link {
    pub(super) fn new(wake: File) -> Self {
        Self {
            look: AtomicBool::new(false),
            busy: AtomicBool::new(false),
            mail: Mutex::default(),
            wake,
        }
    }

    pub(super) fn mail(&self) -> MutexGuard<'_, Mail> {
        lock(&self.mail)
    }

    /// Give an order and wake the lane's poller. A queue pair that it had not taken yet comes back.
    pub(super) fn order(&self, order: Order) -> Option<Box<Pair>> {
        let old = {
            let mut mail = self.mail();
            mail.parked = false;
            let old = mail.order.replace(order);
            if let Some(Order::Resume(_)) = &old {
                // It never stopped being parked.
                mail.parked = true;
            }
            old
        };
        self.look.store(true, Ordering::Release);
        self.wake_lane();
        match old {
            Some(Order::Resume(pair)) => Some(pair),
            _ => None,
        }
    }

    pub(super) fn wake_lane(&self) {
        signal(&self.wake);
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
