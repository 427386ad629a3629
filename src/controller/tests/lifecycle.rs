//! Registers and what they do: enable, reset, shutdown, attach, detach, memory.

use super::*;
use crate::backend::{HugePages, MemoryOptions, NullOptions};
use crate::poller::DoorbellMode;
use nvme_spec::identify::IdentifyController;
use nvme_spec::regs::{Arbitration, CommandSetSelected, Shn, Shst};
use std::time::{Duration, Instant};
use zerocopy::FromBytes as _;

const ON: Cc = Cc::new().with_en(true).with_iosqes(6).with_iocqes(4);

#[test]
fn an_enabled_controller_serves_its_admin_queue() {
    let mut rig = Rig::enabled();
    // The buffer begins in the middle of a page: PRP2 is the rest.
    let mut sqe = identify_controller();
    sqe.prp1 = DATA + 0x800;
    sqe.prp2 = DATA + 0x3000;
    rig.ok(sqe);
    let mut bytes = rig.data(DATA + 0x800, 0x800);
    bytes.extend(rig.data(DATA + 0x3000, 0x800));
    let identify = IdentifyController::read_from_bytes(&bytes).unwrap();
    assert_eq!(identify.nn, 4);
    assert_eq!(rig.data(DATA + 0x3800, 16), [0; 16]);
    // Round and round: the phase turns.
    for _ in 0..100 {
        rig.ok(identify_controller());
    }
}

#[test]
fn what_cannot_be_enabled_is_fatal_until_it_is_reset() {
    let aqa = |sq, cq| Aqa::new().with_asqs_z(sq).with_acqs_z(cq).into_bits();
    let cases: [(u32, u64, u64, Cc); 10] = [
        (aqa(0, 15), ASQ, ACQ, ON),
        (aqa(15, 0), ASQ, ACQ, ON),
        (aqa(15, 15), ASQ + 64, ACQ, ON),
        (aqa(15, 15), ASQ, ACQ + 16, ON),
        (aqa(15, 15), 0, ACQ, ON),
        (aqa(15, 15), ASQ, !0xFFF, ON),
        (aqa(4095, 15), BASE + LEN as u64 - 4096, ACQ, ON),
        (aqa(15, 15), ASQ, ACQ, ON.with_mps(1)),
        (aqa(15, 15), ASQ, ACQ, ON.with_css(CommandSetSelected::ALL)),
        (
            aqa(15, 15),
            ASQ,
            ACQ,
            ON.with_ams(Arbitration::WEIGHTED_ROUND_ROBIN),
        ),
    ];
    for (aqa, asq, acq, cc) in cases {
        let mut rig = Rig::new();
        rig.write32(offset::AQA, aqa);
        rig.shared.registers.write(offset::ASQ, &asq.to_le_bytes());
        rig.shared.registers.write(offset::ACQ, &acq.to_le_bytes());
        rig.cc(cc);
        let case = format!("{aqa:#x} {asq:#x} {acq:#x} {cc:?}");
        assert_eq!(rig.csts(), Csts::new().with_cfs(true), "{case}");
        rig.cc(Cc::new());
        assert_eq!(rig.csts(), Csts::new(), "{case}");
        rig.enable();
        rig.ok(identify_controller());
    }
}

#[test]
fn entry_sizes_count_when_a_queue_is_made() {
    let mut rig = Rig::new();
    rig.set_up(ENTRIES);
    rig.cc(Cc::new().with_en(true));
    assert!(rig.csts().rdy());
    assert_eq!(rig.status(create_cq(1)), Status::INVALID_QUEUE_SIZE);
    rig.cc(Cc::new().with_en(true).with_iocqes(4).with_iosqes(5));
    rig.create_cq(1);
    assert_eq!(rig.status(create_sq(1, 1)), Status::INVALID_QUEUE_SIZE);
    rig.cc(ON);
    rig.ok(create_sq(1, 1));
}

