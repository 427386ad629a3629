//! A physical SSD, taken from the kernel by VFIO: registers, interrupts and DMA of one PCI function for this process, behind an IOMMU.
//!
//! [`preflight`] looks whether that can work, and changes nothing; [`open`] does it. Whatever is in the way is a [`VfioError`] with a
//! way out.

mod bar;
mod device;
mod domain;
mod error;
#[cfg(test)]
mod hardware;
mod ioctl;
mod preflight;

use std::io;
use std::path::Path;
use std::sync::Arc;

use iommufd_ioctls::IommuFd;
use vfio_ioctls::{VfioContainer, VfioDevice, VfioError as Refusal, VfioIommufd};

use self::device::{Trouble, VfioSsd};
use self::domain::{Domain, Way};
use self::preflight::{CONTAINER, cdev_of, group_blockers};
use super::pci::{Host, PciAddress, PciFunction};
use super::{AddressSpace, AnyDevice, MapMemoryError, erase};

pub(crate) use self::domain::entry_limit;
pub use self::error::{Limit, LockedMemory, VfioError};
pub(crate) use self::ioctl::memlock_limit;
pub use self::preflight::{Step, preflight};
pub(crate) use self::preflight::{files as device_files, find};

/// Which of the kernel's two interfaces to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Interface {
    /// Groups where the kernel has them, else device files.
    #[default]
    Auto,
    /// `/dev/vfio/vfio` and the group's file.
    Group,
    /// `/dev/iommu` and the device's own file.
    Cdev,
}

/// How an SSD is opened.
#[derive(Clone, Copy, Debug)]
pub struct VfioOptions {
    /// MSI-X vectors to take, at most; each is a file descriptor. One for the admin queue, and one for each queue pair that shall
    /// interrupt.
    pub vectors: u16,
    /// Which interface of the kernel.
    pub interface: Interface,
}

impl Default for VfioOptions {
    fn default() -> Self {
        Self {
            vectors: 65,
            interface: Interface::Auto,
        }
    }
}

/// Take an SSD: its device, for [`Ssd::start`](super::Ssd::start), and its address space.
///
/// When the device is dropped the SSD reaches no memory any more, whatever is still mapped, and the kernel has it back.
///
/// # Errors
///
/// What is in the way, with a way out.
pub fn open(
    address: PciAddress,
    options: &VfioOptions,
) -> Result<(AnyDevice, Arc<dyn AddressSpace>), VfioError> {
    let host = Host::default();
    let function = preflight(&host, address)?;
    let path = host.function_path(address);
    let opener = Opener {
        host: &host,
        function: &function,
        options,
    };
    let (device, way) = match cdev_of(&host, &function, options.interface) {
        Some(_) => opener.by_cdev(&path)?,
        None if options.interface == Interface::Cdev => {
            return Err(VfioError::NoVfio {
                what: "there is no /dev/iommu, or no device file of the SSD".into(),
                source: io::ErrorKind::NotFound.into(),
            });
        }
        None => opener.by_group(&path)?,
    };
    let space = Domain::new(address, way).map_err(|source| VfioError::Kernel {
        address,
        what: "asking what the IOMMU can do",
        source,
    })?;
    let ssd = VfioSsd::new(address, device, &space, options.vectors)
        .map_err(|trouble| opener.trouble(trouble))?;
    tracing::info!(ssd = %address, node = function.node, "{space}");
    Ok((erase(ssd), space))
}

/// What the parts of opening share: above all, the meaning of errors.
struct Opener<'a> {
    host: &'a Host,
    function: &'a PciFunction,
    options: &'a VfioOptions,
}

