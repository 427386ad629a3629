//! The SMART / Health log (Get Log Page 02h): sums over what pollers counted, and the controller's own times.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme_spec::identify::Le128;
use nvme_spec::log::{CriticalWarning, SmartLog};
use serde::{Deserialize, Serialize};

use super::info::Info;
use crate::io::Namespace;
use crate::poller::stats::NamespaceStats;

/// What an emulated device has for a temperature, in kelvins: room temperature and a little.
pub(super) const TEMPERATURE: u16 = 306;
/// Warning Composite Temperature Threshold, in kelvins.
pub(super) const WARNING_TEMPERATURE: u16 = 343;
/// Critical Composite Temperature Threshold, in kelvins.
pub(super) const CRITICAL_TEMPERATURE: u16 = 353;

/// How often the busy time is looked at: its unit.
pub(super) const SAMPLE: Duration = Duration::from_secs(60);

/// What the SSDs below a controller's namespaces say of their health: copies that their keepers made, by the place of the namespace.
#[derive(Default)]
pub(super) struct SsdHealth(Vec<Option<SmartLog>>);

impl SsdHealth {
    pub(super) fn of(namespaces: &[Namespace]) -> Self {
        let health = |ns: &Namespace| ns.backend.as_nvme()?.health();
        Self(namespaces.iter().map(health).collect())
    }

    fn logs(&self, only: Option<usize>) -> impl Iterator<Item = &SmartLog> {
        let chosen = self.0.iter().enumerate();
        let chosen = chosen.filter(move |(at, _)| only.is_none_or(|only| only == *at));
        chosen.filter_map(|(_, log)| log.as_ref())
    }

    /// The highest composite temperature in kelvins, of the namespace at this place or of all; that of an emulated device where no SSD
    /// tells one.
    pub(super) fn temperature(&self, only: Option<usize>) -> u16 {
        let told = self.logs(only).map(SmartLog::temperature);
        told.filter(|kelvins| *kelvins != 0)
            .max()
            .unwrap_or(TEMPERATURE)
    }

    /// Put into a log what is the SSDs': the worst of each, where there are several.
    fn apply(&self, only: Option<usize>, log: &mut SmartLog) {
        for ssd in self.logs(only) {
            // The guest is shown no persistent memory.
            let warning = ssd.critical_warning.with_pmr(false).into_bits();
            log.critical_warning =
                CriticalWarning::from_bits(log.critical_warning.into_bits() | warning);
            log.percentage_used = log.percentage_used.max(ssd.percentage_used);
            log.media_errors = Le128::new(log.media_errors.get().max(ssd.media_errors.get()));
        }
        let left =
            |l: &&SmartLog| i16::from(l.available_spare) - i16::from(l.available_spare_threshold);
        if let Some(ssd) = self.logs(only).min_by_key(left) {
            log.available_spare = ssd.available_spare;
            log.available_spare_threshold = ssd.available_spare_threshold;
        }
    }
}

/// The health of a controller.
pub(super) struct Health {
    since: Instant,
    sampled: Instant,
    commands: u64,
    busy_minutes: u64,
    power_cycles: u64,
    unsafe_shutdowns: u64,
    /// The counters of each poller that ever served us: one for each namespace, in order.
    stats: Vec<Option<Arc<[NamespaceStats]>>>,
    /// What processes before this one had counted.
    before: HealthImage,
}

/// What is written down of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct HealthImage {
    busy_minutes: u64,
    power_cycles: u64,
    unsafe_shutdowns: u64,
    seconds: u64,
    /// By NSID: reads, blocks read, writes, blocks written, others, media errors.
    namespaces: Vec<(u32, [u64; 6])>,
}

#[derive(Default)]
struct Sum {
    reads: u128,
    bytes_read: u128,
    writes: u128,
    bytes_written: u128,
    others: u128,
    media_errors: u128,
}

impl Health {
    pub(super) fn new(pollers: usize) -> Self {
        let now = Instant::now();
        Self {
            since: now,
            sampled: now,
            commands: 0,
            busy_minutes: 0,
            power_cycles: 0,
            unsafe_shutdowns: 0,
            stats: vec![None; pollers],
            before: HealthImage::default(),
        }
    }

