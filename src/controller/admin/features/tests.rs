//! Features: what is set is got, and what is refused is refused exactly.

use super::*;
use crate::controller::health::TEMPERATURE;
use crate::controller::info::tests::sample;

fn set(fid: FeatureId, cdw11: u32) -> SetFeatures {
    SetFeatures {
        fid,
        cdw11,
        ..SetFeatures::default()
    }
}

fn get(fid: FeatureId, sel: Select, cdw11: u32) -> GetFeatures {
    GetFeatures {
        fid,
        sel,
        cdw11,
        // Only Error Recovery looks at it.
        nsid: 1,
        ..GetFeatures::default()
    }
}

struct Rig {
    info: Info,
    features: Features,
    events: AsyncEventConfig,
}

impl Rig {
    fn new() -> Self {
        let info = sample();
        Self {
            features: Features::new(&info),
            events: AsyncEventConfig::new(),
            info,
        }
    }

    fn set(&mut self, command: &SetFeatures) -> Result<u32, Refusal> {
        self.features
            .set(&self.info, &mut self.events, command, &[], false)
    }

    fn get(&self, command: &GetFeatures) -> Result<u32, Refusal> {
        let got = self.features.get(&self.info, self.events, command);
        got.map(|got| got.dw0)
    }
}

#[test]
fn what_is_set_is_got_and_the_default_stays() {
    // feature, default, set, then got, Get dword 11
    let cases = [
        (FeatureId::ARBITRATION, 7, 0x0302_01FB, 0x0302_0103, 0),
        (FeatureId::POWER_MANAGEMENT, 0, 0x20, 0x20, 0),
        (FeatureId::TEMPERATURE_THRESHOLD, 343, 350, 350, 0),
        (FeatureId::TEMPERATURE_THRESHOLD, 0, 5 | 1 << 20, 5, 1 << 20),
        (
            FeatureId::TEMPERATURE_THRESHOLD,
            343,
            351 | 15 << 16,
            351,
            0,
        ),
        (FeatureId::INTERRUPT_COALESCING, 0, 0xFFFF_1234, 0x1234, 0),
        (
            FeatureId::INTERRUPT_VECTOR_CONFIG,
            4,
            4 | 1 << 16,
            4 | 1 << 16,
            4,
        ),
        (FeatureId::WRITE_ATOMICITY, 0, 1, 1, 0),
        (FeatureId::ASYNC_EVENT_CONFIG, 0, 0xFFFF_FFFF, 0x1FF, 0),
        (FeatureId::SOFTWARE_PROGRESS, 0, 0x105, 5, 0),
        (FeatureId::VOLATILE_WRITE_CACHE, 1, 1, 1, 0),
    ];
    for (fid, default, value, after, cdw11) in cases {
        let mut rig = Rig::new();
        let read = |rig: &Rig, sel| rig.get(&get(fid, sel, cdw11));
        assert_eq!(read(&rig, Select::CURRENT), Ok(default), "{fid:?}");
        assert_eq!(rig.set(&set(fid, value)), Ok(0), "{fid:?}");
        assert_eq!(read(&rig, Select::CURRENT), Ok(after), "{fid:?}");
        assert_eq!(read(&rig, Select::DEFAULT), Ok(default), "{fid:?}");
        assert_eq!(read(&rig, Select::SAVED), Ok(default), "{fid:?}");
    }
}

