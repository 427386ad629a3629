//! What is made of what was said, and of what was left out.

mod refused;

use super::*;
use crate::config::file;

fn resolve_text(text: &str) -> Result<Config, String> {
    let (file, source) = file::parse("t.toml", text.into()).map_err(|e| e.to_string())?;
    resolve(file, Some(&source)).map_err(|e| e.to_string())
}

/// A good configuration with a line put into `[daemon]`, the controller, or the namespace.
fn with(daemon: &str, controller: &str, namespace: &str) -> String {
    format!(
        "[daemon]\n{daemon}\n[[controller]]\nname = \"a\"\nsocket-path = \"/tmp/a.sock\"\n{controller}\n[[controller.namespace]]\n{namespace}\n"
    )
}

const NVME: &str = "backend = \"nvme\"\naddress = \"0000:01:00.0\"";
const MEMORY: &str = "backend = \"memory\"\nsize = \"1G\"";

#[test]
fn defaults() {
    let c = resolve_text(&with("", "", MEMORY)).unwrap();
    assert_eq!(c.pollers.len(), 1);
    assert_eq!(c.pollers[0].core, None);
    assert_eq!(c.pollers[0].idle, IdlePolicy::Adaptive);
    assert_eq!(
        (c.log.level.as_str(), c.log.format),
        ("info", Default::default())
    );
    let c = &c.controllers[0];
    assert_eq!(
        (c.queues, c.queue_entries, c.max_transfer),
        (33, 1024, None)
    );
    assert!(c.doorbell_buffer && c.sgls && c.doorbell_stride == 3 && c.max_namespaces == 1);
    let ns = &c.namespaces[0];
    assert_eq!((ns.nsid, ns.block_shift, ns.read_only), (1, 12, false));
    assert_eq!(ns.identity, "a/1/memory");
}

#[test]
fn derived_names_stay_and_differ() {
    let one = resolve_text(&with("", "", MEMORY)).unwrap();
    // These are in the by-id links of guests: they must never change.
    assert_eq!(one.controllers[0].serial, "VUN-FC784657D163F4B5");
    assert_eq!(
        one.controllers[0].subnqn,
        "nqn.2014-08.org.nvmexpress:uuid:242a29c7-daa4-8413-b0f5-4d26e97af283"
    );
    let two = resolve_text(&with("", "", MEMORY).replace("\"a\"", "\"b\"")).unwrap();
    assert_ne!(one.controllers[0].serial, two.controllers[0].serial);
    assert_ne!(one.controllers[0].subnqn, two.controllers[0].subnqn);
    // Without a name the path makes the difference.
    let unnamed = |path: &str| {
        let text =
            format!("[[controller]]\nsocket-path = \"{path}\"\n[[controller.namespace]]\n{MEMORY}");
        resolve_text(&text).unwrap().controllers.remove(0)
    };
    let (x, y) = (unnamed("/run/x/nvme.sock"), unnamed("/run/y/nvme.sock"));
    assert_eq!((x.name.as_str(), y.name.as_str()), ("nvme", "nvme"));
    assert_ne!(x.serial, y.serial);
    assert_ne!(x.namespaces[0].identity, y.namespaces[0].identity);
}

#[test]
fn a_transport_and_a_directory_for_its_socket() {
    let dir = tempfile::tempdir().unwrap();
    let shown = dir.path().display();
    let made = |transport: &str| {
        let text = format!(
            "[[controller]]\n{transport}\nsocket-path = \"{shown}\"\n[[controller.namespace]]\n{MEMORY}"
        );
        resolve_text(&text).unwrap().controllers.remove(0)
    };
    let path = |c: &ControllerSpec| match &c.socket {
        Socket::Path { path, .. } => path.clone(),
        Socket::Fd(_) => panic!("a path"),
    };
    let vfio = made("transport = \"vfio-user\"");
    assert_eq!(vfio.transport, Transport::VfioUser);
    assert_eq!(path(&vfio), dir.path().join("cntrl"));
    assert_eq!(
        Some(vfio.name.as_str()),
        dir.path().file_name().unwrap().to_str()
    );
    let vhost = made("");
    assert_eq!(
        (vhost.transport, path(&vhost)),
        (Transport::VhostUser, dir.path().into())
    );
    let e = resolve_text(&with("", "transport = \"tcp\"", MEMORY)).unwrap_err();
    assert!(e.starts_with("t.toml:6: unknown variant `tcp`"), "{e}");
}

