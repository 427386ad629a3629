//! NVM Command Set commands as views of an [`Sqe`].
//!
//! NVM Command Set 1.x, section "I/O Commands". As in [`crate::admin`], a view takes fields apart and
//! judges nothing.

use crate::command::Sqe;
use crate::opcode::NvmOpcode;
use bitfield_struct::bitfield;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;

/// Protection Information Field (PRINFO), 4 bits.
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub struct Prinfo {
    /// Check the reference tag.
    pub check_reference_tag: bool,
    /// Check the application tag.
    pub check_application_tag: bool,
    /// Check the guard.
    pub check_guard: bool,
    /// Protection Information Action: insert or strip.
    pub pract: bool,
    #[bits(4)]
    __: u8,
}

/// Dataset Management hints of Read and Write (DSM), 8 bits.
#[bitfield(u8)]
#[derive(PartialEq, Eq)]
pub struct DsmHints {
    /// Access Frequency.
    #[bits(4)]
    pub access_frequency: u8,
    /// Access Latency.
    #[bits(2)]
    pub access_latency: u8,
    /// Sequential Request.
    pub sequential: bool,
    /// Incompressible.
    pub incompressible: bool,
}

/// A command on a range of logical blocks: Read, Write, Compare, Verify, Write Zeroes, Write
/// Uncorrectable. Fields a command does not have are reserved in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadWrite {
    /// Namespace Identifier.
    pub nsid: u32,
    /// Starting LBA.
    pub slba: u64,
    /// Number of Logical Blocks, zero-based.
    pub nlb_z: u16,
    /// Directive Type, 4 bits (Write).
    pub dtype: u8,
    /// Storage Tag Check.
    pub stc: bool,
    /// Namespace Zeroes (Write Zeroes).
    pub nsz: bool,
    /// Deallocate (Write Zeroes).
    pub deac: bool,
    /// Protection Information Field.
    pub prinfo: Prinfo,
    /// Force Unit Access.
    pub fua: bool,
    /// Limited Retry.
    pub lr: bool,
    /// Dataset Management hints (Read, Write).
    pub dsm: DsmHints,
    /// Directive Specific (Write).
    pub dspec: u16,
    /// Expected (or, for Write, initial) Logical Block Reference Tag, low 32 bits.
    pub reftag: u32,
    /// Logical Block Application Tag.
    pub apptag: u16,
    /// Logical Block Application Tag Mask.
    pub appmask: u16,
}

impl ReadWrite {
    /// A plain command: no FUA, no hints, no protection information.
    pub const fn new(nsid: u32, slba: u64, nlb_z: u16) -> Self {
        Self {
            nsid,
            slba,
            nlb_z,
            dtype: 0,
            stc: false,
            nsz: false,
            deac: false,
            prinfo: Prinfo::new(),
            fua: false,
            lr: false,
            dsm: DsmHints::new(),
            dspec: 0,
            reftag: 0,
            apptag: 0,
            appmask: 0,
        }
    }

    /// The fields of a command.
    pub const fn from_sqe(sqe: &Sqe) -> Self {
        Self {
            nsid: sqe.nsid,
            slba: sqe.slba(),
            nlb_z: sqe.nlb_z(),
            dtype: (sqe.cdw12 >> 20) as u8 & 0xF,
            nsz: sqe.cdw12 & 1 << 23 != 0,
            stc: sqe.cdw12 & 1 << 24 != 0,
            deac: sqe.cdw12 & 1 << 25 != 0,
            prinfo: Prinfo::from_bits((sqe.cdw12 >> 26) as u8 & 0xF),
            fua: sqe.cdw12 & 1 << 30 != 0,
            lr: sqe.cdw12 & 1 << 31 != 0,
            dsm: DsmHints::from_bits(sqe.cdw13 as u8),
            dspec: (sqe.cdw13 >> 16) as u16,
            reftag: sqe.cdw14,
            apptag: sqe.cdw15 as u16,
            appmask: (sqe.cdw15 >> 16) as u16,
        }
    }

