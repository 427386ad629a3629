//! Admin commands: Identify, features, queues, aborts, and where their data may lie.

use std::time::Duration;

use guest_tests::daemon::{Disk, Plan, TestDaemon, queue};
use guest_tests::io::{LIMIT, collect};
use guest_tests::raw::Guest;
use nvme_spec::admin::{
    Abort, CreateIoCq, CreateIoSq, DeleteQueue, GetFeatures, Identify, SetFeatures,
};
use nvme_spec::command::NSID_BROADCAST;
use nvme_spec::feature::{FeatureId, NumberOfQueues, Select, Timestamp};
use nvme_spec::identify::{Cns, Csi, IDENTIFY_LEN, NamespaceIdDescriptors, NamespaceIdType};
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::{Sqe, Status};
use vhost_user_nvme::backend::{Delay, Fault, Operations, Rule};
use zerocopy::{FromBytes as _, IntoBytes as _};

fn three() -> TestDaemon {
    TestDaemon::one(Plan {
        max_namespaces: 4,
        ..Plan::many(vec![
            (1, Disk::memory(9, 64)),
            (2, Disk::memory(12, 128)),
            (4, Disk::memory(9, 32)),
        ])
    })
}

#[test]
fn identify_arrives_at_every_offset_of_its_pages() {
    let daemon = three();
    let mut guest = daemon.guest();
    let want = guest
        .identify_raw(Identify {
            cns: Cns::CONTROLLER,
            ..Identify::default()
        })
        .unwrap();
    let data = guest.device().memory().allocate(4 * 4096).unwrap();
    for offset in [0usize, 4, 512, 2048, 4092] {
        data.fill(0xEE);
        // The second page is not the neighbour of the first.
        let (prp1, prp2) = (data.addr() + offset as u64, data.addr() + 3 * 4096);
        let command = Identify {
            cns: Cns::CONTROLLER,
            ..Identify::default()
        };
        guest
            .admin_ok("Identify", command.to_sqe(prp1, prp2))
            .unwrap();
        let got = data.bytes(4 * 4096);
        let first = 4096 - offset;
        assert!(got[offset..4096] == want[..first], "offset {offset}");
        assert!(
            got[3 * 4096..][..offset] == want[first..],
            "offset {offset}"
        );
        assert!(got[..offset].iter().all(|b| *b == 0xEE));
        assert!(got[3 * 4096 + offset..].iter().all(|b| *b == 0xEE));
        assert!(got[4096..3 * 4096].iter().all(|b| *b == 0xEE));
    }
    let identify = |prp1, prp2| {
        Identify {
            cns: Cns::CONTROLLER,
            ..Identify::default()
        }
        .to_sqe(prp1, prp2)
    };
    for (prp1, prp2, status) in [
        (data.addr() + 1, 0, Status::INVALID_PRP_OFFSET),
        (data.addr() + 2, 0, Status::INVALID_PRP_OFFSET),
        (
            data.addr() + 4,
            data.addr() + 4100,
            Status::INVALID_PRP_OFFSET,
        ),
        (0xFFFF_F000_0000, 0, Status::DATA_TRANSFER_ERROR),
        (
            data.addr() + 4,
            0xFFFF_F000_0000,
            Status::DATA_TRANSFER_ERROR,
        ),
        (u64::MAX - 0xFFF, 0, Status::DATA_TRANSFER_ERROR),
    ] {
        let got = guest
            .admin_status("Identify", identify(prp1, prp2))
            .unwrap();
        assert_eq!(got.status(), status, "{prp1:#x} {prp2:#x}");
    }
}

