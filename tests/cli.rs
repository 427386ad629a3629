//! The program as an operator meets it: what it says, its exit status, and its socket files.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Stdio;

use common::{Client, Daemon, HANDSHAKE, PLAIN, code, program, run};
use rustix::process::Signal;

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn help_explains_itself() {
    let long = run(&["--help"]);
    assert!(long.status.success() && long.stderr.is_empty());
    let long = text(&long.stdout);
    for part in [
        "Usage: vhost-user-nvme",
        "--socket-path <PATH>",
        "--namespace memory,size=1G",
        "--namespace file,path=/srv/disk.img",
        "-device vhost-user-nvme,socket=/tmp/nvme.sock",
        "[[controller.namespace]]",
        "--print-capabilities",
        "SIGTERM",
    ] {
        assert!(long.contains(part), "no '{part}' in:\n{long}");
    }
    let short = text(&run(&["-h"]).stdout);
    assert!(
        short.lines().count() < 60 && short.contains("--help"),
        "{short}"
    );
    let version = text(&run(&["--version"]).stdout);
    assert_eq!(
        version,
        format!("vhost-user-nvme {}\n", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn capabilities_are_json() {
    let out = run(&["--print-capabilities"]);
    assert!(out.status.success() && out.stderr.is_empty());
    let squeezed: String = text(&out.stdout).split_whitespace().collect();
    assert_eq!(squeezed, r#"{"type":"nvme","features":[]}"#);
}

#[test]
fn mistakes_are_told_in_a_line_and_nothing_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let socket = socket.to_str().unwrap();
    let ns = "--namespace";
    for (args, expected) in [
        (
            vec![],
            "nothing to do: give it --socket-path and --namespace, or --config; --help has examples",
        ),
        (
            vec!["--socket-path", socket],
            "there is no namespace; add one with --namespace",
        ),
        (
            vec!["--socket-path", socket, ns, "memory"],
            "a memory namespace needs a size, such as size=1G",
        ),
        (
            vec!["--socket-path", socket, ns, "memory,size=5000"],
            "namespace 1: ",
        ),
        (
            vec!["--socket-path", socket, ns, "file,path=/no/such"],
            "there is no file /no/such; make it with 'truncate -s 10G /no/such'",
        ),
        (
            vec![
                "--socket-path",
                socket,
                ns,
                "memory,size=1M",
                "--cores",
                "99999",
            ],
            "core 99999 does not exist",
        ),
        (
            vec![
                "--socket-path",
                socket,
                ns,
                "memory,size=1M",
                "--queues",
                "65",
            ],
            "queues is 65; it can be 2 to 64",
        ),
        (
            vec![
                "--socket-path",
                socket,
                ns,
                "memory,size=1M",
                "--serial",
                "",
            ],
            "serial '' must have 1 to 20 printable ASCII characters",
        ),
        (
            vec!["--socket-path", "/no/such/dir/s", ns, "memory,size=1M"],
            "there is no directory /no/such/dir; make it first",
        ),
        (
            vec!["--socket-path", "/etc/passwd", ns, "memory,size=1M"],
            "/etc/passwd exists and is not a socket: ",
        ),
        (
            vec!["--config", "/no/such.toml"],
            "cannot read the configuration /no/such.toml: No such file or directory",
        ),
        (
            vec!["--fd", "1", ns, "memory,size=1M"],
            "file descriptor 1 (--fd): is one of stdin, stdout and stderr",
        ),
        (
            vec!["--fd", "77", ns, "memory,size=1M"],
            "file descriptor 77 (--fd): is not open",
        ),
    ] {
        let out = run(&args);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{args:?}: {said}");
        assert!(
            said.contains(expected),
            "{args:?}\n got: {said}want: {expected}"
        );
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(out.stdout.is_empty());
    }
    // Clap's own, which has a hint below.
    for (args, expected) in [
        (vec!["--colour"], "unexpected argument '--colour' found"),
        (
            vec!["--socket-path", socket, ns, "memory,speed=9"],
            "unknown key 'speed'; there are size, path, address, ssd-namespace",
        ),
        (
            vec!["--socket-path", socket, ns, "memory,size=1Q"],
            "the unit is unknown",
        ),
        (
            vec!["--socket-path", socket, "--fd", "3"],
            "cannot be used with",
        ),
        (
            vec!["--socket-path", socket, "--idle", "lazy"],
            "possible values: poll, adaptive, interrupt",
        ),
        (vec!["--cores", "x"], "write 2,3 or 4-7"),
    ] {
        let out = run(&args);
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{args:?}: {said}");
        assert!(
            said.contains(expected),
            "{args:?}\n got: {said}want: {expected}"
        );
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_host_is_checked_line_by_line() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let socket = socket.to_str().unwrap();
    let disk = ["--namespace", "memory,size=1M"];
    let check = |args: &[&str], status: i32| {
        let all: Vec<_> = std::iter::once("check")
            .chain(args.iter().copied())
            .collect();
        let out = run(&all);
        let said = text(&out.stdout) + &text(&out.stderr);
        assert_eq!(out.status.code(), Some(status), "{args:?}: {said}");
        said
    };
    let good = check(&["--socket-path", socket, disk[0], disk[1]], 0);
    assert!(
        good.contains("ok    s                namespace 1"),
        "{good}"
    );
    assert!(good.ends_with("this host can serve it\n"), "{good}");
    assert!(!dir.path().join("s").exists(), "nothing is made");

    let bad = check(&["--socket-path", "/no/such/dir/s", disk[0], disk[1]], 1);
    assert!(bad.contains("FAIL  s                the socket"), "{bad}");
    assert!(bad.contains("1 of "), "{bad}");

    let ssd = check(&["fffe:fe:1f.7"], 20);
    assert!(ssd.contains("FAIL  fffe:fe:1f.7"), "{ssd}");
    assert!(ssd.contains("mend: "), "{ssd}");
    let given = check(
        &["--socket-path", socket, "--namespace", "nvme:fffe:fe:1f.7"],
        20,
    );
    assert!(given.contains("there is no PCI device"), "{given}");

    check(&["0000:01:00"], 2);
    check(&disk, 2);
    check(&["--help"], 0);
}

#[test]
fn a_file_is_checked_with_its_lines() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("c.toml");
    let socket = dir.path().join("s");
    let good = format!(
        "[[controller]]\nsocket-path = \"{}\"\n[[controller.namespace]]\nbackend = \"null\"\nsize = \"1G\"\n",
        socket.display()
    );
    let args = ["--check-config", "--config", config.to_str().unwrap()];
    std::fs::write(&config, format!("{good}speed = 1\n")).unwrap();
    let out = run(&args);
    assert_eq!(out.status.code(), Some(2));
    let expected = format!("{}:6: unknown field `speed`", config.display());
    assert!(
        text(&out.stderr).contains(&expected),
        "{}",
        text(&out.stderr)
    );
    std::fs::write(&config, good).unwrap();
    let out = run(&args);
    let said = text(&out.stdout);
    assert!(
        said.starts_with(
            "ok: controllers: 1, namespaces: 1, pollers: 1\ncontroller 's': no state yet"
        ),
        "{said}"
    );
    assert!(out.status.success() && !socket.exists());
}

#[test]
fn it_starts_says_how_to_attach_and_ends_cleanly() {
    for signal in [Signal::TERM, Signal::INT] {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("nvme.sock");
        let path = socket.to_str().unwrap();
        let ns = "memory,size=16M,block-size=512,huge-pages=never";
        let args = [
            "--socket-path",
            path,
            "--socket-mode",
            "0600",
            "--namespace",
            ns,
        ];
        let mut daemon = Daemon::start(dir.path(), &args);
        daemon.line("waits for a virtual machine");
        daemon.line("-object memory-backend-memfd,id=mem,size=2G,share=on");
        daemon.line(&format!("-device vhost-user-nvme,socket={path}"));
        let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        // With a front-end connected, and one in the middle of a message.
        let c = Client::handshake(&socket);
        c.raw(&[1, 2], &[]);
        daemon.signal(signal);
        let status = daemon.wait();
        assert_eq!(status.code(), Some(0), "{}", daemon.log());
        assert!(!socket.exists(), "the socket is removed");
        daemon.line("stopped");
    }
}

#[test]
fn a_live_socket_is_kept_and_a_stale_one_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let args = [
        "--socket-path",
        socket.to_str().unwrap(),
        "--namespace",
        "null,size=1G",
    ];
    let mut daemon = Daemon::start(dir.path(), &args);
    daemon.line("-device");
    let out = run(&args);
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("is in use: a process listens there"));
    Client::handshake(&socket);
    daemon.signal(Signal::KILL);
    daemon.wait();
    assert!(socket.exists(), "nobody could remove it");
    let mut daemon = Daemon::start(dir.path(), &args);
    daemon.line("-device");
    Client::handshake(&socket);
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait().code(), Some(0));
}

