//! The bytes of a namespace that lives in memory, shared by all that serve it.

#![expect(
    unsafe_code,
    reason = "the fence: bytes that others write are compared and zeroed"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::FallocateFlags;

use super::copy::Copier;
use super::crash_point;
use super::mapping::{HUGE_PAGE, Mapping, PAGE, Stored, sealed, whole_pages};
use super::sigbus::{self, Guard};
use super::{Buffers, HostSeg};

/// A mapped file of a fixed size in memory, zero at first.
///
/// Any number of threads use it at once, by copies alone: see [`Stored`]. A file that has a name can be cut, or find no room for a page that
/// is written first: the store is broken from then on, and every access fails.
pub struct Store {
    /// Of a file with a name. Ends before the mapping: fields are dropped in their order.
    guard: Option<Guard>,
    stored: Stored,
    huge: bool,
    file: File,
}

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
        let mapped = whole_pages(len, if huge { HUGE_PAGE } else { PAGE })?;
        let file = sealed("nvme-memory-namespace", mapped, huge)?;
        if !huge && never_overcommits() {
            rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, mapped as u64)?;
        }
        let mapping = Mapping::new(&file, mapped, true)?;
        mapping.advise(true);
        Ok(Self {
            guard: None,
            stored: Stored::new(mapping, len),
            huge,
            file,
        })
    }

    /// A store of `len` bytes over a file of [`Self::bytes_of`] them, on a tmpfs or, if `huge`, a hugetlbfs, with what is in it.
    ///
    /// # Errors
    ///
    /// As [`Self::new`]; the file is too short; too many guarded ranges.
    pub fn over(file: File, len: u64, huge: bool) -> io::Result<Self> {
        sigbus::install()?;
        let mapped = whole_pages(len, if huge { HUGE_PAGE } else { PAGE })?;
        if file.metadata()?.len() < mapped as u64 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if !huge && never_overcommits() {
            rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, mapped as u64)?;
        }
        let mapping = Mapping::new(&file, mapped, true)?;
        mapping.advise(true);
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        // SAFETY: the range is exactly that mapping, which nothing but copies touch, and which stays until after the guard is gone.
        let guard = unsafe { Guard::new(mapping.base(), mapped, wake)? };
        Ok(Self {
            guard: Some(guard),
            stored: Stored::new(mapping, len),
            huge,
            file,
        })
    }

    /// Bytes of the file of a store.
    ///
    /// # Errors
    ///
    /// No address space has that many.
    pub fn bytes_of(len: u64, huge: bool) -> io::Result<u64> {
        whole_pages(len, if huge { HUGE_PAGE } else { PAGE }).map(|n| n as u64)
    }

    /// Whether its file was cut, or had no room: what is stored is lost, and so is what will be.
    #[inline]
    pub fn is_broken(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::hit)
    }

    /// Whether a copy that was `ok` went well. A page that is not there stops the very thread that touches it, which finds the mark afterwards;
    /// what others do at that moment is lost with everything else, so that the order in which they see it does not matter.
    #[inline]
    fn whole_after(&self, ok: bool) -> bool {
        compiler_fence(Ordering::SeqCst);
        ok && !self.is_broken()
    }

    /// Size in bytes, as asked for.
    #[expect(
        clippy::len_without_is_empty,
        reason = "a store has a size, not elements"
    )]
    pub fn len(&self) -> u64 {
        self.stored.len()
    }

    /// Whether it is made of reserved huge pages. They stay with the store: zeroing gives none of them back.
    pub fn is_huge(&self) -> bool {
        self.huge
    }

    /// Bytes of memory it has at the moment.
    pub fn allocated(&self) -> u64 {
        match rustix::fs::fstat(self.file.as_fd()) {
            Ok(stat) => (stat.st_blocks.unsigned_abs().saturating_mul(512)).min(self.len()),
            Err(_) => self.len(),
        }
    }

    /// Copy from byte `offset` on into `data`, all of it. `false`, and nothing done, if that is not inside.
    #[inline]
    #[must_use]
    pub fn read_into(&self, data: &Buffers<'_>, offset: u64, copier: &mut Copier) -> bool {
        self.whole_after(self.stored.read_into(data, offset, copier))
    }

    /// Copy all of `data` to byte `offset` on. `false`, and nothing done, if that is not inside.
    #[inline]
    #[must_use]
    pub fn write_from(&self, data: &Buffers<'_>, offset: u64, copier: &mut Copier) -> bool {
        if !crash_point::store_happens() {
            return true;
        }
        self.whole_after(self.stored.write_from(data, offset, copier))
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

    /// Whether the bytes from `offset` on are those of `data`; `None` if they are not inside.
    pub fn compare(&self, data: &Buffers<'_>, offset: u64) -> Option<bool> {
        let stored = self.stored.at(offset, data.len() as u64)?;
        // Both sides may change while we look, so each is copied once and the copies are compared.
        let mut ours = [0; 1024];
        let mut theirs = [0; 1024];
        let mut done = 0;
        while done < data.len() {
            let n = data.read(done, &mut theirs);
            // SAFETY: `done + n` is at most `data.len()`, so inside the mapping; `ours` has room for 1024 bytes and `n` is
            // at most that. Concurrent writes as in `Stored::read_into`.
            unsafe { std::ptr::copy_nonoverlapping(stored.add(done), ours.as_mut_ptr(), n) };
            if n == 0 || ours[..n] != theirs[..n] {
                return (!self.is_broken()).then_some(false);
            }
            done += n;
        }
        (!self.is_broken()).then_some(true)
    }

    /// Make `len` bytes from `offset` on zero; normal pages that lie in there whole are given back to the system.
    ///
    /// `false`, and nothing done, if that is not inside.
    #[must_use]
    pub fn zero(&self, offset: u64, len: u64) -> bool {
        if self.stored.at(offset, len).is_none() {
            return false;
        }
        if !crash_point::store_happens() {
            return true;
        }
        let end = offset + len;
        let first = offset.next_multiple_of(PAGE);
        // The tail of the last page is beyond `len` and never used: it may go with the rest.
        let last = if end == self.len() {
            self.stored.mapping().bytes() as u64
        } else {
            end - end % PAGE
        };
        if !self.huge && first < last {
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            if rustix::fs::fallocate(&self.file, punch, first, last - first).is_ok() {
                self.fill_zero(offset, first - offset);
                self.fill_zero(last, end.saturating_sub(last));
                return self.whole_after(true);
            }
        }
        self.fill_zero(offset, len);
        self.whole_after(true)
    }

    fn fill_zero(&self, offset: u64, len: u64) {
        if let Some(ptr) = self.stored.at(offset, len) {
            // SAFETY: `at` found it inside; concurrent copies as in `Stored::read_into`.
            unsafe { std::ptr::write_bytes(ptr, 0, len as usize) }
        }
    }
}

