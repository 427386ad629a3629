//! Sizes: what a store of a given size looks like, and where in it a request lies.

use std::ops::Range;

use nvme_spec::Status;

use super::{Geometry, OpenError, Operation, Request};

/// The most bytes a store can have: file offsets are signed.
pub const MAX_BYTES: u64 = i64::MAX as u64;

/// Where the bytes of a request lie in its store.
pub type Extent = Range<u64>;

impl OpenError {
    /// An error without a cause below it.
    pub(crate) fn new(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            hint: hint.into(),
            source: None,
        }
    }

    /// An error of the kernel.
    pub(crate) fn io(
        what: impl Into<String>,
        hint: impl Into<String>,
        source: impl Into<std::io::Error>,
    ) -> Self {
        let source = source.into();
        Self {
            what: format!("{}: {source}", what.into()),
            hint: hint.into(),
            source: Some(source),
        }
    }
}

/// The number of blocks of `1 << block_shift` bytes in `bytes`.
///
/// # Errors
///
/// A block size that is not 512 or 4096, a size of nothing, one that is not whole blocks, one that no file could have.
pub fn blocks_of(bytes: u64, block_shift: u32) -> Result<u64, OpenError> {
    let block = check_shift(block_shift)?;
    if bytes == 0 {
        return Err(OpenError::new(
            "a namespace of 0 bytes",
            format!("give it at least one block of {block} bytes"),
        ));
    }
    if !bytes.is_multiple_of(block) {
        let below = bytes - bytes % block;
        let hint = match below.checked_add(block) {
            Some(above) if below == 0 => format!("make it {above} bytes"),
            Some(above) => format!("make it {below} or {above} bytes"),
            None => format!("make it {below} bytes"),
        };
        return Err(OpenError::new(
            format!("a size of {bytes} bytes is not a multiple of the block size of {block}"),
            hint,
        ));
    }
    if bytes > MAX_BYTES {
        return Err(OpenError::new(
            format!("a size of {bytes} bytes is too large"),
            format!("the most is {MAX_BYTES} bytes"),
        ));
    }
    Ok(bytes >> block_shift)
}

/// The number of bytes in `blocks` blocks; errors as [`blocks_of`].
pub fn bytes_of(blocks: u64, block_shift: u32) -> Result<u64, OpenError> {
    check_shift(block_shift)?;
    let bytes = blocks
        .checked_shl(block_shift)
        .filter(|b| b >> block_shift == blocks);
    let bytes = bytes.unwrap_or(!((1 << block_shift) - 1));
    blocks_of(bytes, block_shift)?;
    Ok(bytes)
}

fn check_shift(block_shift: u32) -> Result<u64, OpenError> {
    match block_shift {
        9 | 12 => Ok(1 << block_shift),
        _ => Err(OpenError::new(
            format!("a block size of 2^{block_shift} bytes"),
            "use 512 or 4096",
        )),
    }
}

impl Geometry {
    /// Bytes in a block.
    pub fn block_size(&self) -> u64 {
        1 << self.block_shift
    }

    /// Bytes in the whole store.
    pub fn bytes(&self) -> u64 {
        self.blocks << self.block_shift
    }

    /// The bytes of the store a request is about, after a second look at what the caller promised.
    ///
    /// # Errors
    ///
    /// The status for a request that no checked caller makes: blocks outside, memory of the wrong size, a write where nothing
    /// may be written. Nothing is left to trust after this.
    pub(crate) fn extent(&self, request: &Request<'_>) -> Result<Extent, Status> {
        if self.read_only && request.operation.writes() {
            return Err(Status::ATTEMPTED_WRITE_TO_READ_ONLY);
        }
        if request.operation == Operation::Flush {
            return Ok(0..0);
        }
        if request.blocks == 0 {
            return Err(Status::INVALID_FIELD);
        }
        let end = request.slba.checked_add(u64::from(request.blocks));
        let Some(end) = end.filter(|end| *end <= self.blocks) else {
            return Err(Status::LBA_OUT_OF_RANGE);
        };
        let extent = request.slba << self.block_shift..end << self.block_shift;
        if request.operation.moves_data() && request.memory_bytes() != extent.end - extent.start {
            return Err(Status::DATA_TRANSFER_ERROR);
        }
        Ok(extent)
    }
}

impl Operation {
    /// Whether it changes what is stored.
    pub fn writes(self) -> bool {
        match self {
            Self::Write { .. } | Self::WriteZeroes { .. } | Self::Deallocate => true,
            Self::Read | Self::Compare | Self::Verify | Self::Flush => false,
        }
    }

    /// Whether it has memory to read or write.
    pub fn moves_data(self) -> bool {
        match self {
            Self::Read | Self::Write { .. } | Self::Compare => true,
            Self::Verify | Self::WriteZeroes { .. } | Self::Deallocate | Self::Flush => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Buffers;

    #[test]
    fn sizes_are_whole_blocks() {
        assert_eq!(blocks_of(4096, 9).unwrap(), 8);
        assert_eq!(bytes_of(3, 12).unwrap(), 12288);
        assert!(blocks_of(0, 9).is_err());
        assert!(blocks_of(4096, 10).is_err());
        let e = blocks_of(1000, 9).unwrap_err().to_string();
        assert!(e.contains("512 or 1024"), "{e}");
        assert!(bytes_of(u64::MAX, 9).is_err());
        assert!(bytes_of(1 << 54, 9).is_err(), "2^63 is one too many");
        assert!(bytes_of((1 << 54) - 1, 9).is_ok());
        assert!(bytes_of(1, 64).is_err());
    }

    #[test]
    fn extents_are_checked_again() {
        let mut g = Geometry {
            block_shift: 9,
            blocks: 8,
            read_only: false,
            volatile_write_cache: false,
            deallocate_reads_zero: true,
            thin: true,
            optimal_blocks: 1,
        };
        let request = |operation, slba, blocks| Request {
            operation,
            slba,
            blocks,
            data: Buffers::NONE,
            guest: None,
        };
        let verify = |slba, blocks| request(Operation::Verify, slba, blocks);
        assert_eq!(g.extent(&verify(7, 1)), Ok(3584..4096));
        assert_eq!(g.extent(&verify(7, 2)), Err(Status::LBA_OUT_OF_RANGE));
        assert_eq!(
            g.extent(&verify(u64::MAX, 2)),
            Err(Status::LBA_OUT_OF_RANGE)
        );
        assert_eq!(g.extent(&verify(0, 0)), Err(Status::INVALID_FIELD));
        assert_eq!(
            g.extent(&request(Operation::Read, 0, 1)),
            Err(Status::DATA_TRANSFER_ERROR)
        );
        assert_eq!(g.extent(&request(Operation::Flush, 0, 0)), Ok(0..0));
        g.read_only = true;
        let read_only = Err(Status::ATTEMPTED_WRITE_TO_READ_ONLY);
        assert_eq!(g.extent(&request(Operation::Deallocate, 0, 1)), read_only);
        assert_eq!(g.extent(&verify(0, 1)), Ok(0..512));
    }
}
