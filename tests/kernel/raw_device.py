# SPDX-License-Identifier: MIT
"""The user's side of a channel, written by hand, so that it can break every rule.

Knows ``/dev/kucomms_NAME`` and the layout from ``kucomms.h`` and uses nothing of the package.
Memory is mapped and read by address, because ``mmap`` of Python is too careful.
"""

import ctypes
import errno
import mmap
import os
import select
import struct
from pathlib import Path

from tests.transports.raw_peer import DiscardingProducer

MAGIC = 0x736D6D6F63756B
VERSION = 1
IOC = 0xE7
BUSY, DISCARD, REPLY, TOKEN = 1, 2, 4, 8
TURNS_FEATURE = 1
NUMBER = 1
DATA, SPACE = 1, 2
HEADER = 32
PAGE = mmap.PAGESIZE
DEBUG = Path("/sys/kernel/debug/kucomms")
PATIENCE = 60.0
"""Seconds; the guest may be emulated."""

READ, WRITE, EXEC = 1, 2, 4
SHARED, PRIVATE, ANONYMOUS = 1, 2, 0x20

_SETUP = struct.Struct("<IIQQQQ2Q64sII7Q")
_WAIT = struct.Struct("<IIq")
_FAILED = 2**64 - 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_size_t
_libc.mmap.argtypes = (
    *(ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ctypes.c_longlong,
)
_libc.mremap.restype = ctypes.c_size_t
_libc.mremap.argtypes = (*[ctypes.c_size_t] * 3, ctypes.c_int)
for _name in ("munmap", "mprotect", "madvise"):
    getattr(_libc, _name).argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_size_t, ctypes.c_size_t)


def ioc(direction, number, size, magic=IOC):
    """The number of an ioctl."""
    return direction << 30 | size << 16 | magic << 8 | number


SETUP = ioc(3, 0, _SETUP.size)
KICK = ioc(0, 1, 0)
WAIT = ioc(3, 2, _WAIT.size)


def _checked(result, failed):
    if result == failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def map_memory(fd, size, offset=0, prot=READ, flags=SHARED):
    """The address."""
    return _checked(_libc.mmap(0, size, prot, flags, fd, offset), _FAILED)


def unmap(at, size):
    _checked(_libc.munmap(at, size), -1)


def protect(at, size, prot):
    _checked(_libc.mprotect(at, size, prot), -1)


def advise(at, size, advice):
    _checked(_libc.madvise(at, size, advice), -1)


def remap(at, size, new_size, flags=1):
    """The new address; by default it may move."""
    return _checked(_libc.mremap(at, size, new_size, flags), _FAILED)


def ioctl(fd, command, argument=0):
    """The errno, 0 for none. ``argument``: an address, or a buffer that is read and written."""
    if isinstance(argument, (bytearray, ctypes.Array)):
        argument = ctypes.addressof(
            (ctypes.c_char * len(argument)).from_buffer(argument)
            if isinstance(argument, bytearray)
            else argument
        )
    result = _libc.ioctl(
        ctypes.c_int(fd), ctypes.c_ulong(command), ctypes.c_ulong(argument % 2**64)
    )
    return ctypes.get_errno() if result < 0 else 0


class Setup:
    """A struct kucomms_setup."""

    def __init__(self, **fields):
        self.version = VERSION
        self.hello_length = None
        self.features = 0
        self.ring_size = 0
        self.page_size = 0
        self.side_size = 0
        self.side_offset = (0, 0)
        self.hello = b""
        self.flags = 0
        self.channel = 0
        self.reserved = (0,) * 7
        for name, value in fields.items():
            assert hasattr(self, name), name
            setattr(self, name, value)

    def pack(self):
        length = len(self.hello) if self.hello_length is None else self.hello_length
        return bytearray(
            _SETUP.pack(
                *(self.version, length, self.features, self.ring_size, self.page_size),
                *(self.side_size, *self.side_offset, self.hello),
                *(self.flags, self.channel, *self.reserved),
            )
        )

    @classmethod
    def unpack(cls, data):
        version, length, features, ring_size, page_size, side_size, *rest = _SETUP.unpack(data)
        *offset, hello, flags, channel, r0, r1, r2, r3, r4, r5, r6 = rest
        return cls(
            version=version,
            hello_length=length,
            features=features,
            ring_size=ring_size,
            page_size=page_size,
            side_size=side_size,
            side_offset=tuple(offset),
            hello=hello[:length],
            flags=flags,
            channel=channel,
            reserved=(r0, r1, r2, r3, r4, r5, r6),
        )


def set_up(fd, **fields):
    """The errno and what the module answered."""
    data = Setup(**fields).pack()
    number = ioctl(fd, SETUP, data)
    return number, Setup.unpack(data)


