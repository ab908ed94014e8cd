# SPDX-License-Identifier: MIT
"""The other side of a shm:// link, written by hand, so that it can break every rule.

Knows the layout from ``kucomms.h`` and ``rendezvous.h`` and uses nothing of the package.
Its methods block; those that need an answer of this process's loop run in a thread.
"""

import array
import fcntl
import mmap
import os
import random
import socket
import struct
from contextlib import suppress

MAGIC = 0x736D6D6F63756B
VERSION = 1
HELLO, SETUP, ATTACH, POOL, MAPPED = 1, 2, 3, 4, 5
FEATURE_POOLS = 2
ACCEPTED, REFUSED_BUSY, REFUSED_VERSION, REFUSED_MEMORY, REFUSED_USER = range(5)
SEALED = 1
EVENTFDS = 2
TURNS = 1
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | 0x10  # FUTURE_WRITE
BUSY, DISCARD, REPLY, TOKEN, NOTICE = 1, 2, 4, 8, 16
KIND_POOL, KIND_BUFFER = 1, 2
HEADER = 32
PAGE = mmap.PAGESIZE
PATIENCE = 10.0

_RECORD = struct.Struct("<QIIQQIIII64s")
_GEOMETRY = struct.Struct("<QII14Q")


def side_size(ring_size):
    return 3 * PAGE + ring_size


def record(
    step,
    *,
    magic=MAGIC,
    version=VERSION,
    features=0,
    ring_size=0,
    status=0,
    flags=0,
    hello=b"",
    hello_length=None,
    pool=0,
):
    """The bytes of a struct kucomms_rendezvous."""
    length = len(hello) if hello_length is None else hello_length
    return _RECORD.pack(
        magic, version, step, features, ring_size, status, flags, length, pool, hello
    )


def geometry(side, ring_size, /, **wrong):
    """The bytes of a struct kucomms_geometry; ``wrong`` replaces fields."""
    fields = {
        "magic": MAGIC,
        "version": VERSION,
        "side": side,
        "features": 0,
        "page_size": PAGE,
        "ring_size": ring_size,
        "producer_offset": PAGE,
        "consumer_offset": 2 * PAGE,
        "data_offset": 3 * PAGE,
        "frame_size": HEADER,
        "reserved": 0,
        "last": 0,
    }
    fields.update(wrong)
    *front, reserved, last = fields.values()
    return _GEOMETRY.pack(*front, reserved, 0, 0, 0, 0, 0, last)


class Answer:
    """A record that was received."""

    def __init__(self, data):
        (
            self.magic,
            self.version,
            self.step,
            self.features,
            self.ring_size,
            self.status,
            self.flags,
            length,
            self.pool,
            hello,
        ) = _RECORD.unpack(data)
        self.hello = hello[:length]


def send(sock, data, fds=()):
    ancillary = []
    if fds:
        ancillary.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds)))
    assert sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL) == len(data)


def receive(sock):
    """A record and the descriptors that came with it. Raises EOFError."""
    data, fds = b"", array.array("i")
    while len(data) < _RECORD.size:
        part, ancillary, _flags, _address = sock.recvmsg(
            _RECORD.size - len(data), socket.CMSG_SPACE(16)
        )
        if not part:
            raise EOFError
        data += part
        for _level, _kind, payload in ancillary:
            fds.frombytes(payload)
    return Answer(data), list(fds)


def is_closed(sock):
    """Wait for what comes next: whether it is the end."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def connect(name, directory=None):
    """A socket connected to the listener of this name."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    sock.connect(os.path.join(directory or runtime_path(), name))
    return sock


def runtime_path():
    return os.path.join(os.environ["XDG_RUNTIME_DIR"], "kucomms")


