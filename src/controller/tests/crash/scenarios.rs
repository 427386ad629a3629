//! One command of each kind, and what else a guest does, stopped after every store.

use super::*;
use proptest::prelude::*;

const OK: &[Status] = &[Status::SUCCESS];

/// Both kinds of store, with shadow doorbells and without.
fn io(scenario: impl Fn(&mut World)) {
    for (wait, shadow) in [(false, false), (true, false), (true, true)] {
        exhaust(wait, shadow, &scenario);
    }
}

#[test]
fn a_write_is_there_and_told_of_once() {
    io(|w| {
        w.run(1, w.fill(3, 77));
        assert_eq!(w.block(2, 3), 77);
    });
}

#[test]
fn a_batch_with_commands_of_both_kinds_on_queues_that_share_a_completion_queue() {
    io(|w| {
        // At once, waiting, at once.
        for (slba, byte) in [(4, 1), (40, 2)] {
            w.submit(1, w.fill(slba, byte), OK);
        }
        for (slba, byte) in [(41, 4), (6, 5)] {
            w.submit(2, w.fill(slba, byte), OK);
        }
        w.submit(3, w.fill(42, 6), OK);
        w.settle();
        for (slba, byte) in [(4, 1), (40, 2), (41, 4), (6, 5), (42, 6)] {
            assert_eq!(w.block(3, slba), byte);
        }
    });
}

#[test]
fn no_stale_data_after_a_write_that_followed_a_write() {
    io(|w| {
        for byte in 1..4 {
            w.run(1, w.fill(5, byte));
            assert_eq!(w.block(3, 5), byte);
        }
    });
}

#[test]
fn commands_of_every_other_kind() {
    let rw = |opcode, slba| ReadWrite::new(1, slba, 0).to_sqe(opcode, DATA + 0x8000, 0);
    let flush = Sqe {
        opcode: NvmOpcode::FLUSH.0,
        nsid: 1,
        ..Sqe::default()
    };
    let range = DsmRange {
        cattr: 0,
        nlb: 2,
        slba: 12,
    };
    let dsm = DatasetManagement {
        nsid: 1,
        nr_z: 0,
        ad: true,
        ..DatasetManagement::default()
    }
    .to_sqe(DATA + 0x9000, 0);
    let all = [
        (flush, OK),
        (rw(NvmOpcode::WRITE_ZEROES, 10), OK),
        (dsm, OK),
        (rw(NvmOpcode::COMPARE, 11), OK),
        (rw(NvmOpcode::VERIFY, 11), OK),
        (rw(NvmOpcode::READ, BLOCKS), &[Status::LBA_OUT_OF_RANGE][..]),
        // What no store here can do.
        (
            rw(NvmOpcode::WRITE_UNCORRECTABLE, 0),
            &[Status::INVALID_OPCODE][..],
        ),
        (rw(NvmOpcode(0x7e), 0), &[Status::INVALID_OPCODE][..]),
    ];
    for wait in [false, true] {
        for (sqe, may) in &all {
            exhaust(wait, false, |w| {
                assert!(w.map.write(DATA + 0x8000, &[0; 512]));
                assert!(w.map.write(DATA + 0x9000, range.as_bytes()));
                w.submit(3, *sqe, may);
                w.settle();
            });
        }
    }
}

#[test]
fn queues_come() {
    exhaust(true, false, |w| {
        w.create_cq(2);
        w.create_sq(4, 2);
        w.run(4, w.fill(7, 9));
        assert_eq!(w.block(4, 7), 9);
    });
}

#[test]
fn a_queue_goes_and_its_identifier_comes_again() {
    exhaust(true, false, |w| {
        w.submit(2, w.fill(8, 1), OK);
        w.submit(2, w.fill(9, 1), OK);
        w.delete(2);
        // The same identifier again.
        w.create_sq(2, 3);
        w.run(2, w.fill(7, 9));
        assert_eq!(w.block(2, 7), 9);
    });
}

#[test]
fn a_queue_pair_goes_and_comes_again() {
    exhaust(false, true, |w| {
        w.delete(3);
        w.run(0, DeleteQueue { qid: 3 }.to_cq_sqe());
        w.cqs.remove(&3);
        w.create_cq(3);
        w.create_sq(3, 3);
    });
}

#[test]
fn a_reset_leaves_nothing_of_before() {
    exhaust(true, false, |w| {
        w.submit(1, w.fill(8, 1), OK);
        w.submit(0, identify_controller(), OK);
        w.disable();
        w.enable();
        w.create_cq(1);
        w.create_sq(1, 1);
        w.run(1, w.fill(7, 9));
    });
}

/// No poller knows of such a guest: its reset is over in the turn in which it begins.
#[test]
fn a_reset_without_io_queues_leaves_nothing_of_before() {
    let bring_up = |w: &mut World| {
        w.enable();
        for _ in 0..5 {
            w.run(0, identify_controller());
        }
    };
    exhaust_from(
        || World::new(true, false),
        bring_up,
        |w| {
            w.disable();
            w.enable();
            w.run(0, identify_controller());
            w.create_cq(1);
            w.create_sq(1, 1);
            w.run(1, w.fill(7, 9));
        },
    );
}

