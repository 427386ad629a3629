//! Admin commands: input, exact status, and what pollers are told.

use super::*;
use nvme_spec::admin::{Abort, CreateIoCq, CreateIoSq, DeleteQueue, DoorbellBufferConfig};
use nvme_spec::feature::FeatureId;
use nvme_spec::log::{ErrorLogEntry, LogId, SmartLog};
use zerocopy::FromBytes as _;

/// A change to a good command, and what comes of it.
type Case<'a, C> = (&'a dyn Fn(&mut C), Status);

#[test]
fn every_other_opcode_is_invalid() {
    let mut rig = Rig::enabled();
    let known = [
        0x00, 0x01, 0x02, 0x04, 0x05, 0x06, 0x08, 0x09, 0x0A, 0x0C, 0x7C,
    ];
    for opcode in (0..=255).filter(|o| !known.contains(o)) {
        let status = rig.status(command(AdminOpcode(opcode)));
        assert_eq!(status, Status::INVALID_OPCODE, "{opcode:#x}");
    }
    let mut info = sample();
    info.doorbell_buffer = false;
    let mut rig = Rig::with(info, Vec::new());
    rig.enable();
    let status = rig.status(command(AdminOpcode::DOORBELL_BUFFER_CONFIG));
    assert_eq!(status, Status::INVALID_OPCODE);
}

#[test]
fn fused_commands_and_sgls_are_refused() {
    let mut rig = Rig::enabled();
    for flags in [1, 2, 3, 0x40, 0x80, 0xC0] {
        let sqe = Sqe {
            flags,
            ..identify_controller()
        };
        assert_eq!(rig.status(sqe), Status::INVALID_FIELD, "{flags:#x}");
    }
}

#[test]
fn data_goes_only_where_there_is_memory() {
    let mut rig = Rig::enabled();
    let end = BASE + LEN as u64;
    for (prp1, prp2, status) in [
        (end, 0, Status::DATA_TRANSFER_ERROR),
        (end - 0x800, end, Status::DATA_TRANSFER_ERROR),
        (u64::MAX - 3, 0, Status::DATA_TRANSFER_ERROR),
        (DATA + 2, 0, Status::INVALID_PRP_OFFSET),
        (DATA + 4, DATA + 8, Status::INVALID_PRP_OFFSET),
    ] {
        let sqe = identify_controller().with_prps(prp1, prp2);
        assert_eq!(rig.status(sqe), status, "{prp1:#x} {prp2:#x}");
    }
    for fid in [FeatureId::TIMESTAMP, FeatureId::HOST_BEHAVIOR] {
        for opcode in [AdminOpcode::GET_FEATURES, AdminOpcode::SET_FEATURES] {
            let mut sqe = command(opcode).with_prps(end, 0);
            sqe.cdw10 = fid.0.into();
            assert_eq!(rig.status(sqe), Status::DATA_TRANSFER_ERROR);
        }
    }
}

#[test]
fn creating_completion_queues() {
    let good = CreateIoCq::from_sqe(&create_cq(1));
    let cases: [Case<'_, CreateIoCq>; 12] = [
        (&|c| c.qid = 0, Status::INVALID_QUEUE_ID),
        (&|c| c.qid = 5, Status::INVALID_QUEUE_ID),
        (&|c| c.qid = 0xFFFF, Status::INVALID_QUEUE_ID),
        (&|c| c.qid = 2, Status::INVALID_QUEUE_ID), // exists
        (&|c| c.qsize_z = 0, Status::INVALID_QUEUE_SIZE),
        (&|c| c.qsize_z = 1024, Status::INVALID_QUEUE_SIZE),
        (&|c| c.qsize_z = 0xFFFF, Status::INVALID_QUEUE_SIZE),
        (&|c| c.pc = false, Status::INVALID_FIELD),
        (&|c| c.prp1 += 16, Status::INVALID_PRP_OFFSET),
        (&|c| c.iv = 5, Status::INVALID_INTERRUPT_VECTOR),
        (&|c| c.iv = 0xFFFF, Status::INVALID_INTERRUPT_VECTOR),
        (&|c| (c.ien, c.iv) = (false, 99), Status::SUCCESS),
    ];
    let mut rig = Rig::enabled();
    rig.create_cq(2);
    for (i, (change, status)) in cases.into_iter().enumerate() {
        let mut command = good;
        change(&mut command);
        assert_eq!(rig.status(command.to_sqe()), status, "case {i}");
    }
    for (qid, size_z) in [(3, 1), (4, 1023)] {
        let command = CreateIoCq {
            qid,
            qsize_z: size_z,
            ..good
        };
        assert_eq!(rig.status(command.to_sqe()), Status::SUCCESS, "{size_z}");
    }
}

