//! The fence around NVMe commands by io_uring: which memory the device reads and writes, and for how long.
//!
//! Three kinds of memory are handed over: segments of a request (a [`Held`], alive by the contract of `Channel::submit`), bounce buffers
//! and the ranges of Dataset Management, both owned by the [`Ring`] until the kernel has finished ([`Uring`]).

#![expect(unsafe_code, reason = "the fence: memory given to the kernel")]

use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut};

use io_uring::types::Fixed;
use io_uring::{cqueue, opcode, squeue};
use nvme_spec::nvm::DsmRange;
use zerocopy::IntoBytes as _;

use super::command::Command;
use super::device::Limits;
use crate::backend::Tag;
use crate::backend::bounce::{Bounce, Bounces};
use crate::backend::uring::{Uring, Vector, length};
use crate::memory::{Held, HostSeg};

/// `_IOWR('N', 0x80, struct nvme_uring_cmd)` and `0x81` of `linux/nvme_ioctl.h`.
const NVME_URING_CMD_IO: u32 = 0xc048_4e80;
const NVME_URING_CMD_IO_VEC: u32 = 0xc048_4e81;

/// Addresses the driver takes as they are: any dword. Others it would copy.
pub(super) const MEMORY_ALIGN: usize = 4;

const PAGE: usize = 4096;

