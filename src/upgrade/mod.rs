//! Live upgrade: a new process takes over sockets, state and connections from this one while guests run.
//!
//! The old process ([`give`]) starts the program at its own path with its own arguments, and talks to it over a socket that the new one
//! ([`take`]) has as its standard input. Until the old one stops serving, everything that goes wrong leaves it as it was:
//!
//! 1. The new one reads arguments and configuration, looks at what it can look at, and says which layouts of the state it knows.
//! 2. The old one suspends its controllers, lets go of memory, stores and locks, and passes its listening sockets and the connections of
//!    vfio-user. Nobody who connects is turned away: who comes now waits in the backlog.
//! 3. The new one takes the locks, resumes, says so, and the old one ends. If it fails instead, the old program is started once more in the
//!    same way, and resumes.
//!
//! `docs/UPGRADE.md` is for operators.

#![forbid(unsafe_code)]

pub mod command;
pub mod give;
pub mod pid_file;
pub mod take;
mod wire;

use crate::state::LAYOUT;

/// The environment variable that tells a process to take over, and the path of the program it is.
pub const VARIABLE: &str = "VHOST_USER_NVME_UPGRADE";

/// Version of this program.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The layouts of the state that this program can go on with.
fn layouts() -> Vec<u64> {
    vec![LAYOUT]
}
