//! Identify structures: fields at their bytes, lists and descriptors, text fields.

use nvme_spec::identify::*;
use nvme_spec::regs::Vs;
use proptest::prelude::*;
use zerocopy::FromBytes;
use zerocopy::FromZeros;
use zerocopy::IntoBytes;

/// The bytes of a structure that are not zero.
fn set_bytes(bytes: &[u8]) -> Vec<(usize, u8)> {
    let set = bytes.iter().copied().enumerate();
    set.filter(|&(_, byte)| byte != 0).collect()
}

#[test]
fn controller_has_every_field_a_host_reads_at_its_byte() {
    let controller = IdentifyController {
        vid: 0x0201,
        ssvid: 0x0403,
        sn: ascii("S1"),
        mn: ascii("M"),
        fr: ascii("1.0"),
        rab: 6,
        ieee: [0xA1, 0xA2, 0xA3],
        mdts: 8,
        cntlid: 0x0605,
        ver: Vs::V1_4,
        oaes: Oaes::new().with_namespace_attribute(true),
        cntrltype: ControllerType::IO,
        oacs: Oacs::new().with_doorbell_buffer_config(true),
        acl_z: 3,
        aerl_z: 7,
        frmw: Frmw::new().with_slots(1).with_slot1_read_only(true),
        lpa: Lpa::new().with_effects(true).with_extended(true),
        elpe_z: 63,
        wctemp: 343,
        tnvmcap: Le128::new(0x0102_0304),
        sqes: EntrySize::SQ,
        cqes: EntrySize::CQ,
        nn: 16,
        oncs: Oncs::new()
            .with_compare(true)
            .with_dataset_management(true)
            .with_write_zeroes(true)
            .with_save_select(true)
            .with_timestamp(true)
            .with_verify(true),
        vwc: Vwc::new()
            .with_present(true)
            .with_flush(FlushBehavior::BROADCAST_SUPPORTED),
        awun_z: 0x0807,
        sgls: Sgls::new().with_supported(1),
        mnan: 0x0C0B_0A09,
        subnqn: utf8("nqn"),
        ..IdentifyController::default()
    };
    let mut expected: Vec<(usize, u8)> = vec![(0, 1), (1, 2), (2, 3), (3, 4)];
    let text = |at: usize, len: usize, text: &'static str| {
        (0..len).map(move |i| (at + i, text.as_bytes().get(i).copied().unwrap_or(b' ')))
    };
    expected.extend(
        text(4, 20, "S1")
            .chain(text(24, 40, "M"))
            .chain(text(64, 8, "1.0")),
    );
    expected.extend([
        (72, 6),
        (73, 0xA1),
        (74, 0xA2),
        (75, 0xA3),
        (77, 8),
        (78, 5),
        (79, 6),
        (81, 4),
        (82, 1),
        (93, 1),
        (111, 1),
        (257, 1),
        (258, 3),
        (259, 7),
        (260, 3),
        (261, 6),
        (262, 63),
        (266, 0x57),
        (267, 1),
        (280, 4),
        (281, 3),
        (282, 2),
        (283, 1),
        (512, 0x66),
        (513, 0x44),
        (516, 16),
        (520, 0xDD),
        (525, 7),
        (526, 7),
        (527, 8),
        (536, 1),
        (540, 9),
        (541, 10),
        (542, 11),
        (543, 12),
        (768, b'n'),
        (769, b'q'),
        (770, b'n'),
    ]);
    assert_eq!(set_bytes(controller.as_bytes()), expected);
    assert_eq!(
        IdentifyController::read_from_bytes(controller.as_bytes()).unwrap(),
        controller
    );
}

#[test]
fn namespace_has_every_field_a_host_reads_at_its_byte() {
    let mut namespace = IdentifyNamespace {
        nsze: 0x0807_0605_0403_0201,
        ncap: 0x11,
        nuse: 0x12,
        nsfeat: Nsfeat::new().with_optperf(true).with_uid_reuse(true),
        nlbaf_z: 1,
        flbas: Flbas::new().with_index_low(1),
        nmic: Nmic::new().with_shared(true),
        dlfeat: Dlfeat::new()
            .with_read(DeallocatedRead::ZEROES)
            .with_write_zeroes_deallocate(true),
        npwg_z: 7,
        nsattr: Nsattr::new().with_write_protected(true),
        nguid: [0xAA; 16],
        eui64: [0xBB; 8],
        ..IdentifyNamespace::default()
    };
    namespace.lbaf[0].lbads = 9;
    namespace.lbaf[1] = LbaFormat {
        ms: 8,
        lbads: 12,
        rp: 1,
    };
    let mut expected: Vec<(usize, u8)> = (0..8).map(|i| (i, i as u8 + 1)).collect();
    expected.extend([
        (8, 0x11),
        (16, 0x12),
        (24, 0x18),
        (25, 1),
        (26, 1),
        (30, 1),
        (33, 9),
        (64, 7),
        (99, 1),
    ]);
    expected.extend(
        (104..120)
            .map(|at| (at, 0xAA))
            .chain((120..128).map(|at| (at, 0xBB))),
    );
    expected.extend([(130, 9), (132, 8), (134, 12), (135, 1)]);
    assert_eq!(set_bytes(namespace.as_bytes()), expected);
    assert_eq!(namespace.current_format(), Some(&namespace.lbaf[1]));
}

