//! Random streams of commands, on a controller that is ours and on devices that are ill or hostile, against a model of the disk.

use std::collections::BTreeMap;
use std::ops::Range;

use nvme_spec::regs::css;
use proptest::prelude::*;

use super::*;
use crate::backend::{Backend, Delay, HugePages, MemoryOptions, Operations, Rule};
use crate::poller::IdlePolicy;
use crate::testing::{Act, Emulated, Mischief};

/// Blocks of 512 bytes each stream has for itself.
const BLOCKS: u64 = 512;

/// Commands of a stream that are out at a time, and the memory each has: room for its data, a list, and a margin.
const DEPTH: u64 = 15;
const ROOM: u64 = 64 << 10;

/// Most blocks of a command.
const MOST: u64 = 64;

/// A source of numbers.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
}

/// A command that is out.
struct Out {
    opcode: NvmOpcode,
    /// Blocks of it, counted in the stream's own.
    blocks: Range<u64>,
    /// Where its data is in guest memory.
    at: u64,
    want: Status,
}

/// What may come of a command besides what should.
#[derive(Clone, Copy, PartialEq)]
enum Trust {
    /// Nothing.
    Honest,
    /// It may have been interrupted; then nobody knows what the blocks hold.
    Ill,
    /// Anything.
    Hostile,
}

/// One user of the SSD: a lane, blocks of its own, memory of its own.
struct Stream {
    lane: Lane,
    numbers: Numbers,
    /// First block and first address.
    base: u64,
    memory: u64,
    /// What the blocks hold; `None` = nobody knows.
    disk: Vec<Option<u8>>,
    out: BTreeMap<u64, Out>,
    places: Vec<u64>,
    next: u64,
    finished: u64,
    trust: Trust,
}

impl Stream {
    fn new(ssd: &Ssd, index: u64, seed: u64, trust: Trust) -> Self {
        Self {
            lane: ssd.lane(DEPTH as u32).unwrap(),
            numbers: Numbers((seed ^ index.wrapping_mul(0x9E37_79B9_7F4A_7C15)) | 1),
            base: index * BLOCKS,
            memory: GUEST + index * DEPTH * ROOM,
            disk: vec![Some(0); BLOCKS as usize],
            out: BTreeMap::new(),
            places: (0..DEPTH).collect(),
            next: 0,
            finished: 0,
            trust,
        }
    }

    /// Bytes of memory so many streams need.
    fn bytes(streams: u64) -> usize {
        (streams * DEPTH * ROOM) as usize
    }

    /// Submit something that does not touch what is out.
    fn submit(&mut self, map: &GuestMap) {
        let Some(place) = self.places.pop() else {
            return;
        };
        let n = &mut self.numbers;
        let len = 1 + if n.below(3) == 0 {
            n.below(MOST)
        } else {
            n.below(9)
        };
        let first = n.below(BLOCKS - len + 1);
        let blocks = first..first + len;
        let clash = |o: &Out| o.blocks.start < blocks.end && blocks.start < o.blocks.end;
        if self.out.values().any(clash) {
            return self.places.push(place);
        }
        let opcode = [
            NvmOpcode::READ,
            NvmOpcode::READ,
            NvmOpcode::WRITE,
            NvmOpcode::WRITE,
            NvmOpcode::COMPARE,
            NvmOpcode::WRITE_ZEROES,
            NvmOpcode::DATASET_MANAGEMENT,
            NvmOpcode::FLUSH,
            NvmOpcode(0x7F),
        ][n.below(9) as usize];
        let room = self.memory + place * ROOM;
        // The list comes first, then the data at any dword.
        let at = room + 4096 + n.below(1024) * 4;
        let fill = n.next() as u8;
        let (user, beyond) = (self.next * DEPTH + place, n.below(20) == 0);
        self.next += 1;
        let bytes = (len * 512) as usize;
        let content: Option<Vec<u8>> = self.content(&blocks);
        let n = &mut self.numbers;
        let mut want = Status::SUCCESS;
        match opcode {
            NvmOpcode::READ => {
                assert!(map.write(room + 4096, &vec![0xEE; (ROOM - 4096) as usize]));
            }
            NvmOpcode::WRITE => {
                let data: Vec<u8> = blocks.clone().flat_map(|b| [fill ^ b as u8; 512]).collect();
                assert!(map.write(at, &data));
            }
            NvmOpcode::COMPARE => {
                let mut data = content.clone().unwrap_or_else(|| vec![0; bytes]);
                if n.below(2) == 0 {
                    let wrong = n.below(bytes as u64) as usize;
                    data[wrong] ^= 1;
                    want = Status::COMPARE_FAILURE;
                }
                assert!(map.write(at, &data));
            }
            NvmOpcode(0x7F) => want = Status::INVALID_OPCODE,
            _ => {}
        }
        let slba = match beyond {
            true => u64::MAX - n.below(1000),
            false => self.base + first,
        };
        let mut sqe = ReadWrite::new(1, slba, (len - 1) as u16).to_sqe(opcode, 0, 0);
        let moves = matches!(
            opcode,
            NvmOpcode::READ | NvmOpcode::WRITE | NvmOpcode::COMPARE
        );
        if beyond && (moves || opcode == NvmOpcode::WRITE_ZEROES) {
            want = Status::LBA_OUT_OF_RANGE;
        }
        let sent = if moves && n.below(2) == 0 {
            let page = at & !4095;
            let pages = (0..).map(|i: u64| page + i * 4096);
            let offset = (at - page) as u32;
            self.lane
                .submit_pages(sqe, pages, offset, bytes as u32, user)
        } else if moves {
            sqe = sqe.with_prps(at, own_list(map, room, at, bytes as u64));
            self.lane.submit(sqe, user)
        } else if opcode == NvmOpcode::DATASET_MANAGEMENT {
            let range = DsmRange {
                cattr: 0,
                nlb: len as u32,
                slba: self.base + first,
            };
            let command = DatasetManagement {
                nsid: 1,
                ad: true,
                ..DatasetManagement::default()
            };
            let sqe = command.to_sqe(0, 0);
            self.lane.submit_bytes(sqe, range.as_bytes(), user)
        } else {
            self.lane.submit(sqe, user)
        };
        assert_eq!(sent, Ok(()));
        let blocks = match opcode {
            NvmOpcode::FLUSH | NvmOpcode(0x7F) => 0..0,
            _ => blocks,
        };
        if opcode == NvmOpcode::WRITE && want == Status::SUCCESS {
            // Until it is done nobody reads them.
            for block in blocks.clone() {
                self.disk[block as usize] = Some(fill ^ block as u8);
            }
        }
        if opcode == NvmOpcode::COMPARE && content.is_none() && want != Status::LBA_OUT_OF_RANGE {
            // Anything may come of it.
            want = Status::COMPARE_FAILURE;
        }
        let out = Out {
            opcode,
            blocks,
            at,
            want,
        };
        assert!(self.out.insert(user, out).is_none());
    }

