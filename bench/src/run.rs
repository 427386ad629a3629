//! One run: guests kept busy by this thread, in turn, for some seconds; what came of it.

use std::io::Read as _;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rustix::event::{PollFd, PollFlags, Timespec};
use serde::Serialize;

use crate::Failure;
use crate::fence::ticks;
use crate::guest::Client;
use crate::queue::Queue;

/// Without a completion for so long, a run has failed.
const STUCK: Duration = Duration::from_secs(5);

/// Empty rounds over all queues from one look at the clock to the next.
const ROUNDS_PER_LOOK: u32 = 64;

/// What a guest reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    /// Commands per second.
    pub iops: f64,
    /// Mean time of a command, from before its submission to after its completion was seen.
    pub avg_ns: f64,
    /// Median.
    pub p50_ns: f64,
    /// 99 of 100 were as fast.
    pub p99_ns: f64,
    /// 999 of 1000 were as fast.
    pub p999_ns: f64,
    /// The slowest.
    pub max_ns: f64,
}

/// What a guest reached, with the time of each of its commands.
pub struct Outcome {
    /// In numbers.
    pub figures: Figures,
    /// Times in ticks.
    pub times: Histogram<u64>,
    /// How long a tick is.
    pub ns_per_tick: f64,
    /// Whether a doorbell was a plain store at the end of the run.
    pub mapped: bool,
}

impl Figures {
    fn of(times: &Histogram<u64>, seconds: f64, ns_per_tick: f64) -> Self {
        let at = |q| times.value_at_quantile(q) as f64 * ns_per_tick;
        Self {
            iops: times.len() as f64 / seconds,
            avg_ns: times.mean() * ns_per_tick,
            p50_ns: at(0.5),
            p99_ns: at(0.99),
            p999_ns: at(0.999),
            max_ns: times.max() as f64 * ns_per_tick,
        }
    }
}

/// Keep all guests at their depths: a while that is not counted, then `length` that is. What each guest reached.
///
/// # Errors
///
/// A command failed, or none completed for seconds.
pub fn load(
    guests: &mut [Client],
    warm_up: Duration,
    length: Duration,
) -> Result<Vec<Outcome>, Failure> {
    for queue in guests.iter_mut().flat_map(|g| &mut g.queues) {
        queue.fill();
    }
    phase(guests, warm_up)?;
    for queue in guests.iter_mut().flat_map(|g| &mut g.queues) {
        queue.forget();
    }
    let (start, start_ticks) = (Instant::now(), ticks());
    phase(guests, length)?;
    let (elapsed, elapsed_ticks) = (start.elapsed(), ticks() - start_ticks);
    let seconds = elapsed.as_secs_f64();
    let ns_per_tick = seconds * 1e9 / elapsed_ticks as f64;
    let outcomes = guests.iter().map(|guest| {
        let mut times = guest.queues[0].times().clone();
        for queue in &guest.queues[1..] {
            times.add(queue.times()).expect("histograms of one shape");
        }
        Outcome {
            figures: Figures::of(&times, seconds, ns_per_tick),
            times,
            ns_per_tick,
            mapped: guest.doorbells_mapped(),
        }
    });
    let outcomes = outcomes.collect();
    drain(guests)?;
    Ok(outcomes)
}

fn phase(guests: &mut [Client], length: Duration) -> Result<(), Failure> {
    let start = Instant::now();
    let mut last = start;
    let mut rounds = 0u32;
    let mut seen = 0u32;
    loop {
        let mut any = 0;
        for queue in guests.iter_mut().flat_map(|g| &mut g.queues) {
            any += pass(queue, true)?;
        }
        seen |= any;
        rounds += 1;
        let sleeps = any == 0 && guests[0].queues[0].interrupt().is_some();
        if sleeps {
            wait(guests)?;
        }
        if rounds >= ROUNDS_PER_LOOK || sleeps {
            rounds = 0;
            let now = Instant::now();
            if now.duration_since(start) >= length {
                return Ok(());
            }
            if seen != 0 {
                (last, seen) = (now, 0);
            } else if now.duration_since(last) > STUCK {
                return Err(stuck(guests));
            }
        }
    }
}

#[inline]
fn pass(queue: &mut Queue, again: bool) -> Result<u32, Failure> {
    queue
        .pass(again)
        .map_err(|wrong| Failure(wrong.to_string()))
}

fn stuck(guests: &[Client]) -> Failure {
    let out: Vec<u32> = guests
        .iter()
        .flat_map(|g| &g.queues)
        .map(Queue::out)
        .collect();
    Failure(format!(
        "nothing completed for {STUCK:?}; commands out on each queue: {out:?}"
    ))
}

/// Take what is still out.
fn drain(guests: &mut [Client]) -> Result<(), Failure> {
    let start = Instant::now();
    loop {
        let mut out = 0;
        for queue in guests.iter_mut().flat_map(|g| &mut g.queues) {
            pass(queue, false)?;
            out += queue.out();
        }
        if out == 0 {
            return Ok(());
        }
        if start.elapsed() > STUCK {
            return Err(stuck(guests));
        }
    }
}

/// Sleep until a queue interrupts.
fn wait(guests: &[Client]) -> Result<(), Failure> {
    let files: Vec<_> = guests
        .iter()
        .flat_map(|g| &g.queues)
        .filter_map(Queue::interrupt)
        .collect();
    let mut fds: Vec<_> = files
        .iter()
        .map(|f| PollFd::new(*f, PollFlags::IN))
        .collect();
    let limit = Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    };
    match rustix::event::poll(&mut fds, Some(&limit)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(e) => return Err(Failure::of("waiting for an interrupt", &e)),
    }
    for (fd, file) in fds.iter().zip(&files) {
        let mut file = *file;
        if fd.revents().contains(PollFlags::IN) {
            // Non-blocking: whoever read it before us has seen it.
            let _ = file.read(&mut [0; 8]);
        }
    }
    Ok(())
}

/// `count` single commands with a pause before each: how long one takes when nothing was going on.
///
/// # Errors
///
/// A command failed, or did not complete for seconds.
pub fn wake_ups(guest: &mut Client, count: u32, pause: Duration) -> Result<Figures, Failure> {
    let queue = &mut guest.queues[0];
    let (start, start_ticks) = (Instant::now(), ticks());
    queue.forget();
    for _ in 0..count {
        std::thread::sleep(pause);
        let sent = Instant::now();
        queue.one();
        while pass(queue, false)? == 0 {
            if sent.elapsed() > STUCK {
                return Err(Failure(format!("a command is out for {STUCK:?}")));
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let ns_per_tick = seconds * 1e9 / (ticks() - start_ticks) as f64;
    Ok(Figures::of(queue.times(), seconds, ns_per_tick))
}
