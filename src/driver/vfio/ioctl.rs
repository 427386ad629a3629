//! The calls to the kernel that the VFIO crate does not make, or makes without telling all of the answer: the fence around them.

#![expect(unsafe_code, reason = "the fence: ioctls with pointers")]

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use iommufd_bindings::{
    IOMMUFD_CMD_IOAS_IOVA_RANGES, IOMMUFD_CMD_IOAS_MAP, IOMMUFD_TYPE, iommu_ioas_iova_ranges,
    iommu_ioas_map, iommu_iova_range, iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE,
};
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_IOMMU_INFO_CAPS,
    VFIO_IOMMU_INFO_PGSIZES, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL,
    VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_TYPE, vfio_iommu_type1_dma_map,
    vfio_iommu_type1_info,
};
use vfio_ioctls::VfioDevice;

const DEVICE_SET_IRQS: libc::c_ulong = number(10);
const DEVICE_RESET: libc::c_ulong = number(11);
const IOMMU_GET_INFO: libc::c_ulong = number(12);
const IOMMU_MAP_DMA: libc::c_ulong = number(13);

/// Bytes of the fixed part of what IOMMU_GET_INFO answers.
const INFO_BYTES: usize = size_of::<vfio_iommu_type1_info>();

/// More than the kernel ever answers.
const MOST_INFO_BYTES: usize = 1 << 20;

const IOAS_IOVA_RANGES: libc::c_ulong =
    (IOMMUFD_TYPE as libc::c_ulong) << 8 | IOMMUFD_CMD_IOAS_IOVA_RANGES as libc::c_ulong;
const IOAS_MAP: libc::c_ulong =
    (IOMMUFD_TYPE as libc::c_ulong) << 8 | IOMMUFD_CMD_IOAS_MAP as libc::c_ulong;

/// More ranges than a platform has holes.
const MOST_RANGES: u32 = 4096;

const fn number(n: u32) -> libc::c_ulong {
    (VFIO_TYPE as libc::c_ulong) << 8 | (VFIO_BASE + n) as libc::c_ulong
}

/// The file of a device.
pub(super) fn file(device: &VfioDevice) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is the device's own, open until it is dropped, which the borrow prevents.
    unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) }
}

/// What an IOMMU domain can do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Info {
    /// Usable device addresses, ascending. Empty: the kernel does not tell.
    pub ranges: Vec<RangeInclusive<u64>>,
    /// Smallest page in bytes.
    pub granule: u64,
    /// Mappings that can still be made, if the kernel tells.
    pub available: Option<u32>,
}

