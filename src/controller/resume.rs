//! Suspending a controller, and going on with what was left: by a front-end that went, by a process that died, or by one that makes room for
//! its successor. It is one road: whoever goes on starts from the state file, as if all else were lost.

use std::sync::Arc;

use crossbeam_channel::Sender;
use nvme_spec::Sqe;
use nvme_spec::doorbell::Doorbell;
use nvme_spec::regs::{Csts, Shst};

use super::actor::Actor;
use super::admin::events::Events;
use super::admin::features::Features;
use super::admin::queue::AdminQueue;
use super::image::{Image, Logs, PhaseImage};
use super::lifecycle::{Drain, Phase};
use super::pending::Work;
use super::queues::{Cq, Sq, State};
use super::recover::{Recovered, recover};
use crate::memory::{GuestMap, SharedWord};
use crate::poller::{
    Carried, Copied, CqConfig, Fetched, HandOver, Journal, Message, Posted, ShadowConfig, SqConfig,
};
use crate::state::StateFile;

/// What was left.
pub(super) enum Kept {
    /// State to go on from.
    State(Arc<StateFile>, Box<Image>),
    /// Of the instance with this id, if that is known; why nobody can go on from it.
    Unusable(Option<[u8; 16]>, String),
}

/// What a transport may know of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Keeping {
    /// Nothing was left, or it is in use.
    #[default]
    Nothing,
    /// State of this instance.
    State([u8; 16]),
    /// State that is of no use.
    Unusable(Option<[u8; 16]>),
}

impl Keeping {
    /// What the front-end with this id is told.
    pub(super) fn code(self, presented: Option<[u8; 16]>) -> u32 {
        match self {
            Self::State(id) if Some(id) == presented => 1,
            Self::Unusable(None) => 2,
            Self::Unusable(id) if id == presented => 2,
            _ => 0,
        }
    }
}

/// Queues that are found again, and where they go.
struct Resumed {
    poller: usize,
    number: u32,
    found: Recovered,
    carried: Vec<Carried>,
}

impl Actor {
    /// Look what a process before us has left. Without anything, a new generation begins.
    pub(super) fn look_for_state(&mut self) {
        let found = match self.keep.current() {
            Ok(None) => {
                // Whoever took it away, its guest may still be there.
                self.shared.set_awaited(self.keep.had_predecessor());
                None
            }
            Ok(Some(state)) => self.read_state(state),
            Err(error) => Some((Kept::Unusable(None, error.to_string()), Logs::default())),
        };
        let Some((kept, logs)) = found else {
            self.begin_generation();
            return;
        };
        let controller = self.shared.info.name.as_str();
        match &kept {
            Kept::State(..) => tracing::info!(controller, "found state to go on from"),
            Kept::Unusable(_, why) => {
                tracing::warn!(controller, "found state that is of no use: {why}");
            }
        }
        self.health.restore(logs.health);
        self.errors = super::error_log::ErrorLog::restore(&logs.errors);
        self.shared.set_awaited(true);
        self.keep_for_later(kept);
    }

    fn keep_for_later(&mut self, kept: Kept) {
        let keeping = match &kept {
            Kept::State(_, image) => match image.instance {
                Some(id) => Keeping::State(id),
                None => Keeping::Nothing,
            },
            Kept::Unusable(id, _) => Keeping::Unusable(*id),
        };
        self.kept = Some(kept);
        self.phase = Phase::Suspended;
        self.shared.set_keeping(keeping, true);
    }

    /// What a state file says; `None` if it is nobody's.
    fn read_state(&self, state: Arc<StateFile>) -> Option<(Kept, Logs)> {
        let bytes = state.image()?;
        Some(match Image::from_bytes(&bytes) {
            Err(why) => (Kept::Unusable(None, why), Logs::default()),
            Ok((image, logs)) => {
                let instance = image.instance?;
                let kept = match image.fingerprint.changes(&self.fingerprint) {
                    Err(why) => Kept::Unusable(Some(instance), why),
                    Ok(_) => Kept::State(state, Box::new(image)),
                };
                (kept, logs)
            }
        })
    }

