//! A namespace that is a range of blocks of an SSD this process drives itself: commands are forwarded, not carried out.
//!
//! The controller above hands on what the guest wrote ([`GuestData`](super::GuestData)). Where a guest has the SSD for itself, its PRPs go
//! through as they are; where several share it, every page is checked and the PRPs are built anew in memory of the driver. What comes
//! back, status and Do Not Retry, is what the SSD said.

mod channel;
mod job;
mod pages;
mod stats;
#[cfg(test)]
mod tests;
mod window;

pub use channel::NvmeChannel;
pub use stats::Forwarded;
pub use window::{Shown, Window};

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nvme_spec::identify::DeallocatedRead;
use nvme_spec::log::SmartLog;

use super::geometry::bytes_of;
use super::traits::{Said, Traits};
use super::{Geometry, Opcodes, OpenError};
use crate::driver::{DriverError, Expected, FlushError, LaneError, Ssd, Watch};
use job::Limits;
use stats::Stats;

/// What an [`NvmeBackend`] is made of. The block size is the SSD's.
#[derive(Clone)]
pub struct NvmeOptions {
    /// The SSD.
    pub ssd: Arc<Ssd>,
    /// The guest's place in its address space: the same for all namespaces of one controller.
    pub window: Arc<Window>,
    /// Its namespace.
    pub nsid: u32,
    /// Where in that the guest's begins, in bytes.
    pub offset: u64,
    /// How large the guest's is, in bytes; `None` = to the end.
    pub size: Option<u64>,
    /// Never write to it.
    pub read_only: bool,
    /// Commands that go to the SSD as the guest wrote them, but for CID and NSID, whatever they do there. Only for a guest that has the whole
    /// namespace, and the SSD, for itself.
    pub pass: Opcodes,
}

/// A store that is a range of blocks of an SSD.
pub struct NvmeBackend {
    pub(super) geometry: Geometry,
    shared: Arc<Shared>,
}

/// What all channels of a namespace share.
struct Shared {
    ssd: Arc<Ssd>,
    window: Arc<Window>,
    nsid: u32,
    /// First block.
    first: u64,
    /// It must go on to have these blocks.
    watch: Arc<Watch>,
    limits: Limits,
    traits: Traits,
    stats: Mutex<Vec<Arc<Stats>>>,
}

impl NvmeBackend {
    /// Look at the SSD's namespace and take a range of it.
    ///
    /// # Errors
    ///
    /// There is no such namespace, its format is one no guest can be given, or the range does not lie in it.
    pub fn open(options: &NvmeOptions) -> Result<Self, OpenError> {
        let (ssd, nsid) = (&options.ssd, options.nsid);
        let name = format!("namespace {nsid} of SSD {}", ssd.name());
        let found = ssd
            .namespace(nsid)
            .map_err(|e| not_there(ssd, &name, nsid, &e))?;
        let namespace = &found.identify;
        if namespace.nsze == 0 {
            return Err(inactive(ssd, &name));
        }
        let Some(format) = namespace.current_format() else {
            return Err(OpenError::new(
                format!("{name} does not say which LBA format it has"),
                "format the namespace (nvme format), or use another",
            ));
        };
        if format.ms != 0 {
            return Err(OpenError::new(
                format!("{name} has {} bytes of metadata with each block", format.ms),
                "format the namespace without metadata (nvme format)",
            ));
        }
        let block_shift = u32::from(format.lbads);
        // Also that its bytes can be counted.
        let bytes = bytes_of(namespace.nsze, block_shift).map_err(|e| OpenError {
            what: format!("{name}: {}", e.what),
            ..e
        })?;
        let blocks = range_of(&name, bytes, options.offset, options.size, block_shift)?;
        let whole = blocks == (0..namespace.nsze);
        let alone = whole && options.window.is_sole();
        if !options.pass.is_empty() && !alone {
            return Err(OpenError::new(
                format!("commands nobody checks cannot be passed to {name}"),
                "pass-opcodes is for a controller that has the SSD alone, and the whole of its namespace",
            ));
        }
        let said = Said {
            controller: ssd.identify(),
            namespace,
            nvm: &found.nvm,
            limits: ssd.nvm(),
            mpsmin: ssd.cap().mpsmin(),
            max_transfer: ssd.max_transfer(),
            first: blocks.start,
            pass: options.pass,
        };
        let traits = Traits::of(&said);
        let geometry = Geometry {
            block_shift,
            blocks: blocks.end - blocks.start,
            read_only: options.read_only,
            volatile_write_cache: ssd.identify().vwc.present(),
            deallocate_reads_zero: namespace.dlfeat.read() == DeallocatedRead::ZEROES,
            // How much of a part of it takes up space cannot be asked.
            thin: false,
            optimal_blocks: match namespace.nsfeat.optperf() {
                true => u32::from(namespace.npwg_z) + 1,
                false => 1,
            },
        };
        Ok(Self {
            geometry,
            shared: Arc::new(Shared {
                ssd: Arc::clone(ssd),
                window: Arc::clone(&options.window),
                nsid,
                first: blocks.start,
                watch: ssd.watch(Expected {
                    nsid,
                    lbads: format.lbads,
                    blocks: blocks.end,
                }),
                limits: Limits::of(&traits, namespace.noiob, block_shift),
                traits,
                stats: Mutex::default(),
            }),
        })
    }