#[test]
fn identify_by_namespace() {
    let daemon = three();
    let mut guest = daemon.guest();
    assert_eq!(guest.identify().nn, 4);
    assert_eq!(guest.namespaces().unwrap(), [1, 2, 4]);
    let status = |guest: &mut Guest, cns, nsid, csi| {
        guest
            .identify_raw(Identify {
                cns,
                nsid,
                csi,
                ..Identify::default()
            })
            .map_err(|e| e.status().unwrap())
    };
    let bad = Err(Status::INVALID_NAMESPACE_OR_FORMAT);
    for nsid in [0, 5, 6, 0xFFFF_FFFE] {
        for cns in [
            Cns::NAMESPACE,
            Cns::NAMESPACE_ID_DESCRIPTORS,
            Cns::CSI_NAMESPACE,
            Cns::INDEPENDENT_NAMESPACE,
        ] {
            assert_eq!(
                status(&mut guest, cns, nsid, Csi::NVM),
                bad,
                "{cns:?} {nsid:#x}"
            );
        }
    }
    for nsid in [0xFFFF_FFFE, NSID_BROADCAST] {
        let list = status(&mut guest, Cns::ACTIVE_NAMESPACES, nsid, Csi::NVM);
        assert_eq!(list, bad);
    }
    // Possible, but not there: all zeroes.
    let inactive = status(&mut guest, Cns::NAMESPACE, 3, Csi::NVM).unwrap();
    assert!(inactive.iter().all(|b| *b == 0) && inactive.len() == IDENTIFY_LEN);
    let after = |guest: &mut Guest, nsid| {
        let list: nvme_spec::identify::NamespaceList = guest
            .identify_as(Cns::ACTIVE_NAMESPACES, nsid, Csi::NVM)
            .unwrap();
        list.ids().collect::<Vec<_>>()
    };
    assert_eq!(after(&mut guest, 0), [1, 2, 4]);
    assert_eq!(after(&mut guest, 1), [2, 4]);
    assert_eq!(after(&mut guest, 3), [4]);
    assert_eq!(after(&mut guest, 4), [0; 0]);
    let mut ids = std::collections::HashSet::new();
    for (nsid, blocks, shift) in [(1, 64, 9), (2, 128, 12), (4, 32, 9)] {
        let ns = guest.identify_namespace(nsid).unwrap();
        assert_eq!((ns.nsze, ns.ncap), (blocks, blocks));
        assert_eq!(ns.current_format().unwrap().lbads, shift);
        assert!(ids.insert(ns.nguid) && ns.nguid != [0; 16]);
        let list: NamespaceIdDescriptors = guest
            .identify_as(Cns::NAMESPACE_ID_DESCRIPTORS, nsid, Csi::NVM)
            .unwrap();
        let kinds: Vec<_> = list.iter().map(|(kind, _)| kind).collect();
        assert!(kinds.contains(&NamespaceIdType::UUID), "{kinds:?}");
        assert!(kinds.contains(&NamespaceIdType::NGUID), "{kinds:?}");
    }
    for cns in [Cns::CSI_NAMESPACE, Cns::INDEPENDENT_NAMESPACE] {
        assert!(status(&mut guest, cns, 1, Csi::NVM).is_ok());
    }
    assert!(status(&mut guest, Cns::CSI_CONTROLLER, 0, Csi::NVM).is_ok());
    assert!(status(&mut guest, Cns::CSI_ACTIVE_NAMESPACES, 0, Csi::NVM).is_ok());
    assert!(status(&mut guest, Cns::CSI_CONTROLLER, 0, Csi::ZONED).is_err());
    for cns in [0x04, 0x10, 0x20, 0xFF] {
        let got = status(&mut guest, Cns(cns), 1, Csi::NVM);
        assert_eq!(got, Err(Status::INVALID_FIELD), "CNS {cns:#x}");
    }
}