#[test]
fn everything_that_can_be_said() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.img");
    std::fs::write(&disk, [0; 8192]).unwrap();
    let text = format!(
        r#"
[daemon]
log-level = "debug"
log-format = "json"
pollers = 2
idle = "poll"
poll-us = 7
slots = 99

[[controller]]
name = "vm1"
socket-path = "/tmp/vm1.sock"
socket-mode = "0660"
socket-group = "0"
serial = "S1"
model = "M1"
subnqn = "nqn.2026-01.org.example:vm1"
queues = 5
queue-entries = 4096
max-transfer = "128K"
max-namespaces = 8
doorbell-buffer = false
sgls = false
doorbell-stride = 0
pci-ids = [0x1234, 0x5678, 0x9ABC, 0xDEF0]

[[controller.namespace]]
backend = "file"
path = "{}"
direct = false
block-size = 512
read-only = true
uuid = "12345678-9abc-def0-1234-56789abcdef0"
nguid = "00112233445566778899aabbccddeeff"
eui64 = "0011223344556677"

[[controller.namespace]]
nsid = 7
backend = "null"
size = 4096

[controller.namespace.danger-zone]
i-want-broken-io = true
delay-us = 10
fault = [{{ operations = ["read"], blocks = [3, 4], skip = 1, count = 2, action = "never-complete" }}]
"#,
        disk.display()
    );
    let c = resolve_text(&text).unwrap();
    assert_eq!((c.pollers.len(), c.pollers[1].slots), (2, 99));
    assert_eq!(c.pollers[0].poll_for, Duration::from_micros(7));
    let c = &c.controllers[0];
    assert_eq!(
        c.socket,
        Socket::Path {
            path: "/tmp/vm1.sock".into(),
            mode: Some(0o660),
            group: Some(0)
        }
    );
    assert_eq!((c.serial.as_str(), c.model.as_str()), ("S1", "M1"));
    assert_eq!(
        (c.queues, c.queue_entries, c.max_transfer),
        (5, 4096, Some(131_072))
    );
    assert_eq!(c.pci_ids, [0x1234, 0x5678, 0x9ABC, 0xDEF0]);
    assert!(!c.doorbell_buffer && !c.sgls && c.doorbell_stride == 0 && c.max_namespaces == 8);
    let [one, two] = c.namespaces.as_slice() else {
        panic!("two namespaces");
    };
    assert_eq!(
        one.store,
        StoreSpec::File {
            path: disk,
            direct: false,
            iopoll: crate::config::IoPoll::Auto,
        }
    );
    assert_eq!((one.block_shift, one.read_only), (9, true));
    assert_eq!(one.uuid.map(|u| u[..2].to_vec()), Some(vec![0x12, 0x34]));
    assert_eq!(
        one.eui64,
        Some([0, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77])
    );
    assert_eq!(
        (two.nsid, &two.store),
        (7, &StoreSpec::Null { bytes: 4096 })
    );
    assert_eq!(two.danger_zone.as_ref().unwrap().fault.len(), 1);
}

#[test]
fn ssds_are_found_with_what_is_said_of_them() {
    let ssd = "[[ssd]]\naddress = \"0000:01:00.0\"\ncommand-timeout-ms = 2000\non-reset = \"fail\"";
    let second = "[[controller.namespace]]\nbackend = \"nvme\"\naddress = \"0000:02:00.1\"\nssd-namespace = 3\noffset = \"1M\"\nsize = \"2G\"";
    let c = resolve_text(&with("", "", &format!("{NVME}\n{second}\n{ssd}"))).unwrap();
    let [one, two] = &c.ssds[..] else {
        panic!("{:?}", c.ssds);
    };
    assert_eq!(one.address.to_string(), "0000:01:00.0");
    assert_eq!(
        (one.command_timeout.as_secs(), one.abort_grace.as_secs()),
        (2, 5)
    );
    assert_eq!(one.on_reset, super::super::OnReset::Fail);
    assert_eq!(two.on_reset, super::super::OnReset::Resubmit);
    let [first, second] = &c.controllers[0].namespaces[..] else {
        panic!("{:?}", c.controllers);
    };
    assert_eq!(first.identity, "a/1/nvme 0000:01:00.0 1 0");
    let store = StoreSpec::Nvme {
        address: two.address,
        nsid: 3,
        offset: 1 << 20,
        bytes: Some(2 << 30),
    };
    assert_eq!(second.store, store);
    assert!(!c.controllers[0].sgls, "an SSD is given PRPs only");
    let wanted = resolve_text(&with("", "sgls = true", NVME)).unwrap_err();
    assert!(wanted.contains("leave sgls out"), "{wanted}");
    let quick =
        crate::config::quick::namespace("nvme:0000:02:00.1,ssd-namespace=3,offset=1M,size=2G");
    let quick = quick.unwrap();
    assert_eq!(super::ssds::store(&quick).unwrap().0, store);
}

