//! Whether an SSD can be opened, as far as that shows from outside: nothing is opened, nothing is changed.

use std::io;

use rustix::fs::Access;

use super::{Interface, VfioError};
use crate::driver::pci::{Host, PciAddress, PciFunction};

/// The container's device file.
pub(super) const CONTAINER: &str = "dev/vfio/vfio";

/// One thing that must be so, in the order in which they are looked at: what fails makes the later ones pointless.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It is an NVMe controller.
    Kind,
    /// The host does not use its disks.
    Unused,
    /// It is behind an IOMMU.
    Iommu,
    /// It is bound to vfio-pci.
    Bound,
    /// Nobody of its group is used by the host.
    Group,
    /// The device files may be opened.
    Files,
}

impl Step {
    /// All of them, in order.
    pub const ALL: [Self; 6] = [
        Self::Kind,
        Self::Unused,
        Self::Iommu,
        Self::Bound,
        Self::Group,
        Self::Files,
    ];

    /// Look at one thing.
    ///
    /// # Errors
    ///
    /// It is not so.
    pub fn look(self, host: &Host, function: &PciFunction) -> Result<(), VfioError> {
        let address = function.address;
        match self {
            Self::Kind if !function.is_nvme() => Err(VfioError::NotNvme {
                address,
                class: function.class,
            }),
            Self::Kind => Ok(()),
            Self::Unused => {
                let uses = host.disk_uses(address);
                match uses.is_empty() {
                    true => Ok(()),
                    false => Err(VfioError::Mounted { address, uses }),
                }
            }
            Self::Iommu if function.group.is_none() => Err(VfioError::NoIommu {
                address,
                elsewhere: host.has_iommu(),
            }),
            Self::Iommu => Ok(()),
            Self::Bound if !function.is_on_vfio() => Err(VfioError::NotBound {
                address,
                driver: function.driver.clone(),
            }),
            Self::Bound => Ok(()),
            Self::Group => {
                let group = function.group.unwrap_or(0);
                let blockers = group_blockers(host, group, address);
                match blockers.is_empty() {
                    true => Ok(()),
                    false => Err(VfioError::GroupNotViable {
                        address,
                        group,
                        blockers,
                    }),
                }
            }
            Self::Files => {
                for path in files(host, function)? {
                    may_open(host, address, &path)?;
                }
                Ok(())
            }
        }
    }
}

/// Look a function up.
///
/// # Errors
///
/// There is none at that address.
pub(crate) fn find(host: &Host, address: PciAddress) -> Result<PciFunction, VfioError> {
    match host.function(address) {
        Ok(function) => Ok(function),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let others = host.nvme_controllers();
            Err(VfioError::NoDevice {
                address,
                others: others.iter().map(|f| f.address).collect(),
            })
        }
        Err(source) => Err(VfioError::Kernel {
            address,
            what: "looking it up in sysfs",
            source,
        }),
    }
}

/// Look whether an SSD can be opened.
///
/// # Errors
///
/// What is in the way.
pub fn preflight(host: &Host, address: PciAddress) -> Result<PciFunction, VfioError> {
    let function = find(host, address)?;
    for step in Step::ALL {
        step.look(host, &function)?;
    }
    Ok(function)
}

/// Devices of a group that keep it from being used.
pub(super) fn group_blockers(host: &Host, group: u32, except: PciAddress) -> Vec<PciFunction> {
    let mut members = host.group(group).unwrap_or_default();
    members.retain(|f| f.address != except && f.blocks_group());
    members
}

/// The device files a function is opened through, without the leading slash.
pub(crate) fn files(host: &Host, function: &PciFunction) -> Result<Vec<String>, VfioError> {
    if let Some(cdev) = cdev_of(host, function, Interface::Auto) {
        return Ok(vec!["dev/iommu".into(), cdev]);
    }
    let group = function.group.unwrap_or(0);
    let files = vec![CONTAINER.into(), format!("dev/vfio/{group}")];
    for path in &files {
        // Whatever else stat says, opening says it better.
        if let Err(source) = std::fs::metadata(host.path(path))
            && source.kind() == io::ErrorKind::NotFound
        {
            return Err(VfioError::NoVfio {
                what: format!("there is no /{path}"),
                source,
            });
        }
    }
    Ok(files)
}

/// The device's own file, if that is the way to go.
pub(super) fn cdev_of(host: &Host, function: &PciFunction, interface: Interface) -> Option<String> {
    let group_there = host.path(CONTAINER).exists();
    match interface {
        Interface::Group => return None,
        Interface::Auto if group_there => return None,
        Interface::Auto | Interface::Cdev => {}
    }
    let dir = host.function_path(function.address).join("vfio-dev");
    let name = std::fs::read_dir(dir).ok()?.next()?.ok()?.file_name();
    let path = format!("dev/vfio/devices/{}", name.to_str()?);
    (host.path("dev/iommu").exists() && host.path(&path).exists()).then_some(path)
}