#[cfg(test)]
impl Store {
    /// Store bytes; for tests that may not name memory themselves.
    pub(crate) fn put(&self, offset: u64, bytes: &mut [u8]) -> bool {
        let segs = [HostSeg::of_slice(bytes)];
        // SAFETY: the bytes outlive the call and are not touched in it.
        self.write_from(
            &unsafe { Buffers::new(&segs) },
            offset,
            &mut Copier::default(),
        )
    }

    /// Load bytes.
    pub(crate) fn get<const N: usize>(&self, offset: u64) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        let segs = [HostSeg::of_slice(&mut bytes)];
        // SAFETY: as above.
        let data = unsafe { Buffers::new(&segs) };
        let ok = self.read_into(&data, offset, &mut Copier::default());
        ok.then_some(bytes)
    }

    /// Compare bytes.
    pub(crate) fn is(&self, offset: u64, bytes: &mut [u8]) -> Option<bool> {
        let segs = [HostSeg::of_slice(bytes)];
        // SAFETY: as above.
        self.compare(&unsafe { Buffers::new(&segs) }, offset)
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
        let mut copier = Copier::default();
        let store = Store::new(10_000, false).unwrap();
        let mut data: Vec<u8> = (0..9000u32).map(|i| i as u8).collect();
        assert!(with(&mut data, |b| store.write_from(
            b,
            1000,
            &mut Copier::default()
        )));
        assert!(!with(&mut data, |b| store.write_from(
            b,
            1001,
            &mut Copier::default()
        )));
        assert!(!with(&mut data, |b| store.read_into(
            b,
            u64::MAX,
            &mut copier
        )));
        let mut back = vec![0xee; 9000];
        assert!(with(&mut back, |b| store.read_into(b, 1000, &mut copier)));
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
        let mut copier = Copier::default();
        let store = Store::new(64 << 10, false).unwrap();
        let mut data = vec![7; 64 << 10];
        assert!(with(&mut data, |b| store.write_from(
            b,
            0,
            &mut Copier::default()
        )));
        let full = store.allocated();
        assert_eq!(full, 64 << 10);
        assert!(store.zero(100, 40_000));
        assert!(!store.zero(100, 64 << 10));
        assert!(!store.zero(u64::MAX, 2));
        assert!(store.allocated() < full);
        assert!(with(&mut data, |b| store.read_into(b, 0, &mut copier)));
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
