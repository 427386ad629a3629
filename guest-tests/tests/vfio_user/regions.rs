//! Accesses to regions: of every size, at every offset, in messages with and without an answer.

use std::time::{Duration, Instant};

use guest_tests::FrontEnd;
use guest_tests::daemon::{Disk, Plan, TestDaemon, bring_up, queue};
use guest_tests::io::Io;
use guest_tests::vfio::{self, BAR0, CONFIG, ClientError};
use nvme_spec::Status;
use nvme_spec::doorbell::Doorbell;
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::regs::{Cc, offset};
use proptest::prelude::*;

const BAR_SIZE: u64 = 0x4000;
const CONFIG_SIZE: u64 = 0x1000;

fn daemon() -> TestDaemon {
    TestDaemon::one(Plan::of(Disk::memory(9, 64)))
}

fn read32(front: &FrontEnd, region: u32, at: u64) -> u32 {
    let mut out = [0; 4];
    front.client().read(region, at, &mut out).unwrap();
    u32::from_le_bytes(out)
}

#[test]
fn the_configuration_space_is_that_of_an_nvme_controller() {
    let daemon = daemon();
    let front = daemon.connect();
    assert_eq!(front.pci_ids(), daemon.controller(0).pci_ids());
    assert_eq!(read32(&front, CONFIG, 8) >> 8, 0x01_0802);
    front.client().write(CONFIG, 0x10, &[0xFF; 8]).unwrap();
    let low = u64::from(read32(&front, CONFIG, 0x10));
    let mask = u64::from(read32(&front, CONFIG, 0x14)) << 32 | low & !0xF;
    assert_eq!((mask.wrapping_neg(), low & 0xF), (BAR_SIZE, 4));
    assert_eq!(
        read32(&front, CONFIG, 0x50) >> 16 & 0x7FF,
        7,
        "MSI-X: 8 vectors"
    );
    // The table is masked and holds what is written; pending bits are zero.
    assert_eq!(read32(&front, BAR0, 0x200C), 1);
    front.client().write(BAR0, 0x2010, &[7; 8]).unwrap();
    assert_eq!(read32(&front, BAR0, 0x2014), 0x0707_0707);
    assert_eq!(read32(&front, BAR0, 0x3000), 0);
}

#[test]
fn a_function_level_reset_is_a_reset() {
    let daemon = daemon();
    let mut guest = bring_up(daemon.connect());
    let io = Io::new(&mut guest, queue(1, 16), 1);
    let front = guest.into_device();
    front
        .client()
        .write(CONFIG, 0x10, &[0, 0, 0xF0, 0xFE])
        .unwrap();
    let control = read32(&front, CONFIG, 0x68) as u16 | 0x8000;
    front
        .client()
        .write(CONFIG, 0x68, &control.to_le_bytes())
        .unwrap();
    assert_eq!(read32(&front, BAR0, offset::CSTS.into()), 0);
    assert_eq!(read32(&front, BAR0, offset::CC.into()), 0);
    assert_eq!(
        read32(&front, CONFIG, 0x10),
        0xFEF0_0004,
        "its address stays"
    );
    drop(io);
    let mut guest = bring_up(front);
    let mut io = Io::new(&mut guest, queue(1, 16), 1);
    assert_eq!(io.write(1, &[7; 512]), Status::SUCCESS);
}

