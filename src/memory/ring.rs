//! Rings of entries and single words that two sides share.

#![expect(unsafe_code, reason = "the fence: atomics and copies in shared memory")]

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::{DoorbellWindow, GuestMap, SideWord, crash_point};

/// A ring of entries of `8 * WORDS` bytes in guest memory: a submission queue (`WORDS` = 8) or a completion queue (2).
///
/// It keeps the memory it lies in alive.
pub struct Ring<const WORDS: usize> {
    base: *mut [u64; WORDS],
    entries: u32,
    _map: Arc<GuestMap>,
}

// SAFETY: entries are only copied or accessed as atomics; the map keeps them mapped.
unsafe impl<const WORDS: usize> Send for Ring<WORDS> {}

impl<const WORDS: usize> Ring<WORDS> {
    /// The ring of `entries` entries at guest physical address `gpa`.
    ///
    /// `None` if it is not 8-byte aligned, or is not guest memory that is contiguous here.
    pub fn new(map: &Arc<GuestMap>, gpa: u64, entries: u32) -> Option<Self> {
        let bytes = usize::try_from(entries).ok()?.checked_mul(8 * WORDS)?;
        let seg = map.resolve_whole(gpa, bytes)?;
        if !gpa.is_multiple_of(8) || !seg.is_aligned(8) {
            return None;
        }
        Some(Self {
            base: seg.ptr().cast(),
            entries,
            _map: Arc::clone(map),
        })
    }

    /// Number of entries.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    fn entry(&self, index: u32) -> *mut [u64; WORDS] {
        assert!(index < self.entries, "ring index is ours, and was checked");
        // In bounds by the check above.
        self.base.wrapping_add(index as usize)
    }

    /// Copy the entry at `index` (below [`Self::entries`]) out, once.
    #[inline]
    pub fn read(&self, index: u32) -> [u64; WORDS] {
        // SAFETY: in bounds, aligned, mapped while `_map` lives. The other side may write it meanwhile: then we get a mixture,
        // which is as hostile as any other entry.
        unsafe { std::ptr::read_volatile(self.entry(index)) }
    }

    /// Copy an entry in, words in order, the last one last with Release: whoever sees the last word sees the others.
    #[inline]
    pub fn write(&self, index: u32, words: [u64; WORDS]) {
        let entry = self.entry(index).cast::<AtomicU64>();
        for (i, word) in words.iter().enumerate() {
            if !crash_point::store_happens() {
                continue;
            }
            let order = if i + 1 == WORDS {
                Ordering::Release
            } else {
                Ordering::Relaxed
            };
            // SAFETY: in bounds and aligned as in `read`; both sides treat the words as atomics.
            unsafe { (*entry.wrapping_add(i)).store(*word, order) };
        }
    }

    /// Copy an entry out, the last word first with Acquire: if that one is new, the others are.
    #[inline]
    pub fn read_published(&self, index: u32) -> [u64; WORDS] {
        let entry = self.entry(index).cast::<AtomicU64>();
        let mut out = [0; WORDS];
        for (i, word) in out.iter_mut().enumerate().rev() {
            // SAFETY: as in `write`.
            *word = unsafe { (*entry.wrapping_add(i)).load(Ordering::Acquire) };
        }
        out
    }

    /// Ask the processor to fetch the entry at `index`, if there is one.
    #[inline]
    pub fn prefetch(&self, index: u32) {
        self.place(index).prefetch();
    }

    /// Where the entry at `index` is; nowhere if there is none.
    #[inline]
    pub fn place(&self, index: u32) -> Place {
        if index < self.entries {
            Place(self.base.wrapping_add(index as usize).cast_const().cast())
        } else {
            Place::default()
        }
    }
}

/// An address, good for nothing but a hint to the processor: it keeps nothing alive.
#[derive(Clone, Copy)]
pub struct Place(*const u8);

// SAFETY: a prefetch is all that can be done with it, which harms nothing on any thread.
unsafe impl Send for Place {}

impl Default for Place {
    fn default() -> Self {
        Self(std::ptr::null())
    }
}

impl Place {
    /// Ask the processor to fetch the cache line there.
    #[inline]
    pub fn prefetch(self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch has no effect that can be observed, whatever the address: it never faults.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(self.0.cast());
        }
    }
}

/// One 32-bit word that two sides share: a doorbell, a shadow doorbell, an EventIdx.
#[derive(Clone)]
pub struct SharedWord {
    word: *const AtomicU32,
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: only accessed as an atomic; the owner keeps it mapped.
unsafe impl Send for SharedWord {}

impl SharedWord {
    /// The register at byte `offset` of the doorbell window; `None` if there is none.
    pub fn in_window(window: &Arc<DoorbellWindow>, offset: usize) -> Option<Self> {
        Some(Self {
            word: std::ptr::from_ref(window.register(offset)?),
            _owner: Arc::clone(window) as _,
        })
    }

