//! Identify: what the controller and its namespaces are.

use nvme_spec::Status;
use nvme_spec::admin::Identify;
use nvme_spec::command::NSID_BROADCAST;
use nvme_spec::identify::{
    Cns, CommandSetCombinations, ControllerType, Csi, DeallocatedRead, Dlfeat, EntrySize,
    FlushBehavior, Frmw, IdentifyController, IdentifyNamespace, IoCommandSetIndependentNamespace,
    LbaFormat, Le128, Lpa, NamespaceIdDescriptors, NamespaceList, Nsattr, Nsfeat, Nstat,
    NvmControllerIdentify, NvmNamespaceIdentify, Oacs, Oaes, Oncs, PowerState, Sgls, Vwc, ascii,
    utf8,
};
use zerocopy::IntoBytes as _;

use super::refusal::{Field, Refusal, invalid};
use super::{ABORT_LIMIT, events};
use crate::controller::error_log;
use crate::controller::info::{Info, NamespaceInfo};
use crate::controller::registers::VERSION;

/// The identifier of the only controller of its NVM subsystem.
pub(in crate::controller) const CNTLID: u16 = 1;

/// The firmware revision: our version.
pub(in crate::controller) const FIRMWARE: &str = env!("CARGO_PKG_VERSION");

/// The data an Identify command asks for: at most 4096 bytes, zeroes follow.
///
/// `used` tells how many blocks of the namespace at a place take up space (NUSE).
pub(super) fn identify(
    info: &Info,
    used: impl Fn(usize) -> Option<u64>,
    command: &Identify,
) -> Result<Vec<u8>, Refusal> {
    let bytes = match command.cns {
        Cns::CONTROLLER => controller(info).as_bytes().to_vec(),
        Cns::NAMESPACE => match named(info, command.nsid)? {
            Some(ns) => {
                let at = info.namespace(ns.nsid).map(|(at, _)| at);
                namespace(ns, at.and_then(used)).as_bytes().to_vec()
            }
            None => Vec::new(),
        },
        Cns::ACTIVE_NAMESPACES => list(info, command)?,
        Cns::CSI_ACTIVE_NAMESPACES => {
            nvm_only(command)?;
            list(info, command)?
        }
        Cns::NAMESPACE_ID_DESCRIPTORS => match named(info, command.nsid)? {
            Some(ns) => descriptors(ns).as_bytes().to_vec(),
            None => return Err(bad_nsid()),
        },
        Cns::CSI_NAMESPACE => {
            nvm_only(command)?;
            // No protection information, no limits beyond those of CNS 00h.
            let traits = named(info, command.nsid)?.and_then(|ns| ns.traits.as_deref());
            let nvm = traits.map_or_else(NvmNamespaceIdentify::default, |t| t.nvm);
            nvm.as_bytes().to_vec()
        }
        Cns::CSI_CONTROLLER => {
            nvm_only(command)?;
            nvm_controller(info).as_bytes().to_vec()
        }
        Cns::INDEPENDENT_NAMESPACE => match named(info, command.nsid)? {
            Some(ns) => independent(ns).as_bytes().to_vec(),
            None => Vec::new(),
        },
        Cns::IO_COMMAND_SETS => {
            // FFFFh is the controller that processes the command.
            if command.cntid != 0xFFFF && command.cntid != CNTLID {
                return Err(invalid(Field::Cdw10High));
            }
            CommandSetCombinations::nvm_only().as_bytes().to_vec()
        }
        _ => return Err(invalid(Field::Cdw10)),
    };
    Ok(bytes)
}

fn bad_nsid() -> Refusal {
    Refusal::of(Status::INVALID_NAMESPACE_OR_FORMAT, Field::Nsid)
}

/// The namespace of this NSID; `None` if the NSID could be one but is not active.
fn named(info: &Info, nsid: u32) -> Result<Option<&NamespaceInfo>, Refusal> {
    if nsid == 0 || nsid > info.max_namespaces {
        return Err(bad_nsid());
    }
    Ok(info.namespace(nsid).map(|(_, ns)| ns))
}

