//! Command opcodes of the admin and the NVM command set.
//!
//! NVMe Base 2.x, figure "Opcodes for Admin Commands"; NVM Command Set 1.x, figure "Opcodes for NVM
//! Commands". Bits 1:0 of every opcode say which way data goes ([`Transfer`]).

/// Which way a command moves data, told by opcode bits 1:0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// No data.
    None,
    /// From the host's memory to the controller.
    HostToController,
    /// From the controller to the host's memory.
    ControllerToHost,
    /// Both ways.
    Bidirectional,
}

impl Transfer {
    const fn of(opcode: u8) -> Self {
        match opcode & 3 {
            0 => Self::None,
            1 => Self::HostToController,
            2 => Self::ControllerToHost,
            _ => Self::Bidirectional,
        }
    }
}

open_enum! {
    /// Opcode of a command in the admin submission queue.
    AdminOpcode: u8 {
        /// Delete I/O Submission Queue.
        DELETE_IO_SQ = 0x00,
        /// Create I/O Submission Queue.
        CREATE_IO_SQ = 0x01,
        /// Get Log Page.
        GET_LOG_PAGE = 0x02,
        /// Delete I/O Completion Queue.
        DELETE_IO_CQ = 0x04,
        /// Create I/O Completion Queue.
        CREATE_IO_CQ = 0x05,
        /// Identify.
        IDENTIFY = 0x06,
        /// Abort.
        ABORT = 0x08,
        /// Set Features.
        SET_FEATURES = 0x09,
        /// Get Features.
        GET_FEATURES = 0x0A,
        /// Asynchronous Event Request.
        ASYNC_EVENT_REQUEST = 0x0C,
        /// Namespace Management.
        NS_MANAGEMENT = 0x0D,
        /// Firmware Commit.
        FIRMWARE_COMMIT = 0x10,
        /// Firmware Image Download.
        FIRMWARE_IMAGE_DOWNLOAD = 0x11,
        /// Device Self-test.
        DEVICE_SELF_TEST = 0x14,
        /// Namespace Attachment.
        NS_ATTACHMENT = 0x15,
        /// Keep Alive.
        KEEP_ALIVE = 0x18,
        /// Directive Send.
        DIRECTIVE_SEND = 0x19,
        /// Directive Receive.
        DIRECTIVE_RECEIVE = 0x1A,
        /// Virtualization Management.
        VIRTUALIZATION_MANAGEMENT = 0x1C,
        /// NVMe-MI Send.
        NVME_MI_SEND = 0x1D,
        /// NVMe-MI Receive.
        NVME_MI_RECEIVE = 0x1E,
        /// Capacity Management.
        CAPACITY_MANAGEMENT = 0x20,
        /// Lockdown.
        LOCKDOWN = 0x24,
        /// Doorbell Buffer Config.
        DOORBELL_BUFFER_CONFIG = 0x7C,
        /// Fabrics Commands.
        FABRICS = 0x7F,
        /// Format NVM.
        FORMAT_NVM = 0x80,
        /// Security Send.
        SECURITY_SEND = 0x81,
        /// Security Receive.
        SECURITY_RECEIVE = 0x82,
        /// Sanitize.
        SANITIZE = 0x84,
        /// Get LBA Status (NVM Command Set).
        GET_LBA_STATUS = 0x86,
    }
}

open_enum! {
    /// Opcode of a command in an I/O submission queue (NVM Command Set).
    NvmOpcode: u8 {
        /// Flush.
        FLUSH = 0x00,
        /// Write.
        WRITE = 0x01,
        /// Read.
        READ = 0x02,
        /// Write Uncorrectable.
        WRITE_UNCORRECTABLE = 0x04,
        /// Compare.
        COMPARE = 0x05,
        /// Write Zeroes.
        WRITE_ZEROES = 0x08,
        /// Dataset Management.
        DATASET_MANAGEMENT = 0x09,
        /// Verify.
        VERIFY = 0x0C,
        /// Reservation Register.
        RESERVATION_REGISTER = 0x0D,
        /// Reservation Report.
        RESERVATION_REPORT = 0x0E,
        /// Reservation Acquire.
        RESERVATION_ACQUIRE = 0x11,
        /// I/O Management Receive.
        IO_MANAGEMENT_RECEIVE = 0x12,
        /// Reservation Release.
        RESERVATION_RELEASE = 0x15,
        /// Cancel.
        CANCEL = 0x18,
        /// Copy.
        COPY = 0x19,
        /// I/O Management Send.
        IO_MANAGEMENT_SEND = 0x1D,
    }
}

impl AdminOpcode {
    /// Which way this command moves data.
    pub const fn transfer(self) -> Transfer {
        Transfer::of(self.0)
    }
}

impl NvmOpcode {
    /// Which way this command moves data.
    pub const fn transfer(self) -> Transfer {
        Transfer::of(self.0)
    }
}
