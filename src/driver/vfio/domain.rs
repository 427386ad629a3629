//! The IOMMU domain of an SSD: which memory it reaches, at which addresses.

#![expect(
    unsafe_code,
    reason = "the fence: addresses of memory are given to the kernel"
)]

use std::fmt;
use std::io;
use std::ops::RangeInclusive;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use vfio_ioctls::{VfioContainer, VfioIommufd, VfioOps};

use super::error::{Limit, LockedMemory};
use super::ioctl::{self, Info};
use crate::driver::pci::{Host, PciAddress};
use crate::driver::{Access, AddressSpace, MapMemoryError, Mapped};
use crate::memory::Region;

/// What an x86 machine surely has, for kernels that do not tell (before 5.4): 39 bits, without the window of interrupts.
const CAREFUL: [RangeInclusive<u64>; 2] = [0..=0xfedf_ffff, 0xfef0_0000..=0x7f_ffff_ffff];

/// The two ways to an IOMMU domain.
#[derive(Clone)]
pub(super) enum Way {
    /// `/dev/vfio/vfio` and a group.
    Container(Arc<VfioContainer>),
    /// `/dev/iommu` and a device's own file.
    Iommufd(Arc<VfioIommufd>),
}

impl Way {
    pub fn ops(&self) -> Arc<dyn VfioOps> {
        match self {
            Self::Container(container) => Arc::clone(container) as _,
            Self::Iommufd(iommufd) => Arc::clone(iommufd) as _,
        }
    }

    fn info(&self) -> io::Result<Info> {
        match self {
            Self::Container(container) => ioctl::info(&**container),
            Self::Iommufd(fd) => ioctl::ioas_info(&**fd.iommufd(), fd.ioas().id()),
        }
    }

    fn unmap(&self, address: u64, bytes: usize) -> Result<(), vfio_ioctls::VfioError> {
        match self {
            Self::Container(container) => container.vfio_dma_unmap(address, bytes),
            Self::Iommufd(fd) => fd.vfio_dma_unmap(address, bytes),
        }
    }
}

/// A way that ends with the device: then nobody's mapping keeps the group from the kernel any more.
#[derive(Clone)]
pub(super) struct Lease(Arc<RwLock<Option<Way>>>);

impl Lease {
    /// Give the domain up, with all its mappings: the device is closed.
    pub fn end(&self) {
        let way = self
            .0
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        drop(way);
    }

    /// The way, which does not end meanwhile.
    fn way(&self) -> RwLockReadGuard<'_, Option<Way>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The domain of one SSD.
pub(super) struct Domain {
    name: PciAddress,
    lease: Lease,
    info: Info,
}

impl Domain {
    /// The domain that an SSD was put into.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn new(name: PciAddress, way: Way) -> io::Result<Arc<Self>> {
        let mut info = way.info()?;
        if info.ranges.is_empty() {
            info.ranges = CAREFUL.to_vec();
        }
        info.granule = info.granule.max(4096);
        let lease = Lease(Arc::new(RwLock::new(Some(way))));
        Ok(Arc::new(Self { name, lease, info }))
    }

    /// For whoever closes the device.
    pub fn lease(&self) -> Lease {
        self.lease.clone()
    }
}

/// For the log: what the domain can do.
impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = self.info.ranges.last().map_or(0, |r| *r.end());
        let bits = u64::BITS - last.leading_zeros();
        write!(
            f,
            "the SSD sees memory through an IOMMU with {bits} address bits"
        )?;
        match self.info.available {
            Some(n) => write!(f, ", {n} mappings free"),
            None => Ok(()),
        }
    }
}

/// A mapping, which ends with it.
struct Shown {
    lease: Lease,
    name: PciAddress,
    address: u64,
    bytes: usize,
    /// The memory stays until the device cannot reach it any more.
    _region: Arc<Region>,
}

impl Drop for Shown {
    fn drop(&mut self) {
        // With the device, its domain and all that was mapped went.
        if let Some(way) = &*self.lease.way()
            && let Err(e) = way.unmap(self.address, self.bytes)
        {
            tracing::error!(
                ssd = %self.name,
                address = format_args!("{:#x}", self.address),
                cause = %e,
                "memory was not taken back from an IOMMU domain"
            );
        }
    }
}

impl AddressSpace for Domain {
    fn ranges(&self) -> Vec<RangeInclusive<u64>> {
        self.info.ranges.clone()
    }

    fn granule(&self) -> u64 {
        self.info.granule
    }

