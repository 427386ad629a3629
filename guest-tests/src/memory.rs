//! The virtual guest's physical memory: memfds, shared with the daemon.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vhost_user_nvme::driver::dma::{Dma, DmaPool, Mapping, shared_memory};
use vhost_user_nvme::memory::GuestMap;

/// One region: a memfd at a guest physical address.
pub struct MemoryRegion {
    /// Guest physical address.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// The memory.
    pub file: File,
    pool: Arc<DmaPool>,
}

impl MemoryRegion {
    /// Fresh memory.
    ///
    /// # Errors
    ///
    /// What the kernel says when memory runs out.
    pub fn new(gpa: u64, len: u64) -> io::Result<Arc<Self>> {
        Self::over(shared_memory("guest-memory", len)?, gpa, len)
    }

    /// The first `len` bytes of a file that can be shared: a memfd, of any pages.
    ///
    /// # Errors
    ///
    /// What the kernel says when it cannot be mapped.
    pub fn over(file: File, gpa: u64, len: u64) -> io::Result<Arc<Self>> {
        let bytes = usize::try_from(len).map_err(io::Error::other)?;
        let pool = DmaPool::new(Mapping::map(&file, 0, bytes, gpa)?)?;
        Ok(Arc::new(Self {
            gpa,
            len,
            file,
            pool,
        }))
    }

    /// Zeroed pages of this region.
    ///
    /// # Errors
    ///
    /// There is no contiguous piece of that size.
    pub fn allocate(&self, bytes: usize) -> io::Result<Dma> {
        self.pool.allocate(bytes)
    }

    /// The region alone, by guest physical addresses.
    pub fn map(&self) -> &Arc<GuestMap> {
        self.pool.map()
    }
}

/// All regions.
#[derive(Default)]
pub struct GuestMemory {
    regions: Mutex<Vec<Arc<MemoryRegion>>>,
}

impl GuestMemory {
    /// Add a region.
    pub fn add(&self, region: Arc<MemoryRegion>) {
        self.lock().push(region);
    }

    /// Take a region away.
    pub fn remove(&self, gpa: u64) -> Option<Arc<MemoryRegion>> {
        let mut regions = self.lock();
        let at = regions.iter().position(|r| r.gpa == gpa)?;
        Some(regions.remove(at))
    }

    /// The regions there are.
    pub fn regions(&self) -> Vec<Arc<MemoryRegion>> {
        self.lock().clone()
    }

    /// Pages from whatever region has them; a region that is asked for first is used up first.
    ///
    /// # Errors
    ///
    /// No region has a contiguous piece of that size.
    pub fn allocate(&self, bytes: usize) -> io::Result<Dma> {
        let mut last = io::Error::from(io::ErrorKind::OutOfMemory);
        for region in self.regions() {
            match region.allocate(bytes) {
                Ok(dma) => return Ok(dma),
                Err(e) => last = e,
            }
        }
        Err(last)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Arc<MemoryRegion>>> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
