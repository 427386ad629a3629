//! Flushing a whole store from the control side, where waiting is allowed.

#![expect(unsafe_code, reason = "calls the unsafe `Channel::submit`")]

use std::time::{Duration, Instant};

use nvme_spec::Status;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Backend, Channel as _, Operation, Request, Submitted};
use crate::driver::FlushError;
use crate::memory::Buffers;

/// How long to sleep between looks at a channel that has no file descriptor to wait on, and at most on one that has.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 5_000_000,
};

impl Backend {
    /// Wait, at most `limit`, until everything written before is on stable media. Needs no poller; not for the I/O path.
    ///
    /// # Errors
    ///
    /// What the store says; [`Status::INTERNAL_ERROR`] if it could not be asked, [`Status::ABORT_REQUESTED`] after `limit`.
    pub fn sync(&self, limit: Duration) -> Result<(), Status> {
        let begun = Instant::now();
        let mut channel = loop {
            match (self.channel(1), self.as_nvme()) {
                (Ok(channel), _) => break channel,
                (Err(_), None) => return Err(Status::INTERNAL_ERROR),
                // Pollers have all queue pairs of the SSD: one of them does it.
                (Err(_), Some(nvme)) => {
                    match nvme.sync(limit.saturating_sub(begun.elapsed())) {
                        // Whoever had one has given it back: there is one again.
                        Err(FlushError::NoLane) if begun.elapsed() < limit => {}
                        Err(FlushError::NoLane | FlushError::Gone) => {
                            return Err(Status::INTERNAL_ERROR);
                        }
                        Err(FlushError::Late) => return Err(Status::ABORT_REQUESTED),
                        Err(FlushError::Failed(status)) => return Err(status),
                        Ok(()) => return Ok(()),
                    }
                    let _ = poll(&mut [], Some(&LOOK));
                }
            }
        };
        let request = Request {
            operation: Operation::Flush,
            slba: 0,
            blocks: 0,
            data: Buffers::NONE,
            guest: None,
        };
        // SAFETY: there is no memory behind `Buffers::NONE`, and its list of segments is empty and static.
        let submitted = unsafe { channel.submit(0, &request) };
        let mut finished = Vec::with_capacity(1);
        let status = loop {
            if let Submitted::Done(status) = submitted {
                break status;
            }
            channel.flush();
            channel.poll(&mut finished);
            if let Some(done) = finished.first() {
                break done.status.status();
            }
            if begun.elapsed() >= limit {
                break Status::ABORT_REQUESTED;
            }
            // Whatever poll says, the next look at the channel decides.
            let _ = match channel.wake_fd() {
                Some(fd) => poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&LOOK)),
                None => poll(&mut [], Some(&LOOK)),
            };
        };
        match status.is_success() {
            true => Ok(()),
            false => Err(status),
        }
    }
}
