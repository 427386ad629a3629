//! SIGKILL at random moments, also while the daemon recovers, under load.
//!
//! `RECOVERY_KILLS` is the number of kills (`scripts/test recovery`: 2,000), `RECOVERY_SEED` chooses another sequence.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use guest_tests::frontend::Setup;
use guest_tests::program::{Program, Surviving};
use guest_tests::rng::Rng;
use vhost_user_nvme::state::is_tmpfs;

use crate::load::Load;

fn number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().expect("a number"),
        Err(_) => default,
    }
}

/// What the killer and the guest tell each other.
#[derive(Default)]
struct Shared {
    completed: AtomicU64,
    over: AtomicBool,
}

/// Kill and start, so many times. A guest that gets nowhere for a while stops it.
fn kill_again_and_again(daemon: &mut Surviving, kills: u64, seed: u64, shared: &Shared) {
    let mut rng = Rng::new(seed);
    for _ in 0..kills {
        let before = shared.completed.load(Ordering::Relaxed);
        if rng.one_in(3) {
            // Not even up, or just recovering.
            std::thread::sleep(Duration::from_micros(rng.below(12_000)));
        } else {
            let wanted = before + 1 + rng.below(200);
            let start = Instant::now();
            while shared.completed.load(Ordering::Relaxed) < wanted
                && start.elapsed() < Duration::from_secs(40)
                && !shared.over.load(Ordering::Relaxed)
            {
                std::thread::sleep(Duration::from_micros(200));
            }
            std::thread::sleep(Duration::from_micros(rng.below(3_000)));
        }
        if shared.over.load(Ordering::Relaxed) {
            return;
        }
        daemon.kill();
        daemon.start();
    }
}

/// Tells the killer that the guest is done, however it ended.
struct Over(Arc<Shared>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Relaxed);
    }
}

/// Where files lie.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Files {
    /// What is done with them is done at once, and nothing is out when the daemon is killed.
    InMemory,
    /// It takes its time: commands are out.
    OnDisk,
}

impl Files {
    fn dir(self) -> tempfile::TempDir {
        if self == Self::InMemory {
            return tempfile::TempDir::new_in("/dev/shm").expect("a directory on tmpfs");
        }
        let places = [env!("CARGO_TARGET_TMPDIR"), "/var/tmp"];
        let disk = places.into_iter().find(|p| !is_tmpfs(Path::new(p)));
        let disk = disk.expect("the target directory or /var/tmp on a disk");
        tempfile::TempDir::new_in(disk).expect("a directory on disk")
    }
}

/// Commands that were out when the daemon was killed, and that the next one has carried on with.
fn carried(daemon: &Surviving) -> u64 {
    let log = std::fs::read_to_string(daemon.dir().join("log")).expect("a log");
    let numbers = log
        .lines()
        .filter(|line| line.contains("resumed"))
        .filter_map(|line| line.split_once("carried=")?.1.split(' ').next());
    numbers.map(|n| n.parse::<u64>().expect("a number")).sum()
}

fn survive(name: &str, arguments: &[&str], files: Files, kills: u64) {
    const BLOCKS: u64 = 2048;
    let seed = number("RECOVERY_SEED", 1);
    let dir = files.dir();
    let path = dir.path().join("disk");
    let made = std::fs::File::create(&path).expect("a file");
    made.set_len(BLOCKS * 4096).expect("a sparse file");
    let mut all: Vec<String> = arguments.iter().map(|a| (*a).to_string()).collect();
    all.push("--namespace".into());
    all.push(format!("file,path={},block-size=4096", path.display()));
    let namespaces = all.iter().filter(|a| *a == "--namespace").count() as u32;
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let mut daemon = Program::surviving(&all);
    let front = daemon.connect(&Setup::default());
    let shared = Arc::new(Shared::default());
    let begin = Instant::now();

    std::thread::scope(|scope| {
        let theirs = Arc::clone(&shared);
        let over = Over(Arc::clone(&shared));
        let link = front.clone();
        let daemon = &mut daemon;
        let killer = scope.spawn(move || {
            kill_again_and_again(daemon, kills, seed, &theirs);
            carried(daemon)
        });
        let mut load = Load::new(front, namespaces, BLOCKS, seed);
        let mut rng = Rng::new(seed ^ 77);
        while !killer.is_finished() {
            let done = load.step();
            shared.completed.fetch_add(done as u64, Ordering::Relaxed);
            if rng.one_in(50) {
                load.administer();
                shared.completed.fetch_add(1, Ordering::Relaxed);
            }
        }
        let carried = killer.join().expect("the one who kills");
        load.compare();
        let mut gaps = link.session().gaps();
        gaps.sort();
        let connections = link.session().connections();
        println!(
            "{name}: {kills} kills in {:.1} s, {connections} connections, {carried} commands carried on with, {:?}; away: p50 {:?}, max {:?}",
            begin.elapsed().as_secs_f64(),
            load.done,
            gaps.get(gaps.len() / 2),
            gaps.last(),
        );
        // Many a kill hit a daemon that nobody had reached yet; but most did not.
        assert!(
            connections > kills / 4,
            "{connections} connections, {kills} kills"
        );
        if files == Files::OnDisk {
            assert!(carried > 0, "no kill has met a command that was out");
        }
        drop(load.into_guest());
        drop(over);
    });
}

#[test]
fn memory_and_file_survive_kills() {
    survive(
        "memory and file, 2 pollers",
        &[
            "--cores",
            "0,1",
            "--namespace",
            "memory,size=8M,block-size=4096",
        ],
        Files::InMemory,
        number("RECOVERY_KILLS", 200) * 3 / 4,
    );
}

#[test]
fn a_file_on_disk_survives_kills_without_shadow_doorbells() {
    survive(
        "file on disk, 1 poller",
        &["--no-doorbell-buffer"],
        Files::OnDisk,
        number("RECOVERY_KILLS", 200) / 4,
    );
}
