//! What waits for answers of pollers, by token.

use std::collections::HashMap;

use crossbeam_channel::Sender;
use nvme_spec::Status;

use crate::poller::Reply;

/// What an answer ends.
pub(super) enum Work {
    /// A poller has been told of this controller.
    Attach(usize),
    /// An admin command.
    Admin(AdminWork),
    /// A reset or detach.
    Drain,
    /// Queues that were found again are given to a poller.
    Resume,
    /// A step of the move of this number.
    Move(u32),
    /// New memory; the sender is dropped when it is in use everywhere.
    Memory {
        /// Held for its drop only.
        _done: Sender<()>,
    },
    /// Nothing: shadow doorbells that a poller learns of with its first queue.
    Nothing,
}

/// An admin command that waits for pollers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AdminWork {
    pub(super) cid: u16,
    pub(super) kind: AdminKind,
}

/// Which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AdminKind {
    CreateCq(u16),
    CreateSq(u16),
    DeleteCq(u16),
    DeleteSq(u16),
    Abort,
    Shadow,
}

/// Work that has come to its end, and what came of it.
pub(super) type Ended = (Work, Result<bool, Status>);

struct Entry {
    /// The pollers that have not answered.
    left: Vec<usize>,
    failed: Option<Status>,
    /// All answers were `Ok(true)`.
    yes: bool,
    work: Work,
}

/// The table. Bounded by what is sent: an admin command has its place in the admin queue, a drain is one, and each change of
/// memory has a transport thread that waits.
#[derive(Default)]
pub(super) struct Pending {
    last: u64,
    entries: HashMap<u64, Entry>,
}

impl Pending {
    /// A token for one message to each of `pollers` (at least one). Each answers once.
    pub(super) fn begin(&mut self, pollers: Vec<usize>, work: Work) -> u64 {
        let token = self.unanswered();
        let entry = Entry {
            left: pollers,
            failed: None,
            yes: true,
            work,
        };
        self.entries.insert(token, entry);
        token
    }

    /// A token whose answer nobody waits for.
    pub(super) fn unanswered(&mut self) -> u64 {
        self.last = self.last.wrapping_add(1);
        self.last
    }

    /// An answer. When it is the last one for its token: the work, and what came of it.
    pub(super) fn answer(&mut self, poller: usize, reply: &Reply) -> Option<Ended> {
        let entry = self.entries.get_mut(&reply.token)?;
        let at = entry.left.iter().position(|left| *left == poller)?;
        entry.left.swap_remove(at);
        match reply.result {
            Ok(yes) => entry.yes &= yes,
            Err(status) => entry.failed = entry.failed.or(Some(status)),
        }
        if !entry.left.is_empty() {
            return None;
        }
        let entry = self.entries.remove(&reply.token)?;
        Some((entry.work, entry.failed.map_or(Ok(entry.yes), Err)))
    }

    /// A poller will not answer any more: what that ends.
    pub(super) fn lost(&mut self, poller: usize) -> Vec<Ended> {
        let waiting = self
            .entries
            .iter()
            .filter(|(_, e)| e.left.contains(&poller));
        let tokens: Vec<_> = waiting.map(|(token, _)| *token).collect();
        let result = Err(Status::INTERNAL_ERROR);
        tokens
            .into_iter()
            .filter_map(|token| self.answer(poller, &Reply { token, result }))
            .collect()
    }

    /// Forget the admin commands: their queue is gone.
    pub(super) fn forget_admin(&mut self) {
        self.entries
            .retain(|_, entry| !matches!(entry.work, Work::Admin(_)));
    }

    /// How many of the admin commands that wait are Aborts.
    pub(super) fn aborts(&self) -> usize {
        self.admin().filter(|w| w.kind == AdminKind::Abort).count()
    }

    fn admin(&self) -> impl Iterator<Item = AdminWork> + '_ {
        self.entries.values().filter_map(|entry| match entry.work {
            Work::Admin(work) => Some(work),
            _ => None,
        })
    }

    /// How many entries there are.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(token: u64, result: Result<bool, Status>) -> Reply {
        Reply { token, result }
    }

    #[test]
    fn the_last_of_several_answers_ends_the_work() {
        let mut p = Pending::default();
        let token = p.begin(vec![0, 1, 2], Work::Drain);
        assert!(p.answer(0, &reply(token, Ok(true))).is_none());
        assert!(
            p.answer(1, &reply(token + 1, Ok(true))).is_none(),
            "unknown"
        );
        assert!(p.answer(0, &reply(token, Ok(true))).is_none(), "again");
        let failed = reply(token, Err(Status::ABORT_REQUESTED));
        assert!(p.answer(2, &failed).is_none());
        let (work, result) = p.answer(1, &reply(token, Ok(true))).unwrap();
        assert!(matches!(work, Work::Drain));
        assert_eq!(result, Err(Status::ABORT_REQUESTED));
        assert!(p.answer(1, &reply(token, Ok(true))).is_none(), "once");
        let token = p.begin(vec![0], Work::Nothing);
        assert_eq!(p.answer(0, &reply(token, Ok(false))).unwrap().1, Ok(false));
        assert_eq!(p.len(), 0);
    }

    #[test]
    fn a_poller_that_is_lost_holds_up_nothing() {
        let mut p = Pending::default();
        let both = p.begin(vec![0, 1], Work::Drain);
        let one = p.begin(vec![1], Work::Nothing);
        let ended = p.lost(1);
        assert!(matches!(
            ended[..],
            [(Work::Nothing, Err(Status::INTERNAL_ERROR))]
        ));
        assert!(p.answer(1, &reply(one, Ok(true))).is_none());
        assert!(p.answer(0, &reply(both, Ok(true))).is_some());
    }

    #[test]
    fn admin_commands_are_forgotten_and_others_are_not() {
        let mut p = Pending::default();
        let kind = AdminKind::Abort;
        let token = p.begin(vec![0], Work::Admin(AdminWork { cid: 4, kind }));
        let drain = p.begin(vec![0], Work::Drain);
        assert_eq!(p.aborts(), 1);
        p.forget_admin();
        assert!(p.answer(0, &reply(token, Ok(true))).is_none());
        assert!(p.answer(0, &reply(drain, Ok(true))).is_some());
    }
}
