//! Memory that takes the place of other memory while an SSD has commands out that use that, for longer than a client waits.

use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use guest_tests::daemon::{Plan, TestDaemon, queue};
use guest_tests::io::{Io, collect};
use guest_tests::memory::MemoryRegion;
use guest_tests::vfio::{self, ClientError};
use nvme_spec::Status;
use nvme_spec::nvm::ReadWrite;
use nvme_spec::opcode::NvmOpcode;
use vhost_user_nvme::driver::SsdOptions;
use vhost_user_nvme::testing::{Act, Mischief, Model, ModelOptions};

const HOT: u64 = 0x8_0000_0000;
const LEN: u64 = 1 << 20;

#[test]
fn memory_that_io_was_in_the_way_of_is_there_when_that_is_done() {
    let model = Model::new(ModelOptions::default());
    let options = SsdOptions {
        command_timeout: Duration::from_secs(6),
        ..SsdOptions::default()
    };
    let daemon = TestDaemon::one(Plan::of(crate::forwarded::disk(&model, options)));
    let mut guest = daemon.guest();
    let front = guest.device().clone();
    let mut io = Io::new(&mut guest, queue(1, 16), 1);
    let mut other = Io::new(&mut guest, queue(2, 16), 1);
    let old = front.add_memory(HOT, LEN).unwrap();
    let data = old.allocate(4096).unwrap();
    let read = ReadWrite::new(1, 0, 7).to_sqe(NvmOpcode::READ, 0, 0);

    // A command that the SSD holds on to, until it is aborted.
    model.misbehave(Mischief::of(&[Act::Stall], 10_000));
    let before = model.doorbell_writes().0;
    io.pair.submit_data(read, data.addr(), 4096, 0).unwrap();
    io.pair.ring();
    while model.doorbell_writes().0 == before {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(20));
    model.misbehave(Mischief::default());

    // Other memory at the same address. Whoever is told that it is there can use it.
    let new = MemoryRegion::new(HOT, LEN).unwrap();
    let unmap = (vfio::DMA_UNMAP, vfio::unmap_body(0, HOT, LEN), None);
    let map = vfio::map_body(vfio::READ_WRITE, 0, HOT, LEN);
    let map = (vfio::DMA_MAP, map, Some(new.file.as_fd()));
    let busy = match front.client().burst(&[unmap, map]) {
        Ok(()) => false,
        Err(ClientError::Refused(e)) if e.raw_os_error() == Some(16) => true,
        Err(e) => panic!("{e}"),
    };
    eprintln!("the command was in the way for too long: {busy}");
    let late = new.allocate(4096).unwrap();
    late.fill(0xA5);
    let readable = |io: &mut Io| {
        io.pair.submit_data(read, late.addr(), 4096, 1).unwrap();
        io.pair.ring();
        // That of the beginning may end here too.
        let done = collect(&mut io.pair, 1);
        done.iter()
            .any(|c| c.user == 1 && c.status() == Status::SUCCESS)
    };
    if busy {
        // All else goes on.
        guest.identify_controller().unwrap();
        assert_eq!(other.write(9, &[1; 512]), Status::SUCCESS);
    }
    let start = Instant::now();
    while !readable(&mut io) {
        assert!(start.elapsed() < Duration::from_secs(60), "lost for good");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(
        late.bytes(4096).iter().all(|b| *b == 0),
        "what is on the SSD"
    );
    assert!(!guest.csts().unwrap().cfs());
}
