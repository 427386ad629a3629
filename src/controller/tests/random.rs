//! Any guest: whatever it writes, commands complete and nothing panics.

use super::*;
use proptest::prelude::*;

/// An SQE of noise, with an opcode and addresses that get somewhere now and then.
fn sqe() -> impl Strategy<Value = Sqe> {
    let address = prop_oneof![
        any::<u64>(),
        (0u64..64).prop_map(|page| BASE + page * 4096),
        (0u64..LEN as u64).prop_map(|at| BASE + at),
    ];
    let opcode = prop_oneof![
        any::<u8>(),
        prop::sample::select(&[0u8, 1, 2, 4, 5, 6, 8, 9, 10, 0x7C][..]),
    ];
    let small = prop_oneof![
        any::<u32>(),
        0u32..32,
        (0u32..8, 0u32..64).prop_map(|(a, b)| a | b << 16)
    ];
    (
        (
            opcode,
            prop_oneof![4 => Just(0u8), 1 => any::<u8>()],
            any::<u16>(),
        ),
        prop_oneof![Just(u32::MAX), 0u32..5, any::<u32>()],
        (address.clone(), address),
        (small.clone(), small.clone(), small.clone(), small.clone()),
    )
        .prop_map(
            |((opcode, flags, cid), nsid, (prp1, prp2), (a, b, c, d))| Sqe {
                opcode,
                flags,
                cid,
                nsid,
                prp1,
                prp2,
                cdw10: a,
                cdw11: b,
                cdw12: c,
                cdw14: d,
                ..Sqe::default()
            },
        )
}

/// Whether a command's data may have hit the admin queues themselves.
fn may_hit_queues(sqe: &Sqe) -> bool {
    let near = |at: u64| (BASE.saturating_sub(1 << 20)..BASE + 0x4000).contains(&at);
    near(sqe.prp1) || near(sqe.prp2)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn every_command_completes_exactly_once(commands in prop::collection::vec(sqe(), 1..40)) {
        let mut rig = Rig::enabled();
        // Lists behind PRP2 are of zeroes: no data goes to the queues by them.
        for sqe in commands {
            if sqe.opcode == AdminOpcode::ASYNC_EVENT_REQUEST.0 || may_hit_queues(&sqe) {
                continue;
            }
            rig.submit(sqe);
            let done = rig.completions();
            prop_assert_eq!(done.len(), 1);
            prop_assert_eq!(done[0].cid, sqe.cid);
        }
        prop_assert!(rig.csts().rdy() && !rig.csts().cfs());
        prop_assert_eq!(rig.actor.pending.len(), 0);
    }

    #[test]
    fn any_writes_to_registers_doorbells_and_memory_are_survived(
        steps in prop::collection::vec(
            (0u8..5, 0u32..0x80, prop_oneof![any::<u32>(), 0u32..20, Just(0x0046_0001u32)], sqe()),
            1..60,
        ),
    ) {
        let mut rig = Rig::new();
        rig.set_up(ENTRIES);
        for (what, at, value, sqe) in steps {
            match what {
                0 => rig.write32(at & !3, value),
                1 => rig.write32(offset::CC, value),
                2 => rig.bell(Doorbell::from_index(u64::from(at % 10)).unwrap(), value),
                3 => {
                    let to = ASQ + u64::from(value % 64) * 64;
                    prop_assert!(rig.map.write(to, sqe.as_bytes()));
                }
                _ => rig.submit(sqe),
            }
            rig.turns();
        }
        // Whatever happened: a reset brings it back.
        rig.cc(Cc::new());
        rig.enable();
        rig.ok(identify_controller());
    }
}
