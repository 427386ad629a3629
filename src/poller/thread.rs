//! The thread of a poller: mail, passes, and when to sleep.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme_spec::Status;

use super::engine::{Engine, Left};
use super::idle::{self, Sleeper, Word as _};
use super::mailbox::Mailbox;
use super::message::{Attachment, ControllerKey, DoorbellMode, Message, PollerEvent, Reply};
use super::patience::Patience;
use super::quiet::Quiet;
use super::run::Core;
use super::served::Served;
use super::sleep::Bed;
use super::stats::PollerStats;
use super::{IdlePolicy, PollerConfig};
use crate::backend::Channel as _;
use crate::memory::SharedWord;

/// How often reports are allowed again and the load is judged.
const TICK: Duration = Duration::from_millis(10);

/// Batches in a tick that make mapped doorbells worth a switch: each spares the guest an exit.
const BUSY_BATCHES: u32 = 64;

/// How long a poller naps that has to look at mapped doorbells while it waits for them to be trapped.
const NAP: Duration = Duration::from_millis(1);

/// And how long once there has been nothing for [`LONG`]: the first command after such a pause waits for it.
const LONG_NAP: Duration = Duration::from_millis(10);
const LONG: Duration = Duration::from_secs(2);

/// How long it looks on, at least, while doorbells are mapped because another poller wants them so: until it naps, a ring is
/// seen at once.
const MAPPED_QUIET: Duration = Duration::from_millis(10);

/// How long it looks on, at least, while doorbells are mapped: they are because the guest was busy, and to have them trapped and mapped again for a
/// guest that only lost its core for a moment costs two switches and [`TICK`] of exits in between.
const MAPPED_LOOK: Duration = Duration::from_millis(2);

pub(super) struct Thread {
    index: usize,
    config: PollerConfig,
    mailbox: Mailbox,
    bed: Bed,
    stats: Arc<PollerStats>,
    engine: Engine,
    quiet: Quiet,
    patience: Patience,
    /// How long the next sleep may be.
    limit: Option<Duration>,
    last_tick: Instant,
}

impl Thread {
    pub fn new(
        index: usize,
        config: PollerConfig,
        mailbox: Mailbox,
        stats: Arc<PollerStats>,
    ) -> io::Result<Self> {
        let mut bed = Bed::new()?;
        bed.add_edge(mailbox.wake())?;
        let now = Instant::now();
        Ok(Self {
            index,
            engine: Engine::new(config.slots),
            patience: Patience::new(config.poll_for),
            config,
            mailbox,
            bed,
            stats,
            quiet: Quiet::new(now),
            limit: None,
            last_tick: now,
        })
    }

    /// Run until told to stop.
    pub fn run(mut self) {
        let mut slept = false;
        loop {
            if self.mailbox.has_mail() {
                slept = false;
                if self.read_mail() {
                    return;
                }
            }
            self.stats.passes.add(1);
            let busy = self.pass();
            if !busy {
                self.stats.empty.add(1);
                self.stats.races_lost.add(u64::from(slept));
            }
            let woken = std::mem::take(&mut slept) && busy;
            let enough = self.quiet.passed(busy) && self.look_at_clock(woken);
            if !busy && (enough || self.config.idle == IdlePolicy::Interrupt) {
                slept = idle::doze(&mut self);
                match slept {
                    true => self.quiet.slept(),
                    false => self.stats.races_won.add(1),
                }
                // Whatever was rung may have been quiet for long.
                self.engine.woken();
            }
        }
    }

    /// Look at everything once; whether there was anything.
    #[inline]
    pub fn pass(&mut self) -> bool {
        let (bed, mut gone) = (&mut self.bed, false);
        let busy = self.engine.pass(|left| match left {
            Left::Controller(served) => {
                for channel in &served.channels {
                    if let Some(fd) = channel.wake_fd() {
                        bed.remove(fd);
                    }
                }
                gone = true;
            }
            Left::Queues(served, token, queues) => {
                queues.kicks().iter().for_each(|kick| bed.remove(kick));
                let sink = &served.at.sink;
                sink.released(served.poller, token, Box::new(queues));
            }
        });
        if gone {
            self.engine.share_out();
        }
        busy
    }

