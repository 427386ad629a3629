//! The whole control plane, driven turn by turn: guest memory in a box, pollers that are scripts.

mod commands;
mod crash;
mod events;
mod lifecycle;
mod moving;
mod random;
mod resuming;
mod switching;
mod threads;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use crossbeam_channel::{Receiver, TryRecvError};
use nvme_spec::doorbell::Doorbell;
use nvme_spec::opcode::AdminOpcode;
use nvme_spec::regs::{Aqa, Cc, Csts, offset};
use nvme_spec::{Cqe, Sqe, Status};
use zerocopy::IntoBytes as _;

use super::actor::{Actor, Parts, Port, Shared};
use super::inbox::{Inbox, Mail};
use super::info::{Info, tests::sample};
use super::placement::Placement;
use crate::backend::Backend;
use crate::memory::{GuestMap, Region};
use crate::poller::sleep::Bed;
use crate::poller::{ControlSink as _, ControllerKey, Message, Reply};
use crate::state::Keep;

/// Where the guest has its memory, its admin queues and a page for data.
const BASE: u64 = 0x10_0000;
const LEN: usize = 1 << 20;
const ASQ: u64 = BASE;
const ACQ: u64 = BASE + 0x1000;
const DATA: u64 = BASE + 0x10000;
const ENTRIES: u16 = 16;

/// A map of one region, zeroed.
fn memory(gpa: u64, len: usize) -> Arc<GuestMap> {
    let mut bytes = vec![0u64; len / 8].into_boxed_slice();
    let host = bytes.as_mut_ptr().cast();
    // SAFETY: the box is the owner and is never looked at again.
    let region = unsafe { Region::new(gpa, len as u64, host, Arc::new(bytes)) };
    GuestMap::new(vec![Arc::new(region)]).unwrap()
}

/// What pollers were sent, and whether they answer by themselves.
struct Script {
    sent: Mutex<Vec<(usize, Message)>>,
    silent: AtomicBool,
    queues: [AtomicUsize; 2],
    inbox: Arc<Inbox>,
}

struct ScriptPort(usize, Arc<Script>);

impl Port for ScriptPort {
    fn send(&self, message: Message) {
        if !self.1.silent.load(Ordering::Relaxed)
            && let Some(token) = token(&message)
        {
            let result = Ok(true);
            self.1.inbox.reply(self.0, Reply { token, result });
        }
        self.1.sent.lock().unwrap().push((self.0, message));
    }

    fn queues(&self) -> usize {
        self.1.queues[self.0].load(Ordering::Relaxed)
    }

    fn count_queues(&self, before: usize, now: usize) {
        let more = now.wrapping_sub(before);
        self.1.queues[self.0].fetch_add(more, Ordering::Relaxed);
    }

    fn slots(&self) -> usize {
        64
    }

    fn node(&self) -> Option<u32> {
        Some(self.0 as u32)
    }
}

fn token(message: &Message) -> Option<u64> {
    match message {
        Message::Attach { token, .. }
        | Message::CreateCq { token, .. }
        | Message::CreateSq { token, .. }
        | Message::DeleteSq { token, .. }
        | Message::DeleteCq { token, .. }
        | Message::Abort { token, .. }
        | Message::SetMemory { token, .. }
        | Message::SetShadow { token, .. }
        | Message::Release { token, .. }
        | Message::Adopt { token, .. }
        | Message::Hello { token, .. }
        | Message::Suspend { token, .. }
        | Message::Reset { token, .. }
        | Message::Detach { token, .. } => Some(*token),
        _ => None,
    }
}

fn kind(message: &Message) -> String {
    match message {
        Message::Attach { .. } => "Attach".into(),
        Message::CreateCq { cq, .. } => format!("CreateCq {}", cq.qid),
        Message::CreateSq { sq, .. } => format!("CreateSq {}", sq.qid),
        Message::DeleteSq { qid, .. } => format!("DeleteSq {qid}"),
        Message::DeleteCq { qid, .. } => format!("DeleteCq {qid}"),
        Message::Abort { sqid, cid, .. } => format!("Abort {sqid} {cid}"),
        Message::SetMemory { .. } => "SetMemory".into(),
        Message::SetShadow { .. } => "SetShadow".into(),
        Message::SetKick { qid, .. } => format!("SetKick {qid}"),
        Message::SetDoorbells { mode, .. } => format!("SetDoorbells {mode:?}"),
        Message::WatchAdmin { on, .. } => format!("WatchAdmin {on}"),
        Message::Release { cqid, .. } => format!("Release {cqid}"),
        Message::Keep { cqid, .. } => format!("Keep {cqid}"),
        Message::Adopt { queues, .. } => format!("Adopt {} {:?}", queues.cqid(), queues.sqids()),
        Message::Hello { .. } => "Hello".into(),
        Message::Suspend { .. } => "Suspend".into(),
        Message::Reset { .. } => "Reset".into(),
        Message::Detach { .. } => "Detach".into(),
        Message::Ping(_) => "Ping".into(),
        Message::Stuck(_) => "Stuck".into(),
        Message::Stop => "Stop".into(),
    }
}

