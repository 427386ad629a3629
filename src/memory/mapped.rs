//! A file mapped into this process, and moving bytes between a file and foreign memory, through the mapping or by system call.

#![expect(
    unsafe_code,
    reason = "the fence: a mapping others write, and I/O vectors for the kernel"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use rustix::event::{EventfdFlags, eventfd};
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::copy::{Copy, Recent, prefetch};
use super::sigbus::{self, Guard};
use super::{Buffers, HostSeg};

const PAGE: u64 = 4096;

/// The kernel takes no more segments at once (UIO_MAXIOV).
const MAX_IOVECS: usize = 1024;

/// A shared mapping of a whole file, whose pages can go at any time: the file is cut by somebody, or its file system is full.
///
/// Touching such a page does not end the process. The mapping is then given up as a whole ([`sigbus`]), and every copy that was under
/// way at that moment or comes later says that it failed, so that its caller goes to the file itself.
pub(crate) struct MappedFile {
    base: *mut u8,
    len: u64,
    mapped: usize,
    into: Copy,
    /// Before the mapping goes, see `Drop`.
    guard: Option<Guard>,
}

// SAFETY: shared memory that is only ever copied to and from.
unsafe impl Send for MappedFile {}
// SAFETY: as above; copies that run at once may tear each other's data, which harms nothing else.
unsafe impl Sync for MappedFile {}

impl MappedFile {
    /// Map the first `len` bytes of `file`, for writing too if `writable` (it must be open for that).
    ///
    /// # Errors
    ///
    /// What the kernel says; too many guarded ranges.
    pub fn new(file: &File, len: u64, writable: bool) -> io::Result<Self> {
        sigbus::install()?;
        let mapped = len
            .max(1)
            .checked_next_multiple_of(PAGE)
            .and_then(|n| usize::try_from(n).ok())
            .filter(|n| isize::try_from(*n).is_ok())
            .ok_or(io::ErrorKind::FileTooLarge)?;
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let mut access = ProtFlags::READ;
        if writable {
            access |= ProtFlags::WRITE;
        }
        // SAFETY: a new shared mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                mapped,
                access,
                MapFlags::SHARED | MapFlags::NORESERVE,
                file,
                0,
            )?
        };
        let mut this = Self {
            base: base.cast(),
            len,
            mapped,
            into: Copy::into_store(len),
            guard: None,
        };
        // SAFETY: the mapping we just made; the advice does not change what it holds.
        let _ = unsafe { rustix::mm::madvise(base, mapped, Advice::LinuxDontDump) };
        // SAFETY: the range is exactly that mapping, which stays until `drop`, where the guard goes first.
        this.guard = Some(unsafe { Guard::new(this.base, mapped, wake)? });
        Ok(this)
    }

    /// Whether a copy can be tried at all.
    pub fn is_whole(&self) -> bool {
        self.guard.as_ref().is_some_and(|g| !g.hit())
    }

    /// `base + offset` if `len` bytes are there.
    #[inline]
    fn at(&self, offset: u64, len: u64) -> Option<*mut u8> {
        let end = offset.checked_add(len)?;
        // Inside the mapping, whose size is a `usize`.
        (end <= self.len && self.is_whole()).then(|| self.base.wrapping_add(offset as usize))
    }

    /// Copy from byte `offset` on into `data`. `false`: what is in `data` now means nothing.
    #[inline]
    #[must_use]
    pub fn read_into(&self, data: &Buffers<'_>, offset: u64, recent: &mut Recent) -> bool {
        let Some(from) = self.at(offset, data.len() as u64) else {
            return false;
        };
        data.each(0, data.len(), |ptr, done, n| {
            // SAFETY: `each` gives `n` bytes of foreign memory that is alive, and `done + n` is at most `data.len()`, which
            // `at` found inside our mapping. The mapping is ours alone, so that the two cannot overlap. Others may copy the
            // same bytes meanwhile: a plain copy of bytes between memories no reference points to, and nothing is
            // decided by them. A page that is missing is replaced by the guard.
            unsafe { recent.way(ptr, n).copy(from.add(done), ptr, n) }
        });
        // First the copy, then the look: the guard marks the range before it replaces it.
        fence(Ordering::Acquire);
        self.is_whole()
    }

    /// Copy `data` to byte `offset` on; the file must be mapped for writing. `false`: it may be there or not.
    #[inline]
    #[must_use]
    pub fn write_from(&self, data: &Buffers<'_>, offset: u64) -> bool {
        let Some(to) = self.at(offset, data.len() as u64) else {
            return false;
        };
        data.each(0, data.len(), |ptr, done, n| {
            // SAFETY: as in `read_into`, the other way.
            unsafe { self.into.copy(ptr, to.add(done), n) }
        });
        // Stores must not be outrun by the look.
        fence(Ordering::SeqCst);
        self.is_whole()
    }
}

