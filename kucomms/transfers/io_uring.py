# SPDX-License-Identifier: MIT
"""Transfers by io_uring: those of one turn of the loop cost one system call."""

from __future__ import annotations

import asyncio
import errno
import os
import struct
from array import array
from collections import OrderedDict, deque

from kucomms._core import Uring, lib
from kucomms._pool_memory import PoolMemory
from kucomms.transfers.base import BLOCK, Complete, Engine, Operation, Transfer

__all__ = ["UringEngine"]

_SIZES = ((256, 16384), (64, 2048))
"""What is handed to the kernel in one system call, and what it has at most; the rest waits
here. So it has room for all completions, and never has to allocate any: that could fail. The
second is for who may lock little memory: some kernels count it."""
_FOR_CANCELS = 4
"""One in so many of those is kept for cancellations: transfers that never end cannot be in
their way."""
_TAKEN = 256
"""Completions that are taken in one turn of the loop."""
_AGAIN = 0.001
"""Seconds until the kernel is asked again when it had no memory for a transfer."""

_ENTRY = struct.Struct("=BBHiQQIIQHHiQQ")  # struct io_uring_sqe
_COMPLETION = struct.Struct("=QiI")  # struct io_uring_cqe
_WHERE_IT_STANDS = (1 << 64) - 1

_ONE: dict[Operation, int] = {
    Operation.READ: lib.IORING_OP_READ,
    Operation.WRITE: lib.IORING_OP_WRITE,
    Operation.RECEIVE: lib.IORING_OP_RECV,
    Operation.SEND: lib.IORING_OP_SEND,
}
_REGISTERED: dict[Operation, int] = {
    Operation.READ: lib.IORING_OP_READ_FIXED,
    Operation.WRITE: lib.IORING_OP_WRITE_FIXED,
}
_MANY: dict[Operation, int] = {
    Operation.READ: lib.IORING_OP_READV,
    Operation.WRITE: lib.IORING_OP_WRITEV,
    Operation.RECEIVE: lib.IORING_OP_RECVMSG,
    Operation.SEND: lib.IORING_OP_SENDMSG,
}
_REGISTERED_MAX: int = lib.URING_FIXED_MAX


