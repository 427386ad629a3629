//! Checks of a configuration, and what is not said in it.

mod namespace;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::file::Source;
use super::raw;
use super::ssds;
use super::{
    Config, ConfigError, ControllerSpec, DEFAULT_POLL, Log, NamespaceSpec, Socket, StateDir,
    StoreSpec,
};
use crate::controller::{Placement, Policy};
use crate::poller::{IdlePolicy, PollerConfig};
use crate::transport::Transport;
use namespace::namespace;

/// Queue pairs by default: admin and 32 for I/O.
const QUEUES: u16 = 33;
/// Entries of an I/O queue by default.
const QUEUE_ENTRIES: u32 = 1024;
/// The largest transfer.
const MAX_TRANSFER: u32 = 1 << 20;
/// CAP.DSTRD by default: see `docs/adr/0003-doorbell-stride.md`.
const DOORBELL_STRIDE: u8 = 3;
/// The largest stride for which 64 queue pairs fit into a window of 1 MiB.
const MAX_STRIDE: u8 = 10;
/// NSIDs beyond this serve nobody and cost a table of that size.
const MAX_NSID: u32 = 1024;
/// Commands a poller can have out, by default and at most.
const SLOTS: usize = 1024;
const MAX_SLOTS: usize = 65_536;
const MAX_POLLERS: usize = 1024;
/// The socket in a directory that vfio-user clients are given.
const CNTRL: &str = "cntrl";
const MODEL: &str = "vhost-user NVMe Controller";
/// An id of the range QEMU sets aside for experiments, so that no driver's quirks for other controllers apply.
const PCI_IDS: [u16; 4] = [0x1AF4, 0x10F0, 0x1AF4, 0x1100];

/// Check a configuration and fill in what was left out. `source` is the file it came from, for lines in messages.
///
/// # Errors
///
/// The first thing that is wrong, in one line.
pub fn resolve(file: raw::File, source: Option<&Source>) -> Result<Config, ConfigError> {
    let place = || source.map(Source::whole).unwrap_or_default();
    let daemon = &file.daemon;
    let pollers = pollers(daemon).map_err(|e| ConfigError(format!("{}{e}", place())))?;
    let level = daemon.log_level.clone().unwrap_or_else(|| "info".into());
    if let Err(e) = tracing_subscriber::EnvFilter::try_new(&level) {
        return Err(ConfigError(format!(
            "{}log-level '{level}' is not one: {e}; use error, warn, info, debug or trace",
            place()
        )));
    }
    let state_dir = match &daemon.state_dir {
        None => StateDir::Default,
        Some(dir) if dir.as_os_str() == "none" => StateDir::None,
        Some(dir) if dir.as_os_str().is_empty() => {
            return Err(ConfigError(format!(
                "{}state-dir is empty; name a directory, or none",
                place()
            )));
        }
        Some(dir) => StateDir::At(absolute(dir)),
    };
    if file.controller.is_empty() {
        return Err(ConfigError(format!(
            "{}there is no controller; add [[controller]] with a socket-path and a [[controller.namespace]]",
            place()
        )));
    }
    let mut seen = Seen::default();
    let mut controllers = Vec::new();
    for spanned in file.controller {
        let span = spanned.span();
        let at = source.map(|s| s.at(&span)).unwrap_or_default();
        let spec = controller(spanned.into_inner(), &at, source)?;
        check_placement(&spec, &pollers).map_err(|e| ConfigError(format!("{at}{e}")))?;
        seen.add(&spec)
            .map_err(|e| ConfigError(format!("{at}{e}")))?;
        controllers.push(spec);
    }
    let ssds = ssds::resolve(file.ssd, &controllers, source)?;
    Ok(Config {
        ssds,
        log: Log {
            level,
            format: daemon.log_format.unwrap_or_default(),
        },
        state_dir,
        pollers,
        controllers,
    })
}

