//! A guest that does what no guest may: wild doorbells, commands that change, completions that are never taken.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use guest_tests::daemon::{Disk, Plan, TestDaemon, bring_up, pollers, queue};
use guest_tests::io::{Io, LIMIT};
use guest_tests::raw::{self, Guest};
use guest_tests::rng::Rng;
use nvme_spec::doorbell::Doorbell as Which;
use nvme_spec::event::AsyncEvent;
use nvme_spec::log::LogId;
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::{Sqe, Status};
use vhost_user_nvme::driver::Doorbell as _;
use vhost_user_nvme::memory::SharedWord;
use vhost_user_nvme::poller::IdlePolicy;

const WILD: [u32; 9] = [
    8,
    9,
    255,
    0xFFFF,
    0x1_0000,
    0x1_0003,
    0x7FFF_FFFF,
    0x8000_0000,
    u32::MAX,
];

fn verify() -> Sqe {
    ReadWrite::new(1, 0, 0).to_sqe(NvmOpcode::VERIFY, 0, 0)
}

/// The event of a wild doorbell is there, once; reading the log page arms it again.
fn expect_event(guest: &mut Guest) {
    assert_eq!(
        guest.wait_event(LIMIT).unwrap(),
        Some(AsyncEvent::INVALID_DOORBELL_VALUE)
    );
    guest.arm_events(2).unwrap();
    guest.log_page(LogId::ERROR, 0, 64, false).unwrap();
}

#[test]
fn a_wild_doorbell_stops_its_queue_and_nothing_else() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 64)));
    let mut guest = daemon.guest();
    guest.arm_events(2).unwrap();
    let mut healthy = Io::new(&mut guest, queue(2, 16), 1);
    for shadow in [false, true] {
        if shadow {
            guest
                .enable_doorbell_buffer(&mut [&mut healthy.pair])
                .unwrap();
        }
        for value in WILD {
            for at in [Which::Sq(1), Which::Cq(1)] {
                let (mut sq, mut cq) = raw::create_pair(&mut guest, 1, 8).unwrap();
                let shadows = guest.doorbell_buffer();
                let map = Arc::clone(sq.memory.map());
                let stride = guest.stride();
                let word = |which| {
                    let (page, _) = shadows?;
                    SharedWord::in_guest(&map, page + stride.shadow_offset(which))
                };
                // Tails and heads begin at 0 in the shadow as well.
                for which in [Which::Sq(1), Which::Cq(1)] {
                    if let Some(word) = word(which) {
                        word.store(0);
                    }
                }
                if let Some(word) = word(at) {
                    word.store(value);
                }
                // A completion queue's head is looked at when there seems to be no room.
                match at {
                    Which::Sq(_) => sq.bell.ring(value),
                    Which::Cq(_) => {
                        cq.bell.ring(value);
                        // Seven fit without a look at the head, the eighth does not.
                        for _ in 0..8 {
                            sq.push(verify());
                            if let Some(word) = word(Which::Sq(1)) {
                                word.store(u32::from(sq.tail));
                            }
                            sq.ring();
                            let start = Instant::now();
                            while cq.take().is_none() && start.elapsed() < Duration::from_millis(2)
                            {
                                std::thread::yield_now();
                            }
                        }
                    }
                }
                expect_event(&mut guest);
                // What was done before is there by now, taken in time or not. It does no more.
                while cq.take().is_some() {}
                sq.push(verify());
                sq.ring();
                assert!(
                    cq.wait(Duration::from_millis(5)).is_none(),
                    "{value:#x} at {at:?}"
                );
                assert_eq!(healthy.read(0, 1).unwrap(), [0; 512]);
                guest.delete_sq(1).unwrap();
                guest.delete_cq(1).unwrap();
            }
        }
    }
    // And its identifier can be used again.
    let mut again = Io::new(&mut guest, queue(1, 8), 1);
    assert_eq!(again.write(1, &[7; 512]), Status::SUCCESS);
}

