//! The bytes of namespaces in memory, in files that the next process finds again.
//!
//! `ns-<nsid>` holds the bytes, on the tmpfs of the directory, or, of huge pages, a file on a hugetlbfs. `ns-<nsid>.id` says, once that
//! file is there whole, what it is: a random id, size, which pages, inode, path. A store is known by its id: what was stored
//! anew, with zeroes, has another one.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::keep::Keep;
use super::place::{Place, is_ours, is_tmpfs};
use crate::memory::Store;

/// `f_type` of a hugetlbfs.
const HUGETLBFS_MAGIC: u64 = 0x9584_58F6;

/// Bytes of the pages we want there.
const HUGE_PAGE: u64 = 2 << 20;

/// What of a tmpfs must stay free beyond a namespace: state files of other controllers live there too.
const MARGIN: u64 = 16 << 20;

/// The name of our directory on a hugetlbfs.
const HUGE_DIR: &str = "vhost-user-nvme";

/// Which pages a store may be made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugeWish {
    /// Normal ones.
    Never,
    /// Huge ones if there are enough.
    IfFree,
    /// Huge ones.
    Always,
}

/// A store that the next process finds again.
pub struct Kept {
    /// Its bytes.
    pub store: Store,
    /// What it is known by.
    pub id: String,
    /// It was there before, with what is in it.
    pub found: bool,
}

/// What is written about a store, in lines.
#[derive(Clone, Debug, PartialEq, Eq)]
struct About {
    id: String,
    len: u64,
    huge: bool,
    inode: (u64, u64),
    path: PathBuf,
}

impl About {
    fn text(&self) -> Option<String> {
        let Self {
            id,
            len,
            huge,
            inode: (device, inode),
            path,
        } = self;
        let path = path.to_str().filter(|p| !p.contains('\n'))?;
        Some(format!("{id}\n{len}\n{huge}\n{device}\n{inode}\n{path}\n"))
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let mut next = || lines.next();
        Some(Self {
            id: next()?.to_owned(),
            len: next()?.parse().ok()?,
            huge: next()?.parse().ok()?,
            inode: (next()?.parse().ok()?, next()?.parse().ok()?),
            path: next()?.into(),
        })
    }

    /// The file, if it is still the one that was meant.
    fn open(&self) -> Option<File> {
        let file = open(&self.path, false).ok()?;
        let meta = file.metadata().ok()?;
        let bytes = Store::bytes_of(self.len, self.huge).ok()?;
        let same = (meta.dev(), meta.ino()) == self.inode && meta.len() == bytes;
        same.then_some(file)
    }
}

impl Keep {
    /// The bytes of a memory namespace, which the next process finds again; `None` if they cannot be kept, which was logged where it is
    /// a surprise. What is there of another size, or of pages that are not wished for, is replaced.
    pub fn store(&self, nsid: u32, len: u64, wish: HugeWish) -> Option<Kept> {
        let place = self.place()?;
        if let Some(about) = place.about(nsid) {
            let fits = match wish {
                HugeWish::Never => !about.huge,
                HugeWish::IfFree => true,
                HugeWish::Always => about.huge,
            };
            let file = (fits && about.len == len).then(|| about.open()).flatten();
            let store = file.and_then(|file| Store::over(file, len, about.huge).ok());
            if let Some(store) = store {
                return Some(Kept {
                    store,
                    id: about.id,
                    found: true,
                });
            }
            tracing::info!(
                nsid,
                "what is left of a memory namespace does not fit it; it begins anew"
            );
        }
        place.forget(nsid);
        let lost = |why: &str| {
            tracing::warn!(
                nsid,
                "the data of a memory namespace will not survive this process: {why}"
            );
        };
        let mut no_file = None;
        if wish != HugeWish::Never {
            let made = match hugetlbfs() {
                Some(mount) => place.huge(&mount, nsid, len),
                None => Err(io::Error::other("no hugetlbfs of 2 MiB pages is mounted")),
            };
            match made {
                Ok(kept) => return Some(kept),
                // Without a mount they can be had all the same.
                Err(e) if wish == HugeWish::Always => {
                    lost(&format!("it has huge pages, and no file for them: {e}"));
                    return None;
                }
                Err(e) => no_file = Some(e),
            }
        }
        match place.normal(nsid, len) {
            Ok(kept) => {
                // To find the data again is worth more than huge pages.
                if let Some(cause) = no_file
                    && free_huge_pages() >= len.div_ceil(HUGE_PAGE)
                {
                    tracing::info!(
                        nsid,
                        %cause,
                        "huge pages are free, but there is no file for them: a memory namespace has normal ones, so that its data survives \
                         this process (to change that: mount -t hugetlbfs hugetlbfs /dev/hugepages, and let the daemon write there)"
                    );
                }
                Some(kept)
            }
            Err(e) => {
                lost(&e.to_string());
                None
            }
        }
    }
}

