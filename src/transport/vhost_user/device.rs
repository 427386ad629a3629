//! What vhost-user messages mean for a controller: one [`Device`] for each connection.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error, GpuBackend, Result, VhostUserBackendReqHandler, VhostUserVirtioFeatures,
};
use vm_memory::FileOffset;

use super::page::{self, FrontEndPage, Written};
use crate::controller::{Controller, DRAIN_LIMIT, MemoryError};
use crate::memory::{GuestMap, Region, VmRegion, check_file, check_room};
use crate::transport::{Failure, is_eventfd};

/// `VIRTIO_F_VERSION_1`.
const VERSION_1: u64 = 1 << 32;

/// Features of the device.
pub const FEATURES: u64 = VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// Protocol features of the device.
pub const PROTOCOL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::BACKEND_SEND_FD)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::SHMEM);

/// What a front-end must have agreed to before it opens the back-end channel.
const CHANNEL_FEATURES: VhostUserProtocolFeatures = VhostUserProtocolFeatures::BACKEND_REQ
    .union(VhostUserProtocolFeatures::BACKEND_SEND_FD)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::SHMEM);

/// Memory regions a front-end may have.
const MAX_REGIONS: usize = 509;

/// PCI revision that the front-end shows.
const PCI_REVISION: u8 = 1;

/// A connection's view of its controller.
pub struct Device {
    controller: Arc<Controller>,
    failure: Arc<Failure>,
    state: Mutex<State>,
}

struct State {
    owned: bool,
    protocol_features: u64,
    page: FrontEndPage,
    memory: Vec<Mapped>,
}

#[derive(Clone)]
struct Mapped {
    vm: Arc<VmRegion>,
    region: Arc<Region>,
}

fn refuse<T>(why: impl Into<String>) -> Result<T> {
    Err(Error::ReqHandlerError(io::Error::other(why.into())))
}

impl Device {
    /// A fresh connection to `controller`.
    pub fn new(controller: Arc<Controller>, failure: Arc<Failure>) -> Arc<Self> {
        let page = FrontEndPage::new(
            u32::try_from(controller.window().bytes()).unwrap_or(u32::MAX),
            controller.queues(),
            controller.pci_ids(),
            PCI_REVISION,
        );
        Arc::new(Self {
            controller,
            failure,
            state: Mutex::new(State {
                owned: false,
                protocol_features: 0,
                page,
                memory: Vec::new(),
            }),
        })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest address of a region whose file turned out to be cut.
    pub fn cut_region(&self) -> Option<u64> {
        let state = self.state();
        let cut = state.memory.iter().find(|m| m.vm.is_cut())?;
        Some(cut.vm.gpa())
    }

    /// Whether the front-end agreed to all the back-end channel needs.
    pub fn may_open_channel(&self) -> bool {
        self.state().protocol_features & CHANNEL_FEATURES.bits() == CHANNEL_FEATURES.bits()
    }

    fn check_vring(&self, index: u32) -> Result<usize> {
        let queues = self.controller.queues();
        if index < u32::from(queues) {
            Ok(index as usize)
        } else {
            refuse(format!(
                "there is no vring {index}, only 0 to {}",
                queues - 1
            ))
        }
    }

    /// Map a region, or take the mapping we have if it shows the same.
    fn map(&self, known: &[Mapped], r: &VhostUserMemoryRegion, file: File) -> io::Result<Mapped> {
        let (gpa, len) = (r.guest_phys_addr, r.memory_size);
        let at = FileOffset::new(file, r.mmap_offset);
        let identity = check_file(&at, gpa, len)?;
        if let Some(same) = known.iter().find(|m| m.vm.identity() == identity) {
            return Ok(same.clone());
        }
        let vm = VmRegion::new(at, gpa, len, Arc::clone(self.failure.wake()))?;
        let region = vm.region();
        Ok(Mapped { vm, region })
    }

    /// Make `memory` the guest's memory.
    fn use_memory(&self, memory: Vec<Mapped>) -> Result<()> {
        let regions = memory.iter().map(|m| Arc::clone(&m.region)).collect();
        let map =
            GuestMap::new(regions).map_err(|e| Error::ReqHandlerError(io::Error::other(e)))?;
        // The old mappings stay until the controller has let go of them.
        let old = std::mem::replace(&mut self.state().memory, memory);
        match self.controller.set_memory(map, DRAIN_LIMIT) {
            Ok(()) => Ok(()),
            Err(e @ (MemoryError::InUse(_) | MemoryError::NotYet(_))) => refuse(e.to_string()),
            Err(e) => {
                // What was there before is still used.
                self.state().memory = old;
                tracing::error!(controller = self.controller.name(), "{e}");
                refuse(e.to_string())
            }
        }
    }
}

/// Check that a file is an eventfd.
fn eventfd(what: &str, index: u32, file: Option<File>) -> Result<Option<File>> {
    let Some(file) = file else { return Ok(None) };
    if !is_eventfd(&file) {
        return refuse(format!("the {what} of vring {index} is not an eventfd"));
    }
    Ok(Some(file))
}

impl VhostUserBackendReqHandler for Device {
    fn set_owner(&self) -> Result<()> {
        if std::mem::replace(&mut self.state().owned, true) {
            return refuse("the session has an owner already");
        }
        Ok(())
    }

