//! vhost-user: the controller at a Unix socket, as `docs/VHOST_USER.md` describes it.
//!
//! A [`Server`] is a thread that accepts front-ends on one socket, one after the other, and serves each
//! ([`connection`]): messages are put together ([`message`]), parsed and checked by the crate `vhost`, and carried out by a
//! [`device::Device`]. Requests to the front-end have a thread of their own ([`channel`]).

mod channel;
mod connection;
mod device;
mod message;
mod page;
mod server;
mod socket;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

pub use server::Server;
pub use socket::{Endpoint, SocketError, SocketFile};

/// Why a connection has to end, told to the thread that serves it. The first reason counts.
struct Failure {
    reason: Mutex<Option<String>>,
    wake: Arc<OwnedFd>,
}

impl Failure {
    fn new() -> io::Result<Self> {
        Ok(Self {
            reason: Mutex::new(None),
            wake: Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?),
        })
    }

    /// The connection must end for this reason.
    fn set(&self, reason: String) {
        self.reason
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get_or_insert(reason);
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }

    fn get(&self) -> Option<String> {
        let reason = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        reason.clone()
    }

    /// Readable when there may be a reason; the SIGBUS guard signals it as well.
    fn wake(&self) -> &Arc<OwnedFd> {
        &self.wake
    }
}
