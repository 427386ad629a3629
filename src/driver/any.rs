//! Devices whose kind is forgotten.

use std::fs::File;
use std::io;

use super::{Access, Device, Dma, Doorbell};

/// A device of any kind: one virtual call for each access, which is one for each doorbell.
pub type AnyDevice = Box<dyn Device<Bell = Box<dyn Doorbell>> + Send>;

impl<B: Doorbell + ?Sized> Doorbell for Box<B> {
    #[inline]
    fn ring(&self, value: u32) {
        (**self).ring(value);
    }
}

impl<D: Device + ?Sized> Device for Box<D> {
    type Bell = D::Bell;

    fn read32(&mut self, offset: u32) -> io::Result<u32> {
        (**self).read32(offset)
    }

    fn read64(&mut self, offset: u32) -> io::Result<u64> {
        (**self).read64(offset)
    }

    fn write32(&mut self, offset: u32, value: u32) -> io::Result<()> {
        (**self).write32(offset, value)
    }

    fn write64(&mut self, offset: u32, value: u64) -> io::Result<()> {
        (**self).write64(offset, value)
    }

    fn doorbell(&mut self, offset: u64) -> io::Result<Self::Bell> {
        (**self).doorbell(offset)
    }

    fn allocate(&mut self, bytes: usize, access: Access) -> io::Result<Dma> {
        (**self).allocate(bytes, access)
    }

    fn interrupt(&mut self, vector: u16) -> io::Result<Option<File>> {
        (**self).interrupt(vector)
    }

    fn hard_reset(&mut self) -> io::Result<bool> {
        (**self).hard_reset()
    }

    fn isolate(&mut self) -> io::Result<()> {
        (**self).isolate()
    }

    fn removal(&mut self) -> io::Result<Option<File>> {
        (**self).removal()
    }
}

/// A device whose kind is forgotten.
struct Erased<D>(D);

/// Forget what kind of device it is.
pub fn erase<D: Device + Send + 'static>(device: D) -> AnyDevice
where
    D::Bell: 'static,
{
    Box::new(Erased(device))
}

impl<D: Device> Device for Erased<D>
where
    D::Bell: 'static,
{
    type Bell = Box<dyn Doorbell>;

    fn read32(&mut self, offset: u32) -> io::Result<u32> {
        self.0.read32(offset)
    }

    fn read64(&mut self, offset: u32) -> io::Result<u64> {
        self.0.read64(offset)
    }

    fn write32(&mut self, offset: u32, value: u32) -> io::Result<()> {
        self.0.write32(offset, value)
    }

    fn write64(&mut self, offset: u32, value: u64) -> io::Result<()> {
        self.0.write64(offset, value)
    }

    fn doorbell(&mut self, offset: u64) -> io::Result<Self::Bell> {
        Ok(Box::new(self.0.doorbell(offset)?))
    }

    fn allocate(&mut self, bytes: usize, access: Access) -> io::Result<Dma> {
        self.0.allocate(bytes, access)
    }

    fn interrupt(&mut self, vector: u16) -> io::Result<Option<File>> {
        self.0.interrupt(vector)
    }

    fn hard_reset(&mut self) -> io::Result<bool> {
        self.0.hard_reset()
    }

    fn isolate(&mut self) -> io::Result<()> {
        self.0.isolate()
    }

    fn removal(&mut self) -> io::Result<Option<File>> {
        self.0.removal()
    }
}
