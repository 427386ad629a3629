//! An SSD behind VFIO, as the driver wants a device.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use nvme_spec::regs::{Cc, Csts, offset};
use rustix::event::{EventfdFlags, eventfd};
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_ERR_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX, VFIO_REGION_INFO_FLAG_MMAP,
};
use vfio_ioctls::{VfioDevice, VfioRegionInfoCap};

use super::bar::{Bar, Doorbell};
use super::domain::{Domain, Lease};
use super::ioctl;
use crate::driver::pci::PciAddress;
use crate::driver::{Access, Device, Dma, Pools};

/// Offset of revision and class code in configuration space. (Vendor and device come from VFIO's memory, not from the device.)
const CLASS: u64 = 8;
/// What they read as where there is no function.
const NOBODY: u32 = u32::MAX;
/// Offset of the command register in configuration space.
const COMMAND: u64 = 4;
/// In it: the device answers to its memory BARs.
const MEMORY_SPACE: u16 = 1 << 1;
/// In it: the device may access memory.
const BUS_MASTER: u16 = 1 << 2;

/// What configuration space of a device that is not there reads as; none that is has all bits set.
const ABSENT: u16 = 0xffff;

/// First doorbell in BAR0, and the least size of one that has any.
const DOORBELLS: u64 = 0x1000;

/// The most of a BAR0 that is mapped: doorbells of all queues at the widest stride.
const MOST_BAR: u64 = 256 << 20;

/// The opened device file, and what ends with it.
pub(super) struct Handle {
    device: Option<VfioDevice>,
    /// The same file once more.
    hold: Option<OwnedFd>,
    lease: Lease,
}

impl Handle {
    /// # Errors
    ///
    /// File descriptors ran out.
    fn new(device: VfioDevice, lease: Lease) -> io::Result<Self> {
        let hold = ioctl::file(&device).try_clone_to_owned()?;
        Ok(Self {
            device: Some(device),
            hold: Some(hold),
            lease,
        })
    }

