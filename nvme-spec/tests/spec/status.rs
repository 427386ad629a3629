//! Statuses: numbers, names, retry advice, and the field a completion carries them in.

use nvme_spec::Status;
use nvme_spec::StatusField;
use proptest::prelude::*;
use std::collections::HashSet;

#[test]
fn values_are_those_of_the_specification() {
    let table = [
        (Status::SUCCESS, 0, 0x00),
        (Status::INVALID_OPCODE, 0, 0x01),
        (Status::INVALID_FIELD, 0, 0x02),
        (Status::COMMAND_ID_CONFLICT, 0, 0x03),
        (Status::DATA_TRANSFER_ERROR, 0, 0x04),
        (Status::POWER_LOSS_ABORT, 0, 0x05),
        (Status::INTERNAL_ERROR, 0, 0x06),
        (Status::ABORT_REQUESTED, 0, 0x07),
        (Status::ABORTED_SQ_DELETION, 0, 0x08),
        (Status::INVALID_NAMESPACE_OR_FORMAT, 0, 0x0B),
        (Status::COMMAND_SEQUENCE_ERROR, 0, 0x0C),
        (Status::SGL_DESCRIPTOR_TYPE_INVALID, 0, 0x11),
        (Status::INVALID_PRP_OFFSET, 0, 0x13),
        (Status::NAMESPACE_WRITE_PROTECTED, 0, 0x20),
        (Status::LBA_OUT_OF_RANGE, 0, 0x80),
        (Status::CAPACITY_EXCEEDED, 0, 0x81),
        (Status::NAMESPACE_NOT_READY, 0, 0x82),
        (Status::COMPLETION_QUEUE_INVALID, 1, 0x00),
        (Status::INVALID_QUEUE_ID, 1, 0x01),
        (Status::INVALID_QUEUE_SIZE, 1, 0x02),
        (Status::ABORT_LIMIT_EXCEEDED, 1, 0x03),
        (Status::AER_LIMIT_EXCEEDED, 1, 0x05),
        (Status::INVALID_INTERRUPT_VECTOR, 1, 0x08),
        (Status::INVALID_LOG_PAGE, 1, 0x09),
        (Status::INVALID_FORMAT, 1, 0x0A),
        (Status::INVALID_QUEUE_DELETION, 1, 0x0C),
        (Status::FEATURE_NOT_SAVEABLE, 1, 0x0D),
        (Status::FEATURE_NOT_CHANGEABLE, 1, 0x0E),
        (Status::FEATURE_NOT_NAMESPACE_SPECIFIC, 1, 0x0F),
        (Status::INVALID_CONTROLLER_ID, 1, 0x1F),
        (Status::IO_COMMAND_SET_COMBINATION_REJECTED, 1, 0x2B),
        (Status::INVALID_IO_COMMAND_SET, 1, 0x2C),
        (Status::CONFLICTING_ATTRIBUTES, 1, 0x80),
        (Status::INVALID_PROTECTION_INFORMATION, 1, 0x81),
        (Status::ATTEMPTED_WRITE_TO_READ_ONLY, 1, 0x82),
        (Status::WRITE_FAULT, 2, 0x80),
        (Status::UNRECOVERED_READ_ERROR, 2, 0x81),
        (Status::COMPARE_FAILURE, 2, 0x85),
        (Status::DEALLOCATED_OR_UNWRITTEN, 2, 0x87),
        (Status::INTERNAL_PATH_ERROR, 3, 0x00),
    ];
    for (status, sct, sc) in table {
        assert_eq!((status.sct(), status.sc()), (sct, sc), "{status}");
        assert_eq!(Status::new(sct, sc), status);
    }
}

#[test]
fn every_named_status_is_eleven_bits_and_unlike_the_others() {
    let mut values = HashSet::new();
    let mut names = HashSet::new();
    for status in Status::NAMED {
        assert_eq!(status.0 & !0x7FF, 0, "{status}");
        assert!(values.insert(status.0), "{status} twice");
        assert!(names.insert(status.name().unwrap()), "{status} twice");
    }
    assert!(Status::NAMED.is_sorted());
}