#[test]
fn refusals_have_their_status_and_place() {
    let field = |f| invalid(f);
    let cases = [
        (set(FeatureId::POWER_MANAGEMENT, 1), field(Field::Cdw11)),
        (
            set(FeatureId::TEMPERATURE_THRESHOLD, 1 << 16),
            field(Field::Cdw11High),
        ),
        (
            set(FeatureId::TEMPERATURE_THRESHOLD, 2 << 20),
            Refusal {
                status: Status::INVALID_FIELD,
                location: 46 | 4 << 8,
            },
        ),
        (
            set(FeatureId::VOLATILE_WRITE_CACHE, 0),
            Refusal::of(Status::FEATURE_NOT_CHANGEABLE, Field::Cdw11),
        ),
        (
            set(FeatureId::NUMBER_OF_QUEUES, 0xFFFF),
            field(Field::Cdw11),
        ),
        (
            set(FeatureId::NUMBER_OF_QUEUES, 0xFFFF_0000),
            field(Field::Cdw11High),
        ),
        (
            set(FeatureId::INTERRUPT_VECTOR_CONFIG, 5),
            field(Field::Cdw11),
        ),
        (
            set(FeatureId::TIMESTAMP, 0),
            Refusal::from(Status::DATA_TRANSFER_ERROR),
        ),
        (
            SetFeatures {
                sv: true,
                ..set(FeatureId::ARBITRATION, 0)
            },
            Refusal {
                status: Status::FEATURE_NOT_SAVEABLE,
                location: 43 | 7 << 8,
            },
        ),
        (
            SetFeatures {
                nsid: 1,
                ..set(FeatureId::ARBITRATION, 0)
            },
            Refusal::of(Status::FEATURE_NOT_NAMESPACE_SPECIFIC, Field::Nsid),
        ),
        (
            SetFeatures {
                nsid: 9,
                ..set(FeatureId::ARBITRATION, 0)
            },
            Refusal::of(Status::INVALID_NAMESPACE_OR_FORMAT, Field::Nsid),
        ),
        (
            SetFeatures {
                nsid: 1,
                ..set(FeatureId::ERROR_RECOVERY, 1 << 16)
            },
            field(Field::Cdw11High),
        ),
        (
            set(FeatureId::ERROR_RECOVERY, 0),
            Refusal::of(Status::INVALID_NAMESPACE_OR_FORMAT, Field::Nsid),
        ),
    ];
    for (command, refusal) in cases {
        assert_eq!(Rig::new().set(&command), Err(refusal), "{command:?}");
    }
    for fid in (0..=255).map(FeatureId).filter(|f| !SUPPORTED.contains(f)) {
        let mut rig = Rig::new();
        assert_eq!(rig.set(&set(fid, 0)), Err(field(Field::Cdw10)), "{fid:?}");
        for sel in [Select::CURRENT, Select::SUPPORTED] {
            assert_eq!(
                rig.get(&get(fid, sel, 0)),
                Err(field(Field::Cdw10)),
                "{fid:?}"
            );
        }
    }
    let rig = Rig::new();
    for fid in SUPPORTED {
        for sel in (4..8).map(Select) {
            let at = Refusal::at(Status::INVALID_FIELD, Field::Cdw10, 8);
            assert_eq!(rig.get(&get(fid, sel, 0)), Err(at), "{fid:?} {sel:?}");
        }
    }
    let temperature = get(FeatureId::TEMPERATURE_THRESHOLD, Select::CURRENT, 15 << 16);
    assert_eq!(rig.get(&temperature), Err(field(Field::Cdw11High)));
    let vector = get(FeatureId::INTERRUPT_VECTOR_CONFIG, Select::CURRENT, 5);
    assert_eq!(rig.get(&vector), Err(field(Field::Cdw11)));
}

#[test]
fn without_a_volatile_cache_there_is_no_such_feature() {
    let mut rig = Rig::new();
    rig.info.namespaces.remove(0);
    let fid = FeatureId::VOLATILE_WRITE_CACHE;
    assert_eq!(rig.set(&set(fid, 1)), Err(invalid(Field::Cdw10)));
    let current = get(fid, Select::CURRENT, 0);
    assert_eq!(rig.get(&current), Err(invalid(Field::Cdw10)));
}

#[test]
fn queues_are_granted_as_asked_up_to_the_limit_and_only_before_there_are_any() {
    let mut rig = Rig::new();
    let fid = FeatureId::NUMBER_OF_QUEUES;
    assert_eq!(rig.get(&get(fid, Select::CURRENT, 0)), Ok(0x0003_0003));
    assert_eq!(rig.set(&set(fid, 0x0001_0063)), Ok(0x0001_0003));
    assert_eq!(rig.features.submission_queues(), 4);
    assert_eq!(rig.features.completion_queues(), 2);
    let late = rig
        .features
        .set(&rig.info, &mut rig.events, &set(fid, 0), &[], true);
    assert_eq!(late, Err(Status::COMMAND_SEQUENCE_ERROR.into()));
}

