//! What is refused, word by word.

use super::*;

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
