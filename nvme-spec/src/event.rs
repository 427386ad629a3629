//! Asynchronous events: what completes an Asynchronous Event Request, and which the host wants.
//!
//! NVMe Base 2.x, section "Asynchronous Event Request command" and figure "Asynchronous Event
//! Configuration" of the feature.

use crate::log::LogId;
use bitfield_struct::bitfield;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;

open_enum! {
    /// Asynchronous Event Type. Once one of a type is reported, no more of that type are until the
    /// host reads the log page without Retain Asynchronous Event.
    EventType: u8 {
        /// Error status.
        ERROR = 0,
        /// SMART / Health status.
        SMART_HEALTH = 1,
        /// Notice.
        NOTICE = 2,
        /// Immediate: reported at once and not masked by an earlier one.
        IMMEDIATE = 3,
        /// One Shot.
        ONE_SHOT = 4,
        /// I/O command specific status.
        IO_COMMAND_SPECIFIC = 6,
        /// Vendor specific.
        VENDOR = 7,
    }
}

/// An asynchronous event, as completion dword 0 carries it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AsyncEvent {
    /// Asynchronous Event Type.
    pub kind: EventType,
    /// Asynchronous Event Information; its meaning depends on the type.
    pub info: u8,
    /// The log page that has more, and that clears the event when it is read.
    pub log_page: LogId,
}

impl AsyncEvent {
    /// The host rang a doorbell of a queue that does not exist.
    pub const INVALID_DOORBELL_REGISTER: Self = Self::error(0x00);
    /// The host wrote a value to a doorbell that is no index of the queue, or that passes the other
    /// pointer.
    pub const INVALID_DOORBELL_VALUE: Self = Self::error(0x01);
    /// A diagnostic failure of the controller.
    pub const DIAGNOSTIC_FAILURE: Self = Self::error(0x02);
    /// Persistent internal error.
    pub const PERSISTENT_INTERNAL_ERROR: Self = Self::error(0x03);
    /// Transient internal error.
    pub const TRANSIENT_INTERNAL_ERROR: Self = Self::error(0x04);
    /// Firmware image load error.
    pub const FIRMWARE_IMAGE_LOAD_ERROR: Self = Self::error(0x05);
    /// NVM subsystem reliability has been compromised.
    pub const NVM_SUBSYSTEM_RELIABILITY: Self = Self::health(0x00);
    /// A temperature crossed its threshold.
    pub const TEMPERATURE_THRESHOLD: Self = Self::health(0x01);
    /// Available spare is below its threshold.
    pub const SPARE_BELOW_THRESHOLD: Self = Self::health(0x02);
    /// A namespace was attached, detached or changed: read the Changed Namespace List.
    pub const NAMESPACE_ATTRIBUTE_CHANGED: Self =
        Self::of(EventType::NOTICE, 0x00, LogId::CHANGED_NAMESPACES);
    /// Firmware activation is starting.
    pub const FIRMWARE_ACTIVATION_STARTING: Self =
        Self::of(EventType::NOTICE, 0x01, LogId::FIRMWARE_SLOT);
    /// Asymmetric namespace access changed.
    pub const ANA_CHANGE: Self = Self::of(EventType::NOTICE, 0x03, LogId::ANA);

    /// An event of any type.
    pub const fn of(kind: EventType, info: u8, log_page: LogId) -> Self {
        Self {
            kind,
            info,
            log_page,
        }
    }

    const fn error(info: u8) -> Self {
        Self::of(EventType::ERROR, info, LogId::ERROR)
    }

    const fn health(info: u8) -> Self {
        Self::of(EventType::SMART_HEALTH, info, LogId::SMART)
    }

    /// Completion dword 0.
    pub const fn to_dw0(self) -> u32 {
        (self.kind.0 & 7) as u32 | (self.info as u32) << 8 | (self.log_page.0 as u32) << 16
    }

    /// The event in completion dword 0; every value is one.
    pub const fn from_dw0(dw0: u32) -> Self {
        Self {
            kind: EventType(dw0 as u8 & 7),
            info: (dw0 >> 8) as u8,
            log_page: LogId((dw0 >> 16) as u8),
        }
    }
}

/// Asynchronous Event Configuration (feature 0Bh): which events the host wants.
#[bitfield(u32)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct AsyncEventConfig {
    /// SMART / Health critical warnings, at the bits of [`crate::log::CriticalWarning`].
    pub smart: u8,
    /// Attached Namespace Attribute Notices.
    pub namespace_attribute: bool,
    /// Firmware Activation Notices.
    pub firmware_activation: bool,
    /// Telemetry Log Notices.
    pub telemetry: bool,
    /// Asymmetric Namespace Access Change Notices.
    pub ana_change: bool,
    /// Predictable Latency Event Aggregate Log Change Notices.
    pub predictable_latency: bool,
    /// LBA Status Information Alert Notices.
    pub lba_status: bool,
    /// Endurance Group Event Aggregate Log Change Notices.
    pub endurance_group: bool,
    /// Normal NVM Subsystem Shutdown.
    pub subsystem_shutdown: bool,
    /// Temperature Threshold Hysteresis Recovery.
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
    /// Discovery Log Page Change Notification.
    pub discovery_log: bool,
}
