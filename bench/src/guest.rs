//! A guest of the load generator: a connected front-end, its memory, and queue pairs at work.

use std::path::Path;
use std::sync::Arc;

use guest_tests::FrontEnd;
use guest_tests::frontend::{GuestBell, Setup};
use guest_tests::io::Io;
use guest_tests::memory::MemoryRegion;
use guest_tests::raw::Guest;
use nvme_spec::Status;
use nvme_spec::admin::{CreateIoCq, CreateIoSq, QueuePriority};
use nvme_spec::doorbell::Doorbell as Which;
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::ring::RingSize;
use vhost_user_nvme::driver::{Driver, Options};

use crate::Failure;
use crate::fence::{CqRing, Ram, SqRing};
use crate::pattern::{Operation, Pattern, Pieces};
use crate::queue::{Parts, Queue};

/// Where the memory of queues and buffers begins; below it is what the driver itself needs.
const BASE: u64 = 1 << 32;
const PAGE: u64 = 4096;

/// What one guest does.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    pub nsid: u32,
    pub operation: Operation,
    /// Bytes of a command.
    pub bytes: u32,
    /// Commands out on each queue pair.
    pub depth: u32,
    pub queues: u16,
    /// Entries of each queue.
    pub entries: u32,
    /// Bytes of the guest's memory that data is read to and written from.
    pub buffers: u64,
    /// Completions taken from a queue before the next one has its turn, at most.
    pub batch: u32,
    /// Sleep on interrupts instead of polling.
    pub interrupts: bool,
}

/// A connected guest. Its queues work as long as it is there.
pub struct Client {
    /// The queue pairs.
    pub queues: Vec<Queue>,
    ram: Arc<Ram>,
    front: FrontEnd,
    _driver: Guest,
}

impl Client {
    /// Connect, bring the controller up, and make the queue pairs.
    ///
    /// # Errors
    ///
    /// [`Failure`] says which step did not work.
    pub fn connect(socket: &Path, work: &Work, seed: u64) -> Result<Self, Failure> {
        let size = RingSize::new(work.entries)
            .filter(|_| work.depth >= 1 && work.depth < work.entries)
            .ok_or_else(|| Failure::text("the depth is at least 1 and below the queue's size"))?;
        let setup = Setup {
            memory: vec![(0, 8 << 20)],
            ..Setup::default()
        };
        let front = FrontEnd::connect_with(socket, &setup)
            .map_err(|e| Failure::of(&format!("connecting to {}", socket.display()), &e))?;
        let mut driver = Driver::bring_up(front.clone(), Options::default())
            .map_err(|e| Failure::of("bringing the controller up", &e))?;
        let granted = driver
            .request_queue_pairs(work.queues)
            .map_err(|e| Failure::of("asking for queue pairs", &e))?;
        if granted < work.queues {
            return Err(Failure(format!("only {granted} queue pairs are granted")));
        }
        let namespace = driver
            .identify_namespace(work.nsid)
            .map_err(|e| Failure::of("Identify Namespace", &e))?;
        let block = namespace
            .current_format()
            .and_then(|f| 1u32.checked_shl(u32::from(f.lbads)))
            .ok_or_else(|| Failure::text("the namespace has no block size"))?;
        if work.bytes == 0
            || !work.bytes.is_multiple_of(block)
            || work.bytes > driver.max_transfer()
        {
            return Err(Failure(format!(
                "commands of {} bytes: not whole blocks of {block}, or more than {}",
                work.bytes,
                driver.max_transfer()
            )));
        }
        let blocks = work.bytes / block;
        let places = namespace.nsze / u64::from(blocks);

        // Buffers first, huge page by huge page; then the PRP lists; then the queues.
        let step = u64::from(work.bytes).next_multiple_of(PAGE);
        let count = (work.buffers / step).max(u64::from(work.depth) * u64::from(work.queues));
        let list_step = (step / PAGE * 8).next_power_of_two();
        let lists = count * step;
        let rings = (lists + count * list_step).next_multiple_of(PAGE);
        let ring_step = (u64::from(work.entries) * 64).next_multiple_of(PAGE);
        let bytes = rings + u64::from(work.queues) * 2 * ring_step;
        let usize_of = |n: u64| usize::try_from(n).map_err(|e| Failure::of("guest memory", &e));
        let ram =
            Ram::new(usize_of(bytes)?).map_err(|e| Failure::of("allocating guest memory", &e))?;
        if work.bytes > 2 * 4096 {
            for piece in 0..count {
                for page in 1..step / PAGE {
                    let at = lists + piece * list_step + (page - 1) * 8;
                    ram.put_u64(usize_of(at)?, BASE + piece * step + page * PAGE);
                }
            }
        }
        let file = ram
            .file()
            .map_err(|e| Failure::of("sharing guest memory", &e))?;
        MemoryRegion::over(file, BASE, ram.bytes() as u64)
            .map_err(|e| Failure::of("mapping guest memory", &e))
            .and_then(|region| {
                front
                    .add_region(region)
                    .map_err(|e| Failure::of("giving memory to the daemon", &e))
            })?;
        let pieces = Pieces {
            first: BASE,
            count,
            step,
            lists: BASE + lists,
            list_step,
        };
        let mut queues = Vec::new();
        for i in 0..work.queues {
            let qid = i + 1;
            let sq = rings + u64::from(i) * 2 * ring_step;
            let cq = sq + ring_step;
            let vector = work.interrupts.then_some(qid);
            create(&mut driver, qid, size, [BASE + sq, BASE + cq], vector)?;
            let bell = |which| -> Result<GuestBell, Failure> {
                front
                    .bell(front.stride().window_offset(which))
                    .ok_or_else(|| Failure::text("there is no doorbell for the queue"))
            };
            let ring = || Failure::text("there is no room for a queue");
            let seed = seed.wrapping_mul(1000).wrapping_add(u64::from(qid));
            queues.push(Queue::new(Parts {
                sq: SqRing::new(&ram, usize_of(sq)?, work.entries).ok_or_else(ring)?,
                cq: CqRing::new(&ram, usize_of(cq)?, work.entries).ok_or_else(ring)?,
                entries: work.entries,
                sq_bell: bell(Which::Sq(qid))?,
                cq_bell: bell(Which::Cq(qid))?,
                interrupt: match vector {
                    Some(vector) => front
                        .call(vector)
                        .map_err(|e| Failure::of("an interrupt", &e))?,
                    None => None,
                },
                pattern: Pattern::new(
                    work.operation,
                    work.nsid,
                    blocks,
                    work.bytes,
                    places,
                    pieces,
                    seed,
                ),
                depth: work.depth,
                batch: work.batch,
            }));
        }
        Ok(Self {
            queues,
            ram,
            front,
            _driver: driver,
        })
    }

