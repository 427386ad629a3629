//! The fence around the ioctls of Linux's NVMe character devices: which namespace it is, and Identify.

#![expect(unsafe_code, reason = "the fence: ioctls")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nvme_spec::Status;
use nvme_spec::identify::Cns;
use nvme_spec::opcode::AdminOpcode;
use zerocopy::FromBytes;

use super::command::Command;

/// `_IO('N', 0x40)` and `_IOWR('N', 0x41, struct nvme_passthru_cmd)` of `linux/nvme_ioctl.h`.
const NVME_IOCTL_ID: libc::Ioctl = 0x4e40;
const NVME_IOCTL_ADMIN_CMD: libc::Ioctl = 0xc048_4e41;

/// How long an Identify may take, in milliseconds.
const TIMEOUT: u32 = 10_000;

/// The NSID of the namespace that a generic device (`/dev/ngXnY`) is.
///
/// # Errors
///
/// What the kernel says: ENOTTY from anything that is no such device.
pub(super) fn namespace_id(device: &File) -> io::Result<u32> {
    // SAFETY: this ioctl takes no argument and touches no memory.
    let result = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), NVME_IOCTL_ID) };
    match u32::try_from(result) {
        Ok(0) => Err(io::Error::from_raw_os_error(libc::ENOTTY)),
        Ok(nsid) => Ok(nsid),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Identify, with that CNS, and that Command Set Identifier where it counts.
///
/// # Errors
///
/// What the kernel says; the status, in words, of a device that refuses.
pub(super) fn identify<T: FromBytes>(
    device: &File,
    nsid: u32,
    cns: Cns,
    csi: u8,
) -> io::Result<Box<T>> {
    const { assert!(size_of::<T>() == 4096) };
    let mut data = Box::new(T::new_zeroed());
    let mut command = Command::new(AdminOpcode::IDENTIFY.0, nsid);
    command.addr = std::ptr::from_mut(&mut *data).expose_provenance() as u64;
    command.data_len = 4096;
    command.cdw10 = u32::from(cns.0);
    command.cdw11 = u32::from(csi) << 24;
    command.timeout_ms = TIMEOUT;
    // SAFETY: the kernel reads and writes the command, which is of the size its number names, and writes up to `data_len` bytes at
    // `addr`, where `data` has 4096, of a type for which any bytes are a value.
    let result = unsafe {
        libc::ioctl(
            device.as_fd().as_raw_fd(),
            NVME_IOCTL_ADMIN_CMD,
            &raw mut command,
        )
    };
    match result {
        0 => Ok(data),
        1.. => Err(io::Error::other(format!(
            "the device answers Identify (CNS {:#04x}) with {}",
            cns.0,
            Status(result as u16 & 0x7ff)
        ))),
        _ => Err(io::Error::last_os_error()),
    }
}
