//! The same tests as in `virtual_guest`, over vfio-user, and those of vfio-user itself.

#[path = "../virtual_guest/admin.rs"]
mod admin;
#[path = "../virtual_guest/basics.rs"]
mod basics;
#[path = "../virtual_guest/fairness.rs"]
mod fairness;
#[path = "../virtual_guest/forwarded.rs"]
mod forwarded;
#[path = "../virtual_guest/hostile.rs"]
mod hostile;
#[path = "../virtual_guest/integrity.rs"]
mod integrity;
#[path = "../virtual_guest/logs.rs"]
mod logs;
#[path = "../virtual_guest/memory.rs"]
mod memory;
#[path = "../virtual_guest/passthrough.rs"]
mod passthrough;
#[path = "../virtual_guest/placement.rs"]
mod placement;
#[path = "../virtual_guest/process.rs"]
mod process;
#[path = "../virtual_guest/prps.rs"]
mod prps;
#[path = "../virtual_guest/reconnect.rs"]
mod reconnect;
#[path = "../virtual_guest/sgls.rs"]
mod sgls;
#[path = "../virtual_guest/signalled.rs"]
mod signalled;
#[path = "../virtual_guest/statuses.rs"]
mod statuses;
#[path = "../virtual_guest/teardown.rs"]
mod teardown;
#[path = "../virtual_guest/upgrade.rs"]
mod upgrade;
#[path = "../virtual_guest/wakeup.rs"]
mod wakeup;

mod interrupts;
mod late;
mod others;
mod protocol;
mod regions;
