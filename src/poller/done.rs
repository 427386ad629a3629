//! The end of a command: its completion, its counters, its report.

use nvme_spec::opcode::NvmOpcode;
use nvme_spec::{Cqe, Sqe, Status, StatusField};

use super::cq::Cq;
use super::message::IoFailure;
use super::sq::Sq;
use super::stats::NamespaceStats;

/// Post the completion of a command of `sq` that was done at once. `head`: how far the queue is known to be fetched.
#[inline]
pub(super) fn post(sq: &Sq, cq: &mut Cq, cid: u16, head: u16, status: Status) {
    let field = if status.is_success() {
        StatusField::from_status(status)
    } else {
        status.into()
    };
    post_field(sq, cq, cid, head, field);
}

/// Post the completion of a command of `sq`.
#[inline]
pub(super) fn post_field(sq: &Sq, cq: &mut Cq, cid: u16, head: u16, field: StatusField) {
    if !field.is_success() {
        sq.stats.failed.add(1);
    }
    let cqe = Cqe {
        sqhd: head,
        sqid: sq.qid,
        cid,
        ..Cqe::default()
    };
    cq.post(cqe, field);
}

/// Commands that were done at once and are posted together.
///
/// A guest that looks at the line of its next completion all the time has to give it up for each store to it, and until it has, later stores
/// wait, among them the copies of the commands after this one. A line has four completions: together they pay once.
pub(super) struct Together {
    ended: [(u16, u16, Status); Self::MOST],
    count: usize,
    /// Bytes that were moved since the first of them.
    bytes: u32,
    most: usize,
}

impl Together {
    /// Completions of a line.
    const MOST: usize = 4;
    /// Fewer commands than this are fewer than the guest has out, or all: it may have nothing to do until it sees the first.
    const DEEP: u32 = 8;
    /// Nobody waits for more than this to be moved for others.
    const BYTES: u32 = 16 << 10;

    /// For a batch of so many commands.
    #[inline]
    pub fn of(batch: u32) -> Self {
        Self {
            ended: [(0, 0, Status::SUCCESS); Self::MOST],
            count: 0,
            bytes: 0,
            most: if batch < Self::DEEP { 1 } else { Self::MOST },
        }
    }

    /// This command of `sq`, of so many bytes, was done. `head`: how far the queue was known to be fetched.
    #[inline]
    pub fn add(&mut self, sq: &Sq, cq: &mut Cq, ended: (u16, u16, Status), bytes: u32) {
        if let Some(place) = self.ended.get_mut(self.count) {
            *place = ended;
            self.count += 1;
        }
        self.bytes = self.bytes.saturating_add(bytes);
        if self.count >= self.most || self.bytes >= Self::BYTES {
            self.post(sq, cq);
        }
    }

    /// Post what was not posted yet.
    #[inline]
    pub fn post(&mut self, sq: &Sq, cq: &mut Cq) {
        for (cid, head, status) in self.ended.iter().take(self.count) {
            post(sq, cq, *cid, *head, *status);
        }
        self.count = 0;
        self.bytes = 0;
    }
}

/// What goes into the error log, if anything does.
pub(super) fn failure(
    sqid: u16,
    sqe: &Sqe,
    status: StatusField,
    parameter: u16,
) -> Option<IoFailure> {
    if status.is_success() {
        return None;
    }
    let told = [Status::ABORT_REQUESTED, Status::ABORTED_SQ_DELETION];
    (!told.contains(&status.status())).then_some(IoFailure {
        sqid,
        cid: sqe.cid,
        status,
        nsid: sqe.nsid,
        lba: sqe.slba(),
        parameter,
    })
}

/// Commands of one namespace that ended well, on their way into its counters: once a batch, not once a command.
pub(super) struct Tally<'a> {
    stats: &'a [NamespaceStats],
    namespace: u32,
    reads: u64,
    blocks_read: u64,
    writes: u64,
    blocks_written: u64,
}

impl<'a> Tally<'a> {
    pub fn new(stats: &'a [NamespaceStats]) -> Self {
        Self {
            stats,
            namespace: 0,
            reads: 0,
            blocks_read: 0,
            writes: 0,
            blocks_written: 0,
        }
    }

    /// A command on `blocks` blocks has ended.
    #[inline]
    pub fn count(&mut self, namespace: u32, opcode: u8, blocks: u32, status: Status) {
        if namespace != self.namespace {
            self.settle();
            self.namespace = namespace;
        }
        if !status.is_success() {
            return self.failed(status);
        }
        match NvmOpcode(opcode) {
            NvmOpcode::READ | NvmOpcode::COMPARE | NvmOpcode::VERIFY => {
                self.reads += 1;
                self.blocks_read += u64::from(blocks);
            }
            NvmOpcode::WRITE => {
                self.writes += 1;
                self.blocks_written += u64::from(blocks);
            }
            _ => {
                if let Some(stats) = self.stats.get(self.namespace as usize) {
                    stats.others.add(1);
                }
            }
        }
    }

    #[cold]
    fn failed(&self, status: Status) {
        // Media and data integrity errors are status code type 2.
        if status.sct() == 2
            && status != Status::COMPARE_FAILURE
            && let Some(stats) = self.stats.get(self.namespace as usize)
        {
            stats.media_errors.add(1);
        }
    }

    /// Write down what was counted.
    #[inline]
    pub fn settle(&mut self) {
        let Some(stats) = self.stats.get(self.namespace as usize) else {
            return;
        };
        if self.reads > 0 {
            stats.reads.add(std::mem::take(&mut self.reads));
            stats.blocks_read.add(std::mem::take(&mut self.blocks_read));
        }
        if self.writes > 0 {
            stats.writes.add(std::mem::take(&mut self.writes));
            stats
                .blocks_written
                .add(std::mem::take(&mut self.blocks_written));
        }
    }
}
