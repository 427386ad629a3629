//! An SSD, its lanes, and devices that are well, ill and hostile.

mod endings;
mod expect;
mod flush;
mod once;
mod recovery;
mod streams;

use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme_spec::nvm::{DatasetManagement, DsmRange, ReadWrite};
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::{Sqe, Status};
use zerocopy::IntoBytes as _;

use super::*;
use crate::driver::dma::{Mapping, shared_memory};
use crate::driver::{Access, Completion, Mapped, SubmitError};
use crate::memory::GuestMap;
use crate::testing::{Model, ModelOptions};

/// Where the guest's memory is for the device.
const GUEST: u64 = 0x10_0000;

/// Options with short times.
fn hasty() -> SsdOptions {
    SsdOptions {
        command_timeout: Duration::from_millis(40),
        abort_grace: Duration::from_millis(40),
        admin_timeout: Duration::from_millis(300),
        least_ready_timeout: Duration::from_millis(100),
        most_ready_timeout: Duration::from_millis(200),
        resets_per_minute: 1000,
        ..SsdOptions::default()
    }
}

/// Memory of a guest, shown to the device.
struct Memory {
    map: Arc<GuestMap>,
    _mapped: Mapped,
}

impl Memory {
    fn new(space: &Arc<dyn AddressSpace>, bytes: usize) -> Self {
        let file = shared_memory("guest", bytes as u64).unwrap();
        let region = Mapping::map(&file, 0, bytes, GUEST).unwrap();
        let mapped = space.map(GUEST, &region, Access::ReadWrite).unwrap();
        Self {
            map: GuestMap::new(vec![region]).unwrap(),
            _mapped: mapped,
        }
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        assert!(self.map.read(at, &mut out));
        out
    }
}

fn start(model: &Model, options: SsdOptions) -> Arc<Ssd> {
    Ssd::start("test".into(), model.device(), model.space(), options).unwrap()
}

