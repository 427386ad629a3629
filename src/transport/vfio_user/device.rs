//! What vfio-user messages mean for a controller: one [`Device`] for each connection.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use nvme_spec::regs::offset::INTMS;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::Refusal;
use super::bar::{Bar, DOORBELLS, Layout};
use super::dma::{MAX_PIECES, Memory};
use super::irq::{Interrupts, KINDS, Parts, SetIrqs};
use super::message::{Answer, Body, Command, MAX_DATA, Message, unsupported};
use super::pci::{self, ConfigSpace};
use crate::controller::{Controller, DRAIN_LIMIT};
use crate::memory::GuestMap;
use crate::transport::Failure;

/// PCI revision that the guest sees.
const REVISION: u8 = 1;

/// The regions of a PCI device: six BARs, ROM, configuration space, VGA.
const REGIONS: u32 = 9;
const BAR0: u32 = 0;
const CONFIG: u32 = 7;

const READ: u32 = 1;
const WRITE: u32 = 2;
const MMAP: u32 = 4;
const CAPS: u32 = 8;
/// Bytes of `struct vfio_region_info`.
const REGION_INFO: u32 = 32;
/// A capability of a region: areas of it that can be mapped.
const SPARSE_MMAP: u32 = 1;
const SPARSE_MMAP_LEN: u32 = 32;

/// What a device is for its client, without the files: those are named by their place among them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Image {
    /// A version was agreed upon.
    agreed: bool,
    /// The client has been given the doorbells.
    mapped: bool,
    /// Configuration space.
    config: Vec<u8>,
    /// MSI-X table.
    table: Vec<u8>,
    pieces: Vec<PieceImage>,
    /// The eventfd of each vector.
    vectors: Vec<Option<usize>>,
    /// That of the pin.
    pin: Option<usize>,
    /// What unmasks the pin; older versions leave none.
    #[serde(default)]
    unmask: Option<usize>,
    /// Whether the pin is masked.
    masked: bool,
    /// Whether the pin is to be signalled.
    raised: bool,
}

/// A piece of memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct PieceImage {
    address: u64,
    len: u64,
    /// File, and offset in it.
    shown: Option<(usize, u64)>,
}

/// Device and inode.
type Identity = (u64, u64);

fn identity(file: &File) -> Option<Identity> {
    let stat = rustix::fs::fstat(file).ok()?;
    Some((stat.st_dev, stat.st_ino))
}

/// A connection's view of its controller.
pub struct Device {
    controller: Arc<Controller>,
    config: ConfigSpace,
    bar: Bar,
    interrupts: Interrupts,
    memory: Memory,
    /// What the controller has of it.
    map: Arc<GuestMap>,
    agreed: bool,
    /// The client has been given the doorbells.
    mapped: bool,
}

impl Device {
    /// A fresh connection to `controller`.
    ///
    /// # Errors
    ///
    /// No file descriptor is left.
    pub fn new(controller: &Arc<Controller>, failure: &Failure) -> io::Result<Self> {
        let window = controller.window().bytes() as u64;
        let layout = Layout::new(window, controller.queues());
        let ids = controller.pci_ids();
        Ok(Self {
            config: ConfigSpace::new(ids, REVISION, &layout, controller.queues()),
            bar: Bar::new(controller, layout)?,
            interrupts: Interrupts::new(controller)?,
            memory: Memory::new(controller.name(), Arc::clone(failure.wake())),
            map: GuestMap::empty(),
            controller: Arc::clone(controller),
            agreed: false,
            mapped: false,
        })
    }

    /// The memory of the client.
    pub fn memory(&mut self) -> &mut Memory {
        &mut self.memory
    }

    /// The controller has this memory now.
    pub fn set_map(&mut self, map: Arc<GuestMap>) {
        self.map = map;
    }

    /// Whether a file behind the client's memory was cut.
    pub fn is_cut(&self) -> bool {
        self.memory.is_cut()
    }

