//! Copies between a store and a guest, at the speed of the memory.

#![expect(
    unsafe_code,
    reason = "the fence: raw copies, and instructions by name"
)]

use super::ahead::{Ahead, PAGE, STEP, ask_for};

/// Pieces below this are copied through the cache: they are as fast that way, and likely to be read again.
const STREAM_FROM: usize = 2048;

/// Bytes of a cache line.
pub(super) const LINE: usize = 64;

/// How bytes are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Copy {
    /// Through the cache.
    Cached,
    /// Large aligned pieces around it. Where the destination is not in the cache, each of its lines would be read first, only to be
    /// overwritten, and other lines thrown out for it.
    Streamed,
}

impl Copy {
    /// The way into a store of `len` bytes.
    pub fn into_store(len: u64) -> Self {
        /// Above the last-level cache's share of a core, on anything this is likely to run on.
        const LARGE: u64 = 32 << 20;
        if len >= LARGE {
            Self::Streamed
        } else {
            Self::Cached
        }
    }
}

/// Copies between stores and guests for one thread: it knows what was copied of late, and what comes next.
pub struct Copier {
    recent: Recent,
    ahead: Ahead,
    /// The machine has the instructions for large pieces.
    wide: bool,
}

impl Default for Copier {
    fn default() -> Self {
        Self {
            recent: Recent::default(),
            ahead: Ahead::default(),
            wide: is_wide(),
        }
    }
}

impl Copier {
    /// The bytes from `from` on are copied after those that are copied now, `len` of them.
    #[inline]
    pub(super) fn expect(&mut self, from: *const u8, len: usize) {
        if len < STREAM_FROM || !self.wide {
            prefetch(from, len);
        } else {
            self.ahead.expect(from, len);
        }
    }

    /// The way to a guest's `len` bytes at `to`; from now on it is a page that was copied to.
    #[inline]
    pub(super) fn way(&mut self, to: *const u8, len: usize) -> Copy {
        if len < STREAM_FROM {
            return Copy::Cached;
        }
        self.recent.way(to)
    }

    /// Copy `n` bytes. They are visible to all before anything that is stored later.
    ///
    /// # Safety
    ///
    /// `n` bytes are readable at `from` and writable at `to`, they do not overlap, and no Rust reference to them is in use.
    #[inline]
    pub(super) unsafe fn copy(&mut self, way: Copy, from: *const u8, to: *mut u8, n: usize) {
        #[cfg(target_arch = "x86_64")]
        if n >= STREAM_FROM && self.wide {
            // What was expected and comes at once has nothing before it to be asked for with.
            if self.ahead.is_of(from, n) {
                self.ahead.ask_for_all();
            }
            let streamed = way == Copy::Streamed && (to.addr() | n) & (LINE - 1) == 0;
            // SAFETY: the machine has the instructions; a streamed destination is aligned; the rest is our contract.
            return unsafe {
                if streamed {
                    wide::<true>(from, to, n, &mut self.ahead)
                } else {
                    wide::<false>(from, to, n, &mut self.ahead)
                }
            };
        }
        let _ = way;
        // SAFETY: our contract.
        unsafe { std::ptr::copy_nonoverlapping(from, to, n) }
    }
}

fn is_wide() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx2");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// The pages of guests that were copied to of late, more or less: which are likely to be in the cache.
///
/// A guest that reads into the same few buffers over and over has them there, and a copy through the cache is the fastest. One that
/// reads into ever new pages (a page cache) has not.
struct Recent {
    /// The page number at its lowest bits; one table, small enough to stay near.
    pages: Box<[u32; Self::ENTRIES]>,
}

impl Default for Recent {
    fn default() -> Self {
        Self {
            pages: Box::new([0; Self::ENTRIES]),
        }
    }
}

impl Recent {
    /// 4 MiB of pages: with the data that comes from a store, that is what a last-level cache keeps for a core.
    const ENTRIES: usize = 1024;

    #[inline]
    fn way(&mut self, to: *const u8) -> Copy {
        let page = (to.addr() >> 12) as u32;
        let Some(entry) = self.pages.get_mut(page as usize % Self::ENTRIES) else {
            return Copy::Cached;
        };
        if std::mem::replace(entry, page) == page {
            Copy::Cached
        } else {
            Copy::Streamed
        }
    }
}

