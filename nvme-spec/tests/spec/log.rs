//! Log pages: fields at their bytes, counters and lists.

use nvme_spec::Status;
use nvme_spec::StatusField;
use nvme_spec::log::*;
use nvme_spec::opcode::AdminOpcode;
use nvme_spec::opcode::NvmOpcode;
use zerocopy::IntoBytes;

/// The bytes of a structure that are not zero.
fn set_bytes(bytes: &[u8]) -> Vec<(usize, u8)> {
    let set = bytes.iter().copied().enumerate();
    set.filter(|&(_, byte)| byte != 0).collect()
}

#[test]
fn error_entry_has_every_field_at_its_byte() {
    let entry = ErrorLogEntry {
        error_count: 0x0807_0605_0403_0201,
        sqid: 0x1211,
        cid: 0x2221,
        status: StatusField::from_status(Status::LBA_OUT_OF_RANGE).with_dnr(true),
        location: ErrorLogEntry::location_of(40, 3),
        lba: 0x4847_4645_4443_4241,
        nsid: 0x5453_5251,
        vendor: 0x61,
        trtype: 0x62,
        csi: 0x63,
        opcode: 0x64,
        command_specific: 0x7877_7675_7473_7271,
        transport_specific: 0x8281,
        version: 1,
        ..ErrorLogEntry::default()
    };
    #[rustfmt::skip]
    let bytes: [u8; 42] = [
        0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08,
        0x11, 0x12, 0x21, 0x22, 0x00, 0x81, 40, 3,
        0x41, 0x42, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48,
        0x51, 0x52, 0x53, 0x54, 0x61, 0x62, 0x63, 0x64,
        0x71, 0x72, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78,
        0x81, 0x82,
    ];
    assert_eq!(entry.as_bytes()[..42], bytes);
    assert_eq!(set_bytes(&entry.as_bytes()[42..]), [(21, 1)]);
}

#[test]
fn smart_log_has_every_field_at_its_byte() {
    let mut log = SmartLog {
        critical_warning: CriticalWarning::new()
            .with_temperature(true)
            .with_read_only(true),
        available_spare: 100,
        available_spare_threshold: 10,
        percentage_used: 1,
        data_units_read: 2.into(),
        data_units_written: 3.into(),
        host_read_commands: 4.into(),
        host_write_commands: 5.into(),
        controller_busy_time: 6.into(),
        power_cycles: 7.into(),
        power_on_hours: 8.into(),
        unsafe_shutdowns: 9.into(),
        media_errors: 10.into(),
        error_log_entries: 11.into(),
        warning_temperature_time: 12,
        critical_temperature_time: 13,
        temperature_sensors: [14, 0, 0, 0, 0, 0, 0, 15],
        tmt1_transitions: 16,
        tmt2_transitions: 17,
        tmt1_time: 18,
        tmt2_time: 19,
        ..SmartLog::default()
    };
    log.set_temperature(0x0141);
    assert_eq!(log.temperature(), 0x0141);
    let expected = [
        (0, 0x0A),
        (1, 0x41),
        (2, 1),
        (3, 100),
        (4, 10),
        (5, 1),
        (32, 2),
        (48, 3),
        (64, 4),
        (80, 5),
        (96, 6),
        (112, 7),
        (128, 8),
        (144, 9),
        (160, 10),
        (176, 11),
        (192, 12),
        (196, 13),
        (200, 14),
        (214, 15),
        (216, 16),
        (220, 17),
        (224, 18),
        (228, 19),
    ];
    assert_eq!(set_bytes(log.as_bytes()), expected);
}

#[test]
fn data_units_are_thousands_of_512_bytes_rounded_up() {
    let table = [
        (0, 0),
        (1, 1),
        (512, 1),
        (512_000, 1),
        (512_001, 2),
        (u128::from(u64::MAX), 36_028_797_018_964),
    ];
    for (bytes, units) in table {
        assert_eq!(SmartLog::data_units(bytes).get(), units, "{bytes}");
    }
    assert_eq!(
        SmartLog::data_units(u128::MAX).get(),
        u128::MAX / 512_000 + 1
    );
}

#[test]
fn other_logs_have_their_fields_at_their_bytes() {
    let mut firmware = FirmwareSlotLog {
        afi: Afi::new().with_active(1).with_next(2),
        ..FirmwareSlotLog::default()
    };
    firmware.frs[0] = *b"1.2.3   ";
    assert_eq!(firmware.as_bytes()[0], 0x21);
    assert_eq!(&firmware.as_bytes()[8..16], b"1.2.3   ");

    let mut effects = CommandsSupportedAndEffects::default();
    effects.set_admin(AdminOpcode::IDENTIFY, Effect::new().with_csupp(true));
    effects.set_io(
        NvmOpcode::WRITE,
        Effect::new().with_csupp(true).with_lbcc(true),
    );
    effects.set_io(NvmOpcode(0xFF), Effect::new().with_cse(2));
    let expected = [(0x06 * 4, 1), (1024 + 4, 3), (1024 + 0xFF * 4 + 2, 2)];
    assert_eq!(set_bytes(effects.as_bytes()), expected);
    assert_eq!(
        Effect::new().with_cse(7).with_uss(true).into_bits(),
        0x000F_0000
    );

    let supported = SupportedLogPages::from_ids([LogId::SUPPORTED, LogId::SMART, LogId(0xFF)]);
    assert_eq!(set_bytes(supported.as_bytes()), [(0, 1), (8, 1), (1020, 1)]);
}

#[test]
fn changed_namespaces_overflow_to_the_one_entry_that_says_so() {
    let few = ChangedNamespaceList::from_ids([1, 5]);
    assert_eq!(few.0[..3], [1, 5, 0]);
    let full = ChangedNamespaceList::from_ids(1..=1024);
    assert_eq!(full.0[1023], 1024);
    let over = ChangedNamespaceList::from_ids(1..=1025);
    assert_eq!(over.0[..2], [u32::MAX, 0]);
    assert_eq!(
        ChangedNamespaceList::from_ids([]),
        ChangedNamespaceList::default()
    );
}
