//! The memory of a transfer as a guest named it: what a backend that forwards gets instead of segments.

use std::fmt;
use std::sync::Arc;

use crate::memory::GuestMap;

/// The memory of a transfer in the guest's own words, not looked at by anybody yet.
#[derive(Clone, Copy)]
pub struct GuestData<'a> {
    /// PRP Entry 1.
    pub prp1: u64,
    /// PRP Entry 2.
    pub prp2: u64,
    /// Bytes of the transfer.
    pub bytes: u32,
    /// Command dword 12: of its bits a backend takes those it knows.
    pub cdw12: u32,
    /// Command dword 13: likewise.
    pub cdw13: u32,
    /// The guest's memory.
    pub map: &'a Arc<GuestMap>,
}

impl fmt::Debug for GuestData<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bytes, prp1, prp2) = (self.bytes, self.prp1, self.prp2);
        write!(f, "{bytes} bytes at PRPs {prp1:#x} and {prp2:#x}")
    }
}

/// A [`GuestData`] that outlives its request: it holds the guest's memory.
pub(super) struct HeldGuest {
    prp1: u64,
    prp2: u64,
    bytes: u32,
    cdw12: u32,
    cdw13: u32,
    map: Arc<GuestMap>,
}

impl HeldGuest {
    /// Hold on to it.
    pub fn of(data: &GuestData<'_>) -> Self {
        Self {
            prp1: data.prp1,
            prp2: data.prp2,
            bytes: data.bytes,
            cdw12: data.cdw12,
            cdw13: data.cdw13,
            map: Arc::clone(data.map),
        }
    }

    /// What is held.
    pub fn data(&self) -> GuestData<'_> {
        GuestData {
            prp1: self.prp1,
            prp2: self.prp2,
            bytes: self.bytes,
            cdw12: self.cdw12,
            cdw13: self.cdw13,
            map: &self.map,
        }
    }
}
