//! Guest memory that comes, goes, and is not what it says.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use guest_tests::FrontEnd;
use guest_tests::daemon::{Disk, Plan, TestDaemon, bring_up, pollers, queue};
use guest_tests::io::{Io, LIMIT, collect};
use guest_tests::raw;
use nvme_spec::Status;
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use vhost_user_nvme::backend::{Delay, Operations, Rule};
use vhost_user_nvme::poller::IdlePolicy;

const HOT: u64 = 0x8_0000_0000;

fn read(slba: u64, blocks: u16) -> nvme_spec::Sqe {
    ReadWrite::new(1, slba, blocks - 1).to_sqe(NvmOpcode::READ, 0, 0)
}

#[test]
fn memory_is_plugged_and_unplugged_while_commands_run() {
    plugged_and_unplugged(Disk::memory(9, 4096));
}

/// Memory that comes and goes under commands for this disk, which has 4096 blocks of 512 bytes.
pub fn plugged_and_unplugged(disk: Disk) {
    let daemon = TestDaemon::start(vec![Plan::of(disk)], &pollers(2, IdlePolicy::Adaptive));
    let mut guest = daemon.guest();
    let front = guest.device().clone();
    let mut steady = Io::new(&mut guest, queue(1, 32), 1);
    let mut plugged = Io::new(&mut guest, queue(2, 32), 1);
    let stop = AtomicBool::new(false);
    let count = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let bytes: Vec<u8> = (0..512 * 16).map(|i| i as u8).collect();
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(steady.write(64, &bytes), Status::SUCCESS);
                assert!(steady.read(64, 16).unwrap() == bytes);
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        for round in 0..30u64 {
            let region = front.add_memory(HOT, 2 << 20).unwrap();
            let data = region.allocate(64 << 10).unwrap();
            for i in 0..8 {
                let at = data.addr() + i * 8192;
                plugged.pair.submit_data(read(0, 16), at, 8192, i).unwrap();
            }
            plugged.pair.ring();
            if round % 2 == 0 {
                for c in collect(&mut plugged.pair, 8) {
                    assert_eq!(c.status(), Status::SUCCESS);
                }
            }
            // Else unplugged with the commands wherever they are.
            front.remove_memory(HOT).unwrap();
            data.fill(0xA5);
            if round % 2 == 1 {
                for c in collect(&mut plugged.pair, 8) {
                    let status = c.status();
                    assert!(
                        [Status::SUCCESS, Status::DATA_TRANSFER_ERROR].contains(&status),
                        "{status}"
                    );
                }
            }
            assert!(
                data.bytes(data.len()).iter().all(|b| *b == 0xA5),
                "written to after it was unplugged"
            );
            let sqe = read(0, 16);
            plugged.pair.submit_data(sqe, HOT, 8192, 0).unwrap();
            plugged.pair.ring();
            let after = collect(&mut plugged.pair, 1)[0].status();
            assert_eq!(after, Status::DATA_TRANSFER_ERROR, "it is not there");
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(count.load(Ordering::Relaxed) > 10);
}

#[test]
fn unplugging_waits_for_commands_that_use_it_and_for_no_others() {
    let (disk, delays) = Disk::memory(9, 4096).with_delays();
    let daemon = TestDaemon::one(Plan::of(disk));
    let mut guest = daemon.guest();
    let front = guest.device().clone();
    let mut slow = Io::new(&mut guest, queue(1, 32), 1);
    let mut other = Io::new(&mut guest, queue(2, 32), 1);
    let slow_blocks = 1000..1100;
    delays.add(
        Rule::always(Operations::READ, Delay(Duration::from_millis(300))).on_blocks(slow_blocks),
    );
    let region = front.add_memory(HOT, 1 << 20).unwrap();
    let data = region.allocate(8192).unwrap();
    // One that is in memory that stays: nobody waits for it.
    slow.pair
        .submit_data(read(1000, 1), slow.data.addr(), 512, 1)
        .unwrap();
    slow.pair.ring();
    std::thread::sleep(Duration::from_millis(10));
    let start = Instant::now();
    front.remove_memory(HOT).unwrap();
    assert!(
        start.elapsed() < Duration::from_millis(250),
        "{:?}",
        start.elapsed()
    );
    assert_eq!(collect(&mut slow.pair, 1)[0].status(), Status::SUCCESS);

    drop((data, region));
    let region = front.add_memory(HOT, 1 << 20).unwrap();
    let data = region.allocate(8192).unwrap();
    slow.pair
        .submit_data(read(1000, 16), data.addr(), 8192, 2)
        .unwrap();
    slow.pair.ring();
    std::thread::sleep(Duration::from_millis(10));
    let unplug = std::thread::spawn({
        let front = front.clone();
        move || front.remove_memory(HOT).map(|_| Instant::now())
    });
    let mut quick = 0;
    while !unplug.is_finished() {
        assert!(other.read(0, 1).is_ok());
        quick += 1;
    }
    unplug.join().unwrap().unwrap();
    assert!(quick > 0);
    // Whatever became of the command, it is over for that memory.
    data.fill(0xA5);
    let status = collect(&mut slow.pair, 1)[0].status();
    assert!(
        [
            Status::SUCCESS,
            Status::DATA_TRANSFER_ERROR,
            Status::ABORT_REQUESTED
        ]
        .contains(&status),
        "{status}"
    );
    std::thread::sleep(Duration::from_millis(350));
    assert!(data.bytes(8192).iter().all(|b| *b == 0xA5));
}

#[test]
fn a_queue_whose_memory_goes_stops_alone() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 64)));
    let mut guest = daemon.guest();
    let front = guest.device().clone();
    let mut healthy = Io::new(&mut guest, queue(1, 16), 1);
    // A queue in the plugged region: the others are taken first, so take all of theirs.
    let region = front.add_memory(HOT, 1 << 20).unwrap();
    let held: Vec<_> = front
        .memory()
        .regions()
        .iter()
        .filter(|r| r.gpa != HOT)
        .flat_map(|r| std::iter::from_fn(|| r.allocate(4096).ok()).collect::<Vec<_>>())
        .collect();
    let (mut sq, mut cq) = raw::create_pair(&mut guest, 2, 8).unwrap();
    assert!(sq.memory.addr() >= HOT && cq.memory.addr() >= HOT);
    drop(held);
    let verify = ReadWrite::new(1, 0, 0).to_sqe(NvmOpcode::VERIFY, 0, 0);
    sq.submit(&[verify]);
    assert!(cq.wait(LIMIT).is_some());
    front.remove_memory(HOT).unwrap();
    sq.submit(&[verify]);
    assert!(cq.wait(Duration::from_millis(50)).is_none());
    assert_eq!(healthy.write(1, &[3; 512]), Status::SUCCESS);
    guest.delete_sq(2).unwrap();
    guest.delete_cq(2).unwrap();
    drop(region);
    let mut again = Io::new(&mut guest, queue(2, 16), 1);
    assert_eq!(again.read(1, 1).unwrap(), [3; 512]);
}