    /// The command with this opcode, with its data (if it has any) at these PRPs.
    ///
    /// NSZ and the top bit of DTYPE are one bit of the command; set the one the opcode has.
    pub const fn to_sqe(&self, opcode: NvmOpcode, prp1: u64, prp2: u64) -> Sqe {
        Sqe {
            opcode: opcode.0,
            flags: 0,
            cid: 0,
            nsid: self.nsid,
            cdw2: 0,
            cdw3: 0,
            mptr: 0,
            prp1,
            prp2,
            cdw10: self.slba as u32,
            cdw11: (self.slba >> 32) as u32,
            cdw12: self.nlb_z as u32
                | ((self.dtype & 0xF) as u32) << 20
                | (self.nsz as u32) << 23
                | (self.stc as u32) << 24
                | (self.deac as u32) << 25
                | ((self.prinfo.into_bits() & 0xF) as u32) << 26
                | (self.fua as u32) << 30
                | (self.lr as u32) << 31,
            cdw13: self.dsm.into_bits() as u32 | (self.dspec as u32) << 16,
            cdw14: self.reftag,
            cdw15: self.apptag as u32 | (self.appmask as u32) << 16,
        }
    }

    /// Number of logical blocks: 1 to 65536.
    pub const fn blocks(&self) -> u32 {
        (self.nlb_z as u32).saturating_add(1)
    }

    /// The first block after the range; `None` if that is beyond 2^64.
    pub const fn end(&self) -> Option<u64> {
        self.slba.checked_add(self.blocks() as u64)
    }
}

/// Flush.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flush {
    /// Namespace Identifier; FFFFFFFFh for all, where VWC allows it.
    pub nsid: u32,
}

impl Flush {
    /// The fields of a command.
    pub const fn from_sqe(sqe: &Sqe) -> Self {
        Self { nsid: sqe.nsid }
    }

    /// The command.
    pub const fn to_sqe(&self) -> Sqe {
        let mut sqe = ReadWrite::new(self.nsid, 0, 0).to_sqe(NvmOpcode::FLUSH, 0, 0);
        sqe.cdw12 = 0;
        sqe
    }
}

/// Dataset Management.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DatasetManagement {
    /// Namespace Identifier.
    pub nsid: u32,
    /// Number of Ranges, zero-based: 1 to 256 [`DsmRange`]s are the command's data.
    pub nr_z: u8,
    /// Attribute, Deallocate.
    pub ad: bool,
    /// Attribute, Integral Dataset for Write.
    pub idw: bool,
    /// Attribute, Integral Dataset for Read.
    pub idr: bool,
}

impl DatasetManagement {
    /// The fields of a command.
    pub const fn from_sqe(sqe: &Sqe) -> Self {
        Self {
            nsid: sqe.nsid,
            nr_z: sqe.cdw10 as u8,
            idr: sqe.cdw11 & 1 != 0,
            idw: sqe.cdw11 & 2 != 0,
            ad: sqe.cdw11 & 4 != 0,
        }
    }

    /// The command, with its ranges at these PRPs.
    pub const fn to_sqe(&self, prp1: u64, prp2: u64) -> Sqe {
        let mut sqe = ReadWrite::new(self.nsid, self.nr_z as u64, 0).to_sqe(
            NvmOpcode::DATASET_MANAGEMENT,
            prp1,
            prp2,
        );
        sqe.cdw11 = self.idr as u32 | (self.idw as u32) << 1 | (self.ad as u32) << 2;
        sqe
    }

    /// Number of ranges: 1 to 256.
    pub const fn ranges(&self) -> u32 {
        (self.nr_z as u32).saturating_add(1)
    }

    /// Bytes of the command's data: 16 to 4096.
    pub const fn data_len(&self) -> u32 {
        self.ranges() << 4
    }
}

/// A range of Dataset Management, 16 bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct DsmRange {
    /// Context Attributes.
    pub cattr: u32,
    /// Length in logical blocks; 0 is an empty range.
    pub nlb: u32,
    /// Starting LBA.
    pub slba: u64,
}
layout!(DsmRange, 16, nlb @ 4, slba @ 8);

impl DsmRange {
    /// The first block after the range; `None` if that is beyond 2^64.
    pub const fn end(&self) -> Option<u64> {
        self.slba.checked_add(self.nlb as u64)
    }
}
