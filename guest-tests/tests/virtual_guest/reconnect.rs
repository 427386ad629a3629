//! Front-ends that come and go; the daemon stays.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use guest_tests::FrontEnd;
use guest_tests::daemon::{Disk, Plan, TestDaemon, bring_up, pollers, queue};
use guest_tests::frontend::Setup;
use guest_tests::io::Io;
use guest_tests::rng::Rng;
use nvme_spec::Status;
use nvme_spec::regs::{Cc, offset};
use vhost_user_nvme::poller::IdlePolicy;
use vhost_user_nvme::transport::Transport;

#[test]
fn fifty_times_and_each_is_a_fresh_start() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 4096)));
    for round in 0..50u64 {
        let front = daemon.connect();
        let mut cc = [0xFF; 4];
        front.read(offset::CC, &mut cc).unwrap();
        assert_eq!(Cc::from_bits(u32::from_le_bytes(cc)), Cc::new());
        let mut guest = bring_up(front);
        let mut io = Io::new(&mut guest, queue(1 + (round % 7) as u16, 16), 1);
        if round > 0 {
            let kept = io.read(round - 1, 1).unwrap();
            assert_eq!(kept, [round as u8 - 1; 512], "the data stays");
        }
        assert_eq!(io.write(round, &[round as u8; 512]), Status::SUCCESS);
        // It goes without a word, or in order.
        match round % 3 {
            0 => drop((guest, io)),
            1 => {
                guest.delete_queue_pair(io.pair).unwrap();
                guest.shut_down(false).unwrap();
            }
            _ => drop((io, guest.reset().unwrap())),
        }
    }
    assert_eq!(daemon.controller(0).queues(), 8);
}

#[test]
fn a_second_front_end_waits_until_the_first_has_gone() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 64)));
    let first = daemon.guest();
    let path = daemon.socket(0).to_owned();
    let second = std::thread::spawn(move || {
        let mut guest = bring_up(FrontEnd::connect(&path).unwrap());
        Io::new(&mut guest, queue(1, 16), 1).write(0, &[1; 512])
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(!second.is_finished());
    drop(first);
    assert_eq!(second.join().unwrap(), Status::SUCCESS);
}

#[test]
fn garbage_ends_its_connection_and_the_next_is_served() {
    let plans = (0..2).map(|_| Plan::of(Disk::memory(9, 64))).collect();
    let daemon = TestDaemon::start(plans, &pollers(1, IdlePolicy::Adaptive));
    let mut healthy = bring_up(FrontEnd::connect(daemon.socket(0)).unwrap());
    let mut io = Io::new(&mut healthy, queue(1, 16), 1);
    let mut rng = Rng::new(11);
    for round in 0..60u64 {
        let mut stream = UnixStream::connect(daemon.socket(1)).unwrap();
        let mut bytes = vec![0; rng.below(300) as usize];
        rng.fill(&mut bytes);
        // Mostly something like a header: request, flags, size.
        if round % 3 != 0 && bytes.len() >= 12 {
            bytes[..4].copy_from_slice(&(rng.below(50) as u32).to_le_bytes());
            bytes[4..8].copy_from_slice(&(1u32 | (rng.below(4) as u32) << 2).to_le_bytes());
            let size = if rng.one_in(4) {
                rng.any() as u32
            } else {
                rng.below(64) as u32
            };
            bytes[8..12].copy_from_slice(&size.to_le_bytes());
        }
        let _ = stream.write_all(&bytes);
        if round % 2 == 0 {
            std::thread::sleep(Duration::from_micros(rng.below(2000)));
        }
        drop(stream);
        assert!(io.read(0, 1).is_ok());
    }
    let mut guest = bring_up(FrontEnd::connect(daemon.socket(1)).unwrap());
    assert_eq!(
        Io::new(&mut guest, queue(1, 16), 1).write(0, &[1; 512]),
        Status::SUCCESS
    );
}

#[test]
fn a_back_channel_that_is_refused_ends_in_an_error_not_in_a_hang() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 64)));
    let mut guest = daemon.guest();
    guest.device().refuse_back_channel(true);
    // Load makes the daemon ask for mapped doorbells; it is told no, and goes on or ends the connection.
    let mut io = Io::new(&mut guest, queue(1, 32), 1);
    let start = std::time::Instant::now();
    while start.elapsed() < Duration::from_millis(200) {
        let sqe = io
            .command(0, 1)
            .to_sqe(nvme_spec::opcode::NvmOpcode::VERIFY, 0, 0);
        if io.pair.submit(sqe, 0).is_ok() {
            io.pair.ring();
        }
        io.pair.poll(32, |_| ());
    }
    drop((io, guest));
    let mut next = daemon.guest();
    assert_eq!(
        Io::new(&mut next, queue(1, 16), 1).write(0, &[1; 512]),
        Status::SUCCESS
    );
}

#[test]
fn memory_of_any_shape_is_taken() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 64)));
    let many: Vec<(u64, u64)> = (0..24).map(|i| (i * (4 << 20), 2 << 20)).collect();
    for memory in [
        vec![(0, 16 << 20)],
        many,
        vec![(1 << 40, 8 << 20), (0, 8 << 20)],
    ] {
        let setup = Setup {
            memory,
            ..Setup::default()
        };
        let front = FrontEnd::connect_with(daemon.socket(0), &setup).unwrap();
        let mut guest = bring_up(front);
        let mut io = Io::new(&mut guest, queue(1, 16), 1);
        assert_eq!(io.write(0, &[1; 512]), Status::SUCCESS);
    }
}

#[test]
fn the_instance_id_reaches_the_controller() {
    if guest_tests::transport() == Transport::VfioUser {
        // It has none.
        return;
    }
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 64)));
    for id in [[7; 16], *b"0123456789abcdef"] {
        let setup = Setup {
            instance: id,
            ..Setup::default()
        };
        let _front = FrontEnd::connect_with(daemon.socket(0), &setup).unwrap();
        assert_eq!(daemon.controller(0).instance(), Some(id));
    }
}
