//! Requests that cannot go to the SSD as one command at once: what is left of them, and how they are cut.

use std::num::NonZero;

use nvme_spec::StatusField;

use super::pages::PAGE;
use crate::backend::guest::HeldGuest;
use crate::backend::traits::Traits;
use crate::backend::{BlockRange, Operation, Request};

/// The most blocks of one command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// Of a Read, Write or Compare.
    transfer: u32,
    /// Blocks between the boundaries that none of these should cross, counted from the SSD's block 0; 0 = there are none.
    boundary: u32,
    /// Of a Verify.
    verify: u32,
    /// Of a Write Zeroes.
    zeroes: u32,
    /// Of a range of Dataset Management.
    range: u32,
    /// Of all its ranges together.
    ranges: u64,
    /// Ranges it can have.
    count: usize,
}

/// Ranges that the Number of Ranges field can say: a page full.
pub(super) const MOST_RANGES: usize = 256;

/// Blocks that the Number of Logical Blocks field can say.
const MOST: u32 = 1 << 16;

impl Limits {
    /// Those of an SSD whose namespace has this optimal boundary (NOIOB).
    pub fn of(traits: &Traits, noiob: u16, block_shift: u32) -> Self {
        let transfer = (traits.max_transfer.max(PAGE.bytes()) >> block_shift).clamp(1, MOST);
        // Powers of two in pages; who tells no limit may mean the one of transfers.
        let own = |power: u8| match power {
            0 => transfer,
            power => {
                let bytes = u64::from(PAGE.bytes()).checked_shl(power.into());
                let blocks = bytes.map_or(MOST.into(), |b| b >> block_shift);
                blocks.clamp(1, MOST.into()) as u32
            }
        };
        let limits = &traits.limits;
        Self {
            transfer,
            boundary: noiob.into(),
            verify: own(limits.vsl),
            zeroes: own(limits.wzsl),
            // As those: 0 is no limit.
            range: NonZero::new(limits.dmrsl).map_or(u32::MAX, NonZero::get),
            ranges: NonZero::new(limits.dmsl).map_or(u64::MAX, NonZero::get),
            count: NonZero::new(limits.dmrl).map_or(MOST_RANGES, |n| n.get().into()),
        }
    }

    /// Whether a transfer of blocks of the SSD is one command.
    #[inline]
    pub fn is_whole(&self, slba: u64, blocks: u32) -> bool {
        blocks <= self.transfer && (self.boundary == 0 || blocks <= self.to_boundary(slba))
    }

    fn to_boundary(self, slba: u64) -> u32 {
        match u64::from(self.boundary) {
            0 => u32::MAX,
            boundary => (boundary - slba % boundary) as u32,
        }
    }

    /// How many of these blocks of the SSD the first command is about.
    pub fn piece(&self, operation: Operation, slba: u64, blocks: u32) -> u32 {
        let most = match operation {
            Operation::Read | Operation::Write { .. } | Operation::Compare => {
                self.transfer.min(self.to_boundary(slba))
            }
            Operation::Verify => self.verify,
            Operation::WriteZeroes { .. } => self.zeroes,
            Operation::Deallocate => u32::try_from(self.ranges)
                .unwrap_or(u32::MAX)
                .min(self.range),
            Operation::Flush => u32::MAX,
        };
        blocks.min(most)
    }

    /// How many of these ranges, from the first on, one command can be about; 0 if the first has to be cut.
    pub fn together(&self, ranges: &[BlockRange]) -> usize {
        let mut left = self.ranges;
        let fits = |range: &&BlockRange| {
            let blocks = u64::from(range.blocks);
            let fits = range.blocks <= self.range && blocks <= left;
            left = left.saturating_sub(blocks);
            fits
        };
        ranges.iter().take(self.count).take_while(fits).count()
    }
}

