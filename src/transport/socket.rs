//! The socket a controller is reached at: a file we make and remove, or a file descriptor we were given.

#![expect(
    unsafe_code,
    reason = "the fence: a file descriptor that was inherited by number"
)]

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use super::Carried;

/// Why a controller cannot be reached at a socket: what is wrong, and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {hint}")]
pub struct SocketError {
    what: String,
    hint: String,
    #[source]
    source: Option<io::Error>,
}

impl SocketError {
    fn new(what: String, hint: &str) -> Self {
        Self {
            what,
            hint: hint.into(),
            source: None,
        }
    }

    fn io(what: String, source: io::Error) -> Self {
        Self {
            what,
            hint: source.to_string(),
            source: Some(source),
        }
    }
}

/// Where front-ends come from.
pub enum Endpoint {
    /// They connect to this socket, again and again.
    Listening(UnixListener),
    /// There is one front-end, and this is it.
    Connected(UnixStream),
    /// A socket that another process has listened on, with a connection of vfio-user that it has begun.
    Taken(UnixListener, Option<(UnixStream, Carried)>),
}

/// A socket file of ours; removed when this is dropped, unless somebody has put another one in its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
    /// Somebody else goes on with it.
    kept: bool,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if !self.kept && identity(&self.path).is_some_and(|i| i == self.identity) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let m = std::fs::symlink_metadata(path).ok()?;
    Some((m.dev(), m.ino()))
}

/// The longest path a Unix socket can have.
pub const MAX_PATH: usize = 107;

impl SocketFile {
    /// Check that a socket can be made at `path`, without making it.
    ///
    /// # Errors
    ///
    /// [`SocketError`]: the path is too long, its directory does not exist or may not be written, or there is something
    /// there that is no socket.
    pub fn check_place(path: &Path) -> Result<(), SocketError> {
        let shown = path.display();
        if path.as_os_str().len() > MAX_PATH {
            return Err(SocketError::new(
                format!("the socket path {shown} is too long"),
                &format!("a Unix socket's has at most {MAX_PATH} bytes"),
            ));
        }
        let parent = match path.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        if !parent.is_dir() {
            return Err(SocketError::new(
                format!("the socket {shown} cannot be made"),
                &format!("there is no directory {}; make it first", parent.display()),
            ));
        }
        if rustix::fs::access(
            parent,
            rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK,
        )
        .is_err()
        {
            return Err(SocketError::new(
                format!("the socket {shown} cannot be made"),
                &format!(
                    "this user may not write to {}; choose another directory or give the right to",
                    parent.display()
                ),
            ));
        }
        match std::fs::symlink_metadata(path) {
            Ok(m) if !m.file_type().is_socket() => Err(SocketError::new(
                format!("{shown} exists and is not a socket"),
                "remove it or choose another --socket-path",
            )),
            _ => Ok(()),
        }
    }

    /// Check that a socket can be made at `path`, and that nobody listens there.
    ///
    /// # Errors
    ///
    /// As [`Self::check_place`]; also when somebody listens.
    pub fn check(path: &Path) -> Result<(), SocketError> {
        Self::check_place(path)?;
        let shown = path.display();
        match UnixStream::connect(path) {
            Ok(_) => Err(SocketError::new(
                format!("the socket {shown} is in use"),
                "a process listens there; stop it or choose another --socket-path",
            )),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
                ) =>
            {
                Ok(())
            }
            Err(e) => Err(SocketError::io(
                format!("the socket {shown} exists, and who listens there cannot be found out"),
                e,
            )),
        }
    }

    /// The socket at `path` that another process of ours has made. It is that one's until [`Self::own`] is called.
    pub fn of_another(path: &Path, identity: (u64, u64)) -> Self {
        Self {
            path: path.to_owned(),
            identity,
            kept: true,
        }
    }

    /// It is ours to remove.
    pub fn own(&mut self) {
        self.kept = false;
    }

    /// Do not remove it.
    pub fn leave(&mut self) {
        self.kept = true;
    }

    /// Its path, and device and inode.
    pub fn identity(&self) -> (&Path, (u64, u64)) {
        (&self.path, self.identity)
    }

    /// Make the socket and listen on it. What a dead process left at `path` is replaced.
    ///
    /// # Errors
    ///
    /// As [`Self::check`]; also when the kernel refuses.
    pub fn listen(
        path: &Path,
        mode: Option<u32>,
        group: Option<u32>,
    ) -> Result<(Self, Endpoint), SocketError> {
        Self::check(path)?;
        let failed = cannot_be_made(path);
        if path.symlink_metadata().is_ok() {
            std::fs::remove_file(path).map_err(&failed)?;
        }
        let listener = UnixListener::bind(path).map_err(&failed)?;
        let file = Self {
            path: path.to_owned(),
            identity: identity(path).unwrap_or_default(),
            kept: false,
        };
        Self::permit(path, mode, group)?;
        Ok((file, Endpoint::Listening(listener)))
    }

    /// Say who may connect.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn permit(path: &Path, mode: Option<u32>, group: Option<u32>) -> Result<(), SocketError> {
        if let Some(group) = group {
            std::os::unix::fs::chown(path, None, Some(group)).map_err(|e| {
                SocketError::io(
                    format!(
                        "the socket {} cannot be given to group {group}",
                        path.display()
                    ),
                    e,
                )
            })?;
        }
        if let Some(mode) = mode {
            let permissions = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(path, permissions).map_err(cannot_be_made(path))?;
        }
        Ok(())
    }
}

