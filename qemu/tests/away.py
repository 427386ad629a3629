# SPDX-License-Identifier: GPL-2.0-or-later
"""Tests of the device while its daemon is away, when it comes back, and when it comes late."""

import math
import os
import re
import struct
import time

from fake_backend import SHMEM_MAP, SHMEM_UNMAP
from harness import answers_during, covers, responsive, same, says, test, wait_memory
from machine import BAR0
from waiting import wait_until

CC, CSTS, AQA, ASQ, ACQ, DOORBELLS = 0x14, 0x1C, 0x24, 0x28, 0x30, 0x1000


def killed(b, m):
    """The daemon dies; returns when the device knows."""
    before = m.stderr().count("the daemon is gone")
    b.kill()
    wait_until(lambda: m.stderr().count("the daemon is gone") > before, lambda: f"no warning: {m.stderr()}")


def again(w, b, **knobs):
    """The daemon is started again: the same socket, doorbells, registers."""
    return w.backend(takes_over=b, vrings=b.vrings, window=b.window, side=b.side, dstrd=b.dstrd, **knobs)


def serves(b, goes=1):
    b.wait(lambda: len(b.goes()) >= goes, "go")


def is_back(m, times=1):
    wait_until(lambda: m.stderr().count("the daemon is back after") >= times, lambda: f"it is not back: {m.stderr()}")


@test
def a_daemon_that_dies_and_comes_back(w):
    b, m = w.pair()
    instance = bytes(b.registers[0xF20:0xF30])
    same(b.goes(), [], "go was before the log was cleared")
    m.enable_msix()
    for vector in range(4):
        m.set_vector(vector, 0x100000 + vector * 4, 0xA0 + vector)
    m.write(4, BAR0 + CC, 0x460001)
    b.registers[CSTS] = 1
    same(m.read(4, BAR0 + CSTS), 1)
    killed(b, m)
    # The guest notices nothing: registers read as before, doorbells are stored.
    same(m.read(4, BAR0 + CSTS), 1)
    same(m.read(4, BAR0 + CC), 0x460001)
    same(m.read(8, BAR0), 0x30 << 40 | 0x3FF)
    m.write(4, BAR0 + DOORBELLS + 8, 0x77)
    same(m.read(4, BAR0 + DOORBELLS + 8), 0x77)
    same(struct.unpack_from("<I", b.doorbells, 8)[0], 0x77, "the daemon's file")
    b2 = again(w, b)
    serves(b2)
    is_back(m)
    same(bytes(b2.registers[0xF20:0xF30]), instance, "instance id")
    same(b2.goes(), [3])
    names = b2.names()
    go = next(i for i, (name, body) in enumerate(b2.log) if name == "SET_CONFIG" and body[:4] == struct.pack("<I", 0xF30))
    assert max(i for i, name in enumerate(names) if name in ("ADD_MEM_REG", "SET_VRING_ENABLE", "SET_VRING_CALL")) < go, names
    same(b2.writes(), [], "register writes that were acknowledged")
    assert covers(b2, 0, 0xA0000) and covers(b2, 1 << 20, 256 << 20), b2.regions
    assert all(b2.kicked(v, wait=True) for v in range(4)), "all vrings are kicked"
    for vector in range(4):
        wait_memory(m, 0x100000 + vector * 4, 0xA0 + vector)
    # And all is as ever.
    same(struct.unpack_from("<I", b2.doorbells, 8)[0], 0x77)
    m.write(4, BAR0 + DOORBELLS + 8, 0x78)
    assert b2.kicked(1, wait=True)
    b2.registers[CSTS] = 5
    same(m.read(4, BAR0 + CSTS), 5)
    m.write(4, 0x100000, 0)
    b2.interrupt(0)
    wait_memory(m, 0x100000, 0xA0)


@test
def a_connection_that_ends_is_made_again_at_once(w):
    # One that is not made at once is made after this; if everything is held up, one that is made at once may fail.
    delay, took = 10, []
    b, m = w.pair(options=f",reconnect-delay={delay * 1000}")
    for round_ in range(20):
        begin = time.monotonic()
        b.die()
        serves(b, round_ + 1)
        took.append(time.monotonic() - begin)
        is_back(m, round_ + 1)
    assert sum(t < delay for t in took) > 10, f"it took {', '.join(f'{t:.1f}' for t in took)} s"
    m.write(4, BAR0 + DOORBELLS, 1)
    assert b.kicked(0, wait=True)


