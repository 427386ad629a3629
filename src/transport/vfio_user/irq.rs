//! Interrupts: `DEVICE_SET_IRQS` for MSI-X, one eventfd a vector, and for the pin, which is one for all of them.
//!
//! MSI-X is the client's eventfds, given to the controller as they are. The pin is a level that VFIO makes edges of: it is signalled once, is
//! masked by that, and after the client has unmasked it is signalled again while it is due: as long as the guest has completions it has not
//! taken. All vectors of the controller signal one eventfd of ours then, which says when to look. A client may have given an eventfd that unmasks
//! it, as it would the kernel: that is how KVM tells of the guest's end of interrupt (its resample eventfd).

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nvme_spec::regs::Csts;
use nvme_spec::regs::offset::CSTS;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use super::Refusal;
use super::bar::signal;
use crate::controller::Controller;
use crate::memory::GuestMap;
use crate::transport::is_eventfd;

/// The kinds of interrupts of a PCI device.
pub const KINDS: u32 = 5;
const INTX: u32 = 0;
const MSIX: u32 = 2;

const DATA_NONE: u32 = 1;
const DATA_BOOL: u32 = 2;
const DATA_EVENTFD: u32 = 4;
const DATA: u32 = DATA_NONE | DATA_BOOL | DATA_EVENTFD;
const ACTION_MASK: u32 = 8;
const ACTION_UNMASK: u32 = 16;
const ACTION_TRIGGER: u32 = 32;

/// What `DEVICE_SET_IRQS` says.
#[derive(Clone, Copy, Debug)]
pub struct SetIrqs<'a> {
    /// What is done to which data.
    pub flags: u32,
    /// The kind.
    pub index: u32,
    /// The first interrupt of that kind.
    pub start: u32,
    /// How many.
    pub count: u32,
    /// A byte for each, if the flags say so.
    pub data: &'a [u8],
}

/// What [`Interrupts`] leave to others.
pub struct Parts {
    /// The client's eventfd of each vector.
    pub vectors: Vec<Option<Arc<File>>>,
    /// The client's eventfd of the pin.
    pub pin: Option<File>,
    /// The client's eventfd that unmasks the pin.
    pub unmask: Option<File>,
    /// Whether the pin is masked.
    pub masked: bool,
    /// Whether the controller has raised the pin and nobody was told.
    pub raised: bool,
}

/// The interrupts of one connection.
pub struct Interrupts {
    controller: Arc<Controller>,
    vectors: Vec<Option<Arc<File>>>,
    pin: Option<File>,
    /// What unmasks the pin besides messages.
    unmask: Option<File>,
    masked: bool,
    /// Signalled by the controller while the pin is used.
    raised: OwnedFd,
    /// Whether `raised` is what the controller signals.
    piped: bool,
}

impl Interrupts {
    /// None is asked for.
    ///
    /// # Errors
    ///
    /// No file descriptor is left.
    pub fn new(controller: &Arc<Controller>) -> io::Result<Self> {
        Ok(Self {
            vectors: vec![None; usize::from(controller.queues())],
            controller: Arc::clone(controller),
            pin: None,
            unmask: None,
            masked: false,
            raised: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            piped: false,
        })
    }

    /// How many interrupts of a kind there are, and the flags of `DEVICE_GET_IRQ_INFO`: eventfd, maskable, automasked, no resize.
    pub fn info(&self, index: u32) -> Option<(u32, u32)> {
        match index {
            INTX => Some((1, 1 | 2 | 4)),
            MSIX => Some((self.vectors.len() as u32, 1 | 8)),
            _ if index < KINDS => Some((0, 1 | 8)),
            _ => None,
        }
    }

