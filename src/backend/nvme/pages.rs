//! The pages of a guest's transfer, each looked at before a device sees it.

use nvme_spec::Status;
use nvme_spec::prp::{self, PageSize, ReadList};

use crate::backend::GuestData;
use crate::memory::GuestMap;

/// Memory page size of both sides: CC.MPS is always 0.
pub(super) const PAGE: PageSize = PageSize::K4;

/// PRP lists of a guest.
struct Lists<'a>(&'a GuestMap);

impl ReadList for Lists<'_> {
    fn read(&mut self, addr: u64, entries: &mut [u64]) -> Result<(), Status> {
        let bytes = zerocopy::IntoBytes::as_mut_bytes(entries);
        match self.0.read(addr, bytes) {
            true => Ok(()),
            false => Err(Status::DATA_TRANSFER_ERROR),
        }
    }
}

/// Whether all of it is the guest's memory.
pub(super) fn is_guest(map: &GuestMap, gpa: u64, len: u32) -> bool {
    let (mut at, mut left) = (gpa, len as usize);
    while left > 0 {
        let Some(seg) = map.resolve(at, left) else {
            return false;
        };
        left -= seg.len();
        let Some(next) = at.checked_add(seg.len() as u64) else {
            return left == 0;
        };
        at = next;
    }
    true
}

/// Read the PRPs of a transfer into `pages`, as guest addresses of whole pages; returns the offset into the first. Lists are read once,
/// into our own memory.
///
/// # Errors
///
/// [`Status::INVALID_PRP_OFFSET`] for a PRP with a wrong offset, [`Status::DATA_TRANSFER_ERROR`] for one that is not the guest's memory.
pub(super) fn read(guest: &GuestData<'_>, pages: &mut Vec<u64>) -> Result<u32, Status> {
    pages.clear();
    let map: &GuestMap = guest.map;
    let offset = PAGE.offset(guest.prp1);
    prp::walk(
        PAGE,
        guest.prp1,
        guest.prp2,
        guest.bytes,
        &mut Lists(map),
        &mut |segment| {
            if !is_guest(map, segment.addr, segment.len) {
                return Err(Status::DATA_TRANSFER_ERROR);
            }
            let first = segment.addr - u64::from(PAGE.offset(segment.addr));
            let end = u64::from(PAGE.offset(segment.addr)) + u64::from(segment.len);
            let count = end.div_ceil(u64::from(PAGE.bytes()));
            // No address wraps: all of it is memory.
            pages.extend((0..count).map(|i| first + i * u64::from(PAGE.bytes())));
            Ok(())
        },
    )?;
    Ok(offset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::test_memory;

    #[test]
    fn pages_come_in_order_and_only_from_the_guest() {
        let map = test_memory(0x10000);
        let list: [u64; 3] = [0x5000, 0x3000, 0x4000];
        assert!(map.write(0x8008, zerocopy::IntoBytes::as_bytes(&list)));
        let mut pages = Vec::new();
        let mut ask = |prp1, prp2, bytes| {
            let guest = GuestData {
                prp1,
                prp2,
                bytes,
                cdw12: 0,
                cdw13: 0,
                map: &map,
            };
            read(&guest, &mut pages).map(|offset| (offset, pages.clone()))
        };
        assert_eq!(ask(0x1000, 0, 4096), Ok((0, vec![0x1000])));
        assert_eq!(ask(0x1200, 0x9999, 512), Ok((0x200, vec![0x1000])));
        assert_eq!(ask(0x1e00, 0x2000, 1024), Ok((0xe00, vec![0x1000, 0x2000])));
        let all = vec![0x1000, 0x5000, 0x3000, 0x4000];
        assert_eq!(ask(0x1000, 0x8008, 16384), Ok((0, all.clone())));
        assert_eq!(ask(0x1800, 0x8008, 14336), Ok((0x800, all)));
        let transfer = Err(Status::DATA_TRANSFER_ERROR);
        assert_eq!(ask(0x10000, 0, 512), transfer, "no memory");
        assert_eq!(ask(0xf000, 0x10000, 8192), transfer);
        assert_eq!(ask(u64::MAX - 3, 0, 512), transfer);
        assert_eq!(ask(0x1001, 0, 512), Err(Status::INVALID_PRP_OFFSET));
        assert_eq!(ask(0x1000, 0x2010, 8192), Err(Status::INVALID_PRP_OFFSET));
        assert!(map.write(0x8010, &0xffff_0000u64.to_le_bytes()));
        assert_eq!(ask(0x1000, 0x8008, 16384), transfer, "an entry elsewhere");
    }
}
