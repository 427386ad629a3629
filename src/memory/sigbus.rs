//! The SIGBUS guard: a guest's memory file that is cut under its mapping fails that guest, not the process.
//!
//! Touching a page of a shared mapping that its file no longer has (or that no hugepage is left for) raises SIGBUS in
//! whichever thread does it, a poller for instance. For ranges that are registered here the handler puts zero pages where
//! the file was, marks the range and goes on; the owner of the range sees the mark and lets go of the guest. Faults
//! anywhere else go where they went before.

#![expect(
    unsafe_code,
    reason = "the fence: a signal handler that replaces mappings"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Ranges that can be guarded at a time, over all guests. Each file of a guest takes one, of which a front-end may have a few hundred: no small number of
/// them can take those of the others.
pub const MAX_RANGES: usize = 32_768;

/// One guarded range. The handler reads it without locks: `version` is odd while it is being changed, and a reader that
/// saw it change ignores what it read. The range a fault lies in does not change meanwhile: the faulting thread keeps it.
struct Slot {
    version: AtomicU32,
    start: AtomicUsize,
    len: AtomicUsize,
    wake: AtomicI32,
    hit: AtomicBool,
}

static SLOTS: [Slot; MAX_RANGES] = [const {
    Slot {
        version: AtomicU32::new(0),
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        wake: AtomicI32::new(-1),
        hit: AtomicBool::new(false),
    }
}; MAX_RANGES];

/// Slots from here on were never used, so the handler need not look at them.
static USED: AtomicUsize = AtomicUsize::new(0);

/// Which slots are taken; also serialises writers.
static TAKEN: Mutex<[bool; MAX_RANGES]> = Mutex::new([false; MAX_RANGES]);

static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

