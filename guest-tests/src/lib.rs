//! The virtual guest: a vhost-user front-end, or a vfio-user client, with an NVMe driver in it, in process.
//!
//! - [`FrontEnd`] is the VMM's side of a socket, in the words of the [`transport`]: guest memory in memfds, registers,
//!   doorbells (trapped and mapped), interrupts. It is a [`Device`](vhost_user_nvme::driver::Device), so that the driver of the
//!   daemon runs on it: that is the virtual guest. [`FrontEnd::surviving`] goes on when the daemon is killed and started again.
//! - [`io`] does commands and waits for them; [`raw`] is a guest that does as it likes: its own queues, any command, any doorbell value.
//! - [`daemon`] starts the daemon under test in this process, [`program`] as one of its own.

mod bell;
pub mod daemon;
mod fence;
pub mod frontend;
mod handler;
pub mod io;
pub mod memory;
pub mod program;
pub mod raw;
pub mod rng;
pub mod service;
pub mod session;
pub mod vfio;

pub use frontend::{FrontEnd, FrontEndError, transport};
pub use memory::GuestMemory;
