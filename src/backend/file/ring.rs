//! The fence around io_uring: what the kernel reads and writes, and for how long.
//!
//! Three kinds of memory are handed to the kernel: segments of a request (a [`Held`], alive by the contract of
//! `Channel::submit`), pieces of the bounce pool and of the zero buffer (both owned by the [`Ring`]). A ring that cannot get its
//! requests back from the kernel leaks what it owns.

#![expect(unsafe_code, reason = "the fence: memory given to the kernel")]

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};
use rustix::mm::{MapFlags, ProtFlags};

use crate::memory::{Held, HostSeg};

/// Bytes of one bounce buffer: the size of the pieces in which a transfer that cannot be direct is done.
pub(super) const BOUNCE_BYTES: usize = 128 << 10;

/// The kernel takes no more segments at once (UIO_MAXIOV).
const MAX_IOVECS: usize = 1024;

/// The zero buffer, and how many times one write names it.
const ZERO_BYTES: usize = 64 << 10;
const ZERO_TIMES: usize = 16;

/// Ring entries for operations at most; more wait in the channel.
const MAX_ENTRIES: u32 = 4096;

/// A piece of the bounce pool. Not `Clone`: who has it, has the buffer.
pub(super) struct Bounce(usize);

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

/// Anonymous memory, page-aligned.
struct Pages {
    base: *mut u8,
    len: usize,
}

// SAFETY: plain memory owned by this value.
unsafe impl Send for Pages {}

impl Pages {
    fn new(len: usize) -> io::Result<Self> {
        // SAFETY: a new private mapping at an address of the kernel's choice touches nothing that exists.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )?
        };
        Ok(Self {
            base: base.cast(),
            len,
        })
    }

    /// Pointer to byte `at`, of which `n` bytes are asked for.
    fn at(&self, at: usize, n: usize) -> *mut u8 {
        assert!(at <= self.len && n <= self.len - at, "offsets are ours");
        self.base.wrapping_add(at)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: our own mapping; `Ring` drops it only when the kernel has nothing of it any more.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.len) };
    }
}

/// An io_uring on one file, with the memory it needs.
pub(super) struct Ring {
    uring: ManuallyDrop<IoUring>,
    /// First the zero buffer, then the bounce buffers.
    pages: ManuallyDrop<Pages>,
    /// The zero buffer, named [`ZERO_TIMES`] times.
    zeroes: ManuallyDrop<Vec<HostSeg>>,
    free: Vec<Bounce>,
    limit: usize,
    /// Operations between `push` and `next`, without cancels.
    operations: usize,
    /// Cancels between `push` and `next`.
    cancels: usize,
}

impl Ring {
    /// A ring for `depth` operations at a time (more is fine, they have to wait) with `bounces` bounce buffers.
    ///
    /// # Errors
    ///
    /// What the kernel says: ENOSYS or EPERM where io_uring may not be used, ENOMEM, EMFILE.
    pub fn new(file: &File, depth: u32, bounces: usize) -> io::Result<Self> {
        // Half of the entries is for operations, half for their cancels, so that there always is room for a cancel.
        let limit = depth.clamp(1, MAX_ENTRIES).next_power_of_two();
        let entries = limit * 2;
        let uring = IoUring::builder()
            .setup_submit_all()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .build(entries)
            // Kernels before 5.19 know none of that, and do not need it.
            .or_else(|_| IoUring::builder().build(entries))?;
        uring.submitter().register_files(&[file.as_raw_fd()])?;
        let pages = Pages::new(ZERO_BYTES + bounces * BOUNCE_BYTES)?;
        // SAFETY: the zero buffer is the first piece of `pages`, which nobody looks at; the borrow ends with the statement.
        let zero = HostSeg::of_slice(unsafe {
            std::slice::from_raw_parts_mut(pages.at(0, ZERO_BYTES), ZERO_BYTES)
        });
        Ok(Self {
            uring: ManuallyDrop::new(uring),
            pages: ManuallyDrop::new(pages),
            zeroes: ManuallyDrop::new(vec![zero; ZERO_TIMES]),
            free: (0..bounces).map(Bounce).collect(),
            limit: limit as usize,
            operations: 0,
            cancels: 0,
        })
    }

