//! The watchdog: the service manager hears from us while every poller and every controller's thread answers, and else does not.

use std::ffi::OsString;
use std::io;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use super::{Manager, Variable};
use crate::controller::Pulse;
use crate::poller::{Message, PollerHandle};

/// Within so many microseconds the manager wants to hear something.
const LIMIT: &str = "WATCHDOG_USEC";
/// From this process; from any if it is not set.
pub const PID: &str = "WATCHDOG_PID";

/// Asked so often within the limit.
const ROUNDS: u32 = 3;

/// Who has to answer.
pub struct Watched {
    /// The pollers.
    pub pollers: Vec<PollerHandle>,
    /// Of each controller its name and its thread.
    pub controllers: Vec<(String, Pulse)>,
}

/// The thread that asks; it ends with this.
pub struct Watchdog {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Watchdog {
    /// Begin to ask, if the service manager has a watchdog.
    ///
    /// # Errors
    ///
    /// No thread is left.
    pub fn start(manager: &Manager, watched: Watched) -> io::Result<Option<Self>> {
        match limit(&|name| std::env::var_os(name)).filter(|_| manager.is_there()) {
            Some(limit) => Self::every(manager.clone(), watched, limit / ROUNDS).map(Some),
            None => Ok(None),
        }
    }

    fn every(manager: Manager, watched: Watched, period: Duration) -> io::Result<Self> {
        let (stop, stopped) = crossbeam_channel::bounded(0);
        let thread = thread::Builder::new()
            .name("nvme-watchdog".into())
            .spawn(move || watch(&manager, &watched, period, &stopped))?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

/// The limit of the manager's watchdog, if it is ours.
fn limit(variable: Variable<'_>) -> Option<Duration> {
    let number = |text: OsString| text.to_str()?.parse::<u64>().ok();
    let limit = variable(LIMIT).and_then(number).filter(|us| *us > 0)?;
    let ours = variable(PID).is_none_or(|pid| number(pid) == Some(std::process::id().into()));
    ours.then(|| Duration::from_micros(limit))
}

fn watch(manager: &Manager, watched: &Watched, period: Duration, stopped: &Receiver<()>) {
    let mut silent = Vec::new();
    loop {
        let round = Instant::now();
        let before = std::mem::replace(&mut silent, watched.silent(round + period, stopped));
        if stopped.try_recv() == Err(crossbeam_channel::TryRecvError::Disconnected) {
            return;
        }
        match silent.as_slice() {
            [] => {
                manager.pulse();
                if !before.is_empty() {
                    tracing::warn!("{} answered again", before.join(", "));
                }
            }
            names if *names == before => {}
            names => tracing::error!(
                "no answer within {period:?} from {}: the service manager is not told that all is well",
                names.join(", ")
            ),
        }
        let left = period.saturating_sub(round.elapsed());
        if stopped.recv_timeout(left) == Err(RecvTimeoutError::Disconnected) {
            return;
        }
    }
}

impl Watched {
    /// Who does not answer in time. A thread that has ended in order counts as one that answers.
    fn silent(&self, deadline: Instant, stopped: &Receiver<()>) -> Vec<String> {
        let mut asked = Vec::new();
        for poller in &self.pollers {
            // Each drops the sender it finds.
            let (sender, answer) = crossbeam_channel::bounded(0);
            poller.send(Message::Ping(sender));
            asked.push((format!("poller {}", poller.index), answer));
        }
        for (name, pulse) in &self.controllers {
            asked.push((format!("the thread of controller '{name}'"), pulse.ask()));
        }
        let silent = asked.into_iter().filter(|(_, answer)| {
            let mut either = crossbeam_channel::Select::new();
            let answered = either.recv(answer);
            either.recv(stopped);
            match either.ready_deadline(deadline) {
                Ok(first) => first != answered && answer.try_recv().is_ok(),
                Err(_) => true,
            }
        });
        silent.map(|(name, _)| name).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::poller::{IdlePolicy, PollerConfig, PollerPool};
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn the_environment_says_whether_there_is_one() {
        let us = std::process::id().to_string();
        let of = |usec: &str, pid: Option<&str>| {
            limit(&|name| match name {
                LIMIT => Some(usec.into()),
                _ => pid.map(Into::into),
            })
        };
        let second = Some(Duration::from_secs(1));
        assert_eq!(of("1000000", None), second);
        assert_eq!(of("1000000", Some(&us)), second);
        assert_eq!(of("1000000", Some("1")), None);
        assert_eq!(of("0", None), None);
        assert_eq!(of("x", None), None);
        assert_eq!(limit(&|_| None), None);
    }

    #[test]
    fn it_is_silent_while_a_poller_is_stuck() {
        let config = PollerConfig {
            core: None,
            idle: IdlePolicy::Interrupt,
            poll_for: Duration::ZERO,
            slots: 4,
        };
        let pool = PollerPool::start(&[config.clone(), config]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let heard = UnixDatagram::bind(&path).unwrap();
        let manager = Manager::at(path.as_os_str()).unwrap();
        let watched = Watched {
            pollers: pool.handles().to_vec(),
            controllers: Vec::new(),
        };
        const PERIOD: Duration = Duration::from_millis(50);
        let watchdog = Watchdog::every(manager, watched, PERIOD).unwrap();
        let mut buffer = [0; 64];
        let mut pulse = |limit: Duration| {
            heard.set_read_timeout(Some(limit)).unwrap();
            let Ok(n) = heard.recv(&mut buffer) else {
                return false;
            };
            assert_eq!(&buffer[..n], b"WATCHDOG=1");
            true
        };
        const LONG: Duration = Duration::from_secs(20);
        assert!(pulse(LONG) && pulse(LONG) && pulse(LONG));
        // A message that is handled, but not before we say so.
        let (go, stuck) = crossbeam_channel::bounded::<()>(0);
        pool.handles()[1].send(Message::Stuck(stuck));
        // Those that were on their way.
        while pulse(PERIOD * 3) {}
        assert!(!pulse(PERIOD * 8), "a poller is stuck");
        drop(go);
        assert!(pulse(LONG) && pulse(LONG), "it answers again");
        // Pollers that have ended are not stuck.
        drop(pool);
        while pulse(Duration::from_millis(1)) {}
        assert!(pulse(LONG) && pulse(LONG) && pulse(LONG));
        drop(watchdog);
        while pulse(Duration::from_millis(1)) {}
        assert!(!pulse(PERIOD * 5), "its thread has ended");
    }
}
