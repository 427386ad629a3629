//! Which requests a wrapper does something to: rules by operation and place, changed while I/O runs.

use std::ops::{BitOr, Range};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::{Operation, Request};

/// A set of kinds of operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operations(u8);

impl Operations {
    /// Read.
    pub const READ: Self = Self(1);
    /// Write.
    pub const WRITE: Self = Self(2);
    /// Compare.
    pub const COMPARE: Self = Self(4);
    /// Verify.
    pub const VERIFY: Self = Self(8);
    /// Write Zeroes.
    pub const WRITE_ZEROES: Self = Self(16);
    /// Deallocate.
    pub const DEALLOCATE: Self = Self(32);
    /// Flush.
    pub const FLUSH: Self = Self(64);
    /// All of them.
    pub const ALL: Self = Self(127);

    /// Whether `operation` is one of them.
    pub fn contains(self, operation: Operation) -> bool {
        let one = match operation {
            Operation::Read => Self::READ,
            Operation::Write { .. } => Self::WRITE,
            Operation::Compare => Self::COMPARE,
            Operation::Verify => Self::VERIFY,
            Operation::WriteZeroes { .. } => Self::WRITE_ZEROES,
            Operation::Deallocate => Self::DEALLOCATE,
            Operation::Flush => Self::FLUSH,
        };
        self.0 & one.0 != 0
    }
}

impl BitOr for Operations {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// What to do to which requests.
#[derive(Clone, Debug)]
pub struct Rule<A> {
    /// The operations it is about.
    pub operations: Operations,
    /// It is about requests that touch one of these blocks, and about every Flush.
    pub blocks: Range<u64>,
    /// So many matching requests pass first.
    pub skip: u64,
    /// Then it does something to so many; `None` = to all.
    pub count: Option<u64>,
    /// What it does.
    pub action: A,
}

impl<A> Rule<A> {
    /// Do `action` to every one of these operations, anywhere.
    pub fn always(operations: Operations, action: A) -> Self {
        Self {
            operations,
            blocks: 0..u64::MAX,
            skip: 0,
            count: None,
            action,
        }
    }

    /// Do `action` to the next of these operations, once.
    pub fn once(operations: Operations, action: A) -> Self {
        Self {
            count: Some(1),
            ..Self::always(operations, action)
        }
    }

    /// Only where one of these blocks is touched.
    pub fn on_blocks(self, blocks: Range<u64>) -> Self {
        Self { blocks, ..self }
    }

    /// Only after so many have passed.
    pub fn after(self, skip: u64) -> Self {
        Self { skip, ..self }
    }

    fn matches(&self, request: &Request<'_>) -> bool {
        if !self.operations.contains(request.operation) {
            return false;
        }
        let end = request.slba.saturating_add(u64::from(request.blocks));
        request.operation == Operation::Flush
            || (request.slba < self.blocks.end && self.blocks.start < end)
    }
}

/// The name of a rule that was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuleId(u64);

struct Entry<A> {
    id: RuleId,
    rule: Rule<A>,
    hits: u64,
}

struct Table<A> {
    entries: Vec<Entry<A>>,
    next: u64,
}

struct Shared<A> {
    /// Whether there are rules at all: what a request looks at when there are none.
    active: AtomicBool,
    table: Mutex<Table<A>>,
}

/// The rules of a wrapper, shared by its channels and whoever changes them.
///
/// The first rule, in the order they were added, that has something to do decides.
pub struct Rules<A>(Arc<Shared<A>>);

impl<A> Clone for Rules<A> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<A: Copy> Default for Rules<A> {
    fn default() -> Self {
        Self::new()
    }
}

impl<A: Copy> Rules<A> {
    /// No rules.
    pub fn new() -> Self {
        Self(Arc::new(Shared {
            active: AtomicBool::new(false),
            table: Mutex::new(Table {
                entries: Vec::new(),
                next: 0,
            }),
        }))
    }

    fn table(&self) -> MutexGuard<'_, Table<A>> {
        // A table is whole between any two of its statements.
        self.0.table.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Add a rule; it holds for requests submitted from now on.
    pub fn add(&self, rule: Rule<A>) -> RuleId {
        let mut table = self.table();
        let id = RuleId(table.next);
        table.next += 1;
        table.entries.push(Entry { id, rule, hits: 0 });
        self.0.active.store(true, Ordering::Release);
        id
    }

    /// Remove a rule. `false` if it is not there.
    pub fn remove(&self, id: RuleId) -> bool {
        let mut table = self.table();
        let before = table.entries.len();
        table.entries.retain(|e| e.id != id);
        self.0
            .active
            .store(!table.entries.is_empty(), Ordering::Release);
        table.entries.len() < before
    }

    /// Remove all rules.
    pub fn clear(&self) {
        self.table().entries.clear();
        self.0.active.store(false, Ordering::Release);
    }

    /// To how many requests a rule has done something; `None` if it was removed.
    pub fn hits(&self, id: RuleId) -> Option<u64> {
        let table = self.table();
        let entry = table.entries.iter().find(|e| e.id == id)?;
        Some(entry.hits)
    }

    /// What to do to this request.
    #[inline]
    pub(super) fn decide(&self, request: &Request<'_>) -> Option<A> {
        if !self.0.active.load(Ordering::Acquire) {
            return None;
        }
        self.decide_slowly(request)
    }

    fn decide_slowly(&self, request: &Request<'_>) -> Option<A> {
        for entry in &mut self.table().entries {
            let rule = &mut entry.rule;
            if rule.count == Some(entry.hits) || !rule.matches(request) {
                continue;
            }
            if rule.skip > 0 {
                rule.skip -= 1;
                continue;
            }
            entry.hits += 1;
            return Some(rule.action);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Buffers;

    fn request(operation: Operation, slba: u64, blocks: u32) -> Request<'static> {
        Request {
            operation,
            slba,
            blocks,
            data: Buffers::NONE,
            guest: None,
        }
    }

    #[test]
    fn a_rule_matches_kind_and_place() {
        let rules = Rules::new();
        rules.add(Rule::always(Operations::READ | Operations::FLUSH, 1).on_blocks(10..12));
        let decide = |op, slba, n| rules.decide(&request(op, slba, n));
        assert_eq!(decide(Operation::Read, 9, 1), None);
        assert_eq!(decide(Operation::Read, 9, 2), Some(1));
        assert_eq!(decide(Operation::Read, 11, 5), Some(1));
        assert_eq!(decide(Operation::Read, 12, 1), None);
        assert_eq!(decide(Operation::Verify, 10, 1), None);
        assert_eq!(decide(Operation::Flush, 0, 0), Some(1));
    }

    #[test]
    fn rules_skip_count_and_go() {
        let rules = Rules::new();
        let first = rules.add(Rule::once(Operations::ALL, 'a').after(1));
        let second = rules.add(Rule::always(Operations::WRITE, 'b'));
        let write = request(Operation::Write { fua: true }, 0, 1);
        let seen: Vec<_> = (0..3).map(|_| rules.decide(&write)).collect();
        assert_eq!(seen, [Some('b'), Some('a'), Some('b')]);
        assert_eq!((rules.hits(first), rules.hits(second)), (Some(1), Some(2)));
        assert!(rules.remove(second) && !rules.remove(second));
        assert_eq!(rules.decide(&write), None);
        rules.clear();
        assert_eq!(rules.hits(first), None);
    }
}
