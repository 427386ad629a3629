//! Capability bit fields of the Identify structures.

use bitfield_struct::bitfield;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;

/// Controller Multi-Path I/O and Namespace Sharing Capabilities (CMIC).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Cmic {
    /// The NVM subsystem may have more than one port.
    pub multi_port: bool,
    /// The NVM subsystem may have more than one controller.
    pub multi_controller: bool,
    /// This controller belongs to an SR-IOV virtual function.
    pub virtual_function: bool,
    /// Asymmetric Namespace Access Reporting.
    pub ana: bool,
    #[bits(4)]
    __: u8,
}

/// Optional Asynchronous Events Supported (OAES).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Oaes {
    #[bits(8)]
    __: u8,
    /// Attached Namespace Attribute Notices.
    pub namespace_attribute: bool,
    /// Firmware Activation Notices.
    pub firmware_activation: bool,
    #[bits(1)]
    __: u8,
    /// Asymmetric Namespace Access Change Notices.
    pub ana_change: bool,
    /// Predictable Latency Event Aggregate Log Change Notices.
    pub predictable_latency: bool,
    /// LBA Status Information Alert Notices.
    pub lba_status: bool,
    /// Endurance Group Event Aggregate Log Page Change Notices.
    pub endurance_group: bool,
    /// Normal NVM Subsystem Shutdown event.
    pub subsystem_shutdown: bool,
    /// Temperature Threshold Hysteresis Recovery event.
    pub temperature_hysteresis: bool,
    /// Reachability Groups Change Notices.
    pub reachability_group: bool,
    #[bits(1)]
    __: u8,
    /// Allocated Namespace Attribute Notices.
    pub allocated_namespace_attribute: bool,
    #[bits(7)]
    __: u8,
    /// Zone Descriptor Changed Notices.
    pub zone_descriptor: bool,
    #[bits(3)]
    __: u8,
    /// Discovery Log Page Change Notices.
    pub discovery_log: bool,
}

/// Controller Attributes (CTRATT).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Ctratt {
    /// 128-bit Host Identifier.
    pub host_id_128: bool,
    /// Non-Operational Power State Permissive Mode.
    pub non_op_permissive: bool,
    /// NVM Sets.
    pub nvm_sets: bool,
    /// Read Recovery Levels.
    pub read_recovery_levels: bool,
    /// Endurance Groups.
    pub endurance_groups: bool,
    /// Predictable Latency Mode.
    pub predictable_latency: bool,
    /// Traffic Based Keep Alive.
    pub traffic_keep_alive: bool,
    /// Namespace Granularity.
    pub namespace_granularity: bool,
    /// SQ Associations.
    pub sq_associations: bool,
    /// UUID List.
    pub uuid_list: bool,
    /// Multi-Domain Subsystem.
    pub multi_domain: bool,
    /// Fixed Capacity Management.
    pub fixed_capacity: bool,
    /// Variable Capacity Management.
    pub variable_capacity: bool,
    /// Delete Endurance Group.
    pub delete_endurance_group: bool,
    /// Delete NVM Set.
    pub delete_nvm_set: bool,
    /// Extended LBA Formats.
    pub extended_lba_formats: bool,
    /// MDTS and size limits exclude metadata.
    pub mem: bool,
    /// HMB Restrict Non-Operational Power State Access.
    pub hmb_restrict: bool,
    /// Reservations and Host Identifier Interaction.
    pub rhii: bool,
    /// Flexible Data Placement.
    pub fdp: bool,
    #[bits(12)]
    __: u16,
}

/// Optional Admin Command Support (OACS).
#[bitfield(u16)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Oacs {
    /// Security Send and Receive.
    pub security: bool,
    /// Format NVM.
    pub format: bool,
    /// Firmware Commit and Image Download.
    pub firmware: bool,
    /// Namespace Management and Attachment.
    pub ns_management: bool,
    /// Device Self-test.
    pub self_test: bool,
    /// Directives.
    pub directives: bool,
    /// NVMe-MI Send and Receive.
    pub nvme_mi: bool,
    /// Virtualization Management.
    pub virtualization: bool,
    /// Doorbell Buffer Config.
    pub doorbell_buffer_config: bool,
    /// Get LBA Status.
    pub get_lba_status: bool,
    /// Command and Feature Lockdown.
    pub lockdown: bool,
    #[bits(5)]
    __: u8,
}