#[test]
fn an_event_comes_once_be_it_before_its_request_or_after() {
    // A request waits: the event completes it.
    exhaust(true, false, |w| {
        w.process()
            .actor
            .events
            .raise(AsyncEvent::DIAGNOSTIC_FAILURE);
        // Whoever dies before it was written down has not noticed it.
        (0..8).for_each(|_| w.step());
        assert!(w.events.len() <= 1);
        assert_eq!(w.events.len() + w.aers.len(), 1, "the request is lost");
    });
    // The event waits, since its kind is masked; the request comes.
    exhaust(true, false, |w| {
        w.process()
            .actor
            .events
            .raise(AsyncEvent::DIAGNOSTIC_FAILURE);
        (0..8).for_each(|_| w.step());
        let came = w.events.len();
        w.process()
            .actor
            .events
            .raise(AsyncEvent::TRANSIENT_INTERNAL_ERROR);
        w.submit(0, aer(), &[]);
        (0..8).for_each(|_| w.step());
        assert!(w.events.len() <= 1 && w.events.len() + w.aers.len() == 2);
        assert!(came == 0 || w.events.len() == came, "it was masked");
    });
}

/// An Abort of the first of these Writes to queue 3, given at the same time, or some steps later.
fn abort(writes: u64, steps: usize) {
    for wait in [false, true] {
        exhaust(wait, false, |w| {
            let may = [Status::SUCCESS, Status::ABORT_REQUESTED];
            let cid = w.submit(3, w.fill(8, 1), &may);
            for other in 1..writes {
                w.submit(3, w.fill(8 + other, 1), OK);
            }
            (0..steps).for_each(|_| w.step());
            let abort = w.submit(0, Abort { sqid: 3, cid }.to_sqe(), OK);
            w.settle();
            let told = |key| w.done.get(&key).unwrap();
            let (write, abort) = (told((3, cid)), told((0, abort)));
            if abort.dw0 == Abort::ABORTED {
                assert_eq!(write.status(), Status::ABORT_REQUESTED);
            }
        });
    }
}

#[test]
fn what_was_aborted_before_it_was_fetched_is_not_carried_out_by_the_next_process() {
    abort(1, 0);
}

#[test]
fn what_was_aborted_while_it_was_out_is_not_carried_out_by_the_next_process() {
    abort(3, 1);
}

#[test]
fn a_feature_that_was_set_is_set() {
    exhaust(true, false, |w| {
        let mut set = command(AdminOpcode::SET_FEATURES);
        // Temperature Threshold, over.
        set.cdw10 = 4;
        set.cdw11 = 350;
        w.run(0, set);
        let over = w.process().actor.features.image();
        assert_eq!(serde_json::to_value(&over).unwrap()["over"], 350);
    });
}

#[test]
fn queues_are_moved_while_they_are_used() {
    for wait in [false, true] {
        exhaust(wait, false, |w| {
            // Of queues that share a completion queue.
            w.submit(1, w.fill(8, 1), OK);
            w.submit(2, w.fill(9, 2), OK);
            let at = w.process().actor.placed();
            let at = at.iter().find(|placed| placed.cqid == 1).unwrap().poller;
            w.move_queue(1, 1 - at);
            w.submit(1, w.fill(10, 3), OK);
            w.submit(2, w.fill(11, 4), OK);
            w.settle();
            for (slba, byte) in [(8, 1), (9, 2), (10, 3), (11, 4)] {
                assert_eq!(w.block(2, slba), byte);
            }
        });
    }
}

#[test]
fn shadow_doorbells_are_given_and_used() {
    exhaust(true, false, |w| {
        let config = DoorbellBufferConfig {
            shadow: SHADOW.doorbells,
            event_idx: SHADOW.event_idx,
        };
        // As a guest does it: all doorbells are in the page before it is used.
        w.shadow = true;
        let pairs = w.pairs.iter().map(|p| (Doorbell::Sq(p.sqid), p.tail));
        let cqs = w
            .cqs
            .iter()
            .map(|(cqid, cq)| (Doorbell::Cq(*cqid), cq.head));
        for (doorbell, value) in pairs.chain(cqs) {
            w.ring(doorbell, value);
        }
        w.run(0, config.to_sqe());
        w.run(1, w.fill(8, 1));
        assert_eq!(w.block(3, 8), 1);
    });
}

