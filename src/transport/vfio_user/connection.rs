//! One connection from its first message to its end.

use std::collections::VecDeque;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::Refusal;
use super::device::{self, Device};
use super::message::{Answer, Command, Message, ReadError, Reader};
use crate::controller::{Controller, DRAIN_LIMIT, FrontEnd, MemoryError};
use crate::memory::GuestMap;
use crate::poller::DoorbellMode;
use crate::transport::stream::send_some;
use crate::transport::{DOORBELLS_CUT, End, Ended, Failure, refused};

/// How long memory that was taken away may take to come back, after the last message about memory.
const LINGER: Duration = Duration::from_millis(20);
/// And after the first one.
const MOST_LINGER: Duration = Duration::from_millis(500);
/// Answers about memory that may wait for it.
const MOST_HELD: usize = 1024;
/// How long messages about memory then wait for I/O: with all of the above less than a VMM has patience (QEMU 5 s).
const UNMAP_LIMIT: Duration = Duration::from_millis(3500);
/// How often memory that had to wait for I/O is tried again after that, and for how long each time.
const RETRY: Duration = Duration::from_millis(100);
const RETRY_LIMIT: Duration = Duration::from_millis(5);

/// Serve a client until it goes, does something wrong, or `stop` becomes readable; one whose connection another process has begun
/// (`before`) as if nothing had happened. The controller is attached meanwhile, and has let go of everything afterwards: unless we were
/// told to stop and `hands_over` says that somebody else goes on with it. Then it is suspended, and the connection is returned.
pub fn serve(
    stream: &UnixStream,
    controller: &Arc<Controller>,
    stop: BorrowedFd<'_>,
    hands_over: &AtomicBool,
    before: Option<Carried>,
) -> (End, Option<Carried>) {
    let failed = |e: io::Error| End::Refused(format!("no connection could be set up: {e}"));
    let front = match Front::new() {
        Ok(front) => Arc::new(front),
        Err(e) => return (failed(e), None),
    };
    controller.attach(Arc::clone(&front) as _);
    let (end, carried) = match Connection::new(stream, controller, front, stop) {
        Err(e) => (failed(e), None),
        Ok(mut connection) => {
            let begun = connection.begin(before);
            let end = match begun {
                Ok(()) => connection.run(),
                Err(Ended(end)) => end,
            };
            match end {
                End::Stopped if hands_over.load(Ordering::Acquire) => {
                    let carried = connection.leave();
                    (End::Stopped, carried)
                }
                end => (end, None),
            }
        }
    };
    let quiet = match carried {
        Some(_) => controller.suspend(DRAIN_LIMIT),
        None => controller.detach(DRAIN_LIMIT),
    };
    if !quiet {
        tracing::warn!(
            controller = controller.name(),
            "I/O of the client is still out after {DRAIN_LIMIT:?}; its memory stays mapped until it is done"
        );
    }
    (end, carried)
}

/// A connection on its way to another process, without its socket.
#[derive(Debug)]
pub struct Carried(Box<Inside>);

#[derive(Debug)]
struct Inside {
    image: Image,
    /// Those that the image names.
    files: Vec<OwnedFd>,
}

/// What there is to know of a connection besides its files.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Image {
    /// What the controller calls it.
    instance: [u8; 16],
    device: device::Image,
    /// Files of the device; those of a message that is not whole follow, and then those of the answers.
    device_files: usize,
    /// A message that is not whole.
    incoming: Vec<u8>,
    incoming_files: usize,
    /// What the client has not got yet, and whether a file goes with its first byte.
    outgoing: Vec<(Vec<u8>, bool)>,
}

impl Carried {
    /// What to send.
    pub fn parts(&self) -> (&Image, &[OwnedFd]) {
        (&self.0.image, &self.0.files)
    }

    /// What was received.
    pub fn new(image: Image, files: Vec<OwnedFd>) -> Self {
        Self(Box::new(Inside { image, files }))
    }
}

/// A name for a connection that nobody had before.
fn new_instance() -> io::Result<[u8; 16]> {
    let mut id = [0; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut id)?;
    Ok(id)
}

/// What the controller wants of us. A client that has mapped the doorbells has them for good; one that has not cannot be made to.
struct Front {
    /// Signalled when it wants to know how they reach it.
    wake: OwnedFd,
}