    /// Look at the clock, after some passes; whether nothing happened for so long that the policy has us sleep. `woken`: there is
    /// work, for the first time after a sleep.
    fn look_at_clock(&mut self, woken: bool) -> bool {
        let now = Instant::now();
        let before = self.quiet.since();
        let quiet = self.quiet.look(now);
        if woken {
            self.patience.woken(now.duration_since(before));
        }
        self.tick(now);
        match self.config.idle {
            IdlePolicy::Poll => !self.engine.served.iter().flatten().any(Served::has_queues),
            IdlePolicy::Adaptive => {
                let mapped = self.engine.served.iter().flatten();
                let mapped = mapped.filter(|served| served.is_mapped());
                let least = mapped.map(|served| match served.wanted {
                    // Others want them so.
                    Some(DoorbellMode::Trapped) => MAPPED_QUIET,
                    _ => MAPPED_LOOK,
                });
                quiet >= least.max().unwrap_or_default().max(self.patience.now())
            }
            IdlePolicy::Interrupt => true,
        }
    }

    /// Judge the load, now and then.
    fn tick(&mut self, now: Instant) {
        if now.duration_since(self.last_tick) < TICK {
            return;
        }
        self.last_tick = now;
        let mut kept = false;
        for served in self.engine.served.iter_mut().flatten() {
            let want = match self.config.idle {
                IdlePolicy::Poll => served.has_unshadowed(),
                IdlePolicy::Adaptive => served.unshadowed_batches >= BUSY_BATCHES,
                IdlePolicy::Interrupt => false,
            };
            // Trapped doorbells that cost exits, or a wish for them that is out of date.
            let open = match served.at.doorbells {
                DoorbellMode::Trapped => served.wanted != Some(DoorbellMode::Mapped),
                DoorbellMode::Mapped => served.wanted == Some(DoorbellMode::Trapped),
            };
            if want && open {
                served.wanted = Some(DoorbellMode::Mapped);
                served.event(PollerEvent::Wants(DoorbellMode::Mapped));
            }
            served.tick();
            served.tend();
            kept |= served.lose_patience();
        }
        if kept {
            self.engine.changed();
        }
    }

    /// Read all mail. `true` if the thread is to end.
    pub fn read_mail(&mut self) -> bool {
        while let Some(message) = self.mailbox.next() {
            if matches!(message, Message::Stop) {
                return true;
            }
            self.handle(message);
        }
        self.engine.changed();
        false
    }

    /// Write no journal from now on, for those who want to know what it costs.
    #[cfg(any(test, feature = "testing"))]
    pub fn without_journal(&mut self) {
        for served in self.engine.served.iter_mut().flatten() {
            served.journal = None;
        }
    }

    /// What a stage of a command is run on when it is run alone: the first controller.
    #[cfg(any(test, feature = "testing"))]
    pub fn first(&mut self) -> Option<(&mut Served, &mut Core)> {
        let served = self.engine.served.iter_mut().flatten().next()?;
        Some((served, &mut self.engine.core))
    }

