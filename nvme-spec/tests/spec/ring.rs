//! Ring arithmetic against a naive queue, for every small size and for any size.

use nvme_spec::ring::Phase;
use nvme_spec::ring::RingSize;
use proptest::prelude::*;

fn any_size() -> impl Strategy<Value = RingSize> {
    prop_oneof![2u32..=5, 2u32..=65536, Just(65535u32), Just(65536u32)]
        .prop_map(|entries| RingSize::new(entries).unwrap())
}

#[test]
fn size_is_2_to_65536_in_either_form() {
    assert_eq!(RingSize::from_z(0), None);
    for size_z in 1..=u16::MAX {
        let size = RingSize::from_z(size_z).unwrap();
        assert_eq!(size.get(), u32::from(size_z) + 1);
        assert_eq!(size.size_z(), size_z);
        assert_eq!(size.capacity(), u32::from(size_z));
        assert_eq!(RingSize::new(size.get()), Some(size));
    }
    for entries in [0, 1, 65537, 65538, 1 << 31, u32::MAX] {
        assert_eq!(RingSize::new(entries), None, "{entries}");
    }
    assert_eq!(RingSize::MIN.get(), 2);
    assert_eq!(RingSize::MAX.get(), 65536);
}

#[test]
fn small_rings_agree_with_counting_one_by_one() {
    for entries in 2..=17u32 {
        let size = RingSize::new(entries).unwrap();
        for head in 0..entries as u16 {
            let mut at = head;
            for n in 0..entries {
                assert_eq!(size.advance(head, n), at);
                assert_eq!(size.distance(head, at), n);
                assert_eq!(size.free(head, at), entries - 1 - n);
                assert_eq!(size.is_empty(head, at), n == 0);
                assert_eq!(size.is_full(head, at), n == entries - 1);
                let next = (u32::from(at) + 1) % entries;
                assert_eq!(u32::from(size.next(at)), next);
                at = next as u16;
            }
            assert_eq!(at, head, "once round");
        }
    }
}

#[test]
fn phase_starts_at_one_and_toggles_exactly_at_the_wrap() {
    for entries in [2, 3, 64, 65536u32] {
        let size = RingSize::new(entries).unwrap();
        let (mut at, mut phase) = (0, Phase::FIRST);
        for i in 0..3 * entries {
            assert_eq!(u32::from(at), i % entries);
            assert_eq!(phase.bit(), i / entries % 2 == 0);
            (at, phase) = size.next_with_phase(at, phase);
        }
    }
    assert_eq!(Phase::default(), Phase::FIRST);
    assert_eq!(Phase::from_bit(false), Phase::FIRST.toggled());
}

proptest! {
    #[test]
    fn doorbell_value_is_an_index_only_below_the_size(size in any_size(), value in prop_oneof![any::<u32>(), 0u32..70000]) {
        let valid = value < size.get();
        prop_assert_eq!(size.is_valid_index(value), valid);
        prop_assert_eq!(size.index(value).map(u32::from), valid.then_some(value));
    }

    #[test]
    fn arithmetic_is_modulo_the_size(size in any_size(), from in any::<u32>(), n in any::<u32>()) {
        let entries = u64::from(size.get());
        let from = (u64::from(from) % entries) as u16;
        let to = size.advance(from, n);
        prop_assert_eq!(u64::from(to), (u64::from(from) + u64::from(n)) % entries);
        prop_assert_eq!(u64::from(size.distance(from, to)), u64::from(n) % entries);
        prop_assert_eq!(size.next(from), size.advance(from, 1));
        prop_assert_eq!(size.free(from, to) == 0, size.is_full(from, to));
        prop_assert_eq!(size.distance(from, to) == 0, size.is_empty(from, to));
    }

    #[test]
    fn foreign_indexes_stay_inside_the_ring(size in any_size(), a in any::<u16>(), b in any::<u16>(), n in any::<u32>()) {
        prop_assert!(u32::from(size.next(a)) < size.get());
        prop_assert!(u32::from(size.advance(a, n)) < size.get());
        prop_assert!(size.distance(a, b) < size.get());
        prop_assert!(size.free(a, b) < size.get());
    }
}
