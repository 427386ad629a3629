//! File descriptors that wake a sleeping poller.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{EventfdFlags, epoll, eventfd};

use super::OpenError;

const HINT: &str = "raise the limit of open files (ulimit -n)";

/// An eventfd, not readable.
pub(super) fn event_fd() -> Result<OwnedFd, OpenError> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|e| OpenError::io("cannot make an eventfd", HINT, e))
}

/// Make it readable. A counter that is full is readable already, so that no error matters.
pub(super) fn signal(fd: impl AsFd) {
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

/// Make it not readable.
pub(super) fn clear(fd: impl AsFd) {
    let _ = rustix::io::read(fd, &mut [0u8; 8]);
}

/// Something that is readable while one of two descriptors is. Both must stay open as long.
pub(super) fn either(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> Result<OwnedFd, OpenError> {
    let make = || {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (i, fd) in [a, b].into_iter().enumerate() {
            let data = epoll::EventData::new_u64(i as u64);
            epoll::add(&epoll, fd, data, epoll::EventFlags::IN)?;
        }
        Ok(epoll)
    };
    make().map_err(|e: rustix::io::Errno| OpenError::io("cannot make an epoll", HINT, e))
}
