//! The control plane of one emulated NVMe controller: registers, admin commands, features, logs, events, lifecycle.
//!
//! It knows no transport and no thread of a poller: a transport calls the methods of [`Controller`], pollers answer through
//! their [`ControlSink`](crate::poller::ControlSink).

mod actor;
mod admin;
mod doorbells;
mod error_log;
mod flush;
mod health;
mod identity;
mod inbox;
mod info;
mod lifecycle;
mod moving;
mod pending;
mod placement;
mod queues;
mod registers;
#[cfg(test)]
mod tests;
mod throttle;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, Sender};

use crate::backend::Backend;
use crate::io::Namespace;
use crate::memory::{DoorbellWindow, GuestMap};
use crate::poller::sleep::Bed;
use crate::poller::{ControllerKey, DoorbellMode, PollerPool, Vector};
use actor::{Actor, Parts, Port, Shared};
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
    /// CAP.DSTRD.
    pub doorbell_stride: u8,
    /// PCI vendor, device, subsystem vendor and subsystem ids.
    pub pci_ids: [u16; 4],
    /// Which pollers serve its queues.
    pub placement: Placement,
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
    instance: Mutex<Option<[u8; 16]>>,
    thread: Option<JoinHandle<()>>,
}

/// How long a transport waits for I/O that is out, before it lets go of memory or answers a reset.
pub const DRAIN_LIMIT: Duration = Duration::from_secs(5);

impl Controller {
    /// Make a controller and start its thread. It has no front-end and no memory yet.
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
        let shared = Shared::new(info, handles.len())
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
            .map(|ns| Namespace {
                nsid: ns.nsid,
                backend: Arc::clone(&ns.backend),
                geometry: ns.backend.geometry(),
                read_only: ns.read_only || ns.backend.geometry().read_only,
            })
            .collect();
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
        });
        let thread = std::thread::Builder::new()
            .name("nvme-control".into())
            .spawn(move || actor.run())
            .map_err(|e| fail("its thread cannot be started", Some(e)))?;
        Ok(Arc::new(Self {
            shared,
            instance: Mutex::new(None),
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

    /// PCI vendor, device, subsystem vendor and subsystem ids.
    pub fn pci_ids(&self) -> [u16; 4] {
        self.shared.info.pci_ids
    }

    /// A front-end has come. It starts from scratch: reset registers, no memory, no vectors, trapped doorbells.
    pub fn attach(&self, front: Arc<dyn FrontEnd>) {
        self.forget_vectors();
        self.shared.window.clear_side();
        self.shared.inbox.send(Mail::Attach(front));
    }

    /// The front-end has gone: reset, then forget memory, vectors and kicks. Waits, at most `limit`, until no I/O can touch its
    /// memory any more; `false` if that took longer (the memory then stays mapped until the I/O is done).
    pub fn detach(&self, limit: Duration) -> bool {
        self.forget_vectors();
        self.wait(limit, Mail::Detach)
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

    /// Write registers: 1, 2, 4 or 8 bytes. What hardware would ignore is ignored.
    pub fn write(&self, offset: u32, bytes: &[u8]) {
        if self.shared.registers.write(offset, bytes) {
            self.shared.inbox.wake();
        }
    }

    /// Reset from outside (function level reset, system reset). Waits as [`Self::detach`] does.
    pub fn reset(&self, limit: Duration) -> bool {
        self.wait(limit, Mail::Reset)
    }

    /// The guest's memory has changed. Waits, at most `limit`, until nothing uses memory that is not in `map`.
    pub fn set_memory(&self, map: Arc<GuestMap>, limit: Duration) -> bool {
        self.wait(limit, |done| Mail::Memory(map, done))
    }

    /// The eventfd that carries interrupt vector `index`.
    pub fn set_call(&self, index: usize, eventfd: Option<File>) {
        if let Some(vector) = self.shared.vectors.get(index) {
            vector.set(eventfd);
        }
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

    /// The instance id the front-end presents.
    pub fn set_instance(&self, id: [u8; 16]) {
        *self.instance.lock().unwrap_or_else(PoisonError::into_inner) = Some(id);
    }

    /// The instance id that the front-end presented last.
    pub fn instance(&self) -> Option<[u8; 16]> {
        *self.instance.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The attributes of a namespace have changed: the guest is told, if it wants to know.
    pub fn namespace_changed(&self, nsid: u32) {
        self.shared.inbox.send(Mail::NamespaceChanged(nsid));
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
    fn new(info: Info, pollers: usize) -> io::Result<(Arc<Self>, inbox::Outbox)> {
        let window = usize::try_from(info.window_len()).unwrap_or(usize::MAX);
        let window = DoorbellWindow::new(window)?;
        let (inbox, outbox) = Inbox::new(pollers)?;
        let shared = Self {
            registers: Registers::new(info.max_queue_entries, info.stride.dstrd()),
            vectors: (0..info.queues)
                .map(|vring| Arc::new(Vector::new(&window, vring)))
                .collect(),
            window,
            inbox,
            info,
        };
        Ok((Arc::new(shared), outbox))
    }
}