#[test]
fn creating_submission_queues() {
    let good = CreateIoSq::from_sqe(&create_sq(1, 1));
    let cases: [Case<'_, CreateIoSq>; 12] = [
        (&|c| c.qid = 0, Status::INVALID_QUEUE_ID),
        (&|c| c.qid = 5, Status::INVALID_QUEUE_ID),
        (&|c| c.qid = 2, Status::INVALID_QUEUE_ID), // exists
        (&|c| c.qsize_z = 0, Status::INVALID_QUEUE_SIZE),
        (&|c| c.qsize_z = 1024, Status::INVALID_QUEUE_SIZE),
        (&|c| c.pc = false, Status::INVALID_FIELD),
        (&|c| c.prp1 += 4, Status::INVALID_PRP_OFFSET),
        (&|c| c.cqid = 0, Status::INVALID_QUEUE_ID),
        (&|c| c.cqid = 5, Status::INVALID_QUEUE_ID),
        (&|c| c.cqid = 4, Status::COMPLETION_QUEUE_INVALID),
        (&|c| c.nvmsetid = 9, Status::SUCCESS), // no NVM sets: reserved
        (&|c| (c.qid, c.cqid) = (3, 2), Status::SUCCESS), // shares one
    ];
    let mut rig = Rig::enabled();
    rig.create_pair(2);
    rig.create_cq(1);
    for (i, (change, status)) in cases.into_iter().enumerate() {
        let mut command = good;
        change(&mut command);
        assert_eq!(rig.status(command.to_sqe()), status, "case {i}");
    }
}

#[test]
fn queues_go_where_their_completion_queue_is_and_spread() {
    let mut rig = Rig::enabled();
    for qid in 1..=4 {
        rig.create_cq(qid);
    }
    for qid in 1..=4 {
        rig.ok(create_sq(qid, qid));
    }
    assert_eq!(
        rig.sent(),
        [
            "0: Attach",
            "0: CreateCq 1",
            "1: Attach",
            "1: CreateCq 2",
            "0: CreateCq 3",
            "1: CreateCq 4",
            "0: CreateSq 1",
            "1: CreateSq 2",
            "0: CreateSq 3",
            "1: CreateSq 4",
        ]
    );
}

#[test]
fn granted_queues_limit_identifiers() {
    let mut rig = Rig::enabled();
    let mut sqe = command(AdminOpcode::SET_FEATURES);
    (sqe.cdw10, sqe.cdw11) = (7, 0x0001_0000);
    assert_eq!(rig.ok(sqe), 0x0001_0000);
    rig.create_pair(1);
    rig.create_cq(2);
    assert_eq!(rig.status(create_sq(2, 2)), Status::INVALID_QUEUE_ID);
    assert_eq!(rig.status(create_cq(3)), Status::INVALID_QUEUE_ID);
    assert_eq!(rig.status(sqe), Status::COMMAND_SEQUENCE_ERROR);
}

#[test]
fn deleting_queues() {
    let mut rig = Rig::enabled();
    rig.create_pair(1);
    let sq = |qid| DeleteQueue { qid }.to_sq_sqe();
    let cq = |qid| DeleteQueue { qid }.to_cq_sqe();
    for qid in [0, 2, 5, 0xFFFF] {
        assert_eq!(rig.status(sq(qid)), Status::INVALID_QUEUE_ID, "{qid}");
        assert_eq!(rig.status(cq(qid)), Status::INVALID_QUEUE_ID, "{qid}");
    }
    assert_eq!(rig.status(cq(1)), Status::INVALID_QUEUE_DELETION);
    rig.ok(sq(1));
    assert_eq!(rig.status(sq(1)), Status::INVALID_QUEUE_ID);
    rig.ok(cq(1));
    assert_eq!(rig.status(cq(1)), Status::INVALID_QUEUE_ID);
    rig.create_pair(1);
}

