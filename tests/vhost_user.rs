//! What a broken or hostile front-end gets: its connection ends with one line that says what came and why it was refused;
//! the socket takes the next one, and other controllers do not notice.

mod common;

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use common::{Channel, Client, Daemon, HANDSHAKE, NEED_REPLY, PLAIN, code, region, u32s, u64s};

struct Setup {
    daemon: Daemon,
    one: PathBuf,
    two: PathBuf,
    _dir: tempfile::TempDir,
}

/// A daemon with two controllers.
fn setup() -> Setup {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one.sock"), dir.path().join("two.sock"));
    let config = dir.path().join("c.toml");
    let controller = |path: &PathBuf| {
        format!(
            "[[controller]]\nsocket-path = \"{}\"\nqueues = 4\n[[controller.namespace]]\nbackend = \"null\"\nsize = \"1G\"\n",
            path.display()
        )
    };
    std::fs::write(&config, controller(&one) + &controller(&two)).unwrap();
    let daemon = Daemon::start(dir.path(), &["--config", config.to_str().unwrap()]);
    Setup {
        daemon,
        one,
        two,
        _dir: dir,
    }
}

impl Setup {
    /// After a connection to `one` has ended with a line that has `why` in it: there was no second line about it, `one` takes
    /// the next front-end, and the one at `two` was not disturbed.
    fn ended(&mut self, why: &str, two: &mut Client) {
        let line = self.daemon.line("connection ended: ");
        assert!(line.contains(why), "\n got: {line}\nwant: {why}");
        assert!(line.contains("controller=\"one\""), "{line}");
        let mut next = Client::handshake(&self.one);
        assert_eq!(next.ask(code::GET_QUEUE_NUM, &[], &[]), Some(4));
        assert_eq!(two.ask(code::GET_QUEUE_NUM, &[], &[]), Some(4));
        drop(next);
        let between = self.daemon.rest();
        assert!(
            !between.contains("WARN") && !between.contains("ERROR"),
            "{between}"
        );
        self.daemon.line("front-end disconnected");
    }
}

