//! A connection whose bytes, files and guest memory are the input's.
//!
//! An input is a list of records. The low bits of a record's first byte say what it is:
//! - 0 to 4: a message. Bit 3: the bytes as they are; otherwise the first two are the command and the flags, and the header is made for them.
//!   Bits 4 to 7: the files that go with it: [`RAM`], [`CALL`], [`KICK`], [`CHANNEL`].
//! - 5: bytes for the guest's memory, which is the first of these files.
//! - 6: a doorbell, where the daemon has handed over the page of them, and a kick.
//! - 7: time for the controller, which has threads of its own: until it interrupts, or [`Patience`] ends.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vhost_user_nvme::backend::{Backend, HugePages, MemoryOptions};
use vhost_user_nvme::controller::{Controller, ControllerConfig};
use vhost_user_nvme::poller::{IdlePolicy, PollerConfig, PollerPool};
use vhost_user_nvme::testing::controller_config;
use vhost_user_nvme::transport::{Endpoint, Server, Transport};

use crate::Input;

/// Bytes of the guest's memory.
pub const MEMORY: u64 = 1 << 20;
/// Goes with a message: guest memory.
pub const RAM: u8 = 1 << 4;
/// Goes with a message: an eventfd for interrupts.
pub const CALL: u8 = 1 << 5;
/// Goes with a message: an eventfd for kicks.
pub const KICK: u8 = 1 << 6;
/// Goes with a message: the daemon's end of the back-end channel.
pub const CHANNEL: u8 = 1 << 7;
/// Messages of one input, at most.
const MOST: usize = 96;
/// Pauses of one input, at most.
const PAUSES: usize = 8;
/// How long the daemon may take to see that its client has gone.
const LIMIT: Duration = Duration::from_secs(15);
/// The doorbells' part of the page that a guest can see.
const WINDOW: u16 = 0x1000;

/// How long a pause may be.
pub type Patience = Duration;

/// The controller, one for all inputs: a daemon outlives its clients.
fn controller() -> &'static Arc<Controller> {
    static CONTROLLER: OnceLock<(PollerPool, Arc<Controller>)> = OnceLock::new();
    let (_, controller) = CONTROLLER.get_or_init(|| {
        vhost_user_nvme::memory::sigbus::install().expect("a signal handler");
        let pollers = PollerPool::start(&[PollerConfig {
            core: None,
            idle: IdlePolicy::Adaptive,
            poll_for: Duration::from_micros(50),
            slots: 64,
        }])
        .expect("a poller");
        let store = Backend::memory(MemoryOptions {
            block_shift: 9,
            blocks: 2048,
            read_only: false,
            huge_pages: HugePages::Never,
        });
        let config = ControllerConfig {
            max_namespaces: 4,
            max_queue_entries: 256,
            ..controller_config("fuzz", vec![Arc::new(store.expect("memory"))])
        };
        let controller = Controller::new(config, &pollers).expect("a controller");
        (pollers, controller)
    });
    controller
}

/// The header of a message.
fn header(transport: Transport, command: u8, flags: u8, body: usize) -> Vec<u8> {
    let (command, flags, body) = (u32::from(command), u32::from(flags), body as u32);
    let words: &[u32] = match transport {
        // Message id and command, size, flags, error.
        Transport::VfioUser => &[0x1234 | command << 16, body + 16, flags, 0],
        Transport::VhostUser => &[command, flags, body],
    };
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

/// What came off a socket at once.
struct Arrived {
    bytes: Vec<u8>,
    file: Option<OwnedFd>,
}

impl Arrived {
    /// `None`: there is nothing, or nobody.
    fn next(from: &UnixStream) -> Option<Self> {
        let mut bytes = vec![0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let got = recvmsg(
            from,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            flags,
        );
        let n = got.ok().map(|got| got.bytes).filter(|n| *n > 0)?;
        bytes.truncate(n);
        let mut file = None;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                file = files.last();
            }
        }
        Some(Self { bytes, file })
    }

    fn long(&self, at: usize) -> u64 {
        let bytes = self.bytes.get(at..).and_then(|b| b.first_chunk());
        bytes.copied().map_or(0, u64::from_ne_bytes)
    }
}

struct Client {
    transport: Transport,
    socket: UnixStream,
    memory: File,
    call: OwnedFd,
    kick: OwnedFd,
    /// The back-end channel: our end and the daemon's.
    channel: (UnixStream, UnixStream),
    /// The page of doorbells, and where in the file it begins.
    window: Option<(File, u64)>,
}

