//! Queues that do not go, and SSDs that do not end.

use nvme_spec::regs::{Cap, css};

use super::*;
use crate::testing::{Act, Mischief};

#[test]
fn a_queue_pair_that_is_not_deleted_is_let_go_of_after_the_reset() {
    let model = Model::new(ModelOptions::default());
    let ssd = start(&model, hasty());
    let lane = ssd.lane(31).unwrap();
    model.refuses_deletion(true);
    drop(lane);
    becomes("it is reset", || ssd.counters().resets > 0);
    model.refuses_deletion(false);
    becomes("it serves", || ssd.state() == SsdState::Ready);
    becomes("all queue pairs are to be had", || {
        let lanes: Vec<_> = (0..8).map(|_| ssd.lane(3)).collect();
        lanes.iter().all(Result::is_ok)
    });
    drop(ssd);
    assert_eq!(model.fake_space().mapped(), 0, "nothing is left behind");
}

#[test]
fn guests_do_not_wait_for_the_shutdown_of_an_ssd_that_is_given_up() {
    let model = Model::new(ModelOptions {
        // It may take more than two minutes, it says.
        cap: Cap::new().with_mqes_z(1023).with_to(255).with_css(css::NVM),
        ..ModelOptions::default()
    });
    let ssd = start(&model, SsdOptions::default());
    let mut lane = ssd.lane(31).unwrap();
    model.misbehave(Mischief::of(&[Act::Deaf], 10_000));
    model.never_shuts_down(true);
    lane.submit(command(NvmOpcode::FLUSH, 0, 1), 1).unwrap();
    lane.ring();
    model.take_back();
    let done = collect(&mut lane, 1, Duration::from_secs(30));
    assert_eq!(done.len(), 1, "it failed");
    assert_eq!(done[0].status(), Status::INTERNAL_ERROR);
    assert_eq!(model.life()[1], 1, "it was asked to save its cache");
    assert!(model.isolated(), "it did not stop");
}