#[test]
fn a_reset_waits_for_pollers_and_forgets_everything() {
    let mut rig = Rig::enabled();
    rig.create_pair(1);
    rig.create_pair(2);
    rig.submit(command(AdminOpcode::ASYNC_EVENT_REQUEST));
    assert!(rig.completions().is_empty());
    rig.sent();
    rig.silence(true);
    rig.submit(create_cq(3));
    assert!(rig.completions().is_empty());
    let late = rig.script.sent.lock().unwrap().pop().unwrap();
    rig.bell(Doorbell::Sq(2), 5);
    rig.cc(Cc::new());
    assert_eq!(rig.sent_only(), ["0: Reset", "1: Reset"]);
    assert!(rig.csts().rdy(), "until the pollers have answered");
    rig.cc(ON);
    assert!(rig.csts().rdy(), "enabling waits as well");
    rig.answer(Ok(true));
    rig.silence(false);
    rig.entries = ENTRIES;
    rig.set_up(ENTRIES);
    rig.turns();
    assert_eq!(rig.csts(), Csts::new().with_rdy(true));
    assert_eq!(rig.bell_value(Doorbell::Sq(2)), 0, "the window is zero");
    let (poller, message) = late;
    let reply = Reply {
        token: token(&message).unwrap(),
        result: Ok(true),
    };
    rig.shared.inbox.reply(poller, reply);
    assert!(rig.completions().is_empty(), "an answer of before");
    rig.create_pair(1);
    assert_eq!(rig.status(create_cq(1)), Status::INVALID_QUEUE_ID);
}

#[test]
fn disable_and_enable_in_one_go_is_a_reset() {
    let mut rig = Rig::enabled();
    rig.create_pair(1);
    rig.sent();
    rig.write32(offset::CC, 0);
    rig.set_up(ENTRIES);
    rig.cc(ON);
    assert_eq!(rig.sent(), ["0: Reset"]);
    assert!(rig.csts().rdy());
    rig.create_pair(1);
    // The same notification again does nothing.
    rig.shared.inbox.wake();
    rig.cc(ON);
    assert_eq!(rig.status(create_cq(1)), Status::INVALID_QUEUE_ID);
}

#[test]
fn shutdown_flushes_and_then_says_so() {
    for shn in [Shn::NORMAL, Shn::ABRUPT] {
        let options = MemoryOptions {
            block_shift: 9,
            blocks: 2048,
            read_only: false,
            huge_pages: HugePages::Never,
        };
        let store = Backend::memory(options).unwrap();
        let mut rig = Rig::with(sample(), vec![Arc::new(store)]);
        rig.enable();
        rig.cc(ON.with_shn(shn));
        let begun = Instant::now();
        while rig.csts().shst() != Shst::COMPLETE {
            assert!(begun.elapsed() < Duration::from_secs(10));
            rig.turns();
            std::thread::yield_now();
        }
        assert!(rig.csts().rdy(), "a shutdown is not a reset");
        rig.cc(Cc::new());
        assert_eq!(rig.csts(), Csts::new());
        rig.enable();
    }
    // Without volatile caches there is nothing to wait for; also with EN = 0.
    let mut rig = Rig::new();
    rig.cc(Cc::new().with_shn(Shn::NORMAL));
    assert_eq!(rig.csts().shst(), Shst::COMPLETE);
}

#[test]
fn a_flush_that_ends_after_a_reset_is_ignored() {
    let mut rig = Rig::enabled();
    rig.shared.inbox.send(Mail::Flushed(rig.actor.shutdowns));
    rig.turns();
    assert_eq!(rig.csts().shst(), Shst::NORMAL);
}

#[test]
fn reset_from_outside_clears_registers_and_answers_when_quiet() {
    let mut rig = Rig::enabled();
    rig.create_pair(1);
    rig.sent();
    rig.silence(true);
    let done = rig.mail(Mail::Reset);
    let again = rig.mail(Mail::Reset);
    rig.turns();
    assert_eq!(rig.csts(), Csts::new());
    assert_eq!(rig.shared.registers.admin().asq, 0);
    assert!(!is_done(&done) && !is_done(&again));
    assert_eq!(rig.sent_only(), ["0: Reset"], "one reset for both");
    rig.answer(Ok(true));
    rig.turns();
    assert!(is_done(&done) && is_done(&again));
    rig.silence(false);
    rig.enable();
    rig.create_pair(1);
    assert_eq!(
        rig.sent(),
        ["0: CreateCq 1", "0: CreateSq 1"],
        "still attached"
    );
}

