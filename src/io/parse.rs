//! The check of an I/O command: opcode, flags, namespace, blocks, size.

use nvme_spec::Sqe;
use nvme_spec::Status;
use nvme_spec::command::NSID_BROADCAST;
use nvme_spec::opcode::NvmOpcode;

use super::namespace::Namespace;
use crate::backend::Operation;

/// What holds for all commands of a controller.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Largest transfer in bytes (Identify MDTS).
    pub max_transfer: u32,
    /// NN: higher NSIDs cannot be (Identify Controller).
    pub max_namespaces: u32,
    /// SGLs are offered (Identify Controller SGLS).
    pub sgls: bool,
}

/// FUSE and PSDT, of the flags of an SQE.
const FLAGS: u8 = 0b1100_0011;
/// Of these: no fused command, an SGL, and a metadata pointer that is none. Nothing here has metadata.
const SGL: u8 = 0b0100_0000;

/// Where in the SQE the fault is, as the Error Information log wants it: byte in bits 7:0, bit in 10:8.
const NOWHERE: u16 = 0xffff;

/// A command that will not be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What the guest is told.
    pub status: Status,
    /// The byte of the SQE that is at fault (Error Information log, Parameter Error Location); 0xFFFF if none is.
    pub parameter: u16,
}

impl Refusal {
    const fn new(status: Status, parameter: u16) -> Self {
        Self { status, parameter }
    }
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self::new(status, NOWHERE)
    }
}

/// A checked command. Block numbers are inside the namespace; `namespace` indexes the controller's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Move data; where from or to, the data pointer says, be it PRPs or an SGL.
    Transfer {
        /// Index of the namespace.
        namespace: usize,
        /// Read, Write or Compare.
        operation: Operation,
        /// First block.
        slba: u64,
        /// Blocks.
        blocks: u32,
        /// The same in bytes, at most the limit.
        bytes: u32,
    },
    /// Move data by a store that forwards the command: its memory is not looked at here.
    Forward {
        /// Index of the namespace.
        namespace: usize,
        /// Read, Write or Compare.
        operation: Operation,
        /// First block.
        slba: u64,
        /// Blocks.
        blocks: u32,
        /// The same in bytes, at most the limit.
        bytes: u32,
    },
    /// Work on blocks without moving data: Verify, Write Zeroes; or Flush, with no blocks.
    Blocks {
        /// Index of the namespace.
        namespace: usize,
        /// What to do.
        operation: Operation,
        /// First block.
        slba: u64,
        /// Blocks.
        blocks: u32,
    },
    /// Hand on a command nobody here understands, as it is.
    Pass {
        /// Index of the namespace.
        namespace: usize,
    },
    /// Flush every namespace.
    FlushAll,
    /// Dataset Management with Deallocate: the ranges are still to be read.
    Deallocate {
        /// Index of the namespace.
        namespace: usize,
        /// How many, 1 to 256.
        ranges: u32,
    },
    /// Nothing has to be done (Dataset Management hints).
    Nothing,
}

