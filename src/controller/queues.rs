//! The table of I/O queues: which there are, in which state, and on which poller.

use std::sync::Arc;

use super::image::{CqImage, SqImage};
use crate::poller::stats::QueueStats;

/// Where a queue is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Creating,
    Live,
    Deleting,
}

/// A completion queue.
#[derive(Clone, Debug)]
pub(super) struct Cq {
    pub(super) state: State,
    pub(super) poller: usize,
    pub(super) image: CqImage,
}

/// A submission queue.
#[derive(Clone, Debug)]
pub(super) struct Sq {
    pub(super) state: State,
    pub(super) poller: usize,
    pub(super) cqid: u16,
    pub(super) image: SqImage,
}

/// All I/O queues of a controller, and the counters of each identifier (which stay when a queue goes).
pub(super) struct Queues {
    cqs: Vec<Option<Cq>>,
    sqs: Vec<Option<Sq>>,
    cq_stats: Vec<Arc<QueueStats>>,
    sq_stats: Vec<Arc<QueueStats>>,
}

impl Queues {
    /// None yet; identifiers below `queues`.
    pub(super) fn new(queues: u16) -> Self {
        let n = usize::from(queues);
        let stats = || (0..n).map(|_| Arc::default()).collect();
        Self {
            cqs: vec![None; n],
            sqs: vec![None; n],
            cq_stats: stats(),
            sq_stats: stats(),
        }
    }

    pub(super) fn clear(&mut self) {
        self.cqs.fill(None);
        self.sqs.fill(None);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.cqs.iter().all(Option::is_none) && self.sqs.iter().all(Option::is_none)
    }

    pub(super) fn cq(&self, qid: u16) -> Option<&Cq> {
        self.cqs.get(usize::from(qid))?.as_ref()
    }

    pub(super) fn sq(&self, qid: u16) -> Option<&Sq> {
        self.sqs.get(usize::from(qid))?.as_ref()
    }

    /// The slot of an I/O completion queue; `None` for the admin queue and beyond the last.
    pub(super) fn cq_slot(&mut self, qid: u16) -> Option<&mut Option<Cq>> {
        self.cqs.get_mut(usize::from(qid)).filter(|_| qid != 0)
    }

    /// The slot of an I/O submission queue; `None` for the admin queue and beyond the last.
    pub(super) fn sq_slot(&mut self, qid: u16) -> Option<&mut Option<Sq>> {
        self.sqs.get_mut(usize::from(qid)).filter(|_| qid != 0)
    }

    /// Whether a submission queue, in whichever state, uses this completion queue.
    pub(super) fn is_used(&self, cqid: u16) -> bool {
        self.sqs.iter().flatten().any(|sq| sq.cqid == cqid)
    }

    /// All completion queues, with their identifiers.
    pub(super) fn cqs(&self) -> impl Iterator<Item = (u16, &Cq)> {
        let all = (0..).zip(&self.cqs);
        all.filter_map(|(qid, cq)| Some((qid, cq.as_ref()?)))
    }

    /// The submission queues of a completion queue, with their identifiers.
    pub(super) fn sqs_of(&self, cqid: u16) -> impl Iterator<Item = (u16, &Sq)> + Clone {
        let all = (0..).zip(&self.sqs);
        all.filter_map(move |(qid, sq)| Some((qid, sq.as_ref().filter(|sq| sq.cqid == cqid)?)))
    }

    /// The queues that the guest knows of, to be written down: those it has been told of, as long as it has not been told that they are gone.
    pub(super) fn image(&self) -> (Vec<CqImage>, Vec<SqImage>) {
        let cqs = self
            .cqs
            .iter()
            .flatten()
            .filter(|q| q.state != State::Creating);
        let sqs = self
            .sqs
            .iter()
            .flatten()
            .filter(|q| q.state != State::Creating);
        (
            cqs.map(|q| q.image.clone()).collect(),
            sqs.map(|q| q.image.clone()).collect(),
        )
    }

    /// A completion queue and its submission queues are on another poller now.
    pub(super) fn moved(&mut self, cqid: u16, to: usize) {
        if let Some(cq) = self.cqs.get_mut(usize::from(cqid)).and_then(Option::as_mut) {
            cq.poller = to;
        }
        for sq in self.sqs.iter_mut().flatten().filter(|sq| sq.cqid == cqid) {
            sq.poller = to;
        }
    }

    /// How many queues each poller has.
    pub(super) fn loads(&self, pollers: usize) -> Vec<usize> {
        let mut loads = vec![0; pollers];
        let cqs = self.cqs.iter().flatten().map(|cq| cq.poller);
        let sqs = self.sqs.iter().flatten().map(|sq| sq.poller);
        for poller in cqs.chain(sqs) {
            if let Some(load) = loads.get_mut(poller) {
                *load += 1;
            }
        }
        loads
    }

    /// The pollers that wait for the kick of this queue pair. They are two where the identifiers are a pair and the queues are
    /// not.
    pub(super) fn pollers_of_kick(&self, qid: u16) -> impl Iterator<Item = usize> + use<> {
        let sq = self.sq(qid).map(|sq| sq.poller);
        let cq = self.cq(qid).map(|cq| cq.poller).filter(|p| Some(*p) != sq);
        sq.into_iter().chain(cq)
    }

    pub(super) fn cq_stats(&self, qid: u16) -> Arc<QueueStats> {
        self.cq_stats
            .get(usize::from(qid))
            .cloned()
            .unwrap_or_default()
    }

    pub(super) fn sq_stats(&self, qid: u16) -> Arc<QueueStats> {
        self.sq_stats
            .get(usize::from(qid))
            .cloned()
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_admin_queue_and_identifiers_beyond_have_no_slot() {
        let mut q = Queues::new(3);
        assert!(q.is_empty());
        assert!(q.cq_slot(0).is_none() && q.sq_slot(0).is_none());
        assert!(q.cq_slot(3).is_none() && q.sq_slot(u16::MAX).is_none());
        let state = State::Live;
        let cq = |poller| Cq {
            state,
            poller,
            image: CqImage::default(),
        };
        *q.cq_slot(1).unwrap() = Some(cq(1));
        *q.sq_slot(2).unwrap() = Some(Sq {
            state,
            poller: 1,
            cqid: 1,
            image: SqImage::default(),
        });
        assert!(q.is_used(1) && !q.is_used(2) && !q.is_empty());
        assert_eq!(q.loads(2), [0, 2]);
        let pollers = |q: &Queues, qid| q.pollers_of_kick(qid).collect::<Vec<_>>();
        assert_eq!((pollers(&q, 2), pollers(&q, 1)), (vec![1], vec![1]));
        *q.cq_slot(2).unwrap() = Some(cq(0));
        assert_eq!((pollers(&q, 2), pollers(&q, 0)), (vec![1, 0], vec![]));
        q.clear();
        assert!(q.is_empty());
    }
}
