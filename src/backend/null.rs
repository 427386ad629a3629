//! A namespace that stores nothing: what the path above the backend costs.

#![expect(unsafe_code, reason = "implements the unsafe `Channel::submit`")]

use std::os::fd::BorrowedFd;

use nvme_spec::Status;

use super::geometry::bytes_of;
use super::{Cancelled, Channel, Finished, Geometry, OpenError, Request, Submitted, Tag};

/// What a [`NullBackend`] is made of.
#[derive(Clone, Copy, Debug)]
pub struct NullOptions {
    /// log2 of the block size in bytes: 9 or 12.
    pub block_shift: u32,
    /// Size in blocks; nothing is allocated for them.
    pub blocks: u64,
    /// Refuse writes.
    pub read_only: bool,
}

/// A store of any size that moves no data: a Read leaves the memory of the guest as it is, a Compare is always equal.
pub struct NullBackend {
    pub(super) geometry: Geometry,
}

impl NullBackend {
    /// Make one.
    ///
    /// # Errors
    ///
    /// A size or block size that cannot be.
    pub fn new(options: NullOptions) -> Result<Self, OpenError> {
        bytes_of(options.blocks, options.block_shift)?;
        Ok(Self {
            geometry: Geometry {
                block_shift: options.block_shift,
                blocks: options.blocks,
                read_only: options.read_only,
                volatile_write_cache: false,
                deallocate_reads_zero: false,
                thin: false,
                optimal_blocks: 1,
            },
        })
    }

    pub(super) fn channel(&self) -> NullChannel {
        NullChannel {
            geometry: self.geometry,
        }
    }
}

/// The data side of a [`NullBackend`].
pub struct NullChannel {
    geometry: Geometry,
}

impl Channel for NullChannel {
    #[inline]
    unsafe fn submit(&mut self, _: Tag, request: &Request<'_>) -> Submitted {
        Submitted::Done(match self.geometry.extent(request) {
            Ok(_) => Status::SUCCESS,
            Err(status) => status,
        })
    }

    #[inline]
    fn flush(&mut self) {}

    #[inline]
    fn poll(&mut self, _: &mut Vec<Finished>) {}

    fn cancel(&mut self, _: Tag) -> Cancelled {
        Cancelled::Gone
    }

    #[inline]
    fn pending(&self) -> usize {
        0
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
