//! Asynchronous events: the requests that wait, the events that wait, and what masks them.

use std::collections::VecDeque;

use nvme_spec::event::{AsyncEvent, AsyncEventConfig, EventType};
use nvme_spec::log::LogId;
use serde::{Deserialize, Serialize};

/// Requests that may wait at a time (Identify AERL + 1).
pub(in crate::controller) const LIMIT: usize = 4;

/// Different events that can wait. There are fewer kinds than that.
const PENDING: usize = 16;

/// The state of asynchronous events since the last reset.
#[derive(Default)]
pub(in crate::controller) struct Events {
    /// Command identifiers of the requests that wait.
    requests: VecDeque<u16>,
    pending: VecDeque<AsyncEvent>,
    /// Reported, and the log page that clears it not yet read.
    masked: Vec<AsyncEvent>,
    /// What the guest wants to hear of.
    pub(in crate::controller) config: AsyncEventConfig,
}

/// The same, to be written down.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::controller) struct EventsImage {
    requests: Vec<u16>,
    pending: Vec<u32>,
    masked: Vec<u32>,
    config: u32,
}

impl Events {
    pub(in crate::controller) fn image(&self) -> EventsImage {
        EventsImage {
            requests: self.requests.iter().copied().collect(),
            pending: self.pending.iter().map(|e| e.to_dw0()).collect(),
            masked: self.masked.iter().map(|e| e.to_dw0()).collect(),
            config: self.config.into_bits(),
        }
    }

    pub(in crate::controller) fn restore(image: &EventsImage) -> Self {
        let events = |from: &[u32]| -> Vec<_> {
            let from = from.iter().take(PENDING);
            from.map(|dw0| AsyncEvent::from_dw0(*dw0)).collect()
        };
        Self {
            requests: image.requests.iter().take(LIMIT).copied().collect(),
            pending: events(&image.pending).into(),
            masked: events(&image.masked),
            config: AsyncEventConfig::from_bits(image.config),
        }
    }

    /// A request has come; `false` if too many wait already.
    pub(in crate::controller) fn request(&mut self, cid: u16) -> bool {
        if self.requests.len() >= LIMIT {
            return false;
        }
        self.requests.push_back(cid);
        true
    }

    /// A request is aborted; whether it was waiting.
    pub(in crate::controller) fn cancel(&mut self, cid: u16) -> bool {
        let found = self.requests.iter().position(|waiting| *waiting == cid);
        found.and_then(|at| self.requests.remove(at)).is_some()
    }

    /// Something has happened. Dropped if the guest does not want to know, or if the same waits already.
    pub(in crate::controller) fn raise(&mut self, event: AsyncEvent) {
        let wanted = match event {
            AsyncEvent::NAMESPACE_ATTRIBUTE_CHANGED => self.config.namespace_attribute(),
            AsyncEvent::SPARE_BELOW_THRESHOLD => self.config.smart() & 1 << 0 != 0,
            AsyncEvent::TEMPERATURE_THRESHOLD => self.config.smart() & 1 << 1 != 0,
            AsyncEvent::NVM_SUBSYSTEM_RELIABILITY => self.config.smart() & 1 << 2 != 0,
            // Errors cannot be turned off.
            _ => event.kind == EventType::ERROR,
        };
        if wanted && !self.pending.contains(&event) && self.pending.len() < PENDING {
            self.pending.push_back(event);
        }
    }

    /// A request and the event to complete it with, if there are both. The event's type is masked from then on, until its log
    /// page is read.
    pub(in crate::controller) fn take(&mut self) -> Option<(u16, AsyncEvent)> {
        let masked = |event: &AsyncEvent| self.masked.iter().any(|m| m.kind == event.kind);
        let at = self.pending.iter().position(|event| !masked(event))?;
        let cid = self.requests.pop_front()?;
        let event = self.pending.remove(at)?;
        self.masked.push(event);
        Some((cid, event))
    }

    /// The guest has read a log page without Retain Asynchronous Event.
    pub(in crate::controller) fn log_read(&mut self, lid: LogId) {
        self.masked.retain(|event| event.log_page != lid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Events {
        Events {
            config: AsyncEventConfig::from_bits(0x1FF),
            ..Events::default()
        }
    }

    #[test]
    fn an_event_waits_for_a_request_and_a_request_for_an_event() {
        let mut e = all();
        assert!(e.request(7));
        assert_eq!(e.take(), None);
        e.raise(AsyncEvent::NAMESPACE_ATTRIBUTE_CHANGED);
        assert_eq!(e.take(), Some((7, AsyncEvent::NAMESPACE_ATTRIBUTE_CHANGED)));
        e.raise(AsyncEvent::INVALID_DOORBELL_VALUE);
        assert_eq!(e.take(), None);
        assert!(e.request(8));
        assert_eq!(e.take(), Some((8, AsyncEvent::INVALID_DOORBELL_VALUE)));
    }

    #[test]
    fn a_type_is_masked_until_its_log_page_is_read() {
        let mut e = all();
        for cid in 0..4 {
            assert!(e.request(cid));
        }
        assert!(!e.request(4), "over the limit");
        e.raise(AsyncEvent::INVALID_DOORBELL_VALUE);
        assert!(e.take().is_some());
        e.raise(AsyncEvent::INVALID_DOORBELL_REGISTER);
        e.raise(AsyncEvent::INVALID_DOORBELL_REGISTER);
        assert_eq!(e.take(), None, "errors are masked");
        e.raise(AsyncEvent::TEMPERATURE_THRESHOLD);
        assert_eq!(e.take(), Some((1, AsyncEvent::TEMPERATURE_THRESHOLD)));
        e.log_read(LogId::SMART);
        assert_eq!(e.take(), None, "that was another page");
        e.log_read(LogId::ERROR);
        assert_eq!(e.take(), Some((2, AsyncEvent::INVALID_DOORBELL_REGISTER)));
        e.log_read(LogId::ERROR);
        assert_eq!(e.take(), None, "the same event twice is one");
    }

    #[test]
    fn unwanted_events_are_dropped_but_errors_are_not() {
        let mut e = Events::default();
        e.request(1);
        e.raise(AsyncEvent::NAMESPACE_ATTRIBUTE_CHANGED);
        e.raise(AsyncEvent::TEMPERATURE_THRESHOLD);
        e.raise(AsyncEvent::ANA_CHANGE);
        e.config = AsyncEventConfig::from_bits(u32::MAX);
        assert_eq!(e.take(), None);
        e.config = AsyncEventConfig::new();
        e.raise(AsyncEvent::PERSISTENT_INTERNAL_ERROR);
        assert_eq!(e.take(), Some((1, AsyncEvent::PERSISTENT_INTERNAL_ERROR)));
    }

    #[test]
    fn a_request_can_be_cancelled_once() {
        let mut e = all();
        e.request(1);
        e.request(2);
        assert!(e.cancel(1) && !e.cancel(1));
        e.raise(AsyncEvent::INVALID_DOORBELL_VALUE);
        assert_eq!(e.take().map(|(cid, _)| cid), Some(2));
    }
}
