//! A poller posts completions, and a guest takes them in its interrupt handler.

use std::sync::Arc;
use std::time::{Duration, Instant};

use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;

use super::{Cell, Event, explore};
use crate::poller::idle::Word;
use crate::poller::interrupt::{Coalescing, GRACE, Interrupts, Verdict};

/// How the poller of an interrupt model ends.
#[derive(Clone, Copy, PartialEq)]
enum End {
    /// It looks on until all is settled.
    Looks,
    /// It goes to sleep, and interrupts for what is left.
    Sleeps,
    /// It goes to sleep and leaves it.
    Leaves,
}

/// A poller that posts `count` entries with a look after each, and a guest that takes them in its interrupt handler. Grace lasts for
/// ever here: nothing is ever mended by time.
fn interrupts(count: u32, end: End) {
    let entries: Arc<Vec<AtomicU32>> = Arc::new((0..count).map(|_| AtomicU32::new(0)).collect());
    let (head, call) = (Cell::<true>::new(0), Event::new(1));
    let poller = {
        let (entries, head, call) = (Arc::clone(&entries), head.clone(), call.clone());
        thread::spawn(move || {
            post_and_interrupt(&entries, &head, &call, end);
            call.done();
        })
    };
    let mut taken = 0;
    while taken < entries.len() {
        call.wait();
        let before = taken;
        while entries
            .get(taken)
            .is_some_and(|e| e.load(Ordering::Acquire) == 1)
        {
            taken += 1;
        }
        if taken != before {
            head.store(taken as u32);
        }
    }
    poller.join().unwrap();
}

fn post_and_interrupt(entries: &[AtomicU32], head: &Cell<true>, call: &Event, end: End) {
    let now = Instant::now();
    let mut irq = Interrupts::default();
    let step = |irq: &mut Interrupts, posted: u32, grace: Duration| {
        let head = head.load();
        let (verdict, _) = irq.step(head, posted - head, Coalescing::default(), grace, || now);
        if verdict == Verdict::Signal {
            call.write();
        }
        verdict
    };
    let mut posted = 0;
    for entry in entries {
        entry.store(1, Ordering::Release);
        posted += 1;
        irq.posted();
        step(&mut irq, posted, GRACE);
    }
    match end {
        End::Looks => {
            while irq.waiting() {
                if let Verdict::Wait(_) = step(&mut irq, posted, GRACE) {
                    thread::yield_now();
                }
            }
        }
        End::Sleeps if irq.waiting() => {
            step(&mut irq, posted, Duration::ZERO);
        }
        End::Sleeps | End::Leaves => {}
    }
}

#[test]
fn every_completion_is_consumed_while_the_poller_looks_on() {
    explore(None, || interrupts(2, End::Looks));
    explore(Some(3), || interrupts(3, End::Looks));
}

#[test]
fn every_completion_is_consumed_when_the_poller_sleeps() {
    explore(None, || interrupts(2, End::Sleeps));
    explore(Some(3), || interrupts(4, End::Sleeps));
}

#[test]
#[should_panic(expected = "a wake-up was lost")]
fn a_poller_that_sleeps_over_an_interrupt_loses_it() {
    explore(None, || interrupts(2, End::Leaves));
}
