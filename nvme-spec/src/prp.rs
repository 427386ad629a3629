//! Physical Region Pages: the one walker and the one builder, for controller and driver alike.
//!
//! NVMe Base 2.x, section "Physical Region Page Entry and List". In short, with `P` the memory page
//! size (CC.MPS) and `n` the number of pages the transfer touches:
//!
//! - PRP1 is the first address; only its low two bits must be zero.
//! - `n == 2`: PRP2 is the second page, offset 0.
//! - `n > 2`: PRP2 points to a list of page addresses. It may point into the middle of a page (low
//!   three bits zero). A list ends at the end of its memory page; if more entries are needed than
//!   fit, the last one points to the next list, which begins at offset 0.
//!
//! Which entry is data and which a pointer follows from the length alone, never from what the list
//! says: so a list that points to itself, or anywhere, costs a bounded number of reads.

use crate::status::Status;
use core::fmt;

/// Entries the walker and the builder hold on the stack at a time.
const CHUNK: usize = 64;

/// Bytes of one list entry.
const ENTRY: u64 = 8;

/// A memory page size: 2^(12 + MPS) bytes, 4 KiB to 128 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageSize(u8);

impl PageSize {
    /// 4 KiB.
    pub const K4: Self = Self(0);
    /// 8 KiB.
    pub const K8: Self = Self(1);
    /// 16 KiB.
    pub const K16: Self = Self(2);
    /// 64 KiB.
    pub const K64: Self = Self(4);

    /// From CC.MPS (or CAP.MPSMIN, CAP.MPSMAX); `None` above 15.
    pub const fn from_mps(mps: u8) -> Option<Self> {
        match mps {
            0..=15 => Some(Self(mps)),
            _ => None,
        }
    }

    /// From a number of bytes; `None` if no memory page has that size.
    pub const fn from_bytes(bytes: u32) -> Option<Self> {
        if !bytes.is_power_of_two() {
            return None;
        }
        match bytes.trailing_zeros().checked_sub(12) {
            Some(mps @ 0..=15) => Some(Self(mps as u8)),
            _ => None,
        }
    }

    /// The value for CC.MPS.
    pub const fn mps(self) -> u8 {
        self.0
    }

    /// Bytes in a page.
    pub const fn bytes(self) -> u32 {
        4096 << (self.0 & 0xF)
    }

    /// An address's offset into its page.
    pub const fn offset(self, addr: u64) -> u32 {
        addr as u32 & self.bytes().saturating_sub(1)
    }

    /// Whether an address is the beginning of a page.
    pub const fn is_aligned(self, addr: u64) -> bool {
        self.offset(addr) == 0
    }

    /// Bytes from an address to the end of its page: 1 to the page size.
    pub const fn rest(self, addr: u64) -> u32 {
        self.bytes().saturating_sub(self.offset(addr))
    }

    /// List entries from an 8-byte aligned address to the end of its page: at least one.
    const fn entries(self, addr: u64) -> u32 {
        self.rest(addr) >> 3
    }
}

/// A physically contiguous piece of a transfer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Segment {
    /// First address.
    pub addr: u64,
    /// Length in bytes; never 0.
    pub len: u32,
}

/// Where the walker reads list entries from: guest memory for a controller.
pub trait ReadList {
    /// Reads `entries.len()` list entries that begin at `addr`.
    ///
    /// What the walker guarantees: `addr` is 8-byte aligned, `entries` holds 1 to 64 entries and does
    /// not reach beyond the memory page of `addr`, and every entry is needed and read once. `addr`
    /// comes from the host and may point anywhere.
    ///
    /// # Errors
    /// The status the command is to fail with, [`Status::DATA_TRANSFER_ERROR`] for an address that
    /// is no memory. After an error the walker reads no more.
    fn read(&mut self, addr: u64, entries: &mut [u64]) -> Result<(), Status>;
}

/// Where the builder writes list entries to: DMA memory of a driver.
pub trait WriteList {
    /// Writes list entries that begin at `addr`.
    ///
    /// What the builder guarantees: `addr` is 8-byte aligned and inside one of the list pages it was
    /// given, and `entries` (1 to 64) does not reach beyond that page.
    fn write(&mut self, addr: u64, entries: &[u64]);
}

/// Joins neighbours that touch into one segment before they reach the sink.
pub(crate) struct Merge<'a, S> {
    pending: Segment,
    sink: &'a mut S,
}

