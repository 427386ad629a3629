//! Files whose data is memory (tmpfs, ramfs): I/O is a copy, done at once, and needs no ring.
//!
//! io_uring hands every request on such a file to a worker thread, since these file systems cannot say that they will not block. Here
//! a page that is known to be there is copied through a mapping, without a system call; anything else goes by `pread` and
//! `pwrite`, which read a hole without filling it and answer a full file system with an error. See ADR 7.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::SeekFrom;

use crate::backend::Operation;
use crate::memory::{Buffers, Copier, Direction, HostSeg, MappedFile, transfer};

const PAGE_SHIFT: u32 = 12;

/// Larger files are not mapped: what is remembered about their pages would itself be large.
const MAX_MAPPED: u64 = 1 << 40;

/// How many pages of one read are looked up at most; the others are when they are read again.
const MAX_LOOKS: usize = 16;

/// Ranges up to this size are zeroed or freed while the caller waits.
pub(super) const MAX_AT_ONCE: u64 = 2 << 20;

const TMPFS_MAGIC: u64 = 0x0102_1994;
const RAMFS_MAGIC: u64 = 0x8584_58f6;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// What a file lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Medium {
    /// Something that has to be waited for.
    Disk,
    /// The page cache, and nothing below it.
    Memory,
    /// Huge pages, which know no `write`.
    HugePages,
}

impl Medium {
    /// Of an open file.
    pub fn of(file: &File) -> Self {
        // The field's type differs between architectures; magic numbers have 32 bits.
        match rustix::fs::fstatfs(file).map(|s| u64::from(s.f_type as u32)) {
            Ok(TMPFS_MAGIC | RAMFS_MAGIC) => Self::Memory,
            Ok(HUGETLBFS_MAGIC) => Self::HugePages,
            _ => Self::Disk,
        }
    }
}

/// One bit for each page of a file, set and cleared by any thread.
struct Bits(Box<[AtomicU64]>);

