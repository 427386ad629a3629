//! Doorbell Buffer Config.

use nvme_spec::admin::DoorbellBufferConfig;
use nvme_spec::{Sqe, Status};

use super::refusal::{Field, Refusal, invalid};
use super::{Actor, Done};
use crate::controller::pending::{AdminKind, AdminWork, Work};
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
        // Pollers copy what was rung so far into the page. The admin queues stay with their registers: current hosts do not shadow
        // them.
        self.shadow = Some(shadow);
        let pollers = self.attached_pollers();
        if pollers.is_empty() {
            self.shadow_used = self.shadow;
            return Ok(Done::Now(0));
        }
        let work = AdminWork {
            cid: sqe.cid,
            kind: AdminKind::Shadow,
        };
        let token = self.pending.begin(pollers.clone(), Work::Admin(work));
        for poller in pollers {
            let key = self.key;
            self.tell(poller, Message::SetShadow { token, key, shadow });
        }
        Ok(Done::Later)
    }
}
