//! The NVM commands of a [`Model`](super::Model), on memory.

use nvme_spec::nvm::{DatasetManagement, DsmRange, ReadWrite};
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::prp::{PageSize, ReadList, Segment, walk};
use nvme_spec::{Sqe, Status};
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::model::ModelOptions;
use super::space::FakeSpace;

/// The blocks of one namespace.
pub(super) struct Disk {
    bytes: Vec<u8>,
    shift: u32,
}

struct Lists<'a>(&'a FakeSpace);

impl ReadList for Lists<'_> {
    fn read(&mut self, addr: u64, entries: &mut [u64]) -> Result<(), Status> {
        match self.0.read(addr, entries.as_mut_bytes()) {
            true => Ok(()),
            false => Err(Status::DATA_TRANSFER_ERROR),
        }
    }
}

/// Move the data of a command: `f` gets each piece of device memory with the offset of its bytes.
pub(super) fn transfer(
    space: &FakeSpace,
    sqe: &Sqe,
    len: u32,
    mut f: impl FnMut(Segment, usize) -> bool,
) -> Result<(), Status> {
    let mut done = 0;
    walk(
        PageSize::K4,
        sqe.prp1,
        sqe.prp2,
        len,
        &mut Lists(space),
        &mut |segment| {
            let at = done;
            done += segment.len as usize;
            match f(segment, at) {
                true => Ok(()),
                false => Err(Status::DATA_TRANSFER_ERROR),
            }
        },
    )
}

impl Disk {
    pub(super) fn new(blocks: u64, shift: u32) -> Self {
        Self {
            bytes: vec![0; usize::try_from(blocks << shift).unwrap_or(0)],
            shift,
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(super) fn fill(&mut self, byte: u8) {
        self.bytes.fill(byte);
    }

    fn range(&self, slba: u64, blocks: u64) -> Result<std::ops::Range<usize>, Status> {
        let all = (self.bytes.len() >> self.shift) as u64;
        match slba.checked_add(blocks) {
            Some(end) if end <= all => {
                Ok((slba << self.shift) as usize..(end << self.shift) as usize)
            }
            _ => Err(Status::LBA_OUT_OF_RANGE),
        }
    }

    pub(super) fn command(
        &mut self,
        space: &FakeSpace,
        sqe: &Sqe,
        limits: &ModelOptions,
    ) -> Result<(), Status> {
        let command = ReadWrite::from_sqe(sqe);
        let blocks = u64::from(command.blocks());
        let len = command.blocks() << self.shift;
        match NvmOpcode(sqe.opcode) {
            NvmOpcode::FLUSH => Ok(()),
            NvmOpcode::READ => {
                let range = self.range(command.slba, blocks)?;
                let data = &self.bytes[range];
                transfer(space, sqe, len, |s, at| {
                    space.write(s.addr, &data[at..at + s.len as usize])
                })
            }
            NvmOpcode::WRITE => {
                let range = self.range(command.slba, blocks)?;
                let data = &mut self.bytes[range];
                transfer(space, sqe, len, |s, at| {
                    space.read(s.addr, &mut data[at..at + s.len as usize])
                })
            }
            NvmOpcode::COMPARE => {
                let range = self.range(command.slba, blocks)?;
                let mut theirs = vec![0; len as usize];
                transfer(space, sqe, len, |s, at| {
                    space.read(s.addr, &mut theirs[at..at + s.len as usize])
                })?;
                match self.bytes[range] == theirs[..] {
                    true => Ok(()),
                    false => Err(Status::COMPARE_FAILURE),
                }
            }
            NvmOpcode::VERIFY => self.range(command.slba, blocks).map(|_| ()),
            NvmOpcode::WRITE_ZEROES => {
                let range = self.range(command.slba, blocks)?;
                self.bytes[range].fill(0);
                Ok(())
            }
            NvmOpcode::DATASET_MANAGEMENT => self.deallocate(space, sqe, limits),
            _ => Err(Status::INVALID_OPCODE),
        }
    }

    fn deallocate(
        &mut self,
        space: &FakeSpace,
        sqe: &Sqe,
        limits: &ModelOptions,
    ) -> Result<(), Status> {
        let command = DatasetManagement::from_sqe(sqe);
        let mut bytes = vec![0; command.data_len() as usize];
        transfer(space, sqe, command.data_len(), |s, at| {
            space.read(s.addr, &mut bytes[at..at + s.len as usize])
        })?;
        let ranges: Vec<DsmRange> = bytes
            .chunks_exact(size_of::<DsmRange>())
            .filter_map(|b| DsmRange::read_from_bytes(b).ok())
            .collect();
        let over = |n: u64, limit: u64| limit != 0 && n > limit;
        let blocks = ranges.iter().map(|r| u64::from(r.nlb));
        // It may do nothing about what is beyond its limits: this one says so.
        if over(ranges.len() as u64, limits.dmrl.into())
            || over(blocks.clone().sum(), limits.dmsl)
            || over(blocks.max().unwrap_or(0), limits.dmrsl.into())
        {
            return Err(Status::INVALID_FIELD);
        }
        for range in &ranges {
            self.range(range.slba, range.nlb.into())?;
        }
        for range in ranges.iter().filter(|_| command.ad) {
            let range = self.range(range.slba, range.nlb.into())?;
            self.bytes[range].fill(0);
        }
        Ok(())
    }
}
