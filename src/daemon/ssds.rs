//! SSDs out of their configuration: opened, brought up, divided among the controllers, listened to.

use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crate::backend::nvme::Window;
use crate::config::{Config, ControllerSpec, OnReset, SsdSpec, StoreSpec};
use crate::controller::Controller;
use crate::driver::pci::{Host, PciAddress};
use crate::driver::vfio::{self, VfioError, VfioOptions};
use crate::driver::{AddressSpace, AnyDevice, MapMemoryError, Ssd, SsdEvent, SsdOptions};
use crate::poller::IdlePolicy;

/// Queue pairs that are asked for at most: an SSD has no more interrupt vectors for them that are worth having.
const MOST_QUEUE_PAIRS: usize = 255;

/// Why an SSD cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SsdError {
    /// It cannot be opened or brought up.
    #[error("{source}: {}", source.hint())]
    Open {
        /// The cause.
        source: VfioError,
    },
    /// Its address space is too small.
    #[error(transparent)]
    Windows(#[from] MapMemoryError),
}

impl SsdError {
    /// The exit status of a program that ends because of this.
    pub fn exit_status(&self) -> Option<u8> {
        match self {
            Self::Open { source } => Some(source.exit_status()),
            Self::Windows(_) => None,
        }
    }
}

impl From<VfioError> for SsdError {
    fn from(source: VfioError) -> Self {
        Self::Open { source }
    }
}

/// See whether the SSDs could be opened, without doing so.
///
/// # Errors
///
/// What is in the way of the first that could not.
pub fn check(config: &Config) -> Result<(), SsdError> {
    let host = Host::default();
    for spec in &config.ssds {
        vfio::preflight(&host, spec.address)?;
    }
    Ok(())
}

/// An SSD that runs.
struct Running {
    address: PciAddress,
    ssd: Arc<Ssd>,
    /// A place in its address space for each controller that uses it, by the controller's place in the configuration.
    windows: Vec<(usize, Arc<Window>)>,
}

/// All SSDs of a configuration.
#[derive(Default)]
pub struct Ssds(Vec<Running>);

/// Whether a namespace of a controller is on this SSD.
fn uses(spec: &ControllerSpec, ssd: PciAddress) -> usize {
    let on =
        |store: &StoreSpec| matches!(store, StoreSpec::Nvme { address, .. } if *address == ssd);
    spec.namespaces.iter().filter(|ns| on(&ns.store)).count()
}

/// How many pollers may serve a controller.
pub(crate) fn pollers_of(spec: &ControllerSpec, config: &Config) -> usize {
    let chosen = spec.placement.pollers.as_ref();
    chosen.map_or(config.pollers.len(), Vec::len)
}

/// Queue pairs that an SSD is asked for: one for each of its namespaces that a poller may serve.
fn queue_pairs(spec: &SsdSpec, config: &Config) -> u16 {
    let lanes: usize = config
        .controllers
        .iter()
        .map(|c| uses(c, spec.address) * pollers_of(c, config))
        .sum();
    // One more, to flush by when a guest shuts down.
    lanes.saturating_add(1).min(MOST_QUEUE_PAIRS) as u16
}

/// Interrupt vectors that are taken of an SSD, if it has so many: one for each queue pair, and one for the admin queue.
pub(crate) fn vectors(spec: &SsdSpec, config: &Config) -> u16 {
    queue_pairs(spec, config).saturating_add(1)
}

/// How an SSD is to be treated, given who will use it.
fn options(spec: &SsdSpec, config: &Config) -> SsdOptions {
    SsdOptions {
        command_timeout: spec.command_timeout,
        abort_grace: spec.abort_grace,
        on_reset: match spec.on_reset {
            OnReset::Resubmit => crate::driver::OnReset::Resubmit,
            OnReset::Fail => crate::driver::OnReset::Fail,
        },
        resets_per_minute: spec.resets_per_minute,
        queue_pairs: queue_pairs(spec, config),
        interrupts: config.pollers.iter().any(|p| p.idle != IdlePolicy::Poll),
        ..SsdOptions::default()
    }
}

