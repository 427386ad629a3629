//! Flushing by lanes that others use.

use super::*;
use crate::testing::{Act, Mischief};

/// How long a flush may take on a machine that is busy with other things.
const LIMIT: Duration = Duration::from_secs(60);

/// Flush while `lane` is polled as if nothing was.
fn flush_beside(
    ssd: &Ssd,
    lane: &mut Lane,
    mut f: impl FnMut(&mut Lane),
) -> Result<(), FlushError> {
    std::thread::scope(|scope| {
        let flushed = scope.spawn(|| ssd.flush(1, LIMIT));
        while !flushed.is_finished() {
            f(lane);
            std::thread::sleep(Duration::from_micros(100));
        }
        flushed.join().unwrap()
    })
}

#[test]
fn an_ssd_without_a_queue_pair_to_spare_is_flushed_by_one_in_use() {
    for queue_pairs in [1, 3] {
        let model = Model::new(ModelOptions {
            queue_pairs,
            ..ModelOptions::default()
        });
        let ssd = start(&model, SsdOptions::default());
        assert_eq!(ssd.flush(1, LIMIT), Err(FlushError::NoLane));
        let mut lanes: Vec<Lane> = (0..queue_pairs).map(|_| ssd.lane(3).unwrap()).collect();
        assert!(matches!(ssd.lane(1), Err(LaneError::NoQueues { .. })));
        let lane = &mut lanes[0];
        // A poller that only tends to it.
        let idle = flush_beside(&ssd, lane, |lane| {
            lane.poll(0, |_| panic!("nothing was submitted"));
        });
        assert_eq!((idle, model.commands(NvmOpcode::FLUSH)), (Ok(()), 1));
        assert_eq!((lane.room(), lane.pending()), (3, 0));
        // One that is busy, with all its slots taken most of the time. What it submits is completed to it, and nothing else.
        let (mut next, mut done) = (0, Vec::new());
        for round in 0..20 {
            let mut work = |lane: &mut Lane| {
                while lane.room() > 0 && next < 1_000_000 {
                    lane.submit(command(NvmOpcode::VERIFY, 0, 1), next).unwrap();
                    next += 1;
                }
                lane.ring();
                // Once without looking at results, as who only tends to it.
                lane.poll(0, |_| panic!("none were asked for"));
                lane.poll(2, |c| done.push((c.user, c.status())));
            };
            assert_eq!(flush_beside(&ssd, lane, &mut work), Ok(()));
            assert_eq!(model.commands(NvmOpcode::FLUSH), round + 2);
        }
        while lane.pending() > 0 {
            lane.poll(64, |c| done.push((c.user, c.status())));
        }
        done.sort_unstable_by_key(|d| d.0);
        assert!(done.iter().map(|d| d.0).eq(0..next), "each once");
        assert!(done.iter().all(|d| d.1.is_success()));
        let unknown = std::thread::scope(|scope| {
            let flushed = scope.spawn(|| ssd.flush(9, LIMIT));
            while !flushed.is_finished() {
                lane.poll(0, |_| ());
            }
            flushed.join().unwrap()
        });
        let status = Status::INVALID_NAMESPACE_OR_FORMAT;
        assert_eq!(unknown, Err(FlushError::Failed(status)));
    }
}

#[test]
fn a_flush_by_others_outlives_resets_and_ends_with_the_ssd_and_the_lane() {
    let one = ModelOptions {
        queue_pairs: 1,
        ..ModelOptions::default()
    };
    for act in [Act::Stall, Act::Deaf, Act::Fatal] {
        let model = Model::new(one.clone());
        let ssd = start(&model, hasty());
        let mut lane = ssd.lane(3).unwrap();
        model.misbehave(Mischief::of(&[act], 10_000));
        let flushed = flush_beside(&ssd, &mut lane, |lane| {
            lane.poll(64, |_| panic!("nothing was submitted"));
            let counters = ssd.counters();
            if counters.timeouts + counters.resets > 0 {
                model.misbehave(Mischief::default());
            }
        });
        assert_eq!(
            (flushed, model.commands(NvmOpcode::FLUSH)),
            (Ok(()), 1),
            "{act:?}"
        );
        assert!(ssd.counters().resubmitted > 0, "{act:?}");
    }
    let model = Model::new(one);
    let ssd = start(&model, hasty());
    let mut lane = Some(ssd.lane(3).unwrap());
    // Whoever has the lane does not look.
    let late = ssd.flush(1, Duration::from_millis(20));
    assert_eq!(late, Err(FlushError::Late));
    std::thread::scope(|scope| {
        let flushed = scope.spawn(|| ssd.flush(1, LIMIT));
        std::thread::sleep(Duration::from_millis(20));
        lane = None;
        assert_eq!(flushed.join().unwrap(), Err(FlushError::NoLane));
    });
    becomes("there is room again", || {
        lane = ssd.lane(3).ok();
        lane.is_some()
    });
    let mut lane = lane.unwrap();
    model.misbehave(Mischief::of(&[Act::Deaf], 10_000));
    let mut tries = 0;
    let gone = flush_beside(&ssd, &mut lane, |lane| {
        lane.poll(64, |_| panic!("nothing was submitted"));
        tries += 1;
        if tries == 20 {
            model.vanish();
        }
    });
    assert!(
        matches!(gone, Err(FlushError::Gone | FlushError::Failed(_))),
        "{gone:?}"
    );
    assert_eq!(ssd.flush(1, LIMIT), Err(FlushError::Gone));
}
