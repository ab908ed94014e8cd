# SPDX-License-Identifier: MIT
"""``kucomms longtest``: both sides send, both sides echo, nothing may be lost.

The connecting side, A, sends messages of type 0: random bytes, 0 to 2047 of them. The
listening side, B, or the kernel module ``kucomms_longtest`` in its place, sends messages
of type 1: the number of the message, 8 bytes little endian, over and over, 8 to 512
bytes. In both, ``id`` is the number of the message, counted from 1, and ``user_value``
the CRC-32 of the data. Whoever gets a message of the other side's type checks both and
sends it back as it is; whoever gets one of its own type compares it with what it sent.

Each side has at most half a ring of its own messages on the way, there and back. So the
echoes of the other side's always find room, no handler ever waits, and the two cannot
block each other however fast they send.

To end, a side sends no more of its own and says so, with an empty message of type 2; the
other side does the same in answer. Who has said it, has heard it, and has all its echoes,
closes the link. Sides know each other by their hello; to a stranger, which may be any
echo server, this last message is not sent, and what it sends is echoed unchecked.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import zlib
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from time import monotonic
from typing import TYPE_CHECKING

import click
import msgspec

from kucomms import (
    ClosedError,
    Endpoint,
    KucommsError,
    Link,
    Message,
    PeerClosedError,
    QueueFull,
)
from kucomms.cli._common import (
    SIZE,
    is_live,
    join,
    json_option,
    print_json,
    somebody,
    stop_on_signals,
    timeout_option,
)
from kucomms.transports.base import Listener

if TYPE_CHECKING:
    from kucomms.cli._longtest_view import View

__all__ = ["Longtest", "Summary", "command", "run_side"]

HELLO = b"kucomms longtest 1"
TYPE_A, TYPE_B, TYPE_END = 0, 1, 2
LONGEST = 2047
SMALLEST_RING = 8192
"""Half of it has room for the longest message."""

_HEADER = 32
_BURST = 0.002
"""Seconds that one call of the work handler sends at most."""
_FLOWING = 0.002
"""Seconds after the last message in which the work handler asks to be called at once."""
_GRACE = 5.0
"""Seconds to wait at the end for echoes, counted from the last one."""
_MASK = 0xFFFFFFFFFFFFFFFF


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """What one side counted. Sizes in bytes, without headers; ``seconds`` of the run."""

    url: str
    side: str
    pid: int
    peer_pid: int | None
    ring_size: int
    seconds: float
    sent_count_0: int
    sent_count_1: int
    received_count_0: int
    received_count_1: int
    bytes_sent: int
    bytes_received: int
    messages_per_second: float
    megabytes_per_second: float
    add_error_count: int
    compare_error_count: int
    unanswered: int
    """Own messages that were on the way when the other side closed without notice."""
    error: str | None
    ok: bool


class Longtest:
    """One side: an endpoint, its handlers, and what they count.

    ``rate``: own messages per second, None for as many as go. ``on_second(test)`` is
    called by the timer handler.
    """

    def __init__(
        self,
        url: str,
        *,
        listens: bool,
        rate: float | None = None,
        on_second: Callable[[Longtest], None] | None = None,
    ) -> None:
        self.url = url
        self.side = "B" if listens else "A"
        self.own, self.other = (TYPE_B, TYPE_A) if listens else (TYPE_A, TYPE_B)
        self.rate = rate
        self.link: Link | None = None
        self.opened = asyncio.Event()
        self.over = asyncio.Event()
        """The link is closed."""
        self.finished = asyncio.Event()
        """Both sides have sent all they will, and our echoes are all here."""
        self.sent = [0, 0]
        self.received = [0, 0]
        self.bytes_sent = 0
        self.bytes_received = 0
        self.add_errors = 0
        self.compare_errors = 0
        self.error: KucommsError | None = None
        self.stopping = False
        self._make = self._make_numbered if listens else self._make_random
        self._on_second = on_second
        self._random = random.Random()  # noqa: S311 - to differ, not to be secret
        self._outstanding: deque[Message] = deque()
        self._in_flight = 0
        self._window = 0
        self._next_own = 1
        self._next_other = 1
        self._peer_is_longtest = False
        self._end_sent = False
        self._end_received = False
        self._allowance = 0.0
        self._last_work = 0.0
        self._progress = 0.0
        self._received_before = 0
        self._begin = 0.0
        self._end = 0.0
        self.endpoint = Endpoint(
            f"longtest {self.side}",
            on_message=self._message,
            on_work=self._work,
            on_timer=self._timer,
            on_link_open=self._open,
            on_link_close=self._close,
        )

    # ---- handlers -----------------------------------------------------------

    def _open(self, link: Link) -> None:
        self.link = link
        self._window = link.ring_size // 2 - _HEADER  # leaves room to say that it is over
        self._peer_is_longtest = link.peer.hello == HELLO
        self._begin = self._last_work = monotonic()
        self.opened.set()

    def _close(self, link: Link, error: KucommsError | None) -> None:
        self.error = error
        self.stopping = True
        self._ended()
        if error is not None or self._end_received:
            self.compare_errors += len(self._outstanding)  # they will not come any more
            self._outstanding.clear()
        self.opened.set()
        self.over.set()

    async def _message(self, message: Message, link: Link) -> None:
        kind = message.type
        if kind == self.own:
            self.received[kind] += 1
            self.bytes_received += len(message.data)
            if self._outstanding and message == self._outstanding[0]:
                self._in_flight -= _span(self._outstanding.popleft())
            else:
                self._mismatch(message)
            if self._end_sent:
                self._check_finished()
        elif kind == self.other:
            self.received[kind] += 1
            self.bytes_received += len(message.data)
            if self._peer_is_longtest:
                self._check_other(message)
            if await self._send(link, message):
                self.sent[kind] += 1
                self.bytes_sent += len(message.data)
        elif kind == TYPE_END and self._peer_is_longtest:
            self._end_received = True
            await self.stop()
        else:
            self.compare_errors += 1

    def _work(self) -> bool:
        link = self.link
        if link is None or self.stopping:
            return False
        now = monotonic()
        sent = self._send_burst(link, now)
        if self.rate is not None:
            return False
        received = sum(self.received)
        if sent or received != self._received_before:
            self._received_before = received
            self._progress = now
        return now - self._progress < _FLOWING

    def _timer(self, _now: float) -> None:
        if self._on_second is not None and self.link is not None:
            self._on_second(self)

    # ---- sending ------------------------------------------------------------

    def _send_burst(self, link: Link, now: float) -> int:
        """Send own messages while there is room for them and their echoes."""
        limit = sys.maxsize
        if self.rate is not None:
            self._allowance += self.rate * (now - self._last_work)
            self._allowance = min(self._allowance, max(1.0, self.rate / 4))
            self._last_work = now
            limit = int(self._allowance)
        count = 0
        end = now + _BURST
        while count < limit:
            message = self._make(self._next_own)
            span = _span(message)
            if self._in_flight + span > self._window or link.tx_free < span:
                break
            try:
                link.send_nowait(message)
            except QueueFull:
                self.add_errors += 1
                break
            except (PeerClosedError, ClosedError):
                break  # the close handler is told why
            self._next_own += 1
            self._in_flight += span
            self._outstanding.append(message)
            self.bytes_sent += len(message.data)
            count += 1
            if monotonic() > end:
                break
        self.sent[self.own] += count
        if self.rate is not None:
            self._allowance -= count
        return count

    def _make_random(self, number: int) -> Message:
        data = self._random.randbytes(int(self._random.random() * (LONGEST + 1)))
        return Message(data, TYPE_A, number, zlib.crc32(data))

    def _make_numbered(self, number: int) -> Message:
        data = (number & _MASK).to_bytes(8, "little") * (1 + number % 64)
        return Message(data, TYPE_B, number & _MASK, zlib.crc32(data))

    async def _send(self, link: Link, message: Message) -> bool:
        try:
            await link.send(message)
        except QueueFull:  # only a peer that does not keep to half a ring gets us here
            self.add_errors += 1
            return False
        except (PeerClosedError, ClosedError):
            return False
        return True

    # ---- checking -----------------------------------------------------------

    def _check_other(self, message: Message) -> None:
        """The other side's message, on its first way."""
        good = (
            message.id == self._next_other
            and message.user_value == zlib.crc32(message.data)
            and (message.type == TYPE_A or message.data[:8] == message.id.to_bytes(8, "little"))
        )
        if not good:
            self.compare_errors += 1
        self._next_other = message.id + 1 & _MASK

    def _mismatch(self, echo: Message) -> None:
        """Count what is missing or wrong, for an echo that is not the one that is next."""
        outstanding = self._outstanding
        position = next((n for n, sent in enumerate(outstanding) if sent.id == echo.id), None)
        if position is None:  # an echo of nothing: doubled, late, or its id is wrong
            self.compare_errors += 1
            return
        self.compare_errors += position
        for _ in range(position):
            self._in_flight -= _span(outstanding.popleft())
        expected = outstanding.popleft()
        self._in_flight -= _span(expected)
        if echo != expected:
            self.compare_errors += 1

    # ---- the end ------------------------------------------------------------

    async def stop(self) -> None:
        """Send no more messages of our own, and say so."""
        self.stopping = True
        link = self.link
        if link is None:
            return
        if not self._end_sent:
            self._end_sent = True
            if self._peer_is_longtest:
                await self._send(link, Message(b"", TYPE_END))
        self._check_finished()

    async def finish(self) -> None:
        """As ``stop``, and wait for echoes as long as they come; then close the link."""
        await self.stop()
        link = self.link
        if link is None:
            return
        outstanding = -1
        while not self.finished.is_set() and not self.over.is_set():
            if outstanding == len(self._outstanding):
                self.compare_errors += outstanding
                self._outstanding.clear()
                break
            outstanding = len(self._outstanding)
            done = [asyncio.ensure_future(e.wait()) for e in (self.finished, self.over)]
            await asyncio.wait(done, timeout=_GRACE, return_when=asyncio.FIRST_COMPLETED)
            for wait in done:
                wait.cancel()
        self._ended()
        await link.aclose()

    def _check_finished(self) -> None:
        heard = self._end_received or not self._peer_is_longtest
        if self._end_sent and heard and not self._outstanding:
            self._ended()
            self.finished.set()

    def _ended(self) -> None:
        self._end = self._end or monotonic()

    # ---- what it counted ----------------------------------------------------

    @property
    def seconds(self) -> float:
        """Seconds since the link opened, until all was over."""
        return ((self._end or monotonic()) - self._begin) if self._begin else 0.0

    @property
    def tx_avail(self) -> int:
        """Bytes that the other side has not read yet."""
        return self.link.tx_avail if self.link is not None and not self.link.closed else 0

    def lines(self) -> str:
        """The two lines of the reference manual."""
        return (
            f"avail_tx0={self.tx_avail} : add_error_count={self.add_errors} : "
            f"compare_error_count={self.compare_errors}\n"
            f"sent_count_0={self.sent[0]} : sent_count_1={self.sent[1]} : "
            f"received_count_0={self.received[0]} : received_count_1={self.received[1]}"
        )

    def summary(self) -> Summary:
        """The counts so far."""
        seconds = self.seconds
        per_second = 1 / seconds if seconds else 0.0
        errors = self.add_errors + self.compare_errors
        return Summary(
            url=self.url,
            side=self.side,
            pid=os.getpid(),
            peer_pid=self.link.peer.pid if self.link else None,
            ring_size=self.link.ring_size if self.link else 0,
            seconds=round(seconds, 3),
            sent_count_0=self.sent[0],
            sent_count_1=self.sent[1],
            received_count_0=self.received[0],
            received_count_1=self.received[1],
            bytes_sent=self.bytes_sent,
            bytes_received=self.bytes_received,
            messages_per_second=round((sum(self.sent) + sum(self.received)) * per_second, 1),
            megabytes_per_second=round(
                (self.bytes_sent + self.bytes_received) * per_second / 1e6, 2
            ),
            add_error_count=self.add_errors,
            compare_error_count=self.compare_errors,
            unanswered=len(self._outstanding),
            error=None if self.error is None else str(self.error),
            ok=not errors and self.error is None and all(self.sent) and all(self.received),
        )


