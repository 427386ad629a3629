//! Opening a file or block device for a namespace: what it is, how it can be used, and that it is ours.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, OFlags, StatxFlags};
use rustix::io::Errno;

use super::resident::Medium;
use super::{FileOptions, IoPoll};
use crate::backend::{OpenError, geometry};

/// A page: no kernel asks for more alignment of memory where it does not say.
const PAGE: u32 = 4096;

/// What a close can take that has returned.
pub(in crate::backend) const SHORT: Duration = Duration::from_millis(100);

/// An opened file and what was found out about it.
pub(super) struct Opened {
    pub file: File,
    pub blocks: u64,
    /// A block device, not a regular file.
    pub device: bool,
    /// O_DIRECT is in use.
    pub direct: bool,
    /// Alignment O_DIRECT asks of addresses, and of lengths, both powers of two.
    pub memory_align: usize,
    pub length_align: usize,
    /// Ranges for fallocate and discard have to be multiples of this.
    pub granule: u64,
    /// Holes can be made in it.
    pub punch: bool,
    /// Bytes of I/O it likes best.
    pub optimal: u64,
    /// Its data is the page cache, and nothing else.
    pub in_memory: bool,
    /// The device below is to be polled for completions.
    pub iopoll: bool,
}

/// Open, look at and lock it.
pub(super) fn open(options: &FileOptions) -> Result<Opened, OpenError> {
    let path = &options.path;
    let meta = std::fs::metadata(path).map_err(|e| cannot_open(options, e))?;
    let device = meta.file_type().is_block_device();
    if !device && !meta.is_file() {
        return Err(OpenError::new(
            format!("{} is neither a file nor a block device", path.display()),
            "name a regular file (truncate -s 10G FILE makes one) or a block device",
        ));
    }
    let mut direct = options.direct;
    let mut file = match open_as(options, device, direct) {
        Err(e) if direct && e.raw_os_error() == Some(libc::EINVAL) => {
            direct = false;
            open_as(options, device, false)
        }
        result => result,
    }
    .map_err(|e| cannot_open(options, e))?;
    let bytes = file
        .seek(SeekFrom::End(0))
        .map_err(|e| OpenError::io(format!("cannot find the size of {}", path.display()), "", e))?;
    let blocks = geometry::blocks_of(bytes, options.block_shift).map_err(|mut e| {
        e.what = format!("{}: {}", path.display(), e.what);
        e
    })?;

    let sector = if device {
        rustix::fs::ioctl_blksszget(&file).unwrap_or(512)
    } else {
        512
    };
    let block = 1u32 << options.block_shift;
    // The node of a device lies on a tmpfs; its data does not.
    let medium = if device {
        Medium::Disk
    } else {
        Medium::of(&file)
    };
    if medium == Medium::HugePages && !options.read_only {
        return Err(OpenError::new(
            format!(
                "{} is made of huge pages, which cannot be written to as a file",
                path.display()
            ),
            "use a memory namespace (it takes huge pages), or a file on tmpfs; read-only works",
        ));
    }
    let (mut memory_align, mut length_align) = (block, block);
    if direct {
        // What is memory has nothing to go around.
        let alignment = match medium {
            Medium::Memory => None,
            Medium::Disk | Medium::HugePages => direct_alignment(&file, sector, block),
        };
        match alignment {
            Some((memory, length)) => (memory_align, length_align) = (memory, length),
            None => {
                direct = false;
                // Not by opening it again: a device opened with O_EXCL is busy, even for us.
                rustix::fs::fcntl_getfl(&file)
                    .and_then(|flags| rustix::fs::fcntl_setfl(&file, flags - OFlags::DIRECT))
                    .map_err(|e| cannot_open(options, e.into()))?;
            }
        }
    }
    if options.direct && !direct && medium != Medium::Memory {
        tracing::info!(
            path = %path.display(),
            block,
            "O_DIRECT is not possible with this file and block size, going through the page cache"
        );
    }
    let number = if device { meta.rdev() } else { meta.dev() };
    let iopoll = polls(options, direct, number)?;
    lock(&file, path, options.read_only, options.after.wait)?;
    let punch = !device && !options.read_only && can_punch(&file, bytes);
    let physical = if device {
        rustix::fs::ioctl_blkpbszget(&file).unwrap_or(sector)
    } else {
        0
    };
    Ok(Opened {
        blocks,
        device,
        direct,
        memory_align: memory_align as usize,
        length_align: length_align as usize,
        granule: if device { u64::from(sector) } else { 1 },
        punch,
        optimal: meta.blksize().max(u64::from(physical)),
        in_memory: medium == Medium::Memory,
        iopoll,
        file,
    })
}

fn open_as(options: &FileOptions, device: bool, direct: bool) -> io::Result<File> {
    let mut flags = 0;
    if direct {
        flags |= libc::O_DIRECT;
    }
    if device && !options.read_only {
        // On a block device: fails if it is mounted or otherwise in use.
        flags |= libc::O_EXCL;
    }
    // Who closed it a moment ago may not be quite done, or is dead, and its I/O is not.
    let mut patience = Patience::new(&options.path, options.after.wait.max(SHORT));
    loop {
        let result = OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .custom_flags(flags)
            .open(&options.path);
        match result {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && patience.wait() => {}
            result => return result,
        }
    }
}