    /// Whether a doorbell is a plain store now.
    pub fn doorbells_mapped(&self) -> bool {
        self.front.doorbells_mapped()
    }

    /// How often the daemon switched between mapped and trapped doorbells.
    pub fn doorbell_switches(&self) -> u64 {
        self.front.doorbell_switches()
    }

    /// What its memory is made of.
    pub fn pages(&self) -> &'static str {
        self.ram.pages()
    }
}

fn create(
    driver: &mut Guest,
    qid: u16,
    size: RingSize,
    [sq, cq]: [u64; 2],
    vector: Option<u16>,
) -> Result<(), Failure> {
    let create_cq = CreateIoCq {
        prp1: cq,
        qid,
        qsize_z: size.size_z(),
        pc: true,
        ien: vector.is_some(),
        iv: vector.unwrap_or(0),
    };
    let create_sq = CreateIoSq {
        prp1: sq,
        qid,
        qsize_z: size.size_z(),
        pc: true,
        qprio: QueuePriority::MEDIUM,
        cqid: qid,
        nvmsetid: 0,
    };
    driver
        .admin_ok("Create I/O Completion Queue", create_cq.to_sqe())
        .and_then(|_| driver.admin_ok("Create I/O Submission Queue", create_sq.to_sqe()))
        .map_err(|e| Failure::of("making a queue pair", &e))?;
    Ok(())
}

/// Write every block of a namespace once, in the largest commands it takes.
///
/// # Errors
///
/// [`Failure`] says which step did not work.
pub fn fill(socket: &Path, nsid: u32) -> Result<(), Failure> {
    let front = FrontEnd::connect(socket)
        .map_err(|e| Failure::of(&format!("connecting to {}", socket.display()), &e))?;
    let mut guest = Driver::bring_up(front, Options::default())
        .map_err(|e| Failure::of("bringing the controller up", &e))?;
    guest
        .request_queue_pairs(1)
        .map_err(|e| Failure::of("asking for a queue pair", &e))?;
    let size = guest
        .identify_namespace(nsid)
        .map_err(|e| Failure::of("Identify Namespace", &e))?
        .nsze;
    let mut io = Io::new(&mut guest, guest_tests::daemon::queue(1, 32), nsid);
    let most = u64::from(io.pair.max_transfer() / io.block);
    let mut slba = 0;
    while slba < size {
        let blocks = most.min(size - slba);
        let status = io.transfer(NvmOpcode::WRITE, slba, blocks as u32);
        if status != Status::SUCCESS {
            return Err(Failure(format!("writing block {slba}: {status}")));
        }
        slba += blocks;
    }
    Ok(())
}
