//! The memory of a request that is pending, without its lifetime.

#![expect(unsafe_code, reason = "the fence: a lifetime is replaced by a promise")]

use super::{Buffers, HostSeg};

/// A [`Buffers`] of which the borrow has ended, but not the promise.
#[derive(Clone, Copy)]
pub(crate) struct Held {
    segs: *const HostSeg,
    count: usize,
}

// SAFETY: an address and a length; looking at it goes through `buffers`, whose promise does not depend on the thread.
unsafe impl Send for Held {}

impl Held {
    /// No memory.
    pub const NONE: Self = Self {
        segs: std::ptr::null(),
        count: 0,
    };

    /// Hold on to the memory of a request.
    ///
    /// # Safety
    ///
    /// Until the value is not used any more, the list of segments must stay where it is, and each segment's memory as the contract
    /// of [`Buffers::new`] says.
    pub unsafe fn new(data: &Buffers<'_>) -> Self {
        Self {
            segs: data.segments().as_ptr(),
            count: data.segments().len(),
        }
    }

    /// The memory.
    pub fn buffers(&self) -> Buffers<'_> {
        if self.count == 0 {
            return Buffers::NONE;
        }
        // SAFETY: `new` got the promise that both hold as long as `self` is used; the result does not outlive this borrow.
        unsafe { Buffers::new(std::slice::from_raw_parts(self.segs, self.count)) }
    }
}