class UringEngine(Engine):
    """A ring of the pool's own. Raises OSError where that is not allowed."""

    name = "io_uring"
    reason = ""

    def __init__(self, memory: PoolMemory, complete: Complete) -> None:
        self._memory = memory
        self._complete = complete
        self._loop = asyncio.get_running_loop()
        self._space = bytearray(_TAKEN * _COMPLETION.size)
        self._ring, self._most = _new_ring()
        problem, _ = self._ring.turn(b"", 0, self._space, 0)
        if problem:  # a sandbox that allows some of its system calls only
            self._ring.close()
            raise OSError(-problem, os.strerror(-problem))
        try:
            self._ring.register(memory.address, memory.size)
            self.registered = memory.size
        except OSError as error:  # transfers work without, and pin what they need themselves
            self.reason = f"not registered: {error.strerror}; see ulimit -l, locked memory"
        self._queue: OrderedDict[Transfer, None] = OrderedDict()
        self._cancels: deque[int] = deque()
        # what never gets to the kernel, and how it ends
        self._early: deque[tuple[Transfer, int]] = deque()
        self._in_kernel: dict[int, Transfer] = {}
        self._cancels_in_kernel = 0
        self._last_number = 0  # 0 itself is that of all cancellations
        # for this turn of the loop: 0, or why there is no offset in this descriptor
        self._offsets: dict[int, int] = {}
        self._scheduled = False
        self._loop.add_reader(self._ring.eventfd, self._turn)

    # ---- the engine ---------------------------------------------------------

    def start(self, transfer: Transfer) -> None:
        """As the base class says."""
        problem = 0 if transfer.offset is None else self._no_offset(transfer.fd)
        if problem:
            self._early.append((transfer, -problem))
        else:
            self._queue[transfer] = None
        self._soon()

    def cancel(self, transfer: Transfer) -> None:
        """As the base class says."""
        if transfer in self._queue:
            del self._queue[transfer]
            self._early.append((transfer, -errno.ECANCELED))
        elif self._in_kernel.get(transfer.number) is transfer:
            self._cancels.append(transfer.number)
        self._soon()

    def close(self) -> None:
        """As the base class says."""
        self._loop.remove_reader(self._ring.eventfd)
        self._ring.close()
        self._cancels.clear()

    def abandon(self, *, forked: bool) -> None:
        """As the base class says."""
        if forked:
            self._ring.forked()
        else:
            self._ring.close()

    # ---- a turn of the loop -------------------------------------------------

    def _soon(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._scheduled_turn)

    def _scheduled_turn(self) -> None:
        self._scheduled = False
        if not self._ring.closed:
            self._turn()

    def _turn(self) -> None:
        self._offsets.clear()
        for _ in range(len(self._early)):
            self._complete(*self._early.popleft())
        if self._ring.closed:
            return  # that was the last one of a pool that closes
        entries = self._entries()
        data = b"".join(entries)
        number, more = self._ring.turn(data, len(entries), self._space, _TAKEN)
        self.system_calls += 2
        taken = memoryview(self._space)[: max(number, 0) * _COMPLETION.size]
        for who, result, _ in _COMPLETION.iter_unpack(bytes(taken)):
            if who:
                transfer = self._in_kernel.pop(who)
                transfer.scratch = None
                self._complete(transfer, result)
            else:
                self._cancels_in_kernel -= 1
        if self._ring.closed:
            return
        if number < 0 or self._ring.pending:
            self._loop.call_later(_AGAIN, self._soon)
        elif more or self._cancels_to_go() or self._transfers_to_go():
            self._soon()

    def _cancels_to_go(self) -> int:
        """How many can be handed to the kernel now, but for its room in one turn."""
        taken = len(self._in_kernel) + self._cancels_in_kernel
        return min(len(self._cancels), self._most - taken)

    def _transfers_to_go(self) -> int:
        taken = len(self._in_kernel) + self._cancels_in_kernel
        return max(min(len(self._queue), self._most - self._most // _FOR_CANCELS - taken), 0)

    def _entries(self) -> list[bytes]:
        """Those for this turn. The kernel has them from now on."""
        entries: list[bytes] = []
        for _ in range(min(self._cancels_to_go(), self._ring.room)):
            target = self._cancels.popleft()
            if target in self._in_kernel:
                entries.append(
                    _ENTRY.pack(lib.IORING_OP_ASYNC_CANCEL, 0, 0, -1, 0, target, *[0] * 8)
                )
                self._cancels_in_kernel += 1
        for _ in range(min(self._transfers_to_go(), self._ring.room - len(entries))):
            transfer, _ = self._queue.popitem(last=False)
            self._last_number = number = self._last_number + 1
            transfer.number = number
            self._in_kernel[number] = transfer
            entries.append(self._entry_of(transfer))
        return entries

    def _entry_of(self, transfer: Transfer) -> bytes:
        operation, segments = transfer.operation, transfer.segments
        offset = transfer.offset
        if offset is None:  # for a socket this is something else, which is not used
            offset = 0 if transfer.on_socket else _WHERE_IT_STANDS
        if len(segments) > 1:
            code = _MANY[operation]
            address, length = _scattered(transfer)
            index = 0
        else:
            address, length = segments[0]
            length = min(length, BLOCK)
            index = self._registered_as(operation, address, length)
            code = _ONE[operation] if index < 0 else _REGISTERED[operation]
        return _ENTRY.pack(
            code, 0, 0, transfer.fd, offset, address, length, 0, transfer.number,
            max(index, 0), 0, 0, 0, 0,
        )  # fmt: skip

    def _registered_as(self, operation: Operation, address: int, length: int) -> int:
        """The number of the registered buffer that has all of this; -1 when none has."""
        if not self.registered or not length or operation not in _REGISTERED:
            return -1
        at = address - self._memory.address
        first, last = at // _REGISTERED_MAX, (at + length - 1) // _REGISTERED_MAX
        return first if first == last else -1

    def _no_offset(self, fd: int) -> int:
        """0, or the errno of using an offset here, where io_uring would just ignore it."""
        problem = self._offsets.get(fd)
        if problem is None:
            try:
                os.lseek(fd, 0, os.SEEK_CUR)
                problem = 0
            except OSError as error:
                problem = error.errno or errno.EIO
            self._offsets[fd] = problem
        return problem


def _new_ring() -> tuple[Uring, int]:
    """A ring, and how many transfers it has room for."""
    for entries, completions in _SIZES[:-1]:
        try:
            return Uring(entries, completions), completions
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
    return Uring(*_SIZES[-1]), _SIZES[-1][1]


def _scattered(transfer: Transfer) -> tuple[int, int]:
    """Address and number of what describes several pieces; the transfer keeps it."""
    vector = array("Q", [value for segment in transfer.segments for value in segment])
    address, _ = vector.buffer_info()
    if not transfer.on_socket:
        transfer.scratch = vector
        return address, len(transfer.segments)
    message = array("Q", [0, 0, address, len(transfer.segments), 0, 0, 0])  # struct msghdr
    transfer.scratch = (vector, message)
    return message.buffer_info()[0], 1
