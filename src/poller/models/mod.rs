//! Proofs by exhaustion: `loom` runs each of these with every interleaving of the threads, and every value that a load may
//! see. Whoever sleeps although nobody is left who could wake it has lost a wake-up, and says so.
//!
//! The pollers' side is the pollers' own code ([`Bell`], [`Awaited`], [`doze`], [`mailbox`](super::mailbox), [`Interrupts`]); the guest's and the
//! front-end's sides are written down here as the specification has them. The models that leave something out must fail: they show
//! that the others would notice.

mod interrupts;
mod side_words;
mod switching;

use std::sync::Arc;

use loom::model::Builder;
use loom::sync::atomic::{AtomicU32, Ordering, fence};
use loom::sync::{Condvar, Mutex};
use loom::thread;
use nvme_spec::doorbell::{armed, need_event, suppressed};
use nvme_spec::ring::RingSize;

use super::bell::{Bell, Shadow};
use super::idle::{Awaited, Sleeper, Word, doze};
use super::mailbox::{post, take};

/// A shared word in `loom`'s memory. With `FENCED` = false the poller's fences are left out.
#[derive(Clone)]
struct Cell<const FENCED: bool>(Arc<AtomicU32>);

impl<const FENCED: bool> Cell<FENCED> {
    fn new(value: u32) -> Self {
        Self(Arc::new(AtomicU32::new(value)))
    }
}

impl<const FENCED: bool> Word for Cell<FENCED> {
    fn load(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }

    fn store(&self, value: u32) {
        self.0.store(value, Ordering::Release);
    }

    fn full_fence() {
        if FENCED {
            fence(Ordering::SeqCst);
        }
    }
}

/// An eventfd that is waited for by its edge: each write wakes, whether or not somebody sleeps yet.
#[derive(Clone)]
struct Event(Arc<(Mutex<Written>, Condvar)>);

struct Written {
    written: bool,
    /// Threads that may still write.
    writers: u32,
}

impl Event {
    fn new(writers: u32) -> Self {
        let written = false;
        Self(Arc::new((
            Mutex::new(Written { written, writers }),
            Condvar::new(),
        )))
    }

    fn write(&self) {
        self.0.0.lock().unwrap().written = true;
        self.0.1.notify_one();
    }

    /// One of the writers has written for the last time.
    fn done(&self) {
        self.0.0.lock().unwrap().writers -= 1;
        self.0.1.notify_one();
    }

    fn wait(&self) {
        let mut state = self.0.0.lock().unwrap();
        while !state.written && state.writers > 0 {
            state = self.0.1.wait(state).unwrap();
        }
        let woken = std::mem::replace(&mut state.written, false);
        drop(state);
        assert!(woken, "a wake-up was lost");
    }
}

/// Try everything; with a bound, everything that needs no more than so many switches of a thread that could go on.
fn explore(bound: Option<usize>, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = bound;
    builder.check(model);
}

const SIZE: RingSize = RingSize::new(4).unwrap();

/// The guest's side of a shadow doorbell, as Base has it in its annex on host considerations.
struct GuestBell<const FENCED: bool> {
    value: Cell<FENCED>,
    event_idx: Cell<FENCED>,
    register: Cell<FENCED>,
    kick: Event,
    /// Whether it has its own fence.
    fenced: bool,
    last: u16,
}

impl<const FENCED: bool> GuestBell<FENCED> {
    fn ring(&mut self, value: u16) {
        let old = std::mem::replace(&mut self.last, value);
        self.value.store(value.into());
        if self.fenced {
            fence(Ordering::SeqCst);
        }
        if need_event(self.event_idx.load() as u16, value, old) {
            self.register.store(value.into());
            self.kick.write();
        }
    }

    fn ring_all(mut self, values: &[u16]) {
        values.iter().for_each(|value| self.ring(*value));
        self.kick.done();
    }
}

/// A shadow doorbell at `start`, which the poller has looked at, from both sides.
fn bell<const F: bool>(start: u16, kick: &Event, fenced: bool) -> (Bell<Cell<F>>, GuestBell<F>) {
    let value = Cell::new(start.into());
    let event_idx = Cell::new(suppressed(start).into());
    let register = Cell::new(start.into());
    let shadow = Shadow {
        value: value.clone(),
        event_idx: event_idx.clone(),
    };
    let ours = Bell::new(register.clone(), Some(shadow), SIZE);
    let theirs = GuestBell {
        value,
        event_idx,
        register,
        kick: kick.clone(),
        fenced,
        last: start,
    };
    (ours, theirs)
}

/// A poller that looks at bells until each has come to its end.
struct Poller<const F: bool> {
    bells: Vec<(Bell<Cell<F>>, u16)>,
    /// The last bell is the head of a full completion queue that the first one's commands wait for.
    room: bool,
    kick: Event,
}

impl<const F: bool> Poller<F> {
    fn awaited(&self) -> Vec<Awaited<'_, Cell<F>>> {
        fn of<const F: bool>((bell, seen): &(Bell<Cell<F>>, u16)) -> (&Bell<Cell<F>>, u16) {
            (bell, *seen)
        }
        match self.room {
            false => self
                .bells
                .iter()
                .map(|b| Awaited {
                    tail: of(b),
                    room: None,
                })
                .collect(),
            true => vec![Awaited {
                tail: of(&self.bells[0]),
                room: Some(of(&self.bells[1])),
            }],
        }
    }

    fn run(mut self, ends: &[u16]) {
        loop {
            for (bell, seen) in &mut self.bells {
                let value = bell.load() as u16;
                if value != *seen {
                    *seen = value;
                    bell.suppress(value);
                }
            }
            if self.bells.iter().map(|(_, seen)| seen).eq(ends) {
                return;
            }
            doze(&mut self);
        }
    }
}

