//! vfio-user messages: off the socket, whole, with their files; and the answers to them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;

use super::Refusal;
use crate::transport::stream::{Incoming, MAX_FILES, Received};

/// Bytes of a header: message id, command, size, flags, error number.
pub const HEADER: usize = 16;
/// The most data of a region that one message can carry: what we tell the client.
pub const MAX_DATA: usize = 64 << 10;
/// The largest body we take.
const MAX_BODY: usize = MAX_DATA + 64;

/// Kinds of messages, in the low bits of the flags.
const KIND: u32 = 0xF;
/// A reply.
const REPLY: u32 = 1;
/// No reply is wanted.
const NO_REPLY: u32 = 1 << 4;
/// The reply is an error.
const ERROR: u32 = 1 << 5;

/// What a message asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Agree on a version.
    Version,
    /// Memory the device may reach from now on.
    DmaMap,
    /// Memory it may not reach any more.
    DmaUnmap,
    /// How many regions and interrupts there are.
    DeviceGetInfo,
    /// About one region.
    DeviceGetRegionInfo,
    /// About one kind of interrupt.
    DeviceGetIrqInfo,
    /// How interrupts are to be signalled.
    DeviceSetIrqs,
    /// Read a region.
    RegionRead,
    /// Write a region.
    RegionWrite,
    /// Reset the device.
    DeviceReset,
    /// About optional features.
    DeviceFeature,
    /// Another one.
    Other(u16),
}

impl From<u16> for Command {
    fn from(code: u16) -> Self {
        match code {
            1 => Self::Version,
            2 => Self::DmaMap,
            3 => Self::DmaUnmap,
            4 => Self::DeviceGetInfo,
            5 => Self::DeviceGetRegionInfo,
            7 => Self::DeviceGetIrqInfo,
            8 => Self::DeviceSetIrqs,
            9 => Self::RegionRead,
            10 => Self::RegionWrite,
            13 => Self::DeviceReset,
            16 => Self::DeviceFeature,
            other => Self::Other(other),
        }
    }
}

/// A whole message of the client.
#[derive(Debug)]
pub struct Message {
    id: u16,
    code: u16,
    flags: u32,
    bytes: Vec<u8>,
    /// Its files. Those that nobody takes are closed with the message.
    pub files: Vec<OwnedFd>,
}

impl Message {
    /// What it asks for.
    pub fn command(&self) -> Command {
        self.code.into()
    }

    /// What follows the header.
    pub fn body(&self) -> Body<'_> {
        Body(self.bytes.get(HEADER..).unwrap_or_default())
    }

    /// Whether the client wants no answer, be it a refusal. It may say so of any message, and ends the connection if it gets one all the same.
    pub fn is_posted(&self) -> bool {
        self.flags & NO_REPLY != 0
    }

    /// The bytes of the answer; `None` if none is wanted.
    pub fn answer(&self, result: &Result<Answer, Refusal>) -> Option<Vec<u8>> {
        if self.is_posted() {
            return None;
        }
        let (body, flags, errno) = match result {
            Ok(answer) => (answer.body.as_slice(), REPLY, 0),
            // An error has no body.
            Err(refusal) => (
                [].as_slice(),
                REPLY | ERROR,
                refusal.errno.raw_os_error().cast_unsigned(),
            ),
        };
        let size = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
        let mut out = Vec::with_capacity(HEADER + body.len());
        out.extend(self.id.to_ne_bytes());
        out.extend(self.code.to_ne_bytes());
        for word in [size, flags, errno] {
            out.extend(word.to_ne_bytes());
        }
        out.extend(body);
        Some(out)
    }
}

/// What a message is answered with.
#[derive(Debug, Default)]
pub struct Answer {
    /// What follows the header.
    pub body: Vec<u8>,
    /// A file that goes with it.
    pub file: Option<OwnedFd>,
}

impl Answer {
    /// An answer of these words.
    pub fn words(words: &[u32]) -> Self {
        Self {
            body: words.iter().flat_map(|w| w.to_ne_bytes()).collect(),
            file: None,
        }
    }
}

