//! The control plane of one emulated NVMe controller: registers, admin commands, features, logs, events, lifecycle.
//!
//! It knows no transport and no thread of a poller: a transport calls the methods of [`Controller`], pollers answer through
//! their [`ControlSink`](crate::poller::ControlSink).

mod actor;
mod admin;
mod commit;
mod dma;
mod doorbells;
mod error_log;
mod flush;
mod health;
mod identity;
mod image;
mod inbox;
mod info;
mod lifecycle;
mod moving;
mod pending;
mod pin;
mod placement;
mod queues;
mod recover;
mod registers;
mod resume;
#[cfg(test)]
mod tests;
mod throttle;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use nvme_spec::doorbell::DoorbellStride;
use nvme_spec::log::CriticalWarning;

use crate::backend::Backend;
use crate::io::Namespace;
use crate::memory::{DoorbellWindow, GuestMap};
use crate::poller::sleep::Bed;
use crate::poller::{ControllerKey, DoorbellMode, PollerPool, Vector};
use crate::state::Keep;
use actor::{Actor, Parts, Port, Shared};
use dma::Dma;
pub use dma::MemoryError;
use inbox::{Inbox, Mail};
use info::Info;
pub use moving::{MoveError, Placed};
pub use placement::{Placement, Policy};
use registers::Registers;

/// A namespace, as configured.
pub struct NamespaceConfig {
    /// NSID, 1 to [`ControllerConfig::max_namespaces`].
    pub nsid: u32,
    /// Its store.
    pub backend: Arc<Backend>,
    /// Write-protected.
    pub read_only: bool,
    /// What its UUID, NGUID and EUI64 are derived from when they are not given: stable, unique on this host.
    pub identity: String,
    /// UUID, if given.
    pub uuid: Option<[u8; 16]>,
    /// NGUID, if given.
    pub nguid: Option<[u8; 16]>,
    /// EUI64, if given.
    pub eui64: Option<[u8; 8]>,
}

/// A controller, as configured. Checked by [`Controller::new`].
pub struct ControllerConfig {
    /// Its name in logs and messages.
    pub name: String,
    /// Serial number, 1 to 20 printable ASCII characters.
    pub serial: String,
    /// Model number, 1 to 40 printable ASCII characters.
    pub model: String,
    /// NVM subsystem qualified name, at most 223 bytes.
    pub subnqn: String,
    /// Its namespaces.
    pub namespaces: Vec<NamespaceConfig>,
    /// NN: fixed while the controller lives, at least the highest NSID.
    pub max_namespaces: u32,
    /// Queue pairs and vectors, admin included: 2 to 64.
    pub queues: u16,
    /// Entries of an I/O queue (CAP.MQES + 1): 2 to 65536.
    pub max_queue_entries: u32,
    /// Largest transfer in bytes: 4096 times a power of two, at most 1 MiB.
    pub max_transfer: u32,
    /// Offer Doorbell Buffer Config.
    pub doorbell_buffer: bool,
    /// Offer SGLs for I/O commands; where a namespace is on an SSD this process drives, they are not offered all the same.
    pub sgls: bool,
    /// CAP.DSTRD.
    pub doorbell_stride: u8,
    /// PCI vendor, device, subsystem vendor and subsystem ids.
    pub pci_ids: [u16; 4],
    /// Which pollers serve its queues.
    pub placement: Placement,
    /// Where its state and its doorbells are kept.
    pub keep: Arc<Keep>,
}

/// Why a controller could not be made.
#[derive(Debug, thiserror::Error)]
#[error("controller '{name}': {what}")]
pub struct ControllerError {
    /// The controller's name.
    pub name: String,
    /// What is wrong, and what would be right.
    pub what: String,
    /// The cause, where there is one.
    #[source]
    pub source: Option<std::io::Error>,
}

/// What a transport does for a controller.
pub trait FrontEnd: Send + Sync {
    /// Switch the way doorbells take. Must not block: the switch is done elsewhere, and [`Controller::doorbells_are`] is
    /// called when the front-end has acknowledged it.
    fn request_doorbells(&self, mode: DoorbellMode);
}

/// The next [`ControllerKey`] of this process.
static NEXT_KEY: AtomicU64 = AtomicU64::new(0);

