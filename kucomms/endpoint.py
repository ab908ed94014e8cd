# SPDX-License-Identifier: MIT
"""Endpoint: three handlers in one context, and the links that feed them.

One task, the runner, calls every handler, one at a time; so nothing between them
needs a lock. A turn of it: run what ticks are due, take up to ``batch`` messages of
each link that has some, give way to the loop. With nothing to do it parks: it asks
the peers for a doorbell and sleeps until one rings or a tick is due; when messages
come in quick succession, it polls for a moment before that.

While a handler itself waits for something, ``_watch`` sees to it that the endpoint
keeps draining: replies reach their requests, other messages wait in the backlog.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextvars import ContextVar
from functools import partial
from time import monotonic
from types import CoroutineType, coroutine
from typing import Any, TypeVar, overload

from kucomms import _core, _log, transports
from kucomms._core import MORE, OK, PAUSE
from kucomms._log_limit import LogLimit
from kucomms._once import Once
from kucomms.exceptions import (
    ClosedError,
    KucommsError,
    OutOfTurnError,
    PeerClosedError,
    ProtocolError,
    QueueFull,
    UsageError,
)
from kucomms.link import Link
from kucomms.message import Message, Token
from kucomms.polling import AdaptivePolling
from kucomms.pool import Pool
from kucomms.scheduler import Scheduler, Ticker
from kucomms.statistics import EndpointStatistics
from kucomms.transports.base import (
    RING_LIMIT,
    Address,
    Connection,
    ConnectOptions,
    Listener,
    ListenOptions,
)
from kucomms.zero_copy import borrowed_message, end_borrow

__all__ = ["Connecting", "Endpoint", "connect"]

_core.configure(Message, Token, CoroutineType)

F = TypeVar("F", bound=Callable[..., Any])

MessageHandler = Callable[[Message, Link], Any]
WorkHandler = Callable[[], Any]
TimerHandler = Callable[[float], Any]
OpenHandler = Callable[[Link], Any]
CloseHandler = Callable[[Link, KucommsError | None], Any]
ErrorHandler = Callable[[BaseException, str], Any]

BUSY_POLL = 50e-6
"""Seconds that an endpoint polls before it sleeps, at most, unless it is told otherwise.

About what going to sleep and being woken costs: so at worst waiting costs twice what it
would without.
"""
_BATCH_BYTES = 1 << 18
"""Bytes of a batch, by about: so many that are alive at once still fit into a cache."""
_GLANCE = 8
"""Messages between two looks at the clock."""
_HOLD = 0.0002
"""Seconds after which the runner gives way to the loop."""
_running_for: ContextVar[Endpoint | None] = ContextVar("kucomms_running_for", default=None)
"""The endpoint in whose handler this is; tasks that a handler makes inherit it."""
_POLL_SLICE = 50_000
"""Nanoseconds of polling between two turns of the loop."""
_POLL_BRIEFLY = 10_000
"""The first slice: a task that a handler has woken waits behind it."""
_POLL_HOLD = (_POLL_SLICE - _POLL_BRIEFLY) * 1e-9
"""Seconds since the loop's last turn after which it has one before any polling."""
_POLL_LINKS = 64
"""Links that are polled at once; more are put to sleep."""


