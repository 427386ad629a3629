//! The side that hands over.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::wire::{PROTOCOL, Socket, ToNew, ToOld, Wire, WireError};
use super::{VARIABLE, VERSION};
use crate::state::LAYOUT;
use crate::systemd::NOT_INHERITED;
use crate::transport::{Left, SocketFile};

/// How long the new program may take to say whether it would go on.
const PREPARE_LIMIT: Duration = Duration::from_secs(10);

/// How long it may take to serve: it waits for locks, and SSDs are brought up.
const SERVE_LIMIT: Duration = Duration::from_secs(60);

/// How long a process that has closed its socket may take to end.
const END_LIMIT: Duration = Duration::from_secs(1);

/// This program, as it was when it started, wherever it is now.
const THIS: &str = "/proc/self/exe";

/// Where the program is that this process was started from, and where a newer one will be.
pub fn program() -> PathBuf {
    if let Some(said) = std::env::var_os(VARIABLE) {
        return said.into();
    }
    let running = std::env::current_exe().unwrap_or_else(|_| THIS.into());
    // As it was called, if that is it: links are followed anew then.
    let called = std::env::args_os().next().map(PathBuf::from);
    let called = called.filter(|path| path.components().count() > 1);
    let called = called.and_then(|path| std::path::absolute(path).ok());
    let same = |path: &PathBuf| {
        let (a, b) = (std::fs::canonicalize(path), std::fs::canonicalize(&running));
        matches!((a, b), (Ok(a), Ok(b)) if a == b)
    };
    called.filter(same).unwrap_or(running)
}

/// Everything there is of a controller outside of its state.
pub type Leaving = (SocketFile, Left);

/// A process that is to take over. It is killed when this is dropped before it serves.
pub struct Successor {
    child: Child,
    wire: Wire,
    version: String,
    serves: bool,
}

impl Drop for Successor {
    fn drop(&mut self) {
        if !self.serves {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Start the program at `path` and ask it whether it could go on with these sockets. Given up when `wanted` says no.
///
/// # Errors
///
/// Why it could not.
pub fn prepare(
    path: &Path,
    sockets: &[PathBuf],
    wanted: &dyn Fn() -> bool,
) -> Result<Successor, String> {
    start(path, path, sockets, wanted)
}

/// As [`prepare`], with the program that is running now, when a newer one at `path` has failed.
///
/// # Errors
///
/// Why it could not.
pub fn again(path: &Path, sockets: &[PathBuf]) -> Result<Successor, String> {
    start(Path::new(THIS), path, sockets, &|| true)
}

fn start(
    file: &Path,
    path: &Path,
    sockets: &[PathBuf],
    wanted: &dyn Fn() -> bool,
) -> Result<Successor, String> {
    let (ours, theirs) = UnixStream::pair().map_err(|e| e.to_string())?;
    let mut command = Command::new(file);
    command
        .arg0(path)
        .args(std::env::args_os().skip(1))
        .env(VARIABLE, path)
        .stdin(Stdio::from(OwnedFd::from(theirs)));
    for variable in NOT_INHERITED {
        command.env_remove(variable);
    }
    let child = command
        .spawn()
        .map_err(|e| format!("{} cannot be started: {e}", path.display()))?;
    // The other end of the socket is closed with it.
    drop(command);
    let mut successor = Successor {
        child,
        wire: Wire::new(ours),
        version: String::new(),
        serves: false,
    };
    let named = |why| format!("{}: {why}", path.display());
    successor.ask(sockets, wanted).map_err(named)?;
    Ok(successor)
}

impl Successor {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Version of its program.
    pub fn version(&self) -> &str {
        &self.version
    }

    fn ask(&mut self, sockets: &[PathBuf], wanted: &dyn Fn() -> bool) -> Result<(), String> {
        let offer = ToNew::Offer {
            protocol: PROTOCOL,
            version: VERSION.into(),
            layout: LAYOUT,
            sockets: sockets.iter().map(|path| bytes_of(path)).collect(),
        };
        let sent = self.wire.send(&offer, &[]);
        let answer = match sent {
            // It may have said something before it went away.
            Ok(()) | Err(WireError::Socket(_)) => self.wire.receive(PREPARE_LIMIT, wanted),
            Err(e) => Err(e),
        };
        match answer {
            Ok((ToOld::Able { version, layouts }, _)) => {
                if !layouts.contains(&LAYOUT) {
                    return Err(format!(
                        "version {version} does not know layout {LAYOUT} of the state, which is ours; it knows {layouts:?}"
                    ));
                }
                self.version = version;
                Ok(())
            }
            Ok((ToOld::Unable { why }, _)) => Err(why),
            Ok((ToOld::Serving, _)) => Err("it says that it serves, and cannot".into()),
            Err(e) => Err(self.end_of(e)),
        }
    }

    /// Why nothing came: the exit status tells more than the socket.
    fn end_of(&mut self, error: WireError) -> String {
        match error {
            WireError::Gone | WireError::Socket(_) => match self.wait(END_LIMIT) {
                Some(status) => format!("it ended with {status}"),
                None => error.to_string(),
            },
            _ => error.to_string(),
        }
    }

    fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let start = Instant::now();
        while start.elapsed() < limit {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(2)),
                ended => return ended.ok().flatten(),
            }
        }
        None
    }

    /// Pass everything on. `before_it_begins` is called when all has been sent but the word to begin.
    ///
    /// # Errors
    ///
    /// Why it does not serve; the process is killed.
    pub fn hand_over(
        mut self,
        leaving: &[Leaving],
        pid_file: Option<&File>,
        before_it_begins: impl FnOnce(u32),
    ) -> Result<Self, String> {
        let result = self.pass(leaving, pid_file, before_it_begins);
        match result {
            Ok(()) => {
                self.serves = true;
                Ok(self)
            }
            Err(why) => Err(why),
        }
    }

    fn pass(
        &mut self,
        leaving: &[Leaving],
        pid_file: Option<&File>,
        before_it_begins: impl FnOnce(u32),
    ) -> Result<(), String> {
        for (file, left) in leaving {
            let (path, identity) = file.identity();
            let mut files = vec![left.listener.as_fd()];
            if let Some((stream, carried)) = &left.connection {
                files.push(stream.as_fd());
                files.extend(carried.parts().1.iter().map(AsFd::as_fd));
            }
            let connection = left
                .connection
                .as_ref()
                .map(|(_, carried)| carried.parts().0);
            let socket = ToNew::Socket(Socket {
                path: bytes_of(path),
                identity,
                connection: connection.cloned(),
            });
            if let Err(e) = self.wire.send(&socket, &files) {
                return Err(self.end_of(e));
            }
        }
        before_it_begins(self.pid());
        let files: Vec<BorrowedFd<'_>> = pid_file.iter().map(|file| file.as_fd()).collect();
        let sent = self.wire.send(&ToNew::Go, &files);
        let answer = match sent {
            Ok(()) => self.wire.receive(SERVE_LIMIT, &|| true),
            Err(e) => Err(e),
        };
        match answer {
            Ok((ToOld::Serving, _)) => Ok(()),
            Ok((ToOld::Unable { why }, _)) => Err(why),
            Ok((ToOld::Able { .. }, _)) => Err("it says the wrong thing".into()),
            Err(e) => Err(self.end_of(e)),
        }
    }
}

fn bytes_of(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}
