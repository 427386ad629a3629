//! The inputs that the message streams begin with: sessions as a VMM and the guest behind it have them, and their parts.

use nvme_spec::Sqe;
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::sgl::Descriptor;
use vhost_user_nvme::transport::Transport;
use zerocopy::IntoBytes as _;

use crate::stream::{CALL, CHANNEL, KICK, MEMORY, RAM};

// Where a guest has what.
const ADMIN_SQ: u32 = 0x1000;
const ADMIN_CQ: u32 = 0x2000;
const SHADOW: u64 = 0x3000;
const IO_SQ: u32 = 0x6000;
const IO_CQ: u32 = 0x7000;
const DATA: u64 = 0x8000;
/// AQA: 16 entries each.
const ENTRIES: u32 = 0x000F_000F;
/// CC: enabled, entries of 64 and 16 bytes.
const ENABLE: u32 = 0x0046_0001;

/// Records of an input.
#[derive(Clone, Default)]
struct Script(Vec<u8>);

impl Script {
    fn message(&mut self, files: u8, command: u8, flags: u8, body: &[u32]) {
        self.0.push(files);
        let len = 2 + body.len() * 4;
        self.0.extend((len as u16).to_le_bytes());
        self.0.extend([command, flags]);
        self.0.extend(body.iter().flat_map(|w| w.to_le_bytes()));
    }

    fn memory(&mut self, at: u32, bytes: &[u8]) {
        self.0.push(5);
        self.0.extend(&at.to_le_bytes()[..3]);
        self.0.push(bytes.len() as u8);
        self.0.extend(bytes);
    }

    /// The page of doorbells is told of a new value.
    fn ring(&mut self, at: u16, value: u16) {
        self.0.push(6);
        self.0.extend([at, value].map(u16::to_le_bytes).concat());
    }

    fn pause(&mut self) {
        self.0.push(7);
    }
}

/// How many admin commands come before the creation of the submission queue: its completion queue has to be there.
const BEFORE_SQ: u32 = 5;

fn admin(opcode: u8, nsid: u32, prp1: u64, cdw10: u32, cdw11: u32) -> Sqe {
    Sqe {
        opcode,
        nsid,
        prp1,
        cdw10,
        cdw11,
        ..Sqe::default()
    }
}

/// The commands of the admin queue. All but the last are done at once.
fn admin_commands() -> [Sqe; 8] {
    let mut buffer = admin(0x7C, 0, SHADOW, 0, 0);
    buffer.prp2 = SHADOW + 0x1000;
    [
        // Identify Controller and Identify Namespace.
        admin(0x06, 0, DATA, 1, 0),
        admin(0x06, 1, DATA + 0x1000, 0, 0),
        // Set Features, Number of Queues; the page SMART / Health Information.
        admin(0x09, 0, 0, 7, 0x1_0001),
        admin(0x02, u32::MAX, DATA + 0x2000, 127 << 16 | 2, 0),
        // A completion queue with interrupts, a submission queue.
        admin(0x05, 0, IO_CQ.into(), 0xF_0001, 3),
        admin(0x01, 0, IO_SQ.into(), 0xF_0001, 0x1_0001),
        // Doorbell Buffer Config.
        buffer,
        // Asynchronous Event Request.
        admin(0x0C, 0, 0, 0, 0),
    ]
}

/// The commands of an I/O queue: a read by PRPs, a write by an SGL, a flush.
fn io_commands() -> [Sqe; 3] {
    let eight = ReadWrite::new(1, 64, 7);
    [
        eight.to_sqe(NvmOpcode::READ, DATA + 0x4000, 0),
        Descriptor::data(DATA + 0x5000, 4096).put(eight.to_sqe(NvmOpcode::WRITE, 0, 0)),
        admin(NvmOpcode::FLUSH.0, 1, 0, 0, 0),
    ]
}

