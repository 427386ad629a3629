//! Namespaces out of their configuration.

use std::sync::Arc;
use std::time::Duration;

use nvme_spec::Status;

use crate::backend::{
    Backend, Delay, Fault, FileOptions, HugePages, IoPoll, MemoryOptions, NullOptions, OpenError,
    Operations, PassthroughOptions, Rule,
};
use crate::config::{self, DangerZone, FaultAction, Huge, NamespaceSpec, StoreSpec};
use crate::controller::NamespaceConfig;

/// See whether a store can be opened, where looking costs nothing and changes nothing.
///
/// # Errors
///
/// What [`open`] would say.
pub fn check(spec: &NamespaceSpec) -> Result<(), OpenError> {
    match spec.store {
        StoreSpec::File { .. } | StoreSpec::NvmePassthrough { .. } => store(spec).map(drop),
        StoreSpec::Null { .. } | StoreSpec::Memory { .. } => Ok(()),
    }
}

/// Open the store of a namespace.
///
/// # Errors
///
/// What is wrong with it, and how to mend it.
pub fn open(spec: &NamespaceSpec) -> Result<Backend, OpenError> {
    let store = store(spec)?;
    Ok(match &spec.danger_zone {
        Some(zone) => endanger(store, zone),
        None => store,
    })
}

fn store(spec: &NamespaceSpec) -> Result<Backend, OpenError> {
    let (block_shift, read_only) = (spec.block_shift, spec.read_only);
    match &spec.store {
        StoreSpec::Null { bytes } => Backend::null(NullOptions {
            block_shift,
            blocks: bytes >> block_shift,
            read_only,
        }),
        StoreSpec::Memory { bytes, huge_pages } => Backend::memory(MemoryOptions {
            block_shift,
            blocks: bytes >> block_shift,
            read_only,
            huge_pages: match huge_pages {
                Huge::IfFree => HugePages::IfFree,
                Huge::Never => HugePages::Never,
                Huge::Required => HugePages::Required,
            },
        }),
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
        }),
        StoreSpec::NvmePassthrough { path } => Backend::passthrough(PassthroughOptions {
            path: path.clone(),
            read_only,
        }),
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
