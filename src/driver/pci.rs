//! What the kernel says of a PCI function: read from sysfs and procfs, nothing is opened and nothing is changed.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The class code of an NVM Express I/O controller: mass storage, non-volatile memory, NVM Express.
pub const CLASS_NVME: u32 = 0x01_0802;

/// The kernel's driver for devices that are used from user space.
pub const VFIO_DRIVER: &str = "vfio-pci";

/// The address of a PCI function, as in `0000:01:00.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Segment ("domain"). Those of real machines have 16 bits; controllers that make buses of their own number on.
    pub domain: u32,
    /// Bus.
    pub bus: u8,
    /// Device, 0 to 31.
    pub device: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

/// A text that is no [`PciAddress`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no PCI address; write it as lspci -D does, for example 0000:01:00.0")]
pub struct BadAddress(pub String);

impl FromStr for PciAddress {
    type Err = BadAddress;

    /// `domain:bus:device.function` in hexadecimal; the domain may be left out.
    fn from_str(text: &str) -> Result<Self, BadAddress> {
        let parse = || {
            let (bus, rest) = text.rsplit_once(':')?;
            let (domain, bus) = bus.rsplit_once(':').unwrap_or(("0000", bus));
            let (device, function) = rest.split_once('.')?;
            Some(Self {
                domain: hex(domain, 4..=8)?,
                bus: u8::try_from(hex(bus, 2..=2)?).ok()?,
                device: u8::try_from(hex(device, 2..=2)?).ok().filter(|n| *n < 32)?,
                function: u8::try_from(hex(function, 1..=1)?)
                    .ok()
                    .filter(|n| *n < 8)?,
            })
        };
        parse().ok_or_else(|| BadAddress(text.chars().take(64).collect()))
    }
}

/// Hexadecimal digits and nothing else.
fn hex(text: &str, digits: std::ops::RangeInclusive<usize>) -> Option<u32> {
    let plain = digits.contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
    u32::from_str_radix(text, 16).ok().filter(|_| plain)
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:04x}:{:02x}:{:02x}.{:x}",
            self.domain, self.bus, self.device, self.function
        )
    }
}

/// What is known of a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciFunction {
    /// Where it is.
    pub address: PciAddress,
    /// Class code: base class, subclass, programming interface.
    pub class: u32,
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// The driver it is bound to.
    pub driver: Option<String>,
    /// The only driver it may be bound to, if one was named.
    pub driver_override: Option<String>,
    /// Number of its IOMMU group; `None` without an IOMMU.
    pub group: Option<u32>,
    /// The NUMA node it is attached to, where the machine has several.
    pub node: Option<u32>,
}

impl PciFunction {
    /// Whether it is an NVMe I/O controller.
    pub fn is_nvme(&self) -> bool {
        self.class == CLASS_NVME
    }

    /// Whether it can be used from user space as it is.
    pub fn is_on_vfio(&self) -> bool {
        self.driver.as_deref() == Some(VFIO_DRIVER)
    }

    /// Whether it keeps others of its group from being used: it is bound to a driver of the kernel that does DMA for somebody else.
    /// Bridges do not.
    pub fn blocks_group(&self) -> bool {
        const BRIDGE: u32 = 0x06;
        match self.driver.as_deref() {
            None | Some(VFIO_DRIVER | "pci-stub") => false,
            Some("pcieport") => false,
            Some(_) => self.class >> 16 != BRIDGE,
        }
    }
}

/// What a disk, or a part of it, is used for by the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskUse {
    /// The block device, such as `nvme0n1p2`.
    pub disk: String,
    /// Its use in words, such as `mounted at /srv`.
    pub what: String,
}

impl fmt::Display for DiskUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is {}", self.disk, self.what)
    }
}

/// The kernel's pictures of this machine, below a root that tests choose.
#[derive(Clone, Debug)]
pub struct Host {
    root: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self::at("/")
    }
}

