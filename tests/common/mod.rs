//! The program under test, and a client that speaks vhost-user byte by byte.

#![allow(dead_code, reason = "each test program uses its part")]

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// How long anything may take on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The program.
pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-nvme"));
    command
        .stdin(Stdio::null())
        .env_remove("RUST_LOG")
        .env("RUNTIME_DIRECTORY", env!("CARGO_TARGET_TMPDIR"));
    command
}

/// Run it to its end.
pub fn run(args: &[&str]) -> Output {
    program().args(args).output().unwrap()
}

/// Wait until `f` gives something.
pub fn eventually<T>(what: &str, mut f: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(t) = f() {
            return t;
        }
        assert!(Instant::now() < end, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A running daemon; killed when dropped.
pub struct Daemon {
    child: Child,
    log: PathBuf,
    seen: usize,
}

impl Daemon {
    /// Start it; its log is `dir/log` (of the last one), and what it keeps is below `dir/state`. Does not wait for anything.
    pub fn start(dir: &Path, args: &[&str]) -> Self {
        let log = dir.join("log");
        let file = std::fs::File::create(&log).unwrap();
        let child = program()
            .env("RUNTIME_DIRECTORY", dir.join("state"))
            .args(args)
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap();
        Self {
            child,
            log,
            seen: 0,
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Wait for a line with `text` in it that no earlier call has found; it.
    pub fn line(&mut self, text: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let log = self.log();
            let mut at = self.seen;
            for line in log[self.seen..].split_inclusive('\n') {
                at += line.len();
                if line.contains(text) && line.ends_with('\n') {
                    self.seen = at;
                    return line.trim_end().to_owned();
                }
            }
            assert!(
                Instant::now() < end,
                "no line with '{text}' after:\n{}",
                &log[self.seen..]
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// All that was logged since the last [`Self::line`].
    pub fn rest(&self) -> String {
        self.log()[self.seen..].to_owned()
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Wait for its end.
    pub fn wait(&mut self) -> ExitStatus {
        let child = &mut self.child;
        eventually("the end of the daemon", || child.try_wait().unwrap())
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Connect as soon as somebody listens.
pub fn connect(path: &Path) -> UnixStream {
    let stream = eventually("a connection", || UnixStream::connect(path).ok());
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

pub mod code {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const CHECK_DEVICE_STATE: u32 = 43;
    pub const GET_SHMEM_CONFIG: u32 = 44;
    pub const SHMEM_MAP: u32 = 9;
}

/// Version 1.
pub const PLAIN: u32 = 1;
/// Version 1, with an acknowledgement.
pub const NEED_REPLY: u32 = 9;

pub const VERSION_1: u64 = 1 << 32;
pub const PROTOCOL: u64 = 1 << 30;

pub fn u64s(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

pub fn u32s(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

/// A front-end, or something that pretends to be one.
pub struct Client {
    pub stream: UnixStream,
}

impl Client {
    pub fn connect(path: &Path) -> Self {
        Self {
            stream: connect(path),
        }
    }

    /// Send bytes with files. Whether the daemon is still there is not asked.
    pub fn raw(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(files)));
        }
        let _ = sendmsg(
            &self.stream,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        );
    }

    pub fn send(&self, code: u32, flags: u32, body: &[u8], files: &[BorrowedFd<'_>]) {
        let mut bytes = u32s(&[code, flags, body.len() as u32]);
        bytes.extend(body);
        self.raw(&bytes, files);
    }

    /// The body of an answer; `None` if the daemon has closed the connection.
    pub fn answer(&mut self) -> Option<(u32, Vec<u8>)> {
        let mut header = [0; 12];
        self.stream.read_exact(&mut header).ok()?;
        let word = |i: usize| u32::from_ne_bytes(header[4 * i..4 * i + 4].try_into().unwrap());
        assert_eq!(word(1) & 7, 5, "an answer of version 1");
        let mut body = vec![0; word(2) as usize];
        self.stream.read_exact(&mut body).ok()?;
        Some((word(0), body))
    }

    /// Ask, and the answer as a number.
    pub fn ask(&mut self, code: u32, body: &[u8], files: &[BorrowedFd<'_>]) -> Option<u64> {
        self.send(code, NEED_REPLY, body, files);
        let (what, body) = self.answer()?;
        assert_eq!(what, code);
        Some(u64::from_ne_bytes(body.get(..8)?.try_into().ok()?))
    }

    /// Whether the daemon closes the connection (after an answer or without).
    pub fn is_closed(&mut self) -> bool {
        let mut bytes = [0; 4096];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(e) => return e.kind() == std::io::ErrorKind::ConnectionReset,
            }
        }
    }

    /// Features, owner and protocol features, as a proper front-end agrees on them.
    pub fn handshake(path: &Path) -> Self {
        let mut c = Self::connect(path);
        for step in 0..HANDSHAKE {
            c.step(step);
        }
        c
    }

    /// One step of the handshake.
    pub fn step(&mut self, step: usize) {
        match step {
            0 => {
                self.send(code::GET_FEATURES, PLAIN, &[], &[]);
                let (_, body) = self.answer().unwrap();
                assert_eq!(body, u64s(&[VERSION_1 | PROTOCOL]));
            }
            1 => {
                self.send(code::GET_PROTOCOL_FEATURES, PLAIN, &[], &[]);
                let (_, body) = self.answer().unwrap();
                self.send(code::SET_PROTOCOL_FEATURES, PLAIN, &body, &[]);
            }
            2 => assert_eq!(self.ask(code::SET_OWNER, &[], &[]), Some(0)),
            3 => {
                let all = u64s(&[VERSION_1 | PROTOCOL]);
                assert_eq!(self.ask(code::SET_FEATURES, &all, &[]), Some(0));
            }
            4 => {
                self.send(code::GET_SHMEM_CONFIG, PLAIN, &[], &[]);
                let (_, body) = self.answer().unwrap();
                assert_eq!(body[..4], u32s(&[2]));
            }
            5 => assert_eq!(self.config(0xF00, 4), 0x454D_564E_u32.to_le_bytes()),
            _ => unreachable!(),
        }
    }

    /// Read the configuration space.
    pub fn config(&mut self, offset: u32, size: u32) -> Vec<u8> {
        let mut body = u32s(&[offset, size, 0]);
        body.resize(12 + size as usize, 0);
        self.send(code::GET_CONFIG, PLAIN, &body, &[]);
        let (_, body) = self.answer().unwrap();
        assert_eq!(body.len(), 12 + size as usize);
        body[12..].to_owned()
    }

    /// Write the configuration space.
    pub fn set_config(&mut self, offset: u32, data: &[u8]) {
        let mut body = u32s(&[offset, data.len() as u32, 0]);
        body.extend(data);
        self.send(code::SET_CONFIG, PLAIN, &body, &[]);
    }
}

/// Steps of [`Client::step`].
pub const HANDSHAKE: usize = 6;

/// The front-end's end of a back-end channel.
pub struct Channel(pub UnixStream);

impl Channel {
    /// Give the daemon the other end.
    pub fn open(client: &mut Client) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        let answer = client.ask(code::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
        assert_eq!(answer, Some(0));
        Self(ours)
    }

    /// A request and its file.
    pub fn request(&self) -> (u32, Vec<u8>, Option<OwnedFd>) {
        let mut bytes = [0; 12 + 40];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(
            &self.0,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::WAITALL,
        );
        assert_eq!(got.unwrap().bytes, bytes.len());
        let file = control.drain().find_map(|m| match m {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let code = u32::from_ne_bytes(bytes[..4].try_into().unwrap());
        (code, bytes[12..].to_owned(), file)
    }

    pub fn acknowledge(&mut self, code: u32, result: u64) {
        let mut bytes = u32s(&[code, 5, 8]);
        bytes.extend(result.to_ne_bytes());
        let _ = self.0.write_all(&bytes);
    }
}

/// A file of shared memory.
pub fn memory(len: u64) -> std::fs::File {
    let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = std::fs::File::from(fd);
    file.set_len(len).unwrap();
    file
}

pub fn eventfd() -> OwnedFd {
    rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap()
}

/// The body of ADD_MEM_REG and REM_MEM_REG.
pub fn region(gpa: u64, len: u64, offset: u64) -> Vec<u8> {
    u64s(&[0, gpa, len, gpa, offset])
}
