//! Commands that are waited for: what most tests want.

use std::time::{Duration, Instant};

use nvme_spec::nvm::{DatasetManagement, DsmRange, Flush, ReadWrite};
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::sgl::Descriptor;
use nvme_spec::{Cqe, Sqe, Status};
use vhost_user_nvme::driver::{Completion, Dma, QueueConfig, QueuePair};
use zerocopy::IntoBytes as _;

use crate::frontend::GuestBell;
use crate::raw::Guest;

/// How long any command of a test may take before the test fails.
pub const LIMIT: Duration = Duration::from_secs(20);

/// A queue pair of the virtual guest.
pub type Pair = QueuePair<GuestBell>;

/// Collect `count` completions, sleeping on the queue's interrupt (if it has one) in between: a completion that is never
/// signalled, or never made, fails the test.
pub fn collect(pair: &mut Pair, count: usize) -> Vec<Completion> {
    let mut done = Vec::with_capacity(count);
    let start = Instant::now();
    while done.len() < count {
        let left = (count - done.len()) as u32;
        if pair.poll(left, |c| done.push(c)) > 0 {
            continue;
        }
        assert_eq!(pair.take_fault(), None, "queue {}", pair.qid());
        assert!(
            start.elapsed() < LIMIT,
            "queue {}: {} of {count} completions after {LIMIT:?}",
            pair.qid(),
            done.len()
        );
        if pair.interrupt().is_some() {
            pair.wait(LIMIT).expect("an eventfd");
        } else {
            std::thread::sleep(Duration::from_micros(50));
        }
    }
    done
}

/// Submit one command with its data pointers in it, and wait.
pub fn exec(pair: &mut Pair, sqe: Sqe) -> Cqe {
    pair.submit(sqe, 0).expect("room in the queue");
    pair.ring();
    collect(pair, 1)[0].cqe
}

/// Submit one command with data, and wait.
pub fn exec_data(pair: &mut Pair, sqe: Sqe, addr: u64, len: u32) -> Cqe {
    pair.submit_data(sqe, addr, len, 0).expect("a transfer");
    pair.ring();
    collect(pair, 1)[0].cqe
}

/// A queue pair, a buffer, and a namespace: the comfortable way to do I/O.
pub struct Io {
    /// The queue pair.
    pub pair: Pair,
    /// Data of commands, from its first byte on.
    pub data: Dma,
    /// The namespace.
    pub nsid: u32,
    /// Bytes of a block.
    pub block: u32,
    /// The controller takes SGLs.
    pub sgls: bool,
}

impl Io {
    /// A queue pair on namespace `nsid`, with a buffer as large as the largest transfer.
    pub fn new(guest: &mut Guest, config: QueueConfig, nsid: u32) -> Self {
        let pair = guest.create_queue_pair(config).expect("a queue pair");
        let ns = guest.identify_namespace(nsid).expect("a namespace");
        let sgls = guest
            .identify_controller()
            .expect("a controller")
            .sgls
            .supported()
            != 0;
        let shift = ns.current_format().expect("a format").lbads;
        let bytes = pair.max_transfer() as usize;
        let data = guest
            .device()
            .memory()
            .allocate(bytes)
            .expect("guest memory");
        Self {
            pair,
            data,
            nsid,
            block: 1 << shift,
            sgls,
        }
    }

    /// A command on blocks.
    pub fn command(&self, slba: u64, blocks: u32) -> ReadWrite {
        ReadWrite::new(self.nsid, slba, (blocks - 1) as u16)
    }

    /// Any command that moves `blocks` blocks from or to the buffer.
    pub fn transfer(&mut self, opcode: NvmOpcode, slba: u64, blocks: u32) -> Status {
        let sqe = self.command(slba, blocks).to_sqe(opcode, 0, 0);
        let (addr, len) = (self.data.addr(), blocks * self.block);
        exec_data(&mut self.pair, sqe, addr, len).status()
    }

    /// Write `bytes` (whole blocks).
    pub fn write(&mut self, slba: u64, bytes: &[u8]) -> Status {
        self.data.write(0, bytes);
        self.transfer(NvmOpcode::WRITE, slba, bytes.len() as u32 / self.block)
    }

    /// Read blocks.
    pub fn read(&mut self, slba: u64, blocks: u32) -> Result<Vec<u8>, Status> {
        self.data.fill(0xDB);
        match self.transfer(NvmOpcode::READ, slba, blocks) {
            Status::SUCCESS => Ok(self.data.bytes((blocks * self.block) as usize)),
            status => Err(status),
        }
    }

    /// Compare `bytes` with the blocks.
    pub fn compare(&mut self, slba: u64, bytes: &[u8]) -> Status {
        self.data.write(0, bytes);
        self.transfer(NvmOpcode::COMPARE, slba, bytes.len() as u32 / self.block)
    }

    /// A command on blocks without data: Verify, Write Zeroes.
    pub fn blocks(&mut self, opcode: NvmOpcode, slba: u64, blocks: u32) -> Status {
        let sqe = self.command(slba, blocks).to_sqe(opcode, 0, 0);
        exec(&mut self.pair, sqe).status()
    }

    /// Flush.
    pub fn flush(&mut self) -> Status {
        exec(&mut self.pair, Flush { nsid: self.nsid }.to_sqe()).status()
    }

    /// Deallocate ranges (first block, number).
    pub fn deallocate(&mut self, ranges: &[(u64, u32)]) -> Status {
        let ranges: Vec<DsmRange> = ranges
            .iter()
            .map(|&(slba, nlb)| DsmRange {
                cattr: 0,
                nlb,
                slba,
            })
            .collect();
        self.data.write(0, ranges.as_bytes());
        let command = DatasetManagement {
            nsid: self.nsid,
            nr_z: (ranges.len() - 1) as u8,
            ad: true,
            ..DatasetManagement::default()
        };
        let (addr, len) = (self.data.addr(), command.data_len());
        exec_data(&mut self.pair, command.to_sqe(0, 0), addr, len).status()
    }
}

/// Write an SGL for these pieces of memory (address and length) into `lists`, from byte `at` on, `most` descriptors to a segment: the
/// descriptor for the command. One piece needs no list.
pub fn sgl(lists: &Dma, at: usize, pieces: &[(u64, u32)], most: usize) -> Descriptor {
    if let [(addr, len)] = *pieces {
        return Descriptor::data(addr, len);
    }
    let (mut at, mut end) = (at, None);
    // From the end: each segment is told where the next lies.
    for piece in pieces.chunks(most).rev() {
        let mut segment: Vec<Descriptor> =
            piece.iter().map(|&(a, n)| Descriptor::data(a, n)).collect();
        let last = end.is_none();
        segment.extend(end);
        lists.write(at, segment.as_bytes());
        let (addr, count) = (lists.addr() + at as u64, segment.len() as u32);
        end = Some(match last {
            true => Descriptor::last_segment(addr, count),
            false => Descriptor::segment(addr, count),
        });
        at += segment.len() * 16;
    }
    end.expect("a piece")
}
