//! A guest that does random I/O on several queues, by interrupts as guests do, and checks every completion.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_tests::FrontEnd;
use guest_tests::daemon::queue;
use guest_tests::io::Pair;
use guest_tests::raw::Guest;
use guest_tests::rng::Rng;
use nvme_spec::nvm::{Flush, ReadWrite};
use nvme_spec::opcode::NvmOpcode;
use nvme_spec::{Sqe, Status};
use rustix::event::{PollFd, PollFlags, Timespec};
use vhost_user_nvme::driver::{Completion, Dma, Driver, Options};

use crate::history::{BLOCK, Expected, History};

/// Blocks of the largest command.
const MOST: usize = 8;

/// Nothing may take longer; a lost completion or interrupt is one that has not come by then.
const LIMIT: Duration = Duration::from_secs(30);

enum What {
    Read(Expected),
    Write(Expected),
    Flush,
}

struct Out {
    nsid: u32,
    what: What,
    since: Instant,
}

struct Lane {
    pair: Pair,
    depth: usize,
    data: Arc<Dma>,
    out: Vec<Option<Out>>,
}

/// What was done so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Done {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub admin: u64,
    pub queues: u64,
    pub resets: u64,
    /// The longest any command took.
    pub longest: Duration,
}

/// The guest.
pub struct Load {
    guest: Option<Guest>,
    lanes: Vec<Lane>,
    /// Data buffers by lane: memory of the guest is not given back.
    buffers: Vec<Arc<Dma>>,
    histories: Vec<History>,
    rng: Rng,
    serial: Vec<u8>,
    pub done: Done,
}

/// How many commands each queue has out at most.
const DEPTHS: [usize; 4] = [1, 4, 16, 60];

fn options() -> Options {
    Options {
        admin_timeout: LIMIT,
        least_ready_timeout: LIMIT,
        ..Options::default()
    }
}

impl Load {
    /// A guest on the namespaces 1 to `namespaces`, of so many blocks each.
    pub fn new(front: FrontEnd, namespaces: u32, blocks: u64, seed: u64) -> Self {
        let buffers = DEPTHS.map(|depth| {
            let bytes = depth * MOST * BLOCK;
            Arc::new(front.memory().allocate(bytes).expect("guest memory"))
        });
        let mut load = Self {
            guest: None,
            lanes: Vec::new(),
            buffers: Vec::from(buffers),
            histories: (1..=namespaces)
                .map(|nsid| History::new(nsid, blocks))
                .collect(),
            rng: Rng::new(seed),
            serial: Vec::new(),
            done: Done::default(),
        };
        load.bring_up(front);
        load
    }

    fn bring_up(&mut self, front: FrontEnd) {
        let mut guest = Driver::bring_up(front, options()).expect("a controller that comes up");
        let wanted = DEPTHS.len() as u16;
        let granted = guest.request_queue_pairs(wanted).expect("queue pairs");
        assert!(granted >= wanted, "{granted} queue pairs");
        guest.arm_events(3).expect("room for three events");
        self.serial = guest.identify().sn.to_vec();
        self.guest = Some(guest);
        for i in 0..DEPTHS.len() {
            let lane = self.lane(i);
            self.lanes.push(lane);
        }
    }

    fn guest(&mut self) -> &mut Guest {
        self.guest.as_mut().expect("a guest that is up")
    }

    fn lane(&mut self, i: usize) -> Lane {
        let config = queue(i as u16 + 1, if i == 0 { 2 } else { 64 });
        let pair = self
            .guest()
            .create_queue_pair(config)
            .expect("a queue pair");
        Lane {
            pair,
            depth: DEPTHS[i],
            data: Arc::clone(&self.buffers[i]),
            out: (0..DEPTHS[i]).map(|_| None).collect(),
        }
    }

    /// Commands that are out.
    pub fn out(&self) -> usize {
        self.lanes
            .iter()
            .map(|l| l.out.iter().flatten().count())
            .sum()
    }

