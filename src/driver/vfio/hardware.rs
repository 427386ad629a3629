//! Tests with an SSD: they need one that is bound to vfio-pci, and destroy what is on it. `guest-tests/cases/vfio.sh` runs them in a
//! guest with an emulated IOMMU; `VHOST_USER_NVME_TEST_VFIO` names the SSD.

use std::fs;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::ring::RingSize;

use super::*;
use crate::driver::dma::{Mapping, shared_memory};
use crate::driver::pci::VFIO_DRIVER;
use crate::driver::{
    Access, Completion, Doorbell, Driver, Options, QueueConfig, QueuePair, wait_for,
};
use crate::memory::GuestMap;

const LIMIT: Duration = Duration::from_secs(20);

type Pair = QueuePair<Box<dyn Doorbell>>;

fn ssd() -> Option<PciAddress> {
    let Ok(address) = std::env::var("VHOST_USER_NVME_TEST_VFIO") else {
        eprintln!("NOT TESTED: VFIO: there is no VHOST_USER_NVME_TEST_VFIO");
        return None;
    };
    Some(address.parse().unwrap())
}

fn take(address: PciAddress) -> (AnyDevice, Arc<dyn AddressSpace>) {
    open(address, &VfioOptions::default()).unwrap_or_else(|e| panic!("{e} ({})", e.hint()))
}

fn up(device: AnyDevice) -> (Driver<AnyDevice>, Pair) {
    let mut driver = Driver::bring_up(device, Options::default()).unwrap();
    assert!(driver.request_queue_pairs(2).unwrap() >= 1);
    let size = RingSize::new(64).unwrap();
    let config = QueueConfig {
        qid: 1,
        sq_size: size,
        cq_size: size,
        depth: 0,
        max_transfer: 0,
        vector: Some(1),
    };
    let pair = driver.create_queue_pair(config).unwrap();
    (driver, pair)
}

/// One command and its end; it must be told by an interrupt.
fn exec(pair: &mut Pair, opcode: NvmOpcode, slba: u64, address: u64, len: u32) -> Completion {
    let command = ReadWrite::new(1, slba, (len / 512 - 1) as u16).to_sqe(opcode, 0, 0);
    pair.submit_data(command, address, len, 7).unwrap();
    pair.ring();
    let start = Instant::now();
    let mut done = None;
    while done.is_none() {
        assert!(start.elapsed() < LIMIT, "no completion, or no interrupt");
        pair.wait(LIMIT).unwrap();
        pair.poll(1, |c| done = Some(c));
    }
    done.unwrap()
}

/// One command that must succeed.
fn well(pair: &mut Pair, opcode: NvmOpcode, slba: u64, address: u64, len: u32) {
    let status = exec(pair, opcode, slba, address, len).status();
    assert!(status.is_success(), "{opcode:?}: {status}");
}

/// `region`'s bytes.
fn bytes(region: &Arc<crate::memory::Region>, at: u64, len: usize) -> Vec<u8> {
    let map = GuestMap::new(vec![Arc::clone(region)]).unwrap();
    let mut out = vec![0; len];
    assert!(map.read(at, &mut out));
    out
}

