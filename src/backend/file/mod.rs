//! A namespace in a regular file or on a block device: through io_uring, or by copies where the file is memory.

mod at_once;
mod channel;
mod helper;
mod open;
mod resident;
mod ring;
mod slot;

pub use channel::FileChannel;
pub(super) use open::{Patience, SHORT, lock};

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::FlockOperation;

use super::error::ErrorLog;
use super::uring::no_ring;
use super::{Geometry, OpenError};
use resident::Resident;
use ring::Ring;

/// What a [`FileBackend`] is made of.
#[derive(Clone, Debug)]
pub struct FileOptions {
    /// The file or block device. Its size is that of the namespace.
    pub path: PathBuf,
    /// log2 of the block size in bytes: 9 or 12.
    pub block_shift: u32,
    /// Never write to it.
    pub read_only: bool,
    /// Go around the page cache (`O_DIRECT`) if the file can do that.
    pub direct: bool,
    /// Whether the device below is polled for completions.
    pub iopoll: IoPoll,
    /// Who had the file before may still be about to let go of it.
    pub after: After,
}

/// What another process that had a store before us still has to do with it, and what the next one may have with us.
#[derive(Clone, Debug, Default)]
pub struct After {
    /// So long it may take until it has let go.
    pub wait: Duration,
    /// A file that the kernel is to hold for as long as it has I/O of ours: who waits for its lock knows that there is none any more.
    pub fence: Option<Arc<File>>,
}

/// Whether the kernel polls a device for completions (`IORING_SETUP_IOPOLL`) instead of being interrupted by it. It takes O_DIRECT, and a
/// device with queues for it: for NVMe SSDs the module parameter `nvme.poll_queues`. A poller does not sleep while I/O is out on such a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoPoll {
    /// If the device can.
    #[default]
    Auto,
    /// Or not at all.
    Required,
    /// Never.
    Never,
}

/// A store in a file. What was written is safe after a Flush, or at once with FUA.
///
/// It is locked (`flock`) against other namespaces, in this process or another.
pub struct FileBackend {
    pub(super) geometry: Geometry,
    shared: Arc<Shared>,
}

/// What all channels of a file share.
struct Shared {
    file: File,
    path: PathBuf,
    device: bool,
    direct: bool,
    memory_align: usize,
    length_align: usize,
    granule: u64,
    /// Holes can be made by fallocate, as far as we know.
    punch: AtomicBool,
    /// Ranges can be zeroed by fallocate, as far as we know.
    zero_range: AtomicBool,
    /// The block device can discard, as far as we know.
    discard: AtomicBool,
    /// The device can be polled for completions, as far as we know.
    iopoll: AtomicBool,
    /// If the file is memory: its I/O.
    resident: Option<Resident>,
    fence: Option<Arc<File>>,
    log: ErrorLog,
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The kernel may hold the file a moment longer than we do; the lock ends here.
        let _ = rustix::fs::flock(&self.file, FlockOperation::NonBlockingUnlock);
    }
}

impl FileBackend {
    /// Open one.
    ///
    /// # Errors
    ///
    /// A path that cannot be used, a size that is not whole blocks, a file somebody else has, a system without io_uring.
    pub fn open(options: FileOptions) -> Result<Self, OpenError> {
        let opened = open::open(&options)?;
        // Better now than at the first queue.
        Ring::new(&opened.file, None, 1, 0, opened.iopoll).map_err(no_ring)?;
        let bytes = opened.blocks << options.block_shift;
        let resident = opened
            .in_memory
            .then(|| Resident::new(&opened.file, bytes, !options.read_only));
        Ok(Self {
            geometry: Geometry {
                block_shift: options.block_shift,
                blocks: opened.blocks,
                read_only: options.read_only,
                volatile_write_cache: true,
                deallocate_reads_zero: opened.punch,
                thin: opened.punch,
                optimal_blocks: optimal_blocks(opened.optimal, options.block_shift),
            },
            shared: Arc::new(Shared {
                file: opened.file,
                path: options.path,
                device: opened.device,
                direct: opened.direct,
                memory_align: opened.memory_align,
                length_align: opened.length_align,
                granule: opened.granule,
                punch: AtomicBool::new(opened.punch || opened.device),
                zero_range: AtomicBool::new(true),
                discard: AtomicBool::new(opened.device),
                iopoll: AtomicBool::new(opened.iopoll),
                resident,
                fence: options.after.fence,
                log: ErrorLog::new(),
            }),
        })
    }

    pub(super) fn channel(&self, depth: u32) -> Result<FileChannel, OpenError> {
        FileChannel::new(self.geometry, &self.shared, depth)
    }

    /// Whether the page cache is gone around.
    pub fn is_direct(&self) -> bool {
        self.shared.direct
    }

    pub(super) fn store_id(&self) -> String {
        match rustix::fs::fstat(&self.shared.file) {
            // The node of a device may be made anew; it is the same device.
            Ok(stat) if self.shared.device => format!("device {:x}", stat.st_rdev),
            Ok(stat) => format!("file {:x} {}", stat.st_dev, stat.st_ino),
            Err(_) => format!("path {}", self.shared.path.display()),
        }
    }

    pub(super) fn allocated_blocks(&self) -> u64 {
        let all = self.geometry.blocks;
        if !self.geometry.thin {
            return all;
        }
        match rustix::fs::fstat(&self.shared.file) {
            Ok(stat) => {
                let bytes = stat.st_blocks.unsigned_abs().saturating_mul(512);
                bytes.div_ceil(self.geometry.block_size()).min(all)
            }
            Err(_) => all,
        }
    }

    pub(super) fn describe(&self) -> String {
        let kind = if self.shared.device {
            "block device"
        } else {
            "file"
        };
        let way = match &self.shared.resident {
            Some(resident) if resident.is_mapped() => "in memory, mapped",
            Some(_) => "in memory",
            None if known(&self.shared.iopoll) => "O_DIRECT, polled",
            None if self.shared.direct => "O_DIRECT",
            None => "page cache",
        };
        format!("{kind} {}, {way}", self.shared.path.display())
    }
}

fn optimal_blocks(bytes: u64, block_shift: u32) -> u32 {
    // Some file systems name a size nobody would want to wait for, others one that is no power of two.
    if !bytes.is_power_of_two() {
        return 1;
    }
    ((bytes.min(1 << 20) >> block_shift) as u32).max(1)
}

fn known(flag: &AtomicBool) -> bool {
    flag.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn optimal_sizes_are_sane() {
        assert_eq!(optimal_blocks(4096, 9), 8);
        assert_eq!(optimal_blocks(512, 12), 1);
        assert_eq!(optimal_blocks(1 << 30, 12), 256);
        assert_eq!(optimal_blocks(0, 9), 1);
        assert_eq!(optimal_blocks(5000, 9), 1);
    }
}
