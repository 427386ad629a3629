//! What another process would need to go on with a guest's commands, written as they go by (`docs/adr/0006`).
//!
//! The guest's own queues are most of the record: a command stays in its submission queue until it is completed, and a
//! completion stays in its completion queue until the guest has read it. What is missing there is kept here, in shared memory
//! that this process does not take with it when it dies:
//!
//! - how far each queue had come, written once a batch, *after* the batch;
//! - a copy of each command that was fetched and has to wait for its backend, written *before* anything of its batch counts as
//!   fetched, and struck out after its completion was posted.
//!
//! A process that stops at any store leaves one of these pictures, each of which can be read:
//!
//! | before the stop | seen afterwards | meaning |
//! |---|---|---|
//! | nothing of a command | it lies at or behind the recorded head | not begun: fetch it |
//! | executed, not posted | the same | fetch it: nobody was told, and doing it again does no harm |
//! | completion posted, batch not recorded | entries of the present phase behind the recorded tail; their SQHD says how far the queue is | done |
//! | copy written, batch not recorded | a copy whose position is behind the recorded head | fetched up to there, this one is out |
//! | completion of a copy posted, copy not struck out | copy and completion with the same identifiers | done |
//!
//! Queues move between pollers, each of which has a journal of its own. The poller that adopts a queue writes the number of the move
//! and then how far the queue has come, before it fetches; the one that had it strikes its record out afterwards. Of two records
//! of a queue the one with the higher number counts ([`Journal::newest`]).
//!
//! All stores are plain ones, in program order for every observer on this machine (Release), and go to lines that no other thread
//! writes.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::memory::SharedWords;

use super::served::MAX_QUEUES;

/// Words of a queue pair's record, a cache line: head, tail, and for each of them the number of the move that brought it here.
const QUEUE_WORDS: usize = 8;

/// Words of a copied command: two cache lines, the command and what it is.
const COPY_WORDS: usize = 16;

/// Where the copies begin.
const COPIES: usize = MAX_QUEUES * QUEUE_WORDS;

/// In a word that was written at all.
const VALID: u64 = 1 << 63;

/// The journal of a controller on one poller, its only writer.
pub struct Journal {
    words: SharedWords,
    slots: usize,
}

/// A command that was fetched and has not completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copied {
    /// Its submission queue.
    pub sqid: u16,
    /// Head of that queue once this command counts as fetched.
    pub head: u16,
    /// The order in which its poller fetched it.
    pub sequence: u32,
    /// The command.
    pub sqe: [u64; 8],
}

