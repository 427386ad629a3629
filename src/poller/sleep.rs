//! Where a poller (and a controller's thread) sleeps: one epoll set of everything that may wake it.
//!
//! All eventfds are edge-triggered and never read: every write wakes, and no descriptor that a front-end gave us can block
//! us.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd, RawFd};
use std::time::Duration;

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};

/// An epoll set that holds a descriptor as often as it was added.
pub(crate) struct Bed {
    set: OwnedFd,
    held: HashMap<RawFd, u32>,
}

impl Bed {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            set: epoll::create(CreateFlags::CLOEXEC)?,
            held: HashMap::new(),
        })
    }

    /// Let this eventfd wake the poller at each write.
    pub fn add_edge(&mut self, fd: impl AsFd) -> io::Result<()> {
        self.add(fd, EventFlags::IN | EventFlags::ET)
    }

    /// Let this descriptor wake the poller as long as it is readable.
    pub fn add_level(&mut self, fd: impl AsFd) -> io::Result<()> {
        self.add(fd, EventFlags::IN)
    }

    fn add(&mut self, fd: impl AsFd, flags: EventFlags) -> io::Result<()> {
        let raw = fd.as_fd().as_raw_fd();
        let count = self.held.entry(raw).or_insert(0);
        if *count == 0
            && let Err(error) = epoll::add(&self.set, &fd, EventData::new_u64(0), flags)
        {
            self.held.remove(&raw);
            return Err(error.into());
        }
        *count += 1;
        Ok(())
    }

    /// Undo one `add_*`. To be called before the descriptor is closed.
    pub fn remove(&mut self, fd: impl AsFd) {
        let raw = fd.as_fd().as_raw_fd();
        if let Some(count) = self.held.get_mut(&raw) {
            *count -= 1;
            if *count == 0 {
                self.held.remove(&raw);
                let _ = epoll::delete(&self.set, &fd);
            }
        }
    }

    /// Sleep until something wakes us, or for at most `limit`.
    pub fn sleep(&mut self, limit: Option<Duration>) {
        let limit = limit.map(|d| Timespec {
            tv_sec: d.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: d.subsec_nanos().into(),
        });
        // An interrupted sleep is a short one; other errors cannot happen to a set of ours.
        let mut events = [const { MaybeUninit::<Event>::uninit() }; 16];
        let _ = epoll::wait(&self.set, &mut events, limit.as_ref());
    }
}
