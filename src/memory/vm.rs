//! Regions of guest memory out of mappings that the crate `vm-memory` made of a front-end's files.

#![expect(
    unsafe_code,
    reason = "the fence: where a foreign mapping becomes a Region"
)]

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::FileType;
use vm_memory::{FileOffset, MmapRegion};

use super::map::Region;
use super::sigbus::Guard;

/// `f_type` of a hugetlbfs file.
const HUGETLBFS_MAGIC: u64 = 0x9584_58F6;

/// What a mapping shows: two mappings with the same identity show the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    device: u64,
    inode: u64,
    offset: u64,
    gpa: u64,
    len: u64,
}

/// A mapped region of a guest and the guard that watches it.
pub struct VmRegion {
    guard: Guard,
    /// After the guard, which must end before the mapping does.
    mapping: MmapRegion<()>,
    identity: Identity,
}

/// Check a file that is to be guest memory, without mapping it.
///
/// # Errors
///
/// It is no regular file, is shorter than the region says, or the region is not made of whole pages of it.
pub fn check_file(file: &FileOffset, gpa: u64, len: u64) -> io::Result<Identity> {
    let stat = rustix::fs::fstat(file.file())?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(io::Error::other(format!(
            "the memory region at {gpa:#x} is not a file of shared memory (memfd, tmpfs or hugetlbfs)"
        )));
    }
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    let offset = file.start();
    if offset.checked_add(len).is_none_or(|end| end > size) {
        return Err(io::Error::other(format!(
            "the memory region at {gpa:#x} says {len:#x} bytes from offset {offset:#x} of its file, which has only {size:#x}"
        )));
    }
    let fs = rustix::fs::fstatfs(file.file())?;
    let page = match u64::try_from(fs.f_type) {
        Ok(HUGETLBFS_MAGIC) => u64::try_from(fs.f_bsize).unwrap_or(0),
        _ => rustix::param::page_size() as u64,
    };
    if len == 0 || !len.is_multiple_of(page) || !offset.is_multiple_of(page) {
        return Err(io::Error::other(format!(
            "the memory region at {gpa:#x} with {len:#x} bytes from offset {offset:#x} is not made of pages of {page:#x} bytes"
        )));
    }
    Ok(Identity {
        device: stat.st_dev,
        inode: stat.st_ino,
        offset,
        gpa,
        len,
    })
}

impl VmRegion {
    /// Map a file as the guest memory at `gpa`. `wake` is signalled when the file turns out to be shorter than the mapping.
    ///
    /// # Errors
    ///
    /// As [`check_file`]; also when the kernel refuses the mapping, or too many regions are mapped.
    pub fn new(file: FileOffset, gpa: u64, len: u64, wake: Arc<OwnedFd>) -> io::Result<Arc<Self>> {
        let identity = check_file(&file, gpa, len)?;
        let bytes = usize::try_from(len).map_err(io::Error::other)?;
        let mapping = MmapRegion::from_file(file, bytes).map_err(|e| {
            io::Error::other(format!("cannot map the memory region at {gpa:#x}: {e}"))
        })?;
        // SAFETY: `mapping` is a shared mapping of whole pages that nothing but accesses by copy and by atomics use.
        // `self` drops the guard first.
        let guard = unsafe { Guard::new(mapping.as_ptr(), bytes, wake)? };
        Ok(Arc::new(Self {
            guard,
            mapping,
            identity,
        }))
    }

    /// What it shows.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Guest physical address.
    pub fn gpa(&self) -> u64 {
        self.identity.gpa
    }

    /// Whether this is the region of `len` bytes at `gpa`.
    pub fn is_at(&self, gpa: u64, len: u64) -> bool {
        self.identity.gpa == gpa && self.identity.len == len
    }

    /// Whether the file was cut and an access has found out. The region reads as zeroes since then.
    pub fn is_cut(&self) -> bool {
        self.guard.hit()
    }

    /// The region, which keeps this mapping alive.
    pub fn region(self: &Arc<Self>) -> Arc<Region> {
        let owner: Arc<dyn std::any::Any + Send + Sync> = Arc::<Self>::clone(self);
        // SAFETY: the mapping is readable, writable and shared, has `len` bytes at `as_ptr`, and lives as long as `owner`. After a
        // fault it is a private one of the same size at the same place, which is as good. Nobody makes references into it.
        Arc::new(unsafe {
            Region::new(
                self.identity.gpa,
                self.identity.len,
                self.mapping.as_ptr(),
                owner,
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    fn region(file_len: u64, offset: u64, len: u64) -> (std::fs::File, io::Result<Arc<VmRegion>>) {
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let file = tempfile::tempfile().unwrap();
        file.set_len(file_len).unwrap();
        let at = FileOffset::new(file.try_clone().unwrap(), offset);
        (file, VmRegion::new(at, 0x1000, len, wake))
    }

    #[test]
    fn files_that_do_not_hold_the_region_are_refused() {
        for (file_len, offset, len, why) in [
            (0, 0, 4096, "which has only 0x0"),
            (8191, 0, 8192, "which has only 0x1fff"),
            (8192, 4096, 8192, "which has only 0x2000"),
            (8192, u64::MAX - 4095, 8192, "which has only 0x2000"),
            (8192, 0, 100, "is not made of pages"),
            (8192, 512, 4096, "is not made of pages"),
            (8192, 0, 0, "is not made of pages"),
        ] {
            let e = region(file_len, offset, len).1.err().unwrap();
            assert!(e.to_string().contains(why), "{e}");
        }
        let null = FileOffset::new(std::fs::File::open("/dev/zero").unwrap(), 0);
        let e = check_file(&null, 0, 4096).unwrap_err();
        assert!(e.to_string().contains("not a file of shared memory"), "{e}");
    }

    #[test]
    fn a_region_keeps_its_mapping() {
        let (_file, vm) = region(12288, 4096, 8192);
        let vm = vm.unwrap();
        let region = vm.region();
        assert_eq!((region.gpa(), region.len()), (0x1000, 8192));
        let weak = Arc::downgrade(&vm);
        drop(vm);
        assert!(weak.upgrade().is_some());
        drop(region);
        assert!(weak.upgrade().is_none());
    }

    #[test]
    fn a_cut_file_is_noticed_through_the_map() {
        super::super::sigbus::install().unwrap();
        let (file, vm) = region(8192, 0, 8192);
        let vm = vm.unwrap();
        let map = super::super::GuestMap::new(vec![vm.region()]).unwrap();
        assert!(map.write(0x1000, &[5; 16]));
        file.set_len(0).unwrap();
        let mut out = [1; 16];
        assert!(map.read(0x1000, &mut out));
        assert_eq!(out, [0; 16]);
        assert!(vm.is_cut());
    }
}
