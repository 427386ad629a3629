//! The real binary: what it costs when idle, and how it ends.

use std::time::{Duration, Instant};

use guest_tests::daemon::{bring_up, queue};
use guest_tests::io::Io;
use guest_tests::program::Program;
use nvme_spec::Status;
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use vhost_user_nvme::transport::Transport;

const OWN_MEMORY: u64 = 64 << 20;

#[test]
fn idle_costs_nothing() {
    for (idle, shadow) in [
        ("adaptive", false),
        ("adaptive", true),
        ("interrupt", false),
        ("interrupt", true),
    ] {
        let program = Program::start(&["--idle", idle, "--namespace", "memory,size=64M"]);
        let mut guest = bring_up(program.connect());
        if shadow {
            guest.enable_doorbell_buffer(&mut []).unwrap();
        }
        guest.arm_events(2).unwrap();
        let mut all: Vec<_> = (1..16)
            .map(|qid| Io::new(&mut guest, queue(qid, 16), 1))
            .collect();
        // Busy first: the doorbells may be mapped by it.
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(100) {
            for io in &mut all {
                assert_eq!(io.write(0, &[1; 4096]), Status::SUCCESS);
            }
        }
        std::thread::sleep(Duration::from_millis(150));
        let (before, start) = (program.cpu(), Instant::now());
        std::thread::sleep(Duration::from_millis(1000));
        let used = program.cpu() - before;
        let elapsed = start.elapsed();
        // Doorbells that are mapped for good have to be looked at, a thousand times a second.
        let share = match guest_tests::transport() {
            Transport::VhostUser => 100,
            Transport::VfioUser => 20,
        };
        assert!(
            used < elapsed / share,
            "idle {idle}, shadow doorbells {shadow}: {used:?} of {elapsed:?}"
        );
        assert!(
            program.own_memory() < OWN_MEMORY,
            "{} bytes",
            program.own_memory()
        );
        // And it wakes up.
        for io in &mut all {
            assert!(io.read(0, 1).unwrap().iter().all(|b| *b == 1));
        }
    }
}

#[test]
fn sigterm_ends_it_with_commands_out() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::File::create(&path)
        .unwrap()
        .set_len(16 << 20)
        .unwrap();
    let namespace = format!("file,path={},block-size=512", path.display());
    for round in 0..4u8 {
        let mut program = Program::start(&["--namespace", &namespace]);
        let mut guest = bring_up(program.connect());
        let mut io = Io::new(&mut guest, queue(1, 64), 1);
        if round > 0 {
            assert_eq!(
                io.read(9, 1).unwrap(),
                [round; 512],
                "what was flushed stays"
            );
        }
        assert_eq!(io.write(9, &[round + 1; 512]), Status::SUCCESS);
        assert_eq!(io.flush(), Status::SUCCESS);
        for i in 0..60u64 {
            let sqe = ReadWrite::new(1, 1000 + i * 16, 15).to_sqe(NvmOpcode::WRITE, 0, 0);
            let at = io.data.addr() + i * 8192;
            io.pair.submit_data(sqe, at, 8192, i).unwrap();
        }
        io.pair.ring();
        program.terminate();
        let status = program.wait(Duration::from_secs(10)).expect("it ends");
        assert!(status.success(), "{status}");
        assert!(!program.socket().exists(), "its socket is gone");
        // The guest sees a connection that has ended.
        assert!(guest.csts().is_err());
    }
}

#[test]
fn sigterm_ends_it_without_a_front_end_and_with_a_silent_one() {
    let mut program = Program::start(&["--namespace", "null,size=1G"]);
    program.terminate();
    assert!(
        program
            .wait(Duration::from_secs(10))
            .expect("it ends")
            .success()
    );
    let mut program = Program::start(&["--namespace", "null,size=1G"]);
    let stream = loop {
        match std::os::unix::net::UnixStream::connect(program.socket()) {
            Ok(stream) => break stream,
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    std::thread::sleep(Duration::from_millis(20));
    program.terminate();
    assert!(
        program
            .wait(Duration::from_secs(10))
            .expect("it ends")
            .success()
    );
    drop(stream);
}