    /// What some blocks hold, if that is known.
    fn content(&self, blocks: &Range<u64>) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        for block in blocks.clone() {
            bytes.extend([self.disk[block as usize]?; 512]);
        }
        Some(bytes)
    }

    /// Collect what is there, and check it.
    fn poll(&mut self, map: &GuestMap) {
        let mut done = Vec::new();
        self.lane.poll(64, |c| done.push(c));
        for c in done {
            let out = self
                .out
                .remove(&c.user)
                .expect("out, and for the first time");
            self.places.push(c.user % DEPTH);
            self.finished += 1;
            if self.trust != Trust::Hostile {
                self.check(map, &out, &c);
            }
        }
    }

    fn check(&mut self, map: &GuestMap, out: &Out, c: &Completion) {
        let known = self.content(&out.blocks);
        if c.status() != out.want {
            let gave_up = c.status() == Status::INTERNAL_ERROR && c.cqe.status.dnr();
            let unknown = out.opcode == NvmOpcode::COMPARE && known.is_none();
            assert!(
                unknown || gave_up && self.trust == Trust::Ill,
                "{:?} of {:?}: {:?}, not {:?}",
                out.opcode,
                out.blocks,
                c.cqe,
                out.want
            );
            if !matches!(out.opcode, NvmOpcode::READ | NvmOpcode::COMPARE) {
                for block in out.blocks.clone() {
                    self.disk[block as usize] = None;
                }
            }
            return;
        }
        if out.want != Status::SUCCESS {
            return;
        }
        match out.opcode {
            NvmOpcode::WRITE_ZEROES | NvmOpcode::DATASET_MANAGEMENT => {
                for block in out.blocks.clone() {
                    self.disk[block as usize] = Some(0);
                }
            }
            NvmOpcode::READ => {
                let len = (out.blocks.end - out.blocks.start) * 512;
                let room = self.memory + (out.at - self.memory) / ROOM * ROOM;
                let mut all = vec![0; (ROOM - 4096) as usize];
                assert!(map.read(room + 4096, &mut all));
                let at = (out.at - room - 4096) as usize;
                let (before, rest) = all.split_at(at);
                let (data, after) = rest.split_at(len as usize);
                let clean = |bytes: &[u8]| bytes.iter().all(|b| *b == 0xEE);
                assert!(
                    clean(before) && clean(after),
                    "nothing but the data is written"
                );
                if let Some(known) = known {
                    assert!(data == known, "what was read at {:?}", out.blocks);
                }
            }
            _ => {}
        }
    }
}

