# SPDX-License-Identifier: MIT
"""Pool: memory from which buffers are allocated, and asynchronous I/O on them."""

from __future__ import annotations

import asyncio
import errno as errnos
import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from operator import index
from socket import SOCK_DGRAM, SOCK_SEQPACKET, socket
from typing import TYPE_CHECKING, Any

import msgspec

from kucomms import _core
from kucomms._extents import Extents
from kucomms._once import Once
from kucomms._pool_memory import PAGE, PoolMemory, new_memory, pool_error
from kucomms._queue import TaskTicket
from kucomms._receiver import Receiver
from kucomms.exceptions import ClosedError, KucommsError, PoolFull, UsageError
from kucomms.statistics import PoolStatistics
from kucomms.transfers import open_engine
from kucomms.transfers.base import Engine, Operation, Transfer

if TYPE_CHECKING:
    from kucomms._link_pools import LinkPools
    from kucomms.link import Link

__all__ = ["Buffer", "Completion", "Opening", "Pool", "open_pool"]

_IOV_MAX = os.sysconf("SC_IOV_MAX")
_OFFSET_MAX = (1 << 63) - 1
_CANCEL_AGAIN = 0.1
"""Seconds after which a closing pool asks again to cancel what is still under way, at first."""


_ADVICE = {
    errnos.EBADF: "it has to be open, and for this direction, until the transfer has ended",
    errnos.EFBIG: "a file cannot be so large here; see 'ulimit -f', or use a smaller offset",
    errnos.EINVAL: "with O_DIRECT, offsets and lengths must be multiples of the block size",
    errnos.EISDIR: "open a file in it",
    errnos.ENOTCONN: "connect the socket first",
    errnos.ENOTSOCK: "use read() and write() for what is no socket",
    errnos.ESPIPE: "pipes and sockets have no offset; leave it out",
}


class Completion(msgspec.Struct, frozen=True):
    """How a transfer ended."""

    tag: Any
    """As it was given to the ``submit`` method."""
    result: int
    """Bytes that were moved; of a read, 0 is the end of the file. 0 when it failed."""
    errno: int
    """0, or why it failed; ECANCELED after ``cancel``."""


class _Watch(weakref.ref[Any]):
    """Tells when the last view of a block has died."""

    __slots__ = ("block",)
    block: _Block


class _Block:
    """Pages that are not free, and who needs them."""

    __slots__ = ("freed", "length", "pages", "start", "transfers", "view", "watch")

    def __init__(self, start: int, pages: int, length: int) -> None:
        self.start = start
        self.pages = pages
        self.length = length
        self.freed = False
        self.transfers = 0
        self.view: memoryview | None = None
        self.watch: _Watch | None = None

    def viewed(self) -> bool:
        """Whether a view of it is alive."""
        return self.watch is not None and self.watch() is not None

    def drop_view(self) -> None:
        """Ours; those that were made of it may live on."""
        view, self.view = self.view, None
        if view is not None:
            with suppress(BufferError):  # something was made of the view itself
                view.release()


class Buffer:
    """Bytes of a pool; from ``Pool.allocate``, or handed over by a peer with a message.

    A context manager, which frees it. It begins at the start of a page. It is not zeroed.
    ``buffer.data[:5] = b"hello"`` writes to it. It is no memoryview itself: that could not
    tell when it is freed or handed over, and be used although the bytes are somebody else's.
    """

    __slots__ = ("__weakref__", "_block", "_gone", "_length", "_pool")

    _gone: str
    """What became of it, instead of being freed."""

    def __init__(self, pool: Pool, block: _Block) -> None:
        self._pool = pool
        self._block: _Block | None = block
        self._length = block.length

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        state = "" if self._block else f", {getattr(self, '_gone', 'freed')}"
        return f"<Buffer of {self._length} bytes{state}>"

    @property
    def pool(self) -> Pool:
        """The pool that it is of."""
        return self._pool

    @property
    def data(self) -> memoryview:
        """Writable, as long as the buffer. Raises UsageError when it is not ours any more."""
        block = self._block
        if block is None:
            raise self._gone_error()
        return block.view if block.view is not None else self._pool._view(block)

    def _gone_error(self) -> UsageError:
        return UsageError(f"{self!r} was used after it was {getattr(self, '_gone', 'freed')}")

    def free(self) -> None:
        """Give the bytes back. Twice is fine, and after handing it over; any thread may.

        While a transfer is under way with it, or a view of it lives, the bytes are not
        handed out again. Raises BufferError, with that already done, when slices of
        ``data``, or what else was made of it, live on.
        """
        block, self._block = self._block, None
        if block is None:
            return
        self._pool._free(block)
        if block.viewed():
            raise BufferError(
                "a view of the buffer outlived it; its bytes stay taken until that dies. "
                "Release slices before you free the buffer"
            )

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, _: object, exc: BaseException | None, *__: object) -> None:
        """As ``free``, but for the BufferError when there is an exception already."""
        try:
            self.free()
        except BufferError:
            if exc is None:
                raise

    def __del__(self) -> None:
        if self._block is not None and self._pool._free(self._block):
            warnings.warn(f"{self!r} was never freed", ResourceWarning, source=self, stacklevel=2)