impl Place {
    fn id_path(&self, nsid: u32) -> PathBuf {
        self.path.join(format!("ns-{nsid}.id"))
    }

    fn about(&self, nsid: u32) -> Option<About> {
        let mut text = String::new();
        let file = self.file(&format!("ns-{nsid}.id"), OFlags::RDONLY).ok()?;
        file.take(8192).read_to_string(&mut text).ok()?;
        About::parse(&text)
    }

    /// Remove a store and what is said about it, in this order: what is said without a store means nothing.
    fn forget(&self, nsid: u32) {
        if let Some(about) = self.about(nsid)
            && about.open().is_some()
        {
            let _ = std::fs::remove_file(&about.path);
        }
        let _ = std::fs::remove_file(self.path.join(format!("ns-{nsid}")));
        let _ = std::fs::remove_file(self.id_path(nsid));
    }

    /// Remove stores that are not in this directory.
    pub(super) fn remove_elsewhere(&self) {
        for entry in std::fs::read_dir(&self.path)
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = entry.file_name();
            let nsid = name
                .to_str()
                .and_then(|n| n.strip_prefix("ns-")?.strip_suffix(".id"));
            if let Some(nsid) = nsid.and_then(|n| n.parse().ok()) {
                self.forget(nsid);
            }
        }
    }

    fn normal(&self, nsid: u32, len: u64) -> io::Result<Kept> {
        if !is_tmpfs(&self.path) {
            return Err(io::Error::other("the state directory is not on tmpfs"));
        }
        let fs = rustix::fs::statvfs(&self.path)?;
        let free = fs.f_bavail.saturating_mul(fs.f_frsize);
        if free < len.saturating_add(MARGIN) {
            return Err(io::Error::other(format!(
                "it has {len} bytes, and the tmpfs of {} only {free}; enlarge that (mount -o remount,size=...), or choose another --state-dir",
                self.path.display()
            )));
        }
        self.make(nsid, len, false, self.path.join(format!("ns-{nsid}")))
    }

    fn huge(&self, mount: &Path, nsid: u32, len: u64) -> io::Result<Kept> {
        let dir = mount.join(HUGE_DIR);
        match std::fs::DirBuilder::new().mode(0o700).create(&dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => is_ours(&dir).map_err(io::Error::other)?,
        }
        let controller = self.path.file_name().unwrap_or_default().to_string_lossy();
        let path = dir.join(format!("{controller}-ns-{nsid}"));
        let _ = std::fs::remove_file(&path);
        let made = self.make(nsid, len, true, path.clone());
        if made.is_err() {
            let _ = std::fs::remove_file(path);
        }
        made
    }

    fn make(&self, nsid: u32, len: u64, huge: bool, path: PathBuf) -> io::Result<Kept> {
        let file = open(&path, true)?;
        file.set_len(Store::bytes_of(len, huge)?)?;
        let meta = file.metadata()?;
        let store = Store::over(file, len, huge)?;
        let about = About {
            id: random_id()?,
            len,
            huge,
            inode: (meta.dev(), meta.ino()),
            path,
        };
        let text = about.text().ok_or(io::ErrorKind::InvalidFilename)?;
        let new = self.path.join(format!("ns-{nsid}.new"));
        let _ = std::fs::remove_file(&new);
        open(&new, true)?.write_all(text.as_bytes())?;
        std::fs::rename(new, self.id_path(nsid))?;
        Ok(Kept {
            store,
            id: about.id,
            found: false,
        })
    }
}

/// Something that no store before had: 32 hexadecimal digits.
///
/// # Errors
///
/// The kernel has no random numbers for us.
pub fn random_id() -> io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

fn open(path: &Path, new: bool) -> io::Result<File> {
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(new)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
}

