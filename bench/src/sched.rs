//! The scheduler: binding this thread to a core, and how long threads waited for theirs.

use std::fs;

use rustix::thread::{CpuSet, sched_setaffinity};

use crate::Failure;

/// Bind this thread to a core.
///
/// # Errors
///
/// There is no such core for us.
pub fn pin(core: usize) -> Result<(), Failure> {
    if core >= CpuSet::MAX_CPU {
        return Err(Failure(format!("there is no core {core}")));
    }
    let mut set = CpuSet::new();
    set.set(core);
    sched_setaffinity(None, &set).map_err(|e| Failure::of(&format!("core {core}"), &e))
}

/// Nanoseconds that this thread and all threads of a process have waited for a core while they could have run. A thread that polls
/// should not wait at all: what it waited was taken by somebody else. 0 where the kernel does not count it.
pub fn waited_ns(process: u32) -> u64 {
    let threads = fs::read_dir(format!("/proc/{process}/task"));
    let theirs = threads.into_iter().flatten().flatten();
    let files = theirs.map(|task| task.path().join("schedstat"));
    files
        .chain(["/proc/thread-self/schedstat".into()])
        .filter_map(|file| waited(&fs::read_to_string(file).ok()?))
        .sum()
}

/// Time on the core, time waited, slices.
fn waited(schedstat: &str) -> Option<u64> {
    schedstat.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_number_is_the_wait() {
        assert_eq!(waited("10 20 30\n"), Some(20));
        assert_eq!(waited(""), None);
    }
}
