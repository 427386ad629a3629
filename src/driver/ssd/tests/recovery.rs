//! Timeouts, resets, removal.

use nvme_spec::event::AsyncEvent;

use super::*;
use crate::testing::{Act, Mischief};

/// Writes of one block each, as many as `n`, to blocks of their own.
fn submit_writes(lane: &mut Lane, memory: &Memory, n: u64) {
    for i in 0..n {
        let at = GUEST + i * 512;
        assert!(memory.map.write(at, &[i as u8 + 1; 512]));
        let sqe = command(NvmOpcode::WRITE, i, 1).with_prps(at, 0);
        lane.submit(sqe, i).unwrap();
    }
    lane.ring();
}

fn users(done: &[Completion]) -> Vec<u64> {
    let mut users: Vec<u64> = done.iter().map(|c| c.user).collect();
    users.sort_unstable();
    users
}

fn all_written(model: &Model, n: u64) {
    let bytes = model.bytes(1);
    for i in 0..n as usize {
        assert_eq!(
            bytes[i * 512..i * 512 + 512],
            [i as u8 + 1; 512],
            "block {i}"
        );
    }
}

#[test]
fn overdue_commands_are_aborted_and_submitted_again() {
    let model = Model::new(ModelOptions::default());
    let ssd = start(&model, hasty());
    let memory = Memory::new(ssd.space(), 1 << 20);
    let mut lane = ssd.lane(31).unwrap();
    model.misbehave(Mischief::of(&[Act::Stall], 10_000));
    submit_writes(&mut lane, &memory, 3);
    assert!(collect(&mut lane, 1, Duration::from_millis(20)).is_empty());
    model.misbehave(Mischief::default());
    let done = collect(&mut lane, 3, Duration::from_secs(10));
    assert_eq!(users(&done), [0, 1, 2]);
    assert!(done.iter().all(|c| c.status().is_success()));
    all_written(&model, 3);
    let counters = ssd.counters();
    assert_eq!(
        (counters.timeouts, counters.aborted, counters.resets),
        (3, 3, 0)
    );
    assert_eq!(counters.resubmitted, 3);
}

#[test]
fn a_command_that_never_ends_fails_and_may_not_be_retried() {
    let model = Model::new(ModelOptions::default());
    let ssd = start(&model, hasty());
    let mut lane = ssd.lane(31).unwrap();
    for (act, resets) in [(Act::Stall, 0), (Act::Deaf, 2)] {
        let before = ssd.counters().resets;
        model.misbehave(Mischief::of(&[act], 10_000));
        let done = run(&mut lane, command(NvmOpcode::FLUSH, 0, 1));
        assert_eq!(done.status(), Status::INTERNAL_ERROR);
        assert!(done.cqe.status.dnr(), "it had its chances");
        assert_eq!(ssd.counters().resets - before, resets);
    }
    model.misbehave(Mischief::default());
    assert!(
        run(&mut lane, command(NvmOpcode::FLUSH, 0, 1))
            .status()
            .is_success()
    );
}

#[test]
fn a_reset_in_the_middle_loses_nothing() {
    for act in [
        Act::Deaf,
        Act::WrongPhase,
        Act::Fatal,
        Act::Disable,
        Act::OtherQueue,
        Act::BadHead,
    ] {
        let model = Model::new(ModelOptions::default());
        let ssd = start(&model, hasty());
        let news = ssd.subscribe();
        let memory = Memory::new(ssd.space(), 1 << 20);
        let mut lanes: Vec<Lane> = (0..3).map(|_| ssd.lane(31).unwrap()).collect();
        model.misbehave(Mischief::of(&[act], 10_000));
        submit_writes(&mut lanes[0], &memory, 5);
        model.misbehave(Mischief::default());
        // The others are polled as well, as they would be.
        let (busy, idle) = lanes.split_at_mut(1);
        let mut done = Vec::new();
        becomes(&format!("all is done after {act:?}"), || {
            busy[0].poll(64, |c| done.push(c));
            for lane in idle.iter_mut() {
                lane.poll(64, |_| panic!("nothing was submitted"));
            }
            done.len() == 5
        });
        assert_eq!(users(&done), [0, 1, 2, 3, 4], "{act:?}");
        assert!(done.iter().all(|c| c.status().is_success()), "{act:?}");
        all_written(&model, 5);
        assert_eq!(ssd.counters().resets, 1, "{act:?}");
        let wrong = matches!(act, Act::OtherQueue | Act::BadHead);
        assert_eq!(ssd.counters().bad_completions > 0, wrong, "{act:?}");
        assert_eq!(news.try_recv(), Ok(SsdEvent::Resetting));
        assert_eq!(news.try_recv(), Ok(SsdEvent::Ready));
        for lane in idle {
            assert!(
                run(lane, command(NvmOpcode::FLUSH, 0, 1))
                    .status()
                    .is_success()
            );
        }
    }
}

