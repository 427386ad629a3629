//! Log pages and events: what happened is in them.

use std::time::Duration;

use guest_tests::daemon::{Disk, Plan, TestDaemon, queue};
use guest_tests::io::{Io, LIMIT};
use nvme_spec::Status;
use nvme_spec::admin::GetLogPage;
use nvme_spec::event::{AsyncEvent, AsyncEventConfig};
use nvme_spec::feature::{FeatureId, TemperatureThreshold};
use nvme_spec::log::{
    ChangedNamespaceList, CommandsSupportedAndEffects, ErrorLogEntry, FirmwareSlotLog, LogId,
    SmartLog, SupportedLogPages,
};
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::{AdminOpcode, NvmOpcode};
use vhost_user_nvme::backend::{Fault, Operations, Rule};
use zerocopy::FromBytes as _;

#[test]
fn smart_counts_what_was_done() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(12, 1024)));
    let mut guest = daemon.guest();
    let mut io = Io::new(&mut guest, queue(1, 16), 1);
    let before: SmartLog = guest.log_as(LogId::SMART, 0xFFFF_FFFF).unwrap();
    // 2,000 units of 512,000 bytes would be long: 250 blocks of 4 KiB are 1,024,000 bytes, two units.
    for slba in 0..250 {
        assert_eq!(io.write(slba, &[1; 4096]), Status::SUCCESS);
    }
    for slba in 0..125 {
        assert!(io.read(slba, 1).is_ok());
    }
    assert_eq!(io.flush(), Status::SUCCESS);
    let after: SmartLog = guest.log_as(LogId::SMART, 0xFFFF_FFFF).unwrap();
    let grew = |get: fn(&SmartLog) -> u128| get(&after) - get(&before);
    assert_eq!(grew(|s| s.host_write_commands.get()), 250);
    assert_eq!(grew(|s| s.host_read_commands.get()), 125);
    assert_eq!(grew(|s| s.data_units_written.get()), 2);
    assert_eq!(grew(|s| s.data_units_read.get()), 1);
    assert_eq!(grew(|s| s.media_errors.get()), 0);
    assert!((250..400).contains(&after.temperature()), "kelvins");
    assert_eq!(after.available_spare, 100);
    assert_eq!(after.critical_warning.into_bits(), 0);
}

#[test]
fn errors_are_in_the_error_log_newest_first() {
    let (disk, faults) = Disk::memory(9, 64).with_faults();
    let daemon = TestDaemon::one(Plan::of(disk));
    let mut guest = daemon.guest();
    let mut io = Io::new(&mut guest, queue(3, 16), 1);
    assert_eq!(io.write(0, &[0x11; 512 * 8]), Status::SUCCESS);
    faults.add(Rule::once(Operations::READ, Fault::Shorten(3)));
    assert_eq!(
        io.read(0, 8),
        Err(Status::UNRECOVERED_READ_ERROR),
        "a short transfer"
    );
    faults.add(Rule::once(Operations::WRITE, Fault::Shorten(1)));
    assert_eq!(
        io.write(8, &[2; 1024]),
        Status::WRITE_FAULT,
        "a short transfer"
    );
    faults.add(Rule::once(
        Operations::FLUSH,
        Fault::Fail(Status::INTERNAL_ERROR),
    ));
    assert_eq!(io.flush(), Status::INTERNAL_ERROR);
    assert_eq!(io.read(64, 1), Err(Status::LBA_OUT_OF_RANGE));
    let bytes = guest
        .log_page(LogId::ERROR, 0xFFFF_FFFF, 4 * 64, false)
        .unwrap();
    let entries: Vec<ErrorLogEntry> = bytes
        .chunks(64)
        .map(|c| ErrorLogEntry::read_from_bytes(c).unwrap())
        .collect();
    let statuses: Vec<_> = entries.iter().map(|e| e.status.status()).collect();
    assert_eq!(
        statuses,
        [
            Status::LBA_OUT_OF_RANGE,
            Status::INTERNAL_ERROR,
            Status::WRITE_FAULT,
            Status::UNRECOVERED_READ_ERROR
        ]
    );
    for pair in entries.windows(2) {
        assert!(pair[0].error_count > pair[1].error_count);
    }
    assert!(entries.iter().all(|e| e.sqid == 3 && e.nsid == 1));
    assert_eq!((entries[0].lba, entries[2].lba), (64, 8));
    let smart: SmartLog = guest.log_as(LogId::SMART, 0xFFFF_FFFF).unwrap();
    assert!(smart.media_errors.get() >= 2);
    assert_eq!(
        u128::from(entries[0].error_count),
        smart.error_log_entries.get()
    );
    // Offsets: the second entry alone.
    let data = guest.device().memory().allocate(4096).unwrap();
    let command = GetLogPage {
        lid: LogId::ERROR,
        nsid: 0xFFFF_FFFF,
        numd_z: 15,
        offset: 64,
        ..GetLogPage::default()
    };
    guest
        .admin_ok("Get Log Page", command.to_sqe(data.addr(), 0))
        .unwrap();
    assert_eq!(data.bytes(64), bytes[64..128]);
}

