//! A guest that behaves: registers, queues, data, interrupts.

use std::time::Duration;

use guest_tests::daemon::{Disk, Plan, TestDaemon, bring_up, pollers, queue};
use guest_tests::io::{Io, LIMIT, collect};
use guest_tests::raw;
use guest_tests::rng::Rng;
use nvme_spec::Status;
use nvme_spec::doorbell::Doorbell as Which;
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::regs::{Csts, Shst, offset};
use nvme_spec::ring::RingSize;
use vhost_user_nvme::driver::{Driver, Options, QueueConfig};
use vhost_user_nvme::poller::IdlePolicy;

fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    Rng::new(seed).fill(&mut out);
    out
}

#[test]
fn a_controller_comes_up_and_stores_data_on_every_backend_and_block_size() {
    let dir = tempfile::tempdir().unwrap();
    for (i, shift) in [9u32, 12].into_iter().enumerate() {
        let file = dir.path().join(format!("disk{i}"));
        let blocks = (4 << 20) >> shift;
        let disks = vec![
            (1, Disk::memory(shift, blocks)),
            (2, Disk::file(&file, shift, blocks)),
        ];
        let daemon = TestDaemon::one(Plan::many(disks));
        let mut guest = daemon.guest();
        assert_eq!(guest.namespaces().unwrap(), [1, 2]);
        for nsid in [1, 2] {
            let mut io = Io::new(&mut guest, queue(nsid as u16, 64), nsid);
            assert_eq!(io.block, 1 << shift);
            for (slba, count) in [(0, 1), (7, 3), (blocks - 1, 1), (16, 64)] {
                let data = pattern(slba, (count << shift) as usize);
                assert!(io.read(slba, count).unwrap().iter().all(|b| *b == 0));
                assert_eq!(io.write(slba, &data), Status::SUCCESS);
                assert_eq!(io.flush(), Status::SUCCESS);
                assert!(io.read(slba, count).unwrap() == data);
                assert_eq!(io.compare(slba, &data), Status::SUCCESS);
                assert_eq!(io.blocks(NvmOpcode::VERIFY, slba, count), Status::SUCCESS);
                let mut other = data.clone();
                *other.last_mut().unwrap() ^= 1;
                assert_eq!(io.compare(slba, &other), Status::COMPARE_FAILURE);
                assert_eq!(
                    io.blocks(NvmOpcode::WRITE_ZEROES, slba, count),
                    Status::SUCCESS
                );
                assert!(io.read(slba, count).unwrap().iter().all(|b| *b == 0));
            }
        }
    }
}

#[test]
fn registers_are_those_of_a_controller() {
    let daemon = TestDaemon::one(Plan {
        doorbell_stride: 2,
        max_queue_entries: 4096,
        ..Plan::of(Disk::memory(9, 64))
    });
    let front = daemon.connect();
    assert_eq!(front.stride().bytes(), 16);
    assert_eq!(front.pci_ids(), [0x1b36, 0x0010, 0x1af4, 0x1100]);
    // BAR0 is max(16 KiB, 4 KiB + window, to a power of two): Windows wants 16 KiB.
    assert!(front.window_bytes() >= 8 * 2 * 16);
    let mut guest = bring_up(front.clone());
    assert_eq!(guest.cap().mqes_z(), 4095);
    assert!(guest.version().unwrap().mjr() >= 1);
    assert!(guest.csts().unwrap().rdy());
    // What does not exist reads as zero and ignores writes; accesses of all sizes do no harm.
    let mut bytes = [0xAA; 256];
    front.read(0x700, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 256]);
    for at in [0, 8, 0x1C, 0x20, 0x38, 0x700, 0xE00, 0xFF8] {
        for len in [1, 2, 4, 8] {
            front.write(at, &vec![0xFF; len]).unwrap();
        }
    }
    assert!(guest.csts().unwrap().rdy(), "and the controller runs on");
    guest.shut_down(false).unwrap();
    assert_eq!(guest.csts().unwrap().shst(), Shst::COMPLETE);
    let front = guest.reset().unwrap();
    let mut csts = [0; 4];
    front.read(offset::CSTS, &mut csts).unwrap();
    assert_eq!(Csts::from_bits(u32::from_le_bytes(csts)), Csts::new());
    bring_up(front);
}

