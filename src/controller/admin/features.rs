//! Set and Get Features: the values, what they may be, and what they are after a reset.

use std::time::{Instant, SystemTime};

use nvme_spec::Status;
use nvme_spec::admin::{GetFeatures, SetFeatures};
use nvme_spec::command::NSID_BROADCAST;
use nvme_spec::event::AsyncEventConfig;
use nvme_spec::feature::{
    Arbitration, Capabilities, ErrorRecovery, FeatureId, HostBehavior, InterruptCoalescing,
    InterruptVectorConfig, NumberOfQueues, PowerManagement, Select, SoftwareProgress,
    TemperatureThreshold, ThresholdType, Timestamp, VolatileWriteCache, WriteAtomicity,
};
use nvme_spec::log::CriticalWarning;
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::refusal::{Field, Refusal, invalid};
use crate::controller::info::Info;
use crate::poller::Coalescing;

/// The features there are (Volatile Write Cache only if there is one).
pub(super) const SUPPORTED: [FeatureId; 13] = [
    FeatureId::ARBITRATION,
    FeatureId::POWER_MANAGEMENT,
    FeatureId::TEMPERATURE_THRESHOLD,
    FeatureId::ERROR_RECOVERY,
    FeatureId::VOLATILE_WRITE_CACHE,
    FeatureId::NUMBER_OF_QUEUES,
    FeatureId::INTERRUPT_COALESCING,
    FeatureId::INTERRUPT_VECTOR_CONFIG,
    FeatureId::WRITE_ATOMICITY,
    FeatureId::ASYNC_EVENT_CONFIG,
    FeatureId::TIMESTAMP,
    FeatureId::HOST_BEHAVIOR,
    FeatureId::SOFTWARE_PROGRESS,
];

/// Events a guest may ask for: the SMART ones, and namespace attribute notices.
const EVENTS: u32 = 0x1FF;

/// The current values.
pub(in crate::controller) struct Features {
    arbitration: u32,
    power: u32,
    over: u16,
    under: u16,
    /// By place of the namespace.
    error_recovery: Vec<ErrorRecovery>,
    /// What was granted, zero-based.
    granted: NumberOfQueues,
    coalescing: InterruptCoalescing,
    /// Coalescing Disable, by vector.
    uncoalesced: Vec<bool>,
    atomicity: WriteAtomicity,
    clock: Clock,
    behavior: HostBehavior,
    /// Survives resets.
    progress: SoftwareProgress,
}

/// The Timestamp feature.
#[derive(Clone, Copy)]
struct Clock {
    millis: u64,
    since: Instant,
    /// The same by the clock on the wall, for other processes: milliseconds of the Unix epoch.
    wall: u64,
    origin: u8,
}

/// The values to be written down.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::controller) struct FeaturesImage {
    arbitration: u32,
    power: u32,
    over: u16,
    under: u16,
    error_recovery: Vec<u32>,
    granted: u32,
    coalescing: u32,
    uncoalesced: Vec<bool>,
    atomicity: u32,
    /// Milliseconds, origin, and when that was by the clock on the wall.
    clock: (u64, u8, u64),
    behavior: Vec<u8>,
    progress: u32,
}

/// What a Get Features gives.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Got {
    /// Completion dword 0.
    pub(super) dw0: u32,
    /// Data, for features that have any.
    pub(super) data: Vec<u8>,
}

impl Features {
    pub(in crate::controller) fn new(info: &Info) -> Self {
        let most_z = info.queues.saturating_sub(2);
        Self {
            arbitration: DEFAULT_ARBITRATION,
            power: 0,
            over: info.temperatures()[0],
            under: 0,
            error_recovery: vec![ErrorRecovery::new(); info.namespaces.len()],
            granted: NumberOfQueues::new().with_nsq_z(most_z).with_ncq_z(most_z),
            coalescing: InterruptCoalescing::new(),
            uncoalesced: vec![false; usize::from(info.queues)],
            atomicity: WriteAtomicity::new(),
            clock: Clock::at(0, Timestamp::ORIGIN_RESET),
            behavior: HostBehavior::default(),
            progress: SoftwareProgress::new(),
        }
    }

    /// Back to the defaults, as a Controller Level Reset does. What the host noted for the time before it runs stays.
    pub(in crate::controller) fn reset(&mut self, info: &Info) {
        let progress = self.progress;
        *self = Self::new(info);
        self.progress = progress;
    }