#[test]
fn commands_fail_at_a_reset_where_that_is_wanted() {
    let model = Model::new(ModelOptions::default());
    let ssd = start(
        &model,
        SsdOptions {
            on_reset: OnReset::Fail,
            ..hasty()
        },
    );
    let memory = Memory::new(ssd.space(), 1 << 20);
    let mut lane = ssd.lane(31).unwrap();
    model.misbehave(Mischief::of(&[Act::Deaf], 10_000));
    submit_writes(&mut lane, &memory, 4);
    ssd.reset();
    becomes("the reset begins", || ssd.state() == SsdState::Resetting);
    model.misbehave(Mischief::default());
    // Submitted during the reset: it waits, and is done.
    lane.poll(64, |_| ());
    lane.submit(command(NvmOpcode::FLUSH, 0, 1), 99).unwrap();
    lane.ring();
    let done = collect(&mut lane, 5, Duration::from_secs(10));
    assert_eq!(users(&done), [0, 1, 2, 3, 99]);
    for c in done {
        if c.user == 99 {
            assert!(c.status().is_success());
        } else {
            assert_eq!(c.status(), Status::COMMAND_INTERRUPTED);
            assert!(!c.cqe.status.dnr(), "it may be retried");
        }
    }
    assert_eq!(ssd.counters().failed, 4);
}

#[test]
fn a_device_that_goes_away_fails_everything_at_once() {
    for how in 0..5 {
        let model = Model::new(ModelOptions {
            hard_reset: false,
            ..ModelOptions::default()
        });
        let ssd = start(&model, hasty());
        let news = ssd.subscribe();
        let memory = Memory::new(ssd.space(), 1 << 20);
        let mut lane = ssd.lane(31).unwrap();
        model.misbehave(Mischief::of(&[Act::Deaf], 10_000));
        submit_writes(&mut lane, &memory, 4);
        match how {
            0 => model.vanish(),
            1 => model.take_back(),
            2 => {
                model.never_ready(true);
                ssd.reset();
            }
            3 => {
                model.never_stops(true);
                ssd.reset();
            }
            _ => {
                model.swap("MODEL2");
                ssd.reset();
            }
        }
        let done = collect(&mut lane, 4, Duration::from_secs(10));
        assert_eq!(users(&done), [0, 1, 2, 3], "{how}");
        for c in &done {
            assert_eq!(c.status(), Status::INTERNAL_ERROR, "{how}");
            assert!(c.cqe.status.dnr(), "{how}");
        }
        becomes("it is gone", || ssd.state() == SsdState::Gone);
        let again = run(&mut lane, command(NvmOpcode::READ, 0, 1));
        assert_eq!(again.status(), Status::INTERNAL_ERROR, "{how}");
        assert_eq!(model.isolated(), how == 3, "{how}: only one did not stop");
        assert!(matches!(ssd.lane(1), Err(LaneError::Gone)));
        assert!(matches!(ssd.smart(), Err(DriverError::Gone)));
        becomes("everybody is told", || {
            news.try_iter().any(|e| e == SsdEvent::Gone)
        });
        drop(lane);
        // The driver's memory is let go of; the guest's is the guest's.
        becomes("it is let go of", || model.fake_space().mapped() == 1);
    }
}

#[test]
fn nobody_waits_for_a_device_that_is_gone_and_slow_to_close() {
    let model = Model::new(ModelOptions::default());
    let ssd = start(&model, hasty());
    model.hold_open(true);
    model.vanish();
    becomes("it is gone", || ssd.state() == SsdState::Gone);
    assert!(matches!(ssd.lane(1), Err(LaneError::Gone)));
    assert!(matches!(ssd.smart(), Err(DriverError::Gone)));
    assert!(matches!(ssd.namespaces(), Err(DriverError::Gone)));
    assert!(
        !model.closed(),
        "they were answered before it was let go of"
    );
    model.hold_open(false);
    becomes("it is let go of", || model.closed());
}

