//! The control plane of one emulated NVMe controller: registers, admin commands, features, logs, events, lifecycle.
//!
//! It knows no transport and no thread of a poller: a transport calls the methods of [`Controller`], pollers answer through
//! their [`ControlSink`](crate::poller::ControlSink).

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::Backend;
use crate::memory::{DoorbellWindow, GuestMap};
use crate::poller::{DoorbellMode, PollerPool};

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

/// One emulated controller. All methods may be called from any thread; none blocks for long unless it says so.
pub struct Controller {}

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
        let _ = (config, pollers);
        todo!()
    }

    /// Its name.
    pub fn name(&self) -> &str {
        todo!()
    }

    /// The doorbell window, for the transport to hand over.
    pub fn window(&self) -> &Arc<DoorbellWindow> {
        todo!()
    }

    /// Vectors and queue pairs, admin included.
    pub fn queues(&self) -> u16 {
        todo!()
    }

    /// PCI vendor, device, subsystem vendor and subsystem ids.
    pub fn pci_ids(&self) -> [u16; 4] {
        todo!()
    }

    /// A front-end has come. It starts from scratch: reset registers, no memory, no vectors, trapped doorbells.
    pub fn attach(&self, front: Arc<dyn FrontEnd>) {
        let _ = front;
        todo!()
    }

    /// The front-end has gone: reset, then forget memory, vectors and kicks. Waits, at most `limit`, until no I/O can touch its
    /// memory any more; `false` if that took longer (the memory then stays mapped until the I/O is done).
    pub fn detach(&self, limit: Duration) -> bool {
        let _ = limit;
        todo!()
    }

    /// Read registers: any offset and length below 0x1000. What does not exist reads as zero.
    pub fn read(&self, offset: u32, out: &mut [u8]) {
        let _ = (offset, out);
        todo!()
    }

    /// Write registers: 1, 2, 4 or 8 bytes. What hardware would ignore is ignored.
    pub fn write(&self, offset: u32, bytes: &[u8]) {
        let _ = (offset, bytes);
        todo!()
    }

    /// Reset from outside (function level reset, system reset). Waits as [`Self::detach`] does.
    pub fn reset(&self, limit: Duration) -> bool {
        let _ = limit;
        todo!()
    }

    /// The guest's memory has changed. Waits, at most `limit`, until nothing uses memory that is not in `map`.
    pub fn set_memory(&self, map: Arc<GuestMap>, limit: Duration) -> bool {
        let _ = (map, limit);
        todo!()
    }

    /// The eventfd that carries interrupt vector `index`.
    pub fn set_call(&self, index: usize, eventfd: Option<File>) {
        let _ = (index, eventfd);
        todo!()
    }

    /// The eventfd that the front-end signals when it trapped a doorbell of queue `index`.
    pub fn set_kick(&self, index: usize, eventfd: Option<File>) {
        let _ = (index, eventfd);
        todo!()
    }

    /// The front-end has acknowledged a switch.
    pub fn doorbells_are(&self, mode: DoorbellMode) {
        let _ = mode;
        todo!()
    }

    /// The instance id the front-end presents.
    pub fn set_instance(&self, id: [u8; 16]) {
        let _ = id;
        todo!()
    }
}
