//! Bytes and the files that come with them, off a Unix socket and onto one.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// The most files that are taken with one message: a vector of each queue pair there can be.
pub const MAX_FILES: usize = 64;

/// A message that is being received.
#[derive(Debug, Default)]
pub struct Incoming {
    /// What has come.
    pub bytes: Vec<u8>,
    /// Its files.
    pub files: Vec<OwnedFd>,
}

/// What came of an attempt to receive.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// Something.
    Some,
    /// There is nothing now.
    Nothing,
    /// The other side has gone.
    Gone,
    /// More files than there is room for.
    TooManyFiles,
}

impl Incoming {
    /// Receive up to `want` bytes in all, once, without waiting.
    ///
    /// # Errors
    ///
    /// What the socket says.
    pub fn receive(&mut self, from: BorrowedFd<'_>, want: usize) -> io::Result<Received> {
        let have = self.bytes.len();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        self.bytes.resize(want.max(have), 0);
        let room = self.bytes.get_mut(have..).unwrap_or_default();
        let room_len = room.len();
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let result = recvmsg(from, &mut [IoSliceMut::new(room)], &mut control, flags);
        let got = result.as_ref().map_or(0, |r| r.bytes.min(room_len));
        self.bytes.truncate(have + got);
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.files.extend(fds);
            }
        }
        let result = match result {
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Received::Nothing),
            Err(Errno::CONNRESET) => return Ok(Received::Gone),
            other => other.map_err(io::Error::from)?,
        };
        if result.flags.contains(ReturnFlags::CTRUNC) || self.files.len() > MAX_FILES {
            return Ok(Received::TooManyFiles);
        }
        Ok(if got == 0 {
            Received::Gone
        } else {
            Received::Some
        })
    }
}

/// Send what the socket takes of `bytes` at once, the files with the first of them; how many bytes that were.
///
/// # Errors
///
/// What the socket says; [`io::ErrorKind::WouldBlock`] if it is full and does not block.
pub fn send_some(to: BorrowedFd<'_>, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<usize> {
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
            return Err(io::Error::other("too many files"));
        }
        let flags = SendFlags::NOSIGNAL;
        match sendmsg(to, &[IoSlice::new(bytes)], &mut control, flags) {
            Err(Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// Send all bytes, the files with the first of them.
///
/// # Errors
///
/// What the socket says.
pub fn send_all(to: impl AsFd, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut rest = bytes;
    let mut files = files;
    while !rest.is_empty() {
        let sent = send_some(to.as_fd(), rest, files)?;
        rest = rest.get(sent..).unwrap_or_default();
        files = &[];
    }
    Ok(())
}