#[test]
fn doorbells_that_are_rung_by_messages_wake_the_poller() {
    let daemon = daemon();
    let mut guest = bring_up(daemon.connect());
    let mut io = Io::new(&mut guest, queue(1, 16), 1);
    let tail = guest.stride().window_offset(Doorbell::Sq(1));
    let front = guest.device().clone();
    for i in 1..30u32 {
        std::thread::sleep(Duration::from_millis(u64::from(i % 5) * 4));
        let verify = ReadWrite::new(1, 0, 0).to_sqe(NvmOpcode::VERIFY, 0, 0);
        io.pair.submit(verify, 0).unwrap();
        let value = (i % 16).to_le_bytes();
        // Posted, as QEMU does it without mapped doorbells, or answered; of 64 bits now and then, over what is no doorbell.
        match i % 3 {
            0 => {
                let body = vfio::access_body(BAR0, 0x1000 + tail, 4, &value);
                front.client().post(vfio::REGION_WRITE, &body).unwrap();
            }
            _ => front.client().write(BAR0, 0x1000 + tail, &value).unwrap(),
        }
        let start = Instant::now();
        while io.pair.poll(1, |c| assert_eq!(c.status(), Status::SUCCESS)) == 0 {
            assert!(start.elapsed() < Duration::from_secs(20), "command {i}");
            std::thread::sleep(Duration::from_micros(100));
        }
        assert_eq!(read32(&front, BAR0, 0x1000 + tail), i % 16);
    }
}

#[test]
fn registers_are_written_by_posted_halves() {
    let daemon = daemon();
    let front = daemon.connect();
    for (at, value) in [(offset::ASQ, 0x1234_5000u32), (offset::ASQ + 4, 7)] {
        let body = vfio::access_body(BAR0, at.into(), 4, &value.to_le_bytes());
        front.client().post(vfio::REGION_WRITE, &body).unwrap();
    }
    let mut out = [0; 8];
    front.read(offset::ASQ, &mut out).unwrap();
    assert_eq!(u64::from_le_bytes(out), 0x7_1234_5000);
    // A posted write that is refused is not answered either: the next answer is that of the next request.
    let body = vfio::access_body(BAR0, BAR_SIZE, 4, &[1; 4]);
    front.client().post(vfio::REGION_WRITE, &body).unwrap();
    assert_eq!(read32(&front, BAR0, offset::CC.into()), 0);
}

/// An access: region, offset, bytes, and whether they are written.
fn accesses() -> impl Strategy<Value = Vec<(u32, u64, u32, bool)>> {
    let region = prop_oneof![4 => Just(BAR0), 2 => Just(CONFIG), 1 => 0u32..12];
    let at = prop_oneof![
        6 => 0u64..BAR_SIZE + 16,
        1 => any::<u64>(),
        1 => Just(u64::from(offset::CC)),
    ];
    let count = prop_oneof![4 => prop::sample::select(vec![1u32, 2, 4, 8]), 2 => 0u32..80, 1 => 0u32..0x5000];
    prop::collection::vec((region, at, count, any::<bool>()), 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_access_is_done_or_refused_and_nothing_else(accesses in accesses(), value in any::<u8>()) {
        let daemon = daemon();
        let front = daemon.connect();
        for (region, at, count, write) in accesses {
            let size = match region {
                BAR0 => BAR_SIZE,
                CONFIG => CONFIG_SIZE,
                _ => 0,
            };
            let has_region = matches!(region, BAR0 | CONFIG);
            let inside = has_region && at.checked_add(count.into()).is_some_and(|end| end <= size);
            let mut bytes = vec![value; count as usize];
            let done = match write {
                true => front.client().write(region, at, &bytes),
                false => front.client().read(region, at, &mut bytes),
            };
            match done {
                Ok(()) => prop_assert!(inside, "{region} {at:#x} {count}"),
                Err(ClientError::Refused(_)) => prop_assert!(!inside, "{region} {at:#x} {count}"),
                Err(e) => prop_assert!(false, "{e}"),
            }
        }
        // Whatever it was: after a reset the controller works.
        front.reset_device().unwrap();
        let mut cc = [0xFF; 4];
        front.read(offset::CC, &mut cc).unwrap();
        prop_assert_eq!(Cc::from_bits(u32::from_le_bytes(cc)), Cc::new());
        let mut guest = bring_up(front);
        let mut io = Io::new(&mut guest, queue(1, 16), 1);
        prop_assert_eq!(io.write(1, &[7; 512]), Status::SUCCESS);
    }
}
