//! From the 64 bytes a guest wrote to something a backend can do, or the exact status of a refusal.
//!
//! Nothing here looks at guest memory twice, and nothing here knows queues, slots or threads.

mod deallocate;
mod namespace;
mod parse;
mod segments;

pub use deallocate::{MAX_RANGES, read_ranges};
pub use namespace::Namespace;
pub use parse::{Limits, Plan, Refusal, parse};
pub use segments::{Fill, MAX_SEGMENTS, resolve, resolve_sgl, walk, walk_data};

/// Guest memory of `len` bytes at address 0, for tests.
#[cfg(test)]
#[expect(unsafe_code, reason = "a test's memory")]
pub(crate) fn test_memory(len: usize) -> std::sync::Arc<crate::memory::GuestMap> {
    use crate::memory::{GuestMap, Region};
    let mut bytes = vec![0u64; len / 8].into_boxed_slice();
    let host = bytes.as_mut_ptr().cast();
    // SAFETY: the box is the owner and is never looked at again.
    let region = unsafe { Region::new(0, len as u64, host, std::sync::Arc::new(bytes)) };
    GuestMap::new(vec![std::sync::Arc::new(region)]).unwrap()
}