def _span(message: Message) -> int:
    """Bytes that a message takes in the ring."""
    return _HEADER + (len(message.data) + 7 & ~7)


# ---- running one ------------------------------------------------------------


async def run_side(
    url: str,
    *,
    listen: bool,
    seconds: float | None = None,
    rate: float | None = None,
    ring_size: int | None = None,
    timeout: float | None = None,
    plain: bool = False,
    quiet: bool = False,
    view: View | None = None,
) -> Summary:
    """Run one side to its end: the seconds over, control-C, or the peer has closed.

    ``plain`` prints the two lines each second; ``view`` shows the run live; ``quiet`` does
    not say where it listens. Raises what
    listening and connecting raise, and NotReadyError when nobody comes within
    ``timeout`` seconds.
    """

    def each_second(test: Longtest) -> None:
        if plain:
            print(test.lines(), flush=True)

    test = Longtest(url, listens=listen, rate=rate, on_second=each_second)
    with stop_on_signals() as stop, view.watch(test) if view else nullcontext():
        test.endpoint.on_error(stop.fail)
        async with test.endpoint:
            joined = await join(
                test.endpoint,
                url,
                listen=listen,
                ring_size=ring_size,
                timeout=timeout,
                quiet=quiet,
                max_links=1,
                hello=HELLO,
            )
            if isinstance(joined, Listener):
                await somebody(stop, test.opened, url, timeout)
                await joined.aclose()
            else:
                await test.opened.wait()
            await stop.until(test.over, seconds)
            await test.finish()
            if test.link is not None:
                await test.over.wait()
        stop.raise_error()
    return test.summary()


