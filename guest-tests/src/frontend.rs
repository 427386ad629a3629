//! The VMM's side of a socket, vhost-user as `docs/VHOST_USER.md` describes it or vfio-user, and the device a driver sees through it.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use nvme_spec::doorbell::DoorbellStride;
use nvme_spec::regs::{Cap, offset};
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures as P};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost_user_nvme::driver::dma::Mapping;
use vhost_user_nvme::driver::{Access, Device, Dma};
use vhost_user_nvme::memory::{GuestMap, SharedWord};
use vhost_user_nvme::transport::Transport;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use crate::bell::GuestBell;
use crate::fence::borrow;
use crate::handler::Doorbells;
use crate::memory::{GuestMemory, MemoryRegion};
use crate::session::{self, Connection, Session};
use crate::vfio::{self, Client, ClientError};

/// First byte of the front-end page.
pub const PAGE: u32 = 0xF00;
/// What its first dword holds: "NVME".
pub const MAGIC: u32 = 0x454D_564E;
/// Where the instance id is written.
pub const INSTANCE: u32 = 0xF20;
/// Where it is said that everything has been sent.
pub const GO: u32 = 0xF30;
/// Where the daemon says what it has kept for the instance.
pub const KEPT: u32 = 0xF34;

/// Virtio features a front-end acknowledges: protocol features, version 1.
pub const FEATURES: u64 = 1 << 30 | 1 << 32;

/// Protocol features a front-end needs.
pub const NEEDED: P = P::MQ
    .union(P::REPLY_ACK)
    .union(P::BACKEND_REQ)
    .union(P::BACKEND_SEND_FD)
    .union(P::CONFIG)
    .union(P::RESET_DEVICE)
    .union(P::CONFIGURE_MEM_SLOTS)
    .union(P::SHMEM);

/// Why a front-end could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum FrontEndError {
    /// A message failed.
    #[error("{what}: {source}")]
    Message {
        /// Which.
        what: &'static str,
        /// The cause.
        source: vhost::Error,
    },
    /// A message of vfio-user failed.
    #[error("{what}: {source}")]
    Client {
        /// Which.
        what: &'static str,
        /// The cause.
        source: ClientError,
    },
    /// What the operating system says.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The daemon said something it must not.
    #[error("the daemon is wrong: {0}")]
    Wrong(String),
}

pub(crate) fn message<T>(
    what: &'static str,
    result: Result<T, vhost::Error>,
) -> Result<T, FrontEndError> {
    result.map_err(|source| FrontEndError::Message { what, source })
}

fn client<T>(what: &'static str, result: Result<T, ClientError>) -> Result<T, FrontEndError> {
    result.map_err(|source| FrontEndError::Client { what, source })
}

/// What front-ends and daemons under test speak: what `VIRTUAL_GUEST_TRANSPORT` says; without it, vfio-user in a test program whose
/// name begins so, and else vhost-user.
pub fn transport() -> Transport {
    static CHOSEN: OnceLock<Transport> = OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let said = std::env::var("VIRTUAL_GUEST_TRANSPORT").ok();
        let program = std::env::current_exe().ok();
        let name = program.as_deref().and_then(Path::file_name);
        match said.as_deref() {
            Some("vfio-user") => Transport::VfioUser,
            Some("vhost-user") => Transport::VhostUser,
            Some(other) => {
                panic!("VIRTUAL_GUEST_TRANSPORT={other} is neither vhost-user nor vfio-user")
            }
            None if name.is_some_and(|n| n.to_string_lossy().starts_with("vfio_user")) => {
                Transport::VfioUser
            }
            None => Transport::VhostUser,
        }
    })
}

/// What a front-end starts with.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Guest memory: address and length of each region.
    pub memory: Vec<(u64, u64)>,
    /// Instance id.
    pub instance: [u8; 16],
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            memory: vec![(0, 8 << 20), (0x1_0000_0000, 16 << 20)],
            instance: *b"a virtual guest!",
        }
    }
}

/// A connected front-end; a clone is another handle to the same connection. It ends with the last handle.
#[derive(Clone)]
pub struct FrontEnd(Arc<Link>);

