//! Scatter Gather Lists: the descriptor and the one walker.
//!
//! NVMe Base 2.x, section "Scatter Gather List (SGL)". In short:
//!
//! - The data pointer of a command holds one descriptor of 16 bytes. A Data Block is all of the data; a
//!   Segment or Last Segment points to an array of descriptors.
//! - Only the last descriptor of a segment may point to the next one. What a Segment descriptor points to ends
//!   with such a pointer, what a Last Segment descriptor points to does not.
//! - Addresses and lengths of data are multiples of four bytes (SGLS, "SGL Support" of 10b).
//!
//! What a controller may offer besides, this walker refuses: Bit Buckets, keyed and transport blocks, addresses that
//! are offsets, and lists longer or shorter than the data.

use crate::command::Sqe;
use crate::prp::Merge;
use crate::prp::Segment;
use crate::status::Status;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;

/// Descriptors the walker holds on the stack at a time.
const CHUNK: usize = 32;

/// Bytes of a descriptor.
const BYTES: u32 = 16;

/// Most descriptors of a command's segments, all together: four times what a list of one descriptor for each 4 KiB of
/// 1 MiB needs. The specification names no limit, and descriptors without data would let a list have 2^28.
pub const MAX_DESCRIPTORS: u32 = 1024;

open_enum! {
    /// SGL Descriptor Type, bits 7:4 of the last byte.
    DescriptorType: u8 {
        /// Memory of the data.
        DATA_BLOCK = 0x0,
        /// Data of a read that nobody wants.
        BIT_BUCKET = 0x1,
        /// Where more descriptors are, the last of which is another pointer.
        SEGMENT = 0x2,
        /// Where the last descriptors are.
        LAST_SEGMENT = 0x3,
        /// Memory behind a key, on fabrics.
        KEYED_DATA_BLOCK = 0x4,
        /// Data the transport has by itself, on fabrics.
        TRANSPORT_DATA_BLOCK = 0x5,
        /// Vendor specific.
        VENDOR = 0xF,
    }
}

/// An SGL descriptor: 16 bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Descriptor {
    /// Where the data, or the segment, begins.
    pub address: u64,
    /// Its bytes.
    pub length: u32,
    /// Reserved: written as zeroes, not looked at.
    pub reserved: [u8; 3],
    /// Type in bits 7:4, subtype in bits 3:0.
    pub identifier: u8,
}
layout!(Descriptor, 16, length @ 8, reserved @ 12, identifier @ 15);

impl Descriptor {
    /// A descriptor of this type, subtype 0 (the address is an address).
    pub const fn new(kind: DescriptorType, address: u64, length: u32) -> Self {
        Self {
            address,
            length,
            reserved: [0; 3],
            identifier: kind.0 << 4,
        }
    }

    /// Data.
    pub const fn data(address: u64, length: u32) -> Self {
        Self::new(DescriptorType::DATA_BLOCK, address, length)
    }

    /// A pointer to `count` descriptors of which the last is another pointer.
    pub const fn segment(address: u64, count: u32) -> Self {
        Self::new(
            DescriptorType::SEGMENT,
            address,
            count.saturating_mul(BYTES),
        )
    }

    /// A pointer to the last `count` descriptors.
    pub const fn last_segment(address: u64, count: u32) -> Self {
        Self::new(
            DescriptorType::LAST_SEGMENT,
            address,
            count.saturating_mul(BYTES),
        )
    }

    /// What it is.
    pub const fn kind(&self) -> DescriptorType {
        DescriptorType(self.identifier >> 4)
    }

    /// How its address is meant: 0 = as an address.
    pub const fn subtype(&self) -> u8 {
        self.identifier & 0xF
    }

    /// The one in a command's data pointer, where that has one ([`Sqe::psdt`]).
    pub const fn of(sqe: &Sqe) -> Self {
        Self {
            address: sqe.prp1,
            length: sqe.prp2 as u32,
            reserved: [
                (sqe.prp2 >> 32) as u8,
                (sqe.prp2 >> 40) as u8,
                (sqe.prp2 >> 48) as u8,
            ],
            identifier: (sqe.prp2 >> 56) as u8,
        }
    }

    /// This descriptor as the data pointer of a command, which then says so (PSDT 01b).
    pub const fn put(&self, mut sqe: Sqe) -> Sqe {
        let [a, b, c] = self.reserved;
        sqe.prp1 = self.address;
        sqe.prp2 = self.length as u64
            | (a as u64) << 32
            | (b as u64) << 40
            | (c as u64) << 48
            | (self.identifier as u64) << 56;
        sqe.flags = sqe.flags & 0x3F | 1 << 6;
        sqe
    }
}

/// Where the walker reads descriptors from: guest memory for a controller.
pub trait ReadSegment {
    /// Reads `descriptors.len()` descriptors that begin at `addr`.
    ///
    /// What the walker guarantees: `addr` is 8-byte aligned, `descriptors` holds 1 to 32 and does not reach beyond the
    /// segment, whose end is an address, and each is read once. `addr` comes from the host and may point anywhere.
    ///
    /// # Errors
    /// The status the command is to fail with, [`Status::DATA_TRANSFER_ERROR`] for an address that is no memory. After an
    /// error the walker reads no more.
    fn read(&mut self, addr: u64, descriptors: &mut [Descriptor]) -> Result<(), Status>;
}

/// What a Segment or Last Segment descriptor points to.
struct Next {
    addr: u64,
    count: u32,
    /// It has no pointer at its end.
    last: bool,
}

