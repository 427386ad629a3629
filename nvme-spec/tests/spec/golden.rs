//! Golden bytes: structures against bytes written down by hand from the specification's figures.

use nvme_spec::Cqe;
use nvme_spec::Sqe;
use nvme_spec::Status;
use nvme_spec::StatusField;
use nvme_spec::command::Fuse;
use nvme_spec::command::Psdt;
use nvme_spec::event::AsyncEvent;
use nvme_spec::event::AsyncEventConfig;
use nvme_spec::event::EventType;
use nvme_spec::feature::Arbitration as Arbitration01;
use nvme_spec::feature::Capabilities;
use nvme_spec::feature::ErrorRecovery;
use nvme_spec::feature::HostBehavior;
use nvme_spec::feature::InterruptCoalescing;
use nvme_spec::feature::InterruptVectorConfig;
use nvme_spec::feature::IoCommandSetProfile;
use nvme_spec::feature::NumberOfQueues;
use nvme_spec::feature::PowerManagement;
use nvme_spec::feature::SoftwareProgress;
use nvme_spec::feature::TemperatureThreshold;
use nvme_spec::feature::ThresholdType;
use nvme_spec::feature::Timestamp;
use nvme_spec::feature::VolatileWriteCache;
use nvme_spec::feature::WriteAtomicity;
use nvme_spec::log::LogId;
use nvme_spec::nvm::DsmRange;
use nvme_spec::opcode::AdminOpcode;
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::opcode::Transfer;
use nvme_spec::regs::*;
use proptest::prelude::*;
use zerocopy::FromBytes;
use zerocopy::IntoBytes;

#[test]
fn sqe_has_every_field_at_its_place() {
    let sqe = Sqe {
        opcode: 0x02,
        flags: 0x81,
        cid: 0x1234,
        nsid: 0x0403_0201,
        cdw2: 0x1413_1211,
        cdw3: 0x2423_2221,
        mptr: 0x3837_3635_3433_3231,
        prp1: 0x4847_4645_4443_4241,
        prp2: 0x5857_5655_5453_5251,
        cdw10: 0x6463_6261,
        cdw11: 0x7473_7271,
        cdw12: 0x8483_8281,
        cdw13: 0x9493_9291,
        cdw14: 0xA4A3_A2A1,
        cdw15: 0xB4B3_B2B1,
    };
    #[rustfmt::skip]
    let bytes: [u8; 64] = [
        0x02, 0x81, 0x34, 0x12, 0x01, 0x02, 0x03, 0x04,
        0x11, 0x12, 0x13, 0x14, 0x21, 0x22, 0x23, 0x24,
        0x31, 0x32, 0x33, 0x34, 0x35, 0x36, 0x37, 0x38,
        0x41, 0x42, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48,
        0x51, 0x52, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58,
        0x61, 0x62, 0x63, 0x64, 0x71, 0x72, 0x73, 0x74,
        0x81, 0x82, 0x83, 0x84, 0x91, 0x92, 0x93, 0x94,
        0xA1, 0xA2, 0xA3, 0xA4, 0xB1, 0xB2, 0xB3, 0xB4,
    ];
    assert_eq!(sqe.as_bytes(), bytes);
    assert_eq!(Sqe::read_from_bytes(&bytes).unwrap(), sqe);
    assert_eq!(sqe.slba(), 0x7473_7271_6463_6261);
    assert_eq!(sqe.nlb_z(), 0x8281);
    assert_eq!(sqe.fuse(), Fuse::FIRST);
    assert_eq!(sqe.psdt(), Psdt::SGL_MPTR_SGL);
    assert_eq!(align_of::<Sqe>(), 8);
}

