# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU without a guest: PCI configuration, memory and ports through qtest, everything else through QMP."""

import json
import os
import socket
import subprocess
import time

from waiting import PATIENCE, wait_until

BAR0, BAR4 = 0xE0000000, 0xE0100000


class Lines:
    """A socket of lines. Not one file to read and to write: a text file forgets what it has read ahead when it is written to,
    so that an event that came together with an answer was lost."""

    def __init__(self, s):
        self.socket = s
        self.input = s.makefile("r", newline="\n")

    def send(self, line):
        self.socket.sendall(line.encode() + b"\n")

    def receive(self):
        line = self.input.readline()
        assert line, "QEMU closed the channel"
        return line


class Machine:
    """Starts QEMU with these arguments; `slot` is the PCI device that the accessors mean."""

    def __init__(self, qemu, tmp, *args, accel="qtest", machine="q35", memory="memory-backend-memfd,id=mem,size=256M,share=on",
                 size="256M", slot=5):
        self.slot = slot
        self.events = []
        listeners = []
        for name in ("qtest", "qmp"):
            path = os.path.join(tmp, name)
            if os.path.exists(path):    # of a machine before this one
                os.unlink(path)
            s = socket.socket(socket.AF_UNIX)
            s.bind(path)
            s.listen(1)
            listeners.append(s)
        self.stderr_path = os.path.join(tmp, "stderr")
        command = [qemu, "-accel", accel, "-S", "-machine", f"{machine},memory-backend=mem", "-object", memory, "-m", size,
                   "-nodefaults", "-display", "none", "-qtest", f"unix:{tmp}/qtest", "-qtest-log", "/dev/null",
                   "-qmp", f"unix:{tmp}/qmp", *args]
        with open(self.stderr_path, "wb") as err:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=err, stderr=err)
        self.pid = self.process.pid
        try:
            self.qtest = Lines(self._accept(listeners[0]))
            self.monitor = Lines(self._accept(listeners[1]))
            self.monitor.receive()
            self.qmp("qmp_capabilities")
        except (OSError, ValueError, AssertionError) as e:
            try:
                status = self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(f"QEMU does not come up: {e}; it said: {self.stderr()}") from e
            raise AssertionError(f"QEMU ended with {status}: {self.stderr()}") from e
        finally:
            for s in listeners:
                s.close()

    def _accept(self, listener):
        def accept():
            ended = self.process.poll() is not None
            try:
                return listener.accept()[0]
            except socket.timeout:
                return ended

        listener.settimeout(0.1)
        s = wait_until(accept, "it does not connect")
        assert s is not True, "it has ended"
        s.settimeout(PATIENCE)
        return s

    def stderr(self):
        with open(self.stderr_path, encoding="utf-8", errors="replace") as f:
            return f.read()

    def close(self):
        """Ends QEMU; it must not have died before."""
        assert self.process.poll() is None, f"QEMU died with {self.process.returncode}: {self.stderr()}"
        try:
            self.qmp("quit")
            assert self.process.wait(PATIENCE) == 0, f"QEMU ended with {self.process.returncode}"
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    # -- QMP

    def qmp(self, command, **arguments):
        answer = self.qmp_raw(command, **arguments)
        assert "return" in answer, f"{command}: {answer}"
        return answer["return"]

    def qmp_raw(self, command, **arguments):
        message = {"execute": command}
        if arguments:
            message["arguments"] = {k.replace("_", "-"): v for k, v in arguments.items()}
        self.monitor.send(json.dumps(message))
        while True:
            answer = json.loads(self.monitor.receive())
            if "event" not in answer:
                return answer
            self.events.append(answer)

    def wait_event(self, name, device=None):
        def find():
            self.qmp("query-status")
            return next((e for e in self.events
                         if e["event"] == name and (device is None or e.get("data", {}).get("device") == device)), None)

        e = wait_until(find, lambda: f"no event {name}; there were {[e['event'] for e in self.events]}", 0.02)
        self.events.remove(e)
        return e

    # -- the process

    def descriptors(self):
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def idles(self):
        """In the best of some moments it uses next to no CPU: one that runs in circles has none such."""
        def ticks():
            with open(f"/proc/{self.pid}/stat", encoding="ascii") as f:
                return sum(map(int, f.read().rsplit(")", 1)[1].split()[11:13]))

        shares = []
        while len(shares) < 10:
            begin, before = time.monotonic(), ticks()
            time.sleep(0.5)
            shares.append((ticks() - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - begin))
            if shares[-1] <= 0.1:
                return
        raise AssertionError(f"it uses {min(shares):.0%} of a CPU at least")

    # -- qtest

    def ask(self, line):
        self.qtest.send(line)
        while True:
            answer = self.qtest.receive().split()
            if answer[0] != "IRQ":
                assert answer[0] == "OK", f"{line}: {answer}"
                return int(answer[1], 0) if len(answer) > 1 else None

    def read(self, size, address):
        return self.ask(f"read{'?bw?l???q'[size]} {address:#x}")

    def write(self, size, address, value):
        self.ask(f"write{'?bw?l???q'[size]} {address:#x} {value:#x}")

    def out(self, size, port, value):
        self.ask(f"out{'?bw?l'[size]} {port:#x} {value:#x}")

    def inp(self, size, port):
        return self.ask(f"in{'?bw?l'[size]} {port:#x}")

    # -- PCI

    def _select(self, offset, bus=0):
        self.out(4, 0xCF8, 0x80000000 | bus << 16 | self.slot << 11 | (offset & 0xFC))

    def config_read(self, size, offset, bus=0):
        self._select(offset, bus)
        return self.inp(size, 0xCFC + (offset & 3))

    def config_write(self, size, offset, value, bus=0):
        self._select(offset, bus)
        self.out(size, 0xCFC + (offset & 3), value)

    def capability(self, wanted):
        at = self.config_read(1, 0x34)
        for _ in range(48):
            if not at:
                break
            if self.config_read(1, at) == wanted:
                return at
            at = self.config_read(1, at + 1)
        raise AssertionError(f"no capability {wanted:#x}")

    def enable_bars(self):
        self.config_write(4, 0x10, BAR0)
        self.config_write(4, 0x14, 0)
        self.config_write(4, 0x20, BAR4)
        self.config_write(4, 0x24, 0)
        self.config_write(2, 0x04, 0x6)

    def enable_msix(self, on=True):
        at = self.capability(0x11)
        self.config_write(2, at + 2, 0x8000 if on else 0)

    def set_vector(self, vector, address, data, masked=False):
        entry = BAR4 + vector * 16
        self.write(4, entry, address)
        self.write(4, entry + 4, 0)
        self.write(4, entry + 8, data)
        self.write(4, entry + 12, int(masked))

    def fw_cfg_file(self, name):
        """The contents of a fw_cfg file, or None."""
        self.out(2, 0x510, 0x19)
        take = lambda n: bytes(self.inp(1, 0x511) for _ in range(n))
        for _ in range(int.from_bytes(take(4), "big")):
            entry = take(64)
            if entry[8:].split(b"\0")[0] == name.encode():
                self.out(2, 0x510, int.from_bytes(entry[4:6], "big"))
                return take(int.from_bytes(entry[:4], "big"))
        return None
