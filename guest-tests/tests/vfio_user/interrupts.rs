//! Interrupts: MSI-X vectors that come and go, and the pin.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use guest_tests::FrontEnd;
use guest_tests::daemon::{Disk, Plan, TestDaemon, bring_up, queue};
use guest_tests::io::Io;
use guest_tests::vfio::{self, CONFIG, EVENTFD_TRIGGER, SET_IRQS};
use nvme_spec::Status;
use nvme_spec::opcode::NvmOpcode;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

const NONE: u32 = 1;
const MASK: u32 = 8;
const UNMASK: u32 = 16;
const TRIGGER: u32 = 32;

fn event() -> std::os::fd::OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()
}

/// Whether it is signalled within so many milliseconds; it is not any more then.
fn signalled(fd: &impl AsFd, ms: i64) -> bool {
    let limit = Timespec {
        tv_sec: 0,
        tv_nsec: ms * 1_000_000,
    };
    poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&limit)).unwrap();
    rustix::io::read(fd, &mut [0u8; 8]).is_ok()
}

fn set(
    front: &FrontEnd,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
    files: &[BorrowedFd<'_>],
) -> Result<(), vfio::ClientError> {
    let body = vfio::words(&[20, flags, index, start, count]);
    front.client().request(SET_IRQS, &body, files).map(|_| ())
}

/// Begin a command.
fn begin(io: &mut Io) {
    let verify = io.command(0, 1).to_sqe(NvmOpcode::VERIFY, 0, 0);
    io.pair.submit(verify, 0).unwrap();
    io.pair.ring();
}

/// Take so many completions, without waiting for an interrupt, and ring for them.
fn take(io: &mut Io, mut n: u32) {
    while n > 0 {
        n -= io.pair.poll(n, |_| ());
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// One command, from beginning to end.
fn go(io: &mut Io) {
    begin(io);
    take(io, 1);
}

#[test]
fn vectors_come_and_go() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 64)));
    let mut guest = bring_up(daemon.connect());
    let front = guest.device().clone();
    let mut io = Io::new(&mut guest, queue(1, 16), 1);
    let mine = event();
    set(&front, EVENTFD_TRIGGER, 2, 1, 1, &[mine.as_fd()]).unwrap();
    signalled(&mine, 0);
    go(&mut io);
    assert!(signalled(&mine, 900));
    // Triggered by the client itself, as for a test.
    set(&front, NONE | TRIGGER, 2, 1, 1, &[]).unwrap();
    assert!(signalled(&mine, 900));
    // No file: nobody listens. What comes then is not lost when somebody does again.
    set(&front, EVENTFD_TRIGGER, 2, 1, 1, &[]).unwrap();
    go(&mut io);
    assert!(!signalled(&mine, 20));
    set(&front, EVENTFD_TRIGGER, 2, 1, 1, &[mine.as_fd()]).unwrap();
    assert!(signalled(&mine, 900));
    set(&front, NONE | TRIGGER, 2, 0, 0, &[]).unwrap();
    go(&mut io);
    assert!(!signalled(&mine, 20));
}

#[test]
fn the_pin_is_a_level_that_is_masked_by_its_edge() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 64)));
    let mut guest = bring_up(daemon.connect());
    let front = guest.device().clone();
    let mut io = Io::new(&mut guest, queue(1, 16), 1);
    let offers = |guest: &mut vhost_user_nvme::driver::Driver<FrontEnd>| {
        guest
            .identify_controller()
            .unwrap()
            .oacs
            .doorbell_buffer_config()
    };
    assert!(offers(&mut guest));
    set(&front, NONE | TRIGGER, 2, 0, 0, &[]).unwrap();
    let pin = event();
    set(&front, EVENTFD_TRIGGER, 0, 0, 1, &[pin.as_fd()]).unwrap();
    let unmask = |front: &FrontEnd| set(front, NONE | UNMASK, 0, 0, 1, &[]).unwrap();
    let status = |front: &FrontEnd| {
        let mut out = [0; 2];
        front.client().read(CONFIG, 6, &mut out).unwrap();
        out[0] & 8 != 0
    };
    begin(&mut io);
    assert!(signalled(&pin, 900) && status(&front));
    begin(&mut io);
    assert!(!signalled(&pin, 20), "masked by the first");
    unmask(&front);
    assert!(signalled(&pin, 900), "both are there still");
    take(&mut io, 1);
    unmask(&front);
    assert!(signalled(&pin, 900), "one is");
    take(&mut io, 1);
    unmask(&front);
    assert!(!signalled(&pin, 20) && !status(&front), "no more than that");
    // What the guest has taken by itself is not told of.
    for _ in 0..40 {
        set(&front, NONE | MASK, 0, 0, 1, &[]).unwrap();
        go(&mut io);
        unmask(&front);
        assert!(!signalled(&pin, 0));
    }
    set(&front, NONE | MASK, 0, 0, 1, &[]).unwrap();
    begin(&mut io);
    assert!(!signalled(&pin, 20));
    unmask(&front);
    assert!(signalled(&pin, 900));
    take(&mut io, 1);
    unmask(&front);
    // Disabled in the command register.
    front.client().write(CONFIG, 4, &[6, 4]).unwrap();
    begin(&mut io);
    assert!(!signalled(&pin, 20));
    front.client().write(CONFIG, 4, &[6, 0]).unwrap();
    assert!(signalled(&pin, 900));
    take(&mut io, 1);

    // Who has the pin rings by registers: the client lowers the pin when it sees that.
    assert!(!offers(&mut guest));
    set(&front, NONE | TRIGGER, 0, 0, 0, &[]).unwrap();
    assert!(offers(&mut guest));
}

