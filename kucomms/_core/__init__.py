# SPDX-License-Identifier: MIT
"""The compiled part, and the only place that knows it.

Two modules over the same C code: ``_ring`` for what runs per message (keeps the
GIL), ``_setup`` for what runs per link (drops it).
"""

import errno
import os
from array import array
from typing import Any

from kucomms._core import _setup  # type: ignore[attr-defined]
from kucomms._core._ring import (
    CARRIED_MAX,
    CLOSED,
    EMPTY,
    FLAG_NOTICE,
    FLAG_REPLY,
    FLAG_TOKEN,
    FORKED,
    FULL,
    HEADER_SIZE,
    KIND_BUFFER,
    KIND_POOL,
    MORE,
    NO_TOKEN,
    OK,
    OUT_OF_TURN,
    PAUSE,
    POOLS_MAX,
    PROTOCOL,
    STATE_CLOSED,
    STATE_OPEN,
    STATE_SHUTDOWN,
    TOO_LARGE,
    TOO_MANY_LOANS,
    WRONG_THREAD,
    Borrow,
    Channel,
    Reservation,
    configure,
    drain_eventfd,
    drain_socket,
    poll,
    ring_device,
    ring_socket,
)
from kucomms.exceptions import ProtocolError, TransportError, VersionError

__all__ = [
    "CARRIED_MAX",
    "CLOSED",
    "EMPTY",
    "FLAG_NOTICE",
    "FLAG_REPLY",
    "FLAG_TOKEN",
    "FORKED",
    "FULL",
    "HEADER_SIZE",
    "KIND_BUFFER",
    "KIND_POOL",
    "MORE",
    "NAME_MAX",
    "NO_TOKEN",
    "OK",
    "OUT_OF_TURN",
    "PAUSE",
    "POOLS_MAX",
    "PROTOCOL",
    "STATE_CLOSED",
    "STATE_OPEN",
    "STATE_SHUTDOWN",
    "TOO_LARGE",
    "TOO_MANY_LOANS",
    "WRONG_THREAD",
    "Borrow",
    "Channel",
    "HalfChannel",
    "Reservation",
    "Uring",
    "bytes_at",
    "configure",
    "drain_eventfd",
    "drain_socket",
    "drop_message",
    "fill_hole",
    "ioctl_close_pool",
    "ioctl_open_pool",
    "ioctl_setup",
    "lib",
    "map_memory",
    "max_message_size",
    "move_message",
    "new_record",
    "new_setup",
    "os_error",
    "poll",
    "populate_memory",
    "record_bytes",
    "ring_device",
    "ring_size_for",
    "ring_socket",
    "shm_create",
    "shm_unlink",
    "side_size",
    "unmap_memory",
]

lib: Any = _setup.lib
_ffi: Any = _setup.ffi

NAME_MAX: int = lib.KUCOMMS_NAME_MAX


_REMEDIES = {
    errno.EMFILE: "raise this process's limit of open files (ulimit -n)",
    errno.ENFILE: "the whole system has too many files open (sysctl fs.file-max)",
}


def os_error(number: int, what: str, why: str | None = None) -> TransportError:
    """The error for errno ``number``; ``what`` says to which URL, and what to do.

    ``why``: if known better than by its number. What is always the same to do is added here.
    """
    remedy = f"; {_REMEDIES[number]}" if number in _REMEDIES else ""
    return TransportError(number, f"{what}: {why or os.strerror(number)}{remedy}")


def ring_size_for(asked: int) -> int:
    """``asked`` bytes, rounded up to a power of two of at least a page.

    Raises ValueError outside 1 .. 2**32.
    """
    size = int(lib.kucomms_ring_size(asked)) if 0 < asked <= 1 << 32 else 0
    if not size:
        raise ValueError(f"ring_size must be from 1 to {1 << 32} bytes, not {asked!r}")
    return size