impl MappedFile {
    /// Ask for the bytes from `offset` on, which a [`Self::read_into`] will soon copy.
    #[inline]
    pub fn prefetch_read(&self, offset: u64, len: usize) {
        if let Some(from) = self.at(offset, len as u64) {
            prefetch(from, len);
        }
    }

    /// Ask for a guest's bytes, which a [`Self::write_from`] will soon copy.
    #[inline]
    pub fn prefetch_write(&self, first: &HostSeg) {
        prefetch(first.ptr(), first.len());
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        self.guard = None;
        // SAFETY: our own mapping; no reference into it ever existed, `self` is the last to use it, and the guard is gone.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.mapped) };
    }
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Out of the file.
    FromFile,
    /// Into the file.
    ToFile,
}

/// Move bytes between `file` from `offset` on and `data`, in as many system calls as it takes. The number moved: less than `data` has
/// only if the file ends there.
///
/// # Errors
///
/// What the kernel says: ENOSPC, EFAULT, ...
pub(crate) fn transfer(
    file: &File,
    data: &Buffers<'_>,
    offset: u64,
    direction: Direction,
) -> io::Result<usize> {
    let fd = file.as_fd().as_raw_fd();
    let mut done = 0;
    while done < data.len() {
        let (segs, inside) = data.split_at(done);
        let at = libc::off_t::try_from(offset + done as u64)
            .map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
        // One segment, or one that is begun, goes by the call that is cheaper by a tenth.
        // SAFETY: pointers and lengths are those of `data`, alive for its lifetime, into which the kernel may write.
        let moved = unsafe {
            match segs {
                [] => break,
                [first, rest @ ..] if inside > 0 || rest.is_empty() => {
                    let (ptr, len) = first.parts();
                    let (ptr, len) = (ptr.wrapping_add(inside).cast(), len - inside.min(len));
                    match direction {
                        Direction::FromFile => libc::pread(fd, ptr, len, at),
                        Direction::ToFile => libc::pwrite(fd, ptr, len, at),
                    }
                }
                _ => {
                    let vector = segs.as_ptr().cast::<libc::iovec>();
                    let count = segs.len().min(MAX_IOVECS) as libc::c_int;
                    match direction {
                        Direction::FromFile => libc::preadv(fd, vector, count, at),
                        Direction::ToFile => libc::pwritev(fd, vector, count, at),
                    }
                }
            }
        };
        match moved {
            0 => break,
            n if n > 0 => done += n.unsigned_abs(),
            _ => {
                let e = io::Error::last_os_error();
                if e.kind() != io::ErrorKind::Interrupted {
                    return Err(e);
                }
            }
        }
    }
    Ok(done)
}

const _: () = assert!(size_of::<HostSeg>() == size_of::<libc::iovec>());

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    fn file(len: u64) -> File {
        let file = memfd_create("mapped", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, len).unwrap();
        file.into()
    }

    fn with<R>(bytes: &mut [u8], f: impl FnOnce(&Buffers<'_>) -> R) -> R {
        let (a, b) = bytes.split_at_mut(bytes.len() / 3);
        let segs = [HostSeg::of_slice(a), HostSeg::of_slice(b)];
        // SAFETY: both halves outlive the call and are not touched in it.
        f(&unsafe { Buffers::new(&segs) })
    }

    #[test]
    fn the_mapping_and_the_file_are_one() {
        let file = file(20_000);
        let map = MappedFile::new(&file, 20_000, true).unwrap();
        let mut data: Vec<u8> = (0..9000u32).map(|i| i as u8).collect();
        assert!(with(&mut data, |b| map.write_from(b, 11_000)));
        assert!(
            !with(&mut data, |b| map.write_from(b, 11_001)),
            "beyond the end"
        );
        assert!(!with(&mut data, |b| map.read_into(
            b,
            u64::MAX,
            &mut Recent::default()
        )));
        let mut back = vec![0; 9000];
        let from = Direction::FromFile;
        let moved = with(&mut back, |b| transfer(&file, b, 11_000, from));
        assert_eq!((moved.unwrap(), &back), (9000, &data));
        let moved = with(&mut back, |b| transfer(&file, b, 19_000, from));
        assert_eq!(moved.unwrap(), 1000, "the end of the file");
        let moved = with(&mut data, |b| transfer(&file, b, 5, Direction::ToFile));
        assert_eq!(moved.unwrap(), 9000);
        assert!(with(&mut back, |b| map.read_into(
            b,
            5,
            &mut Recent::default()
        )));
        assert_eq!(back, data);
    }

    #[test]
    fn a_page_that_is_gone_is_a_failed_copy_then_and_later() {
        let file = file(20_000);
        let map = MappedFile::new(&file, 20_000, true).unwrap();
        let mut data = vec![1; 5000];
        assert!(with(&mut data, |b| map.write_from(b, 0)));
        ftruncate(&file, 6000).unwrap();
        assert!(!with(&mut data, |b| map.write_from(b, 5000)));
        assert!(!map.is_whole());
        assert!(!with(&mut data, |b| map.read_into(
            b,
            0,
            &mut Recent::default()
        )));
    }
}
