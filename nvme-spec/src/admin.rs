//! Admin commands as views of an [`Sqe`]: `from_sqe` for a controller, `to_sqe` for a driver.
//!
//! NVMe Base 2.x, section "Admin Command Set". A view takes the fields apart and judges nothing: every
//! `from_sqe` is total, reserved bits are dropped, and whether a value makes sense is the
//! controller's to say. `to_sqe` leaves the command identifier 0 for the queue to fill in; lengths and
//! identifiers wider than their field are cut to it.

use crate::command::Sqe;
use crate::feature::FeatureId;
use crate::feature::Select;
use crate::identify::Cns;
use crate::identify::Csi;
use crate::log::LogId;
use crate::opcode::AdminOpcode;

const fn low(dword: u32) -> u16 {
    dword as u16
}

const fn high(dword: u32) -> u16 {
    (dword >> 16) as u16
}

const fn join(low: u16, high: u16) -> u32 {
    low as u32 | (high as u32) << 16
}

const fn sqe(opcode: AdminOpcode) -> Sqe {
    Sqe {
        opcode: opcode.0,
        flags: 0,
        cid: 0,
        nsid: 0,
        cdw2: 0,
        cdw3: 0,
        mptr: 0,
        prp1: 0,
        prp2: 0,
        cdw10: 0,
        cdw11: 0,
        cdw12: 0,
        cdw13: 0,
        cdw14: 0,
        cdw15: 0,
    }
}

/// Create I/O Completion Queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CreateIoCq {
    /// Base address of the queue, or of a PRP list of it when `pc` is false.
    pub prp1: u64,
    /// Queue Identifier.
    pub qid: u16,
    /// Queue Size, zero-based.
    pub qsize_z: u16,
    /// Physically Contiguous.
    pub pc: bool,
    /// Interrupts Enabled.
    pub ien: bool,
    /// Interrupt Vector.
    pub iv: u16,
}

impl CreateIoCq {
    /// The fields of a command.
    pub const fn from_sqe(sqe: &Sqe) -> Self {
        Self {
            prp1: sqe.prp1,
            qid: low(sqe.cdw10),
            qsize_z: high(sqe.cdw10),
            pc: sqe.cdw11 & 1 != 0,
            ien: sqe.cdw11 & 2 != 0,
            iv: high(sqe.cdw11),
        }
    }

    /// The command.
    pub const fn to_sqe(&self) -> Sqe {
        let mut sqe = sqe(AdminOpcode::CREATE_IO_CQ);
        sqe.prp1 = self.prp1;
        sqe.cdw10 = join(self.qid, self.qsize_z);
        sqe.cdw11 = join(self.pc as u16 | (self.ien as u16) << 1, self.iv);
        sqe
    }
}

open_enum! {
    /// Queue Priority of a submission queue, for weighted round robin.
    QueuePriority: u8 {
        /// Urgent.
        URGENT = 0,
        /// High.
        HIGH = 1,
        /// Medium.
        MEDIUM = 2,
        /// Low.
        LOW = 3,
    }
}

/// Create I/O Submission Queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CreateIoSq {
    /// Base address of the queue, or of a PRP list of it when `pc` is false.
    pub prp1: u64,
    /// Queue Identifier.
    pub qid: u16,
    /// Queue Size, zero-based.
    pub qsize_z: u16,
    /// Physically Contiguous.
    pub pc: bool,
    /// Queue Priority.
    pub qprio: QueuePriority,
    /// Completion Queue Identifier.
    pub cqid: u16,
    /// NVM Set Identifier.
    pub nvmsetid: u16,
}

impl CreateIoSq {
    /// The fields of a command.
    pub const fn from_sqe(sqe: &Sqe) -> Self {
        Self {
            prp1: sqe.prp1,
            qid: low(sqe.cdw10),
            qsize_z: high(sqe.cdw10),
            pc: sqe.cdw11 & 1 != 0,
            qprio: QueuePriority((sqe.cdw11 >> 1) as u8 & 3),
            cqid: high(sqe.cdw11),
            nvmsetid: low(sqe.cdw12),
        }
    }

    /// The command.
    pub const fn to_sqe(&self) -> Sqe {
        let mut sqe = sqe(AdminOpcode::CREATE_IO_SQ);
        sqe.prp1 = self.prp1;
        sqe.cdw10 = join(self.qid, self.qsize_z);
        sqe.cdw11 = join(self.pc as u16 | ((self.qprio.0 & 3) as u16) << 1, self.cqid);
        sqe.cdw12 = self.nvmsetid as u32;
        sqe
    }
}

/// Delete I/O Submission Queue, Delete I/O Completion Queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeleteQueue {
    /// Queue Identifier.
    pub qid: u16,
}