fn may_open(host: &Host, address: PciAddress, path: &str) -> Result<(), VfioError> {
    let want = Access::READ_OK | Access::WRITE_OK;
    match rustix::fs::access(host.path(path), want) {
        Err(e @ (rustix::io::Errno::ACCESS | rustix::io::Errno::PERM)) => {
            Err(VfioError::NoPermission {
                address,
                path: format!("/{path}"),
                source: e.into(),
            })
        }
        // Opening says the rest.
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::told;
    use super::*;
    use crate::driver::pci::testing::FakeHost;
    use crate::driver::pci::{CLASS_NVME, VFIO_DRIVER};

    const AT: &str = "0000:01:00.0";

    fn look(fake: &FakeHost) -> VfioError {
        preflight(&fake.host(), AT.parse().unwrap()).unwrap_err()
    }

    #[test]
    fn each_obstacle_is_told_in_turn() {
        let fake = FakeHost::new();
        let (text, status) = told(&look(&fake));
        assert_eq!(
            (status, text.contains("has no NVMe controller")),
            (20, true),
            "{text}"
        );
        fake.function("0000:02:00.0", CLASS_NVME, None, None);
        let (text, _) = told(&look(&fake));
        assert!(text.contains("0000:02:00.0"), "{text}");

        fake.function(AT, 0x02_0000, Some("e1000e"), None);
        let (text, status) = told(&look(&fake));
        assert_eq!((status, text.contains("020000")), (21, true), "{text}");

        fake.function(AT, CLASS_NVME, Some("nvme"), None);
        let (text, status) = told(&look(&fake));
        assert_eq!(
            (status, text.contains("intel_iommu=on")),
            (22, true),
            "{text}"
        );
        fake.function("0000:03:00.0", CLASS_NVME, None, Some(4));
        let (text, status) = told(&look(&fake));
        assert_eq!(
            (status, text.contains("another slot")),
            (22, true),
            "{text}"
        );

        fake.function(AT, CLASS_NVME, Some("nvme"), Some(9));
        fake.disk(AT, "nvme0n1", "259:0");
        fake.write(
            "proc/self/mountinfo",
            "30 20 259:0 / /srv rw - ext4 /dev/nvme0n1 rw\n",
        );
        let (text, status) = told(&look(&fake));
        assert_eq!(
            (status, text.contains("mounted at /srv")),
            (23, true),
            "{text}"
        );
        fake.write("proc/self/mountinfo", "");
        let (text, status) = told(&look(&fake));
        assert_eq!(
            (
                status,
                text.contains("scripts/setup-host nvme 0000:01:00.0")
            ),
            (24, true)
        );

        fake.function(AT, CLASS_NVME, Some(VFIO_DRIVER), Some(9));
        fake.function("0000:01:00.1", 0x02_0000, Some("e1000e"), Some(9));
        let (text, status) = told(&look(&fake));
        assert_eq!(
            (status, text.contains("0000:01:00.1 is bound to e1000e")),
            (25, true)
        );
        fake.function("0000:01:00.1", 0x02_0000, Some(VFIO_DRIVER), Some(9));
        let (text, status) = told(&look(&fake));
        assert_eq!(
            (status, text.contains("/dev/vfio/vfio")),
            (26, true),
            "{text}"
        );
        fake.write("dev/vfio/vfio", "");
        let (text, status) = told(&look(&fake));
        assert_eq!((status, text.contains("/dev/vfio/9")), (26, true), "{text}");
        fake.write("dev/vfio/9", "");
        let found = preflight(&fake.host(), AT.parse().unwrap()).unwrap();
        assert_eq!(found.group, Some(9));
    }

    #[test]
    fn without_groups_a_device_file_will_do() {
        let fake = FakeHost::new();
        fake.function(AT, CLASS_NVME, Some(VFIO_DRIVER), Some(9));
        fake.write(&format!("sys/bus/pci/devices/{AT}/vfio-dev/vfio3/dev"), "");
        assert_eq!(look(&fake).exit_status(), 26);
        fake.write("dev/iommu", "");
        fake.write("dev/vfio/devices/vfio3", "");
        let host = fake.host();
        let f = preflight(&host, AT.parse().unwrap()).unwrap();
        let cdev = |interface| cdev_of(&host, &f, interface);
        assert_eq!(
            cdev(Interface::Auto).as_deref(),
            Some("dev/vfio/devices/vfio3")
        );
        fake.write("dev/vfio/vfio", "");
        assert_eq!(
            (cdev(Interface::Auto), cdev(Interface::Group)),
            (None, None)
        );
        assert!(cdev(Interface::Cdev).is_some());
    }
}
