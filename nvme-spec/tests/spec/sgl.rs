//! The SGL walker against a naive model, and the exact status of each mistake.

use nvme_spec::Sqe;
use nvme_spec::Status;
use nvme_spec::prp::Segment;
use nvme_spec::sgl::Descriptor;
use nvme_spec::sgl::DescriptorType;
use nvme_spec::sgl::MAX_DESCRIPTORS;
use nvme_spec::sgl::ReadSegment;
use nvme_spec::sgl::walk;
use proptest::prelude::*;
use std::collections::HashMap;

/// What reading a descriptor nobody wrote answers: a vendor status, so no code of ours can have made it.
const UNMAPPED: Status = Status::new(7, 0x55);

/// Descriptors by address. Checks on every access what the trait promises.
#[derive(Clone, Debug, Default)]
struct Memory {
    descriptors: HashMap<u64, Descriptor>,
    reads: u32,
}

impl Memory {
    fn put(&mut self, addr: u64, descriptors: &[Descriptor]) {
        for (i, d) in descriptors.iter().enumerate() {
            self.descriptors.insert(addr + i as u64 * 16, *d);
        }
    }
}

impl ReadSegment for Memory {
    fn read(&mut self, addr: u64, descriptors: &mut [Descriptor]) -> Result<(), Status> {
        assert_eq!(addr % 8, 0, "descriptor address {addr:#x} is aligned");
        assert!((1..=32).contains(&descriptors.len()));
        assert!(addr.checked_add(descriptors.len() as u64 * 16).is_some());
        self.reads += descriptors.len() as u32;
        for (i, d) in descriptors.iter_mut().enumerate() {
            *d = *self
                .descriptors
                .get(&(addr + i as u64 * 16))
                .ok_or(UNMAPPED)?;
        }
        Ok(())
    }
}

fn walked(memory: &mut Memory, first: Descriptor, len: u32) -> (Result<(), Status>, Vec<Segment>) {
    let mut out = Vec::new();
    let result = walk(first, len, memory, &mut |segment| {
        out.push(segment);
        Ok(())
    });
    (result, out)
}

/// The specification in the plainest words: all descriptors of a segment at once, dwords instead of pieces.
fn model(memory: &Memory, first: Descriptor, len: u32) -> Result<Vec<u64>, Status> {
    let (mut dwords, mut budget) = (Vec::new(), MAX_DESCRIPTORS as usize);
    if len == 0 {
        return Ok(dwords);
    }
    // The command itself is a segment of one descriptor, which may be of either sort.
    let (mut segment, mut at, mut ends) = (vec![Some(first)], 0, None);
    loop {
        let last = at + 1 == segment.len();
        let Some(d) = segment[at] else {
            return Err(UNMAPPED);
        };
        at += 1;
        match d.identifier {
            0x00 if d.length == 0 => {}
            0x00 => {
                if d.address % 4 != 0 || d.length % 4 != 0 {
                    return Err(Status::SGL_DATA_BLOCK_GRANULARITY_INVALID);
                }
                if dwords.len() as u64 * 4 + u64::from(d.length) > u64::from(len) {
                    return Err(Status::DATA_SGL_LENGTH_INVALID);
                }
                if u128::from(d.address) + u128::from(d.length) > u128::from(u64::MAX) {
                    return Err(Status::DATA_TRANSFER_ERROR);
                }
                dwords.extend((0..u64::from(d.length) / 4).map(|i| d.address + i * 4));
            }
            0x20 | 0x30 => {
                if !last {
                    return Err(Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS);
                }
                if ends == Some(true) || d.length == 0 || d.length % 16 != 0 || d.address % 8 != 0 {
                    return Err(Status::INVALID_SGL_SEGMENT_DESCRIPTOR);
                }
                if u128::from(d.address) + u128::from(d.length) > u128::from(u64::MAX) {
                    return Err(Status::DATA_TRANSFER_ERROR);
                }
                let count = d.length as usize / 16;
                if count > budget {
                    return Err(Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS);
                }
                budget -= count;
                (at, ends) = (0, Some(d.identifier == 0x30));
                let all = (0..count as u64).map(|i| d.address + i * 16);
                segment = all.map(|at| memory.descriptors.get(&at).copied()).collect();
                // The walker reads 32 at a time, all or none of them. Never the last, so that a pointer is judged as what it is.
                if let Some(hole) = segment.iter().position(Option::is_none) {
                    segment.truncate(hole / 32 * 32);
                    segment.extend([None, None]);
                }
                continue;
            }
            _ => return Err(Status::SGL_DESCRIPTOR_TYPE_INVALID),
        }
        if last {
            break;
        }
    }
    if ends == Some(false) {
        return Err(Status::INVALID_SGL_SEGMENT_DESCRIPTOR);
    }
    match dwords.len() as u64 * 4 == u64::from(len) {
        true => Ok(dwords),
        false => Err(Status::DATA_SGL_LENGTH_INVALID),
    }
}

