//! A namespace in the memory of the host.

#![expect(unsafe_code, reason = "implements the unsafe `Channel::submit`")]

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme_spec::Status;

use super::geometry::{Extent, bytes_of};
use super::{
    Cancelled, Channel, Finished, Geometry, OpenError, Operation, Request, Submitted, Tag, wake,
};
use crate::memory::{Copier, HostSeg, Store};
use crate::state::random_id;

/// Zeroing more than this at once would hold up the other queues of a poller: it is done in steps of this many bytes.
const ZERO_STEP: u64 = 2 << 20;

/// How long one poll goes on with such steps.
const ZERO_TIME: Duration = Duration::from_micros(200);

/// Whether a store is made of huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HugePages {
    /// If enough are free; else normal pages, which the log tells.
    #[default]
    IfFree,
    /// Never.
    Never,
    /// Or not at all.
    Required,
}

/// What a [`MemoryBackend`] is made of.
#[derive(Clone, Copy, Debug)]
pub struct MemoryOptions {
    /// log2 of the block size in bytes: 9 or 12.
    pub block_shift: u32,
    /// Size in blocks.
    pub blocks: u64,
    /// Refuse writes.
    pub read_only: bool,
    /// Which pages it is made of.
    pub huge_pages: HugePages,
}

/// A store in memory: gone with the process, or in a file that outlives it.
///
/// On normal pages, Write Zeroes and Deallocate give memory back. Huge pages are reserved when the store is made and stay:
/// a huge page that was given back and is missing later would be a fault, not an error.
pub struct MemoryBackend {
    pub(super) geometry: Geometry,
    store: Arc<Store>,
    id: String,
}

impl MemoryBackend {
    /// Make one, all zero.
    ///
    /// # Errors
    ///
    /// A size or block size that cannot be, or memory that cannot be had.
    pub fn new(options: MemoryOptions) -> Result<Self, OpenError> {
        let bytes = bytes_of(options.blocks, options.block_shift)?;
        let store = open_store(bytes, options.huge_pages)?;
        let id = random_id().map_err(|e| {
            OpenError::io("cannot get a random number", "is there /dev/urandom?", e)
        })?;
        Self::over(options, store, id)
    }

    /// Make one of a store that is there already and is known by `id`.
    ///
    /// # Errors
    ///
    /// A size or block size that cannot be, or that is not the store's.
    pub fn over(options: MemoryOptions, store: Store, id: String) -> Result<Self, OpenError> {
        if bytes_of(options.blocks, options.block_shift)? != store.len() {
            return Err(OpenError::new(
                format!(
                    "a store of {} bytes for {} blocks",
                    store.len(),
                    options.blocks
                ),
                "this is a mistake of the program; please report it",
            ));
        }
        Ok(Self {
            id,
            geometry: Geometry {
                block_shift: options.block_shift,
                blocks: options.blocks,
                read_only: options.read_only,
                volatile_write_cache: false,
                deallocate_reads_zero: true,
                thin: !store.is_huge(),
                optimal_blocks: 4096 >> options.block_shift,
            },
            store: Arc::new(store),
        })
    }

    pub(super) fn channel(&self, depth: u32) -> Result<MemoryChannel, OpenError> {
        Ok(MemoryChannel {
            geometry: self.geometry,
            store: Arc::clone(&self.store),
            copier: Copier::default(),
            jobs: VecDeque::with_capacity(depth as usize),
            wake: wake::event_fd()?,
        })
    }

    pub(super) fn store_id(&self) -> String {
        format!("memory {}", self.id)
    }

    pub(super) fn allocated_blocks(&self) -> u64 {
        if self.geometry.thin {
            self.store.allocated() >> self.geometry.block_shift
        } else {
            self.geometry.blocks
        }
    }

    pub(super) fn describe(&self) -> String {
        let pages = if self.store.is_huge() {
            "2 MiB pages"
        } else {
            "normal pages"
        };
        format!("memory, {pages}")
    }
}