class DiscardingProducer:
    """What a producer written by hand can do without end, over whatever memory."""

    def fill_with_discarded(self):
        """The whole ring; to be called with nothing in it."""
        frame = struct.pack("<4Q", DISCARD << 32, 0, 0, 0)
        self.write_data(0, frame * (self.ring_size // HEADER))

    def refill(self):
        """As if everything that was read were there again."""
        self.position = self.released + self.ring_size
        self.publish()


class RawPeer(DiscardingProducer):
    """One side of a channel: it can write everything that is not ours alone."""

    def __init__(self, sock, fd, own, ring_size):
        self.sock = sock
        self.own = own
        self.ring_size = ring_size
        self._memory = mmap.mmap(fd, 2 * side_size(ring_size))
        self.position = 0  # as a good producer
        self.consumed = 0  # as a good consumer

    # ---- raw access ----------------------------------------------------------

    def offset(self, page, side=None):
        """Of a page of a side: 0 geometry, 1 producer, 2 consumer, 3 data."""
        return (self.own if side is None else side) * side_size(self.ring_size) + page * PAGE

    def write(self, at, data):
        self._memory[at : at + len(data)] = data

    def write64(self, at, value):
        self.write(at, (value % 2**64).to_bytes(8, "little"))

    def read64(self, at):
        return int.from_bytes(self._memory[at : at + 8], "little")

    def write_data(self, position, data):
        """Into our ring, around its end."""
        at = position % self.ring_size
        first = min(len(data), self.ring_size - at)
        base = self.offset(3)
        self.write(base + at, data[:first])
        self.write(base, data[first:])

    # ---- a producer ----------------------------------------------------------

    def frame(self, data=b"", *, length=None, flags=0, kind=0, zero=0, type=0, id=0, value=0):
        """Write a frame behind the last one, without publishing it."""
        length = len(data) if length is None else length
        control = length | flags << 32 | kind << 48 | zero << 56
        self.write_data(self.position, struct.pack("<4Q", control, type, id, value) + data)
        self.position += HEADER + (len(data) + 7) // 8 * 8

    def publish(self, position=None):
        self.write64(self.offset(1), self.position if position is None else position)

    def buffers(self, *carried, data=b"", flags=0):
        """Write a frame of buffers: (pool, page, length) of each."""
        front = b"".join(struct.pack("<IIQ", *one) for one in carried)
        self.frame(front + data, kind=KIND_BUFFER, zero=len(carried), flags=flags)

    def send(self, *messages):
        """Send good messages."""
        for data in messages:
            self.frame(data)
        self.publish()
        self.ring()

    @property
    def released(self):
        """How far the other side has read."""
        return self.read64(self.offset(2, 1 - self.own))

    def park_for_space(self, epoch):
        self.write64(self.offset(1) + 128, epoch)

    def set_state(self, state):
        self.write(self.offset(1) + 256, state.to_bytes(4, "little"))

    # ---- a consumer ----------------------------------------------------------

    def park_for_data(self, epoch):
        """Ask for the doorbell."""
        self.write64(self.offset(2) + 128, epoch)

    @property
    def available(self):
        """How far the other side has written."""
        return self.read64(self.offset(1, 1 - self.own))

    def consume(self, position=None):
        """Say that everything up to there was read."""
        self.consumed = self.available if position is None else position
        self.write64(self.offset(2), self.consumed)

    def frames(self):
        """The frames that wait to be read: kind, flags, data of each."""
        base, end = self.offset(3, 1 - self.own), self.available
        data = self._memory[base : base + self.ring_size]
        found = []
        while self.consumed < end:
            at = self.consumed % self.ring_size
            whole = data[at:] + data[:at]
            control = int.from_bytes(whole[:8], "little")
            length = control & 0xFFFFFFFF
            found.append(
                (control >> 48 & 0xFF, control >> 32 & 0xFFFF, whole[HEADER : HEADER + length])
            )
            self.consumed += HEADER + (length + 7) // 8 * 8
        self.consume(self.consumed)
        return found

    # ---- the socket ----------------------------------------------------------

    def open_pool(self, number, size, fd=None, **wrong):
        """Say that there is a pool; returns its file."""
        if fd is None:
            fd = sealed_memory(size)
        send(self.sock, record(POOL, pool=number, ring_size=size, **wrong), [fd])
        return fd

    def mapped(self, answer=0):
        """Read that the other side has opened a pool, and say that it is mapped."""
        told, fds = receive(self.sock)
        assert told.step == POOL
        for fd in fds:
            os.close(fd)
        send(self.sock, record(MAPPED, pool=told.pool, status=answer))
        return told

    def ring(self, data=b"\x01"):
        self.sock.send(data)

    def close(self):
        self._memory.close()
        self.sock.close()


def connect_by_hand(
    name, ring_size=0, *, hello=b"", attach=None, features=0, shown=None, **wrong_geometry
):
    """Complete the rendezvous as a connecting side.

    ``features``: those that it knows; ``shown``: in its memory, if not those in force.
    """
    sock = connect(name)
    send(sock, record(HELLO, ring_size=ring_size, hello=hello, features=features))
    setup, (fd,) = receive(sock)
    assert (setup.step, setup.status, setup.flags) == (SETUP, ACCEPTED, 0)
    assert setup.features & ~features == 0
    peer = RawPeer(sock, fd, 1, setup.ring_size)
    os.close(fd)
    peer.hello = setup.hello
    shown = setup.features if shown is None else shown
    peer.write(peer.offset(0), geometry(1, setup.ring_size, features=shown, **wrong_geometry))
    send(sock, record(ATTACH) if attach is None else attach)
    return peer


class RawListener:
    """Listens at a name, as a dead or broken process or a hostile one would."""

    def __init__(self, name):
        os.makedirs(runtime_path(), 0o700, exist_ok=True)
        self._path = os.path.join(runtime_path(), name)
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.bind(self._path)
        self.sock.listen()

    def accept(self):
        """The next connection, its greeting read."""
        sock, _address = self.sock.accept()
        sock.settimeout(PATIENCE)
        hello, fds = receive(sock)
        assert (hello.step, fds) == (HELLO, [])
        return sock, hello

    def accept_by_hand(self, ring_size=PAGE, *, hello=b"", features=0, **wrong_geometry):
        """Complete the rendezvous as a listening side."""
        sock, greeting = self.accept()
        assert features & ~greeting.features == 0
        fd = memory(2 * side_size(ring_size))
        peer = RawPeer(sock, fd, 0, ring_size)
        peer.hello = greeting.hello
        shown = {"features": features, **wrong_geometry}
        peer.write(peer.offset(0), geometry(0, ring_size, **shown))
        setup = record(SETUP, ring_size=ring_size, hello=hello, features=features)
        send(sock, setup, [fd])
        os.close(fd)
        try:
            attach, fds = receive(sock)
            assert (attach.step, fds) == (ATTACH, [])
        except BaseException:
            peer.close()
            raise
        return peer

    def close(self, leave_socket=False):
        self.sock.close()
        if not leave_socket:
            os.unlink(self._path)

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.close()


def memory(size, seals=None):
    """A new file in memory."""
    fd = os.memfd_create("raw", os.MFD_CLOEXEC | (os.MFD_ALLOW_SEALING if seals else 0))
    os.ftruncate(fd, size)
    return fd


def sealed_memory(size, seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW):
    """As for a pool."""
    fd = memory(size, seals=True)
    if size:
        os.posix_fallocate(fd, 0, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def garbage(peer: RawPeer, random: random.Random):
    """Write nonsense into all that this side shares, some of it almost right."""

    def nearly():
        return random.choice(
            [
                0,
                1,
                8,
                peer.position + random.choice([-64, -8, -1, 1, 8, 64, peer.ring_size]),
                peer.ring_size,
                2**31,
                2**32 - 8,
                2**63,
                2**64 - 8,
                random.getrandbits(64),
                random.getrandbits(12) * 8,
            ]
        )

    for _ in range(random.randrange(1, 12)):
        match random.randrange(9):
            case 0:
                peer.frame(random.randbytes(random.randrange(64)))
                peer.publish()
            case 1:
                peer.frame(
                    random.randbytes(random.randrange(64)),
                    length=random.choice([None, nearly() % 2**32]),
                    flags=random.choice([0, BUSY, DISCARD, REPLY, TOKEN, 7, 16, 0x8000]),
                    kind=random.choice([0, 0, 0, 1, 2, 255]),
                    zero=random.choice([0, 0, 0, 1]),
                )
                peer.publish()
            case 2:
                peer.publish(nearly())
            case 3:
                peer.consume(nearly() % 2**64)
            case 4:
                peer.park_for_space(nearly())
                peer.park_for_data(nearly())
            case 5:
                page = random.randrange(3)
                peer.write(peer.offset(page), random.randbytes(PAGE))
            case 6:
                at = random.randrange(peer.ring_size)
                peer.write_data(at, random.randbytes(random.randrange(1, PAGE)))
            case 7:
                peer.set_state(random.choice([0, 0, 0, 1, 2, 3, 2**32 - 1]))
            case 8:
                peer.sock.setblocking(False)
                with suppress(OSError):
                    peer.ring(random.choice([b"\x01", b"\x01" * 3000, random.randbytes(9)]))
        try:
            peer.ring()
        except OSError:
            return
