//! Memory a device can reach.
//!
//! A [`Mapping`] is a shared mapping of a file, a [`DmaPool`] gives out pages of one, a [`Dma`] is such a piece. Nobody gets a
//! reference into any of them: they are read and written by copying, or as a [`Ring`](crate::memory::Ring) or
//! [`SharedWord`](crate::memory::SharedWord) over [`Dma::map`].

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

pub use crate::memory::Mapping;
use crate::memory::{GuestMap, Region};

/// Granularity of a [`DmaPool`]: the smallest memory page of NVMe.
pub const PAGE: u64 = 4096;

/// A memfd of `bytes` bytes: memory that can be shared with another process.
///
/// # Errors
///
/// What the kernel says when memory or file descriptors run out.
pub fn shared_memory(name: &str, bytes: u64) -> io::Result<File> {
    let fd = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&fd, bytes)?;
    Ok(fd.into())
}

/// Pages of a region, given out and taken back.
pub struct DmaPool {
    map: Arc<GuestMap>,
    /// Free runs, `(address, bytes)`, by ascending address, never touching.
    free: Mutex<Vec<(u64, u64)>>,
}

impl DmaPool {
    /// A pool of all whole pages of a region.
    ///
    /// # Errors
    ///
    /// The region holds no page, or is no valid region.
    pub fn new(region: Arc<Region>) -> io::Result<Arc<Self>> {
        let start = region.gpa().next_multiple_of(PAGE);
        let end = (region.gpa() + region.len()) & !(PAGE - 1);
        let map = GuestMap::new(vec![region]).map_err(io::Error::other)?;
        if start >= end {
            return Err(io::Error::other("the region holds no whole page"));
        }
        Ok(Arc::new(Self {
            map,
            free: Mutex::new(vec![(start, end - start)]),
        }))
    }

    /// The memory all pieces lie in.
    pub fn map(&self) -> &Arc<GuestMap> {
        &self.map
    }

    /// A zeroed piece of at least `bytes` bytes, rounded up to pages.
    ///
    /// # Errors
    ///
    /// `OutOfMemory` if there is no contiguous piece of that size left.
    pub fn allocate(self: &Arc<Self>, bytes: usize) -> io::Result<Dma> {
        let len = (bytes.max(1) as u64).next_multiple_of(PAGE);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(i) = free.iter().position(|&(_, run)| run >= len) else {
            return Err(io::Error::new(
                io::ErrorKind::OutOfMemory,
                format!("no {len} contiguous bytes of DMA memory left"),
            ));
        };
        let (addr, run) = free[i];
        if run == len {
            free.remove(i);
        } else {
            free[i] = (addr + len, run - len);
        }
        drop(free);
        let dma = Dma {
            pool: Arc::clone(self),
            addr,
            len,
        };
        dma.fill(0);
        Ok(dma)
    }

    fn give_back(&self, addr: u64, len: u64) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let i = free.partition_point(|&(a, _)| a < addr);
        free.insert(i, (addr, len));
        if let Some(&(next, next_len)) = free.get(i + 1)
            && addr + len == next
        {
            free[i].1 += next_len;
            free.remove(i + 1);
        }
        if let Some(before) = i.checked_sub(1)
            && free[before].0 + free[before].1 == addr
        {
            free[before].1 += free[i].1;
            free.remove(i);
        }
    }
}

/// A piece of memory the device can reach: page aligned and contiguous on both sides. It goes back to its pool when dropped; the
/// owner sees to it that no command that is out uses it then.
pub struct Dma {
    pool: Arc<DmaPool>,
    addr: u64,
    len: u64,
}

impl Dma {
    /// The address the device uses.
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Bytes, a multiple of [`PAGE`].
    #[expect(clippy::len_without_is_empty, reason = "there is no empty piece")]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// The memory it lies in, by device addresses.
    pub fn map(&self) -> &Arc<GuestMap> {
        &self.pool.map
    }

    /// Copy out, from byte `offset` on. Bytes beyond the end are left alone.
    pub fn read(&self, offset: usize, dst: &mut [u8]) {
        let n = dst.len().min(self.len().saturating_sub(offset));
        let done = self.map().read(self.addr + offset as u64, &mut dst[..n]);
        debug_assert!(done, "a piece lies in its region");
    }

    /// Copy in, from byte `offset` on. Bytes beyond the end are not copied.
    pub fn write(&self, offset: usize, src: &[u8]) {
        let n = src.len().min(self.len().saturating_sub(offset));
        let done = self.map().write(self.addr + offset as u64, &src[..n]);
        debug_assert!(done, "a piece lies in its region");
    }

    /// Set every byte.
    pub fn fill(&self, byte: u8) {
        let block = [byte; PAGE as usize];
        for offset in (0..self.len()).step_by(block.len()) {
            self.write(offset, &block);
        }
    }

    /// A copy of the first `len` bytes.
    pub fn bytes(&self, len: usize) -> Vec<u8> {
        let mut out = vec![0; len.min(self.len())];
        self.read(0, &mut out);
        out
    }
}

impl Drop for Dma {
    fn drop(&mut self) {
        self.pool.give_back(self.addr, self.len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(pages: u64) -> Arc<DmaPool> {
        let bytes = pages * PAGE;
        let file = shared_memory("pool", bytes).unwrap();
        DmaPool::new(Mapping::map(&file, 0, bytes as usize, 0x10_0000).unwrap()).unwrap()
    }

    #[test]
    fn pieces_are_aligned_zeroed_apart_and_come_back() {
        let pool = pool(8);
        let a = pool.allocate(1).unwrap();
        let b = pool.allocate(4097).unwrap();
        let c = pool.allocate(5 * 4096).unwrap();
        assert_eq!(
            [
                (a.addr(), a.len()),
                (b.addr(), b.len()),
                (c.addr(), c.len())
            ],
            [(0x10_0000, 4096), (0x10_1000, 8192), (0x10_3000, 5 * 4096)]
        );
        assert!(pool.allocate(1).is_err(), "all is out");
        b.write(4090, &[7; 10_000]);
        assert_eq!(c.bytes(4), [0; 4], "a write stays inside its piece");
        drop(b);
        drop(a);
        let again = pool.allocate(3 * 4096).unwrap();
        assert_eq!(again.addr(), 0x10_0000, "neighbours are joined");
        assert!(again.bytes(3 * 4096).iter().all(|b| *b == 0));
        drop((again, c));
        assert_eq!(pool.allocate(8 * 4096).unwrap().len(), 8 * 4096);
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let file = shared_memory("short", 4096).unwrap();
        assert!(Mapping::map(&file, 0, 8192, 0).is_err());
        assert!(Mapping::map(&file, 4096, 1, 0).is_err());
        assert!(Mapping::map(&file, u64::MAX, 4096, 0).is_err());
        assert!(Mapping::map(&file, 0, 0, 0).is_err());
    }
}
