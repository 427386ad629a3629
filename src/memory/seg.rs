//! One contiguous piece of foreign memory as the host sees it, and lists of them.

#![expect(
    unsafe_code,
    reason = "the fence: copies to and from memory that others write"
)]

use std::marker::PhantomData;

/// A contiguous piece of memory of this process that somebody else may write at any time.
///
/// It is laid out as the kernel's `struct iovec`, so that a list of them is an I/O vector. It says nothing about how long
/// the memory stays: whoever makes a [`Buffers`] of it promises that.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct HostSeg {
    ptr: *mut u8,
    len: usize,
}

const _: () = assert!(size_of::<HostSeg>() == size_of::<libc::iovec>());
const _: () = assert!(align_of::<HostSeg>() == align_of::<libc::iovec>());
const _: () = assert!(std::mem::offset_of!(libc::iovec, iov_len) == 8);

// SAFETY: a `HostSeg` is an address and a length; using it needs a `Buffers`, whose maker answers for the memory.
unsafe impl Send for HostSeg {}
// SAFETY: as above; nothing can be done through a shared reference but read the address.
unsafe impl Sync for HostSeg {}

impl HostSeg {
    /// A segment of no bytes.
    pub const EMPTY: Self = Self {
        ptr: std::ptr::null_mut(),
        len: 0,
    };

    pub(super) const fn new(ptr: *mut u8, len: usize) -> Self {
        Self { ptr, len }
    }

    pub(super) const fn ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// Address and length, for handing them to the kernel.
    pub(crate) const fn parts(&self) -> (*mut u8, usize) {
        (self.ptr, self.len)
    }

    /// A segment of any address, for tests of what happens with bad ones.
    #[cfg(test)]
    pub(crate) fn of_raw(ptr: *mut u8, len: usize) -> Self {
        Self::new(ptr, len)
    }

    /// A segment over a buffer of our own, for I/O that does not go to a guest.
    ///
    /// The borrow ends with this call; [`Buffers::new`] asks for the promise that the buffer outlives its use.
    pub fn of_slice(bytes: &mut [u8]) -> Self {
        Self::new(bytes.as_mut_ptr(), bytes.len())
    }

    /// Bytes in this segment.
    #[expect(
        clippy::len_without_is_empty,
        reason = "an empty segment is not a case anybody asks about"
    )]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// The first `len` bytes of this segment, or all of it.
    pub fn prefix(&self, len: usize) -> Self {
        Self::new(self.ptr, self.len.min(len))
    }

    /// Whether address and length are both multiples of `align`, a power of two.
    pub fn is_aligned(&self, align: usize) -> bool {
        (self.ptr.addr() | self.len) & (align.wrapping_sub(1)) == 0
    }
}

/// The memory of one transfer: segments in order, alive for `'a`.
#[derive(Clone, Copy, Debug)]
pub struct Buffers<'a> {
    segs: &'a [HostSeg],
    len: usize,
    alive: PhantomData<&'a [u8]>,
}