/// Where a hugetlbfs of 2 MiB pages is mounted that we may write to.
fn hugetlbfs() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
    let of_kind = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (path, kind) = (words.next()?, words.next()?);
        (kind == "hugetlbfs").then(|| PathBuf::from(path))
    });
    let usable = |path: &PathBuf| {
        let right = rustix::fs::statfs(path).is_ok_and(|fs| {
            u64::try_from(fs.f_type) == Ok(HUGETLBFS_MAGIC)
                && u64::try_from(fs.f_bsize) == Ok(HUGE_PAGE)
        });
        right && rustix::fs::access(path, rustix::fs::Access::WRITE_OK).is_ok()
    };
    of_kind.into_iter().find(usable)
}

/// Huge pages that nobody has, and that nobody was promised.
fn free_huge_pages() -> u64 {
    let number = |name| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.trim().parse::<u64>().unwrap_or(0)
    };
    number("free_hugepages").saturating_sub(number("resv_hugepages"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A place on a tmpfs.
    fn place() -> (tempfile::TempDir, Keep) {
        let root = tempfile::tempdir_in("/dev/shm").unwrap();
        assert!(
            is_tmpfs(root.path()),
            "these tests need a tmpfs at /dev/shm"
        );
        let keep = Keep::open(root.path(), Path::new("/x.sock"), Duration::ZERO).unwrap();
        (root, keep)
    }

    fn read(kept: &Kept) -> [u8; 3] {
        kept.store.get(5000).unwrap()
    }

    #[test]
    fn what_is_stored_is_found_again_and_what_does_not_fit_is_new() {
        let (_root, keep) = place();
        let store = |len| keep.store(1, len, HugeWish::Never).unwrap();
        let first = store(10_000);
        assert!(!first.found && first.id.len() == 32);
        assert!(first.store.put(5000, &mut [1, 2, 3]));
        let again = store(10_000);
        assert_eq!(
            (again.found, &again.id, read(&again)),
            (true, &first.id, [1, 2, 3])
        );
        let other = keep.store(2, 10_000, HugeWish::Never).unwrap();
        assert!(!other.found && other.id != first.id && read(&other) == [0; 3]);

        let larger = store(20_000);
        assert!(!larger.found && larger.id != first.id);
        assert_eq!(read(&larger), [0; 3]);
        assert!(larger.store.put(5000, &mut [4, 5, 6]));
        let dir = keep.path().unwrap();
        // Another file in its place, and no file.
        std::fs::rename(dir.join("ns-2"), dir.join("ns-1")).unwrap();
        let new = store(20_000);
        assert!(!new.found && new.id != larger.id && read(&new) == [0; 3]);
        std::fs::remove_file(dir.join("ns-1")).unwrap();
        assert!(!store(20_000).found);
        std::fs::write(dir.join("ns-1.id"), "nonsense").unwrap();
        assert!(!store(20_000).found);
        assert!(store(20_000).found);

        assert!(keep.store(3, 1 << 60, HugeWish::Never).is_none(), "no room");
        keep.clear().unwrap();
        assert!(Keep::nowhere().store(1, 4096, HugeWish::Never).is_none());
    }

    /// Whether huge pages are free or not, and whether there is a hugetlbfs or not.
    #[test]
    fn what_need_not_be_huge_always_survives() {
        let (_root, keep) = place();
        let first = keep.store(1, 4 << 20, HugeWish::IfFree).unwrap();
        assert!(first.store.put(5000, &mut [1, 2, 3]));
        drop(first);
        let again = keep.store(1, 4 << 20, HugeWish::IfFree).unwrap();
        assert!(again.found);
        assert_eq!(read(&again), [1, 2, 3]);
        drop(again);
        keep.clear().unwrap();
    }

    #[test]
    fn a_store_that_is_cut_fails_from_then_on() {
        let (_root, keep) = place();
        let kept = keep.store(1, 20_000, HugeWish::Never).unwrap();
        assert!(kept.store.put(10_000, &mut [1; 100]));
        let file = open(&keep.path().unwrap().join("ns-1"), false).unwrap();
        file.set_len(4096).unwrap();
        assert!(!kept.store.put(10_000, &mut [1; 100]));
        assert_eq!(kept.store.get::<4>(0), None);
        assert_eq!(kept.store.is(0, &mut [0; 4]), None);
        assert!(!kept.store.zero(0, 100));
        assert!(kept.store.is_broken());
    }
}
