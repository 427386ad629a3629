//! From PRPs to pieces of host memory.

use nvme_spec::Status;
use nvme_spec::prp::{self, PageSize, ReadList, Segment};

use crate::memory::{GuestMap, HostSeg, Near};

/// Most pieces a transfer can have: 1 MiB in pages of 4 KiB, with an offset.
pub const MAX_SEGMENTS: usize = (1 << 20) / 4096 + 1;

/// Memory page size: CC.MPS is always 0.
const PAGE: PageSize = PageSize::K4;

/// PRP lists of a guest.
struct Lists<'a>(&'a GuestMap);

impl ReadList for Lists<'_> {
    fn read(&mut self, addr: u64, entries: &mut [u64]) -> Result<(), Status> {
        if self
            .0
            .read(addr, zerocopy::IntoBytes::as_mut_bytes(entries))
        {
            Ok(())
        } else {
            Err(Status::DATA_TRANSFER_ERROR)
        }
    }
}

/// A list of segments that grows in place.
pub struct Fill<'a> {
    room: &'a mut [HostSeg],
    used: usize,
}

impl<'a> Fill<'a> {
    /// Fill `room` from the front.
    pub fn new(room: &'a mut [HostSeg]) -> Self {
        Self { room, used: 0 }
    }

    fn push(&mut self, seg: HostSeg) -> Result<(), Status> {
        // Can only run out when a page spans regions at odd places, which no real guest's memory does.
        let slot = self
            .room
            .get_mut(self.used)
            .ok_or(Status::DATA_TRANSFER_ERROR)?;
        *slot = seg;
        self.used += 1;
        Ok(())
    }
}

/// Resolve a transfer of `bytes` bytes to host memory, looking into the region `near` first; returns the number of segments.
///
/// # Errors
///
/// [`Status::INVALID_PRP_OFFSET`] for a PRP with a wrong offset, [`Status::DATA_TRANSFER_ERROR`] for one that is no guest
/// memory.
#[inline]
pub fn resolve(
    map: &GuestMap,
    near: &mut Near,
    prp1: u64,
    prp2: u64,
    bytes: u32,
    mut fill: Fill<'_>,
) -> Result<usize, Status> {
    // Nearly all transfers lie in one page of one region. All others, and all errors, are the walker's.
    if bytes <= PAGE.rest(prp1)
        && prp1 & 3 == 0
        && let Some(seg) = map.resolve_near(near, prp1, bytes as usize)
    {
        fill.push(seg)?;
        return Ok(1);
    }
    walk(map, prp1, prp2, bytes, |segment| {
        let mut at = segment.addr;
        let mut left = segment.len as usize;
        while left > 0 {
            let seg = map.resolve(at, left).ok_or(Status::DATA_TRANSFER_ERROR)?;
            fill.push(seg)?;
            left -= seg.len();
            // The walker checked that the segment does not wrap.
            at = at.wrapping_add(seg.len() as u64);
        }
        Ok(())
    })?;
    Ok(fill.used)
}

/// Call `each` for the pieces of guest memory that PRPs describe, in order, `bytes` bytes in all.
///
/// # Errors
///
/// As [`resolve`], and what `each` answers.
#[inline]
pub fn walk(
    map: &GuestMap,
    prp1: u64,
    prp2: u64,
    bytes: u32,
    mut each: impl FnMut(Segment) -> Result<(), Status>,
) -> Result<(), Status> {
    prp::walk(PAGE, prp1, prp2, bytes, &mut Lists(map), &mut each)
}