impl<'a> Buffers<'a> {
    /// No memory: for commands that transfer nothing.
    pub const NONE: Buffers<'static> = Buffers {
        segs: &[],
        len: 0,
        alive: PhantomData,
    };

    /// Vouch for segments.
    ///
    /// # Safety
    ///
    /// Each segment's memory must stay mapped, readable and writable for `'a`, and no Rust reference to any of it may be used
    /// while `'a` lasts. Other processes may write it at any time.
    #[inline]
    pub unsafe fn new(segs: &'a [HostSeg]) -> Self {
        let len = segs.iter().map(|s| s.len).sum();
        Self {
            segs,
            len,
            alive: PhantomData,
        }
    }

    /// Bytes in all segments together.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing to transfer.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The segments, in order: an I/O vector in layout.
    pub const fn segments(&self) -> &'a [HostSeg] {
        self.segs
    }

    /// The segments as the kernel wants them. The pointer is good as long as the slice of segments is.
    pub const fn iovecs(&self) -> (*const libc::iovec, usize) {
        (self.segs.as_ptr().cast(), self.segs.len())
    }

    /// The segments from the one on that holds byte `offset`, and how far into it that is. No segments if it is beyond the end.
    pub(crate) fn split_at(&self, offset: usize) -> (&'a [HostSeg], usize) {
        let mut inside = offset;
        for (i, seg) in self.segs.iter().enumerate() {
            if inside < seg.len {
                return (&self.segs[i..], inside);
            }
            inside -= seg.len;
        }
        (&[], 0)
    }

    /// Whether every segment starts and ends on a multiple of `align`, a power of two.
    pub fn is_aligned(&self, align: usize) -> bool {
        self.segs.iter().all(|s| s.is_aligned(align))
    }

    /// Whether every segment starts on a multiple of `start` and is a multiple of `len` long, both powers of two.
    pub fn is_aligned_as(&self, start: usize, len: usize) -> bool {
        let start = start.wrapping_sub(1);
        let len = len.wrapping_sub(1);
        self.segs
            .iter()
            .all(|s| s.ptr.addr() & start == 0 && s.len & len == 0)
    }

    /// Copy `src` in, from byte `offset` of the transfer on. Bytes beyond the end are not copied; returns the number that
    /// were.
    pub fn write(&self, offset: usize, src: &[u8]) -> usize {
        self.each(offset, src.len(), |ptr, done, n| {
            // SAFETY: `each` gives `n` bytes inside a segment, alive by the contract of `new`, and `done + n` is at most
            // `src.len()`. Memory of others cannot overlap `src`, to which a Rust reference exists.
            unsafe { std::ptr::copy_nonoverlapping(src.as_ptr().add(done), ptr, n) }
        })
    }

    /// Copy out into `dst`, from byte `offset` of the transfer on. Returns the number of bytes copied.
    pub fn read(&self, offset: usize, dst: &mut [u8]) -> usize {
        let out = dst.as_mut_ptr();
        self.each(offset, dst.len(), |ptr, done, n| {
            // SAFETY: as in `write`; `out` has room for `done + n` bytes and is ours alone.
            unsafe { std::ptr::copy_nonoverlapping(ptr, out.add(done), n) }
        })
    }

    /// Whether the bytes from `offset` on are `ours`. Each is looked at once.
    pub fn equals(&self, offset: usize, ours: &[u8]) -> bool {
        let mut copy = [0; 1024];
        let mut at = offset;
        ours.chunks(copy.len()).all(|ours| {
            let theirs = &mut copy[..ours.len()];
            let n = self.read(at, theirs);
            at += n;
            n == ours.len() && theirs == ours
        })
    }

    /// Zero `len` bytes from byte `offset` on. Returns the number of bytes zeroed.
    pub fn zero(&self, offset: usize, len: usize) -> usize {
        self.each(offset, len, |ptr, _, n| {
            // SAFETY: as in `write`.
            unsafe { std::ptr::write_bytes(ptr, 0, n) }
        })
    }

    /// Call `f(pointer, bytes done before, bytes here)` for the pieces of `[offset, offset + len)`.
    #[inline]
    pub(super) fn each(
        &self,
        offset: usize,
        len: usize,
        mut f: impl FnMut(*mut u8, usize, usize),
    ) -> usize {
        if let [seg] = self.segs
            && offset == 0
        {
            // Nearly all transfers.
            let n = seg.len.min(len);
            if n > 0 {
                f(seg.ptr, 0, n);
            }
            return n;
        }
        let mut skip = offset;
        let mut done = 0;
        for seg in self.segs {
            if done == len {
                break;
            }
            if skip >= seg.len {
                skip -= seg.len;
                continue;
            }
            let n = (seg.len - skip).min(len - done);
            // `skip < seg.len`, so this stays inside the segment.
            f(seg.ptr.wrapping_add(skip), done, n);
            done += n;
            skip = 0;
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_cross_segments_and_stop_at_the_end() {
        let mut a = [0u8; 3];
        let mut b = [0u8; 5];
        let segs = [HostSeg::of_slice(&mut a), HostSeg::of_slice(&mut b)];
        // SAFETY: `a` and `b` outlive `buffers` and are not touched while it is used.
        let buffers = unsafe { Buffers::new(&segs) };
        assert_eq!(buffers.len(), 8);
        let split = |at| {
            let (segs, inside) = buffers.split_at(at);
            (segs.len(), inside)
        };
        assert_eq!(
            [split(0), split(2), split(3), split(7)],
            [(2, 0), (2, 2), (1, 0), (1, 4)]
        );
        assert_eq!(split(8), (0, 0));
        assert_eq!(buffers.write(1, &[1, 2, 3, 4]), 4);
        assert_eq!(buffers.write(6, &[9; 10]), 2, "only two bytes are left");
        assert_eq!(buffers.write(8, &[7]), 0);
        let mut out = [0xff; 8];
        assert_eq!(buffers.read(0, &mut out), 8);
        assert_eq!(out, [0, 1, 2, 3, 4, 0, 9, 9]);
        assert!(buffers.equals(2, &[2, 3, 4]) && buffers.equals(8, &[]));
        assert!(!buffers.equals(2, &[2, 3, 5]) && !buffers.equals(7, &[9, 9]));
        assert_eq!(buffers.zero(2, 3), 3);
        assert_eq!(buffers.read(1, &mut out), 7);
        assert_eq!(out[..7], [1, 0, 0, 0, 0, 9, 9]);
    }

    #[test]
    fn alignment_is_that_of_every_segment() {
        let mut page = vec![0u64; 1024];
        let base = page.as_mut_ptr().cast::<u8>();
        let segs = [
            HostSeg::new(base, 512),
            HostSeg::new(base.wrapping_add(512), 8),
        ];
        // SAFETY: `page` outlives `buffers`.
        let buffers = unsafe { Buffers::new(&segs) };
        assert!(buffers.is_aligned(8));
        assert!(buffers.is_aligned_as(8, 8) && !buffers.is_aligned_as(8, 16));
        assert!(!buffers.is_aligned(512));
    }
}
