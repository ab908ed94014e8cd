# SPDX-License-Identifier: MIT
"""Link: one of an endpoint's connections to a peer."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from kucomms import _core
from kucomms._core import (
    CARRIED_MAX,
    CLOSED,
    EMPTY,
    FLAG_REPLY,
    FORKED,
    FULL,
    HEADER_SIZE,
    MORE,
    NO_TOKEN,
    OK,
    OUT_OF_TURN,
    PAUSE,
    PROTOCOL,
    STATE_CLOSED,
    STATE_OPEN,
    STATE_SHUTDOWN,
    TOO_LARGE,
    TOO_MANY_LOANS,
    WRONG_THREAD,
)
from kucomms._link_pools import CARRIED_SIZE, LinkPools, as_buffers
from kucomms._queue import TaskTicket, ThreadTicket, Ticket
from kucomms.exceptions import (
    ClosedError,
    HeaderValueError,
    KucommsError,
    MessageTooLargeError,
    OutOfTurnError,
    PeerClosedError,
    ProtocolError,
    QueueEmpty,
    QueueFull,
    ShutdownError,
    TransportError,
    UsageError,
)
from kucomms.message import Message
from kucomms.pool import Opening
from kucomms.statistics import LinkStatistics
from kucomms.zero_copy import Borrowed, Loan

if TYPE_CHECKING:
    from kucomms._pool_memory import PoolMemory
    from kucomms.endpoint import Endpoint
    from kucomms.pool import Buffer
    from kucomms.transports.base import Connection, Peer

__all__ = ["Link"]

T = TypeVar("T")
_Send = Callable[[Any, int | None, int | None, int | None], int]

_FILL, _FILL_BYTES = 128, 1 << 16
"""Messages and bytes that are taken from the ring at once for tasks that await them."""
_LOOP_WATCH = 0.5
"""Seconds after which a thread that waits looks whether the loop is closed: nothing tells it."""
_IDLE_ROUNDS = 16
"""Looks into the ring, between two turns of the loop, that find no message for the backlog."""


class Link:
    """A two-way connection to one peer.

    Made by ``Endpoint.connect``, by ``kucomms.connect``, or by a listener of an
    endpoint, never directly. Messages arrive in order, each whole, each once.

    All methods but ``send_threadsafe`` and ``receive_threadsafe`` belong to the thread of the
    endpoint's loop; others get ``UsageError`` there. After a fork the child cannot use it.

    What sending methods share: ``data`` is bytes-like (else ``TypeError``) or a
    ``Message``, whose header the given keywords override; ``type``, ``id`` and
    ``user_value`` are unsigned 64-bit integers, 0 when not given (else
    ``HeaderValueError``). They raise ``MessageTooLargeError`` for more than
    ``max_message_size`` bytes, ``ClosedError`` after ``aclose``, ``PeerClosedError``
    when the peer has closed or died, ``ProtocolError`` when it broke the rules. When
    they raise, nothing was sent.

    On a link with turns (``turns``) only one side may send. Its message passes the turn to
    the other side, as a ``Token`` does when there is nothing to say; ``OutOfTurnError`` for
    who sends without having it. The side that connects begins. The turn comes with a message
    when that is received, not when it arrives: so whether this side may send (``has_turn``)
    depends on nothing but what it has received.

    ``buffers``: one or up to 255 of pools of this link, its own or the peer's, that are
    handed to the peer with the message: they are gone here once it is sent, and the peer
    frees them, or hands them back. Not sent, and nothing handed over, with ``UsageError``
    for buffers that were freed, are of another pool or link, twice among them, or have a
    transfer under way; with ``BufferError`` when a view of one is alive. ``buffer.data`` is
    released by trying: a ``view = buffer.data`` from before is over, also when there was no
    room, and ``buffer.data`` gives another one.
    """

    def __init__(self, endpoint: Endpoint, connection: Connection) -> None:
        # No more than 29 attributes: with one more, Python 3.11 keeps them in a dictionary of
        # each link's own, and receiving takes a seventh longer.
        self._endpoint = endpoint
        self._connection = connection
        self._channel = connection.channel
        self._channel_send = connection.channel.send
        self._channel_send_paced = connection.channel.send_paced
        self._url = connection.url
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._opened = False
        self._send_queue: deque[Ticket] = deque()
        self._receive_queue: deque[TaskTicket] = deque()
        # taken out of the ring, not yet handed out; older than all in the ring
        self._inbox: deque[Message] = deque()
        # what the endpoint's backlog counts of it, which is not the first so many: they
        # were taken out for a task that awaits them, a few at a time
        self._inbox_bytes = 0
        self._uncounted = 0
        self._requests: dict[int, asyncio.Future[Message]] = {}
        if self._channel.turns:  # who came too late for a reply still has to get the turn
            self._channel.expect(self._requests)
        self._next_id = 0
        # for the endpoint: whether it is in its list of links to look at
        self._queued = False
        self._peer_gone = False
        self._looks_later = False
        self._over = False
        self._closed_here = False
        self._error: KucommsError | None = None
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._doorbells_heard = 0
        self._late_replies = 0
        self._backlog_high_water = 0
        # whether a message may come while we spin
        self._can_be_polled = connection.pollable
        self._polls_hit = 0
        self._polls_missed = 0

    def __repr__(self) -> str:
        state = "closed" if self._over else "peer gone" if self._peer_gone else "open"
        return f"<Link {self._url} {state}>"

    # ---- what it is ---------------------------------------------------------

    @property
    def url(self) -> str:
        """The URL that was listened at or connected to."""
        return self._url

    @property
    def peer(self) -> Peer:
        """Who is at the other side."""
        return self._connection.peer

    @property
    def channel_number(self) -> int | None:
        """Which of the kernel endpoint's numbered channels it is; None when it has no number."""
        return self._connection.peer.channel

    @property
    def ring_size(self) -> int:
        """Bytes of each direction's ring."""
        return self._channel.ring_size

    @property
    def max_message_size(self) -> int:
        """Bytes of the largest message."""
        return _core.max_message_size(self._channel.ring_size)

    @property
    def turns(self) -> bool:
        """Whether only one side may send at a time; the listening side has decided."""
        return self._channel.turns

    @property
    def has_turn(self) -> bool:
        """Whether this side may send: it has the turn, or the link has no turns."""
        return self._channel.has_turn

    @property
    def closed(self) -> bool:
        """Whether nothing more can be sent or received.

        True after ``aclose``, and after the peer has gone and all that it sent was
        received.
        """
        return self._over

    @property
    def tx_avail(self) -> int:
        """Bytes, headers included, that were sent and that the peer has not read yet."""
        return self._channel.tx_avail

    @property
    def tx_free(self) -> int:
        """Bytes, 32 of header for each message included, that can be sent at once now."""
        return self._channel.tx_free

    @property
    def rx_avail(self) -> int:
        """Bytes, headers included, that have arrived and were not received yet."""
        uncounted = islice(self._inbox, self._uncounted)
        return self._channel.rx_avail + self._inbox_bytes + _bytes_of(uncounted)

    @property
    def rx_free(self) -> int:
        """Bytes of the ring in which the peer sends that are free."""
        return self._channel.ring_size - self._channel.rx_avail if not self._over else 0

    def statistics(self) -> LinkStatistics:
        """The counts of this link; still there after it is closed."""
        (sent, sent_bytes, received, received_bytes, full, rung, suppressed, errors, tx_high,
         rx_high) = self._channel.counters()
        return LinkStatistics(
            messages_sent=sent,
            bytes_sent=sent_bytes,
            messages_received=received,
            bytes_received=received_bytes,
            full_waits=full,
            doorbells_rung=rung,
            doorbells_suppressed=suppressed,
            doorbells_heard=self._doorbells_heard,
            polls_hit=self._polls_hit + self._channel.polls_hit,
            polls_missed=self._polls_missed,
            protocol_errors=max(errors, int(isinstance(self._error, ProtocolError))),
            late_replies=self._late_replies,
            tx_high_water=tx_high,
            rx_high_water=rx_high,
            backlog_high_water=self._backlog_high_water,
        )

    # ---- sending ------------------------------------------------------------

    async def send(
        self,
        data: Any,
        *,
        type: int | None = None,
        id: int | None = None,
        user_value: int | None = None,
        buffers: Buffer | Sequence[Buffer] | None = None,
    ) -> None:
        """Send a message; wait while the ring is full.

        Tasks are served first come, first served. Cancelled means not sent. In a
        handler it raises ``QueueFull`` when the endpoint's backlog is full as well:
        else two endpoints that wait for each other would wait for ever.
        """
        if buffers is not None:
            await self._send_carrying(data, type, id, user_value, buffers, 0)
            return
        if not self._send_queue:
            try:
                status = self._channel_send_paced(data, type, id, user_value)
                if status == OK:
                    return
                if status == PAUSE:
                    await self._endpoint._breathe()
                    status = FULL
                    if not self._send_queue:
                        status = self._channel_send(data, type, id, user_value)
                    if status == OK:
                        return
            except (TypeError, OverflowError, BufferError) as error:
                raise self._bad_argument(error) from None
            if status != FULL:
                raise self._send_error(status, data)
        await self._send_when_room(self._channel_send, data, type, id, user_value)

    def send_nowait(
        self,
        data: Any,
        *,
        type: int | None = None,
        id: int | None = None,
        user_value: int | None = None,
        buffers: Buffer | Sequence[Buffer] | None = None,
    ) -> None:
        """Send a message now. Raises ``QueueFull``, also while others wait in ``send``."""
        send = self._channel_send
        if buffers is not None:
            send, _ = self._carrier(buffers, 0, send)
        if self._send_queue:
            self._check_thread()
            raise self._send_error(FULL, data)
        try:
            status = send(data, type, id, user_value)
        except (TypeError, OverflowError, BufferError) as error:
            raise self._bad_argument(error) from None
        if status != OK:
            raise self._send_error(status, data)

    def send_threadsafe(
        self,
        data: Any,
        *,
        type: int | None = None,
        id: int | None = None,
        user_value: int | None = None,
        timeout: float | None = None,
    ) -> None:
        """Send a message from any thread; block while the ring is full.

        Waits in the same queue as ``send``. After ``timeout`` seconds it raises
        ``QueueFull``, and nothing was sent; None waits for ever, or until the loop is
        closed (``ClosedError``). In the thread of the endpoint's loop, where waiting would
        stop what it waits for, it raises ``UsageError`` instead of waiting.
        """
        send = self._channel.send_threadsafe
        status = FULL
        if not self._send_queue:
            try:
                status = send(data, type, id, user_value)
            except (TypeError, OverflowError, BufferError) as error:
                raise self._bad_argument(error) from None
        if status == OK:
            return
        if status != FULL or self._channel.forked:
            raise self._send_error(status, data)
        if threading.get_ident() == self._thread:
            raise UsageError(
                f"{self._url}: the ring is full, and this is the thread of the endpoint's loop, "
                "which must not block; use 'await link.send(...)' here"
            )
        deadline = None if timeout is None else monotonic() + timeout
        size = _size_of(data)
        ticket = ThreadTicket()
        self._send_queue.append(ticket)
        try:
            while True:
                ticket.rest()
                if self._send_queue[0] is ticket:
                    try:
                        status = send(data, type, id, user_value)
                    except (TypeError, OverflowError, BufferError) as error:
                        raise self._bad_argument(error) from None
                    if status == OK:
                        return
                    if status != FULL:
                        raise self._send_error(status, data)
                    if self._channel.park_send(size):
                        continue
                pause = _pause_before(deadline)
                if pause <= 0:
                    raise QueueFull(
                        f"{self._url}: no room in the ring for {timeout} s; the peer does not "
                        "read fast enough"
                    )
                if not ticket.wait(pause) and self._loop.is_closed():
                    raise self._loop_over_error()
        finally:
            self._leave_send_queue(ticket)

    async def send_many(self, messages: Iterable[Any]) -> int:
        """Send messages (each a ``Message`` or bytes-like) in order, in few steps.

        Waits while the ring is full; returns how many were sent, which is all of them.
        When it raises or is cancelled, a prefix of them was sent.
        """
        batch = messages if isinstance(messages, list | tuple) else list(messages)
        await self._endpoint._breathe()
        sent = 0
        if not self._send_queue:
            sent = self._send_some(batch, 0)
        if sent < len(batch):
            ticket = TaskTicket()
            self._send_queue.append(ticket)
            try:
                while True:
                    if self._send_queue[0] is ticket:
                        sent += self._send_some(batch, sent)
                        if sent == len(batch):
                            break
                        if self._channel.park_send(_size_of(batch[sent])):
                            continue
                    await self._wait_in_send_queue(ticket)
            finally:
                self._leave_send_queue(ticket)
        return sent

    def send_many_nowait(self, messages: Iterable[Any]) -> int:
        """Send as many as there is room for now; returns how many, 0 when full."""
        if self._send_queue:
            self._check_thread()
            return 0
        batch = messages if isinstance(messages, list | tuple) else list(messages)
        return self._send_some(batch, 0)

    def _send_some(self, batch: list[Any] | tuple[Any, ...], start: int) -> int:
        """Send from batch[start] on until the ring is full."""
        count = start
        while count < len(batch):
            try:
                sent, status = self._channel.send_many(batch, count)
            except (TypeError, OverflowError, BufferError) as error:
                raise self._bad_argument(error) from None
            count += sent
            if status == FULL:
                break
            if status != OK:
                raise self._send_error(status, batch[count])
        return count - start

    def loan(
        self,
        size: int,
        *,
        type: int | None = None,
        id: int | None = None,
        user_value: int | None = None,
    ) -> Loan:
        """Zero-copy send: ``with link.loan(size) as loan: loan.data[:] = ...``.

        ``loan.data`` is a writable memoryview of ``size`` bytes in the ring, not
        cleared. Leaving the block sends the message; an exception discards it.
        Raises ``QueueFull`` when there is no room, others wait in ``send``, or 64 loans
        are out. A slice that survives the block raises ``BufferError`` at its end, and
        the message is discarded. The peer sees messages in the order of the loans, and
        nothing that comes after an unfinished one.
        """
        return Loan(self, size, type, id, user_value)

    def _reserve(
        self, size: int, type: int | None, id: int | None, user_value: int | None
    ) -> _core.Reservation:
        if self._send_queue:
            self._check_thread()
            raise self._send_error(FULL, None)
        try:
            reservation = self._channel.reserve(size, type, id, user_value)
        except (TypeError, OverflowError) as error:
            raise self._bad_argument(error) from None
        if isinstance(reservation, int):
            raise self._send_error(reservation, None, size)
        return reservation

    async def _send_when_room(
        self,
        send: _Send,
        data: Any,
        type: int | None,
        id: int | None,
        user_value: int | None,
        more: int = 0,
    ) -> None:
        """Queue up and ``send`` as soon as there is room; ``more``: bytes beside the data."""
        ticket = TaskTicket()
        self._send_queue.append(ticket)
        try:
            while True:
                if self._send_queue[0] is ticket:
                    try:
                        status = send(data, type, id, user_value)
                    except (TypeError, OverflowError, BufferError) as error:
                        raise self._bad_argument(error) from None
                    if status == OK:
                        return
                    if status != FULL:
                        raise self._send_error(status, data)
                    if self._channel.park_send(_size_of(data) + more):
                        continue
                elif self._cannot_send():
                    raise self._closed_error()
                await self._wait_in_send_queue(ticket)
        finally:
            self._leave_send_queue(ticket)

    async def _send_carrying(
        self,
        data: Any,
        type: int | None,
        id: int | None,
        user_value: int | None,
        buffers: Buffer | Sequence[Buffer],
        flags: int,
    ) -> None:
        plain = self._channel.send_reply if flags else self._channel_send
        send, more = self._carrier(buffers, flags, plain)
        if self._connection.pools is not None and self._connection.pools.paces():
            await self._endpoint._breathe()
        if not self._send_queue:
            try:
                status = send(data, type, id, user_value)
            except (TypeError, OverflowError, BufferError) as error:
                raise self._bad_argument(error) from None
            if status == OK:
                return
            if status != FULL:
                raise self._send_error(status, data)
        await self._send_when_room(send, data, type, id, user_value, more)

    def _carrier(
        self, buffers: Buffer | Sequence[Buffer], flags: int, plain: _Send
    ) -> tuple[_Send, int]:
        """What sends these buffers with a message, and the bytes that they take in it."""
        self._check_thread()
        given = as_buffers(buffers)
        if not given:
            return plain, 0
        if self._cannot_send():
            raise self._closed_error()
        if len(given) > CARRIED_MAX:
            raise UsageError(
                f"{self._url}: a message hands over {CARRIED_MAX} buffers at most, not "
                f"{len(given)}; send several"
            )
        if not self._connection.carries_buffers:
            raise UsageError(
                f"{self._url}: buffers cannot be handed over this link; that takes inproc://, "
                "kernel:// to an endpoint with KUCOMMS_POOLS, or shm:// with a Python program of "
                "the same user"
            )
        return partial(self._link_pools().send, given, flags), CARRIED_SIZE * len(given)

    async def _wait_in_send_queue(self, ticket: TaskTicket) -> None:
        self._check_thread()
        endpoint = self._endpoint
        if not endpoint._is_handler():
            await ticket.wait()
            return
        # A handler waits: nobody else takes messages out of the rings meanwhile.
        endpoint._keep_draining(self)
        if self._cannot_send():
            return
        if endpoint._backlog_is_full:
            raise self._backlog_error()
        endpoint._handler_waits.add(ticket.fail)
        try:
            await ticket.wait()
        finally:
            endpoint._handler_waits.discard(ticket.fail)

    def _leave_send_queue(self, ticket: Ticket) -> None:
        self._send_queue.remove(ticket)
        if not self._send_queue:
            self._channel.unpark_send()
        self._wake_first_sender()

    def _wake_first_sender(self) -> None:
        """Have the head of the queue try again; from any thread."""
        try:
            head = self._send_queue[0]
        except IndexError:
            return
        if isinstance(head, ThreadTicket) or threading.get_ident() == self._thread:
            head.wake()
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(head.wake)

    # ---- receiving ----------------------------------------------------------

    async def receive(self) -> Message:
        """The next message; waits for one.

        For links without a message handler (else ``UsageError``). Tasks are served
        first come, first served; cancelling loses nothing. When the peer is gone: what
        it committed first, then ``PeerClosedError``.
        """
        self._check_receive()
        if not self._receive_queue:
            if self._uncounted:
                self._uncounted -= 1
                return self._inbox.popleft()
            if not self._inbox:
                await self._endpoint._breathe()
        if not self._receive_queue:
            message = self._take()
            if message is not None:
                return message
        return await self._wait_for(self._take)

    def receive_nowait(self) -> Message:
        """The next message. Raises ``QueueEmpty``, also while others wait in ``receive``."""
        self._check_receive()
        message = None if self._receive_queue else self._take()
        if message is None:
            raise QueueEmpty(f"{self._url}: no message is waiting; 'await link.receive()' waits")
        return message

    def receive_threadsafe(self, timeout: float | None = None) -> Message:
        """The next message, for any thread but that of the endpoint's loop; block for it.

        Waits in the same queue as ``receive``, with whose errors it may end. After
        ``timeout`` seconds it raises ``QueueEmpty``, and no message is lost; None waits for
        ever, 0 only looks. Each call takes two turns between threads, so tens of
        microseconds. ``ClosedError`` when the loop ends meanwhile.
        """
        if self._channel.forked:
            raise self._send_error(FORKED, None)
        if threading.get_ident() == self._thread:
            raise UsageError(
                f"{self._url}: this is the thread of the endpoint's loop, which must not block; "
                "use 'await link.receive()' here"
            )
        deadline = None if timeout is None else monotonic() + timeout
        wanted = _Wanted()
        receiving = self._receive_wanted(wanted, waits=timeout is None or timeout > 0)
        try:
            future = asyncio.run_coroutine_threadsafe(receiving, self._loop)
        except RuntimeError:
            receiving.close()
            raise self._loop_over_error() from None
        try:
            while True:
                pause = _pause_before(deadline)
                if pause <= 0 and timeout == 0 and self._loop.is_running():
                    pause = _LOOP_WATCH  # it has not looked yet
                done, _ = concurrent.futures.wait([future], max(pause, 0))
                if done:
                    break
                if self._loop.is_closed():
                    raise self._loop_over_error()
                if pause <= 0:
                    break
        finally:
            message = wanted.give_up()
            future.cancel()
        if message is None and done:
            try:
                future.result()
            except concurrent.futures.CancelledError:
                raise self._loop_over_error() from None
        if message is None:
            raise QueueEmpty(
                f"{self._url}: no message for {timeout} s; the peer has sent none, or others "
                "receive here, too"
            )
        return message

    async def _receive_wanted(self, wanted: _Wanted, *, waits: bool) -> None:
        def take() -> Message | None:
            return wanted.take(self._take)

        self._check_receive()
        if (self._receive_queue or take() is None) and waits:
            await self._wait_for(take)

    def __aiter__(self) -> AsyncIterator[Message]:
        """Each message as it comes; ends when the link was closed in order."""
        return self

    async def __anext__(self) -> Message:
        """See ``__aiter__``."""
        try:
            return await self.receive()
        except (PeerClosedError, ClosedError):
            if self._error is None:
                raise StopAsyncIteration from None
            raise

    def borrow(self) -> Borrowed:
        """Zero-copy receive: ``async with link.borrow() as message: ...``.

        As ``receive``, but ``message.data`` is a read-only memoryview into the ring,
        which a hostile peer can change under it. It is released at the end of the
        block; a slice that survives raises ``BufferError`` there, and the bytes stay
        taken until it dies.
        """
        self._check_receive()
        return Borrowed(self)

    def _take(self) -> Message | None:
        """The next message if there is one. Raises when none can come any more."""
        if not self._inbox and not self._peer_gone:
            self._fill()
            self._rearm()
        if self._inbox:
            return self._take_from_inbox()
        self._raise_if_ended()
        return None

    def _take_from_inbox(self) -> Message:
        message = self._inbox.popleft()
        if self._uncounted:
            self._uncounted -= 1
            return message
        span = len(message.data) + HEADER_SIZE
        self._inbox_bytes -= span
        self._endpoint._backlog_used -= span
        self._channel.take_turn()  # with turns, of which there is one message at most
        if self._endpoint._starved:
            self._endpoint._backlog_eased()
        return message

    def _take_batch(self, limit: int) -> list[Message]:
        """Up to so many messages from the inbox, in a new list."""
        batch: list[Message] = []
        while self._inbox and len(batch) < limit:
            batch.append(self._take_from_inbox())
        return batch

    def _fill(self) -> bool:
        """Move some messages from the ring into the inbox; whether there was anything."""
        messages: list[Message] = []
        replies: list[Message] = []
        status = self._channel.receive(_FILL, _FILL_BYTES, messages, replies, True)
        if not self._inbox and not self._channel.turns:
            self._inbox.extend(messages)
            self._uncounted = len(messages)
        elif messages:
            self._add_to_inbox(messages)
        if replies:
            self._resolve(replies)
        if status not in (OK, MORE):
            self._receive_failed(status)
            return False
        return bool(messages or replies) or status == MORE

    def _take_borrow(self) -> _core.Borrow | Message | None:
        for _ in range(_FILL):  # replies that nobody has asked for can come without end
            if self._inbox:
                return self._take_from_inbox()
            self._raise_if_ended()
            borrow = self._channel.borrow()
            if isinstance(borrow, int):
                if borrow not in (EMPTY, CLOSED):
                    self._receive_failed(borrow)
                self._raise_if_ended()
                return None
            if isinstance(borrow, Message):
                self._rearm()
                return borrow
            if not borrow.flags & FLAG_REPLY:
                self._rearm()
                return borrow
            data = memoryview(borrow)
            reply = Message(bytes(data), borrow.type, borrow.id, borrow.user_value)
            data.release()
            borrow.release()
            self._resolve([reply])
        return None

    async def _wait_for(self, take: Callable[[], T | None]) -> T:
        ticket = TaskTicket()
        self._receive_queue.append(ticket)
        polled = False
        try:
            while True:
                if self._receive_queue[0] is ticket:
                    result = take()
                    if result is not None:
                        return result
                    if not polled and self._endpoint._polling.budget:
                        polled = True
                        await self._endpoint._poll_for(self)
                        self._check_receive()
                        continue  # whatever has become of the link meanwhile
                    if self._channel.park_receive():
                        # perhaps, over and over, only what has to be skipped
                        await self._endpoint._breathe()
                        self._check_receive()
                        continue
                await self._sleep_for_message(ticket)
                polled = False
        finally:
            self._receive_queue.remove(ticket)
            if self._receive_queue:
                self._receive_queue[0].wake()
            else:
                self._rearm()

    async def _sleep_for_message(self, waitable: TaskTicket) -> None:
        begin = monotonic()
        await waitable.wait()
        self._endpoint._polling.slept(monotonic() - begin)

    def _check_receive(self) -> None:
        status = self._channel.may_receive
        if status in (WRONG_THREAD, FORKED):
            raise self._send_error(status, None)
        if self._endpoint._has_message_handler:
            raise self._handler_error()

    def _refuse_receivers(self) -> None:
        """From now on a message handler gets the messages."""
        for ticket in self._receive_queue:
            ticket.fail(self._handler_error())

    def _handler_error(self) -> UsageError:
        return UsageError(
            f"{self._url}: the endpoint has a message handler, which gets the messages of "
            "all its links; remove the handler, or receive on a kucomms.connect() link"
        )

    def _raise_if_ended(self) -> None:
        if self._peer_gone and not self._inbox:
            self._finish()
        if self._over:
            raise self._closed_error()

    # ---- requests -----------------------------------------------------------

    async def request(
        self,
        data: Any,
        *,
        type: int | None = None,
        id: int | None = None,
        user_value: int | None = None,
        buffers: Buffer | Sequence[Buffer] | None = None,
        timeout: float | None = None,
    ) -> Message:
        """Send a message and wait for the reply to it.

        ``id``: any that is not pending on this link; when not given, one is drawn. The
        peer answers with ``link.reply(message, ...)``, and only that counts as a reply.
        After ``timeout`` seconds (None: never) it raises ``TimeoutError``; a reply that
        comes later is dropped and counted, or, with turns, received as a message, because it
        brings the turn. ``PeerClosedError`` when the peer goes
        without answering. Works inside handlers. Without a message handler it takes
        the messages before the reply into the backlog, for ``receive``; when that is
        full, somebody has to receive before the reply can come.
        """
        self._check_thread()
        if id is None and isinstance(data, Message) and data.id:
            id = data.id
        if id is None:
            id = self._draw_id()
        elif id in self._requests:
            raise UsageError(
                f"{self._url}: a request with id {id} is pending already; leave id out to have "
                "one drawn"
            )
        future: asyncio.Future[Message] = self._loop.create_future()
        self._requests[id] = future
        try:
            async with asyncio.timeout(timeout):
                await self.send(
                    data, type=type, id=id, user_value=user_value, buffers=buffers
                )
                return await self._wait_for_reply(future)
        except TimeoutError as error:
            if isinstance(error, KucommsError):
                raise
            raise TimeoutError(
                f"{self._url}: no reply to request {id} within {timeout} s"
            ) from None
        finally:
            del self._requests[id]

    async def reply(
        self,
        message: Message,
        data: Any,
        *,
        type: int | None = None,
        user_value: int | None = None,
        buffers: Buffer | Sequence[Buffer] | None = None,
    ) -> None:
        """Answer a message that the peer has sent with ``request``.

        ``message`` says which one: the reply has its id, and its type unless another
        is given. A reply to what was no request is dropped there, and counted as late.
        Otherwise as ``send``.
        """
        if type is None:
            type = message.type
        if buffers is not None:
            await self._send_carrying(data, type, message.id, user_value, buffers, FLAG_REPLY)
            return
        if not self._send_queue:
            try:
                status = self._channel.send_reply(data, type, message.id, user_value)
            except (TypeError, OverflowError, BufferError) as error:
                raise self._bad_argument(error) from None
            if status == OK:
                return
            if status != FULL:
                raise self._send_error(status, data)
        await self._send_when_room(self._channel.send_reply, data, type, message.id, user_value)

    def _draw_id(self) -> int:
        while True:
            self._next_id = self._next_id + 1 & 0xFFFFFFFFFFFFFFFF
            if self._next_id and self._next_id not in self._requests:
                return self._next_id

    async def _wait_for_reply(self, future: asyncio.Future[Message]) -> Message:
        endpoint = self._endpoint
        if await endpoint._poll_for(self):
            if endpoint._has_message_handler:
                endpoint._make_ready(self)
            else:
                self._pump(park=False)
            if future.done():
                return future.result()
        begin = monotonic()
        reply = await self._sleep_for_reply(future)
        endpoint._polling.slept(monotonic() - begin)
        return reply

    async def _sleep_for_reply(self, future: asyncio.Future[Message]) -> Message:
        endpoint = self._endpoint
        if endpoint._is_handler():
            endpoint._keep_draining(self)
            if endpoint._backlog_is_full and not future.done():
                raise self._backlog_error()

            def fail(error: BaseException) -> None:
                if not future.done():
                    future.set_exception(error)

            endpoint._handler_waits.add(fail)
            try:
                return await future
            finally:
                endpoint._handler_waits.discard(fail)
        self._rearm()
        return await future

    def _resolve(self, replies: list[Message]) -> None:
        for reply in replies:
            future = self._requests.get(reply.id)
            if future is not None and future.done() and self._channel.turns:
                # given up in this very turn of the loop: for who receives next
                self._add_to_inbox([reply])
                if self._receive_queue:
                    self._receive_queue[0].wake()
            elif future is None or future.done():
                self._late_replies += 1
            else:
                future.set_result(reply)

    # ---- memory -------------------------------------------------------------

    def open_pool(
        self, size: int, *, quota: int | None = None, contiguous: bool = False
    ) -> Opening:
        """As ``kucomms.open_pool``; this pool is closed with the link, if not before.

        Its buffers can be handed to the peer, see ``send``, which maps the pool as well, and
        can write to all of it. That takes a peer that knows how: over inproc:// each does; over
        kernel:// an endpoint with KUCOMMS_POOLS; over shm:// one of the same user, and no C
        program. With others the pool is for transfers only.

        ``contiguous``: in one piece of physical memory, over kernel:// only. ValueError for
        more than 4 MiB.
        """
        self._check_thread()
        most = self._connection.contiguous_max
        if contiguous and not most:
            raise UsageError(
                f"{self._url}: no contiguous memory over this link; only the kernel has it: open "
                "the pool of a kernel:// link, or leave contiguous=True out"
            )
        if contiguous and size > most:
            raise ValueError(
                f"{self._url}: a contiguous pool has {most} bytes at most, not {size}; open several"
            )
        return Opening(size, quota, self, contiguous=contiguous)

    def _link_pools(self) -> LinkPools:
        """The keeper of this link's pools."""
        pools = self._connection.pools
        if pools is None:
            pools = self._connection.pools = LinkPools(self)
        return pools

    def _peer_opened_pool(self, number: int, memory: PoolMemory) -> int:
        return self._link_pools().peer_opened(number, memory)

    def _received_frame(self, *frame: Any) -> Message | bool | None:
        return self._link_pools().received(frame)

    # ---- closing ------------------------------------------------------------

    async def aclose(self) -> None:
        """Close the link in order.

        The peer gets everything that was sent before; this does not wait until it has
        read it. What the peer sent and was not received here is dropped. Twice is fine.
        """
        self._check_thread()
        self._close_here()
        await self._endpoint._pools_closed(self)

    async def wait_closed(self) -> None:
        """Wait until the link is closed, by whichever side; see ``closed``."""
        self._check_thread()
        await asyncio.shield(self._done)

    def _close_here(self) -> None:
        if self._over:
            return
        self._closed_here = True
        if self._endpoint._serving is self:
            self._endpoint._in_hand.clear()
        if not self._peer_gone:
            self._channel.stop_sending(STATE_CLOSED)
        self._finish()

    def _peer_left(self, error: KucommsError | None = None) -> None:
        """The peer is not there any more; what it committed is still to be received."""
        if self._peer_gone or self._over:
            return
        self._peer_gone = True
        self._can_be_polled = False
        state = self._channel.peer_state
        self._channel.finish()
        self._channel.stop_sending(0)
        self._connection.close()
        if error is not None:
            self._error = error
        elif state == STATE_SHUTDOWN:
            self._error = ShutdownError(
                f"{self._url}: the kernel module of the other side is going away; connect again "
                "when it is back"
            )
        elif state not in (STATE_OPEN, STATE_CLOSED):
            self._error = ProtocolError(
                f"{self._url}: the other side says of itself that it is in the unknown state "
                f"{state}; the link was closed"
            )
        elif state != STATE_CLOSED:
            self._error = PeerClosedError(
                f"{self._url}: the process at the other side died or dropped the link without "
                "closing it; connect again when it is back"
            )
        # The rest: after it no request can be answered any more. It comes to an end, for the ring
        # is looked at once more and no further.
        while not self._over and self._fill():
            pass
        self._fail_requests()
        self._wake_senders()
        if self._connection.pools is not None:
            self._connection.pools.peer_left()
        if self._over:
            return
        if self._endpoint._has_message_handler:
            self._endpoint._make_ready(self)
        elif not self._inbox:
            self._finish()
        elif self._receive_queue:
            self._receive_queue[0].wake()

    def _finish(self) -> None:
        """The link is over: nothing can be sent, nothing is left to be received."""
        if self._over:
            return
        self._over = True
        self._peer_gone = True
        self._can_be_polled = False
        self._channel.stop_sending(0)
        self._connection.close()
        self._channel.unmap()
        self._endpoint._backlog_used -= self._inbox_bytes
        self._inbox.clear()
        self._inbox_bytes = self._uncounted = 0
        self._wake_senders()
        for ticket in self._receive_queue:
            ticket.wake()
        self._fail_requests()
        if not self._done.done():
            self._done.set_result(None)
        self._endpoint._link_over(self, self._error)

    def _fail_requests(self) -> None:
        """No reply can come any more."""
        for future in self._requests.values():
            if not future.done():
                future.set_exception(self._closed_error())
                future.exception()  # the request may have been cancelled meanwhile

    def _wake_senders(self) -> None:
        for ticket in list(self._send_queue):
            ticket.wake()

    def _receive_failed(self, status: int) -> None:
        """A status of the channel's receiving side that is not OK."""
        if status == PROTOCOL:
            self._break(
                ProtocolError(
                    f"{self._url}: the other side wrote nonsense into the shared ring; the link "
                    "was closed"
                )
            )
        elif status != CLOSED:
            raise self._send_error(status, None)

    def _break(self, error: KucommsError) -> None:
        """Close the link because the peer broke the rules in what it sends."""
        if self._over:
            return
        if not isinstance(self._error, ProtocolError):
            self._error = error
        self._channel.unmap()  # nothing behind the fault is read, even if it is mended
        if not self._inbox:
            self._finish()
            return
        # what came before the fault can still be received
        self._peer_gone = True
        self._can_be_polled = False
        self._connection.close()
        self._wake_senders()
        self._fail_requests()
        if self._endpoint._has_message_handler:
            self._endpoint._make_ready(self)

    # ---- called by the transport and the endpoint --------------------------

    def _start(self) -> None:
        self._channel.on_room(self._wake_first_sender)
        if self._connection.carries_buffers:
            self._channel.on_frame(self._received_frame)
            self._connection.pool_opened = self._peer_opened_pool
        self._connection.start(self._woken, self._peer_left)

    def _woken(self) -> None:
        """The peer has rung."""
        self._doorbells_heard += 1
        self._look()

    def _look(self) -> None:
        """There may be messages, or room, or the peer has closed."""
        if self._send_queue:
            self._wake_first_sender()
        if self._channel.peer_state:
            self._peer_left()
            return
        endpoint = self._endpoint
        if endpoint._has_message_handler:
            endpoint._make_ready(self)
        elif self._receive_queue:
            self._receive_queue[0].wake()
        else:
            self._rearm()

    def _rearm(self) -> None:
        """Who waits for a reply or for room wants the doorbell, and nobody else asks for it."""
        if self._over or self._endpoint._has_message_handler:
            return
        if self._requests or self._waits_for_room():
            self._pump()

    def _waits_for_room(self) -> bool:
        """Whether somebody waits for what the peer gives back of a pool."""
        pools = self._connection.pools
        return pools is not None and bool(pools.waits)

    def _pump(self, *, park: bool = True, past: bool = False) -> None:
        """Move what has arrived into the backlog, as far as that may grow, and park.

        The backlog bounds messages; after so many rounds without one, the loop has a turn.

        With turns only replies are taken, and a message stays where it is, unless it is in the
        way: ``past``, or when somebody waits for room, what is behind it is looked for.
        """
        looked_again = False
        idle_rounds = 0
        while not self._over:
            if idle_rounds > _IDLE_ROUNDS:
                self._look_later()
                return
            messages: list[Message] = []
            replies: list[Message] = []
            budget = self._endpoint._backlog_limit - self._endpoint._backlog_used
            stays = self._channel.turns and not (past or self._waits_for_room())
            if stays:
                budget = 0
            status = self._channel.receive(64, max(budget, 0), messages, replies, False)
            if messages:
                self._add_to_inbox(messages)
                # Parking again may take back the bell that was rung for its parking.
                if self._receive_queue:
                    self._receive_queue[0].wake()
            if replies:
                self._resolve(replies)
            if status not in (OK, MORE):
                self._receive_failed(status)
                return
            idle_rounds += not messages
            if messages or replies or status == MORE:
                looked_again = False
                continue
            if not park:
                return
            if not self._channel.park_receive():
                if self._channel.peer_starves:  # what a handler has borrowed is in its way
                    self._endpoint._backlog_filled(self)
                return
            if looked_again:  # there is something, and it does not fit
                if not stays:
                    self._endpoint._backlog_filled(self)
                elif self._receive_queue:
                    self._receive_queue[0].wake()
                return
            looked_again = True

    def _look_later(self) -> None:
        """As if the peer had rung, in the loop's next turn."""

        def look() -> None:
            self._looks_later = False
            if not self._over:
                self._look()

        if not self._looks_later:
            self._looks_later = True
            self._loop.call_soon(look)

    def _add_to_inbox(self, messages: list[Message]) -> None:
        self._channel.hold_turn()  # until they are received
        self._inbox.extend(messages)
        size = _bytes_of(messages)
        self._inbox_bytes += size
        self._endpoint._backlog_used += size
        self._backlog_high_water = max(self._backlog_high_water, self._inbox_bytes)

    # ---- errors -------------------------------------------------------------

    def _check_thread(self) -> None:
        if self._channel.forked:
            raise self._send_error(FORKED, None)
        if threading.get_ident() != self._thread:
            raise self._send_error(WRONG_THREAD, None)

    def _cannot_send(self) -> bool:
        return self._over or self._peer_gone

    def _closed_error(self) -> KucommsError:
        """A new error that says why the link is over."""
        if self._error is not None:
            error = type(self._error)(*self._error.args)
            error.__cause__ = self._error.__cause__
            return error
        if self._closed_here:
            return ClosedError(f"{self._url}: this link was closed here; connect again to go on")
        return PeerClosedError(f"{self._url}: the other side closed the link")

    def _loop_over_error(self) -> ClosedError:
        return ClosedError(
            f"{self._url}: the loop of the endpoint has ended, and nothing can be waited for "
            "without it; connect again in another loop"
        )

    def _backlog_error(self) -> QueueFull:
        return QueueFull(
            f"{self._url}: a handler waits here, and the backlog of "
            f"{self._endpoint._backlog_limit} bytes for what arrives meanwhile is full; make the "
            "endpoint's backlog larger, or wait in a task instead of a handler"
        )

    def _bad_argument(self, error: Exception) -> Exception:
        if isinstance(error, OverflowError):
            return HeaderValueError(
                f"{self._url}: type, id and user_value must be from 0 to 2**64-1, and sizes not "
                f"negative ({error})"
            )
        return type(error)(f"{self._url}: {error}")

    def _send_error(self, status: int, data: Any, size: int | None = None) -> KucommsError:
        """The error for a status of the channel that is not OK."""
        if status == FULL and self._channel.forked:
            status = FORKED  # those who wait for room do so in the parent
        if status == FULL:
            return QueueFull(
                f"{self._url}: no room in the ring now; 'await link.send(...)' waits for room"
            )
        if status == TOO_LARGE:
            size = _size_of(data) if size is None else size
            return MessageTooLargeError(
                f"{self._url}: {size} bytes are more than the largest message of "
                f"{self.max_message_size}; split it, or give a larger ring_size"
            )
        if status == CLOSED:
            return self._closed_error()
        if status == PROTOCOL:
            error = ProtocolError(
                f"{self._url}: the other side moved its position in the ring to where it "
                "cannot be; the link was closed"
            )
            # that is what it receives; what it has sent is still delivered
            if threading.get_ident() == self._thread:
                self._peer_left(error)
            elif not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._peer_left, error)
            return error
        if status == WRONG_THREAD:
            return UsageError(
                f"{self._url}: this link belongs to the thread of its endpoint's loop; from "
                "other threads use link.send_threadsafe(...)"
            )
        if status == FORKED:
            return UsageError(
                f"{self._url}: this link was made before a fork and cannot be used in the child; "
                "connect again there"
            )
        if status == OUT_OF_TURN:
            return OutOfTurnError(
                f"{self._url}: a loan is out, which has taken the turn; finish the loan first"
                if self._channel.loans
                else f"{self._url}: it is the other side's turn to send; receive its message "
                "first, which brings the turn here"
            )
        if status == NO_TOKEN:
            return UsageError(
                f"{self._url}: a token passes the turn and is nothing else: no reply, no data, and "
                "for links with turns only, which 'listen(..., turns=True)' makes"
            )
        if status == TOO_MANY_LOANS:
            return QueueFull(f"{self._url}: too many loans are out; finish one first")
        return TransportError(0, f"{self._url}: unexpected status {status}")


class _Wanted:
    """What a thread receives: a message is taken only for one that has not given up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._given_up = False
        self._message: Message | None = None

    def take(self, take: Callable[[], Message | None]) -> Message | None:
        """In the loop."""
        with self._lock:
            if self._given_up:
                raise asyncio.CancelledError
            self._message = take()
            return self._message

    def give_up(self) -> Message | None:
        """In the thread: what was taken, and nothing more will be."""
        with self._lock:
            self._given_up = True
            return self._message


def _pause_before(deadline: float | None) -> float:
    """For how long a thread sleeps at once; not positive after the deadline."""
    return _LOOP_WATCH if deadline is None else min(_LOOP_WATCH, deadline - monotonic())


def _bytes_of(messages: Iterable[Message]) -> int:
    """Bytes that they take, headers included."""
    return sum(HEADER_SIZE + len(message.data) for message in messages)


def _size_of(data: Any) -> int:
    if isinstance(data, Message):
        data = data.data
    return len(data) if isinstance(data, bytes) else memoryview(data).nbytes


