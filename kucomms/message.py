# SPDX-License-Identifier: MIT
"""The message: a header of three free fields, and data."""

from typing import Any

import msgspec

__all__ = ["Message"]


class Message(msgspec.Struct, gc=False, frozen=True):
    """A datagram with its header.

    Received messages are of this class, and one can be sent as it is, with
    ``link.send(message)``, ``link.send_many([...])``.

    ``data`` is ``bytes`` in a received message, a read-only ``memoryview`` in a
    borrowed one, anything bytes-like in one to be sent. ``type``, ``id`` and
    ``user_value`` are unsigned 64-bit integers, free for the user, no value
    reserved. Messages are immutable and compare by value.
    """

    data: Any = b""
    type: int = 0
    id: int = 0
    user_value: int = 0

    def __len__(self) -> int:
        """Length of the data in bytes."""
        return len(self.data)
