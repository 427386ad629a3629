//! Forwarding against SSDs of all sorts: the conformance suite, and what guests must not reach.

#![expect(unsafe_code, reason = "calls the unsafe `Channel::submit`")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme_spec::identify::Le128;
use nvme_spec::log::{CriticalWarning, SmartLog};
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::regs::{Cap, css};
use nvme_spec::{Status, StatusField};

use super::{Forwarded, NvmeOptions, Window};
use crate::backend::conformance::{self, Promise};
use crate::backend::{
    AnyChannel, Backend, Channel as _, Fault, Finished, GuestData, HugePages, MemoryOptions,
    Opcodes, Operation, Operations, Request, Rule, Submitted,
};
use crate::driver::dma::{Mapping, shared_memory};
use crate::driver::{Ssd, SsdOptions};
use crate::memory::{Buffers, GuestMap};
use crate::poller::IdlePolicy;
use crate::testing::{Act, Emulated, Mischief, Model, ModelOptions};

const STORES: Promise = Promise {
    stores: true,
    streams: 6,
};

fn start(model: &Model) -> Arc<Ssd> {
    let options = SsdOptions {
        queue_pairs: 8,
        ..SsdOptions::default()
    };
    Ssd::start("model".into(), model.device(), model.space(), options).unwrap()
}

fn on(ssd: &Arc<Ssd>, window: &Arc<Window>, offset: u64, size: Option<u64>) -> Backend {
    Backend::nvme(&NvmeOptions {
        ssd: Arc::clone(ssd),
        window: Arc::clone(window),
        nsid: 1,
        offset,
        size,
        read_only: false,
        pass: Opcodes::NONE,
    })
    .unwrap()
}

fn sole(ssd: &Arc<Ssd>) -> Arc<Window> {
    Window::sole(ssd.space(), "model").unwrap()
}

fn forwarded(backend: &Backend) -> Forwarded {
    backend.as_nvme().unwrap().forwarded()
}

#[test]
fn a_whole_ssd_conforms_and_prps_go_through_untouched() {
    for block_shift in [9, 12] {
        let model = Model::new(ModelOptions {
            block_shift,
            blocks: (8 << 20) >> block_shift,
            mdts: 8,
            ..ModelOptions::default()
        });
        let ssd = start(&model);
        let backend = on(&ssd, &sole(&ssd), 0, None);
        assert!(backend.describe().contains("as the guest wrote them"));
        conformance::run(&backend, STORES);
        let Forwarded {
            untouched,
            rebuilt,
            split,
            without_data,
            ..
        } = forwarded(&backend);
        assert_eq!((rebuilt, split > 0), (0, false), "{untouched}");
        assert!(untouched > 1000 && without_data > 100, "{untouched}");
        assert_eq!(model.fake_space().refused(), 0);
    }
}

#[test]
fn a_part_of_a_small_slow_ssd_conforms_and_the_rest_is_left_alone() {
    const PART: u64 = 3 << 20;
    let model = Model::new(ModelOptions {
        blocks: 4 * PART / 512,
        // 16 KiB at a time, boundaries that are no power of two, seven commands at a time.
        mdts: 2,
        noiob: 40,
        cap: Cap::new().with_mqes_z(7).with_to(2).with_css(css::NVM),
        ..ModelOptions::default()
    });
    let ssd = start(&model);
    let windows = Window::shared(ssd.space(), "model", 2).unwrap();
    let all = on(&ssd, &windows[0], 0, None);
    let mut client = conformance::Client::new(&all, 1);
    let chunk = conformance::pattern(3, 1 << 20);
    for i in 0..12 {
        client.write(i * 2048, &chunk, conformance::Layout::Pages(0));
    }
    drop(client);
    let before = model.bytes(1);
    let part = on(&ssd, &windows[1], PART, Some(PART));
    assert_eq!(part.geometry().blocks, PART / 512);
    conformance::run(&part, STORES);
    let after = model.bytes(1);
    let (start, end) = (PART as usize, 2 * PART as usize);
    assert!(before[..start] == after[..start] && before[end..] == after[end..]);
    let f = forwarded(&part);
    assert_eq!(f.untouched, 0);
    assert!(f.rebuilt > 500 && f.split > 100, "{f:?}");
    assert_eq!(model.fake_space().refused(), 0);
    assert!(part.describe().contains("blocks 6144 to 12287"));
}

