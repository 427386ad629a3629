//! How often an SSD is rung by a poller that forwards, counted by the SSD.

use std::sync::Arc;

use nvme_spec::Sqe;
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::regs::{Cap, css};
use proptest::prelude::*;

use super::tests_journal::Bench;
use crate::backend::nvme::{Shown, Window};
use crate::backend::{Backend, NvmeOptions};
use crate::driver::{Ssd, SsdOptions};
use crate::testing::{Model, ModelOptions};

/// Bytes a guest has for data.
const DATA: usize = 1 << 20;

/// Guests of an SSD, and the poller of all their queues.
struct Rig {
    model: Model,
    bench: Bench,
    queues: usize,
    /// Tails and heads the SSD was told before the last pass.
    before: (u64, u64),
    _shown: Shown,
}

impl Rig {
    fn new(options: ModelOptions, queues: usize) -> Self {
        let model = Model::new(options);
        let options = SsdOptions::default();
        let ssd = Ssd::start("counting".into(), model.device(), model.space(), options).unwrap();
        let window = Window::sole(ssd.space(), "counting").unwrap();
        let backend = Backend::nvme(&NvmeOptions {
            ssd,
            window: Arc::clone(&window),
            nsid: 1,
            offset: 0,
            size: None,
            read_only: false,
            pass: Default::default(),
        });
        let mut bench = Bench::new(backend.unwrap(), queues, 64, DATA, true).unwrap();
        let shown = window.show(&bench.data().map().regions()[0]).unwrap();
        // The lane has its queue pair when it has done something.
        let prp1 = bench.data().addr();
        let read = ReadWrite::new(1, 0, 0).to_sqe(NvmOpcode::READ, prp1, 0);
        bench.submit(0, [read]);
        while bench.complete(0).0 == 0 {
            bench.pass();
        }
        while bench.pass() {}
        let before = model.doorbell_writes();
        Self {
            model,
            bench,
            queues,
            before,
            _shown: shown,
        }
    }

    fn read(&self, blocks: u32) -> Sqe {
        let prp1 = self.bench.data().addr();
        ReadWrite::new(1, 0, (blocks - 1) as u16).to_sqe(NvmOpcode::READ, prp1, prp1 + 4096)
    }

    /// One pass: how often a tail and a head was written meanwhile, and how many commands of the guest it completed.
    fn pass(&mut self) -> (u64, u64, u32) {
        self.bench.pass();
        let (tails, heads) = self.model.doorbell_writes();
        let rung = (tails - self.before.0, heads - self.before.1);
        self.before = (tails, heads);
        let mut done = 0;
        for queue in 0..self.queues {
            let (n, good) = self.bench.complete(queue);
            assert!(good);
            done += n;
        }
        (rung.0, rung.1, done)
    }
}

fn instant() -> ModelOptions {
    ModelOptions {
        instant: true,
        ..ModelOptions::default()
    }
}

#[test]
fn a_batch_costs_one_tail_and_one_head() {
    let mut rig = Rig::new(instant(), 1);
    let read = rig.read(8);
    for _ in 0..100 {
        rig.bench.submit(0, (0..32).map(|_| read));
        assert_eq!(rig.pass(), (1, 0, 0), "32 commands are sent");
        assert_eq!(rig.pass(), (0, 1, 32), "and 32 completions taken");
        assert_eq!(rig.pass(), (0, 0, 0), "nothing to do");
    }
}

#[test]
fn parts_that_had_to_wait_go_with_what_is_new() {
    // Sixteen commands of the SSD for each of the guest, and seven at a time.
    let mut rig = Rig::new(
        ModelOptions {
            mdts: 1,
            cap: Cap::new().with_mqes_z(7).with_to(2).with_css(css::NVM),
            ..ModelOptions::default()
        },
        2,
    );
    let list: Vec<u8> = (0..31u64)
        .flat_map(|i| (rig.bench.data().addr() + 8192 + i * 4096).to_le_bytes())
        .collect();
    rig.bench.data().write(4096, &list);
    let (large, small) = (rig.read(256), rig.read(8));
    let (mut done, mut sent, mut passes) = (0, 0, 0);
    while done < 60 {
        if passes < 15 {
            // There is always something new as well.
            rig.bench.submit(0, [large, large]);
            rig.bench.submit(1, [small, small]);
        }
        let (tails, heads, n) = rig.pass();
        // This one completes at once what it is told of, and has room again then.
        assert!(tails <= 1 && heads == sent, "{tails} {heads}");
        (sent, done, passes) = (tails, done + n, passes + 1);
        assert!(passes < 1000);
    }
    assert!(passes > 30 * 16 / 7, "much had to wait: {passes}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]

    #[test]
    fn doorbells_are_passes_with_work(
        work in prop::collection::vec(prop::collection::vec(0usize..12, 3), 1..60),
    ) {
        let mut rig = Rig::new(instant(), 3);
        let read = rig.read(8);
        let (mut total, mut done, mut sent, mut out) = (0, 0, 0, 0);
        // At the end until all is done.
        for counts in work.into_iter().chain(std::iter::repeat_n(vec![0; 3], 60)) {
            // No more than a queue holds.
            for (queue, n) in counts.into_iter().enumerate() {
                if out + n < 60 {
                    rig.bench.submit(queue, (0..n).map(|_| read));
                    (total, out) = (total + n, out + n);
                }
            }
            let (tails, heads, n) = rig.pass();
            prop_assert!(tails <= 1);
            prop_assert_eq!(heads, u64::from(n > 0));
            prop_assert_eq!(heads, sent, "what was sent is done in the next pass");
            (sent, done, out) = (tails, done + n as usize, out - n as usize);
        }
        prop_assert_eq!(done, total);
    }
}