    fn reset_owner(&self) -> Result<()> {
        self.state().owned = false;
        Ok(())
    }

    fn reset_device(&self) -> Result<()> {
        if self.controller.reset(DRAIN_LIMIT) {
            Ok(())
        } else {
            refuse(format!(
                "I/O can still touch guest memory, {DRAIN_LIMIT:?} after the reset"
            ))
        }
    }

    fn get_features(&self) -> Result<u64> {
        Ok(FEATURES)
    }

    fn set_features(&self, features: u64) -> Result<()> {
        match features & !FEATURES {
            0 => Ok(()),
            unknown => refuse(format!("features {unknown:#x} were not offered")),
        }
    }

    fn get_protocol_features(&self) -> Result<VhostUserProtocolFeatures> {
        Ok(PROTOCOL_FEATURES)
    }

    fn set_protocol_features(&self, features: u64) -> Result<()> {
        match features & !PROTOCOL_FEATURES.bits() {
            0 => {
                self.state().protocol_features = features;
                Ok(())
            }
            unknown => refuse(format!("protocol features {unknown:#x} were not offered")),
        }
    }

    fn get_queue_num(&self) -> Result<u64> {
        Ok(u64::from(self.controller.queues()))
    }

    fn get_shmem_config(&self) -> Result<VhostUserShMemConfig> {
        let bytes = self.controller.window().bytes() as u64;
        Ok(VhostUserShMemConfig::new(2, &[bytes, bytes]))
    }

    fn get_config(&self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        // The crate has checked both against the size of the configuration space.
        let mut out = vec![0; size.min(page::CONFIG_SIZE) as usize];
        let registers = (page::START.saturating_sub(offset) as usize).min(out.len());
        let (low, high) = out.split_at_mut(registers);
        if !low.is_empty() {
            self.controller.read(offset, low);
        }
        let kept = self.controller.kept().to_le_bytes();
        let state = self.state();
        let start = offset.saturating_sub(page::START) as usize;
        for (i, byte) in high.iter_mut().enumerate() {
            *byte = match (start + i).checked_sub(page::KEPT) {
                Some(at @ 0..4) => kept[at],
                _ => state.page.byte(start + i),
            };
        }
        Ok(out)
    }

    fn set_config(&self, offset: u32, data: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        if let Some(at) = offset.checked_sub(page::START) {
            let written = self.state().page.write(at as usize, data);
            match written {
                None => {}
                Some(Written::Instance(id)) => self.controller.set_instance(id),
                Some(Written::Go { used }) if !self.controller.go(used, DRAIN_LIMIT) => {
                    return refuse(format!(
                        "I/O of an earlier connection is still out, {DRAIN_LIMIT:?} after everything was sent"
                    ));
                }
                Some(Written::Go { .. }) => {}
            }
        } else if matches!(data.len(), 1 | 2 | 4 | 8) && offset.is_multiple_of(data.len() as u32) {
            self.controller.write(offset, data);
        } else {
            tracing::debug!(
                controller = self.controller.name(),
                offset,
                len = data.len(),
                "a register write of a size or alignment that means nothing was ignored"
            );
        }
        Ok(())
    }

