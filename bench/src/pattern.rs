//! Which command comes next: a block of the namespace and a buffer of the guest, both at random.

use crate::fence::Line;

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Operation {
    /// Reads of blocks at random.
    Randread,
    /// Writes of blocks at random.
    Randwrite,
    /// Seven reads on three writes.
    Mix,
}

impl Operation {
    /// As it is named in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Randread => "randread",
            Self::Randwrite => "randwrite",
            Self::Mix => "mix",
        }
    }

    /// Writes in 2^32 commands.
    fn writes(self) -> u64 {
        match self {
            Self::Randread => 0,
            Self::Randwrite => 1 << 32,
            Self::Mix => (1 << 32) * 3 / 10,
        }
    }
}

const WRITE: u64 = 1;
const READ: u64 = 2;
const PAGE: u64 = 4096;

/// The buffers of a guest: pieces of one size, one after the other, with their PRP lists elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct Pieces {
    /// Guest physical address of the first.
    pub first: u64,
    /// How many there are, at least 1.
    pub count: u64,
    /// From one to the next: a multiple of a page.
    pub step: u64,
    /// Guest physical address of the first list.
    pub lists: u64,
    /// From one list to the next; a list does not cross a page.
    pub list_step: u64,
}

/// What one queue does.
#[derive(Clone, Debug)]
pub struct Pattern {
    rng: u64,
    writes: u64,
    nsid: u64,
    nlb_z: u64,
    /// Transfers the namespace has room for, at least 1.
    places: u64,
    blocks: u64,
    bytes: u64,
    pieces: Pieces,
}

impl Pattern {
    /// Transfers of `blocks` blocks (`bytes` bytes), at `places` places of the namespace.
    pub fn new(
        operation: Operation,
        nsid: u32,
        blocks: u32,
        bytes: u32,
        places: u64,
        pieces: Pieces,
        seed: u64,
    ) -> Self {
        Self {
            rng: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            writes: operation.writes(),
            nsid: u64::from(nsid),
            nlb_z: u64::from(blocks.saturating_sub(1)),
            places: places.max(1),
            blocks: u64::from(blocks),
            bytes: u64::from(bytes),
            pieces,
        }
    }

    /// The next command.
    #[inline]
    pub fn next(&mut self, cid: u16) -> Line {
        self.rng ^= self.rng << 13;
        self.rng ^= self.rng >> 7;
        self.rng ^= self.rng << 17;
        let random = self.rng;
        // A number below n out of 64 random bits: the high half of the product. Rotated, the same bits serve for all three.
        let below = |bits: u64, n: u64| ((u128::from(bits) * u128::from(n)) >> 64) as u64;
        let place = below(random, self.places);
        let piece = below(random.rotate_left(24), self.pieces.count);
        let opcode = if random & 0xFFFF_FFFF < self.writes {
            WRITE
        } else {
            READ
        };
        let prp1 = self.pieces.first + piece * self.pieces.step;
        let prp2 = if self.bytes <= PAGE {
            0
        } else if self.bytes <= 2 * PAGE {
            prp1 + PAGE
        } else {
            self.pieces.lists + piece * self.pieces.list_step
        };
        Line([
            opcode | u64::from(cid) << 16 | self.nsid << 32,
            0,
            0,
            prp1,
            prp2,
            place * self.blocks,
            self.nlb_z,
            0,
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvme_spec::Sqe;
    use nvme_spec::nvm::ReadWrite;

    fn pattern(operation: Operation, bytes: u32) -> Pattern {
        let pieces = Pieces {
            first: 1 << 32,
            count: 100,
            step: u64::from(bytes.max(4096)),
            lists: 1 << 40,
            list_step: 256,
        };
        Pattern::new(operation, 3, bytes / 512, bytes, 1000, pieces, 7)
    }

    #[test]
    fn commands_stay_inside_and_go_everywhere() {
        let mut p = pattern(Operation::Mix, 131_072);
        let (mut writes, mut lowest, mut highest) = (0, u64::MAX, 0);
        for _ in 0..20_000 {
            let Line(words) = p.next(9);
            let sqe: Sqe = zerocopy::transmute!(words);
            let command = ReadWrite::from_sqe(&sqe);
            assert_eq!((sqe.cid, sqe.nsid, command.blocks()), (9, 3, 256));
            assert!(command.slba < 1000 * 256 && command.slba.is_multiple_of(256));
            let piece = (sqe.prp1 - (1 << 32)) / 131_072;
            assert!(piece < 100 && sqe.prp1.is_multiple_of(4096));
            assert_eq!(sqe.prp2, (1 << 40) + piece * 256);
            writes += u32::from(sqe.opcode == 1);
            lowest = lowest.min(command.slba);
            highest = highest.max(command.slba);
        }
        assert!((5_500..6_500).contains(&writes), "{writes} of 20000");
        assert!(lowest < 2560 && highest > 997 * 256);
    }

    #[test]
    fn second_pages_and_pure_patterns() {
        for (operation, opcode) in [(Operation::Randread, 2), (Operation::Randwrite, 1)] {
            let mut p = pattern(operation, 8192);
            for _ in 0..1000 {
                let Line(words) = p.next(0);
                assert_eq!(words[0] & 0xFF, opcode);
                assert_eq!(words[4], words[3] + 4096);
            }
            let Line(words) = pattern(operation, 512).next(0);
            assert_eq!((words[4], words[6]), (0, 0));
        }
    }
}
