//! What outlives the process: a place of its own for each controller ([`Keep`]), and in it its state ([`StateFile`]).
//!
//! A place is a directory on tmpfs (`docs/RECOVERY.md` says what lies in it), or nowhere, and then the state lives as long as the process:
//! long enough for a front-end that comes back. A state file is one *generation*: it has a fixed number of pollers and slots, is begun
//! beside the present one, filled, and put in its place by a rename. So whoever comes finds a whole one, whenever the last one died.

#![forbid(unsafe_code)]

mod file;
mod keep;
mod namespace;
mod place;

pub use file::{LAYOUT, Shape, StateFile};
pub use keep::{Keep, KeepError};
pub use namespace::{HugeWish, Kept, random_id};
pub use place::{LOCK_WAIT, directory, is_tmpfs, owner};
