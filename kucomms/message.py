# SPDX-License-Identifier: MIT
"""The message: a header of three free fields, and data; and the token, which has none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

if TYPE_CHECKING:
    from kucomms.pool import Buffer

__all__ = ["CarryingMessage", "Message", "Token"]


class Message(msgspec.Struct, gc=False, frozen=True):
    """A datagram with its header.

    Received messages are of this class, and one can be sent as it is, with
    ``link.send(message)``, ``link.send_many([...])``.

    ``data`` is ``bytes`` in a received message, a read-only ``memoryview`` in a
    borrowed one, anything bytes-like in one to be sent. ``type``, ``id`` and
    ``user_value`` are unsigned 64-bit integers, free for the user, no value
    reserved. Messages are immutable and compare by value.

    ``buffers``: those of pools that the peer has handed over with it, a tuple, empty as a
    rule. Who sends the message again sends them only with ``buffers=message.buffers``.
    """

    buffers: ClassVar[tuple[Buffer, ...]] = ()

    data: Any = b""
    type: int = 0
    id: int = 0
    user_value: int = 0

    def __len__(self) -> int:
        """Length of the data in bytes."""
        return len(self.data)


class Token(Message, gc=False, frozen=True):
    """A message that only passes the turn, on a link with turns; see ``Endpoint.listen``.

    ``await link.send(Token())`` when there is nothing to say. It is received as a ``Token``,
    so what sends every message back passes the turn back. It has no data; its header is the
    user's.
    """


class CarryingMessage(Message, gc=True, frozen=True):
    """A received message that brought buffers. Others are as cheap as they can be."""

    buffers: tuple[Buffer, ...] = ()  # type: ignore[misc]
