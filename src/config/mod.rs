//! One resolved configuration, from the command line or from a TOML file.
//!
//! [`raw`] is what can be written; [`resolve`](fn@resolve::resolve) checks it and fills in what was left out. Nothing is opened or
//! created here.

pub mod file;
pub mod quick;
pub mod raw;
mod resolve;
pub mod size;
mod ssds;

use std::path::PathBuf;
use std::time::Duration;

pub use raw::{DangerZone, Fault, FaultAction, Huge, IoPoll, LogFormat, OnReset, Operation};
pub use resolve::resolve;

use crate::controller::Placement;
use crate::driver::pci::PciAddress;
use crate::poller::PollerConfig;
use crate::transport::Transport;

/// What is wrong with a configuration, in one line, with where it stands and how to mend it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

/// Everything the daemon is to do.
#[derive(Debug)]
pub struct Config {
    /// How to log.
    pub log: Log,
    /// Where what survives this process is kept.
    pub state_dir: StateDir,
    /// The pollers, at least one.
    pub pollers: Vec<PollerConfig>,
    /// The SSDs that namespaces are on, each once.
    pub ssds: Vec<SsdSpec>,
    /// The controllers, at least one.
    pub controllers: Vec<ControllerSpec>,
}

/// Where what survives the process is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum StateDir {
    /// Where this host keeps such things: `$RUNTIME_DIRECTORY`, a directory in `/run` for root, else one in `$XDG_RUNTIME_DIR`.
    #[default]
    Default,
    /// In this directory.
    At(PathBuf),
    /// Nowhere.
    None,
}

/// An SSD to be driven.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SsdSpec {
    /// Where it is.
    pub address: PciAddress,
    /// A command that takes longer is aborted.
    pub command_timeout: Duration,
    /// If that does not help within this time, the controller is reset.
    pub abort_grace: Duration,
    /// What becomes of commands that were out at a reset.
    pub on_reset: OnReset,
    /// With more resets than this within a minute it is given up.
    pub resets_per_minute: u32,
}

/// How to log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// A level or a filter of `tracing`.
    pub level: String,
    /// How lines look.
    pub format: LogFormat,
}

/// Where front-ends of a controller come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Socket {
    /// A socket file of ours.
    Path {
        /// Where.
        path: PathBuf,
        /// Its permissions.
        mode: Option<u32>,
        /// Its group.
        group: Option<u32>,
    },
    /// An inherited file descriptor.
    Fd(i32),
}

/// A controller to be made.
#[derive(Clone, Debug)]
pub struct ControllerSpec {
    /// Its name in messages.
    pub name: String,
    /// What is spoken on its socket.
    pub transport: Transport,
    /// Where front-ends come from.
    pub socket: Socket,
    /// Serial number.
    pub serial: String,
    /// Model number.
    pub model: String,
    /// NVM subsystem qualified name.
    pub subnqn: String,
    /// Queue pairs and vectors, admin included.
    pub queues: u16,
    /// Entries of an I/O queue.
    pub queue_entries: u32,
    /// Largest transfer in bytes; `None` = as much as every namespace takes as one command.
    pub max_transfer: Option<u32>,
    /// NN.
    pub max_namespaces: u32,
    /// Offer Doorbell Buffer Config.
    pub doorbell_buffer: bool,
    /// Offer SGLs.
    pub sgls: bool,
    /// CAP.DSTRD.
    pub doorbell_stride: u8,
    /// PCI vendor, device, subsystem vendor and subsystem ids.
    pub pci_ids: [u16; 4],
    /// Which pollers serve its queues.
    pub placement: Placement,
    /// Its namespaces, by ascending NSID.
    pub namespaces: Vec<NamespaceSpec>,
}

/// A namespace to be made.
#[derive(Clone, Debug)]
pub struct NamespaceSpec {
    /// NSID.
    pub nsid: u32,
    /// Where its data is.
    pub store: StoreSpec,
    /// log2 of the block size: 9 or 12. Where the store has one of its own, this means nothing.
    pub block_shift: u32,
    /// Refuse writes.
    pub read_only: bool,
    /// What its names are derived from.
    pub identity: String,
    /// UUID, if given.
    pub uuid: Option<[u8; 16]>,
    /// NGUID, if given.
    pub nguid: Option<[u8; 16]>,
    /// EUI64, if given.
    pub eui64: Option<[u8; 8]>,
    /// Faults and delays.
    pub danger_zone: Option<DangerZone>,
}

/// Where the data of a namespace is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreSpec {
    /// Nowhere.
    Null {
        /// Size in bytes.
        bytes: u64,
    },
    /// In memory.
    Memory {
        /// Size in bytes.
        bytes: u64,
        /// Which pages.
        huge_pages: Huge,
    },
    /// In a file or on a block device.
    File {
        /// Which.
        path: PathBuf,
        /// Go around the page cache if that is possible.
        direct: bool,
        /// Poll the device for completions.
        iopoll: IoPoll,
    },
    /// On an NVMe SSD, by its commands.
    NvmePassthrough {
        /// Its generic device, `/dev/ngXnY`.
        path: PathBuf,
    },
    /// On an SSD this process drives.
    Nvme {
        /// Where it is.
        address: PciAddress,
        /// NSID there.
        nsid: u32,
        /// Where in that namespace it begins, in bytes.
        offset: u64,
        /// How large it is, in bytes; `None` = to the end.
        bytes: Option<u64>,
    },
}

/// How long an adaptive poller looks before it sleeps, if nothing is configured.
pub const DEFAULT_POLL: Duration = Duration::from_micros(50);