#[test]
fn queue_commands_have_their_statuses() {
    let daemon = TestDaemon::one(Plan {
        max_queue_entries: 256,
        ..Plan::of(Disk::memory(9, 64))
    });
    let mut guest = daemon.guest();
    let memory = guest.device().memory().allocate(64 << 10).unwrap();
    let cq = CreateIoCq {
        prp1: memory.addr(),
        qid: 1,
        qsize_z: 15,
        pc: true,
        ien: true,
        iv: 1,
    };
    let mut expect = |what: &str, sqe: Sqe, status: Status| {
        let got = guest.admin_status("a queue command", sqe).unwrap();
        assert_eq!(got.status(), status, "{what}");
    };
    use Status as S;
    for (what, cq, status) in [
        ("qid 0", CreateIoCq { qid: 0, ..cq }, S::INVALID_QUEUE_ID),
        ("qid 8", CreateIoCq { qid: 8, ..cq }, S::INVALID_QUEUE_ID),
        (
            "qid FFFFh",
            CreateIoCq { qid: 0xFFFF, ..cq },
            S::INVALID_QUEUE_ID,
        ),
        (
            "size 1",
            CreateIoCq { qsize_z: 0, ..cq },
            S::INVALID_QUEUE_SIZE,
        ),
        (
            "size 257",
            CreateIoCq { qsize_z: 256, ..cq },
            S::INVALID_QUEUE_SIZE,
        ),
        (
            "size 65536",
            CreateIoCq {
                qsize_z: 0xFFFF,
                ..cq
            },
            S::INVALID_QUEUE_SIZE,
        ),
        (
            "not contiguous",
            CreateIoCq { pc: false, ..cq },
            S::INVALID_FIELD,
        ),
        (
            "offset",
            CreateIoCq {
                prp1: cq.prp1 + 8,
                ..cq
            },
            S::INVALID_PRP_OFFSET,
        ),
        (
            "vector 8",
            CreateIoCq { iv: 8, ..cq },
            S::INVALID_INTERRUPT_VECTOR,
        ),
        (
            "vector FFFFh",
            CreateIoCq { iv: 0xFFFF, ..cq },
            S::INVALID_INTERRUPT_VECTOR,
        ),
        (
            "vector 8, unused",
            CreateIoCq {
                iv: 8,
                ien: false,
                qid: 2,
                ..cq
            },
            S::SUCCESS,
        ),
        ("good", cq, S::SUCCESS),
        ("again", cq, S::INVALID_QUEUE_ID),
    ] {
        expect(what, cq.to_sqe(), status);
    }
    let nowhere = guest_status_of_memory(&mut expect, cq);
    assert!(nowhere);
    let sq = CreateIoSq {
        prp1: memory.addr() + 8192,
        qid: 1,
        qsize_z: 15,
        pc: true,
        cqid: 1,
        ..CreateIoSq::default()
    };
    for (what, sq, status) in [
        ("qid 0", CreateIoSq { qid: 0, ..sq }, S::INVALID_QUEUE_ID),
        ("qid 8", CreateIoSq { qid: 8, ..sq }, S::INVALID_QUEUE_ID),
        (
            "size 1",
            CreateIoSq { qsize_z: 0, ..sq },
            S::INVALID_QUEUE_SIZE,
        ),
        (
            "size 257",
            CreateIoSq { qsize_z: 256, ..sq },
            S::INVALID_QUEUE_SIZE,
        ),
        (
            "not contiguous",
            CreateIoSq { pc: false, ..sq },
            S::INVALID_FIELD,
        ),
        (
            "offset",
            CreateIoSq {
                prp1: sq.prp1 + 64,
                ..sq
            },
            S::INVALID_PRP_OFFSET,
        ),
        (
            "no such CQ",
            CreateIoSq { cqid: 3, ..sq },
            S::COMPLETION_QUEUE_INVALID,
        ),
        ("CQ 0", CreateIoSq { cqid: 0, ..sq }, S::INVALID_QUEUE_ID),
        ("CQ 8", CreateIoSq { cqid: 8, ..sq }, S::INVALID_QUEUE_ID),
        ("good", sq, S::SUCCESS),
        ("again", sq, S::INVALID_QUEUE_ID),
    ] {
        expect(what, sq.to_sqe(), status);
    }
    let delete = |qid| DeleteQueue { qid };
    expect(
        "CQ in use",
        delete(1).to_cq_sqe(),
        S::INVALID_QUEUE_DELETION,
    );
    for qid in [0, 3, 8, 0xFFFF] {
        expect("delete", delete(qid).to_sq_sqe(), S::INVALID_QUEUE_ID);
        expect("delete", delete(qid).to_cq_sqe(), S::INVALID_QUEUE_ID);
    }
    expect("SQ", delete(1).to_sq_sqe(), S::SUCCESS);
    expect("SQ again", delete(1).to_sq_sqe(), S::INVALID_QUEUE_ID);
    expect("CQ", delete(1).to_cq_sqe(), S::SUCCESS);
    expect("CQ again", delete(1).to_cq_sqe(), S::INVALID_QUEUE_ID);
    // The number of queues is settled once there is one (CQ 2).
    let number = NumberOfQueues::new().with_nsq_z(1).with_ncq_z(1);
    let set = SetFeatures {
        fid: FeatureId::NUMBER_OF_QUEUES,
        cdw11: number.into_bits(),
        ..SetFeatures::default()
    };
    expect(
        "number of queues",
        set.to_sqe(0, 0),
        S::COMMAND_SEQUENCE_ERROR,
    );
    expect(
        "opcode",
        Sqe {
            opcode: 0x7F,
            ..Sqe::default()
        },
        S::INVALID_OPCODE,
    );
}