fn cannot_be_made(path: &Path) -> impl Fn(io::Error) -> SocketError {
    let what = format!("the socket {} cannot be made", path.display());
    move |e| SocketError::io(what.clone(), e)
}

fn bad_fd(number: RawFd, hint: &str) -> SocketError {
    SocketError::new(format!("file descriptor {number} (--fd)"), hint)
}

impl Endpoint {
    /// Check that `number` can be an inherited file descriptor, without taking it.
    ///
    /// # Errors
    ///
    /// It is not open, or one of the standard streams.
    pub fn check(number: RawFd) -> Result<(), SocketError> {
        if (0..3).contains(&number) {
            return Err(bad_fd(
                number,
                "is one of stdin, stdout and stderr; pass a socket as 3 or above",
            ));
        }
        if std::fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_err() {
            return Err(bad_fd(
                number,
                "is not open; the starting process must pass it on",
            ));
        }
        Ok(())
    }

    /// The socket that this process was started with as file descriptor `number`: listening or connected.
    ///
    /// # Errors
    ///
    /// As [`Self::check`]; also when it is not a Unix stream socket.
    pub fn inherited(number: RawFd) -> Result<Self, SocketError> {
        Self::check(number)?;
        // SAFETY: it is open, and the operator says by the option that it is ours: nothing else in this process made it.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        let unix = rustix::net::sockopt::socket_domain(&fd) == Ok(rustix::net::AddressFamily::UNIX)
            && rustix::net::sockopt::socket_type(&fd) == Ok(rustix::net::SocketType::STREAM);
        if !unix {
            // Not ours to close, after all.
            std::mem::forget(fd);
            return Err(bad_fd(number, "is not a Unix stream socket"));
        }
        let _ = rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC);
        match rustix::net::sockopt::socket_acceptconn(&fd) {
            Ok(true) => Ok(Self::Listening(fd.into())),
            _ => Ok(Self::Connected(fd.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_file_is_made_kept_from_others_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (file, endpoint) = SocketFile::listen(&path, Some(0o600), None).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let e = SocketFile::listen(&path, None, None)
            .err()
            .unwrap()
            .to_string();
        assert!(e.contains("is in use: a process listens there"), "{e}");
        drop(file);
        assert!(!path.exists());
        drop(endpoint);
        // Left behind by a process that died: nobody listens.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let (file, _endpoint) = SocketFile::listen(&path, None, None).unwrap();
        // Somebody else's in its place is not removed.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "x").unwrap();
        drop(file);
        assert!(path.exists());
        let e = SocketFile::check(&path).unwrap_err().to_string();
        assert!(e.contains("exists and is not a socket"), "{e}");
    }

    #[test]
    fn places_where_no_socket_can_be() {
        let e = SocketFile::check(Path::new("/no/such/dir/s")).unwrap_err();
        assert!(e.to_string().contains("there is no directory /no/such/dir"));
        let long = format!("/tmp/{}", "x".repeat(200));
        let e = SocketFile::check(Path::new(&long)).unwrap_err();
        assert!(e.to_string().contains("at most 107 bytes"));
    }

    #[test]
    fn file_descriptors_that_are_no_sockets() {
        let e = Endpoint::inherited(1).err().unwrap().to_string();
        assert!(e.contains("is one of stdin"), "{e}");
        let e = Endpoint::inherited(9999).err().unwrap().to_string();
        assert!(e.contains("is not open"), "{e}");
    }
}