/// Ask a container for its [`Info`].
///
/// # Errors
///
/// What the kernel says.
pub(super) fn info(container: &impl AsRawFd) -> io::Result<Info> {
    let mut bytes = INFO_BYTES;
    loop {
        // Words, for their alignment.
        let mut answer = vec![0u64; bytes.div_ceil(8)];
        answer[0] = (answer.len() * 8) as u64;
        // SAFETY: the kernel writes at most `argsz` (the first 32 bits) bytes, which is the size of the buffer.
        let result =
            unsafe { libc::ioctl(container.as_raw_fd(), IOMMU_GET_INFO, answer.as_mut_ptr()) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        let answer: Vec<u8> = answer.iter().flat_map(|w| w.to_ne_bytes()).collect();
        let wanted = u32_at(&answer, 0).unwrap_or(0) as usize;
        if wanted <= answer.len() || wanted > MOST_INFO_BYTES {
            return Ok(parse_info(&answer));
        }
        bytes = wanted;
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(field.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_ne_bytes(field.try_into().ok()?))
}

/// Read a `vfio_iommu_type1_info` with its chain of capabilities.
fn parse_info(answer: &[u8]) -> Info {
    let mut info = Info {
        granule: 4096,
        ..Info::default()
    };
    let flags = u32_at(answer, 4).unwrap_or(0);
    if flags & VFIO_IOMMU_INFO_PGSIZES != 0
        && let Some(sizes) = u64_at(answer, 8).filter(|sizes| *sizes != 0)
    {
        info.granule = 1 << sizes.trailing_zeros();
    }
    let mut next = match flags & VFIO_IOMMU_INFO_CAPS {
        0 => 0,
        _ => u32_at(answer, 16).unwrap_or(0) as usize,
    };
    // Each capability lies behind the one before it, which bounds the walk.
    let mut before = INFO_BYTES - 1;
    while next > before
        && let Some(header) = u32_at(answer, next)
    {
        match header & 0xffff {
            VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => {
                let count = u32_at(answer, next + 8).unwrap_or(0) as usize;
                for i in 0..count.min(answer.len() / 16) {
                    let at = next + 16 + i * 16;
                    if let (Some(start), Some(end)) = (u64_at(answer, at), u64_at(answer, at + 8))
                        && start < end
                    {
                        info.ranges.push(start..=end);
                    }
                }
            }
            VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => info.available = u32_at(answer, next + 8),
            _ => {}
        }
        before = next;
        next = u32_at(answer, next + 4).unwrap_or(0) as usize;
    }
    info.ranges.sort_by_key(|r| *r.start());
    info
}

/// Show `bytes` bytes at `host` to the devices of a container, at device address `address`.
///
/// # Safety
///
/// `host..host + bytes` must be a shared mapping into which no Rust reference exists, and it must stay until the mapping is taken back or
/// the container is closed.
///
/// # Errors
///
/// What the kernel says.
pub(super) unsafe fn map(
    container: &impl AsRawFd,
    address: u64,
    host: *mut u8,
    bytes: u64,
    write: bool,
) -> io::Result<()> {
    let write = if write { VFIO_DMA_MAP_FLAG_WRITE } else { 0 };
    let map = vfio_iommu_type1_dma_map {
        argsz: size_of::<vfio_iommu_type1_dma_map>() as u32,
        flags: VFIO_DMA_MAP_FLAG_READ | write,
        vaddr: host.addr() as u64,
        iova: address,
        size: bytes,
    };
    // SAFETY: the kernel reads the structure; the caller answers for the memory it names.
    let result = unsafe { libc::ioctl(container.as_raw_fd(), IOMMU_MAP_DMA, &raw const map) };
    check(result).map(drop)
}

/// [`Info`] of an address space of iommufd. The number of its mappings is not limited.
///
/// # Errors
///
/// What the kernel says.
pub(super) fn ioas_info(iommufd: &impl AsRawFd, ioas_id: u32) -> io::Result<Info> {
    let mut room = 16;
    loop {
        let mut ranges = vec![iommu_iova_range::default(); room as usize];
        let mut ask = iommu_ioas_iova_ranges {
            size: size_of::<iommu_ioas_iova_ranges>() as u32,
            ioas_id,
            num_iovas: room,
            __reserved: 0,
            allowed_iovas: ranges.as_mut_ptr().addr() as u64,
            out_iova_alignment: 0,
        };
        // SAFETY: the kernel writes the structure, and at most `num_iovas` ranges, which is how many the list holds.
        let result = unsafe { libc::ioctl(iommufd.as_raw_fd(), IOAS_IOVA_RANGES, &raw mut ask) };
        match check(result) {
            Ok(_) => {
                ranges.truncate(ask.num_iovas as usize);
                ranges.sort_by_key(|r| r.start);
                return Ok(Info {
                    ranges: ranges.iter().map(|r| r.start..=r.last).collect(),
                    granule: ask.out_iova_alignment.max(4096),
                    available: None,
                });
            }
            Err(e)
                if e.raw_os_error() == Some(libc::EMSGSIZE)
                    && (room + 1..=MOST_RANGES).contains(&ask.num_iovas) =>
            {
                room = ask.num_iovas;
            }
            Err(e) => return Err(e),
        }
    }
}

/// Show memory to the devices of an address space of iommufd, as [`map`] does for a container.
///
/// # Safety
///
/// As of [`map`].
///
/// # Errors
///
/// What the kernel says.
pub(super) unsafe fn ioas_map(
    iommufd: &impl AsRawFd,
    ioas_id: u32,
    address: u64,
    host: *mut u8,
    bytes: u64,
    write: bool,
) -> io::Result<()> {
    let mut flags = iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE
        | iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA;
    if write {
        flags |= iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE;
    }
    let mut map = iommu_ioas_map {
        size: size_of::<iommu_ioas_map>() as u32,
        flags,
        ioas_id,
        __reserved: 0,
        user_va: host.addr() as u64,
        length: bytes,
        iova: address,
    };
    // SAFETY: the kernel reads the structure and writes its `iova`; the caller answers for the memory it names.
    let result = unsafe { libc::ioctl(iommufd.as_raw_fd(), IOAS_MAP, &raw mut map) };
    check(result).map(drop)
}

/// Have an interrupt of a device signal eventfds: `fds[i]` for its vector `i`. How many vectors there can be, if not so many: none is on
/// then.
///
/// # Errors
///
/// What the kernel says.
pub(super) fn set_irqs(device: &impl AsRawFd, index: u32, fds: &[RawFd]) -> io::Result<u32> {
    let bytes = (5 + fds.len()) * 4;
    let header = [
        u32::try_from(bytes).map_err(io::Error::other)?,
        VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
        index,
        0,
        u32::try_from(fds.len()).map_err(io::Error::other)?,
    ];
    let mut set = header.to_vec();
    set.extend(fds.iter().map(|fd| fd.cast_unsigned()));
    // SAFETY: the kernel reads `argsz` bytes, the size of the buffer.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), DEVICE_SET_IRQS, set.as_ptr()) };
    match check(result)? {
        0 => Ok(header[4]),
        n => Ok(n),
    }
}

/// Reset a device by the means of its bus. Whether it has such means.
///
/// # Errors
///
/// What the kernel says.
pub(super) fn reset(device: &impl AsRawFd) -> io::Result<bool> {
    // SAFETY: no pointer is passed.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), DEVICE_RESET) };
    match check(result) {
        Ok(_) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY)) => Ok(false),
        Err(e) => Err(e),
    }
}