/// SGLS, SGL Support: data in dwords.
const DWORDS: u8 = 2;

fn nvm_only(command: &Identify) -> Result<(), Refusal> {
    match command.csi {
        Csi::NVM => Ok(()),
        _ => Err(Refusal::at(
            Status::INVALID_IO_COMMAND_SET,
            Field::Cdw11High,
            8,
        )),
    }
}

fn list(info: &Info, command: &Identify) -> Result<Vec<u8>, Refusal> {
    if command.nsid >= NSID_BROADCAST - 1 {
        return Err(bad_nsid());
    }
    let nsids = info.namespaces.iter().map(|ns| ns.nsid);
    Ok(NamespaceList::from_ids(command.nsid, nsids)
        .as_bytes()
        .to_vec())
}

fn controller(info: &Info) -> IdentifyController {
    let [vid, _, ssvid, _] = info.pci_ids;
    let capacity =
        |ns: &NamespaceInfo| u128::from(ns.geometry.blocks) << (ns.geometry.block_shift & 63);
    let [wctemp, cctemp] = info.temperatures();
    let mut c = IdentifyController {
        vid,
        ssvid,
        sn: ascii(&info.serial),
        mn: ascii(&info.model),
        fr: ascii(FIRMWARE),
        rab: 6,
        mdts: u8::try_from((info.max_transfer / 4096).max(1).ilog2()).unwrap_or(0),
        cntlid: CNTLID,
        ver: VERSION,
        oaes: Oaes::new().with_namespace_attribute(true),
        cntrltype: ControllerType::IO,
        oacs: Oacs::new().with_doorbell_buffer_config(info.doorbell_buffer),
        acl_z: (ABORT_LIMIT - 1) as u8,
        aerl_z: (events::LIMIT - 1) as u8,
        frmw: Frmw::new().with_slot1_read_only(true).with_slots(1),
        lpa: Lpa::new()
            .with_smart_per_namespace(true)
            .with_effects(true)
            .with_extended(true)
            .with_supported_log_pages(true),
        elpe_z: (error_log::ENTRIES - 1) as u8,
        wctemp,
        cctemp,
        tnvmcap: Le128::new(info.namespaces.iter().map(capacity).sum()),
        sqes: EntrySize::SQ,
        cqes: EntrySize::CQ,
        maxcmd: u16::try_from(info.max_queue_entries).unwrap_or(u16::MAX),
        nn: info.max_namespaces,
        // What an SSD does not do is not done for it.
        oncs: Oncs::new()
            .with_compare(info.traits().all(|t| t.oncs.compare()))
            .with_dataset_management(info.traits().all(|t| t.oncs.dataset_management()))
            .with_write_zeroes(info.traits().all(|t| t.oncs.write_zeroes()))
            .with_save_select(true)
            .with_timestamp(true)
            .with_verify(info.traits().all(|t| t.oncs.verify())),
        awun_z: atomic_z(info, 0),
        awupf_z: atomic_z(info, 1),
        acwu_z: atomic_z(info, 2),
        vwc: Vwc::new()
            .with_present(info.volatile_write_cache())
            .with_flush(FlushBehavior::BROADCAST_SUPPORTED),
        sgls: match info.sgls {
            // More descriptors than this may be more pieces than a transfer can have.
            true => Sgls::new().with_supported(DWORDS).with_threshold(255),
            false => Sgls::new(),
        },
        subnqn: utf8(&info.subnqn),
        ..IdentifyController::default()
    };
    if let Some(psd) = c.psd.first_mut() {
        // 10 W, no latency: the one state there is.
        *psd = PowerState {
            mp: 1000,
            ..PowerState::default()
        };
    }
    c
}

