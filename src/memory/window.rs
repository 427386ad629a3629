//! The doorbell window: BAR0 from 0x1000 on, as a file of ours that the front-end maps.

#![expect(unsafe_code, reason = "the fence: a shared mapping that others write")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

/// A shared file of doorbells, mapped here for good.
///
/// Its size is sealed, so the front-end cannot cut it and fault us.
pub struct DoorbellWindow {
    file: File,
    base: *mut AtomicU32,
    bytes: usize,
}

// SAFETY: the window is only ever accessed as atomics.
unsafe impl Send for DoorbellWindow {}
// SAFETY: as above.
unsafe impl Sync for DoorbellWindow {}

impl DoorbellWindow {
    /// A window of `bytes` bytes (rounded up to whole pages), all zero.
    ///
    /// # Errors
    ///
    /// What the kernel says when memory or file descriptors run out.
    pub fn new(bytes: usize) -> io::Result<Arc<Self>> {
        let bytes = bytes.max(1).next_multiple_of(4096);
        let fd = rustix::fs::memfd_create(
            "nvme-doorbells",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        )?;
        rustix::fs::ftruncate(&fd, bytes as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        // SAFETY: a new shared mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &fd,
                0,
            )?
        };
        Ok(Arc::new(Self {
            file: fd.into(),
            base: base.cast(),
            bytes,
        }))
    }

    /// Size in bytes, a multiple of 4096.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The file, to be handed to the front-end.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The 32-bit register at byte `offset`; `None` if it is unaligned or outside.
    pub fn register(&self, offset: usize) -> Option<&AtomicU32> {
        if !offset.is_multiple_of(4) || offset >= self.bytes {
            return None;
        }
        // SAFETY: aligned and inside the mapping (whose size is a multiple of 4), which lives as long as `self`; every access
        // by anyone to this memory is that of an atomic.
        Some(unsafe { &*self.base.add(offset / 4) })
    }

    /// Set every register to zero, as a reset does.
    pub fn clear(&self) {
        for offset in (0..self.bytes).step_by(4) {
            if let Some(r) = self.register(offset) {
                r.store(0, Ordering::Release);
            }
        }
    }
}

impl Drop for DoorbellWindow {
    fn drop(&mut self) {
        // SAFETY: our own mapping; references into it borrow `self`.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_inside_aligned_and_shared_with_the_file() {
        use std::os::unix::fs::FileExt;
        let w = DoorbellWindow::new(4000).unwrap();
        assert_eq!(w.bytes(), 4096);
        assert!(
            w.register(4096).is_none()
                && w.register(2).is_none()
                && w.register(usize::MAX).is_none()
        );
        w.register(4092)
            .unwrap()
            .store(0x01020304, Ordering::Release);
        let mut b = [0; 4];
        w.file.read_exact_at(&mut b, 4092).unwrap();
        assert_eq!(b, [4, 3, 2, 1]);
        assert!(w.file.set_len(10).is_err(), "the size is sealed");
        w.clear();
        assert_eq!(w.register(4092).unwrap().load(Ordering::Acquire), 0);
    }
}
