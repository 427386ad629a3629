//! What a configuration says of SSDs: `[[ssd]]`, and namespaces of backend `nvme`.

use std::collections::BTreeMap;
use std::time::Duration;

use toml::Spanned;

use super::file::Source;
use super::{ConfigError, ControllerSpec, NamespaceSpec, SsdSpec, StoreSpec, raw};
use crate::driver::pci::PciAddress;

/// By default, as Linux has it.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);
const ABORT_GRACE: Duration = Duration::from_secs(5);
const RESETS_PER_MINUTE: u32 = 5;

/// Commands that go through the checks: Flush, Write, Read, Compare, Write Zeroes, Dataset Management, Verify.
const CHECKED: [u8; 7] = [0x00, 0x01, 0x02, 0x05, 0x08, 0x09, 0x0C];

/// Times that are no mistake.
const TIMES_MS: std::ops::RangeInclusive<u64> = 100..=3_600_000;

/// The store of a namespace of backend `nvme`, and what tells it from others.
pub(super) fn store(ns: &raw::Namespace) -> Result<(StoreSpec, String), String> {
    if ns.block_size.is_some() {
        return Err("an nvme namespace has the blocks of its SSD; remove 'block-size'".into());
    }
    let Some(text) = &ns.address else {
        return Err("an nvme namespace needs the address of its SSD, such as nvme:0000:01:00.0 (address = \"0000:01:00.0\" in a file)".into());
    };
    let address: PciAddress = text.parse().map_err(|e| format!("{e}"))?;
    let nsid = ns.ssd_namespace.unwrap_or(1);
    if nsid == 0 || nsid > 0xFFFF_FFFE {
        return Err(format!(
            "ssd-namespace is {nsid}; an nsid is 1 to 4294967294"
        ));
    }
    let offset = ns.offset.map_or(0, |s| s.0);
    let bytes = ns.size.map(|s| s.0);
    let whole = |what: &str, n: u64| {
        if n.is_multiple_of(512) {
            Ok(())
        } else {
            Err(format!(
                "{what} is {n} bytes; it must be whole blocks of the SSD"
            ))
        }
    };
    whole("offset", offset)?;
    whole("size", bytes.unwrap_or(0))?;
    if bytes == Some(0) || offset.checked_add(bytes.unwrap_or(0)).is_none() {
        return Err("offset and size are no range of the SSD's namespace".into());
    }
    let id = format!("nvme {address} {nsid} {offset}");
    let store = StoreSpec::Nvme {
        address,
        nsid,
        offset,
        bytes,
    };
    Ok((store, id))
}

/// Check the commands that are to go to an SSD unchecked.
pub(super) fn check_passed(zone: &raw::DangerZone, store: &StoreSpec) -> Result<(), String> {
    let Some(first) = zone.pass_opcodes.first() else {
        return Ok(());
    };
    match store {
        StoreSpec::Nvme {
            offset: 0,
            bytes: None,
            ..
        } => {}
        _ => {
            return Err(format!(
                "pass-opcodes = [{first:#04x}, ...] is for an nvme namespace that is all of the SSD's; remove it, or offset and size"
            ));
        }
    }
    match zone.pass_opcodes.iter().find(|o| CHECKED.contains(o)) {
        None => Ok(()),
        Some(opcode) => Err(format!(
            "pass-opcodes has {opcode:#04x}, a command that is always there, and checked; remove it"
        )),
    }
}

/// Blocks of an SSD that a namespace takes: where, from which byte on, how many.
fn part(ns: &NamespaceSpec) -> Option<(PciAddress, u32, u64, u64)> {
    match ns.store {
        StoreSpec::Nvme {
            address,
            nsid,
            offset,
            bytes,
        } => {
            let end = bytes.and_then(|n| offset.checked_add(n));
            Some((address, nsid, offset, end.unwrap_or(u64::MAX)))
        }
        _ => None,
    }
}

/// The SSDs of all controllers, as `[[ssd]]` says they are to be treated.
///
/// # Errors
///
/// An address that is none, is there twice, or that no namespace is on; a number out of its range; two namespaces on the same blocks.
pub(super) fn resolve(
    written: Vec<Spanned<raw::Ssd>>,
    controllers: &[ControllerSpec],
    source: Option<&Source>,
) -> Result<Vec<SsdSpec>, ConfigError> {
    let mut taken: Vec<(PciAddress, u32, u64, u64, bool, String)> = Vec::new();
    let mut ssds = BTreeMap::new();
    for controller in controllers {
        for ns in &controller.namespaces {
            let Some((address, nsid, start, end)) = part(ns) else {
                continue;
            };
            let whose = format!("namespace {} of '{}'", ns.nsid, controller.name);
            let same = |(a, n, s, e, read_only, _): &&(PciAddress, u32, u64, u64, bool, String)| {
                (*a, *n) == (address, nsid)
                    && *s < end
                    && start < *e
                    && !(*read_only && ns.read_only)
            };
            if let Some((.., other)) = taken.iter().find(same) {
                return Err(ConfigError(format!(
                    "{other} and {whose} use the same blocks of {address}; give each its own with offset and size, or make both read-only"
                )));
            }
            taken.push((address, nsid, start, end, ns.read_only, whose));
            ssds.insert(address, of(address, &raw::Ssd::default())?);
        }
    }
    let mut seen = Vec::new();
    for spanned in written {
        let at = source.map(|s| s.at(&spanned.span())).unwrap_or_default();
        let spec = one(&spanned.into_inner()).map_err(|e| ConfigError(format!("{at}{}", e.0)))?;
        let address = spec.address;
        if seen.contains(&address) {
            return Err(ConfigError(format!("{at}ssd {address} is there twice")));
        }
        seen.push(address);
        if ssds.insert(address, spec).is_none() {
            return Err(ConfigError(format!(
                "{at}no namespace is on ssd {address}; remove it, or add one with backend = \"nvme\""
            )));
        }
    }
    Ok(ssds.into_values().collect())
}

fn one(ssd: &raw::Ssd) -> Result<SsdSpec, ConfigError> {
    let Some(text) = &ssd.address else {
        return Err(ConfigError(
            "an ssd needs its address, such as address = \"0000:01:00.0\"".into(),
        ));
    };
    let address = text.parse().map_err(|e| ConfigError(format!("ssd: {e}")))?;
    of(address, ssd)
}

fn of(address: PciAddress, ssd: &raw::Ssd) -> Result<SsdSpec, ConfigError> {
    let time = |key: &str, given: Option<u64>, default: Duration| match given {
        None => Ok(default),
        Some(ms) if TIMES_MS.contains(&ms) => Ok(Duration::from_millis(ms)),
        Some(ms) => Err(ConfigError(format!(
            "ssd {address}: {key} is {ms}; it can be {} to {}",
            TIMES_MS.start(),
            TIMES_MS.end()
        ))),
    };
    Ok(SsdSpec {
        address,
        command_timeout: time(
            "command-timeout-ms",
            ssd.command_timeout_ms,
            COMMAND_TIMEOUT,
        )?,
        abort_grace: time("abort-grace-ms", ssd.abort_grace_ms, ABORT_GRACE)?,
        on_reset: ssd.on_reset.unwrap_or_default(),
        resets_per_minute: ssd.resets_per_minute.unwrap_or(RESETS_PER_MINUTE),
    })
}
