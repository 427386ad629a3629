//! From a checked configuration to a running daemon, and to its orderly end.

pub(crate) mod keeps;
mod logging;
pub(crate) mod ssds;
mod stop;
pub(crate) mod stores;
mod upgrades;

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backend::OpenError;
use crate::config::{Config, ControllerSpec, LogFormat, NamespaceSpec, Socket};
use crate::controller::{Controller, ControllerConfig, DRAIN_LIMIT};
use crate::memory::sigbus;
use crate::poller::PollerPool;
use crate::state::Keep;
use crate::systemd::Manager;
use crate::systemd::watchdog::{Watchdog, Watched};
use crate::transport::{Endpoint, Server, SocketFile, Transport};
use crate::upgrade::take::{Taken, Taking};
use keeps::Keeps;
use ssds::Ssds;
use upgrades::Upgrades;

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
    check_start(config, None)?;
    for controller in &config.controllers {
        for namespace in &controller.namespaces {
            stores::check(namespace).map_err(|e| about(controller, namespace, e))?;
        }
        keeps::describe(config, controller)
            .map_err(|e| format!("controller '{}': {e}", controller.name))?;
    }
    Ok(())
}

/// The part of [`check`] that a start does not come upon anyway, in time to be told as a mistake of the operator.
///
/// # Errors
///
/// As [`check`].
///
/// `taking`: the process that this one takes over from still has everything.
pub fn check_start(config: &Config, taking: Option<&Taking>) -> Result<(), BoxError> {
    for controller in &config.controllers {
        match &controller.socket {
            Socket::Path { path, .. } if taking.is_some_and(|t| t.listens_at(path)) => {}
            // The last one here may be about to end.
            Socket::Path { path, .. } if keeps::is_dying(config, controller) => {
                SocketFile::check_place(path)?;
            }
            Socket::Path { path, .. } => SocketFile::check(path)?,
            Socket::Fd(fd) => Endpoint::check(*fd)?,
        }
        // What a process before us may still be about to let go of is waited for later.
        if taking.is_some() {
            for namespace in &controller.namespaces {
                stores::look(namespace).map_err(|e| about(controller, namespace, e))?;
            }
        } else if !keeps::had_predecessor(config, controller) {
            for namespace in &controller.namespaces {
                stores::check(namespace).map_err(|e| about(controller, namespace, e))?;
            }
        }
    }
    Ok(ssds::check(config)?)
}

fn about(controller: &ControllerSpec, namespace: &NamespaceSpec, error: OpenError) -> String {
    format!(
        "controller '{}': namespace {}: {error}",
        controller.name, namespace.nsid
    )
}

