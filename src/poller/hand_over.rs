//! A completion queue and its submission queues on their way from one poller to another.
//!
//! The poller that has them stops fetching, lets what is out come to its end ([`Served::release`]), and then gives away all
//! it knows of them but pointers: between two pollers a queue keeps nothing of the guest's memory. The other one finds rings and doorbells in its
//! own map ([`Served::adopt`]) and looks at each doorbell, so that whatever was rung meanwhile is seen.
//!
//! In the journals a queue may be recorded several times: the new poller writes its record, with the number of the move, before
//! it fetches anything. Until that is there the old one is true, since nothing happens to the queue in between; afterwards the higher
//! number is.
//!
//! Queues of another process come in the same way ([`HandOver::resumed`]), with commands that were out there.

use std::fs::File;
use std::sync::Arc;

use nvme_spec::Status;
use nvme_spec::doorbell::Doorbell;
use nvme_spec::ring::{Phase, RingSize};

use super::bell::Bell;
use super::cq::{Cq, CqState};
use super::front::Front;
use super::journal::Fetched;
use super::message::{CqConfig, PollerEvent, SqConfig};
use super::served::{Served, Waiting};
use super::sq::{Sq, SqState, State};
use crate::memory::{Ring, SharedWord};

/// Looks at the clock (10 ms each) after which a release is given up, because something is out for so long.
const PATIENCE: u32 = 10;

/// A completion queue with its submission queues, on no poller.
pub struct HandOver {
    cq: (CqConfig, CqState),
    sqs: Vec<(SqConfig, SqState)>,
    /// The guest may have to be interrupted yet.
    unsignalled: bool,
    /// Commands to be executed before anything is fetched.
    carried: Vec<Carried>,
}

/// A command that a process before us fetched and did not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Carried {
    /// Its submission queue.
    pub sqid: u16,
    /// The command.
    pub sqe: [u64; 8],
    /// Where its copy is in the journal of its new poller, until it is completed.
    pub place: u32,
}

/// Where a completion queue of a process before us is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CqPlace {
    /// Where the next completion goes.
    pub tail: u16,
    /// Its phase.
    pub phase: Phase,
    /// How far the guest has read.
    pub head: u16,
}

impl HandOver {
    /// Queues of a process before us: the completion queue, the submission queues with the heads they had, and the commands that were out, oldest
    /// first.
    pub fn resumed(
        cq: CqConfig,
        at: CqPlace,
        sqs: Vec<(SqConfig, u16)>,
        carried: Vec<Carried>,
    ) -> Self {
        let dear = cq.vector.as_ref().is_some_and(|v| v.is_dear());
        let state = CqState::resumed(cq.size, at.tail, at.phase, at.head, dear);
        let sq = |(config, head)| (config, SqState::resumed(head));
        Self {
            cq: (cq, state),
            sqs: sqs.into_iter().map(sq).collect(),
            unsignalled: true,
            carried,
        }
    }

    /// The completion queue.
    pub fn cqid(&self) -> u16 {
        self.cq.0.qid
    }

    /// Its submission queues.
    pub fn sqids(&self) -> Vec<u16> {
        self.sqs.iter().map(|(config, _)| config.qid).collect()
    }

    /// Use these kicks from now on, by queue identifier.
    pub fn set_kicks(&mut self, kick: impl Fn(u16) -> Option<Arc<File>>) {
        self.cq.0.kick = kick(self.cq.0.qid);
        for (config, _) in &mut self.sqs {
            config.kick = kick(config.qid);
        }
    }

    /// The kicks that somebody has to wait for.
    pub(super) fn kicks(&self) -> Vec<Arc<File>> {
        let sqs = self.sqs.iter().map(|(config, _)| &config.kick);
        sqs.chain([&self.cq.0.kick]).flatten().cloned().collect()
    }
}

impl Served {
    /// Fetch no more for this completion queue, and hand it over with its submission queues when nothing of them is out.
    pub fn release(&mut self, token: u64, cqid: u16) {
        let leaving =
            |w: &Waiting| matches!(w, Waiting::Release { cqid: other, .. } if *other == cqid);
        let deleting = |sq: &Sq| sq.cqid == cqid && matches!(sq.state, State::Deleting { .. });
        let resuming = |sq: &Sq| sq.cqid == cqid && sq.state == State::Resuming;
        if self.cq(cqid).is_none()
            || self.sqs.iter().flatten().any(resuming)
            || self.waiting.iter().any(leaving)
            || self.sqs.iter().flatten().any(deleting)
        {
            return self.reply(token, Ok(false));
        }
        self.change_state(cqid, State::Running, State::Paused);
        let ticks = 0;
        self.waiting.push(Waiting::Release { token, cqid, ticks });
        self.unsettled = true;
    }

    /// Go on with a completion queue that was to be handed over; nothing if it has been, or was not.
    pub fn keep(&mut self, cqid: u16) {
        self.keep_those(|_, other| other == cqid);
    }

    /// Time has passed: go on with queues that could not be handed over for too long. Whether there were any.
    pub fn lose_patience(&mut self) -> bool {
        self.keep_those(|ticks, _| {
            *ticks += 1;
            *ticks > PATIENCE
        })
    }

    fn keep_those(&mut self, mut which: impl FnMut(&mut u32, u16) -> bool) -> bool {
        let mut kept = Vec::new();
        self.waiting.retain_mut(|w| {
            let Waiting::Release { token, cqid, ticks } = w else {
                return true;
            };
            let keep = which(ticks, *cqid);
            if keep {
                kept.push((*token, *cqid));
            }
            !keep
        });
        for (token, cqid) in &kept {
            if self.suspended {
                continue;
            }
            self.change_state(*cqid, State::Paused, State::Running);
            self.reply(*token, Ok(false));
        }
        !kept.is_empty()
    }

