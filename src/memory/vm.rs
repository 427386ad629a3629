//! Regions of guest memory out of mappings that the crate `vm-memory` made of a front-end's files.

#![expect(
    unsafe_code,
    reason = "the fence: where a foreign mapping becomes a Region"
)]

use std::any::Any;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::FileType;
use vm_memory::{FileOffset, MmapRegion};

use super::map::Region;
use super::sigbus::Guard;

/// `f_type` of a hugetlbfs file.
const HUGETLBFS_MAGIC: u64 = 0x9584_58F6;

/// `f_type` of the file systems whose pages come from this kernel and its disks: tmpfs (memfd too), hugetlbfs, ramfs, ext4, XFS, Btrfs, F2FS, ZFS,
/// bcachefs. A page of any other may come from a process or a network (FUSE, NFS, CIFS, 9p, Ceph, or an overlay of them), and whoever touches it, a
/// poller with all its guests, waits for as long as those like.
const FILE_SYSTEMS: [u64; 9] = [
    0x0102_1994,
    HUGETLBFS_MAGIC,
    0x8584_58F6,
    0xEF53,
    0x5846_5342,
    0x9123_683E,
    0xF2F5_2010,
    0x2FC1_2FC1,
    0xCA45_1A4E,
];

/// The most address space that one front-end's files are mapped to: this process has 128 TiB for all.
pub const MOST_MAPPED: u64 = 16 << 40;

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
/// It is no regular file of a file system that memory may be on, is shorter than the region says, or the region is not made of whole pages of it.
pub fn check_file(file: &FileOffset, gpa: u64, len: u64) -> io::Result<Identity> {
    let stat = rustix::fs::fstat(file.file())?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(io::Error::other(format!(
            "the memory region at {gpa:#x} is not a file of shared memory (memfd, tmpfs or hugetlbfs)"
        )));
    }
    let kind = rustix::fs::fstatfs(file.file())?.f_type as u64;
    if !FILE_SYSTEMS.contains(&kind) {
        return Err(io::Error::other(format!(
            "the memory region at {gpa:#x} is a file on a file system that memory is not taken from (type {kind:#x}): use memfd, tmpfs, hugetlbfs, or a file on a local disk"
        )));
    }
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    let offset = file.start();
    if offset.checked_add(len).is_none_or(|end| end > size) {
        return Err(io::Error::other(format!(
            "the memory region at {gpa:#x} says {len:#x} bytes from offset {offset:#x} of its file, which has only {size:#x}"
        )));
    }
    let page = page_size(file.file())?;
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

/// Whether another `len` bytes may be mapped for a front-end for which these are mapped already.
///
/// # Errors
///
/// It would have more than [`MOST_MAPPED`].
pub fn check_room(mapped: impl Iterator<Item = u64>, len: u64) -> io::Result<()> {
    let all = mapped.fold(len, u64::saturating_add);
    if all > MOST_MAPPED {
        return Err(io::Error::other(format!(
            "its files would take {all:#x} bytes of address space, more than {MOST_MAPPED:#x}"
        )));
    }
    Ok(())
}

/// A file from its beginning, and the bytes of its whole pages.
fn whole_pages(file: File) -> io::Result<(FileOffset, u64)> {
    let size = u64::try_from(rustix::fs::fstat(&file)?.st_size).unwrap_or(0);
    let page = page_size(&file)?;
    let len = size - size.checked_rem(page).unwrap_or(0);
    Ok((FileOffset::new(file, 0), len))
}

