//! Where a guest's memory lies in the address space of an SSD, and for how long.

use std::ops::{Range, RangeInclusive};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use crate::driver::{Access, AddressSpace, MapMemoryError, Mapped, POOLS_SPAN};
use crate::memory::Region;

/// The least window worth having.
const LEAST: u64 = 1 << 30;

/// The part of an SSD's address space that belongs to one guest: device address = base + guest address.
///
/// Memory that is not needed any more is taken back by a thread of the window, so that no poller ever waits for an IOMMU.
pub struct Window {
    inner: Arc<Inner>,
    back: Sender<Gone>,
}

struct Inner {
    space: Arc<dyn AddressSpace>,
    /// Whose address space it is.
    name: String,
    base: u64,
    /// Guest addresses are below this.
    size: u64,
    /// No other guest uses the SSD.
    sole: bool,
    /// What the device can reach.
    live: Mutex<Vec<Live>>,
    less: Condvar,
    /// Some of that is not the guest's any more.
    stale: AtomicBool,
}

/// Guest addresses the device can reach.
struct Live {
    range: Range<u64>,
    /// The guest's memory is not there any more; commands that are out still use it.
    leaving: bool,
}

/// Memory on its way out of the device's sight.
struct Gone {
    mapped: Mapped,
    range: Range<u64>,
}

/// A region the device can reach until this is dropped.
pub struct Shown {
    gone: Option<Gone>,
    inner: Arc<Inner>,
    back: Sender<Gone>,
}

impl Inner {
    fn live(&self) -> MutexGuard<'_, Vec<Live>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&self, gone: Gone) {
        let Gone { mapped, range } = gone;
        drop(mapped);
        let mut live = self.live();
        if let Some(at) = live.iter().position(|l| l.range == range) {
            live.swap_remove(at);
        }
        self.tell_stale(&live);
        self.less.notify_all();
    }

    fn tell_stale(&self, live: &[Live]) {
        let stale = live.iter().any(|l| l.leaving);
        self.stale.store(stale, Ordering::Release);
    }

    /// Wait until nothing of `range` is live. `false` if that takes too long.
    fn wait_for<'a>(
        &'a self,
        range: &Range<u64>,
        limit: Duration,
    ) -> Option<MutexGuard<'a, Vec<Live>>> {
        let end = Instant::now() + limit;
        let mut live = self.live();
        while live
            .iter()
            .any(|l| l.range.start < range.end && range.start < l.range.end)
        {
            let left = end.checked_duration_since(Instant::now())?;
            let waited = self.less.wait_timeout(live, left);
            live = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Some(live)
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if let Some(gone) = self.gone.take()
            && let Err(unsent) = self.back.send(gone)
        {
            self.inner.forget(unsent.into_inner());
        }
    }
}

fn refused(what: String, hint: impl Into<String>) -> MapMemoryError {
    MapMemoryError {
        what,
        hint: hint.into(),
        source: None,
    }
}

impl Window {
    fn new(
        space: &Arc<dyn AddressSpace>,
        name: &str,
        base: u64,
        size: u64,
        sole: bool,
    ) -> Result<Arc<Self>, MapMemoryError> {
        let inner = Arc::new(Inner {
            space: Arc::clone(space),
            name: name.to_owned(),
            base,
            size,
            sole,
            live: Mutex::default(),
            less: Condvar::new(),
            stale: AtomicBool::new(false),
        });
        let (back, taken) = crossbeam_channel::unbounded();
        let own = Arc::clone(&inner);
        std::thread::Builder::new()
            .name("nvme-unmap".into())
            .spawn(move || taken.into_iter().for_each(|gone| own.forget(gone)))
            .map_err(|e| MapMemoryError {
                what: format!("no thread for the memory {name} is shown: {e}"),
                hint: "raise the limit of threads (ulimit -u)".into(),
                source: Some(e),
            })?;
        Ok(Arc::new(Self { inner, back }))
    }

    /// The whole address space, for the only guest of an SSD: device address = guest address, so that PRPs mean the same to both.
    ///
    /// # Errors
    ///
    /// There are no threads left.
    pub fn sole(space: &Arc<dyn AddressSpace>, name: &str) -> Result<Arc<Self>, MapMemoryError> {
        Self::new(space, name, 0, top(&space.ranges()), true)
    }

    /// A window for each of `guests` guests.
    ///
    /// # Errors
    ///
    /// The address space has no room for so many.
    pub fn shared(
        space: &Arc<dyn AddressSpace>,
        name: &str,
        guests: usize,
    ) -> Result<Vec<Arc<Self>>, MapMemoryError> {
        let Some((size, bases)) = divide(&space.ranges(), guests) else {
            return Err(refused(
                format!(
                    "{name} has no room for the memory of {guests} guests in its address space"
                ),
                "let fewer guests share it",
            ));
        };
        bases
            .into_iter()
            .map(|base| Self::new(space, name, base, size, false))
            .collect()
    }