fn pollers(daemon: &raw::Daemon) -> Result<Vec<PollerConfig>, String> {
    let slots = daemon.slots.unwrap_or(SLOTS);
    if !(1..=MAX_SLOTS).contains(&slots) {
        return Err(format!("slots is {slots}; it can be 1 to {MAX_SLOTS}"));
    }
    let poll_for = daemon.poll_us.map_or(DEFAULT_POLL, Duration::from_micros);
    if poll_for > Duration::from_secs(1) {
        return Err("poll-us is more than a second; use idle = \"poll\" to never sleep".into());
    }
    let idle = match daemon.idle.unwrap_or_default() {
        raw::Idle::Poll => IdlePolicy::Poll,
        raw::Idle::Adaptive => IdlePolicy::Adaptive,
        raw::Idle::Interrupt => IdlePolicy::Interrupt,
    };
    let cores: Vec<Option<usize>> = match (&daemon.cores, daemon.pollers) {
        (Some(_), Some(_)) => {
            return Err("cores and pollers exclude each other: each core has one poller".into());
        }
        (Some(cores), None) => {
            check_cores(cores)?;
            cores.iter().copied().map(Some).collect()
        }
        (None, n) => vec![None; n.unwrap_or(1)],
    };
    if cores.is_empty() || cores.len() > MAX_POLLERS {
        return Err(format!(
            "there are {} pollers; there can be 1 to {MAX_POLLERS}",
            cores.len()
        ));
    }
    Ok(cores
        .into_iter()
        .map(|core| PollerConfig {
            core,
            idle,
            poll_for,
            slots,
        })
        .collect())
}

fn check_cores(cores: &[usize]) -> Result<(), String> {
    let allowed: BTreeSet<usize> = match rustix::thread::sched_getaffinity(None) {
        Ok(set) => (0..rustix::thread::CpuSet::MAX_CPU)
            .filter(|&core| set.is_set(core))
            .collect(),
        Err(e) => return Err(format!("cannot find out which cores there are: {e}")),
    };
    let mut seen = BTreeSet::new();
    for &core in cores {
        if !allowed.contains(&core) {
            let list: Vec<String> = allowed.iter().map(ToString::to_string).collect();
            return Err(format!(
                "core {core} does not exist, or this process may not use it; it may use {}",
                list.join(",")
            ));
        }
        if !seen.insert(core) {
            return Err(format!("core {core} is named twice; a core has one poller"));
        }
    }
    Ok(())
}

/// Check that there are pollers for a controller, and cores where it wants to choose by them.
fn check_placement(spec: &ControllerSpec, pollers: &[PollerConfig]) -> Result<(), String> {
    let name = &spec.name;
    if let Some(chosen) = &spec.placement.pollers {
        let last = pollers.len().saturating_sub(1);
        if chosen.is_empty() {
            return Err(format!(
                "controller '{name}': pollers is empty; name some of 0 to {last}, or leave it out"
            ));
        }
        if let Some(wrong) = chosen.iter().find(|p| **p > last) {
            return Err(format!(
                "controller '{name}': there is no poller {wrong}; they are counted from 0 to {last}"
            ));
        }
    }
    if spec.placement.policy == Policy::Numa && pollers.iter().any(|p| p.core.is_none()) {
        return Err(format!(
            "controller '{name}': placement = \"numa\" needs to know where pollers run; give [daemon] cores"
        ));
    }
    Ok(())
}

/// What must not be there twice.
#[derive(Default)]
struct Seen {
    names: BTreeSet<String>,
    sockets: BTreeMap<PathBuf, String>,
    serials: BTreeMap<String, String>,
    subnqns: BTreeMap<String, String>,
    files: BTreeMap<PathBuf, String>,
}

