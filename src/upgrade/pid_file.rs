//! `daemon.pid` in the state directory, locked by the daemon that it names, and `daemon.upgrade` beside it: what came of the last upgrade.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// Name of the file with the process id.
pub const PID: &str = "daemon.pid";
/// Name of the file with the outcome.
const OUTCOME: &str = "daemon.upgrade";

/// Somebody who only looks whether the file is locked may hold the lock for a moment.
const TRIES: u32 = 5;

/// What came of an upgrade.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Outcome {
    /// Counts upgrades of this state directory.
    pub serial: u64,
    /// Whether the new program serves.
    pub ok: bool,
    /// For people.
    pub message: String,
}

/// The file of this process.
pub struct PidFile {
    file: File,
    dir: PathBuf,
    /// Another process goes on with it.
    left: bool,
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if !self.left {
            let _ = std::fs::remove_file(self.dir.join(PID));
            let _ = std::fs::remove_file(self.dir.join(OUTCOME));
        }
    }
}

impl PidFile {
    /// Write our process id into the file in `dir`; `None` if another daemon has one there.
    ///
    /// # Errors
    ///
    /// What the file system says.
    pub fn claim(dir: &Path) -> io::Result<Option<Self>> {
        let path = dir.join(PID);
        for _ in 0..TRIES {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
                .open(&path)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => std::thread::sleep(Duration::from_millis(20)),
                Err(e) => return Err(e.into()),
                // Whoever had it may just have removed it.
                Ok(()) if !is_at(&file, &path) => {}
                Ok(()) => return Self::of(file, dir).map(Some),
            }
        }
        Ok(None)
    }

    /// Go on with the file of the process before.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn taken(file: OwnedFd, dir: &Path) -> io::Result<Self> {
        Self::of(file.into(), dir)
    }

    fn of(mut file: File, dir: &Path) -> io::Result<Self> {
        let text = format!("{}\n", std::process::id());
        file.rewind()?;
        file.write_all(text.as_bytes())?;
        file.set_len(text.len() as u64)?;
        Ok(Self {
            file,
            dir: dir.to_owned(),
            left: false,
        })
    }

    /// The open file: whoever gets it has the lock as well.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Another process goes on with it.
    pub fn leave(&mut self) {
        self.left = true;
    }

    /// It is ours again.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub fn take_back(&mut self) -> io::Result<()> {
        *self = Self::of(self.file.try_clone()?, &self.dir.clone())?;
        Ok(())
    }

    /// Say what came of an upgrade.
    pub fn report(&self, ok: bool, message: &str) {
        let outcome = Outcome {
            serial: read_outcome(&self.dir)
                .map_or(0, |o| o.serial)
                .wrapping_add(1),
            ok,
            message: message.into(),
        };
        let new = self.dir.join(format!("{OUTCOME}.new"));
        let written = serde_json::to_vec(&outcome)
            .map_err(io::Error::other)
            .and_then(|text| {
                let _ = std::fs::remove_file(&new);
                let mut file = OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(&new)?;
                file.write_all(&text)?;
                std::fs::rename(&new, self.dir.join(OUTCOME))
            });
        if let Err(error) = written {
            tracing::warn!("who asked for the upgrade cannot be told what came of it: {error}");
        }
    }
}

/// Whether an open file is the one at a path.
fn is_at(file: &File, path: &Path) -> bool {
    let (Ok(open), Ok(there)) = (file.metadata(), std::fs::metadata(path)) else {
        return false;
    };
    (open.dev(), open.ino()) == (there.dev(), there.ino())
}

/// What came of the last upgrade of the daemon in `dir`.
pub fn read_outcome(dir: &Path) -> Option<Outcome> {
    let text = std::fs::read(dir.join(OUTCOME)).ok()?;
    serde_json::from_slice(&text).ok()
}

/// The process id of the daemon in `dir`.
///
/// # Errors
///
/// There is no file, or nobody has it locked: no daemon runs.
pub fn read_pid(dir: &Path) -> io::Result<u32> {
    let mut file = File::open(dir.join(PID))?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Err(Errno::WOULDBLOCK) => {}
        Err(e) => return Err(e.into()),
        Ok(()) => return Err(io::Error::other("no daemon has it locked: it has ended")),
    }
    let pid = text.trim().parse();
    pid.map_err(|_| io::Error::other("it holds no process id"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_has_its_file_and_leaves_it_to_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        assert!(read_pid(dir).is_err());
        let mut first = PidFile::claim(dir).unwrap().unwrap();
        assert_eq!(read_pid(dir).unwrap(), std::process::id());
        assert!(PidFile::claim(dir).unwrap().is_none(), "there is one");
        first.report(false, "no");
        first.report(true, "yes");
        let outcome = read_outcome(dir).unwrap();
        assert_eq!((outcome.serial, outcome.ok), (2, true));
        assert_eq!(outcome.message, "yes");
        let second = first.file().try_clone().unwrap().into();
        first.leave();
        let second = PidFile::taken(second, dir).unwrap();
        drop(first);
        assert_eq!(read_pid(dir).unwrap(), std::process::id());
        drop(second);
        assert!(read_pid(dir).is_err() && read_outcome(dir).is_none());
        // What a daemon left that died.
        std::fs::write(dir.join(PID), "1\n").unwrap();
        let e = read_pid(dir).unwrap_err().to_string();
        assert!(e.contains("it has ended"), "{e}");
        let third = PidFile::claim(dir).unwrap().unwrap();
        assert_eq!(read_pid(dir).unwrap(), std::process::id());
        drop(third);
        std::os::unix::fs::symlink("/etc/passwd", dir.join(PID)).unwrap();
        assert!(PidFile::claim(dir).is_err(), "not through a link");
    }
}
