//! The daemon, driven by the virtual guest through a real socket and real shared memory.

mod admin;
mod basics;
mod fairness;
mod forwarded;
mod hostile;
mod integrity;
mod logs;
mod memory;
mod passthrough;
mod placement;
mod process;
mod prps;
mod reconnect;
mod sgls;
mod signalled;
mod ssd;
mod statuses;
mod teardown;
mod upgrade;
mod wakeup;
