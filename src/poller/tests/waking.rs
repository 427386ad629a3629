//! Who wakes whom: doorbells and sleep, interrupts and their coalescing.

use super::*;

#[test]
fn no_wake_up_is_lost() {
    for idle in [IdlePolicy::Adaptive, IdlePolicy::Interrupt] {
        for shadow in [false, true] {
            let mut g = Guest::new(16, idle, shadow);
            let mut lcg = 1u32;
            for i in 0..3000u32 {
                lcg = lcg.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let n = 1 + (lcg >> 28) % 4;
                for k in 0..n {
                    g.push(io(NvmOpcode::READ, k as u16, 0, 1, DATA, 0));
                }
                g.ring_tail();
                for _ in 0..n {
                    g.wait();
                }
                g.done();
                // Around the length of the poll window, where the race is.
                for _ in 0..(lcg >> 20) & 0x3ff {
                    std::hint::spin_loop();
                }
                if i % 512 == 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
    }
}

#[test]
fn an_idle_poller_sleeps_and_a_busy_one_is_not_rung() {
    let mut g = Guest::new(16, IdlePolicy::Adaptive, true);
    assert_eq!(
        g.run(io(NvmOpcode::READ, 1, 0, 1, DATA, 0)),
        Status::SUCCESS
    );
    std::thread::sleep(Duration::from_millis(20));
    let stats = Arc::clone(&g.pool.handles()[0].stats);
    let before = stats.passes.get();
    std::thread::sleep(Duration::from_millis(100));
    assert!(
        stats.passes.get() - before < 5,
        "an idle poller looks at nothing"
    );
    assert!(g.rings >= 1, "it was rung to be woken");

    let mut g = Guest::new(256, IdlePolicy::Poll, true);
    for i in 0..2000 {
        assert_eq!(
            g.run(io(NvmOpcode::READ, i, 0, 1, DATA, 0)),
            Status::SUCCESS
        );
    }
    // Laps of the head are rung; a polling poller needs no other ring.
    assert!(g.rings < 200, "{} rings", g.rings);
}

#[test]
fn each_batch_is_signalled_or_needs_no_interrupt() {
    for idle in [
        IdlePolicy::Poll,
        IdlePolicy::Adaptive,
        IdlePolicy::Interrupt,
    ] {
        let mut g = Guest::new(64, idle, true);
        for _ in 0..500 {
            for cid in 0..8 {
                g.push(io(NvmOpcode::READ, cid, 0, 1, DATA, 0));
                g.ring_tail();
            }
            for _ in 0..8 {
                g.wait();
            }
            g.done();
        }
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            let (sent, spared) = (g.cq_stats.interrupts.get(), g.cq_stats.suppressed.get());
            let batches = g.stats.batches.get();
            if sent + spared == batches {
                assert!(sent > 0);
                break;
            }
            assert!(
                Instant::now() < until,
                "{idle:?}: {sent} interrupts sent and {spared} spared for {batches} batches"
            );
            std::thread::yield_now();
        }
    }
}

#[test]
fn entries_below_the_threshold_are_signalled_in_time() {
    for idle in [
        IdlePolicy::Poll,
        IdlePolicy::Adaptive,
        IdlePolicy::Interrupt,
    ] {
        let mut g = Guest::new(16, idle, false);
        let two_ms = Coalescing { thr_z: 4, time: 20 };
        g.vector.set_coalescing(two_ms);
        let calls = |g: &Guest| {
            let mut count = [0; 8];
            use std::io::Read as _;
            (&g.calls)
                .read(&mut count)
                .map_or(0, |_| u64::from_ne_bytes(count))
        };
        for _ in 0..10 {
            let start = Instant::now();
            g.push(io(NvmOpcode::READ, 1, 0, 1, DATA, 0));
            g.ring_tail();
            g.wait();
            while calls(&g) == 0 {
                assert!(start.elapsed() < Duration::from_secs(10), "{idle:?}");
                std::thread::yield_now();
            }
            assert!(start.elapsed() >= Duration::from_millis(2), "{idle:?}");
            g.done();
        }
    }
}