/// Firmware Updates (FRMW).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Frmw {
    /// The first firmware slot is read only.
    pub slot1_read_only: bool,
    /// Number of firmware slots, 1 to 7.
    #[bits(3)]
    pub slots: u8,
    /// Activation without a reset.
    pub activate_without_reset: bool,
    /// Support for detecting overlapping image ranges.
    pub overlap_detection: bool,
    #[bits(2)]
    __: u8,
}

/// Log Page Attributes (LPA).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Lpa {
    /// SMART / Health log per namespace.
    pub smart_per_namespace: bool,
    /// Commands Supported and Effects log.
    pub effects: bool,
    /// Get Log Page with 32-bit NUMD and offsets.
    pub extended: bool,
    /// Telemetry logs.
    pub telemetry: bool,
    /// Persistent Event log.
    pub persistent_event: bool,
    /// Supported Log Pages (LID 0), Feature Identifiers Effects and NVMe-MI Commands Effects logs.
    pub supported_log_pages: bool,
    /// Telemetry Data Area 4.
    pub telemetry_area4: bool,
    #[bits(1)]
    __: u8,
}

/// Submission Queue Entry Size (SQES) and Completion Queue Entry Size (CQES), as powers of two.
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EntrySize {
    /// Required (and smallest).
    #[bits(4)]
    pub min: u8,
    /// Largest.
    #[bits(4)]
    pub max: u8,
}

impl EntrySize {
    /// SQES of a controller with 64-byte entries only.
    pub const SQ: Self = Self::new().with_min(6).with_max(6);
    /// CQES of a controller with 16-byte entries only.
    pub const CQ: Self = Self::new().with_min(4).with_max(4);
}

/// Optional NVM Command Support (ONCS).
#[bitfield(u16)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Oncs {
    /// Compare.
    pub compare: bool,
    /// Write Uncorrectable.
    pub write_uncorrectable: bool,
    /// Dataset Management.
    pub dataset_management: bool,
    /// Write Zeroes.
    pub write_zeroes: bool,
    /// Save field of Set Features and Select field of Get Features.
    pub save_select: bool,
    /// Reservations.
    pub reservations: bool,
    /// Timestamp feature.
    pub timestamp: bool,
    /// Verify.
    pub verify: bool,
    /// Copy.
    pub copy: bool,
    /// Single atomicity for Copy.
    pub copy_single_atomicity: bool,
    /// All Fast Copy.
    pub all_fast_copy: bool,
    /// Write Zeroes deallocates as fast as Dataset Management (MAXWZD).
    pub max_write_zeroes_with_deallocate: bool,
    /// Namespace Zeroes with NSID FFFFFFFFh.
    pub namespace_zeroes: bool,
    #[bits(3)]
    __: u8,
}

/// Fused Operation Support (FUSES).
#[bitfield(u16)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Fuses {
    /// Compare and Write.
    pub compare_and_write: bool,
    #[bits(15)]
    __: u16,
}

/// Format NVM Attributes (FNA).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Fna {
    /// Format applies to all namespaces.
    pub format_all: bool,
    /// Secure erase applies to all namespaces.
    pub secure_erase_all: bool,
    /// Cryptographic erase.
    pub crypto_erase: bool,
    /// Format with NSID FFFFFFFFh is not supported.
    pub no_broadcast: bool,
    #[bits(4)]
    __: u8,
}

/// Volatile Write Cache (VWC).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Vwc {
    /// There is a volatile write cache.
    pub present: bool,
    /// Flush with NSID FFFFFFFFh.
    #[bits(2)]
    pub flush: FlushBehavior,
    #[bits(5)]
    __: u8,
}

open_enum! {
    /// What Flush with NSID FFFFFFFFh does (VWC bits 2:1).
    FlushBehavior: u8 {
        /// Not told (controllers before 1.4).
        UNSPECIFIED = 0,
        /// Not supported: the command fails.
        BROADCAST_NOT_SUPPORTED = 2,
        /// Flushes all namespaces.
        BROADCAST_SUPPORTED = 3,
    }
}

/// SGL Support (SGLS).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Sgls {
    /// 0: no SGLs; 1: any alignment; 2: dword alignment.
    #[bits(2)]
    pub supported: u8,
    /// Keyed SGL Data Block descriptor.
    pub keyed: bool,
    #[bits(5)]
    __: u8,
    /// SGL Descriptor Threshold.
    pub threshold: u8,
    /// SGL Bit Bucket descriptor.
    pub bit_bucket: bool,
    /// Byte aligned contiguous metadata buffer.
    pub metadata_buffer: bool,
    /// SGLs longer than the data.
    pub larger_than_data: bool,
    /// Metadata pointer as SGL segment.
    pub mptr_sgl: bool,
    /// Address field as offset.
    pub address_offset: bool,
    /// Transport SGL Data Block descriptor.
    pub transport: bool,
    #[bits(10)]
    __: u16,
}

