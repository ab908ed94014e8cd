# SPDX-License-Identifier: MIT
"""``inproc://NAME``: both endpoints in this process, in any loops and threads.

Memory: pages of this process, mapped once for each side with the rights of that
side, as for every other transport. Doorbell: a call into the other side's loop.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from kucomms import _core
from kucomms._pool_memory import PoolMemory, new_memory
from kucomms.exceptions import (
    AddressInUseError,
    BusyError,
    KucommsError,
    NotReadyError,
)
from kucomms.transports.base import (
    Address,
    Connection,
    ConnectOptions,
    Listener,
    ListenOptions,
    Peer,
)

__all__ = ["transport"]

_FEATURES: int = _core.lib.KUCOMMS_FEATURE_POOLS
"""In force on all links."""
_ONCE = 5.0
"""Seconds that a listener which is there may take to answer a connect(timeout=0)."""


class InprocConnection(Connection):
    """One side. Both sides know each other until one closes."""

    def __init__(
        self, url: str, channel: _core.Channel, peer: Peer, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(url, channel, peer)
        self.other: InprocConnection | None = None
        self._loop = loop
        self._thread = 0
        self._woken: Callable[[], None] | None = None
        self._gone: Callable[[KucommsError | None], None] | None = None
        # what came before start(), to be told then
        self._early: list[Callable[[], None]] | None = []
        self._opening: set[asyncio.Future[int]] = set()
        self._pool_number = 0

    def start(
        self, woken: Callable[[], None], gone: Callable[[KucommsError | None], None]
    ) -> None:
        self._woken = woken
        self._gone = gone
        self._thread = threading.get_ident()
        self.channel.attach(self.ring)
        early, self._early = self._early or [], None
        for callback in early:
            self._loop.call_soon(callback)

    def ring(self) -> None:
        other = self.other
        if other is not None and not other._call(other._deliver):
            self.other = None  # its loop was closed under it: as good as dead
            self._call(self._report_gone)

    def _call(self, callback: Callable[[], None]) -> bool:
        try:
            if threading.get_ident() == self._thread:
                self._loop.call_soon(callback)
            else:
                self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop is closed
            return False
        return True

    def _deliver(self) -> None:
        if self._early is not None:
            self._early.append(self._deliver)
        elif self._woken is not None:
            self._woken()

    def _report_gone(self) -> None:
        if self._early is not None:
            self._early.append(self._report_gone)
        elif self._gone is not None:
            self._gone(None)

    async def open_pool(self, size: int, contiguous: bool = False) -> tuple[int, PoolMemory]:
        memory = await new_memory(size)
        try:
            # Each side has a mapping of its own, which lives as long as it likes.
            theirs = PoolMemory.passed(memory.fd, size)
            number, self._pool_number = self.side + self._pool_number, self._pool_number + 2
            answered: asyncio.Future[int] = self._loop.create_future()
            other = self.other
            if other is None or not other._call(
                lambda: other._take_pool(number, theirs, answered)
            ):
                theirs.close()
                raise _core.os_error(errno.ECONNRESET, f"{self.url}: the other side is gone")
            self._opening.add(answered)
            try:
                problem = await answered
            finally:
                self._opening.discard(answered)
            if problem:
                raise _core.os_error(problem, f"{self.url}: the other side cannot map the pool")
            return number, memory
        except BaseException:
            memory.close()
            raise

    def _take_pool(
        self, number: int, memory: PoolMemory, answered: asyncio.Future[int]
    ) -> None:
        """The other side has opened a pool."""
        if self._early is not None:
            self._early.append(lambda: self._take_pool(number, memory, answered))
            return
        problem = errno.ECONNRESET if self._gone is None else self.pool_opened(number, memory)
        if problem:
            memory.close()
        other = self.other
        if other is not None:
            other._call(lambda: _answer(answered, problem))

    def close(self) -> None:
        other, self.other = self.other, None
        self._woken = None
        self._gone = None
        for answered in self._opening:
            _answer(answered, errno.ECONNRESET)
        if other is not None:
            other._call(other._report_gone)


def _answer(answered: asyncio.Future[int], problem: int) -> None:
    if not answered.done():
        answered.set_result(problem)


class InprocListener(Listener):
    """An entry in the table of names."""

    def __init__(
        self,
        address: Address,
        options: ListenOptions,
        accept: Callable[[Connection], None],
        links: Callable[[], int],
    ) -> None:
        super().__init__(address.url)
        self.name = address.name
        self.loop = asyncio.get_running_loop()
        self._options = options
        self._accept = accept
        self._links = links

    def serve(self, request: _Request) -> None:
        """In the listener's loop: make the channel and give each side its end."""
        if not request.reply.set_running_or_notify_cancel():
            return
        try:
            if self.closed:
                raise _Vanished
            if self._links() >= self._options.max_links:
                raise BusyError(
                    f"{self.url}: the listener has all the {self._options.max_links} links "
                    "that it takes; try again later"
                )
            ours, theirs = _make_pair(self.url, self._options, request, self.loop)
        except Exception as error:
            request.reply.set_exception(error)
            return
        request.reply.set_result(theirs)
        self._accept(ours)

    async def aclose(self) -> None:
        self.closed = True
        _table.remove(self)


class _Vanished(Exception):
    """The listener was closed between being found and being asked."""


