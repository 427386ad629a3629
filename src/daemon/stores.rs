//! Namespaces out of their configuration.

use std::sync::Arc;
use std::time::Duration;

use nvme_spec::Status;

use super::keeps;
use super::ssds::Ssds;
use crate::backend::{
    After, Backend, Delay, Fault, FileOptions, HugePages, IoPoll, MemoryOptions, NullOptions,
    NvmeOptions, OpenError, Operations, PassthroughOptions, Rule,
};
use crate::config::{self, DangerZone, FaultAction, Huge, NamespaceSpec, StoreSpec};
use crate::controller::NamespaceConfig;
use crate::state::{HugeWish, Keep};

/// See whether a store can be opened, where looking costs nothing and changes nothing.
///
/// # Errors
///
/// What [`open`] would say.
pub fn check(spec: &NamespaceSpec) -> Result<(), OpenError> {
    match spec.store {
        StoreSpec::File { .. } | StoreSpec::NvmePassthrough { .. } => {
            store(spec, &Ssds::default(), 0, &Keep::nowhere()).map(drop)
        }
        // SSDs are looked at as a whole.
        StoreSpec::Null { .. } | StoreSpec::Memory { .. } | StoreSpec::Nvme { .. } => Ok(()),
    }
}

/// See whether a store is there that another process has open and locked.
///
/// # Errors
///
/// It is not, or may not be used.
pub fn look(spec: &NamespaceSpec) -> Result<(), OpenError> {
    use rustix::fs::{Access, access};
    let (StoreSpec::File { path, .. } | StoreSpec::NvmePassthrough { path }) = &spec.store else {
        return Ok(());
    };
    let wanted = match spec.read_only {
        true => Access::READ_OK,
        false => Access::READ_OK | Access::WRITE_OK,
    };
    access(path, wanted).map_err(|e| {
        OpenError::new(
            format!("{} cannot be used: {e}", path.display()),
            "see that it is there and that this user may read and write it",
        )
    })
}

/// Open the store of a namespace of the controller at a place of the configuration.
///
/// # Errors
///
/// What is wrong with it, and how to mend it.
pub fn open(
    spec: &NamespaceSpec,
    ssds: &Ssds,
    controller: usize,
    keep: &Keep,
) -> Result<Backend, OpenError> {
    let store = store(spec, ssds, controller, keep)?;
    Ok(match &spec.danger_zone {
        Some(zone) if zone.delay_us.is_some() || !zone.fault.is_empty() => endanger(store, zone),
        _ => store,
    })
}

fn store(
    spec: &NamespaceSpec,
    ssds: &Ssds,
    controller: usize,
    keep: &Keep,
) -> Result<Backend, OpenError> {
    let (block_shift, read_only) = (spec.block_shift, spec.read_only);
    let after = || After {
        wait: keeps::patience(keep),
        fence: keep.fence(),
    };
    match &spec.store {
        StoreSpec::Null { bytes } => Backend::null(NullOptions {
            block_shift,
            blocks: bytes >> block_shift,
            read_only,
        }),
        StoreSpec::Memory { bytes, huge_pages } => {
            let (huge_pages, wish) = match huge_pages {
                Huge::IfFree => (HugePages::IfFree, HugeWish::IfFree),
                Huge::Never => (HugePages::Never, HugeWish::Never),
                Huge::Required => (HugePages::Required, HugeWish::Always),
            };
            let options = MemoryOptions {
                block_shift,
                blocks: bytes >> block_shift,
                read_only,
                huge_pages,
            };
            match keep.store(spec.nsid, *bytes, wish) {
                Some(kept) => Backend::memory_over(options, kept.store, kept.id),
                None => Backend::memory(options),
            }
        }
        StoreSpec::File {
            path,
            direct,
            iopoll,
        } => Backend::file(FileOptions {
            path: path.clone(),
            block_shift,
            read_only,
            direct: *direct,
            iopoll: match iopoll {
                config::IoPoll::Auto => IoPoll::Auto,
                config::IoPoll::On => IoPoll::Required,
                config::IoPoll::Off => IoPoll::Never,
            },
            after: after(),
        }),
        StoreSpec::NvmePassthrough { path } => Backend::passthrough(PassthroughOptions {
            path: path.clone(),
            read_only,
            after: after(),
        }),
        StoreSpec::Nvme {
            address,
            nsid,
            offset,
            bytes,
        } => {
            let Some((ssd, window)) = ssds.place(*address, controller) else {
                return Err(OpenError::new(
                    format!("SSD {address} was not opened"),
                    "this is a mistake of the program; please report it",
                ));
            };
            Backend::nvme(&NvmeOptions {
                ssd: Arc::clone(ssd),
                window: Arc::clone(window),
                nsid: *nsid,
                offset: *offset,
                size: *bytes,
                read_only,
                pass: spec
                    .danger_zone
                    .iter()
                    .flat_map(|zone| zone.pass_opcodes.iter().copied())
                    .collect(),
            })
        }
    }
}

/// A store that misbehaves as configured.
fn endanger(store: Backend, zone: &DangerZone) -> Backend {
    let (mut store, faults) = store.with_faults();
    for fault in &zone.fault {
        let blocks = match fault.blocks {
            Some([first, last]) => first..last.saturating_add(1),
            None => 0..u64::MAX,
        };
        faults.add(Rule {
            operations: operations(&fault.operations),
            blocks,
            skip: fault.skip,
            count: fault.count,
            action: match fault.action {
                FaultAction::Fail => Fault::Fail(Status::INTERNAL_ERROR),
                FaultAction::Shorten => Fault::Shorten(1),
                FaultAction::NeverComplete => Fault::NeverComplete,
            },
        });
    }
    if let Some(us) = zone.delay_us {
        let (delayed, delays) = store.with_delays();
        store = delayed;
        let delay = Delay(Duration::from_micros(us));
        delays.add(Rule::always(Operations::ALL, delay));
    }
    store
}

fn operations(list: &[config::Operation]) -> Operations {
    list.iter()
        .map(|operation| match operation {
            config::Operation::Read => Operations::READ,
            config::Operation::Write => Operations::WRITE,
            config::Operation::Compare => Operations::COMPARE,
            config::Operation::Verify => Operations::VERIFY,
            config::Operation::WriteZeroes => Operations::WRITE_ZEROES,
            config::Operation::Deallocate => Operations::DEALLOCATE,
            config::Operation::Flush => Operations::FLUSH,
        })
        .reduce(|a, b| a | b)
        .unwrap_or(Operations::ALL)
}

/// A namespace for the controller.
pub fn namespace(spec: &NamespaceSpec, store: Backend) -> NamespaceConfig {
    NamespaceConfig {
        nsid: spec.nsid,
        backend: Arc::new(store),
        read_only: spec.read_only,
        identity: spec.identity.clone(),
        uuid: spec.uuid,
        nguid: spec.nguid,
        eui64: spec.eui64,
    }
}
