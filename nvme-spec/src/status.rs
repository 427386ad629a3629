//! Completion status: the flat 11-bit [`Status`] and the [`StatusField`] a completion carries it in.
//!
//! NVMe Base 2.x, section "Status Field Definition"; NVM Command Set 1.x, section "Status Values".

use bitfield_struct::bitfield;
use core::fmt;
use zerocopy::FromBytes;
use zerocopy::Immutable;
use zerocopy::IntoBytes;
use zerocopy::KnownLayout;

/// A completion status: Status Code Type in bits 10:8, Status Code in bits 7:0.
///
/// One flat value instead of two fields, because no one ever looks at one of them alone. Bits 15:11
/// of the inner value carry nothing and are dropped when it goes into a [`StatusField`].
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
)]
#[repr(transparent)]
pub struct Status(pub u16);

macro_rules! statuses {
    ($($NAME:ident = $value:literal, $text:literal;)*) => {
        impl Status {
            $(
                #[doc = concat!($text, " (", stringify!($value), ").")]
                pub const $NAME: Self = Self($value);
            )*

            /// Every named status, in numerical order.
            pub const NAMED: &'static [Self] = &[$(Self::$NAME),*];

            /// The specification's name of this status; `None` for reserved and vendor values.
            pub const fn name(self) -> Option<&'static str> {
                match self {
                    $(Self::$NAME => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

statuses! {
    // Generic Command Status (Base, figure "Generic Command Status Values").
    SUCCESS = 0x000, "Successful Completion";
    INVALID_OPCODE = 0x001, "Invalid Command Opcode";
    INVALID_FIELD = 0x002, "Invalid Field in Command";
    COMMAND_ID_CONFLICT = 0x003, "Command ID Conflict";
    DATA_TRANSFER_ERROR = 0x004, "Data Transfer Error";
    POWER_LOSS_ABORT = 0x005, "Commands Aborted due to Power Loss Notification";
    INTERNAL_ERROR = 0x006, "Internal Error";
    ABORT_REQUESTED = 0x007, "Command Abort Requested";
    ABORTED_SQ_DELETION = 0x008, "Command Aborted due to SQ Deletion";
    ABORTED_FAILED_FUSED = 0x009, "Command Aborted due to Failed Fused Command";
    ABORTED_MISSING_FUSED = 0x00A, "Command Aborted due to Missing Fused Command";
    INVALID_NAMESPACE_OR_FORMAT = 0x00B, "Invalid Namespace or Format";
    COMMAND_SEQUENCE_ERROR = 0x00C, "Command Sequence Error";
    INVALID_SGL_SEGMENT_DESCRIPTOR = 0x00D, "Invalid SGL Segment Descriptor";
    INVALID_NUMBER_OF_SGL_DESCRIPTORS = 0x00E, "Invalid Number of SGL Descriptors";
    DATA_SGL_LENGTH_INVALID = 0x00F, "Data SGL Length Invalid";
    METADATA_SGL_LENGTH_INVALID = 0x010, "Metadata SGL Length Invalid";
    SGL_DESCRIPTOR_TYPE_INVALID = 0x011, "SGL Descriptor Type Invalid";
    INVALID_USE_OF_CMB = 0x012, "Invalid Use of Controller Memory Buffer";
    INVALID_PRP_OFFSET = 0x013, "PRP Offset Invalid";
    ATOMIC_WRITE_UNIT_EXCEEDED = 0x014, "Atomic Write Unit Exceeded";
    OPERATION_DENIED = 0x015, "Operation Denied";
    SGL_OFFSET_INVALID = 0x016, "SGL Offset Invalid";
    HOST_ID_INCONSISTENT_FORMAT = 0x018, "Host Identifier Inconsistent Format";
    KEEP_ALIVE_EXPIRED = 0x019, "Keep Alive Timer Expired";
    KEEP_ALIVE_TIMEOUT_INVALID = 0x01A, "Keep Alive Timeout Invalid";
    ABORTED_PREEMPT_AND_ABORT = 0x01B, "Command Aborted due to Preempt and Abort";
    SANITIZE_FAILED = 0x01C, "Sanitize Failed";
    SANITIZE_IN_PROGRESS = 0x01D, "Sanitize In Progress";
    SGL_DATA_BLOCK_GRANULARITY_INVALID = 0x01E, "SGL Data Block Granularity Invalid";
    COMMAND_NOT_SUPPORTED_FOR_CMB_QUEUE = 0x01F, "Command Not Supported for Queue in CMB";
    NAMESPACE_WRITE_PROTECTED = 0x020, "Namespace is Write Protected";
    COMMAND_INTERRUPTED = 0x021, "Command Interrupted";
    TRANSIENT_TRANSPORT_ERROR = 0x022, "Transient Transport Error";
    PROHIBITED_BY_LOCKDOWN = 0x023, "Command Prohibited by Command and Feature Lockdown";
    ADMIN_COMMAND_MEDIA_NOT_READY = 0x024, "Admin Command Media Not Ready";
    INVALID_KEY_TAG = 0x025, "Invalid Key Tag";
    HOST_DISPERSED_NS_NOT_ENABLED = 0x026, "Host Dispersed Namespace Support Not Enabled";
    HOST_ID_NOT_INITIALIZED = 0x027, "Host Identifier Not Initialized";
    INCORRECT_KEY = 0x028, "Incorrect Key";
    FDP_DISABLED = 0x029, "FDP Disabled";
    INVALID_PLACEMENT_HANDLE_LIST = 0x02A, "Invalid Placement Handle List";
    LBA_OUT_OF_RANGE = 0x080, "LBA Out of Range";
    CAPACITY_EXCEEDED = 0x081, "Capacity Exceeded";
    NAMESPACE_NOT_READY = 0x082, "Namespace Not Ready";
    RESERVATION_CONFLICT = 0x083, "Reservation Conflict";
    FORMAT_IN_PROGRESS = 0x084, "Format In Progress";
    // Command Specific Status (Base and NVM Command Set).
    COMPLETION_QUEUE_INVALID = 0x100, "Completion Queue Invalid";
    INVALID_QUEUE_ID = 0x101, "Invalid Queue Identifier";
    INVALID_QUEUE_SIZE = 0x102, "Invalid Queue Size";
    ABORT_LIMIT_EXCEEDED = 0x103, "Abort Command Limit Exceeded";
    AER_LIMIT_EXCEEDED = 0x105, "Asynchronous Event Request Limit Exceeded";
    INVALID_FIRMWARE_SLOT = 0x106, "Invalid Firmware Slot";
    INVALID_FIRMWARE_IMAGE = 0x107, "Invalid Firmware Image";
    INVALID_INTERRUPT_VECTOR = 0x108, "Invalid Interrupt Vector";
    INVALID_LOG_PAGE = 0x109, "Invalid Log Page";
    INVALID_FORMAT = 0x10A, "Invalid Format";
    FIRMWARE_NEEDS_CONVENTIONAL_RESET = 0x10B, "Firmware Activation Requires Conventional Reset";
    INVALID_QUEUE_DELETION = 0x10C, "Invalid Queue Deletion";
    FEATURE_NOT_SAVEABLE = 0x10D, "Feature Identifier Not Saveable";
    FEATURE_NOT_CHANGEABLE = 0x10E, "Feature Not Changeable";
    FEATURE_NOT_NAMESPACE_SPECIFIC = 0x10F, "Feature Not Namespace Specific";
    FIRMWARE_NEEDS_SUBSYSTEM_RESET = 0x110, "Firmware Activation Requires NVM Subsystem Reset";
    FIRMWARE_NEEDS_CONTROLLER_RESET = 0x111, "Firmware Activation Requires Controller Level Reset";
    FIRMWARE_MAX_TIME_VIOLATION = 0x112, "Firmware Activation Requires Maximum Time Violation";
    FIRMWARE_ACTIVATION_PROHIBITED = 0x113, "Firmware Activation Prohibited";
    OVERLAPPING_RANGE = 0x114, "Overlapping Range";
    NS_INSUFFICIENT_CAPACITY = 0x115, "Namespace Insufficient Capacity";
    NS_ID_UNAVAILABLE = 0x116, "Namespace Identifier Unavailable";
    NS_ALREADY_ATTACHED = 0x118, "Namespace Already Attached";
    NS_IS_PRIVATE = 0x119, "Namespace Is Private";
    NS_NOT_ATTACHED = 0x11A, "Namespace Not Attached";
    THIN_PROVISIONING_NOT_SUPPORTED = 0x11B, "Thin Provisioning Not Supported";
    CONTROLLER_LIST_INVALID = 0x11C, "Controller List Invalid";
    SELF_TEST_IN_PROGRESS = 0x11D, "Device Self-test In Progress";
    BOOT_PARTITION_WRITE_PROHIBITED = 0x11E, "Boot Partition Write Prohibited";
    INVALID_CONTROLLER_ID = 0x11F, "Invalid Controller Identifier";
    INVALID_SECONDARY_CONTROLLER_STATE = 0x120, "Invalid Secondary Controller State";
    INVALID_NUMBER_OF_RESOURCES = 0x121, "Invalid Number of Controller Resources";
    INVALID_RESOURCE_ID = 0x122, "Invalid Resource Identifier";
    SANITIZE_PROHIBITED_PMR = 0x123, "Sanitize Prohibited While Persistent Memory Region is Enabled";
    ANA_GROUP_ID_INVALID = 0x124, "ANA Group Identifier Invalid";
    ANA_ATTACH_FAILED = 0x125, "ANA Attach Failed";
    INSUFFICIENT_CAPACITY = 0x126, "Insufficient Capacity";
    NS_ATTACHMENT_LIMIT_EXCEEDED = 0x127, "Namespace Attachment Limit Exceeded";
    PROHIBITION_NOT_SUPPORTED = 0x128, "Prohibition of Command Execution Not Supported";
    IO_COMMAND_SET_NOT_SUPPORTED = 0x129, "I/O Command Set Not Supported";
    IO_COMMAND_SET_NOT_ENABLED = 0x12A, "I/O Command Set Not Enabled";
    IO_COMMAND_SET_COMBINATION_REJECTED = 0x12B, "I/O Command Set Combination Rejected";
    INVALID_IO_COMMAND_SET = 0x12C, "Invalid I/O Command Set";
    IDENTIFIER_UNAVAILABLE = 0x12D, "Identifier Unavailable";
    CONFLICTING_ATTRIBUTES = 0x180, "Conflicting Attributes";
    INVALID_PROTECTION_INFORMATION = 0x181, "Invalid Protection Information";
    ATTEMPTED_WRITE_TO_READ_ONLY = 0x182, "Attempted Write to Read Only Range";
    COMMAND_SIZE_LIMIT_EXCEEDED = 0x183, "Command Size Limit Exceeded";
    INCOMPATIBLE_NAMESPACE_OR_FORMAT = 0x185, "Incompatible Namespace or Format";
    FAST_COPY_NOT_POSSIBLE = 0x186, "Fast Copy Not Possible";
    OVERLAPPING_IO_RANGE = 0x187, "Overlapping I/O Range";
    INSUFFICIENT_RESOURCES = 0x189, "Insufficient Resources";
    // Media and Data Integrity Errors.
    WRITE_FAULT = 0x280, "Write Fault";
    UNRECOVERED_READ_ERROR = 0x281, "Unrecovered Read Error";
    GUARD_CHECK_ERROR = 0x282, "End-to-end Guard Check Error";
    APPLICATION_TAG_CHECK_ERROR = 0x283, "End-to-end Application Tag Check Error";
    REFERENCE_TAG_CHECK_ERROR = 0x284, "End-to-end Reference Tag Check Error";
    COMPARE_FAILURE = 0x285, "Compare Failure";
    ACCESS_DENIED = 0x286, "Access Denied";
    DEALLOCATED_OR_UNWRITTEN = 0x287, "Deallocated or Unwritten Logical Block";
    STORAGE_TAG_CHECK_ERROR = 0x288, "End-to-end Storage Tag Check Error";
    // Path Related Status.
    INTERNAL_PATH_ERROR = 0x300, "Internal Path Error";
    ANA_PERSISTENT_LOSS = 0x301, "Asymmetric Access Persistent Loss";
    ANA_INACCESSIBLE = 0x302, "Asymmetric Access Inaccessible";
    ANA_TRANSITION = 0x303, "Asymmetric Access Transition";
    CONTROLLER_PATHING_ERROR = 0x360, "Controller Pathing Error";
    HOST_PATHING_ERROR = 0x370, "Host Pathing Error";
    ABORTED_BY_HOST = 0x371, "Command Aborted By Host";
}

impl Status {
    /// A status from Status Code Type (low three bits are used) and Status Code.
    pub const fn new(sct: u8, sc: u8) -> Self {
        Self(((sct & 7) as u16) << 8 | sc as u16)
    }

    /// Status Code Type: 0 generic, 1 command specific, 2 media, 3 path, 7 vendor.
    pub const fn sct(self) -> u8 {
        (self.0 >> 8) as u8 & 7
    }

    /// Status Code within its type.
    pub const fn sc(self) -> u8 {
        self.0 as u8
    }

    /// Whether this is [`Status::SUCCESS`].
    pub const fn is_success(self) -> bool {
        self.0 & 0x7FF == 0
    }

    /// Whether the Do Not Retry bit belongs to this status when nothing more is known: the same
    /// command, sent again, must fail again.
    ///
    /// True for everything the host got wrong. False for success, for conditions that pass (an
    /// abort, a deleted queue, a transfer that failed, a namespace not ready), for media and path
    /// errors, where the host knows better than we whether another try is worth it, and for
    /// statuses unknown here.
    pub const fn default_dnr(self) -> bool {
        match self {
            Self::SUCCESS
            | Self::DATA_TRANSFER_ERROR
            | Self::POWER_LOSS_ABORT
            | Self::INTERNAL_ERROR
            | Self::ABORT_REQUESTED
            | Self::ABORTED_SQ_DELETION
            | Self::ABORTED_FAILED_FUSED
            | Self::ABORTED_MISSING_FUSED
            | Self::ABORTED_PREEMPT_AND_ABORT
            | Self::SANITIZE_IN_PROGRESS
            | Self::COMMAND_INTERRUPTED
            | Self::TRANSIENT_TRANSPORT_ERROR
            | Self::ADMIN_COMMAND_MEDIA_NOT_READY
            | Self::NAMESPACE_NOT_READY
            | Self::FORMAT_IN_PROGRESS
            | Self::ABORT_LIMIT_EXCEEDED
            | Self::SELF_TEST_IN_PROGRESS
            | Self::INSUFFICIENT_RESOURCES
            | Self::WRITE_FAULT
            | Self::UNRECOVERED_READ_ERROR => false,
            _ => self.name().is_some() && self.sct() != 3,
        }
    }
}

impl From<Status> for StatusField {
    /// The field of a status of which nothing more is known: with [`Status::default_dnr`].
    fn from(status: Status) -> Self {
        Self::from_status(status).with_dnr(status.default_dnr())
    }
}

impl fmt::Display for Status {
    /// `LBA Out of Range (0x080)`, or `status 0x7c0` where there is no name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => write!(f, "{name} ({:#05x})", self.0),
            None => write!(f, "status {:#05x}", self.0),
        }
    }
}

/// Bits 31:16 of completion dword 3: phase tag and status (Base, figure "Completion Queue Entry:
/// Status Field").
#[bitfield(u16)]
#[derive(PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct StatusField {
    /// Phase Tag: toggles on each pass of the controller through the completion queue.
    pub p: bool,
    /// Status Code.
    pub sc: u8,
    /// Status Code Type.
    #[bits(3)]
    pub sct: u8,
    /// Command Retry Delay: 0 for none, else which of CRDT1..3 of Identify Controller applies.
    #[bits(2)]
    pub crd: u8,
    /// More: the Error Information log has more about this command.
    pub m: bool,
    /// Do Not Retry: the same command would fail again.
    pub dnr: bool,
}
layout!(StatusField, 2);

impl StatusField {
    /// A field with this status and nothing else: phase 0, no retry delay, More and Do Not Retry
    /// clear. Chain [`Self::with_p`], [`Self::with_m`], [`Self::with_dnr`] onto it.
    pub const fn from_status(status: Status) -> Self {
        Self::new().with_sc(status.sc()).with_sct(status.sct())
    }

    /// Whether the command ended well.
    pub const fn is_success(&self) -> bool {
        self.status().is_success()
    }

    /// The 11-bit status, without phase, retry delay, More and Do Not Retry.
    pub const fn status(&self) -> Status {
        Status::new(self.sct(), self.sc())
    }
}
