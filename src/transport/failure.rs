//! Why a connection has to end, told to the thread that serves it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

/// The first reason counts.
pub struct Failure {
    reason: Mutex<Option<String>>,
    wake: Arc<OwnedFd>,
}

impl Failure {
    /// Nothing has failed yet.
    ///
    /// # Errors
    ///
    /// No file descriptor is left.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            reason: Mutex::new(None),
            wake: Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?),
        })
    }

    /// The connection must end for this reason.
    pub fn set(&self, reason: String) {
        self.reason
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(reason);
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }

    /// The reason, if there is one.
    pub fn get(&self) -> Option<String> {
        let reason = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        reason.clone()
    }

    /// Readable when there may be a reason; the SIGBUS guard signals it as well.
    pub fn wake(&self) -> &Arc<OwnedFd> {
        &self.wake
    }
}
