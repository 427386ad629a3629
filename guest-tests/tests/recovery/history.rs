//! What each block may hold: a write has an effect once, in its turn, and never again.

/// Bytes of a block.
pub const BLOCK: usize = 4096;

/// A version is written to a block as a word that says which, all over the block.
const STRIDE: usize = 64;

/// One block. Its versions are counted; version 0 are the zeroes it begins with.
struct Block {
    /// The versions that were written, in their order: is it zeroes?
    zeroes: Vec<bool>,
    /// The newest version that is known to be there: its write was completed, or somebody has read it.
    floor: u32,
    /// A write is out.
    writing: bool,
}

/// All blocks of a namespace.
pub struct History {
    nsid: u32,
    blocks: Vec<Block>,
}

/// What was out when a command was submitted.
pub struct Expected {
    slba: u64,
    /// Of each block: the version that is written, or that a read must at least see.
    versions: Vec<u32>,
}

impl Expected {
    pub fn blocks(&self) -> usize {
        self.versions.len()
    }
}

impl History {
    pub fn new(nsid: u32, blocks: u64) -> Self {
        let blocks = (0..blocks).map(|_| Block {
            zeroes: vec![true],
            floor: 0,
            writing: false,
        });
        Self {
            nsid,
            blocks: blocks.collect(),
        }
    }

    pub fn blocks(&self) -> u64 {
        self.blocks.len() as u64
    }

    fn word(&self, lba: u64, version: u32) -> u64 {
        u64::from(self.nsid) << 56 | lba << 32 | u64::from(version)
    }

    /// Begin a write; `None` if one of the blocks is being written.
    pub fn write(&mut self, slba: u64, count: usize, zeroes: bool) -> Option<Expected> {
        let range = slba as usize..slba as usize + count;
        let blocks = &mut self.blocks[range];
        if blocks.iter().any(|b| b.writing) {
            return None;
        }
        let versions = blocks.iter_mut().map(|b| {
            b.writing = true;
            b.zeroes.push(zeroes);
            b.zeroes.len() as u32 - 1
        });
        Some(Expected {
            slba,
            versions: versions.collect(),
        })
    }

    /// The data of a write.
    pub fn data(&self, e: &Expected) -> Vec<u8> {
        let mut out = vec![0; e.versions.len() * BLOCK];
        for (i, (block, &version)) in out.chunks_mut(BLOCK).zip(&e.versions).enumerate() {
            let word = self.word(e.slba + i as u64, version).to_le_bytes();
            for at in block.chunks_mut(STRIDE) {
                at[..8].copy_from_slice(&word);
            }
        }
        out
    }

    /// It was completed: from now on it is there.
    pub fn written(&mut self, e: &Expected) {
        for (i, &version) in e.versions.iter().enumerate() {
            let block = &mut self.blocks[e.slba as usize + i];
            assert!(block.writing);
            block.writing = false;
            block.floor = block.floor.max(version);
        }
    }

    /// It will never be completed (a reset): it is there or not, as a read will tell.
    pub fn lost(&mut self, e: &Expected) {
        for i in 0..e.versions.len() {
            self.blocks[e.slba as usize + i].writing = false;
        }
    }

    /// Begin a read.
    pub fn read(&self, slba: u64, count: usize) -> Expected {
        let blocks = &self.blocks[slba as usize..slba as usize + count];
        Expected {
            slba,
            versions: blocks.iter().map(|b| b.floor).collect(),
        }
    }

    /// What a read has brought.
    pub fn check(&mut self, e: &Expected, data: &[u8]) -> Result<(), String> {
        assert_eq!(data.len(), e.versions.len() * BLOCK);
        for (i, (bytes, &floor)) in data.chunks(BLOCK).zip(&e.versions).enumerate() {
            let lba = e.slba + i as u64;
            let tag = self.word(lba, 0);
            let block = &mut self.blocks[lba as usize];
            let newest = block.zeroes.len() as u32 - 1;
            let mut oldest_seen = u32::MAX;
            for at in bytes.chunks(STRIDE) {
                let word = u64::from_le_bytes(at[..8].try_into().expect("eight bytes"));
                let version = word as u32;
                let version = if word == 0 {
                    // Of zeroes nobody knows which: the oldest they can be.
                    (floor..=newest).find(|&v| block.zeroes[v as usize])
                } else {
                    let known = word & !0xFFFF_FFFF == tag && (floor..=newest).contains(&version);
                    (known && !block.zeroes[version as usize]).then_some(version)
                };
                let Some(version) = version else {
                    return Err(format!(
                        "block {lba} of namespace {} reads {word:#018x}; versions {floor} to {newest} are possible, zeroes are {:?}",
                        self.nsid,
                        &block.zeroes[floor as usize..]
                    ));
                };
                oldest_seen = oldest_seen.min(version);
            }
            // What was seen once stays.
            block.floor = block.floor.max(oldest_seen);
        }
        Ok(())
    }
}

#[test]
fn the_checker_finds_what_it_is_for() {
    let mut h = History::new(1, 16);
    let first = h.write(3, 2, false).unwrap();
    assert!(h.write(4, 1, false).is_none(), "it is being written");
    let old = vec![0; 2 * BLOCK];
    let new = h.data(&first);
    let r = h.read(3, 2);
    h.check(&r, &old).unwrap();
    h.check(&r, &new).unwrap();
    let r = h.read(3, 2);
    assert!(h.check(&r, &old).is_err(), "it was there before");
    h.written(&first);
    let second = h.write(3, 1, true).unwrap();
    h.written(&second);
    let r = h.read(3, 1);
    assert!(h.check(&r, &new[..BLOCK]).is_err(), "a write of before");
    h.check(&r, &old[..BLOCK]).unwrap();
    let r = h.read(4, 1);
    assert!(h.check(&r, &new[..BLOCK]).is_err(), "another block's");
    h.check(&r, &new[BLOCK..]).unwrap();
    let third = h.write(5, 1, false).unwrap();
    h.lost(&third);
    let data = h.data(&third);
    let r = h.read(5, 1);
    h.check(&r, &old[..BLOCK]).unwrap();
    h.check(&r, &data).unwrap();
    let torn = [&data[..BLOCK / 2], &old[..BLOCK / 2]].concat();
    let r = h.read(5, 1);
    assert!(h.check(&r, &torn).is_err(), "half of it is gone again");
}
