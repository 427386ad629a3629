//! Which NUMA node a core belongs to, as the kernel tells it in `/sys/devices/system/node`.

use std::path::Path;

/// Where the kernel tells it.
const NODES: &str = "/sys/devices/system/node";

/// The node of a core; `None` if the kernel does not say.
pub(crate) fn node_of(core: usize) -> Option<u32> {
    node_in(Path::new(NODES), core)
}

fn node_in(nodes: &Path, core: usize) -> Option<u32> {
    std::fs::read_dir(nodes).ok()?.flatten().find_map(|entry| {
        let name = entry.file_name();
        let node = name.to_str()?.strip_prefix("node")?.parse().ok()?;
        let cores = std::fs::read_to_string(entry.path().join("cpulist")).ok()?;
        in_list(&cores, core).then_some(node)
    })
}

/// Whether a number is in a list such as `0-3,8,10-11`.
fn in_list(list: &str, number: usize) -> bool {
    list.trim().split(',').any(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        match (first.parse::<usize>(), last.parse::<usize>()) {
            (Ok(first), Ok(last)) => (first..=last).contains(&number),
            _ => false,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_found_on_their_nodes() {
        let dir = tempfile::tempdir().unwrap();
        for (node, cores) in [
            ("node0", "0-3,8-11\n"),
            ("node12", "4,5,6-7"),
            ("node2", ""),
        ] {
            std::fs::create_dir(dir.path().join(node)).unwrap();
            std::fs::write(dir.path().join(node).join("cpulist"), cores).unwrap();
        }
        std::fs::write(dir.path().join("online"), "0-1").unwrap();
        let node = |core| node_in(dir.path(), core);
        assert_eq!([node(0), node(3), node(10)], [Some(0); 3]);
        assert_eq!([node(4), node(7)], [Some(12); 2]);
        assert_eq!([node(12), node(usize::MAX)], [None; 2]);
        assert_eq!(node_in(&dir.path().join("nowhere"), 0), None);
        assert!(!in_list("3-1,x,-", 2));
    }
}