open_enum! {
    /// Controller Type (CNTRLTYPE).
    ControllerType: u8 {
        /// Not reported (before 1.4).
        UNREPORTED = 0,
        /// I/O controller.
        IO = 1,
        /// Discovery controller.
        DISCOVERY = 2,
        /// Administrative controller.
        ADMIN = 3,
    }
}

/// Namespace Features (NSFEAT; NVM Command Set).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Nsfeat {
    /// Thin provisioning.
    pub thin: bool,
    /// NAWUN, NAWUPF and NACWU are valid.
    pub atomic: bool,
    /// Deallocated or Unwritten Logical Block error.
    pub dealloc_error: bool,
    /// NGUID and EUI64 are never reused.
    pub uid_reuse: bool,
    /// NPWG, NPWA, NPDG, NPDA and NOWS are valid (OPTPERF, low bit).
    pub optperf: bool,
    /// NPDGL and NPDAL of the NVM specific structure are valid (OPTPERF, high bit).
    pub optperf_large: bool,
    /// Multiple Atomicity Mode.
    pub multi_atomicity: bool,
    /// NPRG, NPRA and NORS of the NVM specific structure are valid (OPTRPERF).
    pub optrperf: bool,
}

/// Formatted LBA Size (FLBAS).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Flbas {
    /// LBA format index, bits 3:0.
    #[bits(4)]
    pub index_low: u8,
    /// Metadata is at the end of the data, not in a buffer of its own.
    pub extended: bool,
    /// LBA format index, bits 5:4.
    #[bits(2)]
    pub index_high: u8,
    #[bits(1)]
    __: u8,
}

impl Flbas {
    /// The LBA format index, 0 to 63.
    pub const fn index(&self) -> u8 {
        self.index_high() << 4 | self.index_low()
    }
}

/// Namespace Multi-path I/O and Namespace Sharing Capabilities (NMIC).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Nmic {
    /// The namespace may be attached to several controllers at once.
    pub shared: bool,
    /// Dispersed Namespace.
    pub dispersed: bool,
    #[bits(6)]
    __: u8,
}

/// Reservation Capabilities (RESCAP).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Rescap {
    /// Persist through power loss.
    pub persist: bool,
    /// Write Exclusive.
    pub write_exclusive: bool,
    /// Exclusive Access.
    pub exclusive_access: bool,
    /// Write Exclusive, Registrants Only.
    pub write_exclusive_registrants: bool,
    /// Exclusive Access, Registrants Only.
    pub exclusive_access_registrants: bool,
    /// Write Exclusive, All Registrants.
    pub write_exclusive_all: bool,
    /// Exclusive Access, All Registrants.
    pub exclusive_access_all: bool,
    /// Ignore Existing Key as defined since 1.3.
    pub iekey: bool,
}

/// Deallocate Logical Block Features (DLFEAT).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Dlfeat {
    /// What reading a deallocated block gives.
    #[bits(3)]
    pub read: DeallocatedRead,
    /// Write Zeroes with the Deallocate bit.
    pub write_zeroes_deallocate: bool,
    /// The guard of a deallocated block is the CRC of its data.
    pub guard_crc: bool,
    #[bits(3)]
    __: u8,
}

open_enum! {
    /// What reading a deallocated block gives (DLFEAT bits 2:0).
    DeallocatedRead: u8 {
        /// Not told.
        UNSPECIFIED = 0,
        /// All bytes 00h.
        ZEROES = 1,
        /// All bytes FFh.
        ONES = 2,
    }
}

/// Namespace Attributes (NSATTR).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Nsattr {
    /// The namespace is write protected now.
    pub write_protected: bool,
    #[bits(7)]
    __: u8,
}

/// Namespace Status (NSTAT).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Nstat {
    /// The namespace is ready.
    pub ready: bool,
    #[bits(7)]
    __: u8,
}

/// Namespace Write Protection Capabilities (NWPC).
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Nwpc {
    /// No Write Protect and Write Protect states.
    pub write_protect: bool,
    /// Write Protect Until Power Cycle.
    pub until_power_cycle: bool,
    /// Permanent Write Protect.
    pub permanent: bool,
    #[bits(5)]
    __: u8,
}
