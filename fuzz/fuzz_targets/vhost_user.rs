//! Messages of a hostile vhost-user front-end, with files, and a guest behind it whose memory the input writes.
#![no_main]

use std::time::Duration;

use fuzz::{sessions, stream};
use libfuzzer_sys::fuzz_target;
use vhost_user_nvme::transport::Transport;

const PATIENCE: Duration = Duration::from_micros(200);

fuzz_target!(
    init: fuzz::seeds(sessions::seeds(Transport::VhostUser)),
    |data: &[u8]| drop(stream::run(Transport::VhostUser, data, PATIENCE))
);