/// The body of a message, read field by field.
#[derive(Clone, Copy, Debug)]
pub struct Body<'a>(&'a [u8]);

impl<'a> Body<'a> {
    /// The 32-bit word at byte `at`.
    pub fn word(self, at: usize) -> Result<u32, Refusal> {
        Ok(u32::from_ne_bytes(self.array(at)?))
    }

    /// The 64-bit word at byte `at`.
    pub fn long(self, at: usize) -> Result<u64, Refusal> {
        Ok(u64::from_ne_bytes(self.array(at)?))
    }

    /// The 16-bit word at byte `at`.
    pub fn half(self, at: usize) -> Result<u16, Refusal> {
        Ok(u16::from_ne_bytes(self.array(at)?))
    }

    /// All bytes from `at` on.
    pub fn rest(self, at: usize) -> &'a [u8] {
        self.0.get(at..).unwrap_or_default()
    }

    /// `argsz`, which must leave room for `least` bytes.
    pub fn argsz(self, least: u32) -> Result<u32, Refusal> {
        match self.word(0)? {
            argsz if argsz >= least => Ok(argsz),
            argsz => Err(Refusal::invalid(format!(
                "argsz is {argsz}, less than {least}"
            ))),
        }
    }

    fn array<const N: usize>(self, at: usize) -> Result<[u8; N], Refusal> {
        self.0
            .get(at..)
            .and_then(|b| b.first_chunk())
            .copied()
            .ok_or_else(|| Refusal::invalid(format!("its body has only {} bytes", self.0.len())))
    }
}

/// Why nothing more can be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The client has gone, between two messages.
    #[error("the client closed the connection")]
    Closed,
    /// What came is no message.
    #[error("{0}")]
    Bad(String),
    /// The socket failed.
    #[error("cannot read from the client: {0}")]
    Socket(#[from] io::Error),
}

/// Puts messages together from what the socket gives, without ever waiting.
#[derive(Default)]
pub struct Reader {
    incoming: Incoming,
}

impl Reader {
    /// Read what is there. `None`: not a whole message yet.
    ///
    /// # Errors
    ///
    /// [`ReadError`]; nothing sensible can follow.
    pub fn read(&mut self, from: impl AsFd) -> Result<Option<Message>, ReadError> {
        loop {
            let want = self.wanted()?;
            if self.incoming.bytes.len() == want {
                let Incoming { bytes, files } = std::mem::take(&mut self.incoming);
                return Ok(Some(Message {
                    id: half(&bytes, 0),
                    code: half(&bytes, 2),
                    flags: word(&bytes, 8),
                    bytes,
                    files,
                }));
            }
            match self.incoming.receive(from.as_fd(), want)? {
                Received::Some => {}
                Received::Nothing => return Ok(None),
                Received::Gone if self.incoming.bytes.is_empty() => return Err(ReadError::Closed),
                Received::Gone => {
                    return Err(ReadError::Bad(format!(
                        "the client went away in the middle of {}",
                        self.name()
                    )));
                }
                Received::TooManyFiles => {
                    return Err(ReadError::Bad(format!(
                        "{}: it carries more files than a message can, or than this process has room for ({MAX_FILES} at most)",
                        self.name()
                    )));
                }
            }
        }
    }

    /// Go on with what another one has read of a message.
    pub fn going_on(bytes: Vec<u8>, files: Vec<OwnedFd>) -> Self {
        Self {
            incoming: Incoming { bytes, files },
        }
    }

    /// What has come of a message that is not whole yet.
    pub fn into_rest(self) -> (Vec<u8>, Vec<OwnedFd>) {
        (self.incoming.bytes, self.incoming.files)
    }

    fn name(&self) -> String {
        match self.incoming.bytes.len() {
            0..4 => "a message".into(),
            _ => format!("{:?}", Command::from(half(&self.incoming.bytes, 2))),
        }
    }

