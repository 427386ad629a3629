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

use super::copy::Copier;
use super::mapping::{Mapping, PAGE, Stored, whole_pages};
use super::sigbus::{self, Guard};
use super::{Buffers, HostSeg};

/// The kernel takes no more segments at once (UIO_MAXIOV).
const MAX_IOVECS: usize = 1024;

/// A shared mapping of a whole file, whose pages can go at any time: the file is cut by somebody, or its file system is full.
///
/// Touching such a page does not end the process. The mapping is then given up as a whole ([`sigbus`]), and every copy that was under
/// way at that moment or comes later says that it failed, so that its caller goes to the file itself.
pub(crate) struct MappedFile {
    /// Ends before the mapping it guards: fields are dropped in their order.
    guard: Guard,
    stored: Stored,
}

impl MappedFile {
    /// Map the first `len` bytes of `file`, for writing too if `writable` (it must be open for that).
    ///
    /// # Errors
    ///
    /// What the kernel says; too many guarded ranges.
    pub fn new(file: &File, len: u64, writable: bool) -> io::Result<Self> {
        sigbus::install()?;
        let mapped = whole_pages(len, PAGE)?;
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let mapping = Mapping::unreserved(file, mapped, writable)?;
        mapping.advise(false);
        Ok(Self {
            // SAFETY: the range is exactly that mapping, which stays until after the guard is gone.
            guard: unsafe { Guard::new(mapping.base(), mapped, wake)? },
            stored: Stored::new(mapping, len),
        })
    }

    /// Whether a copy can be tried at all.
    pub fn is_whole(&self) -> bool {
        !self.guard.hit()
    }

    /// Copy from byte `offset` on into `data`. `false`: what is in `data` now means nothing.
    #[inline]
    #[must_use]
    pub fn read_into(&self, data: &Buffers<'_>, offset: u64, copier: &mut Copier) -> bool {
        if !self.is_whole() || !self.stored.read_into(data, offset, copier) {
            return false;
        }
        // First the copy, then the look: the guard marks the range before it replaces it.
        fence(Ordering::Acquire);
        self.is_whole()
    }

    /// Copy `data` to byte `offset` on; the file must be mapped for writing. `false`: it may be there or not.
    #[inline]
    #[must_use]
    pub fn write_from(&self, data: &Buffers<'_>, offset: u64, copier: &mut Copier) -> bool {
        if !self.is_whole() || !self.stored.write_from(data, offset, copier) {
            return false;
        }
        // Stores must not be outrun by the look.
        fence(Ordering::SeqCst);
        self.is_whole()
    }

    /// Ask for the bytes from `offset` on, which a [`Self::read_into`] will soon copy.
    #[inline]
    pub fn prefetch_read(&self, offset: u64, len: usize, copier: &mut Copier) {
        self.stored.prefetch_read(offset, len, copier);
    }

    /// Ask for a guest's bytes, which a [`Self::write_from`] will soon copy.
    #[inline]
    pub fn prefetch_write(&self, first: &HostSeg, copier: &mut Copier) {
        Stored::prefetch_write(first, copier);
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

    fn write_from(map: &MappedFile, bytes: &mut [u8], offset: u64) -> bool {
        with(bytes, |b| map.write_from(b, offset, &mut Copier::default()))
    }

    fn read_into(map: &MappedFile, bytes: &mut [u8], offset: u64) -> bool {
        with(bytes, |b| map.read_into(b, offset, &mut Copier::default()))
    }

    #[test]
    fn the_mapping_and_the_file_are_one() {
        let file = file(20_000);
        let map = MappedFile::new(&file, 20_000, true).unwrap();
        let mut data: Vec<u8> = (0..9000u32).map(|i| i as u8).collect();
        assert!(write_from(&map, &mut data, 11_000));
        assert!(!write_from(&map, &mut data, 11_001), "beyond the end");
        assert!(!read_into(&map, &mut data, u64::MAX));
        let mut back = vec![0; 9000];
        let from = Direction::FromFile;
        let moved = with(&mut back, |b| transfer(&file, b, 11_000, from));
        assert_eq!((moved.unwrap(), &back), (9000, &data));
        let moved = with(&mut back, |b| transfer(&file, b, 19_000, from));
        assert_eq!(moved.unwrap(), 1000, "the end of the file");
        let moved = with(&mut data, |b| transfer(&file, b, 5, Direction::ToFile));
        assert_eq!(moved.unwrap(), 9000);
        assert!(read_into(&map, &mut back, 5));
        assert_eq!(back, data);
    }

    #[test]
    fn a_page_that_is_gone_is_a_failed_copy_then_and_later() {
        let file = file(20_000);
        let map = MappedFile::new(&file, 20_000, true).unwrap();
        let mut data = vec![1; 5000];
        assert!(write_from(&map, &mut data, 0));
        ftruncate(&file, 6000).unwrap();
        assert!(!write_from(&map, &mut data, 5000));
        assert!(!map.is_whole());
        assert!(!read_into(&map, &mut data, 0));
    }
}
