//! Which poller a new completion queue goes to.

/// The poller with the fewest of our queues. Controllers start looking at different ones (`start`), so that many small
/// controllers do not all end up on the first core. `None` if there are no pollers.
pub(super) fn pick(queues: &[usize], start: usize) -> Option<usize> {
    let n = queues.len();
    (0..n)
        .map(|i| i.wrapping_add(start) % n)
        .min_by_key(|&i| queues.get(i).copied().unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fewest_queues_then_the_first_from_the_start() {
        assert_eq!(pick(&[], 0), None);
        assert_eq!(pick(&[5], usize::MAX), Some(0));
        assert_eq!(pick(&[0, 0, 0], 1), Some(1));
        assert_eq!(pick(&[2, 1, 1], 0), Some(1));
        assert_eq!(pick(&[2, 1, 1], 2), Some(2));
        assert_eq!(pick(&[1, 0, 1], 2), Some(1));
    }
}
