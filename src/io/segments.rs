//! From PRPs or an SGL to pieces of host memory.

use nvme_spec::command::Psdt;
use nvme_spec::prp::{self, PageSize, ReadList, Segment};
use nvme_spec::sgl::{self, Descriptor, ReadSegment};
use nvme_spec::{Sqe, Status};

use crate::memory::{GuestMap, HostSeg, Near};

/// Most pieces a transfer can have: 1 MiB in pages of 4 KiB, with an offset. An SGL could name more.
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

impl ReadSegment for Lists<'_> {
    fn read(&mut self, addr: u64, descriptors: &mut [Descriptor]) -> Result<(), Status> {
        if self
            .0
            .read(addr, zerocopy::IntoBytes::as_mut_bytes(descriptors))
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

    fn push(&mut self, seg: HostSeg) -> Option<()> {
        *self.room.get_mut(self.used)? = seg;
        self.used += 1;
        Some(())
    }

    /// Append a piece of guest memory; `full` if there is no room. With PRPs that can only be when a page spans regions at odd places,
    /// which no real guest's memory does.
    #[inline]
    fn add(&mut self, map: &GuestMap, segment: Segment, full: Status) -> Result<(), Status> {
        let mut at = segment.addr;
        let mut left = segment.len as usize;
        while left > 0 {
            let seg = map.resolve(at, left).ok_or(Status::DATA_TRANSFER_ERROR)?;
            self.push(seg).ok_or(full)?;
            left -= seg.len();
            // The walker checked that the segment does not wrap.
            at = at.wrapping_add(seg.len() as u64);
        }
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
        fill.push(seg).ok_or(Status::DATA_TRANSFER_ERROR)?;
        return Ok(1);
    }
    walk(map, prp1, prp2, bytes, |segment| {
        fill.add(map, segment, Status::DATA_TRANSFER_ERROR)
    })?;
    Ok(fill.used)
}

/// The same where the data pointer of the command is an SGL.
///
/// # Errors
///
/// Those of [`sgl::walk`]; [`Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS`] also where there are more pieces than `fill` has room for;
/// [`Status::DATA_TRANSFER_ERROR`] for what is no guest memory.
#[cold]
pub fn resolve_sgl(
    map: &GuestMap,
    sqe: &Sqe,
    bytes: u32,
    mut fill: Fill<'_>,
) -> Result<usize, Status> {
    sgl::walk(
        Descriptor::of(sqe),
        bytes,
        &mut Lists(map),
        &mut |segment| fill.add(map, segment, Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS),
    )?;
    Ok(fill.used)
}

/// Call `each` for the pieces of guest memory that the data pointer of an I/O command describes, be it PRPs or an SGL.
///
/// # Errors
///
/// As [`resolve`] and [`resolve_sgl`], and what `each` answers.
pub fn walk_data(
    map: &GuestMap,
    sqe: &Sqe,
    bytes: u32,
    mut each: impl FnMut(Segment) -> Result<(), Status>,
) -> Result<(), Status> {
    match sqe.psdt() {
        Psdt::PRP => walk(map, sqe.prp1, sqe.prp2, bytes, each),
        _ => sgl::walk(Descriptor::of(sqe), bytes, &mut Lists(map), &mut each),
    }
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
