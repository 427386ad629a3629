//! The message stream: what clients have been seen to send, and what only a hostile one would.

use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use guest_tests::FrontEnd;
use guest_tests::daemon::{Disk, Plan, TestDaemon, bring_up, pollers, queue};
use guest_tests::io::Io;
use guest_tests::rng::Rng;
use guest_tests::vfio::{self, Client, ClientError};
use nvme_spec::Status;
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use vhost_user_nvme::backend::{Delay, Operations, Rule};
use vhost_user_nvme::poller::IdlePolicy;

fn daemon() -> TestDaemon {
    TestDaemon::one(Plan::of(Disk::memory(9, 4096)))
}

fn raw(daemon: &TestDaemon) -> Client {
    Client::new(UnixStream::connect(daemon.socket(0)).unwrap())
}

fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>) -> i32 {
    match result {
        Err(ClientError::Refused(e)) => e.raw_os_error().unwrap(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn versions() {
    let daemon = daemon();
    let client = raw(&daemon);
    let info = vfio::words(&[16, 0, 0, 0]);
    refused(client.request(vfio::GET_INFO, &info, &[]));
    refused(client.request(vfio::VERSION, &[], &[]));
    refused(client.request(vfio::VERSION, &[1, 0, 0, 0], &[]));
    // Without capabilities; of a later minor version; with capabilities that are none.
    for body in [
        &[0, 0, 0, 0][..],
        &[0, 0, 9, 0],
        b"\0\0\0\0{nonsense",
        &[0; 3000],
    ] {
        let reply = client.request(vfio::VERSION, body, &[]).unwrap();
        assert_eq!(reply.word(0), 0);
        assert_eq!(reply.body.last(), Some(&0));
        let text = std::str::from_utf8(&reply.body[4..reply.body.len() - 1]).unwrap();
        assert!(
            text.starts_with("{\"capabilities\":{\"max_msg_fds\":16,"),
            "{text}"
        );
    }
    client.request(vfio::GET_INFO, &info, &[]).unwrap();
}

#[test]
fn answers_fit_what_was_asked() {
    let daemon = daemon();
    let client = raw(&daemon);
    client.version().unwrap();
    // In a message that is much too large, and in one that says so.
    let mut body = vfio::words(&[16, 0, 0, 0]);
    body.resize(4000, 0);
    assert_eq!(
        client
            .request(vfio::GET_INFO, &body, &[])
            .unwrap()
            .body
            .len(),
        16
    );
    refused(client.request(vfio::GET_INFO, &vfio::words(&[15, 0, 0, 0]), &[]));
    let mut body = vfio::words(&[4064, 0, 0, 0, 0, 0, 0, 0]);
    body.resize(4064, 0);
    let info = client.request(vfio::GET_REGION_INFO, &body, &[]).unwrap();
    assert_eq!(
        (info.body.len(), info.files.len(), info.word(0)),
        (64, 1, 64)
    );
    assert_eq!((info.long(16), info.word(4)), (0x4000, 0xF));
    // A sparse area from 0x1000 on that covers a page, and where that is in the file.
    assert_eq!(
        (info.word(12), info.word(32), info.word(40)),
        (32, 1 | 1 << 16, 1)
    );
    assert_eq!(
        (info.long(48), info.long(56), info.long(24)),
        (0x1000, 0x1000, 0)
    );
    let short = client
        .request(vfio::GET_REGION_INFO, &body_of(32, 0), &[])
        .unwrap();
    assert_eq!(
        (short.body.len(), short.files.len(), short.word(0)),
        (32, 0, 64)
    );
    for index in 1..9 {
        let info = client
            .request(vfio::GET_REGION_INFO, &body_of(4064, index), &[])
            .unwrap();
        assert_eq!(
            (info.body.len(), info.files.len(), info.word(0)),
            (32, 0, 32)
        );
        let expected = if index == 7 { (0x1000, 3) } else { (0, 0) };
        assert_eq!((info.long(16), info.word(4)), expected, "{index}");
    }
    refused(client.request(vfio::GET_REGION_INFO, &body_of(64, 9), &[]));
    refused(client.request(vfio::GET_REGION_INFO, &body_of(31, 0), &[]));
    for (index, count) in [(0, 1), (1, 0), (2, 8), (3, 0), (4, 0)] {
        let asked = vfio::words(&[16, 0, index, 0]);
        let info = client.request(vfio::GET_IRQ_INFO, &asked, &[]).unwrap();
        assert_eq!(
            (info.body.len(), info.word(8), info.word(12)),
            (16, index, count)
        );
    }
    refused(client.request(vfio::GET_IRQ_INFO, &vfio::words(&[16, 0, 5, 0]), &[]));
    for unknown in [0, 6, 11, 12, 14, 15, 16, 17, 999, u16::MAX] {
        refused(client.request(unknown, &[0; 100], &[]));
    }
}

fn body_of(argsz: u32, index: u32) -> Vec<u8> {
    vfio::words(&[argsz, 0, index, 0, 0, 0, 0, 0])
}

#[test]
fn memory_goes_and_comes_back_while_commands_are_out() {
    let (disk, delays) = Disk::memory(9, 4096).with_delays();
    delays.add(Rule::always(
        Operations::READ,
        Delay(Duration::from_millis(2)),
    ));
    let daemon = TestDaemon::start(vec![Plan::of(disk)], &pollers(1, IdlePolicy::Adaptive));
    let mut guest = daemon.guest();
    let front = guest.device().clone();
    let mut io = Io::new(&mut guest, queue(1, 64), 1);
    let mut rng = Rng::new(5);
    let regions = front.memory().regions();
    for round in 0..60u64 {
        for i in 0..16 {
            let sqe = ReadWrite::new(1, i, 7).to_sqe(NvmOpcode::READ, 0, 0);
            let at = io.data.addr() + i * 4096;
            io.pair.submit_data(sqe, at, 4096, i).unwrap();
        }
        io.pair.ring();
        // As QEMU does while firmware changes the legacy area: all of one region goes, and comes back in other pieces, some of which
        // cannot be reached (no queue and no buffer is in them).
        let mut requests = Vec::new();
        for r in &regions {
            requests.push((vfio::DMA_UNMAP, vfio::unmap_body(0, r.gpa, r.len), None));
        }
        for r in &regions {
            let cuts = [
                0,
                4096 * (1 + rng.below(20)),
                r.len / 2,
                r.len - 8192,
                r.len,
            ];
            for (i, cut) in cuts.windows(2).enumerate() {
                let (at, len) = (cut[0], cut[1] - cut[0]);
                let last = i == 3;
                let flags = if last && round % 2 == 0 { 1 } else { 3 };
                let body = vfio::map_body(flags, at, r.gpa + at, len);
                let file = (!(last && round % 3 == 0)).then(|| r.file.as_fd());
                requests.push((vfio::DMA_MAP, body, file));
            }
        }
        let start = Instant::now();
        front.client().burst(&requests).unwrap();
        assert!(
            start.elapsed() < Duration::from_secs(2),
            "{:?}",
            start.elapsed()
        );
        for done in guest_tests::io::collect(&mut io.pair, 16) {
            assert_eq!(done.status(), Status::SUCCESS);
        }
        guest.identify_controller().unwrap();
        assert!(!guest.csts().unwrap().cfs());
        let everything = vfio::unmap_body(0, 0, u64::MAX);
        let unmapped = front.client().request(vfio::DMA_UNMAP, &everything, &[]);
        assert!(unmapped.is_ok());
        for r in &regions {
            front.client().map(r).unwrap();
        }
        // That took the queues away for good, in between: a new life.
        guest = bring_up(guest.reset().unwrap());
        io = Io::new(&mut guest, queue(1, 64), 1);
    }
}

#[test]
fn an_unmap_closes_its_file_and_waits_for_commands_that_are_out() {
    let (disk, delays) = Disk::memory(9, 4096).with_delays();
    let daemon = TestDaemon::start(vec![Plan::of(disk)], &pollers(1, IdlePolicy::Adaptive));
    let mut guest = daemon.guest();
    let front = guest.device().clone();
    let mut io = Io::new(&mut guest, queue(1, 64), 1);
    let hot = front.add_memory(0x8_0000_0000, 1 << 20).unwrap();
    let data = hot.allocate(4096).unwrap();
    delays
        .add(Rule::always(Operations::READ, Delay(Duration::from_millis(80))).on_blocks(100..200));
    data.fill(0);
    let sqe = ReadWrite::new(1, 100, 7).to_sqe(NvmOpcode::READ, 0, 0);
    io.pair.submit_data(sqe, data.addr(), 4096, 0).unwrap();
    io.pair.ring();
    std::thread::sleep(Duration::from_millis(10));
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let body = vfio::unmap_body(0, hot.gpa, hot.len);
    let reply = front
        .client()
        .request(vfio::DMA_UNMAP, &body, &[theirs.as_fd()])
        .unwrap();
    assert_eq!(reply.long(16), hot.len);
    data.fill(0xA5);
    drop(theirs);
    let closed = ours
        .write_all(&[1; 10])
        .and_then(|()| ours.write_all(&[1; 10]));
    assert!(closed.is_err(), "nobody has the other end any more");
    std::thread::sleep(Duration::from_millis(100));
    assert!(data.bytes(4096).iter().all(|b| *b == 0xA5));
    guest_tests::io::collect(&mut io.pair, 1);
    // It is not there any more.
    io.pair.submit_data(sqe, data.addr(), 4096, 0).unwrap();
    io.pair.ring();
    let status = guest_tests::io::collect(&mut io.pair, 1)[0].status();
    assert_eq!(status, Status::DATA_TRANSFER_ERROR);
    assert_eq!(
        refused(front.client().request(vfio::DMA_UNMAP, &body, &[])),
        2
    );
}

#[test]
fn what_was_posted_is_done_when_the_next_message_is_answered() {
    let (disk, delays) = Disk::memory(9, 4096).with_delays();
    let daemon = TestDaemon::start(vec![Plan::of(disk)], &pollers(1, IdlePolicy::Adaptive));
    let mut guest = daemon.guest();
    let front = guest.device().clone();
    let mut io = Io::new(&mut guest, queue(1, 64), 1);
    let hot = front.add_memory(0x8_0000_0000, 1 << 20).unwrap();
    let data = hot.allocate(4096).unwrap();
    delays.add(Rule::always(
        Operations::READ,
        Delay(Duration::from_millis(300)),
    ));
    let sqe = ReadWrite::new(1, 100, 7).to_sqe(NvmOpcode::READ, 0, 0);
    io.pair.submit_data(sqe, data.addr(), 4096, 0).unwrap();
    io.pair.ring();
    std::thread::sleep(Duration::from_millis(20));
    let body = vfio::unmap_body(0, hot.gpa, hot.len);
    front.client().post(vfio::DMA_UNMAP, &body).unwrap();
    // No answer to that, and the answer to this says that the command has let go.
    front.client().read(vfio::BAR0, 0, &mut [0; 4]).unwrap();
    data.fill(0xA5);
    guest_tests::io::collect(&mut io.pair, 1);
    assert!(data.bytes(4096).iter().all(|b| *b == 0xA5));
    assert_eq!(
        refused(front.client().request(vfio::DMA_UNMAP, &body, &[])),
        2
    );
}

#[test]
fn random_messages_do_no_harm_to_others() {
    let plans = (0..2).map(|_| Plan::of(Disk::memory(9, 64))).collect();
    let daemon = TestDaemon::start(plans, &pollers(1, IdlePolicy::Adaptive));
    let mut healthy = bring_up(FrontEnd::connect(daemon.socket(0)).unwrap());
    let mut io = Io::new(&mut healthy, queue(1, 16), 1);
    let mut rng = Rng::new(23);
    for round in 0..150u64 {
        let client = Client::new(UnixStream::connect(daemon.socket(1)).unwrap());
        if round % 4 != 0 {
            client.version().unwrap();
        }
        let memory = vhost_user_nvme::driver::dma::shared_memory("fuzz", 1 << 20).unwrap();
        for _ in 0..rng.below(40) {
            let mut body = vec![0; rng.below(80) as usize];
            rng.fill(&mut body);
            // Mostly small numbers: those get far.
            for word in body.chunks_exact_mut(4) {
                let small = [rng.below(4), rng.below(64), rng.below(0x5000), rng.any()];
                let value = small[rng.below(4) as usize] as u32;
                word.copy_from_slice(&value.to_ne_bytes());
            }
            let files = [memory.as_fd(); 3];
            let some = files.get(..rng.below(4) as usize).filter(|_| rng.one_in(3));
            let command = rng.below(17) as u16;
            match client.request(command, &body, some.unwrap_or(&[])) {
                Ok(_) | Err(ClientError::Refused(_)) => {}
                Err(e) => panic!("{command}: {e}"),
            }
        }
        if round % 5 == 0 {
            let mut bytes = vec![0; rng.below(200) as usize];
            rng.fill(&mut bytes);
            let _ = client.send_bytes(&bytes);
        }
        drop(client);
        assert!(io.read(0, 1).is_ok());
    }
    let mut guest = bring_up(FrontEnd::connect(daemon.socket(1)).unwrap());
    let mut last = Io::new(&mut guest, queue(1, 16), 1);
    assert_eq!(last.write(0, &[1; 512]), Status::SUCCESS);
}

#[test]
fn a_client_that_does_not_read_or_stops_in_the_middle_keeps_nobody() {
    let daemon = daemon();
    for half in [false, true] {
        let client = raw(&daemon);
        client.version().unwrap();
        let mut message = Vec::from([0u8, 0, 9, 0]);
        message.extend(vfio::words(&[32, 0, 0]));
        message.extend(vfio::access_body(vfio::BAR0, 0, 0x4000, &[]));
        if half {
            client.send_bytes(&message[..20]).unwrap();
        } else {
            // Answers that nobody takes, until the socket is full.
            for _ in 0..64 {
                client.send_bytes(&message).unwrap();
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut guest = daemon.guest();
    let mut io = Io::new(&mut guest, queue(1, 16), 1);
    assert_eq!(io.write(0, &[1; 512]), Status::SUCCESS);
}
