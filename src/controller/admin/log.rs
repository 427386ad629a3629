//! Get Log Page: which pages there are, and what part of one is wanted.

use nvme_spec::admin::GetLogPage;
use nvme_spec::command::NSID_BROADCAST;
use nvme_spec::feature::FeatureId;
use nvme_spec::identify::{Oncs, ascii};
use nvme_spec::log::{
    Afi, ChangedNamespaceList, CommandsSupportedAndEffects, CriticalWarning, Effect,
    FirmwareSlotLog, LogId, SupportedLogPages,
};
use nvme_spec::opcode::{AdminOpcode, NvmOpcode};
use nvme_spec::{Status, log};
use zerocopy::IntoBytes as _;

use super::features::SUPPORTED as FEATURES;
use super::identify::FIRMWARE;
use super::refusal::{Field, Refusal, invalid};
use crate::controller::error_log::ErrorLog;
use crate::controller::health::{Health, SsdHealth};
use crate::controller::info::Info;

/// The pages there are.
const PAGES: [LogId; 8] = [
    LogId::SUPPORTED,
    LogId::ERROR,
    LogId::SMART,
    LogId::FIRMWARE_SLOT,
    LogId::CHANGED_NAMESPACES,
    LogId::COMMANDS_AND_EFFECTS,
    LogId::FEATURES_AND_EFFECTS,
    LogId::MI_COMMANDS_AND_EFFECTS,
];

/// Scope bits of an effects entry (bits 31:20): a namespace, the controller.
const SCOPE_NAMESPACE: u16 = 1 << 0;
const SCOPE_CONTROLLER: u16 = 1 << 1;

/// What the pages are made of.
pub(in crate::controller) struct Sources<'a> {
    pub(in crate::controller) info: &'a Info,
    pub(in crate::controller) errors: &'a ErrorLog,
    pub(in crate::controller) health: &'a Health,
    pub(in crate::controller) warning: CriticalWarning,
    pub(in crate::controller) ssds: &'a SsdHealth,
    pub(in crate::controller) changed: &'a [u32],
}

/// The bytes a command asks for: no more than its length, and fewer where the page ends.
pub(super) fn read(sources: &Sources<'_>, command: &GetLogPage) -> Result<Vec<u8>, Refusal> {
    if !PAGES.contains(&command.lid) {
        return Err(Refusal::of(Status::INVALID_LOG_PAGE, Field::Cdw10));
    }
    if command.ot {
        // No page is a list with an index (LID Supported and Effects, IOS).
        return Err(Refusal::at(Status::INVALID_FIELD, Field::Cdw14, 23));
    }
    if command.byte_len() > u64::from(sources.info.max_transfer) {
        return Err(invalid(Field::Cdw10High));
    }
    let mut page = page(sources, command)?;
    let offset = usize::try_from(command.offset).unwrap_or(usize::MAX);
    if offset > page.len() || !offset.is_multiple_of(4) {
        return Err(invalid(Field::Cdw12));
    }
    page.drain(..offset);
    page.truncate(usize::try_from(command.byte_len()).unwrap_or(usize::MAX));
    Ok(page)
}

fn page(sources: &Sources<'_>, command: &GetLogPage) -> Result<Vec<u8>, Refusal> {
    let whole = command.nsid == 0 || command.nsid == NSID_BROADCAST;
    if command.lid == LogId::SMART {
        let only = match whole {
            true => None,
            false => match sources.info.namespace(command.nsid) {
                Some((at, _)) => Some(at),
                None => {
                    return Err(Refusal::of(
                        Status::INVALID_NAMESPACE_OR_FORMAT,
                        Field::Nsid,
                    ));
                }
            },
        };
        let errors = sources.errors.count();
        let log = sources
            .health
            .log(sources.info, only, sources.warning, errors, sources.ssds);
        return Ok(log.as_bytes().to_vec());
    }
    if !whole {
        return Err(invalid(Field::Nsid));
    }
    Ok(match command.lid {
        LogId::SUPPORTED => SupportedLogPages::from_ids(PAGES).as_bytes().to_vec(),
        LogId::ERROR => sources.errors.page(),
        LogId::FIRMWARE_SLOT => firmware().as_bytes().to_vec(),
        LogId::CHANGED_NAMESPACES => {
            ChangedNamespaceList::from_ids(sources.changed.iter().copied())
                .as_bytes()
                .to_vec()
        }
        LogId::COMMANDS_AND_EFFECTS => effects(sources.info).as_bytes().to_vec(),
        LogId::FEATURES_AND_EFFECTS => features(sources.info),
        // MI_COMMANDS_AND_EFFECTS: there are no such commands.
        _ => vec![0; 4096],
    })
}

