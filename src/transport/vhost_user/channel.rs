//! The back-end channel: `SHMEM_MAP` and `SHMEM_UNMAP` to the front-end, from a thread that serves nothing else.

use std::io;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, recvmsg};
use vhost::vhost_user::message::{BackendReq, VhostUserMMap, VhostUserMMapFlags};
use vm_memory::ByteValued;

use super::message::HEADER;
use crate::controller::{Controller, FrontEnd};
use crate::memory::DoorbellWindow;
use crate::poller::DoorbellMode;
use crate::transport::Failure;
use crate::transport::stream::send_all;

/// Version 1, and an acknowledgement is wanted.
const FLAGS: u32 = 0x1 | 0x8;
/// Version 1, a reply.
const REPLY_FLAGS: u32 = 0x1 | 0x4;

/// The front-end's own view of the doorbell window.
const SHM_VIEW: u8 = 0;
/// The doorbell window as part of the guest's BAR0.
const SHM_GUEST: u8 = 1;

/// What the controller wants of a front-end, and the thread that asks for it.
pub struct Channel {
    shared: Arc<Shared>,
    window: Arc<DoorbellWindow>,
    failure: Arc<Failure>,
    worker: Mutex<Option<Worker>>,
}

struct Worker {
    thread: JoinHandle<()>,
    /// Shutting it down ends whatever the thread waits for.
    socket: UnixStream,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// What the controller has asked for and not been answered.
    asked: Option<DoorbellMode>,
    /// How the guest's doorbells are.
    current: DoorbellMode,
    /// A RESET_DEVICE is not answered yet: what is sent now would be undone.
    resetting: bool,
    /// Counts resets.
    resets: u64,
    closed: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FrontEnd for Channel {
    fn request_doorbells(&self, mode: DoorbellMode) {
        self.shared.state().asked = Some(mode);
        self.shared.changed.notify_one();
    }
}

impl Channel {
    /// A channel that is not open yet. What goes wrong with it ends the connection through `failure`.
    pub fn new(window: Arc<DoorbellWindow>, failure: Arc<Failure>) -> Arc<Self> {
        Arc::new(Self {
            shared: Arc::new(Shared {
                state: Mutex::new(State {
                    asked: None,
                    current: DoorbellMode::Trapped,
                    resetting: false,
                    resets: 0,
                    closed: false,
                }),
                changed: Condvar::new(),
            }),
            window,
            failure,
            worker: Mutex::new(None),
        })
    }

    /// The front-end has given us its socket: hand over the doorbell window, then serve what the controller asks for.
    ///
    /// # Errors
    ///
    /// There is a channel already, or no thread or file descriptor is left.
    pub fn open(&self, socket: OwnedFd, controller: Arc<Controller>) -> io::Result<()> {
        let mut worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner);
        if worker.is_some() {
            return Err(io::Error::other("there is a back-end channel already"));
        }
        let socket = UnixStream::from(socket);
        let asker = Asker {
            socket: socket.try_clone()?,
            window: Arc::clone(&self.window),
        };
        let (shared, failure) = (Arc::clone(&self.shared), Arc::clone(&self.failure));
        let thread = std::thread::Builder::new()
            .name("vu-channel".into())
            .spawn(move || {
                if let Err(e) = serve(&asker, &shared, &controller)
                    && !shared.state().closed
                {
                    failure.set(format!("the back-end channel failed: {e}"));
                }
            })?;
        *worker = Some(Worker { thread, socket });
        Ok(())
    }

    /// RESET_DEVICE has come: the front-end goes back to trapped doorbells.
    pub fn reset_begins(&self) {
        let mut state = self.shared.state();
        state.current = DoorbellMode::Trapped;
        state.resetting = true;
        state.resets += 1;
    }

    /// RESET_DEVICE is answered: what is sent from now on counts.
    pub fn reset_ends(&self) {
        self.shared.state().resetting = false;
        self.shared.changed.notify_one();
    }

    /// The connection has ended: end the thread as well.
    pub fn close(&self) {
        self.shared.state().closed = true;
        self.shared.changed.notify_one();
        let worker = self
            .worker
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(w) = worker {
            let _ = w.socket.shutdown(std::net::Shutdown::Both);
            let _ = w.thread.join();
        }
    }
}

