//! A client that is not ours: that of the crate `vfio_user`, which is what Cloud Hypervisor has.

use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use guest_tests::daemon::{Disk, Plan, TestDaemon};
use nvme_spec::regs::{Aqa, Cc, Csts, offset};
use rustix::event::{EventfdFlags, eventfd};
use vhost_user_nvme::driver::dma::shared_memory;
use zerocopy::IntoBytes as _;

#[test]
fn the_client_of_cloud_hypervisor_brings_the_controller_up() {
    use std::os::unix::fs::FileExt as _;
    let daemon = TestDaemon::one(Plan::of(Disk::memory(9, 64)));
    let mut client = vfio_user::Client::new(daemon.socket(0)).unwrap();
    let bar = client.region(0).unwrap();
    assert_eq!(bar.size, 0x4000);
    let areas: Vec<_> = bar
        .sparse_areas
        .iter()
        .map(|a| (a.offset, a.size))
        .collect();
    assert_eq!(areas, [(0x1000, 0x1000)]);
    let at = bar.file_offset.as_ref().expect("a file of doorbells");
    let (doorbells, start) = (at.file().try_clone().unwrap(), at.start() + 0x1000);
    let mut id = [0; 4];
    client.region_read(7, 0, &mut id).unwrap();
    assert_eq!(
        u16::from_le_bytes([id[0], id[1]]),
        daemon.controller(0).pci_ids()[0]
    );

    let memory = shared_memory("ram", 2 << 20).unwrap();
    client.dma_map(0, 0, 2 << 20, memory.as_raw_fd()).unwrap();
    let irq = client.get_irq_info(2).unwrap();
    assert_eq!(irq.count, 8);
    let calls: Vec<_> = (0..8)
        .map(|_| eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap())
        .collect();
    let raw: Vec<_> = calls.iter().map(|c| c.as_raw_fd()).collect();
    client.set_irqs(2, 4 | 32, 0, 8, &raw).unwrap();

    let aqa = Aqa::new().with_asqs_z(15).with_acqs_z(15).into_bits();
    let write = |client: &mut vfio_user::Client, at: u32, bytes: &[u8]| {
        client.region_write(0, at.into(), bytes).unwrap();
    };
    write(&mut client, offset::AQA, &aqa.to_le_bytes());
    write(&mut client, offset::ASQ, &0x1000u64.to_le_bytes());
    write(&mut client, offset::ACQ, &0x2000u64.to_le_bytes());
    let cc = Cc::new().with_en(true).with_iosqes(6).with_iocqes(4);
    write(&mut client, offset::CC, &cc.into_bits().to_le_bytes());
    let start_of_wait = Instant::now();
    loop {
        let mut csts = [0; 4];
        client
            .region_read(0, offset::CSTS.into(), &mut csts)
            .unwrap();
        if Csts::from_bits(u32::from_le_bytes(csts)).rdy() {
            break;
        }
        assert!(start_of_wait.elapsed() < Duration::from_secs(20));
    }
    // Identify Controller to 0x3000, by a store to the mapped doorbell.
    let mut sqe = nvme_spec::Sqe {
        opcode: 6,
        cid: 7,
        prp1: 0x3000,
        cdw10: 1,
        ..nvme_spec::Sqe::default()
    };
    sqe.nsid = 0;
    memory.write_all_at(sqe.as_bytes(), 0x1000).unwrap();
    doorbells.write_all_at(&1u32.to_le_bytes(), start).unwrap();
    let mut cqe = [0; 16];
    while cqe[14] & 1 == 0 {
        memory.read_exact_at(&mut cqe, 0x2000).unwrap();
        assert!(start_of_wait.elapsed() < Duration::from_secs(20));
    }
    assert_eq!((cqe[12], cqe[14] >> 1, cqe[15]), (7, 0, 0), "success");
    let mut serial = [0; 5];
    memory.read_exact_at(&mut serial, 0x3004).unwrap();
    assert_eq!(&serial, b"TEST0");
    let mut count = [0u8; 8];
    while rustix::io::read(&calls[0], &mut count).is_err() {
        assert!(
            start_of_wait.elapsed() < Duration::from_secs(20),
            "no interrupt"
        );
    }
    client.dma_unmap(0, 2 << 20).unwrap();
    client.reset().unwrap();
    client.shutdown().unwrap();
}