class Received(Buffer):
    """One that a message brought: who does not keep it gives it back."""

    __slots__ = ()

    def __del__(self) -> None:
        if self._block is not None:
            self._pool._forsake(self._block)


Piece = Buffer | tuple[Buffer, int, int]
"""A buffer, or a part of it: (buffer, offset, length)."""


class Pool:
    """Memory of a fixed size, buffers in it, and transfers between them and descriptors.

    From ``kucomms.open_pool`` or ``Link.open_pool``. A context manager, which closes it.

    Transfers (``read``, ``write``, ``receive``, ``send``) take one buffer, or a list of
    buffers and of parts of them, (buffer, offset, length): at most 1024, and of those to be
    filled no byte twice. ``file`` is a descriptor, or an object with ``fileno()``, that
    stays open until the transfer has ended. They return the bytes that were moved, which may
    be fewer than asked for, as with the system calls of the same names; a read of 0 is the
    end. They raise TransportError with the errno of the system.

    When the await of a transfer is cancelled, it ends at once, and the kernel is asked to
    cancel the transfer, which may move bytes until then. Buffers may be freed while
    transfers are under way with them: they are not handed out again before those have ended.

    All methods raise UsageError for what can never work, in another thread than that of the
    loop in which it was opened, and after a fork in the child; ClosedError once it is
    closed, or the link's error when it has ended with its link.

    The buffers of a link's pool can be handed to its peer with messages, and come back with
    messages, or when the peer frees them: see ``Link.send``. A pool of the peer's is that of
    a buffer which it has handed over, ``buffer.pool``. It has transfers, and no ``allocate``.
    """

    _opened = False

    def __init__(self, memory: PoolMemory, quota: int) -> None:
        # of a link's pool, when its buffers can be handed to the peer
        self._shared: LinkPools | None = None
        self._number = -1
        # with which it is closed
        self._link: Link | None = None
        self._closed_by_link = False
        # what the peer has, by first page
        self._out: dict[int, _Block] = {}
        self._handed_over = 0
        self._memory = memory
        self._quota = quota
        self._allocated = 0
        self._extents = Extents(memory.size // PAGE)
        self._blocks: set[_Block] = set()
        # blocks that something has let go of, in whatever thread
        self._idle: deque[_Block] = deque()
        self._collecting = False
        self._collects_soon = False
        self._waiting: deque[TaskTicket] = deque()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._forked = False
        self._closing = False
        self._closed: asyncio.Future[None] = self._loop.create_future()
        self._engine = self._open_engine()
        self._under_way: set[Transfer] = set()
        self._untold = 0  # of those, how many end as completions
        self._completions: deque[Completion] = deque()
        self._receivers: deque[TaskTicket] = deque()
        self._completed = self._failed = self._cancelled = 0
        self._bytes_read = self._bytes_written = 0
        self._dropped = 0
        self._posting: set[Receiver] = set()
        _pools.add(self)
        self._opened = True

    def _open_engine(self) -> Engine:
        return open_engine(self._memory, self._complete)

    def __repr__(self) -> str:
        return f"<Pool of {self.size} bytes{', closed' if self._closing else ''}>"

    # ---- what it is ---------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes, a multiple of the page."""
        return self._memory.size

    @property
    def quota(self) -> int:
        """The most bytes that may be allocated at once."""
        return self._quota

    @property
    def closed(self) -> bool:
        """Whether it was closed, or is about to be."""
        return self._closing

    def statistics(self) -> PoolStatistics:
        """The counts of this pool; still there after it is closed."""
        if not self._forked and threading.get_ident() == self._thread:
            self._collect()
        return PoolStatistics(
            engine=self._engine.name,
            engine_reason=self._engine.reason,
            size=self.size,
            quota=self._quota,
            allocated=self._allocated,
            handed_over=self._handed_over,
            registered=self._engine.registered,
            in_flight=len(self._under_way),
            completed=self._completed,
            failed=self._failed,
            cancelled=self._cancelled,
            bytes_read=self._bytes_read,
            bytes_written=self._bytes_written,
            dropped=self._dropped,
            system_calls=self._engine.system_calls,
        )

    # ---- buffers ------------------------------------------------------------

    def allocate(self, size: int) -> Buffer:
        """A buffer of ``size`` bytes, in whole pages of its own.

        What the peer has freed by now is seen, whether somebody receives at the moment or
        not. Raises PoolFull when there is no room now, or others wait for room; ValueError for
        a size that this pool can never have.
        """
        self._check()
        pages = self._pages_for(size)
        buffer = None if self._waiting else self._take(size, pages)
        if buffer is None and self._shared is not None and self._out and not self._waiting:
            self._shared.look()
            self._check()  # what it has seen may have ended the link
            buffer = self._take(size, pages)
        if buffer is None:
            raise PoolFull(
                f"no {size} bytes in a row are free in this pool of {self.size} bytes, with a "
                f"quota of {self._quota} bytes; free a buffer, or 'await "
                "pool.allocate_when_room(...)'"
            )
        return buffer

    async def allocate_when_room(self, size: int) -> Buffer:
        """As ``allocate``, but waits for room, first come first served.

        Also for what the peer gives back. What it has sent before that is taken into the
        endpoint's backlog meanwhile, as with ``Link.request``.
        """
        self._check()
        pages = self._pages_for(size)
        ticket = TaskTicket()
        self._waiting.append(ticket)
        shared = self._shared
        if shared is not None:
            shared.begin_wait(ticket)
        try:
            while True:
                if self._waiting[0] is ticket:
                    buffer = self._take(size, pages)
                    if buffer is None and shared is not None:
                        shared.arm()
                        self._check()
                        buffer = self._take(size, pages)
                    if buffer is not None:
                        return buffer
                await ticket.wait()
                self._check()
        finally:
            self._waiting.remove(ticket)
            if shared is not None:
                shared.end_wait(ticket)
            self._wake_waiting()

    def _pages_for(self, size: int) -> int:
        pages = -(-index(size) // PAGE)
        if size < 1 or pages * PAGE > self._quota:
            raise ValueError(
                f"a buffer of this pool has from 1 to {self._quota} bytes, not {size}; open a "
                "larger pool"
            )
        return pages

    def _take(self, size: int, pages: int) -> Buffer | None:
        self._collect()
        if self._allocated + pages * PAGE > self._quota:
            return None
        start = self._extents.take(pages)
        if start is None:
            return None
        block = _Block(start, pages, size)
        self._blocks.add(block)
        self._allocated += pages * PAGE
        return Buffer(self, block)

    def _view(self, block: _Block) -> memoryview:
        self._check_view()
        living = None if block.watch is None else block.watch()
        if living is not None:  # it is watched already
            block.view = memoryview(living)
            return block.view
        view = self._memory.view(block.start * PAGE, block.length)
        block.watch = _Watch(view.obj, self._view_died)
        block.watch.block = block
        _watches[id(block.watch)] = block.watch
        block.view = view
        return view

    def _check_view(self) -> None:
        self._check()

    def _view_died(self, watch: weakref.ref[Any]) -> None:
        """Perhaps in another thread."""
        assert isinstance(watch, _Watch)
        _watches.pop(id(watch), None)
        self._let_go(watch.block)

    def _free(self, block: _Block) -> bool:
        """Perhaps in another thread. Whether there was anything to be freed."""
        if block.freed or self._forked:
            return False
        block.freed = True
        block.drop_view()
        self._let_go(block)
        return True

    def _forsake(self, block: _Block) -> None:
        """It came with a message, and nobody holds it any more. Anywhere, in any thread."""
        self._free(block)

    def _let_go(self, block: _Block) -> None:
        """Perhaps from within anything, also from within ``_collect``: the loop does the rest."""
        self._idle.append(block)
        if self._waiting or self._closed.done():
            self._collect_later()

    def _collect_later(self) -> None:
        if self._closed.done():
            with _unmapping:
                self._collect()
        elif not self._collects_soon:
            self._collects_soon = True
            with suppress(RuntimeError):  # the loop is closed
                if threading.get_ident() == self._thread:
                    self._loop.call_soon(self._collect_now)
                else:
                    self._loop.call_soon_threadsafe(self._collect_now)

    def _collect_now(self) -> None:
        self._collects_soon = False
        with _unmapping:
            self._collect()
        self._wake_waiting()

    def _collect(self) -> None:
        """Give back the pages that nobody needs any more.

        In the loop's thread only, until it is closed. The garbage collector may run in the
        middle of it, and what that lets go of once the pool is closed comes here again.
        """
        if self._collecting:
            return
        self._collecting = True
        try:
            while self._idle:
                block = self._idle.popleft()
                unused = block.freed and not block.transfers and not block.viewed()
                if unused and block in self._blocks:
                    self._blocks.remove(block)
                    block.watch = None
                    self._allocated -= block.pages * PAGE
                    self._return(block)
        finally:
            self._collecting = False
        if self._closed.done() and not self._blocks and self in _lingering:
            _lingering.remove(self)
            self._memory.close()

    def _return(self, block: _Block) -> None:
        """Nobody here needs it any more."""
        self._extents.give(block.start, block.pages)

    def _wake_waiting(self) -> None:
        if self._waiting:
            self._waiting[0].wake()

    # ---- handing over -------------------------------------------------------

    def _hand_over(self, block: _Block) -> None:
        """The peer has it now."""
        self._out[block.start] = block
        self._handed_over += block.pages * PAGE

    def _take_back(self, page: int, length: int) -> _Block | None:
        """The peer has it no more. None when it never had."""
        block = self._out.get(page)
        if block is None or block.length != length:
            return None
        del self._out[page]
        self._handed_over -= block.pages * PAGE
        return block

    def _received(self, page: int, length: int) -> Buffer | None:
        """What a message brought. None when it cannot have."""
        block = self._take_back(page, length)
        return None if block is None else Received(self, block)

    # ---- transfers ----------------------------------------------------------

    async def read(
        self, file: Any, buffers: Piece | Sequence[Piece], offset: int | None = None
    ) -> int:
        """Read from ``file`` at ``offset``, or where it stands, into the buffers."""
        return await self._transfer(Operation.READ, file, buffers, offset)

    async def write(
        self, file: Any, buffers: Piece | Sequence[Piece], offset: int | None = None
    ) -> int:
        """Write the buffers to ``file`` at ``offset``, or where it stands."""
        return await self._transfer(Operation.WRITE, file, buffers, offset)

    async def receive(self, sock: Any, buffers: Piece | Sequence[Piece]) -> int:
        """Receive from a socket: what is there of a stream, or a datagram."""
        return await self._transfer(Operation.RECEIVE, sock, buffers, None)

    async def send(self, sock: Any, buffers: Piece | Sequence[Piece]) -> int:
        """Send through a socket: some of it, if it is a stream, or one datagram."""
        return await self._transfer(Operation.SEND, sock, buffers, None)

    def receiver(self, sock: socket, *, on_no_buffer: str = "wait") -> Receiver:
        """Receives datagrams of a socket, and says what becomes of those without a buffer.

        ``"wait"`` leaves them in the socket, which drops what it has no room for;
        ``"drop"`` drops and counts each that comes while no ``receive`` of it waits.
        """
        self._check()
        if on_no_buffer not in ("wait", "drop"):
            raise UsageError(f'on_no_buffer is "wait" or "drop", not {on_no_buffer!r}')
        if sock.type not in (SOCK_DGRAM, SOCK_SEQPACKET):
            raise UsageError("a receiver is for sockets with datagrams; a stream has none to drop")
        return Receiver(self, sock, on_no_buffer == "drop")

    def submit_read(
        self,
        file: Any,
        buffers: Piece | Sequence[Piece],
        offset: int | None = None,
        *,
        tag: Any = None,
    ) -> Transfer:
        """Begin a ``read``, and do not wait. How it ends comes from ``completions``."""
        return self._start(Operation.READ, file, buffers, offset, tag, None)

    def submit_write(
        self,
        file: Any,
        buffers: Piece | Sequence[Piece],
        offset: int | None = None,
        *,
        tag: Any = None,
    ) -> Transfer:
        """Begin a ``write``, and do not wait. How it ends comes from ``completions``."""
        return self._start(Operation.WRITE, file, buffers, offset, tag, None)

    def submit_receive(
        self, sock: Any, buffers: Piece | Sequence[Piece], *, tag: Any = None
    ) -> Transfer:
        """Begin a ``receive``, and do not wait. How it ends comes from ``completions``."""
        return self._start(Operation.RECEIVE, sock, buffers, None, tag, None)

    def submit_send(
        self, sock: Any, buffers: Piece | Sequence[Piece], *, tag: Any = None
    ) -> Transfer:
        """Begin a ``send``, and do not wait. How it ends comes from ``completions``."""
        return self._start(Operation.SEND, sock, buffers, None, tag, None)

    async def completions(self) -> AsyncIterator[Completion]:
        """How the transfers of the ``submit`` methods end, in the order in which they do.

        Each comes once, to one of those who iterate. Ends when none is under way any more.
        """
        ticket = TaskTicket()
        while True:
            while self._completions:
                yield self._completions.popleft()
            if not self._untold:
                return
            self._receivers.append(ticket)
            try:
                await ticket.wait()
            finally:
                self._receivers.remove(ticket)
                self._wake_receivers()  # the wake-up may have met one that is cancelled

    async def _transfer(
        self,
        operation: Operation,
        file: Any,
        buffers: Piece | Sequence[Piece],
        offset: int | None,
    ) -> int:
        future: asyncio.Future[int] = self._loop.create_future()
        transfer = self._start(operation, file, buffers, offset, None, future)
        try:
            result = await future
        except BaseException:  # cancelled, as a rule
            self._cancel(transfer)
            raise
        if result < 0:
            raise self._transfer_error(transfer, -result)
        return result

    def _start(
        self,
        operation: Operation,
        file: Any,
        buffers: Piece | Sequence[Piece],
        offset: int | None,
        tag: Any,
        future: asyncio.Future[int] | None,
    ) -> Transfer:
        self._check()
        fd = file if isinstance(file, int) else file.fileno()
        if not -1 <= fd < 1 << 31:
            fd = -1  # a number that no descriptor can have; EBADF, as for others
        transfer = Transfer(
            operation,
            fd,
            offset=offset,
            tag=tag,
            future=future,
            cancel=self._cancel,
        )
        total = self._fill_in(transfer, buffers)
        if offset is not None and not 0 <= index(offset) <= _OFFSET_MAX - total:
            raise UsageError(f"{total} bytes at offset {offset} are beyond what a file can have")
        for block in transfer.blocks:
            block.transfers += 1
        self._under_way.add(transfer)
        self._untold += future is None
        self._engine.start(transfer)
        return transfer

    def _fill_in(self, transfer: Transfer, buffers: Piece | Sequence[Piece]) -> int:
        """Say which bytes a transfer is about. Returns how many."""
        pieces: Any = buffers
        if isinstance(pieces, Buffer) and pieces._pool is self and pieces._block is not None:
            whole = pieces._block  # in short what follows, for what is usual
            transfer.buffers.append(pieces)
            transfer.blocks.append(whole)
            transfer.segments.append((self._memory.address + whole.start * PAGE, whole.length))
            return whole.length
        if isinstance(pieces, Buffer) or _is_part(pieces):
            pieces = (pieces,)
        if not 0 < len(pieces) <= _IOV_MAX:
            raise UsageError(
                f"a transfer has from 1 to {_IOV_MAX} buffers, not {len(pieces)}; use several"
            )
        total = 0
        for piece in pieces:
            buffer, offset, length = piece if _is_part(piece) else (piece, 0, None)
            if not isinstance(buffer, Buffer):
                raise TypeError(f"{piece!r} is neither a Buffer nor (buffer, offset, length)")
            if buffer._pool is not self:
                raise UsageError(f"{buffer!r} belongs to another pool")
            block = buffer._block
            if block is None:
                raise buffer._gone_error()
            length = block.length if length is None else index(length)
            if not (offset >= 0 and length >= 0 and offset + length <= block.length):
                raise UsageError(f"{length} bytes at {offset} are not inside of {buffer!r}")
            transfer.buffers.append(buffer)
            transfer.blocks.append(block)
            transfer.segments.append((self._memory.address + block.start * PAGE + offset, length))
            total += length
        if transfer.fills:
            if not total:
                raise UsageError("a read into no bytes at all would look like the end of the file")
            if len(pieces) > 1:
                _check_apart(transfer.segments)
        return total

    def _cancel(self, transfer: Transfer) -> None:
        self._check_thread()
        if transfer in self._under_way:
            self._engine.cancel(transfer)

    def _complete(self, transfer: Transfer, result: int) -> None:
        """The engine is through with it."""
        self._under_way.remove(transfer)
        for block in transfer.blocks:
            block.transfers -= 1
            if block.freed:
                self._let_go(block)
        self._completed += 1
        if result < 0:
            self._failed += 1
            self._cancelled += result == -errnos.ECANCELED
        elif transfer.fills:
            self._bytes_read += result
        else:
            self._bytes_written += result
        future = transfer.future
        if future is None:
            self._untold -= 1
            self._completions.append(Completion(transfer.tag, max(result, 0), max(-result, 0)))
            self._wake_receivers()
        elif not future.done():
            future.set_result(result)
        transfer.buffers.clear()
        if self._closing and not self._under_way:
            self._finish()

    def _wake_receivers(self) -> None:
        if self._receivers and (self._completions or not self._untold):
            self._receivers[0].wake()

    def _transfer_error(self, transfer: Transfer, number: int) -> KucommsError:
        if number == errnos.ECANCELED and self._closing:
            return self._closed_error()
        total = sum(length for _, length in transfer.segments)
        where = "" if transfer.offset is None else f" at offset {transfer.offset}"
        what = f"cannot {transfer.operation.text} descriptor {transfer.fd}{where}, {total} bytes"
        if number in _ADVICE:
            what += f" ({_ADVICE[number]})"
        return _core.os_error(number, self._where() + what)

    # ---- closing ------------------------------------------------------------

    async def __aenter__(self) -> Pool:
        """Closed at the end of the block."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """As ``aclose``."""
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel all transfers, wait until they have ended, and free all buffers.

        The memory is given back, or when its last view dies. Twice is fine.
        """
        self._check_thread()
        self._begin_close()
        await asyncio.shield(self._closed)

    def _begin_close(self, *, by_link: bool = False) -> None:
        if self._closing:
            return
        self._closing = True
        self._closed_by_link = by_link
        for ticket in self._waiting:
            ticket.wake()
        for receiver in list(self._posting):
            receiver.close()
        self._cancel_all()
        if not self._under_way:
            self._finish()

    def _cancel_all(self, pause: float = _CANCEL_AGAIN) -> None:
        for transfer in list(self._under_way):
            self._engine.cancel(transfer)
        if self._under_way:
            # A request may be between two stages, where the kernel does not find it.
            self._loop.call_later(pause, self._cancel_all, 2 * pause)

    def _finish(self) -> None:
        """Nothing is under way any more."""
        if self._closed.done():
            return
        self._engine.close()
        self._tell_closed()
        self._free_all()
        _pools.discard(self)
        _lingering.add(self)
        self._closed.set_result(None)
        with _unmapping:
            self._collect()

    def _tell_closed(self) -> None:
        if self._shared is not None:
            out, self._out = self._out, {}
            self._handed_over = 0
            self._shared.closed(self, out)

    def _free_all(self) -> None:
        for block in self._blocks.copy():
            self._free(block)

    def __del__(self) -> None:
        if not self._opened or self._forked or self._closed.done():
            return
        warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=2)
        self._engine.abandon(forked=False)
        if self._under_way:
            _kept.append(self._memory)
        else:
            self._memory.close()

    def _after_fork(self) -> None:
        """In the child."""
        self._forked = True
        for block in self._blocks:
            block.drop_view()
        self._memory.forked()
        if not self._closed.done():
            self._engine.abandon(forked=True)

    # ---- errors -------------------------------------------------------------

    def _check(self) -> None:
        if self._forked or threading.get_ident() != self._thread:
            self._check_thread()
        if self._closing:
            raise self._closed_error()

    def _check_thread(self) -> None:
        if self._forked:
            raise UsageError(
                "this pool was opened before a fork and cannot be used in the child; open one there"
            )
        if threading.get_ident() != self._thread:
            raise UsageError("this pool belongs to the thread of the loop in which it was opened")

    def _closed_error(self) -> KucommsError:
        if self._link is not None and self._closed_by_link:
            return self._link._closed_error()
        return ClosedError(f"{self._where()}this pool was closed here; open another one to go on")

    def _where(self) -> str:
        return "" if self._link is None else f"{self._link.url}: "


class Opening(Once[Pool]):
    """What ``open_pool`` returns: to be awaited, or entered, once."""

    def __init__(
        self,
        size: int,
        quota: int | None,
        link: Link | None = None,
        *,
        contiguous: bool = False,
    ) -> None:
        if index(size) < 1:
            raise ValueError(f"a pool has at least 1 byte, not {size}")
        self._size = -(-size // PAGE) * PAGE
        self._quota = self._size if quota is None else index(quota)
        if not PAGE <= self._quota <= self._size:
            raise ValueError(
                f"the quota of a pool of {self._size} bytes is from {PAGE} to that, not {quota}"
            )
        self._link = link
        self._contiguous = contiguous

    async def _open(self) -> Pool:
        link = self._link
        try:
            if link is not None and link._connection.carries_buffers:
                return await link._link_pools().open(self._size, self._quota, self._contiguous)
            memory = await new_memory(self._size)
            try:
                pool = Pool(memory, self._quota)
            except BaseException:
                memory.close()
                raise
        except KucommsError:
            raise
        except OSError as error:
            raise pool_error(error, self._size, "" if link is None else link.url) from error
        if link is not None:
            try:
                link._endpoint._adopt_pool(link, pool)
            except BaseException:
                await pool.aclose()
                raise
        return pool

    async def _close(self, opened: Pool) -> None:
        await opened.aclose()


def open_pool(size: int, *, quota: int | None = None) -> Opening:
    """Open a pool of ``size`` bytes, rounded up to pages, of this process.

    ``async with kucomms.open_pool(size) as pool:`` closes it at the end of the block;
    ``pool = await kucomms.open_pool(size)`` leaves that to ``pool.aclose()``. All of the
    memory is taken at once, and charged to the cgroup of this process. ``quota``: the most
    bytes, in whole pages, that may be allocated at once; all, unless given.

    Raises TransportError (ENOMEM) when there is not so much memory.
    """
    return Opening(size, quota)


def _is_part(piece: Any) -> bool:
    return isinstance(piece, tuple) and len(piece) == 3 and isinstance(piece[1], int)


def _check_apart(segments: list[tuple[int, int]]) -> None:
    end = 0
    for address, length in sorted(segments):
        if address < end and length:
            raise UsageError("the same bytes are twice among those that are to be read into")
        end = max(end, address + length)


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
"""Those that are open."""
_lingering: set[Pool] = set()
"""Closed, but mapped: views of their buffers live."""
_unmapping = threading.RLock()
"""For those, since the last view may die in any thread."""
_watches: dict[int, _Watch] = {}
"""By id, of all views that are alive: so their pools are not collected."""
_kept: list[PoolMemory] = []
"""Never closed, and at the end there were transfers of which nobody hears any more."""


def _forked() -> None:
    for pool in list(_pools) + list(_lingering):
        pool._after_fork()


os.register_at_fork(after_in_child=_forked)
