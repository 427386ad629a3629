//! A userspace NVMe host driver, written against a small device seam.
//!
//! The same driver runs whatever has NVMe registers: a physical SSD over VFIO, or, as the *virtual guest* of the tests, the
//! controller this daemon shows to guests. It never trusts the device: a completion for a command that is not out is counted
//! and reported, all waits end, and no number of the device is used as an index unchecked.
//!
//! - [`Device`] is the seam: registers, doorbells, DMA memory, interrupts.
//! - [`Driver`] brings a controller up from any state and speaks on the admin queue.
//! - [`QueuePair`] is the data path: owned by one thread, polled, no allocation and no lock per command.
//! - [`Ssd`] keeps a controller alive whatever it does (timeouts, resets, events, removal); a [`Lane`] is a queue pair of it that
//!   survives that, for one poller.
//! - [`AddressSpace`] is where memory is shown to the device.
//!
//! It knows nothing of guests and nothing of the emulated controller.

mod admin;
mod any;
mod bringup;
pub mod dma;
mod lists;
pub mod pci;
mod queue;
mod shadow;
mod space;
pub mod ssd;
mod tags;
pub mod vfio;

#[cfg(test)]
mod fake;

use std::fs::File;
use std::io;
use std::time::Duration;

use nvme_spec::StatusField;

pub use any::{AnyDevice, erase};
pub use bringup::{Driver, Options};
pub use dma::{Dma, DmaPool};
pub use queue::{Completion, Counters, Fault, QueueConfig, QueuePair, SubmitError, wait_for};
pub use space::{Access, AddressSpace, MapMemoryError, Mapped, POOLS_SPAN, Pools};
pub use ssd::{
    Expected, FlushError, Lane, LaneError, OnReset, Ssd, SsdCounters, SsdEvent, SsdNamespace,
    SsdOptions, SsdState, Watch,
};

/// One doorbell register, usable from the thread that owns the queue.
pub trait Doorbell: Send {
    /// Write the register. What was written to memory before is visible to the device when it sees the value.
    fn ring(&self, value: u32);
}

/// What the driver needs of a device. Accesses happen in the order of the calls.
pub trait Device {
    /// A doorbell of it.
    type Bell: Doorbell;

    /// Read a 32-bit register at `offset` of BAR0.
    ///
    /// # Errors
    ///
    /// The way to the device is broken.
    fn read32(&mut self, offset: u32) -> io::Result<u32>;

    /// Read a 64-bit register.
    ///
    /// # Errors
    ///
    /// The way to the device is broken.
    fn read64(&mut self, offset: u32) -> io::Result<u64>;

    /// Write a 32-bit register.
    ///
    /// # Errors
    ///
    /// The way to the device is broken.
    fn write32(&mut self, offset: u32, value: u32) -> io::Result<()>;

    /// Write a 64-bit register.
    ///
    /// # Errors
    ///
    /// The way to the device is broken.
    fn write64(&mut self, offset: u32, value: u64) -> io::Result<()>;

    /// The doorbell at byte `offset` of the doorbell window (BAR0 + 0x1000).
    ///
    /// # Errors
    ///
    /// There is no doorbell at that offset.
    fn doorbell(&mut self, offset: u64) -> io::Result<Self::Bell>;

    /// Zeroed memory the device can reach, at least as `access` says: page aligned, contiguous for both sides. Where the device
    /// reaches other people's memory too, what is [`Access::ReadOnly`] must be so for it.
    ///
    /// # Errors
    ///
    /// There is no such piece left.
    fn allocate(&mut self, bytes: usize, access: Access) -> io::Result<Dma>;

    /// The eventfd (non-blocking) behind an interrupt vector; `None` if the device has no such vector or does not interrupt.
    ///
    /// # Errors
    ///
    /// The way to the device is broken.
    fn interrupt(&mut self, vector: u16) -> io::Result<Option<File>>;

    /// Reset it by other means than its registers (a function level reset), after which it can be brought up again. Whether there
    /// is such a means.
    ///
    /// # Errors
    ///
    /// It did not work.
    fn hard_reset(&mut self) -> io::Result<bool> {
        Ok(false)
    }

    /// Keep it from reaching memory from now on (bus mastering off): it did not stop when told to, and is given up.
    ///
    /// # Errors
    ///
    /// It did not work.
    fn isolate(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// An eventfd that becomes readable when the device is to be let go of: it was pulled, or the host wants it back. `None` if
    /// nobody would tell.
    ///
    /// # Errors
    ///
    /// File descriptors ran out.
    fn removal(&mut self) -> io::Result<Option<File>> {
        Ok(None)
    }
}

/// Why something a driver wanted did not happen.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The way to the device is broken, or memory ran out.
    #[error("{what}: {source}")]
    Device {
        /// What was tried.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// Registers read as all ones: the device is not there any more.
    #[error("the device is gone (its registers read as all ones)")]
    Gone,
    /// CSTS.CFS is set.
    #[error("{what}: the controller reports a fatal status")]
    Fatal {
        /// What was tried.
        what: &'static str,
    },
    /// The device did not answer.
    #[error("{what}: no answer within {after:?}")]
    Timeout {
        /// What was tried.
        what: &'static str,
        /// How long it was given.
        after: Duration,
    },
    /// A command was refused.
    #[error("{what}: {}", status.status())]
    Refused {
        /// What was tried.
        what: &'static str,
        /// The whole status field.
        status: StatusField,
    },
    /// The controller cannot do what is needed.
    #[error("the controller cannot do this: {0}")]
    Unsupported(&'static str),
    /// The command was not submitted.
    #[error("{what}: {source}")]
    Submit {
        /// What was tried.
        what: &'static str,
        /// Why.
        source: SubmitError,
    },
}

impl DriverError {
    /// For `map_err` on a device access.
    pub(crate) fn device(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Device { what, source }
    }

    /// The status a refused command came back with.
    pub fn status(&self) -> Option<nvme_spec::Status> {
        match self {
            Self::Refused { status, .. } => Some(status.status()),
            _ => None,
        }
    }
}