/// A controller on two scripted pollers, and its guest.
struct Rig {
    actor: Actor,
    shared: Arc<Shared>,
    script: Arc<Script>,
    map: Arc<GuestMap>,
    tail: u16,
    head: u16,
    phase: bool,
    entries: u16,
    /// Do not move the completion queue's head.
    lazy: bool,
}

impl Rig {
    /// With memory, not enabled.
    fn new() -> Self {
        Self::with(sample(), Vec::new())
    }

    fn with(info: Info, volatile: Vec<Arc<Backend>>) -> Self {
        let keep = Arc::new(Keep::nowhere());
        let (shared, outbox) = Shared::new(info, 2, &keep).unwrap();
        let script = Arc::new(Script {
            sent: Mutex::default(),
            silent: AtomicBool::new(false),
            queues: Default::default(),
            inbox: Arc::clone(&shared.inbox),
        });
        let ports = (0..2)
            .map(|i| Box::new(ScriptPort(i, Arc::clone(&script))) as Box<dyn Port>)
            .collect();
        let actor = Actor::new(Parts {
            shared: Arc::clone(&shared),
            outbox,
            key: ControllerKey(0),
            ports,
            placement: Placement::default(),
            namespaces: Arc::new([]),
            volatile,
            bed: Bed::new().unwrap(),
            keep,
        });
        let mut rig = Self {
            actor,
            shared,
            script,
            map: memory(BASE, LEN),
            tail: 0,
            head: 0,
            phase: true,
            entries: ENTRIES,
            lazy: false,
        };
        let done = rig.mail(|done| Mail::Memory(Arc::clone(&rig.map), done));
        rig.turns();
        assert!(is_done(&done));
        rig
    }

    /// Enabled, as Linux does it.
    fn enabled() -> Self {
        let mut rig = Self::new();
        rig.enable();
        rig
    }

    fn enable(&mut self) {
        self.set_up(self.entries);
        self.cc(Cc::new().with_en(true).with_iosqes(6).with_iocqes(4));
        assert_eq!(self.csts(), Csts::new().with_rdy(true));
    }

    /// Write AQA, ASQ and ACQ, clear the completion queue.
    fn set_up(&mut self, entries: u16) {
        let aqa = Aqa::new().with_asqs_z(entries - 1).with_acqs_z(entries - 1);
        self.write32(offset::AQA, aqa.into_bits());
        self.shared.registers.write(offset::ASQ, &ASQ.to_le_bytes());
        self.shared.registers.write(offset::ACQ, &ACQ.to_le_bytes());
        assert!(self.map.write(ACQ, &[0; 4096]));
        (self.tail, self.head, self.phase, self.entries) = (0, 0, true, entries);
    }

    fn write32(&self, at: u32, value: u32) {
        self.shared.registers.write(at, &value.to_le_bytes());
    }

    fn cc(&mut self, cc: Cc) {
        self.write32(offset::CC, cc.into_bits());
        self.turns();
    }

    fn csts(&self) -> Csts {
        self.shared.registers.csts()
    }

    fn turns(&mut self) {
        for _ in 0..100 {
            let more = self.actor.turn();
            if !more && self.idle() {
                return;
            }
        }
        panic!("the actor does not come to rest");
    }

    fn idle(&self) -> bool {
        self.actor.is_idle()
    }

    /// Send mail with a waiter.
    fn mail(&self, make: impl FnOnce(crossbeam_channel::Sender<()>) -> Mail) -> Receiver<()> {
        let (sender, receiver) = crossbeam_channel::bounded(0);
        self.shared.inbox.send(make(sender));
        receiver
    }

    fn bell(&self, doorbell: Doorbell, value: u32) {
        let at = self.shared.info.stride.window_offset(doorbell) as usize;
        let register = self.shared.window.register(at).unwrap();
        register.store(value, Ordering::Release);
    }

    fn bell_value(&self, doorbell: Doorbell) -> u32 {
        let at = self.shared.info.stride.window_offset(doorbell) as usize;
        self.shared
            .window
            .register(at)
            .unwrap()
            .load(Ordering::Acquire)
    }