impl DeleteQueue {
    /// The fields of either command.
    pub const fn from_sqe(sqe: &Sqe) -> Self {
        Self {
            qid: low(sqe.cdw10),
        }
    }

    /// The command for a submission queue.
    pub const fn to_sq_sqe(&self) -> Sqe {
        let mut sqe = sqe(AdminOpcode::DELETE_IO_SQ);
        sqe.cdw10 = self.qid as u32;
        sqe
    }

    /// The command for a completion queue.
    pub const fn to_cq_sqe(&self) -> Sqe {
        let mut sqe = sqe(AdminOpcode::DELETE_IO_CQ);
        sqe.cdw10 = self.qid as u32;
        sqe
    }
}

/// Identify.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identify {
    /// Controller or Namespace Structure.
    pub cns: Cns,
    /// Controller Identifier.
    pub cntid: u16,
    /// Namespace Identifier.
    pub nsid: u32,
    /// CNS Specific Identifier.
    pub cnssid: u16,
    /// Command Set Identifier.
    pub csi: Csi,
    /// UUID Index, bits 6:0.
    pub uuid_index: u8,
}

impl Identify {
    /// The fields of a command.
    pub const fn from_sqe(sqe: &Sqe) -> Self {
        Self {
            cns: Cns(sqe.cdw10 as u8),
            cntid: high(sqe.cdw10),
            nsid: sqe.nsid,
            cnssid: low(sqe.cdw11),
            csi: Csi((sqe.cdw11 >> 24) as u8),
            uuid_index: sqe.cdw14 as u8 & 0x7F,
        }
    }

    /// The command, with its data at these PRPs.
    pub const fn to_sqe(&self, prp1: u64, prp2: u64) -> Sqe {
        let mut sqe = sqe(AdminOpcode::IDENTIFY).with_prps(prp1, prp2);
        sqe.nsid = self.nsid;
        sqe.cdw10 = join(self.cns.0 as u16, self.cntid);
        sqe.cdw11 = self.cnssid as u32 | (self.csi.0 as u32) << 24;
        sqe.cdw14 = self.uuid_index as u32 & 0x7F;
        sqe
    }
}

/// Get Log Page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GetLogPage {
    /// Log Page Identifier.
    pub lid: LogId,
    /// Log Specific Parameter, 7 bits.
    pub lsp: u8,
    /// Retain Asynchronous Event: reading does not clear the event.
    pub rae: bool,
    /// Number of Dwords, zero-based. Its length in bytes needs more than 32 bits:
    /// [`Self::byte_len`].
    pub numd_z: u32,
    /// Log Specific Identifier.
    pub lsi: u16,
    /// Log Page Offset: bytes, or an index when `ot` is set.
    pub offset: u64,
    /// Namespace Identifier.
    pub nsid: u32,
    /// Command Set Identifier.
    pub csi: Csi,
    /// Offset Type: `offset` is an index.
    pub ot: bool,
    /// UUID Index, bits 6:0.
    pub uuid_index: u8,
}

impl GetLogPage {
    /// The fields of a command.
    pub const fn from_sqe(sqe: &Sqe) -> Self {
        Self {
            lid: LogId(sqe.cdw10 as u8),
            lsp: (sqe.cdw10 >> 8) as u8 & 0x7F,
            rae: sqe.cdw10 & 1 << 15 != 0,
            numd_z: join(high(sqe.cdw10), low(sqe.cdw11)),
            lsi: high(sqe.cdw11),
            offset: sqe.cdw12 as u64 | (sqe.cdw13 as u64) << 32,
            nsid: sqe.nsid,
            csi: Csi((sqe.cdw14 >> 24) as u8),
            ot: sqe.cdw14 & 1 << 23 != 0,
            uuid_index: sqe.cdw14 as u8 & 0x7F,
        }
    }

    /// The command, with its data at these PRPs.
    pub const fn to_sqe(&self, prp1: u64, prp2: u64) -> Sqe {
        let mut sqe = sqe(AdminOpcode::GET_LOG_PAGE).with_prps(prp1, prp2);
        sqe.nsid = self.nsid;
        sqe.cdw10 = join(
            self.lid.0 as u16 | ((self.lsp & 0x7F) as u16) << 8 | (self.rae as u16) << 15,
            low(self.numd_z),
        );
        sqe.cdw11 = join(high(self.numd_z), self.lsi);
        sqe.cdw12 = self.offset as u32;
        sqe.cdw13 = (self.offset >> 32) as u32;
        sqe.cdw14 =
            (self.csi.0 as u32) << 24 | (self.ot as u32) << 23 | self.uuid_index as u32 & 0x7F;
        sqe
    }

    /// Bytes asked for: 4 to 2^34.
    pub const fn byte_len(&self) -> u64 {
        (self.numd_z as u64).saturating_add(1) << 2
    }
}