    fn device(&self) -> io::Result<&VfioDevice> {
        self.device
            .as_ref()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Whether anything answers in configuration space. A kernel that resets a function that has been pulled waits for it for more than a
    /// minute, and whoever asked waits with it.
    fn answers(&self) -> io::Result<bool> {
        let mut bytes = NOBODY.to_le_bytes();
        self.device()?
            .region_read(VFIO_PCI_CONFIG_REGION_INDEX, &mut bytes, CLASS);
        Ok(u32::from_le_bytes(bytes) != NOBODY)
    }

    /// Set and clear bits of the command register.
    fn command(&self, set: u16, clear: u16) -> io::Result<()> {
        let device = self.device()?;
        // Not by the library, which keeps errors to itself.
        let file = ioctl::file(device);
        let at = device.get_region_offset(VFIO_PCI_CONFIG_REGION_INDEX) + COMMAND;
        let read = || -> io::Result<u16> {
            let mut bytes = [0; 2];
            match rustix::io::pread(file, &mut bytes, at)? {
                2 => Ok(u16::from_le_bytes(bytes)),
                _ => Err(io::ErrorKind::UnexpectedEof.into()),
            }
        };
        let before = read()?;
        if before == ABSENT && set == 0 {
            return Ok(());
        }
        rustix::io::pwrite(file, &(before & !clear | set).to_le_bytes(), at)?;
        match read()? {
            ABSENT => Err(io::ErrorKind::NotConnected.into()),
            after if after & (set | clear) == set => Ok(()),
            _ => Err(io::Error::other(
                "the PCI command register does not take what is written to it",
            )),
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // When the library closes a device, it looks its group up in sysfs, and panics if the device has been pulled by then. The kernel
        // does not take a device away while its file is open, as it is until the library is done. (It fails to detach the group, for the
        // same reason, and says so to a log that is off: the group is detached when the lease ends.)
        drop(self.device.take());
        drop(self.hold.take());
        self.lease.end();
    }
}

/// An SSD.
pub(super) struct VfioSsd {
    name: PciAddress,
    bar: Arc<Bar>,
    /// Before `pools`: when it is closed, the device reaches no memory any more.
    handle: Handle,
    pools: Pools,
    vectors: Vec<OwnedFd>,
    /// Signalled when the device is to be let go of.
    removal: Arc<OwnedFd>,
    errors: BusErrors,
}

/// Errors of the device that the bus reports. To the driver they are errors of the controller: a reset mends it, or shows that nothing
/// does.
#[derive(Default)]
struct BusErrors {
    /// Signalled for each; devices that are not on PCI Express have none.
    told: Option<OwnedFd>,
    /// There was one since the controller was last disabled.
    failed: bool,
}

impl BusErrors {
    /// Whether one was told since the last look.
    fn look(&mut self) -> bool {
        let new = self
            .told
            .as_ref()
            .is_some_and(|fd| matches!(rustix::io::read(fd, &mut [0; 8]), Ok(8)));
        self.failed |= new;
        new
    }

    /// CSTS as the driver sees it.
    fn status(&self, value: u32) -> u32 {
        match self.failed {
            true => Csts::from_bits(value).with_cfs(true).into_bits(),
            false => value,
        }
    }

    /// The controller was disabled, or reset: what was before is done with.
    fn forget(&mut self) {
        self.look();
        self.failed = false;
    }
}

impl VfioSsd {
    /// Make a device of an opened one: reset it, map its registers, let it master the bus, take its interrupts.
    ///
    /// # Errors
    ///
    /// What is wrong with it, or what the kernel says.
    pub fn new(
        name: PciAddress,
        device: VfioDevice,
        domain: &Arc<Domain>,
        most_vectors: u16,
    ) -> Result<Self, Trouble> {
        let nonblocking = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let new_eventfd =
            || eventfd(0, nonblocking).map_err(|e| Trouble::kernel("making an eventfd")(e.into()));
        let removal = Arc::new(new_eventfd()?);
        let reset = ioctl::reset(&device);
        let handle =
            Handle::new(device, domain.lease()).map_err(Trouble::kernel("opening its file"))?;
        match reset {
            Ok(true) => {}
            Ok(false) => tracing::debug!(ssd = %name, "no reset by way of the bus"),
            // The driver brings it up from any state.
            Err(cause) => tracing::warn!(ssd = %name, %cause, "the SSD was not reset at opening"),
        }
        let device = handle.device().map_err(Trouble::kernel("opening"))?;
        let bytes = mappable(device)?;
        let bar = Bar::map(
            &ioctl::file(device),
            device.get_region_offset(VFIO_PCI_BAR0_REGION_INDEX),
            bytes,
            Arc::clone(&removal),
        )
        .map_err(Trouble::kernel("mapping BAR0"))?;
        handle
            .command(MEMORY_SPACE | BUS_MASTER, 0)
            .map_err(Trouble::kernel("making the SSD a bus master"))?;

        let count = |index| device.get_irq_info(index).map_or(0, |irq| irq.count);
        if count(VFIO_PCI_REQ_IRQ_INDEX) > 0 {
            ioctl::set_irqs(device, VFIO_PCI_REQ_IRQ_INDEX, &[removal.as_raw_fd()])
                .map_err(Trouble::kernel("asking to be told of removal"))?;
        }
        let mut errors = BusErrors::default();
        if count(VFIO_PCI_ERR_IRQ_INDEX) > 0 {
            let fd = new_eventfd()?;
            match ioctl::set_irqs(device, VFIO_PCI_ERR_IRQ_INDEX, &[fd.as_raw_fd()]) {
                Ok(_) => errors.told = Some(fd),
                Err(cause) => tracing::debug!(ssd = %name, %cause, "bus errors are not told"),
            }
        }
        let mut vectors = Vec::new();
        for _ in 0..count(VFIO_PCI_MSIX_IRQ_INDEX).min(most_vectors.into()) {
            vectors.push(new_eventfd()?);
        }
        enable_vectors(device, &mut vectors).map_err(Trouble::kernel("enabling MSI-X"))?;
        let mut pools = Pools::new(Arc::clone(domain) as _);
        // The first pieces of memory, to be told of limits here and not in the midst of things.
        for access in [Access::ReadOnly, Access::ReadWrite] {
            pools.allocate(1, access).map_err(Trouble::Memory)?;
        }
        let this = Self {
            name,
            bar,
            handle,
            pools,
            vectors,
            removal,
            errors,
        };
        if this.bar.read(offset::CAP.into()).unwrap_or(u32::MAX) == u32::MAX {
            return Err(Trouble::Unusable(
                "its registers read as all ones: it does not answer".into(),
            ));
        }
        tracing::debug!(
            ssd = %name,
            bar0_bytes = bytes,
            vectors = this.vectors.len(),
            "opened through VFIO"
        );
        Ok(this)
    }
}

/// Why a device cannot be used.
pub(super) enum Trouble {
    Unusable(String),
    Memory(io::Error),
    Kernel(&'static str, io::Error),
}

impl Trouble {
    pub fn kernel(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |e| Self::Kernel(what, e)
    }
}

/// How many bytes of BAR0 can be mapped from its beginning on.
fn mappable(device: &VfioDevice) -> Result<usize, Trouble> {
    let size = device.get_region_size(VFIO_PCI_BAR0_REGION_INDEX);
    let flags = device.get_region_flags(VFIO_PCI_BAR0_REGION_INDEX);
    if flags & VFIO_REGION_INFO_FLAG_MMAP == 0 {
        return Err(Trouble::Unusable("its BAR0 cannot be mapped".into()));
    }
    let caps = device.get_region_caps(VFIO_PCI_BAR0_REGION_INDEX);
    first_run(size, &caps).ok_or_else(|| {
        Trouble::Unusable(format!(
            "of its BAR0 of {size} bytes, the registers and doorbells cannot be mapped"
        ))
    })
}

/// The run of bytes at the beginning of a region that may be mapped: all of it, unless the kernel keeps the MSI-X table to itself.
fn first_run(size: u64, caps: &[VfioRegionInfoCap]) -> Option<usize> {
    let mut run = size;
    for cap in caps {
        if let VfioRegionInfoCap::SparseMmap(sparse) = cap {
            let mut areas = sparse.areas.clone();
            areas.sort_by_key(|a| a.offset);
            run = 0;
            for area in areas {
                if area.offset <= run {
                    run = run.max(area.offset.saturating_add(area.size));
                }
            }
            run = run.min(size);
        }
    }
    let run = run.min(MOST_BAR) & !0xfff;
    usize::try_from(run).ok().filter(|_| run > DOORBELLS)
}

/// Turn on as many MSI-X vectors as there are eventfds, or as many as the platform has left; the rest is dropped.
fn enable_vectors(device: &VfioDevice, vectors: &mut Vec<OwnedFd>) -> io::Result<()> {
    while !vectors.is_empty() {
        let fds: Vec<_> = vectors.iter().map(AsRawFd::as_raw_fd).collect();
        match ioctl::set_irqs(device, VFIO_PCI_MSIX_IRQ_INDEX, &fds) {
            Ok(n) if n as usize == fds.len() => break,
            // None is on then.
            Ok(n) => vectors.truncate((n as usize).min(fds.len() - 1)),
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => vectors.truncate(fds.len() / 2),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

impl Device for VfioSsd {
    type Bell = Doorbell;

    fn read32(&mut self, at: u32) -> io::Result<u32> {
        let value = self.bar.read(at.into())?;
        if at != offset::CSTS || value == u32::MAX {
            return Ok(value);
        }
        if self.errors.look() {
            tracing::error!(ssd = %self.name, "the PCI bus reports an error of the SSD; it will be reset");
        }
        Ok(self.errors.status(value))
    }

    fn read64(&mut self, at: u32) -> io::Result<u64> {
        // In halves: not every way to a device takes 64 bits at once.
        let low = self.bar.read(at.into())?;
        let high = self.bar.read(u64::from(at) + 4)?;
        Ok(u64::from(high) << 32 | u64::from(low))
    }

    fn write32(&mut self, at: u32, value: u32) -> io::Result<()> {
        if at == offset::CC && !Cc::from_bits(value).en() {
            self.errors.forget();
        }
        self.bar.write(at.into(), value)
    }

    fn write64(&mut self, at: u32, value: u64) -> io::Result<()> {
        self.bar.write(at.into(), value as u32)?;
        self.bar.write(u64::from(at) + 4, (value >> 32) as u32)
    }

    fn doorbell(&mut self, at: u64) -> io::Result<Doorbell> {
        let at = at
            .checked_add(DOORBELLS)
            .ok_or(io::ErrorKind::InvalidInput)?;
        self.bar.doorbell(at)
    }

    fn allocate(&mut self, bytes: usize, access: Access) -> io::Result<Dma> {
        self.pools.allocate(bytes, access)
    }

    fn interrupt(&mut self, vector: u16) -> io::Result<Option<File>> {
        let fd = self.vectors.get(usize::from(vector));
        fd.map(|fd| Ok(fd.try_clone()?.into())).transpose()
    }

    fn hard_reset(&mut self) -> io::Result<bool> {
        if !self.handle.answers()? {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "nothing answers at its place on the bus",
            ));
        }
        let done = ioctl::reset(self.handle.device()?)?;
        if done {
            self.errors.forget();
            // The kernel restores configuration space; this one bit decides whether anything works.
            self.handle.command(MEMORY_SPACE | BUS_MASTER, 0)?;
        }
        Ok(done)
    }

    fn isolate(&mut self) -> io::Result<()> {
        self.handle.command(0, BUS_MASTER)
    }

    fn removal(&mut self) -> io::Result<Option<File>> {
        Ok(Some(self.removal.try_clone()?.into()))
    }
}

impl Drop for VfioSsd {
    fn drop(&mut self) {
        // Doorbells of it may be in other hands still; they must not keep the kernel from taking the device back.
        if let Err(cause) = self.bar.let_go() {
            tracing::error!(ssd = %self.name, %cause, "the registers of an SSD stay mapped");
        }
    }
}

#[cfg(test)]
mod tests {
    use vfio_ioctls::{VfioRegionInfoCapSparseMmap, VfioRegionSparseMmapArea};

    use super::*;

    #[test]
    fn what_may_be_mapped_of_a_bar() {
        let sparse = |areas: &[(u64, u64)]| {
            let areas = areas
                .iter()
                .map(|&(offset, size)| VfioRegionSparseMmapArea { offset, size })
                .collect();
            [VfioRegionInfoCap::SparseMmap(VfioRegionInfoCapSparseMmap {
                areas,
            })]
        };
        assert_eq!(first_run(0x4000, &[]), Some(0x4000));
        assert_eq!(
            first_run(0x4000, &[VfioRegionInfoCap::MsixMappable]),
            Some(0x4000)
        );
        assert_eq!(first_run(0x1000, &[]), None, "no doorbell");
        assert_eq!(first_run(0, &[]), None);
        assert_eq!(first_run(u64::MAX, &[]), Some(MOST_BAR as usize));
        // The table is at 0x2000.
        assert_eq!(
            first_run(0x4000, &sparse(&[(0x3000, 0x1000), (0, 0x2000)])),
            Some(0x2000)
        );
        assert_eq!(first_run(0x4000, &sparse(&[(0x1000, 0x3000)])), None);
        assert_eq!(first_run(0x4000, &sparse(&[(0, u64::MAX)])), Some(0x4000));
        assert_eq!(first_run(0x4000, &sparse(&[])), None);
    }

    #[test]
    fn an_error_of_the_bus_is_a_fatal_status_until_the_controller_is_disabled() {
        let fd = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        let tell = fd.try_clone().unwrap();
        let mut errors = BusErrors {
            told: Some(fd),
            failed: false,
        };
        assert!(!errors.look());
        assert_eq!(errors.status(1), 1);
        rustix::io::write(&tell, &1u64.to_ne_bytes()).unwrap();
        assert!(errors.look() && !errors.look());
        assert!(Csts::from_bits(errors.status(1)).cfs());
        rustix::io::write(&tell, &1u64.to_ne_bytes()).unwrap();
        errors.forget();
        assert!(!errors.look());
        assert_eq!(errors.status(1), 1);
        assert!(!BusErrors::default().look());
    }
}
