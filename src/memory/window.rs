//! The doorbell window: BAR0 from 0x1000 on, as a file of ours that the front-end maps.

#![expect(unsafe_code, reason = "the fence: a shared mapping that others write")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

/// The side words of one vring lie in so many bytes: a cache line for each writer.
const SIDE_STRIDE: usize = 128;

/// Bytes of all side words: 64 vrings are the most there can be.
const SIDE_BYTES: usize = 64 * SIDE_STRIDE;

/// A word that daemon and front-end share for each vring, besides its doorbells. `docs/VHOST_USER.md` has the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SideWord {
    /// Ours: interrupts signalled.
    Calls = 0,
    /// Ours: not 0 while the submission queue is looked at without being asked.
    Awake = 4,
    /// The front-end's: not 0 while it looks at `Calls`, so that the eventfd can be spared.
    Watching = 64,
    /// The front-end's: not 0 if it ever does that.
    Attentive = 68,
}

/// A shared file of doorbells, mapped here for good, with the side words behind them.
///
/// Its size is sealed, so the front-end cannot cut it and fault us.
pub struct DoorbellWindow {
    file: File,
    base: *mut AtomicU32,
    /// Of the doorbells; the side words follow.
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
        let whole = bytes
            .checked_add(SIDE_BYTES)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        rustix::fs::ftruncate(&fd, whole as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        // SAFETY: a new shared mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                whole,
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

    /// Size of the doorbells in bytes, a multiple of 4096, and where the side words begin in the file.
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

    /// A side word of a vring; `None` if there is no such vring.
    #[inline]
    pub fn side(&self, vring: usize, word: SideWord) -> Option<&AtomicU32> {
        if vring >= SIDE_BYTES / SIDE_STRIDE {
            return None;
        }
        let offset = self.bytes + vring * SIDE_STRIDE + word as usize;
        // SAFETY: aligned and inside the mapping, whose last `SIDE_BYTES` bytes begin at `bytes`; as in `register`.
        Some(unsafe { &*self.base.add(offset / 4) })
    }

    /// Set all side words to zero, for a front-end that comes: nobody is awake, and it watches nothing yet.
    pub fn clear_side(&self) {
        for offset in (0..SIDE_BYTES).step_by(4) {
            // SAFETY: as in `side`.
            unsafe { &*self.base.add((self.bytes + offset) / 4) }.store(0, Ordering::Release);
        }
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
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.bytes + SIDE_BYTES) };
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
        w.side(63, SideWord::Attentive)
            .unwrap()
            .store(7, Ordering::Release);
        w.file.read_exact_at(&mut b, 4096 + 63 * 128 + 68).unwrap();
        assert_eq!(b, [7, 0, 0, 0]);
        assert!(w.side(64, SideWord::Calls).is_none());
        w.clear();
        assert_eq!(
            b[0], 7,
            "a reset of the doorbells is not one of the side words"
        );
        w.clear_side();
        let side = w.side(63, SideWord::Attentive).unwrap();
        assert_eq!(side.load(Ordering::Acquire), 0);
        assert_eq!(w.register(4092).unwrap().load(Ordering::Acquire), 0);
    }
}
