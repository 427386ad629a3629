//! PRPs of a hostile host: good ones with one thing wrong, each with the exact status it must get,
//! and lists of anything at all.

use crate::prp_model::Lists;
use crate::prp_model::Transfer;
use crate::prp_model::UNMAPPED;
use crate::prp_model::joined;
use crate::prp_model::transfer;
use crate::prp_model::walked;
use nvme_spec::Status;
use nvme_spec::prp::PageSize;
use nvme_spec::prp::Prps;
use nvme_spec::prp::ReadList;
use nvme_spec::prp::Segment;
use nvme_spec::prp::walk;
use proptest::prelude::*;
use proptest::sample::Index;

/// One thing a host can get wrong. `bits` and `at` are reduced to what the transfer has.
#[derive(Clone, Debug)]
enum Wrong {
    Prp1Bits(u64),
    Prp2Bits(u64),
    EntryBits(Index, u64),
    PointerBits(Index, u64),
    EntryAtTheEnd(Index),
    EntryUnmapped(Index),
    PointerUnmapped(Index),
}

fn wrong() -> impl Strategy<Value = Wrong> {
    prop_oneof![
        (1u64..4).prop_map(Wrong::Prp1Bits),
        (1u64..4096).prop_map(Wrong::Prp2Bits),
        (any::<Index>(), 1u64..4096).prop_map(|(at, bits)| Wrong::EntryBits(at, bits)),
        (any::<Index>(), 1u64..4096).prop_map(|(at, bits)| Wrong::PointerBits(at, bits)),
        any::<Index>().prop_map(Wrong::EntryAtTheEnd),
        any::<Index>().prop_map(Wrong::EntryUnmapped),
        any::<Index>().prop_map(Wrong::PointerUnmapped),
    ]
}

/// Makes the mistake and says what must come of it: the status, and the index of the first piece
/// that must not reach the sink.
fn apply(
    wrong: &Wrong,
    transfer: &Transfer,
    prps: &mut Prps,
    memory: &mut Lists,
) -> Option<(Status, usize)> {
    let (data, pointers) = transfer.entry_addresses();
    let offset = Status::INVALID_PRP_OFFSET;
    match wrong {
        Wrong::Prp1Bits(bits) => {
            prps.prp1 |= bits;
            (transfer.len > 0).then_some((offset, 0))
        }
        Wrong::Prp2Bits(bits) => match transfer.touched() {
            0 | 1 => {
                prps.prp2 |= bits;
                None
            }
            2 => {
                prps.prp2 |= bits;
                Some((offset, 1))
            }
            _ => {
                prps.prp2 |= bits % 7 + 1;
                Some((offset, 1))
            }
        },
        Wrong::EntryBits(at, bits) => {
            let i = (!data.is_empty()).then(|| at.index(data.len()))?;
            *memory.entries.get_mut(&data[i]).unwrap() |= bits;
            Some((offset, i + 1))
        }
        Wrong::PointerBits(at, bits) => {
            let i = (!pointers.is_empty()).then(|| at.index(pointers.len()))?;
            *memory.entries.get_mut(&pointers[i]).unwrap() |= bits;
            let before = data
                .iter()
                .filter(|&&entry| reaches(transfer, entry, i))
                .count();
            Some((offset, before + 1))
        }
        Wrong::EntryAtTheEnd(at) => {
            let i = (!data.is_empty()).then(|| at.index(data.len()))?;
            let last_page = !u64::from(transfer.page.bytes() - 1);
            memory.entries.insert(data[i], last_page);
            // Only a whole page reaches the end.
            match transfer.pieces()[i + 1].len == transfer.page.bytes() {
                true => Some((Status::DATA_TRANSFER_ERROR, i + 1)),
                false => {
                    memory.entries.insert(data[i], transfer.pages[i + 1]);
                    None
                }
            }
        }
        Wrong::EntryUnmapped(at) => {
            let i = (!data.is_empty()).then(|| at.index(data.len()))?;
            memory.entries.remove(&data[i]);
            // Entries are read in runs: the whole run is lost with this one.
            Some((UNMAPPED, i + 1))
        }
        Wrong::PointerUnmapped(at) => {
            let i = (!pointers.is_empty()).then(|| at.index(pointers.len()))?;
            memory.entries.remove(&pointers[i]);
            let before = data
                .iter()
                .filter(|&&entry| reaches(transfer, entry, i))
                .count();
            Some((UNMAPPED, before + 1))
        }
    }
}

/// Whether a data entry lies in one of the first `list + 1` lists.
fn reaches(transfer: &Transfer, entry: u64, list: usize) -> bool {
    transfer.lists[..=list]
        .iter()
        .any(|&first| (first..first + u64::from(transfer.page.rest(first))).contains(&entry))
}

/// List memory in which every address holds something.
struct Anything {
    page: PageSize,
    seed: u64,
    /// Of 256 entries, how many have an offset.
    offsets: u8,
    reads: u64,
}

