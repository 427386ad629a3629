//! Commands of a hostile guest: checked, and their data resolved in a small memory.
#![no_main]

use fuzz::commands;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: fuzz::seeds(commands::seeds()), |data: &[u8]| commands::run(data));
