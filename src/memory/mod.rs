//! The fence around memory that somebody else writes: guest RAM, queues in it, and the doorbell window.
//!
//! All raw pointers of the I/O path live in this folder. Outside it, guest memory is a [`HostSeg`] nobody can look
//! into, a [`Buffers`] that copies, or a [`Ring`] that reads and writes whole entries.
//!
//! Bytes in these places may change under us at any time. Nothing here hands out a reference to them: every access is a
//! copy or an atomic, so that a value that was checked is the value that is used.

mod held;
mod map;
mod ring;
mod seg;
pub mod sigbus;
mod store;
mod vm;
mod window;

pub(crate) use held::Held;
pub use map::{GuestMap, MapError, Region};
pub use ring::{Ring, SharedWord};
pub use seg::{Buffers, HostSeg};
pub use store::Store;
pub use vm::{Identity, VmRegion, check_file};
pub use window::DoorbellWindow;
