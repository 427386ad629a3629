//! Lost wake-ups: would any be lost, these tests would hang. All policies, both doorbell modes, with and without shadow doorbells.

use std::time::{Duration, Instant};

use guest_tests::daemon::{Disk, Plan, TestDaemon, pollers, queue};
use guest_tests::io::{LIMIT, Pair};
use guest_tests::rng::Rng;
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::{Sqe, Status};
use vhost_user_nvme::driver::QueueConfig;
use vhost_user_nvme::poller::IdlePolicy;
use vhost_user_nvme::transport::Transport;

fn verify() -> Sqe {
    ReadWrite::new(1, 0, 0).to_sqe(NvmOpcode::VERIFY, 0, 0)
}

/// Commands that each queue does at least, on a machine that is busy with other things.
const LEAST: u64 = 50;

/// Commands in bursts, with pauses of all lengths between them, sleeping on the interrupt for each completion.
fn stress(pair: &mut Pair, seed: u64, time: Duration) -> u64 {
    let mut rng = Rng::new(seed);
    let start = Instant::now();
    let mut total = 0;
    while start.elapsed() < time || total <= LEAST {
        let most = u64::from(pair.depth());
        let burst = match rng.below(4) {
            0 => 1,
            1 => 2.min(most),
            _ => 1 + rng.below(most),
        };
        for i in 0..burst {
            pair.submit(verify(), i).unwrap();
            if rng.one_in(3) {
                pair.ring();
            }
        }
        pair.ring();
        let mut left = burst as u32;
        let burst_start = Instant::now();
        while left > 0 {
            // Sometimes we look, mostly we sleep: a completion that is not signalled is never found then.
            let got = pair.poll(left, |c| assert_eq!(c.status(), Status::SUCCESS));
            left -= got;
            if got == 0 && left > 0 {
                pair.wait(LIMIT).unwrap();
            }
            assert!(
                burst_start.elapsed() < LIMIT,
                "queue {}: {left} of {burst} never came, after {total}",
                pair.qid()
            );
        }
        assert_eq!(pair.take_fault(), None);
        total += burst;
        // Around the time the poller goes to sleep.
        match rng.below(8) {
            0 => std::thread::sleep(Duration::from_micros(rng.below(200))),
            1 => std::thread::yield_now(),
            2 => (0..rng.below(2000)).for_each(|_| std::hint::spin_loop()),
            _ => {}
        }
    }
    total
}

