//! Identify Namespace (CNS 00h, NVM Command Set) and the I/O-command-set-independent one (CNS 08h).

use super::Dlfeat;
use super::Flbas;
use super::Le128;
use super::Nmic;
use super::Nsattr;
use super::Nsfeat;
use super::Nstat;
use super::Rescap;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;

/// LBA Format, 4 bytes (NVM Command Set, figure "LBA Format Data Structure").
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct LbaFormat {
    /// Metadata Size, in bytes per logical block.
    pub ms: u16,
    /// LBA Data Size, as a power of two: 9 and more; 0 for a format that is not available.
    pub lbads: u8,
    /// Relative Performance in bits 1:0: 0 best, 3 degraded.
    pub rp: u8,
}
layout!(LbaFormat, 4, lbads @ 2, rp @ 3);

/// Identify Namespace, 4096 bytes (NVM Command Set, figure "Identify – Identify Namespace Data
/// Structure, NVM Command Set").
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IdentifyNamespace {
    /// Namespace Size, in logical blocks.
    pub nsze: u64,
    /// Namespace Capacity, in logical blocks.
    pub ncap: u64,
    /// Namespace Utilization, in logical blocks.
    pub nuse: u64,
    /// Namespace Features.
    pub nsfeat: Nsfeat,
    /// Number of LBA Formats, zero-based.
    pub nlbaf_z: u8,
    /// Formatted LBA Size.
    pub flbas: Flbas,
    /// Metadata Capabilities.
    pub mc: u8,
    /// End-to-end Data Protection Capabilities.
    pub dpc: u8,
    /// End-to-end Data Protection Type Settings.
    pub dps: u8,
    /// Namespace Multi-path I/O and Namespace Sharing Capabilities.
    pub nmic: Nmic,
    /// Reservation Capabilities.
    pub rescap: Rescap,
    /// Format Progress Indicator.
    pub fpi: u8,
    /// Deallocate Logical Block Features.
    pub dlfeat: Dlfeat,
    /// Namespace Atomic Write Unit Normal, zero-based, in logical blocks.
    pub nawun_z: u16,
    /// Namespace Atomic Write Unit Power Fail, zero-based.
    pub nawupf_z: u16,
    /// Namespace Atomic Compare & Write Unit, zero-based.
    pub nacwu_z: u16,
    /// Namespace Atomic Boundary Size Normal, zero-based; 0 for none.
    pub nabsn: u16,
    /// Namespace Atomic Boundary Offset.
    pub nabo: u16,
    /// Namespace Atomic Boundary Size Power Fail; 0 for none.
    pub nabspf: u16,
    /// Namespace Optimal I/O Boundary, in logical blocks; 0 for none.
    pub noiob: u16,
    /// NVM Capacity, in bytes.
    pub nvmcap: Le128,
    /// Namespace Preferred Write Granularity, zero-based, in logical blocks.
    pub npwg_z: u16,
    /// Namespace Preferred Write Alignment, zero-based.
    pub npwa_z: u16,
    /// Namespace Preferred Deallocate Granularity, zero-based.
    pub npdg_z: u16,
    /// Namespace Preferred Deallocate Alignment, zero-based.
    pub npda_z: u16,
    /// Namespace Optimal Write Size, zero-based.
    pub nows_z: u16,
    /// Maximum Single Source Range Length (Copy), in logical blocks.
    pub mssrl: u16,
    /// Maximum Copy Length, in logical blocks.
    pub mcl: u32,
    /// Maximum Source Range Count (Copy), zero-based.
    pub msrc_z: u8,
    /// Key Per I/O Status.
    pub kpios: u8,
    /// Number of Unique Attribute LBA Formats.
    pub nulbaf: u8,
    /// Reserved.
    pub rsvd83: u8,
    /// Key Per I/O Data Access Alignment and Granularity.
    pub kpiodaag: u32,
    /// Reserved.
    pub rsvd88: [u8; 4],
    /// ANA Group Identifier.
    pub anagrpid: u32,
    /// Reserved.
    pub rsvd96: [u8; 3],
    /// Namespace Attributes.
    pub nsattr: Nsattr,
    /// NVM Set Identifier.
    pub nvmsetid: u16,
    /// Endurance Group Identifier.
    pub endgid: u16,
    /// Namespace Globally Unique Identifier, big-endian.
    pub nguid: [u8; 16],
    /// IEEE Extended Unique Identifier, big-endian.
    pub eui64: [u8; 8],
    /// LBA Formats.
    pub lbaf: [LbaFormat; 64],
    /// Vendor Specific.
    pub vs: [u8; 3712],
}
zero_default!(IdentifyNamespace);
layout!(IdentifyNamespace, 4096, ncap @ 8, nuse @ 16, nsfeat @ 24, nlbaf_z @ 25, flbas @ 26,
    mc @ 27, dpc @ 28, dps @ 29, nmic @ 30, rescap @ 31, fpi @ 32, dlfeat @ 33, nawun_z @ 34,
    nawupf_z @ 36, nacwu_z @ 38, nabsn @ 40, nabo @ 42, nabspf @ 44, noiob @ 46, nvmcap @ 48,
    npwg_z @ 64, npwa_z @ 66, npdg_z @ 68, npda_z @ 70, nows_z @ 72, mssrl @ 74, mcl @ 76,
    msrc_z @ 80, kpios @ 81, nulbaf @ 82, kpiodaag @ 84, anagrpid @ 92, nsattr @ 99,
    nvmsetid @ 100, endgid @ 102, nguid @ 104, eui64 @ 120, lbaf @ 128, vs @ 384);