#[test]
fn cqe_has_every_field_at_its_place() {
    let cqe = Cqe {
        dw0: 0x0403_0201,
        dw1: 0x1413_1211,
        sqhd: 0x2221,
        sqid: 0x3231,
        cid: 0x4241,
        status: StatusField::from_status(Status::LBA_OUT_OF_RANGE)
            .with_p(true)
            .with_dnr(true),
    };
    #[rustfmt::skip]
    let bytes: [u8; 16] = [
        0x01, 0x02, 0x03, 0x04, 0x11, 0x12, 0x13, 0x14,
        0x21, 0x22, 0x31, 0x32, 0x41, 0x42, 0x01, 0x81,
    ];
    assert_eq!(cqe.as_bytes(), bytes);
    assert_eq!(Cqe::read_from_bytes(&bytes).unwrap(), cqe);
    assert_eq!(cqe.status(), Status::LBA_OUT_OF_RANGE);
    assert_eq!(align_of::<Cqe>(), 8);
}

#[test]
fn registers_have_the_values_hosts_know() {
    let cap = Cap::new()
        .with_mqes_z(1023)
        .with_cqr(true)
        .with_to(15)
        .with_dstrd(4)
        .with_css(css::NVM)
        .with_mpsmax(4)
        .with_crms_crwms(true);
    assert_eq!(cap.into_bits(), 0x0840_0024_0F01_03FF);
    let all = Cap::from_bits(u64::MAX);
    assert_eq!(
        (all.mqes_z(), all.ams(), all.to(), all.dstrd()),
        (0xFFFF, 3, 0xFF, 15)
    );
    assert_eq!(
        (all.css(), all.cps(), all.mpsmin(), all.mpsmax()),
        (0xFF, 3, 15, 15)
    );
    let bit = |n: u32| Cap::from_bits(1 << n);
    assert!(bit(16).cqr() && bit(36).nssrs() && bit(45).bps() && bit(56).pmrs());
    assert!(bit(57).cmbs() && bit(58).nsss() && bit(59).crms_crwms() && bit(60).crms_crims());

    assert_eq!(Vs::V1_4.into_bits(), 0x0001_0400);
    assert_eq!(Vs::V2_1.into_bits(), 0x0002_0100);
    assert!(Vs::V1_4.into_bits() < Vs::V2_0.into_bits());

    // What Linux writes to enable, and to shut down normally.
    let cc = Cc::from_bits(0x0046_0001);
    assert!(cc.en());
    assert_eq!(
        (cc.css(), cc.mps(), cc.ams()),
        (CommandSetSelected::NVM, 0, Arbitration::ROUND_ROBIN)
    );
    assert_eq!(
        (cc.shn(), cc.iosqes(), cc.iocqes(), cc.crime()),
        (Shn::NONE, 6, 4, false)
    );
    assert_eq!(Cc::from_bits(0x0046_4001).shn(), Shn::NORMAL);
    assert_eq!(Cc::from_bits(0x0046_8061).shn(), Shn::ABRUPT);
    assert_eq!(Cc::from_bits(0x0046_8061).css(), CommandSetSelected::ALL);
    assert_eq!(Cc::from_bits(0x0046_3871).ams(), Arbitration::VENDOR);
    assert_eq!(Cc::from_bits(0x0100_0780).mps(), 15);
    assert!(Cc::from_bits(0x0100_0000).crime());

    let csts = Csts::new().with_rdy(true).with_shst(Shst::COMPLETE);
    assert_eq!(csts.into_bits(), 0x9);
    assert_eq!(
        Csts::new()
            .with_cfs(true)
            .with_nssro(true)
            .with_pp(true)
            .with_st(true)
            .into_bits(),
        0x72
    );

    let aqa = Aqa::from_bits(0x001F_003F);
    assert_eq!((aqa.asqs_z(), aqa.acqs_z()), (63, 31));
    assert_eq!(Aqa::from_bits(u32::MAX).asqs_z(), 4095);
    assert_eq!(
        Crto::new()
            .with_crwmt(0x1234)
            .with_crimt(0x5678)
            .into_bits(),
        0x5678_1234
    );
}

