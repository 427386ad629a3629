//! What a daemon leaves behind, when it does not, and what the next one waits for.

mod common;

use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use common::{Channel, Client, Daemon, code};
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;

/// A place for a daemon, its state in memory if there is such a place.
struct Setup {
    dir: tempfile::TempDir,
    args: Vec<String>,
}

impl Setup {
    fn new(namespace: &str) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        let dir = dir.unwrap();
        let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let namespace = namespace.replace("DIR", dir.path().to_str().unwrap());
        let args = [
            "--socket-path".into(),
            at("s.sock"),
            "--state-dir".into(),
            at("kept"),
            "--namespace".into(),
            namespace,
        ];
        Self {
            args: args.into(),
            dir,
        }
    }

    fn start(&self) -> Daemon {
        Daemon::start(self.dir.path(), &self.args())
    }

    fn args(&self) -> Vec<&str> {
        self.args.iter().map(String::as_str).collect()
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("s.sock")
    }

    /// The controller's own directory.
    fn place(&self) -> Option<PathBuf> {
        let kept = std::fs::read_dir(self.dir.path().join("kept"));
        let found: Vec<_> = kept
            .into_iter()
            .flatten()
            .map(|e| e.unwrap().path())
            .filter(|path| path.is_dir())
            .collect();
        assert!(found.len() <= 1, "{found:?}");
        found.into_iter().next()
    }

    fn check(&self) -> (bool, String) {
        let mut args = self.args();
        args.push("--check-config");
        let out = common::run(&args);
        let text = [out.stdout, out.stderr].concat();
        (out.status.success(), String::from_utf8(text).unwrap())
    }
}

fn inode(file: &Path) -> u64 {
    std::fs::metadata(file).unwrap().ino()
}

#[test]
fn what_is_kept_depends_on_who_may_ask_for_it() {
    let s = Setup::new("memory,size=16M,huge-pages=never");
    assert!(s.check().1.contains("no state yet"), "{:?}", s.check());
    assert!(s.place().is_none(), "a check makes nothing");
    let mut daemon = s.start();
    daemon.line("-device");
    let place = s.place().unwrap();
    assert_eq!(std::fs::metadata(&place).unwrap().mode() & 0o777, 0o700);
    let files = ["doorbells", "lock"].map(|name| place.join(name));
    for file in &files {
        assert_eq!(std::fs::metadata(file).unwrap().mode() & 0o777, 0o600);
    }
    let pid = std::fs::read_to_string(&files[1]).unwrap();
    assert_eq!(pid, daemon.pid().to_string());
    let doorbells = inode(&files[0]);

    // Killed: all of it stays, and the next one goes on with it.
    daemon.signal(Signal::KILL);
    daemon.wait();
    assert!(files[0].exists());
    let mut daemon = s.start();
    daemon.line("-device");
    assert_eq!(inode(&files[0]), doorbells);

    // Stopped while a front-end is there, which will be back.
    let c = Client::handshake(&s.socket());
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
    drop(c);
    assert_eq!(inode(&files[0]), doorbells);

    // Stopped with nobody there.
    let mut daemon = s.start();
    drop(Client::handshake(&s.socket()));
    daemon.line("front-end disconnected");
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait().code(), Some(0), "{}", daemon.log());
    assert!(s.place().is_none(), "{}", daemon.log());
}

#[test]
fn nothing_is_kept_if_nothing_is_to_be() {
    let mut s = Setup::new("memory,size=16M,huge-pages=never");
    s.args[3] = "none".into();
    assert!(s.check().1.contains("nothing survives"));
    let mut daemon = s.start();
    daemon.line("-device");
    Client::handshake(&s.socket());
    assert!(s.place().is_none() && !s.dir.path().join("state").exists());
    drop(daemon);
    // A place that cannot be had, and was asked for.
    s.args[3] = "/proc/no/such".into();
    let out = common::run(&s.args());
    assert_eq!(out.status.code(), Some(1));
    let text = String::from_utf8(out.stderr).unwrap();
    assert!(
        text.contains("the state directory /proc/no/such cannot be made"),
        "{text}"
    );
}