    /// Whether the client can have mapped the doorbells.
    pub fn is_mapped(&self) -> bool {
        self.mapped
    }

    /// Carry out a message.
    pub fn carry_out(&mut self, message: &mut Message) -> Result<Answer, Refusal> {
        let command = message.command();
        if !self.agreed && command != Command::Version {
            return Err(Refusal::invalid("no version was agreed upon"));
        }
        let files = std::mem::take(&mut message.files);
        let body = message.body();
        match command {
            Command::Version => self.version(body),
            Command::DmaMap => {
                body.argsz(32)?;
                let mut files = files.into_iter();
                let file = files.next().map(File::from);
                if files.next().is_some() {
                    return Err(Refusal::invalid("more than one file"));
                }
                let (offset, address, len) = (body.long(8)?, body.long(16)?, body.long(24)?);
                self.memory.map(body.word(4)?, offset, address, len, file)?;
                Ok(Answer::default())
            }
            Command::DmaUnmap => {
                let (argsz, flags) = (body.argsz(24)?, body.word(4)?);
                let (address, len) = (body.long(8)?, body.long(16)?);
                let unmapped = self.memory.unmap(flags, address, len)?;
                let mut answer = Answer::words(&[argsz, flags]);
                answer.body.extend(address.to_ne_bytes());
                answer.body.extend(unmapped.to_ne_bytes());
                Ok(answer)
            }
            Command::DeviceGetInfo => {
                body.argsz(16)?;
                // It can be reset, and it is a PCI device.
                Ok(Answer::words(&[16, 1 | 2, REGIONS, KINDS]))
            }
            Command::DeviceGetRegionInfo => self.region_info(body),
            Command::DeviceGetIrqInfo => {
                body.argsz(16)?;
                let index = body.word(8)?;
                let Some((count, flags)) = self.interrupts.info(index) else {
                    return Err(Refusal::invalid(format!("there is no kind {index}")));
                };
                Ok(Answer::words(&[16, flags, index, count]))
            }
            Command::DeviceSetIrqs => {
                body.argsz(20)?;
                let irqs = SetIrqs {
                    flags: body.word(4)?,
                    index: body.word(8)?,
                    start: body.word(12)?,
                    count: body.word(16)?,
                    data: body.rest(20),
                };
                self.interrupts.set(&irqs, files)?;
                Ok(Answer::default())
            }
            Command::RegionRead => self.read(body),
            Command::RegionWrite => self.write(body),
            Command::DeviceReset => {
                self.config.reset();
                self.bar.reset();
                self.reset()?;
                Ok(Answer::default())
            }
            // What QEMU takes for "no such feature".
            Command::DeviceFeature => Err(Refusal::invalid("no features")),
            Command::Other(code) => Err(unsupported(format!("there is no command {code}"))),
        }
    }

    fn version(&mut self, body: Body<'_>) -> Result<Answer, Refusal> {
        let (major, minor) = (body.half(0)?, body.half(2)?);
        if major != 0 {
            return Err(Refusal::invalid(format!(
                "version {major}.{minor}; we speak 0.0"
            )));
        }
        self.agreed = true;
        // What the client can do makes no difference to us: we send one file at most, and no requests.
        let capabilities = format!(
            "{{\"capabilities\":{{\"max_msg_fds\":16,\"max_data_xfer_size\":{MAX_DATA},\"max_dma_maps\":{MAX_PIECES},\"pgsizes\":4096}}}}\0"
        );
        let mut answer = Answer::words(&[0]);
        answer.body.extend(capabilities.as_bytes());
        Ok(answer)
    }

