//! Opening an NVMe generic device for a namespace: what it can do, and that nobody else uses it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nvme_spec::identify::{
    Cns, DeallocatedRead, IdentifyController, IdentifyNamespace, NvmControllerIdentify,
};
use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::{PassthroughOptions, ioctl};
use crate::backend::bounce::BOUNCE_BYTES;
use crate::backend::{Geometry, OpenError, file, geometry};

/// Namespace Identification Descriptor: type of the Command Set Identifier.
const NIDT_CSI: u8 = 4;

const PAGE: u64 = 4096;

/// What the most careful host would believe of a device that does not say more: 64 KiB.
const CAREFUL: u64 = 64 << 10;

/// What a device does by a command of its own; what it does not is done with reads and writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Abilities {
    pub compare: bool,
    pub verify: bool,
    pub write_zeroes: bool,
    pub deallocate: bool,
}

/// The most of one command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    /// Bytes of a transfer.
    pub bytes: usize,
    /// Segments of a transfer.
    pub segments: usize,
    /// Blocks of a Verify, of a Write Zeroes, and of a range of Dataset Management.
    pub verify: u32,
    pub zeroes: u32,
    pub deallocate: u32,
}

/// An opened device and what was found out about it.
pub(super) struct Device {
    pub file: File,
    pub nsid: u32,
    pub geometry: Geometry,
    pub abilities: Abilities,
    pub limits: Limits,
    /// The block device of the same namespace, held so that nobody mounts it.
    pub claim: Option<File>,
}

/// Namespace Identification Descriptors, as bytes.
#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Descriptors([u8; 4096]);

/// Open, look at and claim it.
pub(super) fn open(options: &PassthroughOptions) -> Result<Device, OpenError> {
    let path = &options.path;
    let meta = std::fs::metadata(path).map_err(|e| cannot(options, "open", e))?;
    if !meta.file_type().is_char_device() {
        return Err(not_one(path));
    }
    // The kernel's own name, whatever the path is called.
    let link = format!(
        "/sys/dev/char/{}:{}",
        rustix::fs::major(meta.rdev()),
        rustix::fs::minor(meta.rdev())
    );
    let name = std::fs::read_link(link)
        .ok()
        .and_then(|target| target.file_name()?.to_str().map(str::to_owned));
    let Some(disk) = name.as_deref().and_then(disk_of) else {
        return Err(not_one(path));
    };
    // No O_NONBLOCK and the like: this device knows none of them.
    let file = OpenOptions::new()
        .read(true)
        .write(!options.read_only)
        .open(path)
        .map_err(|e| cannot(options, "open", e))?;
    let nsid = ioctl::namespace_id(&file).map_err(|e| cannot(options, "identify", e))?;
    let ask = |e| cannot(options, "identify", e);
    let controller: Box<IdentifyController> =
        ioctl::identify(&file, 0, Cns::CONTROLLER, 0).map_err(ask)?;
    // Both came with later versions of NVMe; devices without them have only the NVM command set, and no limits to tell.
    let descriptors =
        ioctl::identify::<Descriptors>(&file, nsid, Cns::NAMESPACE_ID_DESCRIPTORS, 0).ok();
    let command_set = descriptors.map_or(0, |d| command_set(&d.0));
    if command_set != 0 {
        return Err(OpenError::new(
            format!(
                "{} uses I/O command set {command_set}, not the NVM command set",
                path.display()
            ),
            "zoned and key-value namespaces cannot be given to a guest; use another",
        ));
    }
    let nvm = ioctl::identify::<NvmControllerIdentify>(&file, 0, Cns::CSI_CONTROLLER, 0).ok();
    let namespace: Box<IdentifyNamespace> =
        ioctl::identify(&file, nsid, Cns::NAMESPACE, 0).map_err(ask)?;
    let geometry = geometry_of(options, &controller, &namespace)?;
    let abilities = Abilities {
        compare: controller.oncs.compare(),
        verify: controller.oncs.verify(),
        write_zeroes: controller.oncs.write_zeroes(),
        deallocate: controller.oncs.dataset_management(),
    };
    let limits = limits_of(
        &controller,
        nvm.as_deref(),
        geometry.block_shift,
        queue_limit(&disk, "max_hw_sectors_kb").map(|kib| kib.saturating_mul(1024)),
        queue_limit(&disk, "max_segments"),
    );
    let claim = claim(options, &disk)?;
    file::lock(&file, path, options.read_only, options.after.wait)?;
    Ok(Device {
        file,
        nsid,
        geometry,
        abilities,
        limits,
        claim,
    })
}

