//! Log pages.
//!
//! NVMe Base 2.x, section "Get Log Page command".

use crate::identify::Le128;
use crate::status::StatusField;
use bitfield_struct::bitfield;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;

open_enum! {
    /// Log Page Identifier (Base, figure "Get Log Page – Log Page Identifiers").
    LogId: u8 {
        /// Supported Log Pages: [`SupportedLogPages`].
        SUPPORTED = 0x00,
        /// Error Information: [`ErrorLogEntry`], newest first.
        ERROR = 0x01,
        /// SMART / Health Information: [`SmartLog`].
        SMART = 0x02,
        /// Firmware Slot Information: [`FirmwareSlotLog`].
        FIRMWARE_SLOT = 0x03,
        /// Changed Attached Namespace List: [`ChangedNamespaceList`].
        CHANGED_NAMESPACES = 0x04,
        /// Commands Supported and Effects: [`CommandsSupportedAndEffects`].
        COMMANDS_AND_EFFECTS = 0x05,
        /// Device Self-test.
        SELF_TEST = 0x06,
        /// Telemetry Host-Initiated.
        TELEMETRY_HOST = 0x07,
        /// Telemetry Controller-Initiated.
        TELEMETRY_CONTROLLER = 0x08,
        /// Endurance Group Information.
        ENDURANCE_GROUP = 0x09,
        /// Predictable Latency Per NVM Set.
        PREDICTABLE_LATENCY = 0x0A,
        /// Predictable Latency Event Aggregate.
        PREDICTABLE_LATENCY_AGGREGATE = 0x0B,
        /// Asymmetric Namespace Access.
        ANA = 0x0C,
        /// Persistent Event Log.
        PERSISTENT_EVENT = 0x0D,
        /// LBA Status Information.
        LBA_STATUS = 0x0E,
        /// Endurance Group Event Aggregate.
        ENDURANCE_GROUP_AGGREGATE = 0x0F,
        /// Media Unit Status.
        MEDIA_UNIT_STATUS = 0x10,
        /// Supported Capacity Configuration List.
        CAPACITY_CONFIGURATIONS = 0x11,
        /// Feature Identifiers Supported and Effects.
        FEATURES_AND_EFFECTS = 0x12,
        /// NVMe-MI Commands Supported and Effects.
        MI_COMMANDS_AND_EFFECTS = 0x13,
        /// Command and Feature Lockdown.
        LOCKDOWN = 0x14,
        /// Boot Partition.
        BOOT_PARTITION = 0x15,
        /// Rotational Media Information.
        ROTATIONAL_MEDIA = 0x16,
        /// Changed Allocated Namespace List.
        CHANGED_ALLOCATED_NAMESPACES = 0x1C,
        /// FDP Configurations.
        FDP_CONFIGURATIONS = 0x20,
        /// Discovery.
        DISCOVERY = 0x70,
        /// Reservation Notification.
        RESERVATION_NOTIFICATION = 0x80,
        /// Sanitize Status.
        SANITIZE_STATUS = 0x81,
    }
}

/// One entry of the Error Information log, 64 bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct ErrorLogEntry {
    /// Error Count: a unique, increasing number; 0 marks an unused entry.
    pub error_count: u64,
    /// Submission Queue ID; FFFFh if the error belongs to no command.
    pub sqid: u16,
    /// Command ID; FFFFh if the error belongs to no command.
    pub cid: u16,
    /// The completion's status field, phase included.
    pub status: StatusField,
    /// Parameter Error Location: byte of the command in bits 7:0, bit in bits 10:8; FFFFh if none.
    pub location: u16,
    /// The first logical block with the error.
    pub lba: u64,
    /// Namespace.
    pub nsid: u32,
    /// Vendor Specific Information Available: a log page identifier from 80h on, or 0.
    pub vendor: u8,
    /// Transport Type.
    pub trtype: u8,
    /// Command Set Indicator, bits 7:0, valid with Opcode.
    pub csi: u8,
    /// Opcode of the command.
    pub opcode: u8,
    /// Command Specific Information.
    pub command_specific: u64,
    /// Transport Type Specific Information.
    pub transport_specific: u16,
    /// Reserved.
    pub rsvd42: [u8; 21],
    /// Log Page Version: 1 when CSI and Opcode are valid.
    pub version: u8,
}
layout!(ErrorLogEntry, 64, sqid @ 8, cid @ 10, status @ 12, location @ 14, lba @ 16, nsid @ 24,
    vendor @ 28, trtype @ 29, csi @ 30, opcode @ 31, command_specific @ 32,
    transport_specific @ 40, version @ 63);

