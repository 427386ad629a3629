//! Command views: dwords written down by hand, and both ways round for every value.

use nvme_spec::Sqe;
use nvme_spec::admin::Abort;
use nvme_spec::admin::AsyncEventRequest;
use nvme_spec::admin::CreateIoCq;
use nvme_spec::admin::CreateIoSq;
use nvme_spec::admin::DeleteQueue;
use nvme_spec::admin::DoorbellBufferConfig;
use nvme_spec::admin::GetFeatures;
use nvme_spec::admin::GetLogPage;
use nvme_spec::admin::Identify;
use nvme_spec::admin::QueuePriority;
use nvme_spec::admin::SetFeatures;
use nvme_spec::feature::FeatureId;
use nvme_spec::feature::Select;
use nvme_spec::identify::Cns;
use nvme_spec::identify::Csi;
use nvme_spec::log::LogId;
use nvme_spec::nvm::DatasetManagement;
use nvme_spec::nvm::DsmHints;
use nvme_spec::nvm::Flush;
use nvme_spec::nvm::Prinfo;
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use proptest::prelude::*;
use zerocopy::FromBytes;

/// What a command should be: everything not named is zero.
fn sqe(opcode: u8, nsid: u32, prps: [u64; 2], cdw10_to_15: [u32; 6]) -> Sqe {
    let [cdw10, cdw11, cdw12, cdw13, cdw14, cdw15] = cdw10_to_15;
    Sqe {
        opcode,
        nsid,
        prp1: prps[0],
        prp2: prps[1],
        cdw10,
        cdw11,
        cdw12,
        cdw13,
        cdw14,
        cdw15,
        ..Sqe::default()
    }
}

#[test]
fn create_queues_are_those_linux_sends() {
    let cq = CreateIoCq {
        prp1: 0x1000,
        qid: 1,
        qsize_z: 1023,
        pc: true,
        ien: true,
        iv: 1,
    };
    assert_eq!(
        cq.to_sqe(),
        sqe(0x05, 0, [0x1000, 0], [0x03FF_0001, 0x0001_0003, 0, 0, 0, 0])
    );
    let sq = CreateIoSq {
        prp1: 0x2000,
        qid: 1,
        qsize_z: 1023,
        pc: true,
        qprio: QueuePriority::MEDIUM,
        cqid: 1,
        nvmsetid: 0,
    };
    assert_eq!(
        sq.to_sqe(),
        sqe(0x01, 0, [0x2000, 0], [0x03FF_0001, 0x0001_0005, 0, 0, 0, 0])
    );
    assert_eq!(
        DeleteQueue { qid: 7 }.to_sq_sqe(),
        sqe(0x00, 0, [0, 0], [7, 0, 0, 0, 0, 0])
    );
    assert_eq!(
        DeleteQueue { qid: 7 }.to_cq_sqe(),
        sqe(0x04, 0, [0, 0], [7, 0, 0, 0, 0, 0])
    );
}

#[test]
fn identify_and_log_and_features_have_their_dwords() {
    let identify = Identify {
        cns: Cns::CSI_NAMESPACE,
        cntid: 0x1234,
        nsid: 9,
        cnssid: 0x5678,
        csi: Csi::ZONED,
        uuid_index: 3,
    };
    assert_eq!(
        identify.to_sqe(0x1000, 0x2000),
        sqe(
            0x06,
            9,
            [0x1000, 0x2000],
            [0x1234_0005, 0x0200_5678, 0, 0, 3, 0]
        )
    );

    let log = GetLogPage {
        lid: LogId::SMART,
        lsp: 5,
        rae: true,
        numd_z: 0x0001_007F,
        lsi: 0xABCD,
        offset: 0x1_0000_0200,
        nsid: u32::MAX,
        csi: Csi::NVM,
        ot: true,
        uuid_index: 1,
    };
    let expected = [0x007F_8502, 0xABCD_0001, 0x0000_0200, 1, 0x0080_0001, 0];
    assert_eq!(
        log.to_sqe(0x1000, 0),
        sqe(0x02, u32::MAX, [0x1000, 0], expected)
    );
    assert_eq!(log.byte_len(), 0x40200);
    let longest = GetLogPage {
        numd_z: u32::MAX,
        ..log
    };
    assert_eq!(longest.byte_len(), 1 << 34);

    let get = GetFeatures {
        fid: FeatureId::NUMBER_OF_QUEUES,
        sel: Select::SUPPORTED,
        ..GetFeatures::default()
    };
    assert_eq!(
        get.to_sqe(0, 0),
        sqe(0x0A, 0, [0, 0], [0x0307, 0, 0, 0, 0, 0])
    );
    let set = SetFeatures {
        fid: FeatureId::ASYNC_EVENT_CONFIG,
        sv: true,
        cdw11: 0x0B00,
        ..SetFeatures::default()
    };
    assert_eq!(
        set.to_sqe(0, 0),
        sqe(0x09, 0, [0, 0], [0x8000_000B, 0x0B00, 0, 0, 0, 0])
    );
}