impl ReadList for Anything {
    fn read(&mut self, addr: u64, entries: &mut [u64]) -> Result<(), Status> {
        assert_eq!(addr % 8, 0);
        assert!((1..=64).contains(&entries.len()));
        assert!(entries.len() as u64 * 8 <= u64::from(self.page.rest(addr)));
        self.reads += entries.len() as u64;
        for (i, entry) in entries.iter_mut().enumerate() {
            let mut x = (addr + i as u64 * 8) ^ self.seed;
            for _ in 0..3 {
                x = (x ^ x >> 31).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            }
            let keep_offset = (x >> 8) as u8 >= 255 - self.offsets && self.offsets > 0;
            *entry = match keep_offset {
                true => x,
                false => x & !u64::from(self.page.bytes() - 1),
            };
        }
        Ok(())
    }
}

/// Every entry of every list is the same: the classic list that points to itself.
struct Cycle {
    entry: u64,
    reads: u64,
}

impl ReadList for Cycle {
    fn read(&mut self, _addr: u64, entries: &mut [u64]) -> Result<(), Status> {
        self.reads += entries.len() as u64;
        entries.fill(self.entry);
        Ok(())
    }
}

fn most_reads(page: PageSize, len: u32) -> u64 {
    2 * (u64::from(len) / u64::from(page.bytes()) + 2)
}

#[test]
fn list_that_points_to_itself_ends_after_the_entries_the_length_needs() {
    let mut cycle = Cycle {
        entry: 0x9000,
        reads: 0,
    };
    let mut segments = 0;
    let result = walk(
        PageSize::K4,
        0x1000,
        0x9000,
        u32::MAX,
        &mut cycle,
        &mut |_| {
            segments += 1;
            Ok(())
        },
    );
    assert_eq!(result, Ok(()));
    assert_eq!(segments, 1 << 20);
    // 2^20 - 1 data entries in lists of 511 and, the last, 512.
    let pointers = ((1u64 << 20) - 2) / 511;
    assert_eq!(cycle.reads, (1 << 20) - 1 + pointers);
}

#[test]
fn longest_transfer_in_the_largest_pages_ends() {
    let page = PageSize::from_mps(15).unwrap();
    let mut cycle = Cycle { entry: 0, reads: 0 };
    let mut sum = 0u64;
    let result = walk(
        page,
        0,
        page.rest(1).into(),
        u32::MAX,
        &mut cycle,
        &mut |segment| {
            sum += u64::from(segment.len);
            Ok(())
        },
    );
    // PRP2 is one short of a page: not 8-byte aligned.
    assert_eq!(result, Err(Status::INVALID_PRP_OFFSET));
    let result = walk(page, 0, 8, u32::MAX, &mut cycle, &mut |segment| {
        sum += u64::from(segment.len);
        Ok(())
    });
    assert_eq!(result, Ok(()));
    assert_eq!(sum, u64::from(u32::MAX));
    assert_eq!(cycle.reads, 31);
}

proptest! {
    #[test]
    fn one_mistake_gets_its_exact_status(transfer in transfer(), wrong in wrong()) {
        let mut memory = Lists::new(transfer.page);
        let mut prps = transfer.build(&mut memory).unwrap();
        let expected = apply(&wrong, &transfer, &mut prps, &mut memory);
        let (result, segments) = walked(&mut memory, prps, transfer.len);
        let all = transfer.pieces();
        match expected {
            None => {
                prop_assert_eq!(result, Ok(()));
                prop_assert_eq!(segments, joined(&all));
            }
            Some((status, first_bad)) => {
                prop_assert_eq!(result, Err(status));
                // What the sink saw is good, and nothing from the mistake on.
                let good = joined(&all[..first_bad]);
                prop_assert!(good.starts_with(&segments), "{:?} of {:?}", segments, good);
            }
        }
    }

    #[test]
    fn any_list_at_all_is_walked_within_bounds(
        mps in 0u8..=15,
        prp1 in prop_oneof![any::<u64>(), any::<u64>().prop_map(|x| x & !3), u64::MAX - 9000..=u64::MAX],
        prp2 in prop_oneof![any::<u64>(), any::<u64>().prop_map(|x| x & !7), u64::MAX - 9000..=u64::MAX],
        len in prop_oneof![0u32..100_000, 0u32..20_000_000],
        seed in any::<u64>(),
        offsets in prop_oneof![Just(0u8), any::<u8>()],
    ) {
        let page = PageSize::from_mps(mps).unwrap();
        let mut lists = Anything { page, seed, offsets, reads: 0 };
        let mut segments: Vec<Segment> = Vec::new();
        let result = walk(page, prp1, prp2, len, &mut lists, &mut |segment| {
            segments.push(segment);
            Ok(())
        });
        prop_assert!(lists.reads <= most_reads(page, len));
        let mut sum = 0u64;
        for segment in &segments {
            prop_assert!(segment.len > 0);
            prop_assert!(segment.addr.checked_add(u64::from(segment.len)).is_some());
            sum += u64::from(segment.len);
        }
        for pair in segments.windows(2) {
            prop_assert_ne!(pair[0].addr + u64::from(pair[0].len), pair[1].addr, "not joined");
        }
        match result {
            Ok(()) => prop_assert_eq!(sum, u64::from(len)),
            Err(status) => {
                prop_assert!(sum < u64::from(len));
                prop_assert!([Status::INVALID_PRP_OFFSET, Status::DATA_TRANSFER_ERROR].contains(&status));
            }
        }
    }
}