/// AWUN, AWUPF or ACWU: what all namespaces promise. Only those on SSDs promise more than a block.
fn atomic_z(info: &Info, which: usize) -> u16 {
    let of = |ns: &NamespaceInfo| {
        let traits = ns.traits.as_deref();
        traits.and_then(|t| t.atomic_z.get(which)).copied()
    };
    info.namespaces
        .iter()
        .map(|ns| of(ns).unwrap_or(0))
        .min()
        .unwrap_or(0)
}

fn namespace(ns: &NamespaceInfo, used: Option<u64>) -> IdentifyNamespace {
    let g = &ns.geometry;
    let optimal_z = u16::try_from(g.optimal_blocks.saturating_sub(1)).unwrap_or(u16::MAX);
    let mut n = IdentifyNamespace {
        nsze: g.blocks,
        ncap: g.blocks,
        nuse: used.unwrap_or(g.blocks).min(g.blocks),
        nsfeat: Nsfeat::new().with_thin(g.thin).with_optperf(optimal_z > 0),
        dlfeat: Dlfeat::new()
            .with_read(match g.deallocate_reads_zero {
                true => DeallocatedRead::ZEROES,
                false => DeallocatedRead::UNSPECIFIED,
            })
            .with_write_zeroes_deallocate(g.thin && g.deallocate_reads_zero),
        nvmcap: Le128::new(u128::from(g.blocks) << (g.block_shift & 63)),
        npwg_z: optimal_z,
        npwa_z: optimal_z,
        npdg_z: optimal_z,
        npda_z: optimal_z,
        nows_z: optimal_z,
        nsattr: Nsattr::new().with_write_protected(ns.read_only),
        nguid: ns.identity.nguid,
        eui64: ns.identity.eui64,
        ..IdentifyNamespace::default()
    };
    if let Some(traits) = &ns.traits {
        let said = &traits.namespace;
        n.nsfeat = said.nsfeat.with_thin(g.thin);
        n.dlfeat = said.dlfeat;
        (n.noiob, n.nabo) = (said.noiob, said.nabo);
        (n.nawun_z, n.nawupf_z, n.nacwu_z) = (said.nawun_z, said.nawupf_z, said.nacwu_z);
        (n.nabsn, n.nabspf) = (said.nabsn, said.nabspf);
        (n.npwg_z, n.npwa_z, n.nows_z) = (said.npwg_z, said.npwa_z, said.nows_z);
        (n.npdg_z, n.npda_z) = (said.npdg_z, said.npda_z);
    }
    if let Some(format) = n.lbaf.first_mut() {
        *format = LbaFormat {
            ms: 0,
            lbads: u8::try_from(g.block_shift).unwrap_or(0),
            rp: 0,
        };
    }
    n
}

fn independent(ns: &NamespaceInfo) -> IoCommandSetIndependentNamespace {
    /// NSFEAT: this namespace has no volatile write cache, whatever the controller says.
    const NO_VOLATILE_WRITE_CACHE: u8 = 1 << 5;
    IoCommandSetIndependentNamespace {
        nsfeat: match ns.geometry.volatile_write_cache {
            true => 0,
            false => NO_VOLATILE_WRITE_CACHE,
        },
        nsattr: Nsattr::new().with_write_protected(ns.read_only),
        nstat: Nstat::new().with_ready(true),
        ..IoCommandSetIndependentNamespace::default()
    }
}

fn nvm_controller(info: &Info) -> NvmControllerIdentify {
    // 0 is no limit: the least of the others counts.
    let least = |of: fn(&NvmControllerIdentify) -> u8| {
        let limits = info.traits().map(|t| of(&t.limits));
        limits.filter(|limit| *limit != 0).min().unwrap_or(0)
    };
    NvmControllerIdentify {
        vsl: least(|l| l.vsl),
        wzsl: least(|l| l.wzsl),
        ver: nvme_spec::regs::Vs::of(1, 0, 0).into_bits(),
        ..NvmControllerIdentify::default()
    }
}