impl Deref for FrontEnd {
    type Target = Link;

    fn deref(&self) -> &Link {
        &self.0
    }
}

/// What a [`FrontEnd`] is a handle to.
pub struct Link {
    wire: Wire,
    pub(crate) doorbells: Arc<Doorbells>,
    window_bytes: u32,
    pci_ids: [u16; 4],
    stride: DoorbellStride,
    pub(crate) calls: Vec<EventFd>,
    pub(crate) kicks: RwLock<Vec<Arc<EventFd>>>,
    memory: GuestMemory,
}

/// What the daemon is spoken to with.
enum Wire {
    VhostUser(Session),
    VfioUser(Client, Arc<GuestMap>),
}

impl FrontEnd {
    /// Connect, with the default memory.
    ///
    /// # Errors
    ///
    /// [`FrontEndError`] names the step.
    pub fn connect(path: &Path) -> Result<Self, FrontEndError> {
        Self::connect_with(path, &Setup::default())
    }

    /// Connect and go through the whole sequence of the [`transport`].
    ///
    /// # Errors
    ///
    /// [`FrontEndError`] names the step.
    pub fn connect_with(path: &Path, setup: &Setup) -> Result<Self, FrontEndError> {
        Self::over(UnixStream::connect(path)?, setup)
    }

    /// As [`Self::connect_with`], over a socket that is connected.
    ///
    /// # Errors
    ///
    /// [`FrontEndError`] names the step.
    pub fn over(stream: UnixStream, setup: &Setup) -> Result<Self, FrontEndError> {
        let link = match transport() {
            Transport::VhostUser => Self::vhost_user(stream, setup)?,
            Transport::VfioUser => Self::vfio_user(stream)?,
        };
        for (gpa, len) in &setup.memory {
            link.add_memory(*gpa, *len)?;
        }
        link.set_vrings()?;
        link.go()?;
        Ok(Self(Arc::new(link)))
    }

    /// As [`Self::connect_with`], by vhost-user, and again whenever the daemon goes: the driver on it notices nothing but that time
    /// passes. A daemon that does not come back within `patience` is an error for all that is asked of it then.
    ///
    /// # Errors
    ///
    /// [`FrontEndError`] names the step.
    ///
    /// # Panics
    ///
    /// This is vfio-user.
    pub fn surviving(
        path: &Path,
        setup: &Setup,
        patience: Duration,
    ) -> Result<Self, FrontEndError> {
        let front = Self::connect_with(path, setup)?;
        session::survive(&front.0, path, patience)?;
        Ok(front)
    }

    fn vfio_user(stream: UnixStream) -> Result<Link, FrontEndError> {
        let wire = Client::new(stream);
        client("VERSION", wire.version())?;
        let info = vfio::words(&[16, 0, 0, 0]);
        let info = client("DEVICE_GET_INFO", wire.request(vfio::GET_INFO, &info, &[]))?;
        let bar = client("DEVICE_GET_REGION_INFO", wire.region(vfio::BAR0))?;
        let irqs = vfio::words(&[16, 0, 2, 0]);
        let irqs = wire.request(vfio::GET_IRQ_INFO, &irqs, &[]);
        let count = client("DEVICE_GET_IRQ_INFO", irqs)?.word(12);
        // Number of areas; where the only one begins, and its size.
        let (areas, area, len) = (bar.word(40), bar.long(48), bar.long(56));
        let flags = (info.word(4), bar.word(4));
        if (info.word(8), info.word(12)) != (9, 5)
            || flags != (3, 0xF)
            || (areas, area) != (1, 0x1000)
            || bar.files.len() != 1
            || !len.is_multiple_of(4096)
            || bar.long(16) < 0x4000
        {
            return Err(FrontEndError::Wrong(format!("{info:x?}, {bar:x?}")));
        }
        let bytes = usize::try_from(len).map_err(io::Error::other)?;
        let region = Mapping::map(&bar.files[0], bar.long(24) + area, bytes, 0)?;
        let window = GuestMap::new(vec![region]).map_err(io::Error::other)?;
        let half = |at: u64| {
            let mut out = [0; 2];
            let read = wire.read(vfio::CONFIG, at, &mut out);
            client("REGION_READ", read).map(|()| u16::from_le_bytes(out))
        };
        let pci_ids = [half(0)?, half(2)?, half(0x2C)?, half(0x2E)?];
        let mut cap = [0; 8];
        let read = wire.read(vfio::BAR0, offset::CAP.into(), &mut cap);
        client("REGION_READ", read)?;
        let doorbells = Arc::new(Doorbells::default());
        doorbells.are_mapped();
        Ok(Link {
            doorbells,
            window_bytes: bytes as u32,
            pci_ids,
            stride: DoorbellStride::new(Cap::from_bits(u64::from_le_bytes(cap)).dstrd()),
            calls: (0..count)
                .map(|_| EventFd::new(EFD_NONBLOCK))
                .collect::<Result<_, _>>()?,
            kicks: RwLock::default(),
            memory: GuestMemory::default(),
            wire: Wire::VfioUser(wire, window),
        })
    }

