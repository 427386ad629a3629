//! The SMART / Health log (Get Log Page 02h): sums over what pollers counted, and the controller's own times.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme_spec::identify::Le128;
use nvme_spec::log::{CriticalWarning, SmartLog};

use super::info::Info;
use crate::poller::stats::NamespaceStats;

/// What an emulated device has for a temperature, in kelvins: room temperature and a little.
pub(super) const TEMPERATURE: u16 = 306;
/// Warning Composite Temperature Threshold, in kelvins.
pub(super) const WARNING_TEMPERATURE: u16 = 343;
/// Critical Composite Temperature Threshold, in kelvins.
pub(super) const CRITICAL_TEMPERATURE: u16 = 353;

/// How often the busy time is looked at: its unit.
pub(super) const SAMPLE: Duration = Duration::from_secs(60);

/// The health of a controller. It starts anew with the process.
pub(super) struct Health {
    since: Instant,
    sampled: Instant,
    commands: u64,
    busy_minutes: u64,
    power_cycles: u64,
    unsafe_shutdowns: u64,
    /// The counters of each poller that ever served us: one for each namespace, in order.
    stats: Vec<Option<Arc<[NamespaceStats]>>>,
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
        }
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
        for stats in self.stats.iter().flatten() {
            let each = stats.iter().zip(&info.namespaces).enumerate();
            for (_, (s, ns)) in each.filter(|(i, _)| only.is_none_or(|only| only == *i)) {
                let bytes = |blocks: u64| u128::from(blocks) << (ns.geometry.block_shift & 63);
                sum.reads += u128::from(s.reads.get());
                sum.bytes_read += bytes(s.blocks_read.get());
                sum.writes += u128::from(s.writes.get());
                sum.bytes_written += bytes(s.blocks_written.get());
                sum.others += u128::from(s.others.get());
                sum.media_errors += u128::from(s.media_errors.get());
            }
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
            power_on_hours: Le128::new(u128::from(self.since.elapsed().as_secs() / 3600)),
            unsafe_shutdowns: Le128::new(self.unsafe_shutdowns.into()),
            media_errors: Le128::new(sum.media_errors),
            error_log_entries: Le128::new(errors.into()),
            ..SmartLog::default()
        };
        log.set_temperature(TEMPERATURE);
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
        let mut health = Health::new(2);
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
        let log = health.log(&info, None, CriticalWarning::new(), 7);
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
        let only = health.log(&info, Some(0), CriticalWarning::new(), 7);
        assert_eq!(
            (only.data_units_read.get(), only.media_errors.get()),
            (1, 0)
        );
    }

    #[test]
    fn a_minute_with_a_command_is_busy() {
        let info = sample();
        let mut health = Health::new(1);
        let stats = health.stats_for(0, 2);
        let start = health.sampled;
        assert!(health.sample(&info, start + SAMPLE / 2) <= SAMPLE / 2);
        stats[1].others.add(1);
        assert_eq!(health.sample(&info, start + SAMPLE), SAMPLE);
        assert_eq!(health.sample(&info, start + 2 * SAMPLE), SAMPLE);
        let log = health.log(&info, None, CriticalWarning::new(), 0);
        assert_eq!(log.controller_busy_time.get(), 1);
    }
}