#[test]
fn log_pages_say_what_there_is() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 64)));
    let mut guest = daemon.guest();
    let supported: SupportedLogPages = guest.log_as(LogId::SUPPORTED, 0).unwrap();
    for lid in [
        LogId::SUPPORTED,
        LogId::ERROR,
        LogId::SMART,
        LogId::FIRMWARE_SLOT,
        LogId::CHANGED_NAMESPACES,
        LogId::COMMANDS_AND_EFFECTS,
    ] {
        assert!(supported.0[usize::from(lid.0)].lsupp(), "{lid:?}");
    }
    let firmware: FirmwareSlotLog = guest.log_as(LogId::FIRMWARE_SLOT, 0).unwrap();
    assert_eq!(firmware.afi.active(), 1);
    assert_eq!(firmware.frs[0], guest.identify().fr);
    let effects: CommandsSupportedAndEffects =
        guest.log_as(LogId::COMMANDS_AND_EFFECTS, 0).unwrap();
    for opcode in [
        AdminOpcode::IDENTIFY,
        AdminOpcode::ABORT,
        AdminOpcode::CREATE_IO_CQ,
        AdminOpcode::DOORBELL_BUFFER_CONFIG,
    ] {
        assert!(effects.admin[usize::from(opcode.0)].csupp(), "{opcode:?}");
    }
    assert!(effects.io[usize::from(NvmOpcode::WRITE.0)].lbcc());
    assert!(!effects.io[usize::from(NvmOpcode::READ.0)].lbcc());
    // What is not there, and what is beyond the end.
    for (lid, offset, numd_z, status) in [
        (LogId(0x7F), 0, 0, Status::INVALID_LOG_PAGE),
        (LogId(0xFF), 0, 0, Status::INVALID_LOG_PAGE),
        (LogId::SMART, 2, 0, Status::INVALID_FIELD),
        (LogId::SMART, 1024, 0, Status::INVALID_FIELD),
        (LogId::SMART, u64::MAX - 3, 0, Status::INVALID_FIELD),
        (LogId::SMART, 0, u32::MAX, Status::INVALID_FIELD),
    ] {
        let data = guest.device().memory().allocate(4096).unwrap();
        let command = GetLogPage {
            lid,
            nsid: 0xFFFF_FFFF,
            numd_z,
            offset,
            ..GetLogPage::default()
        };
        let got = guest
            .admin_status("Get Log Page", command.to_sqe(data.addr(), 0))
            .unwrap();
        assert_eq!(got.status(), status, "{lid:?} {offset:#x} {numd_z:#x}");
    }
}