@test
def side_words_come_and_go_with_the_daemon(w):
    b, m = w.pair(knobs={"side": 0x1000})
    b.doorbells[0x1000 + 128 + 4] = 1       # awake: no kicks
    killed(b, m)
    m.write(4, BAR0 + DOORBELLS + 8, 1)
    b.doorbells[0x1000:0x1000 + 0x200] = bytes(0x200)
    b2 = again(w, b)
    serves(b2)
    is_back(m)
    same([struct.unpack_from("<I", b2.doorbells, 0x1000 + v * 128 + 68)[0] for v in range(4)], [1, 1, 1, 1], "attentive")
    assert b2.kicked(1, wait=True)
    m.write(4, BAR0 + DOORBELLS + 8, 2)
    assert b2.kicked(1, wait=True)


@test
def mapped_doorbells_are_taken_back(w):
    for accel in ("qtest", "tcg"):
        inner = type(w)()
        try:
            b, m = inner.pair(accel=accel)
            assert b.shmem(SHMEM_MAP, 1)
            m.write(4, BAR0 + DOORBELLS + 8, 1)
            assert not b.kicked(1)
            killed(b, m)
            m.write(4, BAR0 + DOORBELLS + 8, 2)
            same(struct.unpack_from("<I", b.doorbells, 8)[0], 2, "the same page")
            b2 = again(inner, b)
            serves(b2)
            is_back(m)
            assert b2.kicked(1, wait=True)
            m.write(4, BAR0 + DOORBELLS + 8, 3)
            assert b2.kicked(1, wait=True), "trapped"
            same(struct.unpack_from("<I", b2.doorbells, 8)[0], 3)
            assert b2.shmem(SHMEM_MAP, 1) and b2.shmem(SHMEM_UNMAP, 1)
        finally:
            inner.close()


@test
def a_file_of_doorbells_that_was_cut_is_let_go_of(w):
    b, m = w.pair(accel="tcg")
    assert b.shmem(SHMEM_MAP, 1)
    b.doorbells.close()
    os.ftruncate(b.window_fd, 0)    # a store to the old mapping would be a SIGBUS
    killed(b, m)
    m.write(4, BAR0 + DOORBELLS, 1)
    same(m.read(4, BAR0 + DOORBELLS), 1)
    b2 = w.backend()
    serves(b2)
    is_back(m)
    m.write(4, BAR0 + DOORBELLS, 2)
    assert b2.kicked(0, wait=True)
    same(struct.unpack_from("<I", b2.doorbells, 0)[0], 2)


@test
def a_write_whose_acknowledgement_is_lost_is_sent_again(w):
    b, m = w.pair()
    m.write(4, BAR0 + AQA, 0x1F001F)
    b.close_after_write = 1
    m.write(4, BAR0 + CC, 0x460001)
    serves(b)
    is_back(m)
    same(b.writes(), [(AQA, 0x1F001F), (CC, 0x460001), (CC, 0x460001)])
    writes = [struct.unpack_from("<I", body)[0] for name, body in b.log if name == "SET_CONFIG"]
    same([a for a in writes if a in (AQA, CC, 0xF30)], [AQA, CC, 0xF30, CC], "it is sent again after go")
    same(b.goes(), [3])
    same(m.read(4, BAR0 + CC), 0x460001)


@test
def writes_while_the_daemon_is_away_keep_their_order(w):
    b, m = w.pair()
    m.write(4, BAR0 + CC, 0x460001)
    killed(b, m)
    wanted = [(4, CC, 0x460000), (4, AQA, 0x1F001F), (8, ASQ, 0x123456000), (8, ACQ, 0x123457000), (4, CC, 0x460001)]
    for size, offset, value in wanted:
        m.write(size, BAR0 + offset, value)
        same(m.read(size, BAR0 + offset), value, f"register {offset:#x}")
    m.write(4, BAR0 + 0x0C, 0xF0)
    m.write(4, BAR0 + 0x10, 0x30)
    same(m.read(4, BAR0 + 0x0C), 0xC0, "INTMS")
    same(m.read(4, BAR0 + 0x10), 0xC0, "INTMC")
    b2 = again(w, b)
    serves(b2)
    is_back(m)
    same(b2.writes(), [(offset, value) for _, offset, value in wanted] + [(0x0C, 0xF0), (0x10, 0x30)])
    b2.clear_log()
    # Once only.
    killed(b2, m)
    b3 = again(w, b2)
    serves(b3)
    is_back(m, 2)
    same(b3.writes(), [])