impl Seen {
    fn add(&mut self, c: &ControllerSpec) -> Result<(), String> {
        let name = &c.name;
        if !self.names.insert(name.clone()) {
            return Err(format!(
                "there are two controllers called '{name}'; give each a name of its own"
            ));
        }
        if let Socket::Path { path, .. } = &c.socket
            && let Some(other) = self.sockets.insert(absolute(path), name.clone())
        {
            return Err(format!(
                "controllers '{other}' and '{name}' have the same socket-path {}; give each its own",
                path.display()
            ));
        }
        if let Some(other) = self.serials.insert(c.serial.clone(), name.clone()) {
            return Err(format!(
                "controllers '{other}' and '{name}' have the same serial '{}'; give each its own",
                c.serial
            ));
        }
        if let Some(other) = self.subnqns.insert(c.subnqn.clone(), name.clone()) {
            return Err(format!(
                "controllers '{other}' and '{name}' have the same subnqn '{}'; give each its own",
                c.subnqn
            ));
        }
        for ns in &c.namespaces {
            if let StoreSpec::File { path, .. } | StoreSpec::NvmePassthrough { path } = &ns.store {
                let whose = format!("namespace {} of '{name}'", ns.nsid);
                let real = path.canonicalize().unwrap_or_else(|_| absolute(path));
                if let Some(other) = self.files.insert(real, whose.clone()) {
                    return Err(format!(
                        "{other} and {whose} use the same file {}; give each its own",
                        path.display()
                    ));
                }
            }
        }
        Ok(())
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// Check a controller that stands `at` a place of `source`.
fn controller(
    c: raw::Controller,
    at: &str,
    source: Option<&Source>,
) -> Result<ControllerSpec, ConfigError> {
    let socket = socket(&c).map_err(|e| ConfigError(format!("{at}{e}")))?;
    let name = c.name.clone().unwrap_or_else(|| default_name(&socket));
    let in_controller = |e: String| ConfigError(format!("{at}controller '{name}': {e}"));
    if name.is_empty() || name.len() > 64 || name.chars().any(char::is_control) {
        return Err(in_controller(
            "the name must have 1 to 64 characters, all printable".into(),
        ));
    }
    // Without a name, two daemons with sockets of the same name in two directories must not make twins.
    let seed = match (&c.name, &socket) {
        (None, Socket::Path { path, .. }) => {
            String::from_utf8_lossy(absolute(path).as_os_str().as_bytes()).into_owned()
        }
        _ => name.clone(),
    };
    let serial = c.serial.unwrap_or_else(|| derived_serial(&seed));
    printable("serial", &serial, 20).map_err(in_controller)?;
    let model = c.model.unwrap_or_else(|| MODEL.into());
    printable("model", &model, 40).map_err(in_controller)?;
    let subnqn = c.subnqn.unwrap_or_else(|| derived_nqn(&seed));
    if !subnqn.starts_with("nqn.") || subnqn.len() > 223 {
        return Err(in_controller(format!(
            "subnqn '{subnqn}' is not a qualified name: it starts with 'nqn.' and has at most 223 bytes"
        )));
    }
    let queues = c.queues.unwrap_or(QUEUES);
    if !(2..=64).contains(&queues) {
        return Err(in_controller(format!(
            "queues is {queues}; it can be 2 to 64, the admin queue included"
        )));
    }
    let queue_entries = c.queue_entries.unwrap_or(QUEUE_ENTRIES);
    if !(2..=65_536).contains(&queue_entries) {
        return Err(in_controller(format!(
            "queue-entries is {queue_entries}; it can be 2 to 65536"
        )));
    }
    let max_transfer = match c.max_transfer {
        None => None,
        Some(size) => u32::try_from(size.0)
            .map(Some)
            .ok()
            .filter(|n| {
                n.is_some_and(|n| n.is_power_of_two() && (4096..=MAX_TRANSFER).contains(&n))
            })
            .ok_or_else(|| {
                in_controller(format!(
                    "max-transfer is {} bytes; it can be 4K, 8K, 16K and so on up to 1M",
                    size.0
                ))
            })?,
    };
    let doorbell_stride = c.doorbell_stride.unwrap_or(DOORBELL_STRIDE);
    if doorbell_stride > MAX_STRIDE {
        return Err(in_controller(format!(
            "doorbell-stride is {doorbell_stride}; it can be 0 to {MAX_STRIDE} (2 to its power, times 4 bytes)"
        )));
    }
    let mut namespaces: Vec<NamespaceSpec> = Vec::new();
    for (index, spanned) in c.namespace.into_iter().enumerate() {
        let at = source.map(|s| s.at(&spanned.span())).unwrap_or_default();
        let spec = namespace(spanned.into_inner(), index, &seed).and_then(|ns| {
            if namespaces.iter().any(|other| other.nsid == ns.nsid) {
                return Err(format!(
                    "nsid {} is there twice; give each namespace its own",
                    ns.nsid
                ));
            }
            Ok(ns)
        });
        namespaces.push(spec.map_err(|e| ConfigError(format!("{at}controller '{name}': {e}")))?);
    }
    namespaces.sort_by_key(|ns| ns.nsid);
    let Some(highest) = namespaces.last().map(|ns| ns.nsid) else {
        return Err(in_controller(
            "there is no namespace; add one with --namespace or [[controller.namespace]]".into(),
        ));
    };
    let forwards = namespaces
        .iter()
        .any(|ns| matches!(ns.store, StoreSpec::Nvme { .. }));
    if c.sgls == Some(true) && forwards {
        return Err(in_controller(
            "sgls = true, and a namespace is on an SSD this program drives, which is given PRPs only; leave sgls out".into(),
        ));
    }
    let max_namespaces = c.max_namespaces.unwrap_or(highest);
    if max_namespaces < highest || max_namespaces > MAX_NSID {
        return Err(in_controller(format!(
            "max-namespaces is {max_namespaces}; it can be {highest}, the highest nsid, to {MAX_NSID}"
        )));
    }
    Ok(ControllerSpec {
        name,
        transport: match c.transport.unwrap_or_default() {
            raw::Transport::VhostUser => Transport::VhostUser,
            raw::Transport::VfioUser => Transport::VfioUser,
        },
        socket,
        serial,
        model,
        subnqn,
        queues,
        queue_entries,
        max_transfer,
        max_namespaces,
        doorbell_buffer: c.doorbell_buffer.unwrap_or(true),
        sgls: c.sgls.unwrap_or(!forwards),
        doorbell_stride,
        pci_ids: c.pci_ids.unwrap_or(PCI_IDS),
        placement: Placement {
            policy: match c.placement.unwrap_or_default() {
                raw::Policy::Spread => Policy::Spread,
                raw::Policy::Packed => Policy::Packed,
                raw::Policy::Numa => Policy::Numa,
            },
            pollers: c.pollers,
        },
        namespaces,
    })
}

fn socket(c: &raw::Controller) -> Result<Socket, String> {
    let path = match (&c.socket_path, c.fd) {
        (Some(path), None) => path,
        (None, Some(fd)) => return Ok(Socket::Fd(fd)),
        _ => {
            let name = c.name.as_deref().unwrap_or("without a name");
            return Err(format!(
                "controller {name} has no socket; give it a socket-path"
            ));
        }
    };
    let mode = match &c.socket_mode {
        None => None,
        Some(text) => {
            let octal = u32::from_str_radix(text.trim_start_matches("0o"), 8);
            Some(octal.ok().filter(|m| *m <= 0o777).ok_or_else(|| {
                format!("socket-mode '{text}' is not one; write octal digits, such as 0660")
            })?)
        }
    };
    let group = match &c.socket_group {
        None => None,
        Some(text) => Some(group_id(text)?),
    };
    // Some clients of vfio-user are given a directory, and look for the socket in it by this name.
    let by_name = c.transport == Some(raw::Transport::VfioUser) && path.is_dir();
    Ok(Socket::Path {
        path: if by_name {
            path.join(CNTRL)
        } else {
            path.clone()
        },
        mode,
        group,
    })
}

/// The number of a group that is given by number or by its name in `/etc/group`.
fn group_id(text: &str) -> Result<u32, String> {
    if let Ok(id) = text.parse() {
        return Ok(id);
    }
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    groups
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            (fields.next() == Some(text)).then(|| fields.nth(1)?.parse().ok())?
        })
        .next()
        .ok_or_else(|| format!("socket-group '{text}' is not a group of this host; see /etc/group"))
}

