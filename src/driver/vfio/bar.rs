//! BAR0 of an SSD, mapped here: the fence around memory-mapped registers.
//!
//! Every access is one volatile 32-bit load or store with a full fence on both sides, so that registers are written in the order of the
//! program, among themselves and against memory (a controller must not see CC.EN before AQA, ASQ and ACQ). Doorbells need less: what was
//! written to memory before must be there first.
//!
//! Registers can vanish under us: the host takes the device back, or it is pulled. The mapping is then replaced by ordinary memory, at
//! the same place, so that a thread that rings a doorbell harms nobody, and registers read as all ones, as those of a missing device do.

#![expect(
    unsafe_code,
    reason = "the fence: registers are mapped and accessed here"
)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};

use rustix::mm::{MapFlags, ProtFlags};

use crate::driver;
use crate::memory::Mapping;
use crate::memory::sigbus::{self, Guard};

/// A mapped BAR.
pub(super) struct Bar {
    // Before the mapping, so that it goes first.
    guard: Guard,
    /// Accessed by volatile 32-bit loads and stores alone, which a device takes from any processor.
    mapping: Mapping,
    gone: AtomicBool,
}

impl Bar {
    /// Map `bytes` bytes (a multiple of the page size) of a device file from `offset` on. Should an access to them fault later, `wake`
    /// (an eventfd) is signalled.
    ///
    /// # Errors
    ///
    /// What the kernel says; too many guarded ranges.
    pub fn map(
        file: &impl AsFd,
        offset: u64,
        bytes: usize,
        wake: Arc<OwnedFd>,
    ) -> io::Result<Arc<Self>> {
        sigbus::install()?;
        let mapping = Mapping::part(file, offset, bytes)?;
        // SAFETY: the range is exactly the mapping made above, which goes after the guard.
        let guard = unsafe { Guard::new(mapping.base(), bytes, wake)? };
        Ok(Arc::new(Self {
            guard,
            mapping,
            gone: AtomicBool::new(false),
        }))
    }

    /// Whether there are no registers any more.
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire) || self.guard.hit()
    }

    /// Give the registers up: the device file is not referred to any more when this returns.
    ///
    /// # Errors
    ///
    /// The mapping could not be replaced.
    pub fn let_go(&self) -> io::Result<()> {
        self.gone.store(true, Ordering::SeqCst);
        // SAFETY: replaces our own mapping as a whole by private zero pages, at one stroke; the only accesses to it are loads and stores
        // of registers, for which the new pages are as good.
        unsafe {
            rustix::mm::mmap_anonymous(
                self.mapping.base().cast(),
                self.mapping.bytes(),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
            )?
        };
        Ok(())
    }

    /// The register at byte `offset`, which must be aligned and inside.
    fn register(&self, offset: u64) -> io::Result<NonNull<u32>> {
        let inside = usize::try_from(offset).ok().filter(|o| {
            o.is_multiple_of(4) && o.checked_add(4).is_some_and(|e| e <= self.mapping.bytes())
        });
        let base = NonNull::new(self.mapping.base());
        let (Some(offset), Some(base)) = (inside, base) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("no register at offset {offset:#x} of BAR0"),
            ));
        };
        // SAFETY: inside the mapping, as just checked.
        Ok(unsafe { base.add(offset) }.cast())
    }

    /// Read a register: all ones if the device is gone.
    ///
    /// # Errors
    ///
    /// There is none at that offset.
    pub fn read(&self, offset: u64) -> io::Result<u32> {
        let register = self.register(offset)?;
        fence(Ordering::SeqCst);
        // SAFETY: an aligned register inside the mapping. Should it fault, the guard puts a zero page there.
        let value = unsafe { register.read_volatile() };
        fence(Ordering::SeqCst);
        Ok(if self.is_gone() { u32::MAX } else { value })
    }

    /// Write a register; nothing happens if the device is gone.
    ///
    /// # Errors
    ///
    /// There is none at that offset.
    pub fn write(&self, offset: u64, value: u32) -> io::Result<()> {
        let register = self.register(offset)?;
        fence(Ordering::SeqCst);
        // SAFETY: as in `read`.
        unsafe { register.write_volatile(value) };
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// A register that is rung from the thread that owns a queue.
    ///
    /// # Errors
    ///
    /// There is none at that offset.
    pub fn doorbell(self: &Arc<Self>, offset: u64) -> io::Result<Doorbell> {
        Ok(Doorbell {
            register: self.register(offset)?,
            _bar: Arc::clone(self),
        })
    }
}

