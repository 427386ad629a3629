//! A directory that one process owns at a time, and that others cannot spoil.

use std::fs::File;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::keep::KeepError;

/// How long to wait for a process that ends to let go of a controller, and of what it serves.
pub const LOCK_WAIT: Duration = Duration::from_secs(10);

/// Between two looks whether it has.
const LOOK: Duration = Duration::from_millis(10);

pub(super) const LOCK: &str = "lock";

/// A directory that is ours.
pub(super) struct Place {
    pub(super) path: PathBuf,
    /// It was there before: who had it did not end in order, or expected to be asked for.
    pub(super) found: bool,
    /// Its lock, as long as we have it.
    lock: Mutex<Option<File>>,
}

impl Place {
    /// That of the controller at a socket, locked.
    pub(super) fn open(root: &Path, socket: &Path, wait: Duration) -> Result<Self, KeepError> {
        let path = directory(root, socket)?;
        let place = Self {
            found: path.exists(),
            path,
            lock: Mutex::new(None),
        };
        place.lock(wait)?;
        Ok(place)
    }

    pub(super) fn held(&self) -> MutexGuard<'_, Option<File>> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Open a file in it.
    pub(super) fn file(&self, name: &str, flags: OFlags) -> io::Result<File> {
        open_in(&self.path, name, flags)
    }

    /// Make the directory if need be, and have it for ourselves.
    pub(super) fn lock(&self, wait: Duration) -> Result<(), KeepError> {
        let deadline = Instant::now() + wait;
        let mut said = false;
        let mut held = self.held();
        while held.is_none() {
            match self.try_lock()? {
                Some(file) => *held = Some(file),
                None if Instant::now() >= deadline => {
                    return Err(KeepError::Busy {
                        pid: owner(&self.path),
                        dir: self.path.clone(),
                    });
                }
                None => {
                    if !said {
                        tracing::info!(
                            dir = %self.path.display(),
                            pid = owner(&self.path),
                            "another process still has this controller; waiting for it"
                        );
                        said = true;
                    }
                    std::thread::sleep(LOOK);
                }
            }
        }
        Ok(())
    }

    /// `None`: another process has it, or has just removed it.
    fn try_lock(&self) -> Result<Option<File>, KeepError> {
        let failed = |e: io::Error| KeepError::io(format!("cannot use {}", self.path.display()), e);
        make(&self.path)?;
        let file = match self.file(LOCK, OFlags::RDWR | OFlags::CREATE) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            result => result.map_err(failed)?,
        };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Ok(None),
            Err(e) => return Err(failed(e.into())),
        }
        // The owner before us may have removed all this meanwhile.
        let ours = file.metadata().map_err(failed)?;
        match std::fs::symlink_metadata(self.path.join(LOCK)) {
            Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => {}
            _ => return Ok(None),
        }
        let pid = std::process::id().to_string();
        // Only for people to read.
        let _ = file
            .set_len(0)
            .and_then(|()| file.write_all_at(pid.as_bytes(), 0));
        Ok(Some(file))
    }
}

/// The process that has, or had, a controller's directory.
pub fn owner(dir: &Path) -> Option<u32> {
    let file = open_in(dir, LOCK, OFlags::RDONLY).ok()?;
    let mut bytes = [0; 16];
    let n = file.read_at(&mut bytes, 0).ok()?;
    std::str::from_utf8(bytes.get(..n)?).ok()?.parse().ok()
}

/// Where, under `root`, the controller at a socket has its place: something to recognise it by, and what tells it from all others.
///
/// # Errors
///
/// There is no working directory to begin with.
pub fn directory(root: &Path, socket: &Path) -> Result<PathBuf, KeepError> {
    let absolute = std::path::absolute(socket)
        .map_err(|e| KeepError::io(format!("cannot find {}", socket.display()), e))?;
    // By whatever way it is named.
    let whole = match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => parent
            .canonicalize()
            .map_or_else(|_| absolute.clone(), |parent| parent.join(name)),
        _ => absolute.clone(),
    };
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let name = whole.file_name().unwrap_or_default().to_string_lossy();
    let name: String = name.chars().map(plain).take(40).collect();
    let sum = Sha256::digest(whole.as_os_str().as_encoded_bytes());
    let sum: String = sum.iter().take(6).map(|b| format!("{b:02x}")).collect();
    Ok(root.join(format!("{name}-{sum}")))
}

/// See to it that there is a directory only we can use.
///
/// # Errors
///
/// It is somebody else's, or others may use it; the kernel refuses.
fn make(dir: &Path) -> Result<(), KeepError> {
    let failed = |e| KeepError::io(format!("cannot make {}", dir.display()), e);
    match std::fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failed(e)),
        _ => {}
    }
    match is_ours(dir) {
        // Removed again.
        Err(KeepError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

pub(super) fn is_ours(dir: &Path) -> Result<(), KeepError> {
    let meta = std::fs::symlink_metadata(dir)
        .map_err(|e| KeepError::io(format!("cannot look at {}", dir.display()), e))?;
    let not_ours = |why| {
        let dir = dir.to_owned();
        Err(KeepError::NotOurs { dir, why })
    };
    if !meta.is_dir() {
        return not_ours("is not a directory");
    }
    if meta.uid() != rustix::process::geteuid().as_raw() {
        return not_ours("belongs to another user");
    }
    if meta.permissions().mode() & 0o077 != 0 {
        return not_ours("can be used by others");
    }
    Ok(())
}

/// Whether a directory's files are memory.
pub fn is_tmpfs(dir: &Path) -> bool {
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    rustix::fs::statfs(dir).is_ok_and(|fs| u64::try_from(fs.f_type) == Ok(TMPFS_MAGIC))
}

/// Open a file in a directory of ours.
pub(super) fn open_in(dir: &Path, name: &str, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::open(dir.join(name), flags, Mode::RUSR | Mode::WUSR)?;
    let file = File::from(fd);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    Ok(file)
}
