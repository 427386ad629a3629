//! Lanes that are made: whoever asks has one at once, and the keeper gives it its queue pair when it has the time.
//!
//! A keeper that resets its SSD answers nobody for minutes, and a poller serves others too: it must not wait.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam_channel::Sender;
use nvme_spec::prp::PageSize;
use nvme_spec::ring::RingSize;

use super::keeper::{Keeper, Trouble, trouble_of};
use super::link::{Link, Order, Pair, Shared, event_fd, lock};
use super::{Facts, LaneError, SsdState, Watch};
use crate::driver::lists::Lists;
use crate::driver::{Access, Device as _, DriverError, QueueConfig};

/// Pages of the lists and queues of a lane.
const PAGE: PageSize = PageSize::K4;

/// The queue identifiers there are, and those that are taken.
#[derive(Default)]
pub(super) struct Seats {
    pub(super) granted: u16,
    taken: Vec<u16>,
    /// The eventfds of the interrupt vectors; none without interrupts.
    pub(super) vectors: Vec<File>,
}

/// A queue identifier that is taken, until this is dropped.
struct Seat {
    shared: Arc<Shared>,
    qid: u16,
}

impl Seat {
    fn take(shared: &Arc<Shared>) -> Result<Self, LaneError> {
        let mut seats = lock(&shared.seats);
        let (granted, used) = (seats.granted, seats.taken.len() as u16);
        let qid = (1..=granted)
            .find(|qid| !seats.taken.contains(qid))
            .ok_or(LaneError::NoQueues { granted, used })?;
        seats.taken.push(qid);
        Ok(Self {
            shared: Arc::clone(shared),
            qid,
        })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut seats = lock(&self.shared.seats);
        seats.taken.retain(|qid| *qid != self.qid);
    }
}

/// A lane, as the keeper sees it.
pub(super) struct Entry {
    pub(super) link: Arc<Link>,
    pub(super) config: QueueConfig,
    /// The namespace it is for, if for one only.
    pub(super) watch: Option<Arc<Watch>>,
    _seat: Seat,
}

/// A lane that the keeper has not seen yet. If it never does, the lane is told that the SSD is gone.
pub(super) struct Opening {
    entry: Option<Entry>,
    /// Whoever waits for it.
    answer: Option<Sender<Result<(), LaneError>>>,
}

impl Opening {
    /// A lane of this depth: its link and the depth it gets.
    pub(super) fn new(
        shared: &Arc<Shared>,
        facts: &Facts,
        depth: u32,
        watch: Option<Arc<Watch>>,
        answer: Option<Sender<Result<(), LaneError>>>,
    ) -> Result<(Self, Arc<Link>, u32), LaneError> {
        let seat = Seat::take(shared)?;
        let most = u32::from(facts.cap.mqes_z()) + 1;
        let size = RingSize::new(depth.saturating_add(1).clamp(2, most.clamp(2, 4096)))
            .unwrap_or(RingSize::MIN);
        let (vector, wake) = wake_of(shared, seat.qid)?;
        let link = Arc::new(Link::new(wake));
        // It holds no queue pair.
        link.mail().parked = true;
        let entry = Entry {
            link: Arc::clone(&link),
            config: QueueConfig {
                qid: seat.qid,
                sq_size: size,
                cq_size: size,
                depth: size.capacity(),
                // The lists are the lane's: they outlive the queue pair.
                max_transfer: PAGE.bytes(),
                vector,
            },
            watch,
            _seat: seat,
        };
        let depth = entry.config.depth;
        let opening = Self {
            entry: Some(entry),
            answer,
        };
        Ok((opening, link, depth))
    }
}

impl Drop for Opening {
    fn drop(&mut self) {
        if let Some(entry) = &self.entry {
            entry.link.order(Order::Gone);
        }
    }
}

/// The interrupt vector of a queue, and what wakes its poller.
fn wake_of(shared: &Shared, qid: u16) -> Result<(Option<u16>, File), DriverError> {
    let seats = lock(&shared.seats);
    let vector = match seats.vectors.len() as u16 {
        0 => None,
        1 => Some(0),
        n => Some(1 + (qid - 1) % (n - 1)),
    };
    let file = match vector.and_then(|vector| seats.vectors.get(usize::from(vector))) {
        Some(file) => file.try_clone(),
        None => event_fd().map(File::from),
    };
    let file = file.map_err(DriverError::device("making an eventfd"))?;
    Ok((vector, file))
}

impl Keeper {
    /// Give a lane what it needs. While the SSD is being reset it gets its queue pair later.
    pub(super) fn open(&mut self, mut opening: Opening) {
        let Some(entry) = &opening.entry else { return };
        if entry.link.mail().dropped.is_some() {
            return;
        }
        let (config, waits) = (entry.config, opening.answer.is_some());
        let made = self.equip(config, waits);
        let result = match (made, opening.entry.take()) {
            (Ok((lists, pair)), Some(entry)) => {
                let changed = entry.watch.as_ref().is_some_and(|watch| watch.is_changed());
                {
                    let mut mail = entry.link.mail();
                    mail.lists = Some(lists);
                    mail.refuse |= changed;
                }
                match pair {
                    Some(pair) => drop(entry.link.order(Order::Resume(pair))),
                    None => {
                        entry.link.look.store(true, Ordering::Release);
                        entry.link.wake_lane();
                    }
                }
                self.lanes.push(entry);
                Ok(())
            }
            (made, entry) => {
                opening.entry = entry;
                made.map(drop)
            }
        };
        match (&opening.answer, result) {
            (Some(answer), result) => drop(answer.try_send(result)),
            (None, Ok(())) => {}
            (None, Err(error)) => tracing::error!(
                ssd = self.shared.name, %error,
                "a poller's queue pair could not be made: its I/O to this SSD fails"
            ),
        }
    }

    /// Lists and, unless there is a reset, the queue pair of a lane. Nobody `waits`: then a controller that has to be reset for its answer is as
    /// good as one that is being reset.
    fn equip(
        &mut self,
        config: QueueConfig,
        waits: bool,
    ) -> Result<(Lists, Option<Box<Pair>>), LaneError> {
        // In the middle of a reset there is no driver: such a lane gets its queue pair with all others.
        let state = self.shared.state();
        match state {
            SsdState::Gone => return Err(LaneError::Gone),
            SsdState::Ready if self.driver.is_none() => return Err(LaneError::Gone),
            SsdState::Ready | SsdState::Resetting => {}
        }
        let handle = &mut self.handle;
        let max_transfer = self.facts.max_transfer;
        let lists = Lists::new(PAGE, config.depth, max_transfer, true, |bytes| {
            handle.allocate(bytes, Access::ReadOnly)
        })
        .map_err(DriverError::device("allocating PRP lists"))?;
        if state == SsdState::Resetting {
            return Ok((lists, None));
        }
        match self.with_driver(|d| d.create_queue_pair(config)) {
            Ok(pair) => Ok((lists, Some(Box::new(pair)))),
            Err(error) if !waits && matches!(trouble_of(&error), Some(Trouble::Reset(_))) => {
                Ok((lists, None))
            }
            Err(error) => Err(error.into()),
        }
    }
}
