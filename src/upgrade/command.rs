//! `vhost-user-nvme upgrade`: ask a daemon to hand over to the program that is installed now, and say what came of it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use super::pid_file::{self, Outcome};

/// How long an upgrade can take: all limits of its steps together.
const LIMIT: Duration = Duration::from_secs(120);

/// How long the outcome may take to appear when the daemon has gone.
const GRACE: Duration = Duration::from_secs(2);

/// Which daemon.
pub enum Daemon {
    /// The one with this state directory.
    Of(PathBuf),
    /// The one with this process id.
    Process(u32),
}

/// Ask the daemon, and wait. What it has done.
///
/// # Errors
///
/// Why it has not.
pub fn run(daemon: &Daemon) -> Result<String, String> {
    let dir = match daemon {
        Daemon::Of(dir) => dir.clone(),
        Daemon::Process(pid) => directory_of(*pid)?,
    };
    let pid = pid_file::read_pid(&dir).map_err(|e| {
        let file = dir.join(pid_file::PID);
        format!(
            "no daemon: {}: {e}; give its state directory with --state-dir, or --pid",
            file.display()
        )
    })?;
    if let Daemon::Process(wanted) = daemon
        && *wanted != pid
    {
        return Err(format!("process {wanted} has handed over to process {pid}"));
    }
    let before = pid_file::read_outcome(&dir).map(|o| o.serial);
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let process = process.ok_or(format!("{pid} is no process id"))?;
    kill_process(process, Signal::USR2)
        .map_err(|e| format!("process {pid} cannot be told: {e}"))?;
    let new = |outcome: &Outcome| Some(outcome.serial) != before;
    let start = Instant::now();
    let mut gone: Option<Instant> = None;
    loop {
        if let Some(outcome) = pid_file::read_outcome(&dir).filter(new) {
            return match outcome.ok {
                true => Ok(outcome.message),
                false => Err(outcome.message),
            };
        }
        if gone.is_none() && test_kill_process(process).is_err() {
            gone = Some(Instant::now());
        }
        if gone.is_some_and(|since| since.elapsed() > GRACE) {
            return Err(format!(
                "process {pid} has ended without saying what came of it; its log may"
            ));
        }
        if start.elapsed() > LIMIT {
            return Err(format!(
                "process {pid} has not said within {LIMIT:?} what came of it; its log may"
            ));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The state directory of a daemon: where the file of its process id is, which it has open.
fn directory_of(pid: u32) -> Result<PathBuf, String> {
    directories_of(pid)?.into_iter().next().ok_or(format!(
        "process {pid} is no daemon that can be upgraded: it has no state directory, or another daemon had it first"
    ))
}

fn directories_of(pid: u32) -> Result<Vec<PathBuf>, String> {
    let fds = format!("/proc/{pid}/fd");
    let entries = std::fs::read_dir(&fds).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => format!("there is no process {pid}"),
        _ => format!("process {pid} is not ours to ask: {fds}: {e}"),
    })?;
    let targets = entries.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    let files = targets.filter(|target| target.file_name() == Some(pid_file::PID.as_ref()));
    Ok(files
        .filter_map(|file| file.parent().map(Path::to_owned))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upgrade::pid_file::PidFile;

    #[test]
    fn daemons_that_are_not_there_are_said_to_be() {
        let dir = tempfile::tempdir().unwrap();
        let e = run(&Daemon::Of(dir.path().to_owned())).unwrap_err();
        assert!(e.contains("no daemon: ") && e.contains("daemon.pid"), "{e}");
        let e = run(&Daemon::Process(u32::MAX)).unwrap_err();
        assert!(e.contains("there is no process"), "{e}");
    }

    #[test]
    fn a_daemon_s_state_directory_is_found_by_its_process() {
        let dir = tempfile::tempdir().unwrap();
        let _file = PidFile::claim(dir.path()).unwrap().unwrap();
        // Other tests of this process may have one as well.
        let found = directories_of(std::process::id()).unwrap();
        assert!(found.contains(&dir.path().canonicalize().unwrap()));
    }
}
