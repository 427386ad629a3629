//! The guest's physical memory as this process sees it: an immutable picture, replaced as a whole.

#![expect(
    unsafe_code,
    reason = "the fence: pointers into guest memory are made and used here"
)]

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::seg::HostSeg;

/// A piece of guest memory that is mapped here.
pub struct Region {
    gpa: u64,
    len: u64,
    host: *mut u8,
    /// Keeps the mapping alive.
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the pointer is to shared memory that any thread may access by copying; the owner is Send and Sync.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// A region of `len` bytes at guest physical address `gpa`, mapped at `host` for as long as `owner` lives.
    ///
    /// # Safety
    ///
    /// `host..host + len` must be a readable and writable shared mapping that stays as long as `owner` is not dropped, and no
    /// Rust reference into it may exist.
    pub unsafe fn new(
        gpa: u64,
        len: u64,
        host: *mut u8,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self {
            gpa,
            len,
            host,
            _owner: owner,
        }
    }

    /// First guest physical address.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Bytes.
    #[expect(
        clippy::len_without_is_empty,
        reason = "GuestMap::new refuses empty regions"
    )]
    pub fn len(&self) -> u64 {
        self.len
    }
}

impl Region {
    /// Where it is mapped in this process, for handing it to the kernel.
    pub fn host(&self) -> *mut u8 {
        self.host
    }

    /// The same memory at another address: what a device sees in its own address space.
    pub fn shown_at(self: &Arc<Self>, address: u64) -> Arc<Self> {
        Arc::new(Self {
            gpa: address,
            len: self.len,
            host: self.host,
            _owner: Arc::clone(self) as _,
        })
    }

    /// Whether all of another region is here too: the same memory at the same address.
    fn contains(&self, other: &Self) -> bool {
        let Some(before) = other.gpa.checked_sub(self.gpa) else {
            return false;
        };
        let same = (self.host.addr() as u64).checked_add(before) == Some(other.host.addr() as u64);
        same && before
            .checked_add(other.len)
            .is_some_and(|end| end <= self.len)
    }

    /// Whether a segment lies in this region (in part, at least).
    pub fn holds(&self, seg: &HostSeg) -> bool {
        let start = self.host.addr() as u64;
        let at = seg.ptr().addr() as u64;
        at < start.saturating_add(self.len) && start < at.saturating_add(seg.len() as u64)
    }
}

/// Why a memory table was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// A region of no bytes, or one that ends beyond the address space.
    #[error("memory region at {gpa:#x} with {len:#x} bytes is empty or wraps around")]
    BadRegion {
        /// Guest physical address of the region.
        gpa: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// Two regions share guest addresses.
    #[error("memory regions at {first:#x} and {second:#x} overlap")]
    Overlap {
        /// Guest physical address of the lower region.
        first: u64,
        /// Guest physical address of the upper region.
        second: u64,
    },
}

/// The region that was used last: nearly every transfer of a queue lies in the same one.
///
/// It is a copy, good for the map it came from and no other.
#[derive(Clone, Copy)]
pub struct Near {
    generation: u64,
    gpa: u64,
    len: u64,
    host: *mut u8,
}

// SAFETY: the pointer is used only while the map it came from is there, which the generation tells.
unsafe impl Send for Near {}

impl Default for Near {
    fn default() -> Self {
        Self {
            generation: 0,
            gpa: 0,
            len: 0,
            host: std::ptr::null_mut(),
        }
    }
}

/// All of a guest's memory at one moment.
///
/// A map never changes. Hotplug makes a new one; whoever still uses pointers of the old keeps that alive by its `Arc`.
pub struct GuestMap {
    regions: Vec<Arc<Region>>,
    generation: u64,
    /// What must last as long as anybody uses the map.
    _kept: Vec<Arc<dyn Any + Send + Sync>>,
}

static GENERATION: AtomicU64 = AtomicU64::new(1);

impl GuestMap {
    /// A map of these regions, in any order.
    ///
    /// # Errors
    ///
    /// [`MapError`] if a region is empty or wraps, or if two overlap.
    pub fn new(regions: Vec<Arc<Region>>) -> Result<Arc<Self>, MapError> {
        Self::keeping(regions, Vec::new())
    }

