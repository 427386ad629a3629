//! Memory of our own that stands in where a request's memory cannot be given to the kernel as it is.

#![expect(unsafe_code, reason = "the fence: memory the kernel reads and writes")]

use std::io;

use rustix::mm::{MapFlags, ProtFlags};

use crate::memory::Held;

/// Bytes of one bounce buffer: the size of the pieces in which a transfer that cannot be direct is done.
pub(super) const BOUNCE_BYTES: usize = 128 << 10;

/// A piece of a [`Bounces`]. Not `Clone`: who has it, has the buffer.
pub(super) struct Bounce(usize);

/// Anonymous memory, page-aligned: a head of the owner's own, zero at first, then bounce buffers.
pub(super) struct Bounces {
    base: *mut u8,
    len: usize,
    head: usize,
    free: Vec<Bounce>,
}

// SAFETY: plain memory owned by this value.
unsafe impl Send for Bounces {}

impl Bounces {
    /// A head of `head` bytes (a multiple of the page size) and `count` bounce buffers.
    ///
    /// # Errors
    ///
    /// What the kernel says when there is no memory.
    pub fn new(head: usize, count: usize) -> io::Result<Self> {
        let len = head + count * BOUNCE_BYTES;
        // SAFETY: a new private mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len.max(1),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )?
        };
        Ok(Self {
            base: base.cast(),
            len: len.max(1),
            head,
            free: (0..count).map(Bounce).collect(),
        })
    }

    /// Pointer to byte `at`, of which `n` bytes are asked for.
    fn at(&self, at: usize, n: usize) -> *mut u8 {
        assert!(at <= self.len && n <= self.len - at, "offsets are ours");
        self.base.wrapping_add(at)
    }

    /// `n` bytes of the head, from byte `at` on. Valid as long as this value lives.
    pub fn head(&self, at: usize, n: usize) -> *mut u8 {
        assert!(at <= self.head && n <= self.head - at, "offsets are ours");
        self.at(at, n)
    }

    /// The address of a bounce buffer of [`BOUNCE_BYTES`] bytes. Valid as long as this value lives.
    pub fn address(&self, bounce: &Bounce) -> *mut u8 {
        self.at(self.head + bounce.0 * BOUNCE_BYTES, BOUNCE_BYTES)
    }

    /// A bounce buffer, if one is free.
    pub fn take(&mut self) -> Option<Bounce> {
        self.free.pop()
    }

    /// Whether [`Self::take`] has one.
    pub fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// Give a bounce buffer back. The kernel must not have it any more.
    pub fn put(&mut self, bounce: Bounce) {
        self.free.push(bounce);
    }

    /// The first `n` bytes of a bounce buffer.
    ///
    /// # Safety
    ///
    /// The kernel does not have the buffer.
    pub unsafe fn bytes(&self, bounce: &Bounce, n: usize) -> &[u8] {
        let n = n.min(BOUNCE_BYTES);
        // SAFETY: inside the pool, initialized (mmap gives zeroes), and nobody writes it: the kernel does not by our contract, and
        // `fill` needs `&mut self`.
        unsafe { std::slice::from_raw_parts(self.address(bounce), n) }
    }

    /// Make the first `n` bytes of a bounce buffer zero.
    ///
    /// # Safety
    ///
    /// The kernel does not have the buffer.
    pub unsafe fn zero(&mut self, bounce: &Bounce, n: usize) {
        // SAFETY: as in `fill`.
        unsafe { std::ptr::write_bytes(self.address(bounce), 0, n.min(BOUNCE_BYTES)) };
    }

    /// Fill the start of a bounce buffer from a request's memory, from byte `from` on.
    ///
    /// # Safety
    ///
    /// The kernel does not have the buffer.
    pub unsafe fn fill(&mut self, bounce: &Bounce, held: &Held, from: usize, n: usize) {
        let n = n.min(BOUNCE_BYTES);
        // SAFETY: as in `bytes`; `&mut self` makes it ours alone.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.address(bounce), n) };
        held.buffers().read(from, bytes);
    }
}

impl Drop for Bounces {
    fn drop(&mut self) {
        // SAFETY: our own mapping; who owns this drops it only when the kernel has nothing of it any more.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.len) };
    }
}
