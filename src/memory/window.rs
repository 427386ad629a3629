//! The doorbell window: BAR0 from 0x1000 on, as a file of ours that the front-end maps.

#![expect(unsafe_code, reason = "the fence: a shared mapping that others write")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::crash_point;
use super::mapping::{Mapping, PAGE, sealed, whole_pages};
use super::sigbus::{self, Guard};

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

/// Where the doorbells begin in their file: where they begin in BAR0, since a vfio-user client adds the offset of an area of a region
/// to that of the region in the file. The page before them holds nothing.
const BEFORE: usize = PAGE as usize;

/// A shared file of doorbells, mapped here for good, with the side words behind them.
///
/// The front-end must not fault us by cutting it. Where it lives in this process alone its size is sealed. A file with a name cannot be
/// sealed: that one is guarded, and reads as zeroes from the moment it was cut until it is mended.
pub struct DoorbellWindow {
    /// Of a file that can be cut. Ends before the mapping: fields are dropped in their order.
    guard: Option<Watched>,
    file: File,
    mapping: Mapping,
    /// Of the doorbells; the side words follow.
    bytes: usize,
}

/// What watches over a file that can be cut.
struct Watched {
    guard: Guard,
    /// Readable once it was.
    wake: Arc<OwnedFd>,
}

impl DoorbellWindow {
    /// A window of `bytes` bytes (rounded up to whole pages), all zero.
    ///
    /// # Errors
    ///
    /// What the kernel says when memory or file descriptors run out.
    pub fn new(bytes: usize) -> io::Result<Arc<Self>> {
        let (bytes, whole) = sizes(bytes)?;
        let file = sealed("nvme-doorbells", whole, false)?;
        Ok(Arc::new(Self {
            guard: None,
            mapping: Mapping::new(&file, whole, true)?,
            file,
            bytes,
        }))
    }

    /// A window of `bytes` bytes (rounded up to whole pages) in a file that others find again: what is in it stays, what is missing
    /// is zero.
    ///
    /// # Errors
    ///
    /// What the kernel says; no room for it; [`io::ErrorKind::InvalidData`] if the file has another size, and is not empty.
    pub fn over(file: File, bytes: usize) -> io::Result<Arc<Self>> {
        sigbus::install()?;
        let (bytes, whole) = sizes(bytes)?;
        match file.metadata()?.len() {
            0 => file.set_len(whole as u64)?,
            n if n == whole as u64 => {}
            n => {
                let text = format!("the file of doorbells has {n} bytes instead of {whole}");
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
        }
        allocate(&file, whole)?;
        let mapping = Mapping::new(&file, whole, true)?;
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        // SAFETY: the range is exactly that mapping, whose words are only seen as atomics, and which stays until after the guard.
        let guard = unsafe { Guard::new(mapping.base(), whole, Arc::clone(&wake))? };
        Ok(Arc::new(Self {
            guard: Some(Watched { guard, wake }),
            mapping,
            file,
            bytes,
        }))
    }

    /// Whether the file was cut, and an access has found out.
    pub fn is_cut(&self) -> bool {
        self.guard.as_ref().is_some_and(|w| w.guard.hit())
    }

    /// Readable while [`Self::is_cut`]; `None` where that cannot be.
    pub fn cut_fd(&self) -> Option<BorrowedFd<'_>> {
        self.guard.as_ref().map(|w| w.wake.as_fd())
    }

    /// After it was cut: whole again, for the next front-end. What was cut off is zero.
    ///
    /// # Errors
    ///
    /// What the kernel says; no room.
    pub fn mend(&self) -> io::Result<()> {
        let Some(watched) = &self.guard else {
            return Ok(());
        };
        let whole = self.mapping.bytes();
        // Also if nobody has found out yet.
        if self.file.metadata()?.len() != whole as u64 {
            self.file.set_len(whole as u64)?;
        }
        allocate(&self.file, whole)?;
        if watched.guard.hit() {
            self.mapping.again(&self.file)?;
            watched.guard.clear();
            let _ = rustix::io::read(&*watched.wake, &mut [0; 8]);
        }
        Ok(())
    }

