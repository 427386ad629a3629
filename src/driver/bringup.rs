//! A controller's life: found in any state, brought up, reset, shut down; and its queues.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use nvme_spec::doorbell::{Doorbell as Which, DoorbellStride};
use nvme_spec::event::AsyncEvent;
use nvme_spec::identify::IdentifyController;
use nvme_spec::prp::PageSize;
use nvme_spec::regs::{Aqa, Cap, Cc, CommandSetSelected, Csts, Shn, Shst, Vs, css, offset};
use nvme_spec::ring::RingSize;

use super::lists::Lists;
use super::queue::{Parts, QueueConfig, QueuePair, depth_of};
use super::shadow::ShadowBuffers;
use super::{Access, Completion, Device, DriverError};

/// What a driver is started with.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Entries of the admin queues, 2 to 4096.
    pub admin_entries: u32,
    /// Upper bound for one transfer in bytes, whatever the controller allows.
    pub max_transfer: u32,
    /// How long an admin command may take.
    pub admin_timeout: Duration,
    /// Least time a controller is given to become ready, whatever CAP.TO says.
    pub least_ready_timeout: Duration,
    /// Most time it is given, whatever CAP.TO says.
    pub most_ready_timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            admin_entries: 32,
            max_transfer: 1 << 20,
            admin_timeout: Duration::from_secs(10),
            least_ready_timeout: Duration::from_secs(2),
            most_ready_timeout: Duration::from_secs(128),
        }
    }
}

/// A controller that has been brought up.
pub struct Driver<D: Device> {
    pub(super) device: D,
    pub(super) options: Options,
    cap: Cap,
    pub(super) page: PageSize,
    stride: DoorbellStride,
    pub(super) admin: QueuePair<D::Bell>,
    identify: IdentifyController,
    max_transfer: u32,
    shadow: Option<ShadowBuffers>,
    pub(super) finished: Vec<Completion>,
    pub(super) events: VecDeque<AsyncEvent>,
    pub(super) next_user: u64,
    pub(super) aers_out: u32,
    /// Queue pairs the controller refused to delete: it may still use their memory. They go with this driver.
    kept: Vec<QueuePair<D::Bell>>,
}

/// Waits a little, longer each time: a peer may be a thread of this very machine.
pub(super) struct Pause(u32);

impl Pause {
    pub(super) fn new() -> Self {
        Self(0)
    }

    pub(super) fn pause(&mut self) {
        self.0 = self.0.saturating_add(1);
        match self.0 {
            0..=16 => std::hint::spin_loop(),
            17..=64 => std::thread::yield_now(),
            n => std::thread::sleep(Duration::from_micros(u64::from(n.min(500)))),
        }
    }
}

fn read_csts<D: Device>(device: &mut D) -> Result<Csts, DriverError> {
    let bits = device
        .read32(offset::CSTS)
        .map_err(DriverError::device("reading CSTS"))?;
    if bits == u32::MAX {
        return Err(DriverError::Gone);
    }
    Ok(Csts::from_bits(bits))
}

fn read_cc<D: Device>(device: &mut D) -> Result<Cc, DriverError> {
    let bits = device
        .read32(offset::CC)
        .map_err(DriverError::device("reading CC"))?;
    if bits == u32::MAX {
        return Err(DriverError::Gone);
    }
    Ok(Cc::from_bits(bits))
}

fn write_cc<D: Device>(device: &mut D, cc: Cc) -> Result<(), DriverError> {
    device
        .write32(offset::CC, cc.into_bits())
        .map_err(DriverError::device("writing CC"))
}

/// Read CSTS until `done` says so.
fn wait_csts<D: Device>(
    device: &mut D,
    what: &'static str,
    after: Duration,
    mut done: impl FnMut(Csts) -> Result<bool, DriverError>,
) -> Result<(), DriverError> {
    let start = Instant::now();
    let mut pause = Pause::new();
    loop {
        // The clock first: a last look after the time is up.
        let late = start.elapsed() > after;
        if done(read_csts(device)?)? {
            return Ok(());
        }
        if late {
            return Err(DriverError::Timeout { what, after });
        }
        pause.pause();
    }
}