#[test]
fn a_changed_namespace_is_told_once_until_its_log_is_read() {
    let daemon = TestDaemon::one(Plan::many(vec![
        (1, Disk::memory(9, 64)),
        (2, Disk::memory(9, 64)),
    ]));
    let mut guest = daemon.guest();
    let config = AsyncEventConfig::new().with_namespace_attribute(true);
    guest
        .set_feature(FeatureId::ASYNC_EVENT_CONFIG, 0, config.into_bits())
        .unwrap();
    guest.arm_events(3).unwrap();
    daemon.controller(0).namespace_changed(2);
    let changed = AsyncEvent::NAMESPACE_ATTRIBUTE_CHANGED;
    assert_eq!(guest.wait_event(LIMIT).unwrap(), Some(changed));
    daemon.controller(0).namespace_changed(1);
    let quiet = Duration::from_millis(30);
    assert_eq!(guest.wait_event(quiet).unwrap(), None, "masked");
    let list: ChangedNamespaceList = guest
        .log_as(LogId::CHANGED_NAMESPACES, 0xFFFF_FFFF)
        .unwrap();
    assert_eq!(list.0[..3], [1, 2, 0]);
    guest.arm_events(3).unwrap();
    // What came while it was masked is in the list that was read; or it is told now. Either way the list is empty after it.
    while guest.wait_event(quiet).unwrap().is_some() {
        let _: ChangedNamespaceList = guest
            .log_as(LogId::CHANGED_NAMESPACES, 0xFFFF_FFFF)
            .unwrap();
        guest.arm_events(3).unwrap();
    }
    daemon.controller(0).namespace_changed(2);
    assert_eq!(guest.wait_event(LIMIT).unwrap(), Some(changed));
    let list: ChangedNamespaceList = guest
        .log_as(LogId::CHANGED_NAMESPACES, 0xFFFF_FFFF)
        .unwrap();
    assert_eq!(list.0[..2], [2, 0]);
}

#[test]
fn a_temperature_threshold_below_the_temperature_is_an_event() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 64)));
    let mut guest = daemon.guest();
    let config = AsyncEventConfig::new().with_smart(0xFF);
    guest
        .set_feature(FeatureId::ASYNC_EVENT_CONFIG, 0, config.into_bits())
        .unwrap();
    guest.arm_events(1).unwrap();
    let cold = TemperatureThreshold::new().with_tmpth(200);
    guest
        .set_feature(FeatureId::TEMPERATURE_THRESHOLD, 0, cold.into_bits())
        .unwrap();
    assert_eq!(
        guest.wait_event(LIMIT).unwrap(),
        Some(AsyncEvent::TEMPERATURE_THRESHOLD)
    );
    let smart: SmartLog = guest.log_as(LogId::SMART, 0xFFFF_FFFF).unwrap();
    assert!(smart.critical_warning.temperature());
}

#[test]
fn short_transfers_leave_no_stale_success() {
    let (disk, faults) = Disk::memory(9, 64).with_faults();
    let daemon = TestDaemon::one(Plan::of(disk));
    let mut guest = daemon.guest();
    let mut io = Io::new(&mut guest, queue(1, 16), 1);
    for (operations, opcode, status) in [
        (
            Operations::READ,
            NvmOpcode::READ,
            Status::UNRECOVERED_READ_ERROR,
        ),
        (Operations::WRITE, NvmOpcode::WRITE, Status::WRITE_FAULT),
        (
            Operations::COMPARE,
            NvmOpcode::COMPARE,
            Status::UNRECOVERED_READ_ERROR,
        ),
    ] {
        for blocks in [0, 1, 7] {
            faults.add(Rule::once(operations, Fault::Shorten(blocks)));
            io.data.fill(0);
            assert_eq!(io.transfer(opcode, 0, 8), status, "{opcode:?} {blocks}");
            assert_eq!(
                io.transfer(opcode, 0, 8),
                Status::SUCCESS,
                "the next is whole"
            );
        }
    }
    let sqe = ReadWrite::new(1, 0, 0).to_sqe(NvmOpcode::VERIFY, 0, 0);
    faults.add(Rule::once(
        Operations::VERIFY,
        Fault::Fail(Status::UNRECOVERED_READ_ERROR),
    ));
    let cqe = guest_tests::io::exec(&mut io.pair, sqe);
    assert_eq!(cqe.status(), Status::UNRECOVERED_READ_ERROR);
    assert!(!cqe.status.dnr(), "a media error may be tried again");
}