    /// The word at byte `offset` from the first doorbell on.
    ///
    /// # Safety
    ///
    /// `offset` is a multiple of 4 below `bytes + SIDE_BYTES`.
    #[inline]
    unsafe fn word(&self, offset: usize) -> &AtomicU32 {
        let base: *const AtomicU32 = self.mapping.base().cast();
        // SAFETY: aligned and inside (the caller's promise) the mapping, which lives as long as `self`; every access by anyone to
        // this memory is that of an atomic.
        unsafe { &*base.add((BEFORE + offset) / 4) }
    }

    /// Size of the doorbells in bytes, a multiple of 4096, and where the side words begin behind the first doorbell.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where the first doorbell is in the file.
    pub fn file_offset(&self) -> u64 {
        BEFORE as u64
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
        // SAFETY: just looked at; `bytes` is a multiple of 4.
        Some(unsafe { self.word(offset) })
    }

    /// A side word of a vring; `None` if there is no such vring.
    #[inline]
    pub fn side(&self, vring: usize, word: SideWord) -> Option<&AtomicU32> {
        if vring >= SIDE_BYTES / SIDE_STRIDE {
            return None;
        }
        let offset = self.bytes + vring * SIDE_STRIDE + word as usize;
        // SAFETY: `SIDE_BYTES` bytes follow the doorbells, from `bytes` on, a multiple of 4 as all offsets of side words are.
        Some(unsafe { self.word(offset) })
    }

    /// Set all side words to zero, for a front-end that comes: nobody is awake, and it watches nothing yet.
    pub fn clear_side(&self) {
        for offset in (0..SIDE_BYTES).step_by(4) {
            // SAFETY: as in `side`.
            unsafe { self.word(self.bytes + offset) }.store(0, Ordering::Release);
        }
    }

    /// Set every register to zero, as a reset does.
    pub fn clear(&self) {
        for offset in (0..self.bytes).step_by(4) {
            if let Some(r) = self.register(offset)
                && r.load(Ordering::Relaxed) != 0
                && crash_point::store_happens()
            {
                r.store(0, Ordering::Release);
            }
        }
    }
}

/// Bytes of the doorbells, and of the file they lie in.
fn sizes(bytes: usize) -> io::Result<(usize, usize)> {
    let bytes = whole_pages(bytes as u64, PAGE)?;
    let whole = bytes
        .checked_add(BEFORE + SIDE_BYTES)
        .ok_or(io::ErrorKind::OutOfMemory)?;
    Ok((bytes, whole))
}

/// Have memory for all of it: a page that cannot be had later would be taken for one that was cut off.
fn allocate(file: &File, bytes: usize) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes as u64) {
        Err(Errno::OPNOTSUPP) => Ok(()),
        result => Ok(result?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_keeps_what_is_in_it_and_one_that_was_cut_is_mended() {
        let file = tempfile::tempfile().unwrap();
        let over = || DoorbellWindow::over(file.try_clone().unwrap(), 4096);
        let w = over().unwrap();
        assert!(w.cut_fd().is_some() && !w.is_cut());
        let tail = |w: &DoorbellWindow| w.register(64).unwrap().load(Ordering::Acquire);
        w.register(64).unwrap().store(5, Ordering::Release);
        drop(w);
        let w = over().unwrap();
        assert_eq!(tail(&w), 5);
        w.mend().unwrap();
        assert_eq!(tail(&w), 5, "there was nothing to mend");

        file.set_len(4096).unwrap();
        assert_eq!(tail(&w), 0);
        assert!(w.is_cut());
        w.register(64).unwrap().store(6, Ordering::Release);
        w.mend().unwrap();
        assert!(!w.is_cut());
        assert_eq!(tail(&w), 0, "the file, not what was put in its place");
        w.register(64).unwrap().store(7, Ordering::Release);
        assert_eq!(tail(&over().unwrap()), 7);
        file.set_len(4096).unwrap();
        assert_eq!((tail(&w), w.is_cut()), (0, true), "once more");

        assert_eq!(over().err().unwrap().kind(), io::ErrorKind::InvalidData);
    }

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
        w.file.read_exact_at(&mut b, 4096 + 4092).unwrap();
        assert_eq!(b, [4, 3, 2, 1]);
        assert!(w.file.set_len(10).is_err(), "the size is sealed");
        w.side(63, SideWord::Attentive)
            .unwrap()
            .store(7, Ordering::Release);
        w.file
            .read_exact_at(&mut b, 2 * 4096 + 63 * 128 + 68)
            .unwrap();
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