impl Host {
    /// The machine whose `sys`, `proc` and `dev` lie in `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// A path of that machine, given without the leading slash.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.root.join(path)
    }

    /// The content of a small file of that machine, trimmed.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub fn read(&self, path: impl AsRef<Path>) -> io::Result<String> {
        Ok(fs::read_to_string(self.path(path))?.trim().to_owned())
    }

    /// Where sysfs has a function.
    pub fn function_path(&self, address: PciAddress) -> PathBuf {
        self.path("sys/bus/pci/devices").join(address.to_string())
    }

    /// Look a function up.
    ///
    /// # Errors
    ///
    /// `NotFound` if there is none at that address, or what the kernel says.
    pub fn function(&self, address: PciAddress) -> io::Result<PciFunction> {
        let dir = self.function_path(address);
        let number = |name: &str| -> io::Result<u32> {
            let text = fs::read_to_string(dir.join(name))?;
            let text = text.trim();
            u32::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).map_err(|_| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("{} holds no number", dir.join(name).display()),
                )
            })
        };
        let id = |name: &str| number(name).map(|id| u16::try_from(id & 0xffff).unwrap_or(u16::MAX));
        let only = fs::read_to_string(dir.join("driver_override")).unwrap_or_default();
        let only = only.trim();
        Ok(PciFunction {
            address,
            class: number("class")?,
            vendor: id("vendor")?,
            device: id("device")?,
            driver: link_name(&dir.join("driver")),
            driver_override: (!only.is_empty() && only != "(null)").then(|| only.to_owned()),
            group: link_name(&dir.join("iommu_group")).and_then(|name| name.parse().ok()),
            // -1 where there is one node only.
            node: fs::read_to_string(dir.join("numa_node"))
                .ok()
                .and_then(|text| text.trim().parse().ok()),
        })
    }

    /// All functions of an IOMMU group, by address.
    ///
    /// # Errors
    ///
    /// There is no such group, or what the kernel says.
    pub fn group(&self, group: u32) -> io::Result<Vec<PciFunction>> {
        let dir = self.path(format!("sys/kernel/iommu_groups/{group}/devices"));
        let mut found = Vec::new();
        for entry in fs::read_dir(dir)? {
            // A group can hold devices that are not on a PCI bus.
            if let Some(address) = entry?.file_name().to_str().and_then(|n| n.parse().ok()) {
                found.push(self.function(address)?);
            }
        }
        found.sort_by_key(|f| f.address);
        Ok(found)
    }

    /// Whether the kernel has an IOMMU in use.
    pub fn has_iommu(&self) -> bool {
        let some = |path: &str| {
            fs::read_dir(self.path(path)).is_ok_and(|mut entries| entries.next().is_some())
        };
        some("sys/class/iommu") || some("sys/kernel/iommu_groups")
    }

    /// All NVMe controllers of the machine, by address.
    pub fn nvme_controllers(&self) -> Vec<PciFunction> {
        let mut found: Vec<_> = fs::read_dir(self.path("sys/bus/pci/devices"))
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter_map(|address| self.function(address).ok())
            .filter(PciFunction::is_nvme)
            .collect();
        found.sort_by_key(|f| f.address);
        found
    }

    /// The disks that the kernel's own driver shows of a function, such as `nvme0n1`.
    pub fn disks(&self, address: PciAddress) -> Vec<String> {
        let mut disks = Vec::new();
        for controller in names(&self.function_path(address).join("nvme")) {
            let dir = self.function_path(address).join("nvme").join(controller);
            disks.extend(names(&dir).iter().filter_map(|name| disk_of(name)));
        }
        disks.sort();
        disks.dedup();
        disks
    }

    /// What the host uses the disks of a function for: mounts, swap, and devices made of them (LVM, RAID, encryption).
    pub fn disk_uses(&self, address: PciAddress) -> Vec<DiskUse> {
        let mounts = self.read("proc/self/mountinfo").unwrap_or_default();
        let swaps = self.read("proc/swaps").unwrap_or_default();
        let mut uses = Vec::new();
        for disk in self.disks(address) {
            let dir = self.path("sys/class/block").join(&disk);
            let mut parts: Vec<_> = names(&dir)
                .into_iter()
                .filter(|name| dir.join(name).join("partition").exists())
                .collect();
            parts.sort();
            parts.insert(0, disk.clone());
            for part in parts {
                let at = match part == disk {
                    true => dir.clone(),
                    false => dir.join(&part),
                };
                let number = fs::read_to_string(at.join("dev")).unwrap_or_default();
                let mut add = |what: String| {
                    uses.push(DiskUse {
                        disk: part.clone(),
                        what,
                    });
                };
                for point in mount_points(&mounts, number.trim(), &part) {
                    add(format!("mounted at {point}"));
                }
                let device = format!("/dev/{part}");
                if swaps
                    .lines()
                    .any(|line| line.split_whitespace().next() == Some(&device))
                {
                    add("used as swap".into());
                }
                for holder in names(&at.join("holders")) {
                    add(format!("a part of {holder}"));
                }
            }
        }
        uses
    }
}