/// One emulated controller. All methods may be called from any thread; none blocks for long unless it says so.
///
/// Dropping the last reference ends its thread; I/O that is out keeps alive what it needs until it is done.
pub struct Controller {
    shared: Arc<Shared>,
    dma: Dma,
    namespaces: Arc<[Namespace]>,
    thread: Option<JoinHandle<()>>,
}

/// How long a transport waits for I/O that is out, before it lets go of memory or answers a reset.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(5);

impl Controller {
    /// Make a controller and start its thread. It has no front-end and no memory yet. If there is state of a process before us, it
    /// serves nothing until the front-end that this belongs to says [`Self::go`], or another one uses it.
    ///
    /// # Errors
    ///
    /// [`ControllerError`] names the value that is wrong.
    pub fn new(
        config: ControllerConfig,
        pollers: &PollerPool,
    ) -> Result<Arc<Self>, ControllerError> {
        let info = Info::of(&config)?;
        let handles = pollers.handles();
        let fail = |what: &str, source| ControllerError {
            name: config.name.clone(),
            what: what.into(),
            source,
        };
        if handles.is_empty() {
            return Err(fail("there is no poller to serve its queues", None));
        }
        let pollers = &config.placement.pollers;
        if let Some(chosen) = pollers
            && (chosen.is_empty() || chosen.iter().any(|p| *p >= handles.len()))
        {
            let what = format!(
                "pollers are {chosen:?}; name some of 0 to {}",
                handles.len() - 1
            );
            return Err(fail(&what, None));
        }
        let shared = Shared::new(info, handles.len(), &config.keep)
            .map_err(|e| fail("its doorbells or its eventfd cannot be made", Some(e)))?;
        let (shared, outbox) = shared;
        let bed = Bed::new().map_err(|e| fail("it has nowhere to sleep", Some(e)))?;
        let mut namespaces: Vec<_> = config.namespaces.iter().collect();
        namespaces.sort_by_key(|ns| ns.nsid);
        let volatile = namespaces
            .iter()
            .filter(|ns| ns.backend.geometry().volatile_write_cache)
            .map(|ns| Arc::clone(&ns.backend))
            .collect();
        let namespaces = namespaces
            .into_iter()
            .map(|ns| Namespace::new(ns.nsid, Arc::clone(&ns.backend), ns.read_only))
            .collect::<Arc<[_]>>();
        let (dma, own) = (Dma::of(&namespaces), Arc::clone(&namespaces));
        let actor = Actor::new(Parts {
            shared: Arc::clone(&shared),
            outbox,
            key: ControllerKey(NEXT_KEY.fetch_add(1, Ordering::Relaxed)),
            ports: handles
                .iter()
                .map(|handle| Box::new(handle.clone()) as Box<dyn Port>)
                .collect(),
            placement: config.placement.clone(),
            namespaces,
            volatile,
            bed,
            keep: Arc::clone(&config.keep),
        });
        let thread = std::thread::Builder::new()
            .name("nvme-control".into())
            .spawn(move || actor.run())
            .map_err(|e| fail("its thread cannot be started", Some(e)))?;
        Ok(Arc::new(Self {
            shared,
            dma,
            namespaces: own,
            thread: Some(thread),
        }))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.shared.info.name
    }

    /// The doorbell window, for the transport to hand over.
    pub fn window(&self) -> &Arc<DoorbellWindow> {
        &self.shared.window
    }

    /// Vectors and queue pairs, admin included.
    pub fn queues(&self) -> u16 {
        self.shared.info.queues
    }

    /// Distance of doorbells in the window.
    pub fn stride(&self) -> DoorbellStride {
        self.shared.info.stride
    }

    /// PCI vendor, device, subsystem vendor and subsystem ids.
    pub fn pci_ids(&self) -> [u16; 4] {
        self.shared.info.pci_ids
    }

    /// A front-end has come. It starts from scratch: reset registers, no memory, no vectors, trapped doorbells. If state is kept, nothing is
    /// served or changed until [`Self::go`], or until a register is written without that.
    pub fn attach(&self, front: Arc<dyn FrontEnd>) {
        self.forget_vectors();
        self.shared.set_instance(None);
        self.shared.window.clear_side();
        self.shared.pin.set_used(false);
        self.shared.inbox.send(Mail::Attach(front));
    }

