//! One SSD, kept alive: brought up, watched, reset when it must be, given up when it cannot be helped, shut down at the end.
//!
//! A *keeper* thread owns the admin side of the controller. Pollers own a [`Lane`] each. When the controller has to be reset, the
//! keeper asks every lane for its queue pair, brings the controller up again and hands out new ones; the lanes submit again what was
//! out, or fail it, as configured. Nothing of this costs the way of a command more than one load a pass.

mod expect;
mod keeper;
mod lane;
mod link;
mod opening;
mod recover;
#[cfg(test)]
mod tests;
mod watch;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use nvme_spec::Status;
use nvme_spec::identify::{
    IdentifyController, IdentifyNamespace, NvmControllerIdentify, NvmNamespaceIdentify,
};
use nvme_spec::log::{CriticalWarning, ErrorLogEntry, SmartLog};
use nvme_spec::regs::{Cap, Vs};

use super::{AddressSpace, AnyDevice, DriverError};
pub use expect::{Expected, Watch};
use keeper::{Ask, Keeper};
pub use lane::Lane;
use link::{Shared, Wish, lock};
use opening::Opening;

/// How often one who waits for an answer looks whether the SSD is still there.
const GONE_LOOK: Duration = Duration::from_millis(50);

/// What becomes of commands that were out when the controller had to be reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnReset {
    /// They are submitted again. One that ran into its timeout twice fails.
    #[default]
    Resubmit,
    /// They fail with Command Interrupted, and may be retried (DNR is clear).
    Fail,
}

/// How an SSD is treated.
#[derive(Clone, Copy, Debug)]
pub struct SsdOptions {
    /// A command out for longer than this is aborted.
    pub command_timeout: Duration,
    /// If it is still out this much later, the controller is reset.
    pub abort_grace: Duration,
    /// How long an admin command may take.
    pub admin_timeout: Duration,
    /// Least time the controller is given to become ready, whatever CAP.TO says.
    pub least_ready_timeout: Duration,
    /// Most time it is given, whatever CAP.TO says.
    pub most_ready_timeout: Duration,
    /// What becomes of commands that were out at a reset.
    pub on_reset: OnReset,
    /// An SSD that needs more resets than this within a minute is given up.
    pub resets_per_minute: u32,
    /// Queue pairs to ask for: one for each poller that will want a lane.
    pub queue_pairs: u16,
    /// Upper bound of a transfer in bytes, whatever the controller allows.
    pub max_transfer: u32,
    /// Let it interrupt, so that pollers can sleep. Without, lanes must be polled, and the SSD is spared the interrupts.
    pub interrupts: bool,
}

impl Default for SsdOptions {
    fn default() -> Self {
        Self {
            command_timeout: Duration::from_secs(30),
            abort_grace: Duration::from_secs(5),
            admin_timeout: Duration::from_secs(10),
            least_ready_timeout: Duration::from_secs(5),
            most_ready_timeout: Duration::from_secs(128),
            on_reset: OnReset::Resubmit,
            resets_per_minute: 5,
            queue_pairs: 64,
            max_transfer: 1 << 20,
            interrupts: true,
        }
    }
}

/// What an SSD does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SsdState {
    /// It serves.
    Ready,
    /// It is being reset: commands wait.
    Resetting,
    /// It has been pulled, taken back or given up: commands fail.
    Gone,
}

/// What happened to an SSD.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SsdCounters {
    /// Commands that ran into their timeout.
    pub timeouts: u64,
    /// Abort commands sent.
    pub aborts: u64,
    /// Commands the controller aborted because of that.
    pub aborted: u64,
    /// Resets of the controller.
    pub resets: u64,
    /// Commands that were submitted again.
    pub resubmitted: u64,
    /// Commands that failed because of a reset, or because the SSD was gone.
    pub failed: u64,
    /// Completions no device may make: for a command that is not out, of another queue, with a head the queue does not have.
    pub bad_completions: u64,
    /// Asynchronous events.
    pub events: u64,
}