    /// What there is to be written down.
    pub(super) fn image(&self, info: &Info) -> HealthImage {
        let namespaces = info.namespaces.iter().enumerate();
        HealthImage {
            busy_minutes: self.busy_minutes,
            power_cycles: self.power_cycles,
            unsafe_shutdowns: self.unsafe_shutdowns,
            seconds: self.seconds(),
            namespaces: namespaces
                .map(|(at, ns)| (ns.nsid, self.counted(at, ns.nsid)))
                .collect(),
        }
    }

    /// Go on counting where another process stopped.
    pub(super) fn restore(&mut self, image: HealthImage) {
        self.busy_minutes = image.busy_minutes;
        self.power_cycles = image.power_cycles;
        self.unsafe_shutdowns = image.unsafe_shutdowns;
        self.before = image;
    }

    fn seconds(&self) -> u64 {
        self.before
            .seconds
            .saturating_add(self.since.elapsed().as_secs())
    }

    /// All that was ever counted of the namespace at this place.
    fn counted(&self, at: usize, nsid: u32) -> [u64; 6] {
        let before = self.before.namespaces.iter().find(|(n, _)| *n == nsid);
        let mut all = before.map_or([0; 6], |(_, counted)| *counted);
        for s in self.stats.iter().flatten().filter_map(|s| s.get(at)) {
            let counters = [
                &s.reads,
                &s.blocks_read,
                &s.writes,
                &s.blocks_written,
                &s.others,
                &s.media_errors,
            ];
            for (sum, counter) in all.iter_mut().zip(counters) {
                *sum = sum.saturating_add(counter.get());
            }
        }
        all
    }

    /// The counters for a poller; the same ones each time.
    pub(super) fn stats_for(&mut self, poller: usize, namespaces: usize) -> Arc<[NamespaceStats]> {
        let make = || (0..namespaces).map(|_| NamespaceStats::default()).collect();
        match self.stats.get_mut(poller) {
            Some(slot) => Arc::clone(slot.get_or_insert_with(make)),
            None => make(),
        }
    }

    /// A front-end has come: the device has been switched on.
    pub(super) fn power_on(&mut self) {
        self.power_cycles = self.power_cycles.saturating_add(1);
    }

    /// The front-end has gone while the controller was enabled and had not been told to shut down.
    pub(super) fn unsafe_shutdown(&mut self) {
        self.unsafe_shutdowns = self.unsafe_shutdowns.saturating_add(1);
    }

    fn sum(&self, info: &Info, only: Option<usize>) -> Sum {
        let mut sum = Sum::default();
        let each = info.namespaces.iter().enumerate();
        for (at, ns) in each.filter(|(i, _)| only.is_none_or(|only| only == *i)) {
            let bytes = |blocks: u64| u128::from(blocks) << (ns.geometry.block_shift & 63);
            let [reads, blocks_read, writes, blocks_written, others, errors] =
                self.counted(at, ns.nsid);
            sum.reads += u128::from(reads);
            sum.bytes_read += bytes(blocks_read);
            sum.writes += u128::from(writes);
            sum.bytes_written += bytes(blocks_written);
            sum.others += u128::from(others);
            sum.media_errors += u128::from(errors);
        }
        sum
    }

    /// Look at the busy time: a minute in which a command completed is a busy one. Returns when to look again.
    pub(super) fn sample(&mut self, info: &Info, now: Instant) -> Duration {
        let age = now.saturating_duration_since(self.sampled);
        if age < SAMPLE {
            return SAMPLE - age;
        }
        self.sampled = now;
        let sum = self.sum(info, None);
        let commands = u64::try_from(sum.reads + sum.writes + sum.others).unwrap_or(u64::MAX);
        if std::mem::replace(&mut self.commands, commands) != commands {
            self.busy_minutes = self.busy_minutes.saturating_add(1);
        }
        SAMPLE
    }

