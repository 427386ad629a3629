//! Admin commands: one after the other with their answers awaited, or submitted and collected later.

use std::time::{Duration, Instant};

use nvme_spec::admin::{
    Abort, AsyncEventRequest, CreateIoCq, CreateIoSq, DeleteQueue, DoorbellBufferConfig,
    GetFeatures, GetLogPage, Identify, QueuePriority, SetFeatures,
};
use nvme_spec::event::AsyncEvent;
use nvme_spec::feature::{FeatureId, NumberOfQueues, Select};
use nvme_spec::identify::{
    Cns, Csi, IDENTIFY_LEN, IdentifyController, IdentifyNamespace, NamespaceList,
};
use nvme_spec::log::LogId;
use nvme_spec::{Cqe, Sqe, StatusField};
use zerocopy::FromBytes;

use super::bringup::Pause;
use super::{Access, Completion, Device, Driver, DriverError, QueueConfig};

/// User value of Asynchronous Event Requests.
const EVENT: u64 = u64::MAX;

/// Namespaces that are listed.
const MAX_NAMESPACES: usize = 65536;

/// Largest piece of a log page read at once.
const LOG_CHUNK: usize = 4096;

impl<D: Device> Driver<D> {
    /// Submit an admin command: its identifier on the queue, and the number under which [`Self::admin_finished`] gives the answer.
    ///
    /// # Errors
    ///
    /// The queue is full.
    pub fn admin_submit(
        &mut self,
        what: &'static str,
        sqe: Sqe,
    ) -> Result<(u16, u64), DriverError> {
        let user = self.next_user;
        self.next_user = (self.next_user + 1) % EVENT;
        let cid = self
            .admin
            .submit(sqe, user)
            .map_err(|source| DriverError::Submit { what, source })?;
        self.admin.ring();
        Ok((cid, user))
    }

    /// Collect what the admin queue has.
    pub fn admin_poll(&mut self) -> u32 {
        let (finished, events, aers) = (&mut self.finished, &mut self.events, &mut self.aers_out);
        self.admin.poll(u32::from(u16::MAX), |c: Completion| {
            if c.user == EVENT {
                *aers = aers.saturating_sub(1);
                if c.status().is_success() {
                    events.push_back(AsyncEvent::from_dw0(c.cqe.dw0));
                }
            } else {
                finished.push(c);
            }
        })
    }

    /// The answer to an admin command, if it is there.
    pub fn admin_finished(&mut self, user: u64) -> Option<Cqe> {
        self.admin_poll();
        let at = self.finished.iter().position(|c| c.user == user)?;
        Some(self.finished.swap_remove(at).cqe)
    }

    /// Wait for the answer to an admin command.
    ///
    /// # Errors
    ///
    /// [`DriverError::Timeout`], [`DriverError::Fatal`] or [`DriverError::Gone`]: the controller wants a reset then.
    pub fn admin_wait(
        &mut self,
        what: &'static str,
        user: u64,
        after: Duration,
    ) -> Result<Cqe, DriverError> {
        let start = Instant::now();
        let mut pause = Pause::new();
        loop {
            let late = start.elapsed() > after;
            if let Some(cqe) = self.admin_finished(user) {
                return Ok(cqe);
            }
            if late {
                return Err(if self.csts()?.cfs() {
                    DriverError::Fatal { what }
                } else {
                    DriverError::Timeout { what, after }
                });
            }
            match self.admin.interrupt() {
                // Not for long: a controller whose interrupts are broken is slow, not dead.
                Some(_) => {
                    self.admin
                        .wait(Duration::from_millis(20))
                        .map_err(DriverError::device("waiting for an interrupt"))?;
                }
                None => pause.pause(),
            }
        }
    }

    /// Do an admin command: the completion, whatever its status.
    ///
    /// # Errors
    ///
    /// As [`Self::admin_wait`].
    pub fn admin(&mut self, what: &'static str, sqe: Sqe) -> Result<Cqe, DriverError> {
        let (_, user) = self.admin_submit(what, sqe)?;
        self.admin_wait(what, user, self.options.admin_timeout)
    }

    /// Do an admin command that must succeed.
    ///
    /// # Errors
    ///
    /// As [`Self::admin_wait`], and [`DriverError::Refused`].
    pub fn admin_ok(&mut self, what: &'static str, sqe: Sqe) -> Result<Cqe, DriverError> {
        let cqe = self.admin(what, sqe)?;
        if cqe.status().is_success() {
            Ok(cqe)
        } else {
            Err(DriverError::Refused {
                what,
                status: cqe.status.with_p(false),
            })
        }
    }

    /// Do an admin command that reads `len` bytes (at most two pages); `make` puts the data pointers in.
    fn admin_read(
        &mut self,
        what: &'static str,
        len: usize,
        make: impl FnOnce(u64, u64) -> Sqe,
    ) -> Result<Vec<u8>, DriverError> {
        let page = self.page.bytes() as usize;
        let data = self
            .device
            .allocate(len.min(2 * page), Access::ReadWrite)
            .map_err(DriverError::device("allocating memory for an answer"))?;
        let prp2 = if len > page {
            data.addr() + page as u64
        } else {
            0
        };
        match self.admin_ok(what, make(data.addr(), prp2)) {
            Ok(_) => Ok(data.bytes(len)),
            Err(e) => {
                if !matches!(e, DriverError::Refused { .. }) {
                    // No answer: the controller may still write to it.
                    std::mem::forget(data);
                }
                Err(e)
            }
        }
    }

