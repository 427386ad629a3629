//! What a checked command does: its requests to the channels of its namespaces, one after the other.

#![expect(
    unsafe_code,
    reason = "the one place where a channel is promised that guest memory stays"
)]

use std::sync::Arc;

use nvme_spec::command::Psdt;
use nvme_spec::{Sqe, Status};

use super::run::BURST_BYTES;
use super::slot::{Rest, Slot, Slots};
use super::sq::Sq;
use crate::backend::{
    AnyChannel, BlockRange, Channel as _, GuestData, Operation, Request, Submitted,
};
use crate::io::{self, Fill, Limits, Namespace, Plan, Refusal};
use crate::memory::{Buffers, GuestMap, HostSeg};

/// What became of a command at once.
pub(super) enum Begun {
    Done(Refusal),
    Pending,
}

impl From<Status> for Begun {
    fn from(status: Status) -> Self {
        Self::Done(status.into())
    }
}

/// A command that was taken from its queue and checked; its data is on its way into the cache.
pub(super) struct Prepared {
    /// Its slot.
    pub tag: u32,
    /// Head of its queue after it.
    pub head: u16,
    /// How many segments are in its slot.
    segments: u16,
    /// Bytes it moves, or what counts as many because it takes as long.
    pub bytes: u32,
    /// The one copy of what the guest asked for.
    pub sqe: Sqe,
    pub plan: Result<Plan, Refusal>,
}

impl Default for Prepared {
    fn default() -> Self {
        Self {
            tag: 0,
            head: 0,
            segments: 0,
            bytes: 0,
            sqe: Sqe::default(),
            plan: Ok(Plan::Nothing),
        }
    }
}

/// What a command without data counts for in its queue's turn: a store may take long over many blocks, but not as long as if it
/// copied them.
fn without_data(plan: &Result<Plan, Refusal>) -> u32 {
    match plan {
        Ok(Plan::Blocks { blocks, .. }) => blocks.saturating_mul(512),
        Ok(Plan::Deallocate { .. } | Plan::FlushAll) => BURST_BYTES,
        _ => 0,
    }
}

/// What a command needs to get done.
pub(super) struct Work<'a> {
    pub namespaces: &'a [Namespace],
    pub channels: &'a mut [AnyChannel],
    pub map: &'a Arc<GuestMap>,
    pub limits: Limits,
}

/// The [`Work`] of a `Served`. No method: it borrows these fields alone, so that a queue of the same `Served` can be at hand meanwhile.
macro_rules! work {
    ($served:ident) => {
        $crate::poller::work::Work {
            namespaces: &$served.at.namespaces,
            channels: &mut $served.channels,
            map: &$served.at.map,
            limits: $served.limits,
        }
    };
}
pub(super) use work;

