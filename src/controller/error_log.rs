//! The Error Information log (Get Log Page 01h): the newest errors, and how many there have been.

use std::collections::VecDeque;

use nvme_spec::log::ErrorLogEntry;
use nvme_spec::{Status, StatusField};
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes as _, IntoBytes as _};

use crate::poller::IoFailure;

/// Entries kept (Identify ELPE + 1).
pub(super) const ENTRIES: usize = 64;

/// The log.
#[derive(Default)]
pub(super) struct ErrorLog {
    /// Newest first.
    entries: VecDeque<ErrorLogEntry>,
    count: u64,
}

/// The same, to be written down.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ErrorLogImage {
    entries: Vec<[u64; 8]>,
    count: u64,
}

impl ErrorLog {
    pub(super) fn image(&self) -> ErrorLogImage {
        let words = |e: &ErrorLogEntry| <[u64; 8]>::read_from_bytes(e.as_bytes()).ok();
        ErrorLogImage {
            entries: self.entries.iter().filter_map(words).collect(),
            count: self.count,
        }
    }

    pub(super) fn restore(image: &ErrorLogImage) -> Self {
        let entries = image.entries.iter().take(ENTRIES);
        let entry = |words: &[u64; 8]| ErrorLogEntry::read_from_bytes(words.as_bytes()).ok();
        Self {
            entries: entries.filter_map(entry).collect(),
            count: image.count,
        }
    }

    /// Record a failed command.
    pub(super) fn record(&mut self, failure: &IoFailure) {
        self.push(ErrorLogEntry {
            sqid: failure.sqid,
            cid: failure.cid,
            status: failure.status,
            location: failure.parameter,
            lba: failure.lba,
            nsid: failure.nsid,
            ..ErrorLogEntry::default()
        });
    }

    /// Record an error that belongs to a queue and to no command.
    pub(super) fn record_queue(&mut self, sqid: u16) {
        self.push(ErrorLogEntry {
            sqid,
            cid: ErrorLogEntry::NO_COMMAND,
            status: StatusField::from_status(Status::INTERNAL_ERROR),
            location: ErrorLogEntry::NO_LOCATION,
            ..ErrorLogEntry::default()
        });
    }

    /// Count errors whose reports were lost.
    pub(super) fn lost(&mut self, errors: u64) {
        self.count = self.count.saturating_add(errors);
    }

    fn push(&mut self, mut entry: ErrorLogEntry) {
        self.count = self.count.saturating_add(1);
        entry.error_count = self.count;
        self.entries.truncate(ENTRIES - 1);
        self.entries.push_front(entry);
    }

    /// Errors over the life of the controller.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// The log page: all entries, unused ones zero.
    pub(super) fn page(&self) -> Vec<u8> {
        let mut page = Vec::with_capacity(ENTRIES * size_of::<ErrorLogEntry>());
        for entry in &self.entries {
            page.extend_from_slice(entry.as_bytes());
        }
        page.resize(ENTRIES * size_of::<ErrorLogEntry>(), 0);
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(cid: u16) -> IoFailure {
        IoFailure {
            sqid: 3,
            cid,
            status: Status::LBA_OUT_OF_RANGE.into(),
            nsid: 1,
            lba: 77,
            parameter: ErrorLogEntry::location_of(40, 0),
        }
    }

    #[test]
    fn newest_first_and_no_more_than_it_holds() {
        let mut log = ErrorLog::default();
        assert!(log.page().iter().all(|b| *b == 0));
        for cid in 0..100 {
            log.record(&failure(cid));
        }
        log.lost(5);
        log.record_queue(9);
        assert_eq!(log.count(), 106);
        let page = log.page();
        assert_eq!(page.len(), 4096);
        let (newest, rest) = ErrorLogEntry::read_from_prefix(&page).unwrap();
        assert_eq!(
            (newest.error_count, newest.sqid, newest.cid),
            (106, 9, 0xFFFF)
        );
        let (next, _) = ErrorLogEntry::read_from_prefix(rest).unwrap();
        assert_eq!((next.error_count, next.sqid, next.cid), (100, 3, 99));
        assert_eq!((next.lba, next.nsid, next.location), (77, 1, 40));
        assert_eq!(next.status.status(), Status::LBA_OUT_OF_RANGE);
        assert!(next.status.dnr());
        let again = ErrorLog::restore(&log.image());
        assert_eq!((again.page(), again.count()), (log.page(), log.count()));
        let last = ErrorLogEntry::read_from_bytes(&page[63 * 64..]).unwrap();
        assert_eq!(last.error_count, 38);
    }
}