/// CC.EN to 0, from whatever state, and wait until the controller has stopped.
fn disable<D: Device>(device: &mut D, timeout: Duration) -> Result<(), DriverError> {
    let cc = read_cc(device)?;
    let csts = read_csts(device)?;
    if csts.shst() == Shst::OCCURRING {
        wait_csts(device, "waiting for a shutdown to end", timeout, |s| {
            Ok(s.shst() != Shst::OCCURRING)
        })?;
    }
    if cc.en() {
        // EN must not fall while RDY has not followed it yet; a controller in fatal state never gets ready. One that never does is
        // broken, and disabled all the same.
        if !csts.rdy() && !csts.cfs() && csts.shst() == Shst::NORMAL {
            let waited = wait_csts(device, "waiting for an enable to end", timeout, |s| {
                Ok(s.rdy() || s.cfs())
            });
            if !matches!(waited, Ok(()) | Err(DriverError::Timeout { .. })) {
                return waited;
            }
        }
        write_cc(device, cc.with_en(false).with_shn(Shn::NONE))?;
    }
    wait_csts(
        device,
        "disabling the controller",
        timeout,
        |s| Ok(!s.rdy()),
    )
}

impl<D: Device> Driver<D> {
    /// Bring a controller up, whatever state it was left in: reset, admin queue, enable, Identify.
    ///
    /// # Errors
    ///
    /// [`DriverError`] says at which step it ended.
    pub fn bring_up(mut device: D, options: Options) -> Result<Self, DriverError> {
        let bits = device
            .read64(offset::CAP)
            .map_err(DriverError::device("reading CAP"))?;
        if bits == u64::MAX {
            return Err(DriverError::Gone);
        }
        let cap = Cap::from_bits(bits);
        let page = PageSize::K4;
        if cap.mpsmin() > page.mps() {
            return Err(DriverError::Unsupported("a memory page of 4 KiB"));
        }
        if cap.css() & (css::NVM | css::IO_COMMAND_SETS) == 0 {
            return Err(DriverError::Unsupported("the NVM command set"));
        }
        if cap.mqes_z() == 0 {
            return Err(DriverError::Unsupported("queues of two entries"));
        }
        let timeout = ready_timeout(cap, &options);
        disable(&mut device, timeout)?;

        let size = RingSize::new(options.admin_entries.clamp(2, 4096)).unwrap_or(RingSize::MIN);
        let config = QueueConfig {
            qid: 0,
            sq_size: size,
            cq_size: size,
            depth: 0,
            max_transfer: page.bytes(),
            vector: Some(0),
        };
        let stride = DoorbellStride::new(cap.dstrd());
        let (admin, sq, cq) = make_queue(&mut device, config, stride, page, page.bytes())?;

        let aqa = Aqa::new()
            .with_asqs_z(size.size_z())
            .with_acqs_z(size.size_z());
        device
            .write32(offset::AQA, aqa.into_bits())
            .and_then(|()| device.write64(offset::ASQ, sq))
            .and_then(|()| device.write64(offset::ACQ, cq))
            .map_err(DriverError::device("writing the admin queue's place"))?;
        let command_sets = if cap.css() & css::IO_COMMAND_SETS != 0 {
            CommandSetSelected::ALL
        } else {
            CommandSetSelected::NVM
        };
        let cc = Cc::new()
            .with_css(command_sets)
            .with_mps(page.mps())
            .with_iosqes(6)
            .with_iocqes(4);
        // In two steps, as the specification asks of CSS: it may only change while EN is 0.
        write_cc(&mut device, cc)?;
        write_cc(&mut device, cc.with_en(true))?;
        wait_csts(&mut device, "enabling the controller", timeout, |s| {
            if s.cfs() {
                return Err(DriverError::Fatal {
                    what: "enabling the controller",
                });
            }
            Ok(s.rdy())
        })?;

        let mut driver = Self {
            device,
            options,
            cap,
            page,
            stride,
            admin,
            identify: IdentifyController::default(),
            max_transfer: page.bytes(),
            shadow: None,
            finished: Vec::new(),
            events: VecDeque::new(),
            next_user: 0,
            aers_out: 0,
            kept: Vec::new(),
        };
        driver.identify = driver.identify_controller()?;
        // MDTS: a power of two in units of the smallest page; 0 for no limit.
        let limit = match u32::from(driver.identify.mdts) {
            0 => u32::MAX,
            mdts => {
                (4096u32 << cap.mpsmin()).saturating_mul(1u32.checked_shl(mdts).unwrap_or(u32::MAX))
            }
        };
        driver.max_transfer = limit.min(options.max_transfer).max(page.bytes());
        Ok(driver)
    }

    /// Controller Capabilities.
    pub fn cap(&self) -> Cap {
        self.cap
    }