#[test]
fn a_wild_admin_doorbell_is_fatal_until_the_guest_resets() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 64)));
    let mut front = daemon.connect();
    for (value, which) in [
        (32, Which::Sq(0)),
        (u32::MAX, Which::Sq(0)),
        (32, Which::Cq(0)),
    ] {
        let mut guest = bring_up(front);
        let offset = guest.stride().window_offset(which);
        let bell = guest.device().bell(offset).unwrap();
        bell.ring(value);
        if which == Which::Cq(0) {
            // Looked at with the next command.
            let tail = guest.stride().window_offset(Which::Sq(0));
            guest.device().bell(tail).unwrap().kick();
        }
        let start = Instant::now();
        while !guest.csts().unwrap().cfs() {
            assert!(start.elapsed() < LIMIT, "{value:#x} at {which:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        front = guest.into_device();
    }
    let mut guest = bring_up(front);
    let mut io = Io::new(&mut guest, queue(1, 8), 1);
    assert_eq!(io.write(1, &[7; 512]), Status::SUCCESS);
}

#[test]
fn doorbells_of_no_queue_and_kicks_of_none_do_no_harm() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 64)));
    let mut guest = daemon.guest();
    let mut io = Io::new(&mut guest, queue(3, 8), 1);
    let stride = u64::from(guest.stride().bytes());
    let own = [Which::Sq(0), Which::Cq(0), Which::Sq(3), Which::Cq(3)]
        .map(|w| guest.stride().window_offset(w));
    let mut rng = Rng::new(3);
    for _ in 0..3000 {
        let offset = rng.below(u64::from(guest.device().window_bytes()) / 4) * 4;
        let bell = guest.device().bell(offset).unwrap();
        if own.contains(&(offset / stride * stride)) {
            bell.kick();
        } else {
            bell.ring(rng.any() as u32);
        }
    }
    assert_eq!(io.write(1, &[7; 512]), Status::SUCCESS);
    guest.identify_controller().unwrap();
    // A queue that is made now begins at 0, whatever its doorbells held.
    let mut later = Io::new(&mut guest, queue(5, 8), 1);
    assert_eq!(later.read(1, 1).unwrap(), [7; 512]);
}

#[test]
fn a_command_that_changes_after_submission_is_one_of_its_versions() {
    let daemon = TestDaemon::start(
        vec![Plan::of(Disk::memory(9, 4096))],
        &pollers(1, IdlePolicy::Adaptive),
    );
    let mut guest = daemon.guest();
    let (mut sq, mut cq) = raw::create_pair(&mut guest, 1, 16).unwrap();
    let mut healthy = Io::new(&mut guest, queue(2, 16), 1);
    let data = guest.device().memory().allocate(64 << 10).unwrap();
    let versions: Vec<Sqe> = [
        (NvmOpcode::READ, 0, 0, data.addr(), 0),
        (NvmOpcode::READ, 0, 15, data.addr(), data.addr() + 4096),
        (NvmOpcode::READ, u64::MAX, 0xFFFF, data.addr(), 0),
        (NvmOpcode::READ, 1, 7, 0xFFFF_F000_0000, 0),
        (NvmOpcode::WRITE, 8, 15, data.addr() + 1, 1),
        (NvmOpcode(0xFF), 0, 0, 0, 0),
    ]
    .map(|(opcode, slba, nlb, prp1, prp2)| ReadWrite::new(1, slba, nlb).to_sqe(opcode, prp1, prp2))
    .into();
    let stop = Arc::new(AtomicBool::new(false));
    let memory_map = Arc::clone(sq.memory.map());
    let (base, entries) = (sq.memory.addr(), sq.size.get());
    let changer = std::thread::spawn({
        let (stop, versions) = (Arc::clone(&stop), versions.clone());
        move || {
            let ring = vhost_user_nvme::memory::Ring::<8>::new(&memory_map, base, entries).unwrap();
            let mut rng = Rng::new(9);
            while !stop.load(Ordering::Relaxed) {
                let index = rng.below(u64::from(entries)) as u32;
                let sqe = versions[rng.below(versions.len() as u64) as usize];
                // Its identifier stays, so that we can count.
                ring.write(index, zerocopy::transmute!(sqe.with_cid(index as u16)));
            }
        }
    });
    let mut counts = std::collections::HashMap::new();
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(400) {
        let mut left = 0u32;
        for _ in 0..15 {
            let index = sq.tail;
            sq.push(versions[0].with_cid(index));
            left |= 1 << index;
        }
        sq.ring();
        while left != 0 {
            let cqe = cq.wait(LIMIT).expect("every command is answered");
            assert_eq!(cqe.sqid, 1);
            assert!(left & 1 << cqe.cid != 0, "once each");
            left &= !(1 << cqe.cid);
            *counts.entry(cqe.status()).or_insert(0u32) += 1;
        }
    }
    stop.store(true, Ordering::Relaxed);
    changer.join().unwrap();
    for status in counts.keys() {
        assert!(
            [
                Status::SUCCESS,
                Status::INVALID_FIELD,
                Status::LBA_OUT_OF_RANGE,
                Status::DATA_TRANSFER_ERROR,
                Status::INVALID_PRP_OFFSET,
                Status::INVALID_OPCODE,
                // Mixtures of versions.
                Status::INVALID_NAMESPACE_OR_FORMAT,
            ]
            .contains(status),
            "{counts:?}"
        );
    }
    assert!(healthy.read(0, 1).is_ok());
}