impl ErrorLogEntry {
    /// SQID and CID of an error that belongs to no command.
    pub const NO_COMMAND: u16 = 0xFFFF;
    /// Location of an error that belongs to no field.
    pub const NO_LOCATION: u16 = 0xFFFF;

    /// The location of a bit of a field of the command: byte and bit within it.
    pub const fn location_of(byte: u8, bit: u8) -> u16 {
        byte as u16 | (bit as u16 & 7) << 8
    }
}

/// Critical Warning of [`SmartLog`]; the same bits enable the events in the SMART byte of
/// [`crate::event::AsyncEventConfig`].
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CriticalWarning {
    /// Available spare is below its threshold.
    pub spare: bool,
    /// A temperature is beyond a threshold.
    pub temperature: bool,
    /// Reliability is degraded.
    pub reliability: bool,
    /// All media are read only.
    pub read_only: bool,
    /// The volatile memory backup failed.
    pub backup_failed: bool,
    /// The Persistent Memory Region became read only or unreliable.
    pub pmr: bool,
    #[bits(2)]
    __: u8,
}

/// SMART / Health Information log, 512 bytes (Base, figure "SMART / Health Information Log Page").
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SmartLog {
    /// Critical Warning.
    pub critical_warning: CriticalWarning,
    /// Composite Temperature, in kelvins, least significant byte first; see
    /// [`Self::set_temperature`].
    pub composite_temperature: [u8; 2],
    /// Available Spare, percent.
    pub available_spare: u8,
    /// Available Spare Threshold, percent.
    pub available_spare_threshold: u8,
    /// Percentage Used; may exceed 100.
    pub percentage_used: u8,
    /// Endurance Group Critical Warning Summary.
    pub endurance_group_warning: u8,
    /// Reserved.
    pub rsvd7: [u8; 25],
    /// Data Units Read, in thousands of 512 bytes, rounded up.
    pub data_units_read: Le128,
    /// Data Units Written, in thousands of 512 bytes, rounded up.
    pub data_units_written: Le128,
    /// Host Read Commands.
    pub host_read_commands: Le128,
    /// Host Write Commands.
    pub host_write_commands: Le128,
    /// Controller Busy Time, in minutes.
    pub controller_busy_time: Le128,
    /// Power Cycles.
    pub power_cycles: Le128,
    /// Power On Hours.
    pub power_on_hours: Le128,
    /// Unsafe Shutdowns.
    pub unsafe_shutdowns: Le128,
    /// Media and Data Integrity Errors.
    pub media_errors: Le128,
    /// Number of Error Information Log Entries over the life of the controller.
    pub error_log_entries: Le128,
    /// Warning Composite Temperature Time, in minutes.
    pub warning_temperature_time: u32,
    /// Critical Composite Temperature Time, in minutes.
    pub critical_temperature_time: u32,
    /// Temperature Sensors 1 to 8, in kelvins; 0 for none.
    pub temperature_sensors: [u16; 8],
    /// Thermal Management Temperature 1 Transition Count.
    pub tmt1_transitions: u32,
    /// Thermal Management Temperature 2 Transition Count.
    pub tmt2_transitions: u32,
    /// Total Time For Thermal Management Temperature 1, in seconds.
    pub tmt1_time: u32,
    /// Total Time For Thermal Management Temperature 2, in seconds.
    pub tmt2_time: u32,
    /// Reserved.
    pub rsvd232: [u8; 280],
}
zero_default!(SmartLog);
layout!(SmartLog, 512, composite_temperature @ 1, available_spare @ 3,
    available_spare_threshold @ 4, percentage_used @ 5, endurance_group_warning @ 6,
    data_units_read @ 32, data_units_written @ 48, host_read_commands @ 64,
    host_write_commands @ 80, controller_busy_time @ 96, power_cycles @ 112,
    power_on_hours @ 128, unsafe_shutdowns @ 144, media_errors @ 160, error_log_entries @ 176,
    warning_temperature_time @ 192, critical_temperature_time @ 196, temperature_sensors @ 200,
    tmt1_transitions @ 216, tmt2_transitions @ 220, tmt1_time @ 224, tmt2_time @ 228);

impl SmartLog {
    /// Data units for a number of bytes: thousands of 512 bytes, rounded up.
    pub const fn data_units(bytes: u128) -> Le128 {
        Le128::new(bytes.div_ceil(512_000))
    }

    /// The composite temperature, in kelvins.
    pub const fn temperature(&self) -> u16 {
        u16::from_le_bytes(self.composite_temperature)
    }

    /// Sets the composite temperature, in kelvins.
    pub const fn set_temperature(&mut self, kelvins: u16) {
        self.composite_temperature = kelvins.to_le_bytes();
    }
}

