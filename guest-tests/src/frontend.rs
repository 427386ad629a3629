//! The VMM's side of a socket, as `docs/VHOST_USER.md` describes it, and the device a driver sees through it.

use std::fs::File;
use std::io::{self, Write as _};
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{Ordering, compiler_fence, fence};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use nvme_spec::doorbell::DoorbellStride;
use nvme_spec::regs::{Cap, offset};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures as P,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vhost_user_nvme::driver::{Device, Dma, Doorbell};
use vhost_user_nvme::memory::{GuestMap, SharedWord};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::fence::borrow;
use crate::handler::{Channel, Doorbells};
use crate::memory::{GuestMemory, MemoryRegion};

/// First byte of the front-end page.
pub const PAGE: u32 = 0xF00;
/// What its first dword holds: "NVME".
pub const MAGIC: u32 = 0x454D_564E;
/// Where the instance id is written.
pub const INSTANCE: u32 = 0xF20;

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
    /// What the operating system says.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The daemon said something it must not.
    #[error("the daemon is wrong: {0}")]
    Wrong(String),
}

fn message<T>(what: &'static str, result: Result<T, vhost::Error>) -> Result<T, FrontEndError> {
    result.map_err(|source| FrontEndError::Message { what, source })
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
    socket: Frontend,
    doorbells: Arc<Doorbells>,
    window: Arc<GuestMap>,
    window_bytes: u32,
    pci_ids: [u16; 4],
    stride: DoorbellStride,
    calls: Vec<EventFd>,
    kicks: RwLock<Vec<Arc<EventFd>>>,
    memory: GuestMemory,
    _back: Channel,
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

    /// Connect and go through the whole sequence of `docs/VHOST_USER.md`.
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
        let mut socket = Frontend::from_stream(stream, 64);
        let features = message("GET_FEATURES", socket.get_features())?;
        if features & FEATURES != FEATURES {
            return Err(FrontEndError::Wrong(format!("features {features:#x}")));
        }
        let offered = message("GET_PROTOCOL_FEATURES", socket.get_protocol_features())?;
        if !offered.contains(NEEDED) {
            return Err(FrontEndError::Wrong(format!(
                "protocol features {offered:?}"
            )));
        }
        message(
            "SET_PROTOCOL_FEATURES",
            socket.set_protocol_features(NEEDED),
        )?;
        // Every message is acknowledged from here on: an error is noticed where it happens.
        socket.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        message("SET_OWNER", socket.set_owner())?;
        message("SET_FEATURES", socket.set_features(FEATURES))?;
        let queues = message("GET_QUEUE_NUM", socket.get_queue_num())?;
        let shmem = message("GET_SHMEM_CONFIG", socket.get_shmem_config())?;

        let mut page = [0; 0x20];
        read_config(&mut socket, PAGE, &mut page)?;
        let half = |at: usize| u16::from_le_bytes([page[at], page[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        let window_bytes = word(8);
        let sizes = [shmem.memory_sizes[0], shmem.memory_sizes[1]];
        if word(0) != MAGIC
            || word(4) != 1
            || window_bytes == 0
            || !window_bytes.is_multiple_of(4096)
            || u64::from(half(0xC)) != queues
            || shmem.nregions != 2
            || sizes != [u64::from(window_bytes); 2]
        {
            return Err(FrontEndError::Wrong(format!(
                "front-end page {page:x?}, {queues} vrings, shared memory {sizes:x?}"
            )));
        }
        let pci_ids = [0x10, 0x12, 0x14, 0x16].map(half);
        message(
            "SET_CONFIG of the instance",
            socket.set_config(INSTANCE, VhostUserConfigFlags::WRITABLE, &setup.instance),
        )?;
        let doorbells = Arc::new(Doorbells::default());
        let back = Channel::serve(Arc::clone(&doorbells), |theirs| {
            message("SET_BACKEND_REQ_FD", socket.set_backend_request_fd(theirs))
        })?;
        let window = doorbells
            .window(Duration::from_secs(5))
            .ok_or_else(|| FrontEndError::Wrong("it never mapped the doorbell window".into()))?;

        let mut cap = [0; 8];
        read_config(&mut socket, offset::CAP, &mut cap)?;
        let cap = Cap::from_bits(u64::from_le_bytes(cap));
        let eventfd = || EventFd::new(EFD_NONBLOCK);
        let count = usize::try_from(queues).unwrap_or(0);
        let front = Link {
            socket,
            doorbells,
            window,
            window_bytes,
            pci_ids,
            stride: DoorbellStride::new(cap.dstrd()),
            calls: (0..count).map(|_| eventfd()).collect::<Result<_, _>>()?,
            kicks: RwLock::new(
                (0..count)
                    .map(|_| eventfd().map(Arc::new))
                    .collect::<Result<_, _>>()?,
            ),
            memory: GuestMemory::default(),
            _back: back,
        };
        for (gpa, len) in &setup.memory {
            front.add_memory(*gpa, *len)?;
        }
        front.set_vrings()?;
        Ok(Self(Arc::new(front)))
    }
}

impl Link {
    fn set_vrings(&self) -> Result<(), FrontEndError> {
        let kicks = self.kicks.read().unwrap_or_else(PoisonError::into_inner);
        for (i, (call, kick)) in self.calls.iter().zip(kicks.iter()).enumerate() {
            message("SET_VRING_CALL", self.socket.set_vring_call(i, call))?;
            message("SET_VRING_KICK", self.socket.set_vring_kick(i, kick))?;
        }
        drop(kicks);
        self.enable_vrings()
    }

    fn enable_vrings(&self) -> Result<(), FrontEndError> {
        for i in 0..self.calls.len() {
            let mut socket = self.socket.clone();
            message("SET_VRING_ENABLE", socket.set_vring_enable(i, true))?;
        }
        Ok(())
    }

    /// The socket, for messages out of the ordinary.
    pub fn socket(&self) -> Frontend {
        self.socket.clone()
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
        message(
            "ADD_MEM_REG",
            self.socket.clone().add_mem_region(&info(&region)),
        )?;
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
        message(
            "REM_MEM_REG",
            self.socket.clone().remove_mem_region(&info(&region)),
        )?;
        Ok(region)
    }

    /// Replace the whole table by what there is now (`SET_MEM_TABLE`).
    ///
    /// # Errors
    ///
    /// The daemon refused it.
    pub fn set_memory_table(&self) -> Result<(), FrontEndError> {
        let infos: Vec<_> = self.memory.regions().iter().map(|r| info(r)).collect();
        message("SET_MEM_TABLE", self.socket.set_mem_table(&infos)).map(|_| ())
    }

    /// Function level reset or system reset.
    ///
    /// # Errors
    ///
    /// The daemon refused it.
    pub fn reset_device(&self) -> Result<(), FrontEndError> {
        message("RESET_DEVICE", self.socket.clone().reset_device())?;
        message("SET_FEATURES", self.socket.set_features(FEATURES))?;
        self.enable_vrings()
    }

    /// Read registers.
    ///
    /// # Errors
    ///
    /// The connection is gone.
    pub fn read(&self, offset: u32, out: &mut [u8]) -> Result<(), FrontEndError> {
        read_config(&mut self.socket.clone(), offset, out)
    }

    /// Write registers.
    ///
    /// # Errors
    ///
    /// The connection is gone.
    pub fn write(&self, offset: u32, bytes: &[u8]) -> Result<(), FrontEndError> {
        message(
            "SET_CONFIG",
            self.socket
                .clone()
                .set_config(offset, VhostUserConfigFlags::WRITABLE, bytes),
        )
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
        let word = SharedWord::in_guest(&self.window, offset)?;
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

fn info(region: &MemoryRegion) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: region.gpa,
        memory_size: region.len,
        userspace_addr: region.user_addr(),
        mmap_offset: 0,
        mmap_handle: region.file.as_raw_fd(),
    }
}

fn read_config(socket: &mut Frontend, offset: u32, out: &mut [u8]) -> Result<(), FrontEndError> {
    let size = out.len() as u32;
    let (_, payload) = message(
        "GET_CONFIG",
        socket.get_config(offset, size, VhostUserConfigFlags::WRITABLE, out),
    )?;
    out.copy_from_slice(&payload);
    Ok(())
}

/// A doorbell as the guest sees it: a store, and an exit with a kick when it is trapped.
pub struct GuestBell {
    word: SharedWord,
    kick: Option<File>,
    doorbells: Arc<Doorbells>,
}

impl GuestBell {
    /// What the window holds.
    pub fn value(&self) -> u32 {
        self.word.load()
    }

    /// Store without a kick, whatever the mode.
    pub fn store(&self, value: u32) {
        self.word.store(value);
    }

    /// Kick without a store.
    pub fn kick(&self) {
        if let Some(mut kick) = self.kick.as_ref() {
            // It is full only if it is signalled already.
            let _ = kick.write(&1u64.to_ne_bytes());
        }
    }
}

impl GuestBell {
    /// As [`Doorbell::ring`], as cheap as a guest does it: with mapped doorbells one plain store. The fence that is missing is made by
    /// whoever unmaps them, where the kernel lets it (`membarrier`).
    #[inline]
    pub fn ring_plainly(&self, value: u32) {
        self.word.store(value);
        compiler_fence(Ordering::SeqCst);
        if !self.doorbells.mapped_for_plain_rings() {
            fence(Ordering::SeqCst);
            if !self.doorbells.mapped() {
                self.kick();
            }
        }
    }
}

impl Doorbell for GuestBell {
    #[inline]
    fn ring(&self, value: u32) {
        self.word.store(value);
        fence(Ordering::SeqCst);
        if !self.doorbells.mapped() {
            self.kick();
        }
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

    fn allocate(&mut self, bytes: usize) -> io::Result<Dma> {
        self.memory.allocate(bytes)
    }

    fn interrupt(&mut self, vector: u16) -> io::Result<Option<File>> {
        self.call(vector)
    }
}
