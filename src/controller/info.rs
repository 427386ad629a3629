//! What a controller is and never changes: the checked form of its configuration.

use std::sync::Arc;
use std::time::Duration;

use nvme_spec::doorbell::DoorbellStride;

use super::health::{CRITICAL_TEMPERATURE, WARNING_TEMPERATURE};
use super::identity::Identity;
use super::{ControllerConfig, ControllerError};
use crate::backend::{Geometry, Traits};

/// Most queue pairs and vectors of a controller.
const MAX_QUEUES: u16 = 64;
/// Largest transfer.
const MAX_TRANSFER: u32 = 1 << 20;

/// A namespace as Identify shows it.
#[derive(Clone, Debug)]
pub(super) struct NamespaceInfo {
    pub(super) nsid: u32,
    pub(super) geometry: Geometry,
    pub(super) read_only: bool,
    pub(super) identity: Identity,
    /// What its SSD says, if it is on one.
    pub(super) traits: Option<Arc<Traits>>,
}

/// A controller as Identify shows it.
#[derive(Clone, Debug)]
pub(super) struct Info {
    pub(super) name: String,
    pub(super) serial: String,
    pub(super) model: String,
    pub(super) subnqn: String,
    /// By ascending NSID.
    pub(super) namespaces: Vec<NamespaceInfo>,
    /// NN.
    pub(super) max_namespaces: u32,
    /// Queue pairs and vectors, admin included.
    pub(super) queues: u16,
    pub(super) max_queue_entries: u32,
    pub(super) max_transfer: u32,
    pub(super) doorbell_buffer: bool,
    /// SGLs are offered.
    pub(super) sgls: bool,
    pub(super) stride: DoorbellStride,
    /// How long I/O may be out that is not wanted any more.
    pub(super) patience: Duration,
    pub(super) pci_ids: [u16; 4],
}

impl Info {
    /// Check a configuration.
    ///
    /// # Errors
    ///
    /// The first value that is wrong, by name.
    pub(super) fn of(config: &ControllerConfig) -> Result<Self, ControllerError> {
        let mut namespaces = Vec::with_capacity(config.namespaces.len());
        for ns in &config.namespaces {
            let geometry = ns.backend.geometry();
            namespaces.push(NamespaceInfo {
                nsid: ns.nsid,
                geometry,
                read_only: ns.read_only || geometry.read_only,
                identity: Identity::of(ns),
                traits: ns.backend.traits().copied().map(Arc::new),
            });
        }
        namespaces.sort_by_key(|ns| ns.nsid);
        let info = Self {
            name: config.name.clone(),
            serial: config.serial.clone(),
            model: config.model.clone(),
            subnqn: config.subnqn.clone(),
            namespaces,
            max_namespaces: config.max_namespaces,
            queues: config.queues,
            max_queue_entries: config.max_queue_entries,
            max_transfer: config.max_transfer,
            doorbell_buffer: config.doorbell_buffer,
            // What goes to an SSD in the guest's words goes there in PRPs.
            sgls: config.sgls && !config.namespaces.iter().any(|ns| ns.backend.forwards()),
            stride: DoorbellStride::new(config.doorbell_stride),
            patience: config
                .namespaces
                .iter()
                .map(|ns| ns.backend.patience())
                .max()
                .unwrap_or_default(),
            pci_ids: config.pci_ids,
        };
        let wrong = match config.doorbell_stride {
            0..=15 => info.fault(),
            other => Some(format!("doorbell stride {other} is not 0 to 15")),
        };
        match wrong {
            None => Ok(info),
            Some(what) => Err(ControllerError {
                name: config.name.clone(),
                what,
                source: None,
            }),
        }
    }

    /// What is wrong with it, and what would be right.
    fn fault(&self) -> Option<String> {
        let printable = |text: &str| text.bytes().all(|b| matches!(b, 0x20..=0x7E));
        let ascii = |what: &str, text: &str, most: usize| {
            (text.is_empty() || text.len() > most || !printable(text))
                .then(|| format!("{what} '{text}' is not 1 to {most} printable ASCII characters"))
        };
        ascii("serial number", &self.serial, 20)
            .or_else(|| ascii("model number", &self.model, 40))
            .or_else(|| {
                (self.subnqn.is_empty() || self.subnqn.len() > 223)
                    .then(|| format!("NQN of {} bytes: it must have 1 to 223", self.subnqn.len()))
            })
            .or_else(|| self.number_fault())
            .or_else(|| {
                self.namespaces
                    .iter()
                    .find_map(|ns| self.namespace_fault(ns))
            })
            .or_else(|| {
                self.namespaces.windows(2).find_map(|pair| match pair {
                    [a, b] if a.nsid == b.nsid => {
                        Some(format!("two namespaces have NSID {}", a.nsid))
                    }
                    _ => None,
                })
            })
    }

    fn number_fault(&self) -> Option<String> {
        if !(2..=MAX_QUEUES).contains(&self.queues) {
            return Some(format!(
                "{} queue pairs: it must be 2 to {MAX_QUEUES}, admin included",
                self.queues
            ));
        }
        if !(2..=65536).contains(&self.max_queue_entries) {
            return Some(format!(
                "queues of {} entries: it must be 2 to 65536",
                self.max_queue_entries
            ));
        }
        let size = self.max_transfer;
        if !(4096..=MAX_TRANSFER).contains(&size) || !size.is_power_of_two() {
            return Some(format!(
                "largest transfer of {size} bytes: it must be 4096 times a power of two, at most {MAX_TRANSFER}"
            ));
        }
        if self.doorbell_buffer && self.window_len() > 4096 {
            return Some(format!(
                "Doorbell Buffer Config needs all doorbells in one page: with {} queue pairs the doorbell stride {} is too \
                 large",
                self.queues,
                self.stride.dstrd()
            ));
        }
        if !(1..=0xFFFF_FFFE).contains(&self.max_namespaces) {
            return Some(format!(
                "{} namespaces at most: it must be 1 to 4294967294",
                self.max_namespaces
            ));
        }
        None
    }