#[test]
fn error_recovery_is_that_of_a_namespace() {
    let mut rig = Rig::new();
    let fid = FeatureId::ERROR_RECOVERY;
    let of = |rig: &Rig, nsid| {
        let command = GetFeatures {
            nsid,
            ..get(fid, Select::CURRENT, 0)
        };
        rig.get(&command)
    };
    rig.set(&SetFeatures {
        nsid: 3,
        ..set(fid, 9)
    })
    .unwrap();
    assert_eq!((of(&rig, 1), of(&rig, 3)), (Ok(0), Ok(9)));
    rig.set(&SetFeatures {
        nsid: NSID_BROADCAST,
        ..set(fid, 4)
    })
    .unwrap();
    assert_eq!((of(&rig, 1), of(&rig, 3)), (Ok(4), Ok(4)));
    assert_eq!(of(&rig, 2), Err(invalid(Field::Nsid)), "inactive");
    let bad = Refusal::of(Status::INVALID_NAMESPACE_OR_FORMAT, Field::Nsid);
    assert_eq!(
        (of(&rig, 0), of(&rig, NSID_BROADCAST)),
        (Err(bad), Err(bad))
    );
}

#[test]
fn capabilities_are_told() {
    let rig = Rig::new();
    for fid in SUPPORTED {
        let expected = match fid {
            FeatureId::ERROR_RECOVERY => 0b110,
            FeatureId::VOLATILE_WRITE_CACHE => 0,
            _ => 0b100,
        };
        assert_eq!(
            rig.get(&get(fid, Select::SUPPORTED, 0)),
            Ok(expected),
            "{fid:?}"
        );
    }
}

#[test]
fn data_features_keep_their_data_and_the_clock_runs() {
    let mut rig = Rig::new();
    let stamp = Timestamp::new(1_700_000_000_000, 0);
    let command = set(FeatureId::TIMESTAMP, 0);
    rig.features
        .set(
            &rig.info,
            &mut rig.events,
            &command,
            stamp.as_bytes(),
            false,
        )
        .unwrap();
    let read = |rig: &Rig, fid| {
        let command = get(fid, Select::CURRENT, 0);
        rig.features
            .get(&rig.info, rig.events, &command)
            .unwrap()
            .data
    };
    std::thread::sleep(std::time::Duration::from_millis(3));
    let now = Timestamp::read_from_bytes(&read(&rig, FeatureId::TIMESTAMP)).unwrap();
    assert!((1_700_000_000_003..1_700_000_060_000).contains(&now.get()));
    assert_eq!(now.origin(), Timestamp::ORIGIN_SET);

    let mut behavior = HostBehavior {
        acre: 1,
        ..HostBehavior::default()
    };
    let command = set(FeatureId::HOST_BEHAVIOR, 0);
    let put = |rig: &mut Rig, b: &HostBehavior| {
        rig.features
            .set(&rig.info, &mut rig.events, &command, b.as_bytes(), false)
    };
    assert_eq!(put(&mut rig, &behavior), Ok(0));
    assert_eq!(read(&rig, FeatureId::HOST_BEHAVIOR), behavior.as_bytes());
    behavior.lbafee = 2;
    assert_eq!(put(&mut rig, &behavior), Err(Status::INVALID_FIELD.into()));

    rig.features
        .set(
            &rig.info,
            &mut rig.events,
            &set(FeatureId::SOFTWARE_PROGRESS, 6),
            &[],
            false,
        )
        .unwrap();
    rig.features.reset(&rig.info);
    let now = Timestamp::read_from_bytes(&read(&rig, FeatureId::TIMESTAMP)).unwrap();
    assert!(now.get() < 60_000);
    assert_eq!(now.origin(), Timestamp::ORIGIN_RESET);
    assert_eq!(read(&rig, FeatureId::HOST_BEHAVIOR), [0; 512]);
    let progress = get(FeatureId::SOFTWARE_PROGRESS, Select::CURRENT, 0);
    assert_eq!(rig.get(&progress), Ok(6), "survives a reset");
}

#[test]
fn a_threshold_on_the_wrong_side_warns() {
    let mut rig = Rig::new();
    assert!(!rig.features.warning(TEMPERATURE).temperature());
    let fid = FeatureId::TEMPERATURE_THRESHOLD;
    rig.set(&set(fid, u32::from(TEMPERATURE))).unwrap();
    assert!(rig.features.warning(TEMPERATURE).temperature());
    rig.set(&set(fid, 343)).unwrap();
    rig.set(&set(fid, u32::from(TEMPERATURE) | 1 << 20))
        .unwrap();
    assert!(rig.features.warning(TEMPERATURE).temperature());
}
