# SPDX-License-Identifier: MIT
"""Transfers without io_uring.

What can be waited for with epoll (sockets, pipes, terminals) is tried when it is ready,
in the loop, without blocking; so any number can be under way, and each can be cancelled.
What cannot (files, block devices) goes through ``preadv`` and ``pwritev`` in threads.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from kucomms import _core
from kucomms._pool_memory import PoolMemory
from kucomms.transfers.base import Complete, Engine, Transfer

__all__ = ["ThreadEngine"]

_NO_OFFSET = -1
_TRIES = 64
"""Transfers of one descriptor that are tried before the others have their turn."""
_EVENTS = {True: select.EPOLLIN, False: select.EPOLLOUT}


class ThreadEngine(Engine):
    """Bounded threads for files, epoll for the rest."""

    name = "threads"

    def __init__(self, memory: PoolMemory, complete: Complete, reason: str) -> None:
        self.reason = reason
        self._memory = memory
        self._complete = complete
        self._loop = asyncio.get_running_loop()
        self._workers = min(32, (os.cpu_count() or 1) + 4)  # as asyncio's own
        self._threads = ThreadPoolExecutor(self._workers, "kucomms transfer")
        self._running = 0
        # for a thread; the value is whether something says that it will not block
        self._queue: OrderedDict[Transfer, bool] = OrderedDict()
        self._epoll = select.epoll()
        # those that wait for a descriptor, in order: fills the buffers (EPOLLIN) or not
        self._waiting: dict[int, dict[bool, OrderedDict[Transfer, None]]] = {}
        # descriptors that have got a first transfer to wait for
        self._fresh: dict[int, None] = {}
        self._results: deque[tuple[Transfer, int, bool]] = deque()
        self._notified = False
        self._loop.add_reader(self._epoll.fileno(), self._ready)

    # ---- the engine ---------------------------------------------------------

    def start(self, transfer: Transfer) -> None:
        """As the base class says."""
        lines = self._waiting.get(transfer.fd)
        fills = transfer.fills
        if lines is not None:
            lines[fills][transfer] = None
            if len(lines[fills]) == 1:
                self._soon(transfer.fd)
            return
        try:
            self._epoll.register(transfer.fd, 0)
        except PermissionError:  # a file, which is always ready, and blocks nevertheless
            if transfer.on_socket:
                self._end(transfer, -errno.ENOTSOCK)
            else:
                self._queue[transfer] = False
                self._hand_over()
        except ValueError:
            self._end(transfer, -errno.EBADF)
        except OSError as error:
            self._end(transfer, -(error.errno or errno.EIO))
        else:
            lines = self._waiting[transfer.fd] = {True: OrderedDict(), False: OrderedDict()}
            lines[fills][transfer] = None
            self._soon(transfer.fd)

    def cancel(self, transfer: Transfer) -> None:
        """As the base class says."""
        if self._queue.pop(transfer, None) is None:
            lines = self._waiting.get(transfer.fd)
            line = lines[transfer.fills] if lines else None
            if not lines or line is None or transfer not in line:
                return  # a thread has it, and nobody can stop that
            del line[transfer]
            self._watch(transfer.fd, lines)
        self._end(transfer, -errno.ECANCELED)

    def close(self) -> None:
        """As the base class says."""
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        self._threads.shutdown(wait=False)

    def abandon(self, *, forked: bool) -> None:
        """As the base class says."""
        self._epoll.close()
        if not forked:
            self._threads.shutdown(wait=False)

    # ---- descriptors that can be waited for ---------------------------------

    def _ready(self) -> None:
        for fd, events in self._epoll.poll(0):
            lines = self._waiting.get(fd)
            if lines is None:
                continue
            for fills, event in _EVENTS.items():
                if events & (event | select.EPOLLERR | select.EPOLLHUP):
                    self._try(lines[fills], ready=True)
            self._watch(fd, lines)

    def _soon(self, fd: int) -> None:
        """Try once in the loop's next turn, ready or not: what cannot be would never be."""
        self._fresh[fd] = None
        self._deliver_soon()

    def _try_fresh(self) -> None:
        fresh, self._fresh = self._fresh, {}
        for fd in fresh:
            lines = self._waiting.get(fd)
            if lines is not None:
                for line in lines.values():
                    self._try(line, ready=False)
                self._watch(fd, lines)

    def _try(self, line: OrderedDict[Transfer, None], *, ready: bool) -> None:
        for _ in range(min(len(line), _TRIES)):
            transfer = next(iter(line))
            try:
                result = self._attempt(transfer)
            except OSError as error:
                result = -(error.errno or errno.EIO)
            if result == -errno.EAGAIN:
                return
            if result == -errno.EOPNOTSUPP:
                # The kernel cannot try this file (before 6.4: a pipe).
                if ready:
                    del line[transfer]
                    self._queue[transfer] = True
                    self._hand_over()
                return
            del line[transfer]
            self._end(transfer, result)

    def _attempt(self, transfer: Transfer) -> int:
        """Bytes or a negative errno, without waiting. Raises OSError."""
        if transfer.on_socket:
            return _core.move_message(transfer.fd, transfer.fills, transfer.segments)
        views = [self._memory.view(*segment) for segment in self._pieces(transfer)]
        offset = _NO_OFFSET if transfer.offset is None else transfer.offset
        call = os.preadv if transfer.fills else os.pwritev
        return call(transfer.fd, views, offset, os.RWF_NOWAIT)

    def _watch(self, fd: int, lines: dict[bool, OrderedDict[Transfer, None]]) -> None:
        """Have epoll report what somebody waits for."""
        events = 0
        for fills, line in lines.items():
            events |= _EVENTS[fills] if line else 0
        try:
            if events:
                self._epoll.modify(fd, events)
            else:
                del self._waiting[fd]
                self._epoll.unregister(fd)
        except OSError as error:  # it was closed under us
            self._waiting.pop(fd, None)
            for line in lines.values():
                for transfer in line:
                    self._end(transfer, -(error.errno or errno.EIO))

    # ---- threads ------------------------------------------------------------

    def _hand_over(self) -> None:
        while self._queue and self._running < self._workers:
            transfer, ready = self._queue.popitem(last=False)
            try:
                # When this is cancelled, the number may soon stand for another file, and the
                # thread may not have come to it yet.
                fd = os.dup(transfer.fd)
            except OSError as error:
                self._end(transfer, -(error.errno or errno.EIO))
                continue
            self._running += 1
            self._threads.submit(self._run, transfer, fd, ready)

    def _run(self, transfer: Transfer, fd: int, ready: bool) -> None:
        """In a thread."""
        fills = transfer.fills
        pieces = self._pieces(transfer)
        if ready and not fills:  # ready means that so much does not block
            address, length = pieces[0]
            pieces = [(address, min(length, select.PIPE_BUF))]
        views = [self._memory.view(*segment) for segment in pieces]
        result = -errno.EIO
        try:
            if transfer.offset is None:
                result = os.readv(fd, views) if fills else os.writev(fd, views)
            elif fills:
                result = os.preadv(fd, views, transfer.offset)
            else:
                result = os.pwritev(fd, views, transfer.offset)
        except OSError as error:
            result = -(error.errno or errno.EIO)
        finally:
            os.close(fd)
            self._results.append((transfer, result, True))
            self._notify()

    def _notify(self) -> None:
        if not self._notified:
            self._notified = True
            with suppress(RuntimeError):  # the loop is over, and nobody waits any more
                self._loop.call_soon_threadsafe(self._deliver)

    # ---- the end of each ----------------------------------------------------

    def _end(self, transfer: Transfer, result: int) -> None:
        """It is complete, which is said in the loop's next turn."""
        self._results.append((transfer, result, False))
        self._deliver_soon()

    def _deliver_soon(self) -> None:
        if not self._notified:
            self._notified = True
            self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        self._notified = False
        self._try_fresh()
        for _ in range(len(self._results)):
            transfer, result, threaded = self._results.popleft()
            self._running -= threaded
            self._complete(transfer, result)
        self._hand_over()

    def _pieces(self, transfer: Transfer) -> list[tuple[int, int]]:
        base = self._memory.address
        return [(address - base, length) for address, length in transfer.segments]
