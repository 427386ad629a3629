//! From a checked configuration to a running daemon, and to its orderly end.

mod logging;
mod stop;
mod stores;

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::{Config, ControllerSpec, LogFormat, Socket};
use crate::controller::{Controller, ControllerConfig, DRAIN_LIMIT};
use crate::memory::sigbus;
use crate::poller::PollerPool;
use crate::transport::vhost_user::{Endpoint, Server, SocketFile};

/// The daemon could not be started, or could not be ended in order.
const EXIT_FAILURE: u8 = 1;

/// How long the end may take beyond what I/O needs.
const GRACE: Duration = Duration::from_secs(2);

type BoxError = Box<dyn std::error::Error>;

/// Look at what the configuration needs of the host, without making anything.
///
/// # Errors
///
/// What is missing, and how to mend it.
pub fn check(config: &Config) -> Result<(), BoxError> {
    for controller in &config.controllers {
        match &controller.socket {
            Socket::Path { path, .. } => SocketFile::check(path)?,
            Socket::Fd(fd) => Endpoint::check(*fd)?,
        }
        for namespace in &controller.namespaces {
            stores::check(namespace).map_err(|e| {
                format!(
                    "controller '{}': namespace {}: {e}",
                    controller.name, namespace.nsid
                )
            })?;
        }
    }
    Ok(())
}

/// Run until a signal comes; the exit status of the process.
pub fn run(config: Config) -> ExitCode {
    logging::start(&config.log);
    stop::exit_on_panic();
    match start(&config) {
        Ok(daemon) => daemon.serve(),
        Err(e) => {
            let _ = writeln!(std::io::stderr(), "vhost-user-nvme: {e}");
            ExitCode::from(EXIT_FAILURE)
        }
    }
}

/// Everything that runs; fields are dropped in this order.
struct Daemon {
    servers: Vec<Server>,
    controllers: Vec<Arc<Controller>>,
    pollers: PollerPool,
    events: stop::Events,
}

fn start(config: &Config) -> Result<Daemon, BoxError> {
    sigbus::install()?;
    stop::raise_file_limit();
    let events = stop::Events::new()?;
    // All that can be refused comes before anything that others can see.
    let mut stores = Vec::new();
    for spec in &config.controllers {
        for namespace in &spec.namespaces {
            let store = stores::open(namespace).map_err(|e| {
                format!(
                    "controller '{}': namespace {}: {e}",
                    spec.name, namespace.nsid
                )
            })?;
            tracing::info!(
                controller = spec.name,
                nsid = namespace.nsid,
                "namespace: {}",
                store.describe()
            );
            stores.push(stores::namespace(namespace, store));
        }
    }
    let pollers = PollerPool::start(&config.pollers)
        .map_err(|e| format!("the pollers cannot be started: {e}"))?;
    let mut stores = stores.into_iter();
    let mut controllers = Vec::new();
    for spec in &config.controllers {
        let namespaces = stores.by_ref().take(spec.namespaces.len()).collect();
        controllers.push(Controller::new(controller(spec, namespaces), &pollers)?);
    }
    let mut endpoints = Vec::new();
    for spec in &config.controllers {
        endpoints.push(match &spec.socket {
            Socket::Path { path, mode, group } => {
                let (file, endpoint) = SocketFile::listen(path, *mode, *group)?;
                (Some(file), endpoint)
            }
            Socket::Fd(fd) => (None, Endpoint::inherited(*fd)?),
        });
    }
    let mut servers = Vec::new();
    for ((file, endpoint), controller) in endpoints.into_iter().zip(&controllers) {
        let wake = events.waker()?;
        let controller = Arc::clone(controller);
        servers.push(Server::start(endpoint, file, controller, move || {
            wake.wake()
        })?);
    }
    announce(config);
    Ok(Daemon {
        servers,
        controllers,
        pollers,
        events,
    })
}

fn controller(
    spec: &ControllerSpec,
    namespaces: Vec<crate::controller::NamespaceConfig>,
) -> ControllerConfig {
    ControllerConfig {
        name: spec.name.clone(),
        serial: spec.serial.clone(),
        model: spec.model.clone(),
        subnqn: spec.subnqn.clone(),
        namespaces,
        max_namespaces: spec.max_namespaces,
        queues: spec.queues,
        max_queue_entries: spec.queue_entries,
        max_transfer: spec.max_transfer,
        doorbell_buffer: spec.doorbell_buffer,
        doorbell_stride: spec.doorbell_stride,
        pci_ids: spec.pci_ids,
        placement: spec.placement.clone(),
    }
}

