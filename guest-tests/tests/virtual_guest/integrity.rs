//! Random commands from several queues at once, against a model of the disk.

use std::time::{Duration, Instant};

use guest_tests::daemon::{Disk, Plan, TestDaemon, pollers, queue};
use guest_tests::io::{self, Io, LIMIT};
use guest_tests::rng::Rng;
use nvme_spec::Status;
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use vhost_user_nvme::poller::IdlePolicy;

/// A block's content, made of its number and of a version that grows with each write of it; version 0 is all zeroes.
fn content(block: u64, version: u64, out: &mut [u8]) {
    if version == 0 {
        out.fill(0);
    } else {
        Rng::new(block << 32 ^ version).fill(out);
    }
}

/// One command that is out, with what the model expects.
struct Out {
    opcode: NvmOpcode,
    first: u64,
    blocks: u64,
}

/// A queue works on blocks of its own, many commands at a time that do not overlap; each block has a history of versions.
pub(crate) fn work(io: &mut Io, base: u64, blocks: u64, seed: u64, time: Duration) -> u64 {
    let mut rng = Rng::new(seed);
    // Each write of a block gives it a version it never had; 0 is a block of zeroes.
    let mut versions = vec![0u64; blocks as usize];
    let mut next = 0;
    let mut busy = vec![false; blocks as usize];
    let depth = 24u64;
    let each = 32u64 * 512;
    let block = u64::from(io.block);
    let most = each / block;
    let mut out: Vec<Option<Out>> = (0..depth).map(|_| None).collect();
    let mut buffer = vec![0; each as usize];
    let mut want = vec![0; block as usize];
    let start = Instant::now();
    let (mut total, mut left) = (0, 0u64);
    let mut last_progress = Instant::now();
    loop {
        let late = start.elapsed() > time;
        if late && left == 0 {
            break;
        }
        for slot in 0..depth {
            if late || out[slot as usize].is_some() || rng.one_in(3) {
                continue;
            }
            let n = 1 + rng.below(most);
            let first = rng.below(blocks - n + 1);
            let range = first as usize..(first + n) as usize;
            if busy[range.clone()].iter().any(|b| *b) {
                continue;
            }
            let at = slot * (each + 512);
            let opcode = match rng.below(10) {
                0..4 => NvmOpcode::READ,
                4..8 => NvmOpcode::WRITE,
                8 => NvmOpcode::WRITE_ZEROES,
                _ => NvmOpcode::COMPARE,
            };
            // Data at any dword of the slot's own buffer.
            let offset = rng.below(128) * 4;
            let mut command = ReadWrite::new(io.nsid, base + first, (n - 1) as u16);
            match opcode {
                NvmOpcode::WRITE | NvmOpcode::COMPARE => {
                    next += 1;
                    for i in range.clone() {
                        if opcode == NvmOpcode::WRITE {
                            versions[i] = next;
                        }
                        content(base + i as u64, versions[i], &mut want);
                        io.data.write(
                            (at + offset) as usize + (i - first as usize) * block as usize,
                            &want,
                        );
                    }
                    command.fua = rng.one_in(20);
                }
                NvmOpcode::WRITE_ZEROES => {
                    versions[range.clone()].fill(0);
                    command.deac = rng.one_in(2);
                }
                _ => {}
            }
            let sqe = command.to_sqe(opcode, 0, 0);
            let len = if opcode == NvmOpcode::WRITE_ZEROES {
                0
            } else {
                n * block
            };
            let (addr, user) = (io.data.addr() + at + offset, slot << 32 | offset);
            if io.sgls && len > 0 && rng.one_in(3) {
                // Behind the data, a page for each slot. Lists that go through memory in order, cut anywhere.
                let lists = 24 * (each + 512) + slot * 4096;
                let cut = 4 * (1 + rng.below(len / 4)) as u32;
                let mut pieces = vec![(addr, cut)];
                if u64::from(cut) < len {
                    pieces.push((addr + u64::from(cut), len as u32 - cut));
                }
                let most = 1 + rng.below(2) as usize;
                let first = io::sgl(&io.data, lists as usize, &pieces, most);
                io.pair.submit(first.put(sqe), user).unwrap();
            } else {
                io.pair.submit_data(sqe, addr, len as u32, user).unwrap();
            }
            busy[range].fill(true);
            out[slot as usize] = Some(Out {
                opcode,
                first,
                blocks: n,
            });
            left += 1;
        }
        io.pair.ring();
        let mut done = Vec::new();
        io.pair.poll(64, |c| done.push(c));
        assert_eq!(io.pair.take_fault(), None);
        if done.is_empty() {
            assert!(last_progress.elapsed() < LIMIT, "{left} never came");
            if left > 0 {
                io.pair.wait(Duration::from_secs(5)).unwrap();
            }
            continue;
        }
        last_progress = Instant::now();
        for c in done {
            let (slot, offset) = (c.user >> 32, c.user & 0xFFFF_FFFF);
            let Some(o) = out[slot as usize].take() else {
                panic!("completed twice")
            };
            assert_eq!(
                c.status(),
                Status::SUCCESS,
                "{:?} {}+{}",
                o.opcode,
                o.first,
                o.blocks
            );
            let range = o.first as usize..(o.first + o.blocks) as usize;
            if o.opcode == NvmOpcode::READ {
                let bytes = &mut buffer[..(o.blocks * block) as usize];
                io.data.read((slot * (each + 512) + offset) as usize, bytes);
                for (i, got) in range.clone().zip(bytes.chunks(block as usize)) {
                    content(base + i as u64, versions[i], &mut want);
                    assert!(
                        got == want,
                        "block {} version {}",
                        base + i as u64,
                        versions[i]
                    );
                }
            }
            busy[range].fill(false);
            left -= 1;
            total += 1;
        }
    }
    // All of it once more, through one reader.
    for first in (0..blocks).step_by(most as usize) {
        let n = most.min(blocks - first);
        let got = io.read(base + first, n as u32).unwrap();
        for (i, got) in (first..).zip(got.chunks(block as usize)) {
            content(base + i, versions[i as usize], &mut want);
            assert!(got == want, "block {} at the end", base + i);
        }
    }
    assert_eq!(io.flush(), Status::SUCCESS);
    total
}

fn run(disk: Disk, blocks: u64, idle: IdlePolicy, shadow: bool) {
    let daemon = TestDaemon::start(vec![Plan::of(disk)], &pollers(2, idle));
    let mut guest = daemon.guest();
    if shadow {
        guest.enable_doorbell_buffer(&mut []).unwrap();
    }
    let share = blocks / 4;
    let totals: Vec<u64> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4u64)
            .map(|i| {
                let mut io = Io::new(&mut guest, queue(1 + i as u16, 32), 1);
                scope.spawn(move || {
                    work(
                        &mut io,
                        i * share,
                        share,
                        i + blocks,
                        Duration::from_millis(800),
                    )
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(totals.iter().all(|n| *n > 20), "{totals:?}");
}

#[test]
fn memory_of_512_byte_blocks() {
    run(Disk::memory(9, 4096), 4096, IdlePolicy::Adaptive, true);
}

#[test]
fn memory_of_4096_byte_blocks() {
    run(Disk::memory(12, 1024), 1024, IdlePolicy::Interrupt, false);
}

#[test]
fn file_of_512_byte_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::file(&dir.path().join("disk"), 9, 4096);
    run(disk, 4096, IdlePolicy::Interrupt, true);
}

#[test]
fn file_of_4096_byte_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::file(&dir.path().join("disk"), 12, 1024);
    run(disk, 1024, IdlePolicy::Adaptive, false);
}