#[test]
fn small_admin_commands_have_their_dwords() {
    assert_eq!(
        Abort {
            sqid: 2,
            cid: 0x1234
        }
        .to_sqe(),
        sqe(0x08, 0, [0, 0], [0x1234_0002, 0, 0, 0, 0, 0])
    );
    assert_eq!(AsyncEventRequest.to_sqe(), sqe(0x0C, 0, [0, 0], [0; 6]));
    let config = DoorbellBufferConfig {
        shadow: 0x1000,
        event_idx: 0x2000,
    };
    assert_eq!(config.to_sqe(), sqe(0x7C, 0, [0x1000, 0x2000], [0; 6]));
}

#[test]
fn nvm_commands_have_their_dwords() {
    let read = ReadWrite::new(1, 0x1122_3344_5566_7788, 7).to_sqe(NvmOpcode::READ, 0x1000, 0x2000);
    assert_eq!(
        read,
        sqe(
            0x02,
            1,
            [0x1000, 0x2000],
            [0x5566_7788, 0x1122_3344, 7, 0, 0, 0]
        )
    );

    let write = ReadWrite {
        fua: true,
        lr: true,
        prinfo: Prinfo::new().with_pract(true).with_check_guard(true),
        dtype: 2,
        dspec: 0x1234,
        dsm: DsmHints::new()
            .with_sequential(true)
            .with_access_frequency(4),
        reftag: 0xDEAD_BEEF,
        apptag: 0x1111,
        appmask: 0x2222,
        ..ReadWrite::new(1, 0, 0)
    };
    let expected = [0, 0, 0xF020_0000, 0x1234_0044, 0xDEAD_BEEF, 0x2222_1111];
    assert_eq!(
        write.to_sqe(NvmOpcode::WRITE, 0, 0),
        sqe(0x01, 1, [0, 0], expected)
    );

    let zeroes = ReadWrite {
        deac: true,
        nsz: true,
        stc: true,
        ..ReadWrite::new(1, 0, 0xFFFF)
    };
    let zeroes = zeroes.to_sqe(NvmOpcode::WRITE_ZEROES, 0, 0);
    assert_eq!(zeroes, sqe(0x08, 1, [0, 0], [0, 0, 0x0380_FFFF, 0, 0, 0]));

    assert_eq!(
        Flush { nsid: u32::MAX }.to_sqe(),
        sqe(0x00, u32::MAX, [0, 0], [0; 6])
    );
    let dsm = DatasetManagement {
        nsid: 1,
        nr_z: 255,
        ad: true,
        idw: false,
        idr: false,
    };
    assert_eq!(
        dsm.to_sqe(0x1000, 0),
        sqe(0x09, 1, [0x1000, 0], [255, 4, 0, 0, 0, 0])
    );
    let hints = DatasetManagement {
        nr_z: 0,
        ad: false,
        idw: true,
        idr: true,
        ..dsm
    };
    assert_eq!(hints.to_sqe(0, 0).cdw11, 3);
    assert_eq!((dsm.ranges(), dsm.data_len()), (256, 4096));
    assert_eq!((hints.ranges(), hints.data_len()), (1, 16));
}

#[test]
fn end_of_a_range_is_checked() {
    let table = [
        (0, 0, Some(1)),
        (0, 0xFFFF, Some(0x1_0000)),
        (u64::MAX - 1, 0, Some(u64::MAX)),
        (u64::MAX, 0, None),
        (u64::MAX - 0xFFFF, 0xFFFF, None),
        (u64::MAX - 0x1_0000, 0xFFFF, Some(u64::MAX)),
    ];
    for (slba, nlb_z, end) in table {
        assert_eq!(
            ReadWrite::new(1, slba, nlb_z).end(),
            end,
            "{slba:#x} {nlb_z:#x}"
        );
    }
}

