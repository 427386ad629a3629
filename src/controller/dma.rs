//! The guest's memory, shown to the SSDs that serve it: before any poller uses it, and until the last has let go of it.

use std::any::Any;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::backend::nvme::{Shown, Window};
use crate::driver::MapMemoryError;
use crate::io::Namespace;
use crate::memory::{GuestMap, MapError, Region};

/// Why the guest's memory is not what it was to be.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// It is, but I/O still uses what was taken away.
    #[error("I/O still uses the memory that was taken away, after {0:?}")]
    InUse(Duration),
    /// An SSD cannot be shown it; it stays as it was.
    #[error(transparent)]
    Refused(#[from] MapMemoryError),
    /// It makes no map.
    #[error(transparent)]
    Map(#[from] MapError),
}

/// A region and what shows it, once for each window.
struct Held {
    region: Arc<Region>,
    shown: Arc<Vec<Shown>>,
}

impl Held {
    fn range(&self) -> Range<u64> {
        range(&self.region)
    }
}

fn range(region: &Region) -> Range<u64> {
    region.gpa()..region.gpa().saturating_add(region.len())
}

/// What of the guest's memory which SSD can reach.
pub(super) struct Dma {
    windows: Vec<Arc<Window>>,
    held: Mutex<Vec<Held>>,
}

impl Dma {
    /// Of a controller with these namespaces; nothing is shown.
    pub(super) fn of(namespaces: &[Namespace]) -> Self {
        let mut windows: Vec<Arc<Window>> = Vec::new();
        for window in namespaces.iter().filter_map(|ns| ns.backend.window()) {
            if !windows.iter().any(|w| Arc::ptr_eq(w, window)) {
                windows.push(Arc::clone(window));
            }
        }
        Self {
            windows,
            held: Mutex::default(),
        }
    }

    fn held(&self) -> MutexGuard<'_, Vec<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Use `map` by `use_map`, which waits until nothing uses what is not in the map it is given, and says whether that is so.
    ///
    /// # Errors
    ///
    /// [`MemoryError`]; what was refused has not been used.
    pub(super) fn change(
        &self,
        map: Arc<GuestMap>,
        limit: Duration,
        use_map: impl Fn(Arc<GuestMap>) -> bool,
    ) -> Result<(), MemoryError> {
        let used = |map| match use_map(map) {
            true => Ok(()),
            false => Err(MemoryError::InUse(limit)),
        };
        if self.windows.is_empty() {
            return used(map);
        }
        let mut held = self.held();
        let stays = |h: &Held| map.regions().iter().any(|r| Arc::ptr_eq(r, &h.region));
        let new: Vec<_> = map
            .regions()
            .iter()
            .filter(|r| !held.iter().any(|h| Arc::ptr_eq(r, &h.region)))
            .cloned()
            .collect();
        // A device address shows one thing at a time: what is in the way goes first.
        let in_the_way = held.iter().any(|h| {
            let old = h.range();
            !stays(h)
                && new
                    .iter()
                    .map(|r| range(r))
                    .any(|r| r.start < old.end && old.start < r.end)
        });
        if in_the_way {
            let (kept, lost) = held.drain(..).partition(stays);
            *held = kept;
            self.let_go(&held, lost, limit, used)?;
        }
        let mut shown = Vec::with_capacity(new.len());
        for region in new {
            shown.push(self.show(region)?);
        }
        held.extend(shown);
        let (kept, lost): (Vec<_>, Vec<_>) = held.drain(..).partition(stays);
        *held = kept;
        self.let_go(&held, lost, limit, used)
    }

    /// Use the memory of `kept` only, and wait until no SSD can reach what is lost.
    fn let_go(
        &self,
        kept: &[Held],
        lost: Vec<Held>,
        limit: Duration,
        used: impl Fn(Arc<GuestMap>) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let regions = kept.iter().map(|h| Arc::clone(&h.region)).collect();
        let guards = kept
            .iter()
            .map(|h| Arc::clone(&h.shown) as Arc<dyn Any + Send + Sync>);
        used(GuestMap::keeping(regions, guards.collect())?)?;
        let ranges: Vec<_> = lost.iter().map(Held::range).collect();
        // The pollers' maps are gone: this is the end of it.
        drop(lost);
        let hidden = |range| self.windows.iter().all(|w| w.is_hidden(range, limit));
        match ranges.iter().all(hidden) {
            true => Ok(()),
            false => Err(MemoryError::InUse(limit)),
        }
    }

    /// Show a region to each SSD.
    fn show(&self, region: Arc<Region>) -> Result<Held, MapMemoryError> {
        let shown = self.windows.iter().map(|w| w.show(&region));
        let shown = Arc::new(shown.collect::<Result<Vec<_>, _>>()?);
        Ok(Held { region, shown })
    }

    /// The front-end has gone: hold nothing any more.
    pub(super) fn forget(&self) {
        self.held().clear();
    }
}

/// Say how the commands of namespaces on SSDs went there.
pub(super) fn log_forwarded(controller: &str, namespaces: &[Namespace]) {
    for ns in namespaces {
        let Some(nvme) = ns.backend.as_nvme() else {
            continue;
        };
        let f = nvme.forwarded();
        let transfers = f.untouched + f.rebuilt + f.split;
        tracing::info!(
            controller,
            nsid = ns.nsid,
            ssd = nvme.ssd().0.name(),
            untouched = f.untouched,
            rebuilt = f.rebuilt,
            split = f.split,
            without_data = f.without_data,
            passed = f.passed,
            "forwarded: {} of {transfers} transfers with the guest's own PRPs",
            f.untouched
        );
    }
}