/// Copy in large pieces, around the cache if `STREAM`, and ask meanwhile for what is copied next.
///
/// # Safety
///
/// As [`Copier::copy`]; if `STREAM`, `to` and `n` are multiples of a line.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn wide<const STREAM: bool>(from: *const u8, to: *mut u8, n: usize, ahead: &mut Ahead) {
    use std::arch::x86_64::{
        _mm_sfence, _mm256_loadu_si256, _mm256_storeu_si256, _mm256_stream_si256,
    };
    let mut at = 0;
    while at + STEP <= n {
        // Of a large piece the page after this one, which the processor does not look for by itself.
        if at + PAGE < n {
            ask_for(from.wrapping_add(at + PAGE));
        } else {
            ahead.ask_for_step();
        }
        for half in 0..STEP / 32 {
            let at = at + half * 32;
            // SAFETY: `at + 32 <= n`; for stream, both being multiples of a line, `to` is aligned for the store.
            unsafe {
                let bytes = _mm256_loadu_si256(from.add(at).cast());
                if STREAM {
                    _mm256_stream_si256(to.add(at).cast(), bytes);
                } else {
                    _mm256_storeu_si256(to.add(at).cast(), bytes);
                }
            }
        }
        at += STEP;
    }
    // SAFETY: what is left of `n` bytes.
    unsafe { std::ptr::copy_nonoverlapping(from.add(at), to.add(at), n - at) };
    if STREAM {
        // Such stores are not ordered with others: the completion that follows must not overtake them.
        _mm_sfence();
    }
}

/// Ask for the first bytes of `len` at `ptr`, which are soon to be read.
#[inline]
pub(super) fn prefetch(ptr: *const u8, len: usize) {
    /// As many misses as a core can have under way: more would wait for those.
    const LINES: usize = 12;
    #[cfg(target_arch = "x86_64")]
    for line in 0..LINES.min(len.div_ceil(LINE)) {
        // SAFETY: a prefetch has no effect that can be observed, whatever the address.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(
                ptr.wrapping_add(line * LINE).cast(),
            );
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (ptr, len);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_copies_every_byte_and_no_other() {
        assert_eq!(Copy::into_store(4096), Copy::Cached);
        assert_eq!(Copy::into_store(1 << 40), Copy::Streamed);
        let mut copier = Copier::default();
        for wide in [copier.wide, false] {
            copier.wide = wide;
            for way in [Copy::Streamed, Copy::Cached] {
                for (skew, n) in [
                    (0, 4096),
                    (0, 2048),
                    (0, 2050),
                    (0, 2112),
                    (0, 16384),
                    (32, 4096),
                    (8, 9001),
                    (0, 64),
                    (3, 1),
                    (0, 0),
                ] {
                    let from: Vec<u8> = (0..20_000u32).map(|i| (i * 7 + i / 256) as u8).collect();
                    #[repr(align(64))]
                    struct Aligned([u8; 20_000]);
                    let mut to = Box::new(Aligned([0xEE; 20_000]));
                    // Its own bytes, those after them, and bytes that nobody has.
                    for next in [5, 9000] {
                        copier.expect(from.as_ptr().wrapping_add(next), n);
                        // SAFETY: both buffers are longer than `skew + n`, and not otherwise used meanwhile.
                        unsafe {
                            copier.copy(way, from.as_ptr().add(5), to.0.as_mut_ptr().add(skew), n);
                        }
                    }
                    copier.expect(std::ptr::without_provenance(usize::MAX - 100), n);
                    assert_eq!(to.0[skew..skew + n], from[5..5 + n]);
                    assert!(
                        to.0[..skew]
                            .iter()
                            .chain(&to.0[skew + n..])
                            .all(|b| *b == 0xEE)
                    );
                }
            }
        }
    }

    #[test]
    fn pages_that_come_again_soon_are_in_the_cache() {
        let mut copier = Copier::default();
        let page = |n: usize| std::ptr::without_provenance::<u8>(0x7000_0100_0000 + n * 4096);
        let mut lap = |pages: usize, len| {
            (0..pages)
                .filter(|n| copier.way(page(*n), len) == Copy::Cached)
                .count()
        };
        assert_eq!([lap(128, 4096), lap(128, 4096)], [0, 128]);
        assert_eq!(lap(65536, 4096), 128, "those that were known");
        assert_eq!(lap(65536, 4096), 0, "too many to keep");
        assert_eq!(lap(10, 512), 10, "small ones always");
    }
}
