//! The front-end page: configuration space from 0xF00 on, which belongs to the front-end and not to the guest.

/// Where the page begins in the configuration space.
pub const START: u32 = 0xF00;
/// Size of the whole configuration space, this page included.
pub const CONFIG_SIZE: u32 = 0x1000;
/// "NVME", little endian.
pub const MAGIC: u32 = 0x454D_564E;
/// Version of this page.
pub const VERSION: u32 = 1;

/// Where the instance id is, within the page.
const INSTANCE: usize = 0x20;
const LEN: usize = (CONFIG_SIZE - START) as usize;

/// What the page says, and what the front-end wrote to it.
#[derive(Debug)]
pub struct FrontEndPage {
    bytes: [u8; LEN],
}

impl FrontEndPage {
    /// The page of a controller with a doorbell window of `window` bytes, `vrings` vrings and these PCI ids.
    pub fn new(window: u32, vrings: u16, pci_ids: [u16; 4], revision: u8) -> Self {
        let mut bytes = [0; LEN];
        let mut put = |at: usize, b: &[u8]| bytes[at..at + b.len()].copy_from_slice(b);
        put(0x00, &MAGIC.to_le_bytes());
        put(0x04, &VERSION.to_le_bytes());
        put(0x08, &window.to_le_bytes());
        put(0x0C, &vrings.to_le_bytes());
        for (i, id) in pci_ids.iter().enumerate() {
            put(0x10 + 2 * i, &id.to_le_bytes());
        }
        put(0x18, &[revision]);
        // The side words lie behind the doorbells in their file.
        put(0x1C, &window.to_le_bytes());
        Self { bytes }
    }

    /// Byte `offset` of the page; zero beyond its end.
    pub fn byte(&self, offset: usize) -> u8 {
        self.bytes.get(offset).copied().unwrap_or(0)
    }

    /// Write to the page at `offset`. Only the instance id can be written; it is returned if it was touched.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> Option<[u8; 16]> {
        let mut touched = false;
        for (i, &byte) in data.iter().enumerate() {
            let at = offset.saturating_add(i);
            if (INSTANCE..INSTANCE + 16).contains(&at) {
                self.bytes[at] = byte;
                touched = true;
            }
        }
        let id = self.bytes[INSTANCE..INSTANCE + 16].try_into().ok()?;
        touched.then_some(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes() {
        let p = FrontEndPage::new(0x2000, 33, [0x1B36, 0x0010, 0x1AF4, 0x1100], 2);
        let head: Vec<u8> = (0..0x20).map(|i| p.byte(i)).collect();
        assert_eq!(
            head,
            [
                b'N', b'V', b'M', b'E', 1, 0, 0, 0, 0, 0x20, 0, 0, 33, 0, 0, 0, 0x36, 0x1B, 0x10,
                0, 0xF4, 0x1A, 0, 0x11, 2, 0, 0, 0, 0, 0x20, 0, 0
            ]
        );
        assert_eq!(p.byte(usize::MAX), 0);
    }

    #[test]
    fn only_the_instance_id_is_writable_in_any_pieces() {
        let mut p = FrontEndPage::new(0x1000, 2, [0; 4], 0);
        assert_eq!(p.write(0, &[0xFF; 0x20]), None);
        assert_eq!(p.byte(0), b'N');
        assert_eq!(p.write(0x30, &[0xFF; 300]), None, "beyond the page as well");
        assert_eq!(p.write(0x1F, &[1, 2]).unwrap()[0], 2);
        let id = p.write(0x24, &[9; 100]).unwrap();
        assert_eq!(id, [2, 0, 0, 0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9]);
        assert_eq!(p.write(usize::MAX, &[1, 1]), None);
    }
}
