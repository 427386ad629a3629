//! What will be copied next, asked for a little at a time while something else is copied.
//!
//! A core waits for a page that is not in its cache line by line: the processor's own prefetching begins anew with each page, and asking for
//! all lines of the next page at once takes the places that the lines of this one need. Asked for at the pace of the copy before it, into the
//! cache behind the nearest, the page is there when its turn comes.

#![expect(unsafe_code, reason = "an instruction by name")]

use super::copy::LINE;

/// Bytes asked for at a time.
pub(super) const STEP: usize = 4 * LINE;

/// Bytes that are asked for ahead, at most: a page, after which the processor has found out by itself.
pub(super) const PAGE: usize = 4096;

/// What of the bytes that come next was not asked for yet.
#[derive(Default)]
pub(super) struct Ahead {
    /// Address of the next byte to ask for. Never more than a hint: nothing is read there.
    next: usize,
    steps: usize,
}

impl Ahead {
    /// These bytes come next. What was expected before them is asked for now.
    #[inline]
    pub fn expect(&mut self, from: *const u8, len: usize) {
        self.ask_for_all();
        near(from);
        self.next = from.addr().wrapping_add(STEP);
        self.steps = len.min(PAGE).div_ceil(STEP).saturating_sub(1);
    }

    /// Whether the bytes that were not asked for yet are some of these.
    #[inline]
    pub fn is_of(&self, from: *const u8, n: usize) -> bool {
        self.steps > 0 && self.next.wrapping_sub(from.addr()) < n
    }

    /// Ask for a little more of them, if there is more.
    #[inline]
    pub fn ask_for_step(&mut self) {
        if self.steps > 0 {
            self.steps -= 1;
            ask_for(std::ptr::without_provenance(self.next));
            self.next = self.next.wrapping_add(STEP);
        }
    }

    /// Ask for all the rest.
    #[inline]
    pub fn ask_for_all(&mut self) {
        while self.steps > 0 {
            self.ask_for_step();
        }
    }
}

/// Have the [`STEP`] bytes at `from` brought into the nearest cache.
#[inline]
fn near(from: *const u8) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..STEP).step_by(LINE) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch has no effect that can be observed, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = from;
}

/// Have the [`STEP`] bytes at `from` brought into the cache behind the nearest, where there is room for more of them to be under way.
#[inline]
pub(super) fn ask_for(from: *const u8) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..STEP).step_by(LINE) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch has no effect that can be observed, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = from;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(address: usize) -> *const u8 {
        std::ptr::without_provenance(address)
    }

    #[test]
    fn a_page_is_asked_for_once_and_no_more_of_what_is_larger() {
        for (len, steps) in [
            (4096, 15),
            (128 << 10, 15),
            (2048, 7),
            (2049, 8),
            (256, 0),
            (0, 0),
        ] {
            let mut ahead = Ahead::default();
            ahead.expect(at(0x10000), len);
            let mut taken = 0;
            while ahead.is_of(at(0x10000), PAGE) {
                assert_eq!(ahead.next, 0x10000 + STEP * (taken + 1));
                ahead.ask_for_step();
                taken += 1;
            }
            assert_eq!(taken, steps, "{len}");
        }
    }

    #[test]
    fn it_is_told_whose_bytes_they_are() {
        let mut ahead = Ahead::default();
        assert!(!ahead.is_of(at(0), usize::MAX), "none are expected");
        ahead.expect(at(0x10000), 4096);
        assert!(ahead.is_of(at(0x10000), 4096) && ahead.is_of(at(0x10100), 1));
        assert!(!ahead.is_of(at(0x10101), 4096) && !ahead.is_of(at(0xF000), 4096));
        ahead.expect(at(usize::MAX - 10), 4096);
        assert!(
            ahead.is_of(at(usize::MAX - 10), 4096),
            "around the end of all addresses"
        );
        ahead.ask_for_all();
        assert!(!ahead.is_of(at(usize::MAX - 10), 4096));
    }
}
