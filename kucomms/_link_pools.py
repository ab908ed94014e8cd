# SPDX-License-Identifier: MIT
"""The pools of one link: which buffers each side has, and what goes back to their owner."""

from __future__ import annotations

import asyncio
import errno
import struct
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, NoReturn

from kucomms import _core
from kucomms._core import (
    CARRIED_MAX,
    FLAG_NOTICE,
    FLAG_REPLY,
    FULL,
    KIND_BUFFER,
    KIND_POOL,
    OK,
    POOLS_MAX,
    PROTOCOL,
)
from kucomms._pool_memory import PAGE, PoolMemory
from kucomms._queue import TaskTicket
from kucomms.exceptions import (
    ClosedError,
    KucommsError,
    ProtocolError,
    TransportError,
    UsageError,
)
from kucomms.message import CarryingMessage, Message
from kucomms.pool import Buffer, Pool, Received, _Block
from kucomms.transfers import open_engine
from kucomms.transfers.base import Engine, Transfer

if TYPE_CHECKING:
    from kucomms.link import Link

__all__ = ["CARRIED_SIZE", "LinkPools", "PeerPool", "as_buffers"]

_CARRIED = struct.Struct("=IIQ")  # struct kucomms_carried: pool, page, length
CARRIED_SIZE = _CARRIED.size
_NEWS = struct.Struct("=IIQQ")  # struct kucomms_pool_news: number, reserved, size, offset
_PACE = 16


class _NoEngine(Engine):
    """Until the first transfer: most who receive buffers only look at them."""

    name = "none"
    reason = "no transfer was begun yet"

    def __init__(self, pool: PeerPool) -> None:
        self._pool = pool

    def start(self, transfer: Transfer) -> None:
        """As the base class says, by the engine that is opened now."""
        pool = self._pool
        try:
            pool._engine = open_engine(pool._memory, pool._complete)
        except BaseException as error:
            pool._take_out(transfer)
            if isinstance(error, OSError):
                what = "cannot begin transfers with a pool of the peer's"
                raise _core.os_error(error.errno or 0, what, error.strerror) from error
            raise
        pool._engine.start(transfer)

    def cancel(self, transfer: Transfer) -> None:
        """There are none."""

    def close(self) -> None:
        """Nothing is open."""

    def abandon(self, *, forked: bool) -> None:
        """Nothing is open."""