impl Work<'_> {
    /// Take the next command of a queue, which has one, with a slot for it. `false` if there is no slot after all.
    #[inline]
    pub fn prepare(&mut self, slots: &mut Slots, sq: &mut Sq, out: &mut Prepared) -> bool {
        let Some(tag) = slots.take() else {
            return false;
        };
        let Some(words) = sq.take() else {
            slots.release(tag);
            return false;
        };
        self.check(slots, sq, tag, words, out);
        true
    }

    /// Check a command that was taken from this queue at some time, and has this slot.
    #[inline]
    pub fn check(
        &mut self,
        slots: &mut Slots,
        sq: &mut Sq,
        tag: u32,
        words: [u64; 8],
        out: &mut Prepared,
    ) {
        out.tag = tag;
        out.head = sq.head;
        out.segments = 0;
        out.sqe = zerocopy::transmute!(words);
        out.plan = if sq.was_aborted(out.sqe.cid) {
            Err(Status::ABORT_REQUESTED.into())
        } else {
            io::parse(&out.sqe, self.namespaces, self.limits)
        };
        let Ok(Plan::Transfer {
            namespace,
            operation,
            slba,
            bytes,
            ..
        }) = out.plan
        else {
            out.bytes = without_data(&out.plan);
            return;
        };
        out.bytes = bytes;
        let Some((_, room)) = slots.with_segments(tag) else {
            return;
        };
        let fill = Fill::new(room);
        let resolved = if out.sqe.psdt() == Psdt::PRP {
            let (prp1, prp2) = (out.sqe.prp1, out.sqe.prp2);
            io::resolve(self.map, &mut sq.near, prp1, prp2, bytes, fill)
        } else {
            sq.note_sgls();
            io::resolve_sgl(self.map, &out.sqe, bytes, fill)
        };
        match resolved {
            Ok(n) => {
                // At most MAX_SEGMENTS.
                out.segments = n as u16;
                if let (Some(channel), Some(memory)) =
                    (self.channels.get_mut(namespace), room.get(..n))
                {
                    channel.prefetch(operation, slba, memory);
                }
            }
            Err(status) => out.plan = Err(status.into()),
        }
    }

    /// Begin a prepared command, or do it.
    #[inline]
    pub fn begin(
        mut self,
        slot: &mut Slot,
        room: &mut [HostSeg],
        prepared: &Prepared,
        ranges: &mut Vec<BlockRange>,
    ) -> Begun {
        slot.segments = u32::from(prepared.segments);
        let tag = prepared.tag;
        match prepared.plan {
            Err(refusal) => {
                slot.namespace = u32::MAX;
                Begun::Done(refusal)
            }
            Ok(
                Plan::Transfer {
                    namespace,
                    operation,
                    slba,
                    blocks,
                    ..
                }
                | Plan::Blocks {
                    namespace,
                    operation,
                    slba,
                    blocks,
                },
            ) => {
                slot.namespace = namespace as u32;
                slot.blocks = blocks;
                self.submit(tag, slot, room, operation, slba, blocks)
            }
            Ok(Plan::Forward {
                namespace,
                operation,
                slba,
                blocks,
                bytes,
            }) => {
                slot.namespace = namespace as u32;
                slot.blocks = blocks;
                self.forward(
                    tag,
                    namespace,
                    operation,
                    slba,
                    blocks,
                    bytes,
                    &prepared.sqe,
                )
            }
            Ok(Plan::Pass { namespace }) => {
                slot.namespace = namespace as u32;
                slot.blocks = 0;
                self.pass(tag, namespace, &prepared.sqe)
            }
            Ok(Plan::FlushAll) => {
                slot.blocks = 0;
                self.go_on(tag, slot, room, Rest::FlushFrom(0))
            }
            Ok(Plan::Deallocate {
                namespace,
                ranges: count,
            }) => {
                slot.namespace = namespace as u32;
                slot.blocks = 0;
                let Some(ns) = self.namespaces.get(namespace) else {
                    return Status::INTERNAL_ERROR.into();
                };
                let (sqe, blocks) = (&prepared.sqe, ns.geometry.blocks);
                if let Err(status) = io::read_ranges(self.map, sqe, count, blocks, ranges) {
                    return status.into();
                }
                let (n, begun) = self.deallocate(tag, slot, room, ranges);
                if let (Begun::Pending, Some(left @ [_, ..])) = (&begun, ranges.get(n..)) {
                    // Only a backend that takes its time gets here: the one command that remembers more than fits its slot.
                    slot.rest = Rest::Ranges(left.to_vec());
                }
                begun
            }
            Ok(Plan::Nothing) => {
                slot.namespace = u32::MAX;
                Status::SUCCESS.into()
            }
        }
    }

    /// Deallocate ranges until something has to be waited for, or fails: how many were begun, and what came of the last.
    fn deallocate(
        &mut self,
        tag: u32,
        slot: &Slot,
        room: &[HostSeg],
        ranges: &[BlockRange],
    ) -> (usize, Begun) {
        let mut begun = 0;
        while let Some(left @ [first, ..]) = ranges.get(begun..) {
            let channel = self.channels.get_mut(slot.namespace as usize);
            let several = channel.and_then(|channel| channel.deallocate(tag, left));
            let (n, result) = match several {
                Some((n, Submitted::Done(status))) => (n, status.into()),
                Some((n, Submitted::Pending)) => (n, Begun::Pending),
                None => {
                    let operation = Operation::Deallocate;
                    let (slba, blocks) = (first.slba, first.blocks);
                    (1, self.submit(tag, slot, room, operation, slba, blocks))
                }
            };
            begun += n.max(1);
            match result {
                Begun::Done(refusal) if refusal.status.is_success() => {}
                other => return (begun, other),
            }
        }
        (begun, Status::SUCCESS.into())
    }

    /// The next requests of a command that has several.
    pub fn go_on(mut self, tag: u32, slot: &mut Slot, room: &mut [HostSeg], rest: Rest) -> Begun {
        match rest {
            Rest::Nothing => Status::SUCCESS.into(),
            Rest::Ranges(mut ranges) => {
                let (n, begun) = self.deallocate(tag, slot, room, &ranges);
                ranges.drain(..n.min(ranges.len()));
                if matches!(begun, Begun::Pending) && !ranges.is_empty() {
                    slot.rest = Rest::Ranges(ranges);
                }
                begun
            }
            Rest::FlushFrom(first) => {
                for namespace in first..self.namespaces.len() {
                    slot.namespace = namespace as u32;
                    match self.submit(tag, slot, room, Operation::Flush, 0, 0) {
                        Begun::Done(refusal) if refusal.status.is_success() => {}
                        Begun::Pending => {
                            slot.rest = Rest::FlushFrom(namespace + 1);
                            return Begun::Pending;
                        }
                        failed @ Begun::Done(_) => return failed,
                    }
                }
                Status::SUCCESS.into()
            }
        }
    }

    /// Hand a command that is none of ours to a store that wants it.
    #[cold]
    fn pass(&mut self, tag: u32, namespace: usize, sqe: &Sqe) -> Begun {
        let Some(channel) = self.channels.get_mut(namespace) else {
            return Status::INTERNAL_ERROR.into();
        };
        // SAFETY: as in `forward`.
        match unsafe { channel.pass(tag, sqe) } {
            Submitted::Done(status) => status.into(),
            Submitted::Pending => Begun::Pending,
        }
    }

    /// Hand a transfer to a store that forwards it, in the guest's words.
    #[inline]
    #[expect(clippy::too_many_arguments, reason = "the parts of one plan")]
    fn forward(
        &mut self,
        tag: u32,
        namespace: usize,
        operation: Operation,
        slba: u64,
        blocks: u32,
        bytes: u32,
        sqe: &Sqe,
    ) -> Begun {
        let Some(channel) = self.channels.get_mut(namespace) else {
            return Status::INTERNAL_ERROR.into();
        };
        let request = Request {
            operation,
            slba,
            blocks,
            data: Buffers::NONE,
            guest: Some(GuestData {
                prp1: sqe.prp1,
                prp2: sqe.prp2,
                bytes,
                cdw12: sqe.cdw12,
                cdw13: sqe.cdw13,
                map: self.map,
            }),
        };
        // SAFETY: the map, and what shows it to devices, is held by `Served` and, when it is replaced, by `Waiting::Memory` until
        // no forwarded command is out that was begun before (`lifecycle.rs`). `Served` drops its channels before its maps.
        match unsafe { channel.submit(tag, &request) } {
            Submitted::Done(status) => status.into(),
            Submitted::Pending => Begun::Pending,
        }
    }

    #[inline]
    fn submit(
        &mut self,
        tag: u32,
        slot: &Slot,
        room: &[HostSeg],
        operation: Operation,
        slba: u64,
        blocks: u32,
    ) -> Begun {
        let (Some(channel), Some(segs)) = (
            self.channels.get_mut(slot.namespace as usize),
            room.get(..slot.segments as usize),
        ) else {
            return Status::INTERNAL_ERROR.into();
        };
        // SAFETY: the segments were resolved in the controller's present map, which is held by `Served` and, when it is
        // replaced, by `Waiting::Memory` until no slot uses a region that went (`lifecycle.rs`). No reference into
        // guest memory exists outside the fence.
        let data = unsafe { Buffers::new(segs) };
        let request = Request {
            operation,
            slba,
            blocks,
            data,
            guest: None,
        };
        // SAFETY: as above for the memory; the list of segments is the slot's own, which stays until the slot is released,
        // which is after the request finished or was cancelled. `Served` drops its channels before its maps, and
        // the engine drops controllers before slots.
        match unsafe { channel.submit(tag, &request) } {
            Submitted::Done(status) => status.into(),
            Submitted::Pending => Begun::Pending,
        }
    }
}
