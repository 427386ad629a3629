//! The thread that owns the admin side of an SSD: what it is asked, and its loop.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use nvme_spec::admin::Identify;
use nvme_spec::identify::{Cns, Csi, NvmControllerIdentify, NvmNamespaceIdentify};
use nvme_spec::log::{ErrorLogEntry, LogId, SmartLog};
use rustix::event::{PollFd, PollFlags, Timespec};
use zerocopy::FromBytes as _;

use super::link::{Pair, Shared, Wish, clear, lock};
use super::opening::{Entry, Opening};
use super::{Facts, SsdNamespace};
use crate::driver::{
    Access, AnyDevice, Device, Dma, Doorbell, Driver, DriverError, Options, bringup,
};

/// Asynchronous Event Requests to have out.
const EVENTS: u32 = 4;

/// Entries of the error log that are read.
const ERRORS: usize = 64;

/// What a keeper can be asked. The sender is for the answer; it is dropped without one when the keeper ends.
pub(super) enum Ask {
    Lane(Opening),
    Namespaces(Sender<Result<Vec<u32>, DriverError>>),
    Namespace(u32, Sender<Result<SsdNamespace, DriverError>>),
    Smart(Sender<Result<SmartLog, DriverError>>),
    ErrorLog(Sender<Result<Vec<ErrorLogEntry>, DriverError>>),
    /// By any lane there is.
    Flush(Wish),
    Reset,
}

/// What is wrong with the controller.
#[derive(Debug)]
pub(super) enum Trouble {
    /// It needs a reset.
    Reset(String),
    /// It is not there any more, or is wanted elsewhere.
    Gone(String),
}

/// The device: the driver's handle, and the keeper's, who can let go of it.
#[derive(Clone)]
pub(super) struct Handle(Arc<Mutex<Option<AnyDevice>>>);

impl Handle {
    fn with<T>(&self, f: impl FnOnce(&mut AnyDevice) -> io::Result<T>) -> io::Result<T> {
        match lock(&self.0).as_mut() {
            Some(device) => f(device),
            None => Err(io::Error::new(
                io::ErrorKind::NotConnected,
                "the device was let go of",
            )),
        }
    }

    /// Let go of the device.
    pub(super) fn release(&self) {
        let device = lock(&self.0).take();
        drop(device);
    }
}

impl Device for Handle {
    type Bell = Box<dyn Doorbell>;

    fn read32(&mut self, offset: u32) -> io::Result<u32> {
        self.with(|d| d.read32(offset))
    }

    fn read64(&mut self, offset: u32) -> io::Result<u64> {
        self.with(|d| d.read64(offset))
    }

    fn write32(&mut self, offset: u32, value: u32) -> io::Result<()> {
        self.with(|d| d.write32(offset, value))
    }

    fn write64(&mut self, offset: u32, value: u64) -> io::Result<()> {
        self.with(|d| d.write64(offset, value))
    }

    fn doorbell(&mut self, offset: u64) -> io::Result<Self::Bell> {
        self.with(|d| d.doorbell(offset))
    }

    fn allocate(&mut self, bytes: usize, access: Access) -> io::Result<Dma> {
        self.with(|d| d.allocate(bytes, access))
    }

    fn interrupt(&mut self, vector: u16) -> io::Result<Option<File>> {
        self.with(|d| d.interrupt(vector))
    }

    fn hard_reset(&mut self) -> io::Result<bool> {
        self.with(|d| d.hard_reset())
    }

    fn isolate(&mut self) -> io::Result<()> {
        self.with(|d| d.isolate())
    }

    fn removal(&mut self) -> io::Result<Option<File>> {
        self.with(|d| d.removal())
    }
}