    /// A side word of a vring of the doorbell window; `None` if there is no such vring.
    pub fn of_vring(window: &Arc<DoorbellWindow>, vring: usize, word: SideWord) -> Option<Self> {
        Some(Self {
            word: std::ptr::from_ref(window.side(vring, word)?),
            _owner: Arc::clone(window) as _,
        })
    }

    /// The word at guest physical address `gpa`; `None` if it is unaligned or not guest memory.
    pub fn in_guest(map: &Arc<GuestMap>, gpa: u64) -> Option<Self> {
        let seg = map.resolve_whole(gpa, 4)?;
        if !seg.is_aligned(4) {
            return None;
        }
        Some(Self {
            word: seg.ptr().cast_const().cast(),
            _owner: Arc::clone(map) as _,
        })
    }

    /// The value, Acquire: what the other side wrote before it is seen too.
    #[inline]
    pub fn load(&self) -> u32 {
        // SAFETY: aligned and mapped while `_owner` lives (both constructors checked it); both sides treat it as an atomic.
        unsafe { (*self.word).load(Ordering::Acquire) }
    }

    /// Store a value, Release.
    #[inline]
    pub fn store(&self, value: u32) {
        if !crash_point::store_happens() {
            return;
        }
        // SAFETY: as in `load`.
        unsafe { (*self.word).store(value, Ordering::Release) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Region;

    fn map() -> Arc<GuestMap> {
        let mut bytes = vec![0u64; 128].into_boxed_slice();
        let host = bytes.as_mut_ptr().cast();
        // SAFETY: the box is the owner and is never looked at again.
        let region = unsafe { Region::new(0x1000, 1024, host, Arc::new(bytes)) };
        GuestMap::new(vec![Arc::new(region)]).unwrap()
    }

    #[test]
    fn a_ring_must_lie_in_guest_memory() {
        let map = map();
        assert!(Ring::<8>::new(&map, 0x1000, 16).is_some());
        assert!(Ring::<8>::new(&map, 0x1000, 17).is_none());
        assert!(Ring::<8>::new(&map, 0x1004, 2).is_none(), "unaligned");
        assert!(Ring::<2>::new(&map, u64::MAX - 7, 2).is_none());
        assert!(Ring::<8>::new(&map, 0x1000, u32::MAX).is_none());
    }

    #[test]
    fn entries_are_where_the_guest_sees_them() {
        let map = map();
        let ring = Ring::<2>::new(&map, 0x1010, 4).unwrap();
        ring.write(3, [0x1111, 0x2222]);
        let mut bytes = [0; 16];
        assert!(map.read(0x1040, &mut bytes));
        assert_eq!(bytes[..2], [0x11, 0x11]);
        assert_eq!(bytes[8..10], [0x22, 0x22]);
        assert_eq!(ring.read(3), [0x1111, 0x2222]);
        assert_eq!(ring.read_published(3), [0x1111, 0x2222]);
    }

    #[test]
    fn whoever_sees_the_last_word_sees_the_first() {
        // A completion queue of one entry, over and over: the two halves carry the same number, the second publishes it.
        let map = map();
        let ring = Ring::<2>::new(&map, 0x1000, 1).unwrap();
        std::thread::scope(|s| {
            s.spawn(move || (1..=200_000u64).for_each(|n| ring.write(0, [n, n])));
            let theirs = Ring::<2>::new(&map, 0x1000, 1).unwrap();
            let mut last = 0;
            while last < 200_000 {
                let [first, second] = theirs.read_published(0);
                assert!(
                    first >= second,
                    "the first half {first} is older than {second}, which published it"
                );
                assert!(second >= last, "published values went back");
                last = second;
            }
        });
    }

    #[test]
    fn words_are_aligned_and_inside() {
        let map = map();
        assert!(SharedWord::in_guest(&map, 0x1002).is_none());
        assert!(SharedWord::in_guest(&map, 0x1400).is_none());
        let word = SharedWord::in_guest(&map, 0x13fc).unwrap();
        word.store(7);
        assert_eq!(word.load(), 7);
        let window = DoorbellWindow::new(4096).unwrap();
        let bell = SharedWord::in_window(&window, 8).unwrap();
        bell.store(9);
        assert_eq!(window.register(8).unwrap().load(Ordering::Acquire), 9);
        assert!(SharedWord::in_window(&window, 4096).is_none());
    }
}