def side_size(ring_size: int) -> int:
    """Bytes of one side's pages."""
    return int(lib.kucomms_side_size(ring_size))


def max_message_size(ring_size: int) -> int:
    """Bytes of the largest message."""
    return int(lib.kucomms_message_max(ring_size))


def shm_create(name: str) -> int:
    """A new shared memory object, mode 0600; its descriptor. Raises OSError."""
    fd = int(lib.setup_shm_create(name.encode()))
    if fd < 0:
        raise OSError(-fd, os.strerror(-fd), name)
    return fd


def shm_unlink(name: str) -> None:
    """Remove a shared memory object; one that is gone already is fine."""
    err = int(lib.setup_shm_unlink(name.encode()))
    if err and err != -errno.ENOENT:
        raise OSError(-err, os.strerror(-err), name)


class HalfChannel:
    """A channel of which our own side is mapped; ``attach`` adds the peer's.

    ``own``: our side, 0 or 1; ``fd``, ``offset``: where our pages are; ``features``: those
    in force, ``KUCOMMS_FEATURE_...``.
    """

    def __init__(
        self, url: str, own: int, ring_size: int, fd: int, offset: int, features: int = 0
    ) -> None:
        self._url = url
        self._pid = os.getpid()
        err = _ffi.new("int *")
        self._pointer = lib.setup_channel_new(own, ring_size, features, fd, offset, err)
        if not self._pointer:
            raise os_error(-err[0], f"{url}: cannot map {ring_size} bytes of ring")

    def attach(self, fd: int, offset: int) -> Channel:
        """Map the peer's side and check what it says of itself."""
        err = int(lib.kucomms_channel_attach(self._pointer, fd, offset))
        if err == -errno.EPROTO:
            raise ProtocolError(
                f"{self._url}: the shared memory does not hold the channel that was agreed on; "
                "the other side is broken or no kucomms at all"
            )
        if err == -errno.EPROTONOSUPPORT:
            raise VersionError(
                f"{self._url}: the shared memory is of another version of the kucomms ABI than "
                f"{lib.KUCOMMS_ABI_VERSION}; use the same version on both sides"
            )
        if err:
            raise os_error(-err, f"{self._url}: cannot map the other side's ring")
        pointer, self._pointer = self._pointer, None
        return Channel(int(_ffi.cast("uintptr_t", pointer)))

    def close(self) -> None:
        """Unmap, unless ``attach`` has made it a channel."""
        if self._pointer and os.getpid() == self._pid:  # a forked child has no mapping
            lib.setup_channel_free(self._pointer)
        self._pointer = None


def map_memory(fd: int, size: int, offset: int = 0) -> int:
    """Map pages of a file, not for a forked child. Their address. Raises OSError."""
    address = int(lib.setup_map(fd, size, offset))
    if address < 0:
        raise OSError(-address, os.strerror(-address))
    return address


def move_message(fd: int, fills: bool, segments: list[tuple[int, int]]) -> int:
    """Receive into these pieces of memory, or send them, without waiting.

    ``segments``: address and length of each. Returns the bytes, or a negative errno.
    Python's own methods would wait as long as the timeout of the socket says.
    """
    vector = array("Q", [value for segment in segments for value in segment])
    return int(lib.setup_message(fd, fills, vector.buffer_info()[0], len(segments)))


def drop_message(fd: int) -> int:
    """Receive a datagram and forget it, without waiting. 0 or a negative errno."""
    return int(lib.setup_drop_message(fd))


def populate_memory(address: int, size: int) -> None:
    """Touch these pages, so that who uses them does not wait for that."""
    lib.setup_populate(address, size)


def unmap_memory(address: int, size: int) -> None:
    """The end of that."""
    lib.setup_unmap(address, size)


def bytes_at(address: int, length: int) -> Any:
    """An object whose buffer is so many bytes of memory, for memoryview."""
    return _ffi.buffer(_ffi.cast("char *", address), length)