fn firmware() -> FirmwareSlotLog {
    let mut log = FirmwareSlotLog {
        afi: Afi::new().with_active(1),
        ..FirmwareSlotLog::default()
    };
    if let Some(slot) = log.frs.first_mut() {
        *slot = ascii(FIRMWARE);
    }
    log
}

/// What each command does to others. Scopes (CSP) are optional and left out: Linux calls an I/O command that
/// reports one unusual, in the kernel log.
fn effects(info: &Info) -> log::CommandsSupportedAndEffects {
    let supported = Effect::new().with_csupp(true);
    let (admin, read) = (supported, supported);
    let write = supported.with_lbcc(true);
    let mut log = CommandsSupportedAndEffects::default();
    for opcode in [
        AdminOpcode::DELETE_IO_SQ,
        AdminOpcode::CREATE_IO_SQ,
        AdminOpcode::GET_LOG_PAGE,
        AdminOpcode::DELETE_IO_CQ,
        AdminOpcode::CREATE_IO_CQ,
        AdminOpcode::IDENTIFY,
        AdminOpcode::ABORT,
        AdminOpcode::SET_FEATURES,
        AdminOpcode::GET_FEATURES,
        AdminOpcode::ASYNC_EVENT_REQUEST,
    ] {
        log.set_admin(opcode, admin);
    }
    if info.doorbell_buffer {
        log.set_admin(AdminOpcode::DOORBELL_BUFFER_CONFIG, admin);
    }
    let all = |has: fn(&Oncs) -> bool| info.traits().all(|t| has(&t.oncs));
    for (opcode, effect, there) in [
        (NvmOpcode::FLUSH, read, true),
        (NvmOpcode::READ, read, true),
        (NvmOpcode::COMPARE, read, all(Oncs::compare)),
        (NvmOpcode::VERIFY, read, all(Oncs::verify)),
        (NvmOpcode::WRITE, write, true),
        (NvmOpcode::WRITE_ZEROES, write, all(Oncs::write_zeroes)),
        (
            NvmOpcode::DATASET_MANAGEMENT,
            write,
            all(Oncs::dataset_management),
        ),
    ] {
        if there {
            log.set_io(opcode, effect);
        }
    }
    // Nobody knows what these do: the worst is said.
    for opcode in info.traits().flat_map(|t| t.pass.iter()) {
        log.set_io(NvmOpcode(opcode), write);
    }
    log
}