    /// The values, to be written down.
    pub(in crate::controller) fn image(&self) -> FeaturesImage {
        let mut behavior = self.behavior.as_bytes().to_vec();
        let used = behavior.iter().rposition(|b| *b != 0);
        behavior.truncate(used.map_or(0, |at| at + 1));
        FeaturesImage {
            arbitration: self.arbitration,
            power: self.power,
            over: self.over,
            under: self.under,
            error_recovery: self.error_recovery.iter().map(|e| e.into_bits()).collect(),
            granted: self.granted.into_bits(),
            coalescing: self.coalescing.into_bits(),
            uncoalesced: self.uncoalesced.clone(),
            atomicity: self.atomicity.into_bits(),
            clock: (self.clock.millis, self.clock.origin, self.clock.wall),
            behavior,
            progress: self.progress.into_bits(),
        }
    }

    /// Values that were written down, as far as they fit this controller.
    pub(in crate::controller) fn restore(info: &Info, image: &FeaturesImage) -> Self {
        let mut new = Self::new(info);
        let most_z = info.queues.saturating_sub(2);
        let granted = NumberOfQueues::from_bits(image.granted);
        new.granted = NumberOfQueues::new()
            .with_nsq_z(granted.nsq_z().min(most_z))
            .with_ncq_z(granted.ncq_z().min(most_z));
        for (to, from) in new.error_recovery.iter_mut().zip(&image.error_recovery) {
            *to = ErrorRecovery::from_bits(*from);
        }
        for (to, from) in new.uncoalesced.iter_mut().zip(&image.uncoalesced) {
            *to = *from;
        }
        let (millis, origin, then) = image.clock;
        // What has passed since then counts too.
        let passed = wall().saturating_sub(then);
        new.clock = Clock::at(millis.saturating_add(passed), origin);
        let mut behavior = image.behavior.clone();
        behavior.resize(size_of::<HostBehavior>(), 0);
        new.behavior = HostBehavior::read_from_bytes(&behavior).unwrap_or_default();
        Self {
            arbitration: image.arbitration,
            power: image.power,
            over: image.over,
            under: image.under,
            coalescing: InterruptCoalescing::from_bits(image.coalescing),
            atomicity: WriteAtomicity::from_bits(image.atomicity),
            progress: SoftwareProgress::from_bits(image.progress),
            ..new
        }
    }

    /// I/O submission queues granted.
    pub(in crate::controller) fn submission_queues(&self) -> u16 {
        self.granted.nsq_z().saturating_add(1)
    }

    /// I/O completion queues granted.
    pub(in crate::controller) fn completion_queues(&self) -> u16 {
        self.granted.ncq_z().saturating_add(1)
    }

    /// How interrupts of a vector are delayed. The admin completion queue's never are, whatever its vector.
    pub(in crate::controller) fn coalescing(&self, vector: usize) -> Coalescing {
        match self.uncoalesced.get(vector) {
            Some(false) => Coalescing {
                thr_z: self.coalescing.thr_z(),
                time: self.coalescing.time(),
            },
            _ => Coalescing::default(),
        }
    }

    /// The warnings that follow from thresholds, at a composite temperature in kelvins.
    pub(in crate::controller) fn warning(&self, temperature: u16) -> CriticalWarning {
        CriticalWarning::new()
            .with_temperature(temperature >= self.over || temperature <= self.under)
    }

    /// Get Features.
    pub(super) fn get(
        &self,
        info: &Info,
        events: AsyncEventConfig,
        command: &GetFeatures,
    ) -> Result<Got, Refusal> {
        let fid = command.fid;
        supported(info, fid)?;
        let fresh;
        let values = match command.sel {
            Select::CURRENT => self,
            // Nothing is saved: the saved value is the default.
            Select::DEFAULT | Select::SAVED => {
                fresh = Self::new(info);
                &fresh
            }
            Select::SUPPORTED => {
                return Ok(Got {
                    dw0: capabilities(fid).into_bits(),
                    data: Vec::new(),
                });
            }
            _ => return Err(Refusal::at(Status::INVALID_FIELD, Field::Cdw10, 8)),
        };
        let events = match command.sel {
            Select::CURRENT => events,
            _ => AsyncEventConfig::new(),
        };
        let mut data = Vec::new();
        let dw0 = match fid {
            FeatureId::ARBITRATION => values.arbitration,
            FeatureId::POWER_MANAGEMENT => values.power,
            FeatureId::TEMPERATURE_THRESHOLD => values.threshold(command.cdw11)?,
            FeatureId::ERROR_RECOVERY => {
                let at = namespace(info, command.nsid)?;
                values
                    .error_recovery
                    .get(at)
                    .copied()
                    .unwrap_or_default()
                    .into_bits()
            }
            FeatureId::VOLATILE_WRITE_CACHE => VolatileWriteCache::new().with_wce(true).into_bits(),
            FeatureId::NUMBER_OF_QUEUES => values.granted.into_bits(),
            FeatureId::INTERRUPT_COALESCING => values.coalescing.into_bits(),
            FeatureId::INTERRUPT_VECTOR_CONFIG => values.vector(command.cdw11)?,
            FeatureId::WRITE_ATOMICITY => values.atomicity.into_bits(),
            FeatureId::ASYNC_EVENT_CONFIG => events.into_bits(),
            FeatureId::TIMESTAMP => {
                data = values.clock.now().as_bytes().to_vec();
                0
            }
            FeatureId::HOST_BEHAVIOR => {
                data = values.behavior.as_bytes().to_vec();
                0
            }
            FeatureId::SOFTWARE_PROGRESS => values.progress.into_bits(),
            _ => return Err(invalid(Field::Cdw10)),
        };
        Ok(Got { dw0, data })
    }