/// The last part of what a symbolic link names.
fn link_name(link: &Path) -> Option<String> {
    let target = fs::read_link(link).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

/// The names in a directory, in order; none if it cannot be read.
fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// `nvme0n1` for itself, and for `nvme0c3n1`, the path to it through one of several controllers.
fn disk_of(name: &str) -> Option<String> {
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    let (front, namespace) = name.strip_prefix("nvme")?.split_once('n')?;
    let (subsystem, path) = front.split_once('c').unwrap_or((front, "0"));
    (digits(subsystem) && digits(path) && digits(namespace))
        .then(|| format!("nvme{subsystem}n{namespace}"))
}

/// Where a block device is mounted: by its number, or, for file systems with numbers of their own (btrfs), by its name.
fn mount_points(mountinfo: &str, number: &str, name: &str) -> Vec<String> {
    let device = format!("/dev/{name}");
    let mut points: Vec<String> = mountinfo
        .lines()
        .filter_map(|line| {
            let (front, back) = line.split_once(" - ")?;
            let mut fields = front.split(' ').skip(2);
            let (dev, point) = (fields.next()?, fields.nth(1)?);
            let source = back.split(' ').nth(1)?;
            ((!number.is_empty() && dev == number) || source == device).then(|| point.to_owned())
        })
        .collect();
    points.sort();
    points.dedup();
    points
}

#[cfg(test)]
pub(crate) mod testing {
    //! A machine made of files, for tests of what reads sysfs.

    use std::os::unix::fs::symlink;

    use super::*;

    /// A directory that looks like the sysfs, procfs and devfs of a machine.
    pub struct FakeHost {
        pub dir: tempfile::TempDir,
    }

    impl FakeHost {
        pub fn new() -> Self {
            let this = Self {
                dir: tempfile::tempdir().unwrap(),
            };
            for dir in ["sys/bus/pci/devices", "sys/class/block", "sys/class/iommu"] {
                fs::create_dir_all(this.dir.path().join(dir)).unwrap();
            }
            this.write("proc/self/mountinfo", "");
            this.write("proc/swaps", "Filename Type Size Used Priority\n");
            this
        }

        pub fn host(&self) -> Host {
            Host::at(self.dir.path())
        }

        pub fn write(&self, path: &str, text: &str) {
            let path = self.dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        pub fn link(&self, path: &str, target: &str) {
            let path = self.dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let _ = fs::remove_file(&path);
            symlink(target, path).unwrap();
        }

        /// A function with class, driver and group.
        pub fn function(
            &self,
            address: &str,
            class: u32,
            driver: Option<&str>,
            group: Option<u32>,
        ) {
            let at = format!("sys/bus/pci/devices/{address}");
            self.write(&format!("{at}/class"), &format!("0x{class:06x}\n"));
            self.write(&format!("{at}/vendor"), "0x1b36\n");
            self.write(&format!("{at}/device"), "0x0010\n");
            self.write(&format!("{at}/numa_node"), "-1\n");
            self.write(&format!("{at}/driver_override"), "(null)\n");
            if let Some(driver) = driver {
                self.link(
                    &format!("{at}/driver"),
                    &format!("../../../bus/pci/drivers/{driver}"),
                );
            }
            if let Some(group) = group {
                self.link(
                    &format!("{at}/iommu_group"),
                    &format!("../../../kernel/iommu_groups/{group}"),
                );
                self.write(
                    &format!("sys/kernel/iommu_groups/{group}/devices/{address}"),
                    "",
                );
            }
        }

        /// A disk of a function, seen by the kernel's driver.
        pub fn disk(&self, address: &str, disk: &str, number: &str) {
            self.write(
                &format!("sys/bus/pci/devices/{address}/nvme/nvme0/{disk}/x"),
                "",
            );
            let head = disk_of(disk).unwrap();
            self.write(&format!("sys/class/block/{head}/dev"), number);
        }

        pub fn partition(&self, disk: &str, part: &str, number: &str) {
            self.write(&format!("sys/class/block/{disk}/{part}/partition"), "1");
            self.write(&format!("sys/class/block/{disk}/{part}/dev"), number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::FakeHost;
    use super::*;

    fn address(text: &str) -> PciAddress {
        text.parse().unwrap()
    }

    #[test]
    fn addresses_are_read_as_people_and_the_kernel_write_them() {
        let a = address("0000:01:00.0");
        assert_eq!((a.domain, a.bus, a.device, a.function), (0, 1, 0, 0));
        assert_eq!(address("81:1f.7").to_string(), "0000:81:1f.7");
        assert_eq!(address("10000:E1:00.0").to_string(), "10000:e1:00.0");
        for bad in [
            "",
            "0000:01:00",
            "01:00.8",
            "01:20.0",
            "1:0.0",
            "0000:01:00.0 ",
            "0000:01:00.0.0",
            "000g:01:00.0",
            "+000:01:00.0",
            "0:0:00:00.0",
            "123456789:01:00.0",
            "/dev/nvme0",
            "0000:001:00.0",
            "::.",
            "01:00.-1",
        ] {
            let e = bad.parse::<PciAddress>().unwrap_err();
            assert!(e.to_string().contains("0000:01:00.0"), "{bad}");
        }
    }

    #[test]
    fn a_function_is_what_its_files_say() {
        let fake = FakeHost::new();
        let host = fake.host();
        let a = address("0000:01:00.0");
        let missing = host.function(a).unwrap_err();
        assert_eq!(missing.kind(), io::ErrorKind::NotFound);
        fake.function("0000:01:00.0", CLASS_NVME, Some("nvme"), Some(7));
        let f = host.function(a).unwrap();
        assert!(f.is_nvme() && !f.is_on_vfio());
        assert_eq!((f.vendor, f.device), (0x1b36, 0x0010));
        assert_eq!((f.group, f.node, f.driver_override), (Some(7), None, None));
        fake.write("sys/bus/pci/devices/0000:01:00.0/numa_node", "1\n");
        fake.write(
            "sys/bus/pci/devices/0000:01:00.0/driver_override",
            "vfio-pci\n",
        );
        fake.link(
            "sys/bus/pci/devices/0000:01:00.0/driver",
            "../../../../bus/pci/drivers/vfio-pci",
        );
        let f = host.function(a).unwrap();
        assert!(f.is_on_vfio());
        assert_eq!(
            (f.node, f.driver_override.as_deref()),
            (Some(1), Some("vfio-pci"))
        );
        fake.write("sys/bus/pci/devices/0000:01:00.0/class", "no number");
        assert_eq!(
            host.function(a).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
    }

    #[test]
    fn who_blocks_a_group() {
        let fake = FakeHost::new();
        let host = fake.host();
        fake.function("0000:01:00.0", CLASS_NVME, Some("vfio-pci"), Some(3));
        fake.function("0000:00:1c.0", 0x06_0400, Some("pcieport"), Some(3));
        fake.function("0000:01:00.1", CLASS_NVME, None, Some(3));
        fake.function("0000:01:00.2", 0x02_0000, Some("e1000e"), Some(3));
        let members = host.group(3).unwrap();
        let blockers: Vec<_> = members
            .iter()
            .filter(|f| f.blocks_group())
            .map(|f| f.address.to_string())
            .collect();
        assert_eq!(members.len(), 4);
        assert_eq!(blockers, ["0000:01:00.2"]);
        assert!(host.group(4).is_err());
        assert_eq!(host.nvme_controllers().len(), 2);
        assert!(host.has_iommu());
        assert!(!FakeHost::new().host().has_iommu());
    }

    #[test]
    fn uses_of_disks_are_found_by_number_by_name_and_by_holder() {
        let fake = FakeHost::new();
        let host = fake.host();
        let a = address("0000:01:00.0");
        fake.function("0000:01:00.0", CLASS_NVME, Some("nvme"), Some(1));
        assert!(host.disk_uses(a).is_empty());
        fake.disk("0000:01:00.0", "nvme0n1", "259:0\n");
        fake.disk("0000:01:00.0", "nvme0c2n2", "259:4\n");
        fake.write("sys/bus/pci/devices/0000:01:00.0/nvme/nvme0/ng0n1/x", "");
        fake.partition("nvme0n1", "nvme0n1p1", "259:1\n");
        fake.partition("nvme0n1", "nvme0n1p2", "259:2\n");
        assert_eq!(host.disks(a), ["nvme0n1", "nvme0n2"]);
        fake.write(
            "proc/self/mountinfo",
            "20 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
             30 20 259:1 / /srv/a\\040b rw,noatime shared:1 - ext4 /dev/nvme0n1p1 rw\n\
             31 20 0:45 /sub /mnt rw - btrfs /dev/nvme0n2 rw\n\
             32 20 259:11 / /other rw - ext4 /dev/nvme1n1 rw\n\
             broken line\n",
        );
        fake.write(
            "proc/swaps",
            "Filename Type\n/dev/nvme0n1p2 partition 1 0 -2\n",
        );
        fake.write("sys/class/block/nvme0n1/nvme0n1p2/holders/dm-0", "");
        let uses: Vec<_> = host.disk_uses(a).iter().map(ToString::to_string).collect();
        assert_eq!(
            uses,
            [
                "nvme0n1p1 is mounted at /srv/a\\040b",
                "nvme0n1p2 is used as swap",
                "nvme0n1p2 is a part of dm-0",
                "nvme0n2 is mounted at /mnt",
            ]
        );
    }
}