/// Feature Identifiers Supported and Effects: a dword for each feature. Bit 0 supported, bit 1 user data content change, bit
/// 4 controller capability change, bits 31:20 scope.
fn features(info: &Info) -> Vec<u8> {
    let mut page = vec![0; 1024];
    for fid in FEATURES {
        if fid == FeatureId::VOLATILE_WRITE_CACHE && !info.volatile_write_cache() {
            continue;
        }
        let scope = match fid {
            FeatureId::ERROR_RECOVERY => SCOPE_NAMESPACE,
            _ => SCOPE_CONTROLLER,
        };
        let entry = 1u32 | u32::from(scope) << 20;
        let at = usize::from(fid.0).saturating_mul(4);
        if let Some(slot) = page.get_mut(at..at.saturating_add(4)) {
            slot.copy_from_slice(&entry.to_le_bytes());
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::info::tests::sample;
    use crate::poller::IoFailure;
    use nvme_spec::log::{ErrorLogEntry, SmartLog};
    use zerocopy::FromBytes as _;

    fn ask(lid: LogId, bytes: u32) -> GetLogPage {
        GetLogPage {
            lid,
            numd_z: bytes / 4 - 1,
            nsid: NSID_BROADCAST,
            ..GetLogPage::default()
        }
    }

    fn with<T>(f: impl FnOnce(&Sources<'_>) -> T) -> T {
        let info = sample();
        let mut errors = ErrorLog::default();
        for cid in 0..3 {
            errors.record(&IoFailure {
                sqid: 1,
                cid,
                status: Status::LBA_OUT_OF_RANGE.into(),
                nsid: 1,
                lba: 9,
                parameter: 0xFFFF,
            });
        }
        let mut health = Health::new(1);
        health.stats_for(0, 2)[1].writes.add(4);
        f(&Sources {
            info: &info,
            errors: &errors,
            health: &health,
            warning: CriticalWarning::new().with_temperature(true),
            ssds: &SsdHealth::default(),
            changed: &[2, 3],
        })
    }

    #[test]
    fn any_offset_and_length_is_that_part_of_the_page() {
        with(|s| {
            for lid in PAGES {
                let whole = read(s, &ask(lid, 8192)).unwrap();
                let size = whole.len() as u32;
                assert!(size >= 512, "{lid:?}");
                for offset in [0, 4, 64, size / 2, size - 4, size] {
                    for len in [4, 60, 512, 4096] {
                        let mut command = ask(lid, len);
                        command.offset = offset.into();
                        let end = (offset + len).min(size);
                        let expected = &whole[offset as usize..end as usize];
                        assert_eq!(
                            read(s, &command).unwrap(),
                            expected,
                            "{lid:?} {offset} {len}"
                        );
                    }
                }
                for bad in [u64::from(size) + 4, 2, u64::MAX] {
                    let mut command = ask(lid, 4);
                    command.offset = bad;
                    assert_eq!(
                        read(s, &command),
                        Err(invalid(Field::Cdw12)),
                        "{lid:?} {bad}"
                    );
                }
            }
        });
    }

    #[test]
    fn pages_hold_what_they_should() {
        with(|s| {
            let smart =
                SmartLog::read_from_bytes(&read(s, &ask(LogId::SMART, 512)).unwrap()).unwrap();
            assert_eq!(smart.host_write_commands.get(), 4);
            assert_eq!(smart.error_log_entries.get(), 3);
            assert!(smart.critical_warning.temperature());
            let mut one = ask(LogId::SMART, 512);
            one.nsid = 1;
            let smart = SmartLog::read_from_bytes(&read(s, &one).unwrap()).unwrap();
            assert_eq!(smart.host_write_commands.get(), 0);
            let mut second = ask(LogId::ERROR, 64);
            second.offset = 64;
            let entry = ErrorLogEntry::read_from_bytes(&read(s, &second).unwrap()).unwrap();
            assert_eq!((entry.error_count, entry.cid), (2, 1));
            let fw = read(s, &ask(LogId::FIRMWARE_SLOT, 512)).unwrap();
            assert_eq!((fw[0], &fw[8..13]), (1, FIRMWARE.as_bytes()));
            let changed = read(s, &ask(LogId::CHANGED_NAMESPACES, 12)).unwrap();
            assert_eq!(changed, [2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
            let pages = read(s, &ask(LogId::SUPPORTED, 1024)).unwrap();
            let lids: Vec<_> = (0..256).filter(|i| pages[i * 4] & 1 != 0).collect();
            assert_eq!(lids, [0, 1, 2, 3, 4, 5, 0x12, 0x13]);
            let effects = read(s, &ask(LogId::COMMANDS_AND_EFFECTS, 4096)).unwrap();
            assert_eq!(effects[6 * 4] & 1, 1, "Identify");
            assert_eq!(effects[0x80 * 4], 0, "Format NVM");
            assert_eq!(
                effects[1024 + 4..][..4],
                [3, 0, 0, 0],
                "Write changes blocks, and nothing unusual"
            );
            assert_eq!(effects[1024 + 8..][..4], [1, 0, 0, 0], "Read does not");
            let features = read(s, &ask(LogId::FEATURES_AND_EFFECTS, 1024)).unwrap();
            assert_eq!((features[7 * 4], features[0x0D * 4]), (1, 0));
        });
    }

    #[test]
    fn refusals_have_their_status_and_place() {
        with(|s| {
            let mut cases = Vec::new();
            for lid in (0..=255).map(LogId).filter(|lid| !PAGES.contains(lid)) {
                cases.push((
                    ask(lid, 4),
                    Refusal::of(Status::INVALID_LOG_PAGE, Field::Cdw10),
                ));
            }
            let mut index = ask(LogId::ERROR, 4);
            index.ot = true;
            cases.push((
                index,
                Refusal {
                    status: Status::INVALID_FIELD,
                    location: 58 | 7 << 8,
                },
            ));
            let mut long = ask(LogId::ERROR, 4);
            long.numd_z = u32::MAX;
            cases.push((long, invalid(Field::Cdw10High)));
            let mut ns = ask(LogId::ERROR, 4);
            ns.nsid = 1;
            cases.push((ns, invalid(Field::Nsid)));
            let mut inactive = ask(LogId::SMART, 4);
            inactive.nsid = 2;
            let nsid = Refusal::of(Status::INVALID_NAMESPACE_OR_FORMAT, Field::Nsid);
            cases.push((inactive, nsid));
            for (command, refusal) in cases {
                assert_eq!(read(s, &command), Err(refusal), "{command:?}");
            }
        });
    }
}
