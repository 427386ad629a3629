//! One connection from its first message to its end.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error};

use super::channel::Channel;
use super::device::Device;
use super::message::{Message, ReadError, Reader};
use crate::controller::{Controller, DRAIN_LIMIT};
use crate::transport::{DOORBELLS_CUT, End, Ended, Failure, refused};

/// Serve a front-end until it goes, does something wrong, or `stop` becomes readable. The controller is attached
/// meanwhile, and has let go of everything but its state afterwards.
pub fn serve(stream: &UnixStream, controller: &Arc<Controller>, stop: impl AsFd) -> End {
    let result = Connection::new(stream, controller);
    let mut connection = match result {
        Ok(c) => c,
        Err(e) => return End::Refused(format!("no connection could be set up: {e}")),
    };
    controller.attach(Arc::clone(&connection.channel) as _);
    let end = connection.run(stop);
    connection.channel.close();
    let quiet = match controller.window().is_cut() {
        // What the guest had rung is gone with it: there is nothing to go on from.
        true => controller.detach(DRAIN_LIMIT),
        false => controller.suspend(DRAIN_LIMIT),
    };
    if !quiet {
        tracing::warn!(
            controller = controller.name(),
            "I/O of the front-end that has gone is still out after {DRAIN_LIMIT:?}; its memory stays mapped until it is done"
        );
    }
    end
}

struct Connection<'a> {
    front: &'a UnixStream,
    controller: &'a Arc<Controller>,
    failure: Arc<Failure>,
    channel: Arc<Channel>,
    device: Arc<Device>,
    reader: Reader,
    /// The crate parses and answers messages at the other end of `feed`. It gets only whole ones, so it never waits: the front-end
    /// may send what it likes, when it likes, and we still see that we are to stop.
    crate_side: BackendReqHandler<Device>,
    feed: UnixStream,
}

impl<'a> Connection<'a> {
    fn new(front: &'a UnixStream, controller: &'a Arc<Controller>) -> io::Result<Self> {
        front.set_nonblocking(true)?;
        let failure = Arc::new(Failure::new()?);
        let device = Device::new(Arc::clone(controller), Arc::clone(&failure));
        let (feed, theirs) = UnixStream::pair()?;
        Ok(Self {
            front,
            controller,
            channel: Channel::new(Arc::clone(controller.window()), Arc::clone(&failure)),
            failure,
            reader: Reader::default(),
            crate_side: BackendReqHandler::from_stream(theirs, Arc::clone(&device)),
            device,
            feed,
        })
    }

    fn run(&mut self, stop: impl AsFd) -> End {
        loop {
            let step = self
                .wait(&stop, PollFlags::IN)
                .and_then(|()| self.one_message(&stop));
            if let Err(Ended(end)) = step {
                return end;
            }
        }
    }

    /// Wait for the front-end's socket; an end that comes from our side is looked at first.
    fn wait(&self, stop: impl AsFd, events: PollFlags) -> Result<(), Ended> {
        loop {
            let window = self.controller.window();
            let mut fds = [
                PollFd::new(&self.front, events),
                PollFd::new(self.failure.wake(), PollFlags::IN),
                PollFd::new(&stop, PollFlags::IN),
                // Where nobody can cut it, something that is looked at anyway.
                PollFd::from_borrowed_fd(
                    window.cut_fd().unwrap_or(self.failure.wake().as_fd()),
                    PollFlags::IN,
                ),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(e) => return Err(refused("waiting for the front-end", e)),
            }
            let [front, wake, stop, _] = fds.map(|f| !f.revents().is_empty());
            if stop {
                return Err(Ended(End::Stopped));
            }
            if wake {
                self.failed()?;
            }
            if window.is_cut() {
                return Err(Ended(End::Refused(DOORBELLS_CUT.into())));
            }
            if front {
                return Ok(());
            }
        }
    }

