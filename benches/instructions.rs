//! A number of commands through whole passes, and nothing else, for counting their instructions: `scripts/bench micro --callgrind`.

#[path = "micro/rig.rs"]
mod rig;

use rig::{Kind, Rig};

/// Commands of a pass.
const BATCH: u32 = 32;

const KINDS: [(&str, Kind, u32, bool); 7] = [
    ("null-4K", Kind::Null, 4096, true),
    ("null-4K-without-journal", Kind::Null, 4096, false),
    ("null-512", Kind::Null, 512, true),
    ("memory-512", Kind::Memory, 512, true),
    ("forward-4K", Kind::Forward, 4096, true),
    ("forward-4K-without-journal", Kind::Forward, 4096, false),
    ("forward-shared-4K", Kind::ForwardShared, 4096, true),
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (what, count) = match arguments.as_slice() {
        [list] if list == "list" => {
            for (name, ..) in KINDS {
                println!("{name}");
            }
            return;
        }
        // What cargo passes when it runs all benchmarks.
        [what, count, ..] => (what, count.parse::<u32>()),
        _ => return,
    };
    let kind = KINDS.iter().find(|(name, ..)| name == what);
    let (Some(&(_, kind, bytes, journal)), Ok(count)) = (kind, count) else {
        eprintln!("usage: instructions list | NAME COMMANDS");
        std::process::exit(2);
    };
    let mut rig = Rig::new(kind, bytes, 0);
    if !journal {
        rig = rig.without_journal();
    }
    for _ in 0..count / BATCH {
        rig.commands(BATCH);
    }
    rig.check();
}