fn descriptors(ns: &NamespaceInfo) -> NamespaceIdDescriptors {
    let id = ns.identity;
    NamespaceIdDescriptors::of(Some(id.eui64), Some(id.nguid), Some(id.uuid), Csi::NVM)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::info::tests::sample;
    use nvme_spec::identify::{NamespaceIdType, ascii_text, utf8_text};
    use zerocopy::{FromBytes, Immutable, KnownLayout};

    fn ask(cns: Cns, nsid: u32) -> Identify {
        Identify {
            cns,
            nsid,
            ..Identify::default()
        }
    }

    fn get<T: FromBytes + KnownLayout + Immutable>(command: Identify) -> T {
        T::read_from_bytes(&identify(&sample(), |at| (at == 1).then_some(77), &command).unwrap())
            .unwrap()
    }

    #[test]
    fn identify_controller_is_believable() {
        let c: IdentifyController = get(ask(Cns::CONTROLLER, 0));
        assert_eq!((c.vid, c.ssvid), (0x1234, 0x9abc));
        assert_eq!(ascii_text(&c.sn), Some("S123"));
        assert_eq!(&c.sn[..6], b"S123  ");
        assert_eq!(ascii_text(&c.fr), Some(FIRMWARE));
        assert_eq!(utf8_text(&c.subnqn), Some(sample().subnqn.as_str()));
        assert_eq!((c.mdts, c.cntlid, c.nn), (8, 1, 4));
        assert_eq!((c.sqes.into_bits(), c.cqes.into_bits()), (0x66, 0x44));
        assert_eq!((c.acl_z, c.aerl_z, c.elpe_z), (3, 3, 63));
        // Compare, DSM, Write Zeroes, save and select, Timestamp, Verify.
        assert_eq!(c.oncs.into_bits(), 0b1101_1101);
        assert_eq!(c.vwc.into_bits(), 0b111);
        assert!(c.oacs.doorbell_buffer_config());
        assert_eq!(c.oacs.into_bits(), 1 << 8);
        assert_eq!((c.fuses.into_bits(), c.sgls.into_bits()), (0, 0xff02));
        assert_eq!(c.cntrltype, ControllerType::IO);
        assert_eq!((c.npss_z, c.psd[0].mp, c.psd[1].mp), (0, 1000, 0));
        assert_eq!(c.tnvmcap.get(), (1 << 29) + (1 << 32));
        let mut info = sample();
        (info.doorbell_buffer, info.sgls) = (false, false);
        info.namespaces.remove(0);
        let c = controller(&info);
        assert!(!c.oacs.doorbell_buffer_config() && !c.vwc.present());
        assert_eq!(c.sgls.into_bits(), 0);
    }

    #[test]
    fn identify_namespace_is_its_geometry() {
        let n: IdentifyNamespace = get(ask(Cns::NAMESPACE, 3));
        assert_eq!((n.nsze, n.ncap, n.nuse), (1 << 20, 1 << 20, 77));
        assert_eq!((n.nlbaf_z, n.lbaf[0].lbads, n.lbaf[1].lbads), (0, 12, 0));
        assert!(n.nsattr.write_protected() && n.nsfeat.thin());
        assert_eq!(n.dlfeat.read(), DeallocatedRead::ZEROES);
        assert_eq!((n.npwg_z, n.nows_z), (7, 7));
        assert_eq!(n.nguid, sample().namespaces[1].identity.nguid);
        let n: IdentifyNamespace = get(ask(Cns::NAMESPACE, 1));
        assert!(!n.nsattr.write_protected());
        assert_eq!(n.lbaf[0].lbads, 9);
        let i: IoCommandSetIndependentNamespace = get(ask(Cns::INDEPENDENT_NAMESPACE, 3));
        assert!(i.nsattr.write_protected() && i.nstat.ready());
        assert_eq!(i.nsfeat, 1 << 5);
    }

    #[test]
    fn descriptors_carry_all_identifiers() {
        let d: NamespaceIdDescriptors = get(ask(Cns::NAMESPACE_ID_DESCRIPTORS, 1));
        let id = sample().namespaces[0].identity;
        let expected: Vec<(NamespaceIdType, Vec<u8>)> = vec![
            (NamespaceIdType::EUI64, id.eui64.to_vec()),
            (NamespaceIdType::NGUID, id.nguid.to_vec()),
            (NamespaceIdType::UUID, id.uuid.to_vec()),
            (NamespaceIdType::CSI, vec![0]),
        ];
        let found: Vec<_> = d.iter().map(|(t, id)| (t, id.to_vec())).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn lists_hold_active_namespaces_above_the_one_given() {
        let ids = |command| get::<NamespaceList>(command).ids().collect::<Vec<_>>();
        assert_eq!(ids(ask(Cns::ACTIVE_NAMESPACES, 0)), [1, 3]);
        assert_eq!(ids(ask(Cns::ACTIVE_NAMESPACES, 1)), [3]);
        assert_eq!(ids(ask(Cns::CSI_ACTIVE_NAMESPACES, 2)), [3]);
        assert!(ids(ask(Cns::ACTIVE_NAMESPACES, 0xFFFF_FFFD)).is_empty());
        let sets: CommandSetCombinations = get(Identify {
            cntid: 0xFFFF,
            ..ask(Cns::IO_COMMAND_SETS, 0)
        });
        assert_eq!((sets.0[0], sets.0[1]), (1, 0));
    }

    #[test]
    fn inactive_namespaces_are_zeroes_where_the_specification_says_so() {
        for cns in [
            Cns::NAMESPACE,
            Cns::INDEPENDENT_NAMESPACE,
            Cns::CSI_NAMESPACE,
        ] {
            let bytes = identify(&sample(), |at| (at == 1).then_some(77), &ask(cns, 2)).unwrap();
            assert!(bytes.iter().all(|b| *b == 0), "{cns:?}");
        }
    }

    #[test]
    fn refusals_have_their_status_and_place() {
        let nsid = Refusal::of(Status::INVALID_NAMESPACE_OR_FORMAT, Field::Nsid);
        let iocs = Refusal {
            status: Status::INVALID_IO_COMMAND_SET,
            location: 47,
        };
        let csi = |cns, nsid| Identify {
            csi: Csi::ZONED,
            ..ask(cns, nsid)
        };
        let mut cases = vec![
            (ask(Cns::NAMESPACE_ID_DESCRIPTORS, 2), nsid),
            (ask(Cns::ACTIVE_NAMESPACES, 0xFFFF_FFFE), nsid),
            (ask(Cns::CSI_ACTIVE_NAMESPACES, 0xFFFF_FFFF), nsid),
            (csi(Cns::CSI_NAMESPACE, 1), iocs),
            (csi(Cns::CSI_CONTROLLER, 0), iocs),
            (csi(Cns::CSI_ACTIVE_NAMESPACES, 0), iocs),
            (ask(Cns::IO_COMMAND_SETS, 0), invalid(Field::Cdw10High)),
        ];
        for cns in [
            Cns::NAMESPACE,
            Cns::NAMESPACE_ID_DESCRIPTORS,
            Cns::CSI_NAMESPACE,
            Cns::INDEPENDENT_NAMESPACE,
        ] {
            for bad in [0, 5, 0xFFFF_FFFE, 0xFFFF_FFFF] {
                cases.push((ask(cns, bad), nsid));
            }
        }
        for cns in (0..=255).map(Cns) {
            let known = [0, 1, 2, 3, 5, 6, 7, 8, 0x1C].contains(&cns.0);
            if !known {
                cases.push((ask(cns, 1), invalid(Field::Cdw10)));
            }
        }
        for (command, refusal) in cases {
            assert_eq!(
                identify(&sample(), |at| (at == 1).then_some(77), &command),
                Err(refusal),
                "{command:?}"
            );
        }
    }
}