/// News of an SSD.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SsdEvent {
    /// These namespaces changed (NSID `0xFFFF_FFFF` alone: more than the log holds).
    NamespacesChanged(Vec<u32>),
    /// Its health changed.
    Health(CriticalWarning),
    /// It reports an error of its own.
    Error {
        /// The event's information.
        info: u8,
        /// The newest entries of its error log that were not told of before, newest first: at most four.
        entries: Vec<ErrorLogEntry>,
    },
    /// It is being reset.
    Resetting,
    /// It serves again.
    Ready,
    /// It will not come back.
    Gone,
}

/// Why there is no (other) lane.
#[derive(Debug, thiserror::Error)]
pub enum LaneError {
    /// All queue pairs are in use.
    #[error(
        "the SSD granted {granted} I/O queue pairs and all {used} are in use: use fewer pollers for its namespaces"
    )]
    NoQueues {
        /// Queue pairs the SSD granted.
        granted: u16,
        /// Queue pairs in use.
        used: u16,
    },
    /// It refused the queues, or memory ran out.
    #[error("the queues could not be made")]
    Driver(#[from] DriverError),
    /// It is gone.
    #[error("the SSD is gone")]
    Gone,
}

/// Why what was written may not be on stable media.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FlushError {
    /// No lane is there, or the one that was asked went.
    #[error("nobody has a queue pair to flush by")]
    NoLane,
    /// The SSD says so, or it had to be given up.
    #[error("{0}")]
    Failed(Status),
    /// There was no answer in time.
    #[error("no answer in time")]
    Late,
    /// The SSD is gone.
    #[error("the SSD is gone")]
    Gone,
}

/// A namespace of an SSD.
#[derive(Clone, Copy, Debug)]
pub struct SsdNamespace {
    /// NSID.
    pub nsid: u32,
    /// Identify Namespace.
    pub identify: IdentifyNamespace,
    /// What the NVM Command Set adds (CNS 05h); zeroes if the SSD does not know it.
    pub nvm: NvmNamespaceIdentify,
}

/// An SSD. Dropping the last reference shuts it down; lanes that are left fail their commands.
pub struct Ssd {
    shared: Arc<Shared>,
    asks: Sender<Ask>,
    keeper: Option<JoinHandle<()>>,
    space: Arc<dyn AddressSpace>,
    facts: Facts,
}

/// What does not change while it is served.
#[derive(Clone, Copy)]
struct Facts {
    identify: IdentifyController,
    nvm: NvmControllerIdentify,
    cap: Cap,
    version: Vs,
    max_transfer: u32,
    queue_pairs: u16,
}

impl Ssd {
    /// Bring an SSD up, from whatever state, and keep it.
    ///
    /// # Errors
    ///
    /// [`DriverError`] says at which step the bring-up ended.
    pub fn start(
        name: String,
        device: AnyDevice,
        space: Arc<dyn AddressSpace>,
        options: SsdOptions,
    ) -> Result<Arc<Self>, DriverError> {
        let shared = Shared::new(name, options)
            .map(Arc::new)
            .map_err(DriverError::device("making an eventfd"))?;
        let (asks, asked) = crossbeam_channel::unbounded();
        let (keeper, facts) = Keeper::start(device, Arc::clone(&shared), asked)?;
        let text = |field: &[u8]| String::from_utf8_lossy(field).trim().to_string();
        tracing::info!(
            ssd = shared.name,
            model = text(&facts.identify.mn),
            serial = text(&facts.identify.sn),
            firmware = text(&facts.identify.fr),
            queue_pairs = facts.queue_pairs,
            max_transfer = facts.max_transfer,
            "the SSD is up"
        );
        let thread = std::thread::Builder::new()
            .name("nvme-ssd".into())
            .spawn(move || keeper.run())
            .map_err(DriverError::device("starting a thread"))?;
        Ok(Arc::new(Self {
            shared,
            asks,
            keeper: Some(thread),
            space,
            facts,
        }))
    }

    /// Its name in logs.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// How it is treated.
    pub fn options(&self) -> &SsdOptions {
        &self.shared.options
    }

