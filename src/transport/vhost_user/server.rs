//! The thread that accepts front-ends on one socket, one after the other.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use super::connection::{self, End};
use super::socket::{Endpoint, SocketFile};
use crate::controller::{Controller, DRAIN_LIMIT};

/// A controller that is reachable at a socket.
pub struct Server {
    stop: Arc<OwnedFd>,
    finished: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    _file: Option<SocketFile>,
}

impl Server {
    /// Begin to accept front-ends for `controller`. `ended` is called when no more can come (the only one, given by file
    /// descriptor, has gone).
    ///
    /// # Errors
    ///
    /// No thread or file descriptor is left.
    pub fn start(
        endpoint: Endpoint,
        file: Option<SocketFile>,
        controller: Arc<Controller>,
        ended: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let finished = Arc::new(AtomicBool::new(false));
        let (stopped, done) = (Arc::clone(&stop), Arc::clone(&finished));
        let thread = std::thread::Builder::new()
            .name("vu-server".into())
            .spawn(move || {
                match endpoint {
                    Endpoint::Connected(stream) => {
                        serve(&stream, &controller, &stopped);
                    }
                    Endpoint::Listening(listener) => accept(&listener, &controller, &stopped),
                }
                done.store(true, Ordering::Release);
                ended();
            })?;
        Ok(Self {
            stop,
            finished,
            thread: Some(thread),
            _file: file,
        })
    }

    /// Accept no more and end the present connection. Does not wait: [`Self::is_finished`] tells when it is done.
    pub fn stop(&self) {
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
    }

    /// Let go of a server that does not end: its thread stays, its socket file goes.
    pub fn abandon(mut self) {
        self.thread = None;
    }

    /// Whether the thread is done: nothing is connected, and the controller is detached.
    pub fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Acquire)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Serve a front-end and log its coming and going. `false` if we were told to stop.
fn serve(stream: &UnixStream, controller: &Arc<Controller>, stop: &OwnedFd) -> bool {
    let name = controller.name();
    tracing::info!(controller = name, "front-end connected");
    let served = AssertUnwindSafe(|| connection::serve(stream, controller, stop.as_fd()));
    let end = catch_unwind(served).unwrap_or_else(|_| {
        // A mistake of ours, which only this front-end found. The controller keeps nothing of it.
        controller.detach(DRAIN_LIMIT);
        End::Refused("serving it failed; this is a bug of the daemon".into())
    });
    match end {
        End::Closed => tracing::info!(controller = name, "front-end disconnected"),
        End::Refused(why) => {
            tracing::warn!(controller = name, "connection ended: {why}");
        }
        End::Stopped => {
            tracing::info!(controller = name, "connection ended: the daemon stops");
            return false;
        }
    }
    // The front-end may have passed copies of its end to others.
    let _ = stream.shutdown(std::net::Shutdown::Both);
    true
}

fn accept(listener: &UnixListener, controller: &Arc<Controller>, stop: &OwnedFd) {
    let name = controller.name();
    if let Err(e) = listener.set_nonblocking(true) {
        tracing::error!(controller = name, "cannot accept front-ends: {e}");
        return;
    }
    loop {
        let mut fds = [
            PollFd::new(stop, PollFlags::IN),
            PollFd::new(listener, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => {
                tracing::error!(controller = name, "cannot wait for front-ends: {e}");
                return;
            }
        }
        if !fds[0].revents().is_empty() {
            return;
        }
        if fds[1].revents().is_empty() {
            continue;
        }
        match listener.accept() {
            Ok((stream, _)) => {
                if !serve(&stream, controller, stop) {
                    return;
                }
            }
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock
                        | io::ErrorKind::Interrupted
                        | io::ErrorKind::ConnectionAborted
                ) => {}
            Err(e) => {
                // Out of file descriptors, most likely: the front-end waits in the backlog until there are some.
                tracing::error!(controller = name, "cannot accept a front-end: {e}");
                pause(stop, Duration::from_secs(1));
            }
        }
    }
}

/// Wait, unless told to stop.
fn pause(stop: &OwnedFd, time: Duration) {
    let limit = Timespec {
        tv_sec: time.as_secs().cast_signed(),
        tv_nsec: time.subsec_nanos().into(),
    };
    let _ = poll(&mut [PollFd::new(stop, PollFlags::IN)], Some(&limit));
}