pub(super) struct Keeper {
    pub(super) shared: Arc<Shared>,
    asks: Receiver<Ask>,
    /// What was asked during a reset.
    later: VecDeque<Ask>,
    pub(super) handle: Handle,
    /// None when the SSD is gone.
    pub(super) driver: Option<Driver<Handle>>,
    pub(super) lanes: Vec<Entry>,
    pub(super) facts: Facts,
    /// Lanes are woken by the device.
    pub(super) interrupts: bool,
    pub(super) admin_interrupt: Option<File>,
    pub(super) removal: Option<File>,
    /// Abort commands that are out, by the number of their answer, with the time they were sent.
    pub(super) aborts: Vec<(u64, Instant)>,
    pub(super) resets: VecDeque<Instant>,
    pub(super) trouble: Option<Trouble>,
    tick: Duration,
    next_tick: Instant,
    /// When the health is read again.
    pub(super) next_health: Instant,
    /// Events of this tick: a device that reports without end is listened to now and then.
    pub(super) events_heard: u32,
    /// The highest error count of the error log that was told of.
    pub(super) errors_told: u64,
}

impl Keeper {
    /// Bring the device up.
    pub(super) fn start(
        device: AnyDevice,
        shared: Arc<Shared>,
        asks: Receiver<Ask>,
    ) -> Result<(Self, Facts), DriverError> {
        let mut handle = Handle(Arc::new(Mutex::new(Some(device))));
        let options = driver_options(&shared);
        let keeper = Self::over(handle.clone(), shared, asks);
        if keeper.is_err() {
            // It must not go on using memory that is about to be freed.
            let _ = bringup::stop(&mut handle, &options);
        }
        keeper
    }

    fn over(
        mut handle: Handle,
        shared: Arc<Shared>,
        asks: Receiver<Ask>,
    ) -> Result<(Self, Facts), DriverError> {
        let mut driver = Driver::bring_up(handle.clone(), driver_options(&shared))?;
        let granted = set_up(&mut driver, shared.options.queue_pairs.max(1))?;
        let facts = Facts {
            identify: *driver.identify(),
            cap: driver.cap(),
            version: driver.version()?,
            nvm: read_limits(&mut driver)?,
            max_transfer: driver.max_transfer(),
            queue_pairs: granted,
        };
        let mut vectors = Vec::new();
        while shared.options.interrupts
            && vectors.len() <= usize::from(granted)
            && let Some(file) = handle
                .interrupt(vectors.len() as u16)
                .map_err(DriverError::device("setting up an interrupt"))?
        {
            vectors.push(file);
        }
        let interrupts = !vectors.is_empty();
        {
            let mut seats = lock(&shared.seats);
            (seats.granted, seats.vectors) = (granted, vectors);
        }
        let removal = handle
            .removal()
            .map_err(DriverError::device("asking to be told of a removal"))?;
        let admin_interrupt = interrupt_of(driver.admin_queue());
        let tick = tick(&shared);
        let keeper = Self {
            shared,
            asks,
            later: VecDeque::new(),
            handle,
            driver: Some(driver),
            lanes: Vec::new(),
            facts,
            interrupts,
            admin_interrupt,
            removal,
            aborts: Vec::new(),
            resets: VecDeque::new(),
            trouble: None,
            tick,
            next_tick: Instant::now() + tick,
            next_health: Instant::now(),
            events_heard: 0,
            errors_told: 0,
        };
        Ok((keeper, facts))
    }

