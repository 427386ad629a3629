//! A submission queue on its poller: how far the guest is, how far we are.

use std::fs::File;
use std::sync::Arc;

use nvme_spec::ring::RingSize;

use super::bell::Bell;
use super::front::Front;
use super::stats::QueueStats;
use crate::memory::{Near, Place, Ring};

/// Commands whose abort was asked for before they were fetched (Identify ACL is small).
pub(super) const MAX_ABORTS_WAITING: usize = 8;

/// Whether commands are fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Running,
    /// To be handed over to another poller: nothing is fetched until that is done or given up.
    Paused,
    /// It has come from a process before us, whose commands are carried on with first.
    Resuming,
    /// The guest rang with a value its queue does not have; only deletion or reset helps.
    Stopped,
    /// Being deleted: the reply goes out when no command is out.
    Deleting {
        token: u64,
    },
}

/// A submission queue.
///
/// What a fetch touches comes first, in the order of declaration.
#[repr(C)]
pub(super) struct Sq {
    /// `None` while its memory is not there.
    pub ring: Option<Ring<8>>,
    pub size: RingSize,
    /// The next command to be fetched.
    pub head: u16,
    /// The guest's tail, as of the last look.
    pub tail: u16,
    pub qid: u16,
    pub cqid: u16,
    pub state: State,
    /// Commands that were fetched and have not completed.
    pub outstanding: u32,
    /// Of the creation or move that brought it here.
    pub number: u32,
    /// The region of its data, most likely.
    pub near: Near,
    pub stats: Arc<QueueStats>,
    /// Commands to be aborted when they are fetched.
    pub aborts: Vec<Abort>,
    pub bell: Bell,
    /// The front-end's side, if it listens.
    pub front: Option<Front>,
    pub kick: Option<Arc<File>>,
    pub base: u64,
    /// An SGL has come.
    pub sgls: bool,
}

const _: () = assert!(
    std::mem::offset_of!(Sq, aborts) <= 128,
    "what a fetch touches lies on two cache lines"
);

/// An Abort of a command that was not fetched yet. It is answered only when the guest was told of the command: whoever goes on after us
/// knows nothing of it, and begins the Abort again.
pub(super) struct Abort {
    pub cid: u16,
    /// Of the answer.
    pub token: u64,
    /// The command was fetched.
    pub met: bool,
}

/// What has become of a submission queue, without its memory.
pub(super) struct SqState {
    /// Its memory was not there.
    gone: bool,
    head: u16,
    tail: u16,
    stopped: bool,
}

impl SqState {
    /// That of a queue of a process before us.
    pub fn resumed(head: u16) -> Self {
        Self {
            gone: false,
            head,
            tail: head,
            stopped: false,
        }
    }

    /// Whether its memory was not there when it was on a poller last.
    pub fn gone(&self) -> bool {
        self.gone
    }
}

/// A guest's tail doorbell holds a value that its queue does not have.
pub(super) struct InvalidTail;

impl Sq {
    pub fn new(config: super::SqConfig, ring: Ring<8>, bell: Bell) -> Self {
        bell.suppress(0);
        Self {
            qid: config.qid,
            number: config.number,
            base: config.base,
            size: config.size,
            ring: Some(ring),
            bell,
            front: None,
            cqid: config.cqid,
            state: State::Running,
            kick: config.kick,
            stats: config.stats,
            head: 0,
            tail: 0,
            outstanding: 0,
            near: Near::default(),
            aborts: Vec::with_capacity(MAX_ABORTS_WAITING),
            sgls: false,
        }
    }

    /// A command with an SGL was taken: say so once.
    #[cold]
    pub fn note_sgls(&mut self) {
        if !std::mem::replace(&mut self.sgls, true) {
            tracing::debug!(qid = self.qid, "a guest uses SGLs");
        }
    }

    /// Leave this poller. Nothing is out.
    pub fn pack(mut self) -> (super::SqConfig, SqState) {
        let config = super::SqConfig {
            qid: self.qid,
            number: self.number,
            base: self.base,
            size: self.size,
            cqid: self.cqid,
            kick: self.kick,
            stats: self.stats,
        };
        // Until somebody serves it again, the front-end is to ring.
        self.front.iter_mut().for_each(Front::asleep);
        let state = SqState {
            gone: self.ring.is_none(),
            head: self.head,
            tail: self.tail,
            stopped: self.state == State::Stopped,
        };
        (config, state)
    }

