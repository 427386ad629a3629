//! What the main thread hears of: signals, panics, and the last front-end's leave.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR2};

/// Threads whose panic ends a connection, and is dealt with there. All others end the process.
pub const CONNECTION_THREADS: &str = "vu-";

/// Exit status after a panic.
const EXIT_PANIC: i32 = 70;
/// Exit status after a second signal.
const EXIT_AT_ONCE: i32 = 1;

/// Something the main thread is to look at.
pub enum Event {
    /// SIGTERM or SIGINT.
    Signal,
    /// SIGUSR2: hand over to the program that is installed now.
    Upgrade,
    /// A [`Waker`].
    Other,
}

/// Where events come in.
pub struct Events {
    receiver: UnixStream,
    sender: UnixStream,
    signalled: Arc<AtomicBool>,
    upgrade: Arc<AtomicBool>,
}

/// Makes the main thread look.
pub struct Waker(UnixStream);

impl Waker {
    /// Make it look.
    pub fn wake(&self) {
        // A full socket has woken it already.
        let _ = io::Write::write(&mut &self.0, &[0]);
    }
}

impl Events {
    /// Begin to catch signals. From the second on, a signal ends the process at once.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn new() -> io::Result<Self> {
        let (receiver, sender) = UnixStream::pair()?;
        receiver.set_nonblocking(true)?;
        sender.set_nonblocking(true)?;
        let signalled = Arc::new(AtomicBool::new(false));
        for signal in [SIGTERM, SIGINT] {
            let armed = Arc::clone(&signalled);
            // In this order: the first signal arms the second.
            signal_hook::flag::register_conditional_shutdown(signal, EXIT_AT_ONCE, armed)?;
            signal_hook::flag::register(signal, Arc::clone(&signalled))?;
            signal_hook::low_level::pipe::register(signal, sender.try_clone()?)?;
        }
        let upgrade = Arc::new(AtomicBool::new(false));
        signal_hook::flag::register(SIGUSR2, Arc::clone(&upgrade))?;
        signal_hook::low_level::pipe::register(SIGUSR2, sender.try_clone()?)?;
        Ok(Self {
            receiver,
            sender,
            signalled,
            upgrade,
        })
    }

    /// Something that makes [`Self::wait`] return.
    ///
    /// # Errors
    ///
    /// No file descriptor is left.
    pub fn waker(&self) -> io::Result<Waker> {
        self.sender.try_clone().map(Waker)
    }

    /// Wait for an event.
    pub fn wait(&self) -> Event {
        // What woke others before may have been meant for this.
        if !self.signalled() {
            self.sleep(None);
        }
        if self.signalled() {
            Event::Signal
        } else if self.upgrade.swap(false, Ordering::AcqRel) {
            Event::Upgrade
        } else {
            Event::Other
        }
    }

    /// Whether SIGTERM or SIGINT has come.
    pub fn signalled(&self) -> bool {
        self.signalled.load(Ordering::Acquire)
    }

    /// Signals for an upgrade that came until now asked for the one that has just been tried.
    pub fn forget_upgrade(&self) {
        self.upgrade.store(false, Ordering::Release);
    }

    /// Wait for any event, or until `deadline`.
    pub fn wait_until(&self, deadline: Instant) {
        let left = deadline.saturating_duration_since(Instant::now());
        self.sleep(Some(Timespec {
            tv_sec: left.as_secs().cast_signed(),
            tv_nsec: left.subsec_nanos().into(),
        }));
    }

    fn sleep(&self, limit: Option<Timespec>) {
        let _ = poll(
            &mut [PollFd::new(&self.receiver, PollFlags::IN)],
            limit.as_ref(),
        );
        let _ = io::Read::read(&mut &self.receiver, &mut [0; 64]);
    }
}

/// A thread that panics must not leave guests hanging: the process ends, so that whoever watches it can start it again.
pub fn exit_on_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        tell(info);
        let thread = std::thread::current();
        let name = thread.name().unwrap_or_default();
        if !name.starts_with(CONNECTION_THREADS) {
            tracing::error!(
                thread = name,
                "the daemon ends because a thread failed: {info}"
            );
            std::process::exit(EXIT_PANIC);
        }
    }));
}

/// Every controller needs two file descriptors for each queue: take as many as we may have.
pub fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(e) = setrlimit(Resource::Nofile, raised) {
        tracing::debug!("the limit of open files stays {:?}: {e}", limit.current);
    }
}