    /// Serve until told to stop.
    pub(super) fn run(mut self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            self.wait(self.next_tick.saturating_duration_since(Instant::now()));
            self.answer_all();
            self.read_mail();
            self.admin_news();
            if Instant::now() >= self.next_tick {
                self.next_tick = Instant::now() + self.tick;
                self.ticked();
            }
            if let Some(trouble) = self.trouble.take() {
                self.recover(trouble);
            }
        }
        self.end();
    }

    /// Sleep until something happens, at most `limit`.
    pub(super) fn wait(&mut self, limit: Duration) {
        let timeout = Timespec::try_from(limit).ok();
        let mut fds = vec![PollFd::from_borrowed_fd(self.shared.fd(), PollFlags::IN)];
        let files = [&self.admin_interrupt, &self.removal];
        fds.extend(
            files
                .into_iter()
                .flatten()
                .map(|f| PollFd::new(f, PollFlags::IN)),
        );
        let _ = rustix::event::poll(&mut fds, timeout.as_ref());
        clear(self.shared.fd());
        let mut back = false;
        for file in files.into_iter().flatten() {
            if rustix::io::read(file.as_fd(), &mut [0u8; 8]).is_ok()
                && self.removal.as_ref().is_some_and(|r| std::ptr::eq(r, file))
            {
                back = true;
            }
        }
        if back {
            self.note(Trouble::Gone("the host takes the device back".into()));
        }
    }

    /// Make the lanes that are asked for; the rest waits.
    pub(super) fn answer_lanes(&mut self) {
        for ask in std::iter::from_fn(|| self.asks.try_recv().ok()).collect::<Vec<_>>() {
            match ask {
                Ask::Lane(opening) => self.open(opening),
                later => self.later.push_back(later),
            }
        }
    }

    /// Answer all that is asked.
    pub(super) fn answer_all(&mut self) {
        while let Some(ask) = self.later.pop_front().or_else(|| self.asks.try_recv().ok()) {
            match ask {
                Ask::Lane(opening) => self.open(opening),
                Ask::Namespaces(answer) => {
                    let list = self.with_driver(Driver::namespaces);
                    let _ = answer.send(list);
                }
                Ask::Namespace(nsid, answer) => {
                    let namespace = self.with_driver(|d| read_namespace(d, nsid));
                    let _ = answer.send(namespace);
                }
                Ask::Smart(answer) => {
                    let smart = self.read_health(false);
                    let _ = answer.send(smart);
                }
                Ask::ErrorLog(answer) => {
                    let entries = usize::from(self.facts.identify.elpe_z) + 1;
                    let log = self.with_driver(|d| read_error_log(d, entries, true));
                    let _ = answer.send(log);
                }
                Ask::Flush(wish) => self.flush(wish),
                Ask::Reset => {
                    self.note(Trouble::Reset("asked to".into()));
                }
            }
        }
    }

    /// Something is wrong. The worst counts, else the first.
    pub(super) fn note(&mut self, trouble: Trouble) {
        match (&self.trouble, &trouble) {
            (None, _) | (Some(Trouble::Reset(_)), Trouble::Gone(_)) => self.trouble = Some(trouble),
            _ => {}
        }
    }

    /// Use the driver, and note what its errors mean for the controller.
    pub(super) fn with_driver<T>(
        &mut self,
        f: impl FnOnce(&mut Driver<Handle>) -> Result<T, DriverError>,
    ) -> Result<T, DriverError> {
        let driver = self.driver.as_mut().ok_or(DriverError::Gone)?;
        let result = f(driver);
        if let Err(error) = &result
            && let Some(trouble) = trouble_of(error)
        {
            self.note(trouble);
        }
        result
    }

    /// Have a lane flush a namespace: a Flush is about all that was completed before, on whatever queue. If there is none, the wish is
    /// dropped.
    fn flush(&self, wish: Wish) {
        for lane in &self.lanes {
            if lane.watch.as_ref().is_some_and(|watch| watch.is_changed()) {
                continue;
            }
            let mut mail = lane.link.mail();
            if mail.dropped.is_none() {
                mail.flush.push(wish);
                drop(mail);
                lane.link.look.store(true, Ordering::Release);
                return lane.link.wake_lane();
            }
        }
    }
}

/// Ticks after which a command is overdue, and after which it is not waited for any more.
pub(super) fn limits(shared: &Shared) -> [u32; 2] {
    let tick = tick(shared).as_nanos().max(1);
    let ticks = |d: Duration| u32::try_from(d.as_nanos().div_ceil(tick)).unwrap_or(u32::MAX / 2);
    let options = &shared.options;
    let overdue = ticks(options.command_timeout);
    [overdue, overdue.saturating_add(ticks(options.abort_grace))]
}

