//! Which poller a new completion queue goes to.

/// How the queues of a controller are put on pollers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Each to the poller that has the fewest queues, of all controllers.
    #[default]
    Spread,
    /// All to one poller: the one that has the fewest queues when the first comes.
    Packed,
    /// As `Spread`, among the pollers whose cores are where the guest's memory is; all of them if that cannot be known.
    Numa,
}

/// Where the queues of a controller may go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// How a poller is chosen.
    pub policy: Policy,
    /// The pollers that may serve this controller, counted from 0; `None` = all of them.
    pub pollers: Option<Vec<usize>>,
}

impl Placement {
    /// Whether this poller may serve the controller.
    pub fn allows(&self, poller: usize) -> bool {
        self.pollers.as_ref().is_none_or(|p| p.contains(&poller))
    }
}

/// A poller that may be chosen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) poller: usize,
    /// Queues it has, of all controllers.
    pub(super) queues: usize,
    /// Of these, those of the controller in question.
    pub(super) own: usize,
    /// The NUMA node of its core.
    pub(super) node: Option<u32>,
}

/// Choose. Of equals, the first from the `start`-th on, so that many small controllers do not all end up on the first
/// core. `memory`: the node where the guest's memory is. `None` if there are no candidates.
pub(super) fn pick(
    policy: Policy,
    candidates: &[Candidate],
    start: usize,
    memory: Option<u32>,
) -> Option<usize> {
    let first = start.checked_rem(candidates.len())?;
    let (before, from) = candidates.split_at_checked(first)?;
    let turn = from.iter().chain(before);
    let near = |c: &&Candidate| memory.is_some() && c.node == memory;
    let chosen = match policy {
        Policy::Packed => turn.clone().find(|c| c.own > 0),
        Policy::Numa => turn.clone().filter(near).min_by_key(|c| c.queues),
        Policy::Spread => None,
    };
    let chosen = chosen.or_else(|| turn.min_by_key(|c| (c.queues, c.own)));
    chosen.map(|c| c.poller)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pollers with (queues, own, node).
    fn pollers(of: &[(usize, usize, u32)]) -> Vec<Candidate> {
        let of = of.iter().enumerate();
        of.map(|(poller, &(queues, own, node))| Candidate {
            poller,
            queues,
            own,
            node: Some(node),
        })
        .collect()
    }

    #[test]
    fn fewest_queues_then_the_first_from_the_start() {
        let spread = |loads: &[usize], start| {
            let of: Vec<_> = loads.iter().map(|&n| (n, 0, 0)).collect();
            pick(Policy::Spread, &pollers(&of), start, None)
        };
        assert_eq!(spread(&[], 0), None);
        assert_eq!(spread(&[5], usize::MAX), Some(0));
        assert_eq!(spread(&[0, 0, 0], 1), Some(1));
        assert_eq!(spread(&[2, 1, 1], 0), Some(1));
        assert_eq!(spread(&[2, 1, 1], 2), Some(2));
        assert_eq!(spread(&[1, 0, 1], 2), Some(1));
    }

    #[test]
    fn packed_queues_stay_together() {
        let none_yet = pollers(&[(4, 0, 0), (2, 0, 0), (3, 0, 0)]);
        assert_eq!(pick(Policy::Packed, &none_yet, 0, None), Some(1));
        let some = pollers(&[(4, 0, 0), (2, 0, 0), (9, 2, 0)]);
        assert_eq!(pick(Policy::Packed, &some, 0, None), Some(2));
    }

    #[test]
    fn queues_go_to_the_node_of_the_memory_while_it_is_known() {
        let two_nodes = pollers(&[(0, 0, 0), (0, 0, 0), (7, 0, 1), (5, 0, 1)]);
        assert_eq!(pick(Policy::Numa, &two_nodes, 0, Some(1)), Some(3));
        assert_eq!(pick(Policy::Numa, &two_nodes, 1, Some(0)), Some(1));
        assert_eq!(pick(Policy::Numa, &two_nodes, 0, None), Some(0));
        assert_eq!(pick(Policy::Numa, &two_nodes, 0, Some(7)), Some(0));
        assert_eq!(pick(Policy::Spread, &two_nodes, 0, Some(1)), Some(0));
    }
}