impl Bits {
    fn new(pages: u64) -> Self {
        Self((0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    /// The words of a range of pages, and which of their bits are in it.
    fn words(&self, pages: Range<u64>) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let (first, last) = (pages.start / 64, pages.end.div_ceil(64));
        (first..last).filter_map(move |word| {
            let base = word * 64;
            let low = pages.start.saturating_sub(base).min(63);
            let high = (pages.end - base).min(64);
            let mask = (u64::MAX >> (64 - high)) & (u64::MAX << low);
            Some((self.0.get(word as usize)?, mask))
        })
    }

    fn all(&self, pages: Range<u64>) -> bool {
        self.words(pages)
            .all(|(word, mask)| word.load(Ordering::Relaxed) & mask == mask)
    }

    fn set(&self, pages: Range<u64>) {
        for (word, mask) in self.words(pages) {
            if word.load(Ordering::Relaxed) & mask != mask {
                word.fetch_or(mask, Ordering::Relaxed);
            }
        }
    }

    fn clear(&self, pages: Range<u64>) {
        for (word, mask) in self.words(pages) {
            if word.load(Ordering::Relaxed) & mask != 0 {
                word.fetch_and(!mask, Ordering::Relaxed);
            }
        }
    }
}

/// What is known about the pages of a mapped file. None of it has to be true: a page that is not there any more is found out by the
/// mapping's guard, and one that is taken for a hole is read all the same.
struct Mapping {
    map: MappedFile,
    /// It was there.
    there: Bits,
    /// It was not, so there is no point in asking.
    hole: Bits,
    /// How many there are.
    pages: u64,
}

/// The I/O of a file that is memory.
pub(super) struct Resident {
    mapping: Option<Mapping>,
}

impl Resident {
    /// For a file of `len` bytes. What cannot be mapped is served by system calls.
    pub fn new(file: &File, len: u64, writable: bool) -> Self {
        let mapping = (len <= MAX_MAPPED).then(|| MappedFile::new(file, len, writable));
        let mapping = match mapping {
            None => None,
            Some(Ok(map)) => {
                let pages = len.div_ceil(1 << PAGE_SHIFT);
                Some(Mapping {
                    map,
                    there: Bits::new(pages),
                    hole: Bits::new(pages),
                    pages,
                })
            }
            Some(Err(cause)) => {
                tracing::info!(%cause, "a file in memory cannot be mapped, which makes its I/O slower");
                None
            }
        };
        Self { mapping }
    }

    /// Whether pages are copied without a system call.
    pub fn is_mapped(&self) -> bool {
        self.mapping.as_ref().is_some_and(|m| m.map.is_whole())
    }

    /// Fill `data` from the bytes from `offset` on; the number filled.
    ///
    /// # Errors
    ///
    /// As `preadv`.
    #[inline]
    pub fn read(
        &self,
        file: &File,
        data: &Buffers<'_>,
        offset: u64,
        copier: &mut Copier,
    ) -> io::Result<usize> {
        let pages = pages(offset, data.len());
        let mapping = self.mapping.as_ref();
        if let Some(m) = mapping
            && m.there.all(pages.clone())
            && m.map.read_into(data, offset, copier)
        {
            return Ok(data.len());
        }
        let n = transfer(file, data, offset, Direction::FromFile)?;
        if let Some(m) = mapping
            && m.map.is_whole()
        {
            m.look(file, pages);
        }
        Ok(n)
    }

    /// Store `data` from `offset` on; the number of bytes stored.
    ///
    /// # Errors
    ///
    /// As `pwritev`.
    #[inline]
    pub fn write(
        &self,
        file: &File,
        data: &Buffers<'_>,
        offset: u64,
        copier: &mut Copier,
    ) -> io::Result<usize> {
        let pages = pages(offset, data.len());
        let mapping = self.mapping.as_ref();
        if let Some(m) = mapping
            && m.there.all(pages.clone())
            && m.map.write_from(data, offset, copier)
        {
            return Ok(data.len());
        }
        let n = transfer(file, data, offset, Direction::ToFile)?;
        if let Some(m) = mapping
            && n == data.len()
        {
            m.there.set(pages);
        }
        Ok(n)
    }

    /// A request like this comes next.
    #[inline]
    pub fn prefetch(
        &self,
        operation: Operation,
        offset: u64,
        memory: &[HostSeg],
        copier: &mut Copier,
    ) {
        let (Some(m), Some(first)) = (&self.mapping, memory.first()) else {
            return;
        };
        match operation {
            Operation::Read => m.map.prefetch_read(offset, first.len(), copier),
            Operation::Write { .. } => m.map.prefetch_write(first, copier),
            _ => {}
        }
    }

    /// Pages of this range are about to go, or went.
    pub fn forget(&self, bytes: Range<u64>) {
        if let Some(m) = &self.mapping {
            let pages = bytes.start >> PAGE_SHIFT..bytes.end.div_ceil(1 << PAGE_SHIFT);
            m.there.clear(pages.clone());
            m.hole.clear(pages);
        }
    }
}

impl Mapping {
    /// Find out which of these pages are there.
    #[cold]
    fn look(&self, file: &File, pages: Range<u64>) {
        let mut looks = 0;
        for page in pages {
            let one = page..page + 1;
            if self.there.all(one.clone()) || self.hole.all(one.clone()) {
                continue;
            }
            if looks == MAX_LOOKS {
                return;
            }
            looks += 1;
            let at = page << PAGE_SHIFT;
            // The kernel walks over all of a hole to find its end (in a file whose pages were allocated and never written, over every
            // page): what it found out is kept, so that each hole is walked once, not once for each of its pages.
            match rustix::fs::seek(file, SeekFrom::Data(at)) {
                Ok(data) if data < at + (1 << PAGE_SHIFT) => self.there.set(one),
                Ok(data) => self.hole.set(page..data >> PAGE_SHIFT),
                Err(_) => self.hole.set(page..self.pages),
            }
        }
    }
}

/// The pages that hold `len` bytes from `offset` on. Both were checked against the size of the file.
#[inline]
fn pages(offset: u64, len: usize) -> Range<u64> {
    offset >> PAGE_SHIFT..(offset + len as u64).div_ceil(1 << PAGE_SHIFT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_those_of_the_range() {
        let bits = Bits::new(200);
        for range in [0..1, 63..65, 5..64, 64..128, 1..200, 199..200] {
            bits.set(range.clone());
            assert!(bits.all(range.clone()), "{range:?}");
            for outside in [range.start.wrapping_sub(1), range.end] {
                assert!(outside >= 200 || !bits.all(outside..outside + 1));
            }
            bits.clear(range);
            assert!((0..200).all(|i| !bits.all(i..i + 1)));
        }
        bits.set(190..10_000);
        assert!(bits.all(190..200), "no panic beyond the end");
    }

    fn file(len: u64) -> File {
        let dir = std::path::Path::new("/dev/shm");
        let file = tempfile::tempfile_in(dir).unwrap();
        file.set_len(len).unwrap();
        file
    }

    fn with<R>(bytes: &mut [u8], f: impl FnOnce(&Buffers<'_>) -> R) -> R {
        let segs = [HostSeg::of_slice(bytes)];
        // SAFETY: the bytes outlive the call and are not touched in it.
        f(&unsafe { Buffers::new(&segs) })
    }

    fn read(r: &Resident, file: &File, into: &mut [u8], offset: u64) -> io::Result<usize> {
        with(into, |b| r.read(file, b, offset, &mut Copier::default()))
    }

    fn write(r: &Resident, file: &File, from: &mut [u8], offset: u64) -> io::Result<usize> {
        with(from, |b| r.write(file, b, offset, &mut Copier::default()))
    }

    fn allocated(file: &File) -> u64 {
        use std::os::unix::fs::MetadataExt;
        file.metadata().unwrap().blocks() * 512
    }

    #[test]
    fn a_hole_is_walked_once() {
        let file = file(8 << 20);
        let all = rustix::fs::FallocateFlags::empty();
        rustix::fs::fallocate(&file, all, 0, 8 << 20).unwrap();
        let r = Resident::new(&file, 8 << 20, true);
        let m = r.mapping.as_ref().unwrap();
        let mut data = vec![7; 4096];
        let at = 1000 << 12;
        assert_eq!(write(&r, &file, &mut data, at).unwrap(), 4096);
        let mut read_page = |page: u64| read(&r, &file, &mut data, page << 12).unwrap();
        assert_eq!(read_page(5), 4096);
        assert!(m.hole.all(5..1000) && !m.hole.all(4..5) && !m.hole.all(1000..1001));
        assert!(m.there.all(1000..1001));
        assert_eq!(read_page(1500), 4096);
        assert!(m.hole.all(1500..2048) && !m.hole.all(1499..1500));
    }

    #[test]
    fn holes_stay_holes_and_pages_that_are_there_are_mapped() {
        let file = file(1 << 20);
        assert_eq!(Medium::of(&file), Medium::Memory);
        let r = Resident::new(&file, 1 << 20, true);
        let m = r.mapping.as_ref().unwrap();
        let mut data = vec![7; 8192];
        for _ in 0..2 {
            assert_eq!(read(&r, &file, &mut data, 4096).unwrap(), 8192);
            assert!(data.iter().all(|b| *b == 0));
        }
        assert_eq!(allocated(&file), 0);
        assert!(m.hole.all(1..3) && !m.there.all(1..2));
        data.fill(9);
        assert_eq!(write(&r, &file, &mut data, 4096).unwrap(), 8192);
        assert!(m.there.all(1..3));
        data.fill(0);
        assert_eq!(read(&r, &file, &mut data, 6144).unwrap(), 8192);
        assert_eq!((data[6143], data[6144]), (9, 0));
        // What others wrote is seen, as a page that was there or as one that was a hole.
        std::os::unix::fs::FileExt::write_all_at(&file, &[5; 12288], 4096).unwrap();
        assert_eq!(read(&r, &file, &mut data, 8192).unwrap(), 8192);
        assert!(data.iter().all(|b| *b == 5));
        r.forget(4096..12288);
        assert!(!m.there.all(1..2));
    }

    #[test]
    fn a_file_cut_short_is_seen_by_the_call_that_follows() {
        let file = file(1 << 20);
        let r = Resident::new(&file, 1 << 20, true);
        let mut data = vec![1; 1 << 20];
        assert_eq!(write(&r, &file, &mut data, 0).unwrap(), 1 << 20);
        file.set_len(8192).unwrap();
        assert_eq!(read(&r, &file, &mut data, 0).unwrap(), 8192);
        assert!(!r.is_mapped());
        let mut data = vec![2; 8192];
        assert_eq!(write(&r, &file, &mut data, 8192).unwrap(), 8192);
        assert_eq!(file.metadata().unwrap().len(), 16384);
        assert_eq!(read(&r, &file, &mut data, 4096).unwrap(), 8192);
        assert_eq!((data[0], data[4096]), (1, 2));
    }
}
