//! Proofs by exhaustion: `loom` runs each of these with every interleaving of the threads, and every value that a load may
//! see. Whoever sleeps although nobody is left who could wake it has lost a wake-up, and says so.
//!
//! The pollers' side is the pollers' own code ([`Bell`], [`Awaited`], [`doze`], [`mailbox`](super::mailbox), [`Interrupts`]); the guest's and the
//! front-end's sides are written down here as the specification has them. The models that leave something out must fail: they show
//! that the others would notice.

use std::sync::Arc;
use std::time::{Duration, Instant};

use loom::model::Builder;
use loom::sync::atomic::{AtomicU32, Ordering, fence};
use loom::sync::{Condvar, Mutex};
use loom::thread;
use nvme_spec::doorbell::{armed, need_event, suppressed};
use nvme_spec::ring::RingSize;

use super::bell::{Bell, Shadow};
use super::idle::{Awaited, Sleeper, Word, doze};
use super::interrupt::{Coalescing, GRACE, Interrupts, Verdict};
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