    /// Identify Controller, as read at the start.
    pub fn identify(&self) -> &IdentifyController {
        &self.facts.identify
    }

    /// What the NVM Command Set adds (CNS 06h): zeroes if the SSD does not know it.
    pub fn nvm(&self) -> &NvmControllerIdentify {
        &self.facts.nvm
    }

    /// Controller Capabilities.
    pub fn cap(&self) -> Cap {
        self.facts.cap
    }

    /// Version.
    pub fn version(&self) -> Vs {
        self.facts.version
    }

    /// Largest transfer in bytes: a multiple of 4096.
    pub fn max_transfer(&self) -> u32 {
        self.facts.max_transfer
    }

    /// I/O queue pairs it granted.
    pub fn queue_pairs(&self) -> u16 {
        self.facts.queue_pairs
    }

    /// How long a command may take that nobody wants any more, if the SSD does not listen: its time, the grace, and a reset.
    pub fn patience(&self) -> Duration {
        let options = &self.shared.options;
        let reset = Duration::from_millis(500) * u32::from(self.facts.cap.to());
        let reset = reset.clamp(
            options.least_ready_timeout,
            options.most_ready_timeout.max(options.least_ready_timeout),
        );
        options.command_timeout + options.abort_grace + reset
    }

    /// Where memory is shown to it.
    pub fn space(&self) -> &Arc<dyn AddressSpace> {
        &self.space
    }

    /// What it does now.
    pub fn state(&self) -> SsdState {
        self.shared.state()
    }

    /// What happened so far.
    pub fn counters(&self) -> SsdCounters {
        self.shared.counters()
    }

    /// News from now on. What nobody takes is dropped, the newest first.
    pub fn subscribe(&self) -> Receiver<SsdEvent> {
        self.shared.subscribe()
    }

    /// A queue pair for one poller, with at most `depth` commands out. Waits until it is there, or the SSD is being reset.
    ///
    /// # Errors
    ///
    /// [`LaneError`].
    pub fn lane(&self, depth: u32) -> Result<Lane, LaneError> {
        let (sender, answer) = crossbeam_channel::bounded(1);
        let mut lane = self.open(depth, None, Some(sender))?;
        self.await_answer(&answer).unwrap_or(Err(LaneError::Gone))?;
        lane.poll(0, |_| {});
        Ok(lane)
    }

    /// As [`Self::lane`], but wait for nothing: what is submitted waits until the queue pair is there, and fails with Internal Error if there will be none. It is
    /// for commands to one namespace only: once that is not what it must be, they fail with Namespace Not Ready, Do Not Retry set, until the end
    /// of the process, as what is on it now is something else.
    ///
    /// # Errors
    ///
    /// [`LaneError`]: all queue pairs are in use, the SSD is gone, or file descriptors ran out.
    pub fn lane_to(&self, watch: &Arc<Watch>, depth: u32) -> Result<Lane, LaneError> {
        self.open(depth, Some(Arc::clone(watch)), None)
    }

    fn open(
        &self,
        depth: u32,
        watch: Option<Arc<Watch>>,
        answer: Option<Sender<Result<(), LaneError>>>,
    ) -> Result<Lane, LaneError> {
        if self.state() == SsdState::Gone {
            return Err(LaneError::Gone);
        }
        let (opening, link, depth) = Opening::new(&self.shared, &self.facts, depth, watch, answer)?;
        let lane = Lane::new(lane::Parts {
            shared: Arc::clone(&self.shared),
            link,
            depth,
            max_transfer: self.facts.max_transfer,
            limits: keeper::limits(&self.shared),
        });
        let asked = self.asks.send(Ask::Lane(opening));
        asked.map_err(|_| LaneError::Gone)?;
        self.shared.wake();
        Ok(lane)
    }

    /// Have the keeper look whether a namespace is still what it must be: when the SSD reports that it changed, and after each reset.
    pub fn watch(&self, expected: Expected) -> Arc<Watch> {
        let watch = Arc::new(Watch::new(expected));
        lock(&self.shared.watches).push(Arc::downgrade(&watch));
        watch
    }

