//! Namespaces that others format, resize or take away.

use nvme_spec::event::AsyncEvent;
use nvme_spec::identify::IdentifyNamespace;

use super::*;
use crate::driver::{Expected, Watch};
use crate::testing::{Act, Mischief};

/// The whole of a namespace of the model, as it is.
fn watch(ssd: &Ssd, nsid: u32) -> Arc<Watch> {
    let found = ssd.namespace(nsid).unwrap().identify;
    ssd.watch(Expected {
        nsid,
        lbads: found.current_format().unwrap().lbads,
        blocks: found.nsze,
    })
}

type Change = fn(&mut IdentifyNamespace);

/// What may be done to a namespace, and whether its users can go on.
const CHANGES: [(&str, bool, Change); 5] = [
    ("formatted", false, |ns| ns.lbaf[0].lbads = 12),
    ("with metadata", false, |ns| ns.lbaf[0].ms = 8),
    ("shrunk", false, |ns| ns.nsze -= 1),
    ("taken away", false, |ns| ns.nsze = 0),
    ("grown", true, |ns| ns.nsze += 1),
];

fn is_refused(done: &Completion) -> bool {
    assert!(!done.status().is_success() || !done.cqe.status.dnr());
    done.status() == Status::NAMESPACE_NOT_READY && done.cqe.status.dnr()
}

#[test]
fn a_namespace_that_others_change_takes_no_more_commands() {
    for (what, goes_on, change) in CHANGES {
        let model = Model::new(ModelOptions {
            namespaces: 2,
            ..ModelOptions::default()
        });
        let ssd = start(&model, hasty());
        let news = ssd.subscribe();
        let watches = [watch(&ssd, 1), watch(&ssd, 2)];
        let mut lane = ssd.lane_to(&watches[0], 31).unwrap();
        let mut other = ssd.lane_to(&watches[1], 31).unwrap();
        let flush = command(NvmOpcode::FLUSH, 0, 1);
        assert!(run(&mut lane, flush).status().is_success());
        model.change_namespace(1, change);
        let event = AsyncEvent::NAMESPACE_ATTRIBUTE_CHANGED;
        becomes("somebody listens", || model.report(event));
        let told = news.recv_timeout(Duration::from_secs(20)).unwrap();
        assert_eq!(told, SsdEvent::NamespacesChanged(vec![1]));
        lane.poll(0, |_| ());
        let done = run(&mut lane, flush);
        assert_eq!(done.status().is_success(), goes_on, "{what}");
        assert_eq!(is_refused(&done), !goes_on, "{what}");
        assert_eq!(watches[0].is_changed(), !goes_on, "{what}");
        assert!(run(&mut other, flush).status().is_success());
        assert_eq!(model.commands(NvmOpcode::FLUSH), 2 + u32::from(goes_on));
        // Who comes later finds it so.
        let mut late = ssd.lane_to(&watches[0], 31).unwrap();
        late.poll(0, |_| ());
        assert_eq!(is_refused(&run(&mut late, flush)), !goes_on, "{what}");
        assert_eq!(ssd.counters().resets, 0, "{what}");
    }
}

#[test]
fn what_was_out_at_a_reset_does_not_go_to_a_namespace_that_has_changed() {
    for (what, goes_on, change) in CHANGES {
        let model = Model::new(ModelOptions::default());
        let ssd = start(&model, SsdOptions::default());
        let mut lane = ssd.lane_to(&watch(&ssd, 1), 31).unwrap();
        assert!(
            run(&mut lane, command(NvmOpcode::FLUSH, 0, 1))
                .status()
                .is_success()
        );
        model.misbehave(Mischief::of(&[Act::Deaf], 10_000));
        for user in 0..3 {
            lane.submit(command(NvmOpcode::FLUSH, 0, 1), user).unwrap();
        }
        lane.ring();
        model.misbehave(Mischief::default());
        model.change_namespace(1, change);
        ssd.reset();
        let done = collect(&mut lane, 3, Duration::from_secs(20));
        assert_eq!(done.len(), 3, "{what}");
        for c in &done {
            assert_eq!(c.status().is_success(), goes_on, "{what}");
            assert_eq!(is_refused(c), !goes_on, "{what}");
        }
        let commands = if goes_on { 4 } else { 1 };
        assert_eq!(model.commands(NvmOpcode::FLUSH), commands, "{what}");
    }
}
