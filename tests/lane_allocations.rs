//! Nothing is allocated for a command on its way through a lane, however its data is named.

#[path = "common/counting.rs"]
mod counting;

use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use vhost_user_nvme::driver::{Ssd, SsdOptions};
use vhost_user_nvme::testing::Model;

#[test]
fn a_lane_allocates_nothing_for_a_command() {
    let model = Model::instant();
    let options = SsdOptions {
        interrupts: false,
        ..SsdOptions::default()
    };
    let ssd = Ssd::start("instant".into(), model.device(), model.space(), options).unwrap();
    let mut lane = ssd.lane(64).unwrap();
    let read = ReadWrite::new(1, 0, 255).to_sqe(NvmOpcode::READ, 0x10_0000, 0);
    let mut round = |n: u64| {
        let mut done = 0;
        for i in 0..n {
            let pages = (0..32u64).map(|p| 0x10_0000 + p * 4096);
            lane.submit(read, i).unwrap();
            lane.submit_pages(read, pages, 0, 128 << 10, i).unwrap();
            lane.submit_bytes(read, &[7; 4096], i).unwrap();
            lane.ring();
            lane.poll(64, |c| done += u64::from(c.status().is_success()));
        }
        assert_eq!(done, 3 * n);
    };
    round(100);
    let n = counting::allocations(|| round(10_000));
    assert_eq!(n, 0, "allocations in steady I/O");
}
