//! Commands that must not be done twice.

use super::*;
use crate::testing::{Act, Mischief};

/// One that is done twice or not, and one nobody knows anything of.
fn submit_both(lane: &mut Lane) {
    let flush = command(NvmOpcode::FLUSH, 0, 1);
    lane.submit(flush, 1).unwrap();
    lane.submit_once(flush, 2).unwrap();
    lane.ring();
}

fn only_the_first_was_done(model: &Model, lane: &mut Lane, what: &str) {
    let mut done = collect(lane, 2, Duration::from_secs(20));
    done.sort_by_key(|c| c.user);
    let told: Vec<_> = done.iter().map(|c| (c.user, c.status())).collect();
    let want = [(1, Status::SUCCESS), (2, Status::COMMAND_INTERRUPTED)];
    assert_eq!(told, want, "{what}");
    assert!(!done[1].cqe.status.dnr(), "the guest may decide: {what}");
    assert_eq!(model.commands(NvmOpcode::FLUSH), 1, "{what}");
}

#[test]
fn what_nobody_knows_is_not_sent_again_after_an_abort() {
    let model = Model::new(ModelOptions::default());
    let ssd = start(&model, hasty());
    let mut lane = ssd.lane(31).unwrap();
    model.misbehave(Mischief::of(&[Act::Stall], 10_000));
    submit_both(&mut lane);
    model.misbehave(Mischief::default());
    only_the_first_was_done(&model, &mut lane, "an abort");
    assert_eq!(ssd.counters().resets, 0);
}

#[test]
fn what_nobody_knows_is_not_sent_again_after_a_reset() {
    let model = Model::new(ModelOptions::default());
    let ssd = start(&model, SsdOptions::default());
    let mut lane = ssd.lane(31).unwrap();
    model.misbehave(Mischief::of(&[Act::Deaf], 10_000));
    submit_both(&mut lane);
    model.misbehave(Mischief::default());
    ssd.reset();
    only_the_first_was_done(&model, &mut lane, "a reset");
}

#[test]
fn what_nobody_knows_is_sent_if_it_had_not_been() {
    let model = Model::new(ModelOptions::default());
    let ssd = start(&model, SsdOptions::default());
    let mut slow = ssd.lane(31).unwrap();
    let mut lane = ssd.lane(31).unwrap();
    ssd.reset();
    becomes("it is stopped", || {
        lane.poll(0, |_| ());
        !model.enabled()
    });
    // The reset waits for the first lane: what the other is given now is held.
    lane.submit_once(command(NvmOpcode::FLUSH, 0, 1), 3)
        .unwrap();
    lane.ring();
    let mut done = Vec::new();
    becomes("it is done", || {
        slow.poll(64, |_| panic!("nothing was submitted"));
        lane.poll(64, |c| done.push(c));
        !done.is_empty()
    });
    assert!(done[0].status().is_success());
}