impl Next {
    fn of(descriptor: &Descriptor, last: bool) -> Result<Self, Status> {
        let bytes = descriptor.length;
        let whole = bytes != 0 && bytes.is_multiple_of(BYTES);
        if !whole || !descriptor.address.is_multiple_of(8) {
            return Err(Status::INVALID_SGL_SEGMENT_DESCRIPTOR);
        }
        if descriptor.address.checked_add(u64::from(bytes)).is_none() {
            return Err(Status::DATA_TRANSFER_ERROR);
        }
        Ok(Self {
            addr: descriptor.address,
            count: bytes / BYTES,
            last,
        })
    }
}

/// What a descriptor is to the walker.
enum Found {
    Data,
    Pointer { last: bool },
}

fn found(descriptor: &Descriptor) -> Result<Found, Status> {
    match (descriptor.kind(), descriptor.subtype()) {
        (DescriptorType::DATA_BLOCK, 0) => Ok(Found::Data),
        (DescriptorType::SEGMENT, 0) => Ok(Found::Pointer { last: false }),
        (DescriptorType::LAST_SEGMENT, 0) => Ok(Found::Pointer { last: true }),
        _ => Err(Status::SGL_DESCRIPTOR_TYPE_INVALID),
    }
}

/// The pieces found so far, and how much is still to be found.
struct Data<'a, S> {
    merge: Merge<'a, S>,
    left: u32,
}

impl<S: FnMut(Segment) -> Result<(), Status>> Data<'_, S> {
    fn push(&mut self, block: &Descriptor) -> Result<(), Status> {
        if block.length == 0 {
            return Ok(());
        }
        if block.length & 3 != 0 || block.address & 3 != 0 {
            return Err(Status::SGL_DATA_BLOCK_GRANULARITY_INVALID);
        }
        self.left = self
            .left
            .checked_sub(block.length)
            .ok_or(Status::DATA_SGL_LENGTH_INVALID)?;
        self.merge.push(block.address, block.length)
    }
}

/// Resolves the SGL that begins with the descriptor of a command to the segments of a transfer of `len` bytes, in order,
/// contiguous neighbours joined.
///
/// Total for every input: no panic, no allocation, and at most [`MAX_DESCRIPTORS`] descriptors read, each once. `len` 0 reads nothing and
/// gives no segment. The sum of the segments is `len` exactly when the result is `Ok`.
///
/// # Errors
/// The first that applies, in the order of the list:
/// - [`Status::SGL_DESCRIPTOR_TYPE_INVALID`]: a descriptor that is neither Data Block, Segment nor Last Segment with an
///   address.
/// - [`Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS`]: a pointer that is not at its segment's end; more than
///   [`MAX_DESCRIPTORS`] descriptors.
/// - [`Status::INVALID_SGL_SEGMENT_DESCRIPTOR`]: a segment of no bytes, of a part of a descriptor, or not 8-byte aligned; a last segment with a
///   pointer at its end, another without.
/// - [`Status::SGL_DATA_BLOCK_GRANULARITY_INVALID`]: data that is not dwords.
/// - [`Status::DATA_SGL_LENGTH_INVALID`]: more or less data than `len`.
/// - [`Status::DATA_TRANSFER_ERROR`]: data or a segment that reaches the end of the 64-bit address space.
/// - Whatever `list` and `sink` answer.
///
/// On an error the sink may have seen a part of the segments.
pub fn walk<R: ReadSegment>(
    first: Descriptor,
    len: u32,
    list: &mut R,
    sink: &mut impl FnMut(Segment) -> Result<(), Status>,
) -> Result<(), Status> {
    if len == 0 {
        return Ok(());
    }
    let mut data = Data {
        merge: Merge::new(sink),
        left: len,
    };
    let mut next = match found(&first)? {
        Found::Data => {
            data.push(&first)?;
            None
        }
        Found::Pointer { last } => Some(Next::of(&first, last)?),
    };
    let mut budget = MAX_DESCRIPTORS;
    // Terminates: every segment takes at least one descriptor off the budget.
    while let Some(segment) = next {
        budget = budget
            .checked_sub(segment.count)
            .ok_or(Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS)?;
        next = walk_segment(&segment, list, &mut data)?;
        if next.is_none() && !segment.last {
            return Err(Status::INVALID_SGL_SEGMENT_DESCRIPTOR);
        }
    }
    if data.left > 0 {
        return Err(Status::DATA_SGL_LENGTH_INVALID);
    }
    data.merge.flush()
}

/// The data of a segment, and what its end points to.
fn walk_segment<R: ReadSegment, S: FnMut(Segment) -> Result<(), Status>>(
    segment: &Next,
    list: &mut R,
    data: &mut Data<'_, S>,
) -> Result<Option<Next>, Status> {
    let mut at = segment.addr;
    let mut unread = segment.count;
    while unread > 0 {
        let mut buffer = [Descriptor::default(); CHUNK];
        let n = unread.min(CHUNK as u32);
        let Some(descriptors) = buffer.get_mut(..n as usize) else {
            return Err(Status::INTERNAL_ERROR);
        };
        list.read(at, descriptors)?;
        // Never wraps: the end of the segment is an address.
        at = at.wrapping_add(u64::from(n).saturating_mul(u64::from(BYTES)));
        for descriptor in descriptors {
            unread = unread.saturating_sub(1);
            match found(descriptor)? {
                Found::Data => data.push(descriptor)?,
                Found::Pointer { .. } if unread > 0 => {
                    return Err(Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS);
                }
                Found::Pointer { .. } if segment.last => {
                    return Err(Status::INVALID_SGL_SEGMENT_DESCRIPTOR);
                }
                Found::Pointer { last } => return Next::of(descriptor, last).map(Some),
            }
        }
    }
    Ok(None)
}