#[test]
fn current_format_is_one_there_is() {
    let mut namespace = IdentifyNamespace::default();
    for (nlbaf_z, flbas, format) in [
        (0, 0x00, Some(0)),
        (0, 0x01, None),
        (0, 0x60, Some(0)),
        (15, 0x6F, Some(15)),
        (16, 0x20, Some(16)),
        (16, 0x21, None),
        (63, 0x6F, Some(63)),
        (255, 0xFF, Some(63)),
    ] {
        namespace.nlbaf_z = nlbaf_z;
        namespace.flbas = Flbas::from_bits(flbas);
        let expected = format.map(|index: usize| &raw const namespace.lbaf[index]);
        let got = namespace.current_format().map(|format| &raw const *format);
        assert_eq!(got, expected, "{nlbaf_z} {flbas:#x}");
    }
}

#[test]
fn other_structures_have_their_fields_at_their_bytes() {
    let independent = IoCommandSetIndependentNamespace {
        nmic: Nmic::new().with_shared(true),
        nsattr: Nsattr::new().with_write_protected(true),
        nstat: Nstat::new().with_ready(true),
        ..IoCommandSetIndependentNamespace::default()
    };
    assert_eq!(set_bytes(independent.as_bytes()), [(1, 1), (8, 1), (14, 1)]);

    let nvm = NvmControllerIdentify {
        vsl: 1,
        wzsl: 2,
        wusl: 3,
        dmrl: 4,
        dmrsl: 5,
        dmsl: 6,
        ..NvmControllerIdentify::default()
    };
    assert_eq!(
        set_bytes(nvm.as_bytes()),
        [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (8, 6)]
    );

    let mut nvm = NvmNamespaceIdentify {
        lbstm: 1,
        pic: 2,
        npdgl: 3,
        ..NvmNamespaceIdentify::default()
    };
    nvm.elbaf[63] = 4;
    assert_eq!(
        set_bytes(nvm.as_bytes()),
        [(0, 1), (8, 2), (264, 4), (268, 3)]
    );

    let sets = CommandSetCombinations::nvm_only();
    assert_eq!(set_bytes(sets.as_bytes()), [(0, 1)]);

    let state = PowerState {
        mp: 2500,
        enlat: 16,
        exlat: 4,
        ..PowerState::default()
    };
    assert_eq!(
        set_bytes(state.as_bytes()),
        [(0, 0xC4), (1, 9), (4, 16), (8, 4)]
    );
}

#[test]
fn descriptors_follow_each_other_and_end_with_zeroes() {
    let all =
        NamespaceIdDescriptors::of(Some([0xE; 8]), Some([0xF; 16]), Some([0xD; 16]), Csi::NVM);
    let mut expected = vec![1, 8, 0, 0];
    expected.extend([0xE; 8]);
    expected.extend([2, 16, 0, 0]);
    expected.extend([0xF; 16]);
    expected.extend([3, 16, 0, 0]);
    expected.extend([0xD; 16]);
    expected.extend([4, 1, 0, 0, 0]);
    assert_eq!(all.0[..expected.len()], expected);
    assert!(all.0[expected.len()..].iter().all(|&byte| byte == 0));

    let ids: Vec<_> = all.iter().collect();
    assert_eq!(ids.len(), 4);
    assert_eq!(ids[0], (NamespaceIdType::EUI64, &[0xE; 8][..]));
    assert_eq!(ids[3], (NamespaceIdType::CSI, &[0][..]));
    for (nidt, id) in ids {
        assert_eq!(nidt.id_len().map(usize::from), Some(id.len()));
    }
    let only_csi = NamespaceIdDescriptors::of(None, None, None, Csi::ZONED);
    assert_eq!(only_csi.0[..5], [4, 1, 0, 0, 2]);
    assert_eq!(NamespaceIdType(9).id_len(), None);
}

#[test]
fn lists_say_what_fits_and_in_what_order() {
    let list = NamespaceList::from_ids(2, 1..=5);
    assert_eq!(list.ids().collect::<Vec<_>>(), [3, 4, 5]);
    let full = NamespaceList::from_ids(0, 1..=u32::MAX);
    assert_eq!(full.ids().count(), 1024);
    assert_eq!(full.0[1023], 1024);
    assert_eq!(NamespaceList::from_ids(u32::MAX, 1..=5).ids().count(), 0);

    let controllers = ControllerList::from_ids(1, [0, 1, 2]);
    assert_eq!(set_bytes(controllers.as_bytes()), [(0, 2), (2, 1), (4, 2)]);
    assert_eq!(ControllerList::from_ids(0, 0..=u16::MAX).num, 2047);
}