impl Client {
    fn new(transport: Transport, socket: UnixStream) -> Self {
        let memory = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a memory file");
        let memory = File::from(memory);
        memory.set_len(MEMORY).expect("memory");
        socket.set_nonblocking(true).expect("a socket");
        let event =
            || eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).expect("an eventfd");
        Self {
            transport,
            socket,
            memory,
            call: event(),
            kick: event(),
            channel: UnixStream::pair().expect("a channel"),
            window: None,
        }
    }

    /// Take whatever has come, and acknowledge what wants to be.
    fn drain(&mut self) {
        while let Some(mut arrived) = Arrived::next(&self.socket) {
            // The answer to a question for a region, of 80 bytes, is the last there is: what has files ends what is received at once. Its
            // header, argsz, flags, index, capabilities, size and then the offset in the file.
            if let (Some(file), Transport::VfioUser) = (arrived.file.take(), self.transport) {
                let info = arrived.bytes.len().saturating_sub(80);
                let at = arrived.long(info + 16 + 24).saturating_add(WINDOW.into());
                self.window = Some((file.into(), at));
            }
        }
        while let Some(mut arrived) = Arrived::next(&self.channel.0) {
            // SHMEM_MAP: header, region, offset in the file.
            if let Some(file) = arrived.file.take() {
                self.window = Some((file.into(), arrived.long(12 + 8)));
            }
            let code = arrived.long(0) as u32;
            let reply = [code, 0x5, 8, 0, 0].map(u32::to_ne_bytes).concat();
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            let _ = rustix::net::send(&self.channel.0, &reply, flags);
        }
    }

    /// Send bytes and files. `false` if nobody listens any more.
    fn send(&mut self, mut bytes: &[u8], files: u8) -> bool {
        let mut first = true;
        for _ in 0..1000 {
            let all = [
                (RAM, self.memory.as_fd()),
                (CALL, self.call.as_fd()),
                (KICK, self.kick.as_fd()),
                (CHANNEL, self.channel.1.as_fd()),
            ];
            let chosen = all.into_iter().filter(|(bit, _)| files & bit != 0);
            let chosen: Vec<BorrowedFd<'_>> = chosen.map(|(_, file)| file).collect();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if first && !chosen.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(&chosen));
            }
            let sent = sendmsg(
                &self.socket,
                &[IoSlice::new(bytes)],
                &mut control,
                SendFlags::NOSIGNAL,
            );
            match sent {
                Ok(n) => {
                    bytes = &bytes[n..];
                    first = false;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    self.drain();
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(_) => return false,
            }
            if bytes.is_empty() {
                return true;
            }
        }
        panic!("nothing has been taken from the socket for a second");
    }

    fn ring(&self, at: u16, value: u16) {
        if let Some((file, offset)) = &self.window {
            let at = offset.saturating_add(((at % WINDOW) & !3).into());
            // A window may end early, and a file may be none that can be written.
            let _ = file.write_at(&u32::from(value).to_le_bytes(), at);
        }
        let _ = rustix::io::write(&self.kick, &1u64.to_ne_bytes());
    }

    fn pause(&self, patience: Patience) {
        let limit = Timespec {
            tv_sec: 0,
            tv_nsec: patience.subsec_nanos().into(),
        };
        let _ = poll(&mut [PollFd::new(&self.call, PollFlags::IN)], Some(&limit));
        let _ = rustix::io::read(&self.call, &mut [0; 8]);
    }

    /// No more will come: all of it is dealt with when the other side closes.
    fn finish(&mut self) {
        let _ = self.socket.shutdown(std::net::Shutdown::Write);
        let limit = Timespec {
            tv_sec: LIMIT.as_secs().cast_signed(),
            tv_nsec: 0,
        };
        loop {
            let mut fds = [
                PollFd::new(&self.socket, PollFlags::IN),
                PollFd::new(&self.channel.0, PollFlags::IN),
            ];
            match poll(&mut fds, Some(&limit)) {
                // The engine has a timer, which signals.
                Err(rustix::io::Errno::INTR) => continue,
                n => assert_ne!(n, Ok(0), "the connection did not end within {LIMIT:?}"),
            }
            if fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR) {
                return;
            }
            self.drain();
        }
    }
}

/// One input: a whole connection. What was in guest memory at its end.
///
/// # Panics
///
/// The daemon does not end it in time. (In a fuzz target a panic of the daemon ends the process.)
pub fn run(transport: Transport, data: &[u8], patience: Patience) -> File {
    // A controller has one client at a time; tests have several threads.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock();
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let controller = Arc::clone(controller());
    let server = Server::start(
        transport,
        Endpoint::Connected(theirs),
        None,
        controller,
        || {},
    );
    let server = server.expect("a server");
    let mut client = Client::new(transport, ours);
    let mut input = Input(data);
    let (mut messages, mut pauses) = (0, 0);
    while !input.0.is_empty() && messages < MOST {
        let control = input.byte();
        match control & 7 {
            0..=4 => {
                messages += 1;
                let len = usize::from(u16::from_le_bytes(input.array()));
                let bytes = input.bytes(len);
                let message = match bytes {
                    [command, flags, body @ ..] if control & 8 == 0 => {
                        let mut message = header(transport, *command, *flags, body.len());
                        message.extend(body);
                        message
                    }
                    _ => bytes.to_vec(),
                };
                if !message.is_empty() && !client.send(&message, control & 0xF0) {
                    break;
                }
            }
            5 => {
                let [a, b, c] = input.array();
                let at = u64::from(u32::from_le_bytes([a, b, c, 0])) % MEMORY;
                let len = usize::from(input.byte());
                let room = (MEMORY - at) as usize;
                let bytes = input.bytes(len.min(room));
                client.memory.write_all_at(bytes, at).expect("memory");
            }
            6 => {
                let [at, value] = [0; 2].map(|_| u16::from_le_bytes(input.array()));
                client.ring(at, value);
            }
            _ if pauses < PAUSES => {
                pauses += 1;
                client.pause(patience);
            }
            _ => {}
        }
        client.drain();
    }
    client.finish();
    drop(server);
    client.memory
}
