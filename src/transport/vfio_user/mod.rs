//! vfio-user: the controller as a PCI device at a Unix socket, for VMMs as they are.
//!
//! A [`connection`] takes messages off the socket ([`message`]), has a [`device::Device`] carry them out, and sends its answers. The device
//! is made of a configuration space ([`pci`]), a BAR ([`bar`]), interrupts ([`irq`]) and the memory it may reach ([`dma`]).
//! `docs/adr/0014-a-vfio-user-server-of-our-own.md` says why the crate `vfio_user` is not used.

mod bar;
mod connection;
mod device;
mod dma;
mod irq;
mod message;
mod pci;

pub(super) use connection::serve;
pub use connection::{Carried, Image};

/// Why a message was refused: the error number of its answer, and words for the log.
#[derive(Debug)]
struct Refusal {
    errno: rustix::io::Errno,
    why: String,
}

impl Refusal {
    fn new(errno: rustix::io::Errno, why: impl Into<String>) -> Self {
        Self {
            errno,
            why: why.into(),
        }
    }

    /// `EINVAL`.
    fn invalid(why: impl Into<String>) -> Self {
        Self::new(rustix::io::Errno::INVAL, why)
    }
}