/// A queue where no memory is.
fn guest_status_of_memory(expect: &mut impl FnMut(&str, Sqe, Status), cq: CreateIoCq) -> bool {
    for prp1 in [0xFFFF_F000_0000, u64::MAX - 0xFFF] {
        let sqe = CreateIoCq { prp1, qid: 3, ..cq }.to_sqe();
        expect("no memory", sqe, Status::DATA_TRANSFER_ERROR);
    }
    true
}

#[test]
fn features_have_values_defaults_and_capabilities() {
    let daemon = three();
    let mut guest = daemon.guest();
    for fid in [
        0x01, 0x02, 0x04, 0x05, 0x07, 0x08, 0x09, 0x0A, 0x0B, 0x0E, 0x16, 0x80,
    ] {
        let fid = FeatureId(fid);
        let nsid = u32::from(fid == FeatureId::ERROR_RECOVERY);
        let data = guest.device().memory().allocate(4096).unwrap();
        for sel in [
            Select::CURRENT,
            Select::DEFAULT,
            Select::SAVED,
            Select::SUPPORTED,
        ] {
            let command = GetFeatures {
                fid,
                sel,
                nsid,
                ..GetFeatures::default()
            };
            let got = guest
                .admin_status("Get Features", command.to_sqe(data.addr(), 0))
                .unwrap();
            assert_eq!(got.status(), Status::SUCCESS, "{fid:?} {sel:?}");
        }
        let command = GetFeatures {
            fid,
            sel: Select(5),
            nsid,
            ..GetFeatures::default()
        };
        let got = guest.admin_status("Get Features", command.to_sqe(data.addr(), 0));
        assert_eq!(got.unwrap().status(), Status::INVALID_FIELD, "{fid:?}");
    }
    for fid in [0x00, 0x0D, 0x7E, 0xC0, 0xFF] {
        let error = guest.get_feature(FeatureId(fid), Select::CURRENT, 0, 0);
        assert_eq!(error.unwrap_err().status(), Some(Status::INVALID_FIELD));
    }
    // A value that is set is read, and gone after a reset.
    let set = 0x0004_0105;
    guest
        .set_feature(FeatureId::INTERRUPT_COALESCING, 0, 0x0105)
        .unwrap();
    let read = |guest: &mut Guest, sel| {
        guest
            .get_feature(FeatureId::INTERRUPT_COALESCING, sel, 0, 0)
            .unwrap()
    };
    assert_eq!(read(&mut guest, Select::CURRENT), set & 0xFFFF);
    assert_eq!(read(&mut guest, Select::DEFAULT), 0);
    let front = guest.reset().unwrap();
    let mut guest = guest_tests::daemon::bring_up(front);
    assert_eq!(read(&mut guest, Select::CURRENT), 0);
    // Timestamp: data there and back, at an offset that spans pages.
    let data = guest.device().memory().allocate(8192).unwrap();
    let stamp = Timestamp::new(1_700_000_000_000, 0);
    data.write(4092, stamp.as_bytes());
    let set = SetFeatures {
        fid: FeatureId::TIMESTAMP,
        ..SetFeatures::default()
    };
    let (prp1, prp2) = (data.addr() + 4092, data.addr() + 4096);
    guest
        .admin_ok("Set Features", set.to_sqe(prp1, prp2))
        .unwrap();
    data.fill(0);
    let get = GetFeatures {
        fid: FeatureId::TIMESTAMP,
        ..GetFeatures::default()
    };
    guest
        .admin_ok("Get Features", get.to_sqe(prp1, prp2))
        .unwrap();
    let mut bytes = [0; 8];
    data.read(4092, &mut bytes);
    let now = Timestamp::read_from_bytes(&bytes).unwrap();
    assert!((1_700_000_000_000..1_700_000_100_000).contains(&now.get()));
    assert_eq!(now.origin(), Timestamp::ORIGIN_SET);
}

