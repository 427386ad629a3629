//! Feature identifiers, the Select field, and the values of features (dword 11 of Set Features,
//! completion dword 0 of Get Features).
//!
//! NVMe Base 2.x, section "Features"; NVM Command Set 1.x, section "Features".

use bitfield_struct::bitfield;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;

pub use crate::event::AsyncEventConfig;

open_enum! {
    /// Feature Identifier (Base, figure "Feature Identifiers").
    FeatureId: u8 {
        /// Arbitration: [`Arbitration`].
        ARBITRATION = 0x01,
        /// Power Management: [`PowerManagement`].
        POWER_MANAGEMENT = 0x02,
        /// LBA Range Type.
        LBA_RANGE = 0x03,
        /// Temperature Threshold: [`TemperatureThreshold`].
        TEMPERATURE_THRESHOLD = 0x04,
        /// Error Recovery: [`ErrorRecovery`].
        ERROR_RECOVERY = 0x05,
        /// Volatile Write Cache: [`VolatileWriteCache`].
        VOLATILE_WRITE_CACHE = 0x06,
        /// Number of Queues: [`NumberOfQueues`].
        NUMBER_OF_QUEUES = 0x07,
        /// Interrupt Coalescing: [`InterruptCoalescing`].
        INTERRUPT_COALESCING = 0x08,
        /// Interrupt Vector Configuration: [`InterruptVectorConfig`].
        INTERRUPT_VECTOR_CONFIG = 0x09,
        /// Write Atomicity Normal: [`WriteAtomicity`].
        WRITE_ATOMICITY = 0x0A,
        /// Asynchronous Event Configuration: [`AsyncEventConfig`].
        ASYNC_EVENT_CONFIG = 0x0B,
        /// Autonomous Power State Transition.
        AUTONOMOUS_PST = 0x0C,
        /// Host Memory Buffer.
        HMB = 0x0D,
        /// Timestamp: [`Timestamp`] as data.
        TIMESTAMP = 0x0E,
        /// Keep Alive Timer, in milliseconds.
        KEEP_ALIVE = 0x0F,
        /// Host Controlled Thermal Management.
        HCTM = 0x10,
        /// Non-Operational Power State Config.
        NON_OPERATIONAL_POWER_STATE = 0x11,
        /// Read Recovery Level Config.
        READ_RECOVERY_LEVEL = 0x12,
        /// Predictable Latency Mode Config.
        PREDICTABLE_LATENCY_CONFIG = 0x13,
        /// Predictable Latency Mode Window.
        PREDICTABLE_LATENCY_WINDOW = 0x14,
        /// LBA Status Information Report Interval.
        LBA_STATUS_INTERVAL = 0x15,
        /// Host Behavior Support: [`HostBehavior`] as data.
        HOST_BEHAVIOR = 0x16,
        /// Sanitize Config.
        SANITIZE_CONFIG = 0x17,
        /// Endurance Group Event Configuration.
        ENDURANCE_GROUP_EVENT_CONFIG = 0x18,
        /// I/O Command Set Profile: [`IoCommandSetProfile`].
        IO_COMMAND_SET_PROFILE = 0x19,
        /// Spinup Control.
        SPINUP_CONTROL = 0x1A,
        /// Power Loss Signaling Config.
        POWER_LOSS_SIGNALING = 0x1B,
        /// Performance Characteristics.
        PERFORMANCE_CHARACTERISTICS = 0x1C,
        /// Flexible Data Placement.
        FLEXIBLE_DATA_PLACEMENT = 0x1D,
        /// Flexible Data Placement Events.
        FLEXIBLE_DATA_PLACEMENT_EVENTS = 0x1E,
        /// Namespace Admin Label.
        NAMESPACE_ADMIN_LABEL = 0x1F,
        /// Controller Data Queue.
        CONTROLLER_DATA_QUEUE = 0x21,
        /// Enhanced Controller Metadata.
        ENHANCED_CONTROLLER_METADATA = 0x7D,
        /// Controller Metadata.
        CONTROLLER_METADATA = 0x7E,
        /// Namespace Metadata.
        NAMESPACE_METADATA = 0x7F,
        /// Software Progress Marker: [`SoftwareProgress`].
        SOFTWARE_PROGRESS = 0x80,
        /// Host Identifier.
        HOST_ID = 0x81,
        /// Reservation Notification Mask.
        RESERVATION_NOTIFICATION_MASK = 0x82,
        /// Reservation Persistence.
        RESERVATION_PERSISTENCE = 0x83,
        /// Namespace Write Protection Config: [`WriteProtect`].
        NAMESPACE_WRITE_PROTECTION = 0x84,
        /// Boot Partition Write Protection Config.
        BOOT_PARTITION_WRITE_PROTECTION = 0x85,
    }
}

open_enum! {
    /// Select field of Get Features: which of a feature's values.
    Select: u8 {
        /// The current value.
        CURRENT = 0,
        /// The default value.
        DEFAULT = 1,
        /// The saved value.
        SAVED = 2,
        /// What the feature can do: [`Capabilities`].
        SUPPORTED = 3,
    }
}

/// Answer to Get Features with Select = supported capabilities.
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Capabilities {
    /// The value can be saved.
    pub saveable: bool,
    /// The feature is specific to a namespace.
    pub namespace_specific: bool,
    /// The value can be changed.
    pub changeable: bool,
    #[bits(29)]
    __: u32,
}

/// Arbitration (01h).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Arbitration {
    /// Arbitration Burst, as a power of two; 7 for no limit.
    #[bits(3)]
    pub ab: u8,
    #[bits(5)]
    __: u8,
    /// Low Priority Weight, zero-based.
    pub lpw_z: u8,
    /// Medium Priority Weight, zero-based.
    pub mpw_z: u8,
    /// High Priority Weight, zero-based.
    pub hpw_z: u8,
}