#[test]
fn a_controller_is_brought_up_from_any_state() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 64)));
    let mut front = daemon.connect();
    for round in 0..10 {
        let mut guest = bring_up(front);
        let mut io = Io::new(&mut guest, queue(1, 16), 1);
        assert_eq!(io.write(3, &pattern(round, 512)), Status::SUCCESS);
        match round % 4 {
            0 => {}
            1 => guest.shut_down(false).unwrap(),
            2 => guest.shut_down(true).unwrap(),
            _ => guest.device().reset_device().unwrap(),
        }
        front = guest.into_device();
    }
}

#[test]
fn transfers_of_all_lengths_and_offsets_arrive_whole() {
    for idle in [IdlePolicy::Adaptive, IdlePolicy::Interrupt] {
        let daemon = TestDaemon::start(vec![Plan::of(Disk::memory(9, 8192))], &pollers(1, idle));
        let mut guest = daemon.guest();
        assert_eq!(guest.max_transfer(), 1 << 20);
        let mut io = Io::new(&mut guest, queue(1, 64), 1);
        let memory = guest.device().memory().allocate((1 << 20) + 8192).unwrap();
        let whole = pattern(1, memory.len());
        for (offset, blocks) in [
            (0u64, 2048u32),
            (4, 2048),
            (4092, 2048),
            (512, 8),
            (3584, 9),
            (0, 8),
            (0, 16),
            (2048, 1025),
            (4, 1),
        ] {
            let (addr, len) = (memory.addr() + offset, blocks * 512);
            memory.write(0, &whole);
            let command = ReadWrite::new(1, 100, (blocks - 1) as u16);
            for opcode in [NvmOpcode::WRITE, NvmOpcode::READ] {
                let sqe = command.to_sqe(opcode, 0, 0);
                io.pair.submit_data(sqe, addr, len, 9).unwrap();
                io.pair.ring();
                let done = collect(&mut io.pair, 1);
                assert_eq!((done[0].status(), done[0].user), (Status::SUCCESS, 9));
                if opcode == NvmOpcode::WRITE {
                    memory.fill(0x5A);
                }
            }
            let got = memory.bytes(memory.len());
            let range = offset as usize..offset as usize + len as usize;
            assert!(
                got[range.clone()] == whole[range.clone()],
                "{offset} {blocks}"
            );
            let around = got[..range.start].iter().chain(&got[range.end..]);
            assert!(around.into_iter().all(|b| *b == 0x5A), "{offset} {blocks}");
        }
    }
}

#[test]
fn queues_of_every_size_wrap() {
    let daemon = TestDaemon::one(Plan {
        max_queue_entries: 65536,
        ..Plan::of(Disk::null(9, 1 << 20))
    });
    let mut guest = daemon.guest();
    let memory = guest.device().add_memory(0x2_0000_0000, 32 << 20).unwrap();
    drop(memory);
    for (sq, cq) in [
        (2, 2),
        (2, 3),
        (3, 2),
        (5, 1000),
        (1000, 7),
        (256, 256),
        (4097, 333),
        (65536, 65536),
    ] {
        let config = QueueConfig {
            sq_size: RingSize::new(sq).unwrap(),
            cq_size: RingSize::new(cq).unwrap(),
            max_transfer: 4096,
            depth: 65535,
            ..queue(1, 2)
        };
        let mut pair = guest.create_queue_pair(config).unwrap();
        let sqe = ReadWrite::new(1, 5, 0).to_sqe(NvmOpcode::VERIFY, 0, 0);
        let rounds = if sq > 1000 { 2 } else { 20 };
        for round in 0..rounds {
            let mut users: Vec<u64> = (0..u64::from(pair.depth())).collect();
            for user in &users {
                pair.submit(sqe, round << 32 | user).unwrap();
            }
            pair.ring();
            let mut got: Vec<u64> = collect(&mut pair, users.len())
                .iter()
                .map(|c| {
                    assert_eq!(c.status(), Status::SUCCESS);
                    assert_eq!(c.user >> 32, round);
                    c.user & 0xFFFF_FFFF
                })
                .collect();
            got.sort_unstable();
            users.sort_unstable();
            assert_eq!(got, users, "sq {sq} cq {cq}");
        }
        guest.delete_queue_pair(pair).unwrap();
    }
}

