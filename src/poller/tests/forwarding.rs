//! Commands handed on as the guest wrote them, while its memory changes.

use nvme_spec::regs::{Cap, css};

use super::*;
use crate::backend::nvme::Window;
use crate::backend::{Fault, NvmeOptions, Opcodes, Operations, Rule, Rules};
use crate::driver::dma::{Mapping, shared_memory};
use crate::driver::{Ssd, SsdOptions, SsdState};
use crate::testing::{Model, ModelOptions};

/// On an SSD that completes at once, with faults to come.
fn guest(idle: IdlePolicy) -> (Guest, Rules<Fault>) {
    let model = Model::new(ModelOptions {
        instant: true,
        ..ModelOptions::default()
    });
    let options = SsdOptions::default();
    let ssd = Ssd::start("instant".into(), model.device(), model.space(), options).unwrap();
    let window = Window::sole(ssd.space(), "instant").unwrap();
    let backend = Backend::nvme(&NvmeOptions {
        ssd,
        window,
        nsid: 1,
        offset: 0,
        size: None,
        read_only: false,
        pass: [0x80].into_iter().collect(),
    });
    let (backend, faults) = backend.unwrap().with_faults();
    (Guest::on(backend, 16, idle, false, false), faults)
}

/// The guest's memory with a page more.
fn more(guest: &Guest) -> Arc<GuestMap> {
    let mut regions = guest.map.regions().to_vec();
    let file = shared_memory("more", 4096).unwrap();
    regions.push(Mapping::map(&file, 0, 4096, 0x1000_0000).unwrap());
    GuestMap::new(regions).unwrap()
}

#[test]
fn memory_stays_for_what_was_forwarded_before_it_went_and_for_nothing_else() {
    let (mut g, faults) = guest(IdlePolicy::Adaptive);
    let (less, more) = (Arc::clone(&g.map), more(&g));
    let set = |map: &Arc<GuestMap>| {
        let map = Arc::clone(map);
        move |token| Message::SetMemory {
            token,
            key: KEY,
            map,
        }
    };
    assert_eq!(g.ask(set(&more)), Ok(true));
    // Its PRPs, which nobody read, name memory that stays.
    faults.add(Rule::once(Operations::READ, Fault::NeverComplete));
    g.push(io(NvmOpcode::READ, 1, 0, 8, DATA, 0));
    g.ring_tail();
    let out = Instant::now();
    while g.stats.fetched.get() == 0 {
        assert!(out.elapsed() < Duration::from_secs(10));
        std::thread::yield_now();
    }
    g.token += 1;
    let waits = g.token;
    g.pool.handles()[0].send(set(&less)(waits));
    // Commands of the new time keep coming, and do not count.
    for cid in 2..40 {
        let status = g.run(io(NvmOpcode::READ, cid, 0, 8, DATA, 0));
        assert_eq!(status, Status::SUCCESS);
        assert!(g.replies.is_empty(), "the first one is still out");
    }
    g.token += 1;
    let abort = g.token;
    g.pool.handles()[0].send(Message::Abort {
        token: abort,
        key: KEY,
        sqid: 1,
        cid: 1,
    });
    let mut tokens = Vec::new();
    for _ in 0..2 {
        let reply = g.replies.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(reply.result, Ok(true));
        tokens.push(reply.token);
    }
    tokens.sort_unstable();
    assert_eq!(tokens, [waits, abort]);
    assert_eq!(g.wait().status(), Status::ABORT_REQUESTED);
    // Nothing is out: a change is answered at once.
    assert_eq!(g.ask(set(&more)), Ok(true));
    assert_eq!(g.ask(set(&less)), Ok(true));
}

#[test]
fn a_poller_that_slept_is_woken_by_the_ssd() {
    for idle in [IdlePolicy::Interrupt, IdlePolicy::Adaptive] {
        let (mut g, _faults) = guest(idle);
        for cid in 0..20 {
            std::thread::sleep(Duration::from_millis(2));
            let opcode = [NvmOpcode::READ, NvmOpcode::WRITE][usize::from(cid % 2)];
            let status = g.run(io(opcode, cid, 0, 8, DATA, 0));
            assert_eq!(status, Status::SUCCESS);
        }
    }
}

#[test]
fn commands_nobody_understands_pass_only_if_the_operator_says_so() {
    let (mut g, _faults) = guest(IdlePolicy::Adaptive);
    let mut sqe = io(NvmOpcode(0x80), 1, u64::MAX, 0xFFFF, DATA, 0);
    assert_eq!(g.run(sqe), Status::SUCCESS);
    sqe.flags = 0x40;
    assert_eq!(g.run(sqe), Status::INVALID_FIELD, "no SGLs");
    sqe.flags = 0;
    for opcode in [0x04, 0x0D, 0x19, 0x7F, 0x81, 0xFF] {
        sqe.opcode = opcode;
        assert_eq!(g.run(sqe), Status::INVALID_OPCODE, "{opcode:#x}");
    }
    sqe.opcode = 0x80;
    sqe.nsid = 2;
    assert_eq!(g.run(sqe), Status::INVALID_OPCODE, "no such namespace");
}

/// An SSD that takes its time to come back keeps its own guests waiting, and nobody else.
#[test]
fn a_poller_does_not_wait_for_an_ssd_that_is_being_reset() {
    let memory = Backend::memory(MemoryOptions {
        block_shift: 12,
        blocks: 256,
        read_only: false,
        huge_pages: HugePages::Never,
    });
    let mut g = Guest::on(memory.unwrap(), 16, IdlePolicy::Adaptive, false, false);
    let model = Model::new(ModelOptions {
        // It may take two minutes, it says.
        cap: Cap::new().with_mqes_z(1023).with_to(255).with_css(css::NVM),
        ..ModelOptions::default()
    });
    let options = SsdOptions::default();
    let ssd = Ssd::start("quiet".into(), model.device(), model.space(), options).unwrap();
    let window = Window::sole(ssd.space(), "quiet").unwrap();
    let backend = Backend::nvme(&NvmeOptions {
        ssd: Arc::clone(&ssd),
        window,
        nsid: 1,
        offset: 0,
        size: None,
        read_only: false,
        pass: Opcodes::NONE,
    });
    model.never_ready(true);
    ssd.reset();
    let begun = Instant::now();
    while model.life()[0] < 2 {
        assert!(begun.elapsed() < Duration::from_secs(20), "not enabled");
        std::thread::sleep(Duration::from_millis(1));
    }
    // Its guest comes, to the poller that serves the other.
    let (replies_tx, replies) = unbounded();
    let attachment = Box::new(Attachment {
        key: ControllerKey(8),
        sink: Arc::new(Sink {
            replies: replies_tx,
            events: unbounded().0,
            released: unbounded().0,
        }),
        namespaces: Arc::new([Namespace::new(1, Arc::new(backend.unwrap()), false)]),
        stats: Arc::new([NamespaceStats::default()]),
        map: Arc::clone(&g.map),
        window: DoorbellWindow::new(4096).unwrap(),
        stride: DoorbellStride::new(3),
        max_transfer: 1 << 20,
        max_namespaces: 1,
        sgls: false,
        doorbells: DoorbellMode::Trapped,
        journal: None,
    });
    let token = 1;
    g.pool.handles()[0].send(Message::Attach { token, attachment });
    for cid in 1..20 {
        let status = g.run(io(NvmOpcode::READ, cid, 0, 1, DATA, 0));
        assert_eq!(status, Status::SUCCESS);
    }
    let reply = replies.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!(reply.result, Ok(true));
    assert_eq!(ssd.state(), SsdState::Resetting, "all the time");
    model.vanish();
}