    /// As [`Self::new`]; the map keeps `kept` alive, as it keeps its regions: what shows them to devices, for example.
    ///
    /// # Errors
    ///
    /// As [`Self::new`].
    pub fn keeping(
        mut regions: Vec<Arc<Region>>,
        kept: Vec<Arc<dyn Any + Send + Sync>>,
    ) -> Result<Arc<Self>, MapError> {
        regions.sort_by_key(|r| r.gpa);
        for r in &regions {
            if r.len == 0 || r.gpa.checked_add(r.len).is_none() || usize::try_from(r.len).is_err() {
                return Err(MapError::BadRegion {
                    gpa: r.gpa,
                    len: r.len,
                });
            }
        }
        for pair in regions.windows(2) {
            if let [a, b] = pair
                && b.gpa - a.gpa < a.len
            {
                return Err(MapError::Overlap {
                    first: a.gpa,
                    second: b.gpa,
                });
            }
        }
        Ok(Arc::new(Self {
            regions,
            generation: GENERATION.fetch_add(1, Ordering::Relaxed),
            _kept: kept,
        }))
    }

    /// A guest without memory.
    pub fn empty() -> Arc<Self> {
        Arc::new(Self {
            regions: Vec::new(),
            generation: GENERATION.fetch_add(1, Ordering::Relaxed),
            _kept: Vec::new(),
        })
    }

    /// A number no other map of this process has.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The regions, by ascending address.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// The regions of this map that `newer` does not have, be it within a larger one.
    pub fn lost_in(&self, newer: &Self) -> Vec<&Region> {
        self.regions
            .iter()
            .filter(|r| {
                !newer
                    .regions
                    .iter()
                    .any(|n| Arc::ptr_eq(n, r) || n.contains(r))
            })
            .map(|r| &**r)
            .collect()
    }

    /// The index of the region that holds `gpa`.
    fn find(&self, gpa: u64) -> Option<&Region> {
        let after = self.regions.partition_point(|r| r.gpa <= gpa);
        let region = self.regions.get(after.checked_sub(1)?)?;
        (gpa - region.gpa < region.len).then_some(region)
    }

    /// The first part of `[gpa, gpa + len)` that is contiguous here: all of it unless it crosses into another region.
    ///
    /// `None` if `gpa` is not guest memory or `len` is 0.
    pub fn resolve(&self, gpa: u64, len: usize) -> Option<HostSeg> {
        let region = self.find(gpa)?;
        let offset = gpa - region.gpa;
        let n = (region.len - offset).min(len as u64);
        if n == 0 {
            return None;
        }
        // Both fit: `new` checked that the region's length is a `usize`.
        Some(HostSeg::new(
            region.host.wrapping_add(offset as usize),
            n as usize,
        ))
    }

    /// All of `[gpa, gpa + len)` if it is contiguous here, looking into the region `near` first; else `None`.
    #[inline]
    pub fn resolve_near(&self, near: &mut Near, gpa: u64, len: usize) -> Option<HostSeg> {
        let mut offset = gpa.wrapping_sub(near.gpa);
        if near.generation != self.generation || offset >= near.len {
            let region = self.find(gpa)?;
            *near = Near {
                generation: self.generation,
                gpa: region.gpa,
                len: region.len,
                host: region.host,
            };
            offset = gpa - region.gpa;
        }
        // `offset < near.len`, and a region's length is a `usize`.
        (len as u64 <= near.len - offset && len > 0)
            .then(|| HostSeg::new(near.host.wrapping_add(offset as usize), len))
    }

    /// All of `[gpa, gpa + len)` in one piece, or `None`.
    pub fn resolve_whole(&self, gpa: u64, len: usize) -> Option<HostSeg> {
        self.resolve(gpa, len).filter(|s| s.len() == len)
    }

    /// Copy out of guest memory. `false`, with nothing promised about `dst`, if part of it is not guest memory.
    #[must_use]
    pub fn read(&self, gpa: u64, dst: &mut [u8]) -> bool {
        self.pieces(gpa, dst.len(), |seg, done| {
            // SAFETY: the map is alive (we borrow it), so its regions are mapped; `done` and the length lie inside `dst`.
            unsafe { super::Buffers::new(&[seg]).read(0, &mut dst[done..done + seg.len()]) };
        })
    }

