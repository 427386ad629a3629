//! BAR 0: the controller's registers, its doorbells, the MSI-X table and the pending bits.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::event::{EventfdFlags, eventfd};

use super::Refusal;
use crate::controller::Controller;

/// Where the doorbells begin.
pub const DOORBELLS: u64 = 0x1000;
/// The smallest BAR: Windows takes 16 KiB for granted.
const LEAST: u64 = 0x4000;
const PAGE: u64 = 0x1000;
/// Bytes of an entry of the MSI-X table.
const ENTRY: usize = 16;
/// Mask Bit of a vector, at this byte of its entry.
const MASK: usize = 12;

/// What lies where.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    window: u64,
    table_len: u64,
}

impl Layout {
    /// A BAR with a doorbell window of so many bytes, whole pages, and so many vectors.
    pub fn new(window: u64, vectors: u16) -> Self {
        Self {
            window,
            table_len: u64::from(vectors) * ENTRY as u64,
        }
    }

    /// Bytes of the doorbells.
    pub fn window(&self) -> u64 {
        self.window
    }

    /// Where the MSI-X table is.
    pub fn table(&self) -> u64 {
        DOORBELLS + self.window
    }

    /// Where the pending bits are.
    pub fn pba(&self) -> u64 {
        self.table() + PAGE
    }

    /// Bytes of the BAR, a power of two.
    pub fn size(&self) -> u64 {
        (self.pba() + PAGE).next_power_of_two().max(LEAST)
    }
}

/// BAR 0 of a controller, for one connection.
pub struct Bar {
    controller: Arc<Controller>,
    layout: Layout,
    /// What the guest keeps in the MSI-X table. The VMM masks and delivers; it means nothing to us.
    table: Vec<u8>,
    /// Signalled when a doorbell of the queue came as a message.
    kicks: Vec<OwnedFd>,
    /// Bytes between the submission queue tail doorbells of two queues.
    pair: u64,
}

impl Bar {
    /// The BAR, with kicks of its own for the controller.
    ///
    /// # Errors
    ///
    /// No file descriptor is left.
    pub fn new(controller: &Arc<Controller>, layout: Layout) -> io::Result<Self> {
        let queues = usize::from(controller.queues());
        let mut kicks = Vec::with_capacity(queues);
        for index in 0..queues {
            let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            controller.set_kick(index, Some(File::from(kick.try_clone()?)));
            kicks.push(kick);
        }
        let mut bar = Self {
            controller: Arc::clone(controller),
            layout,
            table: Vec::new(),
            kicks,
            pair: u64::from(controller.stride().bytes()) * 2,
        };
        bar.reset();
        Ok(bar)
    }

    /// What lies where.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Every vector masked, as after a reset.
    pub fn reset(&mut self) {
        self.table = vec![0; usize::try_from(self.layout.table_len).unwrap_or(0)];
        for entry in self.table.chunks_exact_mut(ENTRY) {
            if let Some(byte) = entry.get_mut(MASK) {
                *byte = 1;
            }
        }
    }

    /// What the guest keeps in the MSI-X table.
    pub fn table(&self) -> &[u8] {
        &self.table
    }

    /// Go on with the MSI-X table of another one; whether it has the size of ours.
    pub fn restore(&mut self, table: Vec<u8>) -> bool {
        let same = table.len() == self.table.len();
        if same {
            self.table = table;
        }
        same
    }

    /// Check that an access lies in the BAR.
    pub fn check(&self, offset: u64, count: u64) -> Result<(), Refusal> {
        match offset.checked_add(count) {
            Some(end) if end <= self.layout.size() => Ok(()),
            _ => Err(Refusal::invalid(format!(
                "{count} bytes at {offset:#x} are not in BAR 0, which has {:#x}",
                self.layout.size()
            ))),
        }
    }

    /// Read `out.len()` bytes, which [`Self::check`] has let pass. What is nothing reads as zero.
    pub fn read(&self, offset: u64, out: &mut [u8]) {
        out.fill(0);
        let registers = DOORBELLS.saturating_sub(offset);
        let registers = usize::try_from(registers)
            .unwrap_or(usize::MAX)
            .min(out.len());
        let (low, high) = out.split_at_mut(registers);
        if !low.is_empty() {
            self.controller.read(offset as u32, low);
        }
        for (at, byte) in (offset.max(DOORBELLS)..).zip(high) {
            *byte = self.byte(at);
        }
    }

    /// The byte at `at`, behind the registers.
    fn byte(&self, at: u64) -> u8 {
        if at < self.layout.table() {
            let offset = (at - DOORBELLS) as usize;
            let register = self.controller.window().register(offset / 4 * 4);
            let value = register.map_or(0, |r| r.load(Ordering::Acquire));
            return value.to_le_bytes().get(offset % 4).copied().unwrap_or(0);
        }
        let offset = usize::try_from(at - self.layout.table()).ok();
        offset.and_then(|o| self.table.get(o)).copied().unwrap_or(0)
    }

    /// Write what [`Self::check`] has let pass. What hardware would ignore is ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let aligned =
            matches!(data.len(), 1 | 2 | 4 | 8) && offset.is_multiple_of(data.len() as u64);
        if !aligned {
            tracing::debug!(
                controller = self.controller.name(),
                offset,
                len = data.len(),
                "a write to BAR 0 of a size or alignment that means nothing was ignored"
            );
        } else if offset < DOORBELLS {
            self.controller.write(offset as u32, data);
        } else if offset < self.layout.table() {
            // Writes to doorbells have 32 bits; one of 64 is two.
            for (at, word) in (offset..).step_by(4).zip(data.chunks_exact(4)) {
                if let Some(word) = word.first_chunk() {
                    self.ring(at - DOORBELLS, u32::from_le_bytes(*word));
                }
            }
        } else if let Ok(at) = usize::try_from(offset - self.layout.table())
            && let Some(place) = self.table.get_mut(at..at + data.len())
        {
            place.copy_from_slice(data);
        }
    }

    /// The doorbell at byte `at` of the window was written by a message: nobody may be looking.
    fn ring(&self, at: u64, value: u32) {
        let Some(register) = self.controller.window().register(at as usize) else {
            return;
        };
        register.store(value, Ordering::SeqCst);
        let queue = usize::try_from(at / self.pair).unwrap_or(usize::MAX);
        if let Some(kick) = self.kicks.get(queue) {
            // It is full only if it is signalled already.
            let _ = rustix::io::write(kick, &1u64.to_ne_bytes());
        }
    }
}

/// Signal an eventfd of a client. It is made non-blocking by whoever takes it: a counter that is full is an interrupt that is pending.
pub fn signal(mut eventfd: &File) {
    let _ = eventfd.write(&1u64.to_ne_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_fit_into_a_power_of_two() {
        let l = Layout::new(0x1000, 64);
        assert_eq!((l.table(), l.pba(), l.size()), (0x2000, 0x3000, 0x4000));
        let l = Layout::new(0x10_0000, 64);
        assert_eq!((l.table(), l.size()), (0x10_1000, 0x20_0000));
        assert_eq!(Layout::new(0x2000, 2).size(), 0x8000);
    }
}