    /// Bytes of the message, as far as it is known.
    fn wanted(&self) -> Result<usize, ReadError> {
        let bytes = &self.incoming.bytes;
        if bytes.len() < HEADER {
            return Ok(HEADER);
        }
        let bad = |why: String| ReadError::Bad(format!("{}: {why}", self.name()));
        let (size, flags) = (word(bytes, 4), word(bytes, 8));
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        if flags & KIND != 0 {
            return Err(bad(format!("its flags are {flags:#x}; it is no request")));
        }
        if !(HEADER..=HEADER + MAX_BODY).contains(&size) {
            return Err(bad(format!(
                "it is said to have {size} bytes; {HEADER} to {} can be",
                HEADER + MAX_BODY
            )));
        }
        Ok(size)
    }
}

fn half(bytes: &[u8], at: usize) -> u16 {
    let two = bytes.get(at..).and_then(|b| b.first_chunk());
    two.copied().map_or(0, u16::from_ne_bytes)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let four = bytes.get(at..).and_then(|b| b.first_chunk());
    four.copied().map_or(0, u32::from_ne_bytes)
}

/// There is no such thing, or we do not do it.
pub fn unsupported(what: impl Into<String>) -> Refusal {
    Refusal::new(Errno::NOSYS, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::stream::send_all;
    use std::os::unix::net::UnixStream;

    fn header(id: u16, code: u16, size: u32, flags: u32) -> Vec<u8> {
        let mut out = Vec::from(id.to_ne_bytes());
        out.extend(code.to_ne_bytes());
        for word in [size, flags, 0] {
            out.extend(word.to_ne_bytes());
        }
        out
    }

    #[test]
    fn a_message_in_pieces_is_put_together_and_answered() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut reader = Reader::default();
        let mut bytes = header(7, 9, 32, 0);
        bytes.extend([1; 16]);
        for piece in bytes.chunks(5) {
            assert!(reader.read(&b).unwrap().is_none());
            send_all(&a, piece, &[a.as_fd()]).unwrap();
        }
        let message = reader.read(&b).unwrap().unwrap();
        assert_eq!(message.command(), Command::RegionRead);
        assert_eq!(message.files.len(), 7);
        assert_eq!(message.body().long(8).unwrap(), 0x0101_0101_0101_0101);
        assert!(message.body().word(13).is_err() && message.body().half(usize::MAX).is_err());
        let answer = message.answer(&Ok(Answer::words(&[5]))).unwrap();
        let mut expected = header(7, 9, 20, 1);
        expected.extend(5u32.to_ne_bytes());
        assert_eq!(answer, expected);
        let refused = message.answer(&Err(Refusal::invalid("no"))).unwrap();
        assert_eq!(refused[..12], header(7, 9, 16, 0x21)[..12]);
        assert_eq!((refused.len(), refused[12]), (16, 22));
        send_all(&a, &header(8, 10, 16, NO_REPLY), &[]).unwrap();
        let posted = reader.read(&b).unwrap().unwrap();
        assert!(posted.answer(&Err(Refusal::invalid("no"))).is_none());
        drop((a, message));
        assert!(matches!(reader.read(&b), Err(ReadError::Closed)));
    }

    #[test]
    fn what_is_no_message_is_named() {
        for (bytes, why) in [
            (header(0, 1, 15, 0), "Version: it is said to have 15 bytes"),
            (
                header(0, 2, 16, 1),
                "DmaMap: its flags are 0x1; it is no request",
            ),
            (
                header(0, 99, u32::MAX, 0),
                "Other(99): it is said to have 4294967295 bytes",
            ),
            (
                header(0, 10, 17, 0),
                "the client went away in the middle of RegionWrite",
            ),
            (vec![1], "the client went away in the middle of a message"),
        ] {
            let (a, b) = UnixStream::pair().unwrap();
            send_all(&a, &bytes, &[]).unwrap();
            drop(a);
            let error = Reader::default().read(&b).unwrap_err().to_string();
            assert!(error.starts_with(why), "{error}");
        }
    }
}
