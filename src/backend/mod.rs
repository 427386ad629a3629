//! What stores the data of a namespace.
//!
//! A [`Backend`] is the control side: one for each namespace, shared, asked for its [`Geometry`] and for channels. A
//! [`Channel`] is the data side: one for each poller, used by that thread alone, without locks. They are enums, so that a poller calls
//! the store it has, not a table of functions.

mod bounce;
#[cfg(any(test, feature = "testing"))]
pub mod conformance;
mod delay;
mod error;
mod fault;
mod file;
pub mod geometry;
mod guest;
mod memory;
mod null;
pub mod nvme;
mod opcodes;
mod passthrough;
mod rules;
mod select;
mod sync;
#[cfg(test)]
mod tests;
mod traits;
mod uring;
mod wake;

pub use delay::{Delay, DelayBackend, DelayChannel};
pub use fault::{Fault, FaultBackend, FaultChannel};
pub use file::{After, FileBackend, FileChannel, FileOptions, IoPoll};
pub use guest::GuestData;
pub use memory::{HugePages, MemoryBackend, MemoryChannel, MemoryOptions};
pub use null::{NullBackend, NullChannel, NullOptions};
pub use nvme::{NvmeBackend, NvmeChannel, NvmeOptions};
pub use opcodes::Opcodes;
pub use passthrough::{PassthroughBackend, PassthroughChannel, PassthroughOptions};
pub use rules::{Operations, Rule, RuleId, Rules};
pub use select::{AnyChannel, Backend};
pub use traits::Traits;

use std::io;
use std::os::fd::BorrowedFd;

use nvme_spec::{Sqe, Status, StatusField};

use crate::memory::{Buffers, HostSeg};

/// What a namespace's store looks like to the controller above it. All of it is fixed while the backend lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// log2 of the logical block size in bytes: 9 or 12.
    pub block_shift: u32,
    /// Size in logical blocks, at least 1.
    pub blocks: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Data that was written may be lost before a Flush (Identify VWC).
    pub volatile_write_cache: bool,
    /// Deallocated blocks read as zeroes (Identify Namespace DLFEAT).
    pub deallocate_reads_zero: bool,
    /// Deallocating gives the memory or space back (Identify Namespace NSFEAT THINP).
    pub thin: bool,
    /// Preferred granularity and alignment of I/O in logical blocks, at least 1 (NPWG, NPWA).
    pub optimal_blocks: u32,
}

/// What to do. All block numbers were checked against the geometry: `slba + blocks <= geometry.blocks`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fill `data` from the blocks.
    Read,
    /// Store `data`; with `fua`, on stable media before it completes.
    Write {
        /// Force unit access.
        fua: bool,
    },
    /// Compare `data` with the blocks: [`Status::COMPARE_FAILURE`] if they differ.
    Compare,
    /// Read the blocks without moving data; media errors show.
    Verify,
    /// Make the blocks read as zeroes; they may be deallocated if `deallocate`.
    WriteZeroes {
        /// The host allows (DEAC) the blocks to be deallocated.
        deallocate: bool,
        /// Force unit access.
        fua: bool,
    },
    /// The host does not need the blocks any more.
    Deallocate,
    /// All that completed before is on stable media. `slba` and `blocks` are 0.
    Flush,
}

/// One request to a channel.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// What to do.
    pub operation: Operation,
    /// First logical block.
    pub slba: u64,
    /// Number of logical blocks, at least 1 except for Flush.
    pub blocks: u32,
    /// Memory of the transfer: `blocks << block_shift` bytes for Read, Write and Compare, else [`Buffers::NONE`].
    pub data: Buffers<'a>,
    /// To a backend that forwards ([`Backend::forwards`]), instead of `data`: the transfer in the guest's own words.
    pub guest: Option<GuestData<'a>>,
}

impl Request<'_> {
    /// Bytes of memory it comes with.
    pub(crate) fn memory_bytes(&self) -> u64 {
        match &self.guest {
            Some(guest) => u64::from(guest.bytes),
            None => self.data.len() as u64,
        }
    }
}

