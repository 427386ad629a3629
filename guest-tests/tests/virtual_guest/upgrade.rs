//! A daemon that hands over to another process while guests work; what goes wrong then; what the service manager hears.

use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use guest_tests::daemon::{bring_up, queue};
use guest_tests::io::Io;
use guest_tests::service::Service;
use nvme_spec::Status;
use nvme_spec::opcode::NvmOpcode;
use rustix::process::Signal;
use vhost_user_nvme::state::LAYOUT;

use crate::integrity;

/// Two disks for a guest, and a controller that nobody uses.
const CONFIG: &str = r#"
[daemon]
pollers = 2
[[controller]]
transport = "TRANSPORT"
socket-path = "DIR/0.sock"
[[controller.namespace]]
backend = "memory"
size = "16M"
huge-pages = "never"
[[controller.namespace]]
backend = "file"
path = "DISK"
block-size = 512
[[controller]]
transport = "TRANSPORT"
socket-path = "DIR/1.sock"
[[controller.namespace]]
backend = "null"
size = "1G"
"#;

const BLOCKS: u64 = 1024;

/// Tests of this file measure times, and each has processes of its own: one after the other.
static ALONE: Mutex<()> = Mutex::new(());

fn service(variables: &[(&str, &str)]) -> Service {
    Service::start(CONFIG, variables)
}

