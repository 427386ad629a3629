//! Trapped and mapped doorbells, kicks.

use super::*;
use crate::controller::FrontEnd;
use crate::poller::{DoorbellMode, PollerEvent};
use std::fs::File;

#[derive(Default)]
struct Front(Mutex<Vec<DoorbellMode>>);

impl FrontEnd for Front {
    fn request_doorbells(&self, mode: DoorbellMode) {
        self.0.lock().unwrap().push(mode);
    }
}

impl Front {
    fn asked(&self) -> Vec<DoorbellMode> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

#[test]
fn doorbells_are_mapped_when_one_poller_wants_it_and_trapped_when_all_do() {
    let mut rig = Rig::new();
    let front = Arc::new(Front::default());
    rig.shared.inbox.send(Mail::Attach(Arc::clone(&front) as _));
    let _done = rig.mail(|done| Mail::Memory(Arc::clone(&rig.map), done));
    rig.turns();
    rig.enable();
    rig.create_pair(1);
    rig.sent();
    let want = |rig: &mut Rig, poller, mode| {
        rig.shared.inbox.event(poller, PollerEvent::Wants(mode));
        rig.turns();
    };
    want(&mut rig, 0, DoorbellMode::Mapped);
    assert_eq!(front.asked(), [DoorbellMode::Mapped]);
    assert_eq!(rig.sent(), ["0: SetDoorbells Mapped", "0: WatchAdmin true"]);
    // A poller that comes now is told in its attachment.
    rig.create_pair(2);
    {
        let sent = rig.script.sent.lock().unwrap();
        let Some((1, Message::Attach { attachment, .. })) = sent.first() else {
            panic!("no attachment");
        };
        assert_eq!(attachment.doorbells, DoorbellMode::Mapped);
    }
    rig.sent();
    want(&mut rig, 0, DoorbellMode::Trapped);
    assert!(front.asked().is_empty(), "the first switch is under way");
    rig.shared.inbox.send(Mail::Doorbells(DoorbellMode::Mapped));
    rig.turns();
    assert_eq!(front.asked(), [DoorbellMode::Trapped]);
    assert!(rig.sent().is_empty(), "not before it is acknowledged");
    rig.shared
        .inbox
        .send(Mail::Doorbells(DoorbellMode::Trapped));
    rig.turns();
    assert_eq!(
        rig.sent(),
        [
            "0: SetDoorbells Trapped",
            "1: SetDoorbells Trapped",
            "0: WatchAdmin false"
        ]
    );
    assert!(front.asked().is_empty());
}

#[test]
fn after_a_reset_somebody_watches_again_and_an_outer_one_traps() {
    let mut rig = Rig::new();
    let front = Arc::new(Front::default());
    rig.shared.inbox.send(Mail::Attach(Arc::clone(&front) as _));
    let _done = rig.mail(|done| Mail::Memory(Arc::clone(&rig.map), done));
    rig.turns();
    rig.enable();
    rig.create_pair(1);
    let wants = PollerEvent::Wants(DoorbellMode::Mapped);
    rig.shared.inbox.event(0, wants);
    rig.shared.inbox.send(Mail::Doorbells(DoorbellMode::Mapped));
    rig.turns();
    front.asked();
    rig.sent();
    rig.cc(Cc::new());
    assert_eq!(rig.sent(), ["0: Reset", "0: WatchAdmin true"]);
    assert!(front.asked().is_empty());
    let done = rig.mail(Mail::Reset);
    rig.turns();
    assert!(is_done(&done));
    assert_eq!(front.asked(), [DoorbellMode::Trapped]);
}

#[test]
fn a_poller_reports_a_mapped_ring_of_the_admin_queue() {
    let mut rig = Rig::enabled();
    rig.submit(identify_controller());
    rig.shared.inbox.event(0, PollerEvent::AdminRung);
    assert_eq!(rig.completions().len(), 1);
}

fn eventfd() -> File {
    let fd = rustix::event::eventfd(1, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    File::from(fd)
}

#[test]
fn kicks_go_to_the_poller_of_the_queue_and_the_admin_kick_stays() {
    let mut rig = Rig::enabled();
    let kick = eventfd();
    let ours = kick.try_clone().unwrap();
    rig.shared.inbox.send(Mail::Kick(0, Some(kick)));
    rig.shared.inbox.send(Mail::Kick(2, Some(eventfd())));
    rig.shared.inbox.send(Mail::Kick(1000, Some(eventfd())));
    rig.turns();
    rig.turns();
    // It wakes us, and is never read.
    let mut count = [0; 8];
    rustix::io::read(&ours, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1);
    rig.create_pair(1);
    rig.create_pair(2);
    {
        let sent = rig.script.sent.lock().unwrap();
        let kicks: Vec<_> = sent
            .iter()
            .filter_map(|(_, m)| match m {
                Message::CreateSq { sq, .. } => Some(sq.kick.is_some()),
                _ => None,
            })
            .collect();
        assert_eq!(kicks, [false, true]);
    }
    rig.sent();
    rig.shared.inbox.send(Mail::Kick(1, Some(eventfd())));
    rig.shared.inbox.send(Mail::Kick(3, Some(eventfd())));
    rig.turns();
    assert_eq!(rig.sent(), ["0: SetKick 1"]);
}

#[test]
fn vector_0_is_signalled_once_for_a_batch() {
    let mut rig = Rig::enabled();
    let call = eventfd();
    let ours = call.try_clone().unwrap();
    rustix::io::read(&ours, &mut [0u8; 8]).unwrap();
    rig.shared.vectors[0].set(Some(call));
    for _ in 0..5 {
        rig.submit(identify_controller());
    }
    assert_eq!(rig.completions().len(), 5);
    let mut count = [0; 8];
    rustix::io::read(&ours, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1);
}

#[test]
fn interrupt_features_reach_the_vectors_and_a_reset_forgets_them() {
    let set_feature = |fid: u32, value: u32| Sqe {
        opcode: 0x09,
        cdw10: fid,
        cdw11: value,
        ..Sqe::default()
    };
    let mut rig = Rig::enabled();
    let all = |rig: &Rig| -> Vec<_> {
        let vectors = &rig.shared.vectors;
        vectors
            .iter()
            .map(|v| (v.coalescing().thr_z, v.coalescing().time))
            .collect()
    };
    let vectors = rig.shared.vectors.len();
    assert_eq!(all(&rig), vec![(0, 0); vectors]);
    rig.ok(set_feature(0x08, 0x0307));
    assert_eq!(all(&rig), vec![(7, 3); vectors]);
    rig.ok(set_feature(0x09, 1 << 16 | 1));
    let mut expected = vec![(7, 3); vectors];
    expected[1] = (0, 0);
    assert_eq!(all(&rig), expected);
    rig.ok(set_feature(0x08, 0x0102));
    rig.ok(set_feature(0x09, 1));
    assert_eq!(all(&rig), vec![(2, 1); vectors]);
    rig.cc(Cc::new());
    assert_eq!(all(&rig), vec![(0, 0); vectors]);
}
