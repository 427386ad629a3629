//! What the guest and the log hear about an error of the kernel.

use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nvme_spec::Status;

use crate::backend::Operation;

/// The status of a request that ended with `errno`.
pub(super) fn status_of(errno: i32, operation: Operation) -> Status {
    match errno {
        libc::ECANCELED => Status::ABORT_REQUESTED,
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Status::CAPACITY_EXCEEDED,
        libc::EROFS | libc::EPERM | libc::EBADF if operation.writes() => {
            Status::ATTEMPTED_WRITE_TO_READ_ONLY
        }
        libc::EFAULT => Status::DATA_TRANSFER_ERROR,
        libc::EIO | libc::ENODATA | libc::EILSEQ | libc::EREMOTEIO | libc::ENXIO => {
            short(operation)
        }
        _ => Status::INTERNAL_ERROR,
    }
}

/// The status of a request of which the kernel did only a part.
pub(super) fn short(operation: Operation) -> Status {
    match operation {
        Operation::Read | Operation::Compare | Operation::Verify => Status::UNRECOVERED_READ_ERROR,
        _ => Status::WRITE_FAULT,
    }
}

/// Lines about I/O errors, not more than a guest can make a log unreadable with.
pub(super) struct ErrorLog {
    state: Mutex<(Option<Instant>, u32, u64)>,
}

/// So many lines in so much time.
const LINES: u32 = 8;
const PERIOD: Duration = Duration::from_secs(10);

impl ErrorLog {
    pub fn new() -> Self {
        Self {
            state: Mutex::new((None, 0, 0)),
        }
    }

    /// Whether a line may be written now; if so, how many were not since the last.
    fn allow(&self, now: Instant) -> Option<u64> {
        // A thread that panicked here left three numbers, whatever they are.
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let (since, lines, missed) = &mut *state;
        if since.is_none_or(|t| now.duration_since(t) >= PERIOD) {
            *since = Some(now);
            *lines = 0;
        }
        if *lines == LINES {
            *missed = missed.saturating_add(1);
            return None;
        }
        *lines += 1;
        Some(std::mem::take(missed))
    }

    /// Tell that `operation` on the bytes from `offset` on failed.
    pub fn report(&self, path: &Path, operation: Operation, offset: u64, cause: &io::Error) {
        if let Some(not_shown) = self.allow(Instant::now()) {
            tracing::error!(
                path = %path.display(),
                ?operation,
                offset,
                %cause,
                not_shown,
                "I/O on a namespace's store failed"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_have_their_status() {
        let write = Operation::Write { fua: false };
        let cases = [
            (libc::ENOSPC, write, Status::CAPACITY_EXCEEDED),
            (libc::EIO, Operation::Read, Status::UNRECOVERED_READ_ERROR),
            (libc::EIO, Operation::Verify, Status::UNRECOVERED_READ_ERROR),
            (libc::EIO, write, Status::WRITE_FAULT),
            (libc::EIO, Operation::Flush, Status::WRITE_FAULT),
            (libc::EROFS, write, Status::ATTEMPTED_WRITE_TO_READ_ONLY),
            (libc::EFAULT, write, Status::DATA_TRANSFER_ERROR),
            (libc::ECANCELED, write, Status::ABORT_REQUESTED),
            (libc::EPERM, Operation::Read, Status::INTERNAL_ERROR),
            (libc::EINVAL, Operation::Read, Status::INTERNAL_ERROR),
        ];
        for (errno, operation, status) in cases {
            assert_eq!(status_of(errno, operation), status, "{errno} {operation:?}");
        }
    }

    #[test]
    fn a_flood_of_errors_is_counted_not_written() {
        let log = ErrorLog::new();
        let start = Instant::now();
        assert_eq!((0..20).filter(|_| log.allow(start).is_some()).count(), 8);
        assert_eq!(log.allow(start + PERIOD), Some(12));
        assert_eq!(log.allow(start + PERIOD), Some(0));
    }
}