fn dwords(segments: &[Segment]) -> Vec<u64> {
    segments
        .iter()
        .flat_map(|s| (0..u64::from(s.len) / 4).map(|i| s.addr + i * 4))
        .collect()
}

/// Pieces of data, how many of them each segment has, and where the segments lie.
fn lists() -> impl Strategy<Value = (Vec<(u64, u32)>, Vec<usize>)> {
    let piece = (
        prop_oneof![0u64..1 << 40, Just(0x1000), Just(0x2000)],
        prop_oneof![0u32..64, 0u32..2048, Just(1024)],
    );
    (
        proptest::collection::vec(piece.prop_map(|(a, n)| (a * 4, n * 4)), 1..200),
        proptest::collection::vec(1usize..80, 1..8),
    )
}

/// A list as a host would write it: the descriptor of the command, and the data's length.
fn build(memory: &mut Memory, pieces: &[(u64, u32)], cuts: &[usize]) -> (Descriptor, u32) {
    let len = pieces.iter().map(|(_, n)| n).sum();
    let mut rest: Vec<Descriptor> = pieces
        .iter()
        .map(|&(a, n)| Descriptor::data(a, n))
        .collect();
    if let [one] = rest[..] {
        return (one, len);
    }
    let mut segments: Vec<Vec<Descriptor>> = Vec::new();
    for cut in cuts {
        let after = rest.split_off((*cut).min(rest.len()));
        segments.push(rest);
        rest = after;
        if rest.is_empty() {
            break;
        }
    }
    if !rest.is_empty() {
        segments.push(rest);
    }
    // From the end: each is told where the next lies.
    let mut pointer = None;
    for (i, mut segment) in segments.into_iter().enumerate().rev() {
        let at = 0x7000_0000_0000 + i as u64 * 0x10_0008;
        let last = pointer.is_none();
        segment.extend(pointer);
        memory.put(at, &segment);
        let count = segment.len() as u32;
        pointer = Some(match last {
            true => Descriptor::last_segment(at, count),
            false => Descriptor::segment(at, count),
        });
    }
    (pointer.expect("a segment"), len)
}