    /// The log of the controller, or of the namespace at this place.
    pub(super) fn log(
        &self,
        info: &Info,
        only: Option<usize>,
        warning: CriticalWarning,
        errors: u64,
        ssds: &SsdHealth,
    ) -> SmartLog {
        let sum = self.sum(info, only);
        let mut log = SmartLog {
            critical_warning: warning,
            available_spare: 100,
            available_spare_threshold: 10,
            data_units_read: SmartLog::data_units(sum.bytes_read),
            data_units_written: SmartLog::data_units(sum.bytes_written),
            host_read_commands: Le128::new(sum.reads),
            host_write_commands: Le128::new(sum.writes),
            controller_busy_time: Le128::new(self.busy_minutes.into()),
            power_cycles: Le128::new(self.power_cycles.into()),
            power_on_hours: Le128::new(u128::from(self.seconds() / 3600)),
            unsafe_shutdowns: Le128::new(self.unsafe_shutdowns.into()),
            media_errors: Le128::new(sum.media_errors),
            error_log_entries: Le128::new(errors.into()),
            ..SmartLog::default()
        };
        log.set_temperature(ssds.temperature(only));
        ssds.apply(only, &mut log);
        log
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::info::tests::sample;

    #[test]
    fn counters_are_summed_over_pollers_and_in_their_units() {
        let info = sample();
        let (mut health, none) = (Health::new(2), SsdHealth::default());
        for poller in 0..2 {
            let stats = health.stats_for(poller, info.namespaces.len());
            assert!(Arc::ptr_eq(&stats, &health.stats_for(poller, 2)));
            stats[0].reads.add(3);
            stats[0].blocks_read.add(500);
            stats[1].blocks_read.add(1);
            stats[1].writes.add(1);
            stats[1].blocks_written.add(10);
            stats[1].media_errors.add(2);
        }
        health.power_on();
        let log = health.log(&info, None, CriticalWarning::new(), 7, &none);
        // 1000 * 512 + 2 * 4096 bytes are a little more than one thousand blocks of 512.
        assert_eq!(log.data_units_read.get(), 2);
        assert_eq!(log.data_units_written.get(), 1);
        assert_eq!(log.host_read_commands.get(), 6);
        assert_eq!(log.host_write_commands.get(), 2);
        assert_eq!(log.media_errors.get(), 4);
        assert_eq!(log.error_log_entries.get(), 7);
        assert_eq!(
            (log.power_cycles.get(), log.temperature()),
            (1, TEMPERATURE)
        );
        let mut next = Health::new(1);
        next.restore(health.image(&info));
        assert_eq!(next.image(&info), health.image(&info));
        let only = health.log(&info, Some(0), CriticalWarning::new(), 7, &none);
        assert_eq!(
            (only.data_units_read.get(), only.media_errors.get()),
            (1, 0)
        );
    }

    #[test]
    fn a_minute_with_a_command_is_busy() {
        let info = sample();
        let (mut health, none) = (Health::new(1), SsdHealth::default());
        let stats = health.stats_for(0, 2);
        let start = health.sampled;
        assert!(health.sample(&info, start + SAMPLE / 2) <= SAMPLE / 2);
        stats[1].others.add(1);
        assert_eq!(health.sample(&info, start + SAMPLE), SAMPLE);
        assert_eq!(health.sample(&info, start + 2 * SAMPLE), SAMPLE);
        let log = health.log(&info, None, CriticalWarning::new(), 0, &none);
        assert_eq!(log.controller_busy_time.get(), 1);
    }

    #[test]
    fn ssds_tell_of_their_own_health() {
        let info = sample();
        let health = Health::new(1);
        let ssd = |kelvins: u16, spare: u8, used: u8, errors: u128| {
            let mut log = SmartLog {
                available_spare: spare,
                available_spare_threshold: 20,
                percentage_used: used,
                media_errors: Le128::new(errors),
                ..SmartLog::default()
            };
            log.set_temperature(kelvins);
            log.critical_warning = CriticalWarning::new().with_spare(spare < 20).with_pmr(true);
            Some(log)
        };
        let told = |ssds: [Option<SmartLog>; 2], only| {
            let warning = CriticalWarning::new().with_temperature(true);
            let log = health.log(&info, only, warning, 0, &SsdHealth(ssds.into()));
            let spare = (log.available_spare, log.available_spare_threshold);
            let errors = log.media_errors.get();
            let bits = log.critical_warning.into_bits();
            (log.temperature(), spare, log.percentage_used, errors, bits)
        };
        let (a, b) = (ssd(310, 100, 90, 3), ssd(340, 5, 2, 1));
        assert_eq!(told([a, b], None), (340, (5, 20), 90, 3, 0b11));
        assert_eq!(told([a, b], Some(0)), (310, (100, 20), 90, 3, 0b10));
        assert_eq!(told([None, b], None), (340, (5, 20), 2, 1, 0b11));
        let emulated = (TEMPERATURE, (100, 10), 0, 0, 0b10);
        assert_eq!(told([None, b], Some(0)), emulated);
        let mute = ssd(0, 100, 0, 0);
        assert_eq!(told([mute, None], None).0, TEMPERATURE);
    }
}