/// The time the lanes count in.
fn tick(shared: &Shared) -> Duration {
    let shortest = shared
        .options
        .command_timeout
        .min(shared.options.abort_grace);
    (shortest / 4).clamp(Duration::from_millis(1), Duration::from_millis(250))
}

/// How the driver of an SSD is started.
pub(super) fn driver_options(shared: &Shared) -> Options {
    let options = &shared.options;
    Options {
        admin_entries: 64,
        max_transfer: options.max_transfer,
        admin_timeout: options.admin_timeout,
        least_ready_timeout: options.least_ready_timeout,
        most_ready_timeout: options.most_ready_timeout,
    }
}

/// What an SSD that has just been brought up is told: queue pairs, which are returned, and events.
pub(super) fn set_up(driver: &mut Driver<Handle>, wanted: u16) -> Result<u16, DriverError> {
    let granted = driver.request_queue_pairs(wanted)?;
    super::watch::ask_for_events(driver)?;
    driver.arm_events(EVENTS)?;
    Ok(granted)
}

/// The eventfd of the admin queue.
pub(super) fn interrupt_of(pair: &Pair) -> Option<File> {
    pair.interrupt().and_then(|f| f.try_clone().ok())
}

/// What an error of the driver says about the controller; `None` if it is only about the command.
pub(super) fn trouble_of(error: &DriverError) -> Option<Trouble> {
    match error {
        DriverError::Gone => Some(Trouble::Gone(error.to_string())),
        DriverError::Fatal { .. } | DriverError::Timeout { .. } | DriverError::Submit { .. } => {
            Some(Trouble::Reset(error.to_string()))
        }
        DriverError::Device { .. } | DriverError::Refused { .. } | DriverError::Unsupported(_) => {
            None
        }
    }
}

fn read_namespace(driver: &mut Driver<Handle>, nsid: u32) -> Result<SsdNamespace, DriverError> {
    let identify = driver.identify_namespace(nsid)?;
    // Before 2.0 there was no such structure: refused, and zeroes then.
    let nvm = match driver.identify_raw(Identify {
        cns: Cns::CSI_NAMESPACE,
        nsid,
        csi: Csi::NVM,
        ..Identify::default()
    }) {
        Ok(bytes) => NvmNamespaceIdentify::read_from_prefix(&bytes)
            .map(|(value, _)| value)
            .unwrap_or_default(),
        Err(DriverError::Refused { .. }) => NvmNamespaceIdentify::default(),
        Err(error) => return Err(error),
    };
    Ok(SsdNamespace {
        nsid,
        identify,
        nvm,
    })
}

/// What the NVM Command Set adds to Identify Controller; zeroes from an SSD that does not know it.
fn read_limits(driver: &mut Driver<Handle>) -> Result<NvmControllerIdentify, DriverError> {
    match driver.identify_as(Cns::CSI_CONTROLLER, 0, Csi::NVM) {
        Ok(limits) => Ok(limits),
        Err(DriverError::Refused { .. }) => Ok(NvmControllerIdentify::default()),
        Err(error) => Err(error),
    }
}

/// The error log; `retain`: events about it stay masked.
pub(super) fn read_error_log(
    driver: &mut Driver<Handle>,
    entries: usize,
    retain: bool,
) -> Result<Vec<ErrorLogEntry>, DriverError> {
    let size = size_of::<ErrorLogEntry>();
    let bytes = driver.log_page(
        LogId::ERROR,
        nvme_spec::command::NSID_BROADCAST,
        entries.min(ERRORS) * size,
        retain,
    )?;
    Ok(bytes
        .chunks_exact(size)
        .filter_map(|entry| ErrorLogEntry::read_from_bytes(entry).ok())
        .filter(|entry| entry.error_count != 0)
        .collect())
}
