//! A controller's place: a directory that one process owns at a time, and the state file in it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::OFlags;

use super::file::{LAYOUT, Shape, StateFile};
use super::place::{Place, directory, is_ours, open_in};
use crate::memory::{DoorbellWindow, crash_point};

const STATE: &str = "state";
const BEGUN: &str = "state.new";
const DOORBELLS: &str = "doorbells";

/// Why there is no place for a controller, or no state in it.
#[derive(Debug, thiserror::Error)]
pub enum KeepError {
    /// The kernel refused something.
    #[error("{what}: {source}")]
    Io {
        /// What could not be done.
        what: String,
        /// The cause.
        source: io::Error,
    },
    /// Another process has it and does not let go.
    #[error(
        "the controller in {} belongs to another process{}; stop it, or choose another --socket-path or --state-dir",
        dir.display(),
        pid.map_or_else(String::new, |pid| format!(" ({pid})"))
    )]
    Busy {
        /// The directory.
        dir: PathBuf,
        /// The process, as far as known.
        pid: Option<u32>,
    },
    /// Others could write there.
    #[error("{} {why}; remove it, or choose another --state-dir", dir.display())]
    NotOurs {
        /// The directory.
        dir: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Another version of the program wrote the state.
    #[error("the state has layout {found}, and this version knows {LAYOUT}")]
    Layout {
        /// What was found.
        found: u64,
    },
    /// The state cannot be what was written.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
}

impl KeepError {
    pub(super) fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io {
            what: what.into(),
            source: source.into(),
        }
    }
}

/// Where the generations of a controller's state are kept, one after the other.
pub struct Keep {
    place: Option<Place>,
    generations: Mutex<Generations>,
}

#[derive(Default)]
struct Generations {
    /// The one that counts, once it is known here.
    current: Option<Arc<StateFile>>,
    /// The one that is being filled.
    begun: Option<Arc<StateFile>>,
}

impl Keep {
    /// No place: generations live in this process alone, and as long as it.
    pub fn nowhere() -> Self {
        Self {
            place: None,
            generations: Mutex::default(),
        }
    }

