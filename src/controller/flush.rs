//! Making data stable when the guest shuts down.

use std::sync::Arc;
use std::time::Duration;

use super::inbox::{Inbox, Mail};
use crate::backend::Backend;

/// How long a store may take. A guest gives up after less.
const LIMIT: Duration = Duration::from_secs(60);

/// Flush the stores on a thread of its own (it takes as long as the disks take), then say so for this shutdown.
pub(super) fn begin(name: &str, stores: Vec<Arc<Backend>>, inbox: &Arc<Inbox>, shutdown: u64) {
    let thread = std::thread::Builder::new().name("nvme-flush".into());
    let (controller, to) = (name.to_owned(), Arc::clone(inbox));
    let started = thread.spawn(move || {
        for store in &stores {
            if let Err(status) = store.sync(LIMIT) {
                let store = store.describe();
                tracing::error!(controller, store, "not flushed at shutdown: {status}");
            }
        }
        to.send(Mail::Flushed(shutdown));
    });
    if let Err(error) = started {
        tracing::error!(controller = name, "no thread to flush at shutdown: {error}");
        // The guest must not wait for what will not happen.
        inbox.send(Mail::Flushed(shutdown));
    }
}