impl Front {
    fn new() -> io::Result<Self> {
        Ok(Self {
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }
}

impl FrontEnd for Front {
    fn request_doorbells(&self, _: DoorbellMode) {
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

struct Connection<'a> {
    client: &'a UnixStream,
    stop: BorrowedFd<'a>,
    controller: &'a Arc<Controller>,
    front: Arc<Front>,
    failure: Failure,
    device: Device,
    reader: Reader,
    /// Messages about memory whose answers wait until it has settled.
    held: Vec<(Message, Result<Answer, Refusal>)>,
    /// When the first and the last of them came.
    since: Option<(Instant, Instant)>,
    /// Memory that I/O keeps from the controller, and when to try it again.
    late: Option<(Arc<GuestMap>, Instant)>,
    /// What the client is to get.
    outgoing: VecDeque<Outgoing>,
}

/// What there is to do.
struct Ready {
    /// The client has sent something, or takes more.
    client: bool,
    /// The controller wants to know how doorbells reach it.
    front: bool,
}

/// Bytes for the client, with a file that goes with the first of them.
struct Outgoing {
    bytes: Vec<u8>,
    file: Option<OwnedFd>,
}

impl<'a> Connection<'a> {
    fn new(
        client: &'a UnixStream,
        controller: &'a Arc<Controller>,
        front: Arc<Front>,
        stop: BorrowedFd<'a>,
    ) -> io::Result<Self> {
        client.set_nonblocking(true)?;
        let failure = Failure::new()?;
        Ok(Self {
            client,
            stop,
            controller,
            front,
            device: Device::new(controller, &failure)?,
            failure,
            reader: Reader::default(),
            held: Vec::new(),
            since: None,
            late: None,
            outgoing: VecDeque::new(),
        })
    }

    /// Give the connection a name, or go on with that of another process.
    fn begin(&mut self, before: Option<Carried>) -> Result<(), Ended> {
        let Some(Carried(before)) = before else {
            let id = new_instance().map_err(|e| refused("the connection", e))?;
            self.controller.set_instance(id);
            // A client that has just come has used nothing.
            if !self.controller.go(false, DRAIN_LIMIT) {
                // What it did now would be undone when that ends.
                let why = format!("I/O of an earlier client is still out after {DRAIN_LIMIT:?}");
                return Err(Ended(End::Refused(why)));
            }
            return Ok(());
        };
        let Inside { image, mut files } = *before;
        let lost = |why: &str| Ended(End::Refused(format!("it cannot be gone on with: {why}")));
        let needed = image.device_files.checked_add(image.incoming_files);
        if needed.is_none_or(|needed| needed > files.len()) {
            return Err(lost("files are missing"));
        }
        let mut rest = files.split_off(image.device_files);
        let mut answers = rest.split_off(image.incoming_files).into_iter();
        self.reader = Reader::going_on(image.incoming, rest);
        for (bytes, with_file) in image.outgoing {
            let file = if with_file { answers.next() } else { None };
            self.outgoing.push_back(Outgoing { bytes, file });
        }
        let restored = self.device.restore(image.device, &files);
        restored.map_err(|why| lost(&why))?;
        self.controller.set_instance(image.instance);
        if let Some(map) = self.device.memory().take_change() {
            let map = map.map_err(|e| refused("its memory", e))?;
            let set = self.controller.set_memory(map, UNMAP_LIMIT);
            set.map_err(|e| refused("its memory", e))?;
        }
        self.tell_doorbells();
        if !self.controller.go(true, DRAIN_LIMIT) {
            return Err(lost("the controller does not begin"));
        }
        self.flush()
    }

    /// Leave the connection as it is to another process.
    fn leave(mut self) -> Option<Carried> {
        self.settle_memory().ok()?;
        let instance = self.controller.instance()?;
        let (device, mut files) = self.device.into_carried();
        let device_files = files.len();
        let (incoming, more) = self.reader.into_rest();
        let incoming_files = more.len();
        files.extend(more);
        let mut outgoing = Vec::new();
        for Outgoing { bytes, file } in self.outgoing {
            outgoing.push((bytes, file.is_some()));
            files.extend(file);
        }
        let image = Image {
            instance,
            device,
            device_files,
            incoming,
            incoming_files,
            outgoing,
        };
        Some(Carried::new(image, files))
    }

    fn run(&mut self) -> End {
        loop {
            if let Err(Ended(end)) = self.step() {
                return end;
            }
        }
    }

    /// Wait for one thing and do it.
    fn step(&mut self) -> Result<(), Ended> {
        let ready = self.wait()?;
        let message = if ready.client { self.read()? } else { None };
        if let Some(message) = message {
            self.carry_out(message)?;
        }
        if self.settles_at().is_some_and(|at| at <= Instant::now()) {
            self.settle()?;
        }
        self.retry();
        self.device.serve_pin();
        if ready.front {
            let _ = rustix::io::read(&self.front.wake, &mut [0; 8]);
            self.tell_doorbells();
        }
        Ok(())
    }

    /// When memory counts as settled; `None` if it does.
    fn settles_at(&self) -> Option<Instant> {
        let (first, last) = self.since?;
        Some((last + LINGER).min(first + MOST_LINGER))
    }

    /// How long to wait for a message; `None` for ever.
    fn patience(&self) -> Option<Duration> {
        let again = self.late.as_ref().map(|(_, again)| *again);
        let until = self.settles_at().or(again)?;
        Some(until.saturating_duration_since(Instant::now()))
    }

    /// Try again to give the controller the memory that had to wait, if it is time and no other is about to come.
    fn retry(&mut self) {
        if self.since.is_none()
            && let Some((map, _)) = self.late.take_if(|(_, again)| *again <= Instant::now())
        {
            let controller = self.controller.name();
            match self.give(map, RETRY_LIMIT) {
                Err(MemoryError::NotYet(_)) => {}
                Ok(()) | Err(MemoryError::InUse(_)) => {
                    tracing::info!(controller, "memory that had to wait for I/O is there now");
                }
                Err(e) => tracing::error!(controller, "{e}"),
            }
        }
    }

    /// Give the controller this memory. What I/O keeps from it is tried again later.
    fn give(&mut self, map: Arc<GuestMap>, limit: Duration) -> Result<(), MemoryError> {
        let given = self.controller.set_memory(Arc::clone(&map), limit);
        self.late =
            matches!(given, Err(MemoryError::NotYet(_))).then(|| (map, Instant::now() + RETRY));
        given
    }

    /// Wait for whatever there may be to do.
    fn wait(&self) -> Result<Ready, Ended> {
        let mut others = vec![self.front.wake.as_fd()];
        others.extend(self.device.pin_wakes());
        self.wait_for(PollFlags::IN, &others, self.patience())
    }

    /// Wait for the client's socket and for `others`, of which the first is the front's, for so long at most. Ends that come from our side
    /// are looked at first.
    fn wait_for(
        &self,
        events: PollFlags,
        others: &[BorrowedFd<'_>],
        limit: Option<Duration>,
    ) -> Result<Ready, Ended> {
        let limit = limit.map(|limit| Timespec {
            tv_sec: limit.as_secs().cast_signed(),
            tv_nsec: limit.subsec_nanos().into(),
        });
        let window = self.controller.window();
        let mut fds = vec![
            PollFd::new(&self.client, events),
            PollFd::new(self.failure.wake(), PollFlags::IN),
            PollFd::new(&self.stop, PollFlags::IN),
        ];
        let more = others.iter().copied().chain(window.cut_fd());
        fds.extend(more.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(refused("waiting for the client", e)),
        }
        let ready = |i: usize| fds.get(i).is_some_and(|f| !f.revents().is_empty());
        if ready(2) {
            return Err(Ended(End::Stopped));
        }
        if ready(1) {
            let _ = rustix::io::read(self.failure.wake(), &mut [0; 8]);
            if self.device.is_cut() {
                let why = "a file behind the guest's memory was cut while it was mapped";
                return Err(Ended(End::Refused(why.into())));
            }
        }
        if window.is_cut() {
            return Err(Ended(End::Refused(DOORBELLS_CUT.into())));
        }
        Ok(Ready {
            client: ready(0),
            front: !others.is_empty() && ready(3),
        })
    }

    fn read(&mut self) -> Result<Option<Message>, Ended> {
        match self.reader.read(self.client) {
            Ok(message) => Ok(message),
            Err(ReadError::Closed) => Err(Ended(End::Closed)),
            Err(e) => Err(Ended(End::Refused(e.to_string()))),
        }
    }

    fn carry_out(&mut self, mut message: Message) -> Result<(), Ended> {
        let command = message.command();
        tracing::trace!(controller = self.controller.name(), ?command);
        let about_memory = matches!(command, Command::DmaMap | Command::DmaUnmap);
        let access = matches!(command, Command::RegionRead | Command::RegionWrite);
        // A posted message is done before the next one is answered: its client has no other way to know.
        let posted = self.held.iter().any(|(message, _)| message.is_posted());
        if !about_memory && (!access || posted) {
            self.settle()?;
        }
        let was_mapped = self.device.is_mapped();
        let result = self.device.carry_out(&mut message);
        if let Err(refusal) = &result {
            tracing::debug!(
                controller = self.controller.name(),
                ?command,
                "refused: {} ({})",
                refusal.why,
                refusal.errno
            );
        }
        if self.device.is_mapped() != was_mapped {
            self.tell_doorbells();
        }
        if !about_memory {
            self.answer(&message, result);
            return self.flush();
        }
        self.held.push((message, result));
        let now = Instant::now();
        self.since = Some(self.since.map_or((now, now), |(first, _)| (first, now)));
        if self.device.memory().is_settled() || self.held.len() >= MOST_HELD {
            self.settle()?;
        }
        Ok(())
    }

    /// Give the controller the memory there is now, and send the answers that wait for that.
    fn settle(&mut self) -> Result<(), Ended> {
        self.settle_memory()?;
        self.flush()
    }

    /// As [`Self::settle`]; the answers only wait to be sent then.
    fn settle_memory(&mut self) -> Result<(), Ended> {
        self.since = None;
        let changed = match self.device.memory().take_change() {
            None => Ok(()),
            Some(Ok(map)) => {
                self.device.set_map(Arc::clone(&map));
                // What is late already has been waited for.
                let limit = match self.late {
                    Some(_) => RETRY_LIMIT,
                    None => UNMAP_LIMIT,
                };
                self.give(map, limit)
            }
            Some(Err(e)) => return Err(refused("a change of memory", e)),
        };
        // Who cannot be told that it was done: unmaps that I/O is in the way of, or everybody.
        let failed = match &changed {
            Ok(()) => None,
            Err(MemoryError::InUse(_)) => Some((Errno::BUSY, Some(Command::DmaUnmap))),
            Err(MemoryError::NotYet(_)) => Some((Errno::BUSY, None)),
            Err(_) => Some((Errno::NOMEM, None)),
        };
        if let Err(e) = changed {
            tracing::error!(controller = self.controller.name(), "{e}");
        }
        for (message, mut result) in std::mem::take(&mut self.held) {
            if let Some((errno, of)) = failed
                && of.is_none_or(|of| of == message.command())
                && result.is_ok()
            {
                result = Err(Refusal::new(
                    errno,
                    "the controller's memory could not be changed",
                ));
            }
            self.answer(&message, result);
        }
        Ok(())
    }

    /// Put an answer where [`Self::flush`] finds it.
    fn answer(&mut self, message: &Message, result: Result<Answer, Refusal>) {
        if let Some(bytes) = message.answer(&result) {
            let file = result.ok().and_then(|answer| answer.file);
            self.outgoing.push_back(Outgoing { bytes, file });
        }
    }

    /// Send what the client is to get.
    fn flush(&mut self) -> Result<(), Ended> {
        while let Some(mut next) = self.outgoing.pop_front() {
            let files: Vec<BorrowedFd<'_>> = next.file.iter().map(AsFd::as_fd).collect();
            let sent = send_some(self.client.as_fd(), &next.bytes, &files);
            drop(files);
            match sent {
                Ok(sent) => {
                    next.bytes.drain(..sent.min(next.bytes.len()));
                    if sent > 0 {
                        next.file = None;
                    }
                    if !next.bytes.is_empty() {
                        self.outgoing.push_front(next);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.outgoing.push_front(next);
                    // Not for what is done elsewhere: it would stay to be done, and we would not sleep.
                    self.wait_for(PollFlags::OUT, &[], None)?;
                }
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                    ) =>
                {
                    return Err(Ended(End::Closed));
                }
                Err(e) => return Err(refused("answering the client", e)),
            }
        }
        Ok(())
    }

    /// Tell the controller how doorbells reach it.
    fn tell_doorbells(&self) {
        self.controller.doorbells_are(if self.device.is_mapped() {
            DoorbellMode::Mapped
        } else {
            DoorbellMode::Trapped
        });
    }
}

#[cfg(test)]
mod tests;
