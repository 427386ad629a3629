//! The way of a command on its poller: fetch, begin, finish, post.

use nvme_spec::{Sqe, Status, StatusField};

use super::done::{self, Tally, Together};
use super::journal::Copied;
use super::message::PollerEvent;
use super::served::Served;
use super::slot::{Rest, Slots};
use super::work::{Begun, Prepared, work};
use crate::backend::{BlockRange, Channel as _, Finished};
use crate::io::MAX_RANGES;

/// Commands taken from one queue before results and mail have their turn.
const BURST: u32 = 32;

/// The same where other queues are busy: a command that comes alone waits for a burst of each of the others.
const SHARED_BURST: u32 = 8;

/// Bytes moved for one queue, by stores that do it at once, before the next queue has its turn. It is looked at before a command is
/// taken, and two are in hand: so it is exceeded by two transfers at most.
pub(super) const BURST_BYTES: u32 = 256 << 10;

/// Commands that a process before us left come before all of ours: so many there are at most.
pub const CARRIED: u64 = 1 << 32;

/// What all controllers of a poller share.
pub(super) struct Core {
    pub slots: Slots,
    /// Results of a channel, taken in one go.
    finished: Vec<Finished>,
    /// Ranges of the Dataset Management command at hand.
    pub ranges: Vec<BlockRange>,
    /// There are several controllers: each leaves slots to the others.
    pub shared: bool,
    /// Commands taken from one queue before the next has its turn.
    burst: u32,
    /// Fetch order of commands that have to wait.
    sequence: u64,
}

impl Core {
    pub fn new(slots: usize) -> Self {
        Self {
            slots: Slots::new(slots),
            finished: Vec::with_capacity(slots),
            ranges: Vec::with_capacity(MAX_RANGES),
            shared: false,
            burst: BURST,
            // Behind those of a process before us.
            sequence: CARRIED,
        }
    }

    /// Slots for a controller that has `outstanding` commands out.
    ///
    /// Where there are others it may have as many out as it leaves free: so `n` busy ones come to have one part of `n + 1` each, the last
    /// part is there for whoever comes next, and a busy one among quiet ones gets half. While any slot is free, who has none gets one.
    #[inline]
    pub fn share(&self, outstanding: usize) -> usize {
        let free = self.slots.available();
        if !self.shared {
            return free;
        }
        free.saturating_sub(outstanding).div_ceil(2)
    }

    /// So many queues are busy.
    #[inline]
    pub fn expect(&mut self, queues: usize) {
        self.burst = if queues > 1 { SHARED_BURST } else { BURST };
    }
}

/// What came of a look at a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fetched {
    /// Commands were taken, or something else happened.
    pub busy: bool,
    /// There are more commands than were taken.
    pub more: bool,
}

impl Fetched {
    const NOTHING: Self = Self {
        busy: false,
        more: false,
    };
    /// There are commands, and no slot or no room for a completion.
    pub const STALLED: Self = Self {
        busy: false,
        more: true,
    };
    const EVENT: Self = Self {
        busy: true,
        more: false,
    };
}

impl Served {
    /// Take the results that channels have. Whether there were any.
    pub fn collect(&mut self, core: &mut Core) -> bool {
        let mut busy = false;
        for i in 0..self.channels.len() {
            let Some(channel) = self.channels.get_mut(i) else {
                continue;
            };
            if channel.pending() == 0 {
                continue;
            }
            channel.poll(&mut core.finished);
            // Told with what comes new in this pass.
            if channel.unsent() {
                self.submitted = true;
                busy = true;
            }
            let mut finished = std::mem::take(&mut core.finished);
            busy |= !finished.is_empty();
            for result in finished.drain(..) {
                self.finished(core, result);
            }
            core.finished = finished;
        }
        busy
    }

    /// A request of a command is finished: go on with the next one, or complete the command.
    fn finished(&mut self, core: &mut Core, finished: Finished) {
        let Some((slot, room)) = core.slots.with_segments(finished.tag) else {
            tracing::error!(
                tag = finished.tag,
                "a backend finished a request that is not out"
            );
            return;
        };
        let mut status = finished.status;
        if status.is_success() && !slot.mute && !matches!(slot.rest, Rest::Nothing) {
            let rest = std::mem::take(&mut slot.rest);
            match work!(self).go_on(finished.tag, slot, room, rest) {
                Begun::Pending => {
                    self.submitted = true;
                    return;
                }
                Begun::Done(refusal) => status = refusal.status.into(),
            }
        }
        self.complete(core, finished.tag, status);
    }