fn open_store(bytes: u64, huge_pages: HugePages) -> Result<Store, OpenError> {
    let pages = bytes.div_ceil(2 << 20);
    if huge_pages != HugePages::Never {
        match Store::new(bytes, true) {
            Ok(store) => return Ok(store),
            Err(e) if huge_pages == HugePages::Required => {
                return Err(OpenError::io(
                    format!("cannot get {bytes} bytes of memory in {pages} pages of 2 MiB"),
                    "free or reserve huge pages (/proc/sys/vm/nr_hugepages), or allow normal pages",
                    e,
                ));
            }
            Err(e) => tracing::info!(
                bytes,
                needed = pages,
                cause = %e,
                "not enough free huge pages for a memory namespace, using normal pages"
            ),
        }
    }
    Store::new(bytes, false).map_err(|e| {
        OpenError::io(
            format!("cannot get {bytes} bytes of memory"),
            "make the namespace smaller",
            e,
        )
    })
}

/// A long zeroing that is under way.
struct Job {
    tag: Tag,
    left: Extent,
}

/// The data side of a [`MemoryBackend`]. All is done in `submit`, but for zeroing large ranges.
pub struct MemoryChannel {
    geometry: Geometry,
    store: Arc<Store>,
    copier: Copier,
    jobs: VecDeque<Job>,
    /// Readable while there are jobs.
    wake: OwnedFd,
}

impl MemoryChannel {
    fn zero(&mut self, tag: Tag, extent: Extent) -> Submitted {
        if extent.end - extent.start <= ZERO_STEP {
            let ok = self.store.zero(extent.start, extent.end - extent.start);
            return Submitted::Done(done(&self.store, ok));
        }
        if self.jobs.is_empty() {
            wake::signal(&self.wake);
        }
        self.jobs.push_back(Job { tag, left: extent });
        Submitted::Pending
    }

    /// One step of the job in front; its result if that was the last.
    fn step(&mut self) -> Option<Finished> {
        let job = self.jobs.front_mut()?;
        // Steps end on multiples, so that no page is cut in two.
        let end = (job.left.start / ZERO_STEP + 1)
            .saturating_mul(ZERO_STEP)
            .min(job.left.end);
        let ok = self.store.zero(job.left.start, end - job.left.start);
        job.left.start = end;
        if ok && !job.left.is_empty() {
            return None;
        }
        let tag = job.tag;
        self.jobs.pop_front();
        self.rest_if_idle();
        Some(Finished {
            tag,
            status: done(&self.store, ok).into(),
        })
    }

    fn rest_if_idle(&self) {
        if self.jobs.is_empty() {
            wake::clear(&self.wake);
        }
    }
}

/// What a store that says yes or no means: requests are inside it, so that it refuses only if it is broken, or not at all.
#[inline]
fn done(store: &Store, ok: bool) -> Status {
    if ok { Status::SUCCESS } else { refused(store) }
}

#[cold]
fn refused(store: &Store) -> Status {
    if store.is_broken() {
        Status::INTERNAL_ERROR
    } else {
        Status::LBA_OUT_OF_RANGE
    }
}

impl Channel for MemoryChannel {
    #[inline]
    unsafe fn submit(&mut self, tag: Tag, request: &Request<'_>) -> Submitted {
        let extent = match self.geometry.extent(request) {
            Ok(extent) => extent,
            Err(status) => return Submitted::Done(status),
        };
        Submitted::Done(match request.operation {
            Operation::Read => {
                let ok = self
                    .store
                    .read_into(&request.data, extent.start, &mut self.copier);
                done(&self.store, ok)
            }
            Operation::Write { .. } => {
                let ok = self
                    .store
                    .write_from(&request.data, extent.start, &mut self.copier);
                done(&self.store, ok)
            }
            Operation::Compare => match self.store.compare(&request.data, extent.start) {
                Some(true) => Status::SUCCESS,
                Some(false) => Status::COMPARE_FAILURE,
                None => refused(&self.store),
            },
            // Memory has no media errors to find, and no cache to lose.
            Operation::Verify | Operation::Flush => Status::SUCCESS,
            Operation::WriteZeroes { .. } | Operation::Deallocate => {
                return self.zero(tag, extent);
            }
        })
    }

    #[inline]
    fn prefetch(&mut self, operation: Operation, slba: u64, memory: &[HostSeg]) {
        let Some(first) = memory.first() else { return };
        match operation {
            Operation::Read => self.store.prefetch_read(
                slba << self.geometry.block_shift,
                first.len(),
                &mut self.copier,
            ),
            Operation::Write { .. } => self.store.prefetch_write(first, &mut self.copier),
            _ => {}
        }
    }