    /// The front-end has gone: reset, then forget memory, vectors and kicks. Waits, at most `limit`, until no I/O can touch its
    /// memory any more; `false` if that took longer (the memory then stays mapped until the I/O is done).
    pub fn detach(&self, limit: Duration) -> bool {
        self.forget_vectors();
        let done = self.wait(limit, Mail::Detach);
        self.dma.forget();
        dma::log_forwarded(self.name(), &self.namespaces);
        done
    }

    /// The front-end has gone, or another process is to go on: fetch no more, let what is out finish, then forget memory, vectors and kicks, and keep the
    /// state. What takes longer than `limit` is left in the journal. Waits, at most twice as long, until no I/O can touch the front-end's memory
    /// any more; `false` if that took longer. Of a front-end that presented no instance id nothing is kept: [`Self::detach`].
    pub fn suspend(&self, limit: Duration) -> bool {
        let mut done = self.wait(limit, Mail::Suspend);
        if !done {
            self.shared.inbox.send(Mail::Abandon);
            done = self.wait(limit, Mail::Suspend);
        }
        self.forget_vectors();
        self.dma.forget();
        dma::log_forwarded(self.name(), &self.namespaces);
        done
    }

    fn forget_vectors(&self) {
        for vector in &self.shared.vectors {
            vector.set(None);
        }
    }

    /// Send a message whose sender is dropped when it is done, and wait for that.
    fn wait(&self, limit: Duration, mail: impl FnOnce(Sender<()>) -> Mail) -> bool {
        let (sender, done) = crossbeam_channel::bounded(0);
        self.shared.inbox.send(mail(sender));
        done.recv_timeout(limit) == Err(RecvTimeoutError::Disconnected)
    }

    /// Read registers: any offset and length below 0x1000. What does not exist reads as zero.
    pub fn read(&self, offset: u32, out: &mut [u8]) {
        self.shared.registers.read(offset, out);
    }

    /// Write registers: 1, 2, 4 or 8 bytes. What hardware would ignore is ignored. Waits until the new value is in the state. Whoever writes before
    /// [`Self::go`] does not want what was kept.
    pub fn write(&self, offset: u32, bytes: &[u8]) {
        if self.shared.suspended.load(Ordering::Acquire) {
            self.wait(DRAIN_LIMIT, Mail::Fresh);
        }
        if self.shared.registers.write(offset, bytes) {
            self.wait(DRAIN_LIMIT, Mail::Sync);
        }
    }

    /// Reset from outside (function level reset, system reset). Waits as [`Self::detach`] does.
    pub fn reset(&self, limit: Duration) -> bool {
        self.wait(limit, Mail::Reset)
    }

    /// The guest's memory has changed. SSDs are shown what is new, then it is used. Waits, at most `limit`, until nothing uses memory that is
    /// not in `map`.
    ///
    /// # Errors
    ///
    /// [`MemoryError`]: it takes longer, and may have to be tried again; or an SSD cannot be shown the memory.
    pub fn set_memory(&self, map: Arc<GuestMap>, limit: Duration) -> Result<(), MemoryError> {
        self.dma.change(map, limit, |map, limit| {
            self.wait(limit, |done| Mail::Memory(map, done))
        })
    }

    /// The eventfd that carries interrupt vector `index`.
    pub fn set_call(&self, index: usize, eventfd: Option<File>) {
        if let Some(vector) = self.shared.vectors.get(index) {
            vector.set(eventfd);
        }
    }

    /// The guest has the interrupt pin and nothing else, or not any more. Where it has, Doorbell Buffer Config is not offered: a VMM lowers the pin
    /// when the guest writes a register.
    pub fn use_pin(&self, used: bool) {
        self.shared.pin.set_used(used);
    }

    /// Whether the interrupt pin is to be raised: there are completions in `map` that the guest has not taken.
    pub fn is_pin_due(&self, map: &GuestMap) -> bool {
        let shared = &self.shared;
        shared.pin.is_due(map, &shared.window, shared.info.stride)
    }

    /// The eventfd that the front-end signals when it trapped a doorbell of queue `index`.
    pub fn set_kick(&self, index: usize, eventfd: Option<File>) {
        self.shared.inbox.send(Mail::Kick(index, eventfd));
    }

    /// The front-end has acknowledged a switch.
    pub fn doorbells_are(&self, mode: DoorbellMode) {
        self.shared.inbox.send(Mail::Doorbells(mode));
    }

