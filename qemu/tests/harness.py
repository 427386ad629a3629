# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of `run` share: a list of them, a world for each, and what they say."""

import os
import tempfile
import time

from fake_backend import Backend
from machine import Machine
from waiting import PATIENCE, wait_until

TESTS = []
DEVICE = "vhost-user-nvme,id=disk,addr=5,socket="


def test(function):
    TESTS.append(function)
    return function


class World:
    """A temporary directory with what a test starts in it."""

    qemu = None     # the binary
    reports = []    # of the worlds that ended since this was emptied: what was said in them

    def __init__(self):
        self.dir = tempfile.TemporaryDirectory(prefix="vun.")
        self.tmp = self.dir.name
        self.socket = os.path.join(self.tmp, "nvme.sock")
        self.backends, self.machines = [], []
        self.begin = time.monotonic()

    def backend(self, **knobs):
        b = Backend(self.socket, **knobs)
        self.backends.append(b)
        return b

    def machine(self, *args, device=DEVICE, options="", **kw):
        extra = ("-device", device + self.socket + options) if device else ()
        m = Machine(self.qemu, self.tmp, *extra, *args, **kw)
        self.machines.append(m)
        return m

    def pair(self, *args, knobs=None, **kw):
        b = self.backend(**(knobs or {}))
        m = self.machine(*args, **kw)
        m.enable_bars()
        b.clear_log()
        return b, m

    def hasty(self, ms, options="", **kw):
        """A pair whose device waits for answers only so long, `m.reply_timeout`: longer, if even the start takes longer."""
        for timeout in (ms, ms * 4, ms * 16):
            try:
                b, m = self.pair(options=f",reply-timeout={timeout}" + options, **kw)
                m.reply_timeout = timeout
                return b, m
            except AssertionError as e:
                if f"within {timeout} ms" not in str(e):
                    raise
                self.backends.pop().close()
                said = str(e)
        raise AssertionError(said)

    def refused(self, *args, device=DEVICE, options="", **kw):
        """QEMU must end with status 1 and an error; returns what it said."""
        try:
            m = self.machine(*args, device=device, options=options, **kw)
        except AssertionError as e:
            text = str(e)
            assert text.startswith("QEMU ended with 1: "), text
            return text
        raise AssertionError(f"QEMU took it: {m.stderr()}")

    def refused_in_time(self, ms, **kw):
        """The same of a device that waits for answers only so long, unless this machine is too busy for the first ones."""
        for timeout in (ms, ms * 4, ms * 16):
            text = self.refused(options=f",reply-timeout={timeout}", **kw)
            if "no answer to" not in text:
                break
        says(text, f"within {timeout} ms")
        return text

    def said(self):
        """What the machine has said, also one that is just starting."""
        try:
            with open(os.path.join(self.tmp, "stderr"), encoding="utf-8", errors="replace") as f:
                return f.read()
        except FileNotFoundError:
            return ""

    def close(self):
        try:
            for m in self.machines:
                m.close()
        finally:
            for m in self.machines:
                m.kill()
            self.reports.append(self.report())
            for b in self.backends:
                b.close()
            self.dir.cleanup()
        for b in self.backends:
            assert not b.broke, b.broke

    def report(self):
        """For whoever has to find out why a test failed."""
        lines = []
        for i, m in enumerate(self.machines):
            lines += [f"QEMU {i} said:"] + m.stderr().splitlines()[-20:]
        for i, b in enumerate(self.backends):
            lines += [f"back-end {i}, started at {b.begin - self.begin:.3f} s:"] + squeezed(b.history)[-40:]
        return lines


def squeezed(lines):
    """Lines that say the same once, and how often."""
    result, what, times = [], None, 0
    for line in lines:
        if line.split("connection", 1)[-1] == what:
            times += 1
            result[-1] = f"{line}, {times} times"
        else:
            what, times = line.split("connection", 1)[-1], 1
            result.append(line)
    return result


def same(got, want, what=""):
    assert got == want, f"{what or 'value'}: {got!r}, not {want!r}"


def says(text, *parts):
    for part in parts:
        assert part in text, f"no {part!r} in: {text}"


def wait_memory(m, address, value):
    wait_until(lambda: m.read(4, address) == value, lambda: f"no interrupt: {m.read(4, address):#x}")


def answers_during(m, state, times=5):
    """The main loop answers again and again while `state()` is true and does not change.

    One that waits for something to end answers when it has ended. How fast it answers is the machine's business: if not often
    enough in one such state, then in another one.
    """
    seen, answers, end = None, 0, time.monotonic() + PATIENCE
    while answers < times:
        over = time.monotonic() > end
        before = state()
        m.qmp("query-status")
        time.sleep(0.01)    # in which the end of the state is seen, if this answer is due to it
        if before and state() == before:
            answers = answers + 1 if before == seen else 1
            seen = before
        assert answers >= times or not over, f"the main loop does not answer during {seen}"


def responsive(m, seconds):
    """The main loop answers all the time, for so long; the best of some tries counts, since all here may be held up.

    What it is to be held up by comes again and again, and has to be in each of the tries.
    """
    longest = []
    while len(longest) < 20 and (not longest or min(longest) > 0.3):
        longest.append(0)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            begin = time.monotonic()
            m.qmp("query-status")
            longest[-1] = max(longest[-1], time.monotonic() - begin)
            time.sleep(0.01)
    assert min(longest) <= 0.3, f"in each {seconds} s the main loop stood still for {min(longest):.2f} s"


def covers(b, start, end):
    """True if the regions hold this range of guest addresses."""
    at = start
    for gpa, (size, _, _) in sorted(b.regions.items()):
        if gpa <= at < gpa + size:
            at = gpa + size
    return at >= end