class Endpoint:
    """Handlers, and links to any number of peers.

    ``name`` is for logs and errors. ``work_hz``, ``timer_hz``: calls per second of the
    work and timer handlers. ``backlog``: bytes of messages that may wait here while a
    handler itself waits for something. ``busy_poll``: seconds to poll for more before
    going to sleep, at most; 0 for never. How long it really polls follows its success,
    down to nothing where it does not pay, and the loop has a turn after 50 microseconds
    of it at most. ``batch``: messages taken from one link before the others have their
    turn.

    Use it as ``async with endpoint:``, once; leaving the block closes every listener
    and link, and cancels a handler that is waiting for something. It belongs to the
    thread and loop in which it was started. Handlers can be registered before and
    after, as decorators or here, coroutine functions or plain ones.
    """

    def __init__(
        self,
        name: str = "endpoint",
        *,
        on_message: MessageHandler | None = None,
        on_work: WorkHandler | None = None,
        on_timer: TimerHandler | None = None,
        on_link_open: OpenHandler | None = None,
        on_link_close: CloseHandler | None = None,
        on_error: ErrorHandler | None = None,
        work_hz: float = 100.0,
        timer_hz: float = 1.0,
        backlog: int = 1 << 20,
        busy_poll: float = BUSY_POLL,
        batch: int = 128,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch!r}")
        if backlog < 0 or busy_poll < 0:
            raise ValueError("backlog and busy_poll cannot be negative")
        for hz in (work_hz, timer_hz):
            Ticker(hz, 0.0)  # raises for what cannot be a rate
        self.name = name
        self._rates = {"on_work": work_hz, "on_timer": timer_hz}
        self._backlog_limit = backlog
        self._polling = AdaptivePolling(busy_poll)
        self._batch = batch
        self._handlers: dict[str, Callable[..., Any]] = {}
        self._borrowing = False
        self._has_message_handler = False

        self._links: dict[Link, None] = {}
        # to be looked at; found empty since, but not parked yet; with a peer that
        # waits for space and was not told yet that there is some
        self._ready: deque[Link] = deque()
        self._drained: dict[Link, None] = {}
        self._owing: set[Link] = set()
        self._events: deque[tuple[str, Link, KucommsError | None]] = deque()
        self._listeners: list[Listener] = []
        self._scheduler = Scheduler()
        self._runner: asyncio.Task[None] | None = None
        self._sleep: asyncio.Future[None] | None = None
        self._over: asyncio.Future[None] | None = None
        self._stopping = False
        self._ends_with_its_link = False
        self._in_handler = False
        self._watching = False
        # the batch that is being handled
        self._in_hand: list[Message] = []
        self._work_again = False
        self._held_since = 0.0
        # what the handler that is running waits for, to be told that it waits in vain
        self._serving: Link | None = None
        self._handler_waits: set[Callable[[BaseException], None]] = set()
        self._backlog_used = 0
        self._backlog_is_full = False
        # links whose messages wait in the ring because the backlog is full
        self._starved: dict[Link, None] = {}
        # those that are closed with their link, until they are
        self._pools: dict[Link, set[Pool]] = {}
        # links whose open handler has not run yet
        self._unopened: dict[Link, None] = {}
        # when the callback was scheduled that says that the loop has had a turn, or 0
        self._turn_asked = 0.0
        self._is_polling = False
        self._has_polled = False
        self._tick_is_due = False

        self._message_calls = 0
        self._work_calls = 0
        self._timer_calls = 0
        self._handler_errors = 0
        # of each handler: a peer that can make it raise must not keep the loop busy with
        # printing them, which can take a tenth of a second each
        self._tracebacks: dict[str, LogLimit] = {}
        self._time_in_handlers = 0.0
        self._links_opened = 0
        self._links_closed = 0
        self._wakeups = 0

        given = {
            "on_message": on_message,
            "on_work": on_work,
            "on_timer": on_timer,
            "on_link_open": on_link_open,
            "on_link_close": on_link_close,
            "on_error": on_error,
        }
        for kind, handler in given.items():
            if handler is not None:
                self._register(kind, handler)

    def __repr__(self) -> str:
        return f"<Endpoint {self.name!r} {len(self._links)} links>"

    # ---- handlers -----------------------------------------------------------

    @overload
    def on_message(self, handler: F, /) -> F: ...
    @overload
    def on_message(self, /, *, borrow: bool = False) -> Callable[[F], F]: ...

    def on_message(self, handler: Any = None, /, *, borrow: bool = False) -> Any:
        """Register ``handler(message, link)``, called for each message of every link.

        With ``borrow=True``, ``message.data`` is a read-only memoryview into the ring,
        valid until the handler returns; a slice that lives longer is reported as a
        ``BufferError`` of the handler. While it waits, the message's bytes stay taken;
        when the peer has filled the rest of the ring, a send or request that the handler
        waits for raises ``QueueFull``.
        """
        if handler is None:

            def decorate(function: F) -> F:
                self._borrowing = borrow
                return self._register("on_message", function)

            return decorate
        self._borrowing = borrow
        return self._register("on_message", handler)

    def on_work(self, handler: F) -> F:
        """Register ``handler()``, called ``work_hz`` times a second.

        Returning True asks to be called again at once, after the messages that wait.
        """
        return self._register("on_work", handler)

    def on_timer(self, handler: F) -> F:
        """Register ``handler(now)``, called ``timer_hz`` times a second; now: loop.time()."""
        return self._register("on_timer", handler)

    def on_link_open(self, handler: F) -> F:
        """Register ``handler(link)``, called before the first message of a link."""
        return self._register("on_link_open", handler)

    def on_link_close(self, handler: F) -> F:
        """Register ``handler(link, error)``, called after the last message of a link.

        ``error`` is None after an orderly close, by whichever side.
        """
        return self._register("on_link_close", handler)

    def on_error(self, handler: F) -> F:
        """Register ``handler(exception, handler_name)`` for what other handlers raise.

        Without one it is logged with structlog, with a traceback each second at most.
        Either way it is counted and the endpoint goes on.
        """
        return self._register("on_error", handler)

    def _register(self, kind: str, handler: F) -> F:
        if not callable(handler):
            raise TypeError(f"{kind}: a handler must be callable, not {handler!r}")
        if self._runner is not None:
            self._check_thread()
        self._handlers[kind] = handler
        if kind == "on_message":
            self._has_message_handler = True
        if self._runner is not None:
            if kind in self._rates:
                self._scheduler.start(kind, self._rates[kind])
                self._wake()
            if kind == "on_message":
                for link in self._links:
                    link._refuse_receivers()
                    self._make_ready(link)
        return handler

    # ---- life ---------------------------------------------------------------

    async def __aenter__(self) -> Endpoint:
        """Start it in the running loop. Raises UsageError the second time."""
        if self._runner is not None or self._stopping:
            raise UsageError(f"endpoint {self.name!r} was started before; make a new one")
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._pid = os.getpid()
        self._over = self._loop.create_future()
        for kind, hz in self._rates.items():
            if kind in self._handlers:
                self._scheduler.start(kind, hz)
        self._runner = self._loop.create_task(self._run(), name=f"kucomms {self.name}")
        return self

    async def __aexit__(self, *_: object) -> None:
        """As ``aclose``."""
        await self.aclose()

    async def aclose(self) -> None:
        """Close every listener and link in order, run the close handlers, and stop.

        A handler that is waiting for something is cancelled. In a handler it only
        starts all this. Twice is fine.
        """
        if self._runner is None:
            self._stopping = True
            return
        self._check_thread()
        first, self._stopping = not self._stopping, True
        for listener in list(self._listeners):
            await listener.aclose()
        self._listeners.clear()
        for link in list(self._links):
            link._close_here()
        if asyncio.current_task() is self._runner:
            return
        if first and self._in_handler:
            self._runner.cancel()
        self._wake()
        await asyncio.wait([self._runner])
        for link in list(self._pools):
            await self._pools_closed(link)
        if not self._runner.cancelled():
            error = self._runner.exception()
            if error is not None:
                raise error

    async def serve_forever(self) -> None:
        """Wait until the endpoint is closed, or this is cancelled."""
        self._check_started()
        assert self._over is not None
        await asyncio.shield(self._over)

    # ---- links --------------------------------------------------------------

    async def listen(
        self,
        url: str,
        *,
        ring_size: int = 1 << 20,
        max_ring_size: int = RING_LIMIT,
        max_links: int = 4096,
        allow: Iterable[int] = (),
        hello: bytes = b"",
        turns: bool = False,
    ) -> Listener:
        """Take connections at ``url``, until the returned listener is closed.

        ``ring_size``: bytes per direction, rounded up to a power of two of at least a
        page; the largest message is 32 bytes less. A peer may ask for another size, up
        to ``max_ring_size``. ``max_links``: as soon as this endpoint has so many links, of
        whatever origin, others get ``BusyError``. ``allow``: ids of users who may connect
        besides our own. ``hello``: up to 64 bytes that each peer finds in
        ``link.peer.hello``. ``turns``: on each link only one side may send, and passes the turn
        with its message, or with a ``Token``; the peer begins. A peer that does not know turns
        gets ``VersionError``.

        Raises AddressError, AddressInUseError, TransportError.
        """
        self._check_started()
        address = Address.parse(url)
        options = ListenOptions(
            ring_size=_core.ring_size_for(ring_size),
            max_ring_size=_core.ring_size_for(max(max_ring_size, ring_size)),
            max_links=max_links,
            allow=frozenset(allow),
            hello=_check_hello(hello),
            turns=turns,
        )
        listener = await transports.find(address).listen(
            address, options, self._accept, lambda: len(self._links)
        )
        self._listeners = [other for other in self._listeners if not other.closed]
        self._listeners.append(listener)
        return listener

    async def connect(
        self,
        url: str,
        *,
        ring_size: int | None = None,
        timeout: float | None = None,
        hello: bytes = b"",
        owner: int | None = None,
    ) -> Link:
        """Connect to whoever listens at ``url``.

        ``ring_size``: bytes per direction; None takes the listener's. It is clamped to
        the listener's limit: see ``link.ring_size``; what another user's listener gives
        unasked is at most 64 MiB. ``timeout``: seconds to wait for
        the listener, None for ever, 0 tries once. ``hello``: as in ``listen``.
        ``owner``: id of the user whose listener is meant, when not our own; it must
        allow us.

        A kernel endpoint can number its channels: ``kernel://NAME/3`` is one of them, which
        is waited for until it is announced, and ``kernel://NAME`` the lowest that is free;
        see ``link.channel_number``. One that is taken is not waited for.

        Raises AddressError, NotReadyError (NoSuchChannelError), BusyError
        (ChannelTakenError), ShutdownError, VersionError, ProtocolError, TransportError.
        """
        self._check_started()
        address = Address.parse(url)
        options = ConnectOptions(
            ring_size=0 if ring_size is None else _core.ring_size_for(ring_size),
            timeout=timeout,
            hello=_check_hello(hello),
            owner=owner,
        )
        connection = await transports.find(address).connect(address, options)
        if self._stopping:
            _decline(connection)
            raise self._closed_error()
        return self._add_link(connection)

    @property
    def links(self) -> tuple[Link, ...]:
        """The links that are open now."""
        return tuple(self._links)

    def broadcast(
        self,
        data: Any,
        *,
        type: int | None = None,
        id: int | None = None,
        user_value: int | None = None,
    ) -> int:
        """Send to every link that has room, and the turn; returns how many got it."""
        self._check_started()
        count = 0
        for link in tuple(self._links):
            try:
                link.send_nowait(data, type=type, id=id, user_value=user_value)
            except (QueueFull, OutOfTurnError, PeerClosedError, ClosedError, ProtocolError):
                continue
            count += 1
        return count

    def statistics(self) -> EndpointStatistics:
        """The counts of this endpoint."""
        work = self._scheduler.ticker("on_work")
        timer = self._scheduler.ticker("on_timer")
        return EndpointStatistics(
            message_calls=self._message_calls,
            work_calls=self._work_calls,
            timer_calls=self._timer_calls,
            handler_errors=self._handler_errors,
            time_in_handlers=self._time_in_handlers,
            work_ticks=work.ticks if work else 0,
            work_missed=work.missed if work else 0,
            timer_ticks=timer.ticks if timer else 0,
            timer_missed=timer.missed if timer else 0,
            work_jitter_mean=work.jitter_sum / work.ticks if work and work.ticks else 0.0,
            work_jitter_max=work.jitter_max if work else 0.0,
            timer_jitter_mean=timer.jitter_sum / timer.ticks if timer and timer.ticks else 0.0,
            timer_jitter_max=timer.jitter_max if timer else 0.0,
            links_opened=self._links_opened,
            links_closed=self._links_closed,
            wakeups=self._wakeups,
            time_polling=self._polling.nanoseconds / 1e9,
            polls_hit=self._polling.hits,
            polls_missed=self._polling.misses,
        )

    def _accept(self, connection: Connection) -> None:
        """Take a connection that a listener has made."""
        if self._stopping:
            _decline(connection)
        else:
            self._add_link(connection)

    def _add_link(self, connection: Connection) -> Link:
        link = Link(self, connection)
        self._links[link] = None
        try:
            link._start()
        except BaseException:  # nobody has seen it: as if it had never been
            del self._links[link]
            connection.close()
            connection.channel.unmap()
            raise
        self._links_opened += 1
        self._unopened[link] = None
        self._events.append(("on_link_open", link, None))
        self._wake()
        if self._in_handler and self._has_message_handler:
            link._pump()  # nobody else asks for its doorbell before the handler has ended
        return link

    def _link_over(self, link: Link, error: KucommsError | None) -> None:
        """The link is closed; its close handler comes after what it had to say."""
        self._links.pop(link, None)
        self._starved.pop(link, None)
        self._links_closed += 1
        if link._connection.pools is not None:
            link._connection.pools.end()
        for pool in list(self._pools.get(link, ())):
            pool._begin_close(by_link=True)
        self._events.append(("on_link_close", link, error))
        if self._ends_with_its_link:
            self._stopping = True
        self._wake()

    def _adopt_pool(self, link: Link, pool: Pool) -> None:
        """It is to be closed with the link. Raises the link's error when that is over."""
        if link.closed:
            raise link._closed_error()
        pool._link = link
        self._pools.setdefault(link, set()).add(pool)

        def closed(_: object) -> None:
            self._pools[link].discard(pool)
            if not self._pools[link]:
                del self._pools[link]

        pool._closed.add_done_callback(closed)

    async def _pools_closed(self, link: Link) -> None:
        """Those of a link that is over: wait for their transfers."""
        futures = [pool._closed for pool in self._pools.get(link, ())]
        if futures:
            await asyncio.wait(futures)

    # ---- the runner ---------------------------------------------------------

    async def _run(self) -> None:
        """Call every handler, one at a time, until the endpoint stops."""
        _running_for.set(self)
        self._held_since = monotonic()
        try:
            while not self._stopping or self._events:
                while self._events:
                    await self._handle_event(*self._events.popleft())
                if self._stopping:
                    continue
                now = monotonic()
                for _ in range(len(self._ready)):
                    await self._serve(self._ready.popleft())
                    now = monotonic()
                    if now >= self._scheduler.next_deadline or now - self._held_since > _HOLD:
                        await self._glance(now)
                    if self._stopping:
                        break
                if self._work_again or now >= self._scheduler.next_deadline:
                    await self._run_ticks(again=self._work_again)
                if self._ready or self._events or self._work_again or self._stopping:
                    if self._drained:
                        self._park()  # nobody polls them, so they have to be rung for
                    # also what polling found: it may be nothing to handle, over and over
                    if now - self._held_since > _HOLD:
                        await self._give_way()
                elif not await self._poll() and not self._park():
                    await self._sleep_until_woken()
        finally:
            self._scheduler.stop()
            for link in list(self._links):
                link._close_here()
            if self._over is not None and not self._over.done():
                self._over.set_result(None)

    async def _serve(self, link: Link) -> None:
        """Handle up to a batch of one link's messages."""
        if not self._has_message_handler:
            link._queued = False
            return
        if self._borrowing:
            more = await self._serve_borrowed(link)
        else:
            more = await self._serve_copied(link)
        if more or link._inbox:
            self._ready.append(link)
        elif link._peer_gone:
            link._queued = False
            link._finish()
        else:
            self._drained[link] = None

    async def _serve_copied(self, link: Link) -> bool:
        """Call the message handler for what has come. Whether there may be more."""
        channel, polling = link._channel, self._polling
        handler = self._handlers["on_message"]
        replies: list[Message] = []
        self._in_hand = messages = link._take_batch(self._batch)
        if not messages and link._over:
            return False
        poll = _POLL_BRIEFLY if polling.budget and link._can_be_polled else 0
        limit = self._batch
        calls, hits, spent = channel.calls, channel.polls_hit, channel.poll_ns
        begin = monotonic()
        self._in_handler = True
        self._serving = link
        try:
            # Each round goes on where the last one had to stop.
            while True:
                status = PAUSE
                try:
                    result = channel.serve(
                        handler,
                        link,
                        messages,
                        replies,
                        limit,
                        _BATCH_BYTES,
                        min(self._scheduler.next_deadline, self._held_since + _HOLD),
                        poll,
                        self._held_since + _POLL_HOLD,
                        self._ready,
                        self._events,
                        link._inbox,
                    )
                    if isinstance(result, int):
                        status = result
                    else:
                        await self._finish_call(*result)
                except Exception as error:
                    await self._handler_failed(error, "on_message")
                except asyncio.CancelledError as error:
                    await self._handler_cancelled(error, "on_message")
                if replies:
                    link._resolve(replies)
                    replies.clear()
                if status in (OK, MORE):
                    if not messages:
                        return status == MORE
                    limit = 0  # what came together with a reply
                elif status != PAUSE:
                    if not link._over:
                        # what came before the fault is handled first
                        link._add_to_inbox(messages)
                        link._receive_failed(status)
                    return False
                now = monotonic()
                if now >= self._scheduler.next_deadline or now - self._held_since > _HOLD:
                    await self._glance(now)
                    limit = 0  # the rest of the batch, then the others
        finally:
            self._in_handler = False
            self._serving = None
            if channel.owing:
                self._owing.add(link)
            spent = channel.poll_ns - spent
            if spent:
                polling.spun(channel.polls_hit - hits, spent)
            self._message_calls += channel.calls - calls
            self._time_in_handlers += monotonic() - begin - spent * 1e-9

    async def _finish_call(self, result: Any, yielded: Any) -> None:
        """See a handler to its end that wants to wait, and has yielded something already."""
        self._arm_watch()
        if type(result) is CoroutineType:
            await _go_on(result, yielded)
            self._held_since = monotonic()  # the loop has had its turn
        elif inspect.isawaitable(result):
            await result

    async def _serve_borrowed(self, link: Link) -> bool:
        """As ``_serve_copied``, in place: one message at a time."""
        self._arm_watch()
        handler = self._handlers["on_message"]
        count = 0
        countdown = _GLANCE
        begin = monotonic()
        try:
            while count < self._batch and not link._over:
                try:
                    taken = link._take_borrow()
                except KucommsError:  # the link is over
                    break
                if taken is None:
                    break
                borrow, message = borrowed_message(taken)
                count += 1
                self._in_handler = True
                self._serving = link
                failed: BaseException | None = None
                try:
                    result = handler(message, link)
                    if result is not None and inspect.isawaitable(result):
                        await result
                except Exception as error:
                    failed = error
                    await self._handler_failed(error, "on_message")
                except asyncio.CancelledError as error:
                    failed = error
                    await self._handler_cancelled(error, "on_message")
                finally:
                    try:
                        end_borrow(link, borrow, message, failed)
                    except BufferError as error:
                        await self._handler_failed(error, "on_message")
                    failed = None  # its traceback leads back here, and to views of the message
                    self._in_handler = False
                    self._serving = None
                countdown -= 1
                if not countdown:
                    countdown = _GLANCE
                    await self._glance(monotonic())
        finally:
            if link._channel.owing:
                self._owing.add(link)
            self._message_calls += count
            self._time_in_handlers += monotonic() - begin
        return count == self._batch

    async def _glance(self, now: float) -> None:
        """Between two messages: ticks that are due, and the loop's other tasks."""
        if now >= self._scheduler.next_deadline:
            await self._run_ticks()
        if now - self._held_since > _HOLD:
            await self._give_way()

    async def _give_way(self) -> None:
        """Let the loop's other tasks have their turn."""
        in_handler, self._in_handler = self._in_handler, False
        await asyncio.sleep(0)
        self._in_handler = in_handler
        self._held_since = monotonic()
        if self._borrowing:
            self._arm_watch()

    async def _run_ticks(self, again: bool = False) -> None:
        """Run the tick handlers that are due, and the work handler when it asked."""
        due = self._scheduler.due(monotonic())
        if due or again:
            if again or "on_work" in due:
                self._work_again = False
                self._work_calls += 1
                self._work_again = (await self._call("on_work")) is True
            if "on_timer" in due and not self._stopping:
                self._timer_calls += 1
                await self._call("on_timer", self._loop.time())

    async def _handle_event(self, kind: str, link: Link, error: KucommsError | None) -> None:
        if kind == "on_link_open":
            await self._call(kind, link)
            link._opened = True
            self._unopened.pop(link, None)
            if self._has_message_handler and not link._over:
                self._make_ready(link)
        else:
            await self._call(kind, link, error)

    async def _call(self, kind: str, *arguments: Any) -> Any:
        """Call a handler, if there is one; what it raises goes to on_error."""
        handler = self._handlers.get(kind)
        if handler is None:
            return None
        begin = monotonic()
        in_handler, self._in_handler = self._in_handler, True
        try:
            result = handler(*arguments)
            if inspect.isawaitable(result):
                self._arm_watch()
                result = await result
            return result
        except Exception as error:
            await self._handler_failed(error, kind)
        except asyncio.CancelledError as error:
            await self._handler_cancelled(error, kind)
        finally:
            self._in_handler = in_handler
            self._time_in_handlers += monotonic() - begin
        return None

    async def _handler_failed(self, error: BaseException, kind: str) -> None:
        self._handler_errors += 1
        report = self._handlers.get("on_error")
        if report is not None:
            try:
                result = report(error, kind)
                if inspect.isawaitable(result):
                    self._arm_watch()
                    await result
                return
            except asyncio.CancelledError:
                assert self._runner is not None
                if self._stopping:
                    self._runner.uncancel()
                elif self._runner.cancelling():
                    raise
            except Exception as second:
                self._log_failure(second, "on_error")
        self._log_failure(error, kind)

    def _log_failure(self, error: BaseException, kind: str) -> None:
        """Log it, with a traceback unless there was one a moment ago."""
        tracebacks = self._tracebacks.setdefault(kind, LogLimit())
        if not tracebacks.due():
            _log.error("handler_failed", endpoint=self.name, handler=kind, error=repr(error))
            return
        _log.error("handler_failed", endpoint=self.name, handler=kind, exc_info=error)
        tracebacks.logged()

    async def _handler_cancelled(self, error: asyncio.CancelledError, kind: str) -> None:
        """Tell whether we cancelled the handler, somebody the runner, or it is its own."""
        assert self._runner is not None
        if self._stopping:
            self._runner.uncancel()
        elif self._runner.cancelling():
            raise error
        else:
            await self._handler_failed(error, kind)

    # ---- sleeping and waking ------------------------------------------------

    def _park(self) -> bool:
        """Have the peers of drained links ring. Whether something has come meanwhile."""
        if self._owing:
            self._tell_of_space()
        drained, self._drained = self._drained, {}
        for link in drained:
            if link._over or link._inbox or link._channel.park_receive():
                self._ready.append(link)
            else:
                link._queued = False
        return bool(self._ready or self._events)

    async def _sleep_until_woken(self) -> None:
        """Sleep until something wakes us or a tick is due."""
        deadline = self._scheduler.next_deadline
        self._sleep = self._loop.create_future()
        self._tick_is_due = False
        timer = None
        begin = monotonic()
        if deadline != math.inf:
            # asyncio and uvloop round to milliseconds; up, so as not to wake too early
            delay = math.ceil(max(deadline - begin, 0.0) * 1000) / 1000
            timer = self._loop.call_later(delay, self._wake_for_tick)
        try:
            await self._sleep
        finally:
            self._sleep = None
            if timer is not None:
                timer.cancel()
        self._held_since = monotonic()
        self._wakeups += 1
        if not self._tick_is_due:
            self._polling.slept(self._held_since - begin)

    def _wake_for_tick(self) -> None:
        self._tick_is_due = True
        self._wake()

    def _wake(self) -> None:
        if self._sleep is not None and not self._sleep.done():
            self._sleep.set_result(None)

    def _make_ready(self, link: Link) -> None:
        """Have the runner look at this link."""
        if link._opened and not link._queued:
            link._queued = True
            self._ready.append(link)
            self._wake()
        elif link in self._drained:
            del self._drained[link]
            self._ready.append(link)
        if self._in_handler and not link._over:
            link._pump()

    async def _poll(self) -> bool:
        """Spin for a while before parking. Whether there is something to do."""
        polling = self._polling
        if not polling.budget or not self._drained:
            return False
        polled = [link for link in self._drained if link._can_be_polled][-_POLL_LINKS:]
        if not polled:
            return False
        if self._owing:
            self._tell_of_space()
        await self._give_way()
        budget = polling.budget
        if self._scheduler.next_deadline != math.inf:
            until_tick = self._scheduler.next_deadline - self._held_since
            budget = min(budget, int(until_tick * 1e9))
        if self._has_to_do(polled) or budget <= 0 or not await self._spin(polled, budget):
            return self._has_to_do(polled)
        self._ready.extend(self._drained)
        self._drained.clear()
        return True

    async def _spin(self, links: list[Link], budget: int) -> bool:
        """Poll ``links`` for ``budget`` nanoseconds. Whether one of them has something.

        The loop has a turn after each slice; what it brings to do ends the polling as well.
        """
        channels = [link._channel for link in links]
        self._is_polling = True
        try:
            spent = _core.poll(channels, min(budget, _POLL_BRIEFLY))
            left = budget - abs(spent)
            while spent < 0 < left and not self._has_to_do(links):
                await asyncio.sleep(0)
                self._held_since = monotonic()
                spent = _core.poll(channels, min(left, _POLL_SLICE))
                left -= abs(spent)
        finally:
            self._is_polling = False
        if spent >= 0:
            self._polling.hit(budget - left)
        elif left <= 0:
            self._polling.missed(budget - left)
        else:  # there was something better to do
            self._polling.spun(0, budget - left)
        for link in links:
            if spent >= 0:
                link._polls_hit += 1
            else:
                link._polls_missed += 1
        return spent >= 0

    def _has_to_do(self, links: list[Link]) -> bool:
        """Whether the loop's turn has brought the runner something better than polling."""
        return bool(self._ready or self._events or self._stopping) or any(
            link._peer_gone for link in links
        )

    async def _poll_for(self, link: Link) -> bool:
        """For a task that is about to wait for a message of ``link``: as ``_poll``."""
        if not self._polling.budget or self._is_polling or not link._can_be_polled:
            return False
        if self._has_polled:
            return False
        hit = await self._spin([link], self._polling.budget)
        if not hit:  # once in a turn of the loop is enough for all tasks together
            self._has_polled = True
            self._loop.call_soon(self._may_poll)
        return hit

    def _may_poll(self) -> None:
        self._has_polled = False

    def _owes(self, link: Link) -> None:
        """A task has released lazily: whoever waits is told in the loop's next turn."""
        if link._channel.owing and link not in self._owing:
            self._owing.add(link)
            self._loop.call_soon(self._tell_of_space)

    def _tell_of_space(self) -> None:
        """Ring for those who wait for space and were let sleep while there was little."""
        owing, self._owing = self._owing, set()
        for link in owing:
            link._channel.wake_producer()

    def _arm_watch(self) -> None:
        """Have ``_watch`` called as soon as the runner gives way to the loop."""
        if not self._watching:
            self._watching = True
            self._loop.call_soon(self._watch)

    def _watch(self) -> None:
        self._watching = False
        if self._in_handler:
            self._keep_draining()

    def _keep_draining(self, waits_for: Link | None = None) -> None:
        """A handler waits: take what has arrived into the backlog, and ask for doorbells.

        The links that are neither ready, nor being served, nor new, nor the one that the
        handler waits for, have been parked before and will ring. Without a message handler
        only that one is looked at, as for a task.
        """
        self._backlog_is_full = False
        if not self._has_message_handler:
            if waits_for is not None:
                waits_for._rearm()
            return
        if self._serving is not None and self._serving._channel.owing:
            self._owing.add(self._serving)
        if self._owing:
            self._tell_of_space()
        self._ready.extend(self._drained)  # to be looked at again: what comes is in the inbox
        self._drained.clear()
        for link in {self._serving, waits_for, *self._ready, *self._unopened}:
            if link is not None and not link._over:
                if link._opened and not link._queued:
                    link._queued = True
                    self._ready.append(link)
                link._pump()

    def _backlog_filled(self, link: Link) -> None:
        """The backlog has no room for what this link's ring holds."""
        self._starved[link] = None
        self._backlog_is_full = True
        waiting, self._handler_waits = self._handler_waits, set()
        for fail in waiting:
            fail(
                QueueFull(
                    f"endpoint {self.name!r}: a handler waits to send or for a reply, and the "
                    f"backlog of {self._backlog_limit} bytes for what arrives meanwhile is full; "
                    "make it larger, or wait in a task instead of a handler"
                )
            )

    def _backlog_eased(self) -> None:
        """Something was taken out of a backlog that was full."""
        self._backlog_is_full = False
        starved, self._starved = self._starved, {}
        for link in starved:
            self._loop.call_soon(link._rearm)

    def _is_handler(self) -> bool:
        """Whether the caller is the handler that is running, or a task that one made."""
        return self._in_handler and _running_for.get() is self

    async def _breathe(self) -> None:
        """Let the loop have a turn when it has had none for a while.

        For what never waits because there always is something: a task that receives
        from a peer that floods, or sends to one that keeps up.
        """
        now = monotonic()
        if not self._turn_asked:
            self._turn_asked = now
            self._loop.call_soon(self._had_turn)
        elif now - self._turn_asked > _HOLD:
            await asyncio.sleep(0)

    def _had_turn(self) -> None:
        self._turn_asked = 0.0

    # ---- errors -------------------------------------------------------------

    def _check_thread(self) -> None:
        if os.getpid() != self._pid:
            raise UsageError(
                f"endpoint {self.name!r} was started before a fork and cannot be used in the "
                "child; make a new one there"
            )
        if threading.get_ident() != self._thread:
            raise UsageError(
                f"endpoint {self.name!r} belongs to the thread of its loop; use "
                "loop.call_soon_threadsafe, or link.send_threadsafe to send"
            )

    def _check_started(self) -> None:
        if self._stopping:
            raise self._closed_error()
        if self._runner is None:
            raise UsageError(
                f"endpoint {self.name!r} is not running; use it inside 'async with endpoint:'"
            )
        self._check_thread()

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"endpoint {self.name!r} is closed; make a new one")


