//! The load generator against a daemon in this process: that it runs, and that what it says can be.

use std::process::Command;

use guest_tests::daemon::{Disk, Plan, TestDaemon};
use serde_json::Value;

fn polled_guest(daemon: &TestDaemon, arguments: &str) -> Value {
    let out = Command::new(env!("CARGO_BIN_EXE_polled-guest"))
        .args(arguments.split_whitespace())
        .arg("--socket")
        .arg(daemon.socket(0))
        .output()
        .expect("the program");
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{arguments}: {stderr}");
    serde_json::from_slice(&out.stdout).expect("JSON")
}

/// A rate above 0, and times in order.
fn sane(row: &Value) {
    let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key}: {row}"));
    assert!(number("iops") > 0.0, "{row}");
    let times = ["p50_ns", "p99_ns", "p999_ns", "max_ns"].map(number);
    assert!(times[0] > 0.0 && times.is_sorted(), "{row}");
    assert!(
        number("avg_ns") > 0.0 && number("avg_ns") <= times[3] * 1.01,
        "{row}"
    );
}

#[test]
fn loads_of_every_kind() {
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 16384)));
    for load in [
        "--fill --op randread --buffers 8",
        "--op randwrite --depth 32 --buffers 8 --batch 3",
        "--op mix --depth 31 --queue-size 32 --queues 3 --buffers 8",
        "--op mix --block-size 512 --depth 8 --interrupts --buffers 8",
        "--op mix --block-size 131072 --depth 8 --buffers 0",
    ] {
        let rows = polled_guest(
            &daemon,
            &format!("load --seconds 0.1 --warm-up 0.05 {load}"),
        );
        let rows = rows.as_array().expect("a row for each guest");
        assert_eq!(rows.len(), 1);
        sane(&rows[0]);
    }
}

#[test]
fn single_commands_and_idle_guests() {
    let daemon = TestDaemon::one(Plan::of(Disk::null(12, 1 << 20)));
    let row = polled_guest(&daemon, "wake --count 20 --pause 500 --buffers 1");
    sane(&row);
    let held = polled_guest(&daemon, "hold --seconds 0.05 --buffers 1");
    assert_eq!(held["guests"], 1);
}

#[test]
fn what_cannot_be_is_refused() {
    let daemon = TestDaemon::one(Plan::of(Disk::null(12, 1 << 20)));
    for (arguments, why) in [
        ("load --depth 256", "below the queue's size"),
        ("load --block-size 512", "not whole blocks of 4096"),
        ("load --nsid 9", "Identify Namespace"),
        ("load --op sideways", "invalid value"),
    ] {
        let out = Command::new(env!("CARGO_BIN_EXE_polled-guest"))
            .args(arguments.split_whitespace())
            .arg("--socket")
            .arg(daemon.socket(0))
            .output()
            .expect("the program");
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(
            !out.status.success() && stderr.contains(why),
            "{arguments}: {stderr}"
        );
    }
}