/// Poll until so many completions are there, or the time is up.
fn collect(lane: &mut Lane, n: usize, limit: Duration) -> Vec<Completion> {
    let start = Instant::now();
    let mut done = Vec::new();
    while done.len() < n && start.elapsed() < limit {
        if lane.poll(64, |c| done.push(c)) == 0 {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    done
}

/// One command and what comes of it.
fn run(lane: &mut Lane, sqe: Sqe) -> Completion {
    lane.submit(sqe, 77).unwrap();
    lane.ring();
    let done = collect(lane, 1, Duration::from_secs(10));
    assert_eq!(done.len(), 1, "{sqe:?}");
    assert_eq!(done[0].user, 77);
    done[0]
}

/// Wait for it to become so.
fn becomes(what: &str, mut f: impl FnMut() -> bool) {
    let start = Instant::now();
    while !f() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn command(opcode: NvmOpcode, slba: u64, blocks: u32) -> Sqe {
    ReadWrite::new(1, slba, (blocks - 1) as u16).to_sqe(opcode, GUEST, 0)
}

#[test]
fn data_goes_through_a_lane_by_every_way_of_naming_it() {
    let model = Model::new(ModelOptions::default());
    let ssd = start(&model, SsdOptions::default());
    assert_eq!((ssd.queue_pairs(), ssd.max_transfer()), (8, 128 << 10));
    assert_eq!(ssd.namespaces().unwrap(), [1]);
    let namespace = ssd.namespace(1).unwrap();
    assert_eq!(namespace.identify, model.identify_namespace());
    assert_eq!(
        ssd.namespace(2).unwrap_err().status(),
        Some(Status::INVALID_NAMESPACE_OR_FORMAT)
    );
    assert!(ssd.smart().unwrap().critical_warning.temperature());
    assert_eq!(ssd.error_log().unwrap()[0].error_count, 7);

    let memory = Memory::new(ssd.space(), 1 << 20);
    let mut lane = ssd.lane(31).unwrap();
    assert_eq!((lane.room(), lane.pending()), (31, 0));
    let data: Vec<u8> = (0..128 << 10).map(|i| (i * 7 + i / 509) as u8).collect();
    assert!(memory.map.write(GUEST + 512, &data));
    // As pages, with a list of ours; the device has it one page earlier.
    let pages = (0..33).map(|i| GUEST + i * 4096);
    let write = command(NvmOpcode::WRITE, 100, 256);
    lane.submit_pages(write, pages, 512, 128 << 10, 5).unwrap();
    lane.ring();
    let done = collect(&mut lane, 1, Duration::from_secs(5));
    assert!(done[0].status().is_success() && done[0].user == 5);
    assert!(model.bytes(1)[100 * 512..356 * 512] == data[..]);
    // As it is.
    let read = run(&mut lane, command(NvmOpcode::READ, 101, 8));
    assert!(read.status().is_success());
    assert!(memory.bytes(GUEST, 4096) == data[512..512 + 4096]);
    // A small payload.
    let range = DsmRange {
        cattr: 0,
        nlb: 2,
        slba: 100,
    };
    let deallocate = DatasetManagement {
        nsid: 1,
        nr_z: 0,
        ad: true,
        ..DatasetManagement::default()
    };
    let sqe = deallocate.to_sqe(0, 0);
    lane.submit_bytes(sqe, range.as_bytes(), 6).unwrap();
    lane.ring();
    assert!(
        collect(&mut lane, 1, Duration::from_secs(5))[0]
            .status()
            .is_success()
    );
    let bytes = model.bytes(1);
    assert!(bytes[100 * 512..102 * 512].iter().all(|b| *b == 0));
    assert!(bytes[102 * 512..103 * 512] == data[1024..1536]);
    // What cannot be.
    let pages = || (0..).map(|i: u64| GUEST + i * 4096);
    let too_long = lane.submit_pages(write, pages(), 0, (128 << 10) + 1, 0);
    assert_eq!(too_long, Err(SubmitError::TooLong));
    assert!(lane.submit_pages(write, pages(), 2, 512, 0).is_err());
    assert_eq!(
        lane.submit_bytes(sqe, &[0; 4097], 0),
        Err(SubmitError::TooLong)
    );
    assert_eq!((lane.room(), lane.pending()), (31, 0), "nothing is lost");
    let status = run(&mut lane, command(NvmOpcode::READ, 4096, 1)).status();
    assert_eq!(status, Status::LBA_OUT_OF_RANGE);
    assert_eq!(ssd.counters(), SsdCounters::default());
    assert_eq!(model.fake_space().refused(), 0);
}

#[test]
fn lanes_come_and_go_and_say_when_there_are_no_more() {
    let model = Model::new(ModelOptions {
        queue_pairs: 3,
        vectors: 2,
        ..ModelOptions::default()
    });
    let ssd = start(&model, SsdOptions::default());
    let memory = Memory::new(ssd.space(), 1 << 20);
    for round in 0..5 {
        let mut lanes: Vec<Lane> = (0..3).map(|_| ssd.lane(7).unwrap()).collect();
        let error = ssd.lane(7).err().unwrap();
        assert!(matches!(
            error,
            LaneError::NoQueues {
                granted: 3,
                used: 3
            }
        ));
        assert!(error.to_string().contains("granted 3 I/O queue pairs"));
        for lane in &mut lanes {
            assert!(memory.map.write(GUEST, &[round; 512]));
            assert!(
                run(lane, command(NvmOpcode::WRITE, 0, 1))
                    .status()
                    .is_success()
            );
            assert_eq!(model.bytes(1)[..512], [round; 512]);
        }
        drop(lanes);
        becomes("the queues are deleted", || match ssd.lane(7) {
            Ok(_) => true,
            Err(e) => {
                assert!(matches!(e, LaneError::NoQueues { .. }), "{e}");
                false
            }
        });
    }
    let mut lane = ssd.lane(1000).unwrap();
    drop(ssd);
    assert!(!model.enabled(), "the controller is disabled in the end");
    assert_eq!(model.life()[1], 1, "after a shutdown");
    let late = run(&mut lane, command(NvmOpcode::READ, 0, 1));
    assert_eq!(late.status(), Status::INTERNAL_ERROR);
}

#[test]
fn a_device_cannot_write_to_what_it_only_reads() {
    let model = Model::new(ModelOptions::default());
    let ssd = start(&model, SsdOptions::default());
    let memory = Memory::new(ssd.space(), 1 << 20);
    let mut lane = ssd.lane(31).unwrap();
    // A guest that knows where our queues are, and puts that into a PRP list nobody checks: the device reads there, but never
    // writes.
    let own: Vec<u64> = {
        let (read, write) = (model.fake_space().readable(), model.fake_space().writable());
        read.lost_in(&write).iter().map(|r| r.gpa()).collect()
    };
    assert!(!own.is_empty(), "there is memory that is read only");
    for target in own {
        assert!(target > 1 << 38, "at the top: {target:#x}");
        let entries: Vec<u64> = (0..3).map(|i| target + i * 4096).collect();
        assert!(memory.map.write(GUEST + 4096, entries.as_bytes()));
        let sqe = command(NvmOpcode::READ, 0, 32).with_prps(GUEST, GUEST + 4096);
        let status = run(&mut lane, sqe).status();
        assert_eq!(status, Status::DATA_TRANSFER_ERROR);
    }
    assert!(model.fake_space().refused() > 0);
    assert!(
        run(&mut lane, command(NvmOpcode::READ, 0, 8))
            .status()
            .is_success()
    );
}

#[test]
fn an_instant_ssd_is_rung_once_a_batch() {
    let model = Model::instant();
    let options = SsdOptions {
        interrupts: false,
        ..SsdOptions::default()
    };
    let ssd = start(&model, options);
    let mut lane = ssd.lane(255).unwrap();
    let sqe = command(NvmOpcode::READ, 0, 8);
    for round in 0..100u64 {
        for i in 0..100 {
            lane.submit(sqe, round * 100 + i).unwrap();
        }
        lane.ring();
        let mut users = Vec::new();
        assert_eq!(lane.poll(1000, |c| users.push(c.user)), 100);
        assert_eq!(users, (round * 100..round * 100 + 100).collect::<Vec<_>>());
    }
    assert_eq!(lane.doorbell_writes(), (100, 100));
}