class _Request:
    """What a connecting side wants of the listener, perhaps in another thread."""

    def __init__(self, options: ConnectOptions) -> None:
        self.loop = asyncio.get_running_loop()
        self.options = options
        self.reply: Future[InprocConnection] = Future()


class _Table:
    """Who listens at which name, and who waits for one. Used by all threads."""

    def __init__(self) -> None:
        self.forget_all()

    def forget_all(self) -> None:
        """In a forked child: the loops of those who were there run in the parent only."""
        self._lock = threading.Lock()
        self._listeners: dict[str, InprocListener] = {}
        self._waiting: dict[str, list[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}

    def add(self, listener: InprocListener) -> None:
        with self._lock:
            holder = self._listeners.get(listener.name)
            if holder is not None and not holder.loop.is_closed():
                raise AddressInUseError(
                    f"{listener.url}: an endpoint of this process listens there already; "
                    "close it first, or use another name"
                )
            self._listeners[listener.name] = listener
            waiting = self._waiting.pop(listener.name, [])
        for loop, event in waiting:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(event.set)

    def remove(self, listener: InprocListener) -> None:
        with self._lock:
            if self._listeners.get(listener.name) is listener:
                del self._listeners[listener.name]

    def find(self, name: str, event: asyncio.Event) -> InprocListener | None:
        """The listener; when there is none, ``event`` is set as soon as there is one."""
        with self._lock:
            listener = self._listeners.get(name)
            if listener is not None and not listener.loop.is_closed():
                return listener
            self._waiting.setdefault(name, []).append((asyncio.get_running_loop(), event))
            return None

    def forget(self, name: str, event: asyncio.Event) -> None:
        with self._lock:
            waiting = [entry for entry in self._waiting.get(name, []) if entry[1] is not event]
            if waiting:
                self._waiting[name] = waiting
            else:
                self._waiting.pop(name, None)


_table = _Table()
os.register_at_fork(after_in_child=_table.forget_all)


def _make_pair(
    url: str, options: ListenOptions, request: _Request, loop: asyncio.AbstractEventLoop
) -> tuple[InprocConnection, InprocConnection]:
    ring_size = options.agree(request.options.ring_size)
    side = _core.side_size(ring_size)
    halves: list[_core.HalfChannel] = []
    try:
        fd = os.memfd_create("kucomms", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, 2 * side)
            for own in (0, 1):
                features = options.features | _FEATURES
                half = _core.HalfChannel(url, own, ring_size, fd, own * side, features)
                halves.append(half)
            listener, connector = (
                made.attach(fd, (1 - own) * side) for own, made in enumerate(halves)
            )
        finally:
            os.close(fd)
    except OSError as error:
        for half in halves:
            half.close()
        if isinstance(error, KucommsError):
            raise
        raise _core.os_error(
            error.errno or 0, f"{url}: no memory for two rings of {ring_size} bytes"
        ) from error
    me = (os.getpid(), os.geteuid())
    ours = InprocConnection(
        url, listener, Peer(pid=me[0], uid=me[1], hello=request.options.hello), loop
    )
    theirs = InprocConnection(
        url, connector, Peer(pid=me[0], uid=me[1], hello=options.hello), request.loop
    )
    ours.other, theirs.other = theirs, ours
    ours.side = 0
    ours.carries_buffers = theirs.carries_buffers = True
    ours.pollable = theirs.pollable = loop is not request.loop
    return ours, theirs


def _close_unclaimed(reply: Future[InprocConnection]) -> None:
    """The connecting task was cancelled while the answer was on its way."""
    if not reply.cancelled() and reply.exception() is None:
        connection = reply.result()
        connection.channel.attach(connection.ring)
        connection.channel.stop_sending(_core.STATE_CLOSED)
        connection.channel.unmap()
        connection.close()


class InprocTransport:
    """See the module."""

    async def listen(
        self,
        address: Address,
        options: ListenOptions,
        accept: Callable[[Connection], None],
        links: Callable[[], int],
    ) -> Listener:
        listener = InprocListener(address, options, accept, links)
        _table.add(listener)
        return listener

    async def connect(self, address: Address, options: ConnectOptions) -> Connection:
        try:
            async with asyncio.timeout(_ONCE if options.timeout == 0 else options.timeout):
                while True:
                    listener = await self._find(address, options)
                    request = _Request(options)
                    try:
                        listener.loop.call_soon_threadsafe(listener.serve, request)
                        return await asyncio.wrap_future(request.reply)
                    except asyncio.CancelledError:
                        request.reply.add_done_callback(_close_unclaimed)
                        raise
                    except (_Vanished, RuntimeError) as error:
                        if isinstance(error, KucommsError):
                            raise
        except NotReadyError:
            raise
        except TimeoutError:
            raise _nobody(address) from None

    async def _find(self, address: Address, options: ConnectOptions) -> InprocListener:
        event = asyncio.Event()
        try:
            while True:
                event.clear()
                listener = _table.find(address.name, event)
                if listener is not None:
                    return listener
                if options.timeout is not None and options.timeout <= 0:
                    raise _nobody(address)
                await event.wait()
        finally:
            _table.forget(address.name, event)


def _nobody(address: Address) -> NotReadyError:
    return NotReadyError(
        f"{address.url}: no endpoint of this process listens there; call listen() first, "
        "or give connect() a longer timeout"
    )


transport = InprocTransport()