    fn threshold(&self, cdw11: u32) -> Result<u32, Refusal> {
        let asked = TemperatureThreshold::from_bits(cdw11);
        // There is the composite temperature and no sensor.
        if asked.tmpsel() != 0 {
            return Err(invalid(Field::Cdw11High));
        }
        let kelvins = match asked.thsel() {
            ThresholdType::OVER => self.over,
            ThresholdType::UNDER => self.under,
            _ => return Err(Refusal::at(Status::INVALID_FIELD, Field::Cdw11, 20)),
        };
        Ok(TemperatureThreshold::new().with_tmpth(kelvins).into_bits())
    }

    fn vector(&self, cdw11: u32) -> Result<u32, Refusal> {
        let asked = InterruptVectorConfig::from_bits(cdw11);
        match self.uncoalesced.get(usize::from(asked.iv())) {
            Some(cd) => Ok(InterruptVectorConfig::new()
                .with_iv(asked.iv())
                .with_cd(*cd)
                .into_bits()),
            None => Err(invalid(Field::Cdw11)),
        }
    }

    /// Set Features, with its data if the feature has any. `queues`: there are I/O queues. Returns completion dword 0.
    pub(super) fn set(
        &mut self,
        info: &Info,
        events: &mut AsyncEventConfig,
        command: &SetFeatures,
        data: &[u8],
        queues: bool,
    ) -> Result<u32, Refusal> {
        let fid = command.fid;
        supported(info, fid)?;
        if command.sv {
            return Err(Refusal::at(Status::FEATURE_NOT_SAVEABLE, Field::Cdw10, 31));
        }
        let broad = command.nsid == 0 || command.nsid == NSID_BROADCAST;
        if fid != FeatureId::ERROR_RECOVERY && !broad {
            namespace(info, command.nsid)?;
            return Err(Refusal::of(
                Status::FEATURE_NOT_NAMESPACE_SPECIFIC,
                Field::Nsid,
            ));
        }
        let value = command.cdw11;
        match fid {
            FeatureId::ARBITRATION => {
                self.arbitration = Arbitration::from_bits(value).into_bits() & !0xF8;
            }
            FeatureId::POWER_MANAGEMENT => {
                let power = PowerManagement::from_bits(value);
                if power.ps() != 0 {
                    return Err(invalid(Field::Cdw11));
                }
                self.power = value & 0xE0;
            }
            FeatureId::TEMPERATURE_THRESHOLD => self.set_threshold(value)?,
            FeatureId::ERROR_RECOVERY => self.set_error_recovery(info, command.nsid, value)?,
            FeatureId::VOLATILE_WRITE_CACHE => {
                // Turning it off would promise that every write is stable when it completes: we do not offer that, a guest
                // that wants it uses FUA.
                if !VolatileWriteCache::from_bits(value).wce() {
                    return Err(Refusal::of(Status::FEATURE_NOT_CHANGEABLE, Field::Cdw11));
                }
            }
            FeatureId::NUMBER_OF_QUEUES => {
                let asked = NumberOfQueues::from_bits(value);
                if queues {
                    return Err(Status::COMMAND_SEQUENCE_ERROR.into());
                }
                if asked.nsq_z() == 0xFFFF {
                    return Err(invalid(Field::Cdw11));
                }
                if asked.ncq_z() == 0xFFFF {
                    return Err(invalid(Field::Cdw11High));
                }
                let most_z = info.queues.saturating_sub(2);
                self.granted = NumberOfQueues::new()
                    .with_nsq_z(asked.nsq_z().min(most_z))
                    .with_ncq_z(asked.ncq_z().min(most_z));
                return Ok(self.granted.into_bits());
            }
            FeatureId::INTERRUPT_COALESCING => {
                self.coalescing = InterruptCoalescing::from_bits(value & 0xFFFF);
            }
            FeatureId::INTERRUPT_VECTOR_CONFIG => {
                let config = InterruptVectorConfig::from_bits(value);
                match self.uncoalesced.get_mut(usize::from(config.iv())) {
                    Some(cd) => *cd = config.cd(),
                    None => return Err(invalid(Field::Cdw11)),
                }
            }
            FeatureId::WRITE_ATOMICITY => self.atomicity = WriteAtomicity::from_bits(value & 1),
            FeatureId::ASYNC_EVENT_CONFIG => *events = AsyncEventConfig::from_bits(value & EVENTS),
            FeatureId::TIMESTAMP => {
                let stamp =
                    Timestamp::read_from_bytes(data).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
                self.clock = Clock::at(stamp.get(), Timestamp::ORIGIN_SET);
            }
            FeatureId::HOST_BEHAVIOR => {
                let behavior =
                    HostBehavior::read_from_bytes(data).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
                let flags = [
                    behavior.acre,
                    behavior.etdas,
                    behavior.lbafee,
                    behavior.hdisns,
                ];
                if flags.iter().any(|flag| *flag > 1) {
                    return Err(Status::INVALID_FIELD.into());
                }
                self.behavior = behavior;
            }
            FeatureId::SOFTWARE_PROGRESS => {
                self.progress = SoftwareProgress::from_bits(value & 0xFF);
            }
            _ => return Err(invalid(Field::Cdw10)),
        }
        Ok(0)
    }

