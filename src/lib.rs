//! NVMe disks for virtual machines.
//!
//! The arrows point down: `transport` → `controller` → `poller`/`io` → `backend` → `driver`; `memory` (and the crate
//! `nvme-spec`) lie under all of them and know nobody. `ARCHITECTURE.md` tells the way of a command.

pub mod backend;
pub mod cli;
pub mod config;
pub mod controller;
pub mod daemon;
pub mod driver;
pub mod io;
pub mod memory;
pub mod poller;
pub mod transport;
