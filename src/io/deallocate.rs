//! The ranges of a Dataset Management command.

use nvme_spec::{Sqe, Status};

use super::parse::in_range;
use super::segments::walk_data;
use crate::backend::BlockRange;
use crate::memory::GuestMap;

/// Most ranges a command can have (NVM Command Set, Dataset Management, NR).
pub const MAX_RANGES: usize = 256;

/// Bytes of a range definition: context attributes, length in blocks, starting LBA.
const RANGE_BYTES: usize = 16;

/// Copy a command's ranges in, once, and check all of them against a namespace of `size` blocks. Empty ranges are left out.
///
/// # Errors
///
/// As [`resolve`](super::resolve) and [`resolve_sgl`](super::resolve_sgl); [`Status::LBA_OUT_OF_RANGE`] if any range is.
pub fn read_ranges(
    map: &GuestMap,
    sqe: &Sqe,
    count: u32,
    size: u64,
    out: &mut Vec<BlockRange>,
) -> Result<(), Status> {
    let mut bytes = [0u8; MAX_RANGES * RANGE_BYTES];
    let count = (count as usize).min(MAX_RANGES);
    let bytes = &mut bytes[..count * RANGE_BYTES];
    let mut done = 0;
    walk_data(map, sqe, bytes.len() as u32, |segment| {
        let end = done + segment.len as usize;
        let piece = bytes.get_mut(done..end).ok_or(Status::INTERNAL_ERROR)?;
        done = end;
        match map.read(segment.addr, piece) {
            true => Ok(()),
            false => Err(Status::DATA_TRANSFER_ERROR),
        }
    })?;
    out.clear();
    for range in bytes.chunks_exact(RANGE_BYTES) {
        let (Some(blocks), Some(slba)) = (range[4..].first_chunk(), range[8..].first_chunk())
        else {
            continue;
        };
        let range = BlockRange {
            slba: u64::from_le_bytes(*slba),
            blocks: u32::from_le_bytes(*blocks),
        };
        if range.blocks == 0 {
            continue;
        }
        if !in_range(range.slba, range.blocks, size) {
            return Err(Status::LBA_OUT_OF_RANGE);
        }
        out.push(range);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::test_memory;

    fn dsm(prp1: u64, prp2: u64) -> Sqe {
        Sqe {
            prp1,
            prp2,
            ..Sqe::default()
        }
    }

    fn put(map: &GuestMap, gpa: u64, blocks: u32, slba: u64) {
        assert!(
            map.write(gpa + 4, &blocks.to_le_bytes()) && map.write(gpa + 8, &slba.to_le_bytes())
        );
    }

    #[test]
    fn ranges_are_read_over_a_page_end_and_checked() {
        let map = test_memory(0x10000);
        let mut out = Vec::new();
        // Two ranges: the first at the end of a page, the second at the start of another one.
        put(&map, 0x1ff0, 8, 100);
        put(&map, 0x5000, 0, u64::MAX);
        read_ranges(&map, &dsm(0x1ff0, 0x5000), 2, 1000, &mut out).unwrap();
        assert_eq!(
            out,
            [BlockRange {
                slba: 100,
                blocks: 8
            }],
            "an empty range is no range, wherever it points"
        );
        put(&map, 0x5000, 1, 999);
        read_ranges(&map, &dsm(0x1ff0, 0x5000), 2, 1000, &mut out).unwrap();
        assert_eq!(out.len(), 2);
        for bad in [1000, u64::MAX] {
            put(&map, 0x5000, 1, bad);
            let err = read_ranges(&map, &dsm(0x1ff0, 0x5000), 2, 1000, &mut out);
            assert_eq!(err, Err(Status::LBA_OUT_OF_RANGE));
        }
        assert_eq!(
            read_ranges(&map, &dsm(0x1ff0, 0x20000), 2, 1000, &mut out),
            Err(Status::DATA_TRANSFER_ERROR)
        );
        assert_eq!(
            read_ranges(&map, &dsm(0x1ff0, 0x5008), 2, 1000, &mut out),
            Err(Status::INVALID_PRP_OFFSET)
        );
    }
}