    /// Any Identify data structure.
    ///
    /// # Errors
    ///
    /// As [`Self::admin_ok`].
    pub fn identify_raw(&mut self, identify: Identify) -> Result<Vec<u8>, DriverError> {
        self.admin_read("Identify", IDENTIFY_LEN, |prp1, prp2| {
            identify.to_sqe(prp1, prp2)
        })
    }

    /// An Identify data structure of this CNS and NSID as a type.
    ///
    /// # Errors
    ///
    /// As [`Self::admin_ok`].
    pub fn identify_as<T: FromBytes>(
        &mut self,
        cns: Cns,
        nsid: u32,
        csi: Csi,
    ) -> Result<T, DriverError> {
        let bytes = self.identify_raw(Identify {
            cns,
            nsid,
            csi,
            ..Identify::default()
        })?;
        T::read_from_prefix(&bytes)
            .map(|(value, _)| value)
            .map_err(|_| DriverError::Unsupported("an Identify structure of this size"))
    }

    /// Identify Controller, read anew.
    ///
    /// # Errors
    ///
    /// As [`Self::admin_ok`].
    pub fn identify_controller(&mut self) -> Result<IdentifyController, DriverError> {
        self.identify_as(Cns::CONTROLLER, 0, Csi::NVM)
    }

    /// Identify Namespace.
    ///
    /// # Errors
    ///
    /// As [`Self::admin_ok`].
    pub fn identify_namespace(&mut self, nsid: u32) -> Result<IdentifyNamespace, DriverError> {
        self.identify_as(Cns::NAMESPACE, nsid, Csi::NVM)
    }

    /// All active namespaces, by ascending NSID.
    ///
    /// # Errors
    ///
    /// As [`Self::admin_ok`].
    pub fn namespaces(&mut self) -> Result<Vec<u32>, DriverError> {
        let mut all: Vec<u32> = Vec::new();
        loop {
            let after = all.last().copied().unwrap_or(0);
            let list: NamespaceList = self.identify_as(Cns::ACTIVE_NAMESPACES, after, Csi::NVM)?;
            let before = all.len();
            for nsid in list.ids() {
                // A device that does not count upwards does not keep us here.
                if all.last().is_none_or(|last| nsid > *last) {
                    all.push(nsid);
                }
            }
            // Nor does one that never stops.
            if all.len() - before < 1024 || all.len() >= MAX_NAMESPACES {
                return Ok(all);
            }
        }
    }

    /// The first `len` bytes (a multiple of 4) of a log page.
    ///
    /// # Errors
    ///
    /// As [`Self::admin_ok`].
    pub fn log_page(
        &mut self,
        lid: LogId,
        nsid: u32,
        len: usize,
        retain: bool,
    ) -> Result<Vec<u8>, DriverError> {
        let mut out = Vec::with_capacity(len);
        while out.len() < len {
            let n = (len - out.len()).min(LOG_CHUNK);
            let command = GetLogPage {
                lid,
                nsid,
                rae: retain,
                numd_z: (n as u32 / 4).saturating_sub(1),
                offset: out.len() as u64,
                ..GetLogPage::default()
            };
            out.extend(
                self.admin_read("Get Log Page", n, |prp1, prp2| command.to_sqe(prp1, prp2))?,
            );
        }
        Ok(out)
    }

    /// The first bytes of a log page as a type.
    ///
    /// # Errors
    ///
    /// As [`Self::admin_ok`].
    pub fn log_as<T: FromBytes>(&mut self, lid: LogId, nsid: u32) -> Result<T, DriverError> {
        let bytes = self.log_page(lid, nsid, size_of::<T>().next_multiple_of(4), false)?;
        T::read_from_prefix(&bytes)
            .map(|(value, _)| value)
            .map_err(|_| DriverError::Unsupported("a log page of this size"))
    }

    /// Get Features: completion dword 0.
    ///
    /// # Errors
    ///
    /// As [`Self::admin_ok`].
    pub fn get_feature(
        &mut self,
        fid: FeatureId,
        sel: Select,
        nsid: u32,
        cdw11: u32,
    ) -> Result<u32, DriverError> {
        let command = GetFeatures {
            fid,
            sel,
            nsid,
            cdw11,
            uuid_index: 0,
        };
        Ok(self.admin_ok("Get Features", command.to_sqe(0, 0))?.dw0)
    }

    /// Set Features without data: completion dword 0.
    ///
    /// # Errors
    ///
    /// As [`Self::admin_ok`].
    pub fn set_feature(
        &mut self,
        fid: FeatureId,
        nsid: u32,
        cdw11: u32,
    ) -> Result<u32, DriverError> {
        let command = SetFeatures {
            fid,
            nsid,
            cdw11,
            ..SetFeatures::default()
        };
        Ok(self.admin_ok("Set Features", command.to_sqe(0, 0))?.dw0)
    }