#[test]
fn our_own_controller_as_the_ssd_conforms() {
    for idle in [IdlePolicy::Adaptive, IdlePolicy::Interrupt] {
        let memory = Backend::memory(MemoryOptions {
            block_shift: 9,
            blocks: (6 << 20) >> 9,
            read_only: false,
            huge_pages: HugePages::Never,
        });
        let emulated = Emulated::new(vec![Arc::new(memory.unwrap())], idle).unwrap();
        let options = SsdOptions {
            queue_pairs: 8,
            ..SsdOptions::default()
        };
        let ssd = Ssd::start("own".into(), emulated.device(), emulated.space(), options).unwrap();
        let backend = on(&ssd, &sole(&ssd), 1 << 20, None);
        conformance::run(
            &backend,
            Promise {
                streams: 2,
                ..STORES
            },
        );
    }
}

/// The whole way: a driver, our controller, its poller, an SSD behind it; memory comes and goes all the time.
#[test]
fn a_controller_that_forwards_conforms() {
    let model = Model::new(ModelOptions {
        blocks: (8 << 20) >> 9,
        ..ModelOptions::default()
    });
    let inner = start(&model);
    let backend = Arc::new(on(&inner, &sole(&inner), 0, None));
    for idle in [IdlePolicy::Adaptive, IdlePolicy::Interrupt] {
        let emulated = Emulated::new(vec![Arc::clone(&backend)], idle).unwrap();
        let outer = Ssd::start(
            "outer".into(),
            emulated.device(),
            emulated.space(),
            SsdOptions {
                queue_pairs: 8,
                ..SsdOptions::default()
            },
        )
        .unwrap();
        // A reset waits for what the SSD does not do: 30 s, 5 s of grace, and 5 s for the reset of that.
        assert_eq!(outer.cap().to(), 80);
        // What the guest is told is what the SSD said.
        assert_eq!(
            outer.identify().vwc.present(),
            inner.identify().vwc.present()
        );
        let through = on(&outer, &sole(&outer), 0, None);
        let few = Promise {
            streams: 2,
            ..STORES
        };
        conformance::run(&through, few);
    }
    let f = forwarded(&backend);
    // Built anew while memory leaves, and only then. This controller takes more at a time than the SSD.
    assert!(f.untouched > 0 && f.split > 0, "{f:?}");
    assert!(f.untouched + f.rebuilt > 1000, "{f:?}");
    assert_eq!(
        model.fake_space().refused(),
        0,
        "no memory came late or went early"
    );
}

/// A guest of 1 MiB at 0 on a window.
fn guest(window: &Window) -> Arc<GuestMap> {
    let file = shared_memory("guest", 1 << 20).unwrap();
    let region = Mapping::map(&file, 0, 1 << 20, 0).unwrap();
    let shown = window.show(&region).unwrap();
    GuestMap::keeping(vec![region], vec![Arc::new(shown)]).unwrap()
}

/// Do one transfer.
fn transfer(
    channel: &mut AnyChannel,
    map: &Arc<GuestMap>,
    operation: Operation,
    slba: u64,
    bytes: u32,
    prps: [u64; 2],
) -> StatusField {
    let request = Request {
        operation,
        slba,
        blocks: bytes / 512,
        data: Buffers::NONE,
        guest: Some(GuestData {
            prp1: prps[0],
            prp2: prps[1],
            bytes,
            cdw12: u32::MAX,
            cdw13: u32::MAX,
            map,
        }),
    };
    // SAFETY: the caller holds the map until the request is finished, which this waits for.
    match unsafe { channel.submit(0, &request) } {
        Submitted::Done(status) => return status.into(),
        Submitted::Pending => channel.flush(),
    }
    let (mut out, start) = (Vec::<Finished>::with_capacity(1), Instant::now());
    while out.is_empty() {
        assert!(start.elapsed() < Duration::from_secs(20), "no answer");
        channel.poll(&mut out);
    }
    out[0].status
}