/// Get Features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GetFeatures {
    /// Feature Identifier.
    pub fid: FeatureId,
    /// Select.
    pub sel: Select,
    /// Namespace Identifier.
    pub nsid: u32,
    /// Feature specific.
    pub cdw11: u32,
    /// UUID Index, bits 6:0.
    pub uuid_index: u8,
}

impl GetFeatures {
    /// The fields of a command.
    pub const fn from_sqe(sqe: &Sqe) -> Self {
        Self {
            fid: FeatureId(sqe.cdw10 as u8),
            sel: Select((sqe.cdw10 >> 8) as u8 & 7),
            nsid: sqe.nsid,
            cdw11: sqe.cdw11,
            uuid_index: sqe.cdw14 as u8 & 0x7F,
        }
    }

    /// The command, with its data (if the feature has any) at these PRPs.
    pub const fn to_sqe(&self, prp1: u64, prp2: u64) -> Sqe {
        let mut sqe = sqe(AdminOpcode::GET_FEATURES).with_prps(prp1, prp2);
        sqe.nsid = self.nsid;
        sqe.cdw10 = self.fid.0 as u32 | ((self.sel.0 & 7) as u32) << 8;
        sqe.cdw11 = self.cdw11;
        sqe.cdw14 = self.uuid_index as u32 & 0x7F;
        sqe
    }
}

/// Set Features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetFeatures {
    /// Feature Identifier.
    pub fid: FeatureId,
    /// Save.
    pub sv: bool,
    /// Namespace Identifier.
    pub nsid: u32,
    /// Feature specific.
    pub cdw11: u32,
    /// Feature specific.
    pub cdw12: u32,
    /// Feature specific.
    pub cdw13: u32,
    /// UUID Index, bits 6:0; the other bits are feature specific.
    pub cdw14: u32,
    /// Feature specific.
    pub cdw15: u32,
}

impl SetFeatures {
    /// The fields of a command.
    pub const fn from_sqe(sqe: &Sqe) -> Self {
        Self {
            fid: FeatureId(sqe.cdw10 as u8),
            sv: sqe.cdw10 & 1 << 31 != 0,
            nsid: sqe.nsid,
            cdw11: sqe.cdw11,
            cdw12: sqe.cdw12,
            cdw13: sqe.cdw13,
            cdw14: sqe.cdw14,
            cdw15: sqe.cdw15,
        }
    }

    /// The command, with its data (if the feature has any) at these PRPs.
    pub const fn to_sqe(&self, prp1: u64, prp2: u64) -> Sqe {
        let mut sqe = sqe(AdminOpcode::SET_FEATURES).with_prps(prp1, prp2);
        sqe.nsid = self.nsid;
        sqe.cdw10 = self.fid.0 as u32 | (self.sv as u32) << 31;
        sqe.cdw11 = self.cdw11;
        sqe.cdw12 = self.cdw12;
        sqe.cdw13 = self.cdw13;
        sqe.cdw14 = self.cdw14;
        sqe.cdw15 = self.cdw15;
        sqe
    }
}

/// Abort.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Abort {
    /// Submission Queue Identifier of the command to abort.
    pub sqid: u16,
    /// Command Identifier of the command to abort.
    pub cid: u16,
}

impl Abort {
    /// Completion dword 0 when the command was aborted.
    pub const ABORTED: u32 = 0;
    /// Completion dword 0 when the command was not aborted.
    pub const NOT_ABORTED: u32 = 1;

    /// The fields of a command.
    pub const fn from_sqe(sqe: &Sqe) -> Self {
        Self {
            sqid: low(sqe.cdw10),
            cid: high(sqe.cdw10),
        }
    }

    /// The command.
    pub const fn to_sqe(&self) -> Sqe {
        let mut sqe = sqe(AdminOpcode::ABORT);
        sqe.cdw10 = join(self.sqid, self.cid);
        sqe
    }
}

/// Asynchronous Event Request: a command without fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AsyncEventRequest;

impl AsyncEventRequest {
    /// The command.
    pub const fn to_sqe(&self) -> Sqe {
        sqe(AdminOpcode::ASYNC_EVENT_REQUEST)
    }
}

/// Doorbell Buffer Config.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DoorbellBufferConfig {
    /// PRP1: the shadow doorbell buffer, page aligned.
    pub shadow: u64,
    /// PRP2: the EventIdx buffer, page aligned.
    pub event_idx: u64,
}

impl DoorbellBufferConfig {
    /// The fields of a command.
    pub const fn from_sqe(sqe: &Sqe) -> Self {
        Self {
            shadow: sqe.prp1,
            event_idx: sqe.prp2,
        }
    }

    /// The command.
    pub const fn to_sqe(&self) -> Sqe {
        sqe(AdminOpcode::DOORBELL_BUFFER_CONFIG).with_prps(self.shadow, self.event_idx)
    }
}