#[test]
fn sixty_three_queue_pairs_on_three_pollers() {
    let daemon = TestDaemon::start(
        vec![Plan {
            queues: 64,
            doorbell_stride: 1,
            ..Plan::of(Disk::memory(12, 1024))
        }],
        &pollers(3, IdlePolicy::Adaptive),
    );
    let mut guest = daemon.guest();
    guest.enable_doorbell_buffer(&mut []).unwrap();
    let mut all: Vec<_> = (1..64)
        .map(|qid| {
            let config = QueueConfig {
                max_transfer: 4096,
                ..queue(qid, 32)
            };
            guest.create_queue_pair(config).unwrap()
        })
        .collect();
    let data = guest.device().memory().allocate(64 * 4096).unwrap();
    for round in 0..4u64 {
        for pair in &mut all {
            let qid = u64::from(pair.qid());
            let at = data.addr() + qid * 4096;
            data.write(qid as usize * 4096, &pattern(round * 64 + qid, 4096));
            let sqe = ReadWrite::new(1, qid * 16, 0).to_sqe(NvmOpcode::WRITE, 0, 0);
            pair.submit_data(sqe, at, 4096, qid).unwrap();
            pair.ring();
        }
        for pair in &mut all {
            let done = collect(pair, 1)[0];
            assert_eq!(done.status(), Status::SUCCESS);
            assert_eq!(done.user, u64::from(pair.qid()));
        }
        data.fill(0);
        // Each is read back through another queue.
        for pair in &mut all {
            let qid = u64::from(pair.qid() % 63) + 1;
            let sqe = ReadWrite::new(1, qid * 16, 0).to_sqe(NvmOpcode::READ, 0, 0);
            pair.submit_data(sqe, data.addr() + qid * 4096, 4096, qid)
                .unwrap();
            pair.ring();
        }
        for pair in &mut all {
            assert_eq!(collect(pair, 1)[0].status(), Status::SUCCESS);
        }
        let got = data.bytes(data.len());
        for qid in 1..64 {
            let want = pattern(round * 64 + qid as u64, 4096);
            assert!(got[qid * 4096..(qid + 1) * 4096] == want, "queue {qid}");
        }
    }
    assert!(guest.create_queue_pair(queue(64, 8)).is_err());
}

#[test]
fn many_submission_queues_share_a_completion_queue() {
    let daemon = TestDaemon::start(
        vec![Plan::of(Disk::memory(9, 1024))],
        &pollers(2, IdlePolicy::Adaptive),
    );
    let mut guest = daemon.guest();
    let mut cq = raw::create_cq(&mut guest, 1, 5, Some(1)).unwrap();
    let mut sqs: Vec<_> = (1..=7)
        .map(|qid| raw::create_sq(&mut guest, qid, 1, 8).unwrap())
        .collect();
    // 7 queues of 7 commands on a completion queue with room for 4.
    for sq in &mut sqs {
        for cid in 0..7u16 {
            let sqe = ReadWrite::new(1, 0, 0).to_sqe(NvmOpcode::VERIFY, 0, 0);
            sq.push(sqe.with_cid(sq.qid << 8 | cid));
        }
    }
    for sq in &sqs {
        sq.ring();
    }
    let mut seen = std::collections::HashSet::new();
    for _ in 0..49 {
        let cqe = cq.wait(LIMIT).expect("a completion");
        assert_eq!(cqe.status(), Status::SUCCESS);
        assert_eq!(cqe.cid >> 8, cqe.sqid);
        assert!(seen.insert(cqe.cid), "twice: {:#x}", cqe.cid);
    }
    assert!(cq.wait(Duration::from_millis(20)).is_none());
    // The completion queue goes only when no submission queue uses it.
    let refused = guest.delete_cq(1).unwrap_err();
    assert_eq!(refused.status(), Some(Status::INVALID_QUEUE_DELETION));
    for qid in 1..=7 {
        guest.delete_sq(qid).unwrap();
    }
    guest.delete_cq(1).unwrap();
}

