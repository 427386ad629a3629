//! The place of each controller on disk, out of the configuration.

use std::io::{self, Read as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::config::{Config, ControllerSpec, Socket, StateDir};
use crate::state::{self, Keep, KeepError, LOCK_WAIT};

/// What the directory is called where it has no other name.
const NAME: &str = "vhost-user-nvme";

/// Why the controllers' places cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// A controller's place.
    #[error("controller '{name}': {source}")]
    Keep {
        /// The controller.
        name: String,
        /// The cause.
        source: KeepError,
    },
    /// The directory of them all.
    #[error(
        "the state directory {} cannot be made: {source}; choose another --state-dir, or none",
        dir.display()
    )]
    Root {
        /// The directory.
        dir: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// A place for each controller of a configuration.
pub struct Keeps(Vec<Arc<Keep>>);

impl Keeps {
    /// Have them all, after whoever had them before has let go of them.
    ///
    /// # Errors
    ///
    /// [`PlaceError`].
    pub fn open(config: &Config) -> Result<Self, PlaceError> {
        let root = root(&config.state_dir)?;
        let open = |spec: &ControllerSpec| match (&root, &spec.socket) {
            (Some(root), Socket::Path { path, .. }) => {
                Keep::open(root, path, LOCK_WAIT).map_err(|source| PlaceError::Keep {
                    name: spec.name.clone(),
                    source,
                })
            }
            _ => Ok(Keep::nowhere()),
        };
        let keeps = config.controllers.iter();
        Ok(Self(
            keeps
                .map(|spec| open(spec).map(Arc::new))
                .collect::<Result<_, PlaceError>>()?,
        ))
    }

    /// How long to wait for what an SSD's or a file's last user may still be about to let go of.
    pub fn patience(&self) -> Duration {
        let longest = self.0.iter().map(|keep| patience(keep)).max();
        longest.unwrap_or_default()
    }

    /// That of the controller at a place of the configuration.
    pub fn of(&self, controller: usize) -> &Arc<Keep> {
        // There is one for each.
        &self.0[controller]
    }

    /// The orderly end: what nobody is going to ask for is removed. `missed`: which controllers have a front-end that will be back.
    pub fn end(&self, missed: &[bool]) {
        for (keep, missed) in self.0.iter().zip(missed) {
            let Some(dir) = keep.path() else { continue };
            let dir = dir.display();
            if *missed {
                tracing::info!(%dir, "what its guest needs to go on is kept; if that guest is gone for good, remove the directory");
            } else if let Err(e) = keep.clear() {
                tracing::warn!(%dir, "cannot remove the state of a controller: {e}");
            }
        }
    }
}

/// The directory of all controllers' places, which is made if need be; `None`: nothing is to survive, or nothing can.
fn root(dir: &StateDir) -> Result<Option<PathBuf>, PlaceError> {
    let Some(root) = path(dir) else {
        return Ok(None);
    };
    match make(&root) {
        Ok(()) => {}
        Err(source) if *dir != StateDir::Default => {
            return Err(PlaceError::Root { dir: root, source });
        }
        Err(e) => {
            tracing::warn!(
                dir = %root.display(),
                "the state directory cannot be made ({e}): guests lose their disks with this process; choose another --state-dir, or none"
            );
            return Ok(None);
        }
    }
    if !state::is_tmpfs(&root) {
        tracing::warn!(
            dir = %root.display(),
            "the state directory is not on tmpfs: the state is written to a disk over and over, and memory namespaces are not kept; choose another --state-dir"
        );
    }
    Ok(Some(root))
}

/// Where the state of all controllers is kept; `None`: nowhere.
pub fn path(dir: &StateDir) -> Option<PathBuf> {
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty());
    match dir {
        StateDir::None => None,
        StateDir::At(path) => Some(path.clone()),
        // systemd can name several.
        StateDir::Default => var("RUNTIME_DIRECTORY")
            .and_then(|v| std::env::split_paths(&v).next())
            .or_else(|| {
                let root = rustix::process::geteuid().is_root();
                root.then(|| roots_place().join(NAME))
            })
            .or_else(|| var("XDG_RUNTIME_DIR").map(|v| Path::new(&v).join(NAME))),
    }
}

/// Where root's directories on tmpfs are: in a container not always where they belong.
fn roots_place() -> &'static Path {
    let places = [Path::new("/run"), Path::new("/dev/shm")];
    let tmpfs = places.into_iter().find(|place| state::is_tmpfs(place));
    tmpfs.unwrap_or(places[0])
}

