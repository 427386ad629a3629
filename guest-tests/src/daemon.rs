//! The daemon under test, in this process: pollers, controllers, and a socket for each.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nvme_spec::ring::RingSize;
use tempfile::TempDir;
use vhost_user_nvme::backend::{
    Backend, Delay, Fault, FileOptions, HugePages, IoPoll, MemoryOptions, NullOptions, OpenError,
    Rules,
};
use vhost_user_nvme::controller::{Controller, ControllerConfig, NamespaceConfig, Placement};
use vhost_user_nvme::driver::{Driver, Options, QueueConfig};
use vhost_user_nvme::poller::{IdlePolicy, PollerConfig, PollerPool};
use vhost_user_nvme::transport::{Server, SocketFile};

use crate::FrontEnd;
use crate::raw::Guest;

/// A namespace to be served.
pub struct Disk {
    backend: Backend,
    read_only: bool,
}

impl Disk {
    /// In memory: `blocks` blocks of `1 << block_shift` bytes.
    pub fn memory(block_shift: u32, blocks: u64) -> Self {
        Self::over(Backend::memory(MemoryOptions {
            block_shift,
            blocks,
            read_only: false,
            huge_pages: HugePages::Never,
        }))
    }

    /// Moves no data.
    pub fn null(block_shift: u32, blocks: u64) -> Self {
        Self::over(Backend::null(NullOptions {
            block_shift,
            blocks,
            read_only: false,
        }))
    }

    /// In a file, which is made with this size.
    pub fn file(path: &Path, block_shift: u32, blocks: u64) -> Self {
        let file = std::fs::File::create(path).expect("a file in a temporary directory");
        file.set_len(blocks << block_shift).expect("a sparse file");
        Self::over(Backend::file(FileOptions {
            path: path.to_owned(),
            block_shift,
            read_only: false,
            direct: false,
            iopoll: IoPoll::Auto,
            after: Default::default(),
        }))
    }

    /// On a backend that the test made.
    pub fn over(backend: Result<Backend, OpenError>) -> Self {
        Self {
            backend: backend.expect("a backend of a test"),
            read_only: false,
        }
    }

    /// Write-protected.
    pub fn read_only(self) -> Self {
        Self {
            read_only: true,
            ..self
        }
    }

    /// With faults to be chosen later.
    pub fn with_faults(self) -> (Self, Rules<Fault>) {
        let (backend, rules) = self.backend.with_faults();
        (Self { backend, ..self }, rules)
    }

    /// With delays to be chosen later.
    pub fn with_delays(self) -> (Self, Rules<Delay>) {
        let (backend, rules) = self.backend.with_delays();
        (Self { backend, ..self }, rules)
    }
}

/// A controller to be served.
pub struct Plan {
    /// Namespaces by NSID.
    pub disks: Vec<(u32, Disk)>,
    /// NN; 0 = the highest NSID.
    pub max_namespaces: u32,
    /// Queue pairs, admin included.
    pub queues: u16,
    /// Entries of an I/O queue.
    pub max_queue_entries: u32,
    /// Largest transfer in bytes.
    pub max_transfer: u32,
    /// Offer Doorbell Buffer Config.
    pub doorbell_buffer: bool,
    /// Offer SGLs.
    pub sgls: bool,
    /// CAP.DSTRD.
    pub doorbell_stride: u8,
    /// Which pollers serve its queues.
    pub placement: Placement,
}

impl Plan {
    /// One namespace, all limits generous.
    pub fn of(disk: Disk) -> Self {
        Self::many(vec![(1, disk)])
    }

    /// These namespaces.
    pub fn many(disks: Vec<(u32, Disk)>) -> Self {
        Self {
            disks,
            max_namespaces: 0,
            queues: 8,
            max_queue_entries: 1024,
            max_transfer: 1 << 20,
            doorbell_buffer: true,
            sgls: true,
            doorbell_stride: 0,
            placement: Placement::default(),
        }
    }
}

/// Pollers of a test: `count` of them, wherever the scheduler likes.
pub fn pollers(count: usize, idle: IdlePolicy) -> Vec<PollerConfig> {
    let config = PollerConfig {
        core: None,
        idle,
        poll_for: Duration::from_micros(50),
        slots: 512,
    };
    vec![config; count]
}