/// What a front-end does wrong, as bytes and files after a handshake.
fn send(code: u32, body: Vec<u8>, files: &[BorrowedFd<'_>]) -> impl Fn(&mut Client) {
    move |c: &mut Client| c.send(code, NEED_REPLY, &body, files)
}

#[test]
fn wrong_messages_end_their_connection_only() {
    let mut s = setup();
    let mut two = Client::handshake(&s.two);
    let mem = common::memory(0x10000);
    let event = common::eventfd();
    let zero = std::fs::File::open("/dev/zero").unwrap();
    let read_only = {
        let f = tempfile::NamedTempFile::new().unwrap();
        f.as_file().set_len(0x10000).unwrap();
        std::fs::File::open(f.path()).unwrap()
    };
    let (m, e, z, r) = (mem.as_fd(), event.as_fd(), zero.as_fd(), read_only.as_fd());
    let table = |n: u32, regions: &[[u64; 4]]| {
        let mut body = u32s(&[n, 0]);
        body.extend(regions.iter().flat_map(|r| u64s(r)));
        body
    };
    let many = [m; 40];
    type Act<'a> = Box<dyn Fn(&mut Client) + 'a>;
    let cases: Vec<(&str, Act<'_>)> = vec![
        (
            "a message with the unknown code 4294967295: vhost-user knows no such message",
            Box::new(|c| c.raw(&[0xFF; 64], &[])),
        ),
        (
            "GET_FEATURES: its flags are 0x2, not those of a request of version 1",
            Box::new(|c| c.send(code::GET_FEATURES, 2, &[], &[])),
        ),
        (
            "GET_CONFIG: its body is said to have 65536 bytes",
            Box::new(|c| c.raw(&u32s(&[code::GET_CONFIG, 1, 65536]), &[])),
        ),
        (
            "SET_OWNER refused: the session has an owner already",
            Box::new(send(code::SET_OWNER, vec![], &[])),
        ),
        (
            "SET_OWNER refused: its size, content or attached files",
            Box::new(send(code::SET_OWNER, vec![1, 2, 3], &[])),
        ),
        (
            "GET_FEATURES refused: its size, content or attached files",
            Box::new(|c| c.send(code::GET_FEATURES, PLAIN, &[], &[m])),
        ),
        (
            "SET_FEATURES refused: features 0x8000000000000000 were not offered",
            Box::new(send(code::SET_FEATURES, u64s(&[1 << 63]), &[])),
        ),
        (
            "SET_PROTOCOL_FEATURES refused: protocol features 0x2 were not offered",
            Box::new(send(code::SET_PROTOCOL_FEATURES, u64s(&[2]), &[])),
        ),
        (
            "SET_VRING_CALL refused: its size, content or attached files",
            Box::new(send(code::SET_VRING_CALL, u64s(&[0]), &[])),
        ),
        (
            "SET_VRING_CALL refused: its size, content or attached files",
            Box::new(|c| c.send(code::SET_VRING_CALL, PLAIN, &u64s(&[0x100]), &[e])),
        ),
        (
            "SET_VRING_CALL refused: there is no vring 4, only 0 to 3",
            Box::new(|c| c.send(code::SET_VRING_CALL, PLAIN, &u64s(&[4]), &[e])),
        ),
        (
            "SET_VRING_CALL refused: the call of vring 1 is not an eventfd",
            Box::new(|c| c.send(code::SET_VRING_CALL, PLAIN, &u64s(&[1]), &[m])),
        ),
        (
            "SET_VRING_KICK refused: the kick of vring 0 is not an eventfd",
            Box::new(|c| c.send(code::SET_VRING_KICK, PLAIN, &u64s(&[0]), &[z])),
        ),
        (
            "SET_VRING_ENABLE refused: there is no vring 255, only 0 to 3",
            Box::new(send(code::SET_VRING_ENABLE, u32s(&[255, 1]), &[])),
        ),
        (
            "SET_VRING_ENABLE refused: a number in it",
            Box::new(send(code::SET_VRING_ENABLE, u32s(&[0, 7]), &[])),
        ),
        (
            "ADD_MEM_REG refused: a number in it, or the number of its files",
            Box::new(send(code::ADD_MEM_REG, region(0, 0x1000, 0), &[])),
        ),
        (
            "ADD_MEM_REG refused: a number in it, or the number of its files",
            Box::new(|c| c.send(code::ADD_MEM_REG, PLAIN, &region(0, 0x1000, 0), &[m, m])),
        ),
        (
            "ADD_MEM_REG refused: the memory region at 0x1000 says 0x20000 bytes from offset 0x0 of its file, which has only 0x10000",
            Box::new(|c| c.send(code::ADD_MEM_REG, PLAIN, &region(0x1000, 0x20000, 0), &[m])),
        ),
        (
            "ADD_MEM_REG refused: the memory region at 0x0 is not a file of shared memory",
            Box::new(|c| c.send(code::ADD_MEM_REG, PLAIN, &region(0, 0x1000, 0), &[z])),
        ),
        (
            "ADD_MEM_REG refused: cannot map the memory region at 0x0",
            Box::new(|c| c.send(code::ADD_MEM_REG, PLAIN, &region(0, 0x1000, 0), &[r])),
        ),
        (
            "ADD_MEM_REG refused: the memory region at 0x0 with 0x0 bytes",
            Box::new(|c| c.send(code::ADD_MEM_REG, PLAIN, &region(0, 0, 0), &[m])),
        ),
        (
            "ADD_MEM_REG refused: memory region at 0xfffffffffffff000 with 0x2000 bytes is empty or wraps around",
            Box::new(|c| {
                c.send(
                    code::ADD_MEM_REG,
                    PLAIN,
                    &region(0xFFFF_FFFF_FFFF_F000, 0x2000, 0),
                    &[m],
                )
            }),
        ),
        (
            "ADD_MEM_REG refused: memory regions at 0x1000 and 0x2000 overlap",
            Box::new(|c| {
                c.send(code::ADD_MEM_REG, PLAIN, &region(0x1000, 0x4000, 0), &[m]);
                c.send(
                    code::ADD_MEM_REG,
                    PLAIN,
                    &region(0x2000, 0x4000, 0x4000),
                    &[m],
                );
            }),
        ),
        (
            "ADD_MEM_REG refused: memory regions at 0x1000 and 0x1000 overlap",
            Box::new(|c| {
                c.send(code::ADD_MEM_REG, PLAIN, &region(0x1000, 0x4000, 0), &[m]);
                c.send(code::ADD_MEM_REG, PLAIN, &region(0x1000, 0x4000, 0), &[m]);
            }),
        ),
        (
            "REM_MEM_REG refused: there is no memory region of 0x1000 bytes at 0x5000",
            Box::new(send(code::REM_MEM_REG, region(0x5000, 0x1000, 0), &[])),
        ),
        (
            "SET_MEM_TABLE refused: its size, content or attached files",
            Box::new(|c| {
                c.send(
                    code::SET_MEM_TABLE,
                    PLAIN,
                    &table(2, &[[0, 0x1000, 0, 0]]),
                    &[m],
                )
            }),
        ),
        (
            "SET_MEM_TABLE refused: its size, content or attached files",
            Box::new(|c| {
                c.send(
                    code::SET_MEM_TABLE,
                    PLAIN,
                    &table(1, &[[0, 0x1000, 0, 0]]),
                    &[m, m],
                )
            }),
        ),
        (
            "SET_MEM_TABLE refused: memory regions at 0x0 and 0x1000 overlap",
            Box::new(|c| {
                c.send(
                    code::SET_MEM_TABLE,
                    PLAIN,
                    &table(2, &[[0x1000, 0x1000, 0, 0], [0, 0x2000, 0, 0]]),
                    &[m, m],
                )
            }),
        ),
        (
            "SET_MEM_TABLE: it carries more files than a message can",
            Box::new(|c| {
                c.send(
                    code::SET_MEM_TABLE,
                    PLAIN,
                    &table(1, &[[0, 0x1000, 0, 0]]),
                    &many,
                )
            }),
        ),
        (
            "GET_CONFIG refused: its size, content or attached files",
            Box::new(send(code::GET_CONFIG, u32s(&[0xFFF, 4, 0, 0]), &[])),
        ),
        (
            "GET_CONFIG refused: its size, content or attached files",
            Box::new(send(code::GET_CONFIG, u32s(&[u32::MAX, 4, 0, 0]), &[])),
        ),
        (
            "SET_CONFIG refused: its size, content or attached files",
            Box::new(send(code::SET_CONFIG, u32s(&[0, 8, 0, 0]), &[])),
        ),
        (
            "SET_BACKEND_REQ_FD refused: its size, content or attached files",
            Box::new(send(code::SET_BACKEND_REQ_FD, vec![], &[])),
        ),
        (
            "SET_BACKEND_REQ_FD refused: ",
            Box::new(|c| c.send(code::SET_BACKEND_REQ_FD, PLAIN, &[], &[m])),
        ),
        (
            "SET_LOG_BASE refused: the protocol feature",
            Box::new(|c| c.send(code::SET_LOG_BASE, PLAIN, &u64s(&[0x1000, 0]), &[m])),
        ),
        (
            "GET_INFLIGHT_FD refused: the protocol feature",
            Box::new(send(code::GET_INFLIGHT_FD, u64s(&[0, 0, 0]), &[])),
        ),
    ];
    for (why, act) in &cases {
        let mut c = Client::handshake(&s.one);
        act(&mut c);
        assert!(c.is_closed(), "{why}");
        s.ended(why, &mut two);
    }
}

#[test]
fn messages_before_their_time() {
    let mut s = setup();
    let mut two = Client::handshake(&s.two);
    for (why, code, body) in [
        (
            "GET_CONFIG refused: the protocol feature",
            code::GET_CONFIG,
            u32s(&[0, 4, 0, 0]),
        ),
        (
            "GET_QUEUE_NUM refused: the protocol feature",
            code::GET_QUEUE_NUM,
            vec![],
        ),
        (
            "GET_SHMEM_CONFIG refused: the protocol feature",
            code::GET_SHMEM_CONFIG,
            vec![],
        ),
        (
            "RESET_DEVICE refused: the protocol feature",
            code::RESET_DEVICE,
            vec![],
        ),
        (
            "SET_VRING_ENABLE refused: the feature",
            code::SET_VRING_ENABLE,
            u32s(&[0, 1]),
        ),
        (
            "SET_BACKEND_REQ_FD refused: it needs the protocol features",
            code::SET_BACKEND_REQ_FD,
            vec![],
        ),
    ] {
        let mut c = Client::connect(&s.one);
        c.send(code, PLAIN, &body, &[]);
        assert!(c.is_closed(), "{why}");
        s.ended(why, &mut two);
    }
}

#[test]
fn what_costs_nothing_is_taken() {
    let s = setup();
    let mut c = Client::handshake(&s.one);
    let event = common::eventfd();
    for vring in 0..4 {
        assert_eq!(
            c.ask(code::SET_VRING_CALL, &u64s(&[vring]), &[event.as_fd()]),
            Some(0)
        );
        assert_eq!(
            c.ask(code::SET_VRING_KICK, &u64s(&[vring]), &[event.as_fd()]),
            Some(0)
        );
        assert_eq!(
            c.ask(code::SET_VRING_CALL, &u64s(&[vring | 0x100]), &[]),
            Some(0)
        );
        assert_eq!(
            c.ask(code::SET_VRING_ENABLE, &u32s(&[vring as u32, 1]), &[]),
            Some(0)
        );
    }
    c.send(code::GET_VRING_BASE, PLAIN, &u32s(&[1, 0]), &[]);
    assert_eq!(c.answer().unwrap().1, u32s(&[1, 0]));
    assert_eq!(c.ask(code::GET_MAX_MEM_SLOTS, &[], &[]), Some(509));
    assert_eq!(c.ask(code::CHECK_DEVICE_STATE, &[], &[]), Some(1));
    // Memory comes and goes; the same bytes under another number are another region.
    let mem = common::memory(0x10000);
    for _ in 0..3 {
        for (gpa, offset) in [(0, 0), (0x10_0000, 0x4000), (0x8000, 0)] {
            let body = region(gpa, 0x4000, offset);
            assert_eq!(c.ask(code::ADD_MEM_REG, &body, &[mem.as_fd()]), Some(0));
        }
        for gpa in [0x10_0000, 0, 0x8000] {
            assert_eq!(
                c.ask(code::REM_MEM_REG, &region(gpa, 0x4000, 0), &[]),
                Some(0)
            );
        }
    }
    assert_eq!(c.ask(code::RESET_DEVICE, &[], &[]), Some(0));
}

#[test]
fn any_access_to_configuration_space_is_answered() {
    let s = setup();
    let mut c = Client::handshake(&s.one);
    let page = c.config(0xF00, 0x20);
    assert_eq!(page[..8], [b'N', b'V', b'M', b'E', 2, 0, 0, 0]);
    for size in [1, 2, 3, 4, 5, 7, 8, 16, 255, 4000] {
        for offset in [
            0, 1, 2, 3, 4, 7, 0x14, 0x1C, 0x24, 0x28, 0x100, 0xEFD, 0xEFF, 0xF00, 0xF1F, 0xF2F,
            0xFFF,
        ] {
            if offset + size > 0x1000 {
                continue;
            }
            c.config(offset, size);
            // Not to CC: that would enable the controller.
            if size > 8 || offset > 0x24 {
                c.set_config(offset, &vec![0xA5; size as usize]);
            }
        }
    }
    assert_eq!(
        c.config(0xF00, 0x20),
        page,
        "the page cannot be overwritten"
    );
    c.set_config(0xF20, &[7; 16]);
    assert_eq!(c.config(0xF20, 16), [7; 16]);
    // Across the border: the guest's side reads zeroes there, the page follows.
    let across = c.config(0xEFC, 8);
    assert_eq!(across[4..], *b"NVME");
}

#[test]
fn a_front_end_can_leave_at_any_moment() {
    let mut s = setup();
    let mut two = Client::handshake(&s.two);
    for steps in 0..=HANDSHAKE {
        let mut c = Client::connect(&s.one);
        for step in 0..steps {
            c.step(step);
        }
        drop(c);
        s.daemon.line("front-end disconnected");
    }
    // In the middle of a message.
    for (bytes, why) in [
        (
            &u32s(&[24, 1])[..],
            "the front-end went away in the middle of GET_CONFIG",
        ),
        (
            &u32s(&[24, 1, 16, 0])[..],
            "the front-end went away in the middle of GET_CONFIG",
        ),
        (
            &[1][..],
            "the front-end went away in the middle of a message",
        ),
    ] {
        let c = Client::handshake(&s.one);
        c.raw(bytes, &[]);
        drop(c);
        s.ended(why, &mut two);
    }
    // With memory, vectors, and a channel nobody answers on.
    let mut c = Client::handshake(&s.one);
    let (mem, event) = (common::memory(0x10000), common::eventfd());
    let channel = Channel::open(&mut c);
    c.ask(code::ADD_MEM_REG, &region(0, 0x10000, 0), &[mem.as_fd()]);
    c.ask(code::SET_VRING_CALL, &u64s(&[0]), &[event.as_fd()]);
    assert_eq!(channel.request().0, code::SHMEM_MAP);
    drop(c);
    s.daemon.line("front-end disconnected");
    // Our end of the channel is still open: it keeps nobody.
    let mut next = Client::handshake(&s.one);
    assert_eq!(next.ask(code::GET_QUEUE_NUM, &[], &[]), Some(4));
    drop(channel);
}

#[test]
fn a_second_front_end_waits_for_the_first() {
    let mut s = setup();
    let first = Client::handshake(&s.one);
    let mut second = Client::connect(&s.one);
    second.send(code::GET_FEATURES, PLAIN, &[], &[]);
    second
        .stream
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    assert!(second.answer().is_none(), "not yet");
    second
        .stream
        .set_read_timeout(Some(common::PATIENCE))
        .unwrap();
    drop(first);
    assert_eq!(second.answer().unwrap().0, code::GET_FEATURES);
    s.daemon.line("front-end disconnected");
}

#[test]
fn nothing_is_left_behind_by_many_front_ends() {
    let mut s = setup();
    let mut two = Client::handshake(&s.two);
    let pid = s.daemon.pid();
    let open = || {
        std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .count()
    };
    let threads = || {
        std::fs::read_dir(format!("/proc/{pid}/task"))
            .unwrap()
            .count()
    };
    let visit = |s: &mut Setup| {
        let mut c = Client::handshake(&s.one);
        let mem = common::memory(0x10000);
        let event = common::eventfd();
        let _channel = Channel::open(&mut c);
        c.ask(code::ADD_MEM_REG, &region(0, 0x10000, 0), &[mem.as_fd()]);
        c.ask(code::SET_VRING_CALL, &u64s(&[0]), &[event.as_fd()]);
        c.ask(code::SET_VRING_KICK, &u64s(&[0]), &[event.as_fd()]);
        drop(c);
        s.daemon.line("front-end disconnected");
    };
    visit(&mut s);
    assert_eq!(two.ask(code::GET_QUEUE_NUM, &[], &[]), Some(4));
    let before = (open(), threads());
    for _ in 0..50 {
        visit(&mut s);
    }
    assert_eq!(two.ask(code::GET_QUEUE_NUM, &[], &[]), Some(4));
    common::eventually("everything is closed", || {
        (open() <= before.0 && threads() <= before.1).then_some(())
    });
}

#[test]
fn the_back_end_channel_is_watched() {
    let mut s = setup();
    let mut two = Client::handshake(&s.two);
    type Act = fn(&mut Channel);
    let cases: [(&str, Act); 3] = [
        (
            "the back-end channel failed: the front-end did not map the doorbell window",
            |c| {
                c.request();
                c.acknowledge(code::SHMEM_MAP, 1);
            },
        ),
        (
            "the back-end channel failed: the answer to SHMEM_MAP is not one",
            |c| {
                c.request();
                c.0.write_all(&[0xEE; 20]).unwrap();
            },
        ),
        (
            "the back-end channel failed: the front-end closed it",
            |c| {
                c.request();
                c.0.shutdown(std::net::Shutdown::Both).unwrap();
            },
        ),
    ];
    for (why, act) in cases {
        let mut c = Client::handshake(&s.one);
        let mut channel = Channel::open(&mut c);
        act(&mut channel);
        assert!(c.is_closed(), "{why}");
        s.ended(why, &mut two);
    }
    let mut c = Client::handshake(&s.one);
    let _first = Channel::open(&mut c);
    let (_ours, theirs) = UnixStream::pair().unwrap();
    c.send(code::SET_BACKEND_REQ_FD, PLAIN, &[], &[theirs.as_fd()]);
    assert!(c.is_closed());
    s.ended(
        "SET_BACKEND_REQ_FD refused: there is a back-end channel already",
        &mut two,
    );
}

#[test]
fn a_slow_channel_keeps_nothing_waiting() {
    let s = setup();
    let mut c = Client::handshake(&s.one);
    let mut channel = Channel::open(&mut c);
    let (request, body, file) = channel.request();
    assert_eq!(request, code::SHMEM_MAP);
    // Unanswered, and even so:
    assert_eq!(c.ask(code::GET_QUEUE_NUM, &[], &[]), Some(4));
    assert_eq!(c.ask(code::RESET_DEVICE, &[], &[]), Some(0));
    channel.acknowledge(code::SHMEM_MAP, 0);
    let word = |at: usize| u64::from_ne_bytes(body[at..at + 8].try_into().unwrap());
    let (offset, len) = (word(8), word(24));
    let window = u32::from_le_bytes(c.config(0xF08, 4).try_into().unwrap());
    assert_eq!((body[0], len), (0, u64::from(window)));
    let file = std::fs::File::from(file.unwrap());
    // Behind the window, and never part of what is mapped, 128 bytes of side words for each of 64 vrings.
    let side = u32::from_le_bytes(c.config(0xF1C, 4).try_into().unwrap());
    assert_eq!(side, window);
    let len = offset + u64::from(side) + 64 * 128;
    assert_eq!(file.metadata().unwrap().len(), len);
}

/// A guest whose memory file is cut while its controller works in it.
#[test]
fn a_cut_memory_file_fails_its_controller_only() {
    let mut s = setup();
    let mut two = Client::handshake(&s.two);
    let mut c = Client::handshake(&s.one);
    let mut channel = Channel::open(&mut c);
    let (_, body, window) = channel.request();
    channel.acknowledge(code::SHMEM_MAP, 0);
    let window = std::fs::File::from(window.unwrap());
    let offset = u64::from_ne_bytes(body[8..16].try_into().unwrap());
    let (mem, kick) = (common::memory(0x10000), common::eventfd());
    assert_eq!(
        c.ask(code::ADD_MEM_REG, &region(0, 0x10000, 0), &[mem.as_fd()]),
        Some(0)
    );
    assert_eq!(
        c.ask(code::SET_VRING_KICK, &u64s(&[0]), &[kick.as_fd()]),
        Some(0)
    );
    // Admin queues of 16 entries at 0x1000 and 0x2000; enable with 64-byte SQEs and 16-byte CQEs.
    c.set_config(0x24, &0x000F_000F_u32.to_le_bytes());
    c.set_config(0x28, &0x1000_u64.to_le_bytes());
    c.set_config(0x30, &0x2000_u64.to_le_bytes());
    c.set_config(0x14, &0x0046_0001_u32.to_le_bytes());
    common::eventually("CSTS.RDY", || (c.config(0x1C, 4)[0] & 1 == 1).then_some(()));
    mem.set_len(0).unwrap();
    window.write_all_at(&1_u32.to_le_bytes(), offset).unwrap();
    rustix::io::write(&kick, &1_u64.to_ne_bytes()).unwrap();
    assert!(c.is_closed());
    s.ended(
        "the file behind the guest memory at 0x0 was cut while it was mapped",
        &mut two,
    );
    assert!(s.daemon.is_running());
}
