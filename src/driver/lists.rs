//! Memory for PRP lists: a piece for each command that can be out.

use nvme_spec::prp::{self, BuildError, PageSize, Prps, WriteList};
use zerocopy::IntoBytes as _;

use super::{Dma, SubmitError};

/// Memory for the PRP lists of a queue's commands.
pub(super) struct Lists {
    memory: Dma,
    page: PageSize,
    max_transfer: u32,
    /// Bytes for each command: whole pages.
    each: u64,
}

/// Bytes of list memory for each command whose transfer is `max_transfer` bytes at most.
fn bytes_for(max_transfer: u32, page: PageSize) -> u64 {
    if max_transfer <= page.bytes() {
        return 0; // two pages at most: PRP1 and PRP2
    }
    // All pages but the first are in the lists; the last entry of each list but the last is a pointer.
    let entries = max_transfer.div_ceil(page.bytes());
    u64::from(entries.div_ceil((page.bytes() / 8) - 1)) * u64::from(page.bytes())
}

impl WriteList for &Lists {
    fn write(&mut self, addr: u64, entries: &[u64]) {
        let offset = addr.saturating_sub(self.memory.addr());
        self.memory.write(offset as usize, entries.as_bytes());
    }
}

impl Lists {
    /// For `depth` commands that transfer `max_transfer` bytes at most. `spare`: each has a page at least, for other things than a list.
    /// `allocate` makes memory of so many bytes that the device can read.
    pub(super) fn new<E>(
        page: PageSize,
        depth: u32,
        max_transfer: u32,
        spare: bool,
        allocate: impl FnOnce(usize) -> Result<Dma, E>,
    ) -> Result<Self, E> {
        let least = if spare { page.bytes().into() } else { 0 };
        let each = bytes_for(max_transfer, page).max(least);
        let bytes = usize::try_from(u64::from(depth) * each);
        Ok(Self {
            memory: allocate(bytes.unwrap_or(usize::MAX))?,
            page,
            max_transfer,
            each,
        })
    }

    /// Memory page size of the device.
    pub(super) fn page(&self) -> PageSize {
        self.page
    }

    /// Largest transfer in bytes.
    pub(super) fn max_transfer(&self) -> u32 {
        self.max_transfer
    }

    /// Device address of what the command in this slot has.
    pub(super) fn of(&self, slot: u16) -> u64 {
        self.memory.addr() + u64::from(slot) * self.each
    }

    /// Put bytes there, as many as it has: their device address.
    pub(super) fn put(&self, slot: u16, bytes: &[u8]) -> u64 {
        let at = self.of(slot);
        self.memory.write((at - self.memory.addr()) as usize, bytes);
        at
    }

    /// Describe `len` bytes that begin `offset` bytes into the first of `pages`, to be transferred by the command in this slot.
    pub(super) fn describe(
        &self,
        slot: u16,
        pages: impl IntoIterator<Item = u64>,
        offset: u32,
        len: u32,
    ) -> Result<Prps, SubmitError> {
        if len > self.max_transfer {
            return Err(SubmitError::TooLong);
        }
        let (page, base) = (u64::from(self.page.bytes()), self.of(slot));
        let lists = (0..self.each / page).map(|i| base + i * page);
        let prps: Result<Prps, BuildError> =
            prp::build(self.page, pages, offset, len, lists, &mut &*self);
        Ok(prps?)
    }
}
