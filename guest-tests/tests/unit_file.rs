//! The unit file for systemd, as systemd sees it.

use std::io::Write as _;
use std::process::Command;

const UNIT: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../dist/vhost-user-nvme.service"
);

#[test]
fn systemd_finds_nothing_wrong_with_the_unit() {
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(UNIT).unwrap();
    // A program that is there, so that only the unit is judged.
    let text = text.replace("/usr/local/bin/vhost-user-nvme", "/bin/true");
    let unit = dir.path().join("vhost-user-nvme.service");
    std::fs::write(&unit, text).unwrap();
    let verify = Command::new("systemd-analyze")
        .args(["--man=no", "verify"])
        .arg(&unit)
        .output();
    let out = match verify {
        Ok(out) => out,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            // Not by `eprintln!`, whose output is shown of tests that fail only.
            let skipped = "SKIPPED: the unit file was not verified, for there is no systemd-analyze (Debian: package systemd)";
            writeln!(std::io::stderr(), "{skipped}").unwrap();
            return;
        }
        Err(e) => panic!("{e}"),
    };
    let said = String::from_utf8_lossy(&out.stderr);
    let about_us: Vec<_> = said
        .lines()
        .filter(|line| line.contains("vhost-user-nvme"))
        .collect();
    assert!(about_us.is_empty(), "{said}");
    assert!(out.status.success(), "{said}");
}

#[test]
fn what_recovery_needs_is_in_the_unit() {
    let text = std::fs::read_to_string(UNIT).unwrap();
    for line in [
        "Type=notify",
        "Restart=on-failure",
        "RuntimeDirectory=vhost-user-nvme",
        "RuntimeDirectoryPreserve=yes",
        "ExecReload=/usr/local/bin/vhost-user-nvme upgrade --pid $MAINPID",
        // What waits for the end of a process that took over, which systemd does not.
        r#"ExecStop=-/bin/sh -c 'kill -TERM "$MAINPID" && exec tail --pid="$MAINPID" -s 0.1 -f /dev/null'"#,
    ] {
        assert!(text.lines().any(|l| l == line), "{line}");
    }
    assert!(text.lines().any(|l| l.starts_with("WatchdogSec=")));
}