    /// Copy into guest memory. `false` if part of it is not guest memory; the part before it has been written.
    #[must_use]
    pub fn write(&self, gpa: u64, src: &[u8]) -> bool {
        self.pieces(gpa, src.len(), |seg, done| {
            // SAFETY: as in `read`.
            unsafe { super::Buffers::new(&[seg]).write(0, &src[done..done + seg.len()]) };
        })
    }

    fn pieces(&self, gpa: u64, len: usize, mut f: impl FnMut(HostSeg, usize)) -> bool {
        let mut done = 0;
        while done < len {
            let Some(at) = gpa.checked_add(done as u64) else {
                return false;
            };
            let Some(seg) = self.resolve(at, len - done) else {
                return false;
            };
            f(seg, done);
            done += seg.len();
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(gpa: u64, len: usize) -> Arc<Region> {
        let mut bytes = vec![0u8; len.max(1)].into_boxed_slice();
        let host = bytes.as_mut_ptr();
        // SAFETY: the box is the owner and is never looked at again.
        Arc::new(unsafe { Region::new(gpa, len as u64, host, Arc::new(bytes)) })
    }

    #[test]
    fn overlap_emptiness_and_wrap_are_refused() {
        let err = |r| GuestMap::new(r).err();
        assert_eq!(
            err(vec![region(0x3000, 0x1000), region(0x1000, 0x2001)]),
            Some(MapError::Overlap {
                first: 0x1000,
                second: 0x3000
            })
        );
        assert_eq!(
            err(vec![region(5, 0)]),
            Some(MapError::BadRegion { gpa: 5, len: 0 })
        );
        let top = u64::MAX - 10;
        assert_eq!(
            err(vec![region(top, 11)]),
            Some(MapError::BadRegion { gpa: top, len: 11 })
        );
        assert_eq!(err(vec![region(0, 16), region(16, 16)]), None);
    }

    #[test]
    fn what_is_near_is_never_used_for_another_map() {
        let one = GuestMap::new(vec![region(0x1000, 0x1000), region(0x4000, 0x100)]).unwrap();
        let other = GuestMap::new(vec![region(0x1000, 0x800)]).unwrap();
        let mut near = Near::default();
        for (gpa, len) in [(0x1000, 1), (0x1fff, 1), (0x4000, 0x100), (0x1800, 0x800)] {
            let seg = one.resolve_near(&mut near, gpa, len).unwrap();
            let same = one.resolve_whole(gpa, len).unwrap();
            assert_eq!(seg.parts(), same.parts());
        }
        let bad = [
            (0xfff, 1),
            (0x1fff, 2),
            (0x2000, 1),
            (u64::MAX, 1),
            (0x1000, 0),
        ];
        for (gpa, len) in bad {
            assert!(one.resolve_near(&mut near, gpa, len).is_none());
        }
        assert!(one.resolve_near(&mut near, 0x1800, 8).is_some());
        assert!(other.resolve_near(&mut near, 0x1800, 8).is_none());
        let seg = other.resolve_near(&mut near, 0x1000, 8).unwrap();
        assert_eq!(seg.parts(), other.resolve_whole(0x1000, 8).unwrap().parts());
    }

    #[test]
    fn copies_cross_neighbours_but_not_holes() {
        let map =
            GuestMap::new(vec![region(0x100, 16), region(0x110, 16), region(0x130, 4)]).unwrap();
        assert!(map.write(0x10c, &[1, 2, 3, 4, 5, 6, 7, 8]));
        let mut out = [0; 6];
        assert!(map.read(0x10e, &mut out));
        assert_eq!(out, [3, 4, 5, 6, 7, 8]);
        assert!(!map.read(0x11f, &mut [0; 2]), "0x120 is a hole");
        assert!(!map.read(0xff, &mut [0; 1]));
        assert!(!map.write(u64::MAX, &[0; 2]));
        assert!(map.resolve_whole(0x10c, 8).is_none());
        assert_eq!(map.resolve(0x10c, 8).unwrap().len(), 4);
        assert!(map.resolve(0x133, 1).is_some() && map.resolve(0x134, 1).is_none());
    }
}
