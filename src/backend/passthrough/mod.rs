//! A namespace that is a namespace of an NVMe SSD: each request becomes an NVMe command to it, by the kernel's generic device
//! (`/dev/ngXnY`) and io_uring.
//!
//! The guest is told what the SSD says: its statuses are handed on, and what it does by a command of its own (Compare, Verify, Write Zeroes,
//! Dataset Management) is done by it. There is no block layer in between: no scheduler, no merging, no splitting but our own.

mod channel;
mod command;
mod device;
mod ioctl;
mod ring;

pub use channel::PassthroughChannel;

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use nvme_spec::identify::{Cns, IdentifyNamespace};
use rustix::fs::FlockOperation;

use super::error::ErrorLog;
use super::file::After;
use super::uring::no_ring;
use super::{Geometry, OpenError};
use device::Device;
use ring::Ring;

/// What a [`PassthroughBackend`] is made of. The block size is the SSD's.
#[derive(Clone, Debug)]
pub struct PassthroughOptions {
    /// The generic device, `/dev/ngXnY`.
    pub path: PathBuf,
    /// Never write to it.
    pub read_only: bool,
    /// Who had the device before may still be about to let go of it.
    pub after: After,
}

/// A store that is a namespace of an NVMe SSD.
///
/// Unless it is read-only, its block device is held open exclusively, so that it cannot be mounted meanwhile.
pub struct PassthroughBackend {
    pub(super) geometry: Geometry,
    shared: Arc<Shared>,
}

/// What all channels of a device share.
struct Shared {
    device: Device,
    path: PathBuf,
    fence: Option<Arc<File>>,
    log: ErrorLog,
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The kernel may hold the device a moment longer than we do; the lock ends here.
        let _ = rustix::fs::flock(&self.device.file, FlockOperation::NonBlockingUnlock);
    }
}

impl PassthroughBackend {
    /// Open one.
    ///
    /// # Errors
    ///
    /// A path that is no NVMe generic device, a format with metadata or of another block size than 512 or 4096, a device that is mounted or
    /// that somebody else has, a kernel before 5.19.
    pub fn open(options: PassthroughOptions) -> Result<Self, OpenError> {
        let device = device::open(&options)?;
        // Better now than at the first queue.
        Ring::new(&device.file, None, 1, 0).map_err(|e| match e.raw_os_error() {
            Some(libc::EINVAL) => OpenError::io(
                "cannot make an io_uring for NVMe commands",
                "a kernel of 5.19 or later is needed; backend \"file\" works with earlier ones",
                e,
            ),
            _ => no_ring(e),
        })?;
        Ok(Self {
            geometry: device.geometry,
            shared: Arc::new(Shared {
                device,
                path: options.path,
                fence: options.after.fence,
                log: ErrorLog::new(),
            }),
        })
    }

    pub(super) fn channel(&self, depth: u32) -> Result<PassthroughChannel, OpenError> {
        PassthroughChannel::new(self.geometry, &self.shared, depth)
    }

    pub(super) fn store_id(&self) -> String {
        let Device { file, nsid, .. } = &self.shared.device;
        let number = rustix::fs::fstat(file).map_or(0, |stat| stat.st_rdev);
        format!("passthrough {number:x} {nsid}")
    }

    pub(super) fn allocated_blocks(&self) -> u64 {
        let Device { file, nsid, .. } = &self.shared.device;
        let all = self.geometry.blocks;
        if !self.geometry.thin {
            return all;
        }
        ioctl::identify::<IdentifyNamespace>(file, *nsid, Cns::NAMESPACE, 0)
            .map_or(all, |ns| ns.nuse.min(all))
    }

    pub(super) fn describe(&self) -> String {
        let claimed = match &self.shared.device.claim {
            None if !self.geometry.read_only => ", not claimed",
            _ => "",
        };
        format!(
            "NVMe passthrough {}, namespace {}{claimed}",
            self.shared.path.display(),
            self.shared.device.nsid
        )
    }
}