#[test]
fn text_fields_are_padded_cut_and_clean() {
    assert_eq!(&ascii::<8>("1.0"), b"1.0     ");
    assert_eq!(&ascii::<4>("12345"), b"1234");
    assert_eq!(&ascii::<6>("a\n\u{e9}b"), b"a???b ");
    assert_eq!(ascii_text(b"1.0     "), Some("1.0"));
    assert_eq!(ascii_text(b"1.0\0\0"), Some("1.0"));
    assert_eq!(ascii_text(b"        "), Some(""));
    assert_eq!(ascii_text(&[0x31, 0xFF]), None);
    assert_eq!(&utf8::<6>("nqn"), b"nqn\0\0\0");
    assert_eq!(&utf8::<3>("nqn"), b"nq\0");
    assert_eq!(&utf8::<3>("n\u{e9}"), b"n\0\0", "no half character");
    assert_eq!(utf8::<0>("nqn"), []);
    assert_eq!(utf8_text(b"nqn\0x"), Some("nqn"));
    assert_eq!(utf8_text(b"nqn"), Some("nqn"));
    assert_eq!(utf8_text(&[0xFF, 0]), None);
}

#[test]
fn le128_is_little_endian_without_alignment() {
    let mut counter = Le128::from(0x0102_0304_0506_0708_090A_0B0C_0D0E_0F10);
    assert_eq!(counter.as_bytes()[0], 0x10);
    assert_eq!(counter.as_bytes()[15], 0x01);
    counter.set(counter.get() + 1);
    assert_eq!(counter.get(), 0x0102_0304_0506_0708_090A_0B0C_0D0E_0F11);
    assert_eq!(align_of::<Le128>(), 1);
}

#[test]
fn capability_bits_are_at_their_places() {
    assert_eq!(
        Oacs::new()
            .with_format(true)
            .with_firmware(true)
            .into_bits(),
        0x0006
    );
    assert_eq!(
        Oacs::new()
            .with_ns_management(true)
            .with_doorbell_buffer_config(true)
            .into_bits(),
        0x0108
    );
    assert_eq!(
        Lpa::new()
            .with_smart_per_namespace(true)
            .with_supported_log_pages(true)
            .into_bits(),
        0x21
    );
    assert_eq!(
        Oaes::new()
            .with_firmware_activation(true)
            .with_ana_change(true)
            .into_bits(),
        0x0A00
    );
    assert_eq!(Oaes::new().with_discovery_log(true).into_bits(), 1 << 31);
    assert_eq!(
        Ctratt::new()
            .with_host_id_128(true)
            .with_mem(true)
            .with_fdp(true)
            .into_bits(),
        0x0009_0001
    );
    assert_eq!(
        Ctratt::new().with_extended_lba_formats(true).into_bits(),
        1 << 15
    );
    assert_eq!(
        Oncs::new()
            .with_copy(true)
            .with_reservations(true)
            .into_bits(),
        0x0120
    );
    assert_eq!(Fna::new().with_no_broadcast(true).into_bits(), 8);
    assert_eq!(Cmic::new().with_multi_controller(true).into_bits(), 2);
    assert_eq!(Nwpc::new().with_permanent(true).into_bits(), 4);
    assert_eq!(Rescap::new().with_iekey(true).into_bits(), 0x80);
    assert_eq!(
        Nsfeat::new()
            .with_optrperf(true)
            .with_multi_atomicity(true)
            .into_bits(),
        0xC0
    );
    assert_eq!(Fuses::new().with_compare_and_write(true).into_bits(), 1);
    assert_eq!(
        Sgls::new()
            .with_transport(true)
            .with_bit_bucket(true)
            .into_bits(),
        0x0021_0000
    );
}

proptest! {
    /// Descriptors of a hostile device: no panic, no endless list, nothing outside the page.
    #[test]
    fn descriptors_of_anything_end(bytes in prop::collection::vec(any::<u8>(), 4096), headers in any::<bool>()) {
        let mut all = NamespaceIdDescriptors::new_zeroed();
        all.0.copy_from_slice(&bytes);
        if headers {
            all.0[1] = 255;
        }
        let total: usize = all.iter().map(|(_, id)| id.len() + 4).sum();
        prop_assert!(total <= 4096);
        for (nidt, id) in all.iter() {
            prop_assert!(nidt.0 != 0 && !id.is_empty());
        }
    }

    #[test]
    fn text_survives_the_field(text in "[!-~]([ -~]{0,18}[!-~])?") {
        let (short, long) = (ascii::<20>(&text), utf8::<64>(&text));
        prop_assert_eq!(ascii_text(&short), Some(text.as_str()));
        prop_assert_eq!(utf8_text(&long), Some(text.as_str()));
    }

    #[test]
    fn any_text_makes_a_clean_field(text in any::<String>()) {
        prop_assert!(ascii::<20>(&text).iter().all(|byte| (0x20..=0x7E).contains(byte)));
        let field = utf8::<20>(&text);
        prop_assert_eq!(field[19], 0);
        prop_assert!(utf8_text(&field).is_some_and(|kept| text.starts_with(kept)));
    }
}
