//! Requests on a file that is memory, done while the caller waits.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use nvme_spec::Status;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::resident::{MAX_AT_ONCE, Resident};
use super::{Shared, known};
use crate::backend::geometry::Extent;
use crate::backend::{Operation, Request, error};
use crate::memory::Copier;

/// Compare and Verify read so much at a time.
const PIECE: usize = 16 << 10;

impl Shared {
    /// Do a request that was checked, if the file is memory and it does not take long. `None`: it has to go to the ring.
    #[inline]
    pub(super) fn at_once(
        &self,
        request: &Request<'_>,
        extent: &Extent,
        copier: &mut Copier,
    ) -> Option<Status> {
        let resident = self.resident.as_ref()?;
        let len = (extent.end - extent.start) as usize;
        let moved = match request.operation {
            Operation::Read => resident.read(&self.file, &request.data, extent.start, copier),
            Operation::Write { .. } => {
                resident.write(&self.file, &request.data, extent.start, copier)
            }
            _ => return self.others_at_once(resident, request, extent),
        };
        Some(match moved {
            Ok(n) if n == len => Status::SUCCESS,
            Ok(n) => self.failed(request.operation, extent.start + n as u64, &cut_short()),
            Err(e) => self.failed(request.operation, extent.start, &e),
        })
    }

    #[cold]
    fn others_at_once(
        &self,
        resident: &Resident,
        request: &Request<'_>,
        extent: &Extent,
    ) -> Option<Status> {
        let long = extent.end - extent.start > MAX_AT_ONCE;
        let result = match request.operation {
            // There is nothing below the page cache.
            Operation::Flush => Ok(Status::SUCCESS),
            Operation::Compare => self.look(extent, |at, ours| request.data.equals(at, ours)),
            Operation::Verify => self.look(extent, |_, _| true),
            Operation::Read | Operation::Write { .. } => return None,
            Operation::Deallocate if !known(&self.punch) => Ok(Status::SUCCESS),
            Operation::Deallocate | Operation::WriteZeroes { .. } if long => {
                resident.forget(extent.clone());
                return None;
            }
            Operation::Deallocate => self.punch(resident, extent).map(|_| Status::SUCCESS),
            Operation::WriteZeroes { deallocate, .. } => self
                .zero(resident, extent, deallocate)
                .map(|()| Status::SUCCESS),
        };
        Some(result.unwrap_or_else(|e| self.failed(request.operation, extent.start, &e)))
    }

    /// Look at the bytes of a range in order: `f` gets how many came before, and says whether to go on.
    fn look(&self, extent: &Extent, mut f: impl FnMut(usize, &[u8]) -> bool) -> io::Result<Status> {
        let mut piece = [0; PIECE];
        let mut at = extent.start;
        while at < extent.end {
            let n = (extent.end - at).min(PIECE as u64) as usize;
            let bytes = piece.get_mut(..n).unwrap_or_default();
            read_exactly(&self.file, bytes, at)?;
            if !f((at - extent.start) as usize, bytes) {
                return Ok(Status::COMPARE_FAILURE);
            }
            at += n as u64;
        }
        Ok(Status::SUCCESS)
    }

    /// Give a range back. `false`: this file system cannot.
    fn punch(&self, resident: &Resident, extent: &Extent) -> io::Result<bool> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let len = extent.end - extent.start;
        resident.forget(extent.clone());
        let punched = loop {
            match rustix::fs::fallocate(&self.file, flags, extent.start, len) {
                Err(Errno::INTR) => {}
                result => break result,
            }
        };
        match punched {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL) => {
                self.punch.store(false, Ordering::Relaxed);
                Ok(false)
            }
            Err(e) => Err(e.into()),
        }
    }

    fn zero(&self, resident: &Resident, extent: &Extent, deallocate: bool) -> io::Result<()> {
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        if deallocate && known(&self.punch) && self.punch(resident, extent)? {
            return Ok(());
        }
        let mut at = extent.start;
        while at < extent.end {
            let n = (extent.end - at).min(ZEROES.len() as u64) as usize;
            self.file
                .write_all_at(ZEROES.get(..n).unwrap_or_default(), at)?;
            at += n as u64;
        }
        Ok(())
    }

    /// The status of a request that failed, which the log hears too.
    #[cold]
    pub(super) fn failed(&self, operation: Operation, at: u64, cause: &io::Error) -> Status {
        self.log.report(&self.path, operation, at, cause);
        match cause.raw_os_error() {
            Some(errno) => error::status_of(errno, operation),
            None => error::short(operation),
        }
    }
}

fn read_exactly(file: &File, bytes: &mut [u8], at: u64) -> io::Result<()> {
    file.read_exact_at(bytes, at).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => cut_short(),
        _ => e,
    })
}

/// What a transfer that came out short says in the log.
pub(super) fn cut_short() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the transfer came out short: is the file shorter than it was?",
    )
}