    /// Move a completion queue, with its submission queues, to another poller while the guest uses it. Waits, at most `limit`, until it
    /// is there.
    ///
    /// # Errors
    ///
    /// [`MoveError`] says why it stays; after [`MoveError::NoAnswer`] it may yet move.
    pub fn move_queue(&self, cqid: u16, poller: usize, limit: Duration) -> Result<(), MoveError> {
        let (sender, done) = crossbeam_channel::bounded(1);
        self.shared.inbox.send(Mail::Move(cqid, poller, sender));
        done.recv_timeout(limit).unwrap_or(Err(MoveError::NoAnswer))
    }

    /// On which poller each completion queue is; `None` if the controller does not answer within `limit`.
    pub fn placement(&self, limit: Duration) -> Option<Vec<Placed>> {
        let (sender, placed) = crossbeam_channel::bounded(1);
        self.shared.inbox.send(Mail::Placement(sender));
        placed.recv_timeout(limit).ok()
    }

    /// What tells whether its thread does its work.
    pub fn pulse(&self) -> Pulse {
        Pulse(Arc::clone(&self.shared.inbox))
    }

    /// The instance id the front-end presents.
    pub fn set_instance(&self, id: [u8; 16]) {
        self.shared.set_instance(Some(id));
    }

    /// The instance id that the front-end presented last.
    pub fn instance(&self) -> Option<[u8; 16]> {
        self.shared.instance()
    }

    /// What is kept for the instance that the front-end presented: 0 = nothing, 1 = state that [`Self::go`] resumes, 2 = state that
    /// cannot be resumed.
    pub fn kept(&self) -> u32 {
        self.shared.keeping().code(self.shared.instance())
    }

    /// Whether a guest may still be running whose front-end is not connected and will be back: what is kept belongs to a process before us and nobody has
    /// asked for it yet, or the last front-end went without its guest having shut the controller down.
    pub fn is_awaited(&self) -> bool {
        self.shared.awaited.load(Ordering::Acquire)
    }

    /// The front-end has sent everything: its instance id, memory, vectors, kicks. Goes on from the state that is kept for it, if there is any;
    /// `used`: the guest has used this device, so that without such state only a reset helps, and the guest is told so (CSTS.CFS). Waits, at most
    /// `limit`, until that is done; `false` if it is not.
    pub fn go(&self, used: bool, limit: Duration) -> bool {
        self.wait(limit, |done| Mail::Go(used, done))
    }

    /// An SSD below has reported on its health: the guest is told, if it wants to know.
    pub fn health_changed(&self, warning: CriticalWarning) {
        self.shared.inbox.send(Mail::Health(warning));
    }

    /// The attributes of a namespace have changed: the guest is told, if it wants to know.
    pub fn namespace_changed(&self, nsid: u32) {
        self.shared.inbox.send(Mail::NamespaceChanged(nsid));
    }
}

/// Tells whether a controller's thread does its work; does not keep the controller.
#[derive(Clone)]
pub struct Pulse(Arc<Inbox>);

impl Pulse {
    /// Ask it. It answers by letting go of the other end, as it does when it ends.
    pub fn ask(&self) -> Receiver<()> {
        let (sender, answer) = crossbeam_channel::bounded(0);
        self.0.send(Mail::Ping(sender));
        answer
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.shared.inbox.send(Mail::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// What a controller shares with its actor, and the actor's side of the inbox.
    fn new(info: Info, pollers: usize, keep: &Keep) -> io::Result<(Arc<Self>, inbox::Outbox)> {
        let window = usize::try_from(info.window_len()).unwrap_or(usize::MAX);
        let window = keep.doorbells(window)?;
        let (inbox, outbox) = Inbox::new(pollers)?;
        let shared = Self {
            registers: Registers::new(info.max_queue_entries, info.stride.dstrd(), info.patience),
            vectors: (0..info.queues)
                .map(|vring| Arc::new(Vector::new(&window, vring)))
                .collect(),
            window,
            pin: pin::Pin::default(),
            inbox,
            info,
            instance: Mutex::default(),
            keeping: Mutex::default(),
            suspended: AtomicBool::new(false),
            awaited: AtomicBool::new(false),
        };
        Ok((Arc::new(shared), outbox))
    }
}