/// What mappings of this file are made of.
fn page_size(file: &File) -> io::Result<u64> {
    let fs = rustix::fs::fstatfs(file)?;
    Ok(match u64::try_from(fs.f_type) {
        Ok(HUGETLBFS_MAGIC) => u64::try_from(fs.f_bsize).unwrap_or(0),
        _ => rustix::param::page_size() as u64,
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

    /// All whole pages of a file, for [`Self::piece`]s of it: the one of `known` that shows them, or else a new mapping, for which `room` is asked
    /// with its bytes. `wake` as in [`Self::new`].
    ///
    /// # Errors
    ///
    /// As [`Self::new`], and those of `room`.
    pub fn whole_file(
        file: File,
        mut known: impl Iterator<Item = Arc<Self>>,
        room: impl FnOnce(u64) -> io::Result<()>,
        wake: Arc<OwnedFd>,
    ) -> io::Result<Arc<Self>> {
        let (file, len) = whole_pages(file)?;
        let identity = check_file(&file, 0, len)?;
        if let Some(same) = known.find(|known| known.identity == identity) {
            return Ok(same);
        }
        room(len)?;
        Self::new(file, 0, len, wake)
    }

    /// Bytes that are mapped.
    pub fn bytes(&self) -> u64 {
        self.identity.len
    }

    /// The file that is mapped.
    pub fn file(&self) -> Option<&File> {
        self.mapping.file_offset().map(FileOffset::file)
    }

    /// `len` bytes from `offset` on, shown to the guest at `gpa`; `None` if there are not so many.
    pub fn piece(self: &Arc<Self>, gpa: u64, offset: u64, len: u64) -> Option<Arc<Region>> {
        let end = offset.checked_add(len)?;
        if len == 0 || end > self.identity.len {
            return None;
        }
        let host = self
            .mapping
            .as_ptr()
            .wrapping_add(usize::try_from(offset).ok()?);
        // SAFETY: as in `region`, for a part of the mapping, which lies inside it: just looked at.
        Some(Arc::new(unsafe {
            Region::new(gpa, len, host, self.owner())
        }))
    }

    fn owner(self: &Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        Arc::<Self>::clone(self)
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
        // SAFETY: the mapping is readable, writable and shared, has `len` bytes at `as_ptr`, and lives as long as its owner. After a
        // fault it is a private one of the same size at the same place, which is as good. Nobody makes references into it.
        Arc::new(unsafe {
            Region::new(
                self.identity.gpa,
                self.identity.len,
                self.mapping.as_ptr(),
                self.owner(),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    fn memfd(len: u64) -> File {
        crate::driver::dma::shared_memory("guest", len).unwrap()
    }

    fn region(file_len: u64, offset: u64, len: u64) -> (std::fs::File, io::Result<Arc<VmRegion>>) {
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let file = memfd(file_len);
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
        // A regular file, whose bytes nobody vouches for.
        let proc = FileOffset::new(File::open("/proc/self/maps").unwrap(), 0);
        let e = check_file(&proc, 0, 4096).unwrap_err();
        assert!(e.to_string().contains("(type 0x9fa0)"), "{e}");
    }

    #[test]
    fn address_space_has_an_end() {
        assert!(check_room([1 << 40, MOST_MAPPED - (2 << 40)].into_iter(), 1 << 40).is_ok());
        assert!(
            check_room(
                [1 << 40, MOST_MAPPED - (2 << 40)].into_iter(),
                1 + (1 << 40)
            )
            .is_err()
        );
        assert!(check_room([u64::MAX].into_iter(), u64::MAX).is_err());
    }

    #[test]
    fn pieces_of_a_file_lie_in_one_mapping() {
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let file = memfd(3 * 4096 + 5);
        let of = |file: &File, known: &[&Arc<VmRegion>]| {
            let known = known.iter().copied().cloned();
            let room = |len| check_room([].into_iter(), len);
            let file = file.try_clone().unwrap();
            VmRegion::whole_file(file, known, room, Arc::clone(&wake))
        };
        let whole = of(&file, &[]).unwrap();
        let other = of(&memfd(4096), &[&whole]).unwrap();
        assert!(!Arc::ptr_eq(&whole, &other));
        assert!(Arc::ptr_eq(&whole, &of(&file, &[&other, &whole]).unwrap()));
        assert!(of(&memfd(MOST_MAPPED + 4096), &[]).is_err());
        let low = whole.piece(0x10000, 0x200, 0x1000).unwrap();
        let high = whole.piece(0x11000, 0x1200, 0x1e00).unwrap();
        assert_eq!(low.host().wrapping_add(0x1000), high.host());
        for (offset, len) in [(0, 0x3001), (0x3000, 1), (u64::MAX, 2), (0x100, 0)] {
            assert!(
                whole.piece(0, offset, len).is_none(),
                "{offset:#x} {len:#x}"
            );
        }
        let map = super::super::GuestMap::new(vec![low, high]).unwrap();
        assert!(map.write(0x10ffe, &[1, 2, 3, 4]));
        let mut out = [0; 4];
        use std::os::unix::fs::FileExt as _;
        file.read_exact_at(&mut out, 0x11fe).unwrap();
        assert_eq!(out, [1, 2, 3, 4]);
        file.set_len(4 * 4096).unwrap();
        let grown = of(&file, &[&whole]).unwrap();
        assert!(!Arc::ptr_eq(&whole, &grown), "it has grown");
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