class PeerPool(Pool):
    """A pool in which the peer allocates, and of which we have what it handed over."""

    def __init__(self, shared: LinkPools, number: int, memory: PoolMemory) -> None:
        # a byte for each page that is here; the peer must not hand it over again
        self._held = bytearray(memory.size // PAGE)  # first: it may be too much
        super().__init__(memory, memory.size)
        self._shared = shared
        self._number = number
        self._owner_closed = False

    def _open_engine(self) -> Engine:
        return _NoEngine(self)

    def __repr__(self) -> str:
        return f"<Pool of {self.size} bytes of the peer's{', closed' if self._closing else ''}>"

    def allocate(self, size: int) -> Buffer:
        """Only the peer can. Raises UsageError."""
        self._not_ours()

    async def allocate_when_room(self, size: int) -> Buffer:
        """Only the peer can. Raises UsageError."""
        self._not_ours()

    async def aclose(self) -> None:
        """Only the peer can. Raises UsageError."""
        self._not_ours()

    def _not_ours(self) -> NoReturn:
        self._check_thread()
        raise UsageError(
            "this pool is the peer's, who allocates in it and closes it; open one of your own "
            "with link.open_pool()"
        )

    # ---- what is here -------------------------------------------------------

    def _received(self, page: int, length: int) -> Buffer | None:
        pages = -(-length // PAGE)
        end = page + pages
        held = self._held
        if not length or end > len(held) or held.find(1, page, end) >= 0:
            return None
        held[page:end] = b"\1" * pages
        block = _Block(page, pages, length)
        self._blocks.add(block)
        self._allocated += pages * PAGE
        return Received(self, block)

    def _hand_over(self, block: _Block) -> None:
        self._blocks.remove(block)
        self._allocated -= block.pages * PAGE
        self._forget(block)
        self._finish_if_unused()

    def _forget(self, block: _Block) -> None:
        self._held[block.start : block.start + block.pages] = bytes(block.pages)

    def _check_view(self) -> None:
        self._check_thread()  # as memory it stays valid, whatever becomes of the link

    # ---- giving back --------------------------------------------------------

    def _free(self, block: _Block) -> bool:
        if block.freed or self._forked:
            return False
        block.freed = True
        block.drop_view()
        self._idle.append(block)
        if self._closed.done() or threading.get_ident() != self._thread:
            self._collect_later()
        else:
            self._collect_now()
        return True

    def _forsake(self, block: _Block) -> None:
        """Perhaps from within anything: what it leads to is left to the loop."""
        if not block.freed and not self._forked:
            block.freed = True
            block.drop_view()
            self._let_go(block)

    def _let_go(self, block: _Block) -> None:
        self._idle.append(block)
        self._collect_later()

    def _return(self, block: _Block) -> None:
        self._forget(block)
        shared = self._shared
        if shared is not None:
            shared.give_back(_CARRIED.pack(self._number, block.start, block.length))
        self._finish_if_unused()

    # ---- the end ------------------------------------------------------------

    def _take_out(self, transfer: Transfer) -> None:
        """It was never begun."""
        self._under_way.remove(transfer)
        self._untold -= transfer.future is None
        for block in transfer.blocks:
            block.transfers -= 1

    def _tell_closed(self) -> None:
        """The peer knows."""

    def _close_by_owner(self) -> None:
        """What is here stays; the rest ends with it."""
        self._owner_closed = True
        self._finish_if_unused()

    def _finish_if_unused(self) -> None:
        if self._owner_closed and not self._blocks and not self._closing:
            self._begin_close()

    def _free_all(self) -> None:
        """Those who hold buffers may look at them as long as they like."""

    def _closed_error(self) -> KucommsError:
        if self._closed_by_link:
            return super()._closed_error()
        return ClosedError(f"{self._where()}the peer has closed this pool of its own")

    def __del__(self) -> None:
        if not self._opened or self._forked or self._closed.done():
            return
        self._engine.abandon(forked=False)
        if not self._under_way:
            self._memory.close()


def as_buffers(buffers: Any) -> tuple[Buffer, ...]:
    """What was given as ``buffers``: one, or a sequence of them."""
    return (buffers,) if isinstance(buffers, Buffer) else tuple(buffers)


class _Outgoing:
    """The place in the queue of senders of what is to be given back: before all others."""

    __slots__ = ("_flush",)

    def __init__(self, pools: LinkPools) -> None:
        self._flush = pools.flush

    def wake(self) -> None:
        self._flush()


class LinkPools:
    """What a link keeps of its pools, from the first one on."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._connection = link._connection
        self._side = link._connection.side
        # that are open, by number
        self._ours: dict[int, Pool] = {}
        self._theirs: dict[int, PeerPool] = {}
        # closed ones of ours, and what the peer has of them
        self._leaving: dict[int, tuple[Pool, dict[int, _Block]]] = {}
        self._their_next = 1 - self._side  # no number comes twice
        self._opening = 0
        self._most = min(CARRIED_MAX, link.max_message_size // _CARRIED.size)
        # what is to be given back, and frames that say which of our pools are closed
        self._back: deque[bytes] = deque()
        self._news: deque[bytes] = deque()
        self._ticket = _Outgoing(self)
        self._queued = False
        # Somebody waits for room. As a request does, that has the link look at what comes.
        self.waits: set[TaskTicket] = set()
        self._sends = 0

    # ---- pools --------------------------------------------------------------

    async def open(self, size: int, quota: int, contiguous: bool) -> Pool:
        """A pool of ours. Raises the link's error when that ends, OSError."""
        if len(self._ours) + self._opening >= POOLS_MAX:
            raise TransportError(
                errno.EMFILE, f"{self._link.url}: a side has {POOLS_MAX} pools at most; close one"
            )
        self._opening += 1
        opening = asyncio.ensure_future(self._connection.open_pool(size, contiguous))
        opening.add_done_callback(self._opened)
        try:
            number, memory = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(self._unclaimed)
            raise
        except OSError:
            if self._link._cannot_send():
                raise self._link._closed_error() from None
            raise
        if self._link._cannot_send():
            memory.close()
            raise self._link._closed_error()
        try:
            pool = Pool(memory, quota)
        except BaseException:
            self._tell_closed(number)
            memory.close()
            raise
        pool._shared = self
        pool._number = number
        self._ours[number] = pool
        self._link._endpoint._adopt_pool(self._link, pool)
        return pool

    def _opened(self, opening: asyncio.Future[tuple[int, PoolMemory]]) -> None:
        self._opening -= 1

    def _unclaimed(self, opening: asyncio.Future[tuple[int, PoolMemory]]) -> None:
        """Who wanted it was cancelled."""
        if not opening.cancelled() and opening.exception() is None:
            number, memory = opening.result()
            memory.close()
            self._tell_closed(number)

    def closed(self, pool: Pool, out: dict[int, _Block]) -> None:
        """A pool of ours; the peer still has what is ``out``."""
        number = pool._number
        del self._ours[number]
        if out:
            self._leaving[number] = pool, out
        self._tell_closed(number)

    def _tell_closed(self, number: int) -> None:
        if not self._link._cannot_send() and not self._connection.close_pool(number):
            self._news.append(_NEWS.pack(number, 0, 0, 0))
            self.flush()

    def peer_opened(self, number: int, memory: PoolMemory) -> int:
        """A pool of the peer's, mapped here; 0, or why it is not taken.

        Raises ProtocolError when it broke the rules.
        """
        if number & 1 == self._side or number < self._their_next:
            raise ProtocolError(
                f"{self._link.url}: the other side gives its pool the number {number}, which it "
                "cannot have; the link was closed"
            )
        if len(self._theirs) >= POOLS_MAX:
            self.look()  # that it has closed one may wait in the ring
        if len(self._theirs) >= POOLS_MAX:
            return errno.ENOBUFS
        if self._link.closed:
            return errno.ENOTCONN
        try:
            pool = self._theirs[number] = PeerPool(self, number, memory)
        except MemoryError:
            return errno.ENOMEM
        self._their_next = number + 2
        self._link._endpoint._adopt_pool(self._link, pool)
        return 0

    def end(self) -> None:
        """The link is over. Its pools are closed by the endpoint."""
        for pool in self._theirs.values():
            pool._shared = None
        self._theirs.clear()
        self._leaving.clear()
        self._back.clear()
        self._news.clear()

    # ---- sending ------------------------------------------------------------

    def send(
        self,
        buffers: tuple[Buffer, ...],
        flags: int,
        data: Any,
        type: int | None,
        id: int | None,
        user_value: int | None,
    ) -> int:
        """Send a message with buffers, a status: when that is OK, they are the peer's.

        Raises UsageError, ClosedError or BufferError, as well, when they cannot be.
        """
        blocks = [self._block(buffer) for buffer in buffers]
        if len(set(blocks)) != len(blocks):
            raise UsageError("a buffer is twice among those that are to be handed over")
        front = b"".join(
            _CARRIED.pack(buffer._pool._number, block.start, block.length)
            for buffer, block in zip(buffers, blocks, strict=True)
        )
        status = self._link._channel.send_front(
            data, type, id, user_value, front, KIND_BUFFER, flags
        )
        if status == OK:
            for buffer, block in zip(buffers, blocks, strict=True):
                buffer._block = None
                buffer._gone = "handed over"
                buffer._pool._hand_over(block)
        return status

    def paces(self) -> bool:
        """Whether the loop wants a turn before a send: now and then, as with others."""
        self._sends += 1
        return self._sends % _PACE == 0

    def _block(self, buffer: Buffer) -> _Block:
        """Of a buffer that can be handed over."""
        if not isinstance(buffer, Buffer):
            raise TypeError(f"{buffer!r} is no Buffer")
        pool = buffer._pool
        if pool._shared is not self:
            raise UsageError(
                f"{self._link.url}: {buffer!r} is not of a pool of this link; allocate it in one "
                "from link.open_pool()"
            )
        pool._check()
        block = buffer._block
        if block is None:
            raise buffer._gone_error()
        if block.transfers:
            raise UsageError(f"a transfer is under way with {buffer!r}; await its end")
        block.drop_view()
        if block.viewed():
            raise BufferError(
                "a view of the buffer is alive; release slices of its data before you hand it over"
            )
        return block

    def give_back(self, carried: bytes) -> None:
        """Tell the peer that one of its buffers is free, at once if there is room."""
        if not self._link._cannot_send():
            self._back.append(carried)
            self.flush()

    def flush(self) -> None:
        """Send what is to be given back, and what is closed; in a queue when the ring is full."""
        link = self._link
        channel = link._channel
        status = OK
        while status == OK and (self._back or self._news):
            # in this order: what is free is not of a pool that is closed
            some = [self._back[at] for at in range(min(len(self._back), self._most))]
            kind, flags = (KIND_BUFFER, FLAG_NOTICE) if some else (KIND_POOL, 0)
            front = b"".join(some) if some else self._news[0]
            status = channel.send_front(b"", None, None, None, front, kind, flags)
            if status == FULL and channel.park_send(len(front)):
                status = OK  # there is room by now
                continue
            if status == OK:
                for _ in some:
                    self._back.popleft()
                if not some:
                    self._news.popleft()
        if status == FULL:
            if not self._queued:
                self._queued = True
                link._send_queue.appendleft(self._ticket)
            return
        if status != OK:  # the link is over, or will soon be
            if status == PROTOCOL:
                link._send_error(status, None)
            self._back.clear()
            self._news.clear()
        if self._queued:
            self._queued = False
            link._leave_send_queue(self._ticket)

    # ---- receiving ----------------------------------------------------------

    def received(
        self, frame: tuple[int, int, int, bytes, int, int, int]
    ) -> Message | bool | None:
        """See ``Channel.on_frame``."""
        kind, flags, count, data, type, id, user_value = frame
        if kind == KIND_POOL:
            return self._received_news(data)
        front = data[: count * _CARRIED.size]
        if flags & FLAG_NOTICE:
            fits = len(front) == len(data) and flags == FLAG_NOTICE
            return None if fits and self._given_back(front) else False
        buffers = []
        for carried in _CARRIED.iter_unpack(front):
            buffer = self._buffer(*carried)
            if buffer is None:
                return False
            buffers.append(buffer)
        message = CarryingMessage(data[len(front) :], type, id, user_value, tuple(buffers))
        if flags & FLAG_REPLY:
            self._link._resolve([message])
            return None
        return message

    def _buffer(self, number: int, page: int, length: int) -> Buffer | None:
        pool = self._theirs.get(number) or self._ours.get(number)
        if pool is not None:
            return pool._received(page, length)
        left = self._left(number, page, length)
        if left is None:
            return None
        # It was on its way when we closed its pool.
        buffer = Received(*left)
        buffer._block = None
        buffer._gone = "freed with its pool"
        return buffer

    def _left(self, number: int, page: int, length: int) -> tuple[Pool, _Block] | None:
        """A buffer of a closed pool comes back. None when it cannot."""
        pool, out = self._leaving.get(number, (None, {}))
        block = out.get(page)
        if pool is None or block is None or block.length != length:
            return None
        del out[page]
        if not out:
            del self._leaving[number]
        return pool, block

    def _given_back(self, front: bytes) -> bool:
        for number, page, length in _CARRIED.iter_unpack(front):
            pool = self._ours.get(number)
            if pool is None:
                if self._left(number, page, length) is None:
                    return False
                continue
            block = pool._take_back(page, length)
            if block is None:
                return False
            pool._free(block)
        return True

    def _received_news(self, data: bytes) -> bool | None:
        if len(data) != _NEWS.size:
            return False
        number, reserved, size, offset = _NEWS.unpack(data)
        if reserved:
            return False
        if size:
            try:
                memory = self._connection.map_pool(size, offset)
            except (OSError, ProtocolError):
                return False
            return self._take_pool(number, memory)
        pool = self._theirs.pop(number, None)
        if pool is None:
            return False
        pool._close_by_owner()
        return None

    def _take_pool(self, number: int, memory: PoolMemory) -> bool | None:
        try:
            if not self.peer_opened(number, memory):
                return None
        except KucommsError:
            pass
        memory.close()
        return False

    # ---- waiting for room ---------------------------------------------------

    def look(self) -> None:
        """See what the peer has given back by now."""
        link = self._link
        link._pump(park=False, past=True)
        if link._inbox and link._endpoint._has_message_handler:
            link._endpoint._make_ready(link)

    def begin_wait(self, ticket: TaskTicket) -> None:
        """Somebody waits for room, and ``end_wait`` comes after it."""
        self.waits.add(ticket)
        endpoint = self._link._endpoint
        if endpoint._is_handler():
            endpoint._handler_waits.add(ticket.fail)

    def arm(self) -> None:
        """Look, and ask for the doorbell. Raises QueueFull, or why nothing can come."""
        link = self._link
        if link._cannot_send():
            raise link._closed_error()
        if link._endpoint._is_handler():
            link._endpoint._keep_draining(link)
            if link._endpoint._backlog_is_full:
                raise link._backlog_error()
        else:
            link._rearm()

    def end_wait(self, ticket: TaskTicket) -> None:
        """The end of that."""
        self.waits.discard(ticket)
        self._link._endpoint._handler_waits.discard(ticket.fail)

    def peer_left(self) -> None:
        """Nothing comes back any more."""
        for ticket in list(self.waits):
            ticket.wake()