fn any_sqe() -> impl Strategy<Value = Sqe> {
    any::<([u8; 32], [u8; 32])>().prop_map(|(low, high)| {
        let mut bytes = [0; 64];
        bytes[..32].copy_from_slice(&low);
        bytes[32..].copy_from_slice(&high);
        Sqe::read_from_bytes(&bytes).unwrap()
    })
}

proptest! {
    /// Any 64 bytes: the view takes them, and gives back exactly the bits it knows.
    #[test]
    fn views_keep_their_bits_of_any_command(sqe in any_sqe()) {
        // What every view drops: flags, CID, CDW2, CDW3, MPTR; the opcode is its own.
        let base = Sqe { flags: 0, cid: 0, cdw2: 0, cdw3: 0, mptr: 0, ..sqe };
        let none = Sqe { nsid: 0, prp1: 0, prp2: 0, cdw10: 0, cdw11: 0, cdw12: 0, cdw13: 0, cdw14: 0, cdw15: 0, ..base };

        prop_assert_eq!(CreateIoCq::from_sqe(&sqe).to_sqe(),
            Sqe { opcode: 0x05, prp1: sqe.prp1, cdw10: sqe.cdw10, cdw11: sqe.cdw11 & 0xFFFF_0003, ..none });
        prop_assert_eq!(CreateIoSq::from_sqe(&sqe).to_sqe(),
            Sqe { opcode: 0x01, prp1: sqe.prp1, cdw10: sqe.cdw10, cdw11: sqe.cdw11 & 0xFFFF_0007, cdw12: sqe.cdw12 & 0xFFFF, ..none });
        prop_assert_eq!(DeleteQueue::from_sqe(&sqe).to_sq_sqe(),
            Sqe { opcode: 0x00, cdw10: sqe.cdw10 & 0xFFFF, ..none });
        prop_assert_eq!(Identify::from_sqe(&sqe).to_sqe(sqe.prp1, sqe.prp2),
            Sqe { opcode: 0x06, cdw10: sqe.cdw10 & 0xFFFF_00FF, cdw11: sqe.cdw11 & 0xFF00_FFFF, cdw14: sqe.cdw14 & 0x7F,
                nsid: sqe.nsid, prp1: sqe.prp1, prp2: sqe.prp2, ..none });
        prop_assert_eq!(GetLogPage::from_sqe(&sqe).to_sqe(sqe.prp1, sqe.prp2),
            Sqe { opcode: 0x02, cdw14: sqe.cdw14 & 0xFF80_007F, cdw15: 0, ..base });
        prop_assert_eq!(GetFeatures::from_sqe(&sqe).to_sqe(sqe.prp1, sqe.prp2),
            Sqe { opcode: 0x0A, cdw10: sqe.cdw10 & 0x7FF, cdw14: sqe.cdw14 & 0x7F, cdw12: 0, cdw13: 0, cdw15: 0, ..base });
        prop_assert_eq!(SetFeatures::from_sqe(&sqe).to_sqe(sqe.prp1, sqe.prp2),
            Sqe { opcode: 0x09, cdw10: sqe.cdw10 & 0x8000_00FF, ..base });
        prop_assert_eq!(Abort::from_sqe(&sqe).to_sqe(),
            Sqe { opcode: 0x08, cdw10: sqe.cdw10, ..none });
        prop_assert_eq!(DoorbellBufferConfig::from_sqe(&sqe).to_sqe(),
            Sqe { opcode: 0x7C, prp1: sqe.prp1, prp2: sqe.prp2, ..none });

        let opcode = NvmOpcode(sqe.opcode);
        prop_assert_eq!(ReadWrite::from_sqe(&sqe).to_sqe(opcode, sqe.prp1, sqe.prp2),
            Sqe { cdw12: sqe.cdw12 & 0xFFF0_FFFF, cdw13: sqe.cdw13 & 0xFFFF_00FF, ..base });
        prop_assert_eq!(Flush::from_sqe(&sqe).to_sqe(), Sqe { opcode: 0, nsid: sqe.nsid, ..none });
        prop_assert_eq!(DatasetManagement::from_sqe(&sqe).to_sqe(sqe.prp1, sqe.prp2),
            Sqe { opcode: 0x09, cdw10: sqe.cdw10 & 0xFF, cdw11: sqe.cdw11 & 7, nsid: sqe.nsid, prp1: sqe.prp1, prp2: sqe.prp2, ..none });
    }
}
