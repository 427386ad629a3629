//! A guest behind a front-end that watches for completions, as our QEMU device without irqfd does.

use std::sync::atomic::fence;

use super::*;

/// The front-end's half of the side words of vring 1.
struct FrontEnd {
    /// Interrupts counted by the daemon that were injected.
    seen: u32,
    kicks: u32,
    /// Interrupts that came while it watched, and by eventfd.
    watched: u32,
    called: u32,
}

impl FrontEnd {
    fn word(guest: &Guest, word: SideWord) -> &AtomicU32 {
        guest.window.side(1, word).unwrap()
    }

    fn pending(&mut self, guest: &Guest) -> bool {
        let calls = Self::word(guest, SideWord::Calls).load(Ordering::Acquire);
        std::mem::replace(&mut self.seen, calls) != calls
    }

    /// Whether the eventfd was signalled; what was counted is told of by that, too.
    fn called(&mut self, guest: &Guest) -> bool {
        use std::io::Read as _;
        let called = (&guest.calls).read(&mut [0; 8]).is_ok();
        if called {
            self.pending(guest);
            self.called += 1;
        }
        called
    }

    /// A write to the guest's tail doorbell. Whether there was an interrupt before it returned.
    fn ring(&mut self, guest: &mut Guest, watch: bool) -> bool {
        let awake = |guest: &Guest| Self::word(guest, SideWord::Awake).load(Ordering::Acquire) != 0;
        let watch = watch && awake(guest);
        if watch {
            Self::word(guest, SideWord::Watching).store(1, Ordering::Release);
            fence(Ordering::SeqCst);
        }
        let tail = u32::from(guest.tail);
        guest
            .register(Doorbell::Sq(1))
            .store(tail, Ordering::Release);
        fence(Ordering::SeqCst);
        if !awake(guest) {
            use std::io::Write as _;
            self.kicks += 1;
            (&guest.kick).write_all(&1u64.to_ne_bytes()).unwrap();
        }
        if !watch {
            return false;
        }
        let calls = Self::word(guest, SideWord::Calls);
        for _ in 0..1000 {
            if calls.load(Ordering::Acquire) != self.seen {
                break;
            }
            std::thread::yield_now();
        }
        Self::word(guest, SideWord::Watching).store(0, Ordering::Release);
        fence(Ordering::SeqCst);
        let interrupted = self.pending(guest);
        self.watched += u32::from(interrupted);
        interrupted
    }
}

/// `bursts` times `depth` commands, each burst consumed only when an interrupt says so. Would hang if one were lost.
fn run(idle: IdlePolicy, shadow: bool, bursts: u32, depth: u16) -> (FrontEnd, Guest) {
    let mut g = Guest::behind(64, idle, shadow, true);
    let mut front = FrontEnd {
        seen: 0,
        kicks: 0,
        watched: 0,
        called: 0,
    };
    for burst in 0..bursts {
        let mut interrupted = false;
        for cid in 0..depth {
            g.push(io(NvmOpcode::READ, cid, 0, 1, DATA, 0));
            let rings = if shadow {
                let at = DoorbellStride::new(3).shadow_offset(Doorbell::Sq(1));
                let word = SharedWord::in_guest(&g.map, SHADOW.doorbells + at).unwrap();
                let event = SharedWord::in_guest(&g.map, SHADOW.event_idx + at).unwrap();
                let old = word.load() as u16;
                word.store(u32::from(g.tail));
                fence(Ordering::SeqCst);
                need_event(event.load() as u16, g.tail, old)
            } else {
                true
            };
            // Now and then it does not watch: it has missed too often.
            interrupted |= rings && front.ring(&mut g, burst % 5 != 0);
        }
        let mut left = depth;
        let until = Instant::now() + Duration::from_secs(20);
        while left > 0 {
            interrupted |= front.called(&g);
            if std::mem::take(&mut interrupted) {
                while let Some(cqe) = g.take() {
                    assert_eq!(cqe.status(), Status::SUCCESS);
                    left -= 1;
                }
                let head = g.head;
                if shadow {
                    let at = DoorbellStride::new(3).shadow_offset(Doorbell::Cq(1));
                    let word = SharedWord::in_guest(&g.map, SHADOW.doorbells + at).unwrap();
                    word.store(u32::from(head));
                } else {
                    g.register(Doorbell::Cq(1))
                        .store(u32::from(head), Ordering::Release);
                }
            }
            assert!(
                Instant::now() < until,
                "{left} completions in burst {burst}: no interrupt"
            );
            std::thread::yield_now();
        }
    }
    (front, g)
}

#[test]
fn no_interrupt_and_no_kick_is_lost_to_a_front_end_that_watches() {
    for idle in [
        IdlePolicy::Adaptive,
        IdlePolicy::Interrupt,
        IdlePolicy::Poll,
    ] {
        for shadow in [false, true] {
            for depth in [1, 7] {
                let (front, g) = run(idle, shadow, 300, depth);
                assert!(front.watched + front.called >= 1);
                drop(g);
            }
        }
    }
}

#[test]
fn an_interrupt_that_is_watched_for_spares_the_eventfd() {
    let window = DoorbellWindow::new(4096).unwrap();
    let vector = Vector::new(&window, 3);
    let (calls, theirs) = eventfd();
    vector.set(Some(theirs));
    let word = |word| window.side(3, word).unwrap();
    let called = || {
        use std::io::Read as _;
        (&calls).read(&mut [0; 8]).is_ok()
    };
    word(SideWord::Watching).store(1, Ordering::Release);
    vector.signal().unwrap();
    assert!(called(), "a front-end that is not attentive does not watch");
    assert_eq!(word(SideWord::Calls).load(Ordering::Acquire), 0);
    assert!(!vector.is_dear());
    word(SideWord::Attentive).store(1, Ordering::Release);
    assert!(vector.is_dear());
    vector.signal().unwrap();
    assert!(!called());
    assert_eq!(word(SideWord::Calls).load(Ordering::Acquire), 1);
    word(SideWord::Watching).store(0, Ordering::Release);
    vector.signal().unwrap();
    assert!(called());
    assert_eq!(word(SideWord::Calls).load(Ordering::Acquire), 2);
}

#[test]
fn who_looks_says_so_and_who_has_gone_does_not() {
    let (_, mut g) = run(IdlePolicy::Poll, false, 3, 1);
    let awake = Arc::clone(&g.window);
    let awake = || {
        awake
            .side(1, SideWord::Awake)
            .unwrap()
            .load(Ordering::Acquire)
    };
    assert_eq!(awake(), 1);
    let gone = g.ask(|token| Message::Reset { token, key: KEY });
    assert_eq!(gone, Ok(true));
    assert_eq!(awake(), 0);
}
