//! Tests of the specification crate, through its public interface only.

mod commands;
mod doorbell;
mod golden;
mod identify;
mod log;
mod prp;
mod prp_hostile;
mod prp_model;
mod ring;
mod sgl;
mod status;