def summary_text(summary: Summary) -> str:
    """The summary for a person."""
    errors = f"add_error_count={summary.add_error_count} compare_error_count=" + str(
        summary.compare_error_count
    )
    lines = [
        f"longtest {summary.side} at {summary.url}: {'ok' if summary.ok else 'FAILED'}",
        f"  duration   {summary.seconds:.1f} s, ring of {summary.ring_size} bytes",
        f"  type 0     {summary.sent_count_0} sent, {summary.received_count_0} received",
        f"  type 1     {summary.sent_count_1} sent, {summary.received_count_1} received",
        f"  rate       {summary.messages_per_second:.0f} messages/s, "
        f"{summary.megabytes_per_second:.1f} MB/s, both ways",
        f"  errors     {errors}",
    ]
    if summary.unanswered:
        lines.append(f"  unanswered {summary.unanswered} when the other side closed")
    if summary.error:
        lines.append(f"  {summary.error}")
    return "\n".join(lines)


EPILOG = """\b
Example, in two terminals:
  kucomms longtest --listen shm://lab
  kucomms longtest shm://lab --seconds 10

\b
Or with the kernel, when its module kucomms_longtest is loaded:
  kucomms longtest kernel://longtest
"""


@click.command("longtest", epilog=EPILOG)
@click.argument("url")
@click.option("--listen", is_flag=True, help="Be the listening side, B; else the connecting, A.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="End after N seconds.  [default: at control-C, or when the other side ends]",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="N",
    help="Send N messages a second of our own.  [default: as many as go]",
)
@click.option(
    "--ring-size",
    type=SIZE,
    help="Bytes of each direction's ring, 8K at least.  [default: 1M, or the listener's]",
)
@timeout_option
@json_option("Print nothing but the summary, as one JSON object.")
def command(
    *,
    url: str,
    listen: bool,
    seconds: float | None,
    rate: float | None,
    ring_size: int | None,
    timeout: float | None,
    as_json: bool,
) -> int:
    """Exchange and verify messages with another longtest at URL.

    The connecting side sends messages of type 0, of 0 to 2047 random bytes, the listening
    side numbered ones of type 1; each echoes the other's, and checks that its own come
    back unchanged and in order. Every message is verified, always. At kernel://longtest
    the other side is the kernel module kucomms_longtest.

    On a terminal it is shown live. Otherwise there are two lines a second: avail_tx0 is
    what the other side has not read yet, in bytes; add_error_count counts sends that
    failed although there was room, compare_error_count echoes that differ, are missing or
    are out of order.

    Exit code: 0 when there was no error and messages of both types went both ways, else
    1. Control-C ends both sides in order and does not change the code.
    """
    import kucomms
    from kucomms.cli._longtest_view import View

    if ring_size is not None and ring_size < SMALLEST_RING:
        raise click.UsageError(f"--ring-size must be at least {SMALLEST_RING}")
    live = not as_json and is_live()
    summary = kucomms.run(
        run_side(
            url,
            listen=listen,
            seconds=seconds,
            rate=rate,
            ring_size=ring_size,
            timeout=timeout,
            plain=not as_json and not live,
            quiet=as_json or live,
            view=View(seconds) if live else None,
        )
    )
    if as_json:
        print_json(summary)
    else:
        print(summary_text(summary))
    return 0 if summary.ok else 1
