//! The log: lines on stderr, for people or as JSON.

use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};

/// Start to log. A second call in a process changes nothing.
pub fn start(log: &Log) {
    let mut filter = EnvFilter::try_new(&log.level).unwrap_or_else(|_| EnvFilter::new("info"));
    // What it says that matters it returns; and it takes the way in which we close a device for an error.
    if let Ok(off) = "vfio_ioctls=off".parse() {
        filter = filter.add_directive(off);
    }
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    // It fails only if there is a log already.
    let _ = match log.format {
        LogFormat::Text => lines.with_target(false).try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
}