    /// Tell the guest of a command that had to wait, and free the slot.
    pub fn complete(&mut self, core: &mut Core, tag: u32, status: StatusField) {
        let Some(slot) = core.slots.get(tag) else {
            return;
        };
        let aborted = status.status() == Status::ABORT_REQUESTED;
        let status = if slot.queue_deleted && aborted {
            Status::ABORTED_SQ_DELETION.into()
        } else {
            status
        };
        let abort = slot.abort.take();
        self.outstanding = self.outstanding.saturating_sub(1);
        // What it had still to do is not for the next command in this slot.
        slot.rest = Rest::Nothing;
        let copy = slot.journal_at;
        if slot.mute {
            core.slots.release(tag);
            if let Some(journal) = &self.journal {
                journal.strike(copy);
            }
            if let Some(token) = abort {
                self.reply(token, Ok(aborted));
            }
            return;
        }
        let sqe: Sqe = zerocopy::transmute!(slot.sqe);
        let (sqid, cqid) = (slot.sqid, slot.cqid);
        let (namespace, blocks, start) = (slot.namespace, slot.blocks, slot.start);
        core.slots.release(tag);
        // First, so that a guest that asks for the error log finds what it was told of.
        if let Some(failure) = done::failure(sqid, &sqe, status, 0xffff) {
            self.report(failure);
        }
        if let (Some(Some(sq)), Some(Some(cq))) = (
            self.sqs.get_mut(usize::from(sqid)),
            self.cqs.get_mut(usize::from(cqid)),
        ) {
            done::post_field(sq, cq, sqe.cid, sq.head, status);
            sq.outstanding = sq.outstanding.saturating_sub(1);
            sq.stats.completed.add(1);
            sq.stats.service.done(start);
            self.posted |= 1 << (cqid & 63);
            if let Some(journal) = &self.journal {
                journal.strike(copy);
                // Before anything is fetched again: the guest may give the next command this identifier.
                cq.record(journal);
            }
        } else if let Some(journal) = &self.journal {
            journal.strike(copy);
        }
        let mut tally = Tally::new(&self.at.stats);
        tally.count(namespace, sqe.opcode, blocks, status.status());
        tally.settle();
        // After the completion: nobody is told that a command was aborted which a process after us would carry out.
        if let Some(token) = abort {
            self.reply(token, Ok(aborted));
        }
    }