impl Journal {
    /// An empty journal for a poller with `slots` slots.
    ///
    /// # Errors
    ///
    /// What the kernel says when memory or file descriptors run out.
    pub fn new(slots: usize) -> io::Result<Self> {
        let words = slots
            .checked_mul(COPY_WORDS)
            .and_then(|w| w.checked_add(COPIES))
            .ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            words: SharedWords::new("nvme-journal", words)?,
            slots,
        })
    }

    #[inline]
    fn store(&self, at: usize, value: u64) {
        // All indices are below the length for which the words were made.
        if let Some(word) = self.words.words().get(at) {
            word.store(value, Ordering::Release);
        }
    }

    fn load(&self, at: usize) -> u64 {
        let word = self.words.words().get(at);
        word.map_or(0, |w| AtomicU64::load(w, Ordering::Acquire))
    }

    /// All commands before `head` are completed or copied.
    #[inline]
    pub fn fetched(&self, sqid: u16, head: u16) {
        let at = usize::from(sqid) % MAX_QUEUES * QUEUE_WORDS;
        self.store(at, VALID | u64::from(head));
    }

    /// All completions before `tail` are posted, and struck out; the next one has this phase.
    #[inline]
    pub fn posted(&self, cqid: u16, tail: u16, phase: bool) {
        let at = usize::from(cqid) % MAX_QUEUES * QUEUE_WORDS + 1;
        self.store(at, VALID | u64::from(phase) << 16 | u64::from(tail));
    }

    /// Copy a command that has to wait.
    #[inline]
    pub fn copy(&self, slot: u32, copied: &Copied) {
        let at = COPIES + slot as usize * COPY_WORDS;
        for (i, word) in copied.sqe.iter().enumerate() {
            self.store(at + i, *word);
        }
        let what = u64::from(copied.sqid & 0x3fff) << 48
            | u64::from(copied.head) << 32
            | u64::from(copied.sequence);
        self.store(at + 8, VALID | what);
    }

    /// Strike a copy out.
    #[inline]
    pub fn strike(&self, slot: u32) {
        self.store(COPIES + slot as usize * COPY_WORDS + 8, 0);
    }

    /// A submission queue has come from another poller by the move of this number.
    pub fn adopted_sq(&self, sqid: u16, head: u16, number: u64) {
        self.store(usize::from(sqid) % MAX_QUEUES * QUEUE_WORDS + 2, number);
        self.fetched(sqid, head);
    }

    /// A completion queue has come from another poller by the move of this number.
    pub fn adopted_cq(&self, cqid: u16, tail: u16, phase: bool, number: u64) {
        self.store(usize::from(cqid) % MAX_QUEUES * QUEUE_WORDS + 3, number);
        self.posted(cqid, tail, phase);
    }

    /// A queue has gone, or is not there yet.
    pub fn forget_sq(&self, sqid: u16) {
        let at = usize::from(sqid) % MAX_QUEUES * QUEUE_WORDS;
        self.store(at, 0);
        self.store(at + 2, 0);
    }

    /// As [`Self::forget_sq`].
    pub fn forget_cq(&self, cqid: u16) {
        let at = usize::from(cqid) % MAX_QUEUES * QUEUE_WORDS;
        self.store(at + 1, 0);
        self.store(at + 3, 0);
    }

    /// The journal whose record of a queue pair's head (`false`) or tail (`true`) is the one that counts.
    pub fn newest<'a>(
        journals: impl IntoIterator<Item = &'a Self>,
        qid: u16,
        tail: bool,
    ) -> Option<&'a Self> {
        let at = usize::from(qid) % MAX_QUEUES * QUEUE_WORDS + usize::from(tail);
        let known = journals.into_iter().filter(|j| j.load(at) & VALID != 0);
        known.max_by_key(|j| j.load(at + 2))
    }

    /// The recorded head of a submission queue.
    pub fn head(&self, sqid: u16) -> Option<u16> {
        let word = self.load(usize::from(sqid) % MAX_QUEUES * QUEUE_WORDS);
        (word & VALID != 0).then_some(word as u16)
    }

    /// The recorded tail of a completion queue, and the phase of the entry there.
    pub fn tail(&self, cqid: u16) -> Option<(u16, bool)> {
        let word = self.load(usize::from(cqid) % MAX_QUEUES * QUEUE_WORDS + 1);
        (word & VALID != 0).then_some((word as u16, word >> 16 & 1 != 0))
    }

    /// The commands that are out, in the order in which they were fetched.
    pub fn out(&self) -> Vec<Copied> {
        let mut out: Vec<_> = (0..self.slots)
            .filter_map(|slot| {
                let at = COPIES + slot * COPY_WORDS;
                let what = self.load(at + 8);
                (what & VALID != 0).then(|| Copied {
                    sqid: (what >> 48) as u16 & 0x3fff,
                    head: (what >> 32) as u16,
                    sequence: what as u32,
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

    #[test]
    fn what_was_written_is_read_and_what_was_struck_out_is_not() {
        let journal = Journal::new(4).unwrap();
        assert_eq!((journal.head(1), journal.tail(1)), (None, None));
        journal.fetched(1, 0xffff);
        journal.posted(1, 0, true);
        journal.posted(63, 0xfffe, false);
        assert_eq!(journal.head(1), Some(0xffff));
        assert_eq!(journal.tail(1), Some((0, true)));
        assert_eq!(journal.tail(63), Some((0xfffe, false)));
        let copied = |sqid, sequence| Copied {
            sqid,
            head: 7,
            sequence,
            sqe: [u64::from(sequence); 8],
        };
        journal.copy(3, &copied(1, 5));
        journal.copy(0, &copied(63, 6));
        journal.copy(1, &copied(2, 4));
        assert_eq!(journal.out(), [copied(2, 4), copied(1, 5), copied(63, 6)]);
        journal.strike(3);
        assert_eq!(journal.out(), [copied(2, 4), copied(63, 6)]);
        journal.forget_sq(1);
        journal.forget_cq(1);
        assert_eq!((journal.head(1), journal.tail(1)), (None, None));
    }

    #[test]
    fn of_two_records_of_a_moved_queue_the_later_one_counts() {
        let [a, b] = [Journal::new(1).unwrap(), Journal::new(1).unwrap()];
        let head = |a: &Journal, b: &Journal| Journal::newest([a, b], 1, false)?.head(1);
        let tail = |a: &Journal, b: &Journal| Journal::newest([a, b], 1, true)?.tail(1);
        assert_eq!((head(&a, &b), tail(&a, &b)), (None, None));
        a.fetched(1, 5);
        a.posted(1, 5, true);
        for (number, [from, to]) in [(7, [&a, &b]), (8, [&b, &a])] {
            to.adopted_cq(1, 5, true, number);
            to.adopted_sq(1, 5, number);
            to.fetched(1, 6);
            to.posted(1, 6, true);
            assert_eq!(head(&a, &b), Some(6), "before the other is struck out");
            assert_eq!(tail(&a, &b), Some((6, true)));
            from.forget_sq(1);
            from.forget_cq(1);
            assert_eq!((head(&a, &b), from.head(1)), (Some(6), None));
            to.fetched(1, 5);
            to.posted(1, 5, true);
        }
    }
}
