# SPDX-License-Identifier: MIT
"""What a pool asks of the engine that moves its bytes."""

from __future__ import annotations

import abc
import asyncio
import enum
from collections.abc import Callable
from typing import Any

__all__ = ["BLOCK", "Complete", "Engine", "Operation", "Transfer"]

BLOCK = 0x7FFFF000
"""The most bytes that Linux moves in one transfer."""


class Operation(enum.IntEnum):
    """What a transfer does. Integers, because their hash is quick."""

    READ = 0
    RECEIVE = 1
    WRITE = 2
    SEND = 3

    @property
    def text(self) -> str:
        """How errors speak of it."""
        return ("read from", "receive from", "write to", "send to")[self]


class Transfer:
    """A transfer under way; from the ``submit`` methods of a pool."""

    __slots__ = (
        "_cancel", "blocks", "buffers", "fd", "fills", "future", "number", "offset",
        "on_socket", "operation", "scratch", "segments", "tag",
    )  # fmt: skip

    operation: Operation
    fills: bool
    """Whether it writes into the buffers."""
    fd: int
    on_socket: bool
    """Receive or send."""
    segments: list[tuple[int, int]]
    """Address and length of each piece, all in the pool's memory."""
    offset: int | None
    tag: Any
    """The application's; it comes back with the completion."""
    buffers: list[Any]
    """They live as long as this."""
    blocks: list[Any]
    """The pool's; of a buffer, also when it was freed meanwhile."""
    future: asyncio.Future[int] | None
    number: int
    scratch: Any
    """These two are the engine's."""

    def __init__(
        self,
        operation: Operation,
        fd: int,
        *,
        offset: int | None,
        tag: Any,
        future: asyncio.Future[int] | None,
        cancel: Callable[[Transfer], None],
    ) -> None:
        self.operation = operation
        self.fills = operation < Operation.WRITE
        self.fd = fd
        self.on_socket = operation is Operation.RECEIVE or operation is Operation.SEND
        self.offset = offset
        self.tag = tag
        self.future = future
        self._cancel = cancel
        self.segments = []
        self.buffers = []
        self.blocks = []
        self.number = 0
        self.scratch = None

    def __repr__(self) -> str:
        return f"<Transfer {self.operation.text} descriptor {self.fd}, tag {self.tag!r}>"

    def cancel(self) -> None:
        """Ask for it to end soon. Its completion comes in any case, and says how it ended."""
        self._cancel(self)


Complete = Callable[[Transfer, int], None]
"""Called in the loop, once for each transfer, with the bytes moved or a negative errno."""


class Engine(abc.ABC):
    """Moves bytes between the memory of one pool and descriptors.

    All is called in the thread of the pool's loop. ``complete`` is never called from
    within ``start`` or ``cancel``.
    """

    name: str
    reason: str
    """Why this one, when it is not the best."""
    registered: int = 0
    """Bytes of the pool that the kernel has pinned once for all transfers."""
    system_calls: int = 0

    @abc.abstractmethod
    def start(self, transfer: Transfer) -> None:
        """Begin. The descriptor stays open until it is complete, or is cancelled."""

    @abc.abstractmethod
    def cancel(self, transfer: Transfer) -> None:
        """Ask to end a transfer that is under way. May be asked again."""

    @abc.abstractmethod
    def close(self) -> None:
        """The end; no transfer is under way."""

    @abc.abstractmethod
    def abandon(self, *, forked: bool) -> None:
        """Let go of descriptors, but not in order.

        The loop is over, or this is a forked child, and what it inherited is also the
        parent's.
        """