@coroutine
def _go_on(started: CoroutineType[Any, Any, Any], yielded: Any) -> Generator[Any, Any, Any]:
    """Await a coroutine that was started elsewhere, where it has yielded something."""
    while True:
        try:
            value = yield yielded
        except GeneratorExit:
            started.close()
            raise
        except BaseException as error:
            step = partial(started.throw, error)
        else:
            step = partial(started.send, value)
        try:
            yielded = step()
        except StopIteration as end:
            return end.value


def _decline(connection: Connection) -> None:
    """Close in order what no link is made of any more."""
    connection.channel.attach(connection.ring)
    connection.channel.stop_sending(_core.STATE_CLOSED)
    connection.close()
    connection.channel.unmap()


def _check_hello(hello: bytes) -> bytes:
    limit = _core.lib.KUCOMMS_HELLO_MAX
    if len(hello) > limit:
        raise ValueError(f"hello may have {limit} bytes, not {len(hello)}")
    return bytes(hello)


class Connecting(Once[Link]):
    """What ``kucomms.connect`` returns: to be awaited, or entered, once."""

    def __init__(self, url: str, endpoint_options: dict[str, Any], options: dict[str, Any]) -> None:
        self._url = url
        self._options = options
        self._endpoint = Endpoint(url, **endpoint_options)

    async def _open(self) -> Link:
        endpoint = self._endpoint
        await endpoint.__aenter__()
        try:
            link = await endpoint.connect(self._url, **self._options)
        except BaseException:
            await endpoint.aclose()
            raise
        endpoint._ends_with_its_link = True
        return link

    async def _close(self, opened: Link) -> None:
        await self._endpoint.aclose()


def connect(
    url: str,
    *,
    ring_size: int | None = None,
    timeout: float | None = None,
    hello: bytes = b"",
    owner: int | None = None,
    backlog: int = 1 << 20,
    busy_poll: float = BUSY_POLL,
) -> Connecting:
    """Connect to ``url`` without an endpoint of your own; messages are awaited.

    ``async with kucomms.connect(url) as link:`` closes the link at the end of the
    block; ``link = await kucomms.connect(url)`` leaves that to ``link.aclose()``.
    Arguments and errors are those of ``Endpoint.connect``; ``backlog`` and
    ``busy_poll`` those of ``Endpoint``.
    """
    return Connecting(
        url,
        {"backlog": backlog, "busy_poll": busy_poll},
        {"ring_size": ring_size, "timeout": timeout, "hello": hello, "owner": owner},
    )


