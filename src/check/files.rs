//! How many files the daemon has open, at most, with a configuration.

use crate::config::{Config, ControllerSpec, StoreSpec};
use crate::daemon::ssds;
use crate::driver::vfio::VfioOptions;
use crate::transport::Transport;

/// What there is in any case: logs, signals, the pid file, and those of the program that started us; with room to spare.
const ALWAYS: u64 = 64;

/// A poller's: what it sleeps on, and its mailbox.
const POLLER: u64 = 2;

/// A controller's: its socket and connection, its state, its doorbells, and what its threads wait for.
const CONTROLLER: u64 = 16;

/// Files of guest memory for each controller. A guest has one or two, with hotplug a dozen; while they are exchanged there are twice as many.
const MEMORY: u64 = 2 * 24;

/// An SSD's, without its queues: device, group or IOMMU, its errors and its removal, and what its keeper waits for.
const SSD: u64 = 16;

/// How many files may be open. `more` SSDs are looked at that no namespace is on.
pub(super) fn needed(config: Option<&Config>, more: usize) -> u64 {
    let unknown = (more as u64).saturating_mul(ssd(VfioOptions::default().vectors));
    let Some(config) = config else {
        return ALWAYS + unknown;
    };
    let controllers = config.controllers.iter().map(|c| {
        let pollers = ssds::pollers_of(c, config) as u64;
        controller(c, pollers)
    });
    let configured = config
        .ssds
        .iter()
        .map(|spec| ssd(ssds::vectors(spec, config)));
    ALWAYS
        + POLLER * config.pollers.len() as u64
        + controllers.sum::<u64>()
        + configured.sum::<u64>()
        + unknown
}

fn controller(spec: &ControllerSpec, pollers: u64) -> u64 {
    let queue = match spec.transport {
        // A kick and a call.
        Transport::VhostUser => 2,
        // Both are ours and the controller's; after an upgrade the call is for a while that of the message, too.
        Transport::VfioUser => 5,
    };
    let stores = spec.namespaces.iter().map(|ns| {
        let (own, ring) = match ns.store {
            // For an SSD of ours see below.
            StoreSpec::Null { .. } | StoreSpec::Nvme { .. } => (0, 0),
            // What it is kept in, and what tells that it is cut short; for each poller something to wake it by.
            StoreSpec::Memory { .. } => (2, 1),
            // For each poller a ring or two, what wakes it for others, and what waits for all of these.
            StoreSpec::File { .. } => (2, 4),
            StoreSpec::NvmePassthrough { .. } => (2, 3),
        };
        // Delays have a timer and something to wait for it and the store; faults have what never wakes.
        let wrapped = if ns.danger_zone.is_some() { 3 } else { 0 };
        own + (ring + wrapped) * pollers
    });
    CONTROLLER + MEMORY + queue * u64::from(spec.queues) + stores.sum::<u64>()
}

/// An SSD of which so many interrupt vectors are taken. Each is open three times: the device's, its queue pair's, and that of the lane
/// which has the pair.
fn ssd(vectors: u16) -> u64 {
    SSD + 3 * u64::from(vectors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{file, resolve};

    fn config(text: &str) -> Config {
        let (file, source) = file::parse("t.toml", text.into()).unwrap();
        resolve(file, Some(&source)).unwrap()
    }

    const SSD_OF_THREE: &str = r#"
        [daemon]
        pollers = 200
        [[controller]]
        name = "a"
        socket-path = "/tmp/a.sock"
        [[controller.namespace]]
        backend = "nvme"
        address = "0000:01:00.0"
        size = "1G"
        [[controller.namespace]]
        backend = "nvme"
        address = "0000:01:00.0"
        offset = "1G"
        size = "1G"
    "#;

    /// What was counted once: 65 vectors, whatever the pollers.
    #[test]
    fn an_ssd_counts_the_vectors_that_the_daemon_takes() {
        let config = config(SSD_OF_THREE);
        let vectors = ssds::vectors(&config.ssds[0], &config);
        assert_eq!(vectors, 256);
        let least = 3 * u64::from(vectors);
        assert!(needed(Some(&config), 0) >= ALWAYS + least);
        assert!(needed(None, 1) >= 3 * u64::from(VfioOptions::default().vectors));
    }

    #[test]
    fn queues_count_by_transport_and_rings_by_poller() {
        let of = |transport: &str, pollers: u32, store: &str| {
            let text = format!(
                "[daemon]\npollers = {pollers}\n[[controller]]\nsocket-path = \"/tmp/a.sock\"\nqueues = 64\n\
                 transport = \"{transport}\"\n[[controller.namespace]]\n{store}\n"
            );
            needed(Some(&config(&text)), 0)
        };
        let null = "backend = \"null\"\nsize = \"1G\"";
        let vhost_user = of("vhost-user", 1, null);
        assert!(vhost_user >= 2 * 64);
        // A kick and a call, and one of ours of each.
        assert!(of("vfio-user", 1, null) >= vhost_user + 2 * 64);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::File::create(&path)
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        let file = format!("backend = \"file\"\npath = \"{}\"", path.display());
        let (one, many) = (of("vhost-user", 1, &file), of("vhost-user", 101, &file));
        assert!(many >= one + 100 * (POLLER + 3), "{one} {many}");
    }
}