    fn region_info(&mut self, body: Body<'_>) -> Result<Answer, Refusal> {
        let asked = body.argsz(REGION_INFO)?;
        let index = body.word(8)?;
        let (size, flags) = match index {
            BAR0 => (self.bar.layout().size(), READ | WRITE | MMAP | CAPS),
            CONFIG => (pci::SIZE, READ | WRITE),
            _ if index < REGIONS => (0, 0),
            _ => return Err(Refusal::invalid(format!("there is no region {index}"))),
        };
        let has_caps = flags & CAPS != 0;
        let whole = REGION_INFO + if has_caps { SPARSE_MMAP_LEN } else { 0 };
        let cap_offset = if has_caps { REGION_INFO } else { 0 };
        let mut answer = Answer::words(&[whole, flags, index, cap_offset]);
        answer.body.extend(size.to_ne_bytes());
        // Where BAR 0 would begin in the file: its doorbells are then where the window has them.
        let offset = self.controller.window().file_offset() - DOORBELLS;
        answer.body.extend(offset.to_ne_bytes());
        if has_caps && asked >= whole {
            // Version 1, the last capability, one area.
            for word in [SPARSE_MMAP | 1 << 16, 0, 1, 0] {
                answer.body.extend(word.to_ne_bytes());
            }
            for long in [DOORBELLS, self.bar.layout().window()] {
                answer.body.extend(long.to_ne_bytes());
            }
            let file = self.controller.window().fd().try_clone_to_owned();
            let no_file = |e: io::Error| {
                let errno = Errno::from_io_error(&e).unwrap_or(Errno::MFILE);
                Refusal::new(errno, format!("the doorbells cannot be handed over: {e}"))
            };
            answer.file = Some(file.map_err(no_file)?);
            self.mapped = true;
        }
        Ok(answer)
    }

    /// Region, offset and number of bytes of an access, which lies in its region.
    fn access(&self, body: Body<'_>) -> Result<(u32, u64, usize), Refusal> {
        let (offset, region, count) = (body.long(0)?, body.word(8)?, body.word(12)?);
        match region {
            BAR0 => self.bar.check(offset, count.into())?,
            CONFIG => {
                let end = offset.checked_add(count.into());
                if end.is_none_or(|end| end > pci::SIZE) {
                    return Err(Refusal::invalid(format!(
                        "{count} bytes at {offset:#x} are not in the configuration space"
                    )));
                }
            }
            _ => return Err(Refusal::invalid(format!("there is no region {region}"))),
        }
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        if count > MAX_DATA {
            return Err(Refusal::invalid(format!(
                "{count} bytes in one message; {MAX_DATA} can be"
            )));
        }
        Ok((region, offset, count))
    }

    fn read(&mut self, body: Body<'_>) -> Result<Answer, Refusal> {
        let (region, offset, count) = self.access(body)?;
        let mut answer = access_answer(body, count)?;
        let start = answer.body.len();
        answer.body.resize(start + count, 0);
        let data = answer.body.get_mut(start..).unwrap_or_default();
        match region {
            CONFIG => self.config.read(offset, data),
            _ => self.bar.read(offset, data),
        }
        Ok(answer)
    }

    fn write(&mut self, body: Body<'_>) -> Result<Answer, Refusal> {
        let (region, offset, count) = self.access(body)?;
        let data = body.rest(16);
        if data.len() != count {
            return Err(Refusal::invalid(format!(
                "{count} bytes are to be written, {} came",
                data.len()
            )));
        }
        if region != CONFIG {
            self.bar.write(offset, data);
        } else if self.config.write(offset, data) {
            self.config.reset();
            self.bar.reset();
            self.reset()?;
        }
        access_answer(body, count)
    }

    fn reset(&self) -> Result<(), Refusal> {
        if self.controller.reset(DRAIN_LIMIT) {
            return Ok(());
        }
        let why = format!("I/O can still touch guest memory, {DRAIN_LIMIT:?} after the reset");
        Err(Refusal::new(Errno::BUSY, why))
    }

