//! The fence around memory that somebody else writes: guest RAM, queues in it, and the doorbell window.
//!
//! All raw pointers of the I/O path live in this folder. Outside it, guest memory is a [`HostSeg`] nobody can look
//! into, a [`Buffers`] that copies, or a [`Ring`] that reads and writes whole entries.
//!
//! Bytes in these places may change under us at any time. Nothing here hands out a reference to them: every access is a
//! copy or an atomic, so that a value that was checked is the value that is used.

mod ahead;
mod copy;
pub(crate) mod crash_point;
mod held;
mod map;
mod mapped;
mod mapping;
mod numa;
mod ring;
mod seg;
pub mod sigbus;
mod store;
mod vm;
mod window;
mod words;

pub use copy::Copier;
pub(crate) use held::Held;
pub use map::{GuestMap, MapError, Near, Region};
pub(crate) use mapped::{Direction, MappedFile, transfer};
pub use mapping::Mapping;
pub use ring::{Place, Ring, SharedWord};
pub use seg::{Buffers, HostSeg};
pub use store::Store;
pub use vm::{Identity, MOST_MAPPED, VmRegion, check_file, check_room};
pub use window::{DoorbellWindow, SideWord};
pub use words::SharedWords;