    /// Serve nothing any more, let what is out finish, and forget all but the state. `done` is dropped when no I/O can touch guest memory.
    pub(super) fn suspend(&mut self, done: Sender<()>) {
        if self.shared.instance().is_none() && self.phase != Phase::Suspended {
            // Nobody could ask for it.
            return self.detach(done);
        }
        self.front = None;
        self.forget_kicks();
        self.switch.reset();
        if let Some(drain) = &mut self.drain {
            drain.then_suspend = !drain.is_suspend();
            drain.waiters.push(done);
            return;
        }
        if self.phase == Phase::Suspended {
            self.map = GuestMap::empty();
            self.done.push(done);
            return;
        }
        self.begin_suspend(vec![done]);
    }

    /// As [`Self::suspend`], when nothing is under way.
    pub(super) fn begin_suspend(&mut self, waiters: Vec<Sender<()>>) {
        // What was done in this turn is done.
        self.end_turn();
        self.pending.forget_admin();
        self.forget_move();
        self.admin = None;
        self.commands.clear();
        self.queues.clear();
        let kept = self.state.clone().and_then(|state| self.read_state(state));
        let kept = kept.map(|(kept, _)| kept);
        let none = || Kept::Unusable(self.shared.instance(), "it could not be written".into());
        let kept = kept.unwrap_or_else(none);
        let used = matches!(self.phase, Phase::Ready | Phase::Failed);
        if used && self.csts.shst() != Shst::COMPLETE {
            self.shared.set_awaited(true);
        }
        self.keep_for_later(kept);
        // The next front-end may have come, while a reset was under way.
        if self.front.is_none() {
            self.map = GuestMap::empty();
        }
        self.drain = Some(Drain::suspend(waiters));
        let pollers = self.attached_pollers();
        if pollers.is_empty() {
            self.finish_drain();
            return;
        }
        let token = self.pending.begin(pollers.clone(), Work::Drain);
        for poller in pollers {
            let key = self.key;
            self.tell(poller, Message::Suspend { token, key });
        }
    }

    /// What is out takes too long: it is left in the journal.
    pub(super) fn abandon(&mut self) {
        if self.drain.as_ref().is_some_and(Drain::is_suspend) {
            for poller in self.attached_pollers() {
                let token = self.pending.unanswered();
                let key = self.key;
                self.tell(poller, Message::Detach { token, key });
            }
        }
    }

    /// The front-end has sent everything.
    pub(super) fn go(&mut self, used: bool, done: Sender<()>) {
        if self.drain.as_ref().is_some_and(Drain::ends_suspended) {
            self.going = Some((used, done));
            return;
        }
        self.done.push(done);
        self.gone = true;
        self.shared.set_awaited(false);
        if self.phase != Phase::Suspended {
            if used && self.phase == Phase::Disabled && self.drain.is_none() {
                self.lose("nothing was kept of it");
            }
            return;
        }
        let instance = self.shared.instance();
        let lost = match self.kept.take() {
            Some(Kept::State(state, image)) if used && image.instance == instance => {
                match self.resume(&state, *image) {
                    Ok(()) => return,
                    Err(why) => Some(why),
                }
            }
            Some(Kept::Unusable(_, why)) => used.then_some(why),
            _ => used.then(|| "what was kept belongs to another".into()),
        };
        self.start_afresh(lost.as_deref());
    }

    /// The guest has used a controller of which nothing is left: only a reset helps.
    fn lose(&mut self, why: &str) {
        self.shared.registers.pretend_enabled();
        self.fail(&format!(
            "the guest's queues cannot be found again: {why}; it has to reset the controller"
        ));
    }

    /// Forget what was kept: the front-end is a new one, or its guest has `lost` its queues.
    pub(super) fn start_afresh(&mut self, lost: Option<&str>) {
        self.kept = None;
        self.shared.set_keeping(Keeping::Nothing, false);
        self.shared.set_awaited(false);
        self.phase = Phase::Disabled;
        self.shared.registers.reset();
        self.csts = Csts::new();
        self.admin = None;
        self.commands.clear();
        self.queues.clear();
        (self.shadow, self.shadow_used) = (None, None);
        self.features.reset(&self.shared.info);
        self.set_coalescing();
        self.events = Events::default();
        self.changed.clear();
        self.late.clear();
        self.health.power_on();
        // Whoever comes after us is to find what was kept with the doorbells it had, or a guest that has been told, or nothing.
        self.forget_state();
        self.clear_doorbells();
        if let Some(why) = lost {
            self.lose(why);
        }
        self.begin_generation();
    }