def fill_hole(address: int, size: int) -> None:
    """Map empty pages of this process's own at an address. For a forked child."""
    lib.setup_fill_hole(address, size)


class Uring:
    """An io_uring of the thread that makes it; see ``uring.h``.

    Room for ``entries`` (of 64 bytes, ``struct io_uring_sqe``) in one turn, and for
    ``completions`` (of 16 bytes, ``struct io_uring_cqe``). Raises OSError.
    """

    def __init__(self, entries: int, completions: int) -> None:
        err = _ffi.new("int *")
        self._pointer = lib.uring_new(entries, completions, err)
        if not self._pointer:
            raise OSError(-err[0], os.strerror(-err[0]))
        self._fds = (int(self._pointer.fd), int(self._pointer.eventfd))
        self._more = _ffi.new("int *")

    def register(self, address: int, size: int) -> None:
        """Pin this memory once, as buffers of ``lib.URING_FIXED_MAX`` bytes. Raises OSError."""
        err = int(lib.uring_register(self._pointer, address, size))
        if err:
            raise OSError(-err, os.strerror(-err))

    @property
    def closed(self) -> bool:
        """After ``close``, it can only be closed."""
        return not self._pointer

    @property
    def room(self) -> int:
        """Entries that the next turn takes."""
        return int(self._pointer.entries - self._pointer.pending)

    @property
    def pending(self) -> int:
        """Entries that the kernel has not taken yet."""
        return int(self._pointer.pending)

    @property
    def eventfd(self) -> int:
        """Readable when a turn is due."""
        return self._fds[1]

    def turn(
        self, entries: bytes, count: int, completions: bytearray, room: int
    ) -> tuple[int, bool]:
        """Hand over entries, take up to ``room`` completions; two system calls.

        Returns how many came, or a negative errno: nothing was taken for now; and whether
        the next turn is due at once.
        """
        number = lib.uring_turn(
            self._pointer,
            _ffi.from_buffer(entries),
            count,
            _ffi.from_buffer(completions),
            room,
            self._more,
        )
        return int(number), bool(self._more[0])

    def close(self) -> None:
        """What is under way is cancelled by the kernel, some time later."""
        pointer, self._pointer = self._pointer, None
        if pointer:
            lib.uring_free(pointer)

    def forked(self) -> None:
        """In a forked child, which has inherited the descriptor and not the mappings."""
        self._pointer = None
        for fd in self._fds:
            os.close(fd)


def new_record(data: bytes | None = None) -> Any:
    """A ``struct kucomms_rendezvous``: zeroed, or read from ``data``."""
    record = _ffi.new("struct kucomms_rendezvous *")
    if data is not None:
        _ffi.memmove(record, data, _ffi.sizeof("struct kucomms_rendezvous"))
    return record


def new_setup() -> Any:
    """A zeroed ``struct kucomms_setup``."""
    return _ffi.new("struct kucomms_setup *")


def ioctl_setup(fd: int, setup: Any) -> int:
    """Make a channel of an open device; 0 or an errno. Waits unless it is non-blocking."""
    return int(lib.setup_ioctl(fd, setup))


def ioctl_open_pool(fd: int, size: int, *, contiguous: bool) -> tuple[int, int]:
    """Have the kernel open a pool. Its number, and where to map it. Raises OSError."""
    flags = lib.KUCOMMS_POOL_CONTIGUOUS if contiguous else 0
    number, offset = _ffi.new("uint32_t *"), _ffi.new("uint64_t *")
    err = int(lib.setup_open_pool(fd, size, flags, number, offset))
    if err:
        raise OSError(err, os.strerror(err))
    return int(number[0]), int(offset[0])


def ioctl_close_pool(fd: int, number: int) -> int:
    """Say that a pool of ours is closed; 0 or an errno."""
    return int(lib.setup_close_pool(fd, number))


def record_bytes(record: Any) -> bytes:
    """The bytes of such a record."""
    return bytes(_ffi.buffer(record))
