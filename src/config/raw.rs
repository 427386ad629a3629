//! The configuration as it is written, in TOML or on the command line: every key, nothing checked but types.

use std::path::PathBuf;

use serde::{Deserialize, Deserializer};
use toml::Spanned;

use super::size::Size;

/// A whole file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct File {
    /// `[daemon]`
    #[serde(default)]
    pub daemon: Daemon,
    /// `[[ssd]]`
    #[serde(default)]
    pub ssd: Vec<Spanned<Ssd>>,
    /// `[[controller]]`
    #[serde(default)]
    pub controller: Vec<Spanned<Controller>>,
}

/// How an SSD is treated that namespaces of backend `nvme` are on.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Ssd {
    /// Its PCI address.
    pub address: Option<String>,
    /// A command that takes longer is aborted.
    pub command_timeout_ms: Option<u64>,
    /// If that does not help within this time, the controller is reset.
    pub abort_grace_ms: Option<u64>,
    /// What becomes of commands that were out at a reset.
    pub on_reset: Option<OnReset>,
    /// With more resets than this within a minute it is given up.
    pub resets_per_minute: Option<u32>,
}

/// What becomes of commands that were out when an SSD was reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnReset {
    /// They are sent again.
    #[default]
    Resubmit,
    /// They fail.
    Fail,
}

/// What all controllers share.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Daemon {
    /// A level, or a filter of `tracing`.
    pub log_level: Option<String>,
    /// `text` or `json`.
    pub log_format: Option<LogFormat>,
    /// Cores with a poller each.
    pub cores: Option<Vec<usize>>,
    /// Pollers that are bound to no core.
    pub pollers: Option<usize>,
    /// How they wait.
    pub idle: Option<Idle>,
    /// How long an adaptive poller looks before it sleeps, in microseconds.
    pub poll_us: Option<u64>,
    /// Commands a poller can have out.
    pub slots: Option<usize>,
    /// A directory, or `none`.
    pub state_dir: Option<PathBuf>,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// Lines for people
    #[default]
    Text,
    /// An object of JSON on each line
    Json,
}

/// How a poller waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Idle {
    /// Never sleep: lowest latency, a core at 100 %
    Poll,
    /// Look for a while, then sleep until a guest rings
    #[default]
    Adaptive,
    /// Sleep as soon as there is nothing to do
    Interrupt,
}

/// One controller: one socket, one disk controller in one guest.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Controller {
    /// Its name in messages; what its serial number and the names of its namespaces are derived from.
    pub name: Option<String>,
    /// What is spoken on its socket.
    pub transport: Option<Transport>,
    /// Where front-ends connect.
    pub socket_path: Option<PathBuf>,
    /// The socket's permissions, in octal.
    pub socket_mode: Option<String>,
    /// The socket's group.
    pub socket_group: Option<String>,
    /// An inherited file descriptor instead of a path; not in a file.
    #[serde(skip)]
    pub fd: Option<i32>,
    /// Serial number.
    pub serial: Option<String>,
    /// Model number.
    pub model: Option<String>,
    /// NVM subsystem qualified name.
    pub subnqn: Option<String>,
    /// Queue pairs, admin included.
    pub queues: Option<u16>,
    /// Entries of an I/O queue.
    pub queue_entries: Option<u32>,
    /// Largest transfer.
    pub max_transfer: Option<Size>,
    /// Highest NSID the controller could ever have (NN).
    pub max_namespaces: Option<u32>,
    /// Offer Doorbell Buffer Config.
    pub doorbell_buffer: Option<bool>,
    /// Offer SGLs.
    pub sgls: Option<bool>,
    /// CAP.DSTRD.
    pub doorbell_stride: Option<u8>,
    /// PCI vendor, device, subsystem vendor and subsystem ids.
    pub pci_ids: Option<[u16; 4]>,
    /// How its queues are put on pollers.
    pub placement: Option<Policy>,
    /// The pollers that may serve it, counted from 0.
    pub pollers: Option<Vec<usize>>,
    /// `[[controller.namespace]]`
    #[serde(default)]
    pub namespace: Vec<Spanned<Namespace>>,
}