#[test]
fn a_function_level_reset_helps_where_the_controller_does_not_listen() {
    let model = Model::new(ModelOptions::default());
    let ssd = start(&model, hasty());
    let memory = Memory::new(ssd.space(), 1 << 20);
    let mut lane = ssd.lane(31).unwrap();
    model.never_stops(true);
    model.misbehave(Mischief::of(&[Act::Deaf], 10_000));
    submit_writes(&mut lane, &memory, 4);
    model.misbehave(Mischief::default());
    let done = collect(&mut lane, 4, Duration::from_secs(10));
    assert!(done.len() == 4 && done.iter().all(|c| c.status().is_success()));
    all_written(&model, 4);
    assert_eq!(model.life()[2], 1);
}

#[test]
fn a_device_that_needs_too_many_resets_is_given_up() {
    let model = Model::new(ModelOptions::default());
    let ssd = start(
        &model,
        SsdOptions {
            resets_per_minute: 3,
            ..hasty()
        },
    );
    let mut lane = ssd.lane(31).unwrap();
    model.misbehave(Mischief::of(&[Act::Fatal], 10_000));
    let done = run(&mut lane, command(NvmOpcode::FLUSH, 0, 1));
    assert_eq!(done.status(), Status::INTERNAL_ERROR);
    assert_eq!((ssd.counters().resets, ssd.state()), (3, SsdState::Gone));
}

#[test]
fn events_are_heard_again_and_again() {
    let model = Model::new(ModelOptions::default());
    let ssd = start(&model, hasty());
    let news = ssd.subscribe();
    for round in 0..10 {
        // What is in its error log is told once.
        let entries = ssd.error_log().unwrap();
        assert_eq!(entries.len(), 1);
        let told = if round == 0 { entries } else { Vec::new() };
        for (event, want) in [
            (
                AsyncEvent::NAMESPACE_ATTRIBUTE_CHANGED,
                SsdEvent::NamespacesChanged(vec![1]),
            ),
            (
                AsyncEvent::TEMPERATURE_THRESHOLD,
                SsdEvent::Health(CriticalWarning::new().with_temperature(true)),
            ),
            (
                AsyncEvent::PERSISTENT_INTERNAL_ERROR,
                SsdEvent::Error {
                    info: 3,
                    entries: told,
                },
            ),
        ] {
            becomes("somebody listens", || model.report(event));
            assert_eq!(news.recv_timeout(Duration::from_secs(5)), Ok(want));
        }
    }
    assert_eq!(ssd.counters().events, 30);
    assert_eq!(ssd.counters().resets, 0);
}

#[test]
fn the_health_is_at_hand_without_asking() {
    let model = Model::new(ModelOptions::default());
    let ssd = start(&model, hasty());
    let told = |temperature| {
        let mut log = SmartLog {
            percentage_used: 7,
            ..SmartLog::default()
        };
        log.set_temperature(temperature);
        log
    };
    model.set_smart(told(300));
    becomes("it is read", || ssd.health().is_some());
    assert_eq!(model.smart_reads(), 1);
    // An event says that it has changed.
    model.set_smart(told(333));
    let hot = AsyncEvent::TEMPERATURE_THRESHOLD;
    becomes("somebody listens", || model.report(hot));
    becomes("it is read", || ssd.health() == Some(told(333)));
    // Asking for it is a read as well.
    model.set_smart(told(310));
    assert_eq!(ssd.smart().unwrap(), told(310));
    assert_eq!(ssd.health(), Some(told(310)));
    let reads = model.smart_reads();
    for _ in 0..1000 {
        ssd.health();
    }
    assert_eq!(model.smart_reads(), reads);
}

#[test]
fn a_lane_that_is_dropped_with_commands_out_waits_for_the_device() {
    let model = Model::new(ModelOptions::default());
    let ssd = start(&model, SsdOptions::default());
    let memory = Memory::new(ssd.space(), 1 << 20);
    for _ in 0..20 {
        let mut lane = ssd.lane(31).unwrap();
        model.misbehave(Mischief::of(&[Act::Deaf, Act::Late], 5_000));
        submit_writes(&mut lane, &memory, 10);
        drop(lane);
        // Nothing is written from here on: the device has no queue.
        assert!(memory.map.write(GUEST, &[0xEE; 8192]));
        let before = model.bytes(1);
        std::thread::sleep(Duration::from_millis(3));
        assert!(model.bytes(1) == before);
    }
    model.misbehave(Mischief::default());
    assert!(ssd.lane(31).is_ok());
    assert_eq!(ssd.counters().resets, 0);
}

