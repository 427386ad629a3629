//! A vfio-user client of our own: every message, well formed or not, as the tests want it.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::memory::MemoryRegion;

/// `VERSION`.
pub const VERSION: u16 = 1;
/// `DMA_MAP`.
pub const DMA_MAP: u16 = 2;
/// `DMA_UNMAP`.
pub const DMA_UNMAP: u16 = 3;
/// `DEVICE_GET_INFO`.
pub const GET_INFO: u16 = 4;
/// `DEVICE_GET_REGION_INFO`.
pub const GET_REGION_INFO: u16 = 5;
/// `DEVICE_GET_IRQ_INFO`.
pub const GET_IRQ_INFO: u16 = 7;
/// `DEVICE_SET_IRQS`.
pub const SET_IRQS: u16 = 8;
/// `REGION_READ`.
pub const REGION_READ: u16 = 9;
/// `REGION_WRITE`.
pub const REGION_WRITE: u16 = 10;
/// `DEVICE_RESET`.
pub const RESET: u16 = 13;

/// A flag: no reply is wanted.
pub const NO_REPLY: u32 = 1 << 4;

/// The region of BAR 0.
pub const BAR0: u32 = 0;
/// The region of the configuration space.
pub const CONFIG: u32 = 7;
/// Memory that may be read and written.
pub const READ_WRITE: u32 = 3;

/// Eventfds that are triggers.
pub const EVENTFD_TRIGGER: u32 = 4 | 32;

/// The most files in a message: what QEMU sends.
const FILES: usize = 16;

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The daemon answered with this error number.
    #[error("refused: {0}")]
    Refused(io::Error),
    /// The connection is gone.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The answer is not one.
    #[error("the daemon is wrong: {0}")]
    Wrong(String),
}

/// What a request was answered with.
#[derive(Debug)]
pub struct Reply {
    /// What follows the header.
    pub body: Vec<u8>,
    /// Its files.
    pub files: Vec<OwnedFd>,
}

impl Reply {
    /// The word at byte `at`, 0 beyond the end.
    pub fn word(&self, at: usize) -> u32 {
        let four = self.body.get(at..).and_then(|b| b.first_chunk());
        four.copied().map_or(0, u32::from_ne_bytes)
    }

    /// The long word at byte `at`, 0 beyond the end.
    pub fn long(&self, at: usize) -> u64 {
        u64::from(self.word(at)) | u64::from(self.word(at + 4)) << 32
    }
}

/// Words as the body of a message.
pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

/// The body of `DMA_MAP`.
pub fn map_body(flags: u32, offset: u64, address: u64, len: u64) -> Vec<u8> {
    let mut body = words(&[32, flags]);
    for long in [offset, address, len] {
        body.extend(long.to_ne_bytes());
    }
    body
}

/// The body of `DMA_UNMAP`.
pub fn unmap_body(flags: u32, address: u64, len: u64) -> Vec<u8> {
    let mut body = words(&[24, flags]);
    for long in [address, len] {
        body.extend(long.to_ne_bytes());
    }
    body
}

/// The body of an access to a region.
pub fn access_body(region: u32, offset: u64, count: u32, data: &[u8]) -> Vec<u8> {
    let mut body = Vec::from(offset.to_ne_bytes());
    body.extend(words(&[region, count]));
    body.extend(data);
    body
}

/// A connection.
pub struct Client(Mutex<Wire>);

struct Wire {
    stream: UnixStream,
    next: u16,
}

impl Client {
    /// A client at this end of a connection, which has said nothing yet.
    pub fn new(stream: UnixStream) -> Self {
        Self(Mutex::new(Wire { stream, next: 0 }))
    }

    fn wire(&self) -> MutexGuard<'_, Wire> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One request and its answer.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub fn request(
        &self,
        command: u16,
        body: &[u8],
        files: &[BorrowedFd<'_>],
    ) -> Result<Reply, ClientError> {
        let mut wire = self.wire();
        let id = wire.send(command, 0, body, files)?;
        let (got, reply) = wire.receive()?;
        if got != (id, command) {
            return Err(ClientError::Wrong(format!(
                "an answer to {got:?}, not to {:?}",
                (id, command)
            )));
        }
        reply
    }

    /// A request that wants no answer.
    ///
    /// # Errors
    ///
    /// The connection is gone.
    pub fn post(&self, command: u16, body: &[u8]) -> Result<(), ClientError> {
        self.wire().send(command, NO_REPLY, body, &[])?;
        Ok(())
    }

    /// Requests that are all sent before the first answer is waited for.
    ///
    /// # Errors
    ///
    /// The first that there is.
    pub fn burst(
        &self,
        requests: &[(u16, Vec<u8>, Option<BorrowedFd<'_>>)],
    ) -> Result<(), ClientError> {
        let mut wire = self.wire();
        let mut ids = Vec::new();
        for (command, body, file) in requests {
            let files: Vec<_> = file.iter().copied().collect();
            ids.push((wire.send(*command, 0, body, &files)?, *command));
        }
        let mut failed = None;
        for _ in requests {
            let (got, reply) = wire.receive()?;
            if !ids.contains(&got) {
                return Err(ClientError::Wrong(format!("an answer to {got:?}")));
            }
            ids.retain(|id| *id != got);
            failed = failed.or(reply.err());
        }
        failed.map_or(Ok(()), Err)
    }

    /// Agree on a version, with the capabilities QEMU tells.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub fn version(&self) -> Result<Reply, ClientError> {
        let mut body = vec![0; 4];
        body.extend(b"{\"capabilities\":{\"max_msg_fds\":16,\"max_data_xfer_size\":1048576,\"migration\":{\"pgsize\":4096}}}\0");
        self.request(VERSION, &body, &[])
    }

    /// Let the device reach a region.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub fn map(&self, region: &MemoryRegion) -> Result<(), ClientError> {
        let body = map_body(READ_WRITE, 0, region.gpa, region.len);
        self.request(DMA_MAP, &body, &[region.file.as_fd()])?;
        Ok(())
    }

