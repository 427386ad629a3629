//! NVMe disks for virtual machines.
//!
//! The arrows point down: `transport` → `controller` → `poller`/`io` → `backend` → `driver`; `memory` (and the crate
//! `nvme-spec`) lie under all of them and know nobody; `state`, what outlives the process, lies on `memory` alone. `ARCHITECTURE.md` tells the way of a command.

pub mod backend;
pub mod check;
pub mod cli;
pub mod config;
pub mod controller;
pub mod daemon;
pub mod driver;
pub mod io;
pub mod memory;
pub mod poller;
pub mod state;
pub mod systemd;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod transport;
pub mod upgrade;
