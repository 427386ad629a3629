//! A namespace as commands see it.

use std::sync::Arc;

use crate::backend::{Backend, Geometry, Opcodes};

/// A namespace of a controller.
pub struct Namespace {
    /// NSID, 1 to 0xFFFFFFFE.
    pub nsid: u32,
    /// Where the data is.
    pub backend: Arc<Backend>,
    /// `backend.geometry()`, at hand.
    pub geometry: Geometry,
    /// Write-protected by configuration, whatever the backend could do.
    pub read_only: bool,
    /// `backend.forwards()`, at hand.
    pub forwards: bool,
    /// `backend.passes()`, at hand.
    pub passes: Opcodes,
}

impl Namespace {
    /// A namespace on a store; `read_only` if it is, whatever the store could do.
    pub fn new(nsid: u32, backend: Arc<Backend>, read_only: bool) -> Self {
        let geometry = backend.geometry();
        Self {
            nsid,
            geometry,
            read_only: read_only || geometry.read_only,
            forwards: backend.forwards(),
            passes: backend.passes(),
            backend,
        }
    }
}
