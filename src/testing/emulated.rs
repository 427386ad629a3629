//! The controller of this daemon behind the driver's seam: driver and controller in one process, with nothing between.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Weak};

use nvme_spec::doorbell::{Doorbell as Which, DoorbellStride};
use nvme_spec::regs::{Cap, offset};
use rustix::event::{EventfdFlags, eventfd};

use super::config::controller_config;
use super::space::FakeSpace;
use crate::controller::{Controller, ControllerConfig, DRAIN_LIMIT, FrontEnd};
use crate::driver::{Access, AddressSpace, AnyDevice, Device, Dma, Doorbell, Pools, erase};
use crate::memory::SharedWord;
use crate::poller::{DoorbellMode, IdlePolicy, PollerConfig, PollerPool};

/// Queue pairs, admin included.
const QUEUES: u16 = 9;

/// The controller of this daemon as an SSD.
pub struct Emulated {
    // In this order: no controller, then no poller.
    shared: Arc<Shared>,
    _pollers: Arc<PollerPool>,
}

struct Shared {
    controller: Arc<Controller>,
    space: Arc<FakeSpace>,
    calls: Vec<File>,
    kicks: Vec<File>,
    front: Arc<Front>,
}

/// Switches doorbells at once.
struct Front {
    controller: Weak<Controller>,
    mapped: AtomicBool,
}

impl FrontEnd for Front {
    fn request_doorbells(&self, mode: DoorbellMode) {
        self.mapped
            .store(mode == DoorbellMode::Mapped, Ordering::SeqCst);
        if let Some(controller) = self.controller.upgrade() {
            controller.doorbells_are(mode);
        }
    }
}

fn event_files(n: u16) -> io::Result<Vec<File>> {
    (0..n)
        .map(|_| Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?.into()))
        .collect()
}

impl Emulated {
    /// A controller with these namespaces (NSID 1 and on) on a poller of its own.
    ///
    /// # Errors
    ///
    /// File descriptors or memory ran out, or a namespace is none.
    pub fn new(backends: Vec<Arc<crate::backend::Backend>>, idle: IdlePolicy) -> io::Result<Self> {
        let pollers = PollerPool::start(&[PollerConfig {
            core: None,
            idle,
            poll_for: std::time::Duration::from_micros(50),
            slots: 512,
        }])?;
        let config = ControllerConfig {
            queues: QUEUES,
            max_transfer: 256 << 10,
            doorbell_buffer: false,
            sgls: false,
            ..controller_config("emulated", backends)
        };
        let controller = Controller::new(config, &pollers).map_err(io::Error::other)?;
        let front = Arc::new(Front {
            controller: Arc::downgrade(&controller),
            mapped: AtomicBool::new(false),
        });
        // Narrower than that of other doubles, so that it can be a guest of one.
        let space = FakeSpace::of(38);
        let weak = Arc::downgrade(&controller);
        space.on_change(move |map| {
            if let Some(controller) = weak.upgrade() {
                let _ = controller.set_memory(Arc::clone(map), DRAIN_LIMIT);
            }
        });
        let (calls, kicks) = (event_files(QUEUES)?, event_files(QUEUES)?);
        controller.attach(Arc::clone(&front) as _);
        for (i, (call, kick)) in calls.iter().zip(&kicks).enumerate() {
            controller.set_call(i, Some(call.try_clone()?));
            controller.set_kick(i, Some(kick.try_clone()?));
        }
        Ok(Self {
            shared: Arc::new(Shared {
                controller,
                space,
                calls,
                kicks,
                front,
            }),
            _pollers: Arc::new(pollers),
        })
    }

    /// The controller.
    pub fn controller(&self) -> &Arc<Controller> {
        &self.shared.controller
    }

    /// Where its driver shows memory to it. All of it can be written: this controller does not tell reads from writes.
    pub fn space(&self) -> Arc<dyn AddressSpace> {
        Arc::new(Arc::clone(&self.shared.space))
    }

    /// The device, for a driver.
    pub fn device(&self) -> AnyDevice {
        erase(EmulatedDevice {
            shared: Arc::clone(&self.shared),
            pools: Pools::new(self.space()),
            stride: DoorbellStride::PACKED,
        })
    }
}

struct EmulatedDevice {
    shared: Arc<Shared>,
    pools: Pools,
    stride: DoorbellStride,
}

impl EmulatedDevice {
    fn read<const N: usize>(&self, at: u32) -> [u8; N] {
        let mut bytes = [0; N];
        self.shared.controller.read(at, &mut bytes);
        bytes
    }
}

impl Device for EmulatedDevice {
    type Bell = EmulatedBell;

    fn read32(&mut self, at: u32) -> io::Result<u32> {
        Ok(u32::from_le_bytes(self.read(at)))
    }

    fn read64(&mut self, at: u32) -> io::Result<u64> {
        let value = u64::from_le_bytes(self.read(at));
        if at == offset::CAP {
            self.stride = DoorbellStride::new(Cap::from_bits(value).dstrd());
        }
        Ok(value)
    }

    fn write32(&mut self, at: u32, value: u32) -> io::Result<()> {
        self.shared.controller.write(at, &value.to_le_bytes());
        Ok(())
    }

    fn write64(&mut self, at: u32, value: u64) -> io::Result<()> {
        self.shared.controller.write(at, &value.to_le_bytes());
        Ok(())
    }

    fn doorbell(&mut self, at: u64) -> io::Result<EmulatedBell> {
        let none = || io::Error::other(format!("no doorbell at {at:#x}"));
        let window = self.shared.controller.window();
        let offset = usize::try_from(at).map_err(io::Error::other)?;
        let queue = match self.stride.decode(at) {
            Some(Which::Sq(qid) | Which::Cq(qid)) => usize::from(qid),
            None => return Err(none()),
        };
        Ok(EmulatedBell {
            word: SharedWord::in_window(window, offset).ok_or_else(none)?,
            kick: self.shared.kicks.get(queue).ok_or_else(none)?.try_clone()?,
            front: Arc::clone(&self.shared.front),
        })
    }

    fn allocate(&mut self, bytes: usize, access: Access) -> io::Result<Dma> {
        self.pools.allocate(bytes, access)
    }

    fn interrupt(&mut self, vector: u16) -> io::Result<Option<File>> {
        self.shared
            .calls
            .get(usize::from(vector))
            .map(File::try_clone)
            .transpose()
    }

    fn hard_reset(&mut self) -> io::Result<bool> {
        Ok(self.shared.controller.reset(DRAIN_LIMIT))
    }
}

/// A doorbell of an [`Emulated`]: a store, and a kick while doorbells are trapped.
struct EmulatedBell {
    word: SharedWord,
    kick: File,
    front: Arc<Front>,
}

impl Doorbell for EmulatedBell {
    fn ring(&self, value: u32) {
        self.word.store(value);
        fence(Ordering::SeqCst);
        if !self.front.mapped.load(Ordering::Relaxed) {
            // A full counter is a pending kick.
            let _ = rustix::io::write(&self.kick, &1u64.to_ne_bytes());
        }
    }
}