/// A list of the guest's own for data at `at`: PRP2.
fn own_list(map: &GuestMap, list: u64, at: u64, len: u64) -> u64 {
    let page = at & !4095;
    let pages = (at + len).div_ceil(4096) - page / 4096;
    let entries: Vec<u64> = (1..pages).map(|i| page + i * 4096).collect();
    match entries[..] {
        [] => 0,
        [second] => second,
        _ => {
            assert!(map.write(list, entries.as_bytes()));
            list
        }
    }
}

/// Run streams until each has finished `commands`; `disturb` is called now and then, with the number of commands finished so far.
fn run_streams(
    streams: &mut [Stream],
    map: &GuestMap,
    commands: u64,
    mut disturb: impl FnMut(u64),
) {
    let start = Instant::now();
    let mut before = 0;
    loop {
        let mut left = false;
        for stream in streams.iter_mut() {
            let batch = stream.numbers.below(8);
            for _ in 0..batch {
                if stream.next < commands + 50 && stream.finished < commands {
                    stream.submit(map);
                }
            }
            stream.lane.ring();
            stream.poll(map);
            left |= stream.finished < commands || !stream.out.is_empty();
        }
        if !left {
            return;
        }
        let finished = streams.iter().map(|s| s.finished).sum();
        disturb(finished);
        if finished == before {
            std::thread::sleep(Duration::from_micros(100));
        }
        before = finished;
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{finished} finished, {:?} out",
            streams.iter().map(|s| s.out.len()).collect::<Vec<_>>()
        );
    }
}

fn memory_backend() -> Backend {
    Backend::memory(MemoryOptions {
        block_shift: 9,
        blocks: 4 * BLOCKS,
        read_only: false,
        huge_pages: HugePages::Never,
    })
    .unwrap()
}

/// Driver and controller, each other's test.
fn with_our_controller(seed: u64, idle: IdlePolicy, disturbed: bool) {
    let (backend, delays) = memory_backend().with_delays();
    delays.add(Rule {
        skip: 20,
        count: Some(300),
        ..Rule::always(Operations::ALL, Delay(Duration::from_millis(seed % 4)))
    });
    let emulated = Emulated::new(vec![Arc::new(backend)], idle).unwrap();
    let options = SsdOptions {
        command_timeout: Duration::from_secs(5),
        ..hasty()
    };
    let ssd = Ssd::start("ours".into(), emulated.device(), emulated.space(), options).unwrap();
    let memory = Memory::new(ssd.space(), Stream::bytes(3));
    let trust = if disturbed { Trust::Ill } else { Trust::Honest };
    let mut streams: Vec<Stream> = (0..3).map(|i| Stream::new(&ssd, i, seed, trust)).collect();
    let mut next = 100;
    run_streams(&mut streams, &memory.map, 300, |finished| {
        if disturbed && finished >= next && ssd.state() == SsdState::Ready {
            next += 150;
            match next % 4 {
                0 => ssd.reset(),
                // Somebody resets it behind our back.
                _ => assert!(emulated.controller().reset(Duration::from_secs(5))),
            }
        }
    });
    let counters = ssd.counters();
    assert_eq!(counters.bad_completions, 0);
    assert_eq!(counters.failed, 0);
    assert_eq!(counters.resets > 0, disturbed);
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 6,
        max_shrink_iters: 0,
        ..ProptestConfig::default()
    })]

    #[test]
    fn our_driver_and_our_controller_agree_with_a_model_disk(seed: u64) {
        with_our_controller(seed, IdlePolicy::Adaptive, false);
    }

    #[test]
    fn our_driver_and_our_controller_agree_over_resets(seed: u64) {
        with_our_controller(seed, IdlePolicy::Interrupt, true);
    }

    #[test]
    fn an_ill_device_costs_time_but_no_data(seed: u64) {
        let model = Model::new(ModelOptions { seed, ..ModelOptions::default() });
        // Its admin queue is well: only a busy machine makes it late.
        let (most, admin_timeout) = (Duration::from_secs(10), Duration::from_secs(5));
        let ready = SsdOptions { least_ready_timeout: most, most_ready_timeout: most, ..hasty() };
        let ssd = start(&model, SsdOptions { admin_timeout, ..ready });
        let memory = Memory::new(ssd.space(), Stream::bytes(3));
        let mut streams: Vec<Stream> =
            (0..3).map(|i| Stream::new(&ssd, i, seed, Trust::Ill)).collect();
        model.misbehave(Mischief::of(&Act::fair(), 20));
        run_streams(&mut streams, &memory.map, 200, |_| ());
        model.misbehave(Mischief::default());
        let counters = ssd.counters();
        prop_assert!(counters.resets > 0, "{:?}", counters);
        prop_assert!(counters.resubmitted > 0, "{:?}", counters);
        // The last answer may have been a bad one, with a reset to come.
        becomes("ready again", || ssd.state() == SsdState::Ready);
        prop_assert_eq!(model.fake_space().refused(), 0);
    }

    #[test]
    fn pollers_are_threads(seed: u64) {
        let model = Model::new(ModelOptions { seed, ..ModelOptions::default() });
        let ssd = start(&model, hasty());
        let memory = Memory::new(ssd.space(), Stream::bytes(3));
        let streams: Vec<Stream> =
            (0..3).map(|i| Stream::new(&ssd, i, seed, Trust::Ill)).collect();
        model.misbehave(Mischief::of(&Act::fair(), 5));
        let finished = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for stream in streams {
                let (map, finished) = (&memory.map, &finished);
                scope.spawn(move || {
                    let mut streams = [stream];
                    run_streams(&mut streams, map, 300, |_| ());
                    // A poller looks at a lane that has nothing to do, too.
                    finished.fetch_add(1, Ordering::SeqCst);
                    while finished.load(Ordering::SeqCst) < 3 {
                        streams[0].poll(map);
                        std::thread::sleep(Duration::from_millis(1));
                    }
                });
            }
            for round in 0.. {
                if finished.load(Ordering::SeqCst) == 3 {
                    break;
                }
                std::thread::sleep(Duration::from_millis(30));
                if round % 3 == 0 {
                    ssd.reset();
                }
                assert!(ssd.smart().is_ok() || ssd.state() != SsdState::Gone);
                // An SSD in this mood, or a busy machine, may let a lane's admin command time out.
                let lane = ssd.lane(5);
                let late = matches!(lane, Err(LaneError::Driver(DriverError::Timeout { .. })));
                assert!(late || lane.is_ok(), "{:?}", lane.err());
            }
        });
        model.misbehave(Mischief::default());
    }

    #[test]
    fn a_hostile_device_loses_no_command(seed: u64, admin: bool, garbage: bool) {
        let model = Model::new(ModelOptions {
            seed,
            hard_reset: seed.is_multiple_of(2),
            ..ModelOptions::default()
        });
        let options = SsdOptions { resets_per_minute: 10, ..hasty() };
        let ssd = start(&model, options);
        let memory = Memory::new(ssd.space(), Stream::bytes(3));
        let mut streams: Vec<Stream> =
            (0..3).map(|i| Stream::new(&ssd, i, seed, Trust::Hostile)).collect();
        model.misbehave(Mischief { admin, garbage, ..Mischief::of(&Act::ALL, 30) });
        // Each command is answered, once, by the device or for it.
        run_streams(&mut streams, &memory.map, 200, |_| ());
        drop(streams);
        drop(ssd);
    }
}

