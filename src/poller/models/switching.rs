//! Doorbells go from mapped to trapped and back while the guest rings.

use std::sync::Arc;

use loom::sync::atomic::{AtomicU32, Ordering, fence};
use loom::thread;

use super::{Cell, Event, SIZE, explore};
use crate::poller::bell::Bell;
use crate::poller::idle::{Sleeper, Word, doze};
use crate::poller::mailbox::{post, take};

/// A guest's doorbell that is mapped or trapped, as the virtual guest has it: the store, then a kick if it is trapped.
#[derive(Clone)]
struct Switched {
    word: Cell<true>,
    mapped: Arc<AtomicU32>,
    kick: Event,
}

impl Switched {
    fn ring(&self, value: u32) {
        self.word.store(value);
        fence(Ordering::SeqCst);
        if self.mapped.load(Ordering::Acquire) == 0 {
            self.kick.write();
        }
    }

    /// The guest's thread.
    fn ring_all(self, values: &[u32]) {
        values.iter().for_each(|value| self.ring(*value));
        self.kick.done();
    }

    /// The front-end maps or unmaps it, and says so when it is done.
    fn switch(&self, mapped: bool) {
        self.mapped.store(mapped.into(), Ordering::Release);
        fence(Ordering::SeqCst);
    }
}

/// A poller that may be told of a switch, as `thread.rs` does it: it sleeps while doorbells are trapped and naps while they are mapped.
struct Switching {
    bell: Bell<Cell<true>>,
    seen: u16,
    mapped: bool,
    /// It would like them trapped.
    wants: Event,
    asked: bool,
    flag: Cell<true>,
    mail: Arc<AtomicU32>,
    kick: Event,
    /// Whether it naps as it should.
    naps: bool,
}

impl Switching {
    fn run(mut self, end: u16) {
        loop {
            if self.flag.load() != 0 {
                let mail = Arc::clone(&self.mail);
                let pop = || match mail.swap(0, Ordering::AcqRel) {
                    0 => None,
                    mode => Some(mode == 2),
                };
                while let Some(mapped) = take(&self.flag, pop) {
                    self.mapped = mapped;
                }
            }
            self.seen = self.bell.load() as u16;
            if self.seen == end {
                return;
            }
            doze(&mut self);
        }
    }
}

impl Sleeper for Switching {
    fn arm(&mut self) {
        if self.mapped && !std::mem::replace(&mut self.asked, true) {
            self.wants.write();
        }
        self.bell.arm(self.seen);
    }

    fn full_fence(&self) {
        Cell::<true>::full_fence();
    }

    fn has_work(&self) -> bool {
        self.flag.load() != 0 || self.bell.load() as u16 != self.seen
    }

    fn block(&mut self) {
        match self.mapped && self.naps {
            true => thread::yield_now(),
            false => self.kick.wait(),
        }
    }
}

/// Doorbells, the front-end's hand on them, and a poller on them.
fn switching(mapped: bool, naps: bool) -> (Switched, Switching) {
    // The guest and the controller write it.
    let (word, kick) = (Cell::new(0), Event::new(2));
    let doorbell = Switched {
        word: word.clone(),
        mapped: Arc::new(AtomicU32::new(mapped.into())),
        kick: kick.clone(),
    };
    let poller = Switching {
        bell: Bell::new(word, None, SIZE),
        seen: 0,
        mapped,
        wants: Event::new(1),
        asked: false,
        flag: Cell::new(0),
        mail: Arc::new(AtomicU32::new(0)),
        kick,
        naps,
    };
    (doorbell, poller)
}

/// The controller tells the poller how doorbells are: 1 = trapped, 2 = mapped.
fn tell(mode: u32, flag: &Cell<true>, mail: &AtomicU32, kick: &Event) {
    post(flag, || {
        mail.store(mode, Ordering::Release);
        true
    });
    kick.write();
}

/// A poller that wants to sleep has mapped doorbells trapped while the guest rings. `early`: it is told before the front-end is done.
fn trap(early: bool) {
    let (doorbell, poller) = switching(true, true);
    let guest = {
        let doorbell = doorbell.clone();
        thread::spawn(move || doorbell.ring_all(&[1, 2]))
    };
    let (flag, mail) = (poller.flag.clone(), Arc::clone(&poller.mail));
    let wants = poller.wants.clone();
    let controller = thread::spawn(move || {
        wants.wait();
        if early {
            tell(1, &flag, &mail, &doorbell.kick);
            doorbell.switch(false);
        } else {
            doorbell.switch(false);
            tell(1, &flag, &mail, &doorbell.kick);
        }
        doorbell.kick.done();
    });
    // If the guest was so quick that there was nothing to wait for, the controller is never asked: it is now.
    let wants = poller.wants.clone();
    poller.run(2);
    wants.write();
    guest.join().unwrap();
    controller.join().unwrap();
}

#[test]
fn no_ring_is_lost_while_doorbells_are_trapped() {
    explore(Some(3), || trap(false));
}

#[test]
#[should_panic(expected = "a wake-up was lost")]
fn who_is_told_before_they_are_trapped_loses_one() {
    explore(Some(3), || trap(true));
}

/// Another poller has doorbells mapped while this one sleeps: the front-end maps them and the controller tells of it, in
/// whichever order.
fn map(naps: bool) {
    let (doorbell, poller) = switching(false, naps);
    let guest = {
        let doorbell = doorbell.clone();
        thread::spawn(move || doorbell.ring_all(&[1, 2]))
    };
    let (flag, mail, kick) = (
        poller.flag.clone(),
        Arc::clone(&poller.mail),
        poller.kick.clone(),
    );
    let front_end = thread::spawn(move || doorbell.switch(true));
    let controller = thread::spawn(move || {
        tell(2, &flag, &mail, &kick);
        kick.done();
    });
    poller.run(2);
    guest.join().unwrap();
    front_end.join().unwrap();
    controller.join().unwrap();
}

#[test]
fn no_ring_is_lost_while_doorbells_are_mapped() {
    explore(Some(2), || map(true));
}

#[test]
#[should_panic(expected = "a wake-up was lost")]
fn who_sleeps_while_they_are_mapped_loses_one() {
    explore(Some(2), || map(false));
}
