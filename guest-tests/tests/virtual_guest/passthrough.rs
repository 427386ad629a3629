//! A passed-through SSD, from the guest to the medium and back. These need one, whose data they destroy: `VHOST_USER_NVME_TEST_SSD`
//! (`/dev/ngXnY`, with 128 KiB as its largest transfer if splitting is to be seen) and `VHOST_USER_NVME_TEST_BAD_SSD`, which cannot
//! read block 2048 nor write block 4096. The guest case `nvme-passthrough` has both.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::time::Duration;

use guest_tests::daemon::{bring_up, queue};
use guest_tests::io::{Io, collect};
use guest_tests::program::Program;
use guest_tests::rng::Rng;
use nvme_spec::Status;
use nvme_spec::opcode::NvmOpcode;

fn ssd(variable: &str) -> Option<String> {
    let path = std::env::var(variable).ok();
    if path.is_none() {
        eprintln!("NOT TESTED: passthrough: there is no {variable}");
    }
    path
}

fn start(path: &str) -> Program {
    Program::start(&["--namespace", &format!("nvme-passthrough,path={path}")])
}

/// The block device of the same namespace.
fn disk(path: &str) -> String {
    path.replacen("/ng", "/nvme", 1)
}

fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    Rng::new(seed).fill(&mut bytes);
    bytes
}

#[test]
fn what_the_guest_writes_is_on_the_ssd_and_the_other_way_round() {
    let Some(path) = ssd("VHOST_USER_NVME_TEST_SSD") else {
        return;
    };
    const CHUNK: usize = 1 << 20;
    let mut program = start(&path);
    let mut guest = bring_up(program.connect());
    let mut io = Io::new(&mut guest, queue(1, 64), 1);
    let blocks = guest.identify_namespace(1).expect("a namespace").nsze;
    let total = (blocks * u64::from(io.block)) as usize;
    let chunk_blocks = (CHUNK as u64 / u64::from(io.block)) as u32;
    let ours = bytes(1, total);
    // The largest transfers, which the SSD gets in pieces.
    for (i, data) in ours.chunks(CHUNK).enumerate() {
        let slba = i as u64 * u64::from(chunk_blocks);
        assert_eq!(io.write(slba, data), Status::SUCCESS, "at {slba}");
    }
    // Many small ones at a time, each to its own page of the buffer.
    let per_page = 4096 / io.block;
    let mut rng = Rng::new(2);
    for _ in 0..20 {
        let first = rng.below(blocks / u64::from(per_page) - 32);
        io.data.fill(0);
        for i in 0..32 {
            let slba = (first + i) * u64::from(per_page);
            let sqe = io.command(slba, per_page).to_sqe(NvmOpcode::READ, 0, 0);
            let at = io.data.addr() + i * 4096;
            io.pair.submit_data(sqe, at, 4096, i).expect("a transfer");
        }
        io.pair.ring();
        for done in collect(&mut io.pair, 32) {
            assert_eq!(done.cqe.status(), Status::SUCCESS);
        }
        let at = first as usize * 4096;
        assert!(
            io.data.bytes(32 * 4096) == ours[at..at + 32 * 4096],
            "at {first}"
        );
    }
    assert_eq!(
        io.compare(3, &ours[3 * io.block as usize..][..CHUNK]),
        Status::SUCCESS
    );
    let mut other = ours[..CHUNK].to_vec();
    other[CHUNK - 1] ^= 1;
    assert_eq!(io.compare(0, &other), Status::COMPARE_FAILURE);
    assert_eq!(
        io.blocks(NvmOpcode::VERIFY, 0, chunk_blocks),
        Status::SUCCESS
    );
    let last = blocks - 1;
    assert_eq!(
        io.blocks(NvmOpcode::WRITE_ZEROES, 8, chunk_blocks),
        Status::SUCCESS
    );
    assert_eq!(io.deallocate(&[(8, 100), (last, 1)]), Status::SUCCESS);
    let back = io.read(8, chunk_blocks).expect("zeroes");
    assert!(back.iter().all(|b| *b == 0));
    let block = io.block as usize;
    let again = &ours[8 * block..][..CHUNK];
    assert_eq!(io.write(8, again), Status::SUCCESS);
    let again = &ours[total - block..];
    assert_eq!(io.write(last, again), Status::SUCCESS);
    assert_eq!(io.flush(), Status::SUCCESS);

    // It is ours as long as the daemon runs, and everybody's afterwards.
    let busy = File::options()
        .read(true)
        .custom_flags(0o200)
        .open(disk(&path))
        .expect_err("O_EXCL on a claimed device");
    assert_eq!(busy.kind(), std::io::ErrorKind::ResourceBusy);
    drop((io, guest));
    program.terminate();
    let status = program.wait(Duration::from_secs(20)).expect("its end");
    assert!(status.success(), "{status}");

    let kernel = File::options()
        .read(true)
        .write(true)
        .open(disk(&path))
        .expect("the block device");
    let mut theirs = Vec::new();
    (&kernel).read_to_end(&mut theirs).expect("all of it");
    let differ = theirs.iter().zip(&ours).position(|(a, b)| a != b);
    assert_eq!((theirs.len(), differ), (total, None));
    let fresh = bytes(3, CHUNK);
    kernel.write_all_at(&fresh, 2 << 20).expect("a write");
    kernel.sync_all().expect("a flush");
    drop(kernel);

    let program = start(&path);
    let mut guest = bring_up(program.connect());
    let mut io = Io::new(&mut guest, queue(1, 64), 1);
    let back = io.read((2 << 20) / u64::from(io.block), chunk_blocks);
    assert!(back.expect("a read") == fresh);
}

#[test]
fn errors_of_the_ssd_are_the_guests() {
    let Some(path) = ssd("VHOST_USER_NVME_TEST_BAD_SSD") else {
        return;
    };
    let program = start(&path);
    let mut guest = bring_up(program.connect());
    let mut io = Io::new(&mut guest, queue(1, 64), 1);
    assert_eq!(io.block, 512);
    for (slba, blocks) in [(2048, 1), (2040, 16), (1024, 2048)] {
        let failed = Err(Status::UNRECOVERED_READ_ERROR);
        assert_eq!(io.read(slba, blocks).map(|_| ()), failed, "{blocks}@{slba}");
        assert!(io.read(slba + u64::from(blocks) + 16, 8).is_ok());
    }
    assert_eq!(io.write(4096, &[1; 512]), Status::WRITE_FAULT);
    assert_eq!(io.write(4000, &[1; 200 * 512]), Status::WRITE_FAULT);
    assert_eq!(io.write(4097, &[1; 512]), Status::SUCCESS);
    assert_eq!(io.read(4097, 1).expect("a read"), [1; 512]);
}
