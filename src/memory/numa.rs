//! On which NUMA node guest memory lies.

#![expect(
    unsafe_code,
    reason = "the fence: addresses of guest memory are given to the kernel"
)]

use std::collections::BTreeMap;

use super::GuestMap;

/// Pages that are asked about in each region.
const SAMPLES: u64 = 32;

impl GuestMap {
    /// The node that most of this memory is on, as far as it has been used through this mapping; `None` if that cannot be known.
    ///
    /// The pages at `known` are looked at first, which makes them part of the mapping: they are to be pages that the guest has written,
    /// such as its queues. No others are touched: a page nobody uses yet would be made.
    pub fn node(&self, known: &[u64]) -> Option<u32> {
        let mut pages = Vec::new();
        for gpa in known {
            if self.read(*gpa, &mut [0])
                && let Some(seg) = self.resolve(*gpa, 1)
            {
                pages.push(page(seg.ptr()));
            }
        }
        for region in self.regions() {
            let step = (region.len() / SAMPLES).max(4096);
            let places = (0..SAMPLES).map(|i| region.gpa().saturating_add(i * step));
            pages.extend(places.filter_map(|gpa| Some(page(self.resolve(gpa, 1)?.ptr()))));
        }
        most(&nodes(&pages))
    }
}

/// The page of an address.
fn page(at: *mut u8) -> *mut libc::c_void {
    at.map_addr(|at| at & !4095).cast()
}

/// For each page its node, or a negative error.
fn nodes(pages: &[*mut libc::c_void]) -> Vec<i32> {
    let mut status = vec![-libc::ENOENT; pages.len()];
    let nowhere = std::ptr::null::<libc::c_int>();
    // SAFETY: move_pages(2) with no target nodes moves nothing; it reads `pages.len()` addresses, which it only asks the page tables
    // about, and writes as many integers to `status`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            pages.len(),
            pages.as_ptr(),
            nowhere,
            status.as_mut_ptr(),
            0,
        )
    };
    if result < 0 {
        status.clear();
    }
    status
}

/// The node that is there most often.
fn most(nodes: &[i32]) -> Option<u32> {
    let mut counts = BTreeMap::<u32, usize>::new();
    for node in nodes.iter().filter_map(|node| u32::try_from(*node).ok()) {
        *counts.entry(node).or_default() += 1;
    }
    let (node, _) = counts.into_iter().max_by_key(|(_, count)| *count)?;
    Some(node)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_of_most_pages_counts() {
        assert_eq!(most(&[]), None);
        assert_eq!(most(&[-2, -14]), None);
        assert_eq!(most(&[1, -2, 0, 1]), Some(1));
        assert_eq!(most(&[-2, 3]), Some(3));
    }

    #[test]
    fn memory_that_is_used_is_on_a_node_that_exists() {
        let map = crate::io::test_memory(0x10_0000);
        assert!(map.write(0x1000, &[1]));
        if let Some(node) = map.node(&[0x1000, u64::MAX]) {
            let path = format!("/sys/devices/system/node/node{node}");
            assert!(std::path::Path::new(&path).exists(), "{path}");
        }
        assert_eq!(GuestMap::empty().node(&[0]), None);
    }
}
