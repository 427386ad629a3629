//! The front-ends a controller can be attached to. They know the controller; it does not know them.
//!
//! A [`Server`] is a thread that accepts front-ends on one socket, one after the other, and serves each as its [`Transport`] says.

mod failure;
mod server;
mod socket;
pub(crate) mod stream;
mod vfio_user;
mod vhost_user;

pub use server::{Left, Server};
pub use socket::{Endpoint, SocketError, SocketFile};
pub use vfio_user::{Carried, Image as CarriedImage};

use failure::Failure;

/// What is spoken on a socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transport {
    /// vhost-user: QEMU with the device of this project.
    #[default]
    VhostUser,
    /// vfio-user: QEMU from 10.1 on as it is, Cloud Hypervisor.
    VfioUser,
}

/// How a connection ended.
#[derive(Debug)]
enum End {
    /// The front-end closed it.
    Closed,
    /// We were told to stop.
    Stopped,
    /// Something was wrong: what came and why it was refused.
    Refused(String),
}

/// Why a connection ends whose front-end made the doorbells' file shorter.
const DOORBELLS_CUT: &str = "the file of the doorbells was cut while it was mapped";

/// Why the serving of a connection ended early.
struct Ended(End);

fn refused(what: &str, why: impl std::fmt::Display) -> Ended {
    Ended(End::Refused(format!("{what} refused: {why}")))
}

/// Whether a file that a front-end sent is an eventfd, as far as the kernel lets us know.
fn is_eventfd(file: &std::fs::File) -> bool {
    let number = std::os::fd::AsRawFd::as_raw_fd(file);
    let link = std::fs::read_link(format!("/proc/self/fd/{number}"));
    link.map_or(true, |l| l.to_string_lossy().contains("[eventfd]"))
}