#[test]
fn lanes_can_be_made_and_dropped_while_the_controller_is_reset() {
    let model = Model::new(ModelOptions::default());
    let ssd = start(&model, hasty());
    let memory = Memory::new(ssd.space(), 1 << 20);
    let mut first = ssd.lane(31).unwrap();
    let second = ssd.lane(31).unwrap();
    model.misbehave(Mischief::of(&[Act::Deaf], 10_000));
    submit_writes(&mut first, &memory, 3);
    ssd.reset();
    becomes("the reset begins", || ssd.state() == SsdState::Resetting);
    model.misbehave(Mischief::default());
    // All of this on one thread, which is what the reset waits for.
    let mut third = ssd.lane(31).unwrap();
    drop(second);
    third.submit(command(NvmOpcode::FLUSH, 0, 1), 1).unwrap();
    third.ring();
    assert_eq!(collect(&mut first, 3, Duration::from_secs(10)).len(), 3);
    assert_eq!(collect(&mut third, 1, Duration::from_secs(10)).len(), 1);
    becomes("the second is removed", || {
        let lanes: Vec<_> = (0..6).map(|_| ssd.lane(3)).collect();
        lanes.iter().all(Result::is_ok)
    });
    all_written(&model, 3);
}

#[test]
fn a_lane_that_is_made_while_another_is_slow_to_stop_serves_after_the_reset() {
    let model = Model::new(ModelOptions::default());
    let ssd = start(&model, hasty());
    let mut slow = ssd.lane(31).unwrap();
    ssd.reset();
    // Nobody polls the first lane: the controller is stopped under it.
    becomes("it is stopped", || !model.enabled());
    let mut late = ssd.lane(31).unwrap();
    late.submit(command(NvmOpcode::FLUSH, 0, 1), 5).unwrap();
    late.ring();
    let mut done = Vec::new();
    becomes("it is flushed", || {
        slow.poll(64, |_| panic!("nothing was submitted"));
        late.poll(64, |c| done.push(c));
        !done.is_empty()
    });
    assert!(done[0].status().is_success());
    assert_eq!((ssd.state(), ssd.counters().resets), (SsdState::Ready, 1));
}

#[test]
fn what_is_cancelled_ends_soon_and_is_not_done_again() {
    for (act, resets) in [(Act::Stall, 0), (Act::Deaf, 1)] {
        let model = Model::new(ModelOptions::default());
        let options = SsdOptions {
            command_timeout: Duration::from_secs(1),
            ..hasty()
        };
        let ssd = start(&model, options);
        let memory = Memory::new(ssd.space(), 1 << 20);
        let mut lane = ssd.lane(31).unwrap();
        model.misbehave(Mischief::of(&[act], 10_000));
        submit_writes(&mut lane, &memory, 3);
        model.misbehave(Mischief::default());
        lane.cancel(1);
        lane.cancel(1);
        lane.cancel(99);
        becomes("it is aborted", || {
            lane.poll(0, |_| ());
            ssd.counters().aborts == 1
        });
        assert_eq!(ssd.counters().timeouts, 0, "before its time");
        let done = collect(&mut lane, 3, Duration::from_secs(20));
        // One that listens is done with it first; for one that does not, the time of all is up.
        assert!(act == Act::Deaf || done[0].user == 1);
        assert_eq!(users(&done), [0, 1, 2]);
        for c in &done {
            let want = match c.user {
                1 => Status::ABORT_REQUESTED,
                _ => Status::SUCCESS,
            };
            assert_eq!(c.status(), want, "{act:?}");
        }
        assert_eq!(model.bytes(1)[512..1024], [0; 512], "block 1");
        assert_eq!(ssd.counters().resets, resets, "{act:?}");
    }
}

