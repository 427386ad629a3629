# SPDX-License-Identifier: GPL-2.0-or-later
"""A vhost-user back-end that speaks docs/VHOST_USER.md without an NVMe controller behind it, for tests of the front-end."""

import array
import mmap
import os
import select
import socket
import struct
import threading
import time
import traceback

from waiting import PATIENCE, wait_until

REPLY, NEED_REPLY = 4, 8
NAMES = {
    1: "GET_FEATURES", 2: "SET_FEATURES", 3: "SET_OWNER", 12: "SET_VRING_KICK", 13: "SET_VRING_CALL",
    15: "GET_PROTOCOL_FEATURES", 16: "SET_PROTOCOL_FEATURES", 17: "GET_QUEUE_NUM", 18: "SET_VRING_ENABLE",
    21: "SET_BACKEND_REQ_FD", 24: "GET_CONFIG", 25: "SET_CONFIG", 34: "RESET_DEVICE", 36: "GET_MAX_MEM_SLOTS",
    37: "ADD_MEM_REG", 38: "REM_MEM_REG", 44: "GET_SHMEM_CONFIG",
}
PROTOCOL = {"MQ": 0, "REPLY_ACK": 3, "BACKEND_REQ": 5, "CONFIG": 9, "BACKEND_SEND_FD": 10, "RESET_DEVICE": 13,
            "CONFIGURE_MEM_SLOTS": 15, "SHMEM": 22}
SHMEM_MAP, SHMEM_UNMAP = 9, 10


class Closed(Exception):
    """The front-end closed the connection."""


def shut(s):
    try:
        s.shutdown(socket.SHUT_RDWR)
    except OSError:     # it has ended
        pass