    /// Version.
    ///
    /// # Errors
    ///
    /// The way to the device is broken.
    pub fn version(&mut self) -> Result<Vs, DriverError> {
        let bits = self
            .device
            .read32(offset::VS)
            .map_err(DriverError::device("reading VS"))?;
        Ok(Vs::from_bits(bits))
    }

    /// Controller Status.
    ///
    /// # Errors
    ///
    /// The device is gone, or the way to it is broken.
    pub fn csts(&mut self) -> Result<Csts, DriverError> {
        read_csts(&mut self.device)
    }

    /// Identify Controller, as read at bring-up.
    pub fn identify(&self) -> &IdentifyController {
        &self.identify
    }

    /// Largest transfer in bytes.
    pub fn max_transfer(&self) -> u32 {
        self.max_transfer
    }

    /// Distance of doorbells.
    pub fn stride(&self) -> DoorbellStride {
        self.stride
    }

    /// The device below.
    pub fn device(&mut self) -> &mut D {
        &mut self.device
    }

    /// Give the device back. The controller is left as it is.
    pub fn into_device(self) -> D {
        self.device
    }

    /// The admin queue pair.
    pub fn admin_queue(&mut self) -> &mut QueuePair<D::Bell> {
        &mut self.admin
    }

    /// Disable the controller (a Controller Reset). All queue pairs are dead then; bring it up again with
    /// [`Self::bring_up`].
    ///
    /// # Errors
    ///
    /// [`DriverError`] if it does not stop.
    pub fn reset(mut self) -> Result<D, DriverError> {
        let timeout = ready_timeout(self.cap, &self.options);
        disable(&mut self.device, timeout)?;
        Ok(self.device)
    }

    /// Notify the controller of a shutdown and wait until it is complete.
    ///
    /// # Errors
    ///
    /// [`DriverError`] if it does not complete.
    pub fn shut_down(&mut self, abrupt: bool) -> Result<(), DriverError> {
        self.shut_down_within(abrupt, Duration::MAX)
    }

    /// As [`Self::shut_down`], but wait no longer than this.
    ///
    /// # Errors
    ///
    /// [`DriverError`] if it does not complete.
    pub fn shut_down_within(&mut self, abrupt: bool, limit: Duration) -> Result<(), DriverError> {
        let shn = if abrupt { Shn::ABRUPT } else { Shn::NORMAL };
        let cc = read_cc(&mut self.device)?;
        write_cc(&mut self.device, cc.with_shn(shn))?;
        // RTD3 Entry Latency, in microseconds, is what a normal shutdown may take.
        let after = ready_timeout(self.cap, &self.options)
            .max(Duration::from_micros(u64::from(self.identify.rtd3e)))
            .min(self.options.most_ready_timeout)
            .min(limit);
        wait_csts(&mut self.device, "shutting down", after, |s| {
            if s.cfs() {
                return Err(DriverError::Fatal {
                    what: "shutting down",
                });
            }
            Ok(s.shst() == Shst::COMPLETE)
        })
    }

    /// Create a completion and a submission queue.
    ///
    /// # Errors
    ///
    /// The controller refused, or memory ran out. No queue is left behind.
    pub fn create_queue_pair(
        &mut self,
        config: QueueConfig,
    ) -> Result<QueuePair<D::Bell>, DriverError> {
        let (mut pair, sq, cq) = make_queue(
            &mut self.device,
            config,
            self.stride,
            self.page,
            self.max_transfer,
        )?;
        // Its first values are zeroes, and the pages were zeroed: but the identifier may have been in use before.
        if let Some(buffers) = &self.shadow
            && let Some((s, c)) = shadow_words(buffers, self.stride, config.qid, self.page)
        {
            pair.seed(&s, &c);
            pair.set_shadow(s, c);
        }
        self.create_queues(&config, sq, cq)?;
        Ok(pair)
    }

    /// Delete a queue pair. What was out is aborted by the controller; its completions are lost with the queue.
    ///
    /// # Errors
    ///
    /// The controller refused; then its memory is not reused before this driver is dropped, which whoever deleted it should do when the
    /// controller has been stopped.
    pub fn delete_queue_pair(&mut self, pair: QueuePair<D::Bell>) -> Result<(), DriverError> {
        match self
            .delete_sq(pair.qid())
            .and_then(|()| self.delete_cq(pair.qid()))
        {
            Ok(()) => Ok(()),
            Err(e) => {
                self.kept.push(pair);
                Err(e)
            }
        }
    }

