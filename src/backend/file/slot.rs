//! A request on its way: who has it, what its next step is, and how far it has come.

use nvme_spec::Status;

use crate::backend::Operation;
use crate::backend::bounce::{BOUNCE_BYTES, Bounce};
use crate::memory::Held;

/// Who has a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Nobody: the tag is free.
    Free,
    /// We, until there is a bounce buffer or room in the ring.
    Waiting,
    /// The kernel, under this key.
    Kernel(u64),
    /// The helper thread.
    Helper,
}

/// How the next step is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Between file and the request's memory.
    Direct,
    /// Between file and a bounce buffer.
    Bounced,
    /// Punch a hole.
    Punch,
    /// Zero by fallocate.
    ZeroRange,
    /// Write zeroes.
    WriteZeroes,
    /// Discard on a block device.
    Discard,
    /// fdatasync.
    Sync,
}

pub(super) struct Slot {
    pub place: Place,
    pub operation: Operation,
    pub step: Step,
    /// First byte in the file.
    pub offset: u64,
    /// Bytes altogether and done.
    pub len: u64,
    pub done: u64,
    pub memory: Held,
    pub bounce: Option<Bounce>,
    pub cancelled: bool,
    pub retries: u8,
    /// The step is with the ring that is polled.
    pub polled: bool,
    /// Uses of this tag so far: tells a result of this use from any other.
    pub generation: u32,
}

impl Slot {
    pub fn new() -> Self {
        Self {
            place: Place::Free,
            operation: Operation::Flush,
            step: Step::Sync,
            offset: 0,
            len: 0,
            done: 0,
            memory: Held::NONE,
            bounce: None,
            cancelled: false,
            retries: 0,
            polled: false,
            generation: 0,
        }
    }

    pub fn left(&self) -> u64 {
        self.len - self.done
    }

    /// Bytes of the next piece that goes through a bounce buffer.
    pub fn piece(&self) -> usize {
        self.left().min(BOUNCE_BYTES as u64) as usize
    }

    pub fn fua(&self) -> bool {
        matches!(
            self.operation,
            Operation::Write { fua: true } | Operation::WriteZeroes { fua: true, .. }
        )
    }
}

/// What came of a step.
pub(super) enum Next {
    /// Another one.
    Again,
    /// That was the last.
    End(Status),
}