    /// Show a region at its place until what is returned, and every copy of it, is dropped. What was there before must be hidden
    /// ([`Self::is_hidden`]): this does not wait for it.
    ///
    /// # Errors
    ///
    /// It does not fit into the window, the address space refuses it, or something is shown there.
    pub fn show(&self, region: &Arc<Region>) -> Result<Shown, MapMemoryError> {
        let inner = &self.inner;
        let (gpa, len) = (region.gpa(), region.len());
        let what = || {
            format!(
                "guest memory of {len:#x} bytes at {gpa:#x} cannot be shown to {}",
                inner.name
            )
        };
        let granule = inner.space.granule();
        if !gpa.is_multiple_of(granule) || !len.is_multiple_of(granule) {
            let hint = format!(
                "the IOMMU maps pages of {granule:#x} bytes: give the guest memory in such pages"
            );
            return Err(refused(what(), hint));
        }
        let range = gpa..gpa.saturating_add(len);
        let address = inner.base.checked_add(gpa);
        let last = address.and_then(|first| first.checked_add(len.saturating_sub(1)));
        let (Some(address), Some(last), true) = (address, last, range.end <= inner.size) else {
            let hint = format!(
                "{} bytes of addresses are this guest's there; give it less memory, or let fewer guests share the SSD",
                inner.size
            );
            return Err(refused(what(), hint));
        };
        let ranges = inner.space.ranges();
        if !ranges
            .iter()
            .any(|r| r.contains(&address) && r.contains(&last))
        {
            let hint = format!(
                "the IOMMU can map {ranges:x?} there; give the guest memory that lies in these"
            );
            return Err(refused(what(), hint));
        }
        let Some(mut live) = inner.wait_for(&range, Duration::ZERO) else {
            let hint = "commands that are out still use memory that was there before; try again";
            return Err(refused(what(), hint));
        };
        let mapped = inner.space.map(address, region, Access::ReadWrite)?;
        live.push(Live {
            range: range.clone(),
            leaving: false,
        });
        Ok(Shown {
            gone: Some(Gone { mapped, range }),
            inner: Arc::clone(inner),
            back: self.back.clone(),
        })
    }

    /// Wait, at most `limit`, until the device cannot reach any of these guest addresses. Whether that is so.
    pub fn is_hidden(&self, range: &Range<u64>, limit: Duration) -> bool {
        self.inner.wait_for(range, limit).is_some()
    }

    /// The guest's memory at these addresses, which was shown, is to be used by nobody who does not use it yet.
    pub fn leaves(&self, range: &Range<u64>) {
        let mut live = self.inner.live();
        for one in live.iter_mut().filter(|l| l.range == *range) {
            one.leaving = true;
        }
        self.inner.tell_stale(&live);
    }

    /// Whether the device can reach what is not the guest's memory any more. A guest's own PRPs could name that: it must not see them then.
    pub(super) fn is_stale(&self) -> bool {
        self.inner.stale.load(Ordering::Acquire)
    }

    /// Device address of guest address 0.
    pub(super) fn base(&self) -> u64 {
        self.inner.base
    }

    /// Whether PRPs can go through as they are: no other guest is there, and device addresses are guest addresses.
    pub(super) fn is_sole(&self) -> bool {
        self.inner.sole && self.inner.base == 0
    }
}

/// Where the driver's own memory may begin: everything below is for guests.
fn top(ranges: &[RangeInclusive<u64>]) -> u64 {
    let last = ranges.last().map_or(0, |r| *r.end());
    (last - last % LEAST).saturating_sub(POOLS_SPAN)
}

/// The largest size of which there is a window for each guest, and where they begin.
fn divide(ranges: &[RangeInclusive<u64>], guests: usize) -> Option<(u64, Vec<u64>)> {
    let top = top(ranges);
    let mut size = 1u64 << top.checked_ilog2()?;
    while size >= LEAST {
        let inside = |r: &RangeInclusive<u64>| {
            let (first, end) = (*r.start(), top.min(r.end().saturating_add(1)));
            let first = first.checked_next_multiple_of(size).unwrap_or(u64::MAX);
            (0u64..)
                .map_while(move |i| first.checked_add(i.checked_mul(size)?))
                .take_while(move |base| base.checked_add(size).is_some_and(|e| e <= end))
                .filter(|base| *base > 0)
        };
        // What is missing in the lowest window is missing in guests' address spaces too: the interrupts of x86.
        let lowest = (size <= top).then_some(0);
        let bases: Vec<u64> = lowest
            .into_iter()
            .chain(ranges.iter().flat_map(inside))
            .take(guests)
            .collect();
        if bases.len() == guests {
            return Some((size, bases));
        }
        size /= 2;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_as_large_as_can_be_and_leave_room_for_the_driver() {
        let x86 = |bits: u32| {
            let top = (1u64 << bits) - 1;
            vec![0..=0xFEDF_FFFF, 0xFEF0_0000..=top]
        };
        let (size, bases) = divide(&x86(39), 2).unwrap();
        assert_eq!((size, bases), (128 << 30, vec![0, 128 << 30]));
        let (size, bases) = divide(&x86(48), 8).unwrap();
        assert_eq!((size, bases.len()), (1 << 44, 8));
        for pair in bases.windows(2) {
            assert!(pair[1] - pair[0] >= size);
        }
        assert!(bases.iter().all(|b| b + size <= (1 << 48) - POOLS_SPAN));
        assert_eq!(divide(&x86(33), 100), None);
        assert_eq!(divide(&[], 1), None);
        let (size, bases) = divide(&[0..=u64::MAX], 2).unwrap();
        assert_eq!((size, bases), (1 << 62, vec![0, 1 << 62]));
        let holes = [0..=0xFFFF_FFFF, 0x10_0000_0000..=0x1F_FFFF_FFFF];
        let (size, bases) = divide(&holes, 2).unwrap();
        assert_eq!((size, bases), (32 << 30, vec![0, 64 << 30]));
    }
}