impl<'a, S: FnMut(Segment) -> Result<(), Status>> Merge<'a, S> {
    pub(crate) fn new(sink: &'a mut S) -> Self {
        Self {
            pending: Segment::default(),
            sink,
        }
    }

    pub(crate) fn push(&mut self, addr: u64, len: u32) -> Result<(), Status> {
        if addr.checked_add(u64::from(len)).is_none() {
            return Err(Status::DATA_TRANSFER_ERROR);
        }
        let Segment {
            addr: start,
            len: before,
        } = self.pending;
        // Neither sum can wrap: the first was checked when it became pending, and the lengths add
        // up to at most the whole transfer, a u32. Checked all the same, and no merge otherwise.
        if before != 0
            && start.checked_add(u64::from(before)) == Some(addr)
            && let Some(both) = before.checked_add(len)
        {
            self.pending.len = both;
            return Ok(());
        }
        self.flush()?;
        self.pending = Segment { addr, len };
        Ok(())
    }

    pub(crate) fn flush(&mut self) -> Result<(), Status> {
        match self.pending.len {
            0 => Ok(()),
            _ => (self.sink)(self.pending),
        }
    }
}

/// Resolves PRP1, PRP2 and the lists behind them to the segments of a transfer of `len` bytes, in
/// order, contiguous neighbours joined.
///
/// Total for every input: no panic, no allocation, and at most `2 * (len / page + 2)` entries read,
/// each once. `len` 0 reads nothing and gives no segment. The sum of the segments is `len` exactly
/// when the result is `Ok`.
///
/// # Errors
/// - [`Status::INVALID_PRP_OFFSET`]: PRP1 not dword aligned; PRP2 as second page, a list entry or a
///   pointer to a further list with an offset; PRP2 as list pointer not 8-byte aligned.
/// - [`Status::DATA_TRANSFER_ERROR`]: a page that reaches the end of the 64-bit address space.
/// - Whatever `list` and `sink` answer.
///
/// On an error the sink may have seen a part of the segments.
pub fn walk<R: ReadList>(
    page: PageSize,
    prp1: u64,
    prp2: u64,
    len: u32,
    list: &mut R,
    sink: &mut impl FnMut(Segment) -> Result<(), Status>,
) -> Result<(), Status> {
    if len == 0 {
        return Ok(());
    }
    if prp1 & 3 != 0 {
        return Err(Status::INVALID_PRP_OFFSET);
    }
    let mut merge = Merge::new(sink);
    let first = page.rest(prp1).min(len);
    merge.push(prp1, first)?;
    let left = len.saturating_sub(first);
    if left > page.bytes() {
        walk_list(page, prp2, left, list, &mut merge)?;
    } else if left > 0 {
        push_page(page, prp2, left, &mut merge)?;
    }
    merge.flush()
}

/// One page address that is not PRP1: offset 0.
fn push_page<S: FnMut(Segment) -> Result<(), Status>>(
    page: PageSize,
    addr: u64,
    len: u32,
    merge: &mut Merge<'_, S>,
) -> Result<(), Status> {
    if !page.is_aligned(addr) {
        return Err(Status::INVALID_PRP_OFFSET);
    }
    merge.push(addr, len)
}

fn walk_list<R: ReadList, S: FnMut(Segment) -> Result<(), Status>>(
    page: PageSize,
    prp2: u64,
    len: u32,
    list: &mut R,
    merge: &mut Merge<'_, S>,
) -> Result<(), Status> {
    if prp2 & (ENTRY - 1) != 0 {
        return Err(Status::INVALID_PRP_OFFSET);
    }
    let mut at = prp2;
    let mut left = len;
    // Terminates: every list page but a first one of a single entry takes data off `left`.
    while left > 0 {
        let needed = left.div_ceil(page.bytes());
        let slots = page.entries(at);
        let chained = needed > slots;
        let mut unread = needed.min(slots);
        let mut last = 0;
        while unread > 0 {
            let mut buffer = [0; CHUNK];
            let n = unread.min(CHUNK as u32);
            let Some(entries) = buffer.get_mut(..n as usize) else {
                return Err(Status::INTERNAL_ERROR);
            };
            list.read(at, entries)?;
            // Wraps only behind the last page of the address space, when nothing is left to read.
            at = at.wrapping_add(u64::from(n).saturating_mul(ENTRY));
            unread = unread.saturating_sub(n);
            let data = match entries.split_last() {
                Some((pointer, data)) if chained && unread == 0 => {
                    last = *pointer;
                    data
                }
                _ => entries,
            };
            for &addr in data {
                let len = left.min(page.bytes());
                push_page(page, addr, len, merge)?;
                left = left.saturating_sub(len);
            }
        }
        if chained {
            if !page.is_aligned(last) {
                return Err(Status::INVALID_PRP_OFFSET);
            }
            at = last;
        }
    }
    Ok(())
}

