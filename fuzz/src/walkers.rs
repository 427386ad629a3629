//! The PRP and the SGL walker, over lists of anything: bounded, and right about how much they found.

use nvme_spec::prp::{self, PageSize, ReadList, Segment};
use nvme_spec::sgl::{self, Descriptor, MAX_DESCRIPTORS, ReadSegment};
use nvme_spec::{Sqe, Status};

use crate::Input;

/// The same words everywhere, over and over.
struct Lists<'a> {
    words: &'a [u64],
    reads: u64,
}

impl Lists<'_> {
    fn word(&mut self, addr: u64) -> Result<u64, Status> {
        self.reads += 1;
        match self.words.len() as u64 {
            0 => Err(Status::DATA_TRANSFER_ERROR),
            n => Ok(self.words[(addr / 8 % n) as usize]),
        }
    }
}

impl ReadList for Lists<'_> {
    fn read(&mut self, addr: u64, entries: &mut [u64]) -> Result<(), Status> {
        assert!(addr.is_multiple_of(8) && (1..=64).contains(&entries.len()));
        for (i, entry) in entries.iter_mut().enumerate() {
            *entry = self.word(addr.wrapping_add(i as u64 * 8))?;
        }
        Ok(())
    }
}

impl ReadSegment for Lists<'_> {
    fn read(&mut self, addr: u64, descriptors: &mut [Descriptor]) -> Result<(), Status> {
        assert!(addr.is_multiple_of(8) && (1..=32).contains(&descriptors.len()));
        assert!(addr.checked_add(descriptors.len() as u64 * 16).is_some());
        for (i, descriptor) in descriptors.iter_mut().enumerate() {
            let at = addr + i as u64 * 16;
            *descriptor = of(self.word(at)?, self.word(at.wrapping_add(8))?);
        }
        Ok(())
    }
}

fn of(low: u64, high: u64) -> Descriptor {
    Descriptor::of(&Sqe::default().with_prps(low, high))
}

/// One input: which walker and page size, the length, the data pointer, the words of the lists.
///
/// # Panics
///
/// A walker does not do what it says.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let which = input.byte();
    let len = u32::from_le_bytes(input.array()) & 0x1F_FFFF;
    let [one, two] = [0; 2].map(|_: u8| u64::from_le_bytes(input.array()));
    let words: Vec<u64> = input
        .0
        .as_chunks()
        .0
        .iter()
        .map(|word| u64::from_le_bytes(*word))
        .collect();
    let mut lists = Lists {
        words: &words,
        reads: 0,
    };
    let mut sum = 0;
    let mut sink = |segment: Segment| {
        assert!(segment.len > 0 && segment.addr.checked_add(segment.len.into()).is_some());
        sum += u64::from(segment.len);
        Ok(())
    };
    let (result, most) = if which & 1 == 0 {
        let page = PageSize::from_mps(which >> 1 & 7).expect("a page size");
        let result = prp::walk(page, one, two, len, &mut lists, &mut sink);
        (result, 2 * (u64::from(len / page.bytes()) + 2))
    } else {
        let result = sgl::walk(of(one, two), len, &mut lists, &mut sink);
        (result, 2 * u64::from(MAX_DESCRIPTORS))
    };
    assert!(lists.reads <= most, "{} reads", lists.reads);
    let len = u64::from(len);
    assert!(sum <= len && (result.is_err() || sum == len));
}

/// A list of PRPs, and an SGL of two segments.
pub fn seeds() -> Vec<Vec<u8>> {
    let seed = |which: u8, len: u32, words: &[u64]| {
        let mut out = vec![which];
        out.extend(len.to_le_bytes());
        out.extend(words.iter().flat_map(|w| w.to_le_bytes()));
        out
    };
    let high = |d: Descriptor| u64::from(d.length) | u64::from(d.identifier) << 56;
    let (data, next) = (
        Descriptor::data(0x4000, 4096),
        Descriptor::last_segment(0, 2),
    );
    let first = Descriptor::segment(0, 2);
    vec![
        seed(0, 0x5000, &[0x1000, 0x8000, 0x2000, 0x3000, 0x4000, 0x5000]),
        seed(0, 4096, &[0x1000, 0]),
        seed(1, 4096, &[data.address, high(data)]),
        seed(
            1,
            4096,
            &[0, high(first), data.address, high(data), 0, high(next)],
        ),
        seed(
            1,
            8192,
            &[
                0,
                high(next),
                data.address,
                high(data),
                data.address,
                high(data),
            ],
        ),
    ]
}