    /// Leave everything to another one.
    pub fn into_carried(self) -> (Image, Vec<OwnedFd>) {
        let mut files = Vec::new();
        let mut keep = |file: OwnedFd| {
            files.push(file);
            files.len() - 1
        };
        // A file is shown many times, and goes once.
        let mut known: Vec<(Identity, usize)> = Vec::new();
        let mut pieces = Vec::new();
        for (address, len, shown) in self.memory.pieces() {
            let shown = shown.and_then(|(file, offset)| {
                let identity = identity(file)?;
                let place = match known.iter().find(|(known, _)| *known == identity) {
                    Some((_, place)) => *place,
                    None => {
                        let place = keep(file.as_fd().try_clone_to_owned().ok()?);
                        known.push((identity, place));
                        place
                    }
                };
                Some((place, offset))
            });
            pieces.push(PieceImage {
                address,
                len,
                shown,
            });
        }
        let irqs = self.interrupts.into_parts();
        let vectors = irqs.vectors.into_iter().map(|vector| {
            let file = vector?.as_fd().try_clone_to_owned().ok()?;
            Some(keep(file))
        });
        let vectors = vectors.collect();
        let image = Image {
            agreed: self.agreed,
            mapped: self.mapped,
            config: self.config.bytes().to_vec(),
            table: self.bar.table().to_vec(),
            pieces,
            vectors,
            pin: irqs.pin.map(|pin| keep(pin.into())),
            unmask: irqs.unmask.map(|unmask| keep(unmask.into())),
            masked: irqs.masked,
            raised: irqs.raised,
        };
        (image, files)
    }

    /// Go on with what another one left. The memory is not given to the controller yet.
    ///
    /// # Errors
    ///
    /// Why that cannot be: the client would find another device than it knows, or files are missing.
    pub fn restore(&mut self, image: Image, files: &[OwnedFd]) -> Result<(), String> {
        let file = |place: usize| {
            let file = files.get(place).ok_or("a file is missing")?;
            let file = file.try_clone().map_err(|e| e.to_string())?;
            Ok::<_, String>(File::from(file))
        };
        if !self.config.restore(&image.config) || !self.bar.restore(image.table) {
            return Err(
                "the configuration makes another device of it than the client knows".into(),
            );
        }
        for piece in image.pieces {
            let shown = match piece.shown {
                Some((place, offset)) => Some((file(place)?, offset)),
                None => None,
            };
            let restored = self.memory.restore(piece.address, piece.len, shown);
            restored.map_err(|refusal| format!("its memory: {}", refusal.why))?;
        }
        let vectors = image.vectors.into_iter();
        let vectors = vectors.map(|v| v.map(|v| file(v).map(Arc::new)).transpose());
        let parts = Parts {
            vectors: vectors.collect::<Result<_, _>>()?,
            pin: image.pin.map(file).transpose()?,
            unmask: image.unmask.map(file).transpose()?,
            masked: image.masked,
            raised: image.raised,
        };
        if !self.interrupts.restore(parts) {
            return Err("the configuration has another number of vectors".into());
        }
        (self.agreed, self.mapped) = (image.agreed, image.mapped);
        Ok(())
    }

    /// What to wait for so that the interrupt pin is served.
    pub fn pin_wakes(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        self.interrupts.pin_wakes(self.pin_allowed())
    }

    /// Signal the interrupt pin if it is due.
    pub fn serve_pin(&mut self) {
        let allowed = self.pin_allowed();
        let asserted = self.interrupts.pass_on(allowed, &self.map);
        self.config.set_intx(asserted);
    }

    /// Whether neither the command register nor the controller's mask is in the way of the pin.
    fn pin_allowed(&self) -> bool {
        let mut mask = [0; 4];
        self.controller.read(INTMS, &mut mask);
        self.config.allows_intx() && mask[0] & 1 == 0
    }
}

/// The beginning of the answer to an access: what was asked for.
fn access_answer(body: Body<'_>, count: usize) -> Result<Answer, Refusal> {
    let mut answer = Answer::default();
    answer.body.extend(body.long(0)?.to_ne_bytes());
    answer.body.extend(body.word(8)?.to_ne_bytes());
    answer.body.extend((count as u32).to_ne_bytes());
    Ok(answer)
}
