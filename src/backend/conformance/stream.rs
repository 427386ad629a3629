//! Random streams of operations against a model disk.

use nvme_spec::Status;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use super::client::{Client, Layout, pattern};
use crate::backend::{Backend, Operation};

/// Tags in use: so many operations are out at once, in places that do not overlap.
const TAGS: u32 = 8;

/// One operation in the part of the disk that belongs to its tag.
#[derive(Clone, Debug)]
struct Step {
    tag: u32,
    operation: Operation,
    /// Place and size as a share of the tag's part, in 1/65536.
    at: u16,
    len: u16,
    seed: u64,
    layout: Layout,
    /// For Compare: the byte that differs, as a share of the length.
    differs: Option<u16>,
}

fn layout() -> impl Strategy<Value = Layout> {
    prop_oneof![
        Just(Layout::Whole(0)),
        (0usize..4096).prop_map(Layout::Whole),
        Just(Layout::Pages(0)),
        (0usize..1024).prop_map(|n| Layout::Pages(n * 4)),
        (0usize..8).prop_map(|n| Layout::Pages(n * 512)),
        (64usize..6000).prop_map(Layout::Crumbs),
    ]
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        4 => any::<bool>().prop_map(|fua| Operation::Write { fua }),
        4 => Just(Operation::Read),
        2 => Just(Operation::Compare),
        1 => Just(Operation::Verify),
        1 => Just(Operation::Flush),
        1 => Just(Operation::Deallocate),
        2 => any::<(bool, bool)>()
            .prop_map(|(deallocate, fua)| Operation::WriteZeroes { deallocate, fua }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    // Short ones are more interesting than long ones.
    let len = prop_oneof![3 => 0u16..2000, 1 => any::<u16>()];
    let differs = proptest::option::of(any::<u16>());
    let place = (0..TAGS, any::<u16>(), len);
    (place, operation(), any::<u64>(), layout(), differs).prop_map(
        |((tag, at, len), operation, seed, layout, differs)| Step {
            tag,
            operation,
            at,
            len,
            seed,
            layout,
            differs,
        },
    )
}

/// What a disk would hold.
struct Model {
    bytes: Vec<u8>,
    /// Blocks whose content nobody promises.
    unknown: Vec<bool>,
    block: usize,
    deallocate_reads_zero: bool,
}

/// What is expected of a step that is out.
enum Expect {
    Status(Status),
    /// Success, and these bytes from that block on, where they are known.
    Data(usize, Vec<u8>, Vec<bool>),
    /// Compare with blocks nobody knows.
    Anything,
}

impl Model {
    /// Begin a step: the model's own copy of it, the request, and what should come of it.
    fn apply(&mut self, step: &Step) -> (u64, u32, Option<Vec<u8>>, Expect) {
        let part = self.unknown.len() / TAGS as usize;
        let share = |n: u16, of: usize| usize::from(n) * of / 65536;
        let at = share(step.at, part);
        let most = (part - at).min((1 << 20) / self.block);
        let blocks = 1 + share(step.len, most - 1);
        let first = step.tag as usize * part + at;
        let range = first..first + blocks;
        let bytes = first * self.block..(first + blocks) * self.block;
        let ok = Expect::Status(Status::SUCCESS);
        let mut data = None;
        let expect = match step.operation {
            Operation::Write { .. } => {
                let new = pattern(step.seed, bytes.len());
                self.bytes[bytes].copy_from_slice(&new);
                self.unknown[range].fill(false);
                data = Some(new);
                ok
            }
            Operation::WriteZeroes { .. } => {
                self.bytes[bytes].fill(0);
                self.unknown[range].fill(false);
                ok
            }
            Operation::Deallocate => {
                self.bytes[bytes].fill(0);
                self.unknown[range].fill(!self.deallocate_reads_zero);
                ok
            }
            Operation::Read => Expect::Data(
                first,
                self.bytes[bytes].to_vec(),
                self.unknown[range].to_vec(),
            ),
            Operation::Compare => {
                let mut same = self.bytes[bytes].to_vec();
                let mut status = Status::SUCCESS;
                if let Some(at) = step.differs {
                    let at = share(at, same.len());
                    same[at] ^= 1 + (step.seed as u8 & 0x7e);
                    status = Status::COMPARE_FAILURE;
                }
                data = Some(same);
                if self.unknown[range].contains(&true) {
                    Expect::Anything
                } else {
                    Expect::Status(status)
                }
            }
            Operation::Verify => ok,
            Operation::Flush => return (0, 0, None, ok),
        };
        (first as u64, blocks as u32, data, expect)
    }

    fn check(&self, step: &Step, status: Status, expect: &Expect, read: impl Fn() -> Vec<u8>) {
        match expect {
            Expect::Status(expected) => assert_eq!(status, *expected, "{step:?}"),
            Expect::Anything => {
                assert!(matches!(status, Status::SUCCESS | Status::COMPARE_FAILURE));
            }
            Expect::Data(first, bytes, unknown) => {
                assert_eq!(status, Status::SUCCESS, "{step:?}");
                let read = read();
                assert_eq!(read.len(), bytes.len());
                let blocks = read.chunks(self.block).zip(bytes.chunks(self.block));
                for (i, ((got, want), unknown)) in blocks.zip(unknown).enumerate() {
                    assert!(*unknown || got == want, "block {}: {step:?}", first + i);
                }
            }
        }
    }
}

fn play(backend: &Backend, steps: &[Step]) {
    let g = backend.geometry();
    // What lies beyond the first 8 MiB is for other cases.
    let blocks = g.blocks.min((8 << 20) >> g.block_shift) as usize;
    let mut client = Client::new(backend, TAGS);
    client.wipe();
    let mut model = Model {
        bytes: vec![0; blocks << g.block_shift],
        unknown: vec![false; blocks],
        block: g.block_size() as usize,
        deallocate_reads_zero: g.deallocate_reads_zero,
    };
    let mut out: Vec<Option<(Step, Expect)>> = (0..TAGS).map(|_| None).collect();
    for step in steps {
        // One step at a time in each part: the order of two would be nobody's promise.
        if let Some((before, expect)) = out[step.tag as usize].take() {
            let status = client.wait(before.tag);
            model.check(&before, status, &expect, || client.take(before.tag));
        }
        let (slba, n, data, expect) = model.apply(step);
        let data = data.as_deref();
        match client.start(step.tag, step.operation, slba, n, data, step.layout) {
            Some(status) => model.check(step, status, &expect, || client.take(step.tag)),
            None => out[step.tag as usize] = Some((step.clone(), expect)),
        }
    }
    for (step, expect) in out.into_iter().flatten() {
        let status = client.wait(step.tag);
        model.check(&step, status, &expect, || client.take(step.tag));
    }
}

/// Play `streams` streams; a failing one is made as short as it can be.
pub(super) fn run(backend: &Backend, streams: u32) {
    let config = Config {
        cases: streams,
        max_shrink_iters: 200,
        failure_persistence: None,
        ..Config::default()
    };
    // The same streams each time, so that a failure is there again at the next run.
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let steps = proptest::collection::vec(step(), 1..120);
    TestRunner::new_with_rng(config, rng)
        .run(&steps, |steps| {
            play(backend, &steps);
            Ok(())
        })
        .unwrap_or_else(|e| panic!("{}: {e}", backend.describe()));
}