    /// Carry out `DEVICE_SET_IRQS`.
    pub fn set(&mut self, irqs: &SetIrqs<'_>, files: Vec<OwnedFd>) -> Result<(), Refusal> {
        let Some((most, _)) = self.info(irqs.index) else {
            return Err(Refusal::invalid(format!("there is no kind {}", irqs.index)));
        };
        let end = irqs.start.checked_add(irqs.count);
        if end.is_none_or(|end| end > most) {
            return Err(Refusal::invalid(format!(
                "{} interrupts from {} on: there are {most}",
                irqs.count, irqs.start
            )));
        }
        if (irqs.flags & DATA).count_ones() != 1 {
            return Err(Refusal::invalid(format!("flags {:#x}", irqs.flags)));
        }
        if irqs.flags & DATA_BOOL != 0 && irqs.data.len() < irqs.count as usize {
            return Err(Refusal::invalid("fewer bytes than interrupts"));
        }
        let files = eventfds(irqs, files)?;
        match (irqs.flags & !DATA, irqs.index) {
            (ACTION_TRIGGER, INTX) => self.trigger_pin(irqs, files),
            (ACTION_TRIGGER, MSIX) => self.trigger_vectors(irqs, files),
            (ACTION_TRIGGER, _) => {}
            (ACTION_MASK | ACTION_UNMASK, INTX) if irqs.flags & DATA_EVENTFD == 0 => {
                if irqs.count > 0 && irqs.chosen(0) {
                    self.masked = irqs.flags & ACTION_MASK != 0;
                }
            }
            (ACTION_UNMASK, INTX) => {
                self.unmask = files.into_iter().flatten().next().and_then(Arc::into_inner);
            }
            (action, index) => {
                return Err(Refusal::new(
                    Errno::OPNOTSUPP,
                    format!("action {action:#x} on kind {index}"),
                ));
            }
        }
        Ok(())
    }

    fn trigger_vectors(&mut self, irqs: &SetIrqs<'_>, files: Vec<Option<Arc<File>>>) {
        if irqs.flags & DATA_EVENTFD != 0 {
            let start = irqs.start as usize;
            let mut csts = [0; 4];
            self.controller.read(CSTS, &mut csts);
            let ready = Csts::from_bits(u32::from_le_bytes(csts)).rdy();
            let places = self.vectors.iter_mut().skip(start);
            for (place, file) in places.zip(files) {
                // What was raised while nobody listened is not known any more: one too many does no harm.
                if ready
                    && place.is_none()
                    && let Some(file) = &file
                {
                    signal(file);
                }
                *place = file;
            }
        } else if irqs.flags & DATA_NONE != 0 && irqs.count == 0 {
            self.vectors.fill(None);
        } else {
            let chosen = self.vectors.iter().skip(irqs.start as usize);
            for (i, vector) in chosen.take(irqs.count as usize).enumerate() {
                if let Some(file) = vector.as_ref().filter(|_| irqs.chosen(i)) {
                    signal(file);
                }
            }
            return;
        }
        self.connect();
    }

    fn trigger_pin(&mut self, irqs: &SetIrqs<'_>, files: Vec<Option<Arc<File>>>) {
        if irqs.flags & DATA_EVENTFD != 0 && irqs.count > 0 {
            self.pin = files.into_iter().flatten().next().and_then(Arc::into_inner);
            self.masked = false;
        } else if irqs.count == 0 {
            (self.pin, self.unmask) = (None, None);
        } else {
            if irqs.chosen(0)
                && let Some(pin) = &self.pin
            {
                signal(pin);
            }
            return;
        }
        self.connect();
    }

    /// Tell the controller what to signal.
    fn connect(&mut self) {
        let msix = self.vectors.iter().any(Option::is_some);
        self.piped = !msix && self.pin.is_some();
        self.controller.use_pin(self.piped);
        for (index, vector) in self.vectors.iter().enumerate() {
            let call = match vector {
                Some(file) => file.try_clone(),
                None if self.piped => self.raised.try_clone().map(File::from),
                None => {
                    self.controller.set_call(index, None);
                    continue;
                }
            };
            match call {
                Ok(file) => self.controller.set_call(index, Some(file)),
                Err(error) => {
                    let controller = self.controller.name();
                    tracing::error!(
                        controller,
                        index,
                        "no file descriptor for a vector: {error}"
                    );
                }
            }
        }
    }

    /// Leave everything to another one: the vectors, the pin, whether that is masked, and whether it was raised.
    pub fn into_parts(self) -> Parts {
        Parts {
            raised: rustix::io::read(&self.raised, &mut [0; 8]) == Ok(8),
            vectors: self.vectors,
            pin: self.pin,
            unmask: self.unmask,
            masked: self.masked,
        }
    }

