//! PRPs: the table of the specification's rules, and `walk(build(x)) == x`.

use crate::prp_model::Lists;
use crate::prp_model::UNMAPPED;
use crate::prp_model::joined;
use crate::prp_model::transfer;
use crate::prp_model::walked;
use nvme_spec::Status;
use nvme_spec::prp::BuildError;
use nvme_spec::prp::PageSize;
use nvme_spec::prp::Prps;
use nvme_spec::prp::Segment;
use nvme_spec::prp::build;
use nvme_spec::prp::walk;
use proptest::prelude::*;

const OFFSET: Result<(), Status> = Err(Status::INVALID_PRP_OFFSET);
const TRANSFER: Result<(), Status> = Err(Status::DATA_TRANSFER_ERROR);
const NO_LIST: Result<(), Status> = Err(UNMAPPED);
const LAST_PAGE: u64 = 0xFFFF_FFFF_FFFF_F000;

/// One row: PRP1, PRP2, length, list entries, and what must come out (4 KiB pages).
type Row = (
    &'static str,
    u64,
    u64,
    u32,
    &'static [(u64, u64)],
    Result<(), Status>,
    &'static [(u64, u32)],
);

#[rustfmt::skip]
const TABLE: &[Row] = &[
    ("nothing to transfer, whatever the PRPs", 3, 5, 0, &[], Ok(()), &[]),
    ("one byte", 0x1000, 0, 1, &[], Ok(()), &[(0x1000, 1)]),
    ("one page", 0x1000, 0, 4096, &[], Ok(()), &[(0x1000, 4096)]),
    ("dword offset", 0x1004, 0, 512, &[], Ok(()), &[(0x1004, 512)]),
    ("offset 1", 0x1001, 0, 512, &[], OFFSET, &[]),
    ("offset 2", 0x1002, 0, 512, &[], OFFSET, &[]),
    ("last dword of a page", 0x1FFC, 0, 4, &[], Ok(()), &[(0x1FFC, 4)]),
    ("PRP2 not needed is not looked at", 0x1000, 0x2001, 4096, &[], Ok(()), &[(0x1000, 4096)]),
    ("two pages apart", 0x1000, 0x9000, 8192, &[], Ok(()), &[(0x1000, 4096), (0x9000, 4096)]),
    ("two pages that touch", 0x1000, 0x2000, 8192, &[], Ok(()), &[(0x1000, 8192)]),
    ("two pages the wrong way round", 0x2000, 0x1000, 8192, &[], Ok(()), &[(0x2000, 4096), (0x1000, 4096)]),
    ("the same page twice", 0x1000, 0x1000, 8192, &[], Ok(()), &[(0x1000, 4096), (0x1000, 4096)]),
    ("one page's length over two pages", 0x1800, 0x2000, 4096, &[], Ok(()), &[(0x1800, 4096)]),
    ("second page with a byte offset", 0x1000, 0x9001, 8192, &[], OFFSET, &[]),
    ("second page with a dword offset", 0x1000, 0x9004, 8192, &[], OFFSET, &[]),
    ("second page with a sector offset", 0x1000, 0x9200, 4097, &[], OFFSET, &[]),
    ("three pages: a list", 0x1000, 0x9000, 12288, &[(0x9000, 0x5000), (0x9008, 0x7000)], Ok(()),
        &[(0x1000, 4096), (0x5000, 4096), (0x7000, 4096)]),
    ("three pages in a row", 0x4000, 0x9000, 12288, &[(0x9000, 0x5000), (0x9008, 0x6000)], Ok(()), &[(0x4000, 12288)]),
    ("two pages' length over three pages", 0x1FFC, 0x9000, 8192, &[(0x9000, 0x5000), (0x9008, 0x7000)], Ok(()),
        &[(0x1FFC, 4), (0x5000, 4096), (0x7000, 4092)]),
    ("list in the middle of a page", 0x1000, 0x9010, 12288, &[(0x9010, 0x5000), (0x9018, 0x7000)], Ok(()),
        &[(0x1000, 4096), (0x5000, 4096), (0x7000, 4096)]),
    ("list pointer with a dword offset", 0x1000, 0x9004, 12288, &[], OFFSET, &[]),
    ("list pointer with a byte offset", 0x1000, 0x9001, 12288, &[], OFFSET, &[]),
    ("list entry with an offset", 0x1000, 0x9000, 12288, &[(0x9000, 0x5004), (0x9008, 0x7000)], OFFSET, &[]),
    ("second list entry with an offset", 0x1000, 0x9000, 12288, &[(0x9000, 0x5000), (0x9008, 0x7800)], OFFSET,
        &[(0x1000, 4096)]),
    ("list that fits exactly does not chain", 0x1000, 0x9FF0, 12288, &[(0x9FF0, 0x5000), (0x9FF8, 0x7000)], Ok(()),
        &[(0x1000, 4096), (0x5000, 4096), (0x7000, 4096)]),
    ("chain", 0x1000, 0x9FF0, 16384, &[(0x9FF0, 0x5000), (0x9FF8, 0xB000), (0xB000, 0x7000), (0xB008, 0x3000)], Ok(()),
        &[(0x1000, 4096), (0x5000, 4096), (0x7000, 4096), (0x3000, 4096)]),
    ("list of a pointer only", 0x1000, 0x9FF8, 12288, &[(0x9FF8, 0xB000), (0xB000, 0x7000), (0xB008, 0x3000)], Ok(()),
        &[(0x1000, 4096), (0x7000, 4096), (0x3000, 4096)]),
    ("chain pointer into a page", 0x1000, 0x9FF8, 12288, &[(0x9FF8, 0xB008)], OFFSET, &[]),
    ("chain pointer to itself takes its page as data", 0x1000, 0x9FF8, 12288, &[(0x9FF8, 0x9000), (0x9000, 0x9000), (0x9008, 0x9000)], Ok(()),
        &[(0x1000, 4096), (0x9000, 4096), (0x9000, 4096)]),
    ("list that is not there", 0x1000, 0x9000, 12288, &[], NO_LIST, &[]),
    ("next list that is not there", 0x1000, 0x9FF0, 16384, &[(0x9FF0, 0x5000), (0x9FF8, 0xB000)], NO_LIST, &[(0x1000, 4096)]),
    ("PRP1 up to the end of the address space", LAST_PAGE, 0, 4095, &[], Ok(()), &[(LAST_PAGE, 4095)]),
    ("PRP1 over the end of the address space", LAST_PAGE, 0, 4096, &[], TRANSFER, &[]),
    ("PRP2 over the end of the address space", 0x1000, LAST_PAGE, 8192, &[], TRANSFER, &[]),
    ("list entry over the end of the address space", 0x1000, 0x9000, 12288, &[(0x9000, LAST_PAGE), (0x9008, 0x1000)], TRANSFER, &[]),
    ("list at the end of the address space", 0x1000, LAST_PAGE + 0xFF0, 12288, &[(LAST_PAGE + 0xFF0, 0x5000), (LAST_PAGE + 0xFF8, 0x7000)], Ok(()),
        &[(0x1000, 4096), (0x5000, 4096), (0x7000, 4096)]),
];

