//! An io_uring on one file that keeps what the kernel may still touch, and waits for the kernel when it ends.

#![expect(unsafe_code, reason = "the fence: memory given to the kernel")]

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::{IoUring, cqueue, squeue};

use super::OpenError;

/// Ring entries for operations at most; more wait in the channel.
const MAX_ENTRIES: u32 = 4096;

/// The key of every cancel: nobody waits for its result.
pub(super) const CANCEL_KEY: u64 = u64::MAX;

/// What one operation of the kernel reads or writes.
pub(super) enum Vector {
    /// One piece of memory.
    One(*mut u8, u32),
    /// Several.
    Many(*const libc::iovec, u32),
}

/// The ring, and memory `M` that operations may name. A ring that cannot get its operations back from the kernel leaks both.
///
/// Completions are seen without a system call: the kernel puts them into memory we poll. Where it has to finish one in our context
/// it does so when we enter it anyway, or says (`TASKRUN_FLAG`) that we should: with COOP_TASKRUN it does not interrupt us for that.
/// DEFER_TASKRUN would need an enter for every look (ADR 8).
pub(super) struct Uring<S: squeue::EntryMarker, C: cqueue::EntryMarker, M> {
    uring: ManuallyDrop<IoUring<S, C>>,
    memory: ManuallyDrop<M>,
    limit: usize,
    /// Operations between `push` and `next`, without cancels.
    operations: usize,
    /// Cancels between `push` and `next`.
    cancels: usize,
}

impl<S: squeue::EntryMarker, C: cqueue::EntryMarker, M> Uring<S, C, M> {
    /// A ring for `depth` operations at a time (more is fine, they have to wait) on `file`, which is its fixed file 0. With `iopoll`
    /// it takes nothing but reads and writes, no cancels either; the kernel looks for their completions when [`Self::enter`] asks it
    /// to, and [`Self::fd`] does not tell of them. The kernel holds `file`, and `fence`, until the last operation of the ring has ended, also when
    /// this process has not: their locks tell who comes after it.
    ///
    /// # Errors
    ///
    /// What the kernel says: ENOSYS or EPERM where io_uring may not be used, ENOMEM, EMFILE, EINVAL without that kind of entries.
    pub fn new(
        file: &File,
        fence: Option<&File>,
        depth: u32,
        iopoll: bool,
        memory: M,
    ) -> io::Result<Self> {
        // Half of the entries is for operations, half for their cancels, so that there always is room for a cancel.
        let limit = depth.clamp(1, MAX_ENTRIES).next_power_of_two();
        let entries = limit * 2;
        let mut plain = IoUring::<S, C>::builder();
        if iopoll {
            plain.setup_iopoll();
        }
        let uring = plain
            .clone()
            .setup_submit_all()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .build(entries)
            // Kernels before 5.19 know none of that, and do not need it.
            .or_else(|_| plain.build(entries))?;
        let files = [file, fence.unwrap_or(file)].map(AsRawFd::as_raw_fd);
        uring.submitter().register_files(&files)?;
        Ok(Self {
            uring: ManuallyDrop::new(uring),
            memory: ManuallyDrop::new(memory),
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

    /// The memory.
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// The memory. What an operation names of it is the kernel's until its result is there.
    pub fn memory_mut(&mut self) -> &mut M {
        &mut self.memory
    }

    /// Whether [`Self::push`] takes another operation.
    #[inline]
    pub fn has_room(&self) -> bool {
        self.operations < self.limit
    }

    /// Operations the kernel has, or will have at the next submit.
    #[inline]
    pub fn operations(&self) -> usize {
        self.operations
    }

    /// Queue an entry with the key it carries: a cancel if that is [`CANCEL_KEY`], else an operation. `false`, and nothing queued, if
    /// there is no room.
    ///
    /// # Safety
    ///
    /// The memory that the entry names must stay as it is until [`Self::next`] gives the result of its key, or this ring has been
    /// dropped; that of `M` does.
    #[must_use]
    #[inline]
    pub unsafe fn push(&mut self, entry: &S) -> bool {
        let cancel = entry.get_user_data() == CANCEL_KEY;
        let count = match cancel {
            true => &mut self.cancels,
            false => &mut self.operations,
        };
        if *count >= self.limit {
            return false;
        }
        // SAFETY: by our own contract.
        let pushed = unsafe { self.uring.submission().push(entry) }.is_ok();
        *count += usize::from(pushed);
        pushed
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
    #[inline]
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

    /// Enter the kernel, with what was pushed, if anything: that is when a ring with `iopoll` looks for completions.
    pub fn enter(&mut self) {
        // What is not taken stays queued, and is seen by `has_unsubmitted`.
        let _ = self.uring.submit();
    }

    /// The next result: key, and what the system call would have returned.
    #[inline]
    pub fn next(&mut self) -> Option<(u64, i32)> {
        loop {
            let entry: cqueue::Entry = self.uring.completion().next()?.into();
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

impl<S: squeue::EntryMarker, C: cqueue::EntryMarker, M> Drop for Uring<S, C, M> {
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
            ManuallyDrop::drop(&mut self.memory);
        }
    }
}

/// A length for the kernel; what is beyond comes out as a short transfer, which is continued.
pub(super) fn length(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(1 << 30)
}

/// What to tell when [`Uring::new`] fails.
pub(super) fn no_ring(e: io::Error) -> OpenError {
    let hint = match e.raw_os_error() {
        Some(libc::ENOSYS | libc::EPERM | libc::EACCES) => {
            "allow io_uring (/proc/sys/kernel/io_uring_disabled, the container's seccomp profile)"
        }
        Some(libc::EMFILE | libc::ENFILE) => "raise the limit of open files (ulimit -n)",
        Some(libc::ENOMEM) => "raise the limit of locked memory (ulimit -l)",
        _ => "a kernel of 5.10 or later is needed",
    };
    OpenError::io("cannot make an io_uring", hint, e)
}
