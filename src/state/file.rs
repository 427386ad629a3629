//! A state file: header, two images of which one counts, and a journal for each poller.
//!
//! In 64-bit words of this machine:
//!
//! | where | what |
//! |---|---|
//! | page 0 | magic, layout, shape, size; a checksum of these. From word 64 and from word 72 on: what is in image area 0 and 1 (sequence, length, checksum) |
//! | two areas | the images, as bytes |
//! | from there | journals, each beginning a page |
//!
//! A new image goes to the area that does not count: its sequence is made 0, its bytes, length and checksum are written, then its
//! sequence, one above the other's. The area with the higher sequence counts. All are plain stores in this order for every observer
//! (Release), so that whoever reads after the writer died between any two of them finds the old image or the new one.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::FallocateFlags;

use super::keep::KeepError;
use crate::memory::{SharedWords, crash_point};

/// The layout of state files that this program writes and understands; of the images in them too.
pub const LAYOUT: u64 = 1;

const MAGIC: u64 = u64::from_le_bytes(*b"vu-nvme\n");

/// Words of a page.
const PAGE: usize = 512;

/// Words of an image area: 4 MiB, which no controller with 64 queues comes near. What is not used takes no memory.
const AREA: usize = 1024 * PAGE;

/// Memory of an image area that is there from the beginning: 64 KiB.
const RESERVED: usize = 16 * PAGE;

/// Header words that the checksum behind them covers.
const HEADER: usize = 6;

/// Where what is said of each image area begins, and how far apart: a cache line for each.
const IMAGES: usize = 64;
const IMAGE_STRIDE: usize = 8;

/// Where the journals begin.
const JOURNALS: usize = PAGE + 2 * AREA;

/// Words of a queue pair's record in a journal, and the records there are.
const RECORD: usize = 8;
const RECORDS: usize = 64;

/// Words of a command's copy in a journal.
const COPY: usize = 16;

/// More pollers, or slots of one, than any daemon has.
const MOST_POLLERS: usize = 4096;
const MOST_SLOTS: usize = 1 << 20;

/// How much a state file has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Journals: one for each poller of the daemon.
    pub pollers: usize,
    /// Commands that each of them can copy.
    pub slots: usize,
}

impl Shape {
    /// Words of a journal as it is used.
    fn journal(self) -> usize {
        RECORDS * RECORD + self.slots * COPY
    }

    /// Words from the beginning of a journal to that of the next.
    fn stride(self) -> usize {
        self.journal().next_multiple_of(PAGE)
    }

    /// Words in all, if there can be such a file.
    fn words(self) -> Option<usize> {
        let sound = (1..=MOST_POLLERS).contains(&self.pollers) && self.slots <= MOST_SLOTS;
        // At most 2^12 * 2^25 words.
        sound.then(|| JOURNALS + self.pollers * self.stride())
    }
}

/// One generation of a controller's state, mapped. Any thread may use it.
pub struct StateFile {
    words: SharedWords,
    shape: Shape,
    /// Held while an image is written or read; how many words of each area are known to have memory.
    writer: Mutex<[usize; 2]>,
}

impl StateFile {
    /// A new one that nobody else can see.
    ///
    /// # Errors
    ///
    /// What the kernel says when memory or file descriptors run out; a shape that no daemon has.
    pub fn anonymous(shape: Shape) -> io::Result<Arc<Self>> {
        let words = shape.words().ok_or(io::ErrorKind::InvalidInput)?;
        Self::begin(SharedWords::new("nvme-state", words)?, shape)
    }

    /// A new one in a file that is empty.
    pub(super) fn create(file: File, shape: Shape) -> io::Result<Arc<Self>> {
        let words = shape.words().ok_or(io::ErrorKind::InvalidInput)?;
        file.set_len(words as u64 * 8)?;
        Self::begin(SharedWords::over(file, words)?, shape)
    }

    fn begin(words: SharedWords, shape: Shape) -> io::Result<Arc<Self>> {
        let state = Self {
            words,
            shape,
            writer: Mutex::new([0; 2]),
        };
        // A page of a mapping that cannot be had is a fault, so they are all had now, but those of images of unusual size.
        state.allocate(0, PAGE)?;
        let journals = shape.pollers * shape.stride();
        state.allocate(JOURNALS, journals)?;
        for area in 0..2 {
            state.reserve(&mut state.lock(), area, RESERVED)?;
        }
        let header = Self::header(shape);
        for (at, word) in header.into_iter().enumerate() {
            state.put(at, word);
        }
        state.put(HEADER, checksum(header));
        Ok(Arc::new(state))
    }

