//! List memory for the PRP tests, and the naive model the walker and builder are compared with.

use nvme_spec::Status;
use nvme_spec::prp::BuildError;
use nvme_spec::prp::PageSize;
use nvme_spec::prp::Prps;
use nvme_spec::prp::ReadList;
use nvme_spec::prp::Segment;
use nvme_spec::prp::WriteList;
use nvme_spec::prp::build;
use nvme_spec::prp::walk;
use proptest::prelude::*;
use std::collections::HashMap;

/// What reading an entry nobody wrote answers: a vendor status, so no code of ours can have made it.
pub const UNMAPPED: Status = Status::new(7, 0x55);

/// List entries by address. Checks on every access what the traits promise.
pub struct Lists {
    pub page: PageSize,
    pub entries: HashMap<u64, u64>,
    pub reads: u64,
}

impl Lists {
    pub fn new(page: PageSize) -> Self {
        Self {
            page,
            entries: HashMap::new(),
            reads: 0,
        }
    }

    fn check_promises(&self, addr: u64, n: usize) {
        assert_eq!(addr % 8, 0, "entry address {addr:#x} is aligned");
        assert!((1..=64).contains(&n), "{n} entries");
        assert!(
            n as u64 * 8 <= u64::from(self.page.rest(addr)),
            "{n} entries at {addr:#x} stay in their page"
        );
    }
}

impl ReadList for Lists {
    fn read(&mut self, addr: u64, entries: &mut [u64]) -> Result<(), Status> {
        self.check_promises(addr, entries.len());
        self.reads += entries.len() as u64;
        for (i, entry) in entries.iter_mut().enumerate() {
            *entry = *self.entries.get(&(addr + i as u64 * 8)).ok_or(UNMAPPED)?;
        }
        Ok(())
    }
}

impl WriteList for Lists {
    fn write(&mut self, addr: u64, entries: &[u64]) {
        self.check_promises(addr, entries.len());
        for (i, entry) in entries.iter().enumerate() {
            let old = self.entries.insert(addr + i as u64 * 8, *entry);
            assert_eq!(old, None, "no entry is written twice");
        }
    }
}

/// Walks and collects.
pub fn walked(lists: &mut Lists, prps: Prps, len: u32) -> (Result<(), Status>, Vec<Segment>) {
    let mut segments = Vec::new();
    let page = lists.page;
    let result = walk(page, prps.prp1, prps.prp2, len, lists, &mut |segment| {
        segments.push(segment);
        Ok(())
    });
    (result, segments)
}

/// A transfer as a driver would describe it, and where its list goes.
#[derive(Clone, Debug)]
pub struct Transfer {
    pub page: PageSize,
    pub pages: Vec<u64>,
    pub offset: u32,
    pub len: u32,
    pub lists: Vec<u64>,
}

impl Transfer {
    pub fn build(&self, memory: &mut Lists) -> Result<Prps, BuildError> {
        build(
            self.page,
            self.pages.iter().copied(),
            self.offset,
            self.len,
            self.lists.iter().copied(),
            memory,
        )
    }

    /// Pages the transfer touches.
    pub fn touched(&self) -> usize {
        match self.len {
            0 => 0,
            len => (u64::from(self.offset) + u64::from(len)).div_ceil(u64::from(self.page.bytes()))
                as usize,
        }
    }

    /// One piece per page: address and length.
    pub fn pieces(&self) -> Vec<Segment> {
        let size = u64::from(self.page.bytes());
        let end = u64::from(self.offset) + u64::from(self.len);
        (0..self.touched() as u64)
            .map(|i| {
                let from = u64::from(self.offset).max(i * size);
                let to = end.min((i + 1) * size);
                Segment {
                    addr: self.pages[i as usize] + from % size,
                    len: (to - from) as u32,
                }
            })
            .collect()
    }

    /// The addresses of the list entries: those of data (for the second page on, in order) and
    /// those of pointers to a next list.
    pub fn entry_addresses(&self) -> (Vec<u64>, Vec<u64>) {
        let (mut data, mut pointers) = (Vec::new(), Vec::new());
        let mut needed = self.touched().saturating_sub(1);
        if needed < 2 {
            return (data, pointers);
        }
        for &list in &self.lists {
            let slots: Vec<u64> = (list..list + u64::from(self.page.rest(list)))
                .step_by(8)
                .collect();
            if needed <= slots.len() {
                data.extend(&slots[..needed]);
                break;
            }
            data.extend(&slots[..slots.len() - 1]);
            pointers.push(slots[slots.len() - 1]);
            needed -= slots.len() - 1;
        }
        (data, pointers)
    }
}

/// Joins pieces that touch.
pub fn joined(pieces: &[Segment]) -> Vec<Segment> {
    let mut all: Vec<Segment> = Vec::new();
    for piece in pieces {
        match all.last_mut() {
            Some(last) if last.addr + u64::from(last.len) == piece.addr => last.len += piece.len,
            _ => all.push(*piece),
        }
    }
    all
}

prop_compose! {
    /// Any page size up to 64 KiB, any offset, up to a little over two list pages of 4 KiB; pages
    /// scattered and in runs; a list that starts anywhere in its page.
    pub fn transfer()(
        mps in 0u8..=4,
        offset in any::<u32>(),
        len in prop_oneof![
            0u32..=20_000,
            1u32..=5_000_000,
            (0u32..=600).prop_map(|pages| pages * 4096),
        ],
        first_slots in prop_oneof![1u64..=4, 1u64..=512, Just(512u64)],
        seed in prop::collection::vec((1u64..1 << 40, any::<bool>()), 1..64),
    ) -> Transfer {
        let page = PageSize::from_mps(mps).unwrap();
        let size = u64::from(page.bytes());
        let offset = (offset % page.bytes()) & !3;
        let touched = (u64::from(offset) + u64::from(len)).div_ceil(size);
        let mut pages: Vec<u64> = Vec::new();
        for i in 0..touched {
            // The seed is used round and round, moved on each time so that no page comes twice.
            let (number, run) = seed[i as usize % seed.len()];
            let addr = match pages.last() {
                Some(last) if run => last + size,
                _ => (number + (i << 41)) * size % (1 << 62) / size * size,
            };
            pages.push(addr);
        }
        // Lists in the top quarter of the address space: they meet no page.
        let list_page = |i: u64| (3 << 62) + i * 3 * size;
        let slots = first_slots.min(size / 8);
        let mut lists = vec![list_page(0) + size - slots * 8];
        lists.extend((1..2 + touched / (size / 8 - 1) + 1).map(list_page));
        Transfer { page, pages, offset, len, lists }
    }
}
