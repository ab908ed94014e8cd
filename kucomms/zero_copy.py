# SPDX-License-Identifier: MIT
"""Messages that are written or read in place, in the ring itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kucomms._core import EMPTY, FLAG_TOKEN, OK, Borrow
from kucomms.message import CarryingMessage, Message, Token

if TYPE_CHECKING:
    from kucomms.link import Link

__all__ = ["Borrowed", "Loan", "borrowed_message", "end_borrow"]


class Loan:
    """A message that is written in place; see ``Link.loan``."""

    __slots__ = ("_arguments", "_link", "_reservation", "data")

    data: memoryview
    """Writable, ``size`` bytes, valid inside the block."""

    def __init__(
        self, link: Link, size: int, type: int | None, id: int | None, user_value: int | None
    ) -> None:
        self._link = link
        self._arguments = (size, type, id, user_value)

    def __enter__(self) -> Loan:
        self._reservation = self._link._reserve(*self._arguments)
        self.data = memoryview(self._reservation)
        return self

    def __exit__(self, _: object, exc: BaseException | None, *__: object) -> None:
        reservation = self._reservation
        try:
            self.data.release()
        except BufferError:  # something was made of the view itself
            reservation.discard()
            if exc is None:
                raise self._survived() from None
            return
        if exc is not None:
            reservation.discard()
            return
        status = reservation.commit()
        if status == EMPTY:
            raise self._survived()
        if status != OK:
            raise self._link._send_error(status, None)

    def _survived(self) -> BufferError:
        return BufferError(
            f"{self._link.url}: a view of the loan outlived its block, so the message was "
            "discarded; release slices before the block ends"
        )


class Borrowed:
    """A message that is read in place; see ``Link.borrow``."""

    __slots__ = ("_borrow", "_link", "_message")

    def __init__(self, link: Link) -> None:
        self._link = link

    async def __aenter__(self) -> Message:
        link = self._link
        taken = None if link._receive_queue else link._take_borrow()
        if taken is None:
            waited: Borrow | Message = await link._wait_for(link._take_borrow)
            taken = waited
        self._borrow, self._message = borrowed_message(taken)
        return self._message

    async def __aexit__(self, _: object, exc: BaseException | None, *__: object) -> None:
        try:
            end_borrow(self._link, self._borrow, self._message, exc)
        finally:
            self._link._endpoint._owes(self._link)


def borrowed_message(taken: Borrow | Message) -> tuple[Borrow | bytearray, Message]:
    """What keeps the bytes, and the message, for one in place or one copied already."""
    if isinstance(taken, Message):
        # A bytearray can tell whether views of it are alive: it does not change its size.
        keeper = bytearray(taken.data)
        fields = memoryview(keeper).toreadonly(), taken.type, taken.id, taken.user_value
        if taken.buffers:
            return keeper, CarryingMessage(*fields, taken.buffers)
        return keeper, type(taken)(*fields)
    kind = Token if taken.flags & FLAG_TOKEN else Message
    return taken, kind(memoryview(taken), taken.type, taken.id, taken.user_value)


def end_borrow(
    link: Link,
    keeper: Borrow | bytearray,
    message: Message,
    exc: BaseException | None,
) -> None:
    """Release a borrowed message. Raises BufferError when a view of it lives on.

    Lazily: the caller looks after ``channel.owing``.
    """
    released = True
    try:
        message.data.release()
    except BufferError:  # something was made of the view itself
        released = False
    if isinstance(keeper, bytearray):
        try:
            keeper.append(0)
        except BufferError:
            released = False
    else:
        released = keeper.release(True) and released
    if not released and exc is None:
        raise BufferError(
            f"{link.url}: a view of the borrowed message outlived its block; its bytes stay taken "
            "until it dies. Release slices, or copy with bytes()"
        )