/// Say how QEMU attaches each controller.
fn announce(config: &Config) {
    let mut out = std::io::stdout();
    let json = config.log.format == LogFormat::Json;
    for spec in &config.controllers {
        let Socket::Path { path, .. } = &spec.socket else {
            continue;
        };
        // In a property's value, QEMU reads two commas as one.
        let socket = std::path::absolute(path)
            .unwrap_or_else(|_| path.clone())
            .display()
            .to_string()
            .replace(',', ",,");
        let device = format!("-device vhost-user-nvme,socket={socket}");
        const MEMORY: &str = "-machine q35,memory-backend=mem -object memory-backend-memfd,id=mem,size=2G,share=on -m 2G";
        if json {
            tracing::info!(
                controller = spec.name,
                qemu_memory = MEMORY,
                qemu_device = device,
                "listening"
            );
        } else {
            let _ = writeln!(
                out,
                "Controller '{}' (serial {}) waits for a virtual machine. Attach it with QEMU's arguments:\n  {MEMORY} \\\n  {}",
                spec.name,
                spec.serial,
                quoted(&device)
            );
        }
    }
    let _ = out.flush();
}

/// As a shell takes it: quoted if there is anything special in it.
fn quoted(argument: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || " -_=,./:+@%".contains(c);
    match argument.split_once("socket=") {
        Some((before, path)) if !path.chars().all(|c| plain(c) && c != ' ') => {
            let (option, value) = before.split_once(' ').unwrap_or((before, ""));
            format!("{option} '{value}socket={}'", path.replace('\'', "'\\''"))
        }
        _ => argument.to_owned(),
    }
}

impl Daemon {
    fn serve(self) -> ExitCode {
        loop {
            match self.events.wait() {
                stop::Event::Signal => {
                    tracing::info!("stopping: waiting for the I/O that is out");
                    return self.stop();
                }
                stop::Event::Other => {
                    if self.servers.iter().all(Server::is_finished) {
                        tracing::info!("the last front-end has gone and no other can come");
                        return self.stop();
                    }
                }
            }
        }
    }

    /// Accept no more, drain, and end; but not for longer than makes sense.
    fn stop(self) -> ExitCode {
        let deadline = Instant::now() + DRAIN_LIMIT + GRACE;
        for server in &self.servers {
            server.stop();
        }
        while !self.servers.iter().all(Server::is_finished) && Instant::now() < deadline {
            self.events.wait_until(deadline);
        }
        let Self {
            servers,
            controllers,
            pollers,
            ..
        } = self;
        if !servers.iter().all(Server::is_finished) {
            return abandon(servers, "a front-end's connection did not end");
        }
        drop(servers);
        // I/O that never ends must not keep us.
        let (sender, done) = crossbeam_channel::bounded::<()>(0);
        let ended = std::thread::Builder::new()
            .name("vu-end".into())
            .spawn(move || {
                drop(controllers);
                drop(pollers);
                drop(sender);
            });
        let timeout = done.recv_deadline(deadline.max(Instant::now() + GRACE));
        if ended.is_ok() && timeout == Err(crossbeam_channel::RecvTimeoutError::Disconnected) {
            tracing::info!("stopped");
            ExitCode::SUCCESS
        } else {
            abandon(Vec::new(), "I/O is still out")
        }
    }
}

/// End the process with things still going on.
fn abandon(servers: Vec<Server>, why: &str) -> ExitCode {
    tracing::error!("not everything could be ended in order: {why}");
    for server in servers {
        server.abandon();
    }
    ExitCode::from(EXIT_FAILURE)
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn arguments_can_be_pasted() {
        let plain = "-device vhost-user-nvme,socket=/run/a-b_c.sock";
        assert_eq!(quoted(plain), plain);
        assert_eq!(
            quoted("-device vhost-user-nvme,socket=/tmp/a b's"),
            "-device 'vhost-user-nvme,socket=/tmp/a b'\\''s'"
        );
    }
}
