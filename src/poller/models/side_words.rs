//! A front-end without irqfd: it spares the kick of a poller that is awake, and the poller spares the eventfd of a front-end that watches
//! (`docs/VHOST_USER.md`, side words).

use loom::sync::atomic::{Ordering, fence};
use loom::thread;

use super::{Cell, Event, explore};
use crate::poller::front::{Front, tell};
use crate::poller::idle::{Sleeper, Word, doze};

/// A poller that tells of being awake, looks at one doorbell, and sleeps whenever it can.
struct Poller<const F: bool> {
    front: Front<Cell<F>>,
    doorbell: Cell<F>,
    seen: u32,
    kick: Event,
}

impl<const F: bool> Sleeper for Poller<F> {
    fn arm(&mut self) {
        self.front.asleep();
    }

    fn full_fence(&self) {
        Cell::<F>::full_fence();
    }

    fn has_work(&self) -> bool {
        self.doorbell.load() != self.seen
    }

    fn block(&mut self) {
        self.kick.wait();
    }
}

/// A front-end that stores doorbells, and kicks unless the poller is awake.
fn kicks<const F: bool>(front_end_fenced: bool) {
    const RINGS: u32 = 2;
    let (doorbell, awake, kick) = (Cell::<F>::new(0), Cell::<F>::new(0), Event::new(1));
    let front_end = {
        let (doorbell, awake, kick) = (doorbell.clone(), awake.clone(), kick.clone());
        thread::spawn(move || {
            for value in 1..=RINGS {
                doorbell.store(value);
                if front_end_fenced {
                    fence(Ordering::SeqCst);
                }
                if awake.load() == 0 {
                    kick.write();
                }
            }
            kick.done();
        })
    };
    let mut poller = Poller {
        front: Front::new(awake),
        doorbell,
        seen: 0,
        kick,
    };
    loop {
        // As a poller does it: it is awake while there are commands.
        let value = poller.doorbell.load();
        if value != poller.seen {
            poller.seen = value;
            poller.front.awake();
        }
        if poller.seen == RINGS {
            break;
        }
        doze(&mut poller);
    }
    front_end.join().unwrap();
}

#[test]
fn a_poller_that_says_it_sleeps_is_kicked() {
    explore(None, || kicks::<true>(true));
}

#[test]
#[should_panic(expected = "a wake-up was lost")]
fn without_the_pollers_fence_a_kick_is_spared_that_was_needed() {
    explore(None, || kicks::<false>(true));
}

#[test]
#[should_panic(expected = "a wake-up was lost")]
fn without_the_front_ends_fence_a_kick_is_spared_that_was_needed() {
    explore(None, || kicks::<true>(false));
}

/// A poller that tells of completions, and a front-end that watches for a look, stops, looks once more, and then waits for the eventfd.
fn calls<const F: bool>(looks_once_more: bool) {
    const CALLS: u32 = 2;
    let (calls, watching, call) = (Cell::<F>::new(0), Cell::<F>::new(0), Event::new(1));
    let poller = {
        let (calls, watching, call) = (calls.clone(), watching.clone(), call.clone());
        thread::spawn(move || {
            for _ in 0..CALLS {
                let count = || calls.0.fetch_add(1, Ordering::Release);
                if !tell::<Cell<F>>(count, || watching.load()) {
                    call.write();
                }
            }
            call.done();
        })
    };
    let mut injected = 0;
    loop {
        watching.store(1);
        fence(Ordering::SeqCst);
        injected = injected.max(calls.load());
        watching.store(0);
        fence(Ordering::SeqCst);
        if looks_once_more {
            injected = injected.max(calls.load());
        }
        if injected == CALLS {
            break;
        }
        call.wait();
        injected = injected.max(calls.load());
        if injected == CALLS {
            break;
        }
    }
    poller.join().unwrap();
}

#[test]
fn every_interrupt_is_seen_or_signalled() {
    explore(Some(4), || calls::<true>(true));
}

#[test]
#[should_panic(expected = "a wake-up was lost")]
fn without_the_pollers_fence_an_interrupt_is_neither() {
    explore(Some(4), || calls::<false>(true));
}

#[test]
#[should_panic(expected = "a wake-up was lost")]
fn without_a_last_look_an_interrupt_is_neither() {
    explore(Some(4), || calls::<true>(false));
}
