//! Where I/O queues were when whoever served them stopped, from what it left behind: pure, and everything it reads is hostile.
//!
//! For each completion queue: the newest record says where it was; completions behind it, as long as their phase is new, were posted after the
//! record. Their SQHD, the record, and copies that are still the same as what lies in the submission queue behind that, say how far each
//! submission queue was fetched. A copy whose completion is there is done; the others have to be carried on with, in fetch order. `poller/journal.rs`
//! says why that is all there can be.

use std::sync::Arc;

use nvme_spec::Cqe;
use nvme_spec::doorbell::Doorbell;
use nvme_spec::ring::RingSize;

use super::image::{CqImage, SqImage};
use crate::memory::{GuestMap, Ring};
use crate::poller::{Copied, CqPlace, Journal};

/// A completion queue with its submission queues, as somebody left them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Recovered {
    pub(super) cq: CqImage,
    pub(super) at: CqPlace,
    /// With their heads.
    pub(super) sqs: Vec<(SqImage, u16)>,
    /// Commands that were fetched and have not completed, oldest first: submission queue and command.
    pub(super) carried: Vec<(u16, [u64; 8])>,
}

/// Why queues cannot be found again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("queue {qid}: {what}")]
pub(super) struct Lost {
    qid: u16,
    what: &'static str,
}

/// Find queues again. `bell`: what a doorbell holds, if it can be read.
pub(super) fn recover(
    cqs: &[CqImage],
    sqs: &[SqImage],
    journals: &[Journal],
    map: &Arc<GuestMap>,
    bell: &dyn Fn(Doorbell) -> Option<u32>,
) -> Result<Vec<Recovered>, Lost> {
    let out: Vec<Copied> = journals.iter().flat_map(Journal::out).collect();
    let orphan = |sq: &&SqImage| !cqs.iter().any(|cq| cq.qid == sq.cqid);
    if let Some(sq) = sqs.iter().find(orphan) {
        let (qid, what) = (sq.qid, "its completion queue is not there");
        return Err(Lost { qid, what });
    }
    let one = |cq: &CqImage| {
        let mine = sqs
            .iter()
            .filter(|sq| sq.cqid == cq.qid)
            .collect::<Vec<_>>();
        Place {
            cq,
            journals,
            map,
            bell,
        }
        .recover(&mine, &out)
    };
    cqs.iter().map(one).collect()
}

struct Place<'a> {
    cq: &'a CqImage,
    journals: &'a [Journal],
    map: &'a Arc<GuestMap>,
    bell: &'a dyn Fn(Doorbell) -> Option<u32>,
}

/// A submission queue while it is looked for.
struct Sq<'a> {
    image: &'a SqImage,
    size: RingSize,
    ring: Ring<8>,
    head: u16,
    /// The guest's tail, if that is an index.
    tail: Option<u16>,
}

