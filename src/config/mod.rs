//! One resolved configuration, from the command line or from a TOML file.
//!
//! [`raw`] is what can be written; [`resolve`](fn@resolve::resolve) checks it and fills in what was left out. Nothing is opened or
//! created here.

pub mod file;
pub mod quick;
pub mod raw;
mod resolve;
pub mod size;

use std::path::PathBuf;
use std::time::Duration;

pub use raw::{DangerZone, Fault, FaultAction, Huge, IoPoll, LogFormat, Operation};
pub use resolve::resolve;

use crate::controller::Placement;
use crate::poller::PollerConfig;

/// What is wrong with a configuration, in one line, with where it stands and how to mend it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

/// Everything the daemon is to do.
#[derive(Debug)]
pub struct Config {
    /// How to log.
    pub log: Log,
    /// The pollers, at least one.
    pub pollers: Vec<PollerConfig>,
    /// The controllers, at least one.
    pub controllers: Vec<ControllerSpec>,
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
    /// Largest transfer in bytes.
    pub max_transfer: u32,
    /// NN.
    pub max_namespaces: u32,
    /// Offer Doorbell Buffer Config.
    pub doorbell_buffer: bool,
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
}

/// How long an adaptive poller looks before it sleeps, if nothing is configured.
pub const DEFAULT_POLL: Duration = Duration::from_micros(50);