@test
def kept_writes_have_a_limit(w):
    b, m = w.pair()
    killed(b, m)
    for i in range(400):
        m.write(4, BAR0 + CC, 0x460000 | i & 1)
    for i in range(400):
        m.write(4, BAR0 + CC, 0x460000)
    same(m.stderr().count("again and again"), 1, "warnings")
    b2 = again(w, b)
    serves(b2)
    is_back(m)
    same(b2.writes(), [(CC, 0x460000 | i & 1) for i in range(128)])
    m.write(4, BAR0 + CC, 0x460001)
    same(b2.writes()[128:], [(CC, 0x460001)])


@test
def a_daemon_that_dies_again_and_again_while_coming_back(w):
    b, m = w.pair()
    m.write(4, BAR0 + CC, 0x460001)
    killed(b, m)
    m.write(4, BAR0 + CC, 0x460000)
    m.write(4, BAR0 + CC, 0x460001)
    b2 = again(w, b, answer={"GET_FEATURES": "close"})
    for name in ("GET_FEATURES", "GET_PROTOCOL_FEATURES", "SET_OWNER", "GET_QUEUE_NUM", "GET_CONFIG", "SET_CONFIG",
                 "SET_BACKEND_REQ_FD", "ADD_MEM_REG", "SET_VRING_CALL", "SET_VRING_KICK", "SET_VRING_ENABLE"):
        with b2.lock:
            b2.answer = {name: "close"}
            before = b2.connections
        b2.wait(lambda: b2.connections >= before + 2, f"two attempts that end at {name}")
        same(b2.writes(), [], "before go")
    with b2.lock:
        b2.close_after_write = 2    # the first kept write, again and again
        b2.answer = None
    is_back(m)
    same(len(b2.writes()), 4, "writes")
    same(set(b2.writes()[:-1]), {(CC, 0x460000)})
    same(b2.writes()[-1], (CC, 0x460001))
    same(m.stderr().count("is tried again"), 1, "warnings")


@test
def attempts_become_rarer(w):
    b, m = w.pair(options=",reconnect-delay=20")
    with b.lock:
        b.answer = {"GET_FEATURES": "close"}
    b.die()
    # Two seconds for a machine that has nothing else to do.
    b.wait(lambda: b.connections > 30, "30 attempts")
    times = [t - b.times[1] for t in b.times[1:]]
    gaps = [t - s for s, t in zip(times, times[1:])]
    # What the device waits at least, if it reads a clock of milliseconds; this machine may make it any longer.
    for t, gap in zip(times, gaps):
        least = max(20, min(math.floor(t * 1000 / 8), 1000)) / 1000
        assert gap > least - 0.003, f"{gap * 1000:.0f} ms between two attempts, {t * 1000:.0f} ms after the first: {times}"
    assert min(gaps[:5]) < max(gaps[-3:]), f"gaps of {gaps}"
    with b.lock:
        b.answer = None
    is_back(m)


@test
def a_back_end_that_hangs_keeps_nobody(w):
    b, m = w.hasty(1500)
    killed(b, m)
    b2 = again(w, b, answer={"GET_FEATURES": "silence"})
    answers_during(m, b2.connection)
    b2.wait(lambda: b2.connections >= 2, "it is dropped, and tried again")
    responsive(m, 3)        # longer than such a connection, and what is between two
    same(m.read(4, BAR0 + CSTS), 0)
    says(m.stderr(), f"no answer to GET_FEATURES within {m.reply_timeout} ms")
    with b2.lock:
        b2.answer = None
    serves(b2)
    is_back(m)


@test
def a_back_end_that_answers_and_hangs_keeps_nobody_for_long(w):
    """The machine stands still for a second, and a fifth of the time at most, however long answers may take otherwise."""
    b, m = w.pair(options=",reply-timeout=1000000")
    killed(b, m)
    b2 = again(w, b, answer={"SET_BACKEND_REQ_FD": "silence"})
    within = wait_until(lambda: re.search(r"is tried again: no answer to \w+ within (\d+) ms", m.stderr()), "it is not dropped")
    assert int(within[1]) <= 1000, within[0]
    answers_during(m, b2.pause)
    same(m.read(4, BAR0 + CSTS), 0)
    with b2.lock:
        b2.answer = None
    serves(b2)
    is_back(m)
    # The least of all: what is measured from outside may be longer.
    assert min(end - begin for begin, end in zip(b2.times, b2.ends)) > 0.99, "a moment is given to it"
    assert min(t - s for s, t in zip(b2.times, b2.times[1:])) > 4.99, "four times as long it is not tried again"


