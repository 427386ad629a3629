//! Why an SSD cannot be had through VFIO, each with its way out and an exit status of its own.

use std::io;

use crate::driver::pci::{DiskUse, PciAddress, PciFunction};

/// Why an SSD could not be opened. `docs/SSD.md` has the table of them.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// There is no such function.
    #[error("there is no PCI device {address}")]
    NoDevice {
        /// What was asked for.
        address: PciAddress,
        /// NVMe controllers there are.
        others: Vec<PciAddress>,
    },
    /// It is something else.
    #[error("{address} is no NVMe controller (its class is {class:06x})")]
    NotNvme {
        /// What was asked for.
        address: PciAddress,
        /// Its class code.
        class: u32,
    },
    /// The function is in no IOMMU group.
    #[error(
        "{address} is behind no IOMMU: nothing would keep the SSD inside the memory it is shown"
    )]
    NoIommu {
        /// What was asked for.
        address: PciAddress,
        /// Whether other devices of the machine are.
        elsewhere: bool,
    },
    /// The host uses the SSD's disks.
    #[error("{address} is in use by this host: {}", list(.uses))]
    Mounted {
        /// What was asked for.
        address: PciAddress,
        /// Their uses.
        uses: Vec<DiskUse>,
    },
    /// Another driver has it, or none.
    #[error("{address} is bound to {}, not to vfio-pci", .driver.as_deref().map_or("no driver".into(), |d| format!("the driver {d}")))]
    NotBound {
        /// What was asked for.
        address: PciAddress,
        /// Who has it.
        driver: Option<String>,
    },
    /// Others of its group are in use by the host.
    #[error("{address} cannot be separated from other devices: of its IOMMU group {group}, {}", in_the_way(.blockers))]
    GroupNotViable {
        /// What was asked for.
        address: PciAddress,
        /// The group.
        group: u32,
        /// Who is in the way; empty if that cannot be told.
        blockers: Vec<PciFunction>,
    },
    /// The kernel lacks VFIO.
    #[error("this kernel offers no VFIO ({what})")]
    NoVfio {
        /// What is missing.
        what: String,
        /// The cause.
        source: io::Error,
    },
    /// A file may not be opened.
    #[error("no permission to open {path}, which {address} is used through")]
    NoPermission {
        /// What was asked for.
        address: PciAddress,
        /// Which file.
        path: String,
        /// The cause.
        source: io::Error,
    },
    /// Another process, or another part of this one, has it.
    #[error("{address} is in use by another process ({path} is busy)")]
    Busy {
        /// What was asked for.
        address: PciAddress,
        /// Which file.
        path: String,
        /// The cause.
        source: io::Error,
    },
    /// The platform does not isolate interrupts.
    #[error("the IOMMU of {address} does not remap interrupts, so the kernel refuses it")]
    UnsafeInterrupts {
        /// What was asked for.
        address: PciAddress,
        /// The cause.
        source: io::Error,
    },
    /// Locked memory is limited.
    #[error("{0}")]
    Memlock(LockedMemory),
    /// The kernel's number of DMA mappings is limited.
    #[error("no DMA mapping left: vfio_iommu_type1 allows {limit} of them for each SSD")]
    Mappings {
        /// `dma_entry_limit`, if it can be read.
        limit: Limit,
    },
    /// File descriptors ran out.
    #[error("out of file descriptors while opening {address} (it takes about {needed})")]
    Descriptors {
        /// What was asked for.
        address: PciAddress,
        /// For files and interrupt vectors.
        needed: usize,
        /// The cause.
        source: io::Error,
    },
    /// The device is not as an NVMe controller must be.
    #[error("{address} cannot be driven: {what}")]
    Unusable {
        /// What was asked for.
        address: PciAddress,
        /// What is wrong with it.
        what: String,
    },
    /// Anything else the kernel refused.
    #[error("{address}: {what}: {source}")]
    Kernel {
        /// What was asked for.
        address: PciAddress,
        /// What was tried.
        what: &'static str,
        /// The cause.
        source: io::Error,
    },
}

/// A number, or that it is not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit(pub Option<u64>);

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(n) => write!(f, "{n}"),
            None => f.write_str("only so many"),
        }
    }
}

/// Memory that may not be locked, and why not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the limit of locked memory is too small: {} KiB wanted, {} in use, {} allowed",
    .wanted.div_ceil(1024), kib(*.locked), kib(*.limit)
)]
pub struct LockedMemory {
    /// Bytes that were to be mapped.
    pub wanted: u64,
    /// Bytes locked already, if known.
    pub locked: Option<u64>,
    /// The limit in bytes; `None`: there is none, and memory ran out.
    pub limit: Option<u64>,
}