/// Do something while a guest writes and reads two disks, each completion checked to come once, and a third queue is watched for the
/// longest time that a read took, in nanoseconds, since that was last set to 0.
fn under_load(service: &Service, act: impl FnOnce(&AtomicU64)) {
    let mut guest = bring_up(service.connect());
    let done = AtomicBool::new(false);
    let longest = AtomicU64::new(0);
    let mut ios: Vec<_> = [(1, 1), (2, 2), (3, 1)]
        .into_iter()
        .map(|(qid, nsid)| Io::new(&mut guest, queue(qid, 64), nsid))
        .collect();
    let mut probe = ios.pop().unwrap();
    std::thread::scope(|scope| {
        for (i, io) in ios.iter_mut().enumerate() {
            let done = &done;
            scope.spawn(move || {
                let mut seed = i as u64;
                while !done.load(Ordering::Acquire) {
                    seed += 2;
                    // It takes for granted that there is nothing yet.
                    let zeroed = io.blocks(NvmOpcode::WRITE_ZEROES, BLOCKS, BLOCKS as u32);
                    assert_eq!(zeroed, Status::SUCCESS);
                    integrity::work(io, BLOCKS, BLOCKS, seed, Duration::from_millis(500));
                }
            });
        }
        let (done, longest) = (&done, &longest);
        scope.spawn(move || {
            while !done.load(Ordering::Acquire) {
                let start = Instant::now();
                assert!(probe.read(0, 1).is_ok());
                let took = start.elapsed().as_nanos() as u64;
                longest.fetch_max(took, Ordering::AcqRel);
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        // Whoever fails here must not leave the others working.
        let acted = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| act(longest)));
        done.store(true, Ordering::Release);
        if let Err(panic) = acted {
            std::panic::resume_unwind(panic);
        }
    });
    // The admin queue has come along.
    assert_eq!(guest.namespaces().unwrap(), [1, 2]);
    guest.shut_down(false).unwrap();
}

#[test]
fn guests_do_not_notice_upgrades() {
    let _alone = ALONE.lock();
    let count = std::env::var("UPGRADES").map_or(20, |n| n.parse().unwrap());
    let mut service = service(&[]);
    let stop = AtomicBool::new(false);
    let mut gaps = Vec::new();
    std::thread::scope(|scope| {
        let (idle, stop) = (service.socket(1), &stop);
        // Nobody who connects is ever turned away.
        scope.spawn(move || {
            while !stop.load(Ordering::Acquire) {
                UnixStream::connect(&idle).expect("a socket that is always listened on");
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let acted = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            under_load(&service, |longest| {
                for _ in 0..count {
                    let before = service.pid().unwrap();
                    longest.store(0, Ordering::Release);
                    let said = service.upgrade().unwrap();
                    let after = service.pid().unwrap();
                    assert_ne!(before, after);
                    assert!(said.contains(&format!("to process {after}")), "{said}");
                    std::thread::sleep(Duration::from_millis(60));
                    gaps.push(longest.load(Ordering::Acquire) / 1000);
                }
            });
        }));
        stop.store(true, Ordering::Release);
        if let Err(panic) = acted {
            std::panic::resume_unwind(panic);
        }
    });
    gaps.sort_unstable();
    println!(
        "{count} upgrades: longest read in each: p50 {} us, max {} us",
        gaps[gaps.len() / 2],
        gaps[gaps.len() - 1]
    );
    assert_eq!(service.first_status(), Some(0));
    let log = service.log();
    assert!(!log.contains("ERROR"), "{log}");
    service.stop();
    for left in ["0.sock", "1.sock", "state/daemon.pid"] {
        assert!(!service.dir().join(left).exists(), "{left} is left");
    }
}

/// A frame of the hand-over, for `printf` of the shell.
fn frame(json: &str) -> String {
    let octal = |n: usize| -> String {
        let bytes = u32::try_from(n).unwrap().to_le_bytes();
        bytes.iter().map(|b| format!("\\{b:03o}")).collect()
    };
    let json_text = json.replace('"', "\\042");
    format!("printf '{}{}{json_text}' >&0", octal(json.len()), octal(0))
}

#[test]
fn a_program_that_fails_leaves_the_old_one_serving() {
    let _alone = ALONE.lock();
    let service = service(&[]);
    let able = frame(r#"{"able":{"version":"9.9","layouts":[99]}}"#);
    let unable = frame(r#"{"unable":{"why":"no room"}}"#);
    under_load(&service, |_| {
        let pid = service.pid();
        let refused = |why: &str| {
            let said = service.upgrade().unwrap_err();
            assert!(said.contains(why), "{said}\nand not: {why}");
            assert!(said.contains("the old process goes on"), "{said}");
            assert_eq!(service.pid(), pid);
        };
        std::fs::rename(service.program(), service.dir().join("away")).unwrap();
        refused("cannot be started: No such file");
        std::fs::write(service.program(), "no program").unwrap();
        refused("cannot be started: Permission denied");
        service.install(Some("exit 3"));
        refused("it ended with exit status: 3");
        service.install(Some("kill -SEGV $$"));
        refused("it ended with signal: 11");
        service.install(Some("echo what does it want >&0; sleep 1"));
        refused("it said something that is not understood");
        service.install(Some(&format!("{able}; sleep 20")));
        refused(&format!(
            "version 9.9 does not know layout {LAYOUT} of the state"
        ));
        refused("it knows [99]");
        service.install(Some(&format!("{unable}; sleep 20")));
        refused("no room");
        service.install(None);
        service.configure("[daemon]\npollers = 0");
        refused("pollers");
        service.configure("");
        refused("there is no controller");
        service.configure(&CONFIG.replace("DISK", "DIR/no/such/disk"));
        refused("no/such/disk");
        service.configure(CONFIG);
        let said = service.upgrade().unwrap();
        assert!(said.contains("has handed over"), "{said}");
    });
}

#[test]
fn a_program_that_hangs_is_given_up() {
    let _alone = ALONE.lock();
    let service = service(&[]);
    service.install(Some("exec sleep 1000"));
    under_load(&service, |_| {
        let said = service.upgrade().unwrap_err();
        assert!(said.contains("it said nothing for 10s"), "{said}");
    });
}

#[test]
fn a_program_that_fails_with_everything_in_its_hands_is_followed_by_the_old_one() {
    let _alone = ALONE.lock();
    let mut service = service(&[]);
    let able = format!(r#"{{"able":{{"version":"9.9","layouts":[{LAYOUT}]}}}}"#);
    let able = frame(&able);
    under_load(&service, |_| {
        // It reads the offer, and some of what follows.
        let script = format!("head -c 20 <&0 >/dev/null; {able}; sleep 0.3; exit 4");
        for round in 0..3 {
            let before = service.pid();
            service.install(Some(&script));
            let said = service.upgrade().unwrap_err();
            assert!(
                said.contains("the old program goes on as process"),
                "{round}: {said}"
            );
            assert_ne!(service.pid(), before);
            service.install(None);
            service.upgrade().unwrap();
        }
    });
    assert_eq!(service.first_status(), Some(0));
}

#[test]
fn the_configuration_is_read_anew() {
    let _alone = ALONE.lock();
    let mut service = service(&[]);
    let mut other = CONFIG.to_owned();
    let second = other
        .find("[[controller]]\ntransport = \"TRANSPORT\"\nsocket-path = \"DIR/1")
        .unwrap();
    let tail = other.split_off(second).replace("1.sock", "2.sock");
    other.push_str(&tail);
    under_load(&service, |_| {
        service.configure(&other);
        service.upgrade().unwrap();
        assert!(service.socket(2).exists());
        // Once the new process serves, after the command has its answer.
        let end = Instant::now() + Duration::from_secs(20);
        while service.socket(1).exists() {
            assert!(Instant::now() < end, "a socket that nobody serves");
            std::thread::sleep(Duration::from_millis(5));
        }
        UnixStream::connect(service.socket(2)).unwrap();
    });
    service.stop();
    assert!(!service.socket(2).exists());
}

#[test]
fn what_cannot_be_upgraded_says_so() {
    let state = tempfile::tempdir().unwrap();
    let dir = state.path().to_str().unwrap();
    let out = Service::command(&["--state-dir", dir]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1));
    assert!(said.contains("no daemon: "), "{said}");
    let ours = std::process::id().to_string();
    let out = Service::command(&["--pid", &ours]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(said.contains("is no daemon that can be upgraded"), "{said}");
    assert_eq!(out.status.code(), Some(1));
}

#[test]
fn the_command_finds_a_daemon_by_its_process() {
    let _alone = ALONE.lock();
    let service = service(&[]);
    let pid = service.pid().unwrap().to_string();
    let out = Service::command(&["--pid", &pid]);
    assert!(out.status.success(), "{out:?}");
    // And a signal alone does it, too.
    let before = service.pid();
    service.signal(Signal::USR2);
    let start = Instant::now();
    while service.pid() == before {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{}",
            service.log()
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    let out = Service::command(&["--pid", &pid]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success(), "{said}");
}

#[test]
fn the_service_manager_hears_everything() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let heard = UnixDatagram::bind(&path).unwrap();
    heard
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let hear = |prefix: &str| {
        let mut buffer = [0; 512];
        loop {
            let n = heard.recv(&mut buffer).expect("a message");
            let message = String::from_utf8_lossy(&buffer[..n]).into_owned();
            if message.starts_with(prefix) {
                return message;
            }
            assert_eq!(message, "WATCHDOG=1", "while {prefix} is waited for");
        }
    };
    let mut service = service(&[
        ("NOTIFY_SOCKET", path.to_str().unwrap()),
        ("WATCHDOG_USEC", "600000"),
    ]);
    let ready = hear("READY=1");
    assert_eq!(
        ready,
        "READY=1\nSTATUS=Serving controllers: 2, with pollers: 2"
    );
    for _ in 0..3 {
        hear("WATCHDOG=1");
    }
    service.upgrade().unwrap();
    assert!(hear("RELOADING=1").contains("\nMONOTONIC_USEC="));
    assert_eq!(
        hear("MAINPID="),
        format!("MAINPID={}", service.pid().unwrap())
    );
    assert_eq!(hear("READY=1"), ready);
    for _ in 0..3 {
        hear("WATCHDOG=1");
    }
    service.install(Some("exit 3"));
    service.upgrade().unwrap_err();
    hear("RELOADING=1");
    assert_eq!(hear("READY=1"), ready, "the old one goes on");
    service.stop();
    hear("STOPPING=1");
}

#[test]
fn queues_of_a_guest_that_waits_are_carried_along() {
    let _alone = ALONE.lock();
    let service = service(&[]);
    let mut guest = bring_up(service.connect());
    guest.arm_events(2).unwrap();
    let mut io = Io::new(&mut guest, queue(1, 64), 1);
    for round in 1..4u8 {
        assert_eq!(io.write(7, &[round; 4096]), Status::SUCCESS);
        service.upgrade().unwrap();
        assert_eq!(io.read(7, 1).unwrap(), [round; 4096]);
        let mut late = Io::new(&mut guest, queue(1 + u16::from(round), 64), 2);
        assert_eq!(late.write(0, &[round; 512]), Status::SUCCESS);
    }
}
