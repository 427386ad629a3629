//! File descriptors of types that know them only as numbers.

#![expect(
    unsafe_code,
    reason = "the fence: a number becomes a borrowed descriptor"
)]

use std::os::fd::{AsRawFd, BorrowedFd};

/// The descriptor of `owner`, borrowed as long as `owner` is.
///
/// By the contract of [`AsRawFd`] that number is open at least while the owner is borrowed, for the types this crate uses it
/// with: the eventfds of `vmm-sys-util`, and the sockets and received files of `vhost`.
pub(crate) fn borrow<T: AsRawFd + ?Sized>(owner: &T) -> BorrowedFd<'_> {
    // SAFETY: the owner keeps its descriptor open while it is borrowed, and it is not -1.
    unsafe { BorrowedFd::borrow_raw(owner.as_raw_fd()) }
}