#[test]
fn guests_that_share_an_ssd_reach_neither_each_others_memory_nor_blocks() {
    let model = Model::new(ModelOptions::default());
    let ssd = start(&model);
    let windows = Window::shared(ssd.space(), "model", 2).unwrap();
    let half = 1 << 20;
    let mine = on(&ssd, &windows[0], 0, Some(half));
    let theirs = on(&ssd, &windows[1], half, None);
    let (me, them) = (guest(&windows[0]), guest(&windows[1]));
    assert!(them.write(0, &[0x77; 1 << 20]) && me.write(0, &[0x11; 1 << 20]));
    let (mut a, mut b) = (mine.channel(4).unwrap(), theirs.channel(4).unwrap());
    let write = Operation::Write { fua: false };
    assert!(transfer(&mut b, &them, write, 0, 4096, [0, 0]).is_success());
    // The other window, the driver's own memory at the top, the end of the address space.
    let base = windows[1].base() - windows[0].base();
    let elsewhere = [base, base + 0x1000, (1 << 39) - 0x10_0000, !4095, 1 << 20];
    for operation in [Operation::Read, write, Operation::Compare] {
        for bad in elsewhere {
            let list = [bad, 0x3000];
            assert!(me.write(0x8000, zerocopy::IntoBytes::as_bytes(&list)));
            for (bytes, prps) in [
                (512, [bad, 0]),
                (4096, [bad, 0]),
                (8192, [0x1000, bad]),
                (12288, [0x1000, 0x8000]),
                (12288, [0x1000, bad]),
            ] {
                let status = transfer(&mut a, &me, operation, 0, bytes, prps);
                assert_eq!(
                    status.status(),
                    Status::DATA_TRANSFER_ERROR,
                    "{bytes} {prps:x?}"
                );
            }
        }
        let blocks = half / 512;
        for slba in [blocks, blocks - 7, u64::MAX] {
            let status = transfer(&mut a, &me, operation, slba, 4096, [0, 0]);
            assert_eq!(status.status(), Status::LBA_OUT_OF_RANGE);
        }
    }
    assert_eq!(model.fake_space().refused(), 0, "the SSD was never asked");
    let mut bytes = vec![0; 1 << 20];
    assert!(them.read(0, &mut bytes) && bytes.iter().all(|b| *b == 0x77));
    let disk = model.bytes(1);
    assert!(disk[..half as usize].iter().all(|b| *b == 0));
    assert!(disk[half as usize..][..4096].iter().all(|b| *b == 0x77));
    assert!(transfer(&mut b, &them, Operation::Read, 0, 4096, [0x5000, 0]).is_success());
}

#[test]
fn a_sole_guest_may_name_any_address_and_harms_only_itself() {
    let model = Model::new(ModelOptions::default());
    let ssd = start(&model);
    let window = sole(&ssd);
    let backend = on(&ssd, &window, 0, None);
    let map = guest(&window);
    let mut channel = backend.channel(4).unwrap();
    // Nothing is there.
    for bad in [1 << 21, 1 << 38] {
        let status = transfer(&mut channel, &map, Operation::Read, 0, 4096, [bad, 0]);
        assert!(!status.is_success(), "{bad:#x}");
    }
    // And of the driver's own memory nothing can be written that tells the SSD what to do.
    let space = model.fake_space();
    let ours = (0..2048u64).map(|i| (1 << 39) - (i + 1) * 4096);
    let commands = |at: &u64| {
        let there = space.readable().resolve_whole(*at, 4096).is_some();
        there && space.writable().resolve(*at, 4096).is_none()
    };
    let commands: Vec<u64> = ours.filter(commands).step_by(7).take(16).collect();
    assert!(commands.len() > 3);
    for at in commands {
        let status = transfer(&mut channel, &map, Operation::Read, 0, 4096, [at, 0]);
        assert!(!status.is_success(), "{at:#x}");
    }
    assert!(transfer(&mut channel, &map, Operation::Read, 0, 4096, [0, 0]).is_success());
    assert_eq!(ssd.counters().resets, 0);
}

#[test]
fn what_the_ssd_says_is_what_the_guest_hears() {
    let memory = Backend::memory(MemoryOptions {
        block_shift: 9,
        blocks: 4096,
        read_only: false,
        huge_pages: HugePages::Never,
    });
    let (memory, faults) = memory.unwrap().with_faults();
    let emulated = Emulated::new(vec![Arc::new(memory)], IdlePolicy::Adaptive).unwrap();
    let ssd = Ssd::start(
        "own".into(),
        emulated.device(),
        emulated.space(),
        SsdOptions::default(),
    )
    .unwrap();
    let window = sole(&ssd);
    let backend = on(&ssd, &window, 0, None);
    let map = guest(&window);
    let mut channel = backend.channel(4).unwrap();
    for (status, dnr) in [
        (Status::UNRECOVERED_READ_ERROR, false),
        (Status::ACCESS_DENIED, true),
        (Status::NAMESPACE_NOT_READY, false),
        (Status::new(7, 0x55), false),
    ] {
        faults.clear();
        faults.add(Rule::once(Operations::READ, Fault::Fail(status)));
        let said = transfer(&mut channel, &map, Operation::Read, 0, 4096, [0, 0]);
        let expected = StatusField::from_status(status).with_dnr(dnr);
        assert_eq!(said, expected, "{status}");
    }
    // PRPs are the SSD's to judge.
    let odd = transfer(&mut channel, &map, Operation::Read, 0, 4096, [2, 0]);
    assert_eq!(odd, Status::INVALID_PRP_OFFSET.into());
}

