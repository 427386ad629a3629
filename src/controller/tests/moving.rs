//! Moves of queues, step by step, against pollers that are scripts.

use super::*;
use crate::controller::moving::MoveError;
use nvme_spec::admin::DeleteQueue;

type Outcome = Receiver<Result<(), MoveError>>;

fn begin(rig: &mut Rig, cqid: u16, to: usize) -> Outcome {
    let (sender, outcome) = crossbeam_channel::bounded(1);
    rig.shared.inbox.send(Mail::Move(cqid, to, sender));
    rig.turns();
    outcome
}

/// A rig with queue pair 1 on poller 0 and no other poller attached, whose pollers say nothing from now on.
fn rig() -> Rig {
    let mut rig = Rig::enabled();
    rig.create_pair(1);
    assert_eq!(rig.actor.placed()[0].poller, 0);
    rig.sent();
    rig.silence(true);
    rig
}

#[test]
fn a_move_that_the_old_poller_refuses_changes_nothing() {
    let mut rig = rig();
    let outcome = begin(&mut rig, 1, 1);
    assert_eq!(rig.sent_only(), ["1: Attach", "1: Hello"]);
    rig.answer(Ok(true));
    rig.turns();
    assert_eq!(rig.sent_only(), ["0: Release 1"]);
    assert!(outcome.try_recv().is_err(), "it is under way");
    let second = begin(&mut rig, 1, 1);
    assert_eq!(second.try_recv(), Ok(Err(MoveError::Busy)));
    rig.answer(Ok(false));
    rig.turns();
    assert_eq!(outcome.try_recv(), Ok(Err(MoveError::GivenUp)));
    assert_eq!(rig.actor.placed()[0].poller, 0);
    assert_eq!(rig.actor.pending.len(), 0);
    // Another one can follow.
    begin(&mut rig, 1, 1);
    assert_eq!(rig.sent_only(), ["1: Hello"]);
}

#[test]
fn a_poller_that_cannot_serve_gets_no_queues() {
    let mut rig = rig();
    let outcome = begin(&mut rig, 1, 1);
    let token = match &rig.script.sent.lock().unwrap()[0].1 {
        Message::Attach { token, .. } => *token,
        other => panic!("{}", kind(other)),
    };
    rig.sent();
    let result = Err(Status::INTERNAL_ERROR);
    rig.shared.inbox.reply(1, Reply { token, result });
    rig.turns();
    assert_eq!(outcome.try_recv(), Ok(Err(MoveError::GivenUp)));
    assert_eq!(rig.sent(), [""; 0], "nothing is released");
}

#[test]
fn admin_commands_end_a_move_that_waits_for_io() {
    let mut rig = rig();
    let outcome = begin(&mut rig, 1, 1);
    rig.answer(Ok(true));
    rig.turns();
    rig.submit(DeleteQueue { qid: 1 }.to_sq_sqe().with_cid(9));
    assert_eq!(rig.completions().len(), 0);
    assert_eq!(rig.sent_only(), ["0: Release 1", "0: Keep 1"]);
    // Those that have nothing to do with queues are served meanwhile.
    rig.ok(identify_controller());
    rig.answer(Ok(false));
    assert_eq!(rig.completions().len(), 0);
    assert_eq!(outcome.try_recv(), Ok(Err(MoveError::GivenUp)));
    assert_eq!(rig.sent_only(), ["0: DeleteSq 1"]);
    rig.answer(Ok(true));
    let done = rig.completions();
    assert_eq!((done.len(), done[0].cid), (1, 9));
    assert_eq!(done[0].status(), Status::SUCCESS);
}

#[test]
fn a_reset_forgets_the_move() {
    let mut rig = rig();
    let outcome = begin(&mut rig, 1, 1);
    rig.answer(Ok(true));
    rig.turns();
    rig.submit(DeleteQueue { qid: 1 }.to_sq_sqe());
    rig.turns();
    rig.cc(Cc::new());
    assert_eq!(outcome.try_recv(), Ok(Err(MoveError::GivenUp)));
    let sent = ["0: Release 1", "0: Keep 1", "0: Reset", "1: Reset"];
    assert_eq!(rig.sent_only(), sent);
    rig.answer(Ok(false));
    rig.turns();
    assert_eq!(rig.csts(), Csts::new());
    assert_eq!(rig.actor.pending.len(), 0);
    assert_eq!(rig.sent(), [""; 0], "what was deferred is forgotten");
}
