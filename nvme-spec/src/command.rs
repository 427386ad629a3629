//! The submission queue entry ([`Sqe`]) and the completion queue entry ([`Cqe`]).
//!
//! NVMe Base 2.x, figures "Common Command Format" and "Common Completion Queue Entry Layout".

use crate::status::Status;
use crate::status::StatusField;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;

open_enum! {
    /// Fused Operation, command dword 0 bits 9:8.
    Fuse: u8 {
        /// A normal command.
        NORMAL = 0,
        /// First command of a fused pair.
        FIRST = 1,
        /// Second command of a fused pair.
        SECOND = 2,
    }
}

open_enum! {
    /// PRP or SGL for Data Transfer, command dword 0 bits 15:14.
    Psdt: u8 {
        /// PRPs.
        PRP = 0,
        /// SGLs; the metadata pointer is the address of one contiguous buffer.
        SGL_MPTR_BUFFER = 1,
        /// SGLs; the metadata pointer is the address of an SGL descriptor.
        SGL_MPTR_SGL = 2,
    }
}

/// A submission queue entry: 64 bytes, little-endian.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(8))]
pub struct Sqe {
    /// Opcode; which set it is of depends on the queue.
    pub opcode: u8,
    /// FUSE in bits 1:0, PSDT in bits 7:6; the rest is reserved.
    pub flags: u8,
    /// Command Identifier, unique among the outstanding commands of the queue.
    pub cid: u16,
    /// Namespace Identifier; 0 where none is used, `0xFFFF_FFFF` for all.
    pub nsid: u32,
    /// Command dword 2.
    pub cdw2: u32,
    /// Command dword 3.
    pub cdw3: u32,
    /// Metadata Pointer.
    pub mptr: u64,
    /// Data pointer, PRP Entry 1.
    pub prp1: u64,
    /// Data pointer, PRP Entry 2.
    pub prp2: u64,
    /// Command dword 10.
    pub cdw10: u32,
    /// Command dword 11.
    pub cdw11: u32,
    /// Command dword 12.
    pub cdw12: u32,
    /// Command dword 13.
    pub cdw13: u32,
    /// Command dword 14.
    pub cdw14: u32,
    /// Command dword 15.
    pub cdw15: u32,
}
layout!(Sqe, 64, flags @ 1, cid @ 2, nsid @ 4, cdw2 @ 8, cdw3 @ 12, mptr @ 16, prp1 @ 24,
    prp2 @ 32, cdw10 @ 40, cdw11 @ 44, cdw12 @ 48, cdw13 @ 52, cdw14 @ 56, cdw15 @ 60);

/// The NSID that means every namespace (Base, section "Namespace Identifiers").
pub const NSID_BROADCAST: u32 = 0xFFFF_FFFF;

impl Sqe {
    /// Fused Operation.
    pub const fn fuse(&self) -> Fuse {
        Fuse(self.flags & 3)
    }

    /// PRP or SGL for Data Transfer.
    pub const fn psdt(&self) -> Psdt {
        Psdt(self.flags >> 6)
    }

    /// Starting LBA, where dwords 10 and 11 hold one (NVM Command Set data commands).
    pub const fn slba(&self) -> u64 {
        self.cdw10 as u64 | (self.cdw11 as u64) << 32
    }

    /// Puts a starting LBA into dwords 10 and 11.
    pub const fn set_slba(&mut self, slba: u64) {
        self.cdw10 = slba as u32;
        self.cdw11 = (slba >> 32) as u32;
    }

    /// Number of Logical Blocks, zero-based, where dword 12 holds one in its low half.
    pub const fn nlb_z(&self) -> u16 {
        self.cdw12 as u16
    }

    /// This entry with another command identifier.
    pub const fn with_cid(mut self, cid: u16) -> Self {
        self.cid = cid;
        self
    }

    /// This entry with another data pointer.
    pub const fn with_prps(mut self, prp1: u64, prp2: u64) -> Self {
        self.prp1 = prp1;
        self.prp2 = prp2;
        self
    }
}

/// A completion queue entry: 16 bytes, little-endian.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(8))]
pub struct Cqe {
    /// Command specific result, dword 0.
    pub dw0: u32,
    /// Command specific result, dword 1.
    pub dw1: u32,
    /// SQ Head Pointer: how far the controller has fetched when it posted this entry.
    pub sqhd: u16,
    /// SQ Identifier of the queue the command came from.
    pub sqid: u16,
    /// Command Identifier of the completed command.
    pub cid: u16,
    /// Phase tag and status.
    pub status: StatusField,
}
layout!(Cqe, 16, dw1 @ 4, sqhd @ 8, sqid @ 10, cid @ 12, status @ 14);

impl Cqe {
    /// The entry as its two 64-bit halves, in memory order.
    ///
    /// The phase tag is in the second. A controller stores the first half plainly and the second
    /// with one Release store, a host loads the second with Acquire and then the first: then no one
    /// ever sees a half-written entry with a fresh phase.
    pub const fn to_halves(&self) -> [u64; 2] {
        [
            self.dw0 as u64 | (self.dw1 as u64) << 32,
            self.sqhd as u64
                | (self.sqid as u64) << 16
                | (self.cid as u64) << 32
                | (self.status.into_bits() as u64) << 48,
        ]
    }

    /// The entry from its two halves in memory order.
    pub const fn from_halves(halves: [u64; 2]) -> Self {
        let [low, high] = halves;
        Self {
            dw0: low as u32,
            dw1: (low >> 32) as u32,
            sqhd: high as u16,
            sqid: (high >> 16) as u16,
            cid: (high >> 32) as u16,
            status: StatusField::from_bits((high >> 48) as u16),
        }
    }

    /// The phase tag in the second half of an entry, without building the entry.
    pub const fn phase_of_high_half(high: u64) -> bool {
        high >> 48 & 1 != 0
    }

    /// The status of the completed command.
    pub const fn status(&self) -> Status {
        self.status.status()
    }
}
