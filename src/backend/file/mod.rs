//! A namespace in a regular file or on a block device, through io_uring.

mod channel;
mod error;
mod helper;
mod open;
mod ring;

pub use channel::FileChannel;

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::FlockOperation;

use super::{Geometry, OpenError};
use error::ErrorLog;
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
        Ring::new(&opened.file, 1, 0).map_err(no_ring)?;
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
        let way = if self.shared.direct {
            "O_DIRECT"
        } else {
            "page cache"
        };
        format!("{kind} {}, {way}", self.shared.path.display())
    }
}

fn no_ring(e: std::io::Error) -> OpenError {
    let hint = match e.raw_os_error() {
        Some(libc::ENOSYS | libc::EPERM | libc::EACCES) => {
            "allow io_uring (/proc/sys/kernel/io_uring_disabled, the container's seccomp profile)"
        }
        Some(libc::EMFILE | libc::ENFILE) => "raise the limit of open files (ulimit -n)",
        Some(libc::ENOMEM) => "raise the limit of locked memory (ulimit -l)",
        _ => "a kernel of 5.10 or later is needed",
    };
    OpenError::io("cannot make an io_uring", hint, e)
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