    /// Submit at random, wait a moment for interrupts, check what came. Returns the completions.
    pub fn step(&mut self) -> usize {
        for i in 0..self.lanes.len() {
            let room = self.lanes[i].depth - self.lanes[i].out.iter().flatten().count();
            let some = 1 + self.rng.below(self.lanes[i].depth as u64) as usize;
            for _ in 0..room.min(some) {
                self.submit(i);
            }
            self.lanes[i].pair.ring();
        }
        self.collect()
    }

    fn submit(&mut self, lane: usize) {
        let at = self.rng.below(self.histories.len() as u64) as usize;
        let nsid = at as u32 + 1;
        let history = &mut self.histories[at];
        let count = 1 + self.rng.below(MOST as u64) as usize;
        let slba = self.rng.below(history.blocks() - count as u64);
        let lane = &mut self.lanes[lane];
        let slot = lane.out.iter().position(Option::is_none).expect("room");
        let offset = slot * MOST * BLOCK;
        let command = ReadWrite::new(nsid, slba, count as u16 - 1);
        let kind = self.rng.below(20);
        let zeroes = matches!(kind, 10 | 11);
        let (sqe, what): (Sqe, What) = match kind {
            0 => (Flush { nsid }.to_sqe(), What::Flush),
            1..10 => {
                lane.data.write(offset, &vec![0xDB; count * BLOCK]);
                let sqe = command.to_sqe(NvmOpcode::READ, 0, 0);
                (sqe, What::Read(history.read(slba, count)))
            }
            _ => {
                let Some(expected) = history.write(slba, count, zeroes) else {
                    return;
                };
                let opcode = if zeroes {
                    NvmOpcode::WRITE_ZEROES
                } else {
                    lane.data.write(offset, &history.data(&expected));
                    NvmOpcode::WRITE
                };
                (command.to_sqe(opcode, 0, 0), What::Write(expected))
            }
        };
        let plain = matches!(what, What::Flush) || zeroes;
        let (addr, len) = (lane.data.addr() + offset as u64, (count * BLOCK) as u32);
        let submitted = if plain {
            lane.pair.submit(sqe, slot as u64)
        } else {
            lane.pair.submit_data(sqe, addr, len, slot as u64)
        };
        submitted.expect("room in the queue");
        lane.out[slot] = Some(Out {
            nsid,
            what,
            since: Instant::now(),
        });
    }

    /// As a guest does it: no look at a queue before its interrupt.
    fn collect(&mut self) -> usize {
        let mut fds: Vec<_> = self
            .lanes
            .iter()
            .map(|l| {
                let eventfd = l.pair.interrupt().expect("a vector for each queue");
                PollFd::from_borrowed_fd(eventfd.as_fd(), PollFlags::IN)
            })
            .collect();
        let moment = Timespec::try_from(Duration::from_millis(5)).expect("a moment");
        let _ = rustix::event::poll(&mut fds, Some(&moment));
        let ready: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let mut sum = 0;
        for (i, _) in ready.iter().enumerate().filter(|(_, ready)| **ready) {
            self.lanes[i].pair.wait(Duration::ZERO).expect("an eventfd");
            let mut done = Vec::new();
            self.lanes[i].pair.poll(u32::MAX, |c| done.push(c));
            let fault = self.lanes[i].pair.take_fault();
            assert_eq!(fault, None, "queue {}", i + 1);
            sum += done.len();
            for c in done {
                self.completed(i, c);
            }
        }
        let late = self.lanes.iter().flat_map(|l| l.out.iter().flatten());
        if let Some(out) = late.into_iter().find(|out| out.since.elapsed() > LIMIT) {
            let lanes: Vec<_> = self
                .lanes
                .iter()
                .map(|l| (l.pair.qid(), l.pair.out(), l.pair.counters()))
                .collect();
            panic!(
                "a command is out since {:?}; queues: {lanes:?}",
                out.since.elapsed()
            );
        }
        sum
    }

