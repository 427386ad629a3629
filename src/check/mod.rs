//! `vhost-user-nvme check`: whether this host can serve a configuration, line by line, each failed line with its mend.
//!
//! Nothing is made and nothing is changed. Stores and sockets are looked at as they are at the daemon's start.

mod files;
mod host;
mod ssd;

use std::fmt;
use std::io::Write as _;
use std::process::ExitCode;

use crate::config::{Config, Socket};
use crate::daemon::{keeps, stores};
use crate::driver::pci::{Host, PciAddress};
use crate::driver::vfio::VfioError;
use crate::transport::{Endpoint, SocketFile};

/// Exit status of a failure that has none of its own.
const FAILED: u8 = 1;

/// How a line ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Good,
    /// It works, but could be better, or cannot be told.
    Note,
    /// The daemon would not start, or a guest would not work. With the exit status for it.
    Bad(u8),
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    verdict: Verdict,
    subject: String,
    text: String,
    mend: Option<String>,
}

impl Line {
    fn good(subject: impl fmt::Display, text: impl fmt::Display) -> Self {
        Self::new(Verdict::Good, subject, text, None)
    }

    fn note(subject: impl fmt::Display, text: impl fmt::Display, mend: &str) -> Self {
        Self::new(Verdict::Note, subject, text, Some(mend.into()))
    }

    fn bad(status: u8, subject: impl fmt::Display, text: impl fmt::Display, mend: &str) -> Self {
        Self::new(Verdict::Bad(status), subject, text, Some(mend.into()))
    }

    fn refused(subject: impl fmt::Display, e: &VfioError) -> Self {
        Self::bad(e.exit_status(), subject, e, &e.hint())
    }

    fn new(
        verdict: Verdict,
        subject: impl fmt::Display,
        text: impl fmt::Display,
        mend: Option<String>,
    ) -> Self {
        Self {
            verdict,
            subject: subject.to_string(),
            text: text.to_string(),
            mend,
        }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.verdict {
            Verdict::Good => "ok",
            Verdict::Note => "note",
            Verdict::Bad(_) => "FAIL",
        };
        write!(f, "{verdict:<5} {:<16} {}", self.subject, self.text)?;
        match &self.mend {
            Some(mend) => write!(f, "\n{:<22} mend: {mend}", ""),
            None => Ok(()),
        }
    }
}

/// Look at everything and print it: the exit status of the first line that failed, 0 if none did. `ssds` are looked at besides those
/// of the configuration.
pub fn run(config: Option<&Config>, ssds: &[PciAddress]) -> ExitCode {
    let lines = look(&Host::default(), config, ssds);
    let mut out = std::io::stdout();
    for line in &lines {
        let _ = writeln!(out, "{line}");
    }
    let failed = |line: &&Line| matches!(line.verdict, Verdict::Bad(_));
    let count = lines.iter().filter(failed).count();
    let _ = match count {
        0 => writeln!(out, "this host can serve it"),
        n => writeln!(out, "{n} of {} failed", lines.len()),
    };
    status(&lines)
}

fn status(lines: &[Line]) -> ExitCode {
    let bad = lines.iter().find_map(|line| match line.verdict {
        Verdict::Bad(status) => Some(status),
        _ => None,
    });
    bad.map_or(ExitCode::SUCCESS, ExitCode::from)
}

fn look(host: &Host, config: Option<&Config>, more: &[PciAddress]) -> Vec<Line> {
    let mut lines = Vec::new();
    let configured = config.iter().flat_map(|c| &c.ssds).map(|ssd| ssd.address);
    let mut ssds: Vec<_> = configured.chain(more.iter().copied()).collect();
    ssds.sort();
    ssds.dedup();
    let cores: Vec<usize> = config
        .iter()
        .flat_map(|c| c.pollers.iter().filter_map(|p| p.core))
        .collect();
    for address in &ssds {
        ssd::look(host, *address, &cores, &mut lines);
    }
    let more = ssds.len() - config.map_or(0, |c| c.ssds.len());
    host::look(host, files::needed(config, more), ssds.len(), &mut lines);
    for controller in config.iter().flat_map(|c| &c.controllers) {
        let name = &controller.name;
        match &controller.socket {
            Socket::Path { path, .. } => lines.push(match SocketFile::check(path) {
                Ok(()) => Line::good(name, format_args!("socket {}", path.display())),
                Err(e) => plain_failure(name, &e.to_string()),
            }),
            Socket::Fd(fd) => lines.push(match Endpoint::check(*fd) {
                Ok(()) => Line::good(name, format_args!("file descriptor {fd}")),
                Err(e) => plain_failure(name, &e.to_string()),
            }),
        }
        if let Some(config) = config {
            lines.push(match keeps::describe(config, controller) {
                Ok(state) => Line::good(name, state),
                Err(e) => plain_failure(name, &e.to_string()),
            });
        }
        for namespace in &controller.namespaces {
            lines.push(match stores::check(namespace) {
                Ok(()) => Line::good(name, format_args!("namespace {}", namespace.nsid)),
                Err(e) => plain_failure(name, &format!("namespace {}: {e}", namespace.nsid)),
            });
        }
    }
    lines
}

/// Errors of sockets and stores have their mend behind a semicolon or a colon of their own: they are told as the daemon tells them.
fn plain_failure(name: &str, text: &str) -> Line {
    Line::new(Verdict::Bad(FAILED), name, text, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::pci::testing::FakeHost;

    #[test]
    fn lines_are_aligned_and_the_first_failure_counts() {
        let lines = [
            Line::good("a", "b"),
            Line::note("huge pages", "none", "get some"),
            Line::bad(24, "0000:01:00.0", "is bound to nvme", "unbind it"),
            Line::bad(30, "limits", "too small", "raise them"),
        ];
        let text: Vec<_> = lines.iter().map(ToString::to_string).collect();
        assert_eq!(
            text[..3],
            [
                "ok    a                b",
                "note  huge pages       none\n                       mend: get some",
                "FAIL  0000:01:00.0     is bound to nvme\n                       mend: unbind it",
            ]
        );
        assert_eq!(status(&lines), ExitCode::from(24));
        assert_eq!(status(&lines[..2]), ExitCode::SUCCESS);
    }

    #[test]
    fn an_ssd_is_looked_at_once() {
        let fake = FakeHost::new();
        let at: PciAddress = "0000:01:00.0".parse().unwrap();
        let lines = look(&fake.host(), None, &[at, at]);
        let bad: Vec<_> = lines
            .iter()
            .filter(|l| l.verdict == Verdict::Bad(20))
            .collect();
        assert_eq!(bad.len(), 1, "{lines:?}");
    }
}