proptest! {
    #[test]
    fn good_lists_give_their_data_in_order((pieces, cuts) in lists()) {
        let mut memory = Memory::default();
        let (first, len) = build(&mut memory, &pieces, &cuts);
        let (result, segments) = walked(&mut memory, first, len);
        prop_assert_eq!(result, Ok(()));
        let want: Vec<u64> = pieces
            .iter()
            .flat_map(|&(a, n)| (0..u64::from(n) / 4).map(move |i| a + i * 4))
            .collect();
        prop_assert_eq!(dwords(&segments), want);
        prop_assert!(segments.iter().all(|s| s.len > 0));
        prop_assert!(segments.windows(2).all(|w| w[0].addr + u64::from(w[0].len) != w[1].addr));
        prop_assert!(memory.reads <= MAX_DESCRIPTORS);
    }

    #[test]
    fn lists_with_mistakes_are_judged_as_the_model_judges_them(
        (pieces, cuts) in lists(),
        mistakes in proptest::collection::vec(
            (any::<proptest::sample::Index>(), 0u8..8, any::<u64>(), any::<u32>(), any::<u8>()), 1..4),
        longer in -8i64..8,
    ) {
        let mut memory = Memory::default();
        let (mut first, len) = build(&mut memory, &pieces, &cuts);
        let mut places: Vec<u64> = memory.descriptors.keys().copied().collect();
        places.sort_unstable();
        for (at, what, address, length, identifier) in mistakes {
            let place = (!places.is_empty()).then(|| places[at.index(places.len())]);
            let d = match place {
                Some(place) if what != 0 => memory.descriptors.get_mut(&place),
                _ => Some(&mut first),
            };
            let Some(d) = d else { continue };
            match what {
                0 | 1 => d.identifier = identifier,
                2 => d.identifier = [0x00, 0x10, 0x20, 0x30, 0x01, 0x40, 0x50, 0xF0][usize::from(identifier % 8)],
                3 => d.length = length,
                4 => d.length = length % 4096,
                5 => d.address = address,
                6 => d.address = u64::MAX - address % 64,
                _ => {
                    memory.descriptors.remove(&place.unwrap_or_default());
                }
            }
        }
        let len = (i64::from(len) + longer).clamp(0, i64::from(u32::MAX)) as u32;
        let want = model(&memory, first, len);
        let (result, segments) = walked(&mut memory, first, len);
        prop_assert_eq!(result.map(|()| dwords(&segments)), want);
        prop_assert!(memory.reads <= MAX_DESCRIPTORS);
    }

    #[test]
    fn anything_ends(bytes in any::<[u64; 2]>(), memory in any::<[[u64; 2]; 4]>(), len in any::<u32>()) {
        /// The same few descriptors everywhere.
        struct Everywhere([[u64; 2]; 4], u32);
        impl ReadSegment for Everywhere {
            fn read(&mut self, addr: u64, descriptors: &mut [Descriptor]) -> Result<(), Status> {
                for (i, d) in descriptors.iter_mut().enumerate() {
                    self.1 += 1;
                    let words = self.0[(addr as usize / 16 + i) % 4];
                    *d = Descriptor::of(&Sqe::default().with_prps(words[0], words[1]));
                }
                Ok(())
            }
        }
        let mut memory = Everywhere(memory, 0);
        let mut sum = 0u64;
        let first = Descriptor::of(&Sqe::default().with_prps(bytes[0], bytes[1]));
        let result = walk(first, len, &mut memory, &mut |s| {
            sum += u64::from(s.len);
            Ok(())
        });
        prop_assert!(memory.1 <= MAX_DESCRIPTORS && sum <= u64::from(len));
        prop_assert!(result.is_err() || sum == u64::from(len));
    }
}

