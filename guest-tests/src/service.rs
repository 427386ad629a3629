//! The daemon under test as a service: it has a state directory, and hands over to whatever program is at its path.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tempfile::TempDir;
use vhost_user_nvme::transport::Transport;

use crate::FrontEnd;
use crate::frontend::Setup;
use crate::program::binary;

/// How long anything that a test waits for may take.
const LIMIT: Duration = Duration::from_secs(30);

/// A daemon that can be upgraded; whichever process it is is killed when this is dropped.
pub struct Service {
    /// The process it began with.
    first: Child,
    dir: TempDir,
    disk: TempDir,
}

impl Service {
    /// Start it with a configuration, in which `DIR` stands for a directory of this test and `DISK` for a file of 16 MiB, and these
    /// environment variables; wait until it serves.
    pub fn start(config: &str, variables: &[(&str, &str)]) -> Self {
        // The state belongs on tmpfs.
        let tmpfs = Path::new("/dev/shm");
        let dir = match tmpfs.is_dir() {
            true => TempDir::new_in(tmpfs),
            false => TempDir::new(),
        };
        let dir = dir.expect("a temporary directory");
        std::os::unix::fs::symlink(binary(), dir.path().join("daemon")).expect("a link");
        let log = File::create(dir.path().join("log")).expect("a log");
        let disk = TempDir::new().expect("a temporary directory");
        let file = File::create(disk.path().join("disk")).expect("a file");
        file.set_len(16 << 20).expect("a sparse file");
        write_config(dir.path(), disk.path(), config);
        let first = Command::new(dir.path().join("daemon"))
            .arg("--config")
            .arg(dir.path().join("config.toml"))
            .arg("--state-dir")
            .arg(dir.path().join("state"))
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("the daemon");
        let mut service = Self { first, dir, disk };
        let start = Instant::now();
        while service.pid().is_none() || !service.socket(0).exists() {
            if let Some(status) = service.first.try_wait().expect("a child") {
                panic!("the daemon ended at once: {status}: {}", service.log());
            }
            assert!(start.elapsed() < LIMIT, "it does not start");
            std::thread::sleep(Duration::from_millis(2));
        }
        service
    }

    /// Change the configuration for whoever reads it next.
    pub fn configure(&self, config: &str) {
        write_config(self.dir(), self.disk.path(), config);
    }

    /// Put another program at the path of this one: a script of the shell; `None`: the right one.
    pub fn install(&self, script: Option<&str>) {
        use std::os::unix::fs::PermissionsExt as _;
        let new = self.dir().join("daemon.new");
        match script {
            None => std::os::unix::fs::symlink(binary(), &new).expect("a link"),
            Some(script) => {
                std::fs::write(&new, format!("#!/bin/sh\n{script}\n")).expect("a file");
                let all = std::fs::Permissions::from_mode(0o755);
                std::fs::set_permissions(&new, all).expect("our own file");
            }
        }
        std::fs::rename(new, self.program()).expect("the program's path");
    }

    /// The path of the program.
    pub fn program(&self) -> PathBuf {
        self.dir().join("daemon")
    }

    /// Where the controller `index` listens, if the configuration says `DIR/<index>.sock`.
    pub fn socket(&self, index: usize) -> PathBuf {
        self.dir().join(format!("{index}.sock"))
    }

    /// The directory of this test.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What the daemon has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir().join("log")).unwrap_or_default()
    }

    /// The process it is now.
    pub fn pid(&self) -> Option<u32> {
        let text = std::fs::read_to_string(self.dir().join("state/daemon.pid"));
        text.ok()?.trim().parse().ok()
    }

    /// Run the command `upgrade` with these arguments.
    pub fn command(arguments: &[&str]) -> Output {
        let upgrade = Command::new(binary())
            .arg("upgrade")
            .args(arguments)
            .output();
        upgrade.expect("the command")
    }

    /// Ask it to hand over: what it says, and whether it has.
    pub fn upgrade(&self) -> Result<String, String> {
        let state = self.dir().join("state");
        let out = Self::command(&["--state-dir", state.to_str().expect("a plain path")]);
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        match out.status.code() {
            Some(0) => Ok(text(&out.stdout)),
            Some(1) => Err(text(&out.stderr)),
            _ => panic!("{out:?}"),
        }
    }

    /// A front-end on the first controller that outlives processes of the daemon.
    pub fn connect(&self) -> FrontEnd {
        let start = Instant::now();
        loop {
            let front = match crate::transport() {
                Transport::VhostUser => {
                    FrontEnd::surviving(&self.socket(0), &Setup::default(), LIMIT)
                }
                Transport::VfioUser => FrontEnd::connect(&self.socket(0)),
            };
            match front {
                Ok(front) => return front,
                Err(e) if start.elapsed() > LIMIT => panic!("{e}: {}", self.log()),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Send a signal to the process it is now.
    pub fn signal(&self, signal: Signal) {
        let pid = self.pid().and_then(process).expect("a process id");
        kill_process(pid, signal).expect("our own process");
    }

    /// SIGTERM, and wait for the end.
    pub fn stop(&mut self) {
        let pid = self.pid().and_then(process).expect("a process id");
        kill_process(pid, Signal::TERM).expect("our own process");
        let start = Instant::now();
        loop {
            // Its first process is ours to wait for.
            let _ = self.first.try_wait();
            // One that nobody waits for yet has ended as well.
            if test_kill_process(pid).is_err() || is_zombie(pid) {
                return;
            }
            assert!(start.elapsed() < LIMIT, "it does not end: {}", self.log());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Wait for the process it began with: its exit status.
    pub fn first_status(&mut self) -> Option<i32> {
        let start = Instant::now();
        while start.elapsed() < LIMIT {
            if let Some(status) = self.first.try_wait().expect("a child") {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        None
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("log of the daemon:\n{}", self.log());
        }
        if let Some(pid) = self.pid().and_then(process) {
            let _ = kill_process(pid, Signal::KILL);
        }
        let _ = self.first.kill();
        let _ = self.first.wait();
    }
}

fn process(pid: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(pid).ok()?)
}

fn is_zombie(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    stat.is_ok_and(|stat| stat.rsplit(')').next().is_some_and(|s| s.starts_with(" Z")))
}

fn write_config(dir: &Path, disk: &Path, config: &str) {
    let transport = match crate::transport() {
        Transport::VhostUser => "vhost-user",
        Transport::VfioUser => "vfio-user",
    };
    let dir_text = dir.to_str().expect("a plain path");
    let text = config
        .replace("DIR", dir_text)
        .replace("DISK", disk.join("disk").to_str().expect("a plain path"))
        .replace("TRANSPORT", transport);
    let new = dir.join("config.new");
    std::fs::write(&new, text).expect("a file");
    std::fs::rename(new, dir.join("config.toml")).expect("a file");
}