/// A daemon in this process.
pub struct TestDaemon {
    // In this order: no front-end, then no controller, then no poller.
    servers: Vec<Server>,
    controllers: Vec<Arc<Controller>>,
    _pollers: PollerPool,
    sockets: Vec<PathBuf>,
    dir: TempDir,
}

impl TestDaemon {
    /// Serve controllers.
    pub fn start(plans: Vec<Plan>, pollers: &[PollerConfig]) -> Self {
        let dir = TempDir::new().expect("a temporary directory");
        vhost_user_nvme::memory::sigbus::install().expect("a signal handler");
        let pool = PollerPool::start(pollers).expect("pollers");
        let mut daemon = Self {
            servers: Vec::new(),
            controllers: Vec::new(),
            _pollers: pool,
            sockets: Vec::new(),
            dir,
        };
        for plan in plans {
            daemon.serve(plan);
        }
        daemon
    }

    /// One controller with one poller that sleeps when it has nothing to do.
    pub fn one(plan: Plan) -> Self {
        Self::start(vec![plan], &pollers(1, IdlePolicy::Adaptive))
    }

    fn serve(&mut self, plan: Plan) {
        let index = self.controllers.len();
        let namespaces: Vec<_> = plan
            .disks
            .into_iter()
            .map(|(nsid, disk)| NamespaceConfig {
                nsid,
                backend: Arc::new(disk.backend),
                read_only: disk.read_only,
                identity: format!("test-{index}-{nsid}"),
                uuid: None,
                nguid: None,
                eui64: None,
            })
            .collect();
        let highest = namespaces.iter().map(|n| n.nsid).max().unwrap_or(1);
        let config = ControllerConfig {
            name: format!("nvme{index}"),
            serial: format!("TEST{index}"),
            model: "virtual guest test".into(),
            subnqn: format!("nqn.2014-08.org.nvmexpress:uuid:test-{index}"),
            namespaces,
            max_namespaces: plan.max_namespaces.max(highest),
            queues: plan.queues,
            max_queue_entries: plan.max_queue_entries,
            max_transfer: plan.max_transfer,
            doorbell_buffer: plan.doorbell_buffer,
            sgls: plan.sgls,
            doorbell_stride: plan.doorbell_stride,
            pci_ids: [0x1b36, 0x0010, 0x1af4, 0x1100],
            placement: plan.placement,
            keep: Arc::new(vhost_user_nvme::state::Keep::nowhere()),
        };
        let controller = Controller::new(config, &self._pollers).expect("a controller");
        let path = self.dir.path().join(format!("{index}.sock"));
        let (file, endpoint) = SocketFile::listen(&path, None, None).expect("a socket");
        let server = Server::start(
            crate::transport(),
            endpoint,
            Some(file),
            Arc::clone(&controller),
            || {},
        )
        .expect("a server");
        self.servers.push(server);
        self.controllers.push(controller);
        self.sockets.push(path);
    }

    /// The socket of a controller.
    pub fn socket(&self, index: usize) -> &Path {
        &self.sockets[index]
    }

    /// A controller.
    pub fn controller(&self, index: usize) -> &Arc<Controller> {
        &self.controllers[index]
    }

    /// A place for files.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Counters of the pollers.
    pub fn pollers(&self) -> &PollerPool {
        &self._pollers
    }

    /// A front-end on the first controller.
    pub fn connect(&self) -> FrontEnd {
        FrontEnd::connect(self.socket(0)).expect("a front-end")
    }

    /// A guest on the first controller, brought up, with all queue pairs granted.
    pub fn guest(&self) -> Guest {
        bring_up(self.connect())
    }
}

/// Bring a controller up, and take all queue pairs it has.
pub fn bring_up(front: FrontEnd) -> Guest {
    let wanted = front.queues() - 1;
    let mut guest =
        Driver::bring_up(front, Options::default()).expect("a controller that comes up");
    let granted = guest.request_queue_pairs(wanted).expect("queue pairs");
    assert_eq!(granted, wanted, "all queue pairs of a vring each");
    guest
}

/// A queue pair of `entries` entries with an interrupt vector of its own.
pub fn queue(qid: u16, entries: u32) -> QueueConfig {
    let size = RingSize::new(entries).expect("2 to 65536 entries");
    QueueConfig {
        qid,
        sq_size: size,
        cq_size: size,
        depth: 0,
        max_transfer: 0,
        vector: Some(qid),
    }
}