struct Front;

impl crate::controller::FrontEnd for Front {
    fn request_doorbells(&self, _mode: DoorbellMode) {}
}

#[test]
fn detach_during_a_reset_follows_it_and_a_new_front_end_waits() {
    let mut rig = Rig::enabled();
    rig.create_pair(1);
    rig.sent();
    rig.silence(true);
    rig.cc(Cc::new());
    let done = rig.mail(Mail::Detach);
    rig.turns();
    assert_eq!(rig.sent_only(), ["0: Reset"]);
    rig.answer(Ok(true));
    rig.turns();
    assert!(!is_done(&done));
    assert_eq!(rig.sent_only(), ["0: Detach"]);
    // The next front-end is quicker than the last I/O of the one before.
    rig.shared.inbox.send(Mail::Attach(Arc::new(Front)));
    let memory = rig.mail(|done| Mail::Memory(Arc::clone(&rig.map), done));
    rig.set_up(ENTRIES);
    rig.turns();
    // Attach has reset the registers.
    rig.set_up(ENTRIES);
    rig.cc(ON);
    assert!(!rig.csts().rdy() && !is_done(&memory));
    rig.answer(Ok(true));
    rig.turns();
    assert!(is_done(&done) && is_done(&memory) && rig.csts().rdy());
    rig.silence(false);
    rig.create_pair(1);
    assert_eq!(rig.sent(), ["0: Attach", "0: CreateCq 1", "0: CreateSq 1"]);
}

#[test]
fn memory_that_takes_the_admin_queues_away_is_fatal() {
    let mut rig = Rig::enabled();
    let same = rig.mail(|done| Mail::Memory(memory(BASE, LEN), done));
    rig.turns();
    assert!(is_done(&same) && !rig.csts().cfs());
    let gone = rig.mail(|done| Mail::Memory(memory(0, 4096), done));
    rig.turns();
    assert!(is_done(&gone) && rig.csts().cfs());
    let back = rig.mail(|done| Mail::Memory(Arc::clone(&rig.map), done));
    rig.turns();
    assert!(is_done(&back) && rig.csts().cfs(), "only a reset helps");
    rig.cc(Cc::new());
    rig.enable();
}

#[test]
fn new_memory_is_in_use_when_every_poller_says_so() {
    let mut rig = Rig::enabled();
    rig.create_pair(1);
    rig.create_pair(2);
    rig.sent();
    rig.silence(true);
    let map = memory(BASE, LEN);
    let done = rig.mail(|done| Mail::Memory(map, done));
    rig.turns();
    let sent: Vec<_> = rig.script.sent.lock().unwrap().drain(..).collect();
    let tokens: Vec<_> = sent.iter().map(|(p, m)| (*p, token(m).unwrap())).collect();
    assert_eq!(tokens.len(), 2);
    for (poller, token) in tokens {
        assert!(!is_done(&done));
        rig.shared.inbox.reply(
            poller,
            Reply {
                token,
                result: Ok(true),
            },
        );
        rig.turns();
    }
    assert!(is_done(&done));
}

#[test]
fn a_public_controller_needs_pollers_and_good_numbers() {
    use crate::controller::{Controller, ControllerConfig};
    use crate::poller::PollerPool;
    use crate::testing::controller_config;
    let backend = Arc::new(
        Backend::null(NullOptions {
            block_shift: 9,
            blocks: 2048,
            read_only: false,
        })
        .unwrap(),
    );
    let config = |queues| ControllerConfig {
        queues,
        ..controller_config("vm1", vec![Arc::clone(&backend)])
    };
    let pool = PollerPool::start(&[]).unwrap();
    let error = Controller::new(config(0), &pool).err().unwrap().to_string();
    assert!(
        error.contains("controller 'vm1'") && error.contains("0 queue pairs"),
        "{error}"
    );
    let error = Controller::new(config(4), &pool).err().unwrap().to_string();
    assert!(error.contains("no poller"), "{error}");
}