#[test]
fn what_is_cancelled_during_a_reset_does_not_wait_for_its_end() {
    let model = Model::new(ModelOptions::default());
    let ssd = start(&model, SsdOptions::default());
    let mut slow = ssd.lane(31).unwrap();
    let mut lane = ssd.lane(31).unwrap();
    model.misbehave(Mischief::of(&[Act::Deaf], 10_000));
    let flush = command(NvmOpcode::FLUSH, 0, 1);
    for user in [1, 2, 3] {
        lane.submit(flush, user).unwrap();
    }
    lane.ring();
    model.misbehave(Mischief::default());
    // One before the device is stopped, one after that, and one it never had. The reset does not end: nobody polls the other lane.
    lane.cancel(1);
    ssd.reset();
    let mut done = Vec::new();
    becomes("the first ends", || {
        lane.poll(64, |c| done.push(c));
        !done.is_empty()
    });
    assert!(!model.enabled(), "the device is stopped by then");
    lane.submit(flush, 4).unwrap();
    lane.ring();
    lane.cancel(2);
    lane.cancel(4);
    // At once: whoever looks next is told.
    lane.poll(64, |c| done.push(c));
    assert_eq!(users(&done), [1, 2, 4]);
    let aborted = |c: &Completion| c.status() == Status::ABORT_REQUESTED;
    assert!(done.iter().all(aborted));
    assert_eq!(ssd.state(), SsdState::Resetting);
    becomes("the rest is done", || {
        slow.poll(64, |_| panic!("nothing was submitted"));
        lane.poll(64, |c| done.push(c));
        done.len() == 4
    });
    assert!(done[3].user == 3 && done[3].status().is_success());
    assert_eq!(model.commands(NvmOpcode::FLUSH), 1);
}

/// Sleep on the wake-up descriptor until so many completions are there, looking only when it says so.
fn collect_asleep(lane: &mut Lane, n: usize) -> Vec<Completion> {
    let mut done = Vec::new();
    let mut eventfd = std::fs::File::from(lane.wake_fd().unwrap().try_clone_to_owned().unwrap());
    while done.len() < n {
        let mut fds = [rustix::event::PollFd::new(
            &eventfd,
            rustix::event::PollFlags::IN,
        )];
        let limit = Duration::from_secs(10).try_into().unwrap();
        assert_eq!(rustix::event::poll(&mut fds, Some(&limit)), Ok(1), "woken");
        let _ = std::io::Read::read(&mut eventfd, &mut [0; 8]);
        lane.poll(64, |c| done.push(c));
    }
    done
}

#[test]
fn whoever_sleeps_is_woken_for_everything() {
    for act in [Act::Late, Act::Stall, Act::Deaf, Act::Fatal, Act::OddHead] {
        let model = Model::new(ModelOptions {
            mischief: Mischief::of(&[Act::Late], 1),
            ..ModelOptions::default()
        });
        let ssd = start(&model, hasty());
        let memory = Memory::new(ssd.space(), 1 << 20);
        let mut lane = ssd.lane(31).unwrap();
        model.misbehave(Mischief::of(&[act], 10_000));
        submit_writes(&mut lane, &memory, 4);
        model.misbehave(Mischief::default());
        let done = collect_asleep(&mut lane, 4);
        assert_eq!(users(&done), [0, 1, 2, 3], "{act:?}");
        assert!(done.iter().all(|c| c.status().is_success()), "{act:?}");
        // Gone, and still woken: for what is out, and for what comes later.
        model.misbehave(Mischief::of(&[Act::Deaf], 10_000));
        submit_writes(&mut lane, &memory, 2);
        model.vanish();
        assert_eq!(collect_asleep(&mut lane, 2).len(), 2);
        submit_writes(&mut lane, &memory, 2);
        assert_eq!(collect_asleep(&mut lane, 2).len(), 2);
    }
}

#[test]
fn lanes_share_vectors_where_there_are_few_and_do_without_where_there_are_none() {
    for vectors in 0..4 {
        let model = Model::new(ModelOptions {
            vectors,
            ..ModelOptions::default()
        });
        let ssd = start(&model, hasty());
        let memory = Memory::new(ssd.space(), 1 << 20);
        let mut lanes: Vec<Lane> = (0..5).map(|_| ssd.lane(31).unwrap()).collect();
        for lane in &mut lanes {
            submit_writes(lane, &memory, 4);
            // Without interrupts the keeper wakes whoever has something out, now and then.
            assert_eq!(collect_asleep(lane, 4).len(), 4, "{vectors} vectors");
        }
    }
}