    /// Ask for I/O queue pairs: how many there are.
    ///
    /// # Errors
    ///
    /// As [`Self::admin_ok`].
    pub fn request_queue_pairs(&mut self, wanted: u16) -> Result<u16, DriverError> {
        let z = wanted.max(1) - 1;
        let value = NumberOfQueues::new().with_nsq_z(z).with_ncq_z(z);
        let dw0 = self.set_feature(FeatureId::NUMBER_OF_QUEUES, 0, value.into_bits())?;
        let granted = NumberOfQueues::from_bits(dw0);
        let granted = granted.nsq_z().min(granted.ncq_z()).saturating_add(1);
        Ok(granted.min(wanted))
    }

    /// Abort a command: whether it was.
    ///
    /// # Errors
    ///
    /// As [`Self::admin_ok`].
    pub fn abort(&mut self, sqid: u16, cid: u16) -> Result<bool, DriverError> {
        let cqe = self.admin_ok("Abort", Abort { sqid, cid }.to_sqe())?;
        Ok(cqe.dw0 & 1 == Abort::ABORTED)
    }

    /// Have this many Asynchronous Event Requests out, but not more than the controller takes.
    ///
    /// # Errors
    ///
    /// The admin queue is full.
    pub fn arm_events(&mut self, wanted: u32) -> Result<(), DriverError> {
        let most = u32::from(self.identify().aerl_z) + 1;
        while self.aers_out < wanted.min(most) {
            self.admin
                .submit(AsyncEventRequest.to_sqe(), EVENT)
                .map_err(|source| DriverError::Submit {
                    what: "Asynchronous Event Request",
                    source,
                })?;
            self.aers_out += 1;
        }
        self.admin.ring();
        Ok(())
    }

    /// The oldest event that has been reported, if there is one.
    pub fn next_event(&mut self) -> Option<AsyncEvent> {
        self.admin_poll();
        self.events.pop_front()
    }

    /// Wait for an event.
    ///
    /// # Errors
    ///
    /// The way to the device is broken.
    pub fn wait_event(&mut self, limit: Duration) -> Result<Option<AsyncEvent>, DriverError> {
        let start = Instant::now();
        let mut pause = Pause::new();
        loop {
            let late = start.elapsed() > limit;
            if let Some(event) = self.next_event() {
                return Ok(Some(event));
            }
            if late {
                return Ok(None);
            }
            match self.admin.interrupt() {
                Some(_) => {
                    self.admin
                        .wait(Duration::from_millis(20))
                        .map_err(DriverError::device("waiting for an interrupt"))?;
                }
                None => pause.pause(),
            }
        }
    }

    pub(super) fn create_queues(
        &mut self,
        config: &QueueConfig,
        sq: u64,
        cq: u64,
    ) -> Result<(), DriverError> {
        let create_cq = CreateIoCq {
            prp1: cq,
            qid: config.qid,
            qsize_z: config.cq_size.size_z(),
            pc: true,
            ien: config.vector.is_some(),
            iv: config.vector.unwrap_or(0),
        };
        self.admin_ok("Create I/O Completion Queue", create_cq.to_sqe())?;
        let create_sq = CreateIoSq {
            prp1: sq,
            qid: config.qid,
            qsize_z: config.sq_size.size_z(),
            pc: true,
            qprio: QueuePriority::MEDIUM,
            cqid: config.qid,
            nvmsetid: 0,
        };
        let created = self.admin_ok("Create I/O Submission Queue", create_sq.to_sqe());
        if created.is_err() {
            self.delete_cq(config.qid)?;
        }
        created.map(|_| ())
    }

    /// Delete an I/O submission queue.
    ///
    /// # Errors
    ///
    /// As [`Self::admin_ok`].
    pub fn delete_sq(&mut self, qid: u16) -> Result<(), DriverError> {
        let sqe = DeleteQueue { qid }.to_sq_sqe();
        self.admin_ok("Delete I/O Submission Queue", sqe)
            .map(|_| ())
    }

    /// Delete an I/O completion queue.
    ///
    /// # Errors
    ///
    /// As [`Self::admin_ok`].
    pub fn delete_cq(&mut self, qid: u16) -> Result<(), DriverError> {
        let sqe = DeleteQueue { qid }.to_cq_sqe();
        self.admin_ok("Delete I/O Completion Queue", sqe)
            .map(|_| ())
    }

    pub(super) fn configure_doorbell_buffer(
        &mut self,
        shadow: u64,
        event_idx: u64,
    ) -> Result<(), DriverError> {
        let sqe = DoorbellBufferConfig { shadow, event_idx }.to_sqe();
        self.admin_ok("Doorbell Buffer Config", sqe).map(|_| ())
    }

    /// The status field of a command that is expected to be refused.
    ///
    /// # Errors
    ///
    /// As [`Self::admin_wait`].
    pub fn admin_status(
        &mut self,
        what: &'static str,
        sqe: Sqe,
    ) -> Result<StatusField, DriverError> {
        Ok(self.admin(what, sqe)?.status.with_p(false))
    }
}