/// One doorbell.
pub(super) struct Doorbell {
    register: NonNull<u32>,
    _bar: Arc<Bar>,
}

// SAFETY: a register of a mapping that `_bar` keeps; any thread may store to it.
unsafe impl Send for Doorbell {}

impl driver::Doorbell for Doorbell {
    #[inline]
    fn ring(&self, value: u32) {
        // The queue entries first.
        fence(Ordering::Release);
        // SAFETY: as in `Bar::write`.
        unsafe { self.register.write_volatile(value) };
    }
}

/// A file that can be mapped as a BAR is, for tests.
#[cfg(test)]
fn file(bytes: u64) -> std::fs::File {
    driver::dma::shared_memory("bar", bytes).unwrap()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;
    use crate::driver::Doorbell as _;

    fn wake() -> Arc<OwnedFd> {
        Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap())
    }

    fn word(file: &File, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, offset).unwrap();
        u32::from_ne_bytes(bytes)
    }

    #[test]
    fn registers_are_those_of_the_file_and_none_is_outside() {
        let file = file(8192);
        let bar = Bar::map(&file, 0, 8192, wake()).unwrap();
        bar.write(0x14, 0x0046_0001).unwrap();
        assert_eq!(
            (word(&file, 0x14), bar.read(0x14).unwrap()),
            (0x0046_0001, 0x0046_0001)
        );
        let bell = bar.doorbell(8188).unwrap();
        bell.ring(7);
        assert_eq!(word(&file, 8188), 7);
        for offset in [1, 2, 8189, 8192, u64::MAX, u64::MAX - 3] {
            assert!(bar.read(offset).is_err(), "{offset:#x}");
            assert!(bar.write(offset, 0).is_err(), "{offset:#x}");
            assert!(bar.doorbell(offset).is_err(), "{offset:#x}");
        }
    }

    #[test]
    fn registers_that_vanish_read_as_all_ones_and_somebody_is_told() {
        let file = file(8192);
        let wake = wake();
        let bar = Bar::map(&file, 0, 8192, Arc::clone(&wake)).unwrap();
        let bell = bar.doorbell(0x1000).unwrap();
        assert_eq!(bar.read(0x1c).unwrap(), 0);
        rustix::fs::ftruncate(&file, 0).unwrap();
        bell.ring(1);
        assert!(bar.is_gone());
        assert_eq!(bar.read(0x1c).unwrap(), u32::MAX);
        let mut count = [0; 8];
        assert_eq!(rustix::io::read(&*wake, &mut count), Ok(8));
    }

    #[test]
    fn registers_that_are_given_up_do_not_reach_the_file() {
        let file = file(4096);
        let bar = Bar::map(&file, 0, 4096, wake()).unwrap();
        let bell = bar.doorbell(0x20).unwrap();
        bell.ring(1);
        bar.let_go().unwrap();
        bell.ring(2);
        bar.write(0x24, 3).unwrap();
        assert_eq!((word(&file, 0x20), word(&file, 0x24)), (1, 0));
        assert_eq!(bar.read(0x20).unwrap(), u32::MAX);
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let at = format!("{:x}-", bar.mapping.base().addr());
        let line = maps.lines().find(|l| l.contains(&at)).unwrap_or_default();
        assert!(!line.contains("memfd:bar"), "{line}");
    }
}
