//! What the host offers in general: huge pages and limits.

use rustix::process::{Resource, getrlimit};

use super::{Line, Verdict};
use crate::driver::pci::Host;
use crate::driver::vfio::{entry_limit, memlock_limit};

/// What the driver of an SSD locks for itself, in bytes, with room to spare.
const OWN_MEMORY: u64 = 64 << 20;

/// Capability to lock any amount of memory (CAP_IPC_LOCK), as a bit.
const IPC_LOCK: u32 = 14;

/// Mappings an SSD needs for each guest, at most: vhost-user knows no more regions than this.
const REGIONS: u64 = 512;

/// Look at the host, for so many SSDs and a daemon that may have so many `files` open.
pub(super) fn look(host: &Host, files: u64, ssds: usize, lines: &mut Vec<Line>) {
    lines.push(huge_pages(host));
    lines.push(open_files(files, getrlimit(Resource::Nofile).maximum));
    if ssds > 0 {
        lines.push(locked_memory(may_lock_all(host), memlock_limit()));
        if let Some(limit) = entry_limit(host) {
            lines.push(mappings(limit));
        }
    }
}

fn huge_pages(host: &Host) -> Line {
    let subject = "huge pages";
    let mut sizes = Vec::new();
    for (dir, size) in [
        ("hugepages-2048kB", "2 MiB"),
        ("hugepages-1048576kB", "1 GiB"),
    ] {
        let read = |name: &str| -> Option<u64> {
            let path = format!("sys/kernel/mm/hugepages/{dir}/{name}");
            host.read(path).ok()?.parse().ok()
        };
        if let (Some(free), Some(total)) = (read("free_hugepages"), read("nr_hugepages"))
            && total > 0
        {
            sizes.push(format!("{free} of {total} of {size} free"));
        }
    }
    if sizes.is_empty() {
        return Line::note(
            subject,
            "none reserved: guests run on small pages, which costs them and the IOMMU time",
            "scripts/setup-host --hugepages MIB --apply, and memory-backend-memfd,hugetlb=on in QEMU",
        );
    }
    Line::good(subject, sizes.join(", "))
}

fn open_files(needed: u64, limit: Option<u64>) -> Line {
    let subject = "open files";
    match limit {
        None => Line::good(subject, "unlimited"),
        Some(limit) if limit >= needed => Line::good(
            subject,
            format_args!("{limit} allowed, up to {needed} needed"),
        ),
        Some(limit) => Line::bad(
            32,
            subject,
            format_args!("{limit} allowed, but up to {needed} needed"),
            "raise the hard limit: ulimit -Hn, limits.conf (nofile), or LimitNOFILE= of the service",
        ),
    }
}

/// Whether this process may lock memory beyond its limit.
fn may_lock_all(host: &Host) -> bool {
    let status = host.read("proc/self/status").unwrap_or_default();
    let caps = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    caps.and_then(|c| u64::from_str_radix(c.trim(), 16).ok())
        .is_some_and(|caps| caps >> IPC_LOCK & 1 != 0)
}

fn locked_memory(all: bool, limit: Option<u64>) -> Line {
    let subject = "locked memory";
    let limit = match limit {
        Some(limit) if !all => limit,
        _ => return Line::good(subject, "unlimited"),
    };
    let mend = "raise it to the memory of all guests of all SSDs and 64 MiB for each SSD: ulimit -l, limits.conf (memlock), or \
                LimitMEMLOCK= of the service";
    let mib = limit >> 20;
    match limit.checked_sub(OWN_MEMORY) {
        None => Line::bad(
            30,
            subject,
            format_args!("{mib} MiB allowed: too little for an SSD even without a guest"),
            mend,
        ),
        Some(rest) => Line::note(
            subject,
            format_args!(
                "{mib} MiB allowed: the guests of SSDs may have {} MiB of memory in all",
                rest >> 20
            ),
            mend,
        ),
    }
}

fn mappings(limit: u64) -> Line {
    let subject = "DMA mappings";
    let text = format!("{limit} for each SSD (dma_entry_limit)");
    if limit >= REGIONS {
        return Line::good(subject, text);
    }
    Line::new(
        Verdict::Note,
        subject,
        text,
        Some("modprobe vfio_iommu_type1 dma_entry_limit=65535".into()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::pci::testing::FakeHost;

    #[test]
    fn limits_are_judged() {
        assert_eq!(open_files(100, None).verdict, Verdict::Good);
        assert_eq!(open_files(100, Some(100)).verdict, Verdict::Good);
        assert_eq!(open_files(100, Some(99)).verdict, Verdict::Bad(32));
        let memlock = |all, limit| locked_memory(all, limit).verdict;
        assert_eq!(memlock(false, None), Verdict::Good);
        assert_eq!(memlock(true, Some(0)), Verdict::Good);
        assert_eq!(memlock(false, Some(8 << 20)), Verdict::Bad(30));
        let some = locked_memory(false, Some(1 << 30));
        assert_eq!(some.verdict, Verdict::Note);
        assert!(some.text.contains("960 MiB"), "{some}");
        assert_eq!(mappings(65535).verdict, Verdict::Good);
        assert_eq!(mappings(10).verdict, Verdict::Note);
    }

    #[test]
    fn capabilities_and_pages_are_read() {
        let fake = FakeHost::new();
        let host = fake.host();
        assert!(!may_lock_all(&host));
        fake.write("proc/self/status", "Name:\tx\nCapEff:\t0000000000004000\n");
        assert!(may_lock_all(&host));
        fake.write("proc/self/status", "CapEff:\t0000000000003fff\n");
        assert!(!may_lock_all(&host));
        assert_eq!(huge_pages(&host).verdict, Verdict::Note);
        fake.write(
            "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
            "8\n",
        );
        fake.write(
            "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages",
            "3\n",
        );
        let line = huge_pages(&host);
        assert!(line.text.contains("3 of 8 of 2 MiB"), "{line}");
    }
}