fn not_one(path: &Path) -> OpenError {
    OpenError::new(
        format!("{} is no NVMe generic device", path.display()),
        "name a /dev/ngXnY, or use backend \"file\" for a block device such as /dev/nvme0n1",
    )
}

/// `nvme0n1` for `ng0n1`.
fn disk_of(name: &str) -> Option<String> {
    let numbers = name.strip_prefix("ng")?;
    let (controller, namespace) = numbers.split_once('n')?;
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    (digits(controller) && digits(namespace)).then(|| format!("nvme{numbers}"))
}

/// The Command Set Identifier in a list of Namespace Identification Descriptors; 0, the NVM command set, if there is none.
fn command_set(list: &[u8]) -> u8 {
    let mut rest = list;
    while let [kind, len, _, _, data @ ..] = rest {
        if *kind == 0 {
            break;
        }
        if *kind == NIDT_CSI {
            return data.first().copied().unwrap_or(0);
        }
        rest = data.get(usize::from(*len)..).unwrap_or_default();
    }
    0
}

fn geometry_of(
    options: &PassthroughOptions,
    controller: &IdentifyController,
    namespace: &IdentifyNamespace,
) -> Result<Geometry, OpenError> {
    let path = options.path.display();
    let Some(format) = namespace.current_format() else {
        return Err(OpenError::new(
            format!("{path} does not say which LBA format it has"),
            "format the namespace (nvme format), or use another",
        ));
    };
    if format.ms != 0 {
        return Err(OpenError::new(
            format!("{path} has {} bytes of metadata with each block", format.ms),
            "format the namespace without metadata (nvme id-ns -H lists the formats, nvme format --lbaf=N chooses one)",
        ));
    }
    let block_shift = u32::from(format.lbads);
    if block_shift != 9 && block_shift != 12 {
        return Err(OpenError::new(
            format!("{path} has blocks of 2^{block_shift} bytes"),
            "format the namespace with 512 or 4096 (nvme id-ns -H lists the formats, nvme format --lbaf=N chooses one)",
        ));
    }
    // Refuses what no file could have, so that byte numbers never overflow.
    geometry::bytes_of(namespace.nsze, block_shift)?;
    let optimal_blocks = match namespace.nsfeat.optperf() {
        true => u32::from(namespace.npwg_z) + 1,
        false => 1,
    };
    Ok(Geometry {
        block_shift,
        blocks: namespace.nsze,
        read_only: options.read_only,
        volatile_write_cache: controller.vwc.present(),
        // DLFEAT bits 2:0 are 1: deallocated blocks read as zeroes.
        deallocate_reads_zero: namespace.dlfeat.read() == DeallocatedRead::ZEROES,
        thin: namespace.nsfeat.thin(),
        optimal_blocks,
    })
}

