//! The memory that the client lets the device reach: `DMA_MAP` and `DMA_UNMAP`, at any time and in any pieces.
//!
//! A VMM takes memory away and gives it back, cut differently, while the guest runs (QEMU does so whenever firmware changes what
//! the legacy area shows). Commands that are out must not notice. So each file is mapped here as a whole, once: pieces of it that come back
//! are where they were, and neighbours are one region. And memory that was taken away is used until it has come back or does not seem to,
//! which is what [`Memory::is_settled`] tells; the answers wait for that (`docs/adr/0015-unmapped-memory-lingers.md`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use rustix::io::Errno;

use super::Refusal;
use crate::memory::{GuestMap, MapError, Region, VmRegion, check_room};

/// Pieces of memory there can be.
pub const MAX_PIECES: usize = 4096;
/// Files there can be: however a VMM cuts its memory into pieces, it is a few files.
const MAX_FILES: usize = 512;

/// Ranges that the log is told of.
const MOST_WARNINGS: usize = 64;

/// Where the memory of a PC ends that firmware switches between ROM and RAM.
const LEGACY_END: u64 = 0x10_0000;
/// What is no memory in a PC: the frame buffer of old.
const LEGACY_HOLE: (u64, u64) = (0xA_0000, 0xC_0000);

/// The device may read it.
const READ: u32 = 1;
/// The device may write it.
const WRITE: u32 = 2;
/// `DMA_UNMAP`: report dirty pages.
const GET_DIRTY: u32 = 1;
/// `DMA_UNMAP` of everything, in the numbering of the kernel and in that of the crate `vfio_user`.
const ALL: u32 = 2 | 4;

/// A piece as the client maps it.
#[derive(Clone)]
struct Piece {
    len: u64,
    /// What it shows; `None` if the device cannot reach it.
    shown: Option<Shown>,
}

#[derive(Clone)]
struct Shown {
    file: Arc<VmRegion>,
    offset: u64,
}

/// A region of the map that the controller has.
struct Used {
    len: u64,
    shown: Shown,
    region: Arc<Region>,
}

/// All memory of one client.
pub struct Memory {
    /// Of the controller, for the log.
    name: String,
    /// By address; they do not overlap.
    pieces: BTreeMap<u64, Piece>,
    files: Vec<Weak<VmRegion>>,
    used: BTreeMap<u64, Used>,
    /// Address and length of what was taken away since the controller got its map.
    leaving: Vec<(u64, u64)>,
    changed: bool,
    /// Ranges that the log was told of.
    warned: BTreeSet<(u64, u64)>,
    wake: Arc<OwnedFd>,
}

impl Memory {
    /// None. `wake` is signalled when a file turns out to be shorter than it was.
    pub fn new(name: &str, wake: Arc<OwnedFd>) -> Self {
        Self {
            name: name.into(),
            pieces: BTreeMap::new(),
            files: Vec::new(),
            used: BTreeMap::new(),
            leaving: Vec::new(),
            changed: false,
            warned: BTreeSet::new(),
            wake,
        }
    }

    /// `DMA_MAP`: `len` bytes at `address` are those of `file` from `offset` on.
    pub fn map(
        &mut self,
        flags: u32,
        offset: u64,
        address: u64,
        len: u64,
        file: Option<File>,
    ) -> Result<(), Refusal> {
        self.has_room(address, len)?;
        let shown = self.show(flags, offset, address, len, file)?;
        self.changed |= shown.is_some();
        self.pieces.insert(address, Piece { len, shown });
        Ok(())
    }

    /// Whether another piece can be there.
    fn has_room(&self, address: u64, len: u64) -> Result<(), Refusal> {
        let end = address.checked_add(len).filter(|_| len > 0);
        let Some(end) = end else {
            return Err(Refusal::invalid(format!(
                "{len:#x} bytes at {address:#x} are none, or wrap around"
            )));
        };
        let before = self.pieces.range(..end).next_back();
        if let Some((&other, piece)) = before
            && other + piece.len > address
        {
            return Err(Refusal::new(
                Errno::EXIST,
                format!("{len:#x} bytes at {address:#x} overlap memory at {other:#x}"),
            ));
        }
        if self.pieces.len() >= MAX_PIECES {
            let why = format!("there are {MAX_PIECES} pieces of memory already");
            return Err(Refusal::new(Errno::NOSPC, why));
        }
        Ok(())
    }

