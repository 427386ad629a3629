//! Messages between the old process and the new one: a length, JSON, and the files that go with it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::transport::CarriedImage;
use crate::transport::stream::{Incoming, MAX_FILES, Received, send_all};

/// Version of these messages.
pub const PROTOCOL: u32 = 1;

/// The longest message that is taken: memory in thousands of pieces.
const MAX_LEN: usize = 16 << 20;

/// How often somebody who waits is asked whether to go on.
const LOOK: Duration = Duration::from_millis(50);

/// From the old process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToNew {
    /// What it would hand over.
    Offer {
        /// Version of the messages.
        protocol: u32,
        /// Version of the program, for the log.
        version: String,
        /// Layout of the state it leaves.
        layout: u64,
        /// Paths of the sockets it listens on, as bytes.
        sockets: Vec<Vec<u8>>,
    },
    /// One of so many sockets: the listening one is the first of the files.
    Socket(Socket),
    /// Everything has been sent, and nothing is used any more. The file is that of the process id, if there is one.
    Go,
}

/// A socket that is handed over.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Socket {
    /// Its path, as bytes.
    pub path: Vec<u8>,
    /// Device and inode of that.
    pub identity: (u64, u64),
    /// A connection of vfio-user: its socket is the second file, and its own files follow.
    pub connection: Option<CarriedImage>,
}

/// From the new process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToOld {
    /// It would go on.
    Able {
        /// Version of the program, for the log.
        version: String,
        /// Layouts of the state it knows.
        layouts: Vec<u64>,
    },
    /// It cannot.
    Unable {
        /// Why.
        why: String,
    },
    /// It has taken over.
    Serving,
}

/// Why a message did not come.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The other process closed its end.
    #[error("the other process went away")]
    Gone,
    /// It took too long.
    #[error("it said nothing for {0:?}")]
    Late(Duration),
    /// The one who waits does not want to any more.
    #[error("it was given up")]
    GivenUp,
    /// What came is no message.
    #[error("it said something that is not understood: {0}")]
    Bad(String),
    /// The socket failed.
    #[error("it cannot be reached: {0}")]
    Socket(#[from] io::Error),
}

/// One end.
pub struct Wire(UnixStream);

impl Wire {
    /// This end.
    pub fn new(stream: UnixStream) -> Self {
        Self(stream)
    }

    /// Send a message with its files.
    ///
    /// # Errors
    ///
    /// The other end is closed, does not read for long, or the kernel refuses.
    pub fn send(
        &self,
        message: &impl Serialize,
        files: &[BorrowedFd<'_>],
    ) -> Result<(), WireError> {
        let body = serde_json::to_vec(message).map_err(io::Error::other)?;
        let len = u32::try_from(body.len()).map_err(io::Error::other)?;
        let count = u32::try_from(files.len()).map_err(io::Error::other)?;
        let mut head = Vec::from(len.to_le_bytes());
        head.extend(count.to_le_bytes());
        self.0.set_write_timeout(Some(Duration::from_secs(10)))?;
        send_all(&self.0, &head, &[])?;
        send_all(&self.0, &body, &[])?;
        // A byte for each handful of files.
        for files in files.chunks(MAX_FILES) {
            send_all(&self.0, &[0], files)?;
        }
        Ok(())
    }

    /// Wait for a message, for `limit` at most and as long as `wanted` says so.
    ///
    /// # Errors
    ///
    /// [`WireError`]: no message will come.
    pub fn receive<T: DeserializeOwned>(
        &self,
        limit: Duration,
        wanted: &dyn Fn() -> bool,
    ) -> Result<(T, Vec<OwnedFd>), WireError> {
        let wait = Wait {
            end: Instant::now() + limit,
            limit,
            wanted,
        };
        let head = self.exactly(8, &wait)?.bytes;
        let word = |at: usize| {
            let word = head.get(at..).and_then(|b| b.first_chunk());
            word.map_or(usize::MAX, |w| u32::from_le_bytes(*w) as usize)
        };
        let (len, count) = (word(0), word(4));
        if len > MAX_LEN || count > MAX_LEN {
            return Err(WireError::Bad(format!("{len} bytes and {count} files")));
        }
        let body = self.exactly(len, &wait)?.bytes;
        let mut files = Vec::new();
        while files.len() < count {
            let some = self.exactly(1, &wait)?.files;
            if some.is_empty() {
                return Err(WireError::Bad("files are missing".into()));
            }
            files.extend(some);
        }
        let message = serde_json::from_slice(&body).map_err(|e| WireError::Bad(e.to_string()))?;
        Ok((message, files))
    }

    fn exactly(&self, want: usize, wait: &Wait<'_>) -> Result<Incoming, WireError> {
        let mut incoming = Incoming::default();
        while incoming.bytes.len() < want {
            wait.for_something(&self.0)?;
            match incoming.receive(self.0.as_fd(), want)? {
                Received::Some | Received::Nothing => {}
                Received::Gone => return Err(WireError::Gone),
                Received::TooManyFiles => {
                    let why = "more files than this process has room for";
                    return Err(WireError::Bad(why.into()));
                }
            }
        }
        Ok(incoming)
    }
}

struct Wait<'a> {
    end: Instant,
    limit: Duration,
    wanted: &'a dyn Fn() -> bool,
}