fn check(result: libc::c_int) -> io::Result<u32> {
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// How many bytes this process may lock; `None`: as many as it likes.
pub(crate) fn memlock_limit() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Memlock).current
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(flags: u32, sizes: u64, first: u32, rest: &[u32]) -> Vec<u8> {
        let mut words = vec![0, flags];
        words.extend([sizes as u32, (sizes >> 32) as u32, first, 0]);
        words.extend(rest);
        words.iter().flat_map(|w| w.to_ne_bytes()).collect()
    }

    #[test]
    fn the_answer_of_an_intel_iommu_is_understood() {
        let rest = [
            // IOVA ranges at 24: two of them.
            1 | 1 << 16,
            72,
            2,
            0,
            0,
            0,
            0xfedf_ffff,
            0,
            0xfef0_0000,
            0,
            0xffff_ffff,
            0x7f,
            // Mappings left, at 72.
            3 | 1 << 16,
            0,
            65534,
        ];
        let info = parse_info(&answer(3, 0x4020_1000, 24, &rest));
        assert_eq!(info.granule, 4096);
        assert_eq!(info.ranges, [0..=0xfedf_ffff, 0xfef0_0000..=0x7f_ffff_ffff]);
        assert_eq!(info.available, Some(65534));
    }

    #[test]
    fn nonsense_ends() {
        // No capabilities; one that is its own successor; one that leads back; lengths that lead out.
        assert_eq!(
            parse_info(&answer(1, 0x1_0000, 24, &[1, 2])).granule,
            0x1_0000
        );
        for first in [0, 8, 24, 28, 1000, u32::MAX] {
            for next in [24, 8, 40, u32::MAX] {
                let info = parse_info(&answer(3, 0, first, &[1, next, u32::MAX, 0, 5, 0, 4, 0]));
                assert!(info.ranges.iter().all(|r| r.start() < r.end()));
            }
        }
        parse_info(&[]);
        parse_info(&[3; 23]);
    }
}
