//! The configuration of a controller in a test, which says of it only what it is about.

use std::sync::Arc;

use crate::backend::Backend;
use crate::controller::{ControllerConfig, NamespaceConfig, Placement};
use crate::state::Keep;

/// A controller of this name that keeps nothing, with these stores as its namespaces, NSID 1 and on.
#[must_use]
pub fn controller_config(name: &str, backends: Vec<Arc<Backend>>) -> ControllerConfig {
    let namespaces: Vec<_> = (1u32..)
        .zip(backends)
        .map(|(nsid, backend)| NamespaceConfig {
            nsid,
            backend,
            read_only: false,
            identity: format!("{name}-{nsid}"),
            uuid: None,
            nguid: None,
            eui64: None,
        })
        .collect();
    ControllerConfig {
        name: name.into(),
        serial: "S1".into(),
        model: name.into(),
        subnqn: format!("nqn.2014-08.org.nvmexpress:uuid:{name}"),
        max_namespaces: namespaces.len() as u32,
        namespaces,
        queues: 4,
        max_queue_entries: 1024,
        max_transfer: 1 << 20,
        doorbell_buffer: true,
        sgls: true,
        doorbell_stride: 0,
        pci_ids: [0x1b36, 0x0010, 0x1af4, 0x1100],
        placement: Placement::default(),
        keep: Arc::new(Keep::nowhere()),
    }
}