#[test]
fn json_lines() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let args = [
        "--log-format",
        "json",
        "--socket-path",
        socket.to_str().unwrap(),
        "--namespace",
        "null,size=1G",
    ];
    let mut daemon = Daemon::start(dir.path(), &args);
    let line = daemon.line("\"message\":\"listening\"");
    assert!(line.starts_with('{') && line.ends_with('}'), "{line}");
    assert!(
        line.contains("\"qemu_device\":\"-device vhost-user-nvme,socket="),
        "{line}"
    );
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.wait().code(), Some(0));
    assert!(
        daemon.log().lines().all(|l| l.starts_with('{')),
        "{}",
        daemon.log()
    );
}

#[test]
fn an_inherited_socket_is_used() {
    // Std passes on no file descriptor but 0 to 2, so a shell makes 3 out of 0.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let start = |socket: std::os::fd::OwnedFd| {
        std::process::Command::new("bash")
            .args([
                "-c",
                "exec \"$0\" --fd 3 --namespace null,size=1G 3<&0 0</dev/null",
            ])
            .arg(program().get_program())
            .stdin(Stdio::from(socket))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let listener = UnixListener::bind(&path).unwrap();
    let mut child = start(listener.into());
    for _ in 0..2 {
        let mut c = Client::connect(&path);
        for step in 0..HANDSHAKE {
            c.step(step);
        }
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(path.exists(), "it is not ours to remove");
    // A connected one: the daemon ends with it.
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(common::PATIENCE)).unwrap();
    let mut child = start(theirs.into());
    let mut c = Client { stream: ours };
    c.send(code::GET_FEATURES, PLAIN, &[], &[]);
    assert_eq!(c.answer().unwrap().0, code::GET_FEATURES);
    drop(c);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_closed_stdout_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut child = program()
        .args([
            "--socket-path",
            socket.to_str().unwrap(),
            "--namespace",
            "null,size=1G",
        ])
        .stdout(writer)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    Client::handshake(&socket);
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
