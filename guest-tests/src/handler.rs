//! The back-end channel: the daemon maps and unmaps the doorbell window, served by a thread of its own.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::thread::{MembarrierCommand, membarrier};
use vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags};
use vhost::vhost_user::{FrontendReqHandler, HandlerResult, VhostUserFrontendReqHandler};
use vhost_user_nvme::driver::dma::Mapping;
use vhost_user_nvme::memory::GuestMap;

use crate::fence::borrow;

/// What the channel's requests change.
#[derive(Default)]
pub(crate) struct Doorbells {
    window: Mutex<Option<Arc<GuestMap>>>,
    came: Condvar,
    /// Whether the guest reaches the window without an exit.
    mapped: AtomicBool,
    /// The same, and whoever unmaps it makes every thread of this process do a full fence.
    mapped_plainly: AtomicBool,
    switches: AtomicU64,
    /// Requests are answered with an error from now on.
    refuse: AtomicBool,
}

impl Doorbells {
    /// Whether a ring needs no kick. To be asked after the value was stored and a full fence: then either the one who
    /// unmaps sees the value after its acknowledgement, or we see that it is unmapped.
    #[inline]
    pub(crate) fn mapped(&self) -> bool {
        self.mapped.load(Ordering::Relaxed)
    }

    /// As [`Self::mapped`], for those who made no fence. Where the kernel cannot make ours for them it is never true.
    #[inline]
    pub(crate) fn mapped_for_plain_rings(&self) -> bool {
        self.mapped_plainly.load(Ordering::Relaxed)
    }

    /// How often the mode changed.
    pub(crate) fn switches(&self) -> u64 {
        self.switches.load(Ordering::Relaxed)
    }

    /// They are, from the beginning and for good.
    pub(crate) fn are_mapped(&self) {
        self.mapped.store(true, Ordering::Relaxed);
        self.mapped_plainly.store(true, Ordering::Relaxed);
    }

    pub(crate) fn refuse(&self, on: bool) {
        self.refuse.store(on, Ordering::Relaxed);
    }

    /// The window, at address 0 of a map of its own.
    pub(crate) fn window(&self, limit: Duration) -> Option<Arc<GuestMap>> {
        let deadline = Instant::now() + limit;
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        while window.is_none() {
            let left = deadline.checked_duration_since(Instant::now())?;
            window = self
                .came
                .wait_timeout(window, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        window.clone()
    }

    /// A connection begins: it brings the window of its own.
    pub(crate) fn forget_window(&self) {
        *self.window.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The connection is gone: doorbells are trapped until the next one maps them.
    pub(crate) fn take_back(&self) {
        if self.mapped() {
            self.set_mapped(false);
        }
    }

    fn set_mapped(&self, mapped: bool) {
        self.mapped.store(mapped, Ordering::Relaxed);
        if mapped {
            // Registering again is as good as the first time.
            let light = membarrier(MembarrierCommand::RegisterPrivateExpedited).is_ok();
            self.mapped_plainly.store(light, Ordering::Relaxed);
        } else if self.mapped_plainly.swap(false, Ordering::Relaxed) {
            // Cannot fail once it is registered. After it, every thread either sees that the window is unmapped or has made its
            // stores visible.
            let fenced = membarrier(MembarrierCommand::PrivateExpedited);
            debug_assert!(fenced.is_ok(), "a barrier that was registered: {fenced:?}");
        }
        self.switches.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what.to_string())
}

impl VhostUserFrontendReqHandler for Doorbells {
    fn shmem_map(&self, req: &VhostUserMMap, fd: &dyn AsRawFd) -> HandlerResult<u64> {
        if self.refuse.load(Ordering::Relaxed) {
            return Err(invalid("refused on purpose"));
        }
        let (flags, len, offset) = (req.flags, req.len, req.fd_offset);
        if flags & VhostUserMMapFlags::WRITABLE.bits() == 0 || req.shm_offset != 0 {
            return Err(invalid("the window is mapped writable, and as a whole"));
        }
        match req.shmid {
            0 => {
                let len = usize::try_from(len).map_err(io::Error::other)?;
                let region = Mapping::map(&borrow(fd), offset, len, 0)?;
                let map = GuestMap::new(vec![region]).map_err(io::Error::other)?;
                *self.window.lock().unwrap_or_else(PoisonError::into_inner) = Some(map);
                self.came.notify_all();
            }
            1 => self.set_mapped(true),
            _ => return Err(invalid("there is no such region")),
        }
        Ok(0)
    }

    fn shmem_unmap(&self, req: &VhostUserMMap) -> HandlerResult<u64> {
        if self.refuse.load(Ordering::Relaxed) {
            return Err(invalid("refused on purpose"));
        }
        match req.shmid {
            0 => {}
            1 => self.set_mapped(false),
            _ => return Err(invalid("there is no such region")),
        }
        Ok(0)
    }
}

/// The thread that serves the channel.
pub(crate) struct Channel {
    socket: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Channel {
    /// Start serving. `hand_over` is given the daemon's end, to be sent to it.
    pub(crate) fn serve<E>(
        doorbells: Arc<Doorbells>,
        hand_over: impl FnOnce(&dyn AsRawFd) -> Result<(), E>,
    ) -> Result<Self, E>
    where
        E: From<io::Error>,
    {
        let mut server = FrontendReqHandler::new(doorbells).map_err(io::Error::other)?;
        server.set_reply_ack_flag(true);
        let socket = UnixStream::from(borrow(&server).try_clone_to_owned()?);
        let theirs = server.get_tx_raw_fd();
        let thread = std::thread::Builder::new()
            .name("virtual-guest-back".into())
            .spawn(move || while serve_one(&mut server) {})?;
        let channel = Self {
            socket,
            thread: Some(thread),
        };
        // The server keeps its copy of the daemon's end open as long as its thread runs.
        hand_over(&theirs)?;
        Ok(channel)
    }
}

fn serve_one(server: &mut FrontendReqHandler<Doorbells>) -> bool {
    // A request that was refused has been answered so: go on.
    match server.handle_request() {
        Ok(_) => true,
        Err(vhost::vhost_user::Error::ReqHandlerError(_)) => true,
        Err(_) => false,
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
