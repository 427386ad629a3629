//! A caller of a channel: owns the memory, keeps the contract, and checks that the channel keeps its own.

#![expect(unsafe_code, reason = "calls the unsafe `Channel::submit`")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nvme_spec::Status;
use nvme_spec::prp::{self, PageSize, Prps, WriteList};
use rustix::event::{PollFd, PollFlags, Timespec};
use zerocopy::IntoBytes as _;

use crate::backend::nvme::Window;
use crate::backend::{
    AnyChannel, Backend, Cancelled, Channel, Finished, Geometry, GuestData, Operation, Request,
    Submitted, Tag,
};
use crate::driver::dma::{Mapping, shared_memory};
use crate::memory::{Buffers, GuestMap, HostSeg};

const PAGE: usize = 4096;

/// How long anything may take before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(30);

/// How the memory of a transfer is cut up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// One segment at an offset into a page.
    Whole(usize),
    /// Page by page as PRPs do, the pages in another order in memory; the first begins at an offset.
    Pages(usize),
    /// Segments of so many bytes, one byte apart, the first at an odd address.
    Crumbs(usize),
}

/// Memory for one tag.
struct Area {
    bytes: Vec<u8>,
    segs: Vec<HostSeg>,
    /// The same in a guest's words, for a backend that forwards.
    prps: Prps,
}

/// What is known about a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    Pending,
    Done(Status),
}

/// A guest's memory, shown to an SSD: a place for each tag.
struct Guest {
    map: Arc<GuestMap>,
    base: u64,
}

/// Bytes of a tag's place, and of its end that is for PRP lists.
const PLACE: u64 = 2 << 20;
const LISTS: u64 = 64 << 10;

/// Writes PRP lists into a guest's memory.
struct Writer<'a>(&'a GuestMap);

impl WriteList for Writer<'_> {
    fn write(&mut self, addr: u64, entries: &[u64]) {
        assert!(self.0.write(addr, entries.as_bytes()));
    }
}

impl Guest {
    fn new(window: &Window, depth: u32) -> Self {
        // Clients are on one window at the same time.
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let base = (NEXT.fetch_add(1, Ordering::Relaxed) % 60 + 1) << 30;
        let len = PLACE * u64::from(depth);
        let file = shared_memory("conformance", len).expect("memory");
        let region = Mapping::map(&file, 0, len as usize, base).expect("memory");
        let shown = window.show(&region).expect("room in the window");
        let map = GuestMap::keeping(vec![region], vec![Arc::new(shown)]).expect("a map");
        Self { map, base }
    }

    /// As the host lays it out, as far as PRPs can say it.
    fn lay_out(&self, tag: Tag, len: usize, layout: Layout) -> (Prps, Vec<HostSeg>) {
        let place = self.base + u64::from(tag) * PLACE;
        let (at, swapped) = match layout {
            Layout::Whole(at) => (at, false),
            Layout::Pages(at) | Layout::Crumbs(at) => (at, true),
        };
        let at = (at % PAGE) & !3;
        let count = (at + len).div_ceil(PAGE);
        let page = |i: usize| {
            let other = if swapped && i ^ 1 < count { i ^ 1 } else { i };
            place + (other * PAGE) as u64
        };
        let all = vec![0xa5; count * PAGE];
        assert!(self.map.write(place, &all));
        let lists = (0..).map(|i| place + PLACE - LISTS + i * PAGE as u64);
        let prps = prp::build(
            PageSize::K4,
            (0..count).map(page),
            at as u32,
            len as u32,
            lists,
            &mut Writer(&self.map),
        );
        let mut segs = Vec::with_capacity(count);
        let mut left = len;
        for i in 0..count {
            let start = if i == 0 { at } else { 0 };
            let n = left.min(PAGE - start);
            let seg = self.map.resolve_whole(page(i) + start as u64, n);
            segs.push(seg.expect("memory of ours"));
            left -= n;
        }
        (prps.expect("PRPs of pages"), segs)
    }
}

