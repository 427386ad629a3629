//! Ends with commands out: a queue deleted, the controller disabled, reset from outside, the connection gone.

use std::time::{Duration, Instant};

use guest_tests::daemon::{Disk, Plan, TestDaemon, bring_up, pollers, queue};
use guest_tests::io::{Io, collect};
use guest_tests::raw::Guest;
use nvme_spec::Status;
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use vhost_user_nvme::backend::{Delay, Fault, Operations, Rule, Rules};
use vhost_user_nvme::poller::IdlePolicy;

const SLOW: Duration = Duration::from_millis(50);

struct Bench {
    daemon: TestDaemon,
    _delays: Rules<Delay>,
    _faults: Rules<Fault>,
}

/// Blocks 1000 on are read slowly, blocks 2000 on never.
fn bench(idle: IdlePolicy) -> Bench {
    let (disk, delays) = Disk::memory(9, 4096).with_delays();
    let (disk, faults) = disk.with_faults();
    delays.add(Rule::always(Operations::READ, Delay(SLOW)).on_blocks(1000..2000));
    faults.add(Rule::always(Operations::READ, Fault::NeverComplete).on_blocks(2000..3000));
    Bench {
        daemon: TestDaemon::start(vec![Plan::of(disk)], &pollers(2, idle)),
        _delays: delays,
        _faults: faults,
    }
}

/// Put commands of all three kinds out.
fn load(io: &mut Io) -> usize {
    let mut count = 0;
    for i in 0..30u64 {
        let slba = [0, 1000, 2000][i as usize % 3] + i;
        let sqe = ReadWrite::new(1, slba, 7).to_sqe(NvmOpcode::READ, 0, 0);
        let at = io.data.addr() + i * 4096;
        io.pair.submit_data(sqe, at, 4096, i).unwrap();
        count += 1;
    }
    io.pair.ring();
    count
}

fn works(guest: &mut Guest, qid: u16) {
    let mut io = Io::new(guest, queue(qid, 64), 1);
    assert_eq!(io.write(5, &[7; 512]), Status::SUCCESS);
    assert_eq!(io.read(5, 1).unwrap(), [7; 512]);
    guest.delete_queue_pair(io.pair).unwrap();
}

#[test]
fn a_queue_is_deleted_with_commands_out() {
    for idle in [IdlePolicy::Adaptive, IdlePolicy::Interrupt] {
        let b = bench(idle);
        let mut guest = b.daemon.guest();
        for round in 0..5 {
            let mut io = Io::new(&mut guest, queue(1, 64), 1);
            let mut healthy = Io::new(&mut guest, queue(2, 64), 1);
            let count = load(&mut io);
            std::thread::sleep(Duration::from_millis(round));
            let start = Instant::now();
            guest.delete_sq(1).unwrap();
            assert!(
                start.elapsed() < Duration::from_secs(4),
                "{:?}",
                start.elapsed()
            );
            // The data is ours again: nothing may be written to it any more.
            io.data.fill(0xA5);
            // What was fetched has been completed, one way or the other, before the deletion was.
            let mut done = Vec::new();
            io.pair.poll(64, |c| done.push(c));
            assert!(done.len() <= count);
            for c in &done {
                assert!(
                    [
                        Status::SUCCESS,
                        Status::ABORT_REQUESTED,
                        Status::ABORTED_SQ_DELETION
                    ]
                    .contains(&c.status()),
                    "{}",
                    c.status()
                );
            }
            assert!(healthy.read(0, 1).is_ok());
            std::thread::sleep(2 * SLOW);
            assert!(io.data.bytes(30 * 4096).iter().all(|b| *b == 0xA5));
            assert_eq!(io.pair.poll(64, |_| ()), 0, "nothing after the deletion");
            guest.delete_cq(1).unwrap();
            guest.delete_queue_pair(healthy.pair).unwrap();
            works(&mut guest, 1);
        }
    }
}

#[test]
fn the_controller_is_disabled_with_commands_out() {
    let b = bench(IdlePolicy::Adaptive);
    let mut front = b.daemon.connect();
    for round in 0..6 {
        let mut guest = bring_up(front);
        if round % 2 == 0 {
            guest.enable_doorbell_buffer(&mut []).unwrap();
        }
        let mut io = Io::new(&mut guest, queue(1, 64), 1);
        load(&mut io);
        std::thread::sleep(Duration::from_millis(round));
        let start = Instant::now();
        front = guest.reset().unwrap();
        assert!(
            start.elapsed() < Duration::from_secs(4),
            "{:?}",
            start.elapsed()
        );
        io.data.fill(0xA5);
        std::thread::sleep(2 * SLOW);
        assert!(io.data.bytes(30 * 4096).iter().all(|b| *b == 0xA5));
    }
    works(&mut bring_up(front), 3);
}

#[test]
fn the_device_is_reset_from_outside_with_commands_out() {
    let b = bench(IdlePolicy::Adaptive);
    let mut front = b.daemon.connect();
    for round in 0..6 {
        let mut guest = bring_up(front);
        let mut io = Io::new(&mut guest, queue(1, 64), 1);
        load(&mut io);
        std::thread::sleep(Duration::from_millis(round));
        guest.device().reset_device().unwrap();
        io.data.fill(0xA5);
        assert!(!guest.csts().unwrap().rdy());
        std::thread::sleep(2 * SLOW);
        assert!(io.data.bytes(30 * 4096).iter().all(|b| *b == 0xA5));
        let window = guest.device().window_bytes();
        for offset in (0..u64::from(window)).step_by(4) {
            let bell = guest.device().bell(offset).unwrap();
            assert_eq!(bell.value(), 0, "the window is zeroed: {offset:#x}");
        }
        front = guest.into_device();
    }
    works(&mut bring_up(front), 3);
}

#[test]
fn the_front_end_goes_with_commands_out() {
    let b = bench(IdlePolicy::Interrupt);
    for round in 0..10 {
        let mut guest = b.daemon.guest();
        let mut io = Io::new(&mut guest, queue(1, 64), 1);
        load(&mut io);
        std::thread::sleep(Duration::from_millis(round));
        let Io { pair, data, .. } = io;
        drop((pair, guest));
        // The next one is served when the daemon has let go of this one's memory.
        let mut next = b.daemon.guest();
        data.fill(0xA5);
        works(&mut next, 1);
        assert!(data.bytes(30 * 4096).iter().all(|b| *b == 0xA5));
    }
}

#[test]
fn queues_come_and_go_for_ever() {
    let daemon = TestDaemon::start(
        vec![Plan::of(Disk::null(9, 64))],
        &pollers(2, IdlePolicy::Adaptive),
    );
    let mut guest = daemon.guest();
    guest.enable_doorbell_buffer(&mut []).unwrap();
    let mut steady = Io::new(&mut guest, queue(7, 16), 1);
    let verify = ReadWrite::new(1, 0, 0).to_sqe(NvmOpcode::VERIFY, 0, 0);
    for round in 0..200u16 {
        let qid = 1 + round % 6;
        let mut pair = guest.create_queue_pair(queue(qid, 8)).unwrap();
        for _ in 0..5 {
            pair.submit(verify, 0).unwrap();
        }
        pair.ring();
        if round % 3 == 0 {
            collect(&mut pair, 5);
        }
        guest.delete_queue_pair(pair).unwrap();
        assert!(steady.read(0, 1).is_ok());
    }
}