    fn map(
        &self,
        address: u64,
        region: &Arc<Region>,
        access: Access,
    ) -> Result<Mapped, MapMemoryError> {
        let bytes = region.len();
        let refused = |hint: String, source| MapMemoryError {
            what: format!(
                "{}: {} KiB cannot be shown to the SSD at address {address:#x}",
                self.name,
                bytes.div_ceil(1024)
            ),
            hint,
            source,
        };
        let host = region.host();
        fits(&self.info, address, bytes, host.addr() as u64).map_err(|hint| refused(hint, None))?;
        let write = access == Access::ReadWrite;
        let way = self.lease.way();
        let Some(way) = &*way else {
            return Err(refused("the SSD was let go of".into(), None));
        };
        // SAFETY: a region is a shared mapping without references into it, and `Shown` keeps it until it is unmapped.
        let result = unsafe {
            match way {
                Way::Container(container) => ioctl::map(&**container, address, host, bytes, write),
                Way::Iommufd(fd) => {
                    let ioas = fd.ioas().id();
                    ioctl::ioas_map(&**fd.iommufd(), ioas, address, host, bytes, write)
                }
            }
        };
        match result {
            Ok(()) => Ok(Mapped::new(Shown {
                lease: self.lease.clone(),
                name: self.name,
                address,
                bytes: region.len() as usize,
                _region: Arc::clone(region),
            })),
            Err(e) => {
                let hint = match &refusal(&e, bytes) {
                    Some(known) => format!("{known}; {}", known.hint()),
                    None => match e.raw_os_error() {
                        Some(libc::EEXIST) => "other memory is there already".into(),
                        Some(libc::EFAULT) => {
                            "the memory cannot be pinned (no page there, or a file system that does not allow it)".into()
                        }
                        _ => format!("the kernel refused ({e})"),
                    },
                };
                Err(refused(hint, Some(e)))
            }
        }
    }
}

/// Whether memory can be shown at an address at all; if not, why.
fn fits(info: &Info, address: u64, bytes: u64, host: u64) -> Result<(), String> {
    if bytes == 0 || (address | bytes | host) & (info.granule - 1) != 0 {
        return Err(format!(
            "addresses and lengths must be multiples of {} bytes, the IOMMU's smallest page",
            info.granule
        ));
    }
    let last = address.checked_add(bytes - 1);
    let inside =
        |r: &RangeInclusive<u64>| last.is_some_and(|l| r.contains(&address) && r.contains(&l));
    if info.ranges.iter().any(inside) {
        return Ok(());
    }
    let ranges: Vec<_> = info
        .ranges
        .iter()
        .map(|r| format!("{:#x}-{:#x}", r.start(), r.end()))
        .collect();
    Err(format!(
        "the IOMMU reaches {} only; give the guest less memory, or fewer physical address bits",
        ranges.join(", ")
    ))
}

/// An error of mapping that an operator can do something about.
pub(super) fn refusal(error: &io::Error, bytes: u64) -> Option<super::VfioError> {
    match error.raw_os_error() {
        Some(libc::ENOMEM) => Some(super::VfioError::Memlock(LockedMemory {
            wanted: bytes,
            locked: locked(&Host::default()),
            limit: ioctl::memlock_limit(),
        })),
        Some(libc::ENOSPC) => Some(super::VfioError::Mappings {
            limit: Limit(entry_limit(&Host::default())),
        }),
        _ => None,
    }
}

/// Bytes this process has locked.
fn locked(host: &Host) -> Option<u64> {
    let status = host.read("proc/self/status").ok()?;
    let field = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|l| l.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    Some(field("VmLck:")?.saturating_mul(1024))
}

/// How many mappings a domain may have.
pub(crate) fn entry_limit(host: &Host) -> Option<u64> {
    host.read("sys/module/vfio_iommu_type1/parameters/dma_entry_limit")
        .ok()?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_must_fit_the_domain() {
        let info = Info {
            ranges: CAREFUL.to_vec(),
            granule: 4096,
            available: None,
        };
        let ok = |address, bytes| fits(&info, address, bytes, 0x1000).is_ok();
        assert!(ok(0, 0x8000_0000) && ok(1 << 32, 1 << 30) && ok(0x7f_ffff_f000, 4096));
        assert!(!ok(0, 0) && !ok(1, 4096) && !ok(0, 100));
        assert!(!ok(0xfed0_0000, 0x20_0000), "ends inside the hole");
        assert!(!ok(0xfee0_0000, 4096) && !ok(0, 1 << 33), "spans the hole");
        assert!(!ok(0x80_0000_0000, 4096) && !ok(u64::MAX - 4095, 8192));
        let hint = fits(&info, 1 << 40, 4096, 0).unwrap_err();
        assert!(hint.contains("0xfef00000-0x7fffffffff"), "{hint}");
        assert!(
            fits(&info, 0, 4096, 12)
                .unwrap_err()
                .contains("multiples of 4096")
        );
    }

    #[test]
    fn limits_have_messages_with_numbers() {
        let limits = refusal(&io::Error::from_raw_os_error(libc::ENOMEM), 5 << 20).unwrap();
        assert!(limits.to_string().contains("5120 KiB wanted"), "{limits}");
        assert!(locked(&Host::default()).is_some());
        let full = refusal(&io::Error::from_raw_os_error(libc::ENOSPC), 1).unwrap();
        assert!(full.hint().contains("dma_entry_limit"));
        assert!(refusal(&io::Error::from_raw_os_error(libc::EINVAL), 1).is_none());
    }
}