fn default_name(socket: &Socket) -> String {
    match socket {
        // Named after its directory: every controller's socket could be called so.
        Socket::Path { path, .. } if path.file_name() == Some(CNTRL.as_ref()) => path
            .parent()
            .and_then(Path::file_name)
            .map_or_else(|| "nvme".into(), shown_name),
        Socket::Path { path, .. } => path.file_stem().map_or_else(|| "nvme".into(), shown_name),
        Socket::Fd(fd) => format!("fd-{fd}"),
    }
}

/// A part of a path, fit for messages.
fn shown_name(part: &std::ffi::OsStr) -> String {
    let text = part.to_string_lossy();
    let shown = text.chars().filter(|c| !c.is_control());
    shown.take(64).collect()
}

fn printable(what: &str, text: &str, most: usize) -> Result<(), String> {
    let good = (1..=most).contains(&text.len()) && text.bytes().all(|b| matches!(b, b' '..=b'~'));
    if good {
        Ok(())
    } else {
        Err(format!(
            "{what} '{text}' must have 1 to {most} printable ASCII characters"
        ))
    }
}

fn digest(what: &str, seed: &str) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(b"vhost-user-nvme 1 controller ");
    hash.update(what.as_bytes());
    hash.update([0]);
    hash.update(seed.as_bytes());
    hash.finalize().into()
}

fn derived_serial(seed: &str) -> String {
    let bytes = digest("serial", seed);
    let hex: String = bytes.iter().take(8).map(|b| format!("{b:02X}")).collect();
    format!("VUN-{hex}")
}

fn derived_nqn(seed: &str) -> String {
    let mut b = digest("subnqn", seed);
    // UUID version 8 (contents of the maker's choice), variant 10b.
    b[6] = b[6] & 0x0F | 0x80;
    b[8] = b[8] & 0x3F | 0x80;
    let hex: String = b.iter().take(16).map(|b| format!("{b:02x}")).collect();
    format!(
        "nqn.2014-08.org.nvmexpress:uuid:{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}

#[cfg(test)]
mod tests;