    /// Do not let it reach these bytes any more.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub fn unmap(&self, gpa: u64, len: u64) -> Result<(), ClientError> {
        let reply = self.request(DMA_UNMAP, &unmap_body(0, gpa, len), &[])?;
        if reply.long(16) != len {
            let why = format!("{:#x} bytes were unmapped, not {len:#x}", reply.long(16));
            return Err(ClientError::Wrong(why));
        }
        Ok(())
    }

    /// Read a region.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub fn read(&self, region: u32, offset: u64, out: &mut [u8]) -> Result<(), ClientError> {
        let body = access_body(region, offset, out.len() as u32, &[]);
        let reply = self.request(REGION_READ, &body, &[])?;
        match reply.body.get(16..) {
            Some(data) if data.len() == out.len() => out.copy_from_slice(data),
            _ => {
                let why = format!("{} bytes of {}", reply.body.len(), 16 + out.len());
                return Err(ClientError::Wrong(why));
            }
        }
        Ok(())
    }

    /// Write a region.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub fn write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        let body = access_body(region, offset, data.len() as u32, data);
        self.request(REGION_WRITE, &body, &[])?;
        Ok(())
    }

    /// About a region: its size, its offset in the file that comes with it, and the area that can be mapped.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub fn region(&self, index: u32) -> Result<Reply, ClientError> {
        let asked = |argsz| words(&[argsz, 0, index, 0, 0, 0, 0, 0]);
        let first = self.request(GET_REGION_INFO, &asked(32), &[])?;
        match first.word(0) {
            0..=32 => Ok(first),
            whole => self.request(GET_REGION_INFO, &asked(whole), &[]),
        }
    }

    /// Have interrupts of a kind signalled by these eventfds, a few in each message.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub fn set_eventfds(&self, index: u32, files: &[BorrowedFd<'_>]) -> Result<(), ClientError> {
        for (i, some) in files.chunks(FILES).enumerate() {
            let (start, count) = ((i * FILES) as u32, some.len() as u32);
            let body = words(&[20, EVENTFD_TRIGGER, index, start, count]);
            self.request(SET_IRQS, &body, some)?;
        }
        Ok(())
    }

    /// Send anything.
    ///
    /// # Errors
    ///
    /// The connection is gone.
    pub fn send_bytes(&self, bytes: &[u8]) -> Result<(), ClientError> {
        send(&self.wire().stream, bytes, &[])?;
        Ok(())
    }
}

impl Wire {
    fn send(
        &mut self,
        command: u16,
        flags: u32,
        body: &[u8],
        files: &[BorrowedFd<'_>],
    ) -> io::Result<u16> {
        let id = self.next;
        self.next = id.wrapping_add(1);
        let mut bytes = Vec::from(id.to_ne_bytes());
        bytes.extend(command.to_ne_bytes());
        bytes.extend(words(&[16 + body.len() as u32, flags, 0]));
        bytes.extend(body);
        send(&self.stream, &bytes, files)?;
        Ok(id)
    }

    /// The next answer: what it answers, and what it says.
    #[expect(
        clippy::type_complexity,
        reason = "two errors: of the stream, and of the request"
    )]
    fn receive(&mut self) -> Result<((u16, u16), Result<Reply, ClientError>), ClientError> {
        let mut files = Vec::new();
        let mut head = [0; 16];
        receive(&self.stream, &mut head, &mut files)?;
        let half = |at: usize| u16::from_ne_bytes([head[at], head[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        let (size, flags, errno) = (word(4), word(8), word(12));
        let len = (size as usize)
            .checked_sub(16)
            .filter(|len| *len <= 1 << 20);
        let Some(len) = len.filter(|_| flags & 0xF == 1) else {
            let why = format!("an answer of {size} bytes with flags {flags:#x}");
            return Err(ClientError::Wrong(why));
        };
        let mut body = vec![0; len];
        receive(&self.stream, &mut body, &mut files)?;
        let to = (half(0), half(2));
        if flags & 0x20 == 0 {
            return Ok((to, Ok(Reply { body, files })));
        }
        if len > 0 || errno == 0 {
            let why = format!("error {errno} with {len} bytes behind it");
            return Err(ClientError::Wrong(why));
        }
        let error = io::Error::from_raw_os_error(errno.cast_signed());
        Ok((to, Err(ClientError::Refused(error))))
    }
}

fn send(stream: &UnixStream, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut sent = 0;
    while sent < bytes.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if sent == 0 && !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
            return Err(io::Error::other("too many files"));
        }
        let rest = [IoSlice::new(&bytes[sent..])];
        sent += sendmsg(stream, &rest, &mut control, SendFlags::NOSIGNAL)?;
    }
    Ok(())
}

fn receive(stream: &UnixStream, out: &mut [u8], files: &mut Vec<OwnedFd>) -> io::Result<()> {
    let mut have = 0;
    while have < out.len() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let into = &mut [IoSliceMut::new(&mut out[have..])];
        let got = recvmsg(stream, into, &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                files.extend(fds);
            }
        }
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        have += got;
    }
    Ok(())
}
