//! What a controller is at the end of a turn, as it is written down for whoever goes on with it: another process, or this one after
//! its front-end has come back.

use std::sync::Arc;

use nvme_spec::ring::RingSize;
use serde::{Deserialize, Serialize};

use super::admin::events::EventsImage;
use super::admin::features::FeaturesImage;
use super::admin::queue::AdminImage;
use super::error_log::ErrorLogImage;
use super::health::HealthImage;
use super::info::Info;
use super::registers::Host;
use crate::io::Namespace;

/// The version of [`Image`]; another one is refused.
const VERSION: u32 = 1;

/// All that has to be known before anybody outside may see what follows from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Image {
    pub(super) version: u32,
    /// The instance id that the front-end presented.
    pub(super) instance: Option<[u8; 16]>,
    /// What the controller was when this was written.
    pub(super) fingerprint: Fingerprint,
    pub(super) registers: Host,
    pub(super) phase: PhaseImage,
    /// CSTS.SHST was complete.
    pub(super) shut_down: bool,
    /// The admin queue, if it is served.
    pub(super) admin: Option<AdminImage>,
    /// Admin commands that were fetched and have not completed, oldest first, without asynchronous event requests.
    pub(super) commands: Vec<[u64; 8]>,
    pub(super) events: EventsImage,
    pub(super) features: FeaturesImage,
    pub(super) cqs: Vec<CqImage>,
    pub(super) sqs: Vec<SqImage>,
    /// Shadow doorbells and EventIdx, once all pollers use them.
    pub(super) shadow: Option<(u64, u64)>,
    /// NSIDs that changed since the guest read the list.
    pub(super) changed: Vec<u32>,
}

/// What is lost without harm: written with each image, but no reason to write one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Logs {
    pub(super) errors: ErrorLogImage,
    pub(super) health: HealthImage,
}

/// Where the controller is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum PhaseImage {
    Disabled,
    Ready,
    Failed,
}

/// A completion queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CqImage {
    pub(super) qid: u16,
    pub(super) base: u64,
    pub(super) entries: u32,
    /// Its interrupt vector, if interrupts are enabled.
    pub(super) vector: Option<u16>,
    /// Of its creation.
    pub(super) number: u32,
}

/// A submission queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SqImage {
    pub(super) qid: u16,
    pub(super) base: u64,
    pub(super) entries: u32,
    pub(super) cqid: u16,
    /// Of its creation.
    pub(super) number: u32,
}

impl CqImage {
    pub(super) fn size(&self) -> Option<RingSize> {
        RingSize::new(self.entries)
    }
}

impl SqImage {
    pub(super) fn size(&self) -> Option<RingSize> {
        RingSize::new(self.entries)
    }
}

/// What the guest knows of a controller and would not expect to change under it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Fingerprint {
    queues: u16,
    max_queue_entries: u32,
    max_transfer: u32,
    stride: u8,
    doorbell_buffer: bool,
    namespaces: Vec<NamespaceImage>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct NamespaceImage {
    nsid: u32,
    blocks: u64,
    block_shift: u32,
    read_only: bool,
    uuid: [u8; 16],
    /// Which store it is, where that can be another one under the same name.
    store: String,
}

impl Fingerprint {
    /// Of a controller whose namespaces have these stores, in the same order.
    pub(super) fn of(info: &Info, stores: &Arc<[Namespace]>) -> Self {
        let namespaces = info.namespaces.iter().enumerate();
        Self {
            queues: info.queues,
            max_queue_entries: info.max_queue_entries,
            max_transfer: info.max_transfer,
            stride: info.stride.dstrd(),
            doorbell_buffer: info.doorbell_buffer,
            namespaces: namespaces
                .map(|(at, ns)| NamespaceImage {
                    nsid: ns.nsid,
                    blocks: ns.geometry.blocks,
                    block_shift: ns.geometry.block_shift,
                    read_only: ns.read_only,
                    uuid: ns.identity.uuid,
                    store: stores
                        .get(at)
                        .map_or_else(String::new, |ns| ns.backend.store_id()),
                })
                .collect(),
        }
    }

    /// What of `self` is not as it was; and otherwise the namespaces that are larger now, or new.
    pub(super) fn changes(&self, now: &Self) -> Result<Vec<u32>, String> {
        let was = |what: &str, before: &dyn std::fmt::Display, after: &dyn std::fmt::Display| {
            Err(format!("{what} was {before} and is {after}"))
        };
        if self.queues != now.queues {
            return was("the number of queue pairs", &self.queues, &now.queues);
        }
        if self.max_queue_entries != now.max_queue_entries {
            let (before, after) = (&self.max_queue_entries, &now.max_queue_entries);
            return was("the largest queue", before, after);
        }
        if self.max_transfer != now.max_transfer {
            return was(
                "the largest transfer",
                &self.max_transfer,
                &now.max_transfer,
            );
        }
        if self.stride != now.stride {
            return was("the doorbell stride", &self.stride, &now.stride);
        }
        if self.doorbell_buffer != now.doorbell_buffer {
            let (before, after) = (&self.doorbell_buffer, &now.doorbell_buffer);
            return was("Doorbell Buffer Config", before, after);
        }
        let mut changed = Vec::new();
        for before in &self.namespaces {
            let nsid = before.nsid;
            let Some(after) = now.namespaces.iter().find(|ns| ns.nsid == nsid) else {
                return Err(format!("namespace {nsid} is gone"));
            };
            if after.blocks < before.blocks {
                let what = format!("the size of namespace {nsid} in blocks");
                return was(&what, &before.blocks, &after.blocks);
            }
            let same = NamespaceImage {
                blocks: after.blocks,
                ..before.clone()
            };
            if same != *after {
                return Err(format!(
                    "namespace {nsid} is another one, or has another format"
                ));
            }
            if after.blocks != before.blocks {
                changed.push(nsid);
            }
        }
        let known = |nsid| self.namespaces.iter().any(|ns| ns.nsid == nsid);
        let new = now.namespaces.iter().map(|ns| ns.nsid);
        changed.extend(new.filter(|nsid| !known(*nsid)));
        changed.sort_unstable();
        Ok(changed)
    }
}

