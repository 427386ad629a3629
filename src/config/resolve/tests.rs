//! What is refused, word by word; and what is made of what was left out.

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
fn what_is_refused_and_how_it_is_said() {
    let cases: &[(String, &str)] = &[
        (
            "".into(),
            "t.toml: there is no controller; add [[controller]] with a socket-path and a [[controller.namespace]]",
        ),
        (
            with("colour = 1", "", MEMORY),
            "t.toml:2: unknown field `colour`, expected one of `log-level`, `log-format`, `cores`, `pollers`, `idle`, `poll-us`, `slots`",
        ),
        (
            with("", "", "backend = \"memory\"\nsize = \"1G\"\nspeed = 9"),
            "t.toml:10: unknown field `speed`, expected one of",
        ),
        (
            with("slots = \"many\"", "", MEMORY),
            "t.toml:2: invalid type: string \"many\", expected usize",
        ),
        (with("= 1", "", MEMORY), "t.toml:2: "),
        (
            with("slots = 0", "", MEMORY),
            "t.toml: slots is 0; it can be 1 to 65536",
        ),
        (
            with("poll-us = 2000000", "", MEMORY),
            "t.toml: poll-us is more than a second; use idle = \"poll\" to never sleep",
        ),
        (
            with("idle = \"lazy\"", "", MEMORY),
            "t.toml:2: unknown variant `lazy`, expected one of `poll`, `adaptive`, `interrupt`",
        ),
        (
            with("cores = [99999]", "", MEMORY),
            "t.toml: core 99999 does not exist, or this process may not use it; it may use ",
        ),
        (
            with("cores = []", "", MEMORY),
            "t.toml: there are 0 pollers; there can be 1 to 1024",
        ),
        (
            with("pollers = 0", "", MEMORY),
            "t.toml: there are 0 pollers; there can be 1 to 1024",
        ),
        (
            with("cores = [0]\npollers = 1", "", MEMORY),
            "t.toml: cores and pollers exclude each other: each core has one poller",
        ),
        (
            with("log-level = \"a=b=c\"", "", MEMORY),
            "t.toml: log-level 'a=b=c' is not one: ",
        ),
        (
            "[[controller]]\nname = \"x\"\n".into(),
            "t.toml:1: controller x has no socket; give it a socket-path",
        ),
        (
            "[[controller]]\nsocket-path = \"/tmp/x\"\n".into(),
            "t.toml:1: controller 'x': there is no namespace; add one with --namespace or [[controller.namespace]]",
        ),
        (
            with("", "socket-mode = \"rw\"", MEMORY),
            "t.toml:3: socket-mode 'rw' is not one; write octal digits, such as 0660",
        ),
        (
            with("", "socket-group = \"no such group\"", MEMORY),
            "t.toml:3: socket-group 'no such group' is not a group of this host; see /etc/group",
        ),
        (
            with("", "serial = \"\"", MEMORY),
            "t.toml:3: controller 'a': serial '' must have 1 to 20 printable ASCII characters",
        ),
        (
            with("", "model = \"\\u00e9\"", MEMORY),
            "t.toml:3: controller 'a': model 'é' must have 1 to 40 printable ASCII characters",
        ),
        (
            with("", "subnqn = \"x\"", MEMORY),
            "t.toml:3: controller 'a': subnqn 'x' is not a qualified name: it starts with 'nqn.' and has at most 223 bytes",
        ),
        (
            with("", "queues = 1", MEMORY),
            "t.toml:3: controller 'a': queues is 1; it can be 2 to 64, the admin queue included",
        ),
        (
            with("", "queue-entries = 1", MEMORY),
            "t.toml:3: controller 'a': queue-entries is 1; it can be 2 to 65536",
        ),
        (
            with("", "max-transfer = \"3K\"", MEMORY),
            "t.toml:3: controller 'a': max-transfer is 3072 bytes; it can be 4K, 8K, 16K and so on up to 1M",
        ),
        (
            with("", "max-transfer = \"2M\"", MEMORY),
            "t.toml:3: controller 'a': max-transfer is 2097152 bytes; it can be 4K, 8K, 16K and so on up to 1M",
        ),
        (
            with("", "doorbell-stride = 11", MEMORY),
            "t.toml:3: controller 'a': doorbell-stride is 11; it can be 0 to 10 (2 to its power, times 4 bytes)",
        ),
        (
            with("", "max-namespaces = 0", MEMORY),
            "t.toml:3: controller 'a': max-namespaces is 0; it can be 1, the highest nsid, to 1024",
        ),
        (
            with("", "", "size = \"1G\""),
            "t.toml:7: controller 'a': namespace 1: it has no backend; there are null, memory, file, nvme-passthrough and nvme",
        ),
        (
            with("", "", "backend = \"cloud\""),
            "t.toml:7: controller 'a': namespace 1: there is no backend 'cloud'; there are null, memory, file, nvme-passthrough and nvme",
        ),
        (
            with("", "", "backend = \"memory\""),
            "t.toml:7: controller 'a': namespace 1: a memory namespace needs a size, such as size=1G",
        ),
        (
            with("", "", "backend = \"memory\"\nsize = 5000"),
            "t.toml:7: controller 'a': namespace 1: ",
        ),
        (
            with("", "", "backend = \"memory\"\nsize = \"1X\""),
            "t.toml:9: '1X' is not a size: the unit is unknown; write bytes, or a number with K, M, G or T, such as 512M or 10G",
        ),
        (
            with("", "", "backend = \"memory\"\nsize = -1"),
            "t.toml:9: a size cannot be negative",
        ),
        (
            with("", "", "backend = \"memory\"\nsize = \"1G\"\npath = \"/x\""),
            "t.toml:7: controller 'a': namespace 1: 'path' means nothing for a memory namespace; remove it",
        ),
        (
            with("", "", "backend = \"file\""),
            "t.toml:7: controller 'a': namespace 1: a file namespace needs a path, such as path=/srv/disk.img",
        ),
        (
            with("", "", "backend = \"file\"\npath = \"/no/such\""),
            "t.toml:7: controller 'a': namespace 1: there is no file /no/such; make it with 'truncate -s 10G /no/such'",
        ),
        (
            with("", "", "backend = \"file\"\npath = \"/dev/zero\""),
            "t.toml:7: controller 'a': namespace 1: /dev/zero is neither a file nor a block device",
        ),
        (
            with("", "", "backend = \"file\"\npath = \"/x\"\nsize = \"1G\""),
            "t.toml:7: controller 'a': namespace 1: a file namespace is as large as its file; remove 'size', and make the file with 'truncate -s 10G FILE'",
        ),
        (
            with("", "", "backend = \"nvme-passthrough\""),
            "t.toml:7: controller 'a': namespace 1: an nvme-passthrough namespace needs a path, such as path=/dev/ng0n1",
        ),
        (
            with(
                "",
                "",
                "backend = \"nvme-passthrough\"\npath = \"/dev/zero\"\nblock-size = 512",
            ),
            "t.toml:7: controller 'a': namespace 1: an nvme-passthrough namespace has the size and the blocks of its SSD; remove 'size' and 'block-size'",
        ),
        (
            with(
                "",
                "",
                "backend = \"nvme-passthrough\"\npath = \"/no/such\"",
            ),
            "t.toml:7: controller 'a': namespace 1: there is no /no/such; Linux 5.13 and later has a /dev/ngXnY for each NVMe namespace",
        ),
        (
            with("", "", "backend = \"nvme-passthrough\"\npath = \"/dev\""),
            "t.toml:7: controller 'a': namespace 1: /dev is no NVMe generic device: name a /dev/ngXnY, or use backend file",
        ),
        (
            with("", "", "backend = \"nvme\""),
            "t.toml:7: controller 'a': namespace 1: an nvme namespace needs the address of its SSD, such as nvme:0000:01:00.0",
        ),
        (
            with("", "", "backend = \"nvme\"\naddress = \"01\""),
            "t.toml:7: controller 'a': namespace 1: '01' is no PCI address; write it as lspci -D does",
        ),
        (
            with("", "", &format!("{NVME}\nssd-namespace = 0")),
            "t.toml:7: controller 'a': namespace 1: ssd-namespace is 0; an nsid is 1 to 4294967294",
        ),
        (
            with("", "", &format!("{NVME}\nblock-size = 512")),
            "t.toml:7: controller 'a': namespace 1: an nvme namespace has the blocks of its SSD; remove 'block-size'",
        ),
        (
            with("", "", &format!("{NVME}\npath = \"/x\"")),
            "t.toml:7: controller 'a': namespace 1: 'path' means nothing for a nvme namespace; remove it",
        ),
        (
            with("", "", &format!("{NVME}\noffset = 100")),
            "t.toml:7: controller 'a': namespace 1: offset is 100 bytes; it must be whole blocks of the SSD",
        ),
        (
            with("", "", &format!("{NVME}\nsize = 0")),
            "t.toml:7: controller 'a': namespace 1: offset and size are no range of the SSD's namespace",
        ),
        (
            with("", "", &format!("{MEMORY}\noffset = \"1G\"")),
            "t.toml:7: controller 'a': namespace 1: 'offset' means nothing for a memory namespace; remove it",
        ),
        (
            with(
                "",
                "",
                &format!(
                    "{NVME}\nsize = \"1G\"\n[[controller.namespace]]\n{NVME}\noffset = \"512M\""
                ),
            ),
            "namespace 1 of 'a' and namespace 2 of 'a' use the same blocks of 0000:01:00.0; give each its own with offset and size, or make both read-only",
        ),
        (
            with(
                "",
                "",
                &format!("{NVME}\n[[ssd]]\naddress = \"0000:02:00.0\""),
            ),
            "t.toml:10: no namespace is on ssd 0000:02:00.0; remove it, or add one with backend = \"nvme\"",
        ),
        (
            with("", "", &format!("{NVME}\n[[ssd]]\nabort-grace-ms = 1")),
            "t.toml:10: an ssd needs its address, such as address = \"0000:01:00.0\"",
        ),
        (
            with(
                "",
                "",
                &format!("{NVME}\n[[ssd]]\naddress = \"0000:01:00.0\"\ncommand-timeout-ms = 1"),
            ),
            "t.toml:10: ssd 0000:01:00.0: command-timeout-ms is 1; it can be 100 to 3600000",
        ),
        (
            with(
                "",
                "",
                &format!(
                    "{MEMORY}\ndanger-zone = {{ i-want-broken-io = true, pass-opcodes = [128] }}"
                ),
            ),
            "t.toml:7: controller 'a': namespace 1: pass-opcodes = [0x80, ...] is for an nvme namespace that is all of the SSD's; remove it, or offset and size",
        ),
        (
            with(
                "",
                "",
                &format!(
                    "{NVME}\ndanger-zone = {{ i-want-broken-io = true, pass-opcodes = [128, 9] }}"
                ),
            ),
            "t.toml:7: controller 'a': namespace 1: pass-opcodes has 0x09, a command that is always there, and checked; remove it",
        ),
        (
            with("", "", &format!("{MEMORY}\nblock-size = 1024")),
            "t.toml:7: controller 'a': namespace 1: block-size is 1024; it can be 512 or 4096",
        ),
        (
            with("", "", &format!("{MEMORY}\nnsid = 0")),
            "t.toml:7: controller 'a': namespace 0: an nsid is 1 to 1024",
        ),
        (
            with("", "", &format!("{MEMORY}\nuuid = \"xyz\"")),
            "t.toml:7: controller 'a': namespace 1: uuid 'xyz' is not 32 hexadecimal digits, or all zero",
        ),
        (
            with("", "", &format!("{MEMORY}\neui64 = \"0000000000000000\"")),
            "t.toml:7: controller 'a': namespace 1: eui64 '0000000000000000' is not 16 hexadecimal digits, or all zero",
        ),
        (
            with(
                "",
                "",
                &format!("{MEMORY}\ndanger-zone = {{ i-want-broken-io = false }}"),
            ),
            "t.toml:7: controller 'a': namespace 1: danger-zone makes I/O fail or hang; set i-want-broken-io = true in it, or remove it",
        ),
        (
            with(
                "",
                "",
                &format!("{MEMORY}\nnsid = 2\n[[controller.namespace]]\n{MEMORY}"),
            ),
            "t.toml:11: controller 'a': nsid 2 is there twice; give each namespace its own",
        ),
    ];
    for (text, expected) in cases {
        let e = resolve_text(text).unwrap_err();
        assert!(e.starts_with(expected), "\n got: {e}\nwant: {expected}");
        assert_eq!(e.lines().count(), 1, "{e}");
    }
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
