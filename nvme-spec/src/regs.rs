//! Controller properties (registers) in BAR0: offsets and bit fields.
//!
//! NVMe Base 2.x, section "Controller Properties".

use bitfield_struct::bitfield;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;

/// Byte offsets of the properties in BAR0.
pub mod offset {
    /// Controller Capabilities, 64 bits.
    pub const CAP: u32 = 0x00;
    /// Version, 32 bits.
    pub const VS: u32 = 0x08;
    /// Interrupt Mask Set, 32 bits.
    pub const INTMS: u32 = 0x0C;
    /// Interrupt Mask Clear, 32 bits.
    pub const INTMC: u32 = 0x10;
    /// Controller Configuration, 32 bits.
    pub const CC: u32 = 0x14;
    /// Controller Status, 32 bits.
    pub const CSTS: u32 = 0x1C;
    /// NVM Subsystem Reset, 32 bits.
    pub const NSSR: u32 = 0x20;
    /// Admin Queue Attributes, 32 bits.
    pub const AQA: u32 = 0x24;
    /// Admin Submission Queue Base Address, 64 bits.
    pub const ASQ: u32 = 0x28;
    /// Admin Completion Queue Base Address, 64 bits.
    pub const ACQ: u32 = 0x30;
    /// Controller Memory Buffer Location, 32 bits.
    pub const CMBLOC: u32 = 0x38;
    /// Controller Memory Buffer Size, 32 bits.
    pub const CMBSZ: u32 = 0x3C;
    /// Boot Partition Information, 32 bits.
    pub const BPINFO: u32 = 0x40;
    /// Boot Partition Read Select, 32 bits.
    pub const BPRSEL: u32 = 0x44;
    /// Boot Partition Memory Buffer Location, 64 bits.
    pub const BPMBL: u32 = 0x48;
    /// Controller Memory Buffer Memory Space Control, 64 bits.
    pub const CMBMSC: u32 = 0x50;
    /// Controller Memory Buffer Status, 32 bits.
    pub const CMBSTS: u32 = 0x58;
    /// Controller Memory Buffer Elasticity Buffer Size, 32 bits.
    pub const CMBEBS: u32 = 0x5C;
    /// Controller Memory Buffer Sustained Write Throughput, 32 bits.
    pub const CMBSWTP: u32 = 0x60;
    /// NVM Subsystem Shutdown, 32 bits.
    pub const NSSD: u32 = 0x64;
    /// Controller Ready Timeouts, 32 bits.
    pub const CRTO: u32 = 0x68;
    /// Persistent Memory Region Capabilities, 32 bits.
    pub const PMRCAP: u32 = 0xE00;
    /// Persistent Memory Region Control, 32 bits.
    pub const PMRCTL: u32 = 0xE04;
    /// Persistent Memory Region Status, 32 bits.
    pub const PMRSTS: u32 = 0xE08;
    /// Persistent Memory Region Elasticity Buffer Size, 32 bits.
    pub const PMREBS: u32 = 0xE0C;
    /// Persistent Memory Region Sustained Write Throughput, 32 bits.
    pub const PMRSWTP: u32 = 0xE10;
    /// Persistent Memory Region Memory Space Control Lower, 32 bits.
    pub const PMRMSCL: u32 = 0xE14;
    /// Persistent Memory Region Memory Space Control Upper, 32 bits.
    pub const PMRMSCU: u32 = 0xE18;
    /// The first doorbell (SQ 0 tail); see [`crate::doorbell`].
    pub const DOORBELLS: u32 = 0x1000;
}

/// What a host writes to NSSR to reset the NVM subsystem: "NVMe" in ASCII.
pub const NSSR_MAGIC: u32 = 0x4E56_4D65;

/// Controller Capabilities.
#[bitfield(u64)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Cap {
    /// Maximum Queue Entries Supported, zero-based, for each I/O queue; at least 1.
    pub mqes_z: u16,
    /// Contiguous Queues Required.
    pub cqr: bool,
    /// Arbitration Mechanism Supported: bit 0 weighted round robin with urgent class, bit 1 vendor.
    /// Round robin is always supported.
    #[bits(2)]
    pub ams: u8,
    #[bits(5)]
    __: u8,
    /// Timeout, in units of 500 ms: the worst a host waits for CSTS.RDY.
    pub to: u8,
    /// Doorbell Stride: 2^(2 + DSTRD) bytes.
    #[bits(4)]
    pub dstrd: u8,
    /// NVM Subsystem Reset Supported.
    pub nssrs: bool,
    /// Command Sets Supported: the bits of [`css`].
    pub css: u8,
    /// Boot Partition Support.
    pub bps: bool,
    /// Controller Power Scope: 0 not reported, 1 controller, 2 domain, 3 NVM subsystem.
    #[bits(2)]
    pub cps: u8,
    /// Memory Page Size Minimum: 2^(12 + MPSMIN) bytes.
    #[bits(4)]
    pub mpsmin: u8,
    /// Memory Page Size Maximum: 2^(12 + MPSMAX) bytes.
    #[bits(4)]
    pub mpsmax: u8,
    /// Persistent Memory Region Supported.
    pub pmrs: bool,
    /// Controller Memory Buffer Supported.
    pub cmbs: bool,
    /// NVM Subsystem Shutdown Supported.
    pub nsss: bool,
    /// Controller Ready With Media Supported; see [`Crto`].
    pub crms_crwms: bool,
    /// Controller Ready Independent of Media Supported; see [`Crto`].
    pub crms_crims: bool,
    /// NVM Subsystem Shutdown Enhancements Supported.
    pub nsses: bool,
    #[bits(2)]
    __: u8,
}

