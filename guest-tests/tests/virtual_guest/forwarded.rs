//! Guests on an SSD that the daemon drives: a double of one, which reads and writes their memory by itself.

use std::sync::Arc;

use guest_tests::daemon::{Disk, Plan, TestDaemon, queue};
use guest_tests::io::Io;
use guest_tests::rng::Rng;
use nvme_spec::Status;
use vhost_user_nvme::backend::nvme::Window;
use vhost_user_nvme::backend::{Backend, NvmeOptions, Opcodes};
use vhost_user_nvme::driver::{Ssd, SsdOptions};
use vhost_user_nvme::testing::{Model, ModelOptions};

/// All of an SSD, for one guest.
pub fn disk(model: &Model, options: SsdOptions) -> Disk {
    let ssd = Ssd::start("model".into(), model.device(), model.space(), options);
    let ssd = ssd.expect("an SSD that comes up");
    let window = Window::sole(ssd.space(), "model").expect("a window");
    Disk::over(Backend::nvme(&NvmeOptions {
        ssd: Arc::clone(&ssd),
        window,
        nsid: 1,
        offset: 0,
        size: None,
        read_only: false,
        pass: Opcodes::NONE,
    }))
}

#[test]
fn an_ssd_has_the_data_of_its_guest() {
    let model = Model::new(ModelOptions::default());
    let daemon = TestDaemon::one(Plan::of(disk(&model, SsdOptions::default())));
    let mut guest = daemon.guest();
    let mut io = Io::new(&mut guest, queue(1, 16), 1);
    let mut bytes = vec![0; 64 << 10];
    Rng::new(3).fill(&mut bytes);
    assert_eq!(io.write(100, &bytes), Status::SUCCESS);
    assert!(io.read(100, 128).unwrap() == bytes);
    let at = 100 * 512;
    assert!(model.bytes(1)[at..at + bytes.len()] == bytes);
    assert_eq!(io.flush(), Status::SUCCESS);
    assert_eq!(model.fake_space().refused(), 0);
}

#[test]
fn an_ssd_is_shown_memory_that_comes_and_goes() {
    let model = Model::new(ModelOptions::default());
    crate::memory::plugged_and_unplugged(disk(&model, SsdOptions::default()));
}
