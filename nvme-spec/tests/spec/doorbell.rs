//! Doorbell offsets, and the EventIdx rule with a simulated host on every ring size.

use nvme_spec::doorbell::Doorbell;
use nvme_spec::doorbell::DoorbellStride;
use nvme_spec::doorbell::armed;
use nvme_spec::doorbell::need_event;
use nvme_spec::doorbell::suppressed;
use nvme_spec::ring::RingSize;
use proptest::prelude::*;

fn any_doorbell() -> impl Strategy<Value = Doorbell> {
    let qid = prop_oneof![0u16..=64, any::<u16>()];
    (qid, any::<bool>()).prop_map(|(qid, sq)| match sq {
        true => Doorbell::Sq(qid),
        false => Doorbell::Cq(qid),
    })
}

#[test]
fn offsets_are_those_of_the_specification() {
    let packed = DoorbellStride::PACKED;
    let table = [
        (packed, Doorbell::Sq(0), 0x1000),
        (packed, Doorbell::Cq(0), 0x1004),
        (packed, Doorbell::Sq(1), 0x1008),
        (packed, Doorbell::Cq(1), 0x100C),
        (packed, Doorbell::Cq(65535), 0x1000 + 131071 * 4),
        (DoorbellStride::new(4), Doorbell::Sq(1), 0x1080),
        (DoorbellStride::new(4), Doorbell::Cq(64), 0x1000 + 129 * 64),
        (
            DoorbellStride::new(15),
            Doorbell::Cq(65535),
            0x1000 + 131071 * 131072,
        ),
    ];
    for (stride, doorbell, offset) in table {
        assert_eq!(
            stride.bar_offset(doorbell),
            offset,
            "{stride:?} {doorbell:?}"
        );
        assert_eq!(stride.window_offset(doorbell), offset - 0x1000);
        assert_eq!(stride.shadow_offset(doorbell), offset - 0x1000);
        assert_eq!(stride.decode_bar(offset), Some(doorbell));
    }
}

#[test]
fn nothing_but_the_first_byte_of_a_doorbell_decodes() {
    let stride = DoorbellStride::new(1);
    for offset in 0..64u64 {
        assert_eq!(stride.decode(offset).is_some(), offset % 8 == 0, "{offset}");
    }
    for offset in [0, 0x14, 0xFFC, 0xFFF] {
        assert_eq!(stride.decode_bar(offset), None, "{offset:#x} is a register");
    }
    assert_eq!(
        DoorbellStride::PACKED.decode(131072 * 4),
        None,
        "beyond CQ 65535"
    );
    assert_eq!(DoorbellStride::PACKED.decode(u64::MAX), None);
    assert_eq!(DoorbellStride::PACKED.decode(!3), None);
}

#[test]
fn shadow_buffer_of_64_queue_pairs_fits_a_page_up_to_dstrd_2() {
    // Admin and 64 I/O pairs: 130 doorbells. The host allocates by the same arithmetic.
    assert_eq!(DoorbellStride::PACKED.window_len(64), 520);
    assert!(DoorbellStride::new(2).window_len(64) <= 4096);
    assert!(DoorbellStride::new(3).window_len(64) > 4096);
}

#[test]
fn stride_takes_the_four_bits_of_the_field_only() {
    for dstrd in 0..=u8::MAX {
        let stride = DoorbellStride::new(dstrd);
        assert_eq!(stride.dstrd(), dstrd & 15);
        assert_eq!(stride.bytes(), 4 << (dstrd & 15));
    }
}

/// The rule by counting: is `event_idx + 1` met on the way from `old` (excluded) to `new`?
fn passes(event_idx: u16, new: u16, old: u16) -> bool {
    let mut at = old;
    while at != new {
        at = at.wrapping_add(1);
        if at == event_idx.wrapping_add(1) {
            return true;
        }
    }
    false
}

#[test]
fn armed_rings_at_every_next_change_of_every_small_ring() {
    for entries in 2..=40u16 {
        for seen in 0..entries {
            for new in (0..entries).filter(|&new| new != seen) {
                assert!(need_event(armed(seen), new, seen), "{entries} {seen} {new}");
            }
        }
    }
}

