//! The side that takes over.

use std::ffi::OsString;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::wire::{PROTOCOL, Socket, ToNew, ToOld, Wire};
use super::{VARIABLE, VERSION, layouts};
use crate::transport::{Carried, Endpoint, SocketFile, Transport};

/// How long the offer may take to come.
const OFFER_LIMIT: Duration = Duration::from_secs(10);

/// How long the old process may take to let go of everything.
const GO_LIMIT: Duration = Duration::from_secs(120);

/// A process that this one is to take over from.
pub struct Taking {
    wire: Wire,
    sockets: Vec<PathBuf>,
}

impl Taking {
    /// What the environment says of a process to take over from, and its offer.
    ///
    /// # Errors
    ///
    /// There is one, and it cannot be understood; it has been told.
    pub fn of_this_process() -> Result<Option<Self>, String> {
        if std::env::var_os(VARIABLE).is_none() {
            return Ok(None);
        }
        let stdin = std::io::stdin().as_fd().try_clone_to_owned();
        let stdin = stdin.map_err(|e| e.to_string())?;
        // A daemon that was told so by an upgrade, and is started anew by hand, has no socket there.
        if rustix::net::sockopt::socket_domain(&stdin) != Ok(rustix::net::AddressFamily::UNIX) {
            return Err(format!(
                "{VARIABLE} is set, but standard input is no socket of a process to take over from; unset it"
            ));
        }
        Self::over(UnixStream::from(stdin)).map(Some)
    }

    fn over(stream: UnixStream) -> Result<Self, String> {
        let wire = Wire::new(stream);
        let (offer, _) = wire
            .receive(OFFER_LIMIT, &|| true)
            .map_err(|e| e.to_string())?;
        let refusal = match &offer {
            ToNew::Offer { protocol, .. } if *protocol != PROTOCOL => Some(format!(
                "version {VERSION} does not understand version {protocol} of the hand-over; it knows {PROTOCOL}"
            )),
            ToNew::Offer {
                layout, version, ..
            } if !layouts().contains(layout) => Some(format!(
                "version {VERSION} does not know layout {layout} of the state, which version {version} has; it knows {:?}",
                layouts()
            )),
            ToNew::Offer { .. } => None,
            _ => Some("the process to take over from says the wrong thing".into()),
        };
        let mut taking = Self {
            wire,
            sockets: Vec::new(),
        };
        if let Some(why) = refusal {
            taking.unable(&why);
            return Err(why);
        }
        if let ToNew::Offer { sockets, .. } = offer {
            taking.sockets = sockets.into_iter().map(path_of).collect();
        }
        Ok(taking)
    }

    /// Whether this socket is one that is handed over.
    pub fn listens_at(&self, path: &Path) -> bool {
        self.sockets.contains(&absolute(path))
    }

    /// Say that we cannot.
    pub fn unable(&self, why: &str) {
        let _ = self.wire.send(&ToOld::Unable { why: why.into() }, &[]);
    }

    /// Say that we can, and wait for everything.
    ///
    /// # Errors
    ///
    /// It did not come.
    pub fn take(&self, wanted: &dyn Fn() -> bool) -> Result<Taken, String> {
        let able = ToOld::Able {
            version: VERSION.into(),
            layouts: layouts(),
        };
        let failed = |e| format!("nothing was handed over: {e}");
        self.wire.send(&able, &[]).map_err(failed)?;
        let mut sockets = Vec::new();
        loop {
            let (message, mut files) = self.wire.receive(GO_LIMIT, wanted).map_err(failed)?;
            match message {
                ToNew::Socket(socket) => sockets.push(TakenSocket::new(socket, files)?),
                ToNew::Go => {
                    return Ok(Taken {
                        sockets,
                        pid_file: files.pop(),
                    });
                }
                ToNew::Offer { .. } => return Err("there was a second offer".into()),
            }
        }
    }

    /// Say that we serve.
    pub fn serving(&self) {
        if let Err(error) = self.wire.send(&ToOld::Serving, &[]) {
            tracing::warn!("the process before could not be told that this one serves: {error}");
        }
    }
}

/// What was handed over.
#[derive(Default)]
pub struct Taken {
    sockets: Vec<TakenSocket>,
    /// The file of the process id.
    pub pid_file: Option<OwnedFd>,
}

/// A socket that was handed over.
struct TakenSocket {
    path: PathBuf,
    identity: (u64, u64),
    listener: OwnedFd,
    connection: Option<(UnixStream, Carried)>,
}

impl TakenSocket {
    fn new(socket: Socket, files: Vec<OwnedFd>) -> Result<Self, String> {
        let mut files = files.into_iter();
        let missing = || "files are missing from what was handed over".to_owned();
        let listener = files.next().ok_or_else(missing)?;
        let connection = match socket.connection {
            None => None,
            Some(image) => {
                let stream = files.next().ok_or_else(missing)?;
                Some((stream.into(), Carried::new(image, files.collect())))
            }
        };
        Ok(Self {
            path: path_of(socket.path),
            identity: socket.identity,
            listener,
            connection,
        })
    }
}

impl Taken {
    /// The socket at a path, for a controller that speaks `transport` there. Its file is not ours to remove yet.
    pub fn socket(&mut self, path: &Path, transport: Transport) -> Option<(SocketFile, Endpoint)> {
        let path = absolute(path);
        let place = self.sockets.iter().position(|s| s.path == path)?;
        let taken = self.sockets.swap_remove(place);
        // A client of another protocol finds its connection closed.
        let connection = taken
            .connection
            .filter(|_| transport == Transport::VfioUser);
        let file = SocketFile::of_another(&path, taken.identity);
        Some((file, Endpoint::Taken(taken.listener.into(), connection)))
    }

    /// Remove the sockets that nobody wanted.
    pub fn remove_rest(self) {
        for socket in self.sockets {
            tracing::info!(
                "{} is not in the configuration any more",
                socket.path.display()
            );
            SocketFile::of_another(&socket.path, socket.identity).own();
        }
    }
}

fn path_of(bytes: Vec<u8>) -> PathBuf {
    OsString::from_vec(bytes).into()
}

/// As the other process has it.
pub fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
