//! The bytes of a namespace that lives in memory, shared by all that serve it.

#![expect(
    unsafe_code,
    reason = "the fence: copies between two memories that others write"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

use super::copy::{Copy, Recent, prefetch};
use super::{Buffers, HostSeg};

const PAGE: u64 = 4096;
const HUGE_PAGE: u64 = 2 << 20;

/// A mapped memfd of a fixed size, zero at first.
///
/// Any number of threads use it at once, without locks, by copies alone: no reference into it ever exists. Two commands
/// that overlap in time and place may tear each other's data, byte by byte, as NVMe allows beyond the atomic write
/// unit: each byte is then one that some command wrote, and nothing else is harmed. A range out of bounds is refused, never a panic.
pub struct Store {
    base: *mut u8,
    /// What was asked for.
    len: u64,
    /// What is mapped: `len` in whole pages.
    mapped: usize,
    huge: bool,
    into: Copy,
    file: File,
}

// SAFETY: shared memory that is only ever copied to and from.
unsafe impl Send for Store {}
// SAFETY: as above; that copies may run at once is the contract of the type.
unsafe impl Sync for Store {}

impl Store {
    /// A store of `len` bytes in pages of 2 MiB if `huge`, else in normal ones.
    ///
    /// Huge pages are reserved here, all of them, so that none can be missing later. Normal pages come when they are written
    /// first, or all at once if the machine does not overcommit: a page that cannot be had later would be a fault, not an error.
    ///
    /// # Errors
    ///
    /// What the kernel says when there is not that much memory or address space, or not as many free huge pages.
    pub fn new(len: u64, huge: bool) -> io::Result<Self> {
        let page = if huge { HUGE_PAGE } else { PAGE };
        let mapped = len
            .max(1)
            .checked_next_multiple_of(page)
            .and_then(|n| usize::try_from(n).ok())
            .filter(|n| isize::try_from(*n).is_ok())
            .ok_or(io::ErrorKind::FileTooLarge)?;
        let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        if huge {
            flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        }
        let fd = rustix::fs::memfd_create("nvme-memory-namespace", flags)?;
        rustix::fs::ftruncate(&fd, mapped as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        if !huge && never_overcommits() {
            rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, mapped as u64)?;
        }
        // SAFETY: a new shared mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                mapped,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &fd,
                0,
            )?
        };
        let store = Self {
            base: base.cast(),
            len,
            mapped,
            huge,
            into: Copy::into_store(len),
            file: fd.into(),
        };
        // Advice only: without it the store works as well.
        for advice in [Advice::LinuxDontDump, Advice::LinuxHugepage] {
            // SAFETY: the mapping we just made; neither advice changes what it holds.
            let _ = unsafe { rustix::mm::madvise(base, mapped, advice) };
        }
        Ok(store)
    }

    /// Size in bytes, as asked for.
    #[expect(
        clippy::len_without_is_empty,
        reason = "a store has a size, not elements"
    )]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it is made of reserved huge pages. They stay with the store: zeroing gives none of them back.
    pub fn is_huge(&self) -> bool {
        self.huge
    }

    /// Bytes of memory it has at the moment.
    pub fn allocated(&self) -> u64 {
        match rustix::fs::fstat(self.file.as_fd()) {
            Ok(stat) => (stat.st_blocks.unsigned_abs().saturating_mul(512)).min(self.len),
            Err(_) => self.len,
        }
    }

    /// `base + offset` if `len` bytes are there.
    #[inline]
    fn at(&self, offset: u64, len: u64) -> Option<*mut u8> {
        let end = offset.checked_add(len)?;
        // Inside the mapping, whose size is a `usize`.
        (end <= self.len).then(|| self.base.wrapping_add(offset as usize))
    }

    /// Copy from byte `offset` on into `data`, all of it. `false`, and nothing done, if that is not inside.
    #[inline]
    #[must_use]
    pub fn read_into(&self, data: &Buffers<'_>, offset: u64, recent: &mut Recent) -> bool {
        let Some(from) = self.at(offset, data.len() as u64) else {
            return false;
        };
        data.each(0, data.len(), |ptr, done, n| {
            // SAFETY: `each` gives `n` bytes of foreign memory that is alive, and `done + n` is at most `data.len()`, which
            // `at` found inside our mapping. The mapping is ours alone, so that the two cannot overlap. Others may copy
            // the same bytes meanwhile: this is a plain copy of bytes (memcpy) between memories no reference
            // points to, any mixture of old and new bytes is a valid outcome, and nothing is decided by them.
            unsafe { recent.way(ptr, n).copy(from.add(done), ptr, n) }
        });
        true
    }

    /// Copy all of `data` to byte `offset` on. `false`, and nothing done, if that is not inside.
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
        true
    }

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

    /// Whether the bytes from `offset` on are those of `data`; `None` if they are not inside.
    pub fn compare(&self, data: &Buffers<'_>, offset: u64) -> Option<bool> {
        let stored = self.at(offset, data.len() as u64)?;
        // Both sides may change while we look, so each is copied once and the copies are compared.
        let mut ours = [0; 1024];
        let mut theirs = [0; 1024];
        let mut done = 0;
        while done < data.len() {
            let n = data.read(done, &mut theirs);
            // SAFETY: `done + n` is at most `data.len()`, so inside the mapping; `ours` has room for 1024 bytes and `n` is
            // at most that. Concurrent writes as in `read_into`.
            unsafe { std::ptr::copy_nonoverlapping(stored.add(done), ours.as_mut_ptr(), n) };
            if n == 0 || ours[..n] != theirs[..n] {
                return Some(false);
            }
            done += n;
        }
        Some(true)
    }

    /// Make `len` bytes from `offset` on zero; normal pages that lie in there whole are given back to the system.
    ///
    /// `false`, and nothing done, if that is not inside.
    #[must_use]
    pub fn zero(&self, offset: u64, len: u64) -> bool {
        if self.at(offset, len).is_none() {
            return false;
        }
        let end = offset + len;
        let first = offset.next_multiple_of(PAGE);
        // The tail of the last page is beyond `len` and never used: it may go with the rest.
        let last = if end == self.len {
            self.mapped as u64
        } else {
            end - end % PAGE
        };
        if !self.huge && first < last {
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            if rustix::fs::fallocate(&self.file, punch, first, last - first).is_ok() {
                self.fill_zero(offset, first - offset);
                self.fill_zero(last, end.saturating_sub(last));
                return true;
            }
        }
        self.fill_zero(offset, len);
        true
    }

    fn fill_zero(&self, offset: u64, len: u64) {
        if let Some(ptr) = self.at(offset, len) {
            // SAFETY: `at` found it inside; concurrent copies as in `read_into`.
            unsafe { std::ptr::write_bytes(ptr, 0, len as usize) }
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: our own mapping; no reference into it ever existed, and `self` is the last to use it.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.mapped) };
    }
}