    fn set_vring_kick(&self, index: u8, file: Option<File>) -> Result<()> {
        let vring = self.check_vring(index.into())?;
        let file = eventfd("kick", index.into(), file)?;
        self.controller.set_kick(vring, file);
        Ok(())
    }

    fn set_vring_call(&self, index: u8, file: Option<File>) -> Result<()> {
        let vring = self.check_vring(index.into())?;
        let file = eventfd("call", index.into(), file)?;
        self.controller.set_call(vring, file);
        Ok(())
    }

    fn set_vring_err(&self, index: u8, _: Option<File>) -> Result<()> {
        self.check_vring(index.into()).map(drop)
    }

    /// Whether a vring is enabled makes no difference: nothing happens on a queue that the guest has not created, and an interrupt
    /// that was held back meanwhile would be lost.
    fn set_vring_enable(&self, index: u32, _: bool) -> Result<()> {
        self.check_vring(index).map(drop)
    }

    fn get_vring_base(&self, index: u32) -> Result<VhostUserVringState> {
        let vring = self.check_vring(index)?;
        self.controller.set_kick(vring, None);
        self.controller.set_call(vring, None);
        Ok(VhostUserVringState::new(index, 0))
    }

    // Nobody asks for the rings of virtio: a vring here has none.

    fn set_vring_num(&self, index: u32, _: u32) -> Result<()> {
        self.check_vring(index).map(drop)
    }

    fn set_vring_base(&self, index: u32, _: u32) -> Result<()> {
        self.check_vring(index).map(drop)
    }

    fn set_vring_addr(
        &self,
        index: u32,
        _: VhostUserVringAddrFlags,
        _: u64,
        _: u64,
        _: u64,
        _: u64,
    ) -> Result<()> {
        self.check_vring(index).map(drop)
    }

    fn get_max_mem_slots(&self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn set_mem_table(
        &self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let sizes = table.iter().map(|region| region.memory_size);
        check_room(sizes, 0).map_err(Error::ReqHandlerError)?;
        let known = self.state().memory.clone();
        let mut memory = Vec::with_capacity(table.len());
        for (region, file) in table.iter().zip(files) {
            let mapped = self.map(&known, region, file);
            memory.push(mapped.map_err(Error::ReqHandlerError)?);
        }
        self.use_memory(memory)?;
        Ok(None)
    }

    fn add_mem_region(
        &self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let mut memory = self.state().memory.clone();
        if memory.len() >= MAX_REGIONS {
            return refuse(format!("more than {MAX_REGIONS} memory regions"));
        }
        let sizes = memory.iter().map(|m| m.vm.bytes());
        check_room(sizes, region.memory_size).map_err(Error::ReqHandlerError)?;
        // Not one we have: a region that comes a second time overlaps itself.
        let mapped = self.map(&[], region, file);
        memory.push(mapped.map_err(Error::ReqHandlerError)?);
        self.use_memory(memory)?;
        Ok(None)
    }

    fn remove_mem_region(&self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let (gpa, len) = (region.guest_phys_addr, region.memory_size);
        let mut memory = self.state().memory.clone();
        let Some(at) = memory.iter().position(|m| m.vm.is_at(gpa, len)) else {
            return refuse(format!(
                "there is no memory region of {len:#x} bytes at {gpa:#x}"
            ));
        };
        memory.remove(at);
        self.use_memory(memory)
    }

    // Not offered, so never asked for by a front-end that keeps to the protocol.

    fn set_gpu_socket(&self, _: GpuBackend) -> Result<()> {
        refuse("this is no GPU")
    }

    fn get_shared_object(&self, _: VhostUserSharedMsg) -> Result<File> {
        refuse("there are no shared objects")
    }

    fn get_inflight_fd(&self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        refuse("there is no inflight buffer")
    }

    fn set_inflight_fd(&self, _: &VhostUserInflight, _: File) -> Result<()> {
        refuse("there is no inflight buffer")
    }

    fn set_device_state_fd(
        &self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        refuse("the device state cannot be moved")
    }

    fn check_device_state(&self) -> Result<()> {
        refuse("the device state cannot be moved")
    }

    fn set_log_base(&self, _: &VhostUserLog, _: File) -> Result<()> {
        refuse("dirty pages are not logged")
    }
}
