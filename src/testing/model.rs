//! A small SSD in process: its registers, doorbells and interrupts.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use nvme_spec::doorbell::{Doorbell as Which, DoorbellStride};
use nvme_spec::event::AsyncEvent;
use nvme_spec::identify::IdentifyNamespace;
use nvme_spec::log::SmartLog;
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::regs::{Cap, Cc, css, offset};
use rustix::event::{EventfdFlags, eventfd};

use super::mischief::Mischief;
use super::space::FakeSpace;
use super::state::{Queue, State};
use crate::driver::{Access, AddressSpace, AnyDevice, Device, Dma, Doorbell, Pools, erase};

/// The longest it can be held open.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);

/// What a [`Model`] is.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// log2 of the block size.
    pub block_shift: u32,
    /// Blocks of each namespace.
    pub blocks: u64,
    /// Namespaces, with NSID 1 and on.
    pub namespaces: u32,
    /// Identify MDTS: log2 of pages; 0 = no limit.
    pub mdts: u8,
    /// Identify Namespace NOIOB, in blocks.
    pub noiob: u16,
    /// Ranges of a Dataset Management command; 0 = no limit, here and below.
    pub dmrl: u8,
    /// Blocks of each of them.
    pub dmrsl: u32,
    /// Blocks of all of them.
    pub dmsl: u64,
    /// A volatile write cache.
    pub volatile_write_cache: bool,
    /// I/O queue pairs it grants.
    pub queue_pairs: u16,
    /// Interrupt vectors; 0 = it does not interrupt.
    pub vectors: u16,
    /// CAP, whatever it means.
    pub cap: Cap,
    /// A function level reset works.
    pub hard_reset: bool,
    /// I/O commands complete at once, when the doorbell is rung, without looking at them.
    pub instant: bool,
    /// What it does that it should not.
    pub mischief: Mischief,
    /// For the mischief.
    pub seed: u64,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            block_shift: 9,
            blocks: 4096,
            namespaces: 1,
            mdts: 5,
            noiob: 0,
            dmrl: 0,
            dmrsl: 0,
            dmsl: 0,
            volatile_write_cache: true,
            queue_pairs: 8,
            vectors: 9,
            cap: Cap::new().with_mqes_z(1023).with_to(2).with_css(css::NVM),
            hard_reset: true,
            instant: false,
            mischief: Mischief::default(),
            seed: 1,
        }
    }
}

/// A small SSD. A clone is another handle to the same one.
#[derive(Clone)]
pub struct Model(Arc<Core>);

pub(super) struct Core {
    pub(super) space: Arc<FakeSpace>,
    pub(super) options: ModelOptions,
    pub(super) state: Mutex<State>,
    interrupts: Vec<File>,
    removal: File,
}

impl Core {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn interrupt(&self, vector: u16) {
        if let Some(file) = self.interrupts.get(usize::from(vector)) {
            // A full counter is a pending interrupt.
            let _ = rustix::io::write(file, &1u64.to_ne_bytes());
        }
    }
}

fn event_file() -> File {
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    fd.expect("file descriptors for a test").into()
}