#[test]
fn the_whole_table_may_be_set_at_once() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 64)));
    let mut guest = daemon.guest();
    let front = guest.device().clone();
    let mut io = Io::new(&mut guest, queue(1, 16), 1);
    for round in 0..20u8 {
        front.set_memory_table().unwrap();
        assert_eq!(io.write(1, &[round; 512]), Status::SUCCESS);
        assert_eq!(io.read(1, 1).unwrap(), [round; 512]);
    }
}

#[test]
fn a_region_that_is_cut_ends_its_own_connection_only() {
    let plans = (0..2).map(|_| Plan::of(Disk::memory(9, 4096))).collect();
    let daemon = TestDaemon::start(plans, &pollers(1, IdlePolicy::Adaptive));
    let mut healthy = bring_up(FrontEnd::connect(daemon.socket(0)).unwrap());
    let mut io = Io::new(&mut healthy, queue(1, 16), 1);
    for round in 0..3u8 {
        let hostile = FrontEnd::connect(daemon.socket(1)).unwrap();
        let mut guest = bring_up(hostile.clone());
        let mut bad = Io::new(&mut guest, queue(1, 16), 1);
        assert_eq!(bad.write(0, &[round; 512]), Status::SUCCESS);
        let region = hostile.add_memory(HOT, 1 << 20).unwrap();
        let data = region.allocate(64 << 10).unwrap();
        // Cut it, then have it read and written: a fault in the daemon.
        region.file.set_len(0).unwrap();
        for opcode in [NvmOpcode::READ, NvmOpcode::WRITE] {
            let sqe = ReadWrite::new(1, 0, 127).to_sqe(opcode, 0, 0);
            bad.pair.submit_data(sqe, data.addr(), 64 << 10, 0).unwrap();
        }
        bad.pair.ring();
        let start = Instant::now();
        let mut statuses = Vec::new();
        // Its commands fail, or the connection ends; nothing else.
        while statuses.len() < 2 && start.elapsed() < Duration::from_millis(500) {
            bad.pair.poll(2, |c| statuses.push(c.status()));
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(io.write(9, &[round; 512]), Status::SUCCESS);
        assert_eq!(io.read(9, 1).unwrap(), [round; 512]);
        // The pieces of memory that are gone are not to be touched any more.
        std::mem::forget(data);
        drop((bad, guest, hostile));
    }
    let mut again = bring_up(FrontEnd::connect(daemon.socket(1)).unwrap());
    let mut after = Io::new(&mut again, queue(1, 16), 1);
    assert_eq!(after.write(0, &[9; 512]), Status::SUCCESS);
}

#[test]
fn nothing_is_written_to_old_pages_after_a_reset() {
    for shadow in [false, true] {
        let (disk, delays) = Disk::memory(9, 4096).with_delays();
        let daemon = TestDaemon::one(Plan::of(disk));
        let mut guest = daemon.guest();
        if shadow {
            guest.enable_doorbell_buffer(&mut []).unwrap();
        }
        let mut io = Io::new(&mut guest, queue(1, 32), 1);
        let mut idle = Io::new(&mut guest, queue(2, 32), 1);
        assert_eq!(idle.write(0, &[1; 512]), Status::SUCCESS);
        delays.add(
            Rule::always(Operations::READ, Delay(Duration::from_millis(60))).on_blocks(2000..2100),
        );
        for slba in 2000..2010 {
            let at = io.data.addr() + (slba - 2000) * 4096;
            io.pair.submit_data(read(slba, 8), at, 4096, slba).unwrap();
        }
        io.pair.ring();
        let front = guest.device().clone();
        let first = Arc::clone(&front.memory().regions()[0]);
        assert!(idle.pair.out() == 0 && first.gpa == 0);
        // All that is in use lies in one of the first two regions; from the reset on all of both is ours.
        let front = guest.reset().unwrap();
        drop((io, idle));
        let regions = front.memory().regions();
        let held: Vec<_> = regions
            .iter()
            .flat_map(|r| std::iter::from_fn(|| r.allocate(4096).ok()).collect::<Vec<_>>())
            .collect();
        let total: u64 = regions.iter().map(|r| r.len).sum();
        assert_eq!(held.len() as u64 * 4096, total, "every page");
        held.iter().for_each(|page| page.fill(0xA5));
        // A new life in other memory.
        front.add_memory(HOT, 16 << 20).unwrap();
        let mut guest = bring_up(front);
        let mut io = Io::new(&mut guest, queue(1, 32), 1);
        for _ in 0..50 {
            assert_eq!(io.write(5, &[5; 512]), Status::SUCCESS);
        }
        std::thread::sleep(Duration::from_millis(80));
        for page in &held {
            assert!(
                page.bytes(4096).iter().all(|b| *b == 0xA5),
                "page {:#x}",
                page.addr()
            );
        }
    }
}

#[test]
fn memory_that_cannot_be_is_refused_and_the_next_front_end_is_served() {
    let plans = (0..2).map(|_| Plan::of(Disk::memory(9, 64))).collect();
    let daemon = TestDaemon::start(plans, &pollers(1, IdlePolicy::Adaptive));
    let mut healthy = bring_up(FrontEnd::connect(daemon.socket(0)).unwrap());
    let mut io = Io::new(&mut healthy, queue(1, 16), 1);
    let file = vhost_user_nvme::driver::dma::shared_memory("cut", 1 << 20).unwrap();
    for (what, gpa, len, offset) in [
        ("overlaps", 0x1000, 0x1000, 0),
        ("overlaps the end of one", 0x1_0000_0000 - 0x1000, 0x2000, 0),
        ("longer than its file", HOT, 2 << 20, 0),
        ("begins behind its file", HOT, 0x1000, 4 << 20),
        ("wraps around", u64::MAX - 0xFFF, 0x2000, 0),
        ("offset wraps around", HOT, 0x1000, u64::MAX - 0xFFF),
        ("huge", HOT, 1 << 62, 0),
    ] {
        let front = FrontEnd::connect(daemon.socket(1)).unwrap();
        let added = front.map_file(gpa, len, offset, &file);
        assert!(added.is_err(), "{what}");
        assert_eq!(io.write(1, &[1; 512]), Status::SUCCESS, "{what}");
    }
    // Taking away what is not there.
    let front = FrontEnd::connect(daemon.socket(1)).unwrap();
    let len = front.memory().regions()[0].len;
    assert!(front.unmap(HOT, len).is_err());
    drop(front);
    let mut next = bring_up(FrontEnd::connect(daemon.socket(1)).unwrap());
    let mut after = Io::new(&mut next, queue(1, 16), 1);
    assert_eq!(after.write(1, &[1; 512]), Status::SUCCESS);
}
