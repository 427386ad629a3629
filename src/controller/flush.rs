//! Making a store's data stable, for a shutdown.

use crate::backend::Backend;

/// Wait until everything written to a store is on stable media; whether it is.
pub(super) fn flush(store: &Backend) -> bool {
    // There is no store with a volatile cache yet.
    !store.geometry().volatile_write_cache
}