fn limits_of(
    controller: &IdentifyController,
    nvm: Option<&NvmControllerIdentify>,
    block_shift: u32,
    max_bytes: Option<u64>,
    max_segments: Option<u64>,
) -> Limits {
    // Powers of two in units of the smallest page, which we take for 4 KiB: more would only be split less.
    let unit = |power: u8| {
        PAGE.checked_shl(power.into())
            .filter(|bytes| bytes >> power == PAGE)
    };
    let mdts = match controller.mdts {
        0 => None,
        power => unit(power),
    };
    let segments = max_segments.map_or(16, |n| n.clamp(1, 1024));
    // Every page can be a segment of its own, and a page more if the first begins inside one.
    let by_segments = segments.saturating_sub(1).max(1) * PAGE;
    let bytes = max_bytes
        .or(mdts)
        .unwrap_or(CAREFUL)
        .min(mdts.unwrap_or(u64::MAX))
        .min(by_segments)
        .max(PAGE);
    let blocks = |bytes: u64| u32::try_from((bytes >> block_shift).clamp(1, 1 << 16)).unwrap_or(1);
    // Devices that do not tell a limit of their own do not always mean that there is none: then that of transfers holds.
    let own = |power: Option<u8>| match power.filter(|p| *p != 0).and_then(unit) {
        Some(own) => blocks(own),
        None => blocks(mdts.unwrap_or(u64::MAX)),
    };
    let range = nvm.map_or(0, |n| n.dmrsl);
    let command = nvm.map_or(0, |n| u32::try_from(n.dmsl).unwrap_or(u32::MAX));
    let deallocate = [range, command].into_iter().filter(|n| *n != 0).min();
    Limits {
        bytes: usize::try_from(bytes).unwrap_or(BOUNCE_BYTES),
        segments: segments as usize,
        verify: own(nvm.map(|n| n.vsl)),
        zeroes: own(nvm.map(|n| n.wzsl)),
        deallocate: deallocate.unwrap_or(u32::MAX),
    }
}

/// A limit of the block device of the same name, as the kernel's driver sees it.
fn queue_limit(disk: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/sys/block/{disk}/queue/{name}")).ok()?;
    text.trim().parse().ok().filter(|n| *n > 0)
}

/// Open the block device of the same namespace for ourselves alone: fails if it, or a partition of it, is mounted or otherwise in
/// use, and keeps others from mounting it. Who only reads does not need that.
fn claim(options: &PassthroughOptions, disk: &str) -> Result<Option<File>, OpenError> {
    if options.read_only {
        return Ok(None);
    }
    let path = PathBuf::from("/dev").join(disk);
    // Who closed it a moment ago may not be quite done, or is dead, and its commands are not.
    let mut patience = file::Patience::new(&options.path, options.after.wait.max(file::SHORT));
    loop {
        let result = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_EXCL)
            .open(&path);
        match result {
            Ok(file) => return Ok(Some(file)),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) && patience.wait() => {}
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                return Err(OpenError::io(
                    format!(
                        "{} is in use through {}",
                        options.path.display(),
                        path.display()
                    ),
                    "unmount it and its partitions, end who else has it, or make the namespace read-only",
                    e,
                ));
            }
            Err(e) => {
                tracing::warn!(
                    path = %path.display(),
                    cause = %e,
                    "cannot claim the block device of an NVMe namespace; make sure that nobody mounts it"
                );
                return Ok(None);
            }
        }
    }
}