    fn vhost_user(stream: UnixStream, setup: &Setup) -> Result<Link, FrontEndError> {
        let doorbells = Arc::new(Doorbells::default());
        let (connection, shape) = Connection::open(stream, setup.instance, &doorbells)?;
        let eventfd = || EventFd::new(EFD_NONBLOCK);
        let count = usize::from(shape.queues);
        Ok(Link {
            doorbells,
            window_bytes: shape.window_bytes,
            pci_ids: shape.pci_ids,
            stride: shape.stride,
            calls: (0..count).map(|_| eventfd()).collect::<Result<_, _>>()?,
            kicks: RwLock::new(
                (0..count)
                    .map(|_| eventfd().map(Arc::new))
                    .collect::<Result<_, _>>()?,
            ),
            memory: GuestMemory::default(),
            wire: Wire::VhostUser(Session::new(connection, shape, setup.instance)),
        })
    }
}

impl Link {
    fn set_vrings(&self) -> Result<(), FrontEndError> {
        match &self.wire {
            Wire::VhostUser(session) => session::send_vrings(&session.socket()?, self),
            Wire::VfioUser(wire, _) => {
                let calls: Vec<_> = self.calls.iter().map(|call| borrow(call)).collect();
                let calls: Vec<_> = calls.iter().map(|call| call.as_fd()).collect();
                client("DEVICE_SET_IRQS", wire.set_eventfds(2, &calls))
            }
        }
    }

    fn go(&self) -> Result<(), FrontEndError> {
        match &self.wire {
            Wire::VhostUser(session) => session.go(&mut session.socket()?),
            Wire::VfioUser(..) => Ok(()),
        }
    }

    /// The session of vhost-user.
    ///
    /// # Panics
    ///
    /// This is vfio-user.
    pub fn session(&self) -> &Session {
        match &self.wire {
            Wire::VhostUser(session) => session,
            Wire::VfioUser(..) => panic!("a session of vhost-user on a socket of vfio-user"),
        }
    }

    fn window(&self) -> Arc<GuestMap> {
        match &self.wire {
            Wire::VhostUser(session) => session.window(),
            Wire::VfioUser(_, window) => Arc::clone(window),
        }
    }

    /// The socket of vhost-user, for messages out of the ordinary.
    ///
    /// # Panics
    ///
    /// This is vfio-user.
    pub fn socket(&self) -> Frontend {
        self.session().socket().expect("a connection")
    }

    /// The client of vfio-user, for messages out of the ordinary.
    ///
    /// # Panics
    ///
    /// This is vhost-user.
    pub fn client(&self) -> &Client {
        match &self.wire {
            Wire::VfioUser(client, _) => client,
            Wire::VhostUser(_) => panic!("a message of vfio-user on a socket of vhost-user"),
        }
    }

    /// Vectors and queue pairs, admin included.
    pub fn queues(&self) -> u16 {
        self.calls.len() as u16
    }

    /// Bytes of the doorbell window.
    pub fn window_bytes(&self) -> u32 {
        self.window_bytes
    }

    /// PCI vendor, device, subsystem vendor and subsystem.
    pub fn pci_ids(&self) -> [u16; 4] {
        self.pci_ids
    }