impl Slot {
    fn set(&self, start: usize, len: usize, wake: i32) {
        self.version.fetch_add(1, Ordering::AcqRel);
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        self.wake.store(wake, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// Start and length, if they hold `address`.
    fn holding(&self, address: usize) -> Option<(usize, usize)> {
        let before = self.version.load(Ordering::Acquire);
        let start = self.start.load(Ordering::Relaxed);
        let len = self.len.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let after = self.version.load(Ordering::Relaxed);
        (before == after && before.is_multiple_of(2) && address.wrapping_sub(start) < len)
            .then_some((start, len))
    }
}

/// A guarded range; dropping it ends the guard.
pub struct Guard {
    slot: usize,
    /// Signalled by the handler; kept open as long as the slot names it.
    _wake: Arc<OwnedFd>,
}

impl Guard {
    /// Guard the mapping `[start, start + len)`; `start` and `len` are multiples of its page size. When it faults,
    /// the eventfd `wake` is signalled.
    ///
    /// # Safety
    ///
    /// The range must be a mapping of the caller's, and nothing else, until the guard is dropped: on a fault all of it is
    /// replaced by private zero pages.
    ///
    /// # Errors
    ///
    /// There are [`MAX_RANGES`] guards already.
    pub unsafe fn new(start: *mut u8, len: usize, wake: Arc<OwnedFd>) -> io::Result<Self> {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = taken.iter().position(|t| !t).ok_or_else(|| {
            io::Error::other(format!(
                "more than {MAX_RANGES} memory regions over all controllers"
            ))
        })?;
        taken[slot] = true;
        SLOTS[slot].hit.store(false, Ordering::Relaxed);
        SLOTS[slot].set(start.addr(), len, wake.as_fd().as_raw_fd());
        USED.fetch_max(slot + 1, Ordering::Release);
        Ok(Self { slot, _wake: wake })
    }

    /// Whether an access to the range has faulted.
    pub fn hit(&self) -> bool {
        SLOTS[self.slot].hit.load(Ordering::Acquire)
    }

    /// The owner has put things right.
    pub fn clear(&self) {
        SLOTS[self.slot].hit.store(false, Ordering::Release);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        SLOTS[self.slot].set(0, 0, -1);
        taken[self.slot] = false;
    }
}

/// Install the handler, once for the process; further calls do nothing.
///
/// # Errors
///
/// What the kernel says of `sigaction`.
pub fn install() -> io::Result<()> {
    static ONCE: Mutex<bool> = Mutex::new(false);
    let mut done = ONCE.lock().unwrap_or_else(PoisonError::into_inner);
    if *done {
        return Ok(());
    }
    // SAFETY: `sigaction` is plain data for which all zeroes is a value.
    let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: only reads the present action into our variable.
    if unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &raw mut previous) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // Before the handler can run.
    let _ = PREVIOUS.set(previous);
    // The models bring a handler of their own, which must not take the place of ours.
    #[cfg(test)]
    let _ = std::thread::spawn(|| loom::model(|| {})).join();
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
    // SAFETY: as above.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler has the signature SA_SIGINFO asks for and does only what a signal handler may.
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    *done = true;
    Ok(())
}

extern "C" fn on_sigbus(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: errno is this thread's own; it is put back below, since the code we interrupt may be about to look at it.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: the kernel gives a valid siginfo; a positive code says that it was a fault, so that it holds an address.
    let fault = unsafe { ((*info).si_code > 0).then(|| (*info).si_addr() as usize) };
    let handled = fault.is_some_and(replace);
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
    if !handled {
        pass_on(signal, info, context);
    }
}

/// Put zero pages over the guarded range that holds `address`. `false` if there is none.
fn replace(address: usize) -> bool {
    let used = USED.load(Ordering::Acquire).min(MAX_RANGES);
    for slot in &SLOTS[..used] {
        let Some((start, len)) = slot.holding(address) else {
            continue;
        };
        // Before the range is replaced: whoever copied to or from the new pages finds the mark when it looks after its copy.
        slot.hit.store(true, Ordering::SeqCst);
        // SAFETY: the range is a mapping its owner gave us to replace (`Guard::new`), and the owner keeps it while a thread
        // uses it, as this one does. `mmap` and `write` are plain system calls and safe in a signal handler.
        unsafe {
            let at = libc::mmap(
                std::ptr::with_exposed_provenance_mut(start),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            if at == libc::MAP_FAILED {
                return false;
            }
            let one = 1u64.to_ne_bytes();
            libc::write(slot.wake.load(Ordering::Relaxed), one.as_ptr().cast(), 8);
        }
        return true;
    }
    false
}

/// Do what would have been done without us.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = PREVIOUS.get();
    match previous {
        Some(p) if p.sa_sigaction != libc::SIG_DFL && p.sa_sigaction != libc::SIG_IGN => {
            // SAFETY: `sigaction` gave us this address as that of a handler with the signature its flags name.
            unsafe {
                if p.sa_flags & libc::SA_SIGINFO != 0 {
                    let f: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                        std::mem::transmute(p.sa_sigaction);
                    f(signal, info, context);
                } else {
                    let f: extern "C" fn(libc::c_int) = std::mem::transmute(p.sa_sigaction);
                    f(signal);
                }
            }
        }
        _ => {
            // SAFETY: back to the default action, then once more: it takes effect when this handler returns.
            unsafe {
                libc::signal(signal, libc::SIG_DFL);
                libc::raise(signal);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

    #[test]
    fn a_file_cut_under_its_mapping_reads_as_zeroes_and_marks_only_its_range() {
        install().unwrap();
        install().unwrap();
        const LEN: usize = 4 * 4096;
        let map = || {
            let file = memfd_create("cut", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(&file, LEN as u64).unwrap();
            let flags = ProtFlags::READ | ProtFlags::WRITE;
            // SAFETY: a new mapping at an address of the kernel's choice.
            let at = unsafe { mmap(std::ptr::null_mut(), LEN, flags, MapFlags::SHARED, &file, 0) };
            (file, at.unwrap().cast::<u8>())
        };
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let (cut, a) = map();
        let (_whole, b) = map();
        // SAFETY: both are mappings of this test, unmapped below.
        let (ga, gb) = unsafe {
            (
                Guard::new(a, LEN, Arc::clone(&wake)).unwrap(),
                Guard::new(b, LEN, Arc::clone(&wake)).unwrap(),
            )
        };
        // SAFETY: inside the mappings; the guard makes the access past the end of the file one to zero pages.
        unsafe {
            a.add(3 * 4096).write_volatile(7);
            b.write_volatile(7);
            assert!(!ga.hit());
            ftruncate(&cut, 4096).unwrap();
            assert_eq!(a.add(3 * 4096).read_volatile(), 0);
            a.add(2 * 4096).write_volatile(9);
            assert_eq!(a.add(2 * 4096).read_volatile(), 9);
            assert_eq!(b.read_volatile(), 7);
        }
        assert!(ga.hit());
        assert!(!gb.hit());
        let mut count = [0; 8];
        assert_eq!(rustix::io::read(&*wake, &mut count), Ok(8));
        assert_eq!(u64::from_ne_bytes(count), 1, "replaced as a whole, once");
        drop((ga, gb));
        // SAFETY: our own mappings, not used any more.
        unsafe {
            munmap(a.cast(), LEN).unwrap();
            munmap(b.cast(), LEN).unwrap();
        }
    }

    #[test]
    fn a_fault_elsewhere_still_ends_the_process() {
        use std::os::unix::process::ExitStatusExt;
        const CHILD: &str = "SIGBUS_TEST_CHILD";
        if std::env::var_os(CHILD).is_some() {
            install().unwrap();
            let file = memfd_create("cut", MemfdFlags::CLOEXEC).unwrap();
            ftruncate(&file, 4096).unwrap();
            // SAFETY: a new mapping; the read is meant to fault and to end this process.
            unsafe {
                let at = mmap(
                    std::ptr::null_mut(),
                    4096,
                    ProtFlags::READ,
                    MapFlags::SHARED,
                    &file,
                    0,
                )
                .unwrap();
                ftruncate(&file, 0).unwrap();
                at.cast::<u8>().read_volatile();
            }
            std::process::exit(0);
        }
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "memory::sigbus::tests::a_fault_elsewhere_still_ends_the_process",
            ])
            .env(CHILD, "1")
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(libc::SIGBUS));
    }
}