    /// Go on from a state file.
    fn resume(&mut self, state: &Arc<StateFile>, image: Image) -> Result<(), String> {
        let shared = Arc::clone(&self.shared);
        let mut changed = image.fingerprint.changes(&self.fingerprint)?;
        self.shared.set_keeping(Keeping::Nothing, false);
        shared.registers.restore(image.registers);
        self.features = Features::restore(&shared.info, &image.features);
        self.set_coalescing();
        self.events = Events::restore(&image.events);
        self.changed.clone_from(&image.changed);
        self.shutdowns = self.shutdowns.wrapping_add(1);
        self.number = 0;
        self.queues.clear();
        self.shadow = image.shadow.map(|(doorbells, event_idx)| ShadowConfig {
            doorbells,
            event_idx,
        });
        self.shadow_used = self.shadow;
        self.commands.clone_from(&image.commands);
        let shst = match image.shut_down {
            true => Shst::COMPLETE,
            false => Shst::NORMAL,
        };
        self.csts = Csts::new().with_shst(shst);
        let mut resumed = Vec::new();
        match image.phase {
            PhaseImage::Disabled => self.phase = Phase::Disabled,
            PhaseImage::Failed => {
                self.phase = Phase::Failed;
                self.csts = self.csts.with_cfs(true);
            }
            PhaseImage::Ready => {
                let admin = image.admin.as_ref().and_then(|admin| {
                    let (map, window) = (&self.map, &shared.window);
                    let stride = shared.info.stride;
                    AdminQueue::resume(map, window, stride, admin, image.commands.len())
                });
                self.admin = Some(admin.ok_or("the admin queues are not there")?);
                resumed = self.place(self.find(state, &image)?)?;
                self.phase = Phase::Ready;
                self.csts = self.csts.with_rdy(true);
            }
        }
        let slots = self.slots();
        let extra = (0..self.ports.len())
            .map(|poller| {
                let there = resumed.iter().filter(|r| r.poller == poller);
                there.map(|r| r.carried.len()).sum::<usize>()
            })
            .max();
        self.publish(slots + extra.unwrap_or(0), |state| {
            resumed.iter().for_each(|r| r.write_down(state));
        })
        .map_err(|e| format!("its state cannot be written: {e}"))?;
        self.log_resumed(&resumed);
        for one in resumed {
            self.hand_over(one);
        }
        for words in std::mem::take(&mut self.commands) {
            let sqe: Sqe = zerocopy::transmute!(words);
            self.execute(&sqe);
        }
        changed.append(&mut self.late);
        for nsid in changed {
            self.namespace_changed(nsid);
        }
        Ok(())
    }

    fn log_resumed(&self, resumed: &[Resumed]) {
        let carried: usize = resumed.iter().map(|r| r.carried.len()).sum();
        tracing::info!(
            controller = self.shared.info.name.as_str(),
            queues = resumed.len(),
            carried,
            admin = self.commands.len(),
            "resumed"
        );
    }

    /// Where the I/O queues were.
    fn find(&self, state: &Arc<StateFile>, image: &Image) -> Result<Vec<Recovered>, String> {
        let queues = self.shared.info.queues;
        let most = self.shared.info.max_queue_entries;
        let mut cqids: Vec<_> = image.cqs.iter().map(|q| (q.qid, q.entries)).collect();
        let mut sqids: Vec<_> = image.sqs.iter().map(|q| (q.qid, q.entries)).collect();
        for ids in [&mut cqids, &mut sqids] {
            let count = ids.len();
            ids.sort_unstable();
            ids.dedup_by_key(|(qid, _)| *qid);
            let sound = |(qid, entries): &(u16, u32)| (1..queues).contains(qid) && *entries <= most;
            if ids.len() != count || !ids.iter().all(sound) {
                return Err("its table of queues is impossible".into());
            }
        }
        let journals: Vec<_> = (0..state.shape().pollers)
            .map(|poller| Journal::new(Arc::clone(state), poller))
            .collect();
        let stride = self.shared.info.stride;
        let bell = |doorbell: Doorbell| match image.shadow {
            None => {
                let offset = usize::try_from(stride.window_offset(doorbell)).ok()?;
                Some(SharedWord::in_window(&self.shared.window, offset)?.load())
            }
            Some((page, _)) => {
                let gpa = page.checked_add(stride.shadow_offset(doorbell))?;
                Some(SharedWord::in_guest(&self.map, gpa)?.load())
            }
        };
        recover(&image.cqs, &image.sqs, &journals, &self.map, &bell).map_err(|e| e.to_string())
    }