    #[inline]
    fn flush(&mut self) {}

    #[inline]
    fn poll(&mut self, out: &mut Vec<Finished>) {
        if self.jobs.is_empty() {
            return;
        }
        let start = Instant::now();
        while out.len() < out.capacity() {
            out.extend(self.step());
            if self.jobs.is_empty() || start.elapsed() >= ZERO_TIME {
                break;
            }
        }
    }

    fn cancel(&mut self, tag: Tag) -> Cancelled {
        if !self.jobs.is_empty() {
            self.jobs.retain(|job| job.tag != tag);
            self.rest_if_idle();
        }
        Cancelled::Gone
    }

    #[inline]
    fn pending(&self) -> usize {
        self.jobs.len()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wake.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Buffers;

    const MIB: u64 = 1 << 20;

    fn backend(mib: u64) -> MemoryBackend {
        MemoryBackend::new(MemoryOptions {
            block_shift: 12,
            blocks: (mib * MIB) >> 12,
            read_only: false,
            huge_pages: HugePages::Never,
        })
        .unwrap()
    }

    fn readable(channel: &MemoryChannel) -> bool {
        let mut b = [0; 8];
        let got = rustix::io::read(channel.wake_fd().unwrap(), &mut b).is_ok();
        if got {
            wake::signal(&channel.wake);
        }
        got
    }

    fn request(operation: Operation, slba: u64, blocks: u32) -> Request<'static> {
        Request {
            operation,
            slba,
            blocks,
            data: Buffers::NONE,
            guest: None,
        }
    }

    #[test]
    fn long_zeroing_is_done_in_steps_and_frees_memory() {
        let backend = backend(64);
        let mut channel = backend.channel(4).unwrap();
        let mut data = vec![5u8; 64 << 20];
        let segs = [HostSeg::of_slice(&mut data)];
        // SAFETY: `data` outlives the call, which finishes at once.
        let buffers = unsafe { Buffers::new(&segs) };
        assert!(
            backend
                .store
                .write_from(&buffers, 0, &mut Copier::default())
        );
        assert_eq!(backend.allocated_blocks(), 64 << 8);
        let mut out = Vec::with_capacity(4);
        // SAFETY: no memory.
        let submitted =
            unsafe { channel.submit(3, &request(Operation::Deallocate, 1, (64 << 8) - 2)) };
        assert_eq!(submitted, Submitted::Pending);
        assert!(readable(&channel));
        assert_eq!(channel.pending(), 1);
        while channel.pending() > 0 {
            channel.poll(&mut out);
        }
        assert!(!readable(&channel));
        let finished = Finished {
            tag: 3,
            status: Status::SUCCESS.into(),
        };
        assert_eq!(out, [finished]);
        assert_eq!(
            backend.allocated_blocks(),
            2,
            "the first and the last block stay"
        );
    }

    #[test]
    fn long_zeroing_can_be_cancelled_and_waits_for_room() {
        let backend = backend(16);
        let mut channel = backend.channel(4).unwrap();
        for tag in 0..2 {
            // SAFETY: no memory.
            let submitted =
                unsafe { channel.submit(tag, &request(Operation::Deallocate, 0, 16 << 8)) };
            assert_eq!(submitted, Submitted::Pending);
        }
        assert_eq!(channel.cancel(0), Cancelled::Gone);
        assert_eq!(channel.pending(), 1);
        channel.poll(&mut Vec::new());
        assert_eq!(channel.pending(), 1, "nothing fits into no capacity");
        assert!(readable(&channel));
        assert_eq!(channel.cancel(1), Cancelled::Gone);
        assert!(!readable(&channel));
    }

    #[test]
    fn pages_that_are_required_and_missing_are_an_error_with_a_hint() {
        let error = MemoryBackend::new(MemoryOptions {
            block_shift: 9,
            blocks: 1 << 40,
            read_only: false,
            huge_pages: HugePages::Required,
        })
        .err()
        .unwrap();
        assert!(error.to_string().contains("nr_hugepages"), "{error}");
    }
}