/// What a command moves.
pub(super) enum Data<'a> {
    /// Nothing.
    None,
    /// A part of a request's own memory.
    Piece(&'a Piece),
    /// The first bytes of a bounce buffer.
    Bounce(&'a Bounce, usize),
    /// The range that was set for a tag.
    Range(Tag),
}

/// A part of a request's memory that one command can move.
pub(super) struct Piece {
    vector: Vector,
    bytes: usize,
}

impl Piece {
    /// As much as one command takes of a request's memory from byte `from` on, in whole blocks. `None` if the way it is cut up allows
    /// not even one.
    pub fn of(held: &Held, from: usize, limits: &Limits, block: usize) -> Option<Self> {
        let (segs, inside) = held.buffers().split_at(from);
        let first = segs.first()?;
        let (ptr, len) = first.parts();
        let left = len.checked_sub(inside)?;
        if inside > 0 || segs.len() == 1 || left >= limits.bytes {
            let bytes = left.min(limits.bytes);
            let bytes = bytes - bytes % block;
            return (bytes > 0).then(|| Self {
                vector: Vector::One(ptr.wrapping_add(inside), length(bytes)),
                bytes,
            });
        }
        let (mut count, mut bytes, mut taken) = (0, 0, 0);
        for (i, seg) in segs.iter().take(limits.segments).enumerate() {
            taken += seg.len();
            if taken > limits.bytes {
                break;
            }
            if taken % block == 0 {
                (count, bytes) = (i + 1, taken);
            }
        }
        let vector = match count {
            0 => return None,
            1 => Vector::One(ptr, length(bytes)),
            n => Vector::Many(segs.as_ptr().cast(), n as u32),
        };
        Some(Self { vector, bytes })
    }

    /// How much it is.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

const _: () = assert!(size_of::<HostSeg>() == size_of::<libc::iovec>());

/// An io_uring for NVMe commands, with the memory it needs.
pub(super) struct Ring(Uring<squeue::Entry128, cqueue::Entry32, Bounces>);

impl Deref for Ring {
    type Target = Uring<squeue::Entry128, cqueue::Entry32, Bounces>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Ring {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl Ring {
    /// A ring for `depth` commands at a time, with tags below that, and `bounces` bounce buffers.
    ///
    /// # Errors
    ///
    /// As [`Uring::new`].
    pub fn new(
        device: &File,
        fence: Option<&File>,
        depth: u32,
        bounces: usize,
    ) -> io::Result<Self> {
        let ranges = (depth as usize * size_of::<DsmRange>()).next_multiple_of(PAGE);
        Uring::new(device, fence, depth, false, Bounces::new(ranges, bounces)?).map(Self)
    }

    fn range(&self, tag: Tag) -> *mut u8 {
        let size = size_of::<DsmRange>();
        self.memory().head(tag as usize * size, size)
    }

    /// Say what [`Data::Range`] of a tag is. `tag` is below the ring's depth.
    ///
    /// # Safety
    ///
    /// The kernel has no command with the range of that tag.
    pub unsafe fn set_range(&mut self, tag: Tag, range: DsmRange) {
        // SAFETY: 16 bytes of the head, aligned to 16, of our own: nobody else has an address in there by our contract.
        unsafe { self.range(tag).cast::<DsmRange>().write(range) };
    }

    /// Queue a command; its result comes with `key`. `blocking`: let a worker thread of the kernel send it. `false`, and nothing
    /// queued, if there is no room.
    ///
    /// # Safety
    ///
    /// The memory named (a request's, a bounce buffer, a range) must stay as it is until [`Uring::next`] gives the result of
    /// `key`, or this ring has been dropped.
    #[must_use]
    pub unsafe fn queue(
        &mut self,
        key: u64,
        command: &Command,
        data: &Data<'_>,
        blocking: bool,
    ) -> bool {
        let mut command = *command;
        let mut operation = NVME_URING_CMD_IO;
        (command.addr, command.data_len) = match *data {
            Data::None => (0, 0),
            Data::Piece(piece) => match piece.vector {
                Vector::One(ptr, n) => (address(ptr), n),
                Vector::Many(list, n) => {
                    operation = NVME_URING_CMD_IO_VEC;
                    (address(list.cast()), n)
                }
            },
            Data::Bounce(bounce, n) => (address(self.memory().address(bounce)), length(n)),
            Data::Range(tag) => (address(self.range(tag)), size_of::<DsmRange>() as u32),
        };
        let mut bytes = [0; 80];
        if let Some(place) = bytes.get_mut(..size_of::<Command>()) {
            place.copy_from_slice(command.as_bytes());
        }
        let mut entry = opcode::UringCmd80::new(Fixed(0), operation)
            .cmd(bytes)
            .build()
            .user_data(key);
        if blocking {
            entry = entry.flags(squeue::Flags::ASYNC);
        }
        // SAFETY: every address in the command is that of a request's memory, a bounce buffer or a range, alive by our contract.
        unsafe { self.0.push(&entry) }
    }
}

fn address(ptr: *const u8) -> u64 {
    ptr.expose_provenance() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Buffers;

    fn pieces(lens: &[usize], limits: &Limits, block: usize) -> Vec<(usize, usize)> {
        let mut memory: Vec<Vec<u8>> = lens.iter().map(|n| vec![0; *n]).collect();
        let segs: Vec<_> = memory.iter_mut().map(|m| HostSeg::of_slice(m)).collect();
        // SAFETY: only addresses and lengths are looked at; all of it outlives the use.
        let held = unsafe { Held::new(&Buffers::new(&segs)) };
        let mut out = Vec::new();
        let mut from = 0;
        while let Some(piece) = Piece::of(&held, from, limits, block) {
            let n = match piece.vector {
                Vector::One(..) => 1,
                Vector::Many(_, n) => n as usize,
            };
            out.push((n, piece.bytes()));
            from += piece.bytes();
        }
        out
    }

    #[test]
    fn pieces_are_whole_blocks_within_the_limits() {
        let limits = |bytes, segments| Limits {
            bytes,
            segments,
            verify: 1,
            zeroes: 1,
            deallocate: 1,
        };
        let roomy = limits(1 << 20, 127);
        assert_eq!(pieces(&[4096], &roomy, 512), [(1, 4096)]);
        assert_eq!(pieces(&[512, 4096, 3584], &roomy, 4096), [(3, 8192)]);
        let few = limits(8192, 2);
        assert_eq!(
            pieces(&[4096, 4096, 4096], &few, 512),
            [(2, 8192), (1, 4096)]
        );
        // One long segment is cut, and its rest does not hold up what follows.
        assert_eq!(
            pieces(&[20480, 4096], &few, 4096),
            [(1, 8192), (1, 8192), (1, 4096), (1, 4096)]
        );
        // Blocks that lie across segments: as far as one command reaches, else not at all.
        assert_eq!(pieces(&[512, 4096, 3584], &few, 4096), []);
        assert_eq!(
            pieces(&[4096, 512, 4096, 3584], &limits(1 << 20, 3), 4096),
            [(1, 4096), (3, 8192)]
        );
        assert_eq!(pieces(&[5000, 3192], &limits(4096, 9), 4096), [(1, 4096)]);
        assert_eq!(pieces(&[], &roomy, 512), []);
    }
}