/// A request that is cut, or waits for room.
pub(super) struct Job {
    pub operation: Operation,
    /// First block of the guest's namespace.
    pub slba: u64,
    pub blocks: u32,
    /// Blocks that commands were sent for.
    pub sent: u32,
    /// All commands have been sent, or no more shall be.
    pub complete: bool,
    /// Commands that are out.
    pub out: u32,
    /// It is in the queue of those that wait for room.
    pub waits: bool,
    /// The first thing that went wrong.
    pub failed: Option<StatusField>,
    pub guest: Option<HeldGuest>,
}

impl Job {
    pub fn of(request: &Request<'_>) -> Self {
        Self {
            operation: request.operation,
            slba: request.slba,
            blocks: request.blocks,
            sent: 0,
            complete: false,
            out: 0,
            waits: false,
            failed: None,
            guest: request.guest.as_ref().map(HeldGuest::of),
        }
    }

    /// No more of it shall be sent.
    pub fn fail(&mut self, status: StatusField) {
        self.complete = true;
        self.failed = self.failed.or(Some(status));
    }

    /// What came of it, once nothing of it is out or to be sent.
    pub fn end(&self) -> Option<StatusField> {
        (self.complete && self.out == 0 && !self.waits).then(|| self.failed.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvme_spec::identify::{
        IdentifyNamespace, NvmControllerIdentify, NvmNamespaceIdentify, Oncs,
    };

    fn limits(max_transfer: u32, noiob: u16) -> Limits {
        let traits = Traits {
            max_transfer,
            oncs: Oncs::new(),
            namespace: IdentifyNamespace::default(),
            nvm: NvmNamespaceIdentify::default(),
            temperatures: [0; 2],
            pass: crate::backend::Opcodes::NONE,
            atomic_z: [0; 3],
            limits: NvmControllerIdentify {
                wzsl: 3,
                dmrl: 5,
                dmrsl: 1000,
                dmsl: 700,
                ..NvmControllerIdentify::default()
            },
        };
        Limits::of(&traits, noiob, 9)
    }

    #[test]
    fn pieces_are_within_all_limits() {
        let l = limits(65536, 100);
        assert!(l.is_whole(0, 100) && !l.is_whole(1, 100) && !l.is_whole(0, 129));
        let cut = |l: &Limits, operation, mut slba: u64, mut left: u32| {
            let mut pieces = Vec::new();
            while left > 0 {
                let n = l.piece(operation, slba, left);
                pieces.push(n);
                slba += u64::from(n);
                left -= n;
            }
            pieces
        };
        assert_eq!(cut(&l, Operation::Read, 90, 250), [10, 100, 100, 40]);
        assert_eq!(cut(&limits(65536, 0), Operation::Read, 90, 250), [128, 122]);
        assert_eq!(cut(&l, Operation::Verify, 0, 200), [128, 72]);
        let zeroes = Operation::WriteZeroes {
            deallocate: false,
            fua: false,
        };
        assert_eq!(cut(&l, zeroes, 90, 100), [64, 36], "8 pages are 64 blocks");
        assert_eq!(cut(&l, Operation::Deallocate, 0, 1000), [700, 300]);
        let ranges = |blocks: &[u32]| -> Vec<BlockRange> {
            let range = |blocks: &u32| BlockRange {
                slba: 0,
                blocks: *blocks,
            };
            blocks.iter().map(range).collect()
        };
        assert_eq!(l.together(&ranges(&[100, 600, 1])), 2, "700 in all");
        assert_eq!(l.together(&ranges(&[1; 9])), 5, "five ranges");
        assert_eq!(l.together(&ranges(&[701, 1])), 0);
        let none = Limits {
            range: 1000,
            ranges: u64::MAX,
            count: MOST_RANGES,
            ..l
        };
        assert_eq!(none.together(&ranges(&[1000; 300])), 256);
        assert_eq!(none.together(&ranges(&[1000, 1001, 1])), 1);
        assert_eq!(
            limits(0, 0).piece(Operation::Read, 0, 100),
            8,
            "a page at least"
        );
        assert_eq!(limits(u32::MAX, 0).piece(Operation::Read, 0, MOST), MOST);
    }
}
