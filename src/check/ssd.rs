//! An SSD that is to be driven through VFIO.

use std::fs::OpenOptions;

use super::Line;
use crate::driver::pci::{Host, PciAddress, PciFunction};
use crate::driver::vfio::{Step, VfioError, device_files, find};
use crate::poller::node_of;

/// Look at an SSD and at the cores it is served from.
pub(super) fn look(host: &Host, address: PciAddress, cores: &[usize], lines: &mut Vec<Line>) {
    let function = match find(host, address) {
        Ok(function) => function,
        Err(e) => return lines.push(Line::refused(address, &e)),
    };
    for step in Step::ALL {
        match step.look(host, &function) {
            Ok(()) => lines.push(Line::good(address, said(step, &function))),
            Err(e) => {
                lines.push(Line::refused(address, &e));
                // What comes after depends on it. But who is in the way of what can be told at once.
                if !matches!(e, VfioError::Mounted { .. } | VfioError::NotBound { .. }) {
                    return;
                }
            }
        }
        if step == Step::Bound && !function.is_on_vfio() {
            // The group matters all the same; its files come with vfio-pci.
            if let Err(e) = Step::Group.look(host, &function) {
                lines.push(Line::refused(address, &e));
            }
            break;
        }
        if step == Step::Files {
            busy(host, &function, lines);
        }
    }
    nodes(&function, cores, node_of, lines);
}

/// What holds when a step succeeded.
fn said(step: Step, function: &PciFunction) -> String {
    match step {
        Step::Kind => format!(
            "an NVMe controller ({:04x}:{:04x})",
            function.vendor, function.device
        ),
        Step::Unused => "none of its disks is in use by this host".into(),
        Step::Iommu => format!(
            "behind an IOMMU, in group {}",
            function.group.unwrap_or_default()
        ),
        Step::Bound => "bound to vfio-pci".into(),
        Step::Group => "nobody else of its group is in use by this host".into(),
        Step::Files => "its device files may be opened".into(),
    }
}

/// Whether somebody has it: that is as it should be while the daemon runs.
fn busy(host: &Host, function: &PciFunction, lines: &mut Vec<Line>) {
    let Some(path) = device_files(host, function)
        .ok()
        .and_then(|files| files.last().cloned())
    else {
        return;
    };
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .open(host.path(&path));
    if let Err(e) = opened
        && e.raw_os_error() == Some(libc::EBUSY)
    {
        lines.push(Line::note(
            function.address,
            format_args!("in use by a process now (/{path} is busy)"),
            "none is needed if that is the daemon; else end it",
        ));
    }
}

/// Cores far from the SSD.
fn nodes(
    function: &PciFunction,
    cores: &[usize],
    node_of: impl Fn(usize) -> Option<u32>,
    lines: &mut Vec<Line>,
) {
    let Some(node) = function.node else {
        return;
    };
    let far: Vec<_> = cores
        .iter()
        .filter(|core| node_of(**core).is_some_and(|n| n != node))
        .map(ToString::to_string)
        .collect();
    let address = function.address;
    if far.is_empty() {
        lines.push(Line::good(address, format_args!("on NUMA node {node}")));
    } else {
        lines.push(Line::note(
            address,
            format_args!(
                "on NUMA node {node}, but pollers on other nodes: cores {}",
                far.join(", ")
            ),
            &format!("choose cores of /sys/devices/system/node/node{node}/cpulist"),
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;
    use crate::driver::pci::testing::FakeHost;
    use crate::driver::pci::{CLASS_NVME, VFIO_DRIVER};

    const AT: &str = "0000:01:00.0";

    fn lines(fake: &FakeHost) -> Vec<Line> {
        let mut lines = Vec::new();
        look(&fake.host(), AT.parse().unwrap(), &[], &mut lines);
        lines
    }

    fn verdicts(lines: &[Line]) -> Vec<Verdict> {
        lines.iter().map(|l| l.verdict).collect()
    }

    #[test]
    fn all_is_well_line_by_line() {
        let fake = FakeHost::new();
        fake.function(AT, CLASS_NVME, Some(VFIO_DRIVER), Some(9));
        fake.write("dev/vfio/vfio", "");
        fake.write("dev/vfio/9", "");
        let lines = lines(&fake);
        assert_eq!(verdicts(&lines), [Verdict::Good; 6], "{lines:?}");
        assert!(lines[2].text.contains("group 9"));
    }

    #[test]
    fn several_obstacles_are_told_at_once() {
        let fake = FakeHost::new();
        fake.function(AT, CLASS_NVME, Some("nvme"), Some(9));
        fake.function("0000:01:00.1", CLASS_NVME, Some("nvme"), Some(9));
        fake.disk(AT, "nvme0n1", "259:0");
        fake.write(
            "proc/self/mountinfo",
            "30 20 259:0 / /srv rw - ext4 /dev/nvme0n1 rw\n",
        );
        let lines = lines(&fake);
        let statuses: Vec<_> = lines
            .iter()
            .filter_map(|l| match l.verdict {
                Verdict::Bad(status) => Some(status),
                _ => None,
            })
            .collect();
        assert_eq!(statuses, [23, 24, 25], "{lines:?}");
        assert!(
            lines
                .iter()
                .all(|l| l.verdict == Verdict::Good || l.mend.is_some())
        );
    }

    #[test]
    fn far_cores_are_told() {
        let fake = FakeHost::new();
        fake.function(AT, CLASS_NVME, Some(VFIO_DRIVER), Some(9));
        fake.write(&format!("sys/bus/pci/devices/{AT}/numa_node"), "1\n");
        let function = fake.host().function(AT.parse().unwrap()).unwrap();
        let told = |cores: &[usize]| {
            let mut lines = Vec::new();
            nodes(
                &function,
                cores,
                |core| Some(u32::from(core > 3)),
                &mut lines,
            );
            lines.remove(0)
        };
        assert_eq!(told(&[4, 5]).verdict, Verdict::Good);
        let far = told(&[3, 4, 0]);
        assert_eq!(far.verdict, Verdict::Note);
        assert!(far.text.contains("cores 3, 0"), "{far}");
    }
}
