//! Queues: stopped, full, reset, without memory, and moved.

use super::*;

#[test]
fn a_wild_tail_stops_its_queue_and_nothing_else() {
    for wild in [8, 9, 0xffff, 0x1_0000, u32::MAX] {
        let mut g = Guest::new(8, IdlePolicy::Interrupt, false);
        g.register(Doorbell::Sq(1)).store(wild, Ordering::Release);
        use std::io::Write as _;
        (&g.kick).write_all(&1u64.to_ne_bytes()).unwrap();
        let event = g.events.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(event, PollerEvent::InvalidDoorbell { qid: 1 });
        // A good value does not start it again; deletion works.
        g.push(io(NvmOpcode::READ, 1, 0, 1, DATA, 0));
        g.ring_tail();
        std::thread::sleep(Duration::from_millis(20));
        assert!(g.take().is_none());
        let gone = g.ask(|token| Message::DeleteSq {
            token,
            key: KEY,
            qid: 1,
        });
        assert_eq!(gone, Ok(true));
        let gone = g.ask(|token| Message::DeleteCq {
            token,
            key: KEY,
            qid: 1,
        });
        assert_eq!(gone, Ok(true));
    }
}

#[test]
fn a_full_completion_queue_holds_commands_back_and_lets_them_go() {
    for shadow in [false, true] {
        // Depth 2: one completion fits. The guest takes completions, but rings the head late.
        let mut g = Guest::new(2, IdlePolicy::Interrupt, shadow);
        for cid in 0..20 {
            g.push(io(NvmOpcode::READ, cid, 0, 1, DATA, 0));
            g.ring_tail();
            let cqe = g.wait();
            assert_eq!(cqe.cid, cid);
            // The next command is rung before the head is.
            g.push(io(NvmOpcode::READ, cid + 100, 0, 1, DATA, 0));
            g.ring_tail();
            std::thread::sleep(Duration::from_millis(2));
            assert!(g.take().is_none(), "no room for it yet");
            g.done();
            assert_eq!(g.wait().cid, cid + 100);
            g.done();
        }
    }
}

#[test]
fn reset_forgets_the_queues_and_leaves_the_shadow_pages_alone() {
    let mut g = Guest::new(16, IdlePolicy::Adaptive, true);
    assert_eq!(
        g.run(io(NvmOpcode::READ, 1, 0, 1, DATA, 0)),
        Status::SUCCESS
    );
    assert_eq!(g.ask(|token| Message::Reset { token, key: KEY }), Ok(true));
    // The pages are somebody else's now.
    assert!(g.map.write(SHADOW.doorbells, &[0x77; 0x2000]));
    assert!(g.map.write(CQ, &[0x77; 256]));
    g.register(Doorbell::Sq(1)).store(3, Ordering::Release);
    use std::io::Write as _;
    (&g.kick).write_all(&1u64.to_ne_bytes()).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let mut page = [0; 0x2000];
    assert!(g.map.read(SHADOW.doorbells, &mut page));
    assert!(page.iter().all(|b| *b == 0x77));
    let mut cq = [0; 256];
    assert!(g.map.read(CQ, &mut cq));
    assert!(cq.iter().all(|b| *b == 0x77));
    // And it can be used again.
    g.window.clear();
    (g.tail, g.head, g.phase, g.shadow) = (0, 0, true, false);
    assert!(g.map.write(CQ, &[0; 256]));
    let (_, kick) = eventfd();
    g.kick = kick.try_clone().unwrap();
    let (_, head_kick) = eventfd();
    g.head_kick = head_kick.try_clone().unwrap();
    g.create(Arc::new(kick), Arc::new(head_kick));
    assert_eq!(
        g.run(io(NvmOpcode::READ, 1, 0, 1, DATA, 0)),
        Status::SUCCESS
    );
    assert_eq!(g.ask(|token| Message::Detach { token, key: KEY }), Ok(true));
}