#[test]
fn twins_are_refused() {
    let two = |a: &str, b: &str, store: &str| {
        format!(
            "[[controller]]\n{a}\n[[controller.namespace]]\n{store}\n[[controller]]\n{b}\n[[controller.namespace]]\n{store}\n"
        )
    };
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("d");
    std::fs::write(&disk, [0; 4096]).unwrap();
    let file = format!("backend = \"file\"\npath = \"{}\"", disk.display());
    let (a, b) = (
        "name = \"a\"\nsocket-path = \"/tmp/a\"",
        "name = \"b\"\nsocket-path = \"/tmp/b\"",
    );
    for (text, expected) in [
        (
            two(a, a, MEMORY),
            "there are two controllers called 'a'; give each a name of its own",
        ),
        (
            two(a, "name = \"b\"\nsocket-path = \"/tmp/a\"", MEMORY),
            "controllers 'a' and 'b' have the same socket-path /tmp/a; give each its own",
        ),
        (
            two(
                &format!("{a}\nserial = \"1\""),
                &format!("{b}\nserial = \"1\""),
                MEMORY,
            ),
            "controllers 'a' and 'b' have the same serial '1'; give each its own",
        ),
        (
            two(
                &format!("{a}\nsubnqn = \"nqn.x\""),
                &format!("{b}\nsubnqn = \"nqn.x\""),
                MEMORY,
            ),
            "controllers 'a' and 'b' have the same subnqn 'nqn.x'; give each its own",
        ),
        (
            two(a, b, &file),
            "namespace 1 of 'a' and namespace 1 of 'b' use the same file",
        ),
    ] {
        let e = resolve_text(&text).unwrap_err();
        assert!(e.contains(expected), "\n got: {e}\nwant: {expected}");
        assert!(e.starts_with("t.toml:"), "{e}");
    }
    assert!(resolve_text(&two(a, b, MEMORY)).is_ok());
}

#[test]
fn the_example_is_good_also_with_what_is_commented_out() {
    let text = include_str!("../../../docs/example.toml");
    let c = resolve_text(text).unwrap();
    assert_eq!(c.controllers[0].namespaces.len(), 2);
    // Each commented-out key exists: uncommented, none is unknown.
    let (keys, danger) = text.split_once("# For tests only").unwrap();
    let keys = keys.lines().filter_map(|l| {
        let (key, value) = l.strip_prefix("# ")?.split_once(" = ")?;
        (!key.contains(' ') && !key.starts_with('{')).then_some((key, value))
    });
    let mut seen = 0;
    for (key, value) in keys {
        let line = format!("{key} = {value}");
        let mut one = text.replacen(&format!("# {line}"), &line, 1);
        if one
            .split_once("# [[ssd]]")
            .is_some_and(|(_, ssd)| ssd.contains(&format!("\n{line}")))
        {
            one = one.replacen("# [[ssd]]", "[[ssd]]", 1);
        }
        if let Err(e) = resolve_text(&one) {
            assert!(!e.contains("unknown field"), "{e}");
        }
        seen += 1;
    }
    assert!(seen > 20, "{seen}");
    let danger: String = danger
        .lines()
        .filter_map(|l| l.strip_prefix("# "))
        .map(|l| format!("{l}\n"))
        .collect();
    let c = resolve_text(&format!("{text}\n{danger}")).unwrap();
    let zone = c.controllers[0].namespaces[1].danger_zone.as_ref();
    assert_eq!(zone.map(|z| z.fault.len()), Some(1));
}

#[test]
fn placement_names_pollers_that_exist() {
    use crate::controller::{Placement, Policy};
    let placed = |daemon: &str, controller: &str| {
        resolve_text(&with(daemon, controller, MEMORY)).map(|c| c.controllers[0].placement.clone())
    };
    assert_eq!(placed("", ""), Ok(Placement::default()));
    let packed = placed("pollers = 3", "placement = \"packed\"\npollers = [2, 0]").unwrap();
    assert_eq!(packed.policy, Policy::Packed);
    assert!(packed.allows(2) && packed.allows(0) && !packed.allows(1));
    let numa = placed("cores = [0]", "placement = \"numa\"").unwrap();
    assert_eq!(numa.policy, Policy::Numa);
    for (daemon, controller, why) in [
        ("pollers = 2", "pollers = [2]", "there is no poller 2"),
        ("pollers = 2", "pollers = []", "pollers is empty"),
        ("pollers = 2", "placement = \"numa\"", "give [daemon] cores"),
        ("", "placement = \"near\"", "unknown variant"),
    ] {
        let error = placed(daemon, controller).unwrap_err();
        assert!(error.contains(why), "{error}");
    }
}
