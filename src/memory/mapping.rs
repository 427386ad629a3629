//! Shared mappings: made, kept for as long as they are used, and copied to and from.

#![expect(
    unsafe_code,
    reason = "the fence: mappings that others write, and copies between them and foreign memory"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::copy::{Copier, Copy};
use super::{Buffers, HostSeg, Region};

/// Size of a normal page.
pub(super) const PAGE: u64 = 4096;
/// Size of a huge page.
pub(super) const HUGE_PAGE: u64 = 2 << 20;

/// A new file in memory, zero, of a size that nobody can change from now on: who else has it cannot cut it and fault us.
///
/// # Errors
///
/// What the kernel says when memory or file descriptors run out.
pub(super) fn sealed(name: &str, bytes: usize, huge: bool) -> io::Result<File> {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if huge {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let fd = rustix::fs::memfd_create(name, flags)?;
    rustix::fs::ftruncate(&fd, bytes as u64)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd.into())
}

/// `len` bytes in whole pages of this size: what has to be mapped for them.
///
/// # Errors
///
/// No address space has that many.
pub(super) fn whole_pages(len: u64, page: u64) -> io::Result<usize> {
    len.max(1)
        .checked_next_multiple_of(page)
        .and_then(|n| usize::try_from(n).ok())
        .filter(|n| isize::try_from(*n).is_ok())
        .ok_or(io::ErrorKind::FileTooLarge.into())
}

/// A shared mapping of a part of a file. It ends with the value.
pub struct Mapping {
    base: *mut u8,
    bytes: usize,
}

// SAFETY: an address range; what may be done with it is said where pointers into it are used.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Map the first `bytes` bytes, for writing too if `writable`.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub(super) fn new(file: &impl AsFd, bytes: usize, writable: bool) -> io::Result<Self> {
        Self::with(file, 0, bytes, writable, MapFlags::SHARED)
    }

    /// Map `bytes` bytes from `offset` on (both multiples of the page size), for writing too.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub(crate) fn part(file: &impl AsFd, offset: u64, bytes: usize) -> io::Result<Self> {
        Self::with(file, offset, bytes, true, MapFlags::SHARED)
    }

    /// Map `bytes` bytes of a file from `offset` (a multiple of the page size) on, and show them at `address` of a
    /// [`GuestMap`](super::GuestMap).
    ///
    /// # Errors
    ///
    /// The file is shorter than that, or what the kernel says.
    pub fn map(
        file: &impl AsFd,
        offset: u64,
        bytes: usize,
        address: u64,
    ) -> io::Result<Arc<Region>> {
        let size = u64::try_from(rustix::fs::fstat(file)?.st_size).unwrap_or(0);
        let end = offset.checked_add(bytes as u64);
        if bytes == 0 || end.is_none_or(|end| end > size) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "the file is shorter than the mapping",
            ));
        }
        let owner = Arc::new(Self::part(file, offset, bytes)?);
        let base = owner.base;
        // SAFETY: the mapping is readable, writable and shared, it stays until `owner` is dropped, and nobody has or gets a
        // reference into it.
        Ok(Arc::new(unsafe {
            Region::new(address, bytes as u64, base, owner)
        }))
    }

    /// As [`Self::new`], but no memory is set aside for what was not written yet.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub(super) fn unreserved(file: &impl AsFd, bytes: usize, writable: bool) -> io::Result<Self> {
        Self::with(
            file,
            0,
            bytes,
            writable,
            MapFlags::SHARED | MapFlags::NORESERVE,
        )
    }

    fn with(
        file: &impl AsFd,
        offset: u64,
        bytes: usize,
        writable: bool,
        flags: MapFlags,
    ) -> io::Result<Self> {
        let mut access = ProtFlags::READ;
        if writable {
            access |= ProtFlags::WRITE;
        }
        // SAFETY: a new shared mapping at an address of the kernel's choice touches nothing that exists.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, access, flags, file, offset)? };
        Ok(Self {
            base: base.cast(),
            bytes,
        })
    }

    /// Put the file's bytes back in place after something else was put there (by the SIGBUS guard).
    ///
    /// # Errors
    ///
    /// What the kernel says; what is there stays.
    pub fn again(&self, file: &impl AsFd) -> io::Result<()> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: exactly the range of our own mapping, replaced at once by one of the same size and access; nothing but copies and
        // atomics touch it, for which any bytes will do.
        unsafe { rustix::mm::mmap(self.base.cast(), self.bytes, access, flags, file, 0)? };
        Ok(())
    }

    /// Where it begins: aligned to a page, valid for [`Self::bytes`] for as long as `self` lives.
    #[inline]
    pub(crate) fn base(&self) -> *mut u8 {
        self.base
    }

    /// Bytes that are mapped.
    #[inline]
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Keep it out of core dumps and, if `huge`, in huge pages where there are any. Only a wish.
    pub(super) fn advise(&self, huge: bool) {
        let advice = [Advice::LinuxDontDump, Advice::LinuxHugepage];
        for advice in advice.into_iter().take(1 + usize::from(huge)) {
            // SAFETY: our own mapping; neither advice changes what it holds.
            let _ = unsafe { rustix::mm::madvise(self.base.cast(), self.bytes, advice) };
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping; whoever made pointers into it sees to it that they are used no longer than `self` is there.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.bytes) };
    }
}

