//! A thread that does for a channel what the kernel does only while one waits: discarding on a block device.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::{Shared, ring};
use crate::backend::{Tag, wake};

/// A range to be discarded for a tag.
struct Job {
    tag: Tag,
    offset: u64,
    len: u64,
}

/// The thread and the ways to it and back; both have room for every tag.
pub(super) struct Helper {
    jobs: Option<Sender<Job>>,
    results: Receiver<(Tag, i32)>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Helper {
    /// Start it. `wake` is signalled after each result.
    ///
    /// # Errors
    ///
    /// What the kernel says when there can be no more threads.
    pub fn start(shared: &Arc<Shared>, depth: u32, wake: Arc<OwnedFd>) -> io::Result<Self> {
        let (jobs, todo) = bounded::<Job>(depth as usize);
        let (done, results) = bounded(depth as usize);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let shared = Arc::clone(shared);
        let work = move || {
            for job in todo {
                if stopped.load(Ordering::Acquire) {
                    break;
                }
                let result = ring::discard(&shared.file, job.offset, job.len);
                let errno = result.map_or_else(|e| e.raw_os_error().unwrap_or(libc::EIO), |()| 0);
                if done.send((job.tag, errno)).is_err() {
                    break;
                }
                wake::signal(&*wake);
            }
        };
        let thread = std::thread::Builder::new()
            .name("nvme-discard".to_owned())
            .spawn(work)?;
        Ok(Self {
            jobs: Some(jobs),
            results,
            stop,
            thread: Some(thread),
        })
    }

    /// Begin a discard. `false` if the thread is gone.
    #[must_use]
    pub fn discard(&self, tag: Tag, offset: u64, len: u64) -> bool {
        let job = Job { tag, offset, len };
        self.jobs.as_ref().is_some_and(|j| j.try_send(job).is_ok())
    }

    /// The next result: tag and errno, 0 for success.
    pub fn next(&self) -> Option<(Tag, i32)> {
        self.results.try_recv().ok()
    }
}

impl Drop for Helper {
    /// Waits for the discard that runs, so that none comes after whatever follows; the others never begin.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
