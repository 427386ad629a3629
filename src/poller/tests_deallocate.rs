//! Dataset Management on an SSD with limits, against what blocks should be left.

use std::sync::Arc;

use nvme_spec::nvm::{DatasetManagement, DsmRange, Flush};
use nvme_spec::opcode::NvmOpcode;
use proptest::prelude::*;
use zerocopy::IntoBytes as _;

use super::tests_journal::Bench;
use crate::backend::nvme::{Shown, Window};
use crate::backend::{Backend, NvmeOptions};
use crate::driver::{Ssd, SsdOptions};
use crate::testing::{Model, ModelOptions};

/// Blocks of the SSD, and of the guest's namespace in the middle of it.
const BLOCKS: u64 = 4096;
const FIRST: u64 = 1000;
const OURS: u64 = 2000;

fn guest(model: &Model) -> (Bench, Shown) {
    let options = SsdOptions::default();
    let ssd = Ssd::start("limited".into(), model.device(), model.space(), options).unwrap();
    // Shared: what the SSD reads are copies of ours in any case.
    let windows = Window::shared(ssd.space(), "limited", 2).unwrap();
    let backend = Backend::nvme(&NvmeOptions {
        ssd,
        window: Arc::clone(&windows[1]),
        nsid: 1,
        offset: FIRST * 512,
        size: Some(OURS * 512),
        read_only: false,
        pass: Default::default(),
    });
    let mut bench = Bench::new(backend.unwrap(), 1, 16, 64 << 10, true).unwrap();
    let shown = windows[1].show(&bench.data().map().regions()[0]).unwrap();
    // The lane has its queue pair when it has done something.
    bench.submit(0, [Flush { nsid: 1 }.to_sqe()]);
    while bench.complete(0).0 == 0 {
        bench.pass();
        std::thread::yield_now();
    }
    (bench, shown)
}

/// Have the guest deallocate these ranges by one command.
fn deallocate(bench: &mut Bench, ranges: &[DsmRange]) -> bool {
    bench.data().write(0, ranges.as_bytes());
    let command = DatasetManagement {
        nsid: 1,
        nr_z: (ranges.len() - 1) as u8,
        ad: true,
        ..DatasetManagement::default()
    };
    bench.submit(0, [command.to_sqe(bench.data().addr(), 0)]);
    for _ in 0..10_000 {
        bench.pass();
        if let (1, good) = bench.complete(0) {
            return good;
        }
    }
    panic!("it never ends");
}

fn range() -> impl Strategy<Value = DsmRange> {
    let sizes = prop_oneof![4 => 0u32..20, 1 => 0u32..600];
    (0..OURS - 600, sizes).prop_map(|(slba, nlb)| DsmRange {
        cattr: 0x1234,
        nlb,
        slba,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn all_of_the_ranges_go_and_nothing_else(
        ranges in prop::collection::vec(range(), 1..257),
        dmrl in prop_oneof![Just(0u8), 1u8..9, Just(255)],
        dmrsl in prop_oneof![Just(0u32), 7u32..300],
        dmsl in prop_oneof![Just(0u64), 5u64..2000],
        outside in prop::option::weighted(0.1, 0usize..256),
    ) {
        let model = Model::new(ModelOptions {
            blocks: BLOCKS,
            dmrl,
            dmrsl,
            dmsl,
            ..ModelOptions::default()
        });
        let mut ranges = ranges;
        let at = outside.map(|at| at % ranges.len());
        if let Some(range) = at.and_then(|at| ranges.get_mut(at)) {
            (range.slba, range.nlb) = (OURS - 5, 6);
        }
        let (mut bench, _shown) = guest(&model);
        model.fill(1, 0xAA);
        let mut expected = model.bytes(1);
        let good = deallocate(&mut bench, &ranges);
        prop_assert_eq!(good, at.is_none());
        for range in ranges.iter().filter(|_| good) {
            let first = (FIRST + range.slba) as usize * 512;
            expected[first..][..range.nlb as usize * 512].fill(0);
        }
        prop_assert!(model.bytes(1) == expected);
        prop_assert_eq!(model.fake_space().refused(), 0);
        let commands = model.commands(NvmOpcode::DATASET_MANAGEMENT);
        if dmrl == 0 && dmrsl == 0 && dmsl == 0 {
            let any = ranges.iter().any(|r| r.nlb > 0);
            prop_assert_eq!(commands, u32::from(good && any), "all in one");
        }
    }
}

#[test]
fn a_guest_that_trims_costs_one_command() {
    let model = Model::new(ModelOptions {
        blocks: BLOCKS,
        ..ModelOptions::default()
    });
    let (mut bench, _shown) = guest(&model);
    let ranges = std::array::from_fn::<_, 256, _>(|i| DsmRange {
        cattr: 0,
        nlb: 3,
        slba: i as u64 * 7,
    });
    for n in 1..20 {
        assert!(deallocate(&mut bench, &ranges));
        assert_eq!(model.commands(NvmOpcode::DATASET_MANAGEMENT), n);
    }
}