@test
def a_daemon_that_takes_its_time_to_go_on(w):
    b, m = w.hasty(2000)
    m.write(4, BAR0 + CC, 0x460001)
    killed(b, m)
    b2 = again(w, b, silent_go=True)
    serves(b2)
    # The guest is served from what is known, and what it writes is kept.
    m.write(4, BAR0 + CC, 0x464001)
    same(m.read(4, BAR0 + CC), 0x464001)
    m.write(4, BAR0 + DOORBELLS, 9)
    answers_during(m, lambda: b2.connection() and (b2.connection(), len(b2.goes())))
    same(b2.writes(), [])
    serves(b2, 2)
    says(m.stderr(), f"it has not gone on within {m.reply_timeout} ms")
    b2.silent_go = False
    is_back(m)
    same(b2.writes(), [(CC, 0x464001)])
    assert b2.kicked(0, wait=True)


@test
def a_reset_while_the_daemon_is_away(w):
    b, m = w.pair()
    m.write(4, BAR0 + CC, 0x460001)
    b.registers[CSTS] = 1
    m.read(4, BAR0 + CSTS)
    killed(b, m)
    m.write(4, BAR0 + CC, 0x464001)
    m.qmp("system_reset")
    m.wait_event("RESET")
    m.enable_bars()
    same([m.read(4, BAR0 + o) for o in (CC, CSTS, AQA)], [0, 0, 0])
    m.write(4, BAR0 + AQA, 0x70007)
    b2 = again(w, b)
    serves(b2)
    is_back(m)
    same(b2.goes(), [1], "nothing of before is wanted")
    same(b2.writes(), [(AQA, 0x70007)])
    # From here on there is something again.
    killed(b2, m)
    b3 = again(w, b2)
    serves(b3)
    same(b3.goes(), [3])


@test
def a_reset_while_the_daemon_comes_back(w):
    b, m = w.hasty(2000)
    m.write(4, BAR0 + CC, 0x460001)
    killed(b, m)
    b2 = again(w, b, silent_go=True)
    serves(b2)
    m.qmp("system_reset")
    m.wait_event("RESET")
    b2.silent_go = False
    serves(b2, 2)
    same(b2.goes()[0], 3)
    is_back(m)
    same(b2.goes()[-1], 1)


@test
def a_reset_ends_with_nothing_used(w):
    b, m = w.pair()
    m.write(4, BAR0 + CC, 0x460001)
    m.qmp("system_reset")
    m.wait_event("RESET")
    b.clear_log()
    killed(b, m)
    b2 = again(w, b)
    serves(b2)
    same(b2.goes(), [1])


@test
def memory_that_is_plugged_while_the_daemon_is_away(w):
    b, m = w.pair(size="256M,slots=2,maxmem=1G")
    killed(b, m)
    m.qmp("object-add", **{"qom-type": "memory-backend-memfd", "id": "more", "size": 128 << 20, "share": True})
    m.qmp("device_add", driver="pc-dimm", id="dimm", memdev="more")
    b2 = again(w, b)
    serves(b2)
    gpa, (size, _, _) = max(b2.regions.items())
    assert gpa >= 1 << 32 and size == 128 << 20, b2.regions
    assert covers(b2, 1 << 20, 256 << 20)
    is_back(m)
    b2.clear_log()
    m.qmp("device_del", id="dimm")
    m.out(4, 0xA00, 0)
    m.out(1, 0xA14, 0x8)
    m.wait_event("DEVICE_DELETED", "dimm")
    same(b2.names(), ["REM_MEM_REG"])


@test
def another_shape_is_not_taken(w):
    for knobs, text in (({"vrings": 3}, "has 3 queue pairs, this device 4"), ({"dstrd": 2}, "doorbell stride is 2, this device's 0"),
                        ({"window": 0x2000}, "0x2000 bytes, this device's 0x1000")):
        inner = type(w)()
        try:
            b, m = inner.pair()
            killed(b, m)
            b2 = inner.backend(**knobs)
            b2.wait(lambda: b2.connections > 3, "attempts")
            says(m.stderr(), text)
            same(m.stderr().count("is tried again"), 1, "warnings")
            same(b2.goes(), [])
            b2.kill()
            serves(again(inner, b))
            is_back(m)
        finally:
            inner.close()


