//! An address space without an IOMMU.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;

use crate::driver::{Access, AddressSpace, MapMemoryError, Mapped};
use crate::memory::{GuestMap, Region};

/// What the device of a double can reach: looked up for each access, as an IOMMU does.
pub struct FakeSpace {
    regions: Mutex<BTreeMap<u64, (Arc<Region>, Access)>>,
    readable: ArcSwap<GuestMap>,
    writable: ArcSwap<GuestMap>,
    refused: AtomicU64,
    /// Addresses have so many bits.
    bits: u32,
    /// Called with all that is readable when that has changed.
    changed: Mutex<Option<Changed>>,
}

type Changed = Box<dyn Fn(&Arc<GuestMap>) + Send>;

impl FakeSpace {
    /// Nothing is mapped yet.
    pub fn new() -> Arc<Self> {
        Self::of(39)
    }

    /// Nothing is mapped yet, and addresses have so many bits (33 to 63).
    pub fn of(bits: u32) -> Arc<Self> {
        Arc::new(Self {
            bits: bits.clamp(33, 63),
            regions: Mutex::default(),
            readable: ArcSwap::new(GuestMap::empty()),
            writable: ArcSwap::new(GuestMap::empty()),
            refused: AtomicU64::new(0),
            changed: Mutex::new(None),
        })
    }

    /// What the device can read, by device addresses.
    pub fn readable(&self) -> Arc<GuestMap> {
        self.readable.load_full()
    }

    /// What it can write.
    pub fn writable(&self) -> Arc<GuestMap> {
        self.writable.load_full()
    }

    /// The device reads memory. `false`, counted, if it may not.
    pub fn read(&self, address: u64, dst: &mut [u8]) -> bool {
        let ok = self.readable.load().read(address, dst);
        self.note(ok)
    }

    /// The device writes memory. `false`, counted, if it may not.
    pub fn write(&self, address: u64, src: &[u8]) -> bool {
        let ok = self.writable.load().write(address, src);
        self.note(ok)
    }

    fn note(&self, ok: bool) -> bool {
        self.refused.fetch_add(u64::from(!ok), Ordering::Relaxed);
        ok
    }

    /// Accesses that were refused.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Regions that are mapped.
    pub fn mapped(&self) -> usize {
        self.regions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    /// Call `f` whenever something was mapped or unmapped.
    pub(super) fn on_change(&self, f: impl Fn(&Arc<GuestMap>) + Send + 'static) {
        *self.changed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(f));
    }

    fn rebuild(&self, regions: &BTreeMap<u64, (Arc<Region>, Access)>) {
        let map = |all: bool| {
            let chosen = regions
                .values()
                .filter(|(_, access)| all || *access == Access::ReadWrite)
                .map(|(region, _)| Arc::clone(region))
                .collect();
            GuestMap::new(chosen).unwrap_or_else(|_| GuestMap::empty())
        };
        self.writable.store(map(false));
        let readable = map(true);
        self.readable.store(Arc::clone(&readable));
        if let Some(changed) = &*self.changed.lock().unwrap_or_else(PoisonError::into_inner) {
            changed(&readable);
        }
    }
}

/// Ends a mapping.
struct Shown {
    space: Arc<FakeSpace>,
    address: u64,
}

impl Drop for Shown {
    fn drop(&mut self) {
        let mut regions = self
            .space
            .regions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        regions.remove(&self.address);
        self.space.rebuild(&regions);
    }
}

/// The space, as [`AddressSpace`] wants it: mappings keep it alive.
impl AddressSpace for Arc<FakeSpace> {
    fn ranges(&self) -> Vec<RangeInclusive<u64>> {
        // As an IOMMU of so many bits with the interrupt range cut out.
        vec![0..=0xFEDF_FFFF, 0xFEF0_0000..=(1 << self.bits) - 1]
    }

    fn granule(&self) -> u64 {
        4096
    }

    fn map(
        &self,
        address: u64,
        region: &Arc<Region>,
        access: Access,
    ) -> Result<Mapped, MapMemoryError> {
        let what = || format!("showing {:#x} bytes at {address:#x}", region.len());
        let refuse = |hint: &str| {
            Err(MapMemoryError {
                what: what(),
                hint: hint.into(),
                source: None,
            })
        };
        let fits = self.ranges().iter().any(|r| {
            region.len() > 0
                && address >= *r.start()
                && region.len() - 1 <= r.end().saturating_sub(address)
        });
        if !fits || !address.is_multiple_of(4096) || !region.len().is_multiple_of(4096) {
            return refuse("choose whole pages inside the usable ranges");
        }
        let mut regions = self.regions.lock().unwrap_or_else(PoisonError::into_inner);
        let end = address + region.len();
        let overlaps =
            |(at, (r, _)): (&u64, &(Arc<Region>, Access))| *at < end && address < at + r.len();
        if regions.iter().any(overlaps) {
            return refuse("something is mapped there already");
        }
        regions.insert(address, (region.shown_at(address), access));
        self.rebuild(&regions);
        Ok(Mapped::new(Shown {
            space: Arc::clone(self),
            address,
        }))
    }
}