    /// The tail of a queue is `value`: fetch commands and begin them.
    #[inline]
    pub fn fetch(&mut self, core: &mut Core, qid: u16, value: u32) -> Fetched {
        let Some(Some(sq)) = self.sqs.get_mut(usize::from(qid)) else {
            return Fetched::NOTHING;
        };
        let waiting = match sq.accept(value) {
            Ok(0) => return Fetched::NOTHING,
            Ok(n) => n,
            Err(_) => {
                self.event(PollerEvent::InvalidDoorbell { qid });
                return Fetched::EVENT;
            }
        };
        let Some(Some(cq)) = self.cqs.get_mut(usize::from(sq.cqid)) else {
            return Fetched::NOTHING;
        };
        if cq.broken || cq.ring.is_none() {
            return Fetched::NOTHING;
        }
        let slots = u32::try_from(core.share(self.outstanding)).unwrap_or(u32::MAX);
        let wanted = waiting.min(core.burst).min(slots);
        let granted = match cq.reserve(wanted) {
            Ok(n) => n,
            Err(_) => {
                let qid = cq.qid;
                self.event(PollerEvent::InvalidDoorbell { qid });
                return Fetched::EVENT;
            }
        };
        if granted == 0 {
            if wanted > 0 {
                sq.stats.cq_full.add(1);
            }
            return Fetched::STALLED;
        }
        if let Some(front) = &mut sq.front {
            front.awake();
            front.fetched(cq.wants_ring());
            if cq.wants_ring() {
                // We would look without being asked; but whoever rings then watches for the completion.
                sq.bell.arm(sq.tail);
            }
        }
        if !sq.bell.has_shadow() && !cq.wants_ring() {
            self.unshadowed_batches = self.unshadowed_batches.saturating_add(1);
        }

        let cqid = sq.cqid;
        let start = sq.stats.service.start();
        let mut tally = Tally::new(&self.at.stats);
        let mut together = Together::of(granted);
        let (mut done, mut out) = (0, 0);
        // Two commands are in hand: while one is done, the data of the next is on its way.
        let [now, next] = &mut [Prepared::default(), Prepared::default()];
        let (mut now, mut next) = (now, next);
        let mut left = granted;
        let mut bytes = BURST_BYTES;
        // The permit: a place in the completion queue and a slot are in hand before a command is taken.
        let mut there = work!(self).prepare(&mut core.slots, sq, now);
        while there {
            cq.promise();
            left -= 1;
            there = left > 0 && bytes > 0 && work!(self).prepare(&mut core.slots, sq, next);
            let Some((slot, room)) = core.slots.with_segments(now.tag) else {
                break;
            };
            match work!(self).begin(slot, room, now, &mut core.ranges) {
                Begun::Done(refusal) => {
                    let (namespace, blocks) = (slot.namespace, slot.blocks);
                    core.slots.release(now.tag);
                    if let Some(failure) =
                        done::failure(qid, &now.sqe, refusal.status.into(), refusal.parameter)
                        && self.reports_left > 0
                    {
                        self.reports_left -= 1;
                        self.at
                            .sink
                            .event(self.poller, PollerEvent::Failed(failure));
                    }
                    let ended = (now.sqe.cid, now.head, refusal.status);
                    together.add(sq, cq, ended, now.bytes);
                    sq.stats.service.done(start);
                    done += 1;
                    bytes = bytes.saturating_sub(now.bytes);
                    tally.count(namespace, now.sqe.opcode, blocks, refusal.status);
                }
                Begun::Pending => {
                    slot.served = self.index;
                    slot.sqid = qid;
                    slot.cqid = cqid;
                    slot.cid = now.sqe.cid;
                    slot.mute = false;
                    slot.queue_deleted = false;
                    slot.journal_at = now.tag;
                    slot.start = start;
                    slot.abort = None;
                    slot.epoch = self.epoch;
                    slot.sqe = zerocopy::transmute!(now.sqe);
                    core.sequence = core.sequence.wrapping_add(1);
                    if let Some(journal) = &self.journal {
                        let copied = Copied {
                            sqid: qid,
                            head: now.head,
                            sequence: core.sequence,
                            sqe: slot.sqe,
                        };
                        journal.copy(now.tag, &copied);
                    }
                    out += 1;
                }
            }
            std::mem::swap(&mut now, &mut next);
        }
        together.post(sq, cq);
        tally.settle();
        sq.outstanding += out;
        sq.stats.batches.add(1);
        // Not what was granted: large transfers end a turn early.
        let size = (done + out).max(1).ilog2() as usize;
        if let Some(size) = sq.stats.batch_sizes.get(size) {
            size.add(1);
        }
        sq.stats.fetched.add(u64::from(done + out));
        if let Some(journal) = &self.journal {
            cq.record_batch(journal, qid, sq.number, sq.head);
        }
        if done > 0 {
            sq.stats.completed.add(u64::from(done));
            self.posted |= 1 << (cqid & 63);
        }
        if out > 0 {
            self.outstanding += out as usize;
            self.submitted = true;
        }
        Fetched {
            busy: true,
            more: sq.head != sq.tail,
        }
    }
}

/// The positions of the ones.
pub(super) fn bits(mut word: u64) -> impl Iterator<Item = u16> {
    std::iter::from_fn(move || {
        (word != 0).then(|| {
            let at = word.trailing_zeros() as u16;
            word &= word - 1;
            at
        })
    })
}

#[cfg(test)]
mod tests {
    use super::Core;

    /// So many controllers that always want more, on a store that ends a few commands at a time, in order; looked at as the engine does
    /// it where slots run out. How many commands of each have ended.
    fn compete(slots: usize, controllers: usize) -> Vec<u64> {
        let mut core = Core::new(slots);
        core.shared = controllers > 1;
        let (mut out, mut done) = (vec![0; controllers], vec![0; controllers]);
        let mut store = std::collections::VecDeque::new();
        for first in 0..4000 {
            for i in 0..controllers {
                let who = (first + i) % controllers;
                for _ in 0..core.share(out[who]).min(8) {
                    store.push_back((who, core.slots.take().expect("a slot that was promised")));
                    out[who] += 1;
                }
            }
            for (who, tag) in store.drain(..store.len().min(16)) {
                core.slots.release(tag);
                out[who] -= 1;
                done[who] += 1;
            }
        }
        done
    }

    #[test]
    fn busy_controllers_get_equal_shares_of_the_slots() {
        for (slots, controllers) in [(1024, 2), (1024, 8), (1024, 100), (64, 50), (16, 24)] {
            let done = compete(slots, controllers);
            let (least, most) = (*done.iter().min().unwrap(), *done.iter().max().unwrap());
            assert!(most as f64 <= 1.1 * least as f64, "{slots}: {done:?}");
        }
    }

    #[test]
    fn who_is_alone_may_have_all_slots_and_who_has_none_gets_one() {
        let mut core = Core::new(3);
        assert_eq!(core.share(0), 3);
        core.shared = true;
        assert_eq!([core.share(0), core.share(2), core.share(3)], [2, 1, 0]);
        core.slots.take();
        core.slots.take();
        assert_eq!([core.share(0), core.share(1)], [1, 0]);
    }
}