impl Image {
    /// Of a controller that was never enabled.
    pub(super) fn new(fingerprint: Fingerprint) -> Self {
        Self {
            version: VERSION,
            instance: None,
            fingerprint,
            registers: Host::default(),
            phase: PhaseImage::Disabled,
            shut_down: false,
            admin: None,
            commands: Vec::new(),
            events: EventsImage::default(),
            features: FeaturesImage::default(),
            cqs: Vec::new(),
            sqs: Vec::new(),
            shadow: None,
            changed: Vec::new(),
        }
    }

    /// As bytes, with the logs.
    pub(super) fn to_bytes(&self, logs: &Logs) -> Vec<u8> {
        // Fails for maps with odd keys only; an empty image is refused by whoever reads it.
        serde_json::to_vec(&(self, logs)).unwrap_or_default()
    }

    /// From bytes.
    ///
    /// # Errors
    ///
    /// Why they are no image of ours.
    pub(super) fn from_bytes(bytes: &[u8]) -> Result<(Self, Logs), String> {
        let any: (serde_json::Value, Logs) =
            serde_json::from_slice(bytes).map_err(|e| format!("it cannot be read: {e}"))?;
        let version = any.0.get("version").and_then(serde_json::Value::as_u64);
        if version != Some(VERSION.into()) {
            return Err(format!("it has version {version:?}, and this is {VERSION}"));
        }
        let image = serde_json::from_value(any.0);
        Ok((image.map_err(|e| format!("it cannot be read: {e}"))?, any.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::info::tests::sample;
    use nvme_spec::doorbell::DoorbellStride;

    fn fingerprint(change: impl FnOnce(&mut Info)) -> Fingerprint {
        let mut info = sample();
        change(&mut info);
        let none: Arc<[Namespace]> = Arc::new([]);
        Fingerprint::of(&info, &none)
    }

    #[test]
    fn an_image_comes_back_and_other_bytes_are_refused() {
        let mut image = Image::new(fingerprint(|_| {}));
        image.instance = Some([7; 16]);
        image.cqs.push(CqImage::default());
        let bytes = image.to_bytes(&Logs::default());
        assert_eq!(
            Image::from_bytes(&bytes),
            Ok((image.clone(), Logs::default()))
        );
        image.version = 2;
        let newer = image.to_bytes(&Logs::default());
        assert!(
            Image::from_bytes(&newer)
                .unwrap_err()
                .contains("version Some(2)")
        );
        for bad in [
            &b""[..],
            b"{}",
            b"[1,2]",
            b"null",
            &bytes[..bytes.len() / 2],
        ] {
            assert!(Image::from_bytes(bad).is_err());
        }
    }

    #[test]
    fn a_controller_that_lost_something_is_another_and_one_that_got_something_says_so() {
        let before = fingerprint(|_| {});
        assert_eq!(before.changes(&before), Ok(vec![]));
        let grown = fingerprint(|i| i.namespaces[1].geometry.blocks += 1);
        assert_eq!(before.changes(&grown), Ok(vec![3]));
        type Change = fn(&mut Info);
        let cases: [(Change, &str); 10] = [
            (|i| i.queues -= 1, "queue pairs was 5 and is 4"),
            (|i| i.max_queue_entries = 64, "largest queue"),
            (|i| i.max_transfer = 4096, "largest transfer"),
            (|i| i.stride = DoorbellStride::new(1), "stride"),
            (|i| i.doorbell_buffer = false, "Doorbell Buffer"),
            (|i| i.namespaces.truncate(1), "namespace 3 is gone"),
            (
                |i| i.namespaces[0].geometry.blocks -= 1,
                "namespace 1 in blocks",
            ),
            (|i| i.namespaces[0].geometry.block_shift = 12, "another"),
            (|i| i.namespaces[0].read_only = true, "another"),
            (|i| i.namespaces[0].identity.uuid = [1; 16], "another"),
        ];
        for (change, words) in cases {
            let after = fingerprint(change);
            let error = before.changes(&after).unwrap_err();
            assert!(error.contains(words), "{words:?} not in {error:?}");
        }
    }
}