    /// Look whether something went wrong elsewhere.
    fn failed(&self) -> Result<(), Ended> {
        let mut count = [0; 8];
        let _ = rustix::io::read(self.failure.wake(), &mut count);
        if let Some(gpa) = self.device.cut_region() {
            return Err(Ended(End::Refused(format!(
                "the file behind the guest memory at {gpa:#x} was cut while it was mapped"
            ))));
        }
        match self.failure.get() {
            Some(why) => Err(Ended(End::Refused(why))),
            None => Ok(()),
        }
    }

    fn one_message(&mut self, stop: impl AsFd) -> Result<(), Ended> {
        let mut message = match self.reader.read(self.front) {
            Ok(None) => return Ok(()),
            Ok(Some(message)) => message,
            Err(ReadError::Closed) => return Err(Ended(End::Closed)),
            Err(e) => return Err(Ended(End::Refused(e.to_string()))),
        };
        let name = message.name();
        tracing::trace!(controller = self.controller.name(), message = name);
        let channel = self.channel_socket(&mut message)?;
        message.forward(&self.feed).map_err(|e| refused(&name, e))?;
        let reset = message.code() == u32::from(FrontendReq::RESET_DEVICE);
        // Ours would keep the front-end's files open longer than it may expect.
        drop(message);
        if reset {
            self.channel.reset_begins();
        }
        let result = self.crate_side.handle_request();
        self.answer(&stop)?;
        if reset {
            self.channel.reset_ends();
        }
        result.map_err(|e| refused(&name, describe(&e)))?;
        if let Some(socket) = channel {
            let opened = self.channel.open(socket, Arc::clone(self.controller));
            opened.map_err(|e| refused(&name, e))?;
        }
        Ok(())
    }

    /// The socket of the back-end channel, if this message brings it.
    ///
    /// The crate's own object for it waits for answers in a way that nobody can end, so ours is a duplicate.
    fn channel_socket(&self, message: &mut Message) -> Result<Option<OwnedFd>, Ended> {
        if message.code() != u32::from(FrontendReq::SET_BACKEND_REQ_FD) {
            return Ok(None);
        }
        let name = message.name();
        if !self.device.may_open_channel() {
            return Err(refused(
                &name,
                "it needs the protocol features BACKEND_REQ, BACKEND_SEND_FD, REPLY_ACK and SHMEM",
            ));
        }
        match message.files.as_slice() {
            [one] => one.try_clone().map(Some).map_err(|e| refused(&name, e)),
            // Let the crate say what it thinks of that.
            _ => Ok(None),
        }
    }

    /// Send the front-end what the crate answered.
    fn answer(&self, stop: impl AsFd) -> Result<(), Ended> {
        let mut bytes = [MaybeUninit::uninit(); 8192];
        loop {
            let mut rest = match recv(&self.feed, &mut bytes[..], RecvFlags::DONTWAIT) {
                Ok(((answer, _), _)) => &*answer,
                Err(Errno::AGAIN) => return Ok(()),
                Err(e) => return Err(refused("answering the front-end", e)),
            };
            if rest.is_empty() {
                return Ok(());
            }
            while !rest.is_empty() {
                match send(self.front, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                    Ok(n) => rest = rest.get(n..).unwrap_or_default(),
                    Err(Errno::AGAIN) => self.wait(&stop, PollFlags::OUT)?,
                    Err(Errno::INTR) => {}
                    Err(Errno::PIPE | Errno::CONNRESET) => return Err(Ended(End::Closed)),
                    Err(e) => return Err(refused("answering the front-end", e)),
                }
            }
        }
    }
}

/// The crate's errors, for an operator.
fn describe(error: &Error) -> String {
    match error {
        Error::ReqHandlerError(e) => e.to_string(),
        Error::InvalidMessage => {
            "its size, content or attached files are not what this message has".into()
        }
        Error::InvalidParam => "a number in it, or the number of its files, is out of range".into(),
        Error::InactiveOperation(f) => {
            format!("the protocol feature {f:?} it belongs to was not negotiated")
        }
        Error::InactiveFeature(f) => format!("the feature {f:?} it belongs to was not negotiated"),
        other => other.to_string(),
    }
}
