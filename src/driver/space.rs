//! The addresses a device uses, and who shows memory there: the IOMMU domain of an SSD, or a double of one.

use std::any::Any;
use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::dma::{Dma, DmaPool, Mapping, PAGE, shared_memory};
use crate::memory::Region;

/// What the device may do with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// It reads: submission queues, PRP lists, payload. Whatever addresses a guest puts into a PRP list, no transfer ends up there.
    ReadOnly,
    /// It reads and writes.
    ReadWrite,
}

/// Device addresses and who may show memory there.
pub trait AddressSpace: Send + Sync {
    /// Usable device addresses, ascending, not touching.
    fn ranges(&self) -> Vec<RangeInclusive<u64>>;

    /// What addresses and lengths must be multiples of, in bytes: a power of two, at least [`PAGE`].
    fn granule(&self) -> u64;

    /// Show `region` at device address `address` until what is returned is dropped.
    ///
    /// # Errors
    ///
    /// [`MapMemoryError`] says what is in the way.
    fn map(
        &self,
        address: u64,
        region: &Arc<Region>,
        access: Access,
    ) -> Result<Mapped, MapMemoryError>;
}

/// Memory a device can reach until this is dropped.
pub struct Mapped(
    #[expect(dead_code, reason = "what counts is its drop")] Box<dyn Any + Send + Sync>,
);

impl Mapped {
    /// `guard` ends the mapping when it is dropped.
    pub fn new(guard: impl Any + Send + Sync) -> Self {
        Self(Box::new(guard))
    }
}

impl fmt::Debug for Mapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Mapped")
    }
}

/// Why memory was not shown to a device.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {hint}")]
pub struct MapMemoryError {
    /// What was tried, with address and length in it.
    pub what: String,
    /// What the operator can do about it.
    pub hint: String,
    /// The cause, where there is one.
    #[source]
    pub source: Option<io::Error>,
}

/// The top of an address space, in bytes, that [`Pools`] take: windows of guests stay below.
pub const POOLS_SPAN: u64 = 4 << 30;

/// Least piece of memory that is shown to a device at once.
const CHUNK: u64 = 1 << 20;

struct Chunk {
    access: Access,
    pool: Arc<DmaPool>,
    _mapped: Mapped,
}

/// A driver's own memory, in two kinds that never share a page: what the device only reads, and what it writes. It grows from the
/// top of the address space downwards, away from guest memory.
pub struct Pools {
    space: Arc<dyn AddressSpace>,
    chunks: Vec<Chunk>,
    /// First address in use.
    bottom: Option<u64>,
}

impl Pools {
    /// No memory yet.
    pub fn new(space: Arc<dyn AddressSpace>) -> Self {
        Self {
            space,
            chunks: Vec::new(),
            bottom: None,
        }
    }

    /// Zeroed pages the device can reach, contiguous for both sides.
    ///
    /// # Errors
    ///
    /// Memory or device addresses ran out, or the address space refuses the memory.
    pub fn allocate(&mut self, bytes: usize, access: Access) -> io::Result<Dma> {
        for chunk in self.chunks.iter().filter(|c| c.access == access) {
            if let Ok(dma) = chunk.pool.allocate(bytes) {
                return Ok(dma);
            }
        }
        self.grow(bytes as u64, access)?.allocate(bytes)
    }

    fn grow(&mut self, bytes: u64, access: Access) -> io::Result<Arc<DmaPool>> {
        let len = bytes
            .max(CHUNK)
            .checked_next_multiple_of(self.space.granule().max(PAGE))
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let address = self.room(len).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::OutOfMemory,
                format!("no {len} bytes of device addresses left for the driver"),
            )
        })?;
        let file = shared_memory("nvme-driver", len)?;
        let size = usize::try_from(len).map_err(io::Error::other)?;
        let region = Mapping::map(&file, 0, size, address)?;
        let mapped = self
            .space
            .map(address, &region, access)
            .map_err(io::Error::other)?;
        let pool = DmaPool::new(region)?;
        self.bottom = Some(address);
        self.chunks.push(Chunk {
            access,
            pool: Arc::clone(&pool),
            _mapped: mapped,
        });
        Ok(pool)
    }

    /// The highest place for `len` bytes below what is in use.
    fn room(&self, len: u64) -> Option<u64> {
        let granule = self.space.granule().max(PAGE);
        self.space.ranges().iter().rev().find_map(|range| {
            // The last address of the address space itself stays unused, so that no end wraps around.
            let last = *range.end().min(&(u64::MAX - 1));
            let end = match self.bottom {
                Some(bottom) => bottom.min(last.checked_add(1)?),
                None => last.checked_add(1)?,
            };
            let at = end.checked_sub(len)? / granule * granule;
            (at >= *range.start()).then_some(at)
        })
    }
}