fn kib(bytes: Option<u64>) -> String {
    bytes.map_or("unlimited".into(), |b| format!("{} KiB", b / 1024))
}

fn list(uses: &[DiskUse]) -> String {
    let all: Vec<_> = uses.iter().map(ToString::to_string).collect();
    all.join(", ")
}

fn in_the_way(list: &[PciFunction]) -> String {
    if list.is_empty() {
        return "a device is in use by the host".into();
    }
    let name = |f: &PciFunction| {
        let driver = f.driver.as_deref().unwrap_or("none");
        format!("{} is bound to {driver}", f.address)
    };
    list.iter().map(name).collect::<Vec<_>>().join(", ")
}

impl VfioError {
    /// What the operator can do about it.
    pub fn hint(&self) -> String {
        match self {
            Self::NoDevice { others, .. } if others.is_empty() => {
                "lspci -D lists the devices; this machine has no NVMe controller".into()
            }
            Self::NoDevice { others, .. } => {
                let others: Vec<_> = others.iter().map(ToString::to_string).collect();
                format!("NVMe controllers of this machine: {}", others.join(", "))
            }
            Self::NotNvme { .. } => {
                "name an NVMe controller; lspci -D | grep 'Non-Volatile' lists them".into()
            }
            Self::NoIommu {
                elsewhere: false, ..
            } => "switch the IOMMU on in the firmware, and in the kernel with intel_iommu=on (Intel) or amd_iommu=on (AMD)".into(),
            Self::NoIommu { .. } => {
                "use an SSD in another slot: the IOMMU of this machine does not cover this one".into()
            }
            Self::Mounted { .. } => "unmount it, swapoff it, or take it out of its RAID or volume group first".into(),
            Self::NotBound { address, .. } => {
                format!("scripts/setup-host nvme {address} --apply gives it to vfio-pci")
            }
            Self::GroupNotViable { .. } => {
                "give the whole group to vfio-pci, or put the SSD into a slot with a group of its own".into()
            }
            Self::NoVfio { .. } => "modprobe vfio-pci (the kernel needs CONFIG_VFIO_PCI and CONFIG_VFIO_IOMMU_TYPE1)".into(),
            Self::NoPermission { address, .. } => {
                format!("run as root, or: scripts/setup-host nvme {address} --user NAME --apply")
            }
            Self::Busy { .. } => {
                "end the process that has it (fuser -v on that file names it); SSDs of one IOMMU group cannot be used one by one".into()
            }
            Self::UnsafeInterrupts { .. } => {
                "switch interrupt remapping (x2APIC, VT-d interrupt remapping) on in the firmware; only if all guests are trusted: modprobe vfio_iommu_type1 allow_unsafe_interrupts=1".into()
            }
            Self::Memlock(LockedMemory { limit: None, .. }) => {
                "the host is out of memory that can be pinned; give the guests less, or free some".into()
            }
            Self::Memlock(_) => {
                "raise it to the memory of all guests of this SSD and 64 MiB: ulimit -l, limits.conf (memlock), or LimitMEMLOCK= of the service".into()
            }
            Self::Mappings { .. } => {
                "modprobe vfio_iommu_type1 dma_entry_limit=N, or write N to /sys/module/vfio_iommu_type1/parameters/dma_entry_limit before the daemon starts".into()
            }
            Self::Descriptors { .. } => "raise the limit of open files (ulimit -n)".into(),
            Self::Unusable { .. } => "look at the kernel's log (dmesg) for this address; a cold boot may bring the SSD back".into(),
            Self::Kernel { .. } => "look at the kernel's log (dmesg) for this address".into(),
        }
    }

    /// The exit status of a program that ends because of this.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::NoDevice { .. } => 20,
            Self::NotNvme { .. } => 21,
            Self::NoIommu { .. } => 22,
            Self::Mounted { .. } => 23,
            Self::NotBound { .. } => 24,
            Self::GroupNotViable { .. } => 25,
            Self::NoVfio { .. } => 26,
            Self::NoPermission { .. } => 27,
            Self::Busy { .. } => 28,
            Self::UnsafeInterrupts { .. } => 29,
            Self::Memlock(_) => 30,
            Self::Mappings { .. } => 31,
            Self::Descriptors { .. } => 32,
            Self::Unusable { .. } => 33,
            Self::Kernel { .. } => 34,
        }
    }
}