/// Check a command of an I/O queue.
///
/// # Errors
///
/// [`Refusal`] with the status of NVM Command Set section 3.2 or Base section 4.2.3, in the order a controller would find them: opcode, flags,
/// namespace, write protection, size, blocks.
#[inline]
pub fn parse(sqe: &Sqe, namespaces: &[Namespace], limits: Limits) -> Result<Plan, Refusal> {
    let opcode = NvmOpcode(sqe.opcode);
    let known = matches!(
        opcode,
        NvmOpcode::READ
            | NvmOpcode::WRITE
            | NvmOpcode::FLUSH
            | NvmOpcode::COMPARE
            | NvmOpcode::VERIFY
            | NvmOpcode::WRITE_ZEROES
            | NvmOpcode::DATASET_MANAGEMENT
    );
    if !known {
        return unknown(sqe, namespaces);
    }
    if sqe.flags & FLAGS != 0 {
        check_flags(sqe, namespaces, limits)?;
    }
    if opcode == NvmOpcode::FLUSH && sqe.nsid == NSID_BROADCAST {
        return Ok(Plan::FlushAll);
    }
    let namespace =
        find(namespaces, sqe.nsid).ok_or_else(|| no_namespace(sqe.nsid, limits.max_namespaces))?;
    let ns = &namespaces[namespace];
    let writes = matches!(
        opcode,
        NvmOpcode::WRITE | NvmOpcode::WRITE_ZEROES | NvmOpcode::DATASET_MANAGEMENT
    );
    if writes && ns.read_only {
        return Err(Refusal::new(Status::NAMESPACE_WRITE_PROTECTED, 4));
    }
    if opcode == NvmOpcode::FLUSH {
        return Ok(Plan::Blocks {
            namespace,
            operation: Operation::Flush,
            slba: 0,
            blocks: 0,
        });
    }
    if opcode == NvmOpcode::DATASET_MANAGEMENT {
        // Attribute Deallocate (AD) is bit 2 of dword 11; the others are hints.
        return Ok(if sqe.cdw11 & 0b100 == 0 {
            Plan::Nothing
        } else {
            Plan::Deallocate {
                namespace,
                ranges: (sqe.cdw10 & 0xff) + 1,
            }
        });
    }

    let slba = sqe.slba();
    let blocks = u32::from(sqe.nlb_z()) + 1;
    let fua = sqe.cdw12 & (1 << 30) != 0;
    let moves = matches!(
        opcode,
        NvmOpcode::READ | NvmOpcode::WRITE | NvmOpcode::COMPARE
    );
    // At most 2^16 blocks of at most 2^12 bytes.
    let bytes = blocks << ns.geometry.block_shift;
    if moves && bytes > limits.max_transfer {
        return Err(Refusal::new(Status::INVALID_FIELD, 48));
    }
    if !in_range(slba, blocks, ns.geometry.blocks) {
        return Err(Refusal::new(Status::LBA_OUT_OF_RANGE, 40));
    }
    let operation = match opcode {
        NvmOpcode::READ => Operation::Read,
        NvmOpcode::WRITE => Operation::Write { fua },
        NvmOpcode::COMPARE => Operation::Compare,
        NvmOpcode::VERIFY => Operation::Verify,
        _ => Operation::WriteZeroes {
            // DEAC is bit 25 of dword 12.
            deallocate: sqe.cdw12 & (1 << 25) != 0,
            fua,
        },
    };
    Ok(if moves && ns.forwards {
        Plan::Forward {
            namespace,
            operation,
            slba,
            blocks,
            bytes,
        }
    } else if moves {
        Plan::Transfer {
            namespace,
            operation,
            slba,
            blocks,
            bytes,
        }
    } else {
        Plan::Blocks {
            namespace,
            operation,
            slba,
            blocks,
        }
    })
}

/// Flags that are not all zero: no command may be fused, and an SGL is for those who were told of SGLs. Apart, so that others do not
/// pay for the question.
#[cold]
fn check_flags(sqe: &Sqe, namespaces: &[Namespace], limits: Limits) -> Result<(), Refusal> {
    // Where commands are forwarded SGLs are not offered.
    let forwards = || find(namespaces, sqe.nsid).is_some_and(|i| namespaces[i].forwards);
    if sqe.flags & FLAGS == SGL && limits.sgls && !forwards() {
        Ok(())
    } else {
        Err(Refusal::new(Status::INVALID_FIELD, 1))
    }
}

/// A command that is none of ours: it may be that its store wants it all the same.
#[cold]
fn unknown(sqe: &Sqe, namespaces: &[Namespace]) -> Result<Plan, Refusal> {
    let at = find(namespaces, sqe.nsid);
    let Some((namespace, ns)) = at
        .and_then(|at| Some((at, namespaces.get(at)?)))
        .filter(|(_, ns)| ns.passes.contains(sqe.opcode))
    else {
        return Err(Refusal::new(Status::INVALID_OPCODE, 0));
    };
    if sqe.flags & FLAGS != 0 {
        return Err(Refusal::new(Status::INVALID_FIELD, 1));
    }
    // Nobody knows what it does.
    if ns.read_only {
        return Err(Refusal::new(Status::NAMESPACE_WRITE_PROTECTED, 4));
    }
    Ok(Plan::Pass { namespace })
}

/// Whether `blocks` blocks from `slba` on lie in a namespace of `size` blocks.
pub(super) fn in_range(slba: u64, blocks: u32, size: u64) -> bool {
    slba.checked_add(u64::from(blocks))
        .is_some_and(|end| end <= size)
}

/// What an NSID without a namespace gets: one that could have a namespace is inactive, another is invalid (Base, section
/// "Namespace Identifiers").
#[cold]
fn no_namespace(nsid: u32, max_namespaces: u32) -> Refusal {
    let status = if (1..=max_namespaces).contains(&nsid) {
        Status::INVALID_FIELD
    } else {
        Status::INVALID_NAMESPACE_OR_FORMAT
    };
    Refusal::new(status, 4)
}

/// The index of `nsid` in the table; nearly always the table has one entry.
#[inline]
fn find(namespaces: &[Namespace], nsid: u32) -> Option<usize> {
    match namespaces {
        [one] => (one.nsid == nsid).then_some(0),
        many => many.binary_search_by_key(&nsid, |ns| ns.nsid).ok(),
    }
}