#[test]
fn display_names_the_status_or_gives_its_number() {
    assert_eq!(
        Status::LBA_OUT_OF_RANGE.to_string(),
        "LBA Out of Range (0x080)"
    );
    assert_eq!(Status::new(7, 0xC0).to_string(), "status 0x7c0");
}

#[test]
fn retry_is_pointless_after_a_mistake_of_the_host_only() {
    let pass = [
        Status::SUCCESS,
        Status::DATA_TRANSFER_ERROR,
        Status::POWER_LOSS_ABORT,
        Status::INTERNAL_ERROR,
        Status::ABORT_REQUESTED,
        Status::ABORTED_SQ_DELETION,
        Status::NAMESPACE_NOT_READY,
        Status::WRITE_FAULT,
        Status::UNRECOVERED_READ_ERROR,
        Status::COMMAND_INTERRUPTED,
        Status::ANA_TRANSITION,
        Status::new(7, 0xC0),
        Status::new(0, 0x7F),
    ];
    let fail_again = [
        Status::INVALID_OPCODE,
        Status::INVALID_FIELD,
        Status::COMMAND_ID_CONFLICT,
        Status::INVALID_NAMESPACE_OR_FORMAT,
        Status::COMMAND_SEQUENCE_ERROR,
        Status::INVALID_PRP_OFFSET,
        Status::SGL_DESCRIPTOR_TYPE_INVALID,
        Status::LBA_OUT_OF_RANGE,
        Status::CAPACITY_EXCEEDED,
        Status::NAMESPACE_WRITE_PROTECTED,
        Status::INVALID_QUEUE_ID,
        Status::INVALID_QUEUE_SIZE,
        Status::AER_LIMIT_EXCEEDED,
        Status::INVALID_LOG_PAGE,
        Status::FEATURE_NOT_SAVEABLE,
        Status::COMPARE_FAILURE,
        Status::ATTEMPTED_WRITE_TO_READ_ONLY,
        Status::CONFLICTING_ATTRIBUTES,
    ];
    for status in pass {
        assert!(!status.default_dnr(), "{status}");
    }
    for status in fail_again {
        assert!(status.default_dnr(), "{status}");
    }
}

#[test]
fn field_has_the_bits_of_the_specification() {
    let field = |status| StatusField::from_status(status);
    assert_eq!(field(Status::SUCCESS).into_bits(), 0x0000);
    assert_eq!(field(Status::SUCCESS).with_p(true).into_bits(), 0x0001);
    assert_eq!(field(Status::INVALID_FIELD).into_bits(), 0x0004);
    assert_eq!(
        field(Status::INVALID_FIELD)
            .with_dnr(true)
            .with_p(true)
            .into_bits(),
        0x8005
    );
    assert_eq!(field(Status::COMPARE_FAILURE).into_bits(), 0x050A);
    assert_eq!(field(Status::SUCCESS).with_crd(2).into_bits(), 0x2000);
    assert_eq!(field(Status::SUCCESS).with_m(true).into_bits(), 0x4000);
}

proptest! {
    #[test]
    fn field_carries_the_status_through(bits in any::<u16>(), p in any::<bool>(), m in any::<bool>(), dnr in any::<bool>()) {
        let status = Status(bits);
        let field = StatusField::from_status(status).with_p(p).with_m(m).with_dnr(dnr);
        prop_assert_eq!(field.status(), Status(bits & 0x7FF));
        prop_assert_eq!((field.p(), field.m(), field.dnr(), field.crd()), (p, m, dnr, 0));
        prop_assert_eq!(status.is_success(), field.status() == Status::SUCCESS);
    }

    #[test]
    fn any_sixteen_bits_are_a_field(bits in any::<u16>()) {
        let field = StatusField::from_bits(bits);
        prop_assert_eq!(field.into_bits(), bits);
        prop_assert_eq!(field.status().0, bits >> 1 & 0x7FF);
    }
}
