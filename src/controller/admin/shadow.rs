//! Doorbell Buffer Config.

use std::sync::atomic::Ordering;

use nvme_spec::admin::DoorbellBufferConfig;
use nvme_spec::doorbell::Doorbell;
use nvme_spec::{Sqe, Status};

use super::refusal::{Field, Refusal, invalid};
use super::{Actor, Done};
use crate::controller::pending::{AdminKind, AdminWork, Work};
use crate::memory::SharedWord;
use crate::poller::{Message, ShadowConfig};

impl Actor {
    pub(super) fn doorbell_buffer_config(&mut self, sqe: &Sqe) -> Result<Done, Refusal> {
        let command = DoorbellBufferConfig::from_sqe(sqe);
        for (page, field) in [
            (command.shadow, Field::Prp1),
            (command.event_idx, Field::Prp2),
        ] {
            if !page.is_multiple_of(4096) {
                return Err(Refusal::of(Status::INVALID_PRP_OFFSET, field));
            }
            if self.map.resolve_whole(page, 4096).is_none() {
                return Err(invalid(field));
            }
        }
        if command.shadow == command.event_idx {
            return Err(invalid(Field::Prp2));
        }
        let shadow = ShadowConfig {
            doorbells: command.shadow,
            event_idx: command.event_idx,
        };
        self.copy_doorbells(shadow.doorbells);
        self.shadow = Some(shadow);
        let pollers = self.attached_pollers();
        if pollers.is_empty() {
            return Ok(Done::Now(0));
        }
        let work = AdminWork {
            cid: sqe.cid,
            kind: AdminKind::Shadow,
        };
        let token = self.pending.begin(pollers.len(), Work::Admin(work));
        for poller in pollers {
            let key = self.key;
            self.tell(poller, Message::SetShadow { token, key, shadow });
        }
        Ok(Done::Later)
    }

    /// The shadow page begins with what the doorbells hold: a host that never touched one of them since must not make it jump
    /// back. The host uses the page only after this command has completed. The admin queues stay with their registers: current
    /// hosts do not shadow them.
    fn copy_doorbells(&self, page: u64) {
        let info = &self.shared.info;
        let (sqs, cqs) = self.queues.live();
        let sqs = sqs.into_iter().map(Doorbell::Sq);
        let cqs = cqs.into_iter().map(Doorbell::Cq);
        for doorbell in sqs.chain(cqs) {
            let from = info.stride.window_offset(doorbell);
            let to = page.checked_add(info.stride.shadow_offset(doorbell));
            let register = usize::try_from(from)
                .ok()
                .and_then(|from| self.shared.window.register(from));
            if let Some(register) = register
                && let Some(word) = to.and_then(|to| SharedWord::in_guest(&self.map, to))
            {
                word.store(register.load(Ordering::Acquire));
            }
        }
    }
}