    /// Whether queues are to be handed over.
    pub fn is_releasing(&self) -> bool {
        let release = |w: &Waiting| matches!(w, Waiting::Release { .. });
        self.waiting.iter().any(release)
    }

    fn change_state(&mut self, cqid: u16, from: State, to: State) {
        for sq in self.sqs.iter_mut().flatten() {
            if sq.cqid == cqid && sq.state == from {
                sq.state = to;
            }
        }
    }

    /// Answer a release if nothing is out; whether it still has to wait.
    pub(super) fn settle_release(&mut self, token: u64, cqid: u16) -> bool {
        let of_cq = |sq: &&Sq| sq.cqid == cqid;
        let mine = self.sqs.iter().flatten().filter(of_cq);
        if mine.clone().any(|sq| sq.outstanding > 0) {
            return true;
        }
        let sqids: Vec<u16> = mine.map(|sq| sq.qid).collect();
        let Some(cq) = self.cqs.get_mut(usize::from(cqid)).and_then(Option::take) else {
            // It was reset away.
            self.reply(token, Ok(false));
            return false;
        };
        let bit = 1 << (cqid & 63);
        let unsignalled = self.posted & bit != 0;
        self.posted &= !bit;
        self.active_cqs.retain(|q| *q != cqid);
        self.active.retain(|q| !sqids.contains(q));
        let sqs = sqids
            .iter()
            .filter_map(|qid| self.sqs.get_mut(usize::from(*qid))?.take())
            .map(Sq::pack)
            .collect();
        let cq = cq.pack();
        self.leaving.push((
            token,
            HandOver {
                cq,
                sqs,
                unsignalled,
                carried: Vec::new(),
            },
        ));
        false
    }

    /// Go on with queues where another poller has left off. `number`: of the move, higher than all before.
    pub fn adopt(&mut self, number: u32, queues: HandOver) -> Result<(), Status> {
        let HandOver {
            cq: (mut cq, cq_state),
            sqs,
            unsignalled,
            carried,
        } = queues;
        cq.number = number;
        let free = |places: &[bool], qid: u16| places.get(usize::from(qid)) == Some(&true);
        let free_cqs: Vec<bool> = self.cqs.iter().map(Option::is_none).collect();
        let free_sqs: Vec<bool> = self.sqs.iter().map(Option::is_none).collect();
        if !free(&free_cqs, cq.qid) || !sqs.iter().all(|(sq, _)| free(&free_sqs, sq.qid)) {
            return Err(Status::INVALID_QUEUE_ID);
        }
        let mut gone = Vec::new();
        let cqid = cq.qid;
        let ring = Ring::new(&self.at.map, cq.base, cq.size.get());
        let (bell, whole) = self.bell_as_it_is(Doorbell::Cq(cqid), cq.size)?;
        if (ring.is_none() || !whole) && !cq_state.gone() {
            gone.push(cqid);
        }
        let cq = Cq::unpack(cq, cq_state, ring, bell);
        let mut adopted = Vec::new();
        for (mut sq, state) in sqs {
            sq.number = number;
            let ring = Ring::new(&self.at.map, sq.base, sq.size.get());
            let (bell, whole) = self.bell_as_it_is(Doorbell::Sq(sq.qid), sq.size)?;
            if (ring.is_none() || !whole) && !state.gone() {
                gone.push(sq.qid);
            }
            let mut sq = Sq::unpack(sq, state, ring, bell);
            if !carried.is_empty() && sq.state == State::Running {
                sq.state = State::Resuming;
            }
            if sq.cqid == sq.qid {
                sq.front = Front::of(&self.at.window, sq.qid);
            }
            adopted.push(sq);
        }
        // All of it is there: from here on nothing fails. The journal first, before anything is fetched.
        if let Some(journal) = &self.journal {
            for sq in &adopted {
                let head = sq.head;
                journal.fetched(sq.qid, Fetched { number, head });
            }
            // Last: the record before it may name one of them.
            cq.record(journal);
        }
        if let Some(place) = self.cqs.get_mut(usize::from(cqid)) {
            *place = Some(cq);
            self.active_cqs.push(cqid);
        }
        for sq in adopted {
            let qid = sq.qid;
            if let Some(place) = self.sqs.get_mut(usize::from(qid)) {
                *place = Some(sq);
                self.active.push(qid);
            }
        }
        if unsignalled {
            self.posted |= 1 << (cqid & 63);
        }
        self.unsettled |= !carried.is_empty();
        self.carried.extend(carried);
        for qid in gone {
            self.event(PollerEvent::QueueMemoryGone { qid });
        }
        Ok(())
    }

    /// The doorbell of a queue that has been used, with what it holds; and whether its shadow is there, if it has to have one.
    fn bell_as_it_is(&self, doorbell: Doorbell, size: RingSize) -> Result<(Bell, bool), Status> {
        let offset = self.at.stride.window_offset(doorbell) as usize;
        let register =
            SharedWord::in_window(&self.at.window, offset).ok_or(Status::INVALID_QUEUE_ID)?;
        let shadow = self.shadow.map(|config| self.shadow_of(config, doorbell));
        let whole = !matches!(shadow, Some(Err(_)));
        let shadow = shadow.and_then(Result::ok);
        Ok((Bell::new(register, shadow, size), whole))
    }
}
