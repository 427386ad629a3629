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

use super::socket::{Endpoint, SocketFile};
use super::{Carried, End, Transport, vfio_user, vhost_user};
use crate::controller::{Controller, DRAIN_LIMIT};

/// A controller that is reachable at a socket.
pub struct Server {
    stop: Arc<OwnedFd>,
    finished: Arc<AtomicBool>,
    hands_over: Arc<AtomicBool>,
    /// There is a front-end, and it is one that connects again when it loses us.
    missed: Arc<AtomicBool>,
    transport: Transport,
    thread: Option<JoinHandle<Option<Left>>>,
    file: Option<SocketFile>,
}

/// What a server leaves to another one.
pub struct Left {
    /// Where front-ends connect; nobody accepts them meanwhile.
    pub listener: UnixListener,
    /// The connection of a client that does not connect again.
    pub connection: Option<(UnixStream, Carried)>,
}

impl Server {
    /// Begin to accept front-ends that speak `transport` for `controller`. `ended` is called when no more can come (the only one, given by file
    /// descriptor, has gone).
    ///
    /// # Errors
    ///
    /// No thread or file descriptor is left.
    pub fn start(
        transport: Transport,
        endpoint: Endpoint,
        file: Option<SocketFile>,
        controller: Arc<Controller>,
        ended: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let finished = Arc::new(AtomicBool::new(false));
        let hands_over = Arc::new(AtomicBool::new(false));
        let missed = Arc::new(AtomicBool::new(false));
        let (stopped, done) = (Arc::clone(&stop), Arc::clone(&finished));
        let serving = Serving {
            transport,
            controller,
            hands_over: Arc::clone(&hands_over),
            missed: Arc::clone(&missed),
        };
        let thread = std::thread::Builder::new()
            .name("vu-server".into())
            .spawn(move || {
                let left = match endpoint {
                    Endpoint::Connected(stream) => {
                        serving.serve(stream, None, &stopped);
                        None
                    }
                    Endpoint::Listening(listener) => serving.accept(listener, None, &stopped),
                    Endpoint::Taken(listener, before) => serving.accept(listener, before, &stopped),
                };
                // Whoever sees that it is finished may want the controller for itself.
                drop(serving);
                done.store(true, Ordering::Release);
                ended();
                left
            })?;
        Ok(Self {
            stop,
            finished,
            hands_over,
            missed,
            transport,
            thread: Some(thread),
            file,
        })
    }

    /// Accept no more, and leave the present connection so that another server can go on with it. Does not wait, as [`Self::stop`].
    pub fn hand_over(&self) {
        self.hands_over.store(true, Ordering::Release);
        self.stop();
    }

    /// What there is for another server, after [`Self::hand_over`] and when it is finished: its socket file is not removed then. `None` if it
    /// had no socket to listen on.
    pub fn into_left(mut self) -> Option<(SocketFile, Left)> {
        self.take_left()
    }

    /// As [`Self::into_left`]; `None` also when that has been taken before, or nobody was to hand over.
    pub fn take_left(&mut self) -> Option<(SocketFile, Left)> {
        if !self.hands_over.load(Ordering::Acquire) {
            return None;
        }
        let left = self.thread.take()?.join().ok()??;
        let mut file = self.file.take()?;
        file.leave();
        Some((file, left))
    }

    /// The socket file is ours to remove.
    pub fn own_file(&mut self) {
        if let Some(file) = &mut self.file {
            file.own();
        }
    }

    /// Accept no more and end the present connection. Does not wait: [`Self::is_finished`] tells when it is done.
    pub fn stop(&self) {
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
    }

    /// Let go of a server that does not end: its thread stays, its socket file goes.
    pub fn abandon(mut self) {
        self.thread = None;
    }