    /// Readable when [`Self::next`] has something.
    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `uring`, and so `self`, lives.
        unsafe { BorrowedFd::borrow_raw(self.uring.as_raw_fd()) }
    }

    /// Whether [`Self::push`] takes another operation.
    pub fn has_room(&self) -> bool {
        self.operations < self.limit
    }

    /// Operations the kernel has, or will have at the next submit.
    pub fn operations(&self) -> usize {
        self.operations
    }

    /// Queue an operation; its result comes with `key`. Needs [`Self::has_room`], but for a cancel. `blocking`: let a worker thread
    /// of the kernel do it.
    ///
    /// `false`, and nothing queued, if there is no room.
    ///
    /// # Safety
    ///
    /// The memory named (a request's through its `Held`, or a bounce buffer) must stay as it is until [`Self::next`] gives the
    /// result of `key`, or this ring has been dropped.
    #[must_use]
    pub unsafe fn push(&mut self, key: u64, op: &Op<'_>, blocking: bool) -> bool {
        let cancel = matches!(op, Op::Cancel(_));
        if !cancel && !self.has_room() || cancel && self.cancels >= self.limit {
            return false;
        }
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
        // zero buffer and its list, which only go when the kernel has finished.
        let pushed = unsafe { self.uring.submission().push(&entry) }.is_ok();
        if pushed {
            *(if cancel {
                &mut self.cancels
            } else {
                &mut self.operations
            }) += 1;
        }
        pushed
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
                Vector::of(segs, inside)
            }
            Memory::Bounce(bounce, n) => Vector::One(self.bounce(bounce), length(n)),
            Memory::Zeroes(n) if n < 2 * ZERO_BYTES => {
                Vector::One(self.pages.at(0, ZERO_BYTES), length(n.min(ZERO_BYTES)))
            }
            Memory::Zeroes(n) => {
                let times = (n / ZERO_BYTES).min(ZERO_TIMES);
                Vector::Many(self.zeroes.as_ptr().cast(), times as u32)
            }
        }
    }

    fn bounce(&self, bounce: &Bounce) -> *mut u8 {
        self.pages
            .at(ZERO_BYTES + bounce.0 * BOUNCE_BYTES, BOUNCE_BYTES)
    }

    /// A bounce buffer, if one is free.
    pub fn take_bounce(&mut self) -> Option<Bounce> {
        self.free.pop()
    }

    /// Whether [`Self::take_bounce`] has one.
    pub fn has_bounce(&self) -> bool {
        !self.free.is_empty()
    }

    /// Give a bounce buffer back. The kernel must not have it any more.
    pub fn put_bounce(&mut self, bounce: Bounce) {
        self.free.push(bounce);
    }

    /// The first `n` bytes of a bounce buffer.
    ///
    /// # Safety
    ///
    /// The kernel does not have the buffer.
    pub unsafe fn bounced(&self, bounce: &Bounce, n: usize) -> &[u8] {
        let n = n.min(BOUNCE_BYTES);
        // SAFETY: inside the pool, initialized (mmap gives zeroes), and nobody writes it: the kernel does not by our contract, and
        // `fill` needs `&mut self`.
        unsafe { std::slice::from_raw_parts(self.bounce(bounce), n) }
    }

    /// Fill the start of a bounce buffer from a request's memory, from byte `from` on.
    ///
    /// # Safety
    ///
    /// The kernel does not have the buffer.
    pub unsafe fn fill(&mut self, bounce: &Bounce, held: &Held, from: usize, n: usize) {
        let n = n.min(BOUNCE_BYTES);
        // SAFETY: as in `bounced`; `&mut self` makes it ours alone.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.bounce(bounce), n) };
        held.buffers().read(from, bytes);
    }

    /// Hand what was pushed to the kernel.
    ///
    /// # Errors
    ///
    /// What the kernel says; what it did not take stays queued.
    pub fn submit(&mut self) -> io::Result<()> {
        while !self.uring.submission().is_empty() {
            if self.uring.submit()? == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
        }
        Ok(())
    }

    /// Whether there is something to submit.
    pub fn has_unsubmitted(&mut self) -> bool {
        !self.uring.submission().is_empty()
    }

    /// Let the kernel finish what it can only finish in our context.
    #[inline]
    pub fn run_tasks(&mut self) {
        if self.uring.submission().taskrun() {
            let _ = self.uring.submit();
        }
    }

    /// The next result: key, and what the system call would have returned.
    #[inline]
    pub fn next(&mut self) -> Option<(u64, i32)> {
        loop {
            let entry = self.uring.completion().next()?;
            if entry.user_data() == CANCEL_KEY {
                self.cancels = self.cancels.saturating_sub(1);
                continue;
            }
            self.operations = self.operations.saturating_sub(1);
            return Some((entry.user_data(), entry.result()));
        }
    }

    /// Wait until the kernel has nothing of ours any more.
    fn drain(&mut self) -> io::Result<()> {
        // Trouble that goes away by itself, in a row.
        let mut busy = 0;
        while self.operations + self.cancels > 0 {
            while self.next().is_some() {}
            if self.operations + self.cancels == 0 {
                break;
            }
            match self.uring.submit_and_wait(1) {
                Ok(_) => busy = 0,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e)
                    if busy < 1000
                        && matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) =>
                {
                    busy += 1;
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// The key of every [`Op::Cancel`]: nobody waits for its result.
pub(super) const CANCEL_KEY: u64 = u64::MAX;

impl Drop for Ring {
    fn drop(&mut self) {
        if let Err(e) = self.drain() {
            tracing::error!(
                cause = %e,
                operations = self.operations,
                "an io_uring does not give its requests back; leaking its memory"
            );
            return;
        }
        // Ends the ring's hold on the file now, not when the kernel gets round to it.
        let _ = self.uring.submitter().unregister_files();
        // SAFETY: dropped once, here, and not used after. The kernel has no operation left that could touch the memory.
        unsafe {
            ManuallyDrop::drop(&mut self.uring);
            ManuallyDrop::drop(&mut self.zeroes);
            ManuallyDrop::drop(&mut self.pages);
        }
    }
}

/// What one operation of the kernel reads or writes.
enum Vector {
    One(*mut u8, u32),
    Many(*const libc::iovec, u32),
}

impl Vector {
    /// The segments from byte `inside` of the first on: one that is begun goes alone.
    fn of(segs: &[HostSeg], inside: usize) -> Self {
        match segs {
            [] => Self::One(std::ptr::null_mut(), 0),
            [first, rest @ ..] if inside > 0 || rest.is_empty() => {
                let (ptr, len) = first.parts();
                // Inside the segment: `split_at` gives no more than its length.
                Self::One(ptr.wrapping_add(inside), length(len - inside.min(len)))
            }
            _ => Self::Many(segs.as_ptr().cast(), segs.len().min(MAX_IOVECS) as u32),
        }
    }
}

/// A length for the kernel; what is beyond comes out as a short transfer, which is continued.
fn length(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(1 << 30)
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