impl Wait<'_> {
    fn for_something(&self, from: &UnixStream) -> Result<(), WireError> {
        loop {
            let left = self.end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(WireError::Late(self.limit));
            }
            if !(self.wanted)() {
                return Err(WireError::GivenUp);
            }
            let nap = left.min(LOOK);
            let nap = Timespec {
                tv_sec: nap.as_secs().cast_signed(),
                tv_nsec: nap.subsec_nanos().into(),
            };
            match poll(&mut [PollFd::new(from, PollFlags::IN)], Some(&nap)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(e) => return Err(io::Error::from(e).into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    fn wanted() -> bool {
        true
    }

    #[test]
    fn messages_of_any_size_arrive_with_their_files() {
        let (a, b) = UnixStream::pair().unwrap();
        let (a, b) = (Wire::new(a), Wire::new(b));
        let files: Vec<_> = (0..150u8)
            .map(|i| {
                use std::os::unix::fs::FileExt as _;
                let file = tempfile::tempfile().unwrap();
                file.write_all_at(&[i], 0).unwrap();
                file
            })
            .collect();
        let sockets = vec![vec![b'x'; 100_000]; 3];
        let offer = ToNew::Offer {
            protocol: 1,
            version: "v".into(),
            layout: 9,
            sockets: sockets.clone(),
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
                a.send(&offer, &files).unwrap();
                a.send(&ToNew::Go, &[]).unwrap();
            });
            let (message, got) = b.receive::<ToNew>(LONG, &wanted).unwrap();
            assert!(matches!(message, ToNew::Offer { sockets: s, layout: 9, .. } if s == sockets));
            assert_eq!(got.len(), 150);
            for (i, file) in got.into_iter().enumerate() {
                use std::os::unix::fs::FileExt as _;
                let mut byte = [0];
                std::fs::File::from(file)
                    .read_exact_at(&mut byte, 0)
                    .unwrap();
                assert_eq!(usize::from(byte[0]), i);
            }
            let (message, files) = b.receive::<ToNew>(LONG, &wanted).unwrap();
            assert!(matches!(message, ToNew::Go) && files.is_empty());
        });
        drop(a);
        let gone = b.receive::<ToNew>(LONG, &wanted).unwrap_err();
        assert!(matches!(gone, WireError::Gone), "{gone}");
    }

    #[test]
    fn nobody_waits_for_ever_or_believes_everything() {
        let (a, b) = UnixStream::pair().unwrap();
        let wire = Wire::new(b);
        let limit = Duration::from_millis(20);
        let late = wire.receive::<ToOld>(limit, &wanted).unwrap_err();
        assert_eq!(late.to_string(), "it said nothing for 20ms");
        let given_up = wire.receive::<ToOld>(LONG, &|| false).unwrap_err();
        assert!(matches!(given_up, WireError::GivenUp));
        for bytes in [
            &b"\xFF\xFF\xFF\xFF\0\0\0\0"[..],
            b"\0\0\0\0\xFF\xFF\xFF\xFF",
            b"\x02\0\0\0\0\0\0\0{}",
            b"\x04\0\0\0\x01\0\0\0trueX",
        ] {
            send_all(&a, bytes, &[]).unwrap();
            let bad = wire.receive::<ToOld>(LONG, &wanted).unwrap_err();
            assert!(matches!(bad, WireError::Bad(_)), "{bad}");
        }
    }
}