impl IdentifyNamespace {
    /// The LBA format in use; `None` if FLBAS names one beyond the formats there are.
    ///
    /// The high bits of the index count only for a namespace with more than 16 formats.
    pub fn current_format(&self) -> Option<&LbaFormat> {
        let index = match self.nlbaf_z {
            0..=15 => self.flbas.index_low(),
            _ => self.flbas.index(),
        };
        if index > self.nlbaf_z {
            return None;
        }
        self.lbaf.get(usize::from(index))
    }
}

/// I/O Command Set Independent Identify Namespace, 4096 bytes, CNS 08h (Base, figure "Identify – I/O
/// Command Set Independent Identify Namespace Data Structure").
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct IoCommandSetIndependentNamespace {
    /// Common Namespace Features: bit 3 UID reuse, bit 4 rotational medium, bit 5 no volatile write
    /// cache.
    pub nsfeat: u8,
    /// Namespace Multi-path I/O and Namespace Sharing Capabilities.
    pub nmic: Nmic,
    /// Reservation Capabilities.
    pub rescap: Rescap,
    /// Format Progress Indicator.
    pub fpi: u8,
    /// ANA Group Identifier.
    pub anagrpid: u32,
    /// Namespace Attributes.
    pub nsattr: Nsattr,
    /// Reserved.
    pub rsvd9: u8,
    /// NVM Set Identifier.
    pub nvmsetid: u16,
    /// Endurance Group Identifier.
    pub endgid: u16,
    /// Namespace Status.
    pub nstat: Nstat,
    /// Key Per I/O Status.
    pub kpios: u8,
    /// Maximum Key Tag.
    pub maxkt: u16,
    /// Reserved.
    pub rsvd18: [u8; 2],
    /// Reachability Group Identifier.
    pub rgrpid: u32,
    /// Reserved.
    pub rsvd24: [u8; 4072],
}
zero_default!(IoCommandSetIndependentNamespace);
layout!(IoCommandSetIndependentNamespace, 4096, nmic @ 1, rescap @ 2, fpi @ 3, anagrpid @ 4,
    nsattr @ 8, nvmsetid @ 10, endgid @ 12, nstat @ 14, kpios @ 15, maxkt @ 16, rgrpid @ 20);
