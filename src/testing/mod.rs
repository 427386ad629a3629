//! Test doubles of an SSD: what the driver, and whatever forwards to it, is tested and measured against.
//!
//! - [`FakeSpace`]: an address space without an IOMMU, as strict as one.
//! - [`Model`]: a small SSD in process. [`Model::instant`] completes at once and moves no data; with [`Mischief`] it is hostile.
//! - [`Emulated`]: the controller of this very daemon, behind the driver's seam.
//!
//! And [`controller_config`], for tests of this very daemon's controller.

mod config;
mod disk;
mod emulated;
mod mischief;
mod model;
mod space;
mod state;

pub use config::controller_config;
pub use emulated::Emulated;
pub use mischief::{Act, Mischief};
pub use model::{Model, ModelBell, ModelOptions};
pub use space::FakeSpace;