#[test]
fn lies_at_the_start_are_errors_or_harmless() {
    let mut up = 0;
    for seed in 1..120u64 {
        let mut n = Numbers(seed);
        (0..8).for_each(|_| n.0 = n.next());
        let cap = match seed % 3 {
            0 => n.next().into(),
            1 => Cap::new()
                .with_mqes_z(n.next() as u16 >> n.below(16))
                .with_dstrd(n.next() as u8 & 15)
                .with_to(n.next() as u8)
                .with_css(css::NVM)
                .into_bits()
                .into(),
            _ => ModelOptions::default().cap,
        };
        let admin = Mischief {
            admin: true,
            garbage: seed.is_multiple_of(2),
            ..Mischief::of(&Act::ALL, if seed % 4 < 2 { 200 } else { 0 })
        };
        let model = Model::new(ModelOptions {
            cap,
            seed,
            queue_pairs: n.next() as u16 >> n.below(16),
            vectors: n.below(4) as u16,
            mischief: admin,
            ..ModelOptions::default()
        });
        let options = SsdOptions {
            admin_timeout: Duration::from_millis(50),
            least_ready_timeout: Duration::from_millis(5),
            most_ready_timeout: Duration::from_millis(20),
            resets_per_minute: 3,
            ..hasty()
        };
        let started = Ssd::start("liar".into(), model.device(), model.space(), options);
        let Ok(ssd) = started else { continue };
        up += 1;
        let _ = (
            ssd.namespaces(),
            ssd.namespace(1),
            ssd.smart(),
            ssd.error_log(),
        );
        if let Ok(mut lane) = ssd.lane(n.next() as u32) {
            let depth = lane.room();
            for user in 0..u64::from(depth.min(100)) {
                lane.submit(command(NvmOpcode::FLUSH, 0, 1), user).unwrap();
            }
            lane.ring();
            let wanted = depth.min(100) as usize;
            let done = collect(&mut lane, wanted, Duration::from_secs(20));
            assert_eq!(done.len(), wanted, "seed {seed}: {:?}", ssd.counters());
        }
    }
    assert!(up > 5, "some of them come up: {up}");
}