@test
def what_cannot_go_on_is_said(w):
    b, m = w.pair()
    m.write(4, BAR0 + CC, 0x460001)
    killed(b, m)
    b2 = again(w, b, kept=2)
    b2.registers[CSTS] = 2
    serves(b2)
    is_back(m)
    says(m.stderr(), "cannot go on with what the guest had there")
    same(m.read(4, BAR0 + CSTS), 2, "CSTS.CFS")


@test
def unplugged_while_the_daemon_is_away(w):
    b = w.backend()
    m = w.machine(machine="pc", device=None)
    for _ in range(2):
        m.qmp("device_add", driver="vhost-user-nvme", id="disk", socket=w.socket, addr="5")
        m.enable_bars()
        m.write(4, BAR0 + CC, 0x460001)
        killed(b, m)
        fds = m.descriptors()
        m.qmp("device_del", id="disk")
        m.out(4, 0xAE10, 0)
        m.out(4, 0xAE08, 1 << 5)
        m.wait_event("DEVICE_DELETED", "disk")
        wait_until(lambda: m.descriptors() <= fds - 8, "descriptors left behind")
        b = again(w, b)
        time.sleep(0.3)     # in which nothing is to happen
        same(b.connections, 0, "a device that is gone")


@test
def the_machine_ends_while_the_daemon_is_away(w):
    b, m = w.pair()
    killed(b, m)
    b2 = again(w, b, answer={"GET_FEATURES": "silence"})
    b2.wait(lambda: b2.connections, "an attempt")
    w.machines.remove(m)
    m.close()


# ---------------------------------------------------------------- wait=off

LATE = ",wait=off,queues=4,doorbell-stride=0,queue-entries=1024"


@test
def the_machine_starts_before_the_daemon(w):
    m = w.machine(options=LATE)
    m.enable_bars()
    same(m.config_read(4, 0), 0x10F01AF4, "the ids that the daemon has if it is not told otherwise")
    same(m.config_read(2, m.capability(0x11) + 2) & 0x7FF, 3, "MSI-X table size - 1")
    cap = m.read(8, BAR0)
    same((cap & 0xFFFF, cap >> 24 & 0xFF, cap >> 32 & 0xF, cap >> 37 & 0xFF), (1023, 120, 0, 1), "MQES, TO, DSTRD, CSS")
    same(m.read(4, BAR0 + 8), 0x20000)
    wanted = [(4, AQA, 0x1F001F), (8, ASQ, 0x10000), (8, ACQ, 0x11000), (4, CC, 0x460001)]
    for size, offset, value in wanted:
        m.write(size, BAR0 + offset, value)
    same(m.read(4, BAR0 + CSTS), 0, "not ready yet")
    responsive(m, 2)        # longer than the time between two attempts
    b = w.backend()
    serves(b)
    b.wait(lambda: len(b.writes()) == 4, "what was written")
    same(b.goes(), [1])
    same(b.writes(), [(offset, value) for _, offset, value in wanted])
    b.registers[CSTS] = 1
    same(m.read(4, BAR0 + CSTS), 1)
    m.write(4, BAR0 + DOORBELLS, 1)
    assert b.kicked(0, wait=True)
    killed(b, m)
    b2 = again(w, b)
    serves(b2)
    same(b2.goes(), [3])


@test
def what_time_alone_does_not_mend_is_said_once(w):
    b, m = w.pair()
    killed(b, m)
    os.unlink(w.socket)
    os.symlink(w.socket, w.socket)      # a path that leads nowhere
    wait_until(lambda: "Too many levels" in m.stderr(), m.stderr)
    time.sleep(0.5)                     # several attempts, which say nothing
    same(m.stderr().count("is tried again"), 1, "warnings")
    os.unlink(w.socket)
    serves(again(w, b))
    is_back(m)


@test
def a_late_daemon_of_another_shape(w):
    m = w.machine(options=LATE)
    b = w.backend(vrings=5)
    b.wait(lambda: b.connections > 2, "attempts")
    says(m.stderr(), "has 5 queue pairs, this device 4 (its property 'queues')")
    b.kill()
    serves(w.backend())


@test
def what_is_said_of_a_late_daemon_must_make_sense(w):
    for options, text in ((",wait=off,queues=65", "'queues' is 65"), (",wait=off,queue-entries=1", "'queue-entries' is 1"),
                          (",wait=off,doorbell-stride=11", "'doorbell-stride' is 11")):
        says(w.refused(options=options), text)
    says(w.refused(options=LATE, memory="memory-backend-ram,id=mem,size=256M"), "'mem'", "share=on")