#[test]
fn a_poller_that_does_not_answer_holds_up_nobody_else() {
    let mut rig = Rig::enabled();
    rig.create_pair(1);
    rig.sent();
    rig.silence(true);
    rig.submit(DeleteQueue { qid: 1 }.to_sq_sqe().with_cid(1));
    assert!(rig.completions().is_empty());
    // Half gone is gone.
    assert_eq!(
        rig.status(DeleteQueue { qid: 1 }.to_sq_sqe()),
        Status::INVALID_QUEUE_ID
    );
    assert_eq!(rig.status(create_sq(1, 1)), Status::INVALID_QUEUE_ID);
    assert_eq!(
        rig.status(DeleteQueue { qid: 1 }.to_cq_sqe()),
        Status::INVALID_QUEUE_DELETION
    );
    rig.ok(identify_controller());
    rig.answer(Ok(true));
    let done = rig.completions();
    assert_eq!(
        (done.len(), done[0].cid, done[0].status()),
        (1, 1, Status::SUCCESS)
    );
}

#[test]
fn what_a_poller_refuses_the_guest_is_told_and_nothing_stays() {
    let mut rig = Rig::enabled();
    rig.create_cq(1);
    rig.create_cq(2);
    rig.sent();
    rig.silence(true);
    rig.submit(create_cq(3).with_cid(1));
    rig.submit(create_sq(1, 1).with_cid(2));
    assert!(rig.completions().is_empty());
    rig.answer(Err(Status::INVALID_FIELD));
    let done = rig.completions();
    assert_eq!(done.len(), 2);
    for cqe in done {
        assert_eq!(cqe.status(), Status::INVALID_FIELD);
        assert!(cqe.status.dnr() && cqe.status.m());
    }
    rig.silence(false);
    rig.create_cq(3);
    rig.ok(create_sq(1, 1));
}

#[test]
fn a_poller_that_cannot_serve_ends_what_was_sent_to_it() {
    let mut rig = Rig::enabled();
    rig.create_cq(1);
    rig.sent();
    rig.silence(true);
    rig.submit(create_cq(2));
    assert!(rig.completions().is_empty());
    assert_eq!(rig.sent_only(), ["1: Attach", "1: CreateCq 2"]);
    // It answers to the attachment, and to nothing else.
    rig.script.sent.lock().unwrap().truncate(1);
    rig.answer(Err(Status::INTERNAL_ERROR));
    let done = rig.completions();
    assert_eq!((done.len(), done[0].status()), (1, Status::INTERNAL_ERROR));
    rig.silence(false);
    rig.create_cq(2);
    assert_eq!(rig.sent(), ["1: Attach", "1: CreateCq 2"], "another try");
}

#[test]
fn aborting() {
    let mut rig = Rig::enabled();
    rig.create_pair(1);
    rig.sent();
    let abort = |sqid, cid| Abort { sqid, cid }.to_sqe();
    assert_eq!(
        rig.status(abort(2, 0)),
        Status::INVALID_FIELD,
        "no such queue"
    );
    assert_eq!(rig.status(abort(0xFFFF, 0)), Status::INVALID_FIELD);
    assert_eq!(rig.ok(abort(0, 99)), Abort::NOT_ABORTED);
    assert_eq!(rig.ok(abort(1, 33)), Abort::ABORTED);
    assert_eq!(rig.sent(), ["0: Abort 1 33"]);
    rig.silence(true);
    for cid in 0..4 {
        rig.submit(abort(1, cid).with_cid(cid));
    }
    assert_eq!(rig.status(abort(1, 4)), Status::ABORT_LIMIT_EXCEEDED);
    rig.answer(Ok(false));
    let done = rig.completions();
    assert!(
        done.iter()
            .all(|c| c.dw0 == Abort::NOT_ABORTED && c.status().is_success())
    );
    assert_eq!(done.len(), 4);
}

#[test]
fn aborting_an_event_request_completes_both() {
    let mut rig = Rig::enabled();
    let aer = command(AdminOpcode::ASYNC_EVENT_REQUEST).with_cid(50);
    rig.submit(aer);
    rig.submit(Abort { sqid: 0, cid: 50 }.to_sqe().with_cid(51));
    let done = rig.completions();
    let found: Vec<_> = done.iter().map(|c| (c.cid, c.dw0, c.status())).collect();
    assert_eq!(
        found,
        [(50, 0, Status::ABORT_REQUESTED), (51, 0, Status::SUCCESS)]
    );
}