/// Active Firmware Info of [`FirmwareSlotLog`].
#[bitfield(u8)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Afi {
    /// The slot the running firmware was loaded from, 1 to 7.
    #[bits(3)]
    pub active: u8,
    #[bits(1)]
    __: u8,
    /// The slot that will be loaded at the next reset; 0 for not told.
    #[bits(3)]
    pub next: u8,
    #[bits(1)]
    __: u8,
}

/// Firmware Slot Information log, 512 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct FirmwareSlotLog {
    /// Active Firmware Info.
    pub afi: Afi,
    /// Reserved.
    pub rsvd1: [u8; 7],
    /// Firmware Revision for Slots 1 to 7, ASCII; zeroes for an empty slot.
    pub frs: [[u8; 8]; 7],
    /// Reserved.
    pub rsvd64: [u8; 448],
}
zero_default!(FirmwareSlotLog);
layout!(FirmwareSlotLog, 512, frs @ 8, rsvd64 @ 64);

/// Changed Attached Namespace List, 4096 bytes: NSIDs in increasing order, the rest 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ChangedNamespaceList(pub [u32; 1024]);
zero_default!(ChangedNamespaceList);
layout!(ChangedNamespaceList, 4096);

impl ChangedNamespaceList {
    /// A list of these NSIDs, in increasing order; more than 1024 become the one entry FFFFFFFFh the
    /// specification prescribes.
    pub fn from_ids(nsids: impl IntoIterator<Item = u32>) -> Self {
        let mut list = Self::default();
        let mut nsids = nsids.into_iter();
        for (entry, nsid) in list.0.iter_mut().zip(&mut nsids) {
            *entry = nsid;
        }
        if nsids.next().is_some() {
            list = Self::default();
            if let Some(first) = list.0.first_mut() {
                *first = crate::command::NSID_BROADCAST;
            }
        }
        list
    }
}

/// Commands Supported and Effects data structure of one command.
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Effect {
    /// Command Supported.
    pub csupp: bool,
    /// Logical Block Content Change.
    pub lbcc: bool,
    /// Namespace Capability Change.
    pub ncc: bool,
    /// Namespace Inventory Change.
    pub nic: bool,
    /// Controller Capability Change.
    pub ccc: bool,
    #[bits(9)]
    __: u16,
    /// Command Submission and Execution Relaxations.
    #[bits(2)]
    pub cser: u8,
    /// Command Submission and Execution: 0 unrestricted, 1 alone in its namespace, 2 alone in the
    /// controller.
    #[bits(3)]
    pub cse: u8,
    /// UUID Selection Supported.
    pub uss: bool,
    /// Command Scope.
    #[bits(12)]
    pub csp: u16,
}

/// Commands Supported and Effects log, 4096 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CommandsSupportedAndEffects {
    /// Admin commands, by opcode.
    pub admin: [Effect; 256],
    /// I/O commands of the selected command set, by opcode.
    pub io: [Effect; 256],
    /// Reserved.
    pub rsvd2048: [u8; 2048],
}
zero_default!(CommandsSupportedAndEffects);
layout!(CommandsSupportedAndEffects, 4096, io @ 1024, rsvd2048 @ 2048);

impl CommandsSupportedAndEffects {
    /// Sets the effects of an admin command.
    pub fn set_admin(&mut self, opcode: crate::opcode::AdminOpcode, effect: Effect) {
        if let Some(slot) = self.admin.get_mut(usize::from(opcode.0)) {
            *slot = effect;
        }
    }

    /// Sets the effects of an I/O command.
    pub fn set_io(&mut self, opcode: crate::opcode::NvmOpcode, effect: Effect) {
        if let Some(slot) = self.io.get_mut(usize::from(opcode.0)) {
            *slot = effect;
        }
    }
}

/// LID Supported and Effects data structure of one log page.
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct LogEffect {
    /// LID Supported.
    pub lsupp: bool,
    /// Index Offset Supported.
    pub ios: bool,
    #[bits(14)]
    __: u16,
    /// LID Specific Parameter.
    pub lidsp: u16,
}

/// Supported Log Pages log, 1024 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SupportedLogPages(pub [LogEffect; 256]);
zero_default!(SupportedLogPages);
layout!(SupportedLogPages, 1024);

impl SupportedLogPages {
    /// A log that says these pages are supported.
    pub fn from_ids(lids: impl IntoIterator<Item = LogId>) -> Self {
        let mut log = Self::default();
        for lid in lids {
            if let Some(slot) = log.0.get_mut(usize::from(lid.0)) {
                slot.set_lsupp(true);
            }
        }
        log
    }
}
