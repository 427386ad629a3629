//! The conformance suite on devices of this host, which takes root or somebody who names them.

use super::*;

/// Needs SSDs, whose data it destroys: their generic devices, with colons between.
#[test]
fn passed_through_ssds_conform() {
    let Ok(paths) = std::env::var("VHOST_USER_NVME_TEST_SSDS") else {
        eprintln!("NOT TESTED: passthrough: there is no VHOST_USER_NVME_TEST_SSDS");
        return;
    };
    for path in paths.split(':') {
        let options = PassthroughOptions {
            path: path.into(),
            read_only: false,
            after: Default::default(),
        };
        let backend = Backend::passthrough(options.clone()).unwrap();
        eprintln!("{}", backend.describe());
        let few = Promise {
            streams: 3,
            ..STORES
        };
        conformance::run(&backend, few);
        assert!(Backend::passthrough(options.clone()).is_err(), "it is ours");
        drop(backend);
        let read_only = PassthroughOptions {
            read_only: true,
            ..options
        };
        conformance::run(&Backend::passthrough(read_only).unwrap(), few);
    }
}

/// Needs block devices with poll queues, whose data it destroys.
#[test]
fn polled_devices_conform() {
    let Ok(paths) = std::env::var("VHOST_USER_NVME_TEST_IOPOLL") else {
        eprintln!("NOT TESTED: iopoll: there is no VHOST_USER_NVME_TEST_IOPOLL");
        return;
    };
    for path in paths.split(':').map(Path::new) {
        let options = |iopoll| FileOptions {
            iopoll,
            ..file_options(path, 12, true)
        };
        for iopoll in [IoPoll::Required, IoPoll::Auto, IoPoll::Never] {
            let backend = Backend::file(options(iopoll)).unwrap();
            let polled = backend.describe().contains("O_DIRECT, polled");
            assert_eq!(polled, iopoll != IoPoll::Never);
            let few = Promise {
                streams: 3,
                ..STORES
            };
            conformance::run(&backend, few);
            assert_eq!(backend.describe().contains("O_DIRECT, polled"), polled);
        }
    }
}

/// Runs a command; `None`, said loudly, if it fails (no root, no such tool).
fn try_command(test: &str, program: &str, args: &[&str]) -> Option<String> {
    let output = std::process::Command::new(program).args(args).output();
    match output {
        Ok(o) if o.status.success() => Some(String::from_utf8_lossy(&o.stdout).trim().to_owned()),
        Ok(o) => {
            let stderr = String::from_utf8_lossy(&o.stderr);
            eprintln!("NOT TESTED: {test}: {program} {args:?}: {}", stderr.trim());
            None
        }
        Err(e) => {
            eprintln!("NOT TESTED: {test}: {program}: {e}");
            None
        }
    }
}

/// Undoes something when it goes.
struct Undo(Vec<String>);

impl Drop for Undo {
    fn drop(&mut self) {
        let result = std::process::Command::new(&self.0[0])
            .args(&self.0[1..])
            .status();
        assert!(
            std::thread::panicking() || result.is_ok_and(|s| s.success()),
            "{:?}",
            self.0
        );
    }
}

#[test]
fn a_full_disk_is_capacity_exceeded() {
    let test = "a full disk";
    let dir = on_disk();
    let at = dir.path().to_str().unwrap();
    let args = ["-t", "tmpfs", "-o", "size=1m", "none", at];
    if try_command(test, "mount", &args).is_none() {
        return;
    }
    let _undo = Undo(vec!["umount".into(), at.into()]);
    let path = make(dir.path(), "disk", 4 * MIB);
    let backend = open(&path, 12, true);
    let mut c = Client::new(&backend, 1);
    let data = vec![1; 256 << 10];
    let mut statuses = (0..8).map(|i| c.run(WRITE, i * 64, 64, Some(&data), Layout::Pages(4)));
    assert_eq!(statuses.next(), Some(Status::SUCCESS));
    let full = statuses.find(|s| *s != Status::SUCCESS);
    assert_eq!(full, Some(Status::CAPACITY_EXCEEDED));
    // Room again once something is given back.
    c.wipe();
    c.write(0, &data, Layout::Whole(0));
}

#[test]
fn block_devices_conform_and_their_errors_show() {
    let test = "block devices";
    let dir = on_disk();
    let backing = make(dir.path(), "backing", 8 * MIB);
    for (sector, block_shift) in [("512", 9), ("512", 12), ("4096", 12), ("4096", 9)] {
        let backing = backing.to_str().unwrap();
        let args = ["--show", "-f", "-b", sector, backing];
        let Some(device) = try_command(test, "losetup", &args) else {
            return;
        };
        let _undo = Undo(vec!["losetup".into(), "-d".into(), device.clone()]);
        let device = Path::new(&device);
        for direct in [true, false] {
            let backend = open(device, block_shift, direct);
            // Sectors larger than our blocks: only through the page cache.
            let possible = direct && (sector, block_shift) != ("4096", 9);
            assert_eq!(is_direct(&backend), possible);
            assert!(Backend::file(file_options(device, 9, direct)).is_err());
            let few = Promise {
                streams: 4,
                ..STORES
            };
            conformance::run(&backend, few);
        }
        if sector == "512" && block_shift == 9 {
            let backend = open(device, 9, true);
            let mut c = Client::new(&backend, 1);
            let file = File::options().write(true).open(backing).unwrap();
            file.set_len(MIB).unwrap();
            for layout in [Layout::Whole(0), Layout::Whole(4)] {
                let status = c.run(Operation::Read, 4096, 8, None, layout);
                assert_eq!(status, Status::UNRECOVERED_READ_ERROR);
            }
            file.set_len(8 * MIB).unwrap();
        }
    }
}
