//! Queues that move between pollers while the guest uses them.

use std::time::{Duration, Instant};

use guest_tests::daemon::{Disk, Plan, TestDaemon, bring_up, pollers, queue};
use guest_tests::io::{Io, LIMIT, collect};
use guest_tests::rng::Rng;
use nvme_spec::Status;
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use vhost_user_nvme::backend::{Delay, Operations, Rule};
use vhost_user_nvme::controller::{Controller, MoveError};
use vhost_user_nvme::poller::IdlePolicy;

use crate::integrity::work;

/// Where a completion queue is.
fn poller_of(controller: &Controller, cqid: u16) -> usize {
    let placed = controller.placement(LIMIT).unwrap();
    placed.iter().find(|p| p.cqid == cqid).unwrap().poller
}

/// Move a queue to another poller; whether it went.
fn swap(controller: &Controller, cqid: u16, pollers: usize) -> Result<(), MoveError> {
    let to = (poller_of(controller, cqid) + 1) % pollers;
    controller.move_queue(cqid, to, LIMIT)
}

/// A verified random workload on four queues that are moved about all the time, and admin commands meanwhile.
fn run(disk: Disk, blocks: u64, idle: IdlePolicy, shadow: bool, count: usize) {
    let time = Duration::from_millis(1500);
    let daemon = TestDaemon::start(vec![Plan::of(disk)], &pollers(count, idle));
    let mut guest = daemon.guest();
    if shadow {
        guest.enable_doorbell_buffer(&mut []).unwrap();
    }
    let share = blocks / 4;
    let controller = daemon.controller(0);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4u64)
            .map(|i| {
                let mut io = Io::new(&mut guest, queue(1 + i as u16, 32), 1);
                scope.spawn(move || work(&mut io, i * share, share, i + blocks, time))
            })
            .collect();
        let mut rng = Rng::new(blocks);
        let (mut moves, start) = (0, Instant::now());
        while start.elapsed() < time {
            let cqid = 1 + rng.below(4) as u16;
            let to = rng.below(count as u64) as usize;
            match controller.move_queue(cqid, to, LIMIT) {
                Ok(()) => {
                    assert_eq!(poller_of(controller, cqid), to);
                    moves += 1;
                }
                // A slow machine can keep a queue's commands out for long.
                Err(error) => assert_eq!(error, MoveError::GivenUp),
            }
            if rng.one_in(4) {
                guest.identify_controller().unwrap();
            }
            std::thread::sleep(Duration::from_micros(rng.below(3000)));
        }
        assert!(moves > 10, "{moves} moves");
        for thread in threads {
            let total = thread.join().unwrap();
            assert!(total > 20, "{total}");
        }
    });
}

#[test]
fn moves_of_memory_queues_under_load() {
    run(Disk::memory(9, 4096), 4096, IdlePolicy::Adaptive, false, 2);
}

#[test]
fn moves_with_shadow_doorbells() {
    run(Disk::memory(12, 1024), 1024, IdlePolicy::Adaptive, true, 3);
    run(Disk::memory(9, 4096), 4096, IdlePolicy::Interrupt, true, 2);
}

#[test]
fn moves_of_queues_whose_store_answers_later() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::file(&dir.path().join("disk"), 9, 4096);
    run(disk, 4096, IdlePolicy::Adaptive, true, 3);
}

#[test]
fn a_command_that_is_out_finishes_before_its_queue_moves() {
    let (disk, delays) = Disk::memory(9, 4096).with_delays();
    let slow = Duration::from_millis(20);
    delays.add(Rule::always(Operations::READ, Delay(slow)).on_blocks(1000..2000));
    let forever = Duration::from_secs(30);
    delays.add(Rule::always(Operations::READ, Delay(forever)).on_blocks(2000..3000));
    let config = pollers(2, IdlePolicy::Adaptive);
    let daemon = TestDaemon::start(vec![Plan::of(disk)], &config);
    let mut guest = daemon.guest();
    let mut io = Io::new(&mut guest, queue(1, 32), 1);
    let controller = daemon.controller(0);
    let submit = |io: &mut Io, slba| {
        let sqe = ReadWrite::new(1, slba, 0).to_sqe(NvmOpcode::READ, 0, 0);
        let at = io.data.addr();
        io.pair.submit_data(sqe, at, 512, slba).unwrap();
        io.pair.ring();
    };
    for round in 0..6 {
        submit(&mut io, 1000 + round);
        // Mostly it is fetched by now, and in any case it is completed.
        std::thread::sleep(Duration::from_millis(round * 2));
        let begun = poller_of(controller, 1);
        // More of them arrive while it moves.
        let moved = std::thread::scope(|scope| {
            let moved = scope.spawn(|| swap(controller, 1, 2));
            submit(&mut io, 5);
            moved.join().unwrap()
        });
        assert_eq!(moved, Ok(()));
        assert_ne!(poller_of(controller, 1), begun);
        assert!(
            collect(&mut io.pair, 2)
                .iter()
                .all(|c| c.status() == Status::SUCCESS)
        );
    }
    // One that stays out for long: the move is given up, and the queue works all the time but a moment.
    submit(&mut io, 2000);
    std::thread::sleep(Duration::from_millis(10));
    let begun = poller_of(controller, 1);
    assert_eq!(swap(controller, 1, 2), Err(MoveError::GivenUp));
    assert_eq!(poller_of(controller, 1), begun);
    submit(&mut io, 7);
    let first = collect(&mut io.pair, 1);
    assert_eq!(first[0].user, 7, "it goes on while the slow one is out");
    // Admin commands do not wait for it either.
    std::thread::scope(|scope| {
        let moved = scope.spawn(|| swap(controller, 1, 2));
        std::thread::sleep(Duration::from_millis(20));
        let start = Instant::now();
        guest.delete_sq(1).unwrap();
        assert!(start.elapsed() < LIMIT, "{:?}", start.elapsed());
        assert_eq!(moved.join().unwrap(), Err(MoveError::GivenUp));
    });
    guest.delete_cq(1).unwrap();
}