#[test]
fn a_completion_queue_that_is_never_emptied_stops_only_its_own() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 64)));
    let mut guest = daemon.guest();
    let mut cq = raw::create_cq(&mut guest, 1, 2, None).unwrap();
    let mut sq = raw::create_sq(&mut guest, 1, 1, 16).unwrap();
    let mut healthy = Io::new(&mut guest, queue(2, 16), 1);
    for cid in 0..15 {
        sq.push(verify().with_cid(cid));
    }
    sq.ring();
    // Room for one: it comes, and no more, however long we look.
    let start = Instant::now();
    let mut got = Vec::new();
    while start.elapsed() < Duration::from_millis(50) {
        got.extend(cq.take().map(|c| c.cid));
    }
    assert_eq!(got, [0]);
    assert_eq!(healthy.write(0, &[1; 512]), Status::SUCCESS);
    for cid in 1..15 {
        cq.release();
        let cqe = loop {
            if let Some(cqe) = cq.take() {
                break cqe;
            }
            assert!(start.elapsed() < LIMIT);
            std::thread::yield_now();
        };
        assert_eq!((cqe.cid, cqe.status()), (cid, Status::SUCCESS));
    }
    assert!(cq.take().is_none());
    // Full again, and thrown away with commands waiting.
    for cid in 0..15 {
        sq.push(verify().with_cid(cid));
    }
    sq.ring();
    guest.delete_sq(1).unwrap();
    guest.delete_cq(1).unwrap();
    assert_eq!(healthy.read(0, 1).unwrap(), [1; 512]);
}

#[test]
fn one_identifier_for_several_commands_does_no_harm() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 64)));
    let mut guest = daemon.guest();
    let (mut sq, mut cq) = raw::create_pair(&mut guest, 1, 32).unwrap();
    for _ in 0..20 {
        sq.submit(&[verify().with_cid(7); 31]);
        for _ in 0..31 {
            let cqe = cq.wait(LIMIT).expect("an answer to each");
            assert_eq!(cqe.cid, 7);
            assert!([Status::SUCCESS, Status::COMMAND_ID_CONFLICT].contains(&cqe.status()));
        }
    }
}

#[test]
fn random_commands_are_all_answered() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 512)));
    let mut guest = daemon.guest();
    let (mut sq, mut cq) = raw::create_pair(&mut guest, 1, 64).unwrap();
    let data = guest.device().memory().allocate(1 << 20).unwrap();
    let mut rng = Rng::new(77);
    for _ in 0..300 {
        for cid in 0..63 {
            let mut bytes = [0u8; 64];
            rng.fill(&mut bytes);
            let mut sqe: Sqe = zerocopy::transmute!(bytes);
            // Mostly valid, so that it gets far.
            if !rng.one_in(8) {
                sqe.opcode = [0, 1, 2, 5, 8, 9, 0xC][rng.below(7) as usize];
            }
            if !rng.one_in(8) {
                sqe.flags = 0;
            }
            if !rng.one_in(8) {
                sqe.nsid = 1;
            }
            if !rng.one_in(4) {
                sqe.set_slba(rng.below(600));
                sqe.cdw12 = rng.below(20) as u32;
            }
            if !rng.one_in(4) {
                sqe.prp1 = data.addr() + rng.below(1 << 19) / 4 * 4;
                sqe.prp2 = data.addr() + rng.below(100) * 4096;
            }
            sq.push(sqe.with_cid(cid));
        }
        sq.ring();
        let mut left = u64::MAX >> 1;
        while left != 0 {
            let cqe = cq.wait(LIMIT).expect("every command is answered");
            assert!(left & 1 << cqe.cid != 0, "once each");
            left &= !(1 << cqe.cid);
        }
    }
    let mut healthy = Io::new(&mut guest, queue(2, 16), 1);
    assert!(healthy.read(0, 1).is_ok());
}