/// Late answers come now and then.
fn late_answers(core: &Weak<Core>) {
    while let Some(core) = core.upgrade() {
        core.lock().answer_late(&core);
        drop(core);
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Model {
    /// An SSD of this kind.
    pub fn new(options: ModelOptions) -> Self {
        let mischief = !options.mischief.odds.is_empty();
        let core = Arc::new(Core {
            space: FakeSpace::new(),
            state: Mutex::new(State::new(&options)),
            interrupts: (0..options.vectors).map(|_| event_file()).collect(),
            removal: event_file(),
            options,
        });
        if mischief {
            let weak = Arc::downgrade(&core);
            let _ = std::thread::Builder::new()
                .name("late-answers".into())
                .spawn(move || late_answers(&weak));
        }
        Self(core)
    }

    /// An SSD that completes every I/O command at once and moves no data: what is measured against it is the driver alone.
    pub fn instant() -> Self {
        Self::new(ModelOptions {
            instant: true,
            blocks: 1 << 40,
            vectors: 0,
            mdts: 8,
            ..ModelOptions::default()
        })
    }

    /// Where its driver shows memory to it.
    pub fn space(&self) -> Arc<dyn AddressSpace> {
        Arc::new(Arc::clone(&self.0.space))
    }

    /// The same, as what it is.
    pub fn fake_space(&self) -> &Arc<FakeSpace> {
        &self.0.space
    }

    /// The device, for a driver.
    pub fn device(&self) -> AnyDevice {
        erase(ModelDevice {
            core: Arc::clone(&self.0),
            pools: Pools::new(self.space()),
        })
    }

    /// What namespace `nsid` holds.
    pub fn bytes(&self, nsid: u32) -> Vec<u8> {
        self.0.lock().bytes(nsid)
    }

    /// From now on it behaves like this.
    pub fn misbehave(&self, mischief: Mischief) {
        self.0.lock().mischief = mischief;
    }

    /// Report an event, if somebody asked for one. Whether somebody did.
    pub fn report(&self, event: AsyncEvent) -> bool {
        self.0.lock().report(&self.0, event)
    }

    /// All registers read as ones from now on.
    pub fn vanish(&self) {
        self.0.lock().gone = true;
    }

    /// The host wants it back.
    pub fn take_back(&self) {
        let _ = rustix::io::write(&self.0.removal, &1u64.to_ne_bytes());
    }

    /// It does not get ready again.
    pub fn never_ready(&self, on: bool) {
        self.0.lock().never_ready = on;
    }

    /// It stays ready when it is disabled.
    pub fn never_stops(&self, on: bool) {
        self.0.lock().never_stops = on;
    }

    /// A shutdown it is notified of does not end.
    pub fn never_shuts_down(&self, on: bool) {
        self.0.lock().never_shuts_down = on;
    }

    /// It deletes no queue.
    pub fn refuses_deletion(&self, on: bool) {
        self.0.lock().refuses_deletion = on;
    }

    /// Somebody formats or resizes a namespace: what it says of it from now on.
    pub fn change_namespace(&self, nsid: u32, f: impl FnOnce(&mut IdentifyNamespace)) {
        let index = (nsid as usize).wrapping_sub(1);
        f(&mut self.0.lock().namespaces[index]);
    }

    /// Another SSD is in its place.
    pub fn swap(&self, serial: &str) {
        self.0.lock().serial = serial.into();
    }

    /// Letting go of it takes until this is taken back, but 10 seconds at most.
    pub fn hold_open(&self, on: bool) {
        self.0.lock().held_open = on;
    }

    /// Whether it has been let go of.
    pub fn closed(&self) -> bool {
        self.0.lock().closed
    }

    /// Whether the controller is enabled.
    pub fn enabled(&self) -> bool {
        self.0.lock().cc.en()
    }

    /// Whether it was cut off from memory by its driver.
    pub fn isolated(&self) -> bool {
        self.0.lock().isolated
    }

    /// How often it was enabled, notified of a shutdown, and reset as a function.
    pub fn life(&self) -> [u32; 3] {
        let state = self.0.lock();
        [state.enables, state.shutdowns, state.hard_resets]
    }

    /// Its health from now on, which it does not report by itself.
    pub fn set_smart(&self, log: SmartLog) {
        self.0.lock().smart = log;
    }

    /// How often somebody asked it for its health.
    pub fn smart_reads(&self) -> u32 {
        self.0.lock().smart_reads
    }

    /// I/O commands of a kind that it was sent, unless it is instant.
    pub fn commands(&self, opcode: NvmOpcode) -> u32 {
        let state = self.0.lock();
        state
            .counts
            .get(usize::from(opcode.0))
            .copied()
            .unwrap_or(0)
    }

    /// Make every byte of a namespace this.
    pub fn fill(&self, nsid: u32, byte: u8) {
        self.0.lock().fill(nsid, byte);
    }

    /// How often a tail and how often a head of an I/O queue was written.
    pub fn doorbell_writes(&self) -> (u64, u64) {
        let mut sums = (0, 0);
        for (which, count) in &self.0.lock().bells {
            let n = count.load(Ordering::Relaxed);
            match which {
                Which::Sq(1..) => sums.0 += n,
                Which::Cq(1..) => sums.1 += n,
                Which::Sq(0) | Which::Cq(0) => {}
            }
        }
        sums
    }

    /// Identify Namespace of any of its namespaces.
    pub fn identify_namespace(&self) -> IdentifyNamespace {
        super::state::identify_namespace(&self.0.options)
    }
}

/// The device behind a [`Model`].
struct ModelDevice {
    core: Arc<Core>,
    pools: Pools,
}

impl Drop for ModelDevice {
    fn drop(&mut self) {
        let begun = Instant::now();
        while self.core.lock().held_open && begun.elapsed() < CLOSE_LIMIT {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.core.lock().closed = true;
    }
}

impl Device for ModelDevice {
    type Bell = ModelBell;

    fn read32(&mut self, at: u32) -> io::Result<u32> {
        let state = self.core.lock();
        Ok(match at {
            _ if state.gone => u32::MAX,
            offset::VS => 0x0002_0000,
            offset::CC => state.cc.into_bits(),
            offset::CSTS => state.csts().into_bits(),
            _ => 0,
        })
    }

    fn read64(&mut self, at: u32) -> io::Result<u64> {
        let state = self.core.lock();
        Ok(match at {
            _ if state.gone => u64::MAX,
            offset::CAP => self.core.options.cap.into_bits(),
            _ => 0,
        })
    }

    fn write32(&mut self, at: u32, value: u32) -> io::Result<()> {
        let mut state = self.core.lock();
        match at {
            _ if state.gone => {}
            offset::CC => state.set_cc(&self.core, Cc::from_bits(value)),
            offset::AQA => state.aqa = value,
            _ => {}
        }
        Ok(())
    }

    fn write64(&mut self, at: u32, value: u64) -> io::Result<()> {
        let mut state = self.core.lock();
        match at {
            offset::ASQ => state.asq = value,
            offset::ACQ => state.acq = value,
            _ => {}
        }
        Ok(())
    }

    fn doorbell(&mut self, at: u64) -> io::Result<ModelBell> {
        let stride = DoorbellStride::new(self.core.options.cap.dstrd());
        // A BAR of 64 KiB.
        let which = stride
            .decode(at)
            .filter(|_| at < 0xF000)
            .ok_or_else(|| io::Error::other(format!("no doorbell at {at:#x}")))?;
        let writes = Arc::default();
        self.core.lock().bells.push((which, Arc::clone(&writes)));
        Ok(ModelBell {
            core: Arc::clone(&self.core),
            which,
            writes,
            fast: RefCell::new(None),
        })
    }

    fn allocate(&mut self, bytes: usize, access: Access) -> io::Result<Dma> {
        self.pools.allocate(bytes, access)
    }

    fn interrupt(&mut self, vector: u16) -> io::Result<Option<File>> {
        self.core
            .interrupts
            .get(usize::from(vector))
            .map(File::try_clone)
            .transpose()
    }

    fn hard_reset(&mut self) -> io::Result<bool> {
        let mut state = self.core.lock();
        if self.core.options.hard_reset {
            state.hard_reset();
        }
        Ok(self.core.options.hard_reset)
    }

    fn isolate(&mut self) -> io::Result<()> {
        self.core.lock().isolated = true;
        Ok(())
    }

    fn removal(&mut self) -> io::Result<Option<File>> {
        self.core.removal.try_clone().map(Some)
    }
}

/// A doorbell of a [`Model`]. The SSD does its work in the thread that rings.
pub struct ModelBell {
    core: Arc<Core>,
    which: Which,
    /// How often it was written.
    writes: Arc<AtomicU64>,
    /// An instant queue, once it was rung.
    fast: RefCell<Option<Queue>>,
}

impl Doorbell for ModelBell {
    #[inline]
    fn ring(&self, value: u32) {
        // Whoever has the bell is the only one who counts.
        let writes = self.writes.load(Ordering::Relaxed);
        self.writes.store(writes + 1, Ordering::Relaxed);
        let Which::Sq(qid) = self.which else { return };
        if !self.core.options.instant || qid == 0 {
            return self.core.lock().fetch(&self.core, qid, value);
        }
        let mut fast = self.fast.borrow_mut();
        if fast.is_none() {
            *fast = self.core.lock().queues.remove(&qid);
        }
        if let Some(queue) = &mut *fast {
            queue.complete_all(qid, value);
        }
    }
}
