//! The daemon under test as a process of its own: the real binary.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::FrontEnd;

/// The binary: named by `VHOST_USER_NVME_BIN`, or built now (which is quick if it is built), with the profile and into the
/// directory this test was built with.
fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(path) = std::env::var_os("VHOST_USER_NVME_BIN") {
            return path.into();
        }
        // target/<profile>/deps/<this test>
        let this = std::env::current_exe().expect("the path of this test");
        let profile_dir = this.ancestors().nth(2).expect("a target directory");
        let target_dir = profile_dir.parent().expect("a target directory");
        let mut build = Command::new(env!("CARGO"));
        build
            .args([
                "build",
                "--quiet",
                "--locked",
                "--package",
                "vhost-user-nvme",
            ])
            .args(["--bin", "vhost-user-nvme", "--target-dir"])
            .arg(target_dir)
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        if profile_dir.ends_with("release") {
            build.arg("--release");
        }
        let status = build.status().expect("cargo");
        assert!(status.success(), "the daemon does not build: {status}");
        profile_dir.join("vhost-user-nvme")
    })
}

/// A running daemon; killed when dropped.
pub struct Program {
    child: Child,
    socket: PathBuf,
    dir: TempDir,
}

impl Program {
    /// Start it with these arguments and a socket of ours, and wait until it listens.
    pub fn start(arguments: &[&str]) -> Self {
        let dir = TempDir::new().expect("a temporary directory");
        let socket = dir.path().join("nvme.sock");
        let child = Command::new(binary())
            .arg("--socket-path")
            .arg(&socket)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("the daemon");
        let mut program = Self { child, socket, dir };
        let start = Instant::now();
        while !program.socket.exists() {
            if let Some(status) = program.child.try_wait().expect("a child") {
                panic!("the daemon ended at once: {status}");
            }
            assert!(start.elapsed() < Duration::from_secs(20), "no socket");
            std::thread::sleep(Duration::from_millis(2));
        }
        program
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A place for files.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A front-end on its controller. The socket may be bound a moment before it listens.
    pub fn connect(&self) -> FrontEnd {
        let start = Instant::now();
        loop {
            match FrontEnd::connect(&self.socket) {
                Ok(front) => return front,
                Err(e) if start.elapsed() > Duration::from_secs(5) => panic!("{e}"),
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Processor time all its threads have used.
    pub fn cpu(&self) -> Duration {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.child.id()));
        let nanos = tasks
            .expect("a live process")
            .filter_map(|task| {
                let stat = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
                stat.split_whitespace().next()?.parse::<u64>().ok()
            })
            .sum();
        Duration::from_nanos(nanos)
    }

    /// Memory of its own in bytes: resident pages that are not shared memory (guest memory and namespaces are).
    pub fn own_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))
            .expect("a live process");
        status
            .lines()
            .filter(|line| line.starts_with("RssAnon:") || line.starts_with("RssFile:"))
            .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
            .sum::<u64>()
            * 1024
    }

    /// Send SIGTERM.
    pub fn terminate(&self) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.expect("a process id"), Signal::TERM).expect("our own child");
    }

    /// Wait until it has ended.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let start = Instant::now();
        while start.elapsed() < limit {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return Some(status);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        None
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