impl<const F: bool> Sleeper for Poller<F> {
    fn arm(&mut self) {
        self.awaited().iter().for_each(Awaited::arm);
    }

    fn full_fence(&self) {
        Cell::<F>::full_fence();
    }

    fn has_work(&self) -> bool {
        self.awaited().iter().any(Awaited::has_come)
    }

    fn block(&mut self) {
        self.kick.wait();
    }
}

/// A guest that rings over the end of the queue, beside a poller that sleeps whenever it can.
fn one_bell<const F: bool>(guest_fenced: bool) {
    let kick = Event::new(1);
    let (ours, theirs) = bell::<F>(3, &kick, guest_fenced);
    let guest = thread::spawn(move || theirs.ring_all(&[0, 1]));
    let poller = Poller {
        bells: vec![(ours, 3)],
        room: false,
        kick,
    };
    poller.run(&[1]);
    guest.join().unwrap();
}

#[test]
fn a_sleeping_poller_is_rung() {
    explore(None, || one_bell::<true>(true));
}

#[test]
#[should_panic(expected = "a wake-up was lost")]
fn without_the_pollers_fence_it_is_not() {
    explore(None, || one_bell::<false>(true));
}

#[test]
#[should_panic(expected = "a wake-up was lost")]
fn without_the_guests_fence_it_is_not() {
    explore(None, || one_bell::<true>(false));
}

#[test]
fn either_of_two_queues_wakes_their_poller() {
    explore(Some(3), || {
        let kick = Event::new(2);
        let (first, guest_first) = bell::<true>(3, &kick, true);
        let (second, guest_second) = bell::<true>(1, &kick, true);
        let one = thread::spawn(move || guest_first.ring_all(&[0]));
        let other = thread::spawn(move || guest_second.ring_all(&[2]));
        let poller = Poller {
            bells: vec![(first, 3), (second, 1)],
            room: false,
            kick,
        };
        poller.run(&[0, 2]);
        one.join().unwrap();
        other.join().unwrap();
    });
}

/// Commands wait for room in a completion queue, and the guest makes some. Then it rings the tail too.
fn room<const F: bool>(guest_fenced: bool) {
    let kick = Event::new(2);
    let (tail, guest_tail) = bell::<F>(2, &kick, guest_fenced);
    let (head, guest_head) = bell::<F>(3, &kick, guest_fenced);
    let guest = thread::spawn(move || {
        guest_head.ring_all(&[0]);
        guest_tail.ring_all(&[3]);
    });
    let poller = Poller {
        bells: vec![(tail, 2), (head, 3)],
        room: true,
        kick,
    };
    poller.run(&[3, 0]);
    guest.join().unwrap();
}

#[test]
fn room_in_a_completion_queue_wakes_its_poller() {
    explore(Some(4), || room::<true>(true));
}

#[test]
#[should_panic(expected = "a wake-up was lost")]
fn without_the_pollers_fence_room_does_not() {
    explore(Some(4), || room::<false>(true));
}

#[test]
#[should_panic(expected = "a wake-up was lost")]
fn an_event_index_for_the_wrong_value_loses_a_ring() {
    // The trap that `armed` describes: armed for what was seen, not looked at again.
    explore(None, || {
        let kick = Event::new(1);
        let (_, theirs) = bell::<true>(3, &kick, true);
        let event_idx = theirs.event_idx.clone();
        let guest = thread::spawn(move || theirs.ring_all(&[0, 1]));
        event_idx.store(armed(3).into());
        fence(Ordering::SeqCst);
        kick.wait();
        guest.join().unwrap();
    });
}

/// A flag that is raised for what is in a queue of counters.
fn mail<const F: bool>() {
    let (flag, event) = (Cell::<F>::new(0), Event::new(2));
    let queue = Arc::new(AtomicU32::new(0));
    let senders: Vec<_> = (0..2)
        .map(|_| {
            let (flag, event, queue) = (flag.clone(), event.clone(), Arc::clone(&queue));
            thread::spawn(move || {
                post(&flag, || {
                    queue.fetch_add(1, Ordering::AcqRel);
                    true
                });
                event.write();
                event.done();
            })
        })
        .collect();
    struct Reader<const F: bool>(Cell<F>, Event);
    impl<const F: bool> Sleeper for Reader<F> {
        fn arm(&mut self) {}
        fn full_fence(&self) {
            Cell::<F>::full_fence();
        }
        fn has_work(&self) -> bool {
            self.0.load() != 0
        }
        fn block(&mut self) {
            self.1.wait();
        }
    }
    let pop = || {
        let some = queue.load(Ordering::Acquire) > 0;
        some.then(|| queue.fetch_sub(1, Ordering::AcqRel))
    };
    let mut reader = Reader(flag, event);
    let mut read = 0;
    while read < 2 {
        if reader.0.load() != 0 {
            while take(&reader.0, pop).is_some() {
                read += 1;
            }
        } else {
            doze(&mut reader);
        }
    }
    for sender in senders {
        sender.join().unwrap();
    }
}

#[test]
fn mail_is_never_left_unread() {
    explore(Some(3), mail::<true>);
}

#[test]
#[should_panic(expected = "a wake-up was lost")]
fn without_its_fences_mail_is_left() {
    explore(Some(3), mail::<false>);
}