    /// Put a command into the admin queue and ring.
    fn submit(&mut self, sqe: Sqe) {
        let at = ASQ + u64::from(self.tail) * 64;
        assert!(self.map.write(at, sqe.as_bytes()));
        self.tail = (self.tail + 1) % self.entries;
        self.bell(Doorbell::Sq(0), self.tail.into());
    }

    /// The completions that have come, oldest first.
    fn completions(&mut self) -> Vec<Cqe> {
        self.turns();
        let mut found = Vec::new();
        loop {
            let mut bytes = [0; 16];
            assert!(self.map.read(ACQ + u64::from(self.head) * 16, &mut bytes));
            let cqe: Cqe = zerocopy::transmute!(bytes);
            if cqe.status.p() != self.phase {
                break;
            }
            found.push(cqe);
            self.head = (self.head + 1) % self.entries;
            self.phase ^= self.head == 0;
        }
        if !self.lazy {
            self.bell(Doorbell::Cq(0), self.head.into());
        }
        found
    }

    /// One command and its completion.
    fn run(&mut self, sqe: Sqe) -> Cqe {
        self.submit(sqe);
        let done = self.completions();
        assert_eq!(done.len(), 1, "{sqe:?}: {done:?}");
        assert_eq!((done[0].cid, done[0].sqid), (sqe.cid, 0));
        assert_eq!(done[0].sqhd, self.tail);
        assert_eq!(done[0].status.dnr(), done[0].status().default_dnr());
        done[0]
    }

    fn status(&mut self, sqe: Sqe) -> Status {
        self.run(sqe).status()
    }

    fn ok(&mut self, sqe: Sqe) -> u32 {
        let cqe = self.run(sqe);
        assert_eq!(cqe.status(), Status::SUCCESS, "{sqe:?}");
        cqe.dw0
    }

    fn create_cq(&mut self, qid: u16) {
        self.ok(create_cq(qid));
    }

    fn create_pair(&mut self, qid: u16) {
        self.ok(create_cq(qid));
        self.ok(create_sq(qid, qid));
    }

    /// What was sent to pollers since the last call: `poller: message`.
    fn sent(&self) -> Vec<String> {
        let sent = std::mem::take(&mut *self.script.sent.lock().unwrap());
        sent.iter()
            .map(|(p, m)| format!("{p}: {}", kind(m)))
            .collect()
    }

    /// As [`Self::sent`], but the messages stay to be answered.
    fn sent_only(&self) -> Vec<String> {
        let sent = self.script.sent.lock().unwrap();
        sent.iter()
            .map(|(p, m)| format!("{p}: {}", kind(m)))
            .collect()
    }

    fn silence(&self, on: bool) {
        self.script.silent.store(on, Ordering::Relaxed);
    }

    /// Answer the messages that wait, in order.
    fn answer(&mut self, result: Result<bool, Status>) {
        let sent = std::mem::take(&mut *self.script.sent.lock().unwrap());
        for (poller, message) in sent {
            if let Some(token) = token(&message) {
                self.shared.inbox.reply(poller, Reply { token, result });
            }
        }
    }

    fn data(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert!(self.map.read(at, &mut bytes));
        bytes
    }
}

/// Whether what the receiver waits for has been done.
fn is_done(receiver: &Receiver<()>) -> bool {
    receiver.try_recv() == Err(TryRecvError::Disconnected)
}

fn command(opcode: AdminOpcode) -> Sqe {
    Sqe {
        opcode: opcode.0,
        cid: 7,
        prp1: DATA,
        prp2: DATA + 0x1000,
        ..Sqe::default()
    }
}

fn create_cq(qid: u16) -> Sqe {
    nvme_spec::admin::CreateIoCq {
        prp1: BASE + 0x20000 + u64::from(qid) * 0x2000,
        qid,
        qsize_z: 31,
        pc: true,
        ien: true,
        iv: qid,
    }
    .to_sqe()
    .with_cid(100 + qid)
}

fn create_sq(qid: u16, cqid: u16) -> Sqe {
    nvme_spec::admin::CreateIoSq {
        prp1: BASE + 0x40000 + u64::from(qid) * 0x2000,
        qid,
        qsize_z: 31,
        pc: true,
        cqid,
        ..Default::default()
    }
    .to_sqe()
    .with_cid(200 + qid)
}

fn identify_controller() -> Sqe {
    let mut sqe = command(AdminOpcode::IDENTIFY);
    sqe.cdw10 = 1;
    sqe
}