#[test]
fn an_ssd_is_taken_driven_and_given_back() {
    let Some(address) = ssd() else { return };
    let (device, space) = take(address);
    let busy = open(address, &VfioOptions::default()).err().unwrap();
    assert!(matches!(busy, VfioError::Busy { .. }), "{busy}");

    let (mut driver, mut pair) = up(device);
    eprintln!(
        "{:?}, {} bytes at once, addresses {:x?}",
        driver.identify().sn,
        driver.max_transfer(),
        space.ranges()
    );
    // Our own memory, with a PRP list.
    let len = 64 * 1024;
    let data = driver
        .device()
        .allocate(len as usize, Access::ReadWrite)
        .unwrap();
    let pattern: Vec<u8> = (0..len).map(|i| (i / 7) as u8).collect();
    data.write(0, &pattern);
    let (read, write) = (NvmOpcode::READ, NvmOpcode::WRITE);
    well(&mut pair, write, 8, data.addr(), len);
    data.fill(0);
    well(&mut pair, read, 8, data.addr(), len);
    assert_eq!(data.bytes(len as usize), pattern);

    // A guest's memory, at its own addresses, while it is shown and not any longer.
    let file = shared_memory("guest", 16 << 20).unwrap();
    let guest = Mapping::map(&file, 0, 16 << 20, 0x10_0000).unwrap();
    let shown = space.map(0x10_0000, &guest, Access::ReadWrite).unwrap();
    let again = space.map(0x10_0000, &guest, Access::ReadWrite).unwrap_err();
    assert!(again.hint.contains("there already"), "{again}");
    well(&mut pair, read, 8, 0x20_0000, len);
    assert_eq!(bytes(&guest, 0x20_0000, len as usize), pattern);
    drop(shown);
    let before = bytes(&guest, 0x20_0000, 4096);
    // Another block, which is all zeroes. What the SSD makes of an access that fails is its own affair.
    exec(&mut pair, read, 1000, 0x20_0000, 4096);
    assert_eq!(
        bytes(&guest, 0x20_0000, 4096),
        before,
        "the SSD reached memory that was taken back"
    );

    // Memory the device may only read.
    let shown = space.map(0x10_0000, &guest, Access::ReadOnly).unwrap();
    well(&mut pair, write, 256, 0x20_0000, 4096);
    let before = bytes(&guest, 0x30_0000, 4096);
    exec(&mut pair, read, 8, 0x30_0000, 4096);
    assert_eq!(
        bytes(&guest, 0x30_0000, 4096),
        before,
        "it wrote where it may only read"
    );
    drop(shown);

    let ranges = space.ranges();
    let beyond = ranges.last().unwrap().end() + 1;
    assert!(space.map(beyond, &guest, Access::ReadWrite).is_err());

    // By way of the bus, in the midst of things.
    drop(pair);
    let mut device = driver.into_device();
    assert!(
        device.hard_reset().unwrap(),
        "the emulated SSD has a function level reset"
    );
    assert_eq!(device.read32(0x14).unwrap() & 1, 0, "CC.EN");
    let (mut driver, mut pair) = up(device);
    data.fill(0);
    well(&mut pair, read, 8, data.addr(), len);
    assert_eq!(data.bytes(len as usize), pattern);

    // Off the bus: nothing more arrives in memory.
    driver.device().isolate().unwrap();
    data.fill(0x55);
    let command = ReadWrite::new(1, 8, 7).to_sqe(read, 0, 0);
    pair.submit_data(command, data.addr(), 4096, 1).unwrap();
    pair.ring();
    pair.wait(Duration::from_millis(300)).unwrap();
    assert_eq!(pair.poll(1, |c| panic!("{c:?}")), 0);
    assert_eq!(data.bytes(16), [0x55; 16]);
    drop((pair, data));
    drop(driver);
    drop(space);
    let (device, _space) = take(address);
    drop(up(device));
}

#[test]
fn an_ssd_the_host_wants_back_is_let_go() {
    let Some(address) = ssd() else { return };
    let (mut device, space) = take(address);
    let file = shared_memory("guest", 1 << 20).unwrap();
    let guest = Mapping::map(&file, 0, 1 << 20, 0).unwrap();
    let shown = space.map(0, &guest, Access::ReadWrite).unwrap();
    let wanted = device.removal().unwrap().unwrap();
    let bell = device.doorbell(0).unwrap();
    assert_eq!(wait_for(&wanted, Duration::ZERO).unwrap(), 0);

    let (sender, ended) = mpsc::channel();
    std::thread::spawn(move || {
        let unbind = fs::write("/sys/bus/pci/drivers/vfio-pci/unbind", address.to_string());
        sender.send(unbind).unwrap();
    });
    assert!(wait_for(&wanted, LIMIT).unwrap() > 0, "nobody asked for it");
    assert!(ended.try_recv().is_err(), "it was taken while it is open");
    // What a keeper does: only the device goes; doorbells and mappings may be in other hands still.
    drop(device);
    ended
        .recv_timeout(LIMIT)
        .expect("the kernel does not get it back")
        .unwrap();
    bell.ring(1);
    // Nor do mappings keep the kernel's own driver from it.
    let again = space.map(1 << 20, &guest, Access::ReadWrite).unwrap_err();
    assert!(again.hint.contains("let go"), "{again}");
    let at = format!("/sys/bus/pci/devices/{address}");
    fs::write(format!("{at}/driver_override"), "nvme").unwrap();
    fs::write("/sys/bus/pci/drivers/nvme/bind", address.to_string()).unwrap();
    fs::write("/sys/bus/pci/drivers/nvme/unbind", address.to_string()).unwrap();
    fs::write(format!("{at}/driver_override"), VFIO_DRIVER).unwrap();
    drop((shown, space));
    fs::write("/sys/bus/pci/drivers/vfio-pci/bind", address.to_string()).unwrap();
    let (device, _space) = take(address);
    drop(up(device));
}

/// With a limit of locked memory that is too small, as an ordinary user.
#[test]
fn limits_are_told_at_opening() {
    let Some(address) = ssd() else { return };
    let Ok(expected) = std::env::var("VHOST_USER_NVME_TEST_VFIO_STATUS") else {
        eprintln!("NOT TESTED: there is no VHOST_USER_NVME_TEST_VFIO_STATUS");
        return;
    };
    match open(address, &VfioOptions::default()) {
        Ok((device, _space)) => {
            assert_eq!(expected, "0");
            drop(up(device));
        }
        Err(e) => {
            eprintln!("{e}; {}", e.hint());
            assert_eq!(expected, e.exit_status().to_string(), "{e}");
        }
    }
}