/// The stored bytes of a namespace that are mapped here.
///
/// Any number of threads use them at once, without locks, by copies alone: no reference into them ever exists. Two commands
/// that overlap in time and place may tear each other's data, byte by byte, as NVMe allows beyond the atomic write unit: each byte
/// is then one that some command wrote, and nothing else is harmed. A range out of bounds is refused, never a panic.
pub(super) struct Stored {
    mapping: Mapping,
    /// Of the namespace; more may be mapped.
    len: u64,
    into: Copy,
}

impl Stored {
    /// The first `len` bytes of a mapping, which has as many.
    pub fn new(mapping: Mapping, len: u64) -> Self {
        Self {
            len: len.min(mapping.bytes() as u64),
            mapping,
            into: Copy::into_store(len),
        }
    }

    /// Size in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// What they lie in.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// `base + offset` if `len` bytes are there.
    #[inline]
    pub fn at(&self, offset: u64, len: u64) -> Option<*mut u8> {
        let end = offset.checked_add(len)?;
        // Inside the mapping, whose size is a `usize`.
        (end <= self.len).then(|| self.mapping.base().wrapping_add(offset as usize))
    }

    /// Copy from byte `offset` on into `data`, all of it. `false`, and nothing done, if that is not inside.
    #[inline]
    #[must_use]
    pub fn read_into(&self, data: &Buffers<'_>, offset: u64, copier: &mut Copier) -> bool {
        let Some(from) = self.at(offset, data.len() as u64) else {
            return false;
        };
        data.each(0, data.len(), |ptr, done, n| {
            let way = copier.way(ptr, n);
            // SAFETY: `each` gives `n` bytes of foreign memory that is alive, and `done + n` is at most `data.len()`, which
            // `at` found inside our mapping. The mapping is ours alone, so that the two cannot overlap. Others may copy
            // the same bytes meanwhile: this is a plain copy of bytes (memcpy) between memories no reference
            // points to, any mixture of old and new bytes is a valid outcome, and nothing is decided by them.
            unsafe { copier.copy(way, from.add(done), ptr, n) }
        });
        true
    }

    /// Copy all of `data` to byte `offset` on; mapped for writing. `false`, and nothing done, if that is not inside.
    #[inline]
    #[must_use]
    pub fn write_from(&self, data: &Buffers<'_>, offset: u64, copier: &mut Copier) -> bool {
        let Some(to) = self.at(offset, data.len() as u64) else {
            return false;
        };
        data.each(0, data.len(), |ptr, done, n| {
            // SAFETY: as in `read_into`, the other way.
            unsafe { copier.copy(self.into, ptr, to.add(done), n) }
        });
        true
    }

    /// Ask for the bytes from `offset` on, which a [`Self::read_into`] will soon copy.
    #[inline]
    pub fn prefetch_read(&self, offset: u64, len: usize, copier: &mut Copier) {
        if let Some(from) = self.at(offset, len as u64) {
            copier.expect(from, len);
        }
    }

    /// Ask for a guest's bytes, which a [`Self::write_from`] will soon copy.
    #[inline]
    pub fn prefetch_write(first: &HostSeg, copier: &mut Copier) {
        copier.expect(first.ptr(), first.len());
    }
}