    /// All active namespaces, by ascending NSID.
    ///
    /// # Errors
    ///
    /// [`DriverError`].
    pub fn namespaces(&self) -> Result<Vec<u32>, DriverError> {
        self.ask(Ask::Namespaces).unwrap_or(Err(DriverError::Gone))
    }

    /// A namespace, read anew.
    ///
    /// # Errors
    ///
    /// [`DriverError`]; an NSID that is not there is refused with Invalid Namespace or Format.
    pub fn namespace(&self, nsid: u32) -> Result<SsdNamespace, DriverError> {
        self.ask(|answer| Ask::Namespace(nsid, answer))
            .unwrap_or(Err(DriverError::Gone))
    }

    /// The SMART / Health log.
    ///
    /// # Errors
    ///
    /// [`DriverError`].
    pub fn smart(&self) -> Result<SmartLog, DriverError> {
        self.ask(Ask::Smart).unwrap_or(Err(DriverError::Gone))
    }

    /// The SMART / Health log as it was read last: within a minute, or after the SSD reported that something had changed. The SSD is not
    /// asked. `None` if it never could be read.
    pub fn health(&self) -> Option<SmartLog> {
        *lock(&self.shared.health)
    }

    /// The Error Information log, newest first, at most 64 entries.
    ///
    /// # Errors
    ///
    /// [`DriverError`].
    pub fn error_log(&self) -> Result<Vec<ErrorLogEntry>, DriverError> {
        self.ask(Ask::ErrorLog).unwrap_or(Err(DriverError::Gone))
    }

    /// Flush a namespace by a queue pair that is in use, between the commands of whoever has it: where there is none to be had
    /// ([`LaneError::NoQueues`]). Waits at most `limit`.
    ///
    /// # Errors
    ///
    /// What the SSD says; [`FlushError`].
    pub fn flush(&self, nsid: u32, limit: Duration) -> Result<(), FlushError> {
        let until = Instant::now() + limit;
        let (answer, answered) = crossbeam_channel::bounded(1);
        let asked = self.asks.send(Ask::Flush(Wish { nsid, answer }));
        asked.map_err(|_| FlushError::Gone)?;
        self.shared.wake();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if self.state() == SsdState::Gone {
                return Err(FlushError::Gone);
            }
            match answered.recv_timeout(left.min(GONE_LOOK)) {
                Ok(status) if status.is_success() => return Ok(()),
                Ok(status) => return Err(FlushError::Failed(status)),
                Err(RecvTimeoutError::Disconnected) => return Err(FlushError::NoLane),
                Err(RecvTimeoutError::Timeout) if left.is_zero() => return Err(FlushError::Late),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Reset the controller now, whatever it does. Returns at once; [`Self::subscribe`] tells the end.
    pub fn reset(&self) {
        let _ = self.asks.send(Ask::Reset);
        self.shared.wake();
    }

    /// Ask the keeper; `None` if it has ended, or if the SSD is gone: letting go of that may take the kernel a minute.
    fn ask<T>(&self, make: impl FnOnce(Sender<T>) -> Ask) -> Option<T> {
        if self.state() == SsdState::Gone {
            return None;
        }
        let (sender, answer) = crossbeam_channel::bounded(1);
        self.asks.send(make(sender)).ok()?;
        self.shared.wake();
        self.await_answer(&answer)
    }

    fn await_answer<T>(&self, answer: &Receiver<T>) -> Option<T> {
        loop {
            match answer.recv_timeout(GONE_LOOK) {
                Ok(answer) => return Some(answer),
                Err(RecvTimeoutError::Timeout) if self.state() != SsdState::Gone => {}
                Err(_) => return answer.try_recv().ok(),
            }
        }
    }
}

impl Drop for Ssd {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake();
        // All I/O to one that is gone has failed. What its keeper still does is to close it, for which the kernel may take a minute.
        if let Some(keeper) = self.keeper.take()
            && self.state() != SsdState::Gone
        {
            let _ = keeper.join();
        }
    }
}
