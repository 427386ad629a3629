//! Asynchronous events, through the admin queue.

use super::*;
use crate::poller::PollerEvent;
use nvme_spec::event::AsyncEvent;
use nvme_spec::log::{CriticalWarning, LogId};

fn request(cid: u16) -> Sqe {
    command(AdminOpcode::ASYNC_EVENT_REQUEST).with_cid(cid)
}

fn set_feature(fid: u32, value: u32) -> Sqe {
    let mut sqe = command(AdminOpcode::SET_FEATURES);
    (sqe.cdw10, sqe.cdw11) = (fid, value);
    sqe
}

fn read_log(lid: LogId, retain: bool) -> Sqe {
    let mut sqe = command(AdminOpcode::GET_LOG_PAGE);
    sqe.nsid = 0xFFFF_FFFF;
    sqe.cdw10 = u32::from(lid.0) | u32::from(retain) << 15 | 3 << 16;
    sqe
}

impl Rig {
    /// The events that have completed requests.
    fn events(&mut self) -> Vec<(u16, AsyncEvent)> {
        let done = self.completions();
        assert!(done.iter().all(|c| c.status().is_success()));
        done.iter()
            .map(|c| (c.cid, AsyncEvent::from_dw0(c.dw0)))
            .collect()
    }
}

#[test]
fn more_requests_than_the_limit_are_refused() {
    let mut rig = Rig::enabled();
    for cid in 0..4 {
        rig.submit(request(cid));
    }
    assert!(rig.completions().is_empty());
    assert_eq!(rig.status(request(4)), Status::AER_LIMIT_EXCEEDED);
}

#[test]
fn an_invalid_doorbell_of_an_io_queue_is_an_error_event() {
    let mut rig = Rig::enabled();
    rig.submit(request(1));
    rig.submit(request(2));
    rig.turns();
    for _ in 0..3 {
        rig.shared
            .inbox
            .event(0, PollerEvent::InvalidDoorbell { qid: 1 });
    }
    assert_eq!(rig.events(), [(1, AsyncEvent::INVALID_DOORBELL_VALUE)]);
    rig.shared
        .inbox
        .event(0, PollerEvent::QueueMemoryGone { qid: 1 });
    assert!(rig.events().is_empty(), "masked");
    rig.ok(read_log(LogId::ERROR, true));
    assert!(rig.events().is_empty(), "retained");
    rig.submit(read_log(LogId::ERROR, false));
    let done = rig.completions();
    assert_eq!(done.len(), 2);
    assert_eq!(done[1].cid, 2);
    let event = AsyncEvent::from_dw0(done[1].dw0);
    assert_eq!(event, AsyncEvent::TRANSIENT_INTERNAL_ERROR);
}

#[test]
fn an_invalid_admin_doorbell_is_an_event_and_then_fatal() {
    for (doorbell, value) in [
        (Doorbell::Sq(0), 16),
        (Doorbell::Sq(0), u32::MAX),
        (Doorbell::Sq(0), 0x1_0001),
        (Doorbell::Cq(0), 16),
        (Doorbell::Cq(0), 3), // beyond what was posted
    ] {
        let mut rig = Rig::enabled();
        rig.submit(request(9));
        rig.turns();
        rig.lazy = true;
        rig.bell(doorbell, value);
        assert_eq!(rig.events(), [(9, AsyncEvent::INVALID_DOORBELL_VALUE)]);
        assert!(rig.csts().cfs(), "{doorbell:?} {value:#x}");
        rig.lazy = false;
        rig.cc(Cc::new());
        rig.enable();
        rig.ok(identify_controller());
    }
}

#[test]
fn a_changed_namespace_is_a_notice_for_those_who_asked() {
    let mut rig = Rig::enabled();
    rig.submit(request(1));
    rig.shared.inbox.send(Mail::NamespaceChanged(3));
    assert!(rig.events().is_empty(), "not asked for");
    rig.ok(set_feature(0x0B, 1 << 8));
    rig.shared.inbox.send(Mail::NamespaceChanged(1));
    rig.shared.inbox.send(Mail::NamespaceChanged(2));
    assert_eq!(rig.events(), [(1, AsyncEvent::NAMESPACE_ATTRIBUTE_CHANGED)]);
    rig.ok(read_log(LogId::CHANGED_NAMESPACES, true));
    assert_eq!(rig.data(DATA, 12), [1, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
    rig.ok(read_log(LogId::CHANGED_NAMESPACES, false));
    rig.ok(read_log(LogId::CHANGED_NAMESPACES, false));
    assert_eq!(rig.data(DATA, 8), [0; 8]);
}

#[test]
fn a_crossed_temperature_threshold_is_a_health_event_for_those_who_asked() {
    let mut rig = Rig::enabled();
    rig.submit(request(1));
    rig.ok(set_feature(4, 300));
    assert!(rig.events().is_empty());
    rig.submit(set_feature(0x0B, 2));
    let done = rig.completions();
    assert_eq!(done.len(), 2);
    let event = AsyncEvent::from_dw0(done[1].dw0);
    assert_eq!(event, AsyncEvent::TEMPERATURE_THRESHOLD);
}

#[test]
fn the_health_of_an_ssd_is_an_event_for_those_who_asked() {
    let mut rig = Rig::enabled();
    let health = |warning| Mail::Health(warning);
    let spare = CriticalWarning::new().with_spare(true);
    rig.submit(request(1));
    rig.submit(request(2));
    rig.shared.inbox.send(health(spare));
    assert!(rig.events().is_empty(), "not asked for");
    rig.ok(set_feature(0x0B, 1));
    rig.shared.inbox.send(health(spare.with_read_only(true)));
    rig.shared.inbox.send(health(CriticalWarning::new()));
    assert_eq!(rig.events(), [(1, AsyncEvent::SPARE_BELOW_THRESHOLD)]);
    rig.ok(read_log(LogId::SMART, false));
    assert!(rig.events().is_empty(), "nothing else was asked for");
    rig.ok(set_feature(0x0B, 4));
    rig.shared.inbox.send(health(spare.with_read_only(true)));
    assert_eq!(rig.events(), [(2, AsyncEvent::NVM_SUBSYSTEM_RELIABILITY)]);
}

#[test]
fn requests_and_events_do_not_survive_a_reset() {
    let mut rig = Rig::enabled();
    rig.submit(request(1));
    rig.turns();
    rig.cc(Cc::new());
    rig.enable();
    rig.shared
        .inbox
        .event(0, PollerEvent::InvalidDoorbell { qid: 1 });
    assert!(rig.events().is_empty(), "no request waits");
    rig.cc(Cc::new());
    rig.shared
        .inbox
        .event(0, PollerEvent::InvalidDoorbell { qid: 1 });
    rig.turns();
    rig.enable();
    rig.submit(request(2));
    assert!(rig.events().is_empty(), "that was before");
}
