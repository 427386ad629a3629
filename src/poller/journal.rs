//! What another process would need to go on with a guest's commands, written as they go by (`docs/adr/0006`).
//!
//! The guest's own queues are most of the record: a command stays in its submission queue until it is completed, and a
//! completion stays in its completion queue until the guest has read it. What is missing there is kept here, in memory
//! that this process does not take with it when it dies:
//!
//! - how far each completion queue had come, and *in the same word* how far the submission queue had come that was served last:
//!   one store for a batch, *after* the batch ([`Journal::record`]);
//! - how far each submission queue had come before another one of the same completion queue was served ([`Journal::fetched`]);
//! - a copy of each command that was fetched and has to wait for its backend, written *before* anything of its batch counts as
//!   fetched, and struck out after its completion was posted.
//!
//! A process that stops at any store leaves one of these pictures, each of which can be read (`controller/recover.rs` does):
//!
//! | before the stop | seen afterwards | meaning |
//! |---|---|---|
//! | nothing of a command | it lies at or behind the recorded head | not begun: fetch it |
//! | executed, not posted | the same | fetch it: nobody was told, and doing it again does no harm |
//! | completion posted, batch not recorded | entries of the present phase behind the recorded tail; their SQHD says how far the queue is | done |
//! | copy written, batch not recorded | the command is still in its queue behind the recorded head, and the same as the copy | fetched up to there, this one is out |
//! | completion of a copy posted, copy not struck out | copy, and behind the recorded tail a completion with the same identifiers | done |
//!
//! Queues move between pollers, each of which has a journal of its own, and identifiers are used again. So each record has a number in the same
//! word: that of the creation or the move that brought the queue here. The poller that gets a queue writes its record before it
//! fetches, and before it answers. Nothing is struck out when a queue goes: of two records the one with the higher number counts, and
//! which queues there are says the image.
//!
//! All stores are plain ones, in program order for every observer on this machine (Release), and go to lines that no other thread
//! writes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nvme_spec::ring::Phase;

use crate::memory::crash_point;
use crate::state::StateFile;

use super::served::MAX_QUEUES;

/// Words of a queue pair's record, a cache line.
const QUEUE_WORDS: usize = 8;

/// Words of a copied command: two cache lines, the command and what it is.
const COPY_WORDS: usize = 16;

/// Where the copies begin.
const COPIES: usize = MAX_QUEUES * QUEUE_WORDS;

/// In a word that was written at all.
const VALID: u64 = 1 << 63;

/// The highest number of a creation or move: 23 bits.
pub const LAST_NUMBER: u32 = (1 << 23) - 1;

/// The part of a fetch order that is written down: 41 bits, which last for weeks.
const SEQUENCE: u64 = (1 << 41) - 1;

/// The journal of a controller on one poller, its only writer.
#[derive(Clone)]
pub struct Journal {
    state: Arc<StateFile>,
    /// Where its words are.
    place: std::ops::Range<usize>,
}

/// A command that was fetched and has not completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copied {
    /// Its submission queue.
    pub sqid: u16,
    /// Head of that queue once this command counts as fetched.
    pub head: u16,
    /// The order in which its poller fetched it.
    pub sequence: u64,
    /// The command.
    pub sqe: [u64; 8],
}

/// How far a completion queue had come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Posted {
    /// Of the creation or move that brought it there.
    pub number: u32,
    /// All completions before it are posted, and struck out.
    pub tail: u16,
    /// Of the next completion.
    pub phase: Phase,
    /// The submission queue that was served last, and how far it had come at the same time. 0 is none.
    pub last: (u16, u16),
}

/// How far a submission queue had come when another one was served, or at its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// Of the creation or move that brought it there.
    pub number: u32,
    /// All commands before it are completed or copied.
    pub head: u16,
}

impl Journal {
    /// The journal of this poller in a state file.
    pub fn new(state: Arc<StateFile>, poller: usize) -> Self {
        let place = state.journal_place(poller);
        Self { state, place }
    }

    #[inline]
    fn words(&self) -> &[AtomicU64] {
        self.state.words_at(self.place.clone())
    }

    #[inline]
    fn store(words: &[AtomicU64], at: usize, value: u64) {
        // All indices are below the length for which the words were made.
        if let Some(word) = words.get(at)
            && crash_point::store_happens()
        {
            word.store(value, Ordering::Release);
        }
    }

    fn load(&self, at: usize) -> u64 {
        let word = self.words().get(at);
        word.map_or(0, |w| AtomicU64::load(w, Ordering::Acquire))
    }

    /// How far a completion queue has come, and with it the submission queue in `last`.
    #[inline]
    pub fn record(&self, cqid: u16, posted: Posted) {
        let at = usize::from(cqid) % MAX_QUEUES * QUEUE_WORDS + 1;
        let Posted { number, last, .. } = posted;
        let word = VALID
            | u64::from(number & LAST_NUMBER) << 40
            | u64::from(last.0 & 63) << 33
            | u64::from(posted.phase.bit()) << 32
            | u64::from(posted.tail) << 16
            | u64::from(last.1);
        Self::store(self.words(), at, word);
    }

