# SPDX-License-Identifier: MIT
"""A raw channel with pools: the user's side of buffers in messages, written by hand."""

import ctypes
import itertools
import os
import struct
import time

from tests.kernel.raw_device import (
    BUSY,
    HEADER,
    PAGE,
    PATIENCE,
    READ,
    WRITE,
    RawDevice,
    ioc,
    ioctl,
    map_memory,
    unmap,
)

POOLS = 2  # the feature
MESSAGE, NEWS, BUFFER = range(3)
NOTICE = 0x10
CONTIGUOUS = 1
_REQUEST = struct.Struct("<QIIQ4Q")
_CARRIED = struct.Struct("<IIQ")
_NEWS = struct.Struct("<IIQQ")
OPEN_POOL = ioc(3, 3, _REQUEST.size)
CLOSE_POOL = ioc(1, 4, _REQUEST.size)


def open_pool(fd, size=0, flags=0, number=0, offset=0, reserved=(0,) * 4):
    """KUCOMMS_IOC_OPEN_POOL: the errno, the number and the offset."""
    data = bytearray(_REQUEST.pack(size, flags, number, offset, *reserved))
    failed = ioctl(fd, OPEN_POOL, data)
    return failed, *_REQUEST.unpack(data)[2:4]


def close_pool(fd, number, size=0, flags=0, offset=0, reserved=(0,) * 4):
    """KUCOMMS_IOC_CLOSE_POOL: the errno."""
    data = bytearray(_REQUEST.pack(size, flags, number, offset, *reserved))
    return ioctl(fd, CLOSE_POOL, data)


def carried(*buffers):
    """The bytes of (pool, page, length), ...."""
    return b"".join(_CARRIED.pack(*buffer) for buffer in buffers)


class Mapping:
    """A pool, mapped."""

    def __init__(self, fd, number, size, offset):
        self.number = number
        self.size = size
        self.offset = offset
        self.at = map_memory(fd, size, offset, READ | WRITE)

    def buffer(self, page, length):
        return self.number, page, length

    def write(self, page, data):
        assert page * PAGE + len(data) <= self.size
        ctypes.memmove(self.at + page * PAGE, data, len(data))

    def read(self, page, length):
        return ctypes.string_at(self.at + page * PAGE, length)

    def view(self, page, length):
        return (ctypes.c_char * length).from_address(self.at + page * PAGE)

    def unmap(self):
        if self.at:
            unmap(self.at, self.size)
        self.at = 0


class Frame:
    """What came from the kernel."""

    def __init__(self, control, type, id, value, data):
        self.flags = control >> 32 & 0xFFFF
        self.kind = control >> 48 & 0xFF
        self.type, self.id, self.value = type, id, value
        count = control >> 56
        self.buffers = list(itertools.islice(_CARRIED.iter_unpack(data[: count * 16]), count))
        self.data = data[count * 16 :]

    @property
    def is_notice(self):
        return bool(self.flags & NOTICE)

    @property
    def numbers(self):
        return struct.unpack(f"<{len(self.data) // 8}q", self.data)

    @property
    def news(self):
        """Of a pool: number, size, offset."""
        number, reserved, size, offset = _NEWS.unpack(self.data)
        assert not reserved
        return number, size, offset


class PoolDevice(RawDevice):
    """A channel whose messages can hand over buffers."""

    def __init__(self, name="buffers", ring_size=1 << 16, features=POOLS):
        super().__init__(name, ring_size=ring_size, features=features)
        self.mappings = []

    def open_pool(self, size, flags=0):
        """A pool of ours, mapped. Raises OSError."""
        failed, number, offset = open_pool(self.fd, size, flags)
        if failed:
            raise OSError(failed, os.strerror(failed))
        return self.map(number, size, offset)

    def map(self, number, size, offset):
        mapping = Mapping(self.fd, number, size, offset)
        self.mappings.append(mapping)
        return mapping

    def hand_over(self, type, *buffers, data=b"", flags=0, publish=True, id=0):
        """A good message with buffers, or whatever is asked for."""
        self.frame(
            carried(*buffers) + data,
            flags=flags,
            kind=BUFFER if buffers else MESSAGE,
            zero=len(buffers),
            type=type,
            id=id,
        )
        if publish:
            self.publish()
            # Refused when the kernel has read it already, and shut the channel for it.
            self.kick()

    def give_back(self, *buffers):
        self.hand_over(0, *buffers, flags=NOTICE)

    def ask(self, type, *arguments, buffers=()):
        """A message with arguments."""
        data = struct.pack(f"<{len(arguments)}Q", *arguments)
        self.hand_over(type, *buffers, data=data)

    def next_frame(self):
        """The next that comes, waiting for it."""
        give_up = time.monotonic() + PATIENCE
        while self.available == self.consumed:
            assert time.monotonic() < give_up
            assert not self.poll(timeout=0)
            os.sched_yield()
        at = self.consumed % self.ring_size
        # A long one is there before it is whole.
        while self.read64(3 * PAGE + at) >> 32 & BUSY:
            assert time.monotonic() < give_up
            os.sched_yield()
        data = ctypes.string_at(self.kernel + 3 * PAGE, self.ring_size)
        data = (data[at:] + data[:at])[: self.available - self.consumed]
        control, *header = struct.unpack("<4Q", data[:HEADER])
        length = control & 0xFFFFFFFF
        self.consume(self.consumed + HEADER + (length + 7) // 8 * 8)
        # The kernel may wait for the room: as one who has parked would be rung for.
        self.kick()
        return Frame(control, *header, data[HEADER : HEADER + length])

    def message(self):
        """The next that is no notice and no news, and what came before it."""
        before = []
        while (frame := self.next_frame()).is_notice or frame.kind == NEWS:
            before.append(frame)
        return frame, before

    def returned(self, count):
        """As many buffers as notices tell of."""
        buffers = []
        while len(buffers) < count:
            frame = self.next_frame()
            assert frame.is_notice, (frame.kind, frame.flags)
            buffers += frame.buffers
        return buffers

    def pool_news(self):
        frame = self.next_frame()
        assert frame.kind == NEWS
        return frame.news

    def close(self):
        for mapping in self.mappings:
            mapping.unmap()
        super().close()