    /// Choose pollers for queues, and note them in the table.
    fn place(&mut self, found: Vec<Recovered>) -> Result<Vec<Resumed>, String> {
        let slots = self.slots();
        let mut places = vec![slots; self.ports.len()];
        let mut resumed = Vec::with_capacity(found.len());
        for found in found {
            let poller = self.choose_poller(found.cq.base);
            let poller = poller.ok_or("no poller may serve its queues")?;
            let number = self.next_number().ok_or("it has too many queues")?;
            let state = State::Live;
            if let Some(slot) = self.queues.cq_slot(found.cq.qid) {
                let mut image = found.cq.clone();
                image.number = number;
                *slot = Some(Cq {
                    state,
                    poller,
                    image,
                });
            }
            for (sq, _) in &found.sqs {
                if let Some(slot) = self.queues.sq_slot(sq.qid) {
                    let mut image = sq.clone();
                    image.number = number;
                    *slot = Some(Sq {
                        state,
                        poller,
                        cqid: sq.cqid,
                        image,
                    });
                }
            }
            let mut carried = Vec::with_capacity(found.carried.len());
            for (sqid, sqe) in &found.carried {
                let next = places
                    .get_mut(poller)
                    .ok_or("no poller may serve its queues")?;
                let place = u32::try_from(*next).map_err(|_| "too many commands were out")?;
                *next += 1;
                carried.push(Carried {
                    sqid: *sqid,
                    sqe: *sqe,
                    place,
                });
            }
            resumed.push(Resumed {
                poller,
                number,
                found,
                carried,
            });
        }
        Ok(resumed)
    }

    /// Give queues to their poller.
    fn hand_over(&mut self, resumed: Resumed) {
        let Resumed {
            poller,
            number,
            found,
            carried,
        } = resumed;
        self.introduce(poller);
        let kick = |qid: u16| self.kicks.get(usize::from(qid)).cloned().flatten();
        let vector = |iv: u16| self.shared.vectors.get(usize::from(iv)).cloned();
        let sqs = found.sqs.iter().filter_map(|(sq, head)| {
            let config = SqConfig {
                qid: sq.qid,
                number,
                base: sq.base,
                size: sq.size()?,
                cqid: sq.cqid,
                kick: kick(sq.qid),
                stats: self.queues.sq_stats(sq.qid),
            };
            Some((config, *head))
        });
        let sqs = sqs.collect();
        let cq = found.cq;
        // The size was looked at when it was found.
        let Some(size) = cq.size() else { return };
        let config = CqConfig {
            qid: cq.qid,
            number,
            base: cq.base,
            size,
            vector: cq.vector.and_then(vector),
            kick: kick(cq.qid),
            stats: self.queues.cq_stats(cq.qid),
        };
        let queues = Box::new(HandOver::resumed(config, found.at, sqs, carried));
        let token = self.pending.begin(vec![poller], Work::Resume);
        let key = self.key;
        let message = Message::Adopt {
            token,
            key,
            number,
            queues,
        };
        self.tell(poller, message);
    }
}

impl Resumed {
    /// Write queues and commands into the journal of their new poller, in a generation that does not count yet.
    fn write_down(&self, state: &Arc<StateFile>) {
        let journal = Journal::new(Arc::clone(state), self.poller);
        let number = self.number;
        for (sq, head) in &self.found.sqs {
            let head = *head;
            journal.fetched(sq.qid, Fetched { number, head });
        }
        for carried in &self.carried {
            let at = self.found.sqs.iter().find(|(sq, _)| sq.qid == carried.sqid);
            let copied = Copied {
                sqid: carried.sqid,
                head: at.map_or(0, |(_, head)| *head),
                // In this order, and before all that is fetched now.
                sequence: carried.place.into(),
                sqe: carried.sqe,
            };
            journal.copy(carried.place, &copied);
        }
        let posted = Posted {
            number,
            tail: self.found.at.tail,
            phase: self.found.at.phase,
            last: (0, 0),
        };
        journal.record(self.found.cq.qid, posted);
    }
}