/// Any status an SSD can make up comes through our controller with its Do Not Retry and More, and is in the error log the guest reads.
#[test]
fn errors_of_the_ssd_are_in_the_guests_error_log() {
    let model = Model::new(ModelOptions::default());
    let inner = start(&model);
    let backend = Arc::new(on(&inner, &sole(&inner), 0, None));
    let emulated = Emulated::new(vec![backend], IdlePolicy::Adaptive).unwrap();
    let options = SsdOptions::default();
    let outer = Ssd::start("outer".into(), emulated.device(), emulated.space(), options).unwrap();
    let window = sole(&outer);
    let through = on(&outer, &window, 0, None);
    let map = guest(&window);
    let mut channel = through.channel(4).unwrap();
    model.misbehave(Mischief::of(&[Act::AnyStatus], 10_000));
    let told = [Status::ABORT_REQUESTED, Status::ABORTED_SQ_DELETION];
    let (mut dnr, mut more, mut media) = (0, 0, 0);
    // No more than a poller reports in one go: of a guest whose commands fail by the thousand, most go unreported.
    for slba in 0..60u64 {
        let read = Operation::Read;
        let said = transfer(&mut channel, &map, read, slba, 512, [0x1000, 0]);
        if said.is_success() || told.contains(&said.status()) {
            continue;
        }
        let log = outer.error_log().unwrap();
        let entry = log.first().expect("an entry");
        assert_eq!(entry.status.with_p(false), said);
        assert_eq!((entry.lba, entry.nsid), (slba, 1));
        dnr += u32::from(said.dnr());
        more += u32::from(said.m());
        media += u64::from(said.sct() == 2 && said.status() != Status::COMPARE_FAILURE);
    }
    assert!((10..50).contains(&dnr) && (10..50).contains(&more));
    let smart = outer.smart().unwrap();
    // The last one may be counted after it was told.
    assert!(media > 1 && smart.media_errors.get() + 1 >= u128::from(media));
}

/// The SMART / Health log of a guest is its SSD's where it is about the device, and its own where it is about what it did. The SSD is not asked.
#[test]
fn the_health_of_the_ssd_is_in_the_guests_log() {
    let model = Model::new(ModelOptions::default());
    let mut told = SmartLog {
        critical_warning: CriticalWarning::new().with_spare(true),
        available_spare: 4,
        available_spare_threshold: 9,
        percentage_used: 101,
        media_errors: Le128::new(77),
        host_read_commands: Le128::new(1 << 70),
        power_cycles: Le128::new(500),
        ..SmartLog::default()
    };
    told.set_temperature(341);
    model.set_smart(told);
    let inner = start(&model);
    let backend = Arc::new(on(&inner, &sole(&inner), 0, None));
    let start = Instant::now();
    while inner.health().is_none() {
        assert!(start.elapsed() < Duration::from_secs(20), "never read");
        std::thread::sleep(Duration::from_millis(1));
    }
    let emulated = Emulated::new(vec![backend], IdlePolicy::Adaptive).unwrap();
    let options = SsdOptions::default();
    let outer = Ssd::start("outer".into(), emulated.device(), emulated.space(), options).unwrap();
    let (reads, start) = (model.smart_reads(), Instant::now());
    for _ in 0..20 {
        let log = outer.smart().unwrap();
        assert_eq!(log.critical_warning, told.critical_warning);
        let spare = (log.available_spare, log.available_spare_threshold);
        assert_eq!((spare, log.percentage_used), ((4, 9), 101));
        assert_eq!((log.temperature(), log.media_errors.get()), (341, 77));
        let own = (log.host_read_commands.get(), log.power_cycles.get());
        assert_eq!(own, (0, 1));
    }
    // Once a minute it is, by its keeper.
    let minutes = start.elapsed().as_secs() / 60 + 1;
    assert!(u64::from(model.smart_reads() - reads) <= minutes);
}

