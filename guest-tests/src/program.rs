//! The daemon under test as a process of its own: the real binary.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use vhost_user_nvme::transport::Transport;

use crate::FrontEnd;
use crate::frontend::Setup;

/// The binary: named by `VHOST_USER_NVME_BIN`, or built now (which is quick if it is built), with the profile and into the
/// directory this test was built with.
pub(crate) fn binary() -> &'static Path {
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
            .args(match crate::transport() {
                Transport::VhostUser => ["--transport", "vhost-user"],
                Transport::VfioUser => ["--transport", "vfio-user"],
            })
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

    /// One that can be killed and started again, with what survives it and its log in a directory on tmpfs. `{dir}` in an argument is
    /// that directory.
    pub fn surviving(arguments: &[&str]) -> Surviving {
        let dir = TempDir::new_in("/dev/shm").expect("a temporary directory on tmpfs");
        let mut daemon = Surviving {
            child: None,
            socket: dir.path().join("nvme.sock"),
            arguments: Vec::new(),
            dir,
        };
        daemon.configure(arguments);
        daemon.start();
        daemon
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

/// A daemon that is killed and started again.
pub struct Surviving {
    child: Option<Child>,
    socket: PathBuf,
    arguments: Vec<String>,
    dir: TempDir,
}

impl Surviving {
    /// What it is started with from the next time on. `{dir}` is its directory.
    pub fn configure(&mut self, arguments: &[&str]) {
        let dir = self.dir.path().to_string_lossy();
        self.arguments = arguments.iter().map(|a| a.replace("{dir}", &dir)).collect();
    }

    /// Start it, and do not wait for it.
    pub fn start(&mut self) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join("log"))
            .expect("a log");
        let child = Command::new(binary())
            .arg("--state-dir")
            .arg(self.dir.path().join("state"))
            .arg("--socket-path")
            .arg(&self.socket)
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the daemon");
        self.child = Some(child);
    }

    /// SIGKILL, at any instruction. It is gone when this returns.
    ///
    /// # Panics
    ///
    /// It had ended by itself; the message has the end of its log.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            if let Some(status) = child.try_wait().expect("a child") {
                panic!("the daemon ended by itself: {status}; {}", self.log());
            }
            child.kill().expect("our own child");
            child.wait().expect("a child");
        }
    }

    /// SIGTERM, and wait for its end.
    ///
    /// # Panics
    ///
    /// It does not end, or with a failure.
    pub fn stop(&mut self) {
        let Some(mut child) = self.child.take() else {
            return;
        };
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        kill_process(pid.expect("a process id"), Signal::TERM).expect("our own child");
        let start = Instant::now();
        loop {
            match child.try_wait().expect("a child") {
                Some(status) if status.success() => return,
                Some(status) => panic!("it ended with {status}; {}", self.log()),
                None if start.elapsed() > Duration::from_secs(30) => {
                    let _ = child.kill();
                    panic!("it does not end; {}", self.log());
                }
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A place for files.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The end of what it said.
    pub fn log(&self) -> String {
        let text = std::fs::read(self.dir.path().join("log")).unwrap_or_default();
        let from = text.len().saturating_sub(4000);
        String::from_utf8_lossy(&text[from..]).into_owned()
    }

    /// A front-end that survives it.
    ///
    /// # Panics
    ///
    /// It does not listen within ten seconds.
    pub fn connect(&self, setup: &Setup) -> FrontEnd {
        let start = Instant::now();
        loop {
            match FrontEnd::surviving(&self.socket, setup, Duration::from_secs(60)) {
                Ok(front) => return front,
                Err(e) if start.elapsed() > Duration::from_secs(10) => {
                    panic!("{e}; {}", self.log())
                }
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }
}

impl Drop for Surviving {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
