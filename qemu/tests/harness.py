# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of `run` share: a list of them, a world for each, and what they say."""

import os
import tempfile
import time

from fake_backend import Backend
from machine import Machine

TESTS = []
DEVICE = "vhost-user-nvme,id=disk,addr=5,socket="


def test(function):
    TESTS.append(function)
    return function


class World:
    """A temporary directory with what a test starts in it."""

    qemu = None     # the binary

    def __init__(self):
        self.dir = tempfile.TemporaryDirectory(prefix="vun.")
        self.tmp = self.dir.name
        self.socket = os.path.join(self.tmp, "nvme.sock")
        self.backends, self.machines = [], []

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

    def refused(self, *args, device=DEVICE, options="", **kw):
        """QEMU must end with status 1 and an error; returns what it said."""
        try:
            m = self.machine(*args, device=device, options=options, **kw)
        except AssertionError as e:
            text = str(e)
            assert text.startswith("QEMU ended with 1: "), text
            return text
        raise AssertionError(f"QEMU took it: {m.stderr()}")

    def close(self):
        try:
            for m in self.machines:
                m.close()
        finally:
            for m in self.machines:
                m.kill()
            for b in self.backends:
                b.close()
            self.dir.cleanup()


def same(got, want, what=""):
    assert got == want, f"{what or 'value'}: {got!r}, not {want!r}"


def says(text, *parts):
    for part in parts:
        assert part in text, f"no {part!r} in: {text}"


def wait_memory(m, address, value):
    end = time.monotonic() + 5
    while m.read(4, address) != value:
        assert time.monotonic() < end, f"no interrupt: {m.read(4, address):#x}"
        time.sleep(0.01)


def covers(b, start, end):
    """True if the regions hold this range of guest addresses."""
    at = start
    for gpa, (size, _, _) in sorted(b.regions.items()):
        if gpa <= at < gpa + size:
            at = gpa + size
    return at >= end