/// What a guest writes into its memory before it rings.
fn guest(script: &mut Script) {
    for (at, commands) in [
        (ADMIN_SQ, &admin_commands()[..]),
        (IO_SQ, &io_commands()[..]),
    ] {
        for (i, sqe) in (0..).zip(commands) {
            let sqe = Sqe { cid: i, ..*sqe };
            script.memory(at + 64 * u32::from(i), sqe.as_bytes());
        }
    }
}

/// What the controller answers comes with time.
fn pauses(script: &mut Script) {
    script.pause();
    script.pause();
}

/// Whole sessions, and each of their parts behind what it needs.
pub fn seeds(transport: Transport) -> Vec<Vec<u8>> {
    let (start, parts, end) = match transport {
        Transport::VfioUser => vfio(),
        Transport::VhostUser => vhost(),
    };
    let mut all = Vec::new();
    for part in &parts {
        all.push([&start.0[..], &part.0].concat());
    }
    let whole = whole(&start, &parts);
    for part in &end {
        all.push([&whole[..], &part.0].concat());
    }
    all.push(whole);
    all
}

fn whole(start: &Script, parts: &[Script]) -> Vec<u8> {
    let parts = parts.iter().flat_map(|part| &part.0);
    start.0.iter().chain(parts).copied().collect()
}

fn script(write: impl FnOnce(&mut Script)) -> Script {
    let mut script = Script::default();
    write(&mut script);
    script
}

/// How a session begins, how it goes on, and what may happen at its end.
type Session = (Script, Vec<Script>, Vec<Script>);

fn vfio() -> Session {
    const CONFIG: u32 = 7;
    let write = |s: &mut Script, region: u32, offset: u32, words: &[u32]| {
        let head = [offset, 0, region, words.len() as u32 * 4];
        s.message(0, 10, 0, &[&head, words].concat());
    };
    let read = |s: &mut Script, region: u32, offset: u32, bytes: u32| {
        s.message(0, 9, 0, &[offset, 0, region, bytes]);
    };
    let start = script(|s| s.message(0, 1, 0, &[0]));
    let parts = vec![
        script(|s| {
            s.message(0, 4, 0, &[16, 0, 0, 0]);
            for region in [0, 7, 8] {
                s.message(0, 5, 0, &[4064, 0, region, 0, 0, 0, 0, 0]);
            }
            s.message(0, 7, 0, &[16, 0, 2, 0]);
            read(s, CONFIG, 0, 256);
            write(s, CONFIG, 4, &[0x0010_0406]);
        }),
        script(|s| s.message(RAM, 2, 0, &[32, 3, 0, 0, 0, 0, MEMORY as u32, 0])),
        script(guest),
        script(|s| {
            // SET_IRQS: the vectors' eventfds.
            s.message(CALL, 8, 0, &[20, 36, 2, 0, 1]);
        }),
        script(|s| {
            write(s, 0, 0x24, &[ENTRIES]);
            write(s, 0, 0x28, &[ADMIN_SQ, 0]);
            write(s, 0, 0x30, &[ADMIN_CQ, 0]);
            write(s, 0, 0x14, &[ENABLE]);
            pauses(s);
            read(s, 0, 0, 64);
            write(s, 0, 0x1000, &[BEFORE_SQ]);
            pauses(s);
            write(s, 0, 0x1000, &[8]);
            pauses(s);
            s.memory(SHADOW as u32 + 8, &[3]);
            write(s, 0, 0x1008, &[3]);
            s.ring(8, 3);
            pauses(s);
            write(s, 0, 0x1004, &[7]);
        }),
    ];
    let end = vec![
        // Its memory goes while it is enabled; comes again in two pieces, one without a file.
        script(|s| {
            s.message(0, 3, 0, &[24, 0, 0, 0, MEMORY as u32, 0]);
            s.message(RAM, 2, 0, &[32, 3, 0, 0, 0, 0, 0xA_0000, 0]);
            s.message(0, 2, 0, &[32, 1, 0, 0, 0xA_0000, 0, 0x2_0000, 0]);
        }),
        script(|s| s.message(0, 13, 0, &[])),
        // The pin: its eventfd, that of its unmasking, a mask and an unmask.
        script(|s| {
            s.message(CALL, 8, 0, &[20, 36, 0, 0, 1]);
            s.message(KICK, 8, 0, &[20, 20, 0, 0, 1]);
            s.message(0, 8, 0, &[20, 9, 0, 0, 1]);
            s.message(0, 8, 0, &[20, 17, 0, 0, 1]);
        }),
        // Numbers at the end of what can be: memory, vectors, registers, configuration space.
        script(|s| {
            const TOP: u32 = u32::MAX;
            s.message(RAM, 2, 0, &[32, 3, 0, 0, 0xFFFF_F000, TOP, 0x2000, 0]);
            s.message(RAM, 2, 0, &[32, 3, 0xFFFF_F000, TOP, 0, 1, 0x2000, 0]);
            s.message(0, 3, 0, &[24, 0, 0xFFFF_F000, TOP, 0x2000, 0]);
            s.message(CALL, 8, 0, &[20, 36, 2, TOP, 1]);
            read(s, 0, TOP, 8);
            write(s, CONFIG, TOP, &[1]);
            s.message(0, 9, 0, &[TOP, TOP, 0, TOP]);
        }),
        // Function level reset, by the PCI Express capability; shutdown; disabling.
        script(|s| {
            write(s, CONFIG, 0x48, &[0x8000]);
            write(s, 0, 0x14, &[ENABLE | 1 << 14]);
            read(s, 0, 0x1C, 4);
            write(s, 0, 0x14, &[0]);
        }),
    ];
    (start, parts, end)
}