/// Bits of [`Cap::css`].
pub mod css {
    /// NVM Command Set.
    pub const NVM: u8 = 1 << 0;
    /// One or more I/O command sets, told by Identify (CNS 1Ch).
    pub const IO_COMMAND_SETS: u8 = 1 << 6;
    /// No I/O command set: admin only.
    pub const ADMIN_ONLY: u8 = 1 << 7;
}

/// Version.
#[bitfield(u32)]
#[derive(PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Vs {
    /// Tertiary version number.
    pub ter: u8,
    /// Minor version number.
    pub mnr: u8,
    /// Major version number.
    pub mjr: u16,
}

impl Vs {
    /// 1.2.
    pub const V1_2: Self = Self::of(1, 2, 0);
    /// 1.3.
    pub const V1_3: Self = Self::of(1, 3, 0);
    /// 1.4.
    pub const V1_4: Self = Self::of(1, 4, 0);
    /// 2.0.
    pub const V2_0: Self = Self::of(2, 0, 0);
    /// 2.1.
    pub const V2_1: Self = Self::of(2, 1, 0);

    /// A version from its three numbers.
    pub const fn of(mjr: u16, mnr: u8, ter: u8) -> Self {
        Self::new().with_mjr(mjr).with_mnr(mnr).with_ter(ter)
    }
}

open_enum! {
    /// I/O Command Set Selected, CC.CSS.
    CommandSetSelected: u8 {
        /// NVM Command Set.
        NVM = 0,
        /// All supported I/O command sets.
        ALL = 6,
        /// Admin command set only.
        ADMIN_ONLY = 7,
    }
}

open_enum! {
    /// Arbitration Mechanism Selected, CC.AMS.
    Arbitration: u8 {
        /// Round robin.
        ROUND_ROBIN = 0,
        /// Weighted round robin with urgent priority class.
        WEIGHTED_ROUND_ROBIN = 1,
        /// Vendor specific.
        VENDOR = 7,
    }
}

open_enum! {
    /// Shutdown Notification, CC.SHN.
    Shn: u8 {
        /// No notification.
        NONE = 0,
        /// Normal shutdown.
        NORMAL = 1,
        /// Abrupt shutdown.
        ABRUPT = 2,
    }
}

open_enum! {
    /// Shutdown Status, CSTS.SHST.
    Shst: u8 {
        /// Normal operation.
        NORMAL = 0,
        /// Shutdown processing occurring.
        OCCURRING = 1,
        /// Shutdown processing complete.
        COMPLETE = 2,
    }
}

/// Controller Configuration.
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Cc {
    /// Enable. From 1 to 0 is a Controller Reset.
    pub en: bool,
    #[bits(3)]
    __: u8,
    /// I/O Command Set Selected.
    #[bits(3)]
    pub css: CommandSetSelected,
    /// Memory Page Size: 2^(12 + MPS) bytes.
    #[bits(4)]
    pub mps: u8,
    /// Arbitration Mechanism Selected.
    #[bits(3)]
    pub ams: Arbitration,
    /// Shutdown Notification.
    #[bits(2)]
    pub shn: Shn,
    /// I/O Submission Queue Entry Size, as a power of two: 6.
    #[bits(4)]
    pub iosqes: u8,
    /// I/O Completion Queue Entry Size, as a power of two: 4.
    #[bits(4)]
    pub iocqes: u8,
    /// Controller Ready Independent of Media Enable.
    pub crime: bool,
    #[bits(7)]
    __: u8,
}

/// Controller Status.
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Csts {
    /// Ready.
    pub rdy: bool,
    /// Controller Fatal Status.
    pub cfs: bool,
    /// Shutdown Status.
    #[bits(2)]
    pub shst: Shst,
    /// NVM Subsystem Reset Occurred; the host clears it by writing 1.
    pub nssro: bool,
    /// Processing Paused.
    pub pp: bool,
    /// Shutdown Type: true for an NVM subsystem shutdown.
    pub st: bool,
    #[bits(25)]
    __: u32,
}

/// Admin Queue Attributes.
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Aqa {
    /// Admin Submission Queue Size, zero-based, 2..=4096 entries.
    #[bits(12)]
    pub asqs_z: u16,
    #[bits(4)]
    __: u8,
    /// Admin Completion Queue Size, zero-based, 2..=4096 entries.
    #[bits(12)]
    pub acqs_z: u16,
    #[bits(4)]
    __: u8,
}

/// Controller Ready Timeouts.
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Crto {
    /// Controller Ready With Media Timeout, in units of 500 ms.
    pub crwmt: u16,
    /// Controller Ready Independent of Media Timeout, in units of 500 ms.
    pub crimt: u16,
}
