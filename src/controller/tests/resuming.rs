//! Suspended and resumed, or not: what a front-end is told that comes back, against pollers that are scripts.

use super::*;
use crate::controller::FrontEnd;
use crate::poller::{DoorbellMode, Fetched, Journal, Posted};
use nvme_spec::event::AsyncEvent;
use nvme_spec::ring::Phase;

const ID: [u8; 16] = [3; 16];

struct Front;

impl FrontEnd for Front {
    fn request_doorbells(&self, _: DoorbellMode) {}
}

/// A rig whose front-end presented an id, with a queue pair and an event request that waits.
fn rig() -> Rig {
    let mut rig = Rig::new();
    rig.shared.set_instance(Some(ID));
    rig.mail(|done| Mail::Go(false, done));
    rig.enable();
    rig.create_pair(1);
    rig.submit(command(AdminOpcode::ASYNC_EVENT_REQUEST));
    assert!(rig.completions().is_empty());
    // As a poller would have written it.
    let journal = Journal::new(Arc::clone(rig.actor.state.as_ref().unwrap()), 0);
    let (number, phase, last) = (1, Phase::FIRST, (0, 0));
    let posted = Posted {
        number,
        tail: 0,
        phase,
        last,
    };
    journal.record(1, posted);
    journal.fetched(1, Fetched { number: 2, head: 0 });
    rig
}

fn suspend(rig: &mut Rig) {
    let done = rig.mail(Mail::Suspend);
    rig.turns();
    assert!(is_done(&done));
}

/// The front-end comes with this id and all else, and says go.
fn come(rig: &mut Rig, id: Option<[u8; 16]>, used: bool) {
    rig.shared.inbox.send(Mail::Attach(Arc::new(Front)));
    rig.shared.set_instance(id);
    let memory = rig.mail(|done| Mail::Memory(Arc::clone(&rig.map), done));
    let gone = rig.mail(|done| Mail::Go(used, done));
    rig.turns();
    assert!(is_done(&memory) && is_done(&gone));
    assert_eq!(rig.shared.keeping().code(id), 0, "it is in use");
}

#[test]
fn a_front_end_that_comes_back_finds_everything_as_it_was() {
    let mut rig = rig();
    rig.sent();
    suspend(&mut rig);
    assert_eq!(rig.sent(), ["0: Suspend"]);
    assert_eq!(rig.shared.keeping().code(Some(ID)), 1);
    assert_eq!(rig.shared.keeping().code(Some([4; 16])), 0);
    assert_eq!(rig.shared.keeping().code(None), 0);
    // What is rung meanwhile is not lost, and what happens is told.
    let mut sqe = identify_controller();
    sqe.cid = 77;
    rig.submit(sqe);
    rig.turns();
    come(&mut rig, Some(ID), true);
    assert_eq!(rig.sent(), ["0: Attach", "0: Adopt 1 [1]"]);
    assert_eq!(rig.csts(), Csts::new().with_rdy(true));
    let done = rig.completions();
    assert_eq!((done.len(), done[0].cid), (1, 77));
    rig.actor.events.raise(AsyncEvent::TRANSIENT_INTERNAL_ERROR);
    let done = rig.completions();
    assert_eq!((done.len(), done[0].cid), (1, 7), "the request still waits");
    assert_eq!(
        rig.status(create_cq(1)),
        Status::INVALID_QUEUE_ID,
        "it is there"
    );
    rig.create_pair(2);
}

#[test]
fn commands_that_waited_for_pollers_are_done_again() {
    let mut rig = rig();
    rig.silence(true);
    rig.submit(create_cq(2));
    assert!(rig.completions().is_empty());
    rig.silence(false);
    rig.sent();
    suspend(&mut rig);
    come(&mut rig, Some(ID), true);
    let sent = rig.sent();
    let expected = [
        "0: Suspend",
        "1: Suspend",
        "0: Attach",
        "0: Adopt 1 [1]",
        "1: Attach",
        "1: CreateCq 2",
    ];
    assert_eq!(sent, expected);
    let done = rig.completions();
    assert_eq!((done.len(), done[0].cid), (1, 102));
    assert_eq!(done[0].status(), Status::SUCCESS);
}

#[test]
fn who_cannot_go_on_is_told_and_can_reset() {
    type Spoil = fn(&mut Rig) -> (Option<[u8; 16]>, bool);
    let cases: [(Spoil, bool); 5] = [
        (|_| (Some([4; 16]), true), true),
        (|_| (Some([4; 16]), false), false),
        (|_| (Some(ID), false), false),
        // Its memory is not what it was.
        (
            |rig| {
                rig.map = memory(BASE, 0x1000);
                (Some(ID), true)
            },
            true,
        ),
        // The journal says nothing.
        (
            |rig| {
                let state = rig.actor.state.as_ref().unwrap();
                for word in state.journal_words(0) {
                    word.store(0, Ordering::Relaxed);
                }
                (Some(ID), true)
            },
            true,
        ),
    ];
    for (at, (spoil, failed)) in cases.into_iter().enumerate() {
        let mut rig = rig();
        suspend(&mut rig);
        let (id, used) = spoil(&mut rig);
        come(&mut rig, id, used);
        assert_eq!(rig.csts(), Csts::new().with_cfs(failed), "{at}");
        rig.cc(Cc::new());
        assert_eq!(rig.csts(), Csts::new(), "{at}");
        if rig.map.read(DATA, &mut [0]) {
            rig.enable();
            rig.create_pair(1);
        }
    }
}

#[test]
fn a_register_write_before_go_is_a_fresh_start() {
    let mut rig = rig();
    suspend(&mut rig);
    let fresh = rig.mail(Mail::Fresh);
    rig.turns();
    assert!(is_done(&fresh));
    assert_eq!(rig.csts(), Csts::new());
    assert_eq!(rig.shared.keeping().code(Some(ID)), 0);
}

#[test]
fn who_presents_no_id_is_reset_when_it_goes() {
    let mut rig = Rig::enabled();
    rig.create_pair(1);
    rig.sent();
    suspend(&mut rig);
    assert_eq!(rig.sent(), ["0: Detach"]);
    assert_eq!(rig.csts(), Csts::new());
}

#[test]
fn going_waits_for_io_of_before_which_can_be_abandoned() {
    let mut rig = rig();
    rig.sent();
    rig.silence(true);
    let done = rig.mail(Mail::Suspend);
    rig.turns();
    assert!(!is_done(&done));
    rig.shared.inbox.send(Mail::Abandon);
    rig.turns();
    assert_eq!(rig.sent_only(), ["0: Suspend", "0: Detach"]);
    rig.shared.inbox.send(Mail::Attach(Arc::new(Front)));
    rig.shared.set_instance(Some(ID));
    let memory = rig.mail(|done| Mail::Memory(Arc::clone(&rig.map), done));
    let gone = rig.mail(|done| Mail::Go(true, done));
    rig.turns();
    assert!(!is_done(&memory) && !is_done(&gone));
    rig.silence(false);
    rig.answer(Ok(true));
    rig.turns();
    assert!(is_done(&done) && is_done(&memory) && is_done(&gone));
}

#[test]
fn a_reset_that_was_under_way_has_happened() {
    let mut rig = rig();
    rig.silence(true);
    rig.cc(Cc::new());
    let done = rig.mail(Mail::Suspend);
    rig.turns();
    rig.silence(false);
    rig.answer(Ok(true));
    rig.turns();
    assert!(is_done(&done));
    come(&mut rig, Some(ID), true);
    assert_eq!(rig.csts(), Csts::new());
    rig.enable();
    rig.create_pair(1);
}