/// Blocks that are deallocated together with others, checked as those of a [`Request`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockRange {
    /// First block.
    pub slba: u64,
    /// Blocks, at least 1.
    pub blocks: u32,
}

/// The caller's name for a request, below the `depth` its channel was opened with. It is free again once its result is
/// there.
pub type Tag = u32;

/// What became of a request right away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Submitted {
    /// It is finished.
    Done(Status),
    /// [`Channel::poll`] will give the result under its tag.
    Pending,
}

/// What became of a wish to cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Cancelled {
    /// The request is gone: its memory is not touched any more and no result will come.
    Gone,
    /// The result will come, cancelled ([`Status::ABORT_REQUESTED`]) or not.
    ResultComes,
}

/// A finished request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished {
    /// The tag it was submitted under.
    pub tag: Tag,
    /// What the guest is told, with the Do Not Retry and More bits; its phase and retry delay mean nothing.
    pub status: StatusField,
}

/// The data side of a backend, owned by one poller.
///
/// The contract, both ways. The caller: block numbers are inside the geometry, a tag is not used twice at a time, and memory stays as
/// [`Channel::submit`] asks. The channel: never panics on any request, never blocks for long in `submit`, `flush` and `poll`; a transfer
/// that came out short is an error; each pending request finishes exactly once; after [`Drop`] it touches no
/// memory of any request (it waits for the kernel if it must).
pub trait Channel: Send {
    /// Begin a request, or do it.
    ///
    /// # Safety
    ///
    /// If this returns [`Submitted::Pending`], the memory behind `request.data`, and the list of segments itself, must stay valid
    /// until the request is finished, is [`Cancelled::Gone`], or the channel has been dropped. The same holds for the mapping, here and for
    /// devices, of all of `request.guest`'s memory.
    unsafe fn submit(&mut self, tag: Tag, request: &Request<'_>) -> Submitted;

    /// A request like this, with this memory, comes next: bring near what it needs. Only a hint; costs little.
    #[inline]
    fn prefetch(&mut self, operation: Operation, slba: u64, memory: &[HostSeg]) {
        let _ = (operation, slba, memory);
    }

    /// Begin a command that nobody here understands, as the guest wrote it but for its identifier and NSID: one that [`Backend::passes`].
    ///
    /// # Safety
    ///
    /// As [`Self::submit`], for all of the guest's memory.
    unsafe fn pass(&mut self, tag: Tag, sqe: &Sqe) -> Submitted {
        let _ = (tag, sqe);
        Submitted::Done(Status::INVALID_OPCODE)
    }

    /// Deallocate several ranges by one request: how many of these, from the first on, it is about, and what became of it. `None`: each by
    /// [`Self::submit`], the first at least.
    fn deallocate(&mut self, tag: Tag, ranges: &[BlockRange]) -> Option<(usize, Submitted)> {
        let _ = (tag, ranges);
        None
    }

    /// Hand what was submitted to whoever does it. Called once a pass.
    fn flush(&mut self);

    /// Append finished requests to `out`, as many as there are and fit into its capacity. See [`Self::unsent`].
    fn poll(&mut self, out: &mut Vec<Finished>);

    /// Whether [`Self::poll`] went on with requests by something that was not handed over yet: [`Self::flush`] does that.
    #[inline]
    fn unsent(&self) -> bool {
        false
    }

    /// Stop a pending request if that can be done.
    fn cancel(&mut self, tag: Tag) -> Cancelled;

    /// Pending requests.
    fn pending(&self) -> usize;

    /// Readable when [`Self::poll`] has something; `None` if requests never are pending.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Whether [`Self::wake_fd`] is an eventfd that is written for all news and read by nobody: its edges are what to wait for.
    fn wakes_by_edges(&self) -> bool {
        false
    }

    /// Called now and then, and after a sleep, also when nothing is pending: for what is not the doing of a request.
    fn tend(&mut self) {}
}

/// Why a backend could not be opened: what was tried, on what, and what came back.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {hint}")]
pub struct OpenError {
    /// What was tried, with the path or size in it.
    pub what: String,
    /// What the operator can do about it.
    pub hint: String,
    /// The cause, where there is one.
    #[source]
    pub source: Option<io::Error>,
}