#[test]
fn opcodes_have_their_numbers_and_directions() {
    let table = [
        (AdminOpcode::DELETE_IO_SQ, 0x00, Transfer::None),
        (AdminOpcode::CREATE_IO_SQ, 0x01, Transfer::HostToController),
        (AdminOpcode::GET_LOG_PAGE, 0x02, Transfer::ControllerToHost),
        (AdminOpcode::DELETE_IO_CQ, 0x04, Transfer::None),
        (AdminOpcode::CREATE_IO_CQ, 0x05, Transfer::HostToController),
        (AdminOpcode::IDENTIFY, 0x06, Transfer::ControllerToHost),
        (AdminOpcode::ABORT, 0x08, Transfer::None),
        (AdminOpcode::SET_FEATURES, 0x09, Transfer::HostToController),
        (AdminOpcode::GET_FEATURES, 0x0A, Transfer::ControllerToHost),
        (AdminOpcode::ASYNC_EVENT_REQUEST, 0x0C, Transfer::None),
        (AdminOpcode::DOORBELL_BUFFER_CONFIG, 0x7C, Transfer::None),
        (AdminOpcode::FABRICS, 0x7F, Transfer::Bidirectional),
        (AdminOpcode::FORMAT_NVM, 0x80, Transfer::None),
        (AdminOpcode::SANITIZE, 0x84, Transfer::None),
    ];
    for (opcode, number, transfer) in table {
        assert_eq!(
            (opcode.0, opcode.transfer()),
            (number, transfer),
            "{opcode:?}"
        );
    }
    let table = [
        (NvmOpcode::FLUSH, 0x00, Transfer::None),
        (NvmOpcode::WRITE, 0x01, Transfer::HostToController),
        (NvmOpcode::READ, 0x02, Transfer::ControllerToHost),
        (NvmOpcode::WRITE_UNCORRECTABLE, 0x04, Transfer::None),
        (NvmOpcode::COMPARE, 0x05, Transfer::HostToController),
        (NvmOpcode::WRITE_ZEROES, 0x08, Transfer::None),
        (
            NvmOpcode::DATASET_MANAGEMENT,
            0x09,
            Transfer::HostToController,
        ),
        (NvmOpcode::VERIFY, 0x0C, Transfer::None),
        (NvmOpcode::COPY, 0x19, Transfer::HostToController),
    ];
    for (opcode, number, transfer) in table {
        assert_eq!(
            (opcode.0, opcode.transfer()),
            (number, transfer),
            "{opcode:?}"
        );
    }
    assert_eq!(format!("{:?}", NvmOpcode::WRITE_ZEROES), "WRITE_ZEROES");
    assert_eq!(format!("{:?}", NvmOpcode(0xC1)), "NvmOpcode(0xc1)");
    assert_eq!(AdminOpcode(0xC1).name(), None);
}

#[test]
fn feature_values_have_their_bits() {
    assert_eq!(
        Arbitration01::new()
            .with_ab(7)
            .with_hpw_z(1)
            .with_mpw_z(2)
            .with_lpw_z(3)
            .into_bits(),
        0x0102_0307
    );
    assert_eq!(
        PowerManagement::new().with_ps(5).with_wh(2).into_bits(),
        0x45
    );
    let over = TemperatureThreshold::new()
        .with_tmpth(343)
        .with_tmpsel(1)
        .with_thsel(ThresholdType::UNDER);
    assert_eq!(over.into_bits(), 0x0011_0157);
    assert_eq!(
        ErrorRecovery::new()
            .with_tler(9)
            .with_dulbe(true)
            .into_bits(),
        0x0001_0009
    );
    assert_eq!(VolatileWriteCache::new().with_wce(true).into_bits(), 1);
    assert_eq!(
        NumberOfQueues::new()
            .with_nsq_z(63)
            .with_ncq_z(31)
            .into_bits(),
        0x001F_003F
    );
    assert_eq!(
        InterruptCoalescing::new()
            .with_thr_z(7)
            .with_time(2)
            .into_bits(),
        0x0207
    );
    assert_eq!(
        InterruptVectorConfig::new()
            .with_iv(3)
            .with_cd(true)
            .into_bits(),
        0x0001_0003
    );
    assert_eq!(WriteAtomicity::new().with_dn(true).into_bits(), 1);
    assert_eq!(Capabilities::new().with_changeable(true).into_bits(), 4);
    assert_eq!(SoftwareProgress::from_bits(0xFFFF_FF05).pbslc(), 5);
    assert_eq!(IoCommandSetProfile::from_bits(u32::MAX).iocsci(), 511);
    let time = Timestamp::new(0xFFFF_0605_0403_0201, Timestamp::ORIGIN_SET);
    assert_eq!(time.as_bytes(), [1, 2, 3, 4, 5, 6, 2, 0]);
    assert_eq!((time.get(), time.origin()), (0x0605_0403_0201, 1));
    let behavior = HostBehavior {
        acre: 1,
        lbafee: 1,
        ..HostBehavior::default()
    };
    assert_eq!(behavior.as_bytes()[..4], [1, 0, 1, 0]);
}