#[test]
fn each_mistake_has_its_status() {
    const AT: u64 = 0x8000;
    let data = Descriptor::data(0x1000, 512);
    let of = |kind, address, length| Descriptor::new(kind, address, length);
    let odd = |change: fn(&mut Descriptor)| {
        let mut d = Descriptor::data(0x1000, 512);
        change(&mut d);
        d
    };
    let last = |n| Descriptor::last_segment(AT, n);
    let cases: Vec<(Descriptor, Vec<Descriptor>, Status)> = vec![
        (data, vec![], Status::SUCCESS),
        (last(1), vec![data], Status::SUCCESS),
        (odd(|d| d.reserved = [1, 2, 3]), vec![], Status::SUCCESS),
        (
            odd(|d| d.length = 508),
            vec![],
            Status::DATA_SGL_LENGTH_INVALID,
        ),
        (
            odd(|d| d.length = 516),
            vec![],
            Status::DATA_SGL_LENGTH_INVALID,
        ),
        (
            last(2),
            vec![data, odd(|d| d.length = 4)],
            Status::DATA_SGL_LENGTH_INVALID,
        ),
        (
            odd(|d| d.address += 2),
            vec![],
            Status::SGL_DATA_BLOCK_GRANULARITY_INVALID,
        ),
        (
            odd(|d| d.length = 510),
            vec![],
            Status::SGL_DATA_BLOCK_GRANULARITY_INVALID,
        ),
        (
            odd(|d| d.identifier = 1),
            vec![],
            Status::SGL_DESCRIPTOR_TYPE_INVALID,
        ),
        (
            of(DescriptorType::BIT_BUCKET, 0, 512),
            vec![],
            Status::SGL_DESCRIPTOR_TYPE_INVALID,
        ),
        (
            of(DescriptorType::KEYED_DATA_BLOCK, 0x1000, 512),
            vec![],
            Status::SGL_DESCRIPTOR_TYPE_INVALID,
        ),
        (
            of(DescriptorType::VENDOR, 0x1000, 512),
            vec![],
            Status::SGL_DESCRIPTOR_TYPE_INVALID,
        ),
        (
            of(DescriptorType::LAST_SEGMENT, AT, 0),
            vec![data],
            Status::INVALID_SGL_SEGMENT_DESCRIPTOR,
        ),
        (
            of(DescriptorType::LAST_SEGMENT, AT, 24),
            vec![data],
            Status::INVALID_SGL_SEGMENT_DESCRIPTOR,
        ),
        (
            of(DescriptorType::SEGMENT, AT + 4, 16),
            vec![data],
            Status::INVALID_SGL_SEGMENT_DESCRIPTOR,
        ),
        (
            Descriptor::segment(AT, 1),
            vec![data],
            Status::INVALID_SGL_SEGMENT_DESCRIPTOR,
        ),
        (
            last(2),
            vec![data, last(1)],
            Status::INVALID_SGL_SEGMENT_DESCRIPTOR,
        ),
        (
            last(2),
            vec![last(1), data],
            Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS,
        ),
        (
            Descriptor::segment(AT, 2),
            vec![last(1), last(1)],
            Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS,
        ),
        (
            last(MAX_DESCRIPTORS + 1),
            vec![data],
            Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS,
        ),
        (
            of(DescriptorType::LAST_SEGMENT, AT, u32::MAX - 15),
            vec![data],
            Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS,
        ),
        (
            of(DescriptorType::LAST_SEGMENT, !7, 16),
            vec![],
            Status::DATA_TRANSFER_ERROR,
        ),
        (
            odd(|d| d.address = !511),
            vec![],
            Status::DATA_TRANSFER_ERROR,
        ),
        (last(1), vec![], UNMAPPED),
        // A segment that is its own next one.
        (
            Descriptor::segment(AT, 1),
            vec![Descriptor::segment(AT, 1)],
            Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS,
        ),
    ];
    for (i, (first, list, status)) in cases.into_iter().enumerate() {
        let mut memory = Memory::default();
        memory.put(AT, &list);
        let got = walked(&mut memory, first, 512).0.err();
        assert_eq!(got.unwrap_or(Status::SUCCESS), status, "case {i}");
    }
    // Nothing is read, and nothing judged, for no data.
    assert_eq!(walked(&mut Memory::default(), last(1), 0), (Ok(()), vec![]));
}

#[test]
fn what_the_sink_says_ends_the_walk() {
    let result = walk(
        Descriptor::data(0, 4),
        4,
        &mut Memory::default(),
        &mut |_| Err(Status::INTERNAL_ERROR),
    );
    assert_eq!(result, Err(Status::INTERNAL_ERROR));
}

#[test]
fn a_command_carries_its_descriptor() {
    let d = Descriptor {
        reserved: [1, 2, 3],
        ..Descriptor::last_segment(0x1234_5678_9abc_def0, 7)
    };
    let sqe = d.put(Sqe::default());
    assert_eq!(Descriptor::of(&sqe), d);
    assert_eq!(sqe.psdt(), nvme_spec::command::Psdt::SGL_MPTR_BUFFER);
    assert_eq!(sqe.prp2, 0x3003_0201_0000_0070);
    let bytes = zerocopy::IntoBytes::as_bytes(&d);
    assert_eq!((bytes[8], bytes[15]), (0x70, 0x30));
}
