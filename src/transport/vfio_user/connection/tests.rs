//! A connection whose client does not read, and one that has nothing to say.

use std::io::Write as _;
use std::os::fd::AsFd as _;

use rustix::time::{ClockId, clock_gettime};

use super::*;
use crate::backend::{Backend, NullOptions};
use crate::controller::{ControllerConfig, NamespaceConfig};
use crate::poller::{IdlePolicy, PollerConfig, PollerPool};
use crate::state::Keep;

fn pollers() -> PollerPool {
    let config = PollerConfig {
        core: None,
        idle: IdlePolicy::Adaptive,
        poll_for: Duration::from_micros(50),
        slots: 16,
    };
    PollerPool::start(&[config]).unwrap()
}

fn controller(pollers: &PollerPool) -> Arc<Controller> {
    let store = Backend::null(NullOptions {
        block_shift: 9,
        blocks: 64,
        read_only: false,
    });
    let config = ControllerConfig {
        name: "vm1".into(),
        serial: "S1".into(),
        model: "M".into(),
        subnqn: "nqn.2014-08.org.example:vm1".into(),
        namespaces: vec![NamespaceConfig {
            nsid: 1,
            backend: Arc::new(store.unwrap()),
            read_only: false,
            identity: "vm1/1".into(),
            uuid: None,
            nguid: None,
            eui64: None,
        }],
        max_namespaces: 1,
        queues: 2,
        max_queue_entries: 64,
        max_transfer: 1 << 20,
        doorbell_buffer: true,
        sgls: true,
        doorbell_stride: 0,
        pci_ids: [1, 2, 3, 4],
        placement: Default::default(),
        keep: Arc::new(Keep::nowhere()),
    };
    Controller::new(config, pollers).unwrap()
}

fn header(code: u16, body: usize) -> Vec<u8> {
    let mut out = vec![0, 0];
    out.extend(code.to_ne_bytes());
    for word in [16 + body as u32, 0, 0] {
        out.extend(word.to_ne_bytes());
    }
    out
}

/// Agree on a version.
fn version(client: &mut UnixStream) {
    let mut message = header(1, 4);
    message.extend([0; 4]);
    client.write_all(&message).unwrap();
}

/// Ask for answers and read none, until nobody takes what we send.
fn fill(client: &mut UnixStream) {
    client.set_nonblocking(true).unwrap();
    let mut message = header(9, 16);
    message.extend(0u64.to_ne_bytes());
    for word in [0u32, 0x4000] {
        message.extend(word.to_ne_bytes());
    }
    let (mut sent, mut stuck) = (0, 0);
    while stuck < 20 {
        match client.write(&message[sent..]) {
            Ok(n) => (sent, stuck) = ((sent + n) % message.len(), 0),
            Err(_) => {
                stuck += 1;
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

/// What this thread has had of a processor.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec as u32)
}

/// What a thread that does not sleep has in this test.
const BUSY: Duration = Duration::from_millis(200);

/// What a connection takes of a processor that has nothing to do after `begin`, though the controller has asked for doorbells, while one that
/// does not sleep takes [`BUSY`]: how long that is, other processes decide.
fn takes(begin: impl FnOnce(&mut UnixStream)) -> Duration {
    let pollers = pollers();
    let controller = controller(&pollers);
    let (ours, mut client) = UnixStream::pair().unwrap();
    let stop = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let front = Arc::new(Front::new().unwrap());
    std::thread::scope(|scope| {
        let served = scope.spawn(|| {
            let mut connection =
                Connection::new(&ours, &controller, Arc::clone(&front), stop.as_fd()).unwrap();
            let end = connection.run();
            assert!(matches!(end, End::Stopped), "{end:?}");
            cpu_time()
        });
        version(&mut client);
        begin(&mut client);
        front.request_doorbells(DoorbellMode::Trapped);
        std::thread::sleep(Duration::from_millis(20));
        // One wake-up more than there are wishes.
        rustix::io::write(&front.wake, &1u64.to_ne_bytes()).unwrap();
        let other = scope.spawn(|| {
            let always = eventfd(1, EventfdFlags::NONBLOCK).unwrap();
            while cpu_time() < BUSY {
                poll(&mut [PollFd::new(&always, PollFlags::IN)], None).unwrap();
            }
        });
        other.join().unwrap();
        rustix::io::write(&stop, &1u64.to_ne_bytes()).unwrap();
        served.join().unwrap()
    })
}

#[test]
fn who_waits_for_a_client_that_does_not_read_does_not_spin() {
    let taken = takes(fill);
    assert!(taken < BUSY / 4, "{taken:?}");
}

#[test]
fn a_wake_up_without_a_wish_does_not_spin() {
    let taken = takes(|_| ());
    assert!(taken < BUSY / 4, "{taken:?}");
}