/// A channel with a caller.
pub struct Client {
    // First, so that it is dropped before the memory it uses.
    channel: Option<AnyChannel>,
    geometry: Geometry,
    areas: Vec<Area>,
    states: Vec<State>,
    out: Vec<Finished>,
    /// Where the memory is, if the backend forwards.
    guest: Option<Guest>,
}

/// Deterministic bytes that differ from block to block and seed to seed.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        out.extend_from_slice(&x.to_le_bytes());
    }
    out.truncate(len);
    out
}

impl Client {
    /// A channel of `depth` tags.
    pub fn new(backend: &Backend, depth: u32) -> Self {
        let area = || Area {
            bytes: Vec::new(),
            segs: Vec::new(),
            prps: Prps::default(),
        };
        Self {
            channel: Some(backend.channel(depth).expect("a channel")),
            geometry: backend.geometry(),
            areas: (0..depth).map(|_| area()).collect(),
            states: vec![State::Free; depth as usize],
            out: Vec::with_capacity(depth as usize),
            guest: backend.window().map(|window| Guest::new(window, depth)),
        }
    }

    fn channel(&mut self) -> &mut AnyChannel {
        self.channel.as_mut().expect("not dropped yet")
    }

    /// Requests the channel says are pending.
    pub fn pending(&self) -> usize {
        self.channel.as_ref().map_or(0, Channel::pending)
    }

    /// Lay out `len` bytes for a tag.
    fn lay_out(&mut self, tag: Tag, len: usize, layout: Layout) {
        let area = &mut self.areas[tag as usize];
        if let Some(guest) = &self.guest {
            (area.prps, area.segs) = guest.lay_out(tag, len, layout);
            return;
        }
        // Room for gaps and for the start in a page, twice.
        let room = match layout {
            Layout::Crumbs(n) => len + len.div_ceil(n.max(1)),
            _ => len,
        };
        area.bytes.clear();
        area.bytes.resize(room + 4 * PAGE, 0xa5);
        let skip = area.bytes.as_ptr().align_offset(PAGE);
        let mut rest = &mut area.bytes[skip..];
        area.segs.clear();
        match layout {
            Layout::Whole(at) => area.segs.push(HostSeg::of_slice(&mut rest[at..at + len])),
            Layout::Pages(at) => {
                let pages = (at + len).div_ceil(PAGE);
                let mut pieces: Vec<_> = rest.chunks_mut(PAGE).take(pages).map(Some).collect();
                let mut left = len;
                for i in 0..pages {
                    // Neighbours change places.
                    let j = if i ^ 1 < pages { i ^ 1 } else { i };
                    let page = pieces[j].take().expect("each page once");
                    let start = if i == 0 { at } else { 0 };
                    let n = left.min(PAGE - start);
                    area.segs
                        .push(HostSeg::of_slice(&mut page[start..start + n]));
                    left -= n;
                }
            }
            Layout::Crumbs(n) => {
                let mut left = len;
                while left > 0 {
                    let n = left.min(n.max(1));
                    let (gap_and_crumb, after) = rest.split_at_mut(n + 1);
                    area.segs.push(HostSeg::of_slice(&mut gap_and_crumb[1..]));
                    rest = after;
                    left -= n;
                }
            }
        }
    }