def wait(fd, events, timeout_ns, reserved=0):
    """KUCOMMS_IOC_WAIT: the errno and the events."""
    data = bytearray(_WAIT.pack(events, reserved, timeout_ns))
    number = ioctl(fd, WAIT, data)
    return number, _WAIT.unpack(data)[0]


def open_device(name, flags=os.O_RDWR):
    return os.open(f"/dev/kucomms_{name}", flags | os.O_CLOEXEC)


class RawDevice(DiscardingProducer):
    """A channel, both sides mapped: it can write everything that is not the kernel's alone."""

    def __init__(self, name, **fields):
        self.fd = open_device(name)
        number, self.setup = set_up(self.fd, **fields)
        if number:
            os.close(self.fd)
            raise OSError(number, os.strerror(number))
        self.ring_size = self.setup.ring_size
        self.side_size = self.setup.side_size
        offset = self.setup.side_offset
        self.kernel = map_memory(self.fd, self.side_size, offset[0])
        self.own = map_memory(self.fd, self.side_size, offset[1], READ | WRITE)
        self.position = 0  # as a good producer
        self.consumed = 0  # as a good consumer

    # ---- raw access ----------------------------------------------------------

    def write(self, at, data):
        """Into our side."""
        assert at + len(data) <= self.side_size
        ctypes.memmove(self.own + at, data, len(data))

    def write64(self, at, value):
        ctypes.c_uint64.from_address(self.own + at).value = value % 2**64

    def read64(self, at):
        """Out of the kernel's side."""
        return ctypes.c_uint64.from_address(self.kernel + at).value

    def write_data(self, position, data):
        """Into our ring, around its end."""
        at = position % self.ring_size
        first = min(len(data), self.ring_size - at)
        self.write(3 * PAGE + at, data[:first])
        self.write(3 * PAGE, data[first:])

    # ---- a producer ----------------------------------------------------------

    def frame(self, data=b"", *, length=None, flags=0, kind=0, zero=0, type=0, id=0, value=0):
        """Write a frame behind the last one, without publishing it."""
        length = len(data) if length is None else length
        control = length | flags << 32 | kind << 48 | zero << 56
        self.write_data(self.position, struct.pack("<4Q", control, type, id, value) + data)
        self.position += HEADER + (len(data) + 7) // 8 * 8

    def publish(self, position=None):
        self.write64(PAGE, self.position if position is None else position)

    def send(self, *messages, **fields):
        """Send good messages."""
        for data in messages:
            self.frame(data, **fields)
        self.publish()
        assert self.kick() == 0

    def send_if_alive(self, data, **fields):
        """The same, but the kernel may have shut the channel, or not have made room."""
        if self.position + HEADER + len(data) - self.released <= self.ring_size:
            self.frame(data, **fields)
            self.publish()
        assert self.kick() in (0, errno.EPROTO)

    @property
    def released(self):
        """How far the kernel has read."""
        return self.read64(2 * PAGE)

    def kernel_data(self, position, length):
        """Bytes of the kernel's ring, which do not cross its end."""
        return ctypes.string_at(self.kernel + 3 * PAGE + position % self.ring_size, length)

    def set_state(self, state):
        ctypes.c_uint32.from_address(self.own + PAGE + 256).value = state

    @property
    def kernel_state(self):
        return ctypes.c_uint32.from_address(self.kernel + PAGE + 256).value

    # ---- a consumer ----------------------------------------------------------

    @property
    def available(self):
        """How far the kernel has written."""
        return self.read64(PAGE)

    def consume(self, position=None):
        """Say that everything up to there was read."""
        self.consumed = self.available if position is None else position
        self.write64(2 * PAGE, self.consumed)

    def park(self, epoch):
        """Ask for the doorbell, as a consumer."""
        self.write64(2 * PAGE + 128, epoch)

    # ---- the device ----------------------------------------------------------

    def kick(self):
        """The errno."""
        return ioctl(self.fd, KICK)

    def wait(self, events=DATA, timeout_ns=int(PATIENCE * 1e9)):
        """The errno."""
        return wait(self.fd, events, timeout_ns)[0]

    def poll(self, events=0, timeout=PATIENCE):
        """The events that come, 0 after ``timeout``; without ``events``, only the end is one."""
        poll = select.poll()
        poll.register(self.fd, events)
        found = poll.poll(timeout * 1000)
        return found[0][1] if found else 0

    def close(self):
        unmap(self.own, self.side_size)
        unmap(self.kernel, self.side_size)
        os.close(self.fd)

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.close()


def _counts(path):
    return {line.split()[0]: int(line.split()[1]) for line in path.read_text().splitlines()}


def counters():
    """What is alive in the module: {what: how many}."""
    return _counts(DEBUG / "alive")


def alive():
    """Those that come back to what they were: the others count what has happened."""
    return {what: count for what, count in counters().items() if what != "protocol_errors"}


def channel_counters(name):
    """Those of the only channel of a device."""
    (path,) = DEBUG.glob(f"kucomms_{name}.*")
    return _counts(path)
