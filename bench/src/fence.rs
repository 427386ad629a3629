//! The guest's memory as the load generator uses it: one shared mapping, rings in it, and the time stamp counter.

#![expect(
    unsafe_code,
    reason = "the fence: a shared mapping, whole entries in it, rdtsc"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::MemfdFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags};

const HUGE_PAGE: usize = 2 << 20;

/// The time stamp counter: ticks of a constant rate on every machine this is for.
#[inline]
pub fn ticks() -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: every x86-64 processor has the instruction, and it touches no memory.
        unsafe { std::arch::x86_64::_rdtsc() }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        use std::sync::OnceLock;
        use std::time::Instant;
        static START: OnceLock<Instant> = OnceLock::new();
        START.get_or_init(Instant::now).elapsed().as_nanos() as u64
    }
}

/// Memory of the guest: a memfd, mapped here for good.
pub struct Ram {
    base: *mut u8,
    bytes: usize,
    file: File,
    huge: bool,
}

// SAFETY: accessed by copies of whole entries and by atomics only.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Ram {
    /// At least `bytes` bytes, all present: huge pages if as many are free, else normal ones, with the advice to make them
    /// transparent huge pages.
    ///
    /// # Errors
    ///
    /// What the kernel says when memory runs out.
    pub fn new(bytes: usize) -> io::Result<Arc<Self>> {
        let bytes = bytes.max(1).next_multiple_of(HUGE_PAGE);
        let ram = match Self::of(bytes, true) {
            Ok(ram) => ram,
            Err(_) => Self::of(bytes, false)?,
        };
        Ok(Arc::new(ram))
    }

    fn of(bytes: usize, huge: bool) -> io::Result<Self> {
        let mut flags = MemfdFlags::CLOEXEC;
        if huge {
            flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        }
        let file = rustix::fs::memfd_create("polled-guest", flags)?;
        rustix::fs::ftruncate(&file, bytes as u64)?;
        // SAFETY: a new shared mapping at an address of the kernel's choice touches nothing that exists. Huge pages are
        // reserved by it, so that none can be missing later.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )?
        };
        let ram = Self {
            base: base.cast(),
            bytes,
            file: file.into(),
            huge,
        };
        if !huge {
            // SAFETY: the mapping we just made; the advice does not change what it holds.
            let _ = unsafe { rustix::mm::madvise(base, bytes, Advice::LinuxHugepage) };
        }
        for page in (0..bytes).step_by(4096) {
            // SAFETY: inside the mapping, and aligned; nobody else has it yet.
            unsafe { ram.base.add(page).cast::<u64>().write_volatile(0) };
        }
        Ok(ram)
    }

    /// Bytes there are.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Another handle to the file, for the front-end.
    ///
    /// # Errors
    ///
    /// File descriptors ran out.
    pub fn file(&self) -> io::Result<File> {
        Ok(self.file.as_fd().try_clone_to_owned()?.into())
    }

    /// What it is made of, in words.
    pub fn pages(&self) -> &'static str {
        if self.huge {
            "huge pages"
        } else {
            "memfd, transparent huge pages if the system gives them to shared memory"
        }
    }

    /// Write a word at byte `offset`; outside, or unaligned, nothing happens.
    pub fn put_u64(&self, offset: usize, value: u64) {
        if let Some(at) = self.at(offset, 8) {
            // SAFETY: in bounds and aligned; both sides treat it as an atomic.
            unsafe { (*at.cast::<AtomicU64>()).store(value, Ordering::Relaxed) };
        }
    }

    /// Copy bytes from byte `offset` on out; beyond the end, or unaligned, nothing happens.
    #[inline]
    pub fn copy_out(&self, offset: usize, to: &mut [u8]) {
        if let Some(at) = self.at(offset, to.len()) {
            // SAFETY: in bounds of a mapping that lives as long as we do; what has its own borrow is not in it. Where the device
            // writes at the same time nobody reads what was copied.
            unsafe { std::ptr::copy_nonoverlapping(at, to.as_mut_ptr(), to.len()) };
        }
    }

    /// Copy bytes to byte `offset` and on; beyond the end, or unaligned, nothing happens.
    #[inline]
    pub fn copy_in(&self, offset: usize, from: &[u8]) {
        if let Some(at) = self.at(offset, from.len()) {
            // SAFETY: as in `copy_out`; no reference into the mapping exists.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), at, from.len()) };
        }
    }

    fn at(&self, offset: usize, bytes: usize) -> Option<*mut u8> {
        let end = offset.checked_add(bytes)?;
        (end <= self.bytes && offset.is_multiple_of(8)).then(|| self.base.wrapping_add(offset))
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: our own mapping; whoever uses it holds an `Arc` of us.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.bytes) };
    }
}

/// One submission queue entry as a line of the cache.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Line(pub [u64; 8]);

/// The submission queue, for whoever fills it.
pub struct SqRing {
    base: *mut Line,
    entries: u32,
    _ram: Arc<Ram>,
}

// SAFETY: entries are only written, as wholes; the memory is kept alive.
unsafe impl Send for SqRing {}

impl SqRing {
    /// The ring of `entries` entries at byte `offset`, a multiple of 64; `None` if there is no room.
    pub fn new(ram: &Arc<Ram>, offset: usize, entries: u32) -> Option<Self> {
        let base = ram.at(offset, entries as usize * 64)?;
        offset.is_multiple_of(64).then(|| Self {
            base: base.cast(),
            entries,
            _ram: Arc::clone(ram),
        })
    }

    /// Write an entry. The device may look at it when it sees the doorbell that is stored (Release) later.
    #[inline]
    pub fn put(&self, index: u32, entry: Line) {
        assert!(index < self.entries);
        // SAFETY: in bounds, aligned, mapped as long as we live. The device does not look at entries beyond the doorbell.
        unsafe { self.base.add(index as usize).write_volatile(entry) };
    }
}

/// The completion queue, for whoever empties it.
pub struct CqRing {
    base: *const [AtomicU64; 2],
    entries: u32,
    _ram: Arc<Ram>,
}

// SAFETY: entries are only read, as atomics; the memory is kept alive.
unsafe impl Send for CqRing {}

impl CqRing {
    /// The ring of `entries` entries at byte `offset`, a multiple of 16; `None` if there is no room.
    pub fn new(ram: &Arc<Ram>, offset: usize, entries: u32) -> Option<Self> {
        let base = ram.at(offset, entries as usize * 16)?;
        offset.is_multiple_of(16).then(|| Self {
            base: base.cast_const().cast(),
            entries,
            _ram: Arc::clone(ram),
        })
    }

    /// The half of an entry with SQ head, identifier, phase and status.
    #[inline]
    pub fn high_half(&self, index: u32) -> u64 {
        assert!(index < self.entries);
        // SAFETY: in bounds, aligned, mapped as long as we live; both sides treat it as an atomic.
        unsafe { (&(*self.base.add(index as usize)))[1].load(Ordering::Acquire) }
    }
}