#[test]
fn abort_aborts_what_is_stuck_and_says_so_of_what_is_not() {
    let (disk, faults) = Disk::memory(9, 64).with_faults();
    let daemon = TestDaemon::one(Plan::of(disk));
    let mut guest = daemon.guest();
    let mut pair = guest.create_queue_pair(queue(1, 16)).unwrap();
    let rule = faults.add(Rule::always(Operations::VERIFY, Fault::NeverComplete));
    let sqe = ReadWrite::new(1, 0, 0).to_sqe(NvmOpcode::VERIFY, 0, 0);
    for round in 0..20 {
        let cid = pair.submit(sqe, round).unwrap();
        let other = pair.submit(sqe, 1000 + round).unwrap();
        pair.ring();
        // It may not have been fetched yet: an abort finds it all the same.
        assert!(guest.abort(1, cid).unwrap(), "round {round}");
        let done = collect(&mut pair, 1);
        assert_eq!(
            (done[0].user, done[0].status()),
            (round, Status::ABORT_REQUESTED)
        );
        assert!(!guest.abort(1, cid).unwrap(), "it is gone");
        assert!(guest.abort(1, other).unwrap());
        let done = collect(&mut pair, 1);
        assert_eq!(done[0].user, 1000 + round);
    }
    assert!(faults.remove(rule));
    assert!(!guest.abort(1, 0x5555).unwrap());
    for sqid in [2, 7, 8, 0xFFFF] {
        // A queue that does not exist has no such command.
        let abort = Abort { sqid, cid: 0 };
        let cqe = guest.admin("Abort", abort.to_sqe()).unwrap();
        assert!(
            cqe.status() == Status::INVALID_FIELD
                || cqe.status().is_success() && cqe.dw0 & 1 == Abort::NOT_ABORTED,
            "SQ {sqid}: {}",
            cqe.status()
        );
    }
    pair.submit(sqe, 9).unwrap();
    pair.ring();
    assert_eq!(collect(&mut pair, 1)[0].status(), Status::SUCCESS);
}

#[test]
fn abort_of_a_command_that_waits_and_of_an_event_request() {
    let (disk, delays) = Disk::memory(9, 64).with_delays();
    let daemon = TestDaemon::one(Plan::of(disk));
    let mut guest = daemon.guest();
    let mut pair = guest.create_queue_pair(queue(1, 16)).unwrap();
    delays.add(Rule::always(
        Operations::READ,
        Delay(Duration::from_secs(60)),
    ));
    let data = guest.device().memory().allocate(4096).unwrap();
    let sqe = ReadWrite::new(1, 0, 7).to_sqe(NvmOpcode::READ, 0, 0);
    let cid = pair.submit_data(sqe, data.addr(), 4096, 1).unwrap();
    pair.ring();
    std::thread::sleep(Duration::from_millis(10));
    assert!(guest.abort(1, cid).unwrap());
    assert_eq!(collect(&mut pair, 1)[0].status(), Status::ABORT_REQUESTED);
    // An Asynchronous Event Request that waits.
    let aer = nvme_spec::admin::AsyncEventRequest.to_sqe();
    let (cid, user) = guest.admin_submit("an event request", aer).unwrap();
    assert!(guest.abort(0, cid).unwrap());
    let cqe = guest.admin_wait("an event request", user, LIMIT).unwrap();
    assert_eq!(cqe.status(), Status::ABORT_REQUESTED);
    // More of them than there may be.
    let most = u64::from(guest.identify().aerl_z) + 1;
    for _ in 0..most {
        guest.admin_submit("an event request", aer).unwrap();
    }
    let refused = guest.admin_status("one too many", aer).unwrap();
    assert_eq!(refused.status(), Status::AER_LIMIT_EXCEEDED);
}

#[test]
fn a_controller_without_doorbell_buffer_refuses_it() {
    let daemon = TestDaemon::one(Plan {
        doorbell_buffer: false,
        ..Plan::of(Disk::memory(9, 64))
    });
    let mut guest = daemon.guest();
    assert!(!guest.identify().oacs.doorbell_buffer_config());
    let error = guest.enable_doorbell_buffer(&mut []).unwrap_err();
    assert_eq!(error.status(), Some(Status::INVALID_OPCODE));
}

#[test]
fn doorbell_buffers_must_be_pages_of_memory() {
    let daemon = three();
    let mut guest = daemon.guest();
    assert!(guest.identify().oacs.doorbell_buffer_config());
    let data = guest.device().memory().allocate(8192).unwrap();
    let (a, b) = (data.addr(), data.addr() + 4096);
    for (shadow, event_idx, good) in [
        (a + 4, b, false),
        (a, b + 2048, false),
        (0xFFFF_F000_0000, b, false),
        (a, u64::MAX - 0xFFF, false),
        (a, b, true),
    ] {
        let command = nvme_spec::admin::DoorbellBufferConfig { shadow, event_idx };
        let status = guest.admin_status("Doorbell Buffer Config", command.to_sqe());
        assert_eq!(status.unwrap().status().is_success(), good, "{shadow:#x}");
    }
}