    /// Go on with a queue of another poller.
    pub fn unpack(
        config: super::SqConfig,
        state: SqState,
        ring: Option<Ring<8>>,
        bell: Bell,
    ) -> Self {
        Self {
            qid: config.qid,
            number: config.number,
            base: config.base,
            size: config.size,
            ring,
            bell,
            cqid: config.cqid,
            state: if state.stopped {
                State::Stopped
            } else {
                State::Running
            },
            kick: config.kick,
            stats: config.stats,
            head: state.head,
            tail: state.tail,
            outstanding: 0,
            front: None,
            near: Near::default(),
            // While an Abort waits, no queue is moved.
            aborts: Vec::with_capacity(MAX_ABORTS_WAITING),
            sgls: false,
        }
    }

    /// The guest's tail is `value` now; the number of commands to fetch.
    #[inline]
    pub fn accept(&mut self, value: u32) -> Result<u32, InvalidTail> {
        if self.state != State::Running || self.ring.is_none() {
            return Ok(0);
        }
        if value != u32::from(self.tail) {
            let Some(tail) = self.size.index(value) else {
                self.state = State::Stopped;
                return Err(InvalidTail);
            };
            self.tail = tail;
            self.bell.suppress(tail);
        }
        Ok(self.size.distance(self.head, self.tail))
    }

    /// Where the next command will be.
    #[inline]
    pub fn next_command(&self) -> Place {
        let place = |ring: &Ring<8>| ring.place(u32::from(self.head));
        self.ring.as_ref().map(place).unwrap_or_default()
    }

    /// Whether the guest is about to ring for commands that we have seen already: then somebody watches for their completion.
    pub fn ring_is_due(&self) -> bool {
        let expects = self.front.as_ref().is_some_and(Front::expects_ring);
        expects && !self.bell.has_rung(self.tail)
    }

    /// Copy the next command out. Call only as often as [`Self::look`] said.
    #[inline]
    pub fn take(&mut self) -> Option<[u64; 8]> {
        /// How far ahead the processor is asked to look: the lines come from the guest's core, one after the other.
        const AHEAD: u32 = 4;
        let ring = self.ring.as_ref()?;
        let words = ring.read(u32::from(self.head));
        self.head = self.size.next(self.head);
        ring.prefetch(u32::from(self.head).wrapping_add(AHEAD - 1));
        Some(words)
    }

    /// Whether this command was aborted before it was fetched.
    #[inline]
    pub fn was_aborted(&mut self, cid: u16) -> bool {
        if self.aborts.is_empty() {
            return false;
        }
        let mut aborts = self.aborts.iter_mut();
        match aborts.find(|abort| abort.cid == cid && !abort.met) {
            Some(abort) => {
                abort.met = true;
                true
            }
            None => false,
        }
    }

    /// Have a command aborted that was not fetched yet. `false` if there is none.
    pub fn abort_unfetched(&mut self, cid: u16, token: u64) -> bool {
        let there = self.state != State::Stopped
            && self.aborts.len() < MAX_ABORTS_WAITING
            && self.aborts.iter().all(|abort| abort.cid != cid)
            && self.holds_unfetched(cid);
        if there {
            let met = false;
            self.aborts.push(Abort { cid, token, met });
        }
        there
    }

    /// The next Abort that has come to its end, with what became of it: its command was completed, or will never be fetched.
    pub fn ended_abort(&mut self) -> Option<(u64, bool)> {
        let never = self.state == State::Stopped || self.ring.is_none();
        let at = self.aborts.iter().position(|abort| abort.met || never)?;
        let abort = self.aborts.swap_remove(at);
        Some((abort.token, abort.met))
    }

    /// Whether a command that was not fetched yet has this identifier.
    fn holds_unfetched(&self, cid: u16) -> bool {
        let Some(ring) = &self.ring else { return false };
        // What the guest has queued by now counts, not what we saw last.
        let tail = self.size.index(self.bell.load()).unwrap_or(self.tail);
        let mut at = self.head;
        for _ in 0..self.size.distance(self.head, tail) {
            if (ring.read(u32::from(at))[0] >> 16) as u16 == cid {
                return true;
            }
            at = self.size.next(at);
        }
        false
    }
}
