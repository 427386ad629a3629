//! PRPs and SGLs over lists of anything.
#![no_main]

use fuzz::walkers;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: fuzz::seeds(walkers::seeds()), |data: &[u8]| walkers::run(data));
