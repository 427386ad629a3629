//! Why an admin command is refused: the status, and the field that is at fault.

use nvme_spec::Status;
use nvme_spec::log::ErrorLogEntry;

/// A refused command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::controller) struct Refusal {
    pub(in crate::controller) status: Status,
    /// Parameter Error Location of the error log.
    pub(in crate::controller) location: u16,
}

/// Fields of a submission queue entry, by the byte they begin at.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
pub(in crate::controller) enum Field {
    Opcode = 0,
    Flags = 1,
    Nsid = 4,
    Prp1 = 24,
    Prp2 = 32,
    Cdw10 = 40,
    Cdw10High = 42,
    Cdw11 = 44,
    Cdw11High = 46,
    Cdw12 = 48,
    Cdw14 = 56,
}

impl Refusal {
    /// This status, because of a field.
    pub(in crate::controller) const fn of(status: Status, field: Field) -> Self {
        Self::at(status, field, 0)
    }

    /// This status, because of a bit of a field.
    pub(in crate::controller) const fn at(status: Status, field: Field, bit: u8) -> Self {
        Self {
            status,
            location: ErrorLogEntry::location_of((field as u8).saturating_add(bit / 8), bit % 8),
        }
    }
}

impl From<Status> for Refusal {
    /// This status, because of no field.
    fn from(status: Status) -> Self {
        Self {
            status,
            location: ErrorLogEntry::NO_LOCATION,
        }
    }
}

/// `INVALID_FIELD` because of this field.
pub(in crate::controller) const fn invalid(field: Field) -> Refusal {
    Refusal::of(Status::INVALID_FIELD, field)
}
