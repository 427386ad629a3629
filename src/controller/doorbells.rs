//! The switch between trapped and mapped doorbells: what pollers want, what was asked for, what is.

use crate::poller::DoorbellMode;

/// The state of the switch. One request is out at a time.
#[derive(Debug)]
pub(super) struct Switch {
    /// How doorbells may reach us: `Mapped` from the request on, until the front-end says `Trapped`.
    mode: DoorbellMode,
    /// Asked for, not acknowledged.
    asked: Option<DoorbellMode>,
    /// What each poller would like.
    wants: Vec<DoorbellMode>,
    /// What the front-end was asked for and did not do: it cannot, so it is not asked again.
    refused: Option<DoorbellMode>,
}

impl Switch {
    pub(super) fn new(pollers: usize) -> Self {
        Self {
            mode: DoorbellMode::Trapped,
            asked: None,
            wants: vec![DoorbellMode::Trapped; pollers],
            refused: None,
        }
    }

    /// How doorbells may reach us.
    pub(super) fn mode(&self) -> DoorbellMode {
        self.mode
    }

    /// A poller has changed its mind.
    pub(super) fn want(&mut self, poller: usize, mode: DoorbellMode) {
        if let Some(want) = self.wants.get_mut(poller) {
            *want = mode;
        }
    }

    /// Nobody wants anything any more.
    pub(super) fn forget_wants(&mut self) {
        self.wants.fill(DoorbellMode::Trapped);
    }

    /// A fresh front-end, whose doorbells are trapped.
    pub(super) fn reset(&mut self) {
        *self = Self::new(self.wants.len());
    }

    /// What to ask the front-end for now, if anything.
    pub(super) fn next(&mut self) -> Option<DoorbellMode> {
        if self.asked.is_some() {
            return None;
        }
        let wish = if self.wants.contains(&DoorbellMode::Mapped) {
            DoorbellMode::Mapped
        } else {
            DoorbellMode::Trapped
        };
        if wish == self.mode || Some(wish) == self.refused {
            return None;
        }
        self.asked = Some(wish);
        if wish == DoorbellMode::Mapped {
            self.mode = wish;
        }
        Some(wish)
    }

    /// The front-end has said how doorbells are; whether that is a change of [`Self::mode`].
    pub(super) fn acknowledged(&mut self, mode: DoorbellMode) -> bool {
        let asked = self.asked.take();
        if asked.is_some_and(|asked| asked != mode) {
            self.refused = asked;
        }
        std::mem::replace(&mut self.mode, mode) != mode
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use DoorbellMode::{Mapped, Trapped};

    #[test]
    fn one_poller_is_enough_to_map_and_all_must_agree_to_trap() {
        let mut s = Switch::new(2);
        assert_eq!(s.next(), None);
        s.want(1, Mapped);
        assert_eq!(s.next(), Some(Mapped));
        assert_eq!(s.mode(), Mapped, "from the request on");
        s.want(1, Trapped);
        assert_eq!(s.next(), None, "one at a time");
        assert!(!s.acknowledged(Mapped));
        assert_eq!(s.next(), Some(Trapped));
        assert_eq!(s.mode(), Mapped, "until it is acknowledged");
        s.want(0, Mapped);
        assert!(s.acknowledged(Trapped));
        assert_eq!(s.next(), Some(Mapped));
        s.want(7, Mapped);
    }

    #[test]
    fn a_front_end_that_cannot_trap_is_asked_once() {
        let mut s = Switch::new(1);
        assert!(s.acknowledged(Mapped), "of its own accord");
        assert_eq!(s.next(), Some(Trapped));
        assert!(!s.acknowledged(Mapped));
        assert_eq!((s.next(), s.mode()), (None, Mapped));
        s.want(0, Mapped);
        s.want(0, Trapped);
        assert_eq!(s.next(), None);
    }

    #[test]
    fn a_front_end_that_cannot_map_is_asked_once() {
        let mut s = Switch::new(1);
        s.want(0, Mapped);
        assert_eq!(s.next(), Some(Mapped));
        assert!(s.acknowledged(Trapped));
        assert_eq!(s.next(), None);
        s.reset();
        s.want(0, Mapped);
        assert_eq!(s.next(), Some(Mapped), "another front-end may");
    }
}
