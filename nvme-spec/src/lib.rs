//! The NVMe Base (2.x) and NVM Command Set (1.x) specifications as types.
//!
//! Structures, constants and the arithmetic the specification prescribes; no I/O, no allocation,
//! no `unsafe`, and nothing of any one program. The same types serve an emulated controller and a
//! host driver, so each module reads and builds.
//!
//! - **Wire structures** are `#[repr(C)]` with plain integers: the specification is little-endian
//!   and so are the hosts this crate compiles for. They convert from and to bytes with `zerocopy`.
//! - **Open values** (opcodes, statuses, identifiers) are newtypes with named constants, so that an
//!   unknown value survives and can be refused by name or number.
//! - **`_z`** marks every zero-based field (a value of 0 means one).
//! - Citations name the specification and its section or figure title. Figure *numbers* move
//!   between revisions and are given only where the revision is named.
//! - A `with_*`/`set_*` method of a bit field narrower than its integer type masks nothing in
//!   release and asserts in debug builds: hand it values you have already checked. Reading
//!   accessors are total.
#![no_std]
#![forbid(unsafe_code)]
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::unwrap_used
)]

#[cfg(not(target_endian = "little"))]
compile_error!("nvme-spec maps little-endian wire structures to plain integers");

#[macro_use]
mod macros;

pub mod admin;
pub mod command;
pub mod doorbell;
pub mod event;
pub mod feature;
pub mod identify;
pub mod log;
pub mod nvm;
pub mod opcode;
pub mod prp;
pub mod regs;
pub mod ring;
pub mod sgl;
pub mod status;

pub use command::Cqe;
pub use command::Sqe;
pub use status::Status;
pub use status::StatusField;