    /// The place, under `root`, of the controller at this socket: it is made if it is not there, and locked, for which is waited so long.
    ///
    /// # Errors
    ///
    /// Another process has it and keeps it; others could write to it; the kernel refuses.
    pub fn open(root: &Path, socket: &Path, wait: Duration) -> Result<Self, KeepError> {
        let place = Place::open(root, socket, wait)?;
        match std::fs::remove_file(place.path.join(BEGUN)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(KeepError::io("cannot remove what was left half written", e));
            }
            _ => {}
        }
        Ok(Self {
            place: Some(place),
            generations: Mutex::default(),
        })
    }

    /// What was left for the controller at this socket, without having its place.
    ///
    /// # Errors
    ///
    /// Others could write to it; what was left is of another layout, or damaged.
    pub fn look(root: &Path, socket: &Path) -> Result<Option<Arc<StateFile>>, KeepError> {
        let dir = directory(root, socket)?;
        match std::fs::symlink_metadata(&dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            _ => is_ours(&dir)?,
        }
        read(&dir)
    }

    /// Whether another process had this controller, and did not end in order.
    pub fn had_predecessor(&self) -> bool {
        self.place.as_ref().is_some_and(|place| place.found)
    }

    /// What ends when the last I/O of this process has ended, if a ring of the kernel holds it as long as it exists: the lock.
    pub fn fence(&self) -> Option<Arc<File>> {
        let place = self.place.as_ref()?;
        let held = place.held();
        held.as_ref()?.try_clone().ok().map(Arc::new)
    }

    pub(super) fn place(&self) -> Option<&Place> {
        self.place.as_ref()
    }

    /// The directory; `None` if this is nowhere.
    pub fn path(&self) -> Option<&Path> {
        self.place.as_ref().map(|p| &*p.path)
    }

    /// The generation that counts: the one published last, or what a process before us left. `None`: there was never one.
    ///
    /// # Errors
    ///
    /// What was left is of another layout, or damaged. A new generation replaces it.
    pub fn current(&self) -> Result<Option<Arc<StateFile>>, KeepError> {
        let mut generations = self.generations();
        if generations.current.is_none()
            && let Some(place) = &self.place
        {
            generations.current = read(&place.path)?;
        }
        Ok(generations.current.clone())
    }

    /// A new generation, beside the one that counts. One that was begun before and not published is gone.
    ///
    /// # Errors
    ///
    /// What the kernel says: no memory, no room.
    pub fn begin(&self, shape: Shape) -> io::Result<Arc<StateFile>> {
        let mut generations = self.generations();
        generations.begun = None;
        let state = match &self.place {
            None => StateFile::anonymous(shape)?,
            Some(place) => {
                let new = || place.file(BEGUN, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL);
                let file = match new() {
                    Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                        std::fs::remove_file(place.path.join(BEGUN))?;
                        new()?
                    }
                    result => result?,
                };
                StateFile::create(file, shape)?
            }
        };
        generations.begun = Some(Arc::clone(&state));
        Ok(state)
    }

    /// From now on the generation begun last is the one that counts.
    ///
    /// # Errors
    ///
    /// It is not that one; what the kernel says. The one before still counts.
    pub fn publish(&self, state: Arc<StateFile>) -> io::Result<()> {
        let mut generations = self.generations();
        let begun = generations.begun.take();
        if !begun.is_some_and(|begun| Arc::ptr_eq(&begun, &state)) {
            return Err(io::Error::other(
                "this generation was not the last that was begun",
            ));
        }
        // In a test this process may be "dead" already.
        if crash_point::store_happens() {
            if let Some(place) = &self.place {
                std::fs::rename(place.path.join(BEGUN), place.path.join(STATE))?;
            }
            generations.current = Some(state);
        }
        Ok(())
    }

    /// What counted until now counts no more, here and for who comes after us: there is no state until the next [`Self::publish`].
    ///
    /// # Errors
    ///
    /// What the kernel says; it still counts then.
    pub fn forget(&self) -> io::Result<()> {
        let mut generations = self.generations();
        if crash_point::store_happens() {
            if let Some(place) = &self.place {
                match std::fs::remove_file(place.path.join(STATE)) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                    _ => {}
                }
            }
            generations.current = None;
        }
        Ok(())
    }

    /// The controller's doorbell window of `bytes` bytes: the same file for ever, with what a guest stored while nobody was there. A
    /// file of another size is none that a front-end could still use, and makes room for a new one.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn doorbells(&self, bytes: usize) -> io::Result<Arc<DoorbellWindow>> {
        let Some(place) = &self.place else {
            return DoorbellWindow::new(bytes);
        };
        let open = || place.file(DOORBELLS, OFlags::RDWR | OFlags::CREATE);
        match DoorbellWindow::over(open()?, bytes) {
            Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                tracing::warn!(dir = %place.path.display(), "{e}; it is replaced");
                std::fs::remove_file(place.path.join(DOORBELLS))?;
                DoorbellWindow::over(open()?, bytes)
            }
            result => result,
        }
    }

    /// Let go of the directory, so that another process can have it.
    pub fn unlock(&self) {
        if let Some(place) = &self.place {
            *place.held() = None;
        }
        // What it publishes is what counts then.
        *self.generations() = Generations::default();
    }

    /// Take the directory again after [`Self::unlock`].
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn lock(&self, wait: Duration) -> Result<(), KeepError> {
        self.place.as_ref().map_or(Ok(()), |place| place.lock(wait))
    }

    /// Remove the directory with all that is in it, if it is ours at the moment: nobody is going to ask for it.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn clear(&self) -> io::Result<()> {
        if let Some(place) = &self.place {
            let held = place.held().take();
            if held.is_some() {
                place.remove_elsewhere();
                // Whoever waits for the lock sees that the file it locks is no longer there.
                std::fs::remove_dir_all(&place.path)?;
            }
        }
        *self.generations() = Generations::default();
        Ok(())
    }

    fn generations(&self) -> std::sync::MutexGuard<'_, Generations> {
        self.generations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was left in a directory.
