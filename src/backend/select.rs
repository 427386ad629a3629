//! One type for all backends and one for their channels: a `match` instead of a table of functions.

#![expect(unsafe_code, reason = "implements the unsafe `Channel::submit`")]

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use nvme_spec::Sqe;

use super::delay::{Delay, DelayBackend, DelayChannel};
use super::fault::{Fault, FaultBackend, FaultChannel};
use super::file::{FileBackend, FileChannel, FileOptions};
use super::memory::{MemoryBackend, MemoryChannel, MemoryOptions};
use super::null::{NullBackend, NullChannel, NullOptions};
use super::nvme::{NvmeBackend, NvmeChannel, NvmeOptions, Window};
use super::passthrough::{PassthroughBackend, PassthroughChannel, PassthroughOptions};
use super::rules::Rules;
use super::traits::Traits;
use super::{
    BlockRange, Cancelled, Channel, Finished, Geometry, Opcodes, OpenError, Operation, Request,
    Submitted, Tag,
};
use crate::memory::{HostSeg, Store};

/// The store of a namespace. Shared; what pollers use are its channels.
pub enum Backend {
    /// Stores nothing.
    Null(NullBackend),
    /// In memory.
    Memory(MemoryBackend),
    /// In a file or on a block device.
    File(FileBackend),
    /// A namespace of an NVMe SSD.
    Passthrough(PassthroughBackend),
    /// Blocks of an SSD this process drives.
    Nvme(Box<NvmeBackend>),
    /// Another one, with faults.
    Fault(Box<FaultBackend>),
    /// Another one, with delays.
    Delay(Box<DelayBackend>),
}

impl Backend {
    /// A store that moves no data.
    ///
    /// # Errors
    ///
    /// A size or block size that cannot be.
    pub fn null(options: NullOptions) -> Result<Self, OpenError> {
        NullBackend::new(options).map(Self::Null)
    }

    /// A store in memory.
    ///
    /// # Errors
    ///
    /// A size or block size that cannot be, or memory that cannot be had.
    pub fn memory(options: MemoryOptions) -> Result<Self, OpenError> {
        MemoryBackend::new(options).map(Self::Memory)
    }

    /// A store in memory that is there already, and is known by `id`.
    ///
    /// # Errors
    ///
    /// As [`MemoryBackend::over`].
    pub fn memory_over(
        options: MemoryOptions,
        store: Store,
        id: String,
    ) -> Result<Self, OpenError> {
        MemoryBackend::over(options, store, id).map(Self::Memory)
    }

    /// A store in a file or on a block device.
    ///
    /// # Errors
    ///
    /// As [`FileBackend::open`].
    pub fn file(options: FileOptions) -> Result<Self, OpenError> {
        FileBackend::open(options).map(Self::File)
    }

    /// A store that is a namespace of an NVMe SSD.
    ///
    /// # Errors
    ///
    /// As [`PassthroughBackend::open`].
    pub fn passthrough(options: PassthroughOptions) -> Result<Self, OpenError> {
        PassthroughBackend::open(options).map(Self::Passthrough)
    }

    /// A store that is blocks of an SSD this process drives.
    ///
    /// # Errors
    ///
    /// As [`NvmeBackend::open`].
    pub fn nvme(options: &NvmeOptions) -> Result<Self, OpenError> {
        NvmeBackend::open(options).map(|b| Self::Nvme(Box::new(b)))
    }

    /// This store with faults, and the handle to say which.
    pub fn with_faults(self) -> (Self, Rules<Fault>) {
        let rules = Rules::new();
        let fault = FaultBackend::new(self, rules.clone());
        (Self::Fault(Box::new(fault)), rules)
    }

    /// This store with delays, and the handle to say which.
    pub fn with_delays(self) -> (Self, Rules<Delay>) {
        let rules = Rules::new();
        let delay = DelayBackend::new(self, rules.clone());
        (Self::Delay(Box::new(delay)), rules)
    }

    /// What it looks like.
    pub fn geometry(&self) -> Geometry {
        match self {
            Self::Null(b) => b.geometry,
            Self::Memory(b) => b.geometry,
            Self::File(b) => b.geometry,
            Self::Passthrough(b) => b.geometry,
            Self::Nvme(b) => b.geometry,
            Self::Fault(b) => b.inner.geometry(),
            Self::Delay(b) => b.inner.geometry(),
        }
    }

    /// What tells the data it holds from that of any other store on this host, as long as the host runs: a guest's commands may go on only
    /// with the same one. Nothing in it is secret.
    pub fn store_id(&self) -> String {
        match self {
            Self::Null(_) => "null".into(),
            Self::Memory(b) => b.store_id(),
            Self::File(b) => b.store_id(),
            Self::Passthrough(b) => b.store_id(),
            Self::Nvme(b) => b.store_id(),
            Self::Fault(b) => b.inner.store_id(),
            Self::Delay(b) => b.inner.store_id(),
        }
    }

    /// Whether requests that move data come with [`Request::guest`], not with [`Request::data`].
    pub fn forwards(&self) -> bool {
        self.as_nvme().is_some()
    }

    /// Commands beyond those of [`Operation`] that it hands on ([`Channel::pass`]).
    pub fn passes(&self) -> Opcodes {
        self.as_nvme().map_or(Opcodes::NONE, NvmeBackend::passes)
    }

    /// The SSD's blocks that this is, below whatever wraps them.
    pub fn as_nvme(&self) -> Option<&NvmeBackend> {
        match self {
            Self::Null(_) | Self::Memory(_) | Self::File(_) | Self::Passthrough(_) => None,
            Self::Nvme(b) => Some(b),
            Self::Fault(b) => b.inner.as_nvme(),
            Self::Delay(b) => b.inner.as_nvme(),
        }
    }

