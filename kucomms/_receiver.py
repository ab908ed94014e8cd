# SPDX-License-Identifier: MIT
"""Datagrams that come while no buffer is posted for them."""

from __future__ import annotations

import errno
from socket import socket
from typing import TYPE_CHECKING, Any

from kucomms import _core
from kucomms.exceptions import ClosedError

if TYPE_CHECKING:
    from kucomms.pool import Pool

__all__ = ["Receiver"]

_AT_ONCE = 64
"""Datagrams that are dropped in one turn of the loop."""


class Receiver:
    """Receives datagrams into buffers that are posted; from ``Pool.receiver``.

    A context manager. While no ``receive`` waits, a datagram waits in the socket, or is
    dropped. So whoever drops keeps several buffers posted. It is closed before the socket,
    or with its pool.
    """

    def __init__(self, pool: Pool, sock: socket, drops: bool) -> None:
        self._pool = pool
        self._sock = sock
        self._drops = drops
        self._posted = 0
        self._dropping = False
        self._closed = False
        self._dropped = 0
        pool._posting.add(self)
        self._watch()

    @property
    def dropped(self) -> int:
        """Datagrams that no buffer was posted for."""
        return self._dropped

    async def receive(self, buffers: Any) -> int:
        """As ``Pool.receive``. Several may wait; each gets one datagram."""
        if self._closed:
            raise ClosedError("this receiver was closed here; make another one to go on")
        self._posted += 1
        self._watch()
        try:
            return await self._pool.receive(self._sock, buffers)
        finally:
            self._posted -= 1
            self._watch()

    def close(self) -> None:
        """Leave the socket alone from now on. Twice is fine."""
        self._closed = True
        self._pool._posting.discard(self)
        self._watch()

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *_: object) -> None:
        """As ``close``."""
        self.close()

    def _watch(self) -> None:
        """Drop what comes, if nobody waits for it."""
        wanted = self._drops and not self._posted and not self._closed
        if wanted and not self._dropping:
            self._pool._loop.add_reader(self._sock.fileno(), self._drop)
        elif self._dropping and not wanted:
            self._pool._loop.remove_reader(self._sock.fileno())
        self._dropping = wanted

    def _drop(self) -> None:
        for _ in range(_AT_ONCE):
            result = _core.drop_message(self._sock.fileno())
            if result == -errno.EAGAIN:
                return
            if not result:  # else the error of one that was sent, which nobody asks for either
                self._dropped += 1
                self._pool._dropped += 1
