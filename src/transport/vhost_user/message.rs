//! Messages of a front-end as they come off the socket: whole, with their files, and with a name for the log.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use vhost::vhost_user::message::FrontendReq;

use crate::transport::stream::{Incoming, Received, send_all};

/// Bytes of a header: request, flags, size of the body.
pub const HEADER: usize = 12;
/// The largest body, as in the crate.
pub const MAX_BODY: usize = 0x1000;
/// The most files a message can carry, as in the crate.
pub const MAX_FILES: usize = 32;

/// A whole message.
#[derive(Debug)]
pub struct Message {
    /// Header and body as they came.
    pub bytes: Vec<u8>,
    /// Its files.
    pub files: Vec<OwnedFd>,
}

/// Why nothing more can be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The front-end has gone, between two messages.
    #[error("the front-end closed the connection")]
    Closed,
    /// It has gone in the middle of one.
    #[error("the front-end went away in the middle of {0}")]
    Truncated(String),
    /// What came is no message.
    #[error("{name}: {why}")]
    Bad {
        /// What came.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// The socket failed.
    #[error("cannot read from the front-end: {0}")]
    Socket(#[from] io::Error),
}

impl Message {
    /// The request code.
    pub fn code(&self) -> u32 {
        word(&self.bytes, 0)
    }

    /// A name for the log.
    pub fn name(&self) -> String {
        name(self.code())
    }

    /// Send it on. The peer's buffer must have room for it.
    ///
    /// # Errors
    ///
    /// What the socket says.
    pub fn forward(&self, to: impl AsFd) -> io::Result<()> {
        let fds: Vec<BorrowedFd<'_>> = self.files.iter().map(AsFd::as_fd).collect();
        send_all(to, &self.bytes, &fds)
    }
}

fn word(bytes: &[u8], index: usize) -> u32 {
    bytes
        .get(index * 4..index * 4 + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_ne_bytes)
}

fn name(code: u32) -> String {
    FrontendReq::try_from(code).map_or_else(
        |_| format!("a message with the unknown code {code}"),
        |request| format!("{request:?}"),
    )
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
                return Ok(Some(Message { bytes, files }));
            }
            if !self.receive(from.as_fd(), want)? {
                return Ok(None);
            }
        }
    }

    /// Bytes of the message, as far as it is known.
    fn wanted(&self) -> Result<usize, ReadError> {
        if self.incoming.bytes.len() < HEADER {
            return Ok(HEADER);
        }
        let bad = |why: String| ReadError::Bad {
            name: name(word(&self.incoming.bytes, 0)),
            why,
        };
        let (flags, size) = (
            word(&self.incoming.bytes, 1),
            word(&self.incoming.bytes, 2) as usize,
        );
        if FrontendReq::try_from(word(&self.incoming.bytes, 0)).is_err() {
            return Err(bad("vhost-user knows no such message".into()));
        }
        if flags & !0x8 != 1 {
            return Err(bad(format!(
                "its flags are {flags:#x}, not those of a request of version 1"
            )));
        }
        if size > MAX_BODY {
            return Err(bad(format!("its body is said to have {size} bytes")));
        }
        Ok(HEADER + size)
    }

    /// Read up to `want` bytes in all. `false`: there is nothing now.
    fn receive(&mut self, from: BorrowedFd<'_>, want: usize) -> Result<bool, ReadError> {
        let received = self.incoming.receive(from, want)?;
        if received == Received::TooManyFiles || self.incoming.files.len() > MAX_FILES {
            return Err(ReadError::Bad {
                name: self.partial_name(),
                why: format!(
                    "it carries more files than a message can, or than this process has room for ({MAX_FILES} at most)"
                ),
            });
        }
        match received {
            Received::Some => Ok(true),
            Received::Nothing => Ok(false),
            Received::Gone | Received::TooManyFiles => Err(self.gone()),
        }
    }

    fn partial_name(&self) -> String {
        if self.incoming.bytes.len() < 4 {
            "a message".into()
        } else {
            name(word(&self.incoming.bytes, 0))
        }
    }

    fn gone(&self) -> ReadError {
        if self.incoming.bytes.is_empty() {
            ReadError::Closed
        } else {
            ReadError::Truncated(self.partial_name())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn header(code: u32, flags: u32, size: u32) -> Vec<u8> {
        [code, flags, size]
            .iter()
            .flat_map(|w| w.to_ne_bytes())
            .collect()
    }

    #[test]
    fn a_message_in_pieces_is_put_together_with_its_files() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut message = header(13, 9, 8);
        message.extend([1, 0, 0, 0, 0, 0, 0, 0]);
        let mut reader = Reader::default();
        assert!(reader.read(&b).unwrap().is_none());
        send_all(&a, &message[..5], &[a.as_fd()]).unwrap();
        assert!(reader.read(&b).unwrap().is_none());
        send_all(&a, &message[5..17], &[]).unwrap();
        assert!(reader.read(&b).unwrap().is_none());
        send_all(&a, &message[17..], &[b.as_fd()]).unwrap();
        send_all(&a, &header(1, 1, 0), &[]).unwrap();
        let got = reader.read(&b).unwrap().unwrap();
        assert_eq!((got.bytes.as_slice(), got.files.len()), (&message[..], 2));
        assert_eq!(got.name(), "SET_VRING_CALL");
        let next = reader.read(&b).unwrap().unwrap();
        assert_eq!(
            (next.name().as_str(), next.files.len()),
            ("GET_FEATURES", 0)
        );
        // The message carried a copy of the other end.
        drop((a, got));
        assert!(matches!(reader.read(&b), Err(ReadError::Closed)));
    }

    #[test]
    fn what_is_no_message_is_named() {
        for (bytes, why) in [
            (
                header(0, 1, 0),
                "a message with the unknown code 0: vhost-user knows no such message",
            ),
            (
                header(9999, 1, 0),
                "a message with the unknown code 9999: vhost-user knows no such message",
            ),
            (
                header(1, 2, 0),
                "GET_FEATURES: its flags are 0x2, not those of a request of version 1",
            ),
            (
                header(1, 5, 0),
                "GET_FEATURES: its flags are 0x5, not those of a request of version 1",
            ),
            (
                header(24, 1, u32::MAX),
                "GET_CONFIG: its body is said to have 4294967295 bytes",
            ),
            (
                header(24, 1, 100),
                "the front-end went away in the middle of GET_CONFIG",
            ),
            (
                vec![1, 2],
                "the front-end went away in the middle of a message",
            ),
        ] {
            let (a, b) = UnixStream::pair().unwrap();
            send_all(&a, &bytes, &[]).unwrap();
            drop(a);
            let mut reader = Reader::default();
            assert_eq!(reader.read(&b).unwrap_err().to_string(), why);
        }
    }
}