#[test]
fn state_that_makes_no_sense_is_told() {
    let s = Setup::new("null,size=1G");
    let mut daemon = s.start();
    daemon.line("-device");
    daemon.signal(Signal::KILL);
    daemon.wait();
    let state = s.place().unwrap().join("state");
    std::fs::write(&state, [0xEE; 8192]).unwrap();
    let (good, text) = s.check();
    assert!(good && text.contains("it is not a state file"), "{text}");
    // A guest that is new does not care.
    let mut daemon = s.start();
    daemon.line("-device");
    Client::handshake(&s.socket());
}

/// Somebody else still has what the daemon needs, and lets go of it late.
#[test]
fn what_another_process_still_has_is_waited_for() {
    let s = Setup::new("file,path=DIR/disk,direct=off");
    let disk = std::fs::File::create(s.dir.path().join("disk")).unwrap();
    disk.set_len(16 << 20).unwrap();
    // Nobody was there before us: then it is somebody else's for good.
    flock(&disk, FlockOperation::LockExclusive).unwrap();
    let out = common::run(&s.args());
    let text = String::from_utf8(out.stderr).unwrap();
    assert!(text.contains("is in use by another namespace"), "{text}");
    flock(&disk, FlockOperation::Unlock).unwrap();

    let mut daemon = s.start();
    daemon.line("-device");
    let lock = std::fs::File::open(s.place().unwrap().join("lock")).unwrap();
    daemon.signal(Signal::KILL);
    daemon.wait();
    // As if the kernel were not done with what the dead one had begun.
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    flock(&disk, FlockOperation::LockExclusive).unwrap();
    let mut daemon = s.start();
    daemon.line("another process still has this controller; waiting for it");
    flock(&lock, FlockOperation::Unlock).unwrap();
    daemon.line("another process still has this; waiting for the last of its I/O to end");
    assert!(!daemon.log().contains("-device"));
    flock(&disk, FlockOperation::Unlock).unwrap();
    daemon.line("-device");
    Client::handshake(&s.socket());
}

/// A front-end that makes the doorbells' file shorter, which cannot be sealed since it has a name.
#[test]
fn a_cut_doorbell_file_ends_its_own_connection_only() {
    let s = Setup::new("null,size=1G");
    let two = Setup::new("null,size=1G");
    let config = s.dir.path().join("c.toml");
    let text = [("one", &s), ("two", &two)].map(|(name, s)| {
        format!(
            "[[controller]]\nname = \"{name}\"\nsocket-path = \"{}\"\nqueues = 4\n[[controller.namespace]]\nbackend = \"null\"\nsize = \"1G\"\n",
            s.socket().display()
        )
    });
    std::fs::write(&config, text.concat()).unwrap();
    let args = ["--config", config.to_str().unwrap()];
    let mut daemon = Daemon::start(s.dir.path(), &args);
    daemon.line("-device");
    let mut other = Client::handshake(&two.socket());
    for _ in 0..2 {
        let mut c = Client::handshake(&s.socket());
        let mut channel = Channel::open(&mut c);
        let (_, body, window) = channel.request();
        channel.acknowledge(code::SHMEM_MAP, 0);
        let offset = u64::from_ne_bytes(body[8..16].try_into().unwrap());
        let window = std::fs::File::from(window.unwrap());
        window.write_all_at(&1_u32.to_le_bytes(), offset).unwrap();
        let whole = window.metadata().unwrap().len();
        window.set_len(0).unwrap();
        // A reset clears the doorbells, and so comes upon it.
        c.send(code::RESET_DEVICE, common::PLAIN, &[], &[]);
        assert!(c.is_closed());
        daemon.line("connection ended: the file of the doorbells was cut while it was mapped");
        assert_eq!(other.ask(code::GET_QUEUE_NUM, &[], &[]), Some(4));
        let mut next = Client::handshake(&s.socket());
        assert_eq!(next.ask(code::RESET_DEVICE, &[], &[]), Some(0));
        assert_eq!(window.metadata().unwrap().len(), whole, "mended");
        drop(next);
        daemon.line("front-end disconnected");
    }
}
