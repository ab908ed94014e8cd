# SPDX-License-Identifier: MIT
"""The pages of a pool: how they are got, mapped, kept from a forked child, and given back."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import mmap
import os
from contextlib import suppress
from pathlib import Path

from kucomms import _core
from kucomms.exceptions import TransportError

__all__ = ["PAGE", "PoolMemory", "check_room", "new_memory", "pool_error"]

PAGE = mmap.PAGESIZE

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_BLOCK = 512
"""Bytes of what ``st_blocks`` counts."""
_PIECE = 1 << 20
"""Bytes that are allocated in one turn of the loop: about a millisecond's worth."""


class PoolMemory:
    """``size`` bytes of a file, mapped, not for a forked child. Raises OSError."""

    def __init__(self, fd: int, size: int, offset: int = 0) -> None:
        self.size = size
        self.fd = -1
        self.address = _core.map_memory(fd, size, offset)

    @classmethod
    def create(cls, size: int) -> PoolMemory:
        """A new memfd, which it keeps open as ``fd``.

        Ordinary pages, which can be pinned and handed to another process. The size is
        sealed.
        """
        fd = os.memfd_create("kucomms_pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            memory = cls(fd, size)
        except BaseException:
            os.close(fd)
            raise
        memory.fd = fd
        return memory

    @classmethod
    def passed(cls, fd: int, size: int) -> PoolMemory:
        """A memfd that somebody else has made.

        Raises ValueError when it is not that, OSError (ENOMEM) when it is not all there.
        """
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError:  # only memory has such
            seals = 0
        # Without them the peer could cut it off under us, which is a SIGBUS.
        status = os.fstat(fd)
        if seals & _SEALS != _SEALS or status.st_size != size:
            raise ValueError("not the sealed memory that was announced")
        # A hole costs the peer nothing, and us what we keep for each page, or touch.
        if status.st_blocks * _BLOCK < size:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return cls(fd, size)

    def allocate(self, offset: int, length: int) -> None:
        """Get the pages of a part now. Raises OSError."""
        # Without it want of memory would show as SIGBUS at the first touch.
        os.posix_fallocate(self.fd, offset, length)
        # And without this, registering them would hold up the loop until all were zeroed.
        _core.populate_memory(self.address + offset, length)

    def view(self, offset: int, length: int) -> memoryview:
        """A view of some bytes. It does not keep the mapping: who makes it must."""
        return memoryview(_core.bytes_at(self.address + offset, length))

    def forked(self) -> None:
        """In a forked child: empty pages, so that a view it inherited reads zeros.

        And so that nothing else is mapped where a later munmap would hit it.
        """
        _core.fill_hole(self.address, self.size)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def close(self) -> None:
        """Unmap. No view, and no transfer of the kernel's, may be left."""
        _core.unmap_memory(self.address, self.size)
        if self.fd >= 0:
            os.close(self.fd)


async def new_memory(size: int) -> PoolMemory:
    """Memory of so many bytes, a multiple of ``PAGE``, and really there.

    Raises OSError; ENOMEM when the machine, or the cgroup, has no room for it.
    """
    check_room(size)
    memory = PoolMemory.create(size)
    try:
        for at in range(0, size, _PIECE):
            if at:
                await asyncio.sleep(0)
            memory.allocate(at, min(_PIECE, size - at))
        return memory
    except BaseException:
        memory.close()
        raise


def check_room(size: int) -> None:
    """The kernel would allocate until it has to kill somebody, so ask before.

    Raises OSError.
    """
    room, whose = min(
        (_room_of_machine(), "this machine"), (_room_of_cgroup(), "this process's cgroup")
    )
    if size > room:
        raise OSError(errno.ENOMEM, f"{whose} has {room} bytes of memory left")


def pool_error(error: OSError, size: int, url: str = "") -> TransportError:
    """What is raised when there is no pool of ``size`` bytes (for this link)."""
    number = error.errno or 0
    advice = "; ask for fewer" if number == errno.ENOMEM else ""
    what = f"{url and url + ': '}cannot open a pool of {size} bytes{advice}"
    return _core.os_error(number, what, error.strerror)


def _room_of_machine() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(fields[name].split()[0]) << 10 for name in ("MemAvailable", "SwapFree"))


def _room_of_cgroup(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int:
    """What the cgroup (version 2) and those above it leave; without a limit, much."""
    room = 1 << 63
    try:
        _, version_2, path = own.read_text().strip().rpartition("0::/")
    except OSError:
        return room
    if not version_2:
        return room
    group = root / path
    while group.is_relative_to(root):
        with suppress(OSError):  # version 1, or not ours to read
            limit = (group / "memory.max").read_text().strip()
            if limit != "max":
                used = int((group / "memory.current").read_text())
                lines = (group / "memory.stat").read_text().splitlines()
                stat = dict(line.split() for line in lines)
                # the cache of files makes room
                used -= int(stat["inactive_file"]) + int(stat["active_file"])
                room = min(room, int(limit) - used)
        group = group.parent
    return max(room, 0)
