//! A namespace as commands see it.

use std::sync::Arc;

use crate::backend::{Backend, Geometry};

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
}