/// Hand over the window, then switch the doorbells whenever the controller wants it.
fn serve(asker: &Asker, shared: &Shared, controller: &Controller) -> io::Result<()> {
    if !asker.map(SHM_VIEW)? {
        return Err(io::Error::other(
            "the front-end did not map the doorbell window (SHMEM_MAP of region 0)",
        ));
    }
    // A front-end that cannot show the window to the guest will not learn it while it is connected.
    let mut can_map = true;
    loop {
        let mut state = shared.state();
        while !state.closed && (state.asked.is_none() || state.resetting) {
            state = shared
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed {
            return Ok(());
        }
        let Some(asked) = state.asked.take() else {
            continue;
        };
        let (current, resets) = (state.current, state.resets);
        drop(state);
        match asked {
            _ if asked == current => {}
            DoorbellMode::Mapped if can_map => {
                can_map = asker.map(SHM_GUEST)?;
                if !can_map {
                    tracing::info!(
                        controller = controller.name(),
                        "the front-end cannot map doorbells into the guest: they stay trapped"
                    );
                }
            }
            DoorbellMode::Mapped => {}
            DoorbellMode::Trapped => {
                if !asker.unmap(SHM_GUEST)? {
                    return Err(io::Error::other(
                        "the front-end did not unmap the guest's doorbells (SHMEM_UNMAP of region 1)",
                    ));
                }
            }
        }
        let mut state = shared.state();
        if state.resets != resets && asked == DoorbellMode::Mapped {
            // Undone by a reset meanwhile: do it again.
            state.asked.get_or_insert(asked);
            continue;
        }
        let now = if can_map {
            asked
        } else {
            DoorbellMode::Trapped
        };
        state.current = now;
        drop(state);
        controller.doorbells_are(now);
    }
}

/// Sends requests and waits for their acknowledgement.
struct Asker {
    socket: UnixStream,
    window: Arc<DoorbellWindow>,
}

impl Asker {
    /// `SHMEM_MAP` of the whole window; whether the front-end did it.
    fn map(&self, shmid: u8) -> io::Result<bool> {
        self.ask(
            BackendReq::SHMEM_MAP,
            &self.request(shmid, VhostUserMMapFlags::WRITABLE),
            &[self.window.fd()],
        )
    }

    /// `SHMEM_UNMAP` of the whole window; whether the front-end did it.
    fn unmap(&self, shmid: u8) -> io::Result<bool> {
        self.ask(
            BackendReq::SHMEM_UNMAP,
            &self.request(shmid, VhostUserMMapFlags::empty()),
            &[],
        )
    }

    fn request(&self, shmid: u8, flags: VhostUserMMapFlags) -> VhostUserMMap {
        VhostUserMMap {
            shmid,
            fd_offset: self.window.file_offset(),
            len: self.window.bytes() as u64,
            flags: flags.bits(),
            ..VhostUserMMap::default()
        }
    }

    fn ask(
        &self,
        request: BackendReq,
        body: &VhostUserMMap,
        files: &[BorrowedFd<'_>],
    ) -> io::Result<bool> {
        let body = body.as_slice();
        let code = u32::from(request);
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        for word in [code, FLAGS, body.len() as u32] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(body);
        // Whether the socket blocks is the front-end's to change at any time, so wait here and not in the kernel.
        self.wait(rustix::event::PollFlags::OUT)?;
        send_all(&self.socket, &bytes, files)?;
        let mut reply = [0; HEADER + 8];
        self.receive(&mut reply)?;
        let word = |i: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|n| reply[4 * i + n]));
        // Whether NEED_REPLY is repeated in a reply is left open by the protocol.
        if word(0) != code || word(1) & !0x8 != REPLY_FLAGS || word(2) != 8 {
            return Err(io::Error::other(format!(
                "the answer to {request:?} is not one: request {}, flags {:#x}, {} bytes",
                word(0),
                word(1),
                word(2)
            )));
        }
        Ok((word(3), word(4)) == (0, 0))
    }

    fn wait(&self, events: rustix::event::PollFlags) -> io::Result<()> {
        let mut fds = [rustix::event::PollFd::new(&self.socket, events)];
        loop {
            match rustix::event::poll(&mut fds, None) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn receive(&self, into: &mut [u8]) -> io::Result<()> {
        let mut have = 0;
        while have < into.len() {
            self.wait(rustix::event::PollFlags::IN)?;
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            // Files that come with an answer are closed with this buffer.
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let got = recvmsg(
                self.socket.as_fd(),
                &mut [IoSliceMut::new(&mut into[have..])],
                &mut control,
                RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
            );
            match got {
                Ok(r) if r.bytes == 0 => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the front-end closed it",
                    ));
                }
                Ok(r) => have += r.bytes,
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}
