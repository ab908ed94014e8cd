# SPDX-License-Identifier: MIT
"""Places in the queues of those who wait to send or to receive.

A queue is a deque of tickets. Its head, and nobody else, tries what it waits for; who
leaves the queue, done or cancelled, wakes the next. So the order is that of arrival,
and a wake-up that meets a cancelled task is not lost.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Protocol

__all__ = ["TaskTicket", "ThreadTicket", "Ticket"]


class Ticket(Protocol):
    """A place in a queue."""

    def wake(self) -> None:
        """The head of the queue may try again; in the loop's thread, or a thread's own."""


class TaskTicket:
    """A task's place in a queue."""

    __slots__ = ("_future",)

    def __init__(self) -> None:
        self._future: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    def fail(self, error: BaseException) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_exception(error)

    async def wait(self) -> None:
        self._future = asyncio.get_running_loop().create_future()
        try:
            await self._future
        finally:
            self._future = None


class ThreadTicket:
    """A thread's place in a queue."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = threading.Event()

    def wake(self) -> None:
        self._event.set()

    def rest(self) -> None:
        """What comes after this ends the next wait."""
        self._event.clear()

    def wait(self, timeout: float | None) -> bool:
        return self._event.wait(timeout)