#[test]
fn walk_follows_every_row_of_the_table() {
    for &(name, prp1, prp2, len, entries, result, segments) in TABLE {
        let mut lists = Lists::new(PageSize::K4);
        lists.entries.extend(entries.iter().copied());
        let prps = Prps {
            prp1,
            prp2,
            lists: 0,
        };
        let (got, got_segments) = walked(&mut lists, prps, len);
        assert_eq!(got, result, "{name}");
        let segments: Vec<_> = segments
            .iter()
            .map(|&(addr, len)| Segment { addr, len })
            .collect();
        assert_eq!(got_segments, segments, "{name}");
    }
}

/// All low bits of both PRPs and all the lengths at which their meaning changes, against the rules
/// in their shortest form.
#[test]
fn walk_gives_the_exact_status_for_every_alignment_and_length() {
    let lens = [
        0, 1, 3, 4, 512, 2047, 2048, 2049, 4092, 4095, 4096, 4097, 6144, 8188, 8191, 8192, 8193,
        12288, 12289, 16384,
    ];
    let offsets1 = (0..16).chain([512, 2048, 4088, 4092, 4093, 4095]);
    for offset1 in offsets1 {
        for offset2 in (0..32).chain([512, 2048, 4072, 4080]) {
            for len in lens {
                let mut lists = Lists::new(PageSize::K4);
                let entries = (0..=0xFF8)
                    .step_by(8)
                    .map(|at| (0x9000 + at, 0x10_0000 + at * 1024));
                lists.entries.extend(entries);
                let prps = Prps {
                    prp1: 0x1000 + offset1,
                    prp2: 0x9000 + offset2,
                    lists: 0,
                };
                let touched = (offset1 + u64::from(len)).div_ceil(4096);
                let expected = match (len, touched) {
                    (0, _) => Ok(()),
                    _ if offset1 % 4 != 0 => OFFSET,
                    (_, 1) => Ok(()),
                    (_, 2) if offset2 != 0 => OFFSET,
                    (_, 2) => Ok(()),
                    _ if offset2 % 8 != 0 => OFFSET,
                    _ => Ok(()),
                };
                // With 4080 a fourth page would chain through an entry that is data here: a page
                // address, and so a list of things not mapped.
                let chained = touched > 2 && touched - 1 > (4096 - offset2) / 8;
                let (got, segments) = walked(&mut lists, prps, len);
                if chained && expected.is_ok() {
                    assert_eq!(got, NO_LIST, "{offset1} {offset2} {len}");
                } else {
                    assert_eq!(got, expected, "{offset1} {offset2} {len}");
                    let sum: u32 = segments.iter().map(|segment| segment.len).sum();
                    assert!(got.is_err() || sum == len, "{offset1} {offset2} {len}");
                }
            }
        }
    }
}