/// As KVM does it: its resample eventfd is signalled when the guest has ended the interrupt, and no message is sent.
#[test]
fn the_pin_is_unmasked_by_an_eventfd_too() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 64)));
    let mut guest = bring_up(daemon.connect());
    let front = guest.device().clone();
    let mut io = Io::new(&mut guest, queue(1, 16), 1);
    set(&front, NONE | TRIGGER, 2, 0, 0, &[]).unwrap();
    let (pin, unmask) = (event(), event());
    set(&front, EVENTFD_TRIGGER, 0, 0, 1, &[pin.as_fd()]).unwrap();
    let eventfd = EVENTFD_TRIGGER & !TRIGGER;
    set(&front, eventfd | UNMASK, 0, 0, 1, &[unmask.as_fd()]).unwrap();
    let end_of_interrupt = || rustix::io::write(&unmask, &1u64.to_ne_bytes()).unwrap();
    let comes = |pin: &std::os::fd::OwnedFd| (0..30).any(|_| signalled(pin, 900));
    begin(&mut io);
    assert!(comes(&pin));
    begin(&mut io);
    assert!(!signalled(&pin, 20), "masked by the first");
    end_of_interrupt();
    assert!(comes(&pin), "both are there still");
    take(&mut io, 1);
    end_of_interrupt();
    assert!(comes(&pin), "one is");
    take(&mut io, 1);
    end_of_interrupt();
    assert!(!signalled(&pin, 20), "no more than that");
    // That of another device at the same interrupt, when ours was not masked.
    end_of_interrupt();
    begin(&mut io);
    assert!(comes(&pin));
    assert!(!signalled(&pin, 20), "unmasked by what came before");
    // A message does it as well.
    set(&front, NONE | UNMASK, 0, 0, 1, &[]).unwrap();
    assert!(comes(&pin));
    // Nobody listens to the eventfd any more.
    set(&front, eventfd | UNMASK, 0, 0, 1, &[]).unwrap();
    end_of_interrupt();
    assert!(!signalled(&pin, 20));
    set(&front, NONE | UNMASK, 0, 0, 1, &[]).unwrap();
    assert!(comes(&pin));
    take(&mut io, 1);
}

#[test]
fn what_cannot_be_is_refused() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 64)));
    let mut guest = bring_up(daemon.connect());
    let front = guest.device().clone();
    let file = std::fs::File::open("/dev/null").unwrap();
    let (a, b) = (event(), event());
    let two = [a.as_fd(), b.as_fd()];
    for (what, flags, index, start, count, files) in [
        ("beyond the last", EVENTFD_TRIGGER, 2, 7, 2, &two[..]),
        ("wraps around", EVENTFD_TRIGGER, 2, u32::MAX, 2, &two),
        ("too few files", EVENTFD_TRIGGER, 2, 0, 3, &two),
        ("too many files", EVENTFD_TRIGGER, 2, 0, 1, &two),
        ("files for nothing", NONE | TRIGGER, 2, 0, 2, &two),
        ("no eventfd", EVENTFD_TRIGGER, 2, 0, 1, &[file.as_fd()]),
        ("no kind", EVENTFD_TRIGGER, 5, 0, 0, &[]),
        (
            "MSI, of which there are none",
            EVENTFD_TRIGGER,
            1,
            0,
            1,
            &two[..1],
        ),
        (
            "two kinds of data",
            EVENTFD_TRIGGER | NONE,
            2,
            0,
            1,
            &two[..1],
        ),
        ("two actions", NONE | TRIGGER | MASK, 2, 0, 1, &[]),
        ("a mask of vectors", NONE | MASK, 2, 0, 1, &[]),
        ("a mask by an eventfd", 4 | MASK, 0, 0, 1, &two[..1]),
        ("bytes that did not come", 2 | TRIGGER, 2, 0, 4, &[]),
    ] {
        let refused = set(&front, flags, index, start, count, files);
        assert!(
            matches!(refused, Err(vfio::ClientError::Refused(_))),
            "{what}"
        );
    }
    let mut io = Io::new(&mut guest, queue(1, 16), 1);
    assert_eq!(io.write(1, &[7; 512]), Status::SUCCESS);
}