#[test]
fn memory_is_shown_once_and_gone_when_it_is_dropped() {
    let model = Model::new(ModelOptions::default());
    let ssd = start(&model);
    let window = sole(&ssd);
    let before = model.fake_space().mapped();
    let map = guest(&window);
    assert_eq!(model.fake_space().mapped(), before + 1);
    let at_once = Duration::ZERO;
    assert!(
        !window.is_hidden(&(0..4096), at_once) && window.is_hidden(&(1 << 20..1 << 21), at_once)
    );
    drop(map);
    assert!(window.is_hidden(&(0..1 << 20), Duration::from_secs(10)));
    assert_eq!(model.fake_space().mapped(), before);
    let region = |gpa: u64, len: u64| {
        let file = shared_memory("guest", len).unwrap();
        Mapping::map(&file, 0, len as usize, gpa).unwrap()
    };
    for (gpa, len, why) in [
        (0, 2048, "pages of 0x1000 bytes"),
        (0x800, 4096, "pages of 0x1000 bytes"),
        (0xFEDF_F000, 8192, "the IOMMU can map"),
        (
            (1 << 39) - 0x1000,
            4096,
            "bytes of addresses are this guest's",
        ),
    ] {
        let e = window.show(&region(gpa, len)).err().unwrap().to_string();
        assert!(e.contains(why), "{e}");
    }
    assert_eq!(model.fake_space().mapped(), before);
}

/// A guest that shuts down has its data on stable media, whether the SSD has a queue pair to spare for that, grants as many as pollers
/// need, or only one.
#[test]
fn an_ssd_is_flushed_when_its_guest_shuts_down() {
    for (queue_pairs, namespaces) in [(8, 1), (2, 2), (1, 1)] {
        for idle in [IdlePolicy::Adaptive, IdlePolicy::Interrupt] {
            let model = Model::new(ModelOptions {
                queue_pairs,
                namespaces,
                ..ModelOptions::default()
            });
            let inner = start(&model);
            let window = sole(&inner);
            let backends = (1..=namespaces).map(|nsid| {
                let options = NvmeOptions {
                    ssd: Arc::clone(&inner),
                    window: Arc::clone(&window),
                    nsid,
                    offset: 0,
                    size: None,
                    read_only: false,
                    pass: Opcodes::NONE,
                };
                Arc::new(Backend::nvme(&options).unwrap())
            });
            let emulated = Emulated::new(backends.collect(), idle).unwrap();
            let outer = Ssd::start(
                "outer".into(),
                emulated.device(),
                emulated.space(),
                SsdOptions {
                    // A shutdown takes as long as a flush does.
                    least_ready_timeout: Duration::from_secs(60),
                    ..SsdOptions::default()
                },
            )
            .unwrap();
            // While its queues are there, pollers have theirs.
            let lane = outer.lane(4).unwrap();
            assert_eq!(model.commands(NvmOpcode::FLUSH), 0);
            drop(outer);
            assert_eq!(
                model.commands(NvmOpcode::FLUSH),
                namespaces,
                "{queue_pairs} queue pairs"
            );
            // The SSD itself goes on.
            assert_eq!(model.life()[1], 0);
            drop((lane, emulated));
        }
    }
}

#[test]
fn ranges_that_are_not_there_are_refused() {
    let model = Model::new(ModelOptions::default());
    let ssd = start(&model);
    let window = sole(&ssd);
    let open = |nsid, offset, size| {
        let options = NvmeOptions {
            ssd: Arc::clone(&ssd),
            window: Arc::clone(&window),
            nsid,
            offset,
            size,
            read_only: false,
            pass: Opcodes::NONE,
        };
        Backend::nvme(&options).err().map(|e| e.to_string())
    };
    assert_eq!(open(1, 512, Some(1024)), None);
    let pass = |window: &Arc<Window>, size| {
        let options = NvmeOptions {
            ssd: Arc::clone(&ssd),
            window: Arc::clone(window),
            nsid: 1,
            offset: 0,
            size,
            read_only: false,
            pass: [0x80].into_iter().collect(),
        };
        Backend::nvme(&options).map(|b| b.passes().contains(0x80))
    };
    assert!(pass(&window, None).unwrap() && pass(&window, Some(2 << 20)).unwrap());
    let shared = Window::shared(ssd.space(), "model", 2).unwrap();
    for (window, size) in [(&window, Some(1 << 20)), (&shared[1], None)] {
        let e = pass(window, size).unwrap_err().to_string();
        assert!(e.contains("commands nobody checks cannot be passed"), "{e}");
    }
    for (nsid, offset, size, why) in [
        (
            2,
            0,
            None,
            "there is no namespace 2 of SSD model: set ssd-namespace to one it has: 1",
        ),
        (1, 100, None, "offset 100 is not whole blocks"),
        (1, 0, Some(100), "size 100 is not whole blocks"),
        (1, 2 << 20, None, "do not lie in namespace 1"),
        (1, 0, Some((2 << 20) + 512), "it has 2097152 bytes"),
        (1, u64::MAX - 511, Some(512), "do not lie in"),
    ] {
        let e = open(nsid, offset, size).unwrap();
        assert!(e.contains(why), "{e}");
    }
}