    /// The memory of a tag as the channel sees it.
    fn memory(&self, tag: Tag) -> Buffers<'_> {
        // SAFETY: the segments are parts of `bytes` of the same area, which stays as it is until the next `lay_out`, for a tag
        // that is not pending; nobody looks at `bytes` itself but `untouched`, after the channel is gone.
        unsafe { Buffers::new(&self.areas[tag as usize].segs) }
    }

    /// Put data into the memory of a tag.
    fn put(&mut self, tag: Tag, data: &[u8], layout: Layout) {
        self.lay_out(tag, data.len(), layout);
        assert_eq!(self.memory(tag).write(0, data), data.len());
    }

    /// The data in the memory of a tag.
    pub fn take(&self, tag: Tag) -> Vec<u8> {
        let memory = self.memory(tag);
        let mut data = vec![0; memory.len()];
        memory.read(0, &mut data);
        data
    }

    /// Submit with the memory the tag has.
    fn submit(&mut self, tag: Tag, operation: Operation, slba: u64, blocks: u32) -> Option<Status> {
        assert_eq!(self.states[tag as usize], State::Free, "tag {tag} is used");
        let before = self.pending();
        let area = &self.areas[tag as usize];
        // SAFETY: as in `memory`.
        let memory = unsafe { Buffers::new(&area.segs) };
        let moves = operation.moves_data();
        let guest = self.guest.as_ref().filter(|_| moves);
        let request = Request {
            operation,
            slba,
            blocks,
            data: match moves && guest.is_none() {
                true => memory,
                false => Buffers::NONE,
            },
            guest: guest.map(|guest| GuestData {
                prp1: area.prps.prp1,
                prp2: area.prps.prp2,
                bytes: memory.len() as u32,
                cdw12: 0,
                cdw13: 0,
                map: &guest.map,
            }),
        };
        let channel = self.channel.as_mut().expect("not dropped yet");
        // SAFETY: area and list stay until the tag is free again; `Drop` order and `drop_channel` see to the rest.
        match unsafe { channel.submit(tag, &request) } {
            Submitted::Done(status) => {
                assert_eq!(self.pending(), before, "a finished request is not pending");
                Some(status)
            }
            Submitted::Pending => {
                assert_eq!(self.pending(), before + 1);
                self.states[tag as usize] = State::Pending;
                None
            }
        }
    }

    /// Begin a request with fresh memory: `data` to be written or compared, or that much to be read.
    pub fn start(
        &mut self,
        tag: Tag,
        operation: Operation,
        slba: u64,
        blocks: u32,
        data: Option<&[u8]>,
        layout: Layout,
    ) -> Option<Status> {
        match data {
            Some(data) => self.put(tag, data, layout),
            None if operation.moves_data() => {
                let len = (blocks as usize) << self.geometry.block_shift;
                self.lay_out(tag, len, layout);
            }
            None => {}
        }
        self.submit(tag, operation, slba, blocks)
    }

    /// Take at most `room` results.
    pub fn poll(&mut self, room: usize) -> usize {
        let mut out = std::mem::take(&mut self.out);
        out.clear();
        let mut few;
        let results = if room < out.capacity() {
            few = Vec::with_capacity(room);
            &mut few
        } else {
            &mut out
        };
        let (capacity, before) = (results.capacity(), self.pending());
        self.channel().poll(results);
        if self.channel().unsent() {
            self.channel().flush();
        }
        assert!(results.capacity() == capacity, "poll must not make room");
        assert_eq!(self.pending(), before - results.len());
        for finished in results.iter() {
            let state = &mut self.states[finished.tag as usize];
            assert_eq!(*state, State::Pending, "a result nobody waits for");
            *state = State::Done(finished.status.status());
        }
        let n = results.len();
        self.out = out;
        n
    }

    /// Whether its file descriptor stays readable once it was written.
    pub fn wakes_by_edges(&mut self) -> bool {
        self.channel().wakes_by_edges()
    }

    /// Whether a sleeping poller would wake, within `timeout`.
    pub fn wakes_within(&mut self, timeout: Duration) -> bool {
        let Some(fd) = self.channel().wake_fd() else {
            return false;
        };
        let end = Instant::now() + timeout;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let spec = Timespec::try_from(left).expect("a short time");
            match rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&spec)) {
                Ok(n) => return n > 0,
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => panic!("poll: {e}"),
            }
        }
    }

    /// Wait for a pending tag as a poller does: asleep.
    pub fn wait(&mut self, tag: Tag) -> Status {
        let start = Instant::now();
        self.channel().flush();
        loop {
            if let State::Done(status) = self.states[tag as usize] {
                self.states[tag as usize] = State::Free;
                return status;
            }
            assert_eq!(self.states[tag as usize], State::Pending, "tag {tag}");
            if self.poll(usize::MAX) == 0 {
                assert!(
                    self.wakes_within(PATIENCE) && start.elapsed() < PATIENCE,
                    "tag {tag} is lost"
                );
            }
        }
    }

    /// Wait for all pending tags.
    pub fn wait_all(&mut self) -> Vec<Status> {
        let tags = 0..self.states.len() as Tag;
        tags.filter_map(|tag| match self.states[tag as usize] {
            State::Free => None,
            _ => Some(self.wait(tag)),
        })
        .collect()
    }

    /// Hand over what was submitted.
    pub fn flush(&mut self) {
        self.channel().flush();
    }

    /// Whether there is a result for the tag; it is taken.
    pub fn result(&mut self, tag: Tag) -> Option<Status> {
        let State::Done(status) = self.states[tag as usize] else {
            return None;
        };
        self.states[tag as usize] = State::Free;
        Some(status)
    }

    /// Cancel; a tag that is gone is free.
    pub fn cancel(&mut self, tag: Tag) -> Cancelled {
        let before = self.pending();
        let cancelled = self.channel().cancel(tag);
        let state = self.states.get_mut(tag as usize);
        if let Some(state) = state
            && cancelled == Cancelled::Gone
            && *state == State::Pending
        {
            *state = State::Free;
            assert_eq!(self.pending(), before - 1);
        }
        cancelled
    }

    /// Do a request on tag 0 and wait for it.
    pub fn run(
        &mut self,
        operation: Operation,
        slba: u64,
        blocks: u32,
        data: Option<&[u8]>,
        layout: Layout,
    ) -> Status {
        match self.start(0, operation, slba, blocks, data, layout) {
            Some(status) => status,
            None => self.wait(0),
        }
    }

    /// A request without memory.
    pub fn plain(&mut self, operation: Operation, slba: u64, blocks: u32) -> Status {
        self.run(operation, slba, blocks, None, Layout::Whole(0))
    }

    /// Write, which must succeed.
    pub fn write(&mut self, slba: u64, data: &[u8], layout: Layout) {
        let blocks = (data.len() >> self.geometry.block_shift) as u32;
        let operation = Operation::Write { fua: false };
        let status = self.run(operation, slba, blocks, Some(data), layout);
        assert_eq!(status, Status::SUCCESS, "write {blocks}@{slba} {layout:?}");
    }

    /// Read, which must succeed.
    pub fn read(&mut self, slba: u64, blocks: u32, layout: Layout) -> Vec<u8> {
        let status = self.run(Operation::Read, slba, blocks, None, layout);
        assert_eq!(status, Status::SUCCESS, "read {blocks}@{slba} {layout:?}");
        self.take(0)
    }

    /// Make all blocks zero.
    pub fn wipe(&mut self) {
        let most = (64u64 << 20) >> self.geometry.block_shift;
        let mut slba = 0;
        while slba < self.geometry.blocks {
            let blocks = most.min(self.geometry.blocks - slba);
            let operation = Operation::WriteZeroes {
                deallocate: true,
                fua: false,
            };
            let status = self.plain(operation, slba, blocks as u32);
            assert_eq!(status, Status::SUCCESS, "write zeroes {blocks}@{slba}");
            slba += blocks;
        }
    }

    /// Drop the channel with whatever is pending; then nothing may change any more.
    pub fn drop_channel(mut self) {
        self.channel = None;
        let tags = 0..self.areas.len() as Tag;
        let before: Vec<_> = tags.clone().map(|tag| self.take(tag)).collect();
        std::thread::sleep(Duration::from_millis(50));
        for (tag, before) in tags.zip(&before) {
            assert!(
                self.take(tag) == *before,
                "memory was touched after the drop"
            );
        }
    }
}