/// Power Management (02h).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct PowerManagement {
    /// Power State.
    #[bits(5)]
    pub ps: u8,
    /// Workload Hint.
    #[bits(3)]
    pub wh: u8,
    #[bits(24)]
    __: u32,
}

/// Temperature Threshold (04h): the selector is in dword 11 of both Get and Set Features.
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct TemperatureThreshold {
    /// Temperature Threshold, in kelvins.
    pub tmpth: u16,
    /// Threshold Temperature Select: 0 composite, 1..=8 sensor, 15 all of them (Set only).
    #[bits(4)]
    pub tmpsel: u8,
    /// Threshold Type Select.
    #[bits(2)]
    pub thsel: ThresholdType,
    /// Temperature Threshold Hysteresis, in kelvins.
    #[bits(3)]
    pub tmpthh: u8,
    #[bits(7)]
    __: u8,
}

open_enum! {
    /// Threshold Type Select of [`TemperatureThreshold`].
    ThresholdType: u8 {
        /// Over temperature.
        OVER = 0,
        /// Under temperature.
        UNDER = 1,
    }
}

/// Error Recovery (05h; NVM Command Set).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ErrorRecovery {
    /// Time Limited Error Recovery, in units of 100 ms; 0 for no limit.
    pub tler: u16,
    /// Deallocated or Unwritten Logical Block Error Enable.
    pub dulbe: bool,
    #[bits(15)]
    __: u16,
}

/// Volatile Write Cache (06h).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VolatileWriteCache {
    /// Volatile Write Cache Enable.
    pub wce: bool,
    #[bits(31)]
    __: u32,
}

/// Number of Queues (07h): requested in dword 11, allocated in completion dword 0.
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct NumberOfQueues {
    /// Number of I/O Submission Queues, zero-based; FFFFh is not allowed in a request.
    pub nsq_z: u16,
    /// Number of I/O Completion Queues, zero-based; FFFFh is not allowed in a request.
    pub ncq_z: u16,
}

/// Interrupt Coalescing (08h).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct InterruptCoalescing {
    /// Aggregation Threshold, zero-based: completion queue entries per interrupt.
    pub thr_z: u8,
    /// Aggregation Time, in units of 100 µs; 0 for no delay.
    pub time: u8,
    __: u16,
}

/// Interrupt Vector Configuration (09h): the vector is in dword 11 of both Get and Set Features.
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct InterruptVectorConfig {
    /// Interrupt Vector.
    pub iv: u16,
    /// Coalescing Disable.
    pub cd: bool,
    #[bits(15)]
    __: u16,
}

/// Write Atomicity Normal (0Ah).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct WriteAtomicity {
    /// Disable Normal: only AWUPF need be honoured.
    pub dn: bool,
    #[bits(31)]
    __: u32,
}

/// I/O Command Set Profile (19h).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IoCommandSetProfile {
    /// I/O Command Set Combination Index, into [`crate::identify::CommandSetCombinations`].
    #[bits(9)]
    pub iocsci: u16,
    #[bits(23)]
    __: u32,
}

/// Software Progress Marker (80h).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SoftwareProgress {
    /// Pre-boot Software Load Count.
    pub pbslc: u8,
    #[bits(24)]
    __: u32,
}

/// Namespace Write Protection Config (84h).
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct WriteProtect {
    /// Write Protection State: 0 none, 1 protected, 2 until power cycle, 3 permanent.
    #[bits(3)]
    pub wps: u8,
    #[bits(29)]
    __: u32,
}

/// Data of the Timestamp feature (0Eh), 8 bytes.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Timestamp {
    /// Milliseconds since 1970-01-01 00:00 UTC, or since the last reset when never set: 48 bits,
    /// least significant byte first.
    pub millis: [u8; 6],
    /// Bit 0 Synch (the clock may have stopped), bits 3:1 Timestamp Origin. Only for Get Features.
    pub attributes: u8,
    /// Reserved.
    pub rsvd7: u8,
}
layout!(Timestamp, 8, attributes @ 6);

impl Timestamp {
    /// The clock started from 0 at a Controller Level Reset.
    pub const ORIGIN_RESET: u8 = 0;
    /// The clock was set by Set Features.
    pub const ORIGIN_SET: u8 = 1;

    /// A timestamp of so many milliseconds (modulo 2^48) with an origin.
    pub const fn new(millis: u64, origin: u8) -> Self {
        let [a, b, c, d, e, f, _, _] = millis.to_le_bytes();
        Self {
            millis: [a, b, c, d, e, f],
            attributes: (origin & 7) << 1,
            rsvd7: 0,
        }
    }

    /// The milliseconds.
    pub const fn get(&self) -> u64 {
        let [a, b, c, d, e, f] = self.millis;
        u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
    }

    /// The Timestamp Origin.
    pub const fn origin(&self) -> u8 {
        self.attributes >> 1 & 7
    }
}

/// Data of the Host Behavior Support feature (16h), 512 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct HostBehavior {
    /// Advanced Command Retry Enable: 1 for Command Retry Delay understood.
    pub acre: u8,
    /// Extended Telemetry Data Area 4 Supported.
    pub etdas: u8,
    /// LBA Format Extension Enable.
    pub lbafee: u8,
    /// Host Dispersed Namespace Support.
    pub hdisns: u8,
    /// Copy Descriptor Formats 2h to 4h Enable.
    pub cdfe: u16,
    /// Reserved.
    pub rsvd6: [u8; 506],
}
zero_default!(HostBehavior);
layout!(HostBehavior, 512, etdas @ 1, lbafee @ 2, hdisns @ 3, cdfe @ 4, rsvd6 @ 6);
