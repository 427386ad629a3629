//! No completion is left unsignalled: guests that sleep until they are interrupted, and only then look.
//!
//! `SIGNALLED_COMMANDS` says how many commands are done one by one, and how many at depth, under each policy; `scripts/test` has them do
//! a million each.

use std::time::{Duration, Instant};

use guest_tests::daemon::{Disk, Plan, TestDaemon, pollers, queue};
use guest_tests::io::{LIMIT, Pair};
use nvme_spec::feature::{FeatureId, InterruptCoalescing, InterruptVectorConfig};
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::{Sqe, Status};
use vhost_user_nvme::poller::IdlePolicy;

fn commands() -> u64 {
    let given = std::env::var("SIGNALLED_COMMANDS");
    given.map_or(8_000, |n| n.parse().expect("SIGNALLED_COMMANDS: a number"))
}

fn verify() -> Sqe {
    ReadWrite::new(1, 0, 0).to_sqe(NvmOpcode::VERIFY, 0, 0)
}

/// `count` commands, `depth` at a time. The interrupt's handler takes what it finds, moves the head, and ends; what it did not find has to
/// be signalled again. Returns the number of interrupts.
fn run(pair: &mut Pair, depth: u64, count: u64) -> u64 {
    let depth = depth.min(pair.depth().into());
    let (mut begun, mut done, mut interrupts) = (0, 0, 0);
    while done < count {
        while begun < count && begun - done < depth {
            pair.submit(verify(), begun).unwrap();
            begun += 1;
        }
        pair.ring();
        let signalled = pair.wait(LIMIT).unwrap();
        assert!(
            signalled > 0,
            "no interrupt for {LIMIT:?}, with {} commands out after {done}; {} are complete and unsignalled",
            begun - done,
            pair.poll(u32::MAX, |_| {}),
        );
        interrupts += signalled;
        done += u64::from(pair.poll(u32::MAX, |c| assert_eq!(c.status(), Status::SUCCESS)));
    }
    assert_eq!(pair.take_fault(), None);
    interrupts
}

/// A guest alone and one at depth, half of the time with shadow doorbells.
fn guests(idle: IdlePolicy) {
    for (depth, entries) in [(1, 2), (1, 64), (63, 64), (1000, 1024)] {
        for shadow in [false, true] {
            let daemon = TestDaemon::start(vec![Plan::of(Disk::null(9, 64))], &pollers(1, idle));
            let mut guest = daemon.guest();
            if shadow {
                guest.enable_doorbell_buffer(&mut []).unwrap();
            }
            let mut pair = guest.create_queue_pair(queue(1, entries)).unwrap();
            let count = commands() / 4;
            let start = Instant::now();
            let interrupts = run(&mut pair, depth, count);
            println!(
                "{idle:?}, depth {depth} of {entries}, shadow doorbells {shadow}: {count} commands, {interrupts} interrupts, {:?}",
                start.elapsed()
            );
        }
    }
}

#[test]
fn poll() {
    guests(IdlePolicy::Poll);
}

#[test]
fn adaptive() {
    guests(IdlePolicy::Adaptive);
}

#[test]
fn interrupt() {
    guests(IdlePolicy::Interrupt);
}

const POLICIES: [IdlePolicy; 3] = [
    IdlePolicy::Poll,
    IdlePolicy::Adaptive,
    IdlePolicy::Interrupt,
];

/// The shortest time that one of `count` commands takes which come one by one.
fn quickest(pair: &mut Pair, count: u32) -> Duration {
    let one = |_| {
        let start = Instant::now();
        run(pair, 1, 1);
        start.elapsed()
    };
    (0..count).map(one).min().unwrap_or_default()
}

#[test]
fn coalescing_delays_an_interrupt_and_loses_none() {
    const DELAY: Duration = Duration::from_millis(2);
    for idle in POLICIES {
        for shadow in [false, true] {
            let daemon = TestDaemon::start(vec![Plan::of(Disk::null(9, 64))], &pollers(1, idle));
            let mut guest = daemon.guest();
            if shadow {
                guest.enable_doorbell_buffer(&mut []).unwrap();
            }
            let mut pair = guest.create_queue_pair(queue(1, 64)).unwrap();
            assert!(quickest(&mut pair, 50) < DELAY, "nothing is delayed yet");
            // Eight entries, or two milliseconds.
            let value = InterruptCoalescing::new().with_thr_z(7).with_time(20);
            let fid = FeatureId::INTERRUPT_COALESCING;
            guest.set_feature(fid, 0, value.into_bits()).unwrap();
            assert!(quickest(&mut pair, 20) >= DELAY, "one entry of eight");
            let interrupts = run(&mut pair, 24, 2400);
            assert!(
                interrupts <= 1200,
                "{idle:?}: {interrupts} interrupts for 2400 entries by eight"
            );
            // Nobody delays the admin queue.
            let admin = || {
                let start = Instant::now();
                guest.identify_controller().unwrap();
                start.elapsed()
            };
            let admin = std::iter::repeat_with(admin).take(50).min();
            assert!(admin < Some(DELAY), "{admin:?}");
            let value = InterruptVectorConfig::new().with_iv(1).with_cd(true);
            let fid = FeatureId::INTERRUPT_VECTOR_CONFIG;
            guest.set_feature(fid, 0, value.into_bits()).unwrap();
            assert!(quickest(&mut pair, 50) < DELAY, "not on this vector");
        }
    }
}