    /// Doorbell Buffer Config: shadow doorbells for the queue pairs given (all I/O queue pairs that exist) and all to come.
    ///
    /// # Errors
    ///
    /// The controller refused, or memory ran out.
    pub fn enable_doorbell_buffer(
        &mut self,
        live: &mut [&mut QueuePair<D::Bell>],
    ) -> Result<(), DriverError> {
        let page = self.page.bytes() as usize;
        let what = "allocating the doorbell buffers";
        let buffers = ShadowBuffers {
            doorbells: self
                .device
                .allocate(page, Access::ReadOnly)
                .map_err(DriverError::device(what))?,
            event_idx: self
                .device
                .allocate(page, Access::ReadWrite)
                .map_err(DriverError::device(what))?,
        };
        let words = |qid| shadow_words(&buffers, self.stride, qid, self.page);
        for pair in live.iter() {
            if let Some((s, c)) = words(pair.qid()) {
                pair.seed(&s, &c);
            }
        }
        let (doorbells, event_idx) = (buffers.doorbells.addr(), buffers.event_idx.addr());
        self.configure_doorbell_buffer(doorbells, event_idx)?;
        for pair in live.iter_mut() {
            if let Some((s, c)) = shadow_words(&buffers, self.stride, pair.qid(), self.page) {
                pair.set_shadow(s, c);
            }
        }
        self.shadow = Some(buffers);
        Ok(())
    }

    /// Device addresses of the shadow doorbell and the EventIdx page, if they are in use.
    pub fn doorbell_buffer(&self) -> Option<(u64, u64)> {
        let buffers = self.shadow.as_ref()?;
        Some((buffers.doorbells.addr(), buffers.event_idx.addr()))
    }
}

fn shadow_words(
    buffers: &ShadowBuffers,
    stride: DoorbellStride,
    qid: u16,
    page: PageSize,
) -> Option<(super::shadow::Shadow, super::shadow::Shadow)> {
    Some((
        buffers.words(stride, Which::Sq(qid), page.bytes())?,
        buffers.words(stride, Which::Cq(qid), page.bytes())?,
    ))
}

fn ready_timeout(cap: Cap, options: &Options) -> Duration {
    (Duration::from_millis(500) * u32::from(cap.to()))
        .max(options.least_ready_timeout)
        .min(options.most_ready_timeout)
}

/// Disable a controller, whatever state it is in. It reaches no memory then.
pub(super) fn stop<D: Device>(device: &mut D, options: &Options) -> Result<(), DriverError> {
    let bits = device
        .read64(offset::CAP)
        .map_err(DriverError::device("reading CAP"))?;
    if bits == u64::MAX {
        return Err(DriverError::Gone);
    }
    disable(device, ready_timeout(Cap::from_bits(bits), options))
}

/// Memory, doorbells and interrupt of a queue pair, with the device addresses of the submission and the completion queue.
fn make_queue<D: Device>(
    device: &mut D,
    config: QueueConfig,
    stride: DoorbellStride,
    page: PageSize,
    limit: u32,
) -> Result<(QueuePair<D::Bell>, u64, u64), DriverError> {
    let max_transfer = match config.max_transfer {
        0 => limit,
        wanted => wanted.min(limit),
    };
    let what = "allocating a queue";
    let mut memory = |bytes: usize, access| {
        let memory = device.allocate(bytes, access);
        memory.map_err(DriverError::device(what))
    };
    let sq = memory(config.sq_size.get() as usize * 64, Access::ReadOnly)?;
    let cq = memory(config.cq_size.get() as usize * 16, Access::ReadWrite)?;
    let lists = Lists::new(page, depth_of(&config), max_transfer, false, |bytes| {
        memory(bytes, Access::ReadOnly)
    })?;
    let bell = |device: &mut D, which| {
        device
            .doorbell(stride.window_offset(which))
            .map_err(DriverError::device("finding a doorbell"))
    };
    let (sq_addr, cq_addr) = (sq.addr(), cq.addr());
    let parts = Parts {
        config,
        sq,
        cq,
        lists,
        sq_bell: bell(device, Which::Sq(config.qid))?,
        cq_bell: bell(device, Which::Cq(config.qid))?,
        interrupt: match config.vector {
            Some(vector) => device
                .interrupt(vector)
                .map_err(DriverError::device("setting up an interrupt"))?,
            None => None,
        },
    };
    let pair = QueuePair::new(parts).ok_or(DriverError::Unsupported(
        "queues in the memory that was given",
    ))?;
    Ok((pair, sq_addr, cq_addr))
}