    pub(super) fn channel(&self, depth: u32) -> Result<NvmeChannel, OpenError> {
        let shared = &self.shared;
        let lane = shared.ssd.lane_to(&shared.watch, depth).map_err(|e| OpenError {
            what: format!("no queue pair of SSD {} for a poller: {e}", shared.ssd.name()),
            hint: match e {
                LaneError::NoQueues { .. } => {
                    "each namespace on it needs one for each poller of its controller: give the controller fewer (pollers = [...])"
                }
                _ => "see the log for what the SSD did",
            }
            .into(),
            source: None,
        })?;
        let stats = Arc::new(Stats::default());
        let mut all = shared.stats.lock().unwrap_or_else(PoisonError::into_inner);
        stats::retire(&mut all);
        all.push(Arc::clone(&stats));
        Ok(NvmeChannel::new(
            self.geometry,
            Arc::clone(shared),
            lane,
            depth,
            stats,
        ))
    }

    /// Flush by a queue pair of a poller, as [`Ssd::flush`] does.
    pub(super) fn sync(&self, limit: Duration) -> Result<(), FlushError> {
        self.shared.ssd.flush(self.shared.nsid, limit)
    }

    /// Commands that are handed on unchecked.
    pub fn passes(&self) -> Opcodes {
        self.shared.traits.pass
    }

    /// The health of the SSD, as its keeper read it last.
    pub fn health(&self) -> Option<SmartLog> {
        self.shared.ssd.health()
    }

    /// What the SSD says of itself.
    pub fn traits(&self) -> &Traits {
        &self.shared.traits
    }

    /// The guest's place in the SSD's address space.
    pub fn window(&self) -> &Arc<Window> {
        &self.shared.window
    }

    /// The SSD, and its namespace.
    pub fn ssd(&self) -> (&Arc<Ssd>, u32) {
        (&self.shared.ssd, self.shared.nsid)
    }

    /// The blocks of the SSD's namespace that are this one's.
    pub fn blocks(&self) -> Range<u64> {
        self.shared.first..self.shared.first + self.geometry.blocks
    }

    /// How commands were forwarded so far.
    pub fn forwarded(&self) -> Forwarded {
        let all = self.shared.stats.lock();
        stats::sum(&all.unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn store_id(&self) -> String {
        let Shared {
            ssd, nsid, first, ..
        } = &*self.shared;
        let said = ssd.identify();
        format!("nvme {} {:?} {nsid} {first}", ssd.name(), said.sn)
    }

    pub(super) fn describe(&self) -> String {
        let Shared {
            ssd, window, nsid, ..
        } = &*self.shared;
        let how = match window.is_sole() {
            true => "PRPs as the guest wrote them",
            false => "shared, PRPs checked and built anew",
        };
        let blocks = self.blocks();
        format!(
            "SSD {}, namespace {nsid}, blocks {} to {}, {how}",
            ssd.name(),
            blocks.start,
            blocks.end - 1
        )
    }
}

fn not_there(ssd: &Ssd, name: &str, nsid: u32, error: &DriverError) -> OpenError {
    match error {
        DriverError::Refused { .. } => inactive(ssd, name),
        _ => OpenError::new(
            format!("cannot identify {name} (NSID {nsid}): {error}"),
            "see the log for what the SSD did",
        ),
    }
}

fn inactive(ssd: &Ssd, name: &str) -> OpenError {
    let there: Vec<String> = ssd
        .namespaces()
        .unwrap_or_default()
        .iter()
        .map(u32::to_string)
        .collect();
    OpenError::new(
        format!("there is no {name}"),
        match there.is_empty() {
            true => "it has no namespace at all; make one (nvme create-ns)".to_owned(),
            false => format!("set ssd-namespace to one it has: {}", there.join(", ")),
        },
    )
}

/// The blocks of a range given in bytes, in a namespace of `bytes` bytes.
fn range_of(
    name: &str,
    bytes: u64,
    offset: u64,
    size: Option<u64>,
    block_shift: u32,
) -> Result<Range<u64>, OpenError> {
    let block = 1u64 << block_shift;
    for (what, value) in [("offset", Some(offset)), ("size", size)] {
        if let Some(value) = value
            && !value.is_multiple_of(block)
        {
            return Err(OpenError::new(
                format!("{what} {value} is not whole blocks of {name}"),
                format!("its blocks have {block} bytes"),
            ));
        }
    }
    let end = match size {
        None => Some(bytes),
        Some(size) => offset.checked_add(size),
    };
    match end.filter(|end| offset < *end && *end <= bytes) {
        Some(end) => Ok(offset >> block_shift..end >> block_shift),
        None => Err(OpenError::new(
            format!(
                "{} bytes from offset {offset} do not lie in {name}",
                size.map_or_else(|| "no".into(), |s| s.to_string())
            ),
            format!("it has {bytes} bytes"),
        )),
    }
}