fn read(dir: &Path) -> Result<Option<Arc<StateFile>>, KeepError> {
    match open_in(dir, STATE, OFlags::RDONLY) {
        Ok(file) => StateFile::read(&file).map(Some),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(KeepError::io("cannot open the state", e)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
    use std::sync::atomic::Ordering;

    use super::super::place::{LOCK, LOCK_WAIT};
    use super::*;
    use crate::memory::crash_point::Crash;

    const SHAPE: Shape = Shape {
        pollers: 1,
        slots: 1,
    };
    const NOW: Duration = Duration::ZERO;

    fn image(keep: &Keep) -> Option<Vec<u8>> {
        keep.current().unwrap().and_then(|state| state.image())
    }

    #[test]
    fn the_generation_that_counts_is_the_one_published_last_here_and_for_who_comes_after() {
        let root = tempfile::tempdir().unwrap();
        let socket = root.path().join("a.sock");
        let open = || Keep::open(root.path(), &socket, NOW).unwrap();
        let mut keeps = vec![Keep::nowhere(), open()];
        for keep in &mut keeps {
            assert!(keep.current().unwrap().is_none());
            for n in 0..3u8 {
                let state = keep.begin(SHAPE).unwrap();
                state.commit(&[n]).unwrap();
                let before = (n > 0).then(|| vec![n - 1]);
                assert_eq!(image(keep), before);
                if keep.path().is_some() {
                    keep.unlock();
                    *keep = open();
                    assert_eq!(image(keep), before);
                    assert!(keep.publish(state).is_err(), "it is gone");
                    let state = keep.begin(SHAPE).unwrap();
                    state.commit(&[n]).unwrap();
                    keep.publish(state).unwrap();
                } else {
                    keep.publish(state).unwrap();
                }
                assert_eq!(image(keep), Some(vec![n]));
            }
            let first = keep.begin(SHAPE).unwrap();
            let second = keep.begin(SHAPE).unwrap();
            assert!(keep.publish(first).is_err());
            assert!(keep.publish(second).is_err(), "the attempt was the last");
            let crash = Crash::after(0);
            let dead = keep.begin(SHAPE).unwrap();
            keep.publish(dead).unwrap();
            keep.forget().unwrap();
            drop(crash);
            assert_eq!(image(keep), Some(vec![2]));
            keep.forget().unwrap();
            keep.forget().unwrap();
            assert_eq!(image(keep), None);
            if keep.path().is_some() {
                keep.unlock();
                assert_eq!(image(&open()), None);
            }
        }
    }

    #[test]
    fn one_process_at_a_time_has_it_and_who_waits_gets_it() {
        let root = tempfile::tempdir().unwrap();
        let socket = root.path().join("b.sock");
        let open = |wait| Keep::open(root.path(), &socket, wait);
        let first = open(NOW).unwrap();
        let path = first.path().unwrap().to_owned();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o700);
        let busy = open(NOW).err().unwrap();
        let me = std::process::id();
        assert!(matches!(&busy, KeepError::Busy { pid: Some(pid), .. } if *pid == me));
        assert!(
            busy.to_string()
                .contains(&format!("another process ({me})"))
        );
        let other = Keep::open(root.path(), &root.path().join("c.sock"), NOW);
        assert!(other.is_ok(), "another controller's is another");
        std::thread::scope(|s| {
            let second = s.spawn(|| open(LOCK_WAIT));
            std::thread::sleep(Duration::from_millis(50));
            first.clear().unwrap();
            let second = second.join().unwrap().unwrap();
            assert!(path.join(LOCK).exists(), "not the one that was removed");
            assert!(open(NOW).is_err());
            first.clear().unwrap();
            assert!(path.exists(), "not ours any more");
            assert!(first.lock(NOW).is_err());
            second.unlock();
            first.lock(NOW).unwrap();
            first.clear().unwrap();
            assert!(!path.exists());
        });
    }

    #[test]
    fn places_that_others_could_write_to_and_states_of_others_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let socket = root.path().join("d.sock");
        let open = || Keep::open(root.path(), &socket, NOW);
        let path = directory(root.path(), &socket).unwrap();
        let refused = |why: &str| {
            let error = open().err().unwrap();
            assert!(matches!(error, KeepError::NotOurs { .. }), "{error}");
            assert!(error.to_string().contains(why), "{error}");
        };
        std::fs::write(&path, "").unwrap();
        refused("is not a directory");
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/tmp", &path).unwrap();
        refused("is not a directory");
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        let mode = |mode| {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        mode(0o710);
        refused("can be used by others");
        mode(0o700);
        let keep = open().unwrap();
        std::fs::write(
            path.join(STATE),
            "something else, long enough to hold a header ........",
        )
        .unwrap();
        assert!(matches!(keep.current(), Err(KeepError::Damaged(_))));
        let state = keep.begin(SHAPE).unwrap();
        keep.publish(state).unwrap();
        assert!(keep.current().unwrap().is_some());
        drop(keep);
        std::fs::remove_file(path.join(STATE)).unwrap();
        std::os::unix::fs::symlink("/dev/zero", path.join(STATE)).unwrap();
        assert!(matches!(
            open().unwrap().current(),
            Err(KeepError::Io { .. })
        ));
        assert!(Keep::open(Path::new("/no/such"), &socket, NOW).is_err());
    }

    #[test]
    fn doorbells_are_the_same_file_for_ever_if_they_have_the_right_size() {
        let root = tempfile::tempdir().unwrap();
        let keep = Keep::open(root.path(), &root.path().join("e.sock"), NOW).unwrap();
        let file = keep.path().unwrap().join(DOORBELLS);
        let inode = || std::fs::metadata(&file).unwrap().ino();
        let first = keep.doorbells(4096).unwrap();
        let before = inode();
        first.register(8).unwrap().store(3, Ordering::Release);
        let second = keep.doorbells(4096).unwrap();
        assert_eq!(
            (inode(), second.register(8).unwrap().load(Ordering::Acquire)),
            (before, 3)
        );
        let third = keep.doorbells(8192).unwrap();
        assert_ne!(inode(), before);
        assert_eq!(third.register(8).unwrap().load(Ordering::Acquire), 0);
        assert!(Keep::nowhere().doorbells(4096).unwrap().cut_fd().is_none());
    }

    #[test]
    fn a_place_is_known_by_its_socket_however_that_is_named() {
        let root = tempfile::tempdir().unwrap();
        let at = |socket: PathBuf| directory(Path::new("/r"), &socket).unwrap();
        let plain = at(root.path().join("vm 1.sock"));
        let name = plain.file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with("vm-1-sock-") && name.len() == 22, "{name}");
        std::os::unix::fs::symlink(root.path(), root.path().join("l")).unwrap();
        assert_eq!(at(root.path().join("l/./vm 1.sock")), plain);
        assert_ne!(at(root.path().join("vm-1.sock")), plain);
        assert_eq!(at("/no/such/x".into()), at("/no/such/x".into()));
    }
}
