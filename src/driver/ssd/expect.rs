//! Namespaces in use, and what they must go on to be.
//!
//! A namespace may be formatted or resized by others: another controller of the same SSD. Whoever sends commands to it counts on its block size (how much a
//! command moves, and so how much memory its PRPs have to name) and on its blocks being there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use nvme_spec::identify::IdentifyNamespace;

use super::SsdEvent;
use super::keeper::{Handle, Keeper};
use super::link::{Shared, lock};
use crate::driver::{Driver, DriverError};

/// What a namespace must go on to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// NSID.
    pub nsid: u32,
    /// log2 of the block size; blocks have no metadata.
    pub lbads: u8,
    /// Blocks it has at least.
    pub blocks: u64,
}

impl Expected {
    /// What is wrong with a namespace; it is not there if `None`.
    fn fault(&self, found: Option<&IdentifyNamespace>) -> Option<String> {
        let Some(found) = found.filter(|found| found.nsze != 0) else {
            return Some("it is not there any more".into());
        };
        match found.current_format() {
            Some(format) if format.ms != 0 => Some(format!(
                "its blocks have {} bytes of metadata now",
                format.ms
            )),
            Some(format) if format.lbads != self.lbads => Some(format!(
                "its LBA format has blocks of 2^{} bytes now, not of 2^{}",
                format.lbads, self.lbads
            )),
            None => Some("it does not say which LBA format it has".into()),
            Some(_) if found.nsze < self.blocks => Some(format!(
                "it has {} blocks now, and {} are needed",
                found.nsze, self.blocks
            )),
            Some(_) => None,
        }
    }
}

/// A namespace in use: see [`Ssd::watch`](super::Ssd::watch).
#[derive(Debug)]
pub struct Watch {
    expected: Expected,
    changed: AtomicBool,
}

impl Watch {
    pub(super) fn new(expected: Expected) -> Self {
        Self {
            expected,
            changed: AtomicBool::new(false),
        }
    }

    /// Whether it is not what it was, and takes no commands any more.
    pub fn is_changed(&self) -> bool {
        self.changed.load(Ordering::Acquire)
    }
}

/// Look at the namespaces in use that `which` says. Guests of one that has changed get errors from then on.
pub(super) fn look(
    driver: &mut Driver<Handle>,
    shared: &Shared,
    which: impl Fn(u32) -> bool,
) -> Result<(), DriverError> {
    let all: Vec<Arc<Watch>> = {
        let mut watches = lock(&shared.watches);
        watches.retain(|watch| watch.strong_count() > 0);
        watches.iter().filter_map(Weak::upgrade).collect()
    };
    for watch in all {
        let nsid = watch.expected.nsid;
        if watch.is_changed() || !which(nsid) {
            continue;
        }
        let found = match driver.identify_namespace(nsid) {
            Ok(found) => Some(found),
            Err(DriverError::Refused { .. }) => None,
            Err(error) => return Err(error),
        };
        if let Some(what) = watch.expected.fault(found.as_ref()) {
            watch.changed.store(true, Ordering::Release);
            tracing::error!(
                ssd = shared.name,
                nsid,
                what,
                "a namespace has been changed by others: its I/O fails (Namespace Not Ready); make it again what it was, or the \
                 configuration what it is, and start the daemon anew"
            );
        }
    }
    Ok(())
}

impl Keeper {
    /// These namespaces have changed.
    pub(super) fn look_at_namespaces(&mut self, event: &SsdEvent) {
        let SsdEvent::NamespacesChanged(list) = event else {
            return;
        };
        let which = |nsid| list.contains(&nsid) || list.contains(&u32::MAX);
        let shared = Arc::clone(&self.shared);
        // What an error means for the controller is noted; after a reset they are all looked at.
        let _ = self.with_driver(|driver| look(driver, &shared, which));
        self.refuse_changed();
    }

    /// Have lanes to namespaces that have changed take no more commands.
    pub(super) fn refuse_changed(&self) {
        for lane in &self.lanes {
            if lane.watch.as_ref().is_some_and(|watch| watch.is_changed()) {
                lane.link.mail().refuse = true;
                lane.link.look.store(true, Ordering::Release);
                lane.link.wake_lane();
            }
        }
    }
}
