//! The end of a turn: what has changed is written down, and only then does anybody outside see what follows from it.
//!
//! In this order: the image, the completions of the admin queue, their interrupt, CSTS, messages to pollers, answers to transports. So whatever
//! was seen of this controller is in its state: a process that goes on from the image repeats at most what nobody was told of.

use std::sync::Arc;

use nvme_spec::regs::Shst;

use super::actor::Actor;
use super::image::{Image, Logs, PhaseImage};
use super::lifecycle::Phase;
use crate::poller::LAST_NUMBER;
use crate::state::{Shape, StateFile};

impl Actor {
    /// What there is to be written down.
    pub(super) fn image(&self) -> Image {
        let (cqs, sqs) = self.queues.image();
        let phase = match self.phase {
            // What is being reset is gone for whoever comes after us.
            _ if self.drain.is_some() => PhaseImage::Disabled,
            Phase::Ready => PhaseImage::Ready,
            Phase::Failed => PhaseImage::Failed,
            Phase::Disabled | Phase::Suspended => PhaseImage::Disabled,
        };
        // A front-end that is still on its way has perhaps to be told that nothing is left: nobody may take what there is then for its.
        let known = self.gone || phase != PhaseImage::Disabled;
        Image {
            instance: self.shared.instance().filter(|_| known),
            registers: self.shared.registers.image(),
            phase,
            shut_down: self.csts.shst() == Shst::COMPLETE,
            admin: self.admin.as_ref().map(|queue| queue.image()),
            commands: self.commands.clone(),
            events: self.events.image(),
            features: self.features.image(),
            cqs,
            sqs,
            shadow: self.shadow_used.map(|s| (s.doorbells, s.event_idx)),
            changed: self.changed.clone(),
            ..Image::new(self.fingerprint.clone())
        }
    }

    pub(super) fn logs(&self) -> Logs {
        Logs {
            errors: self.errors.image(),
            health: self.health.image(&self.shared.info),
        }
    }

    /// Write down what has changed, then let it be seen.
    pub(super) fn end_turn(&mut self) {
        if self.phase != Phase::Suspended {
            self.write_down();
        }
        self.post_admin();
        if self.shared.registers.csts() != self.csts {
            self.shared.registers.set_csts(self.csts);
        }
        for (poller, message) in self.outbound.take() {
            if let Some(port) = self.ports.get(poller) {
                port.send(message);
            }
        }
        self.done.clear();
    }

    pub(super) fn write_down(&mut self) {
        let image = self.image();
        if self.committed.as_ref() == Some(&image) {
            return;
        }
        let Some(state) = &self.state else { return };
        let written = state.commit(&image.to_bytes(&self.logs()));
        if written.is_err() {
            // Nothing is better than something that is not true any more.
            let _ = state.commit(&[]);
            self.state = None;
        }
        self.committed = Some(image);
        if let Err(error) = written {
            self.fail(&format!("its state cannot be written: {error}"));
        }
    }

    /// Post what the admin queue has made, and interrupt the guest for it.
    pub(super) fn post_admin(&mut self) {
        if self.admin.as_mut().is_some_and(|queue| queue.post())
            && let Some(vector) = self.shared.vectors.first()
            && let Err(error) = vector.signal()
        {
            self.complain(&format!("interrupt vector 0 cannot be signalled: {error}"));
        }
    }

    /// The number of the next creation or move of a queue; `None` if there have been too many since the last reset.
    pub(super) fn next_number(&mut self) -> Option<u32> {
        if self.number >= LAST_NUMBER {
            return None;
        }
        self.number += 1;
        Some(self.number)
    }

    /// Whether numbers are so high that the next reset should begin a new generation.
    pub(super) fn is_old(&self) -> bool {
        self.number > LAST_NUMBER / 2
    }

    /// Begin a generation in which nothing has happened: no poller knows us. If that cannot be, nothing is kept until the next reset tries again.
    pub(super) fn begin_generation(&mut self) {
        let slots = self.slots();
        match self.publish(slots, |_| {}) {
            Ok(()) => (self.number, self.stale) = (0, false),
            Err(error) => {
                let controller = self.shared.info.name.as_str();
                tracing::error!(
                    controller,
                    "its state cannot be kept: {error}; its guest has to reset it if this process ends"
                );
                self.forget_state();
            }
        }
    }

    /// What was written down must not be found any more: from now on things happen that it does not tell of.
    pub(super) fn forget_state(&mut self) {
        self.state = None;
        let forgotten = self.keep.forget();
        self.stale = forgotten.is_err();
        if let Err(error) = forgotten {
            self.complain(&format!("its old state cannot be removed: {error}"));
        }
    }

    /// Set all doorbells to zero, as a reset does; not while what is written down would take them for the guest's.
    pub(super) fn clear_doorbells(&self) {
        if !self.stale {
            self.shared.window.clear();
        }
    }

    /// Slots of the poller that has most.
    pub(super) fn slots(&self) -> usize {
        self.ports.iter().map(|p| p.slots()).max().unwrap_or(0)
    }

    /// Put a new generation in the place of the present one: our image, and what `fill` writes into its journals.
    pub(super) fn publish(
        &mut self,
        slots: usize,
        fill: impl FnOnce(&Arc<StateFile>),
    ) -> std::io::Result<()> {
        let shape = Shape {
            pollers: self.ports.len(),
            slots,
        };
        let state = self.keep.begin(shape)?;
        let image = self.image();
        state.commit(&image.to_bytes(&self.logs()))?;
        fill(&state);
        self.keep.publish(Arc::clone(&state))?;
        self.state = Some(state);
        self.committed = Some(image);
        Ok(())
    }
}