fn cannot(options: &PassthroughOptions, what: &str, error: io::Error) -> OpenError {
    let hint = match error.raw_os_error() {
        Some(libc::ENOENT) => {
            "give a /dev/ngXnY that exists (Linux 5.13 or later makes one for each namespace)"
        }
        Some(libc::EACCES | libc::EPERM) => {
            "give this user the permission, or run as root: the kernel lets others send only few commands"
        }
        Some(libc::EMFILE | libc::ENFILE) => "raise the limit of open files (ulimit -n)",
        Some(libc::ENOTTY) => "name a /dev/ngXnY",
        _ => "check the path, and the device in the kernel's log",
    };
    OpenError::io(
        format!("cannot {what} {}", options.path.display()),
        hint,
        error,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvme_spec::identify::{Dlfeat, LbaFormat, Nsfeat, Oncs, Vwc};

    #[test]
    fn names_of_generic_devices() {
        assert_eq!(disk_of("ng0n1").as_deref(), Some("nvme0n1"));
        assert_eq!(disk_of("ng12n345").as_deref(), Some("nvme12n345"));
        for bad in [
            "nvme0n1", "ng0", "ngn1", "ng0n", "ng0n1p1", "ng-1n1", "null",
        ] {
            assert_eq!(disk_of(bad), None, "{bad}");
        }
    }

    #[test]
    fn command_sets_are_found_behind_other_descriptors() {
        let mut list = vec![0; 4096];
        assert_eq!(command_set(&list), 0);
        list[..4].copy_from_slice(&[3, 16, 0, 0]);
        list[20..25].copy_from_slice(&[4, 1, 0, 0, 2]);
        assert_eq!(command_set(&list), 2);
        // Lengths that lead out of the list, or to its very end.
        assert_eq!(command_set(&[1, 255, 0, 0, 4, 1, 0, 0, 2]), 0);
        assert_eq!(command_set(&[4, 1, 0, 0]), 0);
        assert_eq!(command_set(&[1; 7]), 0);
    }

    fn options() -> PassthroughOptions {
        PassthroughOptions {
            path: "/dev/ng0n1".into(),
            read_only: false,
            after: Default::default(),
        }
    }

    #[test]
    fn formats_that_do_not_fit_are_refused_with_a_way_out() {
        let controller = IdentifyController {
            vwc: Vwc::new().with_present(true),
            oncs: Oncs::new(),
            ..IdentifyController::default()
        };
        let mut ns = IdentifyNamespace {
            nsze: 1000,
            nlbaf_z: 1,
            dlfeat: Dlfeat::new().with_read(DeallocatedRead::ZEROES),
            nsfeat: Nsfeat::new().with_optperf(true),
            npwg_z: 7,
            ..IdentifyNamespace::default()
        };
        ns.lbaf[0] = LbaFormat {
            ms: 0,
            lbads: 9,
            rp: 0,
        };
        let g = geometry_of(&options(), &controller, &ns).unwrap();
        assert_eq!(
            (g.block_shift, g.blocks, g.optimal_blocks, g.thin),
            (9, 1000, 8, false)
        );
        assert!(g.deallocate_reads_zero && g.volatile_write_cache);
        let fails = |ns: &IdentifyNamespace| {
            let e = geometry_of(&options(), &controller, ns).unwrap_err();
            format!("{e}")
        };
        ns.lbaf[0].ms = 8;
        assert!(fails(&ns).contains("8 bytes of metadata"));
        ns.lbaf[0] = LbaFormat {
            ms: 0,
            lbads: 16,
            rp: 0,
        };
        assert!(fails(&ns).contains("2^16"));
        ns.lbaf[0].lbads = 12;
        for nsze in [0, u64::MAX, 1 << 52] {
            ns.nsze = nsze;
            fails(&ns);
        }
    }

    #[test]
    fn limits_are_the_tightest_that_anybody_names() {
        let mut controller = IdentifyController {
            mdts: 7,
            ..IdentifyController::default()
        };
        let l = limits_of(&controller, None, 9, Some(512 << 10), Some(127));
        assert_eq!((l.bytes, l.segments), (126 * 4096, 127));
        assert_eq!((l.verify, l.zeroes, l.deallocate), (1024, 1024, u32::MAX));
        let nvm = NvmControllerIdentify {
            vsl: 1,
            wzsl: 20,
            dmrsl: 500,
            dmsl: 100,
            ..NvmControllerIdentify::default()
        };
        let l = limits_of(&controller, Some(&nvm), 12, Some(128 << 10), Some(1024));
        assert_eq!((l.bytes, l.segments), (128 << 10, 1024));
        assert_eq!((l.verify, l.zeroes, l.deallocate), (2, 1 << 16, 100));
        // A device that says nothing, or nonsense.
        controller.mdts = 0;
        let l = limits_of(&controller, None, 9, None, None);
        assert_eq!((l.bytes, l.zeroes), (15 * 4096, 1 << 16));
        controller.mdts = 255;
        let l = limits_of(&controller, None, 9, Some(1), Some(1));
        assert_eq!((l.bytes, l.segments), (4096, 1));
    }
}
