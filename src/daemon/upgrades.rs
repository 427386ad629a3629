//! How a daemon hands over to a new process, and goes on if that does not work.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};

use super::{Daemon, EXIT_FAILURE, GRACE, keeps};
use crate::config::{Config, Socket};
use crate::controller::DRAIN_LIMIT;
use crate::transport::{Endpoint, Server, Transport};
use crate::upgrade::give::{self, Leaving, Successor};
use crate::upgrade::pid_file::PidFile;
use crate::upgrade::take::absolute;

/// What an upgrade needs to know.
pub(super) struct Upgrades {
    /// Where a newer program will be.
    program: PathBuf,
    /// Of each controller what is spoken on its socket, and where that is if it has a path.
    sockets: Vec<(Transport, Option<PathBuf>)>,
    pid_file: Option<PidFile>,
    /// Whether state outlives the process.
    keeps: bool,
}

impl Upgrades {
    /// For this configuration, with the process id's file of the process before, if there was one.
    pub(super) fn new(config: &Config, pid_file: Option<OwnedFd>) -> Self {
        let dir = keeps::path(&config.state_dir).filter(|dir| dir.is_dir());
        let dir = dir.as_deref();
        let socket = |socket: &Socket| match socket {
            Socket::Path { path, .. } => Some(absolute(path)),
            Socket::Fd(_) => None,
        };
        let controllers = config.controllers.iter();
        Self {
            program: give::program(),
            sockets: controllers
                .map(|c| (c.transport, socket(&c.socket)))
                .collect(),
            pid_file: dir.and_then(|dir| claim(dir, pid_file)),
            keeps: dir.is_some(),
        }
    }

    /// The sockets, if all can be handed over.
    fn paths(&self) -> Result<Vec<PathBuf>, String> {
        if !self.keeps {
            return Err(
                "without a state directory (--state-dir) there is nothing to go on with".into(),
            );
        }
        if std::process::id() == 1 {
            return Err(
                "this is the first process of its container, which ends with it; restart the container instead".into(),
            );
        }
        let paths = self.sockets.iter().map(|(_, path)| path.clone());
        paths.collect::<Option<_>>().ok_or(
            "a controller was given its socket by file descriptor (--fd), and nothing is kept of such a one".into(),
        )
    }

    fn report(&self, ok: bool, message: &str) {
        if let Some(file) = &self.pid_file {
            file.report(ok, message);
        }
    }
}

/// The file that tells others our process id.
fn claim(dir: &Path, before: Option<OwnedFd>) -> Option<PidFile> {
    let claimed = match before {
        Some(file) => PidFile::taken(file, dir).map(Some),
        None => PidFile::claim(dir),
    };
    match claimed {
        Ok(Some(file)) => Some(file),
        Ok(None) => {
            tracing::info!(
                "another daemon has {} as well: the command 'upgrade' reaches that one, SIGUSR2 this one",
                dir.display()
            );
            None
        }
        Err(error) => {
            tracing::warn!(
                "the command 'upgrade' will not find this daemon: no file for its process id in {}: {error}",
                dir.display()
            );
            None
        }
    }
}

impl Daemon {
    /// Hand over to the program that is installed now: the exit status of this process. If that cannot be, the daemon, which serves.
    pub(super) fn upgrade(self) -> Result<ExitCode, Box<Self>> {
        self.manager.reloading("Handing over to a new process");
        tracing::info!("upgrade: starting {}", self.upgrades.program.display());
        let prepared = self.upgrades.paths().and_then(|paths| {
            let wanted = || !self.events.signalled();
            let successor = give::prepare(&self.upgrades.program, &paths, &wanted)?;
            Ok((successor, paths))
        });
        match prepared {
            Ok((successor, paths)) => self.hand_over(successor, &paths),
            Err(why) => Err(self.refuse(&why)),
        }
    }

    /// No upgrade; this process goes on.
    fn refuse(mut self, why: &str) -> Box<Self> {
        self.take_back();
        tracing::error!("upgrade refused, this process goes on: {why}");
        self.upgrades
            .report(false, &format!("{why}; the old process goes on"));
        self.manager.ready(&self.status());
        self.events.forget_upgrade();
        Box::new(self)
    }