/// Whether the kernel promises only memory it has (`vm.overcommit_memory = 2`).
fn never_overcommits() -> bool {
    std::fs::read_to_string("/proc/sys/vm/overcommit_memory").is_ok_and(|s| s.trim() == "2")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with<R>(bytes: &mut [u8], f: impl FnOnce(&Buffers<'_>) -> R) -> R {
        let (a, b) = bytes.split_at_mut(bytes.len() / 3);
        let segs = [HostSeg::of_slice(a), HostSeg::of_slice(b)];
        // SAFETY: both halves outlive the call and are not touched in it.
        f(&unsafe { Buffers::new(&segs) })
    }

    #[test]
    fn bytes_come_back_and_bounds_hold() {
        let mut recent = Recent::default();
        let store = Store::new(10_000, false).unwrap();
        let mut data: Vec<u8> = (0..9000u32).map(|i| i as u8).collect();
        assert!(with(&mut data, |b| store.write_from(b, 1000)));
        assert!(!with(&mut data, |b| store.write_from(b, 1001)));
        assert!(!with(&mut data, |b| store.read_into(
            b,
            u64::MAX,
            &mut recent
        )));
        let mut back = vec![0xee; 9000];
        assert!(with(&mut back, |b| store.read_into(b, 1000, &mut recent)));
        assert_eq!(back, data);
        assert_eq!(with(&mut data, |b| store.compare(b, 1000)), Some(true));
        assert_eq!(with(&mut data, |b| store.compare(b, 1001)), None);
        for at in [0, 2999, 3000, 8999] {
            data[at] ^= 1;
            assert_eq!(with(&mut data, |b| store.compare(b, 1000)), Some(false));
            data[at] ^= 1;
        }
    }

    #[test]
    fn zeroing_frees_whole_pages_and_only_what_was_asked() {
        let mut recent = Recent::default();
        let store = Store::new(64 << 10, false).unwrap();
        let mut data = vec![7; 64 << 10];
        assert!(with(&mut data, |b| store.write_from(b, 0)));
        let full = store.allocated();
        assert_eq!(full, 64 << 10);
        assert!(store.zero(100, 40_000));
        assert!(!store.zero(100, 64 << 10));
        assert!(!store.zero(u64::MAX, 2));
        assert!(store.allocated() < full);
        assert!(with(&mut data, |b| store.read_into(b, 0, &mut recent)));
        let zero = |i: usize| (100..40_100).contains(&i);
        assert!(
            data.iter()
                .enumerate()
                .all(|(i, b)| *b == if zero(i) { 0 } else { 7 })
        );
    }

    #[test]
    fn a_size_nobody_has_is_an_error() {
        assert!(Store::new(u64::MAX, false).is_err());
        assert!(Store::new(1 << 62, false).is_err());
        assert!(Store::new(1 << 62, true).is_err());
    }
}