    fn namespace_fault(&self, ns: &NamespaceInfo) -> Option<String> {
        let nsid = ns.nsid;
        if !(1..=self.max_namespaces).contains(&nsid) {
            return Some(format!(
                "NSID {nsid} is not 1 to {} (the highest this controller may have)",
                self.max_namespaces
            ));
        }
        let shift = ns.geometry.block_shift;
        if shift != 9 && shift != 12 {
            return Some(format!(
                "namespace {nsid}: logical blocks of 2^{shift} bytes; they must have 512 or 4096"
            ));
        }
        if ns.geometry.blocks == 0 {
            return Some(format!(
                "namespace {nsid} is smaller than one logical block"
            ));
        }
        None
    }

    /// Bytes of doorbells.
    pub(super) fn window_len(&self) -> u64 {
        self.stride.window_len(self.queues.saturating_sub(1))
    }

    /// The namespace with this NSID, if it is active, and its place.
    pub(super) fn namespace(&self, nsid: u32) -> Option<(usize, &NamespaceInfo)> {
        let at = self
            .namespaces
            .binary_search_by_key(&nsid, |ns| ns.nsid)
            .ok()?;
        Some((at, self.namespaces.get(at)?))
    }

    /// What the SSDs of its namespaces say.
    pub(super) fn traits(&self) -> impl Iterator<Item = &Traits> {
        self.namespaces.iter().filter_map(|ns| ns.traits.as_deref())
    }

    /// WCTEMP and CCTEMP, in kelvins: those of the SSD that is the first to get too hot.
    pub(super) fn temperatures(&self) -> [u16; 2] {
        let of = |at: usize| {
            let told = self.traits().filter_map(move |t| t.temperatures.get(at));
            told.copied().filter(|kelvins| *kelvins != 0).min()
        };
        [
            of(0).unwrap_or(WARNING_TEMPERATURE),
            of(1).unwrap_or(CRITICAL_TEMPERATURE),
        ]
    }

    /// Whether any namespace may lose data that was not flushed.
    pub(super) fn volatile_write_cache(&self) -> bool {
        self.namespaces
            .iter()
            .any(|ns| ns.geometry.volatile_write_cache)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A controller with a 512 B namespace (NSID 1, volatile cache) and a read-only 4096 B one (NSID 3).
    pub(in crate::controller) fn sample() -> Info {
        let ns = |nsid: u32, block_shift: u32, read_only: bool| NamespaceInfo {
            nsid,
            geometry: Geometry {
                block_shift,
                blocks: 1 << 20,
                read_only: false,
                volatile_write_cache: !read_only,
                deallocate_reads_zero: true,
                thin: true,
                optimal_blocks: 8,
            },
            read_only,
            identity: Identity::derived(&format!("sample {nsid}")),
            traits: None,
        };
        Info {
            name: "sample".into(),
            serial: "S123".into(),
            model: "A model".into(),
            subnqn: "nqn.2014-08.org.nvmexpress:uuid:sample".into(),
            namespaces: vec![ns(1, 9, false), ns(3, 12, true)],
            max_namespaces: 4,
            queues: 5,
            max_queue_entries: 1024,
            max_transfer: 1 << 20,
            doorbell_buffer: true,
            sgls: true,
            stride: DoorbellStride::PACKED,
            patience: Duration::ZERO,
            pci_ids: [0x1234, 0x5678, 0x9abc, 0xdef0],
        }
    }

    type Change = fn(&mut Info);

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(sample().fault(), None);
        let cases: [(Change, &str); 15] = [
            (|i| i.serial.clear(), "serial number"),
            (|i| i.serial = "x".repeat(21), "serial number"),
            (|i| i.model = "tab\t".into(), "model number"),
            (|i| i.subnqn = "x".repeat(224), "NQN of 224 bytes"),
            (|i| i.queues = 1, "1 queue pairs"),
            (|i| i.queues = 65, "65 queue pairs"),
            (|i| i.max_queue_entries = 1, "1 entries"),
            (|i| i.max_queue_entries = 65537, "65537 entries"),
            (|i| i.max_transfer = 12288, "12288 bytes"),
            (|i| i.max_transfer = 2 << 20, "2097152 bytes"),
            (|i| i.stride = DoorbellStride::new(9), "doorbell stride 9"),
            (|i| i.max_namespaces = 2, "NSID 3 is not 1 to 2"),
            (|i| i.namespaces[0].nsid = 0, "NSID 0"),
            (|i| i.namespaces[0].nsid = 3, "two namespaces have NSID 3"),
            (|i| i.namespaces[1].geometry.block_shift = 10, "2^10"),
        ];
        for (break_it, words) in cases {
            let mut info = sample();
            break_it(&mut info);
            let fault = info.fault().unwrap_or_default();
            assert!(fault.contains(words), "{words:?} not in {fault:?}");
        }
    }
}