    fn hand_over(mut self, successor: Successor, paths: &[PathBuf]) -> Result<ExitCode, Box<Self>> {
        let begin = Instant::now();
        for server in &self.servers {
            server.hand_over();
        }
        // Memory that a client takes away, and what is out.
        if !self.servers_finish(begin + 3 * DRAIN_LIMIT + GRACE) {
            drop(successor);
            return Err(self.refuse("a front-end's connection did not end"));
        }
        self.watchdog = None;
        let servers = std::mem::take(&mut self.servers);
        let leaving: Vec<Leaving> = servers.into_iter().filter_map(Server::into_left).collect();
        let Self {
            runs,
            manager,
            mut upgrades,
            events,
            ..
        } = self;
        if !runs.end(Instant::now() + DRAIN_LIMIT, |_| {}) {
            tracing::warn!("upgrade: I/O is still out; the new process waits for it");
        }
        let version = successor.version().to_owned();
        let pass = |successor: Successor, upgrades: &Upgrades| {
            let file = upgrades.pid_file.as_ref().map(PidFile::file);
            successor.hand_over(&leaving, file, |pid| manager.main_pid(pid))
        };
        let first = pass(successor, &upgrades);
        let outcome = match first {
            Ok(successor) => {
                let message = format!(
                    "process {} has handed over to process {}, version {version}, in {} ms",
                    std::process::id(),
                    successor.pid(),
                    begin.elapsed().as_millis()
                );
                tracing::info!("upgrade: {message}");
                upgrades.report(true, &message);
                Ok(successor)
            }
            Err(why) => {
                tracing::error!(
                    "upgrade: the new program has failed, the old one is started again: {why}"
                );
                let again = give::again(&upgrades.program, paths);
                match again.and_then(|successor| pass(successor, &upgrades)) {
                    Ok(successor) => {
                        let pid = successor.pid();
                        let message = format!("{why}; the old program goes on as process {pid}");
                        upgrades.report(false, &message);
                        Ok(successor)
                    }
                    Err(other) => Err(format!("{why}; and the old program: {other}")),
                }
            }
        };
        match outcome {
            Ok(successor) => {
                if let Some(file) = &mut upgrades.pid_file {
                    file.leave();
                }
                let pid = i32::try_from(successor.pid()).ok().and_then(Pid::from_raw);
                if events.signalled()
                    && let Some(pid) = pid
                {
                    // Whoever wanted us to end means the service.
                    let _ = kill_process(pid, Signal::TERM);
                }
                Ok(ExitCode::SUCCESS)
            }
            Err(why) => {
                let message = format!("nobody serves any more: {why}");
                tracing::error!("upgrade: {message}; the state is kept for the next start");
                upgrades.report(false, &message);
                if let Some(file) = &mut upgrades.pid_file {
                    // So that the outcome can be read.
                    file.leave();
                }
                Ok(ExitCode::from(EXIT_FAILURE))
            }
        }
    }

    /// Go on with what servers left that should have been handed over.
    pub(super) fn take_back(&mut self) {
        for (place, (transport, path)) in self.upgrades.sockets.iter().enumerate() {
            let Some(server) = self.servers.get_mut(place) else {
                continue;
            };
            if !server.is_finished() || path.is_none() {
                continue;
            }
            let (Some(controller), Ok(wake)) =
                (self.runs.controllers.get(place), self.events.waker())
            else {
                continue;
            };
            let Some((file, left)) = server.take_left() else {
                continue;
            };
            let endpoint = Endpoint::Taken(left.listener, left.connection);
            let controller = std::sync::Arc::clone(controller);
            match Server::start(*transport, endpoint, Some(file), controller, move || {
                wake.wake()
            }) {
                Ok(mut new) => {
                    new.own_file();
                    *server = new;
                }
                Err(error) => tracing::error!("a controller cannot be reached any more: {error}"),
            }
        }
    }
}