#[test]
fn moves_meet_deletions_resets_and_disconnections() {
    let config = pollers(3, IdlePolicy::Adaptive);
    let (disk, delays) = Disk::memory(9, 4096).with_delays();
    delays
        .add(Rule::always(Operations::READ, Delay(Duration::from_millis(2))).on_blocks(1000..2000));
    let daemon = TestDaemon::start(vec![Plan::of(disk)], &config);
    let controller = daemon.controller(0);
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mover = scope.spawn(|| {
            let mut rng = Rng::new(3);
            let mut moves = 0u32;
            let begun = Instant::now();
            // The limit is for a test that has failed: it must not hang.
            while begun.elapsed() < 6 * LIMIT && !over.load(std::sync::atomic::Ordering::Relaxed) {
                let (cqid, to) = (1 + rng.below(2) as u16, rng.below(3) as usize);
                moves += u32::from(controller.move_queue(cqid, to, LIMIT).is_ok());
                std::thread::sleep(Duration::from_micros(rng.below(300)));
            }
            moves
        });
        let mut rng = Rng::new(4);
        let mut front = daemon.connect();
        let start = Instant::now();
        let mut lives = 0;
        while start.elapsed() < Duration::from_secs(2) || lives < 6 {
            let mut guest = bring_up(front);
            if lives % 2 == 0 {
                guest.enable_doorbell_buffer(&mut []).unwrap();
            }
            for _ in 0..4 {
                let mut a = Io::new(&mut guest, queue(1, 32), 1);
                let mut b = Io::new(&mut guest, queue(2, 32), 1);
                for i in 0..20u64 {
                    let slba = if i % 3 == 0 { 1000 + i } else { i };
                    for io in [&mut a, &mut b] {
                        let sqe = ReadWrite::new(1, slba, 0).to_sqe(NvmOpcode::READ, 0, 0);
                        let at = io.data.addr() + i * 4096;
                        io.pair.submit_data(sqe, at, 512, i).unwrap();
                    }
                }
                a.pair.ring();
                b.pair.ring();
                if rng.one_in(2) {
                    collect(&mut a.pair, 20);
                }
                collect(&mut b.pair, 20);
                guest.delete_queue_pair(a.pair).unwrap();
                guest.delete_queue_pair(b.pair).unwrap();
            }
            // A reset with commands out and a queue on its way.
            let mut io = Io::new(&mut guest, queue(1, 32), 1);
            for i in 0..10u64 {
                let sqe = ReadWrite::new(1, 1000 + i, 0).to_sqe(NvmOpcode::READ, 0, 0);
                let at = io.data.addr() + i * 4096;
                io.pair.submit_data(sqe, at, 512, i).unwrap();
            }
            io.pair.ring();
            std::thread::sleep(Duration::from_micros(rng.below(3000)));
            front = match lives % 3 {
                0 => guest.reset().unwrap(),
                1 => {
                    guest.device().reset_device().unwrap();
                    guest.into_device()
                }
                _ => {
                    drop((io, guest));
                    daemon.connect()
                }
            };
            lives += 1;
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(mover.join().unwrap() > 5);
        let mut guest = bring_up(front);
        let mut io = Io::new(&mut guest, queue(1, 32), 1);
        assert_eq!(io.write(5, &[7; 512]), Status::SUCCESS);
    });
}

#[test]
fn what_cannot_be_moved_is_said() {
    let daemon = TestDaemon::start(
        vec![Plan::of(Disk::null(9, 64))],
        &pollers(2, IdlePolicy::Adaptive),
    );
    let controller = daemon.controller(0);
    let missing = Err(MoveError::NoSuchQueue);
    assert_eq!(controller.move_queue(1, 0, LIMIT), missing, "no guest");
    let mut guest = daemon.guest();
    let _pair = guest.create_queue_pair(queue(1, 8)).unwrap();
    for cqid in [0, 2, 8, u16::MAX] {
        assert_eq!(controller.move_queue(cqid, 0, LIMIT), missing, "{cqid}");
    }
    let none = Err(MoveError::NoSuchPoller);
    assert_eq!(controller.move_queue(1, 2, LIMIT), none);
    assert_eq!(controller.move_queue(1, usize::MAX, LIMIT), none);
    let here = poller_of(controller, 1);
    assert_eq!(controller.move_queue(1, here, LIMIT), Ok(()));
}