    /// Distance of doorbells.
    pub fn stride(&self) -> DoorbellStride {
        self.stride
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Whether doorbells are mapped into the guest now.
    pub fn doorbells_mapped(&self) -> bool {
        self.doorbells.mapped()
    }

    /// How often the daemon switched the doorbells.
    pub fn doorbell_switches(&self) -> u64 {
        self.doorbells.switches()
    }

    /// Answer requests of the back-end channel with errors, or do not any more.
    pub fn refuse_back_channel(&self, on: bool) {
        self.doorbells.refuse(on);
    }

    /// Plug memory.
    ///
    /// # Errors
    ///
    /// The daemon refused it.
    pub fn add_memory(&self, gpa: u64, len: u64) -> Result<Arc<MemoryRegion>, FrontEndError> {
        self.add_region(MemoryRegion::new(gpa, len)?)
    }

    /// Plug memory that the caller made.
    ///
    /// # Errors
    ///
    /// The daemon refused it.
    pub fn add_region(
        &self,
        region: Arc<MemoryRegion>,
    ) -> Result<Arc<MemoryRegion>, FrontEndError> {
        self.map_file(region.gpa, region.len, 0, &region.file)?;
        self.memory.add(Arc::clone(&region));
        Ok(region)
    }

    /// Unplug memory. When this returns nothing of the daemon uses it.
    ///
    /// # Errors
    ///
    /// There is no such region, or the daemon refused.
    pub fn remove_memory(&self, gpa: u64) -> Result<Arc<MemoryRegion>, FrontEndError> {
        let region = self
            .memory
            .remove(gpa)
            .ok_or_else(|| FrontEndError::Wrong(format!("no region at {gpa:#x}")))?;
        self.unmap(region.gpa, region.len)?;
        Ok(region)
    }

    /// Show the daemon `len` bytes of a file from `offset` on, and nobody else.
    ///
    /// # Errors
    ///
    /// The daemon refused it.
    pub fn map_file(
        &self,
        gpa: u64,
        len: u64,
        offset: u64,
        file: &File,
    ) -> Result<(), FrontEndError> {
        match &self.wire {
            Wire::VhostUser(session) => session.ask("ADD_MEM_REG", |socket| {
                session::add_memory(socket, gpa, len, offset, file)
            }),
            Wire::VfioUser(wire, _) => {
                let body = vfio::map_body(vfio::READ_WRITE, offset, gpa, len);
                let mapped = wire.request(vfio::DMA_MAP, &body, &[file.as_fd()]);
                client("DMA_MAP", mapped).map(|_| ())
            }
        }
    }

    /// Take memory away from the daemon, whether it is there or not.
    ///
    /// # Errors
    ///
    /// The daemon refused it.
    pub fn unmap(&self, gpa: u64, len: u64) -> Result<(), FrontEndError> {
        match &self.wire {
            Wire::VhostUser(session) => session.ask("REM_MEM_REG", |socket| {
                socket.remove_mem_region(&session::info(gpa, len, 0, -1))
            }),
            Wire::VfioUser(wire, _) => client("DMA_UNMAP", wire.unmap(gpa, len)),
        }
    }

    /// Replace the whole table by what there is now: `SET_MEM_TABLE`, or all taken away and given back in halves, without a wait in
    /// between.
    ///
    /// # Errors
    ///
    /// The daemon refused it.
    pub fn set_memory_table(&self) -> Result<(), FrontEndError> {
        let regions = self.memory.regions();
        match &self.wire {
            Wire::VhostUser(session) => session.ask("SET_MEM_TABLE", |socket| {
                session::set_memory(socket, &regions)
            }),
            Wire::VfioUser(wire, _) => {
                let away = vfio::unmap_body(0, 0, u64::MAX);
                let mut requests = vec![(vfio::DMA_UNMAP, away, None)];
                for r in &regions {
                    let half = r.len / 2;
                    for offset in [0, half] {
                        let body = vfio::map_body(vfio::READ_WRITE, offset, r.gpa + offset, half);
                        requests.push((vfio::DMA_MAP, body, Some(r.file.as_fd())));
                    }
                }
                client("DMA_MAP", wire.burst(&requests))
            }
        }
    }

    /// Function level reset or system reset.
    ///
    /// # Errors
    ///
    /// The daemon refused it.
    pub fn reset_device(&self) -> Result<(), FrontEndError> {
        match &self.wire {
            Wire::VhostUser(session) => {
                session.ask("RESET_DEVICE", |socket| socket.reset_device())?;
                session.is_used(false);
                session.ask("SET_FEATURES", |socket| socket.set_features(FEATURES))?;
                session::enable_vrings(&session.socket()?, self)
            }
            Wire::VfioUser(wire, _) => {
                client("DEVICE_RESET", wire.request(vfio::RESET, &[], &[])).map(|_| ())
            }
        }
    }

    /// Read registers.
    ///
    /// # Errors
    ///
    /// The connection is gone.
    pub fn read(&self, offset: u32, out: &mut [u8]) -> Result<(), FrontEndError> {
        match &self.wire {
            Wire::VhostUser(session) => session.ask("GET_CONFIG", |socket| {
                session::read_config(socket, offset, out)
            }),
            Wire::VfioUser(wire, _) => {
                client("REGION_READ", wire.read(vfio::BAR0, offset.into(), out))
            }
        }
    }

    /// Write registers.
    ///
    /// # Errors
    ///
    /// The connection is gone.
    pub fn write(&self, offset: u32, bytes: &[u8]) -> Result<(), FrontEndError> {
        match &self.wire {
            Wire::VhostUser(session) => {
                // What is asked again after the daemon came back may have been done before: that does no harm.
                session.is_used(true);
                session.ask("SET_CONFIG", |socket| {
                    socket.set_config(offset, VhostUserConfigFlags::WRITABLE, bytes)
                })
            }
            Wire::VfioUser(wire, _) => {
                let written = wire.write(vfio::BAR0, offset.into(), bytes);
                client("REGION_WRITE", written)
            }
        }
    }

    /// The call eventfd of a vector, for a thread of its own.
    ///
    /// # Errors
    ///
    /// File descriptors ran out.
    pub fn call(&self, vector: u16) -> io::Result<Option<File>> {
        match self.calls.get(usize::from(vector)) {
            None => Ok(None),
            Some(call) => Ok(Some(borrow(call).try_clone_to_owned()?.into())),
        }
    }

    /// A doorbell by its byte offset in the window. Any aligned offset inside the window is one, as for a guest.
    pub fn bell(&self, offset: u64) -> Option<GuestBell> {
        let word = SharedWord::in_guest(&self.window(), offset)?;
        let queue = usize::try_from(offset / (u64::from(self.stride.bytes()) * 2)).ok()?;
        let kicks = self.kicks.read().unwrap_or_else(PoisonError::into_inner);
        let kick = match kicks.get(queue) {
            Some(kick) => Some(borrow(kick.as_ref()).try_clone_to_owned().ok()?.into()),
            None => None,
        };
        Some(GuestBell {
            word,
            kick,
            doorbells: Arc::clone(&self.doorbells),
        })
    }
}

fn other(e: FrontEndError) -> io::Error {
    io::Error::other(e)
}

impl Device for FrontEnd {
    type Bell = GuestBell;

    fn read32(&mut self, offset: u32) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes).map_err(other)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn read64(&mut self, offset: u32) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.read(offset, &mut bytes).map_err(other)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn write32(&mut self, offset: u32, value: u32) -> io::Result<()> {
        self.write(offset, &value.to_le_bytes()).map_err(other)
    }

    fn write64(&mut self, offset: u32, value: u64) -> io::Result<()> {
        self.write(offset, &value.to_le_bytes()).map_err(other)
    }

    fn doorbell(&mut self, offset: u64) -> io::Result<GuestBell> {
        self.bell(offset)
            .ok_or_else(|| io::Error::other(format!("no doorbell at {offset:#x}")))
    }

    fn allocate(&mut self, bytes: usize, _: Access) -> io::Result<Dma> {
        self.memory.allocate(bytes)
    }

    fn interrupt(&mut self, vector: u16) -> io::Result<Option<File>> {
        self.call(vector)
    }
}