impl Ssds {
    /// Open all, and bring them up. A process that was killed may still have one for so long: the kernel resets an SSD before it lets go.
    ///
    /// # Errors
    ///
    /// What is in the way of the first that could not be.
    pub fn start(config: &Config, wait: Duration) -> Result<Self, SsdError> {
        let mut running = Vec::new();
        for spec in &config.ssds {
            let options = options(spec, config);
            let begin = Instant::now();
            let vectors = VfioOptions {
                vectors: vectors(spec, config),
                ..VfioOptions::default()
            };
            let (device, space) = open(spec.address, &vectors, wait)?;
            let name = spec.address.to_string();
            let ssd =
                Ssd::start(name.clone(), device, Arc::clone(&space), options).map_err(|e| {
                    VfioError::Unusable {
                        address: spec.address,
                        what: e.to_string(),
                    }
                })?;
            let users: Vec<usize> = (0..)
                .zip(&config.controllers)
                .filter(|(_, c)| uses(c, spec.address) > 0)
                .map(|(i, _)| i)
                .collect();
            let windows = match users.len() {
                1 => vec![Window::sole(&space, &name)?],
                n => Window::shared(&space, &name, n)?,
            };
            tracing::info!(
                ssd = name,
                queue_pairs = ssd.queue_pairs(),
                max_transfer = ssd.max_transfer(),
                guests = users.len(),
                // Of an upgrade's pause, this is the SSD's part.
                brought_up_in_ms = begin.elapsed().as_millis(),
                "SSD"
            );
            running.push(Running {
                address: spec.address,
                ssd,
                windows: users.into_iter().zip(windows).collect(),
            });
        }
        Ok(Self(running))
    }

    /// The SSD at an address, and the place there of a controller, by its place in the configuration.
    pub fn place(&self, ssd: PciAddress, controller: usize) -> Option<(&Arc<Ssd>, &Arc<Window>)> {
        let running = self.0.iter().find(|r| r.address == ssd)?;
        let (_, window) = running.windows.iter().find(|(i, _)| *i == controller)?;
        Some((&running.ssd, window))
    }

    /// Tell the controllers, which are in the order of the configuration, what their SSDs report.
    pub fn listen(&self, config: &Config, controllers: &[Arc<Controller>]) -> std::io::Result<()> {
        for Running { address, ssd, .. } in &self.0 {
            // Guests' namespaces by those of the SSD.
            let mut on = Vec::new();
            for (spec, controller) in config.controllers.iter().zip(controllers) {
                for ns in &spec.namespaces {
                    if let StoreSpec::Nvme {
                        address: a, nsid, ..
                    } = &ns.store
                        && a == address
                    {
                        on.push((*nsid, ns.nsid, Arc::downgrade(controller)));
                    }
                }
            }
            let (name, news) = (address.to_string(), ssd.subscribe());
            thread::Builder::new()
                .name("nvme-news".into())
                .spawn(move || {
                    for event in news {
                        tell(&name, &event, &on);
                    }
                })?;
        }
        Ok(())
    }
}

/// Open an SSD, once nobody else has it.
fn open(
    address: PciAddress,
    vectors: &VfioOptions,
    wait: Duration,
) -> Result<(AnyDevice, Arc<dyn AddressSpace>), VfioError> {
    let until = Instant::now() + wait;
    let mut said = false;
    loop {
        match vfio::open(address, vectors) {
            Err(VfioError::Busy { .. }) if Instant::now() < until => {
                if !said {
                    tracing::info!(ssd = %address, "another process still has this SSD; waiting for it");
                    said = true;
                }
                thread::sleep(Duration::from_millis(10));
            }
            result => return result,
        }
    }
}

/// Tell guests of an event.
fn tell(ssd: &str, event: &SsdEvent, on: &[(u32, u32, Weak<Controller>)]) {
    match event {
        SsdEvent::NamespacesChanged(list) => {
            tracing::info!(ssd, ?list, "namespaces of the SSD have changed");
            for (theirs, ours, controller) in on {
                if (list.contains(theirs) || list.contains(&u32::MAX))
                    && let Some(controller) = controller.upgrade()
                {
                    controller.namespace_changed(*ours);
                }
            }
        }
        SsdEvent::Health(warning) => {
            tracing::warn!(ssd, ?warning, "the SSD reports on its health");
            // Once each, however many namespaces it has there: the same event twice is one.
            let all = on
                .iter()
                .filter_map(|(.., controller)| controller.upgrade());
            all.for_each(|controller| controller.health_changed(*warning));
        }
        SsdEvent::Error { info, entries } => {
            tracing::warn!(ssd, info, "the SSD reports an error");
            for entry in entries {
                tracing::warn!(
                    ssd,
                    number = entry.error_count,
                    status = %entry.status.status(),
                    nsid = entry.nsid,
                    lba = entry.lba,
                    queue = entry.sqid,
                    opcode = entry.opcode,
                    "an error of the SSD's log"
                );
            }
        }
        SsdEvent::Resetting => tracing::warn!(ssd, "the SSD is reset"),
        SsdEvent::Ready => tracing::info!(ssd, "the SSD serves again"),
        SsdEvent::Gone => tracing::error!(ssd, "the SSD is gone: all I/O to it fails"),
    }
}