    fn show(
        &mut self,
        flags: u32,
        offset: u64,
        address: u64,
        len: u64,
        file: Option<File>,
    ) -> Result<Option<Shown>, Refusal> {
        let last = address + (len - 1);
        let Some(file) = file else {
            self.warn(address, last, "it came without a file");
            return Ok(None);
        };
        if flags & (READ | WRITE) != READ | WRITE {
            // Nothing that is read-only is ever a buffer of a driver: it is ROM, or what shadows it.
            return Ok(None);
        }
        let file = match self.file(file) {
            Ok(file) => file,
            Err(e) => {
                self.warn(address, last, &e.to_string());
                return Ok(None);
            }
        };
        if file.piece(address, offset, len).is_none() {
            return Err(Refusal::invalid(format!(
                "{len:#x} bytes at {address:#x} are said to be at {offset:#x} of a file that has fewer"
            )));
        }
        Ok(Some(Shown { file, offset }))
    }

    /// All pieces, for another one: address, length, and file and offset of what can be reached.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, u64, Option<(&File, u64)>)> {
        self.pieces.iter().map(|(&address, piece)| {
            let shown = piece.shown.as_ref();
            let shown = shown.and_then(|s| Some((s.file.file()?, s.offset)));
            (address, piece.len, shown)
        })
    }

    /// Take over a piece of another one.
    pub fn restore(
        &mut self,
        address: u64,
        len: u64,
        shown: Option<(File, u64)>,
    ) -> Result<(), Refusal> {
        match shown {
            Some((file, offset)) => self.map(READ | WRITE, offset, address, len, Some(file)),
            // Whoever left it has said why. Like ROM, it is only known to be there.
            None => self.has_room(address, len).map(|()| {
                self.pieces.insert(address, Piece { len, shown: None });
            }),
        }
    }

    /// Say, once for each range and not of too many, that the controller will not reach some memory: firmware maps it again and again.
    fn warn(&mut self, first: u64, last: u64, why: &str) {
        if self.warned.len() < MOST_WARNINGS && self.warned.insert((first, last)) {
            let controller = self.name.as_str();
            tracing::warn!(
                controller,
                "memory at {first:#x} to {last:#x} cannot be reached by the controller: {why}"
            );
        }
    }

    /// The mapping of a whole file: the one there is, or a new one.
    fn file(&mut self, file: File) -> std::io::Result<Arc<VmRegion>> {
        self.files.retain(|f| f.strong_count() > 0);
        let known = || self.files.iter().filter_map(Weak::upgrade);
        let room = |len| match self.files.len() {
            0..MAX_FILES => check_room(known().map(|file| file.bytes()), len),
            _ => Err(std::io::Error::other(format!(
                "there are {MAX_FILES} files of memory already"
            ))),
        };
        let file = VmRegion::whole_file(file, known(), room, Arc::clone(&self.wake))?;
        let new = Arc::downgrade(&file);
        if !self.files.iter().any(|known| known.ptr_eq(&new)) {
            self.files.push(new);
        }
        Ok(file)
    }

    /// `DMA_UNMAP`: the pieces that make up `len` bytes at `address`. How many bytes those were.
    pub fn unmap(&mut self, flags: u32, address: u64, len: u64) -> Result<u64, Refusal> {
        if flags & ALL != 0 && len == 0 {
            let all: Vec<u64> = self.pieces.keys().copied().collect();
            return Ok(all.into_iter().map(|at| self.remove(at)).sum());
        }
        if flags & GET_DIRTY != 0 {
            return Err(Refusal::new(Errno::OPNOTSUPP, "dirty pages are not logged"));
        }
        let end = address.checked_add(len).filter(|_| len > 0);
        let Some(end) = end else {
            return Err(Refusal::invalid(format!(
                "{len:#x} bytes at {address:#x} are none, or wrap around"
            )));
        };
        let cut = |at: u64| Refusal::invalid(format!("it would cut the memory at {at:#x}"));
        if let Some((&at, piece)) = self.pieces.range(..address).next_back()
            && at + piece.len > address
        {
            return Err(cut(at));
        }
        if let Some((&at, piece)) = self.pieces.range(address..end).next_back()
            && at + piece.len > end
        {
            return Err(cut(at));
        }
        let inside: Vec<u64> = self.pieces.range(address..end).map(|(&at, _)| at).collect();
        if inside.is_empty() {
            let why = format!("there is no memory at {address:#x}");
            return Err(Refusal::new(Errno::NOENT, why));
        }
        Ok(inside.into_iter().map(|at| self.remove(at)).sum())
    }

    fn remove(&mut self, at: u64) -> u64 {
        let Some(piece) = self.pieces.remove(&at) else {
            return 0;
        };
        if piece.shown.is_some() {
            self.leaving.push((at, piece.len));
            self.changed = true;
        }
        piece.len
    }

    /// Whether all that was taken away has been replaced.
    pub fn is_settled(&self) -> bool {
        self.leaving.iter().all(|&(at, len)| self.covers(at, len))
    }

    /// Whether all these bytes are mapped, be it by something that cannot be reached.
    fn covers(&self, at: u64, len: u64) -> bool {
        let end = at + len;
        let mut next = at;
        let first = self.pieces.range(..=at).next_back().map(|(&at, _)| at);
        for (&start, piece) in self.pieces.range(first.unwrap_or(at)..end) {
            if start > next {
                return false;
            }
            next = next.max(start + piece.len);
        }
        next >= end
    }

    /// The regions there are to be: neighbours in address and file together, but cut where the legacy area of a PC ends. What lies above
    /// keeps its region then, whatever firmware does below.
    fn wanted(&self) -> Vec<(u64, u64, Shown)> {
        let (hole, hole_end) = LEGACY_HOLE;
        let filled = self.pieces.range(..=hole).next_back();
        let filled = filled.is_some_and(|(&at, p)| p.shown.is_some() && at + p.len >= hole_end);
        let cut = if filled { 0 } else { LEGACY_END };
        let mut wanted: Vec<(u64, u64, Shown)> = Vec::new();
        for (&at, piece) in &self.pieces {
            let Some(shown) = &piece.shown else { continue };
            let low = cut.saturating_sub(at).min(piece.len);
            for (skipped, len) in [(0, low), (low, piece.len - low)] {
                let (at, offset) = (at + skipped, shown.offset + skipped);
                match wanted.last_mut() {
                    _ if len == 0 => {}
                    Some((start, before, last))
                        if *start + *before == at
                            && at != cut
                            && Arc::ptr_eq(&last.file, &shown.file)
                            && last.offset + *before == offset =>
                    {
                        *before += len;
                    }
                    _ => {
                        let file = Arc::clone(&shown.file);
                        wanted.push((at, len, Shown { file, offset }));
                    }
                }
            }
        }
        wanted
    }

    /// The map for the controller, if it is not the one it has.
    pub fn take_change(&mut self) -> Option<Result<Arc<GuestMap>, MapError>> {
        self.leaving.clear();
        if !std::mem::take(&mut self.changed) {
            return None;
        }
        let wanted = self.wanted();
        let mut old = std::mem::take(&mut self.used);
        for (at, len, shown) in wanted {
            let same = old.remove(&at).filter(|used| {
                used.len == len
                    && used.shown.offset == shown.offset
                    && Arc::ptr_eq(&used.shown.file, &shown.file)
            });
            let used = match same {
                Some(used) => used,
                None => {
                    let Some(region) = shown.file.piece(at, shown.offset, len) else {
                        continue;
                    };
                    Used { len, shown, region }
                }
            };
            self.used.insert(at, used);
        }
        let regions = self.used.values().map(|u| Arc::clone(&u.region)).collect();
        Some(GuestMap::new(regions))
    }

    /// Whether a file turned out to be cut.
    pub fn is_cut(&self) -> bool {
        let mut files = self.files.iter().filter_map(Weak::upgrade);
        files.any(|file| file.is_cut())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustix::event::{EventfdFlags, eventfd};

    const RW: u32 = READ | WRITE;

    fn memory() -> Memory {
        let wake = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        Memory::new("test", Arc::new(wake))
    }

    fn file(len: u64) -> File {
        crate::driver::dma::shared_memory("guest", len).unwrap()
    }

    fn apply(m: &mut Memory) -> Option<Arc<GuestMap>> {
        m.take_change().map(Result::unwrap)
    }

    #[test]
    fn memory_that_comes_back_cut_differently_is_the_same_memory() {
        let (mut m, ram) = (memory(), file(2 << 20));
        let again = || Some(ram.try_clone().unwrap());
        m.map(RW, 0, 0, 2 << 20, again()).unwrap();
        let whole = apply(&mut m).unwrap();
        assert!(
            whole.resolve_whole(0xFFFF0, 0x20).is_some(),
            "no PC: one region"
        );
        m.unmap(0, 0, 2 << 20).unwrap();
        m.map(RW, 0, 0, 0xA0000, again()).unwrap();
        m.map(RW, 0xC0000, 0xC0000, 0x140000, again()).unwrap();
        let whole = apply(&mut m).unwrap();
        let high = Arc::clone(&whole.regions()[2]);
        assert_eq!((high.gpa(), high.len()), (1 << 20, 1 << 20));
        assert!(whole.write(0x9FFFE, &[1, 2]) && whole.write(0xEFFFE, &[3, 4, 5, 6]));
        assert_eq!(m.unmap(0, 0, 2 << 20).unwrap(), 0x1E0000);
        assert!(!m.is_settled());
        m.map(RW, 0, 0, 0xA0000, again()).unwrap();
        assert!(!m.is_settled());
        m.map(READ, 0xC0000, 0xC0000, 0x20000, again()).unwrap();
        m.map(RW, 0xE0000, 0xE0000, 0x10000, None).unwrap();
        m.map(RW, 0xF0000, 0xF0000, 0x110000, again()).unwrap();
        assert!(m.is_settled());
        let pieces = apply(&mut m).unwrap();
        assert!(pieces.regions().iter().any(|r| Arc::ptr_eq(r, &high)));
        let mut out = [0; 2];
        assert!(pieces.read(0x9FFFE, &mut out) && out == [1, 2]);
        assert!(!pieces.read(0xC0000, &mut out) && !pieces.read(0xE0000, &mut out));
        assert!(pieces.read(0xF0000, &mut out) && out == [5, 6]);
        assert_eq!(whole.lost_in(&pieces).len(), 1);
        m.unmap(0, 0xC0000, 0x140000).unwrap();
        m.map(RW, 0xC0000, 0xC0000, 0x140000, again()).unwrap();
        let merged = apply(&mut m).unwrap();
        assert!(merged.regions().iter().any(|r| Arc::ptr_eq(r, &high)));
        assert!(
            merged.resolve_whole(0xEFFFE, 4).is_some(),
            "one region again"
        );
        assert_eq!(pieces.lost_in(&merged).len(), 0);
        assert!(apply(&mut m).is_none());
    }

    #[test]
    fn what_cannot_be_is_refused_and_what_cannot_be_reached_is_let_be() {
        let mut m = memory();
        let errno = |r: Result<(), Refusal>| r.unwrap_err().errno;
        m.map(RW, 0, 0x1000, 0x1000, Some(file(0x1000))).unwrap();
        for (at, len) in [(0x1800, 0x1000), (0x800, 0x801), (0x1000, 1), (0, 0x10000)] {
            assert_eq!(errno(m.map(RW, 0, at, len, None)), Errno::EXIST);
        }
        for (at, len) in [(0x5000, 0), (u64::MAX, 2)] {
            assert_eq!(errno(m.map(RW, 0, at, len, None)), Errno::INVAL);
        }
        for (offset, len) in [(0, 0x1001), (0x1000, 1), (u64::MAX, 0x1000)] {
            let mapped = m.map(RW, offset, 0x10000, len, Some(file(0x1000)));
            assert_eq!(errno(mapped), Errno::INVAL);
        }
        let null = File::open("/dev/null").unwrap();
        m.map(RW, 0, 0x20000, 0x1000, Some(null)).unwrap();
        apply(&mut m);
        let unmapped = |m: &mut Memory, at, len| m.unmap(0, at, len).map_err(|r| r.errno);
        assert_eq!(unmapped(&mut m, 0x1000, 0x800), Err(Errno::INVAL));
        assert_eq!(unmapped(&mut m, 0x1800, 0x800), Err(Errno::INVAL));
        assert_eq!(unmapped(&mut m, 0x3000, 0x800), Err(Errno::NOENT));
        assert_eq!(unmapped(&mut m, 0, 0), Err(Errno::INVAL));
        assert_eq!(
            m.unmap(GET_DIRTY, 0x1000, 0x1000).unwrap_err().errno,
            Errno::OPNOTSUPP
        );
        assert_eq!(unmapped(&mut m, 0x20000, 0x1000), Ok(0x1000));
        assert!(m.is_settled(), "nobody used it");
        assert_eq!(m.unmap(2, 0, 0).unwrap(), 0x1000);
        assert!(!m.is_settled());
    }

    #[test]
    fn one_client_cannot_have_all_there_is() {
        let mut m = memory();
        let page = |n: usize| (n as u64) << 12;
        for n in 0..MAX_FILES + 5 {
            m.map(RW, 0, page(n), 4096, Some(file(4096))).unwrap();
        }
        let reached = |m: &mut Memory| {
            apply(m);
            m.used.len()
        };
        assert_eq!(reached(&mut m), MAX_FILES);
        m.unmap(0, 0, page(1)).unwrap();
        reached(&mut m);
        // Room for one more, which is not too large.
        let sparse = file(crate::memory::MOST_MAPPED - (1 << 20));
        let at = page(MAX_FILES + 5);
        m.map(RW, 0, at, 4096, Some(sparse)).unwrap();
        assert_eq!(reached(&mut m), MAX_FILES - 1);
        m.unmap(0, at, 4096).unwrap();
        reached(&mut m);
        // Many pieces of one file are one.
        let ram = file(page(1000));
        for n in 0..1000 {
            let piece = Some(ram.try_clone().unwrap());
            m.map(RW, page(n), at + page(2 * n), 4096, piece).unwrap();
        }
        assert_eq!(reached(&mut m), MAX_FILES - 1 + 1000);
    }

    proptest! {
        #[test]
        fn any_sequence_keeps_a_map_of_what_is_mapped(
            steps in prop::collection::vec((any::<bool>(), 0u64..24, 1u64..8, 0u32..4, any::<bool>()), 0..60),
        ) {
            let (mut m, ram) = (memory(), file(64 << 12));
            let mut model = [None; 40];
            for (map, page, pages, flags, with_file) in steps {
                let (at, len) = (page << 12, pages << 12);
                let range = page as usize..(page + pages) as usize;
                if map {
                    let file = with_file.then(|| ram.try_clone().unwrap());
                    let free = model[range.clone()].iter().all(Option::is_none);
                    let done = m.map(flags, at, at, len, file);
                    prop_assert_eq!(done.is_ok(), free);
                    if free {
                        model[range].fill(Some(with_file && flags == RW));
                    }
                } else if m.unmap(0, at, len).is_ok() {
                    model[range].fill(None);
                }
                if m.is_settled() && let Some(map) = apply(&mut m) {
                    for (page, state) in model.iter().enumerate() {
                        let there = map.resolve_whole((page as u64) << 12, 4096).is_some();
                        prop_assert_eq!(there, *state == Some(true), "page {}", page);
                    }
                }
            }
        }
    }
}