    fn find(&mut self, key: ControllerKey) -> Option<(&mut Served, &mut Core, &mut Bed)> {
        let (served, core) = self.engine.find(key)?;
        Some((served, core, &mut self.bed))
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Stop => {}
            Message::Ping(answer) => drop(answer),
            #[cfg(test)]
            Message::Stuck(until) => drop(until.recv()),
            Message::Attach { token, attachment } => self.attach(token, *attachment),
            Message::CreateCq { token, key, cq } => {
                if let Some((served, _, bed)) = self.find(key) {
                    let kick = cq.kick.clone();
                    let result = served.create_cq(cq).map(|()| true);
                    if result.is_ok() {
                        add_kick(bed, kick.as_deref());
                    }
                    served.reply(token, result);
                }
            }
            Message::CreateSq { token, key, sq } => {
                if let Some((served, _, bed)) = self.find(key) {
                    let kick = sq.kick.clone();
                    let result = served.create_sq(sq).map(|()| true);
                    if result.is_ok() {
                        add_kick(bed, kick.as_deref());
                    }
                    served.reply(token, result);
                }
            }
            Message::DeleteSq { token, key, qid } => {
                if let Some((served, core, bed)) = self.find(key) {
                    remove_kick(bed, served.sq(qid).and_then(|sq| sq.kick.take()).as_deref());
                    served.delete_sq(core, token, qid);
                }
            }
            Message::DeleteCq { token, key, qid } => {
                if let Some((served, _, bed)) = self.find(key) {
                    let result = served.delete_cq(qid).map(|kick| {
                        remove_kick(bed, kick.as_deref());
                        true
                    });
                    served.reply(token, result);
                }
            }
            Message::Abort {
                token,
                key,
                sqid,
                cid,
            } => {
                if let Some((served, core, _)) = self.find(key) {
                    served.abort(core, token, sqid, cid);
                }
            }
            Message::Release { token, key, cqid } => {
                if let Some((served, ..)) = self.find(key) {
                    served.release(token, cqid);
                }
            }
            Message::Keep { key, cqid } => {
                if let Some((served, ..)) = self.find(key) {
                    served.keep(cqid);
                }
            }
            Message::Adopt {
                token,
                key,
                number,
                queues,
            } => {
                if let Some((served, _, bed)) = self.find(key) {
                    let kicks = queues.kicks();
                    kicks.iter().for_each(|kick| add_kick(bed, Some(kick)));
                    let result = served.adopt(number, *queues);
                    if result.is_err() {
                        kicks.iter().for_each(|kick| bed.remove(kick));
                    }
                    served.reply(token, result.map(|()| true));
                }
            }
            Message::Hello { token, key } => {
                if let Some((served, ..)) = self.find(key) {
                    served.reply(token, Ok(true));
                }
            }
            Message::SetMemory { token, key, map } => {
                if let Some((served, ..)) = self.find(key) {
                    served.begin_memory(token, map);
                }
            }
            Message::SetShadow { token, key, shadow } => {
                if let Some((served, ..)) = self.find(key) {
                    let result = served.set_shadow(shadow).map(|()| true);
                    served.reply(token, result);
                }
            }
            Message::SetKick { key, qid, kick } => {
                if let Some((served, _, bed)) = self.find(key) {
                    let sq = served.sq(qid).map(|sq| &mut sq.kick);
                    change_kick(bed, sq, kick.clone());
                    change_kick(bed, served.cq(qid).map(|cq| &mut cq.kick), kick);
                }
            }
            Message::SetDoorbells { key, mode } => {
                if let Some((served, ..)) = self.find(key) {
                    served.at.doorbells = mode;
                    served.wanted = None;
                }
            }
            Message::WatchAdmin { key, on } => {
                if let Some((served, ..)) = self.find(key) {
                    served.watch_admin(on);
                }
            }
            Message::Reset { token, key } => {
                if let Some((served, core)) = self.wait_for_no_kick(key) {
                    served.begin_reset(core, token, false);
                }
            }
            Message::Suspend { token, key } => {
                if let Some((served, _)) = self.wait_for_no_kick(key) {
                    served.begin_suspend(token);
                }
            }
            Message::Detach { token, key } => {
                if let Some((served, core)) = self.wait_for_no_kick(key) {
                    served.journal = None;
                    served.begin_reset(core, token, true);
                }
            }
        }
    }

    fn attach(&mut self, token: u64, at: Attachment) {
        let sink = Arc::clone(&at.sink);
        let key = at.key;
        let index = self.index;
        let reply = |result| sink.reply(index, Reply { token, result });
        let known = self.engine.served.iter().flatten().any(|s| s.at.key == key);
        if known || self.engine.served.len() > usize::from(u16::MAX) {
            return reply(Err(Status::INTERNAL_ERROR));
        }
        let place = match self.engine.served.iter().position(Option::is_none) {
            Some(place) => place,
            None => {
                self.engine.served.push(None);
                self.engine.served.len() - 1
            }
        };
        match Served::new(at, place as u32, self.index, self.config.slots) {
            Ok(served) => {
                for channel in &served.channels {
                    let added = match channel.wake_fd() {
                        None => Ok(()),
                        Some(fd) if channel.wakes_by_edges() => self.bed.add_edge(fd),
                        Some(fd) => self.bed.add_level(fd),
                    };
                    if let Err(error) = added {
                        tracing::error!(poller = self.index, %error, "cannot wait for a backend");
                        return reply(Err(Status::INTERNAL_ERROR));
                    }
                }
                if let Some(place) = self.engine.served.get_mut(place) {
                    *place = Some(served);
                }
                self.engine.share_out();
                reply(Ok(true));
            }
            Err(error) => {
                tracing::error!(poller = self.index, %error, "cannot open a namespace");
                reply(Err(Status::INTERNAL_ERROR));
            }
        }
    }

    /// Nobody is to wake us for this controller any more.
    fn wait_for_no_kick(&mut self, key: ControllerKey) -> Option<(&mut Served, &mut Core)> {
        let (served, core, bed) = self.find(key)?;
        let sqs = served.sqs.iter_mut().flatten().map(|sq| &mut sq.kick);
        let cqs = served.cqs.iter_mut().flatten().map(|cq| &mut cq.kick);
        for kick in sqs.chain(cqs) {
            remove_kick(bed, kick.take().as_deref());
        }
        Some((served, core))
    }
}