/// What is spoken on a socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// For QEMU with the device of this project
    #[default]
    VhostUser,
    /// For QEMU 10.1 and later as it is, and Cloud Hypervisor
    VfioUser,
}

/// How queues are put on pollers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// Each to the poller with the fewest queues.
    #[default]
    Spread,
    /// All of a controller to one poller.
    Packed,
    /// To pollers where the guest's memory is.
    Numa,
}

/// One namespace.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Namespace {
    /// NSID; the place in the list by default.
    pub nsid: Option<u32>,
    /// `null`, `memory`, `file`, `nvme-passthrough` or `nvme`.
    pub backend: Option<String>,
    /// Size, of `null` and `memory`; how much of the SSD's namespace, of `nvme`.
    pub size: Option<Size>,
    /// PCI address of the SSD, of `nvme`.
    pub address: Option<String>,
    /// NSID on the SSD, of `nvme`.
    pub ssd_namespace: Option<u32>,
    /// Where in the SSD's namespace it begins, of `nvme`.
    pub offset: Option<Size>,
    /// Path, of `file` and `nvme-passthrough`.
    pub path: Option<PathBuf>,
    /// 512 or 4096; not of `nvme-passthrough` and `nvme`.
    pub block_size: Option<Size>,
    /// Refuse writes.
    pub read_only: Option<bool>,
    /// Around the page cache, of `file`.
    pub direct: Option<bool>,
    /// `"auto"`, true or false, of `file`.
    pub iopoll: Option<IoPoll>,
    /// `if-free`, `never` or `required`, of `memory`.
    pub huge_pages: Option<Huge>,
    /// UUID.
    pub uuid: Option<String>,
    /// NGUID: 32 hexadecimal digits.
    pub nguid: Option<String>,
    /// EUI64: 16 hexadecimal digits.
    pub eui64: Option<String>,
    /// Faults and delays, for tests.
    pub danger_zone: Option<DangerZone>,
}

/// Whether the kernel polls the device for completions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoPoll {
    /// If it can.
    #[default]
    Auto,
    /// It must.
    On,
    /// It does not.
    Off,
}

impl<'de> Deserialize<'de> for IoPoll {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "iopoll is true, false or \"auto\"")]
        enum Written {
            Flag(bool),
            Word(Word),
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "kebab-case")]
        enum Word {
            Auto,
        }
        Ok(match Written::deserialize(deserializer)? {
            Written::Flag(true) => Self::On,
            Written::Flag(false) => Self::Off,
            Written::Word(Word::Auto) => Self::Auto,
        })
    }
}

/// Which pages a namespace in memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Huge {
    /// Huge pages if enough are free.
    IfFree,
    /// Normal pages.
    Never,
    /// Huge pages or nothing.
    Required,
}

/// What makes a namespace misbehave on purpose.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct DangerZone {
    /// Must be true: this namespace loses data and hangs guests.
    pub i_want_broken_io: bool,
    /// Each request waits so long.
    pub delay_us: Option<u64>,
    /// Requests that go wrong.
    #[serde(default)]
    pub fault: Vec<Fault>,
    /// I/O commands beyond those of this daemon that go to the SSD unchecked, by opcode; of `nvme`.
    #[serde(default)]
    pub pass_opcodes: Vec<u8>,
}

/// Requests that go wrong.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Fault {
    /// `read`, `write`, `compare`, `verify`, `write-zeroes`, `deallocate`, `flush`; all if empty.
    #[serde(default)]
    pub operations: Vec<Operation>,
    /// First and last block; all by default.
    pub blocks: Option<[u64; 2]>,
    /// So many pass first.
    #[serde(default)]
    pub skip: u64,
    /// Then so many go wrong; all by default.
    pub count: Option<u64>,
    /// What happens to them.
    pub action: FaultAction,
}

/// An operation of a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// Read
    Read,
    /// Write
    Write,
    /// Compare
    Compare,
    /// Verify
    Verify,
    /// Write Zeroes
    WriteZeroes,
    /// Dataset Management: deallocate
    Deallocate,
    /// Flush
    Flush,
}

/// How a request goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultAction {
    /// It fails with Internal Error.
    Fail,
    /// Only its first block is done.
    Shorten,
    /// It never completes.
    NeverComplete,
}