#[test]
fn a_shutdown_is_told_of_when_it_is_done() {
    exhaust(true, false, |w| {
        w.submit(1, w.fill(8, 1), OK);
        w.settle();
        let cc = Cc::new().with_en(true).with_iosqes(6).with_iocqes(4);
        let cc = cc.with_shn(nvme_spec::regs::Shn::NORMAL);
        w.write(offset::CC, &cc.into_bits().to_le_bytes());
        w.until("SHST", |w| {
            w.csts().shst() == nvme_spec::regs::Shst::COMPLETE
        });
        w.disable();
        w.enable();
        w.create_cq(1);
        w.create_sq(1, 1);
        assert_eq!(w.block(1, 8), 1);
    });
}

/// What a guest does in a random history.
#[derive(Clone, Debug)]
enum Do {
    Write(u16, u64, u8),
    Flush(u16),
    Settle,
    Step,
    Recreate,
}

fn what() -> impl Strategy<Value = Do> {
    prop_oneof![
        8 => (1u16..=3, 0u64..48, 1u8..).prop_map(|(q, slba, byte)| Do::Write(q, slba, byte)),
        1 => (1u16..=3).prop_map(Do::Flush),
        2 => Just(Do::Settle),
        3 => Just(Do::Step),
        1 => Just(Do::Recreate),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_history_with_any_crashes(
        wait in any::<bool>(),
        shadow in any::<bool>(),
        first in 0u64..400,
        again in prop::collection::vec(0u64..2500, 0..5),
        history in prop::collection::vec(what(), 1..60),
    ) {
        let mut w = World::new(wait, shadow);
        w.bring_up();
        w.again = again;
        w.crash = Some(Crash::after(first));
        let mut blocks: HashMap<u64, u8> = HashMap::new();
        let mut busy: HashMap<u64, ()> = HashMap::new();
        for act in history {
            match act {
                Do::Write(sqid, slba, byte) => {
                    // A guest has no two commands on a block at a time, and no more than fit.
                    let cqid = w.pairs.iter().find(|p| p.sqid == sqid).unwrap().cqid;
                    let sqids: Vec<_> = w.pairs.iter().filter(|p| p.cqid == cqid).map(|p| p.sqid).collect();
                    let full = w.out.keys().filter(|(q, _)| sqids.contains(q)).count() >= usize::from(SMALL) - 1;
                    if full || busy.insert(slba, ()).is_some() {
                        w.settle();
                        busy.clear();
                        busy.insert(slba, ());
                    }
                    w.submit(sqid, w.fill(slba, byte), OK);
                    blocks.insert(slba, byte);
                }
                Do::Flush(sqid) => {
                    w.settle();
                    busy.clear();
                    let flush = Sqe { opcode: NvmOpcode::FLUSH.0, nsid: 1, ..Sqe::default() };
                    w.run(sqid, flush);
                }
                Do::Settle => {
                    w.settle();
                    busy.clear();
                }
                Do::Step => w.step(),
                Do::Recreate => {
                    w.settle();
                    busy.clear();
                    w.delete(2);
                    w.create_sq(2, 1);
                }
            }
        }
        w.settle();
        w.crash = None;
        w.again.clear();
        for (slba, byte) in blocks {
            prop_assert_eq!(w.block(1, slba), byte);
        }
        w.check();
    }

    #[test]
    fn garbage_is_refused_or_read_but_never_a_panic(
        journal in prop::collection::vec((0usize..700, any::<u64>(), any::<bool>()), 0..60),
        cq in prop::collection::vec(any::<u8>(), 0..80),
        bells in any::<[u32; 4]>(),
        entries in 0u32..70000,
    ) {
        use crate::controller::image::{CqImage, SqImage};
        use crate::controller::recover::recover;
        use crate::poller::Journal;
        use crate::state::{Shape, StateFile};
        let state = StateFile::anonymous(Shape { pollers: 2, slots: 12 }).unwrap();
        for (at, value, small) in journal {
            let value = if small { 1 << 63 | value & 0x3_0007_0007 } else { value | 1 << 63 };
            for poller in 0..2 {
                if let Some(word) = state.journal_words(poller).get(at) {
                    word.store(value, Ordering::Relaxed);
                }
            }
        }
        let map = memory(BASE, LEN);
        prop_assert!(map.write(BASE + 0x1000, &cq));
        let entries = entries.max(u32::from(entries % 2 == 0) * 5);
        let cqs = [CqImage { qid: 1, base: BASE + 0x1000, entries, ..CqImage::default() }];
        let sqs = [1, 2].map(|qid| SqImage {
            qid,
            base: BASE + 0x4000,
            entries: 5,
            cqid: 1,
            ..SqImage::default()
        });
        let journals = [0, 1].map(|poller| Journal::new(Arc::clone(&state), poller));
        let bell = |d: Doorbell| bells.get(d.index() as usize % 5).copied();
        if let Ok(found) = recover(&cqs, &sqs, &journals, &map, &bell) {
            for one in found {
                prop_assert!(u32::from(one.at.tail) < entries && u32::from(one.at.head) < entries);
                prop_assert!(one.sqs.iter().all(|(_, head)| *head < 5));
                prop_assert!((one.carried.len() as u32) < entries);
            }
        }
    }
}