    /// How far a submission queue has come that its completion queue's record does not name, or will not.
    #[inline]
    pub fn fetched(&self, sqid: u16, fetched: Fetched) {
        let at = usize::from(sqid) % MAX_QUEUES * QUEUE_WORDS;
        let number = u64::from(fetched.number & LAST_NUMBER) << 40;
        Self::store(self.words(), at, VALID | number | u64::from(fetched.head));
    }

    /// Copy a command that has to wait.
    #[inline]
    pub fn copy(&self, place: u32, copied: &Copied) {
        let words = self.words();
        let at = COPIES + place as usize * COPY_WORDS;
        // Looked at once, not for each word.
        let Some(words) = words.get(at..).and_then(<[_]>::first_chunk::<9>) else {
            return;
        };
        for (i, word) in copied.sqe.iter().enumerate() {
            Self::store(words, i, *word);
        }
        let what = u64::from(copied.sqid & 63) << 57
            | u64::from(copied.head) << 41
            | copied.sequence & SEQUENCE;
        Self::store(words, 8, VALID | what);
    }

    /// Strike a copy out.
    #[inline]
    pub fn strike(&self, place: u32) {
        Self::store(self.words(), COPIES + place as usize * COPY_WORDS + 8, 0);
    }

    /// What is recorded of a completion queue.
    pub fn posted(&self, cqid: u16) -> Option<Posted> {
        let word = self.load(usize::from(cqid) % MAX_QUEUES * QUEUE_WORDS + 1);
        (word & VALID != 0).then_some(Posted {
            number: (word >> 40) as u32 & LAST_NUMBER,
            tail: (word >> 16) as u16,
            phase: Phase::from_bit(word >> 32 & 1 != 0),
            last: ((word >> 33) as u16 & 63, word as u16),
        })
    }

    /// What is recorded of a submission queue by itself.
    pub fn own(&self, sqid: u16) -> Option<Fetched> {
        let word = self.load(usize::from(sqid) % MAX_QUEUES * QUEUE_WORDS);
        (word & VALID != 0).then_some(Fetched {
            number: (word >> 40) as u32 & LAST_NUMBER,
            head: word as u16,
        })
    }

    /// How far a submission queue of this completion queue has come.
    #[cfg(test)]
    pub fn head(&self, sqid: u16, cqid: u16) -> Option<u16> {
        let own = self.own(sqid)?.head;
        match self.posted(cqid)?.last {
            (named, head) if named == sqid => Some(head),
            _ => Some(own),
        }
    }

    /// The commands that are out, in the order in which they were fetched.
    pub fn out(&self) -> Vec<Copied> {
        let places = self.words().len().saturating_sub(COPIES) / COPY_WORDS;
        let mut out: Vec<_> = (0..places)
            .filter_map(|place| {
                let at = COPIES + place * COPY_WORDS;
                let what = self.load(at + 8);
                (what & VALID != 0).then(|| Copied {
                    sqid: (what >> 57) as u16 & 63,
                    head: (what >> 41) as u16,
                    sequence: what & SEQUENCE,
                    sqe: std::array::from_fn(|i| self.load(at + i)),
                })
            })
            .collect();
        out.sort_by_key(|c| c.sequence);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Shape;

    fn journal(slots: usize) -> Journal {
        let shape = Shape { pollers: 1, slots };
        Journal::new(StateFile::anonymous(shape).unwrap(), 0)
    }

    #[test]
    fn what_was_written_is_read_and_what_was_struck_out_is_not() {
        let journal = journal(4);
        assert_eq!((journal.own(1), journal.posted(1)), (None, None));
        let own = Fetched {
            number: LAST_NUMBER,
            head: 0xffff,
        };
        journal.fetched(1, own);
        assert_eq!(journal.own(1), Some(own));
        for (cqid, posted) in [
            (1, (1, 0, true, (0, 0))),
            (63, (LAST_NUMBER, 0xfffe, false, (63, 0xffff))),
            (5, (0, 0xffff, true, (1, 0))),
        ] {
            let (number, tail, phase, last) = posted;
            let posted = Posted {
                number,
                tail,
                phase: Phase::from_bit(phase),
                last,
            };
            journal.record(cqid, posted);
            assert_eq!(journal.posted(cqid), Some(posted));
        }
        assert_eq!(
            (journal.head(1, 1), journal.head(1, 5)),
            (Some(0xffff), Some(0))
        );
        let copied = |sqid, sequence| Copied {
            sqid,
            head: 0xfff7,
            sequence,
            sqe: [sequence; 8],
        };
        journal.copy(3, &copied(1, 5));
        journal.copy(0, &copied(63, SEQUENCE));
        journal.copy(1, &copied(2, 4));
        assert_eq!(
            journal.out(),
            [copied(2, 4), copied(1, 5), copied(63, SEQUENCE)]
        );
        journal.strike(3);
        assert_eq!(journal.out(), [copied(2, 4), copied(63, SEQUENCE)]);
    }
}