#[test]
fn doorbell_buffer_config_is_checked_copied_and_told_to_all() {
    let mut rig = Rig::enabled();
    rig.create_cq(1);
    rig.sent();
    let config = |shadow, event_idx| DoorbellBufferConfig { shadow, event_idx }.to_sqe();
    let end = BASE + LEN as u64;
    for (shadow, event_idx, status) in [
        (DATA + 64, DATA + 0x1000, Status::INVALID_PRP_OFFSET),
        (DATA, DATA + 0x1004, Status::INVALID_PRP_OFFSET),
        (0, DATA, Status::INVALID_FIELD),
        (DATA, end, Status::INVALID_FIELD),
        (DATA, DATA, Status::INVALID_FIELD),
    ] {
        let found = rig.status(config(shadow, event_idx));
        assert_eq!(found, status, "{shadow:#x} {event_idx:#x}");
    }
    assert!(rig.sent().is_empty());
    rig.ok(config(DATA, DATA + 0x1000));
    assert_eq!(rig.sent(), ["0: SetShadow"]);
    rig.create_cq(2);
    assert_eq!(rig.sent(), ["1: Attach", "1: SetShadow", "1: CreateCq 2"]);
    // After a reset nobody hears of the old pages.
    rig.cc(Cc::new());
    rig.enable();
    rig.sent();
    rig.create_pair(1);
    assert_eq!(rig.sent(), ["0: CreateCq 1", "0: CreateSq 1"]);
}

#[test]
fn a_full_completion_queue_holds_commands_back_until_there_is_room() {
    let mut rig = Rig::new();
    rig.entries = 2;
    rig.enable();
    rig.lazy = true;
    rig.ok(identify_controller());
    rig.submit(identify_controller());
    assert!(rig.completions().is_empty(), "no room for it");
    assert!(rig.actor.admin.as_ref().unwrap().is_blocked());
    for _ in 0..5 {
        rig.bell(Doorbell::Cq(0), rig.head.into());
        assert_eq!(rig.completions().len(), 1);
        rig.submit(identify_controller());
        assert!(rig.completions().is_empty());
    }
    // Event requests do not keep the room.
    rig.lazy = false;
    rig.completions();
    rig.completions();
    for cid in 0..3 {
        rig.submit(command(AdminOpcode::ASYNC_EVENT_REQUEST).with_cid(cid));
        rig.turns();
    }
    rig.ok(identify_controller());
}

#[test]
fn errors_are_logged_and_counted() {
    let mut rig = Rig::enabled();
    rig.status(command(AdminOpcode(0xC5)).with_cid(17));
    rig.shared.inbox.event(
        1,
        crate::poller::PollerEvent::Failed(crate::poller::IoFailure {
            sqid: 2,
            cid: 3,
            status: Status::LBA_OUT_OF_RANGE.into(),
            nsid: 1,
            lba: 1 << 40,
            parameter: ErrorLogEntry::location_of(40, 0),
        }),
    );
    let log = |lid: LogId, bytes: u32| {
        let mut sqe = command(AdminOpcode::GET_LOG_PAGE);
        sqe.nsid = 0xFFFF_FFFF;
        sqe.cdw10 = u32::from(lid.0) | (bytes / 4 - 1) << 16;
        sqe
    };
    assert!(rig.map.write(DATA, &[0xEE; 8192]));
    rig.ok(log(LogId::ERROR, 128));
    let bytes = rig.data(DATA, 129);
    let newest = ErrorLogEntry::read_from_bytes(&bytes[..64]).unwrap();
    assert_eq!((newest.error_count, newest.sqid, newest.cid), (2, 2, 3));
    assert_eq!((newest.lba, newest.nsid), (1 << 40, 1));
    let older = ErrorLogEntry::read_from_bytes(&bytes[64..128]).unwrap();
    assert_eq!((older.error_count, older.sqid, older.cid), (1, 0, 17));
    assert_eq!(older.location, 0);
    assert_eq!(older.status.status(), Status::INVALID_OPCODE);
    assert_eq!(bytes[128], 0xEE, "not a byte more than asked for");
    rig.ok(log(LogId::SMART, 1024));
    let bytes = rig.data(DATA, 1024);
    let smart = SmartLog::read_from_bytes(&bytes[..512]).unwrap();
    assert_eq!(smart.error_log_entries.get(), 2);
    assert!(
        bytes[512..].iter().all(|b| *b == 0),
        "zeroes behind the page"
    );
    let mut sqe = log(LogId::ERROR, 4);
    sqe.cdw12 = 4100;
    assert_eq!(rig.status(sqe), Status::INVALID_FIELD);
    assert_eq!(rig.status(log(LogId(0xC0), 4)), Status::INVALID_LOG_PAGE);
}