class Backend:
    """Serves one front-end after the other on `path`. The knobs are attributes to set before start()."""

    def __init__(self, path, **knobs):
        self.path = path
        self.begin = time.monotonic()
        self.vrings = 4
        self.window = 0x1000
        self.dstrd = 0
        self.slots = 32
        self.lacks = ()             # names of protocol features
        self.features = 1 << 30 | 1 << 32
        self.magic = 0x454D564E
        self.page_version = 2
        self.kept = 0               # what it says is kept for the instance
        self.takes_over = None      # another back-end, whose doorbells and registers are this one's
        self.short_file = False     # the window's file is shorter than the window
        self.no_window = False      # never map it
        self.side = None            # offset of the side words in the window's file; it is made large enough, unless
        self.no_side = False        # it is not
        self.answer = None          # request name -> bytes to send instead, or "close", or "silence"
        self.refuse = ()            # names of requests to answer with a failure
        self.close_after_write = 0  # so many of the guest's next register writes it does, and dies before they are acknowledged
        self.silent_go = False      # never acknowledge `go`
        for name, value in knobs.items():
            assert hasattr(self, name), name
            setattr(self, name, value)
        self.lock = threading.Condition()
        self.asking = None          # a lock of each back channel: one request at a time, with its answer
        self.log = []               # (name, body) as they came
        self.history = []           # lines for people, of all connections
        self.broke = None           # what went wrong in here
        self.over = False           # no connection is taken any more
        self.regions = {}           # gpa -> (size, offset, file)
        self.calls, self.kicks, self.enabled = {}, {}, {}
        self.hoarded = []           # descriptors that came with what was not answered
        self.registers = bytearray(0x1000)
        self.main = self.back = None
        self.connections = 0
        self.connected = False
        self.times, self.ends = [], []  # when connections were taken, and seen to have ended
        self.window_fd = os.dup(self.takes_over.window_fd) if self.takes_over else os.memfd_create("doorbells")
        size = self.window if self.side is None or self.no_side else self.side + 0x1000
        if not self.takes_over:
            os.ftruncate(self.window_fd, size if not self.short_file else self.window // 2)
        self.doorbells = mmap.mmap(self.window_fd, 0)
        struct.pack_into("<Q", self.registers, 0, 0x30 << 40 | self.dstrd << 32 | 0x3FF)
        struct.pack_into("<IIIHHHHHHB", self.registers, 0xF00, self.magic, self.page_version, self.window, self.vrings, 0,
                         0x1B36, 0x0010, 0x1AF4, 0x1100, 2)
        struct.pack_into("<I", self.registers, 0xF1C, self.side or 0)
        struct.pack_into("<I", self.registers, 0xF34, self.kept)
        if self.takes_over:
            self.registers[0x08:0xF00] = self.takes_over.registers[0x08:0xF00]
        self.listener = socket.socket(socket.AF_UNIX)
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        self.listener.bind(path)
        self.listener.listen(4)
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    # -- what tests ask

    def names(self):
        with self.lock:
            return [name for name, _ in self.log]

    def clear_log(self):
        with self.lock:
            self.log.clear()

    def wait(self, condition, what):
        end = time.monotonic() + PATIENCE
        with self.lock:
            while True:
                over = time.monotonic() > end
                if condition():
                    return
                assert not self.broke, self.broke
                assert not over, f"{what} has not happened; log: {[n for n, _ in self.log][-12:]}"
                self.lock.wait(0.2)

    def connection(self):
        """The number of the connection that there is, or 0."""
        with self.lock:
            return self.connections if self.connected else 0

    def pause(self):
        """The number of the connection that there was, while there is none; or 0."""
        with self.lock:
            return 0 if self.connected else self.connections

    def writes(self, first=0, end=0xF00):
        """The register writes so far: (offset, value)."""
        with self.lock:
            found = [(struct.unpack_from("<I", body)[0], int.from_bytes(body[12:], "little")) for name, body in self.log
                     if name == "SET_CONFIG"]
        return [(offset, value) for offset, value in found if first <= offset < end]

    def goes(self):
        """What `go` was said with."""
        return [value for _, value in self.writes(0xF30, 0xF34)]

    def kicked(self, vring, wait=False):
        """Takes a kick of this vring, if there is one; or waits for it."""
        fd = self.kicks[vring]
        if not select.select([fd], [], [], PATIENCE if wait else 0)[0]:
            return False
        os.read(fd, 8)
        return True

    def interrupt(self, vector):
        os.write(self.calls[vector], struct.pack("<Q", 1))

    def taken(self, vector):
        """Waits until somebody in QEMU has read what `interrupt` wrote."""
        fd = self.calls[vector]
        wait_until(lambda: not select.select([fd], [], [], 0)[0], "nobody reads the eventfd")

    def shmem(self, request, shmid, **kw):
        """Sends SHMEM_MAP or SHMEM_UNMAP; True if the front-end agreed."""
        with self.asking:
            return self._shmem(self.back, request, shmid, **kw)

    def _shmem(self, back, request, shmid, length=None, offset=0, fd=None, flags=1, need_reply=True):
        body = struct.pack("<B7xQQQQ", shmid, 0, offset, self.window if length is None else length, flags)
        message = struct.pack("<III", request, 1 | (NEED_REPLY if need_reply else 0), len(body)) + body
        fds = []
        if request == SHMEM_MAP:
            fds = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [self.window_fd if fd is None else fd]))]
        back.sendmsg([message], fds)
        if not need_reply:
            return True
        back.settimeout(PATIENCE)
        answer = b""
        while len(answer) < 20:
            more = back.recv(20 - len(answer))
            if not more:
                raise Closed
            answer += more
        got, flags, size, status = struct.unpack("<IIIQ", answer)
        assert (got, flags, size) == (request, 1 | REPLY, 8), answer
        return status == 0

    def die(self):
        """What a killed daemon does: everything closed at once."""
        # Not by close(): other threads wait for these sockets, and the number would be another one's while they do.
        with self.lock:
            ends = self.main, self.back
            self.back = None    # the next connection may be there before this one has ended
        for s in ends:
            if s:
                shut(s)

    def kill(self):
        """Dies, and listens no more: nobody comes in between."""
        # The thread in accept() would keep a socket alive that is only closed.
        with self.lock:
            self.over = True
        shut(self.listener)
        self.die()
        self.thread.join(PATIENCE)
        self.listener.close()

    stop_listening = kill   # of one that nobody has connected to

    def close(self):
        self.kill()
        for fd in (self.window_fd, *self.calls.values(), *self.kicks.values(), *self.hoarded):
            os.close(fd)

    # -- the other side of the connection

    def _serve(self):
        while True:
            try:
                s, _ = self.listener.accept()
            except OSError:
                return
            with self.lock:
                if self.over:
                    s.close()
                    return
                self.main = s
                self.connections += 1
                self.connected = True
                self.times.append(time.monotonic())
                self._tell("connected")
                self.lock.notify_all()
            try:
                while True:
                    self._request()
            except (Closed, OSError) as e:
                how = str(e) or "closed"
            except Exception:   # noqa: BLE001: whatever it is, a test has to know
                how = self.broke = "the fake back-end broke: " + traceback.format_exc()
            with self.lock:
                self.connected = False
                self.ends.append(time.monotonic())
                self._tell(how)
                for _, _, fd in self.regions.values():
                    os.close(fd)
                self.regions.clear()
                self.lock.notify_all()
            s.close()

    def _tell(self, what):
        self.history.append(f"{time.monotonic() - self.begin:8.3f} s  connection {self.connections}: {what}")

    def _receive(self, size, fds):
        data = b""
        while len(data) < size:
            part, ancillary, _, _ = self.main.recvmsg(size - len(data), socket.CMSG_SPACE(32))
            for _, _, payload in ancillary:
                fds.frombytes(payload)
            if not part:
                raise Closed
            data += part
        return data

    def _request(self):
        fds = array.array("i")
        request, flags, size = struct.unpack("<III", self._receive(12, fds))
        body = self._receive(size, fds)
        name = NAMES.get(request, str(request))
        with self.lock:
            special = (self.answer or {}).get(name)
            said = ""
            if name in ("GET_CONFIG", "SET_CONFIG"):
                said = f" {struct.unpack_from('<I', body)[0]:#x}"
            if name == "SET_CONFIG":
                said += f" = {int.from_bytes(body[12:], 'little'):#x}"
            self._tell(name + said + (f" (answer: {special})" if special else ""))
        if special == "close":
            for fd in fds:
                os.close(fd)
            raise Closed
        if special == "silence":
            self.hoarded += fds
            return
        if special is not None:
            self.main.sendall(special)
            return
        reply = self._handle(name, body, list(fds))
        if reply is None and flags & NEED_REPLY:
            reply = struct.pack("<Q", 1 if name in self.refuse else 0)
        with self.lock:
            self.log.append((name, body))
            self.lock.notify_all()
            at = struct.unpack_from("<I", body)[0] if name == "SET_CONFIG" else None
            if at is not None and at < 0xF00 and self.close_after_write:
                self.close_after_write -= 1
                raise Closed
            if at == 0xF30 and self.silent_go:
                return
        if reply is not None:
            self.main.sendall(struct.pack("<III", request, 1 | REPLY, len(reply)) + reply)

    def _handle(self, name, body, fds):
        if name == "GET_FEATURES":
            return struct.pack("<Q", self.features)
        if name == "GET_PROTOCOL_FEATURES":
            return struct.pack("<Q", sum(1 << bit for n, bit in PROTOCOL.items() if n not in self.lacks))
        if name == "GET_QUEUE_NUM":
            return struct.pack("<Q", self.vrings)
        if name == "GET_MAX_MEM_SLOTS":
            return struct.pack("<Q", self.slots)
        if name == "GET_SHMEM_CONFIG":
            return struct.pack("<II256Q", 2, 0, self.window, self.window, *[0] * 254)
        if name == "GET_CONFIG":
            offset, size, flags = struct.unpack_from("<III", body)
            return struct.pack("<III", offset, size, flags) + self.registers[offset:offset + size]
        if name == "SET_CONFIG":
            offset, size, _ = struct.unpack_from("<III", body)
            self.registers[offset:offset + size] = body[12:12 + size]
        if name == "SET_BACKEND_REQ_FD":
            self.back, self.asking = socket.socket(fileno=fds.pop()), threading.Lock()
            if not self.no_window:
                threading.Thread(target=self._map_window, args=(self.asking, self.back), daemon=True).start()
        if name in ("SET_VRING_CALL", "SET_VRING_KICK"):
            held, index = self.calls if name == "SET_VRING_CALL" else self.kicks, struct.unpack("<Q", body)[0] & 0xFF
            if index in held:
                os.close(held[index])
            held[index] = fds.pop()
        if name == "SET_VRING_ENABLE":
            index, on = struct.unpack("<II", body)
            self.enabled[index] = on
        if name == "ADD_MEM_REG":
            _, gpa, size, _, offset = struct.unpack("<5Q", body)
            assert gpa not in self.regions, "a region twice"
            fd = fds.pop()
            if name not in self.refuse:
                self.regions[gpa] = (size, offset, fd)
        if name == "REM_MEM_REG":
            _, gpa, size, _, offset = struct.unpack("<5Q", body)
            there = self.regions.pop(gpa)
            assert there[:2] == (size, offset), "removed what was not added"
            os.close(there[2])
        if name == "RESET_DEVICE":
            size = min(self.window, len(self.doorbells))
            self.doorbells[:size] = bytes(size)
            self.enabled.clear()
        assert not fds, f"{name} with a descriptor too many"
        return None

    def _map_window(self, asking, back):
        with asking:
            try:
                self._shmem(back, SHMEM_MAP, 0)
            except (Closed, OSError):
                pass
