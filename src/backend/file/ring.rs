//! The fence around io_uring: what the kernel reads and writes, and for how long.
//!
//! Three kinds of memory are handed to the kernel: segments of a request (a [`Held`], alive by the contract of
//! `Channel::submit`), pieces of the bounce pool and of the zero buffer (both owned by the [`Ring`], until the kernel has
//! finished: [`Uring`]).

#![expect(unsafe_code, reason = "the fence: memory given to the kernel")]

use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, AsRawFd};

use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{cqueue, opcode, squeue};

use crate::backend::bounce::{Bounce, Bounces};
use crate::backend::uring::{Uring, Vector, length};
use crate::memory::{Held, HostSeg};

/// The kernel takes no more segments at once (UIO_MAXIOV).
const MAX_IOVECS: usize = 1024;

/// The zero buffer, and how many times one write names it.
const ZERO_BYTES: usize = 64 << 10;
const ZERO_TIMES: usize = 16;

/// What a read or write moves.
pub(super) enum Memory<'a> {
    /// The request's own memory from byte `from` on.
    Request(&'a Held, usize),
    /// The first bytes of a bounce buffer.
    Bounce(&'a Bounce, usize),
    /// That many zeroes, at most.
    Zeroes(usize),
}

/// One operation for the kernel.
pub(super) enum Op<'a> {
    /// Read at a file offset.
    Read(Memory<'a>, u64),
    /// Write at a file offset; `true`: data on stable media before it completes.
    Write(Memory<'a>, u64, bool),
    /// `fdatasync`.
    Sync,
    /// `fallocate` with a mode, on offset and length.
    Allocate(i32, u64, u64),
    /// Cancel the operation with that key.
    Cancel(u64),
}

/// What operations of a file's ring may name of its own.
pub(super) struct Owned {
    /// Bounce buffers; their head is the zero buffer.
    bounces: Bounces,
    /// The zero buffer, named [`ZERO_TIMES`] times.
    zeroes: Vec<HostSeg>,
}

// SAFETY: plain memory and its address, owned together.
unsafe impl Send for Owned {}

/// An io_uring on one file, with the memory it needs.
pub(super) struct Ring(Uring<squeue::Entry, cqueue::Entry, Owned>);

impl Deref for Ring {
    type Target = Uring<squeue::Entry, cqueue::Entry, Owned>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Ring {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl Ring {
    /// A ring for `depth` operations at a time (more is fine, they have to wait) with `bounces` bounce buffers. `fence` and `iopoll` as in
    /// [`Uring::new`].
    ///
    /// # Errors
    ///
    /// As [`Uring::new`].
    pub fn new(
        file: &File,
        fence: Option<&File>,
        depth: u32,
        bounces: usize,
        iopoll: bool,
    ) -> io::Result<Self> {
        let bounces = Bounces::new(ZERO_BYTES, bounces)?;
        let zeroes = bounces.head(0, ZERO_BYTES);
        // SAFETY: the head of `bounces`, which nobody looks at; the borrow ends with the statement.
        let zero = HostSeg::of_slice(unsafe { std::slice::from_raw_parts_mut(zeroes, ZERO_BYTES) });
        let zeroes = vec![zero; ZERO_TIMES];
        Uring::new(file, fence, depth, iopoll, Owned { bounces, zeroes }).map(Self)
    }

    /// Queue an operation; its result comes with `key`. Needs [`Uring::has_room`], but for a cancel. `blocking`: let a worker thread
    /// of the kernel do it.
    ///
    /// `false`, and nothing queued, if there is no room.
    ///
    /// # Safety
    ///
    /// The memory named (a request's through its `Held`, or a bounce buffer) must stay as it is until [`Uring::next`] gives the
    /// result of `key`, or this ring has been dropped.
    #[must_use]
    pub unsafe fn queue(&mut self, key: u64, op: &Op<'_>, blocking: bool) -> bool {
        let entry = match *op {
            Op::Read(ref memory, offset) => self.read(memory, offset),
            Op::Write(ref memory, offset, fua) => self.write(memory, offset, fua),
            Op::Sync => opcode::Fsync::new(Fixed(0))
                .flags(FsyncFlags::DATASYNC)
                .build(),
            Op::Allocate(mode, offset, len) => opcode::Fallocate::new(Fixed(0), len)
                .offset(offset)
                .mode(mode)
                .build(),
            Op::Cancel(key) => opcode::AsyncCancel::new(key).build(),
        };
        let mut entry = entry.user_data(key);
        if blocking {
            entry = entry.flags(squeue::Flags::ASYNC);
        }
        // SAFETY: every pointer in the entry is to the memory of a request or a bounce buffer (alive by our contract), or to the
        // zero buffer and its list, which are the ring's own.
        unsafe { self.0.push(&entry) }
    }

    fn read(&self, memory: &Memory<'_>, offset: u64) -> squeue::Entry {
        match self.vector(memory) {
            Vector::One(ptr, n) => opcode::Read::new(Fixed(0), ptr, n).offset(offset).build(),
            Vector::Many(v, n) => opcode::Readv::new(Fixed(0), v, n).offset(offset).build(),
        }
    }

    fn write(&self, memory: &Memory<'_>, offset: u64, fua: bool) -> squeue::Entry {
        let flags = if fua { libc::RWF_DSYNC } else { 0 };
        match self.vector(memory) {
            Vector::One(ptr, n) => opcode::Write::new(Fixed(0), ptr, n)
                .offset(offset)
                .rw_flags(flags)
                .build(),
            Vector::Many(v, n) => opcode::Writev::new(Fixed(0), v, n)
                .offset(offset)
                .rw_flags(flags)
                .build(),
        }
    }

    /// As much of the memory as fits into one operation.
    fn vector(&self, memory: &Memory<'_>) -> Vector {
        match *memory {
            Memory::Request(held, from) => {
                let buffers = held.buffers();
                let (segs, inside) = buffers.split_at(from);
                vector(segs, inside)
            }
            Memory::Bounce(bounce, n) => {
                Vector::One(self.memory().bounces.address(bounce), length(n))
            }
            Memory::Zeroes(n) if n < 2 * ZERO_BYTES => {
                let n = n.min(ZERO_BYTES);
                Vector::One(self.memory().bounces.head(0, n), length(n))
            }
            Memory::Zeroes(n) => {
                let times = (n / ZERO_BYTES).min(ZERO_TIMES);
                Vector::Many(self.memory().zeroes.as_ptr().cast(), times as u32)
            }
        }
    }

    /// The bounce buffers. One that an operation names is the kernel's until its result is there.
    pub fn bounces(&mut self) -> &mut Bounces {
        &mut self.memory_mut().bounces
    }
}

/// The segments from byte `inside` of the first on: one that is begun goes alone.
fn vector(segs: &[HostSeg], inside: usize) -> Vector {
    match segs {
        [] => Vector::One(std::ptr::null_mut(), 0),
        [first, rest @ ..] if inside > 0 || rest.is_empty() => {
            let (ptr, len) = first.parts();
            // Inside the segment: `split_at` gives no more than its length.
            Vector::One(ptr.wrapping_add(inside), length(len - inside.min(len)))
        }
        _ => Vector::Many(segs.as_ptr().cast(), segs.len().min(MAX_IOVECS) as u32),
    }
}

/// Discard a range of a block device. Blocks until the device has done it.
///
/// # Errors
///
/// What the kernel says: EOPNOTSUPP from a device that cannot.
pub(super) fn discard(file: &File, offset: u64, len: u64) -> io::Result<()> {
    const BLKDISCARD: libc::Ioctl = 0x1277;
    let range = [offset, len];
    // SAFETY: BLKDISCARD reads two 64-bit numbers.
    let result = unsafe { libc::ioctl(file.as_fd().as_raw_fd(), BLKDISCARD, range.as_ptr()) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use rustix::fs::{FlockOperation, flock};

    use super::*;

    #[test]
    fn a_ring_holds_its_fence_as_long_as_it_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let fence = File::create(&path).unwrap();
        flock(&fence, FlockOperation::LockExclusive).unwrap();
        let ring = Ring::new(&tempfile::tempfile().unwrap(), Some(&fence), 1, 0, false).unwrap();
        // As if the process had gone, and the ring had not.
        drop(fence);
        let other = File::open(&path).unwrap();
        let is_free = || flock(&other, FlockOperation::NonBlockingLockExclusive).is_ok();
        assert!(!is_free());
        drop(ring);
        let end = Instant::now() + Duration::from_secs(10);
        while !is_free() {
            assert!(Instant::now() < end, "the kernel still holds it");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
