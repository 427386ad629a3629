//! The daemon's socket as vhost-user: a connection, and the next one when the daemon comes back.

use std::fs::File;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use nvme_spec::doorbell::DoorbellStride;
use nvme_spec::regs::{Cap, offset};
use rustix::event::{PollFd, PollFlags};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag};
use vhost::vhost_user::{Error as Protocol, Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vhost_user_nvme::memory::GuestMap;

use crate::frontend::{
    FEATURES, FrontEndError, GO, INSTANCE, KEPT, Link, MAGIC, NEEDED, PAGE, message,
};
use crate::handler::{Channel, Doorbells};
use crate::memory::MemoryRegion;

/// No answer takes longer, not even that of a daemon that first has to wait for what its predecessor left.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the daemon says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Of the front-end page: that of a daemon of before *go* is 1.
    version: u32,
    pub(crate) queues: u16,
    pub(crate) window_bytes: u32,
    pub(crate) pci_ids: [u16; 4],
    pub(crate) stride: DoorbellStride,
}

/// One connection.
pub(crate) struct Connection {
    socket: Frontend,
    /// The same socket, to watch it and to end it.
    stream: UnixStream,
    window: Arc<GuestMap>,
    _back: Channel,
}

impl Connection {
    /// Steps 1 to 8 of `docs/VHOST_USER.md`.
    pub(crate) fn open(
        stream: UnixStream,
        instance: [u8; 16],
        doorbells: &Arc<Doorbells>,
    ) -> Result<(Self, Shape), FrontEndError> {
        let watched = stream.try_clone()?;
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
        message("GET_CONFIG", read_config(&mut socket, PAGE, &mut page))?;
        let half = |at: usize| u16::from_le_bytes([page[at], page[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        let window_bytes = word(8);
        let sizes = [shmem.memory_sizes[0], shmem.memory_sizes[1]];
        if word(0) != MAGIC
            || !(1..=2).contains(&word(4))
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
        message(
            "SET_CONFIG of the instance",
            socket.set_config(INSTANCE, VhostUserConfigFlags::WRITABLE, &instance),
        )?;
        doorbells.forget_window();
        let back = Channel::serve(Arc::clone(doorbells), |theirs| {
            message("SET_BACKEND_REQ_FD", socket.set_backend_request_fd(theirs))
        })?;
        let window = await_window(doorbells, &watched)?;

        let mut cap = [0; 8];
        message(
            "GET_CONFIG",
            read_config(&mut socket, offset::CAP, &mut cap),
        )?;
        let cap = Cap::from_bits(u64::from_le_bytes(cap));
        let shape = Shape {
            version: word(4),
            queues: half(0xC),
            window_bytes,
            pci_ids: [0x10, 0x12, 0x14, 0x16].map(half),
            stride: DoorbellStride::new(cap.dstrd()),
        };
        let connection = Self {
            socket,
            stream: watched,
            window,
            _back: back,
        };
        Ok((connection, shape))
    }
}

/// The window, which the daemon maps by itself; it may be killed before it does.
fn await_window(
    doorbells: &Doorbells,
    stream: &UnixStream,
) -> Result<Arc<GuestMap>, FrontEndError> {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        if let Some(window) = doorbells.window(Duration::from_millis(10)) {
            return Ok(window);
        }
        let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let ended = rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0);
        if ended || Instant::now() > end {
            return Err(FrontEndError::Wrong(
                "it never mapped the doorbell window".into(),
            ));
        }
    }
}

/// What becomes of the connections.
struct Now {
    /// The one there is, or the last there was.
    connection: Connection,
    up: bool,
    /// Those so far.
    number: u64,
    /// Nobody waits for another one any more, and why.
    given_up: Option<String>,
    /// How long each loss lasted.
    gaps: Vec<Duration>,
    /// It comes back.
    survives: bool,
}

/// All connections of one front-end.
pub struct Session {
    instance: [u8; 16],
    shape: Shape,
    now: Mutex<Now>,
    changed: Condvar,
    /// The guest has written to a register since the last reset.
    used: AtomicBool,
    /// It does not connect again for now.
    away: AtomicBool,
}

impl Session {
    pub(crate) fn new(connection: Connection, shape: Shape, instance: [u8; 16]) -> Self {
        Self {
            instance,
            shape,
            now: Mutex::new(Now {
                connection,
                up: true,
                number: 1,
                given_up: None,
                gaps: Vec::new(),
                survives: false,
            }),
            changed: Condvar::new(),
            used: AtomicBool::new(false),
            away: AtomicBool::new(false),
        }
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits while the daemon is away.
    fn up(&self) -> Result<MutexGuard<'_, Now>, FrontEndError> {
        let mut now = self.now();
        loop {
            if let Some(why) = &now.given_up {
                return Err(FrontEndError::Wrong(why.clone()));
            }
            if now.up {
                return Ok(now);
            }
            now = self
                .changed
                .wait(now)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The socket of now.
    pub(crate) fn socket(&self) -> Result<Frontend, FrontEndError> {
        Ok(self.up()?.connection.socket.clone())
    }

    pub(crate) fn window(&self) -> Arc<GuestMap> {
        Arc::clone(&self.now().connection.window)
    }

    /// Connections so far.
    pub fn connections(&self) -> u64 {
        self.now().number
    }

    /// How long the daemon was away each time, as this front-end saw it.
    pub fn gaps(&self) -> Vec<Duration> {
        self.now().gaps.clone()
    }

    /// Whether *go* says that the guest has used the device.
    pub fn is_used(&self, used: bool) {
        self.used.store(used, Ordering::Release);
    }

    /// Ask, and ask the next daemon if this one goes: what is asked must be idempotent.
    pub(crate) fn ask<T>(
        &self,
        what: &'static str,
        mut f: impl FnMut(&mut Frontend) -> Result<T, vhost::Error>,
    ) -> Result<T, FrontEndError> {
        loop {
            let now = self.up()?;
            let (mut socket, number, survives) =
                (now.connection.socket.clone(), now.number, now.survives);
            drop(now);
            match f(&mut socket) {
                Err(e) if survives && !is_refusal(&e) => {
                    let mut now = self.now();
                    if now.number == number {
                        // Whatever it was, this connection is not to be used any more; whoever watches it makes the next one.
                        let _ = now.connection.stream.shutdown(Shutdown::Both);
                        now.up = false;
                    }
                }
                result => return message(what, result),
            }
        }
    }

    /// Step 11, of which an older daemon knows nothing: `scripts/bench host --against` measures such.
    pub(crate) fn go(&self, socket: &mut Frontend) -> Result<(), FrontEndError> {
        if self.shape.version < 2 {
            return Ok(());
        }
        let go = 1 | u32::from(self.used.load(Ordering::Acquire)) << 1;
        message(
            "SET_CONFIG of go",
            socket.set_config(GO, VhostUserConfigFlags::WRITABLE, &go.to_le_bytes()),
        )
    }

    /// What the daemon has kept for this instance.
    ///
    /// # Errors
    ///
    /// The connection is gone.
    pub fn kept(&self) -> Result<u32, FrontEndError> {
        let mut out = [0; 4];
        self.ask("GET_CONFIG", |socket| read_config(socket, KEPT, &mut out))?;
        Ok(u32::from_le_bytes(out))
    }

    /// Whether it makes no connections for now, as a VMM that is busy elsewhere. One that there is stays.
    pub fn stay_away(&self, away: bool) {
        self.away.store(away, Ordering::Release);
    }

    /// End the connection, as if the daemon had; a front-end that survives makes the next one.
    pub fn cut(&self) {
        let _ = self.now().connection.stream.shutdown(Shutdown::Both);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // The one who watches has a copy of the socket.
        self.cut();
    }
}

/// An answer, and not the end of the connection.
fn is_refusal(e: &vhost::Error) -> bool {
    matches!(
        e,
        vhost::Error::VhostUserProtocol(Protocol::BackendInternalError)
    )
}

/// Watch the connection of `link`, and make the next one whenever it ends.
pub(crate) fn survive(
    link: &Arc<Link>,
    path: &Path,
    patience: Duration,
) -> Result<(), FrontEndError> {
    let session = link.session();
    let mut now = session.now();
    now.survives = true;
    let watch = Watch {
        link: Arc::downgrade(link),
        path: path.to_owned(),
        patience,
    };
    let stream = now.connection.stream.try_clone()?;
    drop(now);
    std::thread::Builder::new()
        .name("virtual-guest-watch".into())
        .spawn(move || watch.run(stream))?;
    Ok(())
}

struct Watch {
    link: Weak<Link>,
    path: PathBuf,
    patience: Duration,
}

impl Watch {
    fn run(&self, mut stream: UnixStream) {
        loop {
            // Nothing but its end: answers are read by whoever asked.
            let mut fds = [PollFd::new(&stream, PollFlags::RDHUP)];
            while rustix::event::poll(&mut fds, None).is_err() {}
            let begin = Instant::now();
            let mut last = None;
            stream = loop {
                let Some(link) = self.link.upgrade() else {
                    return;
                };
                let session = link.session();
                session.now().up = false;
                link.doorbells.take_back();
                if begin.elapsed() > self.patience {
                    session.now().given_up = Some(format!("it does not come back: {last:?}"));
                    session.changed.notify_all();
                    return;
                }
                match self.attempt(&link, begin) {
                    Ok(stream) => break stream,
                    Err(e) => last = Some(e),
                }
                drop(link);
                std::thread::sleep(Duration::from_millis(1));
            };
        }
    }

    fn attempt(&self, link: &Link, begin: Instant) -> Result<UnixStream, FrontEndError> {
        let session = link.session();
        if session.away.load(Ordering::Acquire) {
            return Err(FrontEndError::Wrong("it is to stay away".into()));
        }
        let stream = UnixStream::connect(&self.path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let (mut connection, shape) = Connection::open(stream, session.instance, &link.doorbells)?;
        if shape != session.shape {
            return Err(FrontEndError::Wrong(format!("it is {shape:?} now")));
        }
        for region in link.memory().regions() {
            let r = &region;
            let added = add_memory(&mut connection.socket, r.gpa, r.len, 0, &r.file);
            message("ADD_MEM_REG", added)?;
        }
        send_vrings(&connection.socket, link)?;
        session.go(&mut connection.socket)?;
        let kicks = link.kicks.read().unwrap_or_else(PoisonError::into_inner);
        for eventfd in kicks.iter().map(Arc::as_ref).chain(&link.calls) {
            // It is full only if it is signalled already.
            let _ = eventfd.write(1);
        }
        drop(kicks);
        let watched = connection.stream.try_clone()?;
        let mut now = session.now();
        let before = std::mem::replace(&mut now.connection, connection);
        now.up = true;
        now.number += 1;
        now.gaps.push(begin.elapsed());
        session.changed.notify_all();
        drop(now);
        // Its thread is waited for.
        drop(before);
        Ok(watched)
    }
}

/// Step 10 of all vrings.
pub(crate) fn send_vrings(socket: &Frontend, link: &Link) -> Result<(), FrontEndError> {
    let kicks = link.kicks.read().unwrap_or_else(PoisonError::into_inner);
    for (i, (call, kick)) in link.calls.iter().zip(kicks.iter()).enumerate() {
        message("SET_VRING_CALL", socket.set_vring_call(i, call))?;
        message("SET_VRING_KICK", socket.set_vring_kick(i, kick))?;
    }
    drop(kicks);
    enable_vrings(socket, link)
}

pub(crate) fn enable_vrings(socket: &Frontend, link: &Link) -> Result<(), FrontEndError> {
    for i in 0..link.calls.len() {
        let enabled = socket.clone().set_vring_enable(i, true);
        message("SET_VRING_ENABLE", enabled)?;
    }
    Ok(())
}

pub(crate) fn add_memory(
    socket: &mut Frontend,
    gpa: u64,
    len: u64,
    offset: u64,
    file: &File,
) -> Result<(), vhost::Error> {
    socket
        .add_mem_region(&info(gpa, len, offset, file.as_raw_fd()))
        .map(drop)
}

pub(crate) fn set_memory(
    socket: &mut Frontend,
    regions: &[Arc<MemoryRegion>],
) -> Result<(), vhost::Error> {
    let infos: Vec<_> = regions
        .iter()
        .map(|r| info(r.gpa, r.len, 0, r.file.as_raw_fd()))
        .collect();
    socket.set_mem_table(&infos).map(drop)
}

pub(crate) fn info(gpa: u64, len: u64, offset: u64, file: i32) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: gpa,
        memory_size: len,
        // Where this process would have mapped it: an identity, no more.
        userspace_addr: 0x7000_0000_0000_u64.saturating_add(gpa),
        mmap_offset: offset,
        mmap_handle: file,
    }
}

pub(crate) fn read_config(
    socket: &mut Frontend,
    offset: u32,
    out: &mut [u8],
) -> Result<(), vhost::Error> {
    let size = out.len() as u32;
    let (_, payload) = socket.get_config(offset, size, VhostUserConfigFlags::WRITABLE, out)?;
    if payload.len() != out.len() {
        return Err(Protocol::InvalidMessage.into());
    }
    out.copy_from_slice(&payload);
    Ok(())
}