    /// Go on with what another one left; whether it had as many vectors.
    pub fn restore(&mut self, parts: Parts) -> bool {
        if parts.vectors.len() != self.vectors.len() {
            return false;
        }
        self.vectors = parts.vectors;
        self.pin = parts.pin;
        self.unmask = parts.unmask;
        self.masked = parts.masked;
        if parts.raised {
            let _ = rustix::io::write(&self.raised, &1u64.to_ne_bytes());
        }
        self.connect();
        true
    }

    /// What becomes readable when the pin may have to be signalled, as far as `allowed` lets it; `None` while it cannot be.
    pub fn pin_wakes(&self, allowed: bool) -> Option<BorrowedFd<'_>> {
        match (&self.unmask, self.masked) {
            _ if !self.piped => None,
            (Some(unmask), true) => Some(unmask.as_fd()),
            (_, masked) => (allowed && !masked).then(|| self.raised.as_fd()),
        }
    }

    /// Whether the client has unmasked the pin by its eventfd since this was asked last.
    fn take_unmask(&mut self) -> bool {
        let Some(unmask) = &self.unmask else {
            return false;
        };
        let mut count = [0; 8];
        let into = &mut [IoSliceMut::new(&mut count)];
        // The client can clear O_NONBLOCK and take what we were woken for: only this read never waits.
        match preadv2(unmask, into, u64::MAX, ReadWriteFlags::NOWAIT) {
            Ok(8) => true,
            Err(Errno::AGAIN | Errno::INTR) => false,
            // Nothing that can be waited for: it would wake us for ever.
            _ => {
                self.unmask = None;
                false
            }
        }
    }

    /// Signal the pin if there is something new for the guest in `map`, unless it is masked or `allowed` says no. Whether it is asserted.
    pub fn pass_on(&mut self, allowed: bool, map: &GuestMap) -> bool {
        if self.piped && self.masked && self.take_unmask() {
            self.masked = false;
        }
        if self.piped && !self.masked && allowed {
            // First this, then the look: what is raised after it has us look again.
            let _ = rustix::io::read(&self.raised, &mut [0; 8]);
            if self.controller.is_pin_due(map) {
                // KVM signals it for others of a shared interrupt too: what came before was not about this one.
                self.take_unmask();
                if let Some(pin) = &self.pin {
                    signal(pin);
                }
                self.masked = true;
            }
        }
        self.piped && self.masked
    }
}

impl SetIrqs<'_> {
    /// Whether interrupt `i` of these is meant.
    fn chosen(&self, i: usize) -> bool {
        self.flags & DATA_BOOL == 0 || self.data.get(i).is_some_and(|b| *b != 0)
    }
}

/// The eventfds of a message: one for each interrupt, or none at all, which takes away those there were.
fn eventfds(irqs: &SetIrqs<'_>, files: Vec<OwnedFd>) -> Result<Vec<Option<Arc<File>>>, Refusal> {
    let wanted = if irqs.flags & DATA_EVENTFD != 0 {
        irqs.count as usize
    } else {
        0
    };
    if files.is_empty() {
        return Ok(vec![None; wanted]);
    }
    if files.len() != wanted {
        return Err(Refusal::invalid(format!(
            "{} files for {wanted} interrupts",
            files.len()
        )));
    }
    let check = |fd: OwnedFd| {
        let file = File::from(fd);
        if !is_eventfd(&file) {
            return Err(Refusal::invalid("a file is not an eventfd"));
        }
        // A counter that is full must stop neither a poller nor us.
        let flags = rustix::fs::fcntl_getfl(&file);
        let set =
            flags.and_then(|f| rustix::fs::fcntl_setfl(&file, f | rustix::fs::OFlags::NONBLOCK));
        match set {
            Ok(()) => Ok(Some(Arc::new(file))),
            Err(e) => Err(Refusal::new(e, "an eventfd cannot be made non-blocking")),
        }
    };
    files.into_iter().map(check).collect()
}