#[test]
fn events_are_encoded_as_hosts_decode_them() {
    let table = [
        (AsyncEvent::INVALID_DOORBELL_REGISTER, 0x0001_0000),
        (AsyncEvent::INVALID_DOORBELL_VALUE, 0x0001_0100),
        (AsyncEvent::PERSISTENT_INTERNAL_ERROR, 0x0001_0300),
        (AsyncEvent::TEMPERATURE_THRESHOLD, 0x0002_0101),
        (AsyncEvent::SPARE_BELOW_THRESHOLD, 0x0002_0201),
        (AsyncEvent::NAMESPACE_ATTRIBUTE_CHANGED, 0x0004_0002),
        (AsyncEvent::FIRMWARE_ACTIVATION_STARTING, 0x0003_0102),
        (AsyncEvent::ANA_CHANGE, 0x000C_0302),
        (
            AsyncEvent::of(EventType::VENDOR, 0xFF, LogId(0xC0)),
            0x00C0_FF07,
        ),
    ];
    for (event, dw0) in table {
        assert_eq!(event.to_dw0(), dw0, "{event:?}");
        assert_eq!(AsyncEvent::from_dw0(dw0), event);
    }
    // Linux asks for namespace attribute, firmware activation and ANA change.
    let linux = AsyncEventConfig::from_bits(0x0000_0B00);
    assert!(linux.namespace_attribute() && linux.firmware_activation() && linux.ana_change());
    assert_eq!(linux.smart(), 0);
    assert!(AsyncEventConfig::from_bits(1 << 31).discovery_log());
    assert!(AsyncEventConfig::from_bits(1 << 27).zone_descriptor());
    assert!(AsyncEventConfig::from_bits(1 << 19).allocated_namespace_attribute());
}

#[test]
fn dsm_range_has_every_field_at_its_place() {
    let range = DsmRange {
        cattr: 0x0403_0201,
        nlb: 8,
        slba: 0x1122_3344_5566_7788,
    };
    let bytes = [
        1, 2, 3, 4, 8, 0, 0, 0, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11,
    ];
    assert_eq!(range.as_bytes(), bytes);
    assert_eq!(range.end(), Some(0x1122_3344_5566_7790));
    let last = DsmRange {
        nlb: 1,
        slba: u64::MAX,
        cattr: 0,
    };
    assert_eq!(last.end(), None);
}

proptest! {
    #[test]
    fn cqe_halves_are_its_bytes(bytes in any::<[u8; 16]>()) {
        let cqe = Cqe::read_from_bytes(&bytes).unwrap();
        let halves = cqe.to_halves();
        prop_assert_eq!(halves.as_bytes(), &bytes);
        prop_assert_eq!(Cqe::from_halves(halves), cqe);
        prop_assert_eq!(Cqe::phase_of_high_half(halves[1]), cqe.status.p());
    }

    #[test]
    fn sqe_slba_is_kept_in_two_dwords(slba in any::<u64>()) {
        let mut sqe = Sqe::default();
        sqe.set_slba(slba);
        prop_assert_eq!(sqe.slba(), slba);
        prop_assert_eq!(sqe.cdw10, slba as u32);
        prop_assert_eq!(sqe.cdw11, (slba >> 32) as u32);
    }

    #[test]
    fn any_dword_is_an_event_of_known_fields(dw0 in any::<u32>()) {
        prop_assert_eq!(AsyncEvent::from_dw0(dw0).to_dw0(), dw0 & 0x00FF_FF07);
    }
}
