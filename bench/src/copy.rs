//! How fast this machine copies at the moment: the yardstick for rows that are mostly a copy.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use crate::Failure;
use crate::fence::Ram;
use crate::pattern::Operation;

/// Bytes of the set that random blocks are taken from.
const SET: usize = 256 << 20;

/// Bytes of a block.
const BLOCK: usize = 4096;

/// Copies of one measurement: about a millisecond.
const COPIES: u32 = 2000;

/// Nanoseconds of a plain copy of a random block, on the machine of SPDK's figures (docs/PERFORMANCE.md): out of the set, and into it.
const THERE: [f64; 2] = [390.0, 520.0];

/// A set of blocks in huge pages.
pub struct Copies {
    set: Arc<Ram>,
    small: Box<[u8; BLOCK]>,
    numbers: u64,
}

impl Copies {
    /// # Errors
    ///
    /// Memory ran out.
    pub fn new() -> Result<Self, Failure> {
        Ok(Self {
            set: Ram::new(SET).map_err(|e| Failure::of("memory to copy", &e))?,
            small: Box::new([1; BLOCK]),
            numbers: 0x9E37_79B9_7F4A_7C15,
        })
    }

    /// Nanoseconds of the plain copy that such a command needs, now, on this core.
    pub fn ns(&mut self, operation: Operation) -> f64 {
        let start = Instant::now();
        for _ in 0..COPIES {
            self.numbers ^= self.numbers << 13;
            self.numbers ^= self.numbers >> 7;
            self.numbers ^= self.numbers << 17;
            let at = self.numbers as usize % (SET / BLOCK) * BLOCK;
            match operation {
                Operation::Randwrite => self.set.copy_in(at, black_box(&self.small[..])),
                _ => self.set.copy_out(at, black_box(&mut self.small[..])),
            }
        }
        start.elapsed().as_nanos() as f64 / f64::from(COPIES)
    }
}

/// What `iops` of the other machine would be if its copies took `ns` and the rest of a command as long as it did.
pub fn here(iops: f64, operation: Operation, ns: f64) -> f64 {
    let there = match operation {
        Operation::Randwrite => THERE[1],
        _ => THERE[0],
    };
    1e9 / (1e9 / iops - there + ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_copy_is_slower() {
        let iops = |ns| here(1e6, Operation::Randread, ns).round();
        assert_eq!(
            [iops(390.0), iops(890.0), iops(140.0)],
            [1e6, 666_667.0, 1_333_333.0]
        );
        assert_eq!(here(1e6, Operation::Randwrite, 520.0).round(), 1e6);
    }

    #[test]
    fn a_copy_takes_time() {
        let mut copies = Copies::new().unwrap();
        for operation in [Operation::Randread, Operation::Randwrite] {
            // 4 KiB at 1 TB/s are 4 ns.
            assert!(copies.ns(operation) > 4.0);
        }
    }
}