impl Sleeper for Thread {
    fn arm(&mut self) {
        let mut until = None;
        let nap = match self.quiet.since().elapsed() {
            quiet if quiet < LONG => NAP,
            _ => LONG_NAP,
        };
        self.limit = None;
        for served in self.engine.served.iter_mut().flatten() {
            // Also one whose last queue has gone: its old wish would keep doorbells mapped for ever.
            if served.at.doorbells == DoorbellMode::Mapped
                && served.wanted != Some(DoorbellMode::Trapped)
            {
                served.wanted = Some(DoorbellMode::Trapped);
                served.event(PollerEvent::Wants(DoorbellMode::Trapped));
            }
            if served.is_mapped() {
                self.limit = Some(nap);
            } else if served.is_releasing() {
                // Not longer than we have patience for what is out.
                self.limit = self.limit.or(Some(TICK));
            }
            // Nobody will look whether the guest is consuming anyway.
            until = until.into_iter().chain(served.signal(Duration::ZERO)).min();
            served.arm();
        }
        if let Some(until) = until {
            let left = until.saturating_duration_since(Instant::now());
            self.limit = Some(self.limit.map_or(left, |limit| limit.min(left)));
        }
    }

    fn full_fence(&self) {
        SharedWord::full_fence();
    }

    fn has_work(&self) -> bool {
        self.mailbox.has_mail() || self.engine.served.iter().flatten().any(Served::has_work)
    }

    fn block(&mut self) {
        self.stats.sleeps.add(1);
        self.bed.sleep(self.limit);
    }
}

fn add_kick(bed: &mut Bed, kick: Option<&File>) {
    if let Some(kick) = kick
        && let Err(error) = bed.add_edge(kick)
    {
        tracing::warn!(%error, "a kick that cannot be waited for: is it an eventfd?");
    }
}

fn change_kick(bed: &mut Bed, place: Option<&mut Option<Arc<File>>>, kick: Option<Arc<File>>) {
    if let Some(place) = place {
        add_kick(bed, kick.as_deref());
        remove_kick(bed, std::mem::replace(place, kick).as_deref());
    }
}

fn remove_kick(bed: &mut Bed, kick: Option<&File>) {
    if let Some(kick) = kick {
        bed.remove(kick);
    }
}