#[test]
fn walk_ends_with_the_status_of_the_sink() {
    let mut lists = Lists::new(PageSize::K4);
    let mut calls = 0;
    let result = walk(PageSize::K4, 0x1000, 0x9000, 8192, &mut lists, &mut |_| {
        calls += 1;
        Err(Status::CAPACITY_EXCEEDED)
    });
    assert_eq!(result, Err(Status::CAPACITY_EXCEEDED));
    assert_eq!(calls, 1);
}

#[test]
fn build_refuses_what_no_prp_can_say() {
    let page = PageSize::K4;
    let refused = |pages: &[u64], offset, len, lists: &[u64]| {
        let mut memory = Lists::new(page);
        let (pages, lists) = (pages.iter().copied(), lists.iter().copied());
        build(page, pages, offset, len, lists, &mut memory).unwrap_err()
    };
    assert_eq!(refused(&[0x1000], 2, 1, &[]), BuildError::Offset);
    assert_eq!(refused(&[0x1000], 4096, 1, &[]), BuildError::Offset);
    assert_eq!(refused(&[0x1004], 0, 1, &[]), BuildError::Page);
    assert_eq!(refused(&[0x1000, 0x2200], 0, 8192, &[]), BuildError::Page);
    assert_eq!(
        refused(&[0x1000, 0x2000, 0x3008], 0, 12288, &[0x9000]),
        BuildError::Page
    );
    assert_eq!(refused(&[], 0, 1, &[]), BuildError::TooFewPages);
    assert_eq!(refused(&[0x1000], 0, 4097, &[]), BuildError::TooFewPages);
    assert_eq!(
        refused(&[0x1000, 0x2000], 4, 8192, &[0x9000]),
        BuildError::TooFewPages
    );
    assert_eq!(
        refused(&[0x1000, 0x2000, 0x3000], 0, 12288, &[]),
        BuildError::TooFewLists
    );
    assert_eq!(
        refused(&[0x1000, 0x2000, 0x3000], 0, 12288, &[0x9004]),
        BuildError::List
    );
    assert_eq!(
        refused(&[0x1000, 0x2000, 0x3000], 0, 12288, &[0x9FF8]),
        BuildError::TooFewLists
    );
    assert_eq!(
        refused(&[0x1000, 0x2000, 0x3000], 0, 12288, &[0x9FF8, 0xA008]),
        BuildError::List
    );
}

#[test]
fn build_of_nothing_takes_no_page() {
    let mut memory = Lists::new(PageSize::K4);
    let built = build(PageSize::K4, [], 0, 0, [], &mut memory);
    assert_eq!(built, Ok(Prps::default()));
}

#[test]
fn page_size_is_one_of_sixteen_powers_of_two() {
    for mps in 0..=u8::MAX {
        let page = PageSize::from_mps(mps);
        assert_eq!(page.is_some(), mps <= 15, "{mps}");
        if let Some(page) = page {
            assert_eq!(page.bytes(), 4096 << mps);
            assert_eq!(page.mps(), mps);
            assert_eq!(PageSize::from_bytes(page.bytes()), Some(page));
            assert_eq!(page.rest(u64::from(page.bytes()) * 7), page.bytes());
            assert_eq!(page.rest(u64::MAX), 1);
            assert_eq!(page.offset(u64::MAX), page.bytes() - 1);
            assert!(page.is_aligned(0) && !page.is_aligned(1));
        }
    }
    for bytes in [0, 1, 2048, 4095, 4097, 12288, 1 << 28, 1 << 31, u32::MAX] {
        assert_eq!(PageSize::from_bytes(bytes), None, "{bytes}");
    }
}

proptest! {
    #[test]
    fn walk_of_build_is_the_transfer(transfer in transfer()) {
        let mut memory = Lists::new(transfer.page);
        let prps = transfer.build(&mut memory).unwrap();
        let (data, pointers) = transfer.entry_addresses();

        // The list holds exactly the entries the specification puts there.
        prop_assert_eq!(memory.entries.len(), data.len() + pointers.len());
        for (at, page) in data.iter().zip(transfer.pages.iter().skip(1)) {
            prop_assert_eq!(memory.entries.get(at), Some(page));
        }
        for (at, list) in pointers.iter().zip(transfer.lists.iter().skip(1)) {
            prop_assert_eq!(memory.entries.get(at), Some(list));
        }
        let lists = if data.is_empty() { 0 } else { pointers.len() + 1 };
        prop_assert_eq!(prps.lists as usize, lists);

        let (result, segments) = walked(&mut memory, prps, transfer.len);
        prop_assert_eq!(result, Ok(()));
        prop_assert_eq!(segments, joined(&transfer.pieces()));
        // Every entry is read, and once.
        prop_assert_eq!(memory.reads as usize, memory.entries.len());
    }

    #[test]
    fn build_takes_one_list_page_less_as_refusal(transfer in transfer()) {
        let (_, pointers) = transfer.entry_addresses();
        let mut poor = transfer.clone();
        poor.lists.truncate(pointers.len());
        let mut memory = Lists::new(transfer.page);
        let expected = match transfer.touched() {
            0..=2 => None,
            _ => Some(BuildError::TooFewLists),
        };
        prop_assert_eq!(poor.build(&mut memory).err(), expected);
    }
}