    fn header(shape: Shape) -> [u64; HEADER] {
        [
            MAGIC,
            LAYOUT,
            shape.pollers as u64,
            shape.slots as u64,
            AREA as u64,
            shape.stride() as u64,
        ]
    }

    /// What is in a file that another process left: a copy, so that nobody can change it under us.
    pub(super) fn read(file: &File) -> Result<Arc<Self>, KeepError> {
        let shape = Self::shape_of(file)?;
        let copy = Self::anonymous(shape).map_err(|e| KeepError::io("cannot copy the state", e))?;
        let words = copy.words.words();
        let mut chunk = vec![0; 64 << 10];
        let mut at = 0;
        while at < words.len() {
            // Only what has memory: most of the image areas has not.
            let data = rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at as u64 * 8));
            match data {
                Ok(offset) => at = at.max((offset / 8) as usize),
                Err(rustix::io::Errno::NXIO) => break,
                Err(rustix::io::Errno::INVAL) => {}
                Err(e) => return Err(KeepError::io("cannot read the state", e)),
            }
            let len = words.len().saturating_sub(at).min(chunk.len() / 8) * 8;
            file.read_exact_at(&mut chunk[..len], at as u64 * 8)
                .map_err(|e| KeepError::io("cannot read the state", e))?;
            for (to, from) in words[at..].iter().zip(chunk[..len].chunks_exact(8)) {
                to.store(word_of(from), Ordering::Relaxed);
            }
            at += len / 8;
        }
        for area in 0..2 {
            let sequence = words[IMAGES + area * IMAGE_STRIDE].load(Ordering::Relaxed);
            if sequence != 0 && copy.read_area(area).is_none() {
                return Err(KeepError::Damaged("an image has the wrong checksum"));
            }
        }
        Ok(copy)
    }

    /// What a file's header says, if it is one of ours.
    fn shape_of(file: &File) -> Result<Shape, KeepError> {
        let mut bytes = [0; (HEADER + 1) * 8];
        file.read_exact_at(&mut bytes, 0)
            .map_err(|_| KeepError::Damaged("it has no header"))?;
        let mut words = [0; HEADER + 1];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = word_of(bytes);
        }
        let [magic, layout, pollers, slots, _, _, sum] = words;
        if magic != MAGIC {
            return Err(KeepError::Damaged("it is not a state file"));
        }
        // First: what follows may be laid out differently.
        if layout != LAYOUT {
            return Err(KeepError::Layout { found: layout });
        }
        let number = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let shape = Shape {
            pollers: number(pollers),
            slots: number(slots),
        };
        let size = shape.words();
        let header = size.map(|_| Self::header(shape));
        let sound = header.is_some_and(|h| h[..] == words[..HEADER] && checksum(h) == sum);
        if !sound {
            return Err(KeepError::Damaged("its header has the wrong checksum"));
        }
        let len = file
            .metadata()
            .map_err(|e| KeepError::io("cannot read the state", e))?
            .len();
        if size.is_none_or(|words| words as u64 * 8 != len) {
            return Err(KeepError::Damaged("it has the wrong size"));
        }
        Ok(shape)
    }

    /// What it has room for.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Replace the image. Whoever reads, now or after any death of this process, finds the one before or this one.
    ///
    /// # Errors
    ///
    /// It is larger than 4 MiB, or there is no memory for it; the one before stays.
    pub fn commit(&self, image: &[u8]) -> io::Result<()> {
        let mut reserved = self.lock();
        let sequences = [0, 1].map(|area| self.get(IMAGES + area * IMAGE_STRIDE));
        let area = usize::from(sequences[0] > sequences[1]);
        let next = sequences[1 - area]
            .checked_add(1)
            .ok_or(io::ErrorKind::InvalidData)?;
        let words = image.len().div_ceil(8);
        if words > AREA {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.reserve(&mut reserved, area, words)?;
        let about = IMAGES + area * IMAGE_STRIDE;
        self.put(about, 0);
        let begin = PAGE + area * AREA;
        for (at, bytes) in (begin..).zip(image.chunks(8)) {
            self.put(at, word_of(bytes));
        }
        self.put(about + 1, image.len() as u64);
        self.put(about + 2, image_checksum(next, image));
        self.put(about, next);
        Ok(())
    }

    /// The newest image; `None` if there was never one.
    pub fn image(&self) -> Option<Vec<u8>> {
        let _reserved = self.lock();
        let newest = (0..2).max_by_key(|area| self.get(IMAGES + area * IMAGE_STRIDE))?;
        self.read_area(newest)
    }

    /// How many images there were, this one included.
    #[cfg(test)]
    fn sequence(&self) -> u64 {
        (0..2)
            .map(|area| self.get(IMAGES + area * IMAGE_STRIDE))
            .max()
            .unwrap_or(0)
    }

    /// The image in an area, if there is a whole one.
    fn read_area(&self, area: usize) -> Option<Vec<u8>> {
        let [sequence, len, sum] = [0, 1, 2].map(|i| self.get(IMAGES + area * IMAGE_STRIDE + i));
        let len = usize::try_from(len).ok().filter(|n| *n <= AREA * 8)?;
        if sequence == 0 {
            return None;
        }
        let begin = PAGE + area * AREA;
        let words = (begin..begin + len.div_ceil(8)).map(|at| self.get(at));
        let mut image: Vec<u8> = words.flat_map(u64::to_ne_bytes).collect();
        image.truncate(len);
        (image_checksum(sequence, &image) == sum).then_some(image)
    }

    /// The journal of a poller, all zero in a new generation: 64 records of 8 words, then 16 words for each slot. Empty if there is
    /// no such poller.
    pub fn journal_words(&self, poller: usize) -> &[AtomicU64] {
        self.words_at(self.journal_place(poller))
    }

    /// Where [`Self::journal_words`] are among all words.
    pub(crate) fn journal_place(&self, poller: usize) -> std::ops::Range<usize> {
        if poller >= self.shape.pollers {
            return 0..0;
        }
        let begin = JOURNALS + poller * self.shape.stride();
        begin..begin + self.shape.journal()
    }

    /// These words; none if not all of them are there.
    #[inline]
    pub(crate) fn words_at(&self, place: std::ops::Range<usize>) -> &[AtomicU64] {
        self.words.words().get(place).unwrap_or_default()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, [usize; 2]> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
    fn put(&self, at: usize, value: u64) {
        if let Some(word) = self.words.words().get(at)
            && crash_point::store_happens()
        {
            word.store(value, Ordering::Release);
        }
    }

    fn get(&self, at: usize) -> u64 {
        let word = self.words.words().get(at);
        word.map_or(0, |w| w.load(Ordering::Acquire))
    }

    /// Have memory for the first `words` words of an image area.
    fn reserve(&self, reserved: &mut [usize; 2], area: usize, words: usize) -> io::Result<()> {
        if let Some(has) = reserved.get_mut(area)
            && *has < words
        {
            let words = words.next_multiple_of(RESERVED);
            self.allocate(PAGE + area * AREA, words.min(AREA))?;
            *has = words;
        }
        Ok(())
    }

    fn allocate(&self, at: usize, words: usize) -> io::Result<()> {
        let (at, len) = (at as u64 * 8, words as u64 * 8);
        let fd = self.words.fd();
        match rustix::fs::fallocate(fd.as_fd(), FallocateFlags::empty(), at, len) {
            // A file system that cannot promise does not.
            Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            result => Ok(result?),
        }
    }
}

/// Up to 8 bytes as they lie in memory, zero where there are none.
fn word_of(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    for (to, from) in word.iter_mut().zip(bytes) {
        *to = *from;
    }
    u64::from_ne_bytes(word)
}

/// Against mistakes and torn writes, not against forgers: who can write here is us.
fn checksum(words: impl IntoIterator<Item = u64>) -> u64 {
    words.into_iter().fold(0x6a09_e667_f3bc_c908, |sum, word| {
        let mixed = (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed ^ mixed >> 29
    })
}

fn image_checksum(sequence: u64, image: &[u8]) -> u64 {
    let about = [sequence, image.len() as u64];
    checksum(about.into_iter().chain(image.chunks(8).map(word_of)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::crash_point::Crash;

    const SHAPE: Shape = Shape {
        pollers: 2,
        slots: 3,
    };

    #[test]
    fn images_come_back_and_the_last_one_counts() {
        let state = StateFile::anonymous(SHAPE).unwrap();
        assert_eq!((state.image(), state.shape()), (None, SHAPE));
        for n in 0..20usize {
            let image: Vec<u8> = (0..n * 1000 + n % 8).map(|i| (i * n) as u8).collect();
            state.commit(&image).unwrap();
            assert_eq!(state.image(), Some(image));
            assert_eq!(state.sequence(), n as u64 + 1);
        }
        let large = vec![7; AREA * 8];
        state.commit(&large).unwrap();
        assert_eq!(state.image().as_ref(), Some(&large));
        assert!(state.commit(&vec![7; AREA * 8 + 1]).is_err());
        assert_eq!(state.image(), Some(large));
        state.commit(&[]).unwrap();
        assert_eq!(state.image(), Some(Vec::new()));
    }

    #[test]
    fn journals_are_zero_apart_and_of_the_size_that_was_asked_for() {
        let state = StateFile::anonymous(SHAPE).unwrap();
        assert_eq!(state.journal_words(0).len(), 64 * 8 + 3 * 16);
        assert!(state.journal_words(2).is_empty() && state.journal_words(usize::MAX).is_empty());
        for poller in 0..2 {
            for word in state.journal_words(poller) {
                assert_eq!(word.swap(poller as u64 + 1, Ordering::Relaxed), 0);
            }
        }
        state.commit(&[3; 100]).unwrap();
        assert_eq!(state.image(), Some(vec![3; 100]));
        let page = |p: usize| state.journal_words(p).as_ptr().addr() % 4096;
        assert_eq!((page(0), page(1)), (0, 0));
        for shape in [(0, 1), (1, usize::MAX), (usize::MAX, 1)] {
            let (pollers, slots) = shape;
            assert!(StateFile::anonymous(Shape { pollers, slots }).is_err());
        }
    }

    #[test]
    fn every_prefix_of_the_stores_of_a_commit_leaves_the_old_or_the_new_image() {
        let images = [
            &b""[..],
            b"first",
            b"a second that is longer",
            b"3",
            b"fourth..",
        ];
        for before in 0..images.len() {
            for stop in 0.. {
                let state = StateFile::anonymous(SHAPE).unwrap();
                for image in &images[1..=before] {
                    state.commit(image).unwrap();
                }
                let old = state.image();
                let new = b"the one that is interrupted".to_vec();
                let crash = Crash::after(stop);
                state.commit(&new).unwrap();
                let happened = crash.happened();
                assert_eq!(happened, crash.asked() > stop);
                drop(crash);
                let copy = File::from(state.words.fd().try_clone_to_owned().unwrap());
                for found in [state.image(), StateFile::read(&copy).unwrap().image()] {
                    let expected = if happened {
                        old.clone()
                    } else {
                        Some(new.clone())
                    };
                    assert_eq!(found, expected);
                }
                // The next process goes on from there.
                state.commit(b"later").unwrap();
                assert_eq!(state.image(), Some(b"later".to_vec()));
                if !happened {
                    break;
                }
            }
        }
    }

    #[test]
    fn a_file_is_read_as_it_was_and_a_damaged_one_is_refused() {
        let file = || tempfile::tempfile().unwrap();
        let made = file();
        let state = StateFile::create(made.try_clone().unwrap(), SHAPE).unwrap();
        state.commit(b"one").unwrap();
        state.commit(b"two").unwrap();
        state.journal_words(1)[5].store(9, Ordering::Relaxed);
        let read = StateFile::read(&made).unwrap();
        assert_eq!(read.image(), Some(b"two".to_vec()));
        assert_eq!(read.journal_words(1)[5].load(Ordering::Relaxed), 9);
        assert_eq!(read.shape(), SHAPE);

        assert!(matches!(
            StateFile::read(&file()),
            Err(KeepError::Damaged(_))
        ));
        let with = |at: usize, value: u64| {
            let old = state.get(at);
            state.put(at, value);
            let result = StateFile::read(&made);
            state.put(at, old);
            result.err()
        };
        assert!(with(40, 1).is_none(), "not used");
        assert!(matches!(with(1, 77), Some(KeepError::Layout { found: 77 })));
        for at in [
            0,
            2,
            3,
            4,
            5,
            6,
            IMAGES,
            IMAGES + 1,
            IMAGES + 2,
            PAGE,
            PAGE + AREA,
        ] {
            for value in [1, 1 << 20, u64::MAX, u64::MAX / 2 + 1] {
                if state.get(at) == value {
                    continue;
                }
                let found = with(at, value);
                assert!(matches!(found, Some(KeepError::Damaged(_))), "{at} {value}");
            }
        }
        made.set_len(made.metadata().unwrap().len() - 8).unwrap();
        assert!(matches!(StateFile::read(&made), Err(KeepError::Damaged(_))));
    }
}
