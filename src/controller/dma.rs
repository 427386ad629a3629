//! The guest's memory, shown to the SSDs that serve it: before any poller uses it, and until the last has let go of it.

use std::any::Any;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::backend::nvme::{Shown, Window};
use crate::driver::MapMemoryError;
use crate::io::Namespace;
use crate::memory::{GuestMap, MapError, Region};

/// How long pollers have to say that they use a map, whatever has been waited for before.
const LEAST: Duration = Duration::from_millis(100);

/// Why the guest's memory is not what it was to be.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// It is, but I/O still uses what was taken away.
    #[error("I/O still uses the memory that was taken away, after {0:?}")]
    InUse(Duration),
    /// It is less: what was taken away is not used any more, but I/O that is out keeps an SSD from being shown what comes in its place. To be tried
    /// again with the same map.
    #[error(
        "memory that an SSD is to be shown has to wait: after {0:?}, I/O still uses what was at its addresses"
    )]
    NotYet(Duration),
    /// An SSD cannot be shown what is new.
    #[error(transparent)]
    Refused(#[from] MapMemoryError),
    /// It makes no map.
    #[error(transparent)]
    Map(#[from] MapError),
}

fn left(end: Instant) -> Duration {
    end.saturating_duration_since(Instant::now())
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

    /// Use `map` by `use_map`, which waits for so long at most until nothing uses what is not in the map it is given, and says whether that is so.
    /// All waits together take hardly longer than `limit`.
    ///
    /// # Errors
    ///
    /// [`MemoryError`]; what was refused has not been used.
    pub(super) fn change(
        &self,
        map: Arc<GuestMap>,
        limit: Duration,
        use_map: impl Fn(Arc<GuestMap>, Duration) -> bool,
    ) -> Result<(), MemoryError> {
        let end = Instant::now() + limit;
        let used = |map| use_map(map, left(end).max(LEAST));
        if self.windows.is_empty() {
            return match used(map) {
                true => Ok(()),
                false => Err(MemoryError::InUse(limit)),
            };
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
            if !self.let_go(&held, lost, end, used)? {
                return Err(MemoryError::NotYet(limit));
            }
        }
        // Also what an earlier attempt, or the client before this one, has left.
        if !new.iter().all(|region| self.is_hidden(&range(region), end)) {
            return Err(MemoryError::NotYet(limit));
        }
        let mut shown = Vec::with_capacity(new.len());
        for region in new {
            shown.push(self.show(region)?);
        }
        held.extend(shown);
        let (kept, lost): (Vec<_>, Vec<_>) = held.drain(..).partition(stays);
        *held = kept;
        match self.let_go(&held, lost, end, used)? {
            true => Ok(()),
            false => Err(MemoryError::InUse(limit)),
        }
    }

    /// Use the memory of `kept` only, and wait until no SSD can reach what is lost. Whether that is so.
    fn let_go(
        &self,
        kept: &[Held],
        lost: Vec<Held>,
        end: Instant,
        used: impl Fn(Arc<GuestMap>) -> bool,
    ) -> Result<bool, MapError> {
        self.leaves(&lost);
        let regions = kept.iter().map(|h| Arc::clone(&h.region)).collect();
        let guards = kept
            .iter()
            .map(|h| Arc::clone(&h.shown) as Arc<dyn Any + Send + Sync>);
        let quiet = used(GuestMap::keeping(regions, guards.collect())?);
        let ranges: Vec<_> = lost.iter().map(Held::range).collect();
        // The pollers' maps are gone: this is the end of it.
        drop(lost);
        Ok(quiet && ranges.iter().all(|range| self.is_hidden(range, end)))
    }

    /// Wait until no SSD can reach these guest addresses. Whether that is so.
    fn is_hidden(&self, range: &Range<u64>, end: Instant) -> bool {
        let mut windows = self.windows.iter();
        windows.all(|window| window.is_hidden(range, left(end)))
    }

    /// Show a region to each SSD.
    fn show(&self, region: Arc<Region>) -> Result<Held, MapMemoryError> {
        let shown = self.windows.iter().map(|w| w.show(&region));
        let shown = Arc::new(shown.collect::<Result<Vec<_>, _>>()?);
        Ok(Held { region, shown })
    }

    /// What these show is not the guest's any more, though commands that are out keep it in the sight of SSDs.
    fn leaves(&self, lost: &[Held]) {
        for held in lost {
            for window in &self.windows {
                window.leaves(&held.range());
            }
        }
    }

    /// The front-end has gone: hold nothing any more.
    pub(super) fn forget(&self) {
        let mut held = self.held();
        self.leaves(&held);
        held.clear();
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    use crate::backend::{Backend, NvmeOptions, Opcodes};
    use crate::driver::dma::{Mapping, shared_memory};
    use crate::driver::{Ssd, SsdOptions};
    use crate::testing::{Model, ModelOptions};

    const AT: u64 = 1 << 20;

    fn region(gpa: u64) -> Arc<Region> {
        let file = shared_memory("guest", AT).unwrap();
        Mapping::map(&file, 0, AT as usize, gpa).unwrap()
    }

    fn dma(model: &Model) -> Dma {
        let ssd = Ssd::start(
            "model".into(),
            model.device(),
            model.space(),
            SsdOptions::default(),
        );
        let ssd = ssd.unwrap();
        let backend = Backend::nvme(&NvmeOptions {
            window: Window::sole(ssd.space(), "model").unwrap(),
            ssd,
            nsid: 1,
            offset: 0,
            size: None,
            read_only: false,
            pass: Opcodes::NONE,
        });
        Dma::of(&[Namespace::new(1, Arc::new(backend.unwrap()), false)])
    }

    #[test]
    fn memory_that_has_to_wait_for_io_can_be_tried_again() {
        let model = Model::new(ModelOptions::default());
        let dma = dma(&model);
        let (low, old, new) = (region(0), region(AT), region(AT));
        let limit = Duration::from_millis(60);
        // The pollers: the map they have, and those that commands keep.
        let present = RefCell::new(GuestMap::empty());
        let out = RefCell::new(Vec::new());
        let use_map = |map, least: Duration| {
            assert!(least <= limit.max(LEAST));
            *present.borrow_mut() = map;
            out.borrow().is_empty()
        };
        let map =
            |high: &Arc<Region>| GuestMap::new(vec![Arc::clone(&low), Arc::clone(high)]).unwrap();
        let has = |region: &Arc<Region>| {
            let present = present.borrow();
            present.regions().iter().any(|r| Arc::ptr_eq(r, region))
        };
        dma.change(map(&old), limit, use_map).unwrap();
        assert!(has(&low) && has(&old));
        out.borrow_mut().push(Arc::clone(&present.borrow()));
        let before = model.fake_space().mapped();
        for _ in 0..3 {
            let result = dma.change(map(&new), limit, use_map);
            assert!(matches!(result, Err(MemoryError::NotYet(_))), "{result:?}");
            assert!(has(&low) && !has(&old) && !has(&new));
            assert_eq!(model.fake_space().mapped(), before);
        }
        out.borrow_mut().clear();
        // The device's view of the old one goes elsewhere, and soon.
        while dma.change(map(&new), limit, use_map).is_err() {}
        assert!(has(&low) && has(&new));
        assert_eq!(model.fake_space().mapped(), before);
        assert_eq!(model.fake_space().refused(), 0);
    }
}
