//! The PCI configuration space: a header, Power Management, MSI-X and PCI Express with Function Level Reset.

use super::bar::Layout;

/// Bytes of the region. There are no extended capabilities: from 0x100 on it reads as zero.
pub const SIZE: u64 = 0x1000;

/// Bytes that hold something.
const LEN: usize = 0x100;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const BARS_END: usize = 0x18;
const INTERRUPT_LINE: usize = 0x3C;
const PM: usize = 0x40;
const MSIX: usize = 0x50;
const PCIE: usize = 0x60;
/// Device Control of the PCI Express capability.
const DEVICE_CONTROL: usize = PCIE + 8;

/// Interrupt Disable, in the high byte of Command.
const INTX_DISABLE: u8 = 1 << 2;
/// Interrupt Status, in the low byte of Status.
const INTX_STATUS: u8 = 1 << 3;
/// Initiate Function Level Reset, in the high byte of Device Control.
const FLR: u8 = 1 << 7;

/// The configuration space of one device. Writes of any size at any place are defined: bits that can be written are, the others stay.
pub struct ConfigSpace {
    bytes: [u8; LEN],
    writable: [u8; LEN],
    fresh: [u8; LEN],
}

impl ConfigSpace {
    /// That of a controller with these ids (vendor, device, subsystem vendor, subsystem), this BAR and so many vectors.
    pub fn new(ids: [u16; 4], revision: u8, layout: &Layout, vectors: u16) -> Self {
        let mut space = Self {
            bytes: [0; LEN],
            writable: [0; LEN],
            fresh: [0; LEN],
        };
        let [vendor, device, subsystem_vendor, subsystem] = ids;
        space.half(0x00, vendor, 0);
        space.half(0x02, device, 0);
        // Memory space, bus master, parity, SERR#, interrupt disable.
        space.half(COMMAND, 0, 0x0546);
        // There are capabilities.
        space.half(STATUS, 0x0010, 0);
        // Mass storage, non-volatile memory, NVM Express.
        space.word(0x08, 0x0108_0200 | u32::from(revision), 0);
        space.half(0x0C, 0, 0x00FF);
        // 64-bit memory; what is above its size can be written.
        let mask = !(layout.size() - 1);
        space.word(BAR0, 0x4, mask as u32);
        space.word(BAR0 + 4, 0, (mask >> 32) as u32);
        space.half(0x2C, subsystem_vendor, 0);
        space.half(0x2E, subsystem, 0);
        space.half(0x34, PM as u16, 0);
        // Line, and pin A.
        space.half(INTERRUPT_LINE, 0x0100, 0x00FF);

        space.half(PM, capability(0x01, MSIX), 0);
        space.half(PM + 2, 0x0003, 0);
        // No soft reset: D3hot keeps everything.
        space.half(PM + 4, 0x0008, 0x0003);

        space.half(MSIX, capability(0x11, PCIE), 0);
        space.half(MSIX + 2, vectors.saturating_sub(1) & 0x7FF, 0xC000);
        // Both in BAR 0.
        space.word(MSIX + 4, layout.table() as u32, 0);
        space.word(MSIX + 8, layout.pba() as u32, 0);

        space.half(PCIE, capability(0x10, 0), 0);
        // Version 2, endpoint.
        space.half(PCIE + 2, 0x0002, 0);
        // Function Level Reset, role-based error reporting.
        space.word(PCIE + 4, 0x1000_8000, 0);
        space.half(DEVICE_CONTROL, 0x2810, 0x7FFF);
        // A link of 16 GT/s, four lanes, up.
        space.word(PCIE + 0x0C, 0x0000_0044, 0);
        space.half(PCIE + 0x10, 0, 0x00C3);
        space.half(PCIE + 0x12, 0x0044, 0);
        // Completion Timeout Disable.
        space.word(PCIE + 0x24, 0x0000_0010, 0);
        space.half(PCIE + 0x28, 0, 0x0010);
        space.word(PCIE + 0x2C, 0x0000_001E, 0);
        space.half(PCIE + 0x30, 0x0004, 0x000F);
        space.fresh = space.bytes;
        space
    }

    fn half(&mut self, at: usize, value: u16, writable: u16) {
        self.bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        self.writable[at..at + 2].copy_from_slice(&writable.to_le_bytes());
    }

    fn word(&mut self, at: usize, value: u32, writable: u32) {
        self.half(at, value as u16, writable as u16);
        self.half(at + 2, (value >> 16) as u16, (writable >> 16) as u16);
    }

    /// Read; what lies outside is zero.
    pub fn read(&self, offset: u64, out: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(LEN).min(LEN);
        let inside = self.bytes.get(start..).unwrap_or_default();
        let bytes = inside.iter().copied().chain(std::iter::repeat(0));
        out.iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
    }

