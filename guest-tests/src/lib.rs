//! The virtual guest: a vhost-user front-end with an NVMe driver in it, in process.
//!
//! - [`FrontEnd`] is the VMM's side of a socket, as `docs/VHOST_USER.md` describes it: guest memory in memfds, registers,
//!   doorbells (trapped and mapped), interrupts. It is a [`Device`](vhost_user_nvme::driver::Device), so that the driver of the
//!   daemon runs on it: that is the virtual guest.
//! - [`io`] does commands and waits for them; [`raw`] is a guest that does as it likes: its own queues, any command, any doorbell value.
//! - [`daemon`] starts the daemon under test in this process, [`program`] as one of its own.

pub mod daemon;
mod fence;
pub mod frontend;
mod handler;
pub mod io;
pub mod memory;
pub mod program;
pub mod raw;
pub mod rng;

pub use frontend::{FrontEnd, FrontEndError};
pub use memory::GuestMemory;