#[test]
fn interrupts_come_once_for_a_batch_and_never_when_disabled() {
    let daemon = TestDaemon::one(Plan::of(Disk::null(9, 1024)));
    let mut guest = daemon.guest();
    let mut pair = guest.create_queue_pair(queue(1, 64)).unwrap();
    let sqe = ReadWrite::new(1, 0, 0).to_sqe(NvmOpcode::VERIFY, 0, 0);
    for _ in 0..50 {
        pair.submit(sqe, 0).unwrap();
    }
    pair.ring();
    let mut signals = 0;
    let mut done = 0;
    while done < 50 {
        signals += pair.wait(LIMIT).unwrap();
        done += pair.poll(64, |_| ());
    }
    assert!(
        (1..50).contains(&signals),
        "{signals} interrupts for a batch of 50"
    );
    // Two vectors crossed: queue 2 interrupts on vector 5.
    let mut crossed = guest
        .create_queue_pair(QueueConfig {
            vector: Some(5),
            ..queue(2, 8)
        })
        .unwrap();
    crossed.submit(sqe, 0).unwrap();
    crossed.ring();
    assert_eq!(crossed.wait(LIMIT).unwrap(), 1);
    // IEN = 0: polled.
    let mut polled = guest
        .create_queue_pair(QueueConfig {
            vector: None,
            ..queue(3, 8)
        })
        .unwrap();
    let vector = guest.device().call(3).unwrap().unwrap();
    polled.submit(sqe, 0).unwrap();
    polled.ring();
    collect(&mut polled, 1);
    let waited = vhost_user_nvme::driver::wait_for(&vector, Duration::from_millis(30));
    assert_eq!(waited.unwrap(), 0, "nobody is interrupted");
}

#[test]
fn doorbells_of_every_stride_reach_their_queue() {
    for stride in [0, 1, 4, 8] {
        let daemon = TestDaemon::one(Plan {
            queues: 4,
            doorbell_stride: stride,
            // Its pages are as large as a memory page, whatever the stride.
            doorbell_buffer: stride < 8,
            ..Plan::of(Disk::null(9, 1024))
        });
        let mut guest = daemon.guest();
        assert_eq!(guest.stride().bytes(), 4 << stride);
        let last = guest.stride().window_offset(Which::Cq(3)) + 4;
        assert!(last <= u64::from(guest.device().window_bytes()));
        for dbbuf in [false, true] {
            if dbbuf && stride < 8 {
                guest.enable_doorbell_buffer(&mut []).unwrap();
            }
            for qid in 1..4 {
                let mut pair = guest.create_queue_pair(queue(qid, 4)).unwrap();
                let sqe = ReadWrite::new(1, 0, 0).to_sqe(NvmOpcode::VERIFY, 0, 0);
                for _ in 0..10 {
                    pair.submit(sqe, 0).unwrap();
                    pair.ring();
                    collect(&mut pair, 1);
                }
                guest.delete_queue_pair(pair).unwrap();
            }
        }
    }
}

#[test]
fn several_controllers_share_a_daemon_and_its_pollers() {
    let plans = (0..4).map(|_| Plan::of(Disk::memory(9, 256))).collect();
    let daemon = TestDaemon::start(plans, &pollers(2, IdlePolicy::Adaptive));
    let mut all: Vec<_> = (0..4)
        .map(|i| {
            let front = guest_tests::FrontEnd::connect(daemon.socket(i)).unwrap();
            let mut guest = bring_up(front);
            let io = Io::new(&mut guest, queue(1, 16), 1);
            (guest, io)
        })
        .collect();
    for (i, (_, io)) in all.iter_mut().enumerate() {
        assert_eq!(io.write(9, &pattern(i as u64, 512)), Status::SUCCESS);
    }
    for (i, (_, io)) in all.iter_mut().enumerate() {
        assert!(io.read(9, 1).unwrap() == pattern(i as u64, 512));
    }
    let serials: std::collections::HashSet<_> =
        all.iter().map(|(guest, _)| guest.identify().sn).collect();
    assert_eq!(serials.len(), 4);
}

#[test]
fn admin_queues_may_be_small() {
    let daemon = TestDaemon::one(Plan::of(Disk::null(9, 64)));
    let options = Options {
        admin_entries: 2,
        ..Options::default()
    };
    let mut guest = Driver::bring_up(daemon.connect(), options).unwrap();
    for _ in 0..10 {
        guest.identify_controller().unwrap();
    }
}
