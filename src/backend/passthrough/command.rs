//! An NVMe command as Linux takes it, by ioctl and by io_uring.

use zerocopy::{Immutable, IntoBytes};

/// `struct nvme_passthru_cmd` of `linux/nvme_ioctl.h`; `struct nvme_uring_cmd` is the same, but that nobody reads or writes its last
/// word.
#[derive(Clone, Copy, Debug, Default, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Command {
    opcode: u8,
    flags: u8,
    rsvd1: u16,
    nsid: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    pub addr: u64,
    metadata_len: u32,
    pub data_len: u32,
    pub cdw10: u32,
    pub cdw11: u32,
    pub cdw12: u32,
    cdw13: u32,
    cdw14: u32,
    cdw15: u32,
    pub timeout_ms: u32,
    result: u32,
}

const _: () = assert!(size_of::<Command>() == 72);

impl Command {
    /// A command without dwords of its own.
    pub fn new(opcode: u8, nsid: u32) -> Self {
        Self {
            opcode,
            nsid,
            ..Self::default()
        }
    }
}
