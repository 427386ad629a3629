//! State that cannot be written anew: what was kept before must not come back, for the guest has gone on without it.

use super::*;
use std::path::PathBuf;

impl World {
    /// Where the next generation is written.
    fn begun(&mut self) -> PathBuf {
        let place = self.process().actor.keep.path();
        place.unwrap().join("state.new")
    }

    /// The process is killed. In the next one, no generation can be begun as long as it is `obstructed`: as if the tmpfs were full.
    fn next(&mut self, obstructed: bool) {
        let begun = self.begun();
        self.process = None;
        let _ = std::fs::remove_dir(&begun);
        self.start();
        if obstructed {
            // A file of this name cannot be made.
            std::fs::create_dir(&begun).unwrap();
        }
    }

    /// The guest resets the controller, and uses one queue pair.
    fn reset(&mut self) {
        self.disable();
        assert!(!self.csts().cfs());
        self.enable();
        self.create_cq(1);
        self.create_sq(1, 1);
    }
}

/// A guest with a block of ones, whose commands still lie in its queues.
fn world() -> World {
    let mut w = World::new(true, false);
    w.bring_up();
    w.run(1, w.fill(5, 1));
    w
}

#[test]
fn what_was_kept_before_does_not_come_back() {
    // `used`: the guest is still there; else its machine was reset meanwhile. Whether what was kept fits the new queues depends on how
    // far both had come.
    for (used, before, since) in [true, false]
        .into_iter()
        .flat_map(|used| (1..8).map(move |n| (used, n, n % 3 + 1)))
    {
        let mut w = World::new(true, false);
        w.reset();
        for _ in 0..before {
            w.run(1, w.fill(5, 1));
        }
        w.next(true);
        assert!(w.come(used));
        assert_eq!(w.csts().cfs(), used);
        w.reset();
        for _ in 0..since {
            w.run(1, w.fill(5, 2));
        }
        w.next(false);
        assert!(w.come(true));
        assert!(w.csts().cfs(), "nothing was kept of what it did since");
        w.reset();
        assert_eq!(w.block(1, 5), 2);
        w.check();
    }
}

#[test]
fn a_guest_that_was_told_is_told_again_by_the_next_process() {
    let mut w = world();
    w.next(true);
    assert!(w.come(true));
    // It has not come to reset it yet.
    w.next(false);
    assert!(w.come(true));
    assert!(w.csts().cfs());
    // Here it was written down.
    w.next(false);
    assert!(w.come(true));
    assert!(w.csts().cfs());
    w.reset();
    assert_eq!(w.block(1, 5), 1);
    w.check();
}

#[test]
fn a_reset_begins_to_keep_again() {
    let mut w = world();
    w.next(true);
    assert!(w.come(true));
    w.reset();
    w.run(1, w.fill(5, 2));
    let begun = w.begun();
    std::fs::remove_dir(begun).unwrap();
    w.reset();
    w.run(1, w.fill(6, 3));
    w.next(false);
    assert!(w.connect(true));
    assert_eq!((w.block(1, 5), w.block(1, 6)), (2, 3));
    w.check();
}

/// Let a process come upon state that is of no use, and end after any of its stores; whoever comes then tells the guest.
fn is_told_whenever_the_process_ends(spoil: impl Fn(&mut World)) {
    for stop in 0.. {
        let mut w = world();
        let whole = Arc::clone(&w.map);
        spoil(&mut w);
        w.crash = Some(Crash::after(stop));
        let came = w.come(true);
        w.crash = None;
        w.map = whole;
        if came {
            assert!(stop > 10);
            return;
        }
        w.next(false);
        assert!(w.come(true));
        // Or there is still everything.
        assert!(w.csts().cfs() || w.csts().rdy(), "stop {stop}");
        if w.csts().cfs() {
            w.reset();
        }
        assert_eq!(w.block(1, 5), 1);
        w.check();
    }
}

#[test]
fn a_guest_whose_queues_are_not_found_is_told_whenever_the_process_ends() {
    is_told_whenever_the_process_ends(|w| {
        w.next(false);
        // Its memory is not what it was.
        w.map = memory(BASE + 0x8_0000, LEN / 2);
    });
}

#[test]
fn a_guest_whose_state_is_gone_is_told_whenever_the_process_ends() {
    is_told_whenever_the_process_ends(|w| {
        let state = w.begun().with_file_name("state");
        w.process = None;
        std::fs::remove_file(state).unwrap();
        w.start();
    });
}

#[test]
fn state_that_cannot_be_removed_keeps_the_controller_from_being_enabled() {
    let mut w = world();
    let state = w.begun().with_file_name("state");
    w.process = None;
    // Neither removed nor replaced as a file is.
    std::fs::remove_file(&state).unwrap();
    std::fs::create_dir(&state).unwrap();
    w.start();
    assert!(w.come(true));
    assert!(w.csts().cfs());
    w.disable();
    assert!(!w.csts().cfs());
    let on = Cc::new().with_en(true).with_iosqes(6).with_iocqes(4);
    w.write(offset::CC, &on.into_bits().to_le_bytes());
    w.until("CFS", |w| w.csts().cfs());
    std::fs::remove_dir(&state).unwrap();
    w.reset();
    assert_eq!(w.block(1, 5), 1);
    w.next(false);
    assert!(w.connect(true), "and it is kept again");
    w.check();
}
