//! A daemon that is started again as another one: with other namespaces, without its state, for another guest.

use std::time::{Duration, Instant};

use guest_tests::FrontEnd;
use guest_tests::daemon::{bring_up, queue};
use guest_tests::frontend::Setup;
use guest_tests::io::Io;
use guest_tests::program::{Program, Surviving};
use guest_tests::raw::Guest;
use nvme_spec::Status;
use nvme_spec::regs::{Cc, offset};

const MEMORY: &str = "memory,size=8M,block-size=4096";
const QUIET: [&str; 2] = ["--log-level", "error"];

/// Arguments for these namespaces.
fn with<'a>(namespaces: &[&'a str]) -> Vec<&'a str> {
    let mut out = Vec::from(QUIET);
    for ns in namespaces {
        out.extend(["--namespace", ns]);
    }
    out
}

fn file(daemon: &Surviving, name: &str) {
    let made = std::fs::File::create(daemon.dir().join(name)).expect("a file");
    made.set_len(8 << 20).expect("a sparse file");
}

/// The daemon goes, and comes as it is configured now.
fn again(daemon: &mut Surviving, front: &FrontEnd) {
    daemon.kill();
    comes(daemon, front);
}

fn comes(daemon: &mut Surviving, front: &FrontEnd) {
    let before = front.session().connections();
    daemon.start();
    let start = Instant::now();
    while front.session().connections() == before {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{}",
            daemon.log()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A guest that has written a block to namespace 1, with a queue pair.
fn a_guest(daemon: &Surviving) -> (FrontEnd, Guest, Io) {
    let front = daemon.connect(&Setup::default());
    let mut guest = bring_up(front.clone());
    let mut io = Io::new(&mut guest, queue(1, 16), 1);
    assert_eq!(io.write(7, &[0xA7; 4096]), Status::SUCCESS);
    (front, guest, io)
}

fn resumes(daemon: &Surviving, guest: &mut Guest, io: &mut Io) {
    let csts = guest.csts().expect("a register");
    assert!(csts.rdy() && !csts.cfs(), "{csts:?}; {}", daemon.log());
    assert_eq!(io.read(7, 1).expect("a block"), [0xA7; 4096]);
    assert_eq!(io.write(8, &[0xA8; 4096]), Status::SUCCESS);
    assert_eq!(io.read(8, 1).expect("a block"), [0xA8; 4096]);
}

/// It is told that the controller failed, resets it, and goes on.
fn fails_and_is_reset(daemon: &Surviving, guest: Guest, io: Io) -> Guest {
    let mut guest = guest;
    let csts = guest.csts().expect("a register");
    assert!(csts.cfs(), "{csts:?}; {}", daemon.log());
    drop(io);
    let front = guest.reset().expect("a reset");
    let mut cc = [0xFF; 4];
    front.read(offset::CC, &mut cc).expect("a register");
    assert!(!Cc::from_bits(u32::from_le_bytes(cc)).en());
    let mut guest = bring_up(front);
    assert!(!guest.csts().expect("a register").cfs());
    guest
}

#[test]
fn the_same_goes_on() {
    let mut daemon = Program::surviving(&with(&[MEMORY]));
    let (front, mut guest, mut io) = a_guest(&daemon);
    for _ in 0..3 {
        again(&mut daemon, &front);
        resumes(&daemon, &mut guest, &mut io);
    }
    // Also after an orderly end.
    daemon.stop();
    comes(&mut daemon, &front);
    assert_eq!(io.read(8, 1).expect("a block"), [0xA8; 4096]);
    // And when only the connection ends.
    front.session().cut();
    resumes(&daemon, &mut guest, &mut io);
}

/// Start it, and wait until it has found what was left.
fn finds(daemon: &mut Surviving) {
    let found = |daemon: &Surviving| {
        let log = std::fs::read_to_string(daemon.dir().join("log")).expect("a log");
        log.matches("found state to go on from").count()
    };
    let before = found(daemon);
    daemon.start();
    let start = Instant::now();
    while found(daemon) == before {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{}",
            daemon.log()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Two restarts in a row, the second before the front-end has noticed the first.
#[test]
fn an_orderly_end_before_the_front_end_is_back() {
    let mut daemon = Program::surviving(&["--namespace", MEMORY]);
    let (front, mut guest, mut io) = a_guest(&daemon);
    front.session().stay_away(true);
    daemon.kill();
    for _ in 0..2 {
        finds(&mut daemon);
        daemon.stop();
    }
    front.session().stay_away(false);
    comes(&mut daemon, &front);
    resumes(&daemon, &mut guest, &mut io);
    // The connection was lost a moment before.
    front.session().stay_away(true);
    front.session().cut();
    daemon.stop();
    front.session().stay_away(false);
    comes(&mut daemon, &front);
    resumes(&daemon, &mut guest, &mut io);
}

/// A guest that has shut its disk down, and whose machine has ended, is not waited for.
#[test]
fn an_orderly_end_after_the_guest_has_gone() {
    let mut daemon = Program::surviving(&["--namespace", MEMORY]);
    let (front, mut guest, io) = a_guest(&daemon);
    drop(io);
    guest.shut_down(false).expect("a shutdown");
    drop((guest, front));
    let start = Instant::now();
    while !daemon.log().contains("front-end disconnected") {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{}",
            daemon.log()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    daemon.stop();
    let state = std::fs::read_dir(daemon.dir().join("state")).expect("a directory");
    let left: Vec<_> = state.flatten().filter(|e| e.path().is_dir()).collect();
    assert!(left.is_empty(), "{left:?}; {}", daemon.log());
}

#[test]
fn a_namespace_that_is_gone() {
    let mut daemon = Program::surviving(&with(&[MEMORY, MEMORY]));
    let (front, guest, io) = a_guest(&daemon);
    daemon.configure(&with(&[MEMORY]));
    again(&mut daemon, &front);
    let mut guest = fails_and_is_reset(&daemon, guest, io);
    assert_eq!(guest.namespaces().expect("a list"), [1]);
    let mut io = Io::new(&mut guest, queue(1, 16), 1);
    assert_eq!(
        io.read(7, 1).expect("a block"),
        [0xA7; 4096],
        "data of what is still there"
    );
    again(&mut daemon, &front);
    resumes(&daemon, &mut guest, &mut io);
}

#[test]
fn a_namespace_that_is_smaller() {
    let mut daemon = Program::surviving(&with(&[MEMORY]));
    let (front, guest, io) = a_guest(&daemon);
    daemon.configure(&with(&["memory,size=4M,block-size=4096"]));
    again(&mut daemon, &front);
    let mut guest = fails_and_is_reset(&daemon, guest, io);
    assert_eq!(guest.identify_namespace(1).expect("a namespace").nsze, 1024);
    let mut io = Io::new(&mut guest, queue(1, 16), 1);
    assert_eq!(io.write(1023, &[1; 4096]), Status::SUCCESS);
    assert_eq!(io.write(1024, &[1; 4096]), Status::LBA_OUT_OF_RANGE);
}

#[test]
fn another_backend() {
    let mut daemon = Program::surviving(&with(&[MEMORY]));
    let (front, guest, io) = a_guest(&daemon);
    file(&daemon, "a");
    daemon.configure(&with(&["file,path={dir}/a,block-size=4096"]));
    again(&mut daemon, &front);
    let mut guest = fails_and_is_reset(&daemon, guest, io);
    let mut io = Io::new(&mut guest, queue(1, 16), 1);
    assert_eq!(io.read(7, 1).expect("a block"), [0; 4096], "another disk");
    assert_eq!(io.write(7, &[0xA7; 4096]), Status::SUCCESS);
    // Another file of the same size is another disk as well.
    again(&mut daemon, &front);
    resumes(&daemon, &mut guest, &mut io);
    file(&daemon, "b");
    daemon.configure(&with(&["file,path={dir}/b,block-size=4096"]));
    again(&mut daemon, &front);
    fails_and_is_reset(&daemon, guest, io);
}

#[test]
fn state_that_is_lost() {
    let mut daemon = Program::surviving(&with(&[MEMORY]));
    let (front, guest, io) = a_guest(&daemon);
    daemon.kill();
    std::fs::remove_dir_all(daemon.dir().join("state")).expect("a directory");
    comes(&mut daemon, &front);
    let mut guest = fails_and_is_reset(&daemon, guest, io);
    let mut io = Io::new(&mut guest, queue(1, 16), 1);
    assert_eq!(io.write(7, &[0xA7; 4096]), Status::SUCCESS);
    again(&mut daemon, &front);
    resumes(&daemon, &mut guest, &mut io);
}

#[test]
fn state_that_is_garbage() {
    let mut daemon = Program::surviving(&with(&[MEMORY]));
    let (front, guest, io) = a_guest(&daemon);
    daemon.kill();
    let mut damaged = 0;
    let mut dirs = vec![daemon.dir().join("state")];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).expect("a directory") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.file_name().is_some_and(|n| n == "state") {
                let len = std::fs::metadata(&path).expect("a file").len() as usize;
                std::fs::write(&path, vec![0x5A; len]).expect("a file");
                damaged += 1;
            }
        }
    }
    assert_eq!(damaged, 1);
    comes(&mut daemon, &front);
    let mut guest = fails_and_is_reset(&daemon, guest, io);
    let mut io = Io::new(&mut guest, queue(1, 16), 1);
    assert_eq!(
        io.read(7, 1).expect("a block"),
        [0xA7; 4096],
        "the data is not in that file"
    );
}

#[test]
fn another_guest_finds_a_fresh_controller() {
    let mut daemon = Program::surviving(&with(&[MEMORY]));
    let (_, guest, io) = a_guest(&daemon);
    daemon.kill();
    drop((guest, io));
    daemon.start();
    let setup = Setup {
        instance: *b"another instance",
        ..Setup::default()
    };
    let front = daemon.connect(&setup);
    let (mut cc, mut csts) = ([0xFF; 4], [0xFF; 4]);
    front.read(offset::CC, &mut cc).expect("a register");
    front.read(offset::CSTS, &mut csts).expect("a register");
    assert_eq!((cc, csts), ([0; 4], [0; 4]), "{}", daemon.log());
    let mut guest = bring_up(front.clone());
    let mut io = Io::new(&mut guest, queue(1, 16), 1);
    assert_eq!(
        io.read(7, 1).expect("a block"),
        [0xA7; 4096],
        "the disk is the same"
    );
    again(&mut daemon, &front);
    resumes(&daemon, &mut guest, &mut io);
}

#[test]
fn a_guest_that_was_reset_meanwhile_is_not_gone_on_with() {
    let mut daemon = Program::surviving(&with(&[MEMORY]));
    let (front, guest, io) = a_guest(&daemon);
    daemon.kill();
    // What a front-end does when its machine is reset while nobody is there.
    front.session().is_used(false);
    comes(&mut daemon, &front);
    let mut cc = [0xFF; 4];
    front.read(offset::CC, &mut cc).expect("a register");
    assert_eq!(cc, [0; 4], "{}", daemon.log());
    drop((guest, io));
    let mut guest = bring_up(front);
    let mut io = Io::new(&mut guest, queue(1, 16), 1);
    assert_eq!(io.read(7, 1).expect("a block"), [0xA7; 4096]);
}