    /// Write; whether this asks for a Function Level Reset.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> bool {
        let mut reset = false;
        let start = usize::try_from(offset).unwrap_or(LEN).min(LEN);
        for (at, &new) in (start..).zip(data) {
            let (Some(byte), Some(&mask)) = (self.bytes.get_mut(at), self.writable.get(at)) else {
                break;
            };
            *byte = *byte & !mask | new & mask;
            reset |= at == DEVICE_CONTROL + 1 && new & FLR != 0;
        }
        reset
    }

    /// Back to what it was, as a reset does; the addresses it was given stay, for a VMM that does not give them again.
    pub fn reset(&mut self) {
        let old = self.bytes;
        self.bytes = self.fresh;
        for kept in [BAR0..BARS_END, INTERRUPT_LINE..INTERRUPT_LINE + 1] {
            self.bytes[kept.clone()].copy_from_slice(&old[kept]);
        }
    }

    /// Everything that can be read.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Go on with what another one held; whether it differs in nothing but what the guest can change.
    pub fn restore(&mut self, bytes: &[u8]) -> bool {
        let Ok(bytes) = <[u8; LEN]>::try_from(bytes) else {
            return false;
        };
        let mut fixed = bytes
            .iter()
            .zip(&self.fresh)
            .zip(&self.writable)
            .enumerate();
        let same = fixed.all(|(at, ((now, fresh), mask))| {
            let own = if at == STATUS { INTX_STATUS } else { 0 };
            (now ^ fresh) & !(mask | own) == 0
        });
        if same {
            self.bytes = bytes;
        }
        same
    }

    /// Whether the guest lets the device use its interrupt pin.
    pub fn allows_intx(&self) -> bool {
        self.bytes[COMMAND + 1] & INTX_DISABLE == 0
    }

    /// Show whether the interrupt pin is asserted.
    pub fn set_intx(&mut self, asserted: bool) {
        let status = &mut self.bytes[STATUS];
        *status = *status & !INTX_STATUS | if asserted { INTX_STATUS } else { 0 };
    }
}

/// The first two bytes of a capability.
const fn capability(id: u8, next: usize) -> u16 {
    u16::from_le_bytes([id, next as u8])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(
            [0x1AF4, 0x10F0, 0x1AF4, 0x1100],
            1,
            &Layout::new(4096, 33),
            33,
        )
    }

    fn read32(s: &ConfigSpace, at: u64) -> u32 {
        let mut out = [0; 4];
        s.read(at, &mut out);
        u32::from_le_bytes(out)
    }

    #[test]
    fn golden_header_and_capabilities() {
        let s = space();
        assert_eq!(read32(&s, 0), 0x10F0_1AF4);
        assert_eq!(read32(&s, 8), 0x0108_0201);
        assert_eq!(read32(&s, 0x2C), 0x1100_1AF4);
        assert_eq!(read32(&s, 0x3C), 0x100);
        let mut at = read32(&s, 0x34) as u64;
        let mut ids = Vec::new();
        while at != 0 {
            let head = read32(&s, at);
            ids.push(head & 0xFF);
            at = u64::from(head >> 8 & 0xFF);
        }
        assert_eq!(ids, [0x01, 0x11, 0x10]);
        assert_eq!(read32(&s, 0x50) >> 16, 32, "33 vectors, zero-based");
        assert_eq!((read32(&s, 0x54), read32(&s, 0x58)), (0x2000, 0x3000));
        assert_eq!(read32(&s, 0x64) >> 28 & 1, 1, "FLR");
        assert_eq!(read32(&s, 0x100), 0);
        assert_eq!(read32(&s, u64::MAX), 0);
    }

    #[test]
    fn the_bar_tells_its_size_and_keeps_its_address() {
        let mut s = space();
        s.write(0x10, &[0xFF; 8]);
        assert_eq!(
            (read32(&s, 0x10), read32(&s, 0x14)),
            (0xFFFF_C004, u32::MAX)
        );
        s.write(0x10, &0xFEBF_0000u32.to_le_bytes());
        s.write(0x04, &[0x06, 0x04]);
        assert!(!s.allows_intx());
        s.set_intx(true);
        assert_eq!(read32(&s, 4), 0x0018_0406);
        s.reset();
        assert_eq!(
            (read32(&s, 0x10), read32(&s, 4)),
            (0xFEBF_0004, 0x0010_0000)
        );
        assert!(s.allows_intx());
    }

    #[test]
    fn a_function_level_reset_is_asked_for_by_one_bit_in_writes_of_any_size() {
        for size in [1, 2, 4, 8] {
            let mut s = space();
            let start = 0x69 / size * size;
            let mut data = vec![0; size];
            data[0x69 - start] = 0x80;
            assert!(s.write(start as u64, &data), "{size}");
            assert_eq!(read32(&s, 0x68) & 0x8000, 0, "it reads as zero");
        }
        assert!(!space().write(0x68, &[0xFF, 0x7F]));
        assert!(!space().write(0x6A, &[0xFF; 4]));
    }

    #[test]
    fn what_another_one_held_is_taken_if_it_is_the_same_device() {
        let mut s = space();
        s.write(0x10, &0xFEBF_0000u32.to_le_bytes());
        s.write(0x04, &[0x06, 0x04]);
        s.set_intx(true);
        let mut next = space();
        assert!(next.restore(s.bytes()));
        assert_eq!(next.bytes(), s.bytes());
        let mut other = ConfigSpace::new(
            [0x1AF4, 0x10F0, 0x1AF4, 0x1100],
            1,
            &Layout::new(4096, 33),
            32,
        );
        assert!(!other.restore(s.bytes()), "another number of vectors");
        let mut other = ConfigSpace::new(
            [0x1AF4, 0x10F0, 0x1AF4, 0x1100],
            1,
            &Layout::new(1 << 20, 33),
            33,
        );
        assert!(!other.restore(s.bytes()), "another BAR");
        assert!(!space().restore(&s.bytes()[1..]));
    }

    proptest! {
        #[test]
        fn only_writable_bits_change(
            writes in prop::collection::vec((0u64..0x1010, prop::collection::vec(any::<u8>(), 0..20)), 0..40),
        ) {
            let mut s = space();
            let fresh = s.bytes;
            for (at, data) in writes {
                s.write(at, &data);
            }
            for (now, (before, mask)) in s.bytes.iter().zip(fresh.iter().zip(&s.writable)) {
                prop_assert_eq!((now ^ before) & !mask, 0);
            }
            s.write(u64::MAX, &[1, 2]);
        }
    }
}