fn make(root: &Path) -> io::Result<()> {
    let made = std::fs::DirBuilder::new().mode(0o700).create(root);
    match made {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let meta = std::fs::metadata(root)?;
    if !meta.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    // Whoever may rename a directory of ours could put another in its place.
    let (mode, owner) = (meta.mode(), meta.uid());
    let ours = owner == rustix::process::geteuid().as_raw() || owner == 0;
    if mode & 0o1000 == 0 && (mode & 0o022 != 0 || !ours) {
        let text = "others can write to it";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
    }
    Ok(rustix::fs::access(
        root,
        rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK,
    )?)
}

/// How long to wait for what the user before us of a controller's stores may still be about to let go of: not at all, if there was none
/// or it ended in order.
pub fn patience(keep: &Keep) -> Duration {
    match keep.had_predecessor() {
        true => LOCK_WAIT,
        false => Duration::ZERO,
    }
}

/// Where a controller's place is, if it has one.
fn directory(config: &Config, spec: &ControllerSpec) -> Option<PathBuf> {
    match (path(&config.state_dir)?, &spec.socket) {
        (root, Socket::Path { path, .. }) => state::directory(&root, path).ok(),
        _ => None,
    }
}

/// Whether there is something that another process left, or has.
pub fn had_predecessor(config: &Config, spec: &ControllerSpec) -> bool {
    directory(config, spec).is_some_and(|dir| dir.exists())
}

/// Whether the process that has a controller is about to end, and its socket with it: killed, but its I/O keeps it.
pub fn is_dying(config: &Config, spec: &ControllerSpec) -> bool {
    let Some(pid) = directory(config, spec).and_then(|dir| state::owner(&dir)) else {
        return false;
    };
    let mut stat = String::new();
    let read = std::fs::File::open(format!("/proc/{pid}/stat"))
        .and_then(|file| file.take(4096).read_to_string(&mut stat));
    // Behind the name, which can hold anything: Z and X are the ends of a process's first thread.
    let state = stat
        .rsplit(')')
        .next()
        .and_then(|s| s.trim_start().chars().next());
    read.is_ok() && matches!(state, Some('Z' | 'X'))
}

/// What there is for a controller, for who checks a configuration.
///
/// # Errors
///
/// As [`Keeps::open`], as far as it can be told without making anything.
pub fn describe(config: &Config, spec: &ControllerSpec) -> Result<String, KeepError> {
    let (Some(root), Socket::Path { path, .. }) = (path(&config.state_dir), &spec.socket) else {
        return Ok("nothing survives the daemon".into());
    };
    let dir = state::directory(&root, path)?;
    let found = Keep::look(&root, path);
    let dir = dir.display();
    Ok(match found {
        Ok(None) => format!("no state yet; it will be kept in {dir}"),
        Ok(Some(state)) => match state.image() {
            None => format!("state in {dir}, of no guest yet"),
            Some(image) => format!(
                "state in {dir}: {} bytes, and journals of {} pollers",
                image.len(),
                state.shape().pollers
            ),
        },
        // The daemon starts all the same.
        Err(e @ (KeepError::Layout { .. } | KeepError::Damaged(_))) => format!(
            "state in {dir} that cannot be used: {e}; a guest that is still there has to reset its disk"
        ),
        Err(e) => return Err(e),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_is_made_and_one_that_cannot_be_is_an_error_if_it_was_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| StateDir::At(dir.path().join(name));
        let made = root(&at("state")).unwrap().unwrap();
        assert!(made.is_dir());
        assert_eq!(root(&at("state")).unwrap(), Some(made));
        std::fs::write(dir.path().join("file"), "").unwrap();
        for name in ["no/such", "file"] {
            let error = root(&at(name)).unwrap_err().to_string();
            assert!(error.contains("--state-dir"), "{error}");
        }
        assert_eq!(root(&StateDir::None).unwrap(), None);
        std::fs::create_dir(dir.path().join("open")).unwrap();
        for (mode, good) in [
            (0o777, false),
            (0o775, false),
            (0o1777, true),
            (0o755, true),
        ] {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
            std::fs::set_permissions(dir.path().join("open"), mode).unwrap();
            assert_eq!(root(&at("open")).is_ok(), good);
        }
    }
}