    fn completed(&mut self, lane: usize, c: Completion) {
        let lane = &mut self.lanes[lane];
        let slot = c.user as usize;
        // The driver has found that the command was out, and only once.
        let out = lane.out[slot].take().expect("a command that is out");
        self.done.longest = self.done.longest.max(out.since.elapsed());
        assert_eq!(c.status(), Status::SUCCESS, "queue {}", lane.pair.qid());
        let history = &mut self.histories[out.nsid as usize - 1];
        match out.what {
            What::Flush => self.done.flushes += 1,
            What::Write(e) => {
                history.written(&e);
                self.done.writes += 1;
            }
            What::Read(e) => {
                let mut data = vec![0; e.blocks() * BLOCK];
                lane.data.read(slot * MOST * BLOCK, &mut data);
                if let Err(why) = history.check(&e, &data) {
                    panic!("queue {}: {why}", lane.pair.qid());
                }
                self.done.reads += 1;
            }
        }
    }

    /// Wait for all that is out.
    pub fn drain(&mut self) {
        while self.out() > 0 {
            self.collect();
        }
    }

    fn drain_lane(&mut self, lane: usize) {
        while self.lanes[lane].out.iter().any(Option::is_some) {
            self.collect();
        }
    }

    /// Something on the admin queue: most of the time questions, at times a queue that goes and comes, rarely a reset with all that is out.
    pub fn administer(&mut self) {
        match self.rng.below(16) {
            0 => self.reset(),
            1..8 => {
                let lane = self.rng.below(self.lanes.len() as u64) as usize;
                self.drain_lane(lane);
                let old = self.lanes.remove(lane);
                self.guest()
                    .delete_queue_pair(old.pair)
                    .expect("a queue that goes");
                let new = self.lane(lane);
                self.lanes.insert(lane, new);
                self.done.queues += 1;
            }
            _ => {
                let identify = self.guest().identify_controller().expect("Identify");
                assert_eq!(identify.sn.to_vec(), self.serial);
                let nsid = 1 + self.rng.below(self.histories.len() as u64) as u32;
                let ns = self.guest().identify_namespace(nsid).expect("Identify");
                assert_eq!(ns.nsze, self.histories[nsid as usize - 1].blocks());
                self.guest().arm_events(3).expect("room for three events");
                self.done.admin += 2;
            }
        }
        assert_eq!(self.guest().admin_queue().take_fault(), None, "admin queue");
    }

    /// The guest resets its controller: what is out is never completed.
    pub fn reset(&mut self) {
        for lane in &mut self.lanes {
            for out in lane.out.iter_mut().filter_map(Option::take) {
                if let What::Write(e) = out.what {
                    self.histories[out.nsid as usize - 1].lost(&e);
                }
            }
        }
        let guest = self.guest.take().expect("a guest that is up");
        let front = guest.reset().expect("a reset");
        // Not before: until then the controller may write to their memory.
        self.lanes.clear();
        self.bring_up(front);
        self.done.resets += 1;
    }

    /// Read everything, and compare.
    pub fn compare(&mut self) {
        self.drain();
        for at in 0..self.histories.len() {
            for slba in (0..self.histories[at].blocks()).step_by(MOST) {
                let nsid = at as u32 + 1;
                let expected = self.histories[at].read(slba, MOST);
                let lane = &mut self.lanes[1];
                let sqe = ReadWrite::new(nsid, slba, MOST as u16 - 1).to_sqe(NvmOpcode::READ, 0, 0);
                let (addr, len) = (lane.data.addr(), (MOST * BLOCK) as u32);
                lane.pair.submit_data(sqe, addr, len, 0).expect("room");
                lane.pair.ring();
                lane.out[0] = Some(Out {
                    nsid,
                    what: What::Read(expected),
                    since: Instant::now(),
                });
                self.drain();
            }
        }
    }

    /// The driver, with nothing out.
    pub fn into_guest(mut self) -> Guest {
        self.drain();
        self.guest.take().expect("a guest that is up")
    }
}
