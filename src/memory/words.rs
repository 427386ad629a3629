//! A shared file of 64-bit words that outlives the thread that writes it: where a journal is kept.

#![expect(
    unsafe_code,
    reason = "the fence: a shared mapping that is seen as atomics"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::AtomicU64;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

/// A mapped memfd of words, all zero at first. Pages that nobody wrote take no memory.
pub struct SharedWords {
    file: File,
    base: *mut AtomicU64,
    words: usize,
}

// SAFETY: the words are only ever accessed as atomics.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// A file of `words` words, called `name` in `/proc`.
    ///
    /// # Errors
    ///
    /// What the kernel says when memory or file descriptors run out.
    pub fn new(name: &str, words: usize) -> io::Result<Self> {
        let bytes = words
            .max(1)
            .checked_mul(8)
            .and_then(|b| b.checked_next_multiple_of(4096))
            .ok_or(io::ErrorKind::FileTooLarge)?;
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
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
        Ok(Self {
            file: fd.into(),
            base: base.cast(),
            words: bytes / 8,
        })
    }

    /// The words; at least as many as were asked for.
    #[inline]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: aligned (a page), inside the mapping, which lives as long as `self` and cannot shrink (sealed); zeroed memory is
        // a valid atomic, and every access by anyone is that of an atomic.
        unsafe { std::slice::from_raw_parts(self.base, self.words) }
    }

    /// The file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: our own mapping; references into it borrow `self`.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.words * 8) };
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn words_are_those_of_the_file() {
        let words = SharedWords::new("test", 600).unwrap();
        assert_eq!(words.words().len(), 1024);
        words.words()[599].store(0x1122, Ordering::Release);
        let file = File::from(words.fd().try_clone_to_owned().unwrap());
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, 599 * 8).unwrap();
        assert_eq!(u64::from_ne_bytes(bytes), 0x1122);
        assert!(SharedWords::new("test", usize::MAX).is_err());
    }
}