    fn set_threshold(&mut self, value: u32) -> Result<(), Refusal> {
        let new = TemperatureThreshold::from_bits(value);
        // 0 is the composite temperature, 15 is all there are: the same here.
        if new.tmpsel() != 0 && new.tmpsel() != 15 {
            return Err(invalid(Field::Cdw11High));
        }
        match new.thsel() {
            ThresholdType::OVER => self.over = new.tmpth(),
            ThresholdType::UNDER => self.under = new.tmpth(),
            _ => return Err(Refusal::at(Status::INVALID_FIELD, Field::Cdw11, 20)),
        }
        Ok(())
    }

    fn set_error_recovery(&mut self, info: &Info, nsid: u32, value: u32) -> Result<(), Refusal> {
        let new = ErrorRecovery::from_bits(value & 0x1_FFFF);
        // NSFEAT does not offer the error for deallocated blocks.
        if new.dulbe() {
            return Err(invalid(Field::Cdw11High));
        }
        if nsid == NSID_BROADCAST {
            self.error_recovery.fill(new);
        } else {
            let at = namespace(info, nsid)?;
            if let Some(slot) = self.error_recovery.get_mut(at) {
                *slot = new;
            }
        }
        Ok(())
    }
}

/// No limit of the arbitration burst, all weights one.
const DEFAULT_ARBITRATION: u32 = 7;

/// Milliseconds by the clock on the wall.
fn wall() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

impl Clock {
    fn at(millis: u64, origin: u8) -> Self {
        Self {
            millis,
            since: Instant::now(),
            wall: wall(),
            origin,
        }
    }

    fn now(&self) -> Timestamp {
        let age = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        Timestamp::new(self.millis.saturating_add(age), self.origin)
    }
}

fn supported(info: &Info, fid: FeatureId) -> Result<(), Refusal> {
    let present = match fid {
        FeatureId::VOLATILE_WRITE_CACHE => info.volatile_write_cache(),
        _ => SUPPORTED.contains(&fid),
    };
    match present {
        true => Ok(()),
        false => Err(invalid(Field::Cdw10)),
    }
}

/// The place of the active namespace with this NSID.
fn namespace(info: &Info, nsid: u32) -> Result<usize, Refusal> {
    match info.namespace(nsid) {
        Some((at, _)) => Ok(at),
        None if (1..=info.max_namespaces).contains(&nsid) => Err(invalid(Field::Nsid)),
        None => Err(Refusal::of(
            Status::INVALID_NAMESPACE_OR_FORMAT,
            Field::Nsid,
        )),
    }
}

fn capabilities(fid: FeatureId) -> Capabilities {
    Capabilities::new()
        .with_namespace_specific(fid == FeatureId::ERROR_RECOVERY)
        .with_changeable(fid != FeatureId::VOLATILE_WRITE_CACHE)
}

#[cfg(test)]
mod tests;