#[test]
fn suppressed_does_not_ring_within_a_lap_of_any_small_ring() {
    for entries in 2..=40u32 {
        let size = RingSize::new(entries).unwrap();
        for seen in 0..entries as u16 {
            // Every change from one place to a later one, short of coming round to `seen`.
            for from in 0..entries {
                for to in from + 1..entries {
                    let (old, new) = (size.advance(seen, from), size.advance(seen, to));
                    assert!(
                        !need_event(suppressed(seen), new, old),
                        "{entries} {seen} {old} {new}"
                    );
                }
            }
        }
    }
}

/// Why the controller must look again after arming: a host that had moved on before, does not ring.
#[test]
fn armed_with_a_stale_value_is_a_lost_wake_up() {
    let (seen, moved, next) = (5, 6, 7);
    assert!(!need_event(armed(seen), next, moved));
    assert!(need_event(armed(moved), next, moved));
}

proptest! {
    #[test]
    fn decode_is_the_inverse_of_offset(dstrd in 0u8..16, doorbell in any_doorbell()) {
        let stride = DoorbellStride::new(dstrd);
        prop_assert_eq!(stride.decode(stride.window_offset(doorbell)), Some(doorbell));
        prop_assert_eq!(stride.decode_bar(stride.bar_offset(doorbell)), Some(doorbell));
        prop_assert_eq!(Doorbell::from_index(u64::from(doorbell.index())), Some(doorbell));
    }

    #[test]
    fn decode_accepts_only_offsets_it_would_give(dstrd in 0u8..16, offset in prop_oneof![any::<u64>(), 0u64..1 << 20]) {
        let stride = DoorbellStride::new(dstrd);
        if let Some(doorbell) = stride.decode(offset) {
            prop_assert_eq!(stride.window_offset(doorbell), offset);
        }
        if let Some(doorbell) = stride.decode_bar(offset) {
            prop_assert_eq!(stride.bar_offset(doorbell), offset);
        }
    }

    #[test]
    fn need_event_is_passing_the_event_index(event_idx in any::<u16>(), new in any::<u16>(), old in any::<u16>()) {
        prop_assert_eq!(need_event(event_idx, new, old), passes(event_idx, new, old));
    }

    #[test]
    fn armed_rings_at_the_next_change(entries in 2u32..=65536, seen in any::<u32>(), by in 1u32..65536) {
        let size = RingSize::new(entries).unwrap();
        let seen = (seen % entries) as u16;
        let new = size.advance(seen, by % (entries - 1) + 1);
        if new != seen {
            prop_assert!(need_event(armed(seen), new, seen));
        }
    }

    /// A host that goes on and on while the controller never refreshes its suppression: silence
    /// short of a lap, and at most one ring per lap after that.
    #[test]
    fn suppressed_rings_at_most_once_per_lap(
        entries in prop_oneof![2u32..=8, 2u32..=65536, Just(65536u32)],
        seen in any::<u32>(),
        steps in prop::collection::vec(any::<u32>(), 1..200),
    ) {
        let size = RingSize::new(entries).unwrap();
        let seen = (seen % entries) as u16;
        let (mut at, mut gone, mut rings) = (seen, 0u64, 0u64);
        for step in steps {
            let step = step % size.capacity() + 1;
            let new = size.advance(at, step);
            gone += u64::from(step);
            if need_event(suppressed(seen), new, at) {
                rings += 1;
            }
            prop_assert_eq!(rings, gone / u64::from(entries));
            at = new;
        }
    }

    /// A controller that polls and refreshes is never rung, however the host moves.
    #[test]
    fn suppressed_and_refreshed_is_silent(
        entries in prop_oneof![2u32..=8, 2u32..=65536, Just(65536u32)],
        start in any::<u32>(),
        steps in prop::collection::vec((any::<u32>(), any::<bool>()), 1..200),
    ) {
        let size = RingSize::new(entries).unwrap();
        let mut seen = (start % entries) as u16;
        let mut at = seen;
        for (step, refresh) in steps {
            // The host cannot pass the entries the controller has not taken.
            let room = size.free(seen, at);
            if room > 0 {
                let new = size.advance(at, step % room + 1);
                prop_assert!(!need_event(suppressed(seen), new, at));
                at = new;
            }
            if refresh || room == 0 {
                seen = at;
            }
        }
    }
}