/// What [`build`] made: the two data pointer fields of a command.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prps {
    /// PRP Entry 1.
    pub prp1: u64,
    /// PRP Entry 2; 0 where none is needed.
    pub prp2: u64,
    /// How many of the list pages were used.
    pub lists: u32,
}

/// Why [`build`] refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BuildError {
    /// The offset is not dword aligned or not inside the first page.
    Offset,
    /// A page address has an offset.
    Page,
    /// There are fewer pages than the transfer touches.
    TooFewPages,
    /// A list address is not aligned: 8 bytes for the first, a page for the others.
    List,
    /// There are fewer list pages than the pages need.
    TooFewLists,
}

impl fmt::Display for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Offset => "offset is not dword aligned or not inside the first page",
            Self::Page => "page address is not page aligned",
            Self::TooFewPages => "fewer pages than the transfer touches",
            Self::List => "list address is not aligned",
            Self::TooFewLists => "fewer list pages than the transfer needs",
        })
    }
}

impl core::error::Error for BuildError {}

/// Builds PRP1, PRP2 and the lists for `len` bytes that begin `offset` bytes into the first of
/// `pages` and go on at the beginning of each further page.
///
/// `lists` gives the memory for list entries, one address per list page: the first may lie inside
/// a page (then the list starts there and ends with that page), the others begin pages. Only as many
/// items as needed are taken from either iterator; entries not needed are not written. `len` 0
/// gives PRPs of 0.
///
/// # Errors
/// See [`BuildError`]. The list pages may then hold parts of a list.
pub fn build<W: WriteList>(
    page: PageSize,
    pages: impl IntoIterator<Item = u64>,
    offset: u32,
    len: u32,
    lists: impl IntoIterator<Item = u64>,
    memory: &mut W,
) -> Result<Prps, BuildError> {
    let mut prps = Prps::default();
    if offset & 3 != 0 || offset >= page.bytes() {
        return Err(BuildError::Offset);
    }
    if len == 0 {
        return Ok(prps);
    }
    let mut pages = pages.into_iter();
    let mut next_page = || match pages.next() {
        Some(addr) if page.is_aligned(addr) => Ok(addr),
        Some(_) => Err(BuildError::Page),
        None => Err(BuildError::TooFewPages),
    };
    // An aligned address has room for an offset: or, not plus.
    prps.prp1 = next_page()? | u64::from(offset);
    let left = len.saturating_sub(page.bytes().saturating_sub(offset));
    let mut needed = left.div_ceil(page.bytes());
    if needed <= 1 {
        if needed == 1 {
            prps.prp2 = next_page()?;
        }
        return Ok(prps);
    }

    let mut lists = lists.into_iter();
    let mut at = lists.next().ok_or(BuildError::TooFewLists)?;
    if at & (ENTRY - 1) != 0 {
        return Err(BuildError::List);
    }
    prps.prp2 = at;
    prps.lists = 1;
    while needed > 0 {
        let slots = page.entries(at);
        let next_list = if needed <= slots {
            None
        } else {
            let addr = lists.next().ok_or(BuildError::TooFewLists)?;
            if !page.is_aligned(addr) {
                return Err(BuildError::List);
            }
            prps.lists = prps.lists.saturating_add(1);
            Some(addr)
        };
        let mut unwritten = needed.min(slots);
        while unwritten > 0 {
            let mut buffer = [0; CHUNK];
            let n = unwritten.min(CHUNK as u32);
            let entries = buffer.get_mut(..n as usize).unwrap_or_default();
            unwritten = unwritten.saturating_sub(n);
            let (pointer, data) = match (entries.split_last_mut(), next_list) {
                (Some((pointer, data)), Some(addr)) if unwritten == 0 => {
                    (Some((pointer, addr)), data)
                }
                _ => (None, &mut *entries),
            };
            for entry in data {
                *entry = next_page()?;
                needed = needed.saturating_sub(1);
            }
            if let Some((pointer, addr)) = pointer {
                *pointer = addr;
            }
            memory.write(at, entries);
            at = at.wrapping_add(u64::from(n).saturating_mul(ENTRY));
        }
        if let Some(addr) = next_list {
            at = addr;
        }
    }
    Ok(prps)
}
