//! The front-end page: configuration space from 0xF00 on, which belongs to the front-end and not to the guest.

/// Where the page begins in the configuration space.
pub const START: u32 = 0xF00;
/// Size of the whole configuration space, this page included.
pub const CONFIG_SIZE: u32 = 0x1000;
/// "NVME", little endian.
pub const MAGIC: u32 = 0x454D_564E;
/// Version of this page.
pub const VERSION: u32 = 2;

/// Where the instance id is, within the page.
const INSTANCE: usize = 0x20;
/// Where the front-end says that it has sent everything.
const GO: usize = 0x30;
/// Where we say what is kept for this instance.
pub const KEPT: usize = 0x34;
/// Bit of `GO`: everything has been sent.
pub const GO_SENT: u32 = 1 << 0;
/// Bit of `GO`: the guest has used this device over an earlier connection.
pub const GO_USED: u32 = 1 << 1;
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

    /// Write to the page at `offset`: the instance id in any pieces, and `go` as a whole. Nothing else can be written.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> Option<Written> {
        if offset == GO {
            let value = u32::from_le_bytes(data.try_into().ok()?);
            return (value & GO_SENT != 0).then_some(Written::Go {
                used: value & GO_USED != 0,
            });
        }
        let mut touched = false;
        for (i, &byte) in data.iter().enumerate() {
            let at = offset.saturating_add(i);
            if (INSTANCE..INSTANCE + 16).contains(&at) {
                self.bytes[at] = byte;
                touched = true;
            }
        }
        let id = self.bytes[INSTANCE..INSTANCE + 16].try_into().ok()?;
        touched.then_some(Written::Instance(id))
    }
}

/// What a write to the page says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// The instance id is this now.
    Instance([u8; 16]),
    /// Everything has been sent. `used`: the guest has used this device over an earlier connection.
    Go {
        /// See above.
        used: bool,
    },
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
                b'N', b'V', b'M', b'E', 2, 0, 0, 0, 0, 0x20, 0, 0, 33, 0, 0, 0, 0x36, 0x1B, 0x10,
                0, 0xF4, 0x1A, 0, 0x11, 2, 0, 0, 0, 0, 0x20, 0, 0
            ]
        );
        assert_eq!(p.byte(usize::MAX), 0);
    }

    #[test]
    fn only_the_instance_id_is_writable_in_any_pieces() {
        let id_of = |w: Option<Written>| match w {
            Some(Written::Instance(id)) => id,
            other => panic!("{other:?}"),
        };
        let mut p = FrontEndPage::new(0x1000, 2, [0; 4], 0);
        assert_eq!(p.write(0, &[0xFF; 0x20]), None);
        assert_eq!(p.byte(0), b'N');
        assert_eq!(p.write(0x30, &[0xFF; 300]), None, "beyond the page as well");
        assert_eq!(id_of(p.write(0x1F, &[1, 2]))[0], 2);
        let id = id_of(p.write(0x24, &[9; 100]));
        assert_eq!(id, [2, 0, 0, 0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9]);
        assert_eq!(p.write(usize::MAX, &[1, 1]), None);
        assert_eq!(
            p.write(0x30, &[1, 0, 0, 0]),
            Some(Written::Go { used: false })
        );
        assert_eq!(
            p.write(0x30, &[3, 0, 0, 0]),
            Some(Written::Go { used: true })
        );
        for nothing in [&[2, 0, 0, 0][..], &[1], &[1, 0, 0, 0, 0], &[]] {
            assert_eq!(p.write(0x30, nothing), None);
        }
        assert_eq!(p.write(0x34, &[1, 0, 0, 0]), None);
    }
}
