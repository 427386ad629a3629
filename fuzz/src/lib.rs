//! What the fuzz targets do with their inputs, and the inputs they begin with.
//!
//! `FUZZ_SEEDS=DIR TARGET` writes the seeds of a target to a directory and ends: they are made, not kept.

pub mod commands;
pub mod sessions;
pub mod stream;
pub mod walkers;

use std::path::Path;

/// Write seeds and end, if that is asked for.
///
/// # Panics
///
/// They cannot be written.
pub fn seeds(all: impl IntoIterator<Item = Vec<u8>>) {
    let Some(dir) = std::env::var_os("FUZZ_SEEDS") else {
        return;
    };
    for (i, seed) in all.into_iter().enumerate() {
        std::fs::write(Path::new(&dir).join(format!("seed-{i}")), seed).expect("a seed");
    }
    std::process::exit(0);
}

/// An input, taken from the front; zeroes where it has ended.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// Up to `n` bytes.
    pub fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// `N` bytes.
    pub fn array<const N: usize>(&mut self) -> [u8; N] {
        let taken = self.bytes(N);
        let mut out = [0; N];
        out[..taken.len()].copy_from_slice(taken);
        out
    }

    /// A byte.
    pub fn byte(&mut self) -> u8 {
        let [byte] = self.array();
        byte
    }
}
