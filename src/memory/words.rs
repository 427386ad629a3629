//! A shared file of 64-bit words that outlives the thread that writes it: where a journal is kept.

#![expect(
    unsafe_code,
    reason = "the fence: a shared mapping that is seen as atomics"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::AtomicU64;

use super::mapping::{Mapping, PAGE, sealed, whole_pages};

/// A mapped file of words, all zero at first if it is new. Pages that nobody wrote take no memory.
pub struct SharedWords {
    file: File,
    mapping: Mapping,
}

impl SharedWords {
    /// A file of `words` words, called `name` in `/proc`.
    ///
    /// # Errors
    ///
    /// What the kernel says when memory or file descriptors run out.
    pub fn new(name: &str, words: usize) -> io::Result<Self> {
        let bytes = (words as u64)
            .checked_mul(8)
            .ok_or(io::ErrorKind::FileTooLarge)?;
        let bytes = whole_pages(bytes, PAGE)?;
        let file = sealed(name, bytes, false)?;
        Ok(Self {
            mapping: Mapping::new(&file, bytes, true)?,
            file,
        })
    }

    /// The first `words` words of a file, which has as many.
    ///
    /// Nobody may make it shorter: it has to be in a directory that is ours alone, since it cannot be sealed.
    ///
    /// # Errors
    ///
    /// It is too short; what the kernel says of mapping it.
    pub fn over(file: File, words: usize) -> io::Result<Self> {
        let bytes = (words as u64)
            .checked_mul(8)
            .ok_or(io::ErrorKind::FileTooLarge)?;
        let bytes = whole_pages(bytes, PAGE)?;
        if file.metadata()?.len() < bytes as u64 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Self {
            mapping: Mapping::new(&file, bytes, true)?,
            file,
        })
    }

    /// The words; at least as many as were asked for.
    #[inline]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: aligned (a page), inside the mapping, which lives as long as `self` and cannot shrink (sealed, or ours alone); any bytes are
        // a valid atomic, and every access by anyone is that of an atomic.
        unsafe { std::slice::from_raw_parts(self.mapping.base().cast(), self.mapping.bytes() / 8) }
    }

    /// The file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
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
        let file = file.try_clone().unwrap();
        let again = SharedWords::over(file.try_clone().unwrap(), 1024).unwrap();
        assert_eq!(again.words()[599].load(Ordering::Acquire), 0x1122);
        assert!(SharedWords::over(file, 1025).is_err());
    }
}