/// The exit status that says what is wrong with an SSD, if that is what an error is about.
pub fn exit_status(error: &(dyn std::error::Error + 'static)) -> Option<u8> {
    error.downcast_ref::<ssds::SsdError>()?.exit_status()
}

/// Run until a signal comes; the exit status of the process.
pub fn run(config: Config, taking: Option<Taking>) -> ExitCode {
    logging::start(&config.log);
    stop::exit_on_panic();
    match start(&config, taking.as_ref()) {
        Ok(daemon) => {
            drop(taking);
            daemon.serve()
        }
        Err(e) => {
            if let Some(taking) = &taking {
                taking.unable(&e.to_string());
            }
            let _ = writeln!(std::io::stderr(), "vhost-user-nvme: {e}");
            ExitCode::from(exit_status(&*e).unwrap_or(EXIT_FAILURE))
        }
    }
}

/// Everything that runs; fields are dropped in this order.
struct Daemon {
    watchdog: Option<Watchdog>,
    servers: Vec<Server>,
    runs: Runs,
    events: stop::Events,
    manager: Manager,
    upgrades: Upgrades,
}

/// What serves guests, besides the servers; fields are dropped in this order.
struct Runs {
    controllers: Vec<Arc<Controller>>,
    pollers: PollerPool,
    keeps: Keeps,
    /// Each is shut down when its last namespace has gone.
    ssds: Ssds,
}

fn start(config: &Config, taking: Option<&Taking>) -> Result<Daemon, BoxError> {
    sigbus::install()?;
    stop::raise_file_limit();
    let events = stop::Events::new()?;
    let manager = Manager::of_this_process();
    // Until here the old process serves; from here on nobody does but us.
    let mut taken = match taking {
        Some(taking) => taking.take(&|| !events.signalled())?,
        None => Taken::default(),
    };
    // First: only then is it certain that no process before us serves these controllers.
    let keeps = Keeps::open(config)?;
    // All that can be refused comes before anything that others can see.
    let ssds = Ssds::start(config, keeps.patience())?;
    let mut stores = Vec::new();
    for (place, spec) in config.controllers.iter().enumerate() {
        for namespace in &spec.namespaces {
            let store = stores::open(namespace, &ssds, place, keeps.of(place))
                .map_err(|e| about(spec, namespace, e))?;
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
    for (place, spec) in config.controllers.iter().enumerate() {
        let namespaces = stores.by_ref().take(spec.namespaces.len()).collect();
        let spec = controller(spec, namespaces, Arc::clone(keeps.of(place)));
        controllers.push(Controller::new(spec, &pollers)?);
    }
    ssds.listen(config, &controllers)?;
    let mut endpoints = Vec::new();
    for spec in &config.controllers {
        endpoints.push(match &spec.socket {
            Socket::Path { path, mode, group } => {
                let (file, endpoint) = match taken.socket(path, spec.transport) {
                    Some((file, endpoint)) => {
                        SocketFile::permit(path, *mode, *group)?;
                        (file, endpoint)
                    }
                    None => SocketFile::listen(path, *mode, *group)?,
                };
                (Some(file), endpoint)
            }
            Socket::Fd(fd) => (None, Endpoint::inherited(*fd)?),
        });
    }
    let mut servers = Vec::new();
    let attached = controllers.iter().zip(&config.controllers);
    for ((file, endpoint), (controller, spec)) in endpoints.into_iter().zip(attached) {
        let wake = events.waker()?;
        let controller = Arc::clone(controller);
        let ended = move || wake.wake();
        let server = Server::start(spec.transport, endpoint, file, controller, ended)?;
        servers.push(server);
    }
    let watched = Watched {
        pollers: pollers.handles().to_vec(),
        controllers: controllers
            .iter()
            .map(|c| (c.name().to_owned(), c.pulse()))
            .collect(),
    };
    let watchdog = Watchdog::start(&manager, watched)?;
    let upgrades = Upgrades::new(config, taken.pid_file.take());
    match taking {
        None => announce(config),
        Some(taking) => {
            taking.serving();
            servers.iter_mut().for_each(Server::own_file);
            taken.remove_rest();
            tracing::info!("this process has taken over");
        }
    }
    let daemon = Daemon {
        watchdog,
        servers,
        runs: Runs {
            controllers,
            pollers,
            keeps,
            ssds,
        },
        events,
        manager,
        upgrades,
    };
    daemon.manager.ready(&daemon.status());
    Ok(daemon)
}

fn controller(
    spec: &ControllerSpec,
    namespaces: Vec<crate::controller::NamespaceConfig>,
    keep: Arc<Keep>,
) -> ControllerConfig {
    ControllerConfig {
        name: spec.name.clone(),
        serial: spec.serial.clone(),
        model: spec.model.clone(),
        subnqn: spec.subnqn.clone(),
        max_namespaces: spec.max_namespaces,
        queues: spec.queues,
        max_queue_entries: spec.queue_entries,
        max_transfer: spec
            .max_transfer
            .unwrap_or_else(|| largest_transfer(&namespaces)),
        namespaces,
        doorbell_buffer: spec.doorbell_buffer,
        sgls: spec.sgls,
        doorbell_stride: spec.doorbell_stride,
        pci_ids: spec.pci_ids,
        placement: spec.placement.clone(),
        keep,
    }
}

/// The largest transfer that is one command to every store.
fn largest_transfer(namespaces: &[crate::controller::NamespaceConfig]) -> u32 {
    const MOST: u32 = 1 << 20;
    let of = |ns: &crate::controller::NamespaceConfig| {
        let bytes = ns.backend.traits().map_or(MOST, |t| t.max_transfer);
        // A power of two, of pages.
        1 << bytes.clamp(4096, MOST).ilog2()
    };
    namespaces.iter().map(of).min().unwrap_or(MOST)
}

/// Say how QEMU attaches each controller.
fn announce(config: &Config) {
    let mut out = std::io::stdout();
    let json = config.log.format == LogFormat::Json;
    for spec in &config.controllers {
        let Socket::Path { path, .. } = &spec.socket else {
            continue;
        };
        let socket = std::path::absolute(path).unwrap_or_else(|_| path.clone());
        let device = device_argument(spec.transport, &socket.display().to_string());
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
            if spec.transport == Transport::VfioUser {
                let _ = writeln!(
                    out,
                    "or Cloud Hypervisor's:\n  --memory size=2G,shared=on --user-device {}",
                    quoted(&format!("socket={}", socket.display()))
                );
            }
        }
    }
    let _ = out.flush();
}

/// What attaches the controller at this socket to QEMU.
fn device_argument(transport: Transport, socket: &str) -> String {
    match transport {
        // In a property's value, QEMU reads two commas as one.
        Transport::VhostUser => {
            format!(
                "-device vhost-user-nvme,socket={}",
                socket.replace(',', ",,")
            )
        }
        Transport::VfioUser => {
            let path = socket.replace('\\', "\\\\").replace('"', "\\\"");
            format!(
                "-device {{\"driver\":\"vfio-user-pci\",\"socket\":{{\"type\":\"unix\",\"path\":\"{path}\"}}}}"
            )
        }
    }
}

/// As a shell takes it: the value of the option quoted if there is anything special in it.
fn quoted(argument: &str) -> String {
    let (option, value) = match argument.split_once(' ') {
        Some((option, value)) if option.starts_with('-') => (format!("{option} "), value),
        _ => (String::new(), argument),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=,./:+@%".contains(c);
    if value.chars().all(plain) {
        argument.to_owned()
    } else {
        format!("{option}'{}'", value.replace('\'', "'\\''"))
    }
}

impl Daemon {
    fn serve(mut self) -> ExitCode {
        loop {
            match self.events.wait() {
                stop::Event::Signal => {
                    tracing::info!("stopping: waiting for the I/O that is out");
                    return self.stop();
                }
                stop::Event::Upgrade => match self.upgrade() {
                    Ok(status) => return status,
                    Err(daemon) => self = *daemon,
                },
                stop::Event::Other => {
                    self.take_back();
                    if self.servers.iter().all(Server::is_finished) {
                        tracing::info!("the last front-end has gone and no other can come");
                        return self.stop();
                    }
                }
            }
        }
    }

    /// What there is to say while all is well.
    fn status(&self) -> String {
        format!(
            "Serving controllers: {}, with pollers: {}",
            self.runs.controllers.len(),
            self.runs.pollers.handles().len()
        )
    }

    /// Wait until all servers are finished; whether they are by then.
    fn servers_finish(&self, deadline: Instant) -> bool {
        while !self.servers.iter().all(Server::is_finished) && Instant::now() < deadline {
            self.events.wait_until(deadline);
        }
        self.servers.iter().all(Server::is_finished)
    }

    /// Of each controller, whether somebody will be back for it.
    fn missed(&self) -> Vec<bool> {
        let served = self.servers.iter().zip(&self.runs.controllers);
        served
            .map(|(server, controller)| server.will_be_missed(controller))
            .collect()
    }

    /// Accept no more, drain, and end; but not for longer than makes sense.
    fn stop(mut self) -> ExitCode {
        self.manager.stopping("Waiting for the I/O that is out");
        let deadline = Instant::now() + DRAIN_LIMIT + GRACE;
        let before = self.missed();
        for server in &self.servers {
            server.stop();
        }
        let finished = self.servers_finish(deadline);
        self.watchdog = None;
        if !finished {
            return abandon(self.servers, "a front-end's connection did not end");
        }
        // Also who came, or was lost, meanwhile.
        let missed = before.iter().zip(self.missed());
        let missed: Vec<_> = missed.map(|(before, after)| *before || after).collect();
        drop(self.servers);
        let deadline = deadline.max(Instant::now() + GRACE);
        // Who is still there may come back; nobody else will.
        if self.runs.end(deadline, move |keeps| keeps.end(&missed)) {
            tracing::info!("stopped");
            ExitCode::SUCCESS
        } else {
            abandon(Vec::new(), "I/O is still out")
        }
    }
}

impl Runs {
    /// End everything, and do the rest with the places of the controllers; whether that is done by then. I/O that never ends must not keep us.
    fn end(self, deadline: Instant, rest: impl FnOnce(&Keeps) + Send + 'static) -> bool {
        let (sender, done) = crossbeam_channel::bounded::<()>(0);
        let ended = std::thread::Builder::new()
            .name("vu-end".into())
            .spawn(move || {
                let Self {
                    controllers,
                    pollers,
                    keeps,
                    ssds,
                } = self;
                drop(controllers);
                drop(pollers);
                drop(ssds);
                rest(&keeps);
                drop(keeps);
                drop(sender);
            });
        let timeout = done.recv_deadline(deadline);
        ended.is_ok() && timeout == Err(crossbeam_channel::RecvTimeoutError::Disconnected)
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
    use super::{Transport, device_argument, quoted};

    #[test]
    fn arguments_can_be_pasted() {
        let plain = "-device vhost-user-nvme,socket=/run/a-b_c.sock";
        assert_eq!(quoted(plain), plain);
        assert_eq!(
            quoted("-device vhost-user-nvme,socket=/tmp/a b's"),
            "-device 'vhost-user-nvme,socket=/tmp/a b'\\''s'"
        );
        assert_eq!(
            quoted(&device_argument(Transport::VfioUser, "/tmp/a\"b")),
            r#"-device '{"driver":"vfio-user-pci","socket":{"type":"unix","path":"/tmp/a\"b"}}'"#
        );
    }
}