impl Place<'_> {
    fn recover(&self, sqs: &[&SqImage], out: &[Copied]) -> Result<Recovered, Lost> {
        let cqid = self.cq.qid;
        let lost = |what| Lost { qid: cqid, what };
        let size = self.cq.size().ok_or(lost("its size is none"))?;
        let ring = Ring::<2>::new(self.map, self.cq.base, size.get());
        let ring = ring.ok_or(lost("its memory is not there"))?;
        let records = self.journals.iter().filter_map(|j| j.posted(cqid));
        let record = records
            .max_by_key(|r| r.number)
            .filter(|r| r.number >= self.cq.number)
            .ok_or(lost("there is no record of it"))?;
        let mut at = CqPlace {
            tail: record.tail,
            phase: record.phase,
            head: 0,
        };
        if !size.is_valid_index(at.tail.into()) {
            return Err(lost("its record is beyond its end"));
        }
        let mut found = Vec::with_capacity(sqs.len());
        for image in sqs {
            found.push(self.sq(image, record.last)?);
        }

        let mut posted: Vec<Cqe> = Vec::new();
        for _ in 0..size.capacity() {
            let cqe = Cqe::from_halves(ring.read_published(at.tail.into()));
            if cqe.status.p() != at.phase.bit() {
                break;
            }
            let sq = found.iter_mut().find(|sq| sq.image.qid == cqe.sqid);
            let sq = sq.ok_or(lost("it has a completion of a queue that is not there"))?;
            if !sq.size.is_valid_index(cqe.sqhd.into()) {
                return Err(lost("it has a completion with an impossible head"));
            }
            sq.head = cqe.sqhd;
            posted.push(cqe);
            (at.tail, at.phase) = size.next_with_phase(at.tail, at.phase);
        }

        let mut carried = Vec::new();
        for sq in &mut found {
            sq.find_copies(out)?;
        }
        for copy in out {
            if !found.iter().any(|sq| sq.image.qid == copy.sqid) {
                continue;
            }
            let cid = cid(&copy.sqe);
            let done = |cqe: &Cqe| (cqe.sqid, cqe.cid) == (copy.sqid, cid);
            match posted.iter().position(done) {
                Some(at) => {
                    posted.swap_remove(at);
                }
                None => carried.push((copy.sqid, copy.sqe)),
            }
        }

        let head = (self.bell)(Doorbell::Cq(cqid)).ok_or(lost("its doorbell is not there"))?;
        // One that is no index stops the queue, as it would have done before.
        at.head = size.index(head).unwrap_or(at.tail);
        let unread = u64::from(size.distance(at.head, at.tail));
        if unread + carried.len() as u64 > size.capacity().into() {
            return Err(lost("it has no room for what was out"));
        }
        Ok(Recovered {
            cq: self.cq.clone(),
            at,
            sqs: found.iter().map(|sq| (sq.image.clone(), sq.head)).collect(),
            carried,
        })
    }

    fn sq<'a>(&self, image: &'a SqImage, last: (u16, u16)) -> Result<Sq<'a>, Lost> {
        let qid = image.qid;
        let lost = |what| Lost { qid, what };
        let size = image.size().ok_or(lost("its size is none"))?;
        let ring = Ring::<8>::new(self.map, image.base, size.get());
        let ring = ring.ok_or(lost("its memory is not there"))?;
        let own = self.journals.iter().filter_map(|j| j.own(qid));
        let own = own
            .max_by_key(|r| r.number)
            .filter(|r| r.number >= image.number)
            .ok_or(lost("there is no record of it"))?;
        let head = if last.0 == qid { last.1 } else { own.head };
        if !size.is_valid_index(head.into()) {
            return Err(lost("its record is beyond its end"));
        }
        let tail = (self.bell)(Doorbell::Sq(qid)).ok_or(lost("its doorbell is not there"))?;
        Ok(Sq {
            image,
            size,
            ring,
            head,
            tail: size.index(tail),
        })
    }
}

impl Sq<'_> {
    /// Go behind commands that were copied and whose batch was not recorded: they still lie in the queue as they were copied.
    fn find_copies(&mut self, out: &[Copied]) -> Result<(), Lost> {
        let mut furthest = 0;
        let there = self
            .tail
            .map_or(0, |tail| self.size.distance(self.head, tail));
        for copy in out.iter().filter(|c| c.sqid == self.image.qid) {
            if !self.size.is_valid_index(copy.head.into()) {
                let (qid, what) = (copy.sqid, "a copy is beyond its end");
                return Err(Lost { qid, what });
            }
            let ahead = self.size.distance(self.head, copy.head);
            if ahead > furthest && ahead <= there {
                let index = self.size.advance(self.head, ahead - 1);
                if self.ring.read(index.into()) == copy.sqe {
                    furthest = ahead;
                }
            }
        }
        self.head = self.size.advance(self.head, furthest);
        Ok(())
    }
}

fn cid(sqe: &[u64; 8]) -> u16 {
    (sqe[0] >> 16) as u16
}