    /// Whether a front-end of `controller`, which this serves, will connect again once this process has gone: one that is here, or one that has not come
    /// back yet. The clients of vfio-user do not.
    pub fn will_be_missed(&self, controller: &Controller) -> bool {
        let awaited = self.transport == Transport::VhostUser && controller.is_awaited();
        awaited || self.missed.load(Ordering::Acquire)
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

/// What the thread knows.
struct Serving {
    transport: Transport,
    controller: Arc<Controller>,
    hands_over: Arc<AtomicBool>,
    missed: Arc<AtomicBool>,
}

/// How the serving of a front-end ended.
enum Then {
    /// The next one may come.
    Next,
    /// None may; this is what another process goes on with.
    Stop(Option<(UnixStream, Carried)>),
}

impl Serving {
    /// Serve a front-end and log its coming and going.
    fn serve(&self, stream: UnixStream, before: Option<Carried>, stop: &OwnedFd) -> Then {
        let name = self.controller.name();
        match before {
            None => tracing::info!(controller = name, "front-end connected"),
            Some(_) => tracing::info!(
                controller = name,
                "the front-end's connection was taken over"
            ),
        }
        let served = AssertUnwindSafe(|| {
            // If the front-end before this one cut it.
            if let Err(e) = self.controller.window().mend() {
                let why = format!("the doorbells' file cannot be mended: {e}");
                return (End::Refused(why), None);
            }
            match self.transport {
                Transport::VhostUser => {
                    let end = vhost_user::serve(&stream, &self.controller, stop.as_fd());
                    (end, None)
                }
                Transport::VfioUser => vfio_user::serve(
                    &stream,
                    &self.controller,
                    stop.as_fd(),
                    &self.hands_over,
                    before,
                ),
            }
        });
        let again = self.transport == Transport::VhostUser;
        self.missed.store(again, Ordering::Release);
        let (end, carried) = catch_unwind(served).unwrap_or_else(|_| {
            // A mistake of ours, which only this front-end found. The controller keeps nothing of it.
            self.controller.detach(DRAIN_LIMIT);
            let why = "serving it failed; this is a bug of the daemon";
            (End::Refused(why.into()), None)
        });
        self.missed.store(false, Ordering::Release);
        match end {
            End::Closed => tracing::info!(controller = name, "front-end disconnected"),
            End::Refused(why) => {
                tracing::warn!(controller = name, "connection ended: {why}");
            }
            End::Stopped => {
                match carried {
                    Some(_) => tracing::info!(controller = name, "connection handed over"),
                    None => tracing::info!(controller = name, "connection ended: the daemon stops"),
                }
                return Then::Stop(carried.map(|carried| (stream, carried)));
            }
        }
        // The front-end may have passed copies of its end to others.
        let _ = stream.shutdown(std::net::Shutdown::Both);
        Then::Next
    }

    /// Serve front-ends until told to stop; what is left for another process then.
    fn accept(
        &self,
        listener: UnixListener,
        before: Option<(UnixStream, Carried)>,
        stop: &OwnedFd,
    ) -> Option<Left> {
        let name = self.controller.name();
        let left = |connection| {
            Some(Left {
                listener: listener.try_clone().ok()?,
                connection,
            })
        };
        if let Err(e) = listener.set_nonblocking(true) {
            tracing::error!(controller = name, "cannot accept front-ends: {e}");
            return None;
        }
        if let Some((stream, carried)) = before
            && let Then::Stop(connection) = self.serve(stream, Some(carried), stop)
        {
            return left(connection);
        }
        loop {
            let mut fds = [
                PollFd::new(stop, PollFlags::IN),
                PollFd::new(&listener, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => {
                    tracing::error!(controller = name, "cannot wait for front-ends: {e}");
                    return None;
                }
            }
            if !fds[0].revents().is_empty() {
                return left(None);
            }
            if fds[1].revents().is_empty() {
                continue;
            }
            match listener.accept() {
                Ok((stream, _)) => {
                    if let Then::Stop(connection) = self.serve(stream, None, stop) {
                        return left(connection);
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
}

/// Wait, unless told to stop.
fn pause(stop: &OwnedFd, time: Duration) {
    let limit = Timespec {
        tv_sec: time.as_secs().cast_signed(),
        tv_nsec: time.subsec_nanos().into(),
    };
    let _ = poll(&mut [PollFd::new(stop, PollFlags::IN)], Some(&limit));
}