    /// What it says of itself, if it is an SSD's.
    pub fn traits(&self) -> Option<&Traits> {
        self.as_nvme().map(NvmeBackend::traits)
    }

    /// How long a request may be out that was cancelled, as far as that is known beforehand.
    pub fn patience(&self) -> Duration {
        self.as_nvme()
            .map_or(Duration::ZERO, |nvme| nvme.ssd().0.patience())
    }

    /// Where the guest's memory must be shown for it.
    pub fn window(&self) -> Option<&Arc<Window>> {
        self.as_nvme().map(NvmeBackend::window)
    }

    /// A channel for one poller, on which tags below `depth` may be pending at a time.
    ///
    /// # Errors
    ///
    /// Resources of the kernel that cannot be had.
    pub fn channel(&self, depth: u32) -> Result<AnyChannel, OpenError> {
        Ok(match self {
            Self::Null(b) => AnyChannel::Null(b.channel()),
            Self::Memory(b) => AnyChannel::Memory(b.channel(depth)?),
            Self::File(b) => AnyChannel::File(Box::new(b.channel(depth)?)),
            Self::Passthrough(b) => AnyChannel::Passthrough(Box::new(b.channel(depth)?)),
            Self::Nvme(b) => AnyChannel::Nvme(Box::new(b.channel(depth)?)),
            Self::Fault(b) => AnyChannel::Fault(Box::new(b.channel(depth)?)),
            Self::Delay(b) => AnyChannel::Delay(Box::new(b.channel(depth)?)),
        })
    }

    /// Logical blocks that take up memory or space at the moment (Identify Namespace NUSE): all of them where deallocating
    /// gives nothing back. Asks the kernel; not for the I/O path.
    pub fn allocated_blocks(&self) -> u64 {
        match self {
            Self::Null(b) => b.geometry.blocks,
            Self::Memory(b) => b.allocated_blocks(),
            Self::File(b) => b.allocated_blocks(),
            Self::Passthrough(b) => b.allocated_blocks(),
            Self::Nvme(b) => b.geometry.blocks,
            Self::Fault(b) => b.inner.allocated_blocks(),
            Self::Delay(b) => b.inner.allocated_blocks(),
        }
    }

    /// What it is, in a line for the log: `memory, 2 MiB pages: 262144 blocks of 4096 bytes (1073741824 bytes)`.
    pub fn describe(&self) -> String {
        let what = match self {
            Self::Null(_) => "null".to_owned(),
            Self::Memory(b) => b.describe(),
            Self::File(b) => b.describe(),
            Self::Passthrough(b) => b.describe(),
            Self::Nvme(b) => b.describe(),
            Self::Fault(b) => return format!("faults over {}", b.inner.describe()),
            Self::Delay(b) => return format!("delays over {}", b.inner.describe()),
        };
        let g = self.geometry();
        let read_only = if g.read_only { ", read-only" } else { "" };
        format!(
            "{what}: {} blocks of {} bytes ({} bytes){read_only}",
            g.blocks,
            g.block_size(),
            g.bytes()
        )
    }
}

/// A channel of any backend.
pub enum AnyChannel {
    /// To a [`NullBackend`].
    Null(NullChannel),
    /// To a [`MemoryBackend`].
    Memory(MemoryChannel),
    /// To a [`FileBackend`].
    File(Box<FileChannel>),
    /// To a [`PassthroughBackend`].
    Passthrough(Box<PassthroughChannel>),
    /// To an [`NvmeBackend`].
    Nvme(Box<NvmeChannel>),
    /// To a [`FaultBackend`].
    Fault(Box<FaultChannel>),
    /// To a [`DelayBackend`].
    Delay(Box<DelayChannel>),
}

macro_rules! each {
    ($self:ident, $c:ident => $e:expr) => {
        match $self {
            Self::Null($c) => $e,
            Self::Memory($c) => $e,
            Self::File($c) => $e,
            Self::Passthrough($c) => $e,
            Self::Nvme($c) => $e,
            Self::Fault($c) => $e,
            Self::Delay($c) => $e,
        }
    };
}

impl Channel for AnyChannel {
    #[inline]
    unsafe fn submit(&mut self, tag: Tag, request: &Request<'_>) -> Submitted {
        // SAFETY: the caller's promise is the one the inner channel asks for.
        each!(self, c => unsafe { c.submit(tag, request) })
    }

    unsafe fn pass(&mut self, tag: Tag, sqe: &Sqe) -> Submitted {
        // SAFETY: the caller's promise is the one the inner channel asks for.
        each!(self, c => unsafe { c.pass(tag, sqe) })
    }

    fn deallocate(&mut self, tag: Tag, ranges: &[BlockRange]) -> Option<(usize, Submitted)> {
        each!(self, c => c.deallocate(tag, ranges))
    }

    #[inline]
    fn prefetch(&mut self, operation: Operation, slba: u64, memory: &[HostSeg]) {
        each!(self, c => c.prefetch(operation, slba, memory))
    }

    #[inline]
    fn flush(&mut self) {
        each!(self, c => c.flush())
    }

    #[inline]
    fn poll(&mut self, out: &mut Vec<Finished>) {
        each!(self, c => c.poll(out))
    }

    #[inline]
    fn unsent(&self) -> bool {
        each!(self, c => c.unsent())
    }

    fn cancel(&mut self, tag: Tag) -> Cancelled {
        each!(self, c => c.cancel(tag))
    }

    #[inline]
    fn pending(&self) -> usize {
        each!(self, c => c.pending())
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        each!(self, c => c.wake_fd())
    }

    fn wakes_by_edges(&self) -> bool {
        each!(self, c => c.wakes_by_edges())
    }

    fn tend(&mut self) {
        each!(self, c => c.tend());
    }
}