fn vhost() -> Session {
    const VERSION: u8 = 1;
    const NEED_REPLY: u8 = 9;
    // Multiqueue, reply-ack, back-end requests, configuration, back-end files, reset, memory slots, shared memory.
    const FEATURES: u32 = 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 10 | 1 << 13 | 1 << 15 | 1 << 22;
    let config = |s: &mut Script, write: bool, offset: u32, words: &[u32]| {
        let head = [offset, words.len() as u32 * 4, 0];
        let body = [&head, words].concat();
        s.message(0, if write { 25 } else { 24 }, VERSION, &body);
    };
    let start = script(|s| {
        s.message(0, 1, VERSION, &[]);
        s.message(0, 15, VERSION, &[]);
        s.message(0, 16, VERSION, &[FEATURES, 0]);
        s.message(0, 3, VERSION, &[]);
        s.message(0, 2, VERSION, &[1 << 30, 1]);
    });
    let region = |s: &mut Script, code: u8| {
        let body = [0, 0, 0, 0, MEMORY as u32, 0, 0x10_0000, 0, 0, 0];
        s.message(if code == 37 { RAM } else { 0 }, code, NEED_REPLY, &body);
    };
    let parts = vec![
        script(|s| {
            s.message(0, 17, VERSION, &[]);
            s.message(0, 44, VERSION, &[]);
            config(s, false, 0xF00, &[0; 8]);
            config(s, true, 0xF20, &[1, 2, 3, 4]);
            s.message(CHANNEL, 21, NEED_REPLY, &[]);
            s.pause();
        }),
        script(|s| region(s, 37)),
        script(guest),
        script(|s| {
            for i in 0..2 {
                s.message(CALL, 13, VERSION, &[i, 0]);
                s.message(KICK, 12, VERSION, &[i, 0]);
                s.message(0, 18, VERSION, &[i, 1]);
            }
        }),
        script(|s| {
            config(s, true, 0x24, &[ENTRIES]);
            config(s, true, 0x28, &[ADMIN_SQ, 0]);
            config(s, true, 0x30, &[ADMIN_CQ, 0]);
            config(s, true, 0x14, &[ENABLE]);
            s.pause();
            config(s, false, 0, &[0; 16]);
            s.ring(0, BEFORE_SQ as u16);
            pauses(s);
            s.ring(0, 8);
            pauses(s);
            s.memory(SHADOW as u32 + 8, &[3]);
            s.ring(8, 3);
            pauses(s);
            s.ring(4, 7);
        }),
    ];
    let end = vec![
        script(|s| region(s, 38)),
        // Numbers at the end of what can be: memory, vrings, registers.
        script(|s| {
            const TOP: u32 = u32::MAX;
            let region = [0, 0, 0xFFFF_F000, TOP, 0x2000, 0, 0, 0, 0, 0];
            s.message(RAM, 37, NEED_REPLY, &region);
            s.message(0, 38, NEED_REPLY, &region);
            config(s, false, TOP, &[0; 2]);
            config(s, true, 0xFFF, &[1]);
            s.message(CALL, 13, VERSION, &[0xFF, 0]);
        }),
        // RESET_DEVICE.
        script(|s| s.message(0, 34, NEED_REPLY, &[])),
        // The memory table at once.
        script(|s| {
            let body = [1, 0, 0, 0, MEMORY as u32, 0, 0x10_0000, 0, 0, 0];
            s.message(RAM, 5, NEED_REPLY, &body);
        }),
        script(|s| {
            config(s, true, 0x14, &[ENABLE | 1 << 14]);
            config(s, false, 0x1C, &[0]);
            config(s, true, 0x14, &[0]);
        }),
    ];
    (start, parts, end)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt as _;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use nvme_spec::Cqe;
    use zerocopy::FromBytes as _;

    use super::*;
    use crate::stream;

    fn entries(memory: &File, at: u32) -> Vec<Cqe> {
        let mut bytes = [0; 256];
        memory.read_exact_at(&mut bytes, at.into()).unwrap();
        let all = bytes
            .chunks_exact(16)
            .map(|b| Cqe::read_from_bytes(b).unwrap());
        all.take_while(|cqe| cqe.status.p()).collect()
    }

    /// A fuzzer that begins where nothing works goes nowhere: in the session it begins with all commands succeed.
    #[test]
    fn the_first_inputs_lead_to_io() {
        for transport in [Transport::VfioUser, Transport::VhostUser] {
            let (start, parts, _) = match transport {
                Transport::VfioUser => vfio(),
                Transport::VhostUser => vhost(),
            };
            let input = whole(&start, &parts);
            let mut found = Vec::new();
            for patience in [20, 100, 500] {
                let memory = stream::run(transport, &input, Duration::from_millis(patience));
                found = [ADMIN_CQ, IO_CQ].map(|at| entries(&memory, at)).into();
                if found[1].len() == io_commands().len() {
                    break;
                }
            }
            let bad = found
                .iter()
                .flatten()
                .filter(|cqe| !cqe.status.is_success());
            assert_eq!(bad.count(), 0, "{transport:?}: {found:#x?}");
            assert_eq!(
                [found[0].len(), found[1].len()],
                [admin_commands().len() - 1, io_commands().len()],
                "{transport:?}: {found:#x?}"
            );
        }
    }

    /// No input of those that a fuzzer begins with is too long for it, and all end well: the daemon outlives a mistake of its own in serving
    /// a connection, but it tells of it.
    #[test]
    fn every_first_input_ends() {
        static PANICS: AtomicUsize = AtomicUsize::new(0);
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::Relaxed);
            before(info);
        }));
        for transport in [Transport::VfioUser, Transport::VhostUser] {
            for (i, input) in seeds(transport).iter().enumerate() {
                assert!(input.len() < 4096, "{}", input.len());
                stream::run(transport, input, Duration::from_millis(1));
                let panics = PANICS.load(Ordering::Relaxed);
                assert_eq!(panics, 0, "input {i} of {transport:?}");
            }
        }
    }
}
