//! What the service manager is told: the datagrams of `sd_notify`(3), to the socket that `NOTIFY_SOCKET` names.
//!
//! Without a service manager nothing is sent, and nobody notices.

pub mod watchdog;

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Where messages go.
const SOCKET: &str = "NOTIFY_SOCKET";

/// How long a service manager that does not read may keep us.
const PATIENCE: Duration = Duration::from_millis(500);

/// The way to the service manager. A clone is the same way.
#[derive(Clone, Default)]
pub struct Manager(Option<Arc<To>>);

struct To {
    socket: UnixDatagram,
    address: SocketAddr,
}

impl Manager {
    /// Whoever started us, if it wants to be told.
    pub fn of_this_process() -> Self {
        let Some(name) = std::env::var_os(SOCKET).filter(|name| !name.is_empty()) else {
            return Self(None);
        };
        Self::at(&name).unwrap_or_else(|error| {
            tracing::warn!(
                "the service manager cannot be told anything: {SOCKET} is {name:?}: {error}"
            );
            Self(None)
        })
    }

    /// The one at a socket: a path, or `@` and an abstract name.
    ///
    /// # Errors
    ///
    /// It is neither, or no socket is left.
    pub fn at(name: &OsStr) -> io::Result<Self> {
        let address = match name.as_bytes() {
            [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest)?,
            [b'/', ..] => SocketAddr::from_pathname(name)?,
            _ => {
                return Err(io::Error::other(
                    "it is neither a path nor an abstract name",
                ));
            }
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self(Some(Arc::new(To { socket, address }))))
    }

    /// Whether there is one.
    pub fn is_there(&self) -> bool {
        self.0.is_some()
    }

    /// All controllers can be reached, and this is what there is to say.
    pub fn ready(&self, status: &str) {
        self.tell(&format!("READY=1\nSTATUS={}", line(status)));
    }

    /// An upgrade begins; [`Self::ready`] ends it, whatever comes of it.
    pub fn reloading(&self, status: &str) {
        let now = clock_gettime(ClockId::Monotonic);
        let micros = now.tv_sec.saturating_mul(1_000_000) + now.tv_nsec / 1000;
        self.tell(&format!(
            "RELOADING=1\nMONOTONIC_USEC={micros}\nSTATUS={}",
            line(status)
        ));
    }

    /// The end has begun.
    pub fn stopping(&self, status: &str) {
        self.tell(&format!("STOPPING=1\nSTATUS={}", line(status)));
    }

    /// From now on this process is the service.
    pub fn main_pid(&self, pid: u32) {
        self.tell(&format!("MAINPID={pid}"));
    }

    /// We are alive.
    pub fn pulse(&self) {
        self.tell("WATCHDOG=1");
    }

    fn tell(&self, message: &str) {
        let Some(to) = &self.0 else { return };
        if let Err(error) = to.socket.send_to_addr(message.as_bytes(), &to.address) {
            tracing::debug!("the service manager could not be told {message:?}: {error}");
        }
    }
}

/// Text that cannot be mistaken for another assignment.
fn line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

/// What a process that takes over from this one must not inherit: whose watchdog it is.
pub const NOT_INHERITED: [&str; 1] = [watchdog::PID];

/// An environment variable.
pub(crate) type Variable<'a> = &'a dyn Fn(&str) -> Option<OsString>;

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(from: &UnixDatagram) -> String {
        let mut buffer = [0; 512];
        from.set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let n = from.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..n].to_vec()).unwrap()
    }

    fn say_everything(manager: &Manager, heard: &UnixDatagram) {
        manager.reloading("a new\nbinary");
        let message = receive(heard);
        let rest = message
            .strip_prefix("RELOADING=1\nMONOTONIC_USEC=")
            .unwrap();
        let (micros, status) = rest.split_once('\n').unwrap();
        assert!(micros.parse::<u64>().unwrap() > 0);
        assert_eq!(status, "STATUS=a new binary");
        manager.ready("Serving");
        assert_eq!(receive(heard), "READY=1\nSTATUS=Serving");
        manager.main_pid(77);
        assert_eq!(receive(heard), "MAINPID=77");
        manager.pulse();
        assert_eq!(receive(heard), "WATCHDOG=1");
        manager.stopping("bye");
        assert_eq!(receive(heard), "STOPPING=1\nSTATUS=bye");
    }

    #[test]
    fn sockets_with_a_path_and_abstract_ones() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let heard = UnixDatagram::bind(&path).unwrap();
        say_everything(&Manager::at(path.as_os_str()).unwrap(), &heard);
        let name = format!("vhost-user-nvme-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let heard = UnixDatagram::bind_addr(&address).unwrap();
        let name = OsString::from(format!("@{name}"));
        say_everything(&Manager::at(&name).unwrap(), &heard);
    }

    #[test]
    fn nobody_there_is_no_trouble() {
        assert!(Manager::at(OsStr::new("vsock:2:1234")).is_err());
        assert!(Manager::at(OsStr::new("relative")).is_err());
        let gone = Manager::at(OsStr::new("/no/such/socket")).unwrap();
        gone.ready("x");
        Manager::default().ready("x");
        assert!(gone.is_there() && !Manager::default().is_there());
    }

    #[test]
    fn a_manager_that_does_not_read_does_not_keep_us() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let _deaf = UnixDatagram::bind(&path).unwrap();
        let manager = Manager::at(path.as_os_str()).unwrap();
        let start = std::time::Instant::now();
        let full = (0..1000).any(|_| {
            let before = std::time::Instant::now();
            manager.pulse();
            before.elapsed() >= PATIENCE
        });
        assert!(full, "its queue never got full");
        assert!(start.elapsed() < PATIENCE * 10);
    }
}