impl Opener<'_> {
    fn by_group(&self, path: &Path) -> Result<(VfioDevice, Way), VfioError> {
        let container = VfioContainer::new(None).map_err(|e| self.refused(e))?;
        let container = Arc::new(container);
        let way = Way::Container(container);
        let device = VfioDevice::new(path, way.ops(), true).map_err(|e| self.refused(e))?;
        Ok((device, way))
    }

    fn by_cdev(&self, path: &Path) -> Result<(VfioDevice, Way), VfioError> {
        let iommufd = IommuFd::new().map_err(|e| self.refused(Refusal::NewVfioIommufd(e)))?;
        let iommufd =
            VfioIommufd::new(Arc::new(iommufd), None, None).map_err(|e| self.refused(e))?;
        let way = Way::Iommufd(Arc::new(iommufd));
        let device = VfioDevice::new(path, way.ops(), true).map_err(|e| self.refused(e))?;
        Ok((device, way))
    }

    /// What an error of the library means here.
    fn refused(&self, refusal: Refusal) -> VfioError {
        // Some of its errors do not carry what the kernel said.
        let last = io::Error::last_os_error();
        let address = self.function.address;
        let group = self.function.group.unwrap_or(0);
        match refusal {
            Refusal::OpenContainer(e) => self.file(e, format!("/{CONTAINER}")),
            Refusal::OpenGroup(e, group) => self.file(e, format!("/dev/vfio/{group}")),
            Refusal::OpenDeviceCdev(e) => {
                self.file(e, "the device's file in /dev/vfio/devices".into())
            }
            Refusal::NewVfioIommufd(iommufd_ioctls::IommufdError::OpenIommufd(e)) => {
                self.file(e, "/dev/iommu".into())
            }
            Refusal::GroupViable => VfioError::GroupNotViable {
                address,
                group,
                blockers: group_blockers(self.host, group, address),
            },
            e @ (Refusal::VfioApiVersion | Refusal::VfioExtension | Refusal::VfioType1V2) => {
                VfioError::NoVfio {
                    what: "its IOMMU driver, vfio_iommu_type1, is not there".into(),
                    source: io::Error::other(e),
                }
            }
            Refusal::ContainerSetIOMMU(e) if e.errno() == libc::EPERM => {
                VfioError::UnsafeInterrupts {
                    address,
                    source: e.into(),
                }
            }
            Refusal::ContainerSetIOMMU(e) if e.errno() == libc::ENODEV => VfioError::NoVfio {
                what: "its IOMMU driver, vfio_iommu_type1, is not there".into(),
                source: e.into(),
            },
            Refusal::ContainerSetIOMMU(e) => self.kernel("setting up the IOMMU domain", e.into()),
            Refusal::GroupGetDeviceFD(e) => self.kernel("opening the device", e.into()),
            Refusal::VfioDeviceBindIommufd(e) if e.errno() == libc::EPERM => {
                VfioError::UnsafeInterrupts {
                    address,
                    source: e.into(),
                }
            }
            Refusal::VfioDeviceBindIommufd(e) => self.kernel("binding the device", e.into()),
            Refusal::VfioDeviceAttachIommufdPt(e) => {
                self.kernel("setting up the IOMMU domain", e.into())
            }
            Refusal::GroupSetContainer => self.kernel("putting its group into a container", last),
            other => self.kernel("opening", io::Error::other(other)),
        }
    }

    /// A file could not be opened.
    fn file(&self, source: io::Error, path: String) -> VfioError {
        let address = self.function.address;
        match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => VfioError::NoVfio {
                what: format!("no {path}"),
                source,
            },
            Some(libc::EACCES | libc::EPERM) => VfioError::NoPermission {
                address,
                path,
                source,
            },
            Some(libc::EBUSY) => VfioError::Busy {
                address,
                path,
                source,
            },
            _ => self.kernel("opening its file", source),
        }
    }

    fn kernel(&self, what: &'static str, source: io::Error) -> VfioError {
        let address = self.function.address;
        match source.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE) => VfioError::Descriptors {
                address,
                // The container, the group, the device, two events, and each vector twice.
                needed: 8 + 2 * usize::from(self.options.vectors),
                source,
            },
            _ => VfioError::Kernel {
                address,
                what,
                source,
            },
        }
    }

    fn trouble(&self, trouble: Trouble) -> VfioError {
        match trouble {
            Trouble::Unusable(what) => VfioError::Unusable {
                address: self.function.address,
                what,
            },
            Trouble::Memory(e) => {
                // What the kernel said is inside of what the address space said.
                let refused = e.get_ref().and_then(|e| e.downcast_ref::<MapMemoryError>());
                let cause = refused.and_then(|e| e.source.as_ref());
                cause
                    .and_then(|cause| domain::refusal(cause, 1 << 20))
                    .unwrap_or_else(|| self.kernel("showing it memory", e))
            }
            Trouble::Kernel(what, source) => self.kernel(what, source),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::pci::testing::FakeHost;
    use super::super::pci::{CLASS_NVME, VFIO_DRIVER};
    use super::*;

    const AT: &str = "0000:01:00.0";

    /// Message, hint and status in one, and that the first two say something.
    pub(super) fn told(e: &VfioError) -> (String, u8) {
        assert!(!e.to_string().is_empty() && !e.hint().is_empty());
        (format!("{e}; {}", e.hint()), e.exit_status())
    }

    #[test]
    fn what_the_library_refuses_has_a_meaning() {
        let fake = FakeHost::new();
        fake.function(AT, CLASS_NVME, Some(VFIO_DRIVER), Some(9));
        let host = fake.host();
        let function = host.function(AT.parse().unwrap()).unwrap();
        let opener = Opener {
            host: &host,
            function: &function,
            options: &VfioOptions::default(),
        };
        let os = io::Error::from_raw_os_error;
        let no = vmm_sys_util::errno::Error::new;
        let cases = [
            (Refusal::OpenContainer(os(libc::ENOENT)), 26),
            (Refusal::OpenContainer(os(libc::EACCES)), 27),
            (Refusal::OpenGroup(os(libc::EACCES), "9".into()), 27),
            (Refusal::OpenGroup(os(libc::EBUSY), "9".into()), 28),
            (Refusal::OpenGroup(os(libc::EMFILE), "9".into()), 32),
            (Refusal::GroupViable, 25),
            (Refusal::VfioExtension, 26),
            (Refusal::ContainerSetIOMMU(no(libc::EPERM)), 29),
            (Refusal::ContainerSetIOMMU(no(libc::EINVAL)), 34),
            (Refusal::GroupGetDeviceFD(no(libc::EIO)), 34),
            (Refusal::VfioDeviceGetInfoPCI, 34),
        ];
        for (refusal, status) in cases {
            let name = format!("{refusal:?}");
            assert_eq!(told(&opener.refused(refusal)).1, status, "{name}");
        }
        let unusable = opener.trouble(Trouble::Unusable("it is broken".into()));
        assert_eq!(told(&unusable).1, 33);
        let refused = |source| {
            Trouble::Memory(io::Error::other(MapMemoryError {
                what: String::new(),
                hint: String::new(),
                source,
            }))
        };
        for (source, status) in [
            (Some(os(libc::ENOMEM)), 30),
            (Some(os(libc::ENOSPC)), 31),
            (Some(os(libc::EINVAL)), 34),
            (None, 34),
        ] {
            assert_eq!(told(&opener.trouble(refused(source))).1, status);
        }
    }
}
