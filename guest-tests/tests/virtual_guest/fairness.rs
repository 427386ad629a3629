//! Guests that share one poller. What is compared are counts, not times.

use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_tests::FrontEnd;
use guest_tests::daemon::{Disk, Plan, TestDaemon, bring_up, pollers, queue};
use guest_tests::io::{Io, LIMIT, Pair, collect};
use nvme_spec::Status;
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use vhost_user_nvme::backend::{Delay, Operations, Rule};
use vhost_user_nvme::driver::QueueConfig;
use vhost_user_nvme::poller::IdlePolicy;
use vhost_user_nvme::poller::stats::QueueStats;

/// Counters of the only submission queue of a controller.
fn stats(daemon: &TestDaemon, controller: usize) -> Arc<QueueStats> {
    let placed = daemon.controller(controller).placement(LIMIT).unwrap();
    Arc::clone(&placed[0].sqs[0].1)
}

/// So many guests, each with a full queue of `depth` commands on a store that takes its time, rung at once. How many commands
/// of each are done while one does six tenths of its own, once all are under way.
fn race(guests: usize, depth: u32, slots: usize) -> Vec<u64> {
    let mut rules = Vec::new();
    let plans = (0..guests).map(|_| {
        let (disk, delays) = Disk::null(9, 64).with_delays();
        delays.add(Rule::always(
            Operations::READ,
            Delay(Duration::from_millis(4)),
        ));
        rules.push(delays);
        Plan {
            queues: 2,
            ..Plan::of(disk)
        }
    });
    let plans = plans.collect();
    let mut config = pollers(1, IdlePolicy::Adaptive);
    config[0].slots = slots;
    let daemon = TestDaemon::start(plans, &config);
    let mut pairs: Vec<(_, Pair)> = (0..guests)
        .map(|i| {
            let mut guest = bring_up(FrontEnd::connect(daemon.socket(i)).unwrap());
            let config = QueueConfig {
                max_transfer: 4096,
                ..queue(1, depth + 1)
            };
            let pair = guest.create_queue_pair(config).unwrap();
            (guest, pair)
        })
        .collect();
    for (guest, pair) in &mut pairs {
        let data = guest.device().memory().allocate(4096).unwrap();
        let read = ReadWrite::new(1, 0, 0).to_sqe(NvmOpcode::READ, 0, 0);
        for i in 0..u64::from(depth) {
            pair.submit_data(read, data.addr(), 512, i).unwrap();
        }
    }
    let counters: Vec<_> = (0..guests).map(|i| stats(&daemon, i)).collect();
    pairs.iter_mut().for_each(|(_, pair)| pair.ring());
    let start = Instant::now();
    // They do not start at the same moment, and the first finds everything free: count from when all are well under way.
    let mut base = vec![0; guests];
    let (mut warm, most) = (true, u64::from(depth) * 6 / 10);
    let counts = loop {
        let now = counters.iter().map(|s| s.completed.get());
        let counts: Vec<u64> = now.zip(&base).map(|(now, base)| now - base).collect();
        if warm && counts.iter().all(|n| *n >= 60) {
            base.clone_from(&counts);
            warm = false;
        } else if !warm && counts.iter().any(|n| *n >= most) {
            break counts;
        }
        assert!(start.elapsed() < LIMIT, "{counts:?}");
        std::thread::sleep(Duration::from_micros(100));
    };
    for (_, pair) in &mut pairs {
        collect(pair, depth as usize);
    }
    counts
}

#[test]
fn guests_of_one_poller_get_equal_shares_of_its_slots() {
    let counts = race(8, 1000, 64);
    let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
    assert!(*most as f64 <= 1.15 * *least as f64 + 8.0, "{counts:?}");
}

#[test]
fn more_guests_than_slots_all_make_progress() {
    let counts = race(24, 400, 16);
    assert!(counts.iter().all(|n| *n > 60), "{counts:?}");
}

#[test]
fn large_transfers_leave_turns_to_others() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(12, 4096)));
    let mut guest = daemon.guest();
    let mut io = Io::new(&mut guest, queue(1, 64), 1);
    let stats = stats(&daemon, 0);
    let mut batches = |blocks: u32| {
        let before = stats.batches.get();
        for i in 0..32u64 {
            let sqe = io.command(i * 32, blocks).to_sqe(NvmOpcode::READ, 0, 0);
            let len = blocks * 4096;
            io.pair.submit_data(sqe, io.data.addr(), len, i).unwrap();
        }
        io.pair.ring();
        let done = collect(&mut io.pair, 32);
        assert!(done.iter().all(|c| c.status() == Status::SUCCESS));
        stats.batches.get() - before
    };
    // 32 of 128 KiB are 16 times 256 KiB, and each turn ends with at most two transfers more than that.
    assert!(batches(32) >= 8);
    assert!(batches(1) <= 4);
}