/// The alignment O_DIRECT asks for: of memory, of lengths and offsets. `None` if it cannot serve blocks of `block` bytes.
fn direct_alignment(file: &File, sector: u32, block: u32) -> Option<(u32, u32)> {
    let (mut memory, mut length) = (sector, sector);
    let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok();
    if let Some(stat) = stat
        && stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0
    {
        (memory, length) = (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
    }
    // Zero alignment means: not supported.
    let usable = memory.is_power_of_two() && memory <= PAGE && length.is_power_of_two();
    if !usable || length > block {
        return None;
    }
    // Whatever was said, try it: one block into memory that is aligned as badly as we shall ever do it.
    let mut buffer = vec![0u8; block as usize + 2 * PAGE as usize];
    let misfit = buffer.as_ptr().addr() % PAGE as usize;
    let start = (PAGE as usize - misfit) % PAGE as usize + memory as usize % PAGE as usize;
    let bytes = buffer.get_mut(start..start + block as usize)?;
    match file.read_at(bytes, 0) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => None,
        // A block that cannot be read is the guest's to find out.
        _ => Some((memory, length)),
    }
}

/// Whether to poll the device of that number for completions.
fn polls(options: &FileOptions, direct: bool, device: u64) -> Result<bool, OpenError> {
    if options.iopoll == IoPoll::Never {
        return Ok(false);
    }
    let can = direct && has_poll_queues(device);
    if options.iopoll == IoPoll::Required && !can {
        let path = options.path.display();
        return Err(match direct {
            true => OpenError::new(
                format!("the device of {path} has no queues to be polled"),
                "give it some (for NVMe: nvme.poll_queues=N on the kernel's command line), or set iopoll to auto",
            ),
            false => OpenError::new(
                format!("{path} goes through the page cache, where there is nothing to poll for"),
                "use O_DIRECT (direct = true, and a file that can do it), or set iopoll to auto",
            ),
        });
    }
    Ok(can)
}

/// A partition has no queues of its own; they are those of the disk above it.
fn has_poll_queues(device: u64) -> bool {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let dir = format!("/sys/dev/block/{major}:{minor}");
    [
        format!("{dir}/queue/io_poll"),
        format!("{dir}/../queue/io_poll"),
    ]
    .iter()
    .find_map(|path| std::fs::read_to_string(path).ok())
    .is_some_and(|text| text.trim() == "1")
}

/// Beyond the end there is nothing to lose.
fn can_punch(file: &File, bytes: u64) -> bool {
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file.as_fd(), mode, bytes, u64::from(PAGE)).is_ok()
}

/// Nobody else may write what we serve; what is only read can be shared with others who only read.
///
/// A process that was killed holds its lock until the kernel has ended its last operation on the file: that is waited for, so that nothing of
/// it comes after what we do.
pub(in crate::backend) fn lock(
    file: &File,
    path: &Path,
    read_only: bool,
    wait: Duration,
) -> Result<(), OpenError> {
    let operation = if read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    let mut patience = Patience::new(path, wait);
    loop {
        match rustix::fs::flock(file.as_fd(), operation) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) if patience.wait() => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(OpenError::new(
                    format!("{} is in use by another namespace", path.display()),
                    "end the other daemon or use another file; only read-only namespaces can share one",
                ));
            }
            Err(e) => {
                tracing::warn!(
                    path = %path.display(),
                    cause = %e,
                    "cannot lock this file; make sure that nobody else uses it"
                );
                return Ok(());
            }
        }
    }
}

/// How to wait for somebody who is about to let go of a file.
pub(in crate::backend) struct Patience<'a> {
    path: &'a Path,
    until: Instant,
    said: bool,
}

impl<'a> Patience<'a> {
    /// For so long.
    pub(in crate::backend) fn new(path: &'a Path, wait: Duration) -> Self {
        Self {
            path,
            until: Instant::now() + wait,
            // Not worth a word.
            said: wait <= SHORT,
        }
    }

    /// Wait a moment, and say once that we do; `false` if it has been long enough.
    pub(in crate::backend) fn wait(&mut self) -> bool {
        if Instant::now() >= self.until {
            return false;
        }
        if !self.said {
            self.said = true;
            tracing::info!(
                path = %self.path.display(),
                "another process still has this; waiting for the last of its I/O to end"
            );
        }
        std::thread::sleep(Duration::from_millis(10));
        true
    }
}

fn cannot_open(options: &FileOptions, error: io::Error) -> OpenError {
    let path: &Path = &options.path;
    let hint = match error.raw_os_error() {
        Some(libc::ENOENT) => "make it first, for example with: truncate -s 10G FILE",
        Some(libc::EACCES | libc::EPERM) => "give this user the permission, or run as another",
        Some(libc::EROFS) => "make the namespace read-only",
        Some(libc::EBUSY) => "it is mounted or otherwise in use; unmount it first",
        Some(libc::EMFILE | libc::ENFILE) => "raise the limit of open files (ulimit -n)",
        Some(libc::ETXTBSY) => "it is a program that is running, or a swap file",
        _ => "check the path",
    };
    OpenError::io(format!("cannot open {}", path.display()), hint, error)
}