#[test]
fn queues_whose_memory_goes_stop_until_it_is_back() {
    let mut g = Guest::new(16, IdlePolicy::Adaptive, false);
    assert_eq!(
        g.run(io(NvmOpcode::READ, 1, 0, 1, DATA, 0)),
        Status::SUCCESS
    );
    let set = |g: &mut Guest, map| {
        g.ask(|token| Message::SetMemory {
            token,
            key: KEY,
            map,
        })
    };
    assert_eq!(set(&mut g, GuestMap::empty()), Ok(true));
    let gone: Vec<_> = g.events.try_iter().collect();
    assert!(gone.contains(&PollerEvent::QueueMemoryGone { qid: 1 }));
    g.push(io(NvmOpcode::READ, 2, 0, 1, DATA, 0));
    g.ring_tail();
    std::thread::sleep(Duration::from_millis(10));
    assert!(g.take().is_none());
    let map = Arc::clone(&g.map);
    assert_eq!(set(&mut g, map), Ok(true));
    assert_eq!(g.wait().cid, 2);
}

#[test]
fn queues_go_on_where_another_poller_left_off() {
    for shadow in [false, true] {
        let mut g = Guest::new(16, IdlePolicy::Interrupt, shadow);
        let read = |cid| io(NvmOpcode::READ, cid, 0, 1, DATA, 0);
        let kept = g.ask(|token| Message::Release {
            token,
            key: KEY,
            cqid: 2,
        });
        assert_eq!(kept, Ok(false), "there is none");
        for number in 1..40 {
            assert_eq!(g.run(read(1)), Status::SUCCESS);
            g.token += 1;
            let (token, key, cqid) = (g.token, KEY, 1);
            g.pool.handles()[0].send(Message::Release { token, key, cqid });
            let (answered, queues) = g.released.recv_timeout(Duration::from_secs(10)).unwrap();
            assert_eq!(
                (answered, queues.cqid(), queues.sqids()),
                (token, 1, vec![1])
            );
            // Nobody looks now, and what is rung is not lost.
            g.push(read(2));
            g.ring_tail();
            std::thread::sleep(Duration::from_micros(200));
            assert!(g.take().is_none());
            let done = g.ask(|token| Message::Hello { token, key });
            assert_eq!(done, Ok(true));
            let done = g.ask(|token| Message::Adopt {
                token,
                key,
                number,
                queues,
            });
            assert_eq!(done, Ok(true));
            assert_eq!(g.wait().cid, 2);
            g.done();
        }
    }
}

/// Completions of a deep batch are posted together: none is lost, none comes twice, and each says what its own command came to.
#[test]
fn each_command_of_a_batch_has_its_completion_in_order() {
    let mut g = Guest::new(64, IdlePolicy::Adaptive, false);
    let mut queued = 0u16;
    for batch in (1..=40).chain([8, 9, 12, 63]) {
        let commands: Vec<Sqe> = (0..batch)
            .map(|cid| match cid % 5 {
                // A block that is not there, a command nobody knows, and one that moves what several others do.
                1 => io(NvmOpcode::READ, cid, u64::MAX - 1, 1, DATA, 0),
                3 => io(NvmOpcode(0x7F), cid, 0, 1, DATA, 0),
                4 => io(NvmOpcode::WRITE_ZEROES, cid, 0, 64, 0, 0),
                _ => io(NvmOpcode::READ, cid, 0, 1, DATA, 0),
            })
            .collect();
        for sqe in commands {
            g.push(sqe);
        }
        g.ring_tail();
        for cid in 0..batch {
            let cqe = g.wait();
            queued = (queued + 1) % 64;
            let want = match cid % 5 {
                1 => Status::LBA_OUT_OF_RANGE,
                3 => Status::INVALID_OPCODE,
                _ => Status::SUCCESS,
            };
            assert_eq!(
                (cqe.cid, cqe.status.status(), cqe.sqhd),
                (cid, want, queued),
                "of {batch}"
            );
        }
        g.done();
        assert!(g.take().is_none(), "one too many of {batch}");
    }
}