fn run(idle: IdlePolicy, shadow: bool, entries: u32, disk: Disk) {
    let mut config = pollers(2, idle);
    for poller in &mut config {
        poller.poll_for = Duration::from_micros(20);
    }
    let daemon = TestDaemon::start(
        vec![Plan {
            queues: 4,
            ..Plan::of(disk)
        }],
        &config,
    );
    let mut guest = daemon.guest();
    if shadow {
        guest.enable_doorbell_buffer(&mut []).unwrap();
    }
    let pairs: Vec<Pair> = (1..4)
        .map(|qid| {
            let config = QueueConfig {
                max_transfer: 4096,
                ..queue(qid, entries)
            };
            guest.create_queue_pair(config).unwrap()
        })
        .collect();
    let totals: Vec<u64> = std::thread::scope(|scope| {
        let threads: Vec<_> = pairs
            .into_iter()
            .map(|mut pair| {
                scope.spawn(move || {
                    let seed = u64::from(pair.qid()) + u64::from(entries);
                    stress(&mut pair, seed, Duration::from_millis(700))
                })
            })
            .collect();
        // Admin commands meanwhile: the mailbox and the queues wake the same threads.
        let until = Instant::now() + Duration::from_millis(700);
        while Instant::now() < until {
            guest.identify_controller().unwrap();
            std::thread::sleep(Duration::from_micros(300));
        }
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(totals.iter().all(|n| *n > LEAST), "{totals:?}");
}

#[test]
fn adaptive() {
    run(IdlePolicy::Adaptive, false, 32, Disk::null(9, 64));
}

#[test]
fn adaptive_with_shadow_doorbells() {
    run(IdlePolicy::Adaptive, true, 32, Disk::null(9, 64));
}

#[test]
fn interrupt() {
    run(IdlePolicy::Interrupt, false, 32, Disk::null(9, 64));
}

#[test]
fn interrupt_with_shadow_doorbells() {
    run(IdlePolicy::Interrupt, true, 32, Disk::null(9, 64));
}

#[test]
fn poll_with_shadow_doorbells() {
    run(IdlePolicy::Poll, true, 32, Disk::null(9, 64));
}

#[test]
fn poll() {
    run(IdlePolicy::Poll, false, 32, Disk::null(9, 64));
}

#[test]
fn the_smallest_queues() {
    run(IdlePolicy::Interrupt, true, 2, Disk::null(9, 64));
    run(IdlePolicy::Adaptive, false, 2, Disk::null(9, 64));
}

#[test]
fn odd_queues() {
    run(IdlePolicy::Adaptive, true, 3, Disk::null(9, 64));
    run(IdlePolicy::Interrupt, false, 5, Disk::null(9, 64));
}

#[test]
fn stores_that_answer_later() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::file(&dir.path().join("disk"), 9, 64);
    run(IdlePolicy::Interrupt, true, 32, disk);
    let disk = Disk::file(&dir.path().join("other"), 9, 64);
    run(IdlePolicy::Adaptive, false, 32, disk);
}

#[test]
fn doorbells_are_mapped_under_load_and_trapped_when_it_ends() {
    let daemon = TestDaemon::start(
        vec![Plan {
            doorbell_buffer: false,
            ..Plan::of(Disk::null(9, 64))
        }],
        &pollers(1, IdlePolicy::Adaptive),
    );
    let mut guest = daemon.guest();
    let front = guest.device().clone();
    let mut pair = guest.create_queue_pair(queue(1, 32)).unwrap();
    let mut rng = Rng::new(1);
    let start = Instant::now();
    // Load comes and goes; each command of it would hang if a ring fell between the modes.
    let mut quiet_trapped = 0;
    // A client of vfio-user maps them for good.
    let switches = guest_tests::transport() == Transport::VhostUser;
    while !switches && start.elapsed() < Duration::from_secs(1) {
        stress(&mut pair, rng.any(), Duration::from_millis(60));
        std::thread::sleep(Duration::from_millis(40));
        assert!(front.doorbells_mapped());
    }
    while switches && front.doorbell_switches() < 8 && start.elapsed() < LIMIT {
        stress(&mut pair, rng.any(), Duration::from_millis(60));
        std::thread::sleep(Duration::from_millis(40));
        quiet_trapped += u32::from(!front.doorbells_mapped());
    }
    assert!(
        !switches || front.doorbell_switches() >= 2,
        "it never switched"
    );
    assert!(
        !switches || quiet_trapped > 0,
        "it sleeps only with trapped doorbells"
    );
    // Commands one by one, long after the load.
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(3));
        pair.submit(verify(), 0).unwrap();
        pair.ring();
        guest_tests::io::collect(&mut pair, 1);
        guest.identify_controller().unwrap();
    }
}

#[test]
fn kicks_that_come_twice_or_for_nothing_do_no_harm() {
    let daemon = TestDaemon::start(
        vec![Plan::of(Disk::null(9, 64))],
        &pollers(1, IdlePolicy::Interrupt),
    );
    let mut guest = daemon.guest();
    let mut pair = guest.create_queue_pair(queue(1, 8)).unwrap();
    let offset = guest
        .stride()
        .window_offset(nvme_spec::doorbell::Doorbell::Sq(1));
    let bell = guest.device().bell(offset).unwrap();
    for _ in 0..500 {
        bell.kick();
        pair.submit(verify(), 0).unwrap();
        pair.ring();
        bell.kick();
        guest_tests::io::collect(&mut pair, 1);
        bell.kick();
    }
}
