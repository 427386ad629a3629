//! A guest that does as it likes: queues of its own making, any command, any doorbell value.

use std::time::{Duration, Instant};

use nvme_spec::admin::{CreateIoCq, CreateIoSq, QueuePriority};
use nvme_spec::doorbell::Doorbell as Which;
use nvme_spec::ring::{Phase, RingSize};
use nvme_spec::{Cqe, Sqe};
use vhost_user_nvme::driver::{Dma, Doorbell, Driver, DriverError};
use vhost_user_nvme::memory::Ring;

use crate::FrontEnd;
use crate::frontend::GuestBell;

/// A driver on a front-end: the virtual guest.
pub type Guest = Driver<FrontEnd>;

/// A completion queue of our own.
pub struct RawCq {
    /// Its identifier.
    pub qid: u16,
    /// Where it lies.
    pub memory: Dma,
    /// Its entries.
    pub size: RingSize,
    ring: Ring<2>,
    /// The entry that is looked at next.
    pub head: u16,
    phase: Phase,
    /// Its head doorbell.
    pub bell: GuestBell,
}

impl RawCq {
    /// The next entry, if it is there. The head doorbell is not written.
    pub fn take(&mut self) -> Option<Cqe> {
        let halves = self.ring.read_published(u32::from(self.head));
        if Cqe::phase_of_high_half(halves[1]) != self.phase.bit() {
            return None;
        }
        (self.head, self.phase) = self.size.next_with_phase(self.head, self.phase);
        Some(Cqe::from_halves(halves))
    }

    /// Tell the device how far we have read.
    pub fn release(&self) {
        self.bell.ring(u32::from(self.head));
    }

    /// Wait for the next entry and tell the device.
    pub fn wait(&mut self, limit: Duration) -> Option<Cqe> {
        let start = Instant::now();
        loop {
            let late = start.elapsed() > limit;
            if let Some(cqe) = self.take() {
                self.release();
                return Some(cqe);
            }
            if late {
                return None;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

/// A submission queue of our own.
pub struct RawSq {
    /// Its identifier.
    pub qid: u16,
    /// Where it lies.
    pub memory: Dma,
    /// Its entries.
    pub size: RingSize,
    ring: Ring<8>,
    /// The entry that is written next.
    pub tail: u16,
    /// Its tail doorbell.
    pub bell: GuestBell,
}

impl RawSq {
    /// Write an entry and move the tail, without telling the device.
    pub fn push(&mut self, sqe: Sqe) {
        self.put(self.tail, sqe);
        self.tail = self.size.next(self.tail);
    }

    /// Write an entry anywhere in the ring.
    pub fn put(&self, index: u16, sqe: Sqe) {
        self.ring.write(u32::from(index), zerocopy::transmute!(sqe));
    }

    /// Tell the device.
    pub fn ring(&self) {
        self.bell.ring(u32::from(self.tail));
    }

    /// Write entries and tell the device.
    pub fn submit(&mut self, sqes: &[Sqe]) {
        for sqe in sqes {
            self.push(*sqe);
        }
        self.ring();
    }
}

/// Make a completion queue. `vector` enables its interrupts.
///
/// # Errors
///
/// The controller refused, or memory ran out.
pub fn create_cq(
    guest: &mut Guest,
    qid: u16,
    size: u32,
    vector: Option<u16>,
) -> Result<RawCq, DriverError> {
    let cq = make_cq(guest, qid, size)?;
    let create = CreateIoCq {
        prp1: cq.memory.addr(),
        qid,
        qsize_z: cq.size.size_z(),
        pc: true,
        ien: vector.is_some(),
        iv: vector.unwrap_or(0),
    };
    guest.admin_ok("Create I/O Completion Queue", create.to_sqe())?;
    Ok(cq)
}

/// Make a submission queue on a completion queue.
///
/// # Errors
///
/// The controller refused, or memory ran out.
pub fn create_sq(guest: &mut Guest, qid: u16, cqid: u16, size: u32) -> Result<RawSq, DriverError> {
    let sq = make_sq(guest, qid, size)?;
    let create = CreateIoSq {
        prp1: sq.memory.addr(),
        qid,
        qsize_z: sq.size.size_z(),
        pc: true,
        qprio: QueuePriority::MEDIUM,
        cqid,
        nvmsetid: 0,
    };
    guest.admin_ok("Create I/O Submission Queue", create.to_sqe())?;
    Ok(sq)
}

/// Both queues under one identifier.
///
/// # Errors
///
/// The controller refused, or memory ran out.
pub fn create_pair(guest: &mut Guest, qid: u16, size: u32) -> Result<(RawSq, RawCq), DriverError> {
    let cq = create_cq(guest, qid, size, None)?;
    Ok((create_sq(guest, qid, qid, size)?, cq))
}

fn make_cq(guest: &mut Guest, qid: u16, size: u32) -> Result<RawCq, DriverError> {
    let (size, memory, bell) = parts(guest, size, 16, Which::Cq(qid))?;
    Ok(RawCq {
        qid,
        ring: Ring::new(memory.map(), memory.addr(), size.get())
            .ok_or(DriverError::Unsupported("a ring here"))?,
        memory,
        size,
        head: 0,
        phase: Phase::FIRST,
        bell,
    })
}

fn make_sq(guest: &mut Guest, qid: u16, size: u32) -> Result<RawSq, DriverError> {
    let (size, memory, bell) = parts(guest, size, 64, Which::Sq(qid))?;
    Ok(RawSq {
        qid,
        ring: Ring::new(memory.map(), memory.addr(), size.get())
            .ok_or(DriverError::Unsupported("a ring here"))?,
        memory,
        size,
        tail: 0,
        bell,
    })
}

fn parts(
    guest: &mut Guest,
    size: u32,
    entry: usize,
    which: Which,
) -> Result<(RingSize, Dma, GuestBell), DriverError> {
    let size = RingSize::new(size).ok_or(DriverError::Unsupported("a queue of this size"))?;
    let what = "making a queue";
    let device = |source| DriverError::Device { what, source };
    let front = guest.device().clone();
    let memory = front
        .memory()
        .allocate(size.get() as usize * entry)
        .map_err(device)?;
    let offset = front.stride().window_offset(which);
    let bell = front
        .bell(offset)
        .ok_or(DriverError::Unsupported("a doorbell for this queue"))?;
    Ok((size, memory, bell))
}
