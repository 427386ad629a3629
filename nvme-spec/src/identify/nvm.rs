//! Identify structures specific to the NVM Command Set: CNS 05h and 06h with CSI 00h.

use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;

/// I/O Command Set Specific Identify Controller for the NVM Command Set, CNS 06h (NVM Command Set,
/// figure "Identify – I/O Command Set Specific Identify Controller Data Structure").
///
/// The size limits are powers of two in units of the minimum memory page size; 0 for no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NvmControllerIdentify {
    /// Verify Size Limit.
    pub vsl: u8,
    /// Write Zeroes Size Limit.
    pub wzsl: u8,
    /// Write Uncorrectable Size Limit.
    pub wusl: u8,
    /// Dataset Management Ranges Limit; 0 for not reported.
    pub dmrl: u8,
    /// Dataset Management Range Size Limit, in logical blocks per range; 0 for not reported.
    pub dmrsl: u32,
    /// Dataset Management Size Limit, in logical blocks per command; 0 for not reported.
    pub dmsl: u64,
    /// Key Per I/O Capabilities of this command set.
    pub kpiocap: u8,
    /// Write Zeroes With Deallocate Size Limit.
    pub wzdsl: u8,
    /// Admin Optional Command Support.
    pub aocs: u16,
    /// Version of the NVM Command Set.
    pub ver: u32,
    /// LBA Migration Queue Format.
    pub lbamqf: u8,
    /// Reserved.
    pub rsvd25: [u8; 4071],
}
zero_default!(NvmControllerIdentify);
layout!(NvmControllerIdentify, 4096, wzsl @ 1, wusl @ 2, dmrl @ 3, dmrsl @ 4, dmsl @ 8,
    kpiocap @ 16, wzdsl @ 17, aocs @ 18, ver @ 20, lbamqf @ 24);

/// I/O Command Set Specific Identify Namespace for the NVM Command Set, CNS 05h (NVM Command Set,
/// figure "NVM Command Set I/O Command Set Specific Identify Namespace Data Structure").
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NvmNamespaceIdentify {
    /// Logical Block Storage Tag Mask.
    pub lbstm: u64,
    /// Protection Information Capabilities.
    pub pic: u8,
    /// Protection Information Format Attributes.
    pub pifa: u8,
    /// Reserved.
    pub rsvd10: [u8; 2],
    /// Extended LBA Formats: storage tag size in bits 6:0, protection information format in 8:7.
    pub elbaf: [u32; 64],
    /// Namespace Preferred Deallocate Granularity Large, in logical blocks.
    pub npdgl: u32,
    /// Namespace Preferred Read Granularity, in logical blocks.
    pub nprg: u32,
    /// Namespace Preferred Read Alignment, in logical blocks.
    pub npra: u32,
    /// Namespace Optimal Read Size, in logical blocks.
    pub nors: u32,
    /// Namespace Preferred Deallocate Alignment Large, in logical blocks.
    pub npdal: u32,
    /// LBA Format Placement Shard Size.
    pub lbapss: u32,
    /// Tracked LBA Allocation Granularity.
    pub tlbaag: u32,
    /// Reserved.
    pub rsvd296: [u8; 3800],
}
zero_default!(NvmNamespaceIdentify);
layout!(NvmNamespaceIdentify, 4096, pic @ 8, pifa @ 9, elbaf @ 12, npdgl @ 268, nprg @ 272,
    npra @ 276, nors @ 280, npdal @ 284, lbapss @ 288, tlbaag @ 292);
