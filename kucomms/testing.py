# SPDX-License-Identifier: MIT
"""The conformance suite: what every transport must do.

For authors of transports. Say how to start a ``Responder`` on the other side of your
transport by writing a ``Harness``, then run each of ``CHECKS`` against it, on every loop
that you support::

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    async def test_conformance(check):
        await check(MyHarness())

A check is a coroutine function of a harness; it raises AssertionError, or whatever went
wrong. It waits for events only, never for time to pass, except where time is its
subject.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import zlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any

import msgspec

import kucomms
from kucomms import (
    ClosedError,
    Endpoint,
    HeaderValueError,
    Link,
    Message,
    MessageTooLargeError,
    NotReadyError,
    OutOfTurnError,
    PeerClosedError,
    QueueEmpty,
    QueueFull,
    Token,
    UsageError,
)

__all__ = ["CHECKS", "Harness", "Report", "Responder", "numbered", "verify"]

ECHO, REPLY, STREAM, SINK, REPORT, CLOSE, HOLD, RELEASE, LATE = range(9)
"""What a Responder does with a message of this type."""

PATIENCE = 60.0
"""Seconds after which something that should have happened did not."""


# ---- messages that can be checked -------------------------------------------


def numbered(number: int, size: int, type: int = 0) -> Message:
    """Message ``number``: ``size`` bytes made from the number, with their checksum."""
    data = random.Random(number).randbytes(size)
    return Message(data, type=type, id=number, user_value=zlib.crc32(data))


def verify(message: Message, number: int) -> None:
    """Raise AssertionError unless this is message ``number``, whole."""
    assert message.id == number, f"expected message {number}, got {message.id}"
    assert zlib.crc32(message.data) == message.user_value, f"message {number} is damaged"


class Report(msgspec.Struct):
    """What a Responder has received of type SINK, over all its links."""

    count: int = 0
    size: int = 0
    damaged: int = 0
    out_of_order: int = 0
    links: int = 0


# ---- the other side ---------------------------------------------------------


class Responder:
    """The other side of a check: does what it is told, by the type of each message.

    ECHO: sends it back. REPLY: replies with the same data. LATE: replies to it as soon
    as the next LATE has come. STREAM: sends ``user_value`` numbered messages of up to
    ``id`` bytes, type STREAM. SINK: counts and checks it. REPORT: replies with a Report.
    CLOSE: closes the link. HOLD: replies, then reads no more of this link until RELEASE
    comes over another one.

    Its messages are awaited by a task for each link; with ``handler=True`` they come to a
    message handler instead, a borrowing one with ``borrow=True``, which knows ECHO,
    REPLY, STREAM, SINK and REPORT only.
    """

    def __init__(self, *, handler: bool = False, borrow: bool = False, **options: Any) -> None:
        self.endpoint = Endpoint("responder", **options)
        self._report = Report()
        self._next: dict[Link, int] = {}
        self._released = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._late: dict[Link, Message] = {}
        self.endpoint.on_link_open(self._opened)
        self.endpoint.on_link_close(self._closed)
        self.endpoint.on_error(self._failed)
        if handler:
            self.endpoint.on_message(borrow=borrow)(self._do)
        self._handler = handler

    async def __aenter__(self) -> Responder:
        await self.endpoint.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.endpoint.aclose()

    def _opened(self, link: Link) -> None:
        self._report.links += 1
        self._next[link] = 0
        if not self._handler:
            task = asyncio.get_running_loop().create_task(self._attend(link))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _failed(self, error: BaseException, name: str) -> None:
        if not isinstance(error, QueueFull | PeerClosedError | ClosedError):
            raise error

    def _closed(self, link: Link, _error: BaseException | None) -> None:
        self._report.links -= 1
        self._late.pop(link, None)

    async def _attend(self, link: Link) -> None:
        with suppress(PeerClosedError, ClosedError):
            async for message in link:
                await self._do(message, link)

    async def _do(self, message: Message, link: Link) -> None:
        match message.type:
            case 0:
                await link.send(message)
            case 1:
                await link.reply(message, message.data)
            case 2:
                for number in range(message.user_value):
                    size = number % (message.id + 1)
                    await link.send(numbered(number, size, STREAM))
            case 3:
                self._sink(message, link)
            case 4:
                await link.reply(message, msgspec.msgpack.encode(self._report))
            case 5:
                await link.aclose()
            case 6:
                self._released.clear()
                await link.reply(message, b"")
                await self._released.wait()
            case 7:
                self._released.set()
            case 8:
                earlier = self._late.pop(link, None)
                self._late[link] = message
                if earlier is not None:
                    await link.reply(earlier, earlier.data)

    def _sink(self, message: Message, link: Link) -> None:
        report = self._report
        report.count += 1
        report.size += len(message)
        if zlib.crc32(message.data) != message.user_value:
            report.damaged += 1
        if message.id != self._next[link]:
            report.out_of_order += 1
        self._next[link] = message.id + 1


class Harness(ABC):
    """How to reach a Responder over the transport under test."""

    turns = True
    """Whether the responder's listener can be told ``turns=True``."""
    exact_doorbells = False
    """Whether the peer cannot run, and so not park again, while the check does."""

    @abstractmethod
    def new_url(self) -> str:
        """A URL at which nobody listens."""

    @abstractmethod
    def responder(self, url: str, **options: Any) -> AbstractAsyncContextManager[None]:
        """Run a ``Responder(**options)`` that listens at ``url``.

        ``ring_size``, ``max_ring_size``, ``max_links`` and ``turns`` are listen's.
        """

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the responder from running at all, meanwhile."""
        yield

    @asynccontextmanager
    async def link(self, **options: Any) -> Any:
        """A link to a responder, its messages awaited."""
        url = self.new_url()
        async with self.responder(url, **options), kucomms.connect(url, timeout=PATIENCE) as link:
            yield link


async def report(link: Link) -> Report:
    """What the responder has received."""
    reply = await link.request(b"", type=REPORT, timeout=PATIENCE)
    return msgspec.msgpack.decode(reply.data, type=Report)


async def expect(error: type[BaseException], awaitable: Awaitable[Any]) -> BaseException:
    """Await something that must raise ``error``."""
    try:
        await awaitable
    except error as raised:
        return raised
    raise AssertionError(f"{error.__name__} was not raised")


def expect_call(error: type[BaseException], call: Callable[[], Any]) -> BaseException:
    """Call something that must raise ``error``."""
    try:
        call()
    except error as raised:
        return raised
    raise AssertionError(f"{error.__name__} was not raised")


# ---- messages ---------------------------------------------------------------


async def check_sizes(harness: Harness) -> None:
    """0, 1, a page and one around it, exactly the largest; one more is refused."""
    async with harness.link(ring_size=1 << 14) as link:
        largest = link.max_message_size
        assert largest == link.ring_size - 32
        for number, size in enumerate([0, 1, 4095, 4096, 4097, largest, 0, largest]):
            message = numbered(number, size)
            await link.send(message)
            answer = await link.receive()
            verify(answer, number)
            assert answer == message
            assert len(answer) == size
        before = link.statistics().messages_sent
        too_large = bytes(largest + 1)
        await expect(MessageTooLargeError, link.send(too_large))
        expect_call(MessageTooLargeError, lambda: link.send_nowait(too_large))
        expect_call(MessageTooLargeError, lambda: link.send_threadsafe(too_large))
        await expect(MessageTooLargeError, link.send_many([too_large]))
        expect_call(MessageTooLargeError, lambda: link.loan(largest + 1).__enter__())
        error = await expect(MessageTooLargeError, link.request(too_large))
        assert link.url in str(error)
        assert link.statistics().messages_sent == before
        await link.send(b"still works")
        assert (await link.receive()).data == b"still works"


async def check_header(harness: Harness) -> None:
    """All 64 bits of each header field belong to the user; keywords override a Message."""
    top = 2**64 - 1
    async with harness.link() as link:
        await link.send(b"x", type=ECHO, id=top, user_value=top)
        assert await link.receive() == Message(b"x", type=0, id=top, user_value=top)
        message = Message(b"y", type=ECHO, id=5, user_value=6)
        await link.send(message, id=7)
        assert await link.receive() == Message(b"y", type=0, id=7, user_value=6)
        link.send_nowait(message, user_value=0)
        assert await link.receive() == Message(b"y", type=0, id=5, user_value=0)
        for data in (bytearray(b"abc"), memoryview(b"abc"), memoryview(b"xabcx")[1:4]):
            await link.send(data)
            assert (await link.receive()).data == b"abc"


async def check_bad_arguments(harness: Harness) -> None:
    """What cannot be sent is refused, the URL named, and nothing was sent."""
    async with harness.link() as link:
        before = link.statistics().messages_sent
        for data in ("text", None, 5, [b"x"], memoryview(b"abcdef")[::2]):
            bad = BufferError if isinstance(data, memoryview) else TypeError
            calls: tuple[Callable[..., None], ...] = (link.send_nowait, link.send_threadsafe)
            for call in calls:
                error = expect_call(bad, partial(call, data))
                assert link.url in str(error)
            await expect(bad, link.send(data))
            await expect(bad, link.send_many([data]))
            await expect(bad, link.request(data))
        for value in (-1, 2**64, -(2**70)):
            for name in ("type", "id", "user_value"):
                error = await expect(HeaderValueError, link.send(b"", **{name: value}))
                assert link.url in str(error)
                expect_call(HeaderValueError, link.loan(1, **{name: value}).__enter__)
            await expect(HeaderValueError, link.send(Message(b"", id=value)))
        wrong: Any = "1"
        await expect(TypeError, link.send(b"", type=wrong))
        expect_call(HeaderValueError, lambda: link.loan(-1).__enter__())
        assert link.statistics().messages_sent == before


async def check_stream_both_ways(harness: Harness) -> None:
    """Many messages of all sizes each way at once: in order, whole, each once."""
    count = 3000
    async with harness.link(ring_size=1 << 15) as link, asyncio.TaskGroup() as tasks:
        await link.send(b"", type=STREAM, id=2047, user_value=count)

        async def send() -> None:
            for number in range(count):
                await link.send(numbered(number, number % 2048, SINK))

        tasks.create_task(send())
        for number in range(count):
            verify(await link.receive(), number)
        async with asyncio.timeout(PATIENCE):
            while (seen := await report(link)).count < count:
                pass
        assert (seen.damaged, seen.out_of_order, seen.count) == (0, 0, count)


async def check_many_at_once(harness: Harness) -> None:
    """send_many and send_many_nowait: in order, all or a prefix."""
    async with harness.link(ring_size=1 << 14) as link:
        messages = [numbered(number, number % 100, SINK) for number in range(2000)]
        assert await link.send_many(iter(messages)) == 2000
        assert (await report(link)).count == 2000
        assert await link.send_many([]) == 0
        bad = [numbered(2000, 1, SINK), "not bytes", numbered(2001, 1, SINK)]
        await expect(TypeError, link.send_many(bad))
        assert (await report(link)).count == 2001
        sent = 2001
        async with kucomms.connect(link.url, timeout=PATIENCE) as other:
            await link.request(b"", type=HOLD, timeout=PATIENCE)
            more = [numbered(sent + number, 1000, SINK) for number in range(2000)]
            count = link.send_many_nowait(more)
            assert 0 < count < 2000
            total = count
            while (count := link.send_many_nowait(more[total:])) > 0:
                total += count
            await other.send(b"", type=RELEASE)
            assert await link.send_many(more[total:]) == 2000 - total
            seen = await report(link)
        assert (seen.count, seen.damaged, seen.out_of_order) == (4001, 0, 0)


# ---- back-pressure ----------------------------------------------------------


def _fill(link: Link, start: int) -> int:
    """Send until the ring is full, to a peer that holds; returns the next number."""
    for number in itertools.count(start):
        try:
            link.send_nowait(numbered(number, 500, SINK))
        except QueueFull as error:
            assert link.url in str(error)
            return number
    raise AssertionError


async def check_full(harness: Harness) -> None:
    """A peer that does not read: QueueFull, waiting senders in order, nothing lost."""
    async with harness.link(ring_size=1 << 16) as link:
        async with kucomms.connect(link.url, timeout=PATIENCE) as other:
            await link.request(b"", type=HOLD, timeout=PATIENCE)
            number = _fill(link, 0)
            assert link.tx_free < 544
            tasks = []
            for extra in range(20):
                message = numbered(number + extra, 500, SINK)
                tasks.append(asyncio.ensure_future(link.send(message)))
                await asyncio.sleep(0)
            expect_call(QueueFull, lambda: link.send_nowait(b""))  # others wait
            expect_call(QueueFull, lambda: link.loan(1).__enter__())
            assert not any(task.done() for task in tasks)
            await other.send(b"", type=RELEASE)
            await asyncio.gather(*tasks)
        seen = await report(link)
        assert (seen.count, seen.damaged, seen.out_of_order) == (number + 20, 0, 0)
        assert link.statistics().full_waits > 0


async def check_cancelled_send(harness: Harness) -> None:
    """A cancelled send was not sent, and those behind it have their turn."""
    async with harness.link(ring_size=1 << 16) as link:
        async with kucomms.connect(link.url, timeout=PATIENCE) as other:
            await link.request(b"", type=HOLD, timeout=PATIENCE)
            number = _fill(link, 0)
            tasks = [asyncio.ensure_future(link.send(bytes(600), type=SINK)) for _ in range(5)]
            last = asyncio.ensure_future(link.send(numbered(number, 500, SINK)))
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await other.send(b"", type=RELEASE)
            await last
            for task in tasks:
                await expect(asyncio.CancelledError, task)
        seen = await report(link)
        assert (seen.count, seen.damaged, seen.out_of_order) == (number + 1, 0, 0)


async def check_threads(harness: Harness) -> None:
    """send_threadsafe from two threads while the loop sends too: nothing lost or mixed."""
    count = 1000
    async with harness.link(ring_size=1 << 14) as link:

        def work(start: int) -> None:
            for number in range(start, start + count):
                link.send_threadsafe(numbered(number, number % 300, ECHO))

        threads = [threading.Thread(target=work, args=(base * count,)) for base in (1, 2)]
        for thread in threads:
            thread.start()

        async def send() -> None:
            for number in range(count):
                await link.send(numbered(number, number % 300, ECHO))

        sender = asyncio.ensure_future(send())
        following = [0, count, 2 * count]
        for _ in range(3 * count):
            message = await link.receive()
            who = message.id // count
            verify(message, following[who])
            following[who] += 1
        await sender
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        expect_call(QueueEmpty, link.receive_nowait)


async def check_threadsafe_timeout(harness: Harness) -> None:
    """send_threadsafe gives up after its timeout, and then nothing was sent."""
    async with harness.link(ring_size=1 << 16) as link:
        async with kucomms.connect(link.url, timeout=PATIENCE) as other:
            await link.request(b"", type=HOLD, timeout=PATIENCE)
            number = _fill(link, 0)
            expect_call(UsageError, lambda: link.send_threadsafe(bytes(600)))  # the loop's thread

            await expect(
                QueueFull, asyncio.to_thread(link.send_threadsafe, bytes(600), timeout=0.0)
            )
            await expect(QueueFull, asyncio.to_thread(lambda: _fail_soon(link)))
            patient = asyncio.ensure_future(
                asyncio.to_thread(link.send_threadsafe, numbered(number, 600, SINK))
            )
            await other.send(b"", type=RELEASE)
            await patient
        seen = await report(link)
        assert (seen.count, seen.damaged, seen.out_of_order) == (number + 1, 0, 0)


def _fail_soon(link: Link) -> None:
    link.send_threadsafe(bytes(600), type=SINK, timeout=0.05)


async def check_receiving_threads(harness: Harness) -> None:
    """Threads that receive beside tasks: each message goes to one of them, in order for each."""
    count, receivers = 600, 2
    async with harness.link() as link:
        got: list[list[Message]] = [[] for _ in range(receivers + 1)]

        def work(mine: list[Message]) -> None:
            while (message := link.receive_threadsafe(timeout=PATIENCE)).type == STREAM:
                mine.append(message)

        async def receive() -> None:
            while (message := await link.receive()).type == STREAM:
                got[-1].append(message)

        threads = [asyncio.to_thread(work, got[number]) for number in range(receivers)]
        waiting = [asyncio.ensure_future(thread) for thread in (*threads, receive())]
        await link.send(b"", type=STREAM, id=300, user_value=count)
        for _ in waiting:
            await link.send(b"the end", type=ECHO)
        await asyncio.gather(*waiting)
        for mine in got:
            assert [message.id for message in mine] == sorted(message.id for message in mine)
        every = sorted((message for mine in got for message in mine), key=lambda m: m.id)
        assert len(every) == count
        for number, message in enumerate(every):
            verify(message, number)
        expect_call(QueueEmpty, link.receive_nowait)


async def check_receiving_thread_gives_up(harness: Harness) -> None:
    """receive_threadsafe loses nothing when its time is up, however short that is."""
    count = 400
    async with harness.link() as link:

        def look() -> Message:
            message: Message = link.receive_threadsafe(timeout=0)
            return message

        def work() -> list[Message]:
            chance = random.Random(count)
            messages: list[Message] = []
            while not messages or messages[-1].type == STREAM:
                with suppress(QueueEmpty):
                    messages.append(link.receive_threadsafe(chance.choice([0, 1e-5, 1e-4, 1e-3])))
            return messages[:-1]

        error = await expect(QueueEmpty, asyncio.to_thread(look))
        assert link.url in str(error)
        await expect(QueueEmpty, asyncio.to_thread(link.receive_threadsafe, 0.05))
        working = asyncio.ensure_future(asyncio.to_thread(work))
        await link.send(b"", type=STREAM, id=100, user_value=count)
        while not working.done():
            await link.send(b"the end", type=ECHO)
            await asyncio.wait([working], timeout=0.01)
        messages = await working
        assert len(messages) == count
        for number, message in enumerate(messages):
            verify(message, number)
        while await report(link) and link.rx_avail:
            assert (await link.receive()).data == b"the end"
        # those who wait are served first come, first served
        receiving = asyncio.ensure_future(link.receive())
        await asyncio.sleep(0)
        await expect(QueueEmpty, asyncio.to_thread(look))
        await link.send(b"mine", type=ECHO)
        assert (await receiving).data == b"mine"


async def check_receiving_thread_ends(harness: Harness) -> None:
    """receive_threadsafe in the loop's thread, and when the link is closed, by either side."""
    async with harness.link() as link:
        error = expect_call(UsageError, lambda: link.receive_threadsafe(0))
        assert link.url in str(error)
        async with kucomms.connect(link.url, timeout=PATIENCE) as other:
            waiting = asyncio.ensure_future(asyncio.to_thread(other.receive_threadsafe))
            await other.send(b"", type=CLOSE)
            await expect(PeerClosedError, waiting)
        waiting = asyncio.ensure_future(asyncio.to_thread(link.receive_threadsafe))
        await link.request(b"", type=REPLY, timeout=PATIENCE)
        await link.aclose()
        await expect(ClosedError, waiting)
        await expect(ClosedError, asyncio.to_thread(link.receive_threadsafe, 0))


async def check_wrong_thread(harness: Harness) -> None:
    """All but the methods for threads belongs to the loop's thread, and says so."""
    async with harness.link() as link:
        calls: list[Callable[[], Any]] = [
            lambda: link.send_nowait(b""),
            lambda: link.send_many_nowait([b""]) and None,
            link.receive_nowait,
            lambda: link.loan(1).__enter__(),
            link.borrow,
        ]
        for call in calls:
            error = await expect(UsageError, asyncio.to_thread(call))
            assert link.url in str(error)

        for make in (
            lambda: link.send(b""), link.receive, lambda: link.request(b""), link.aclose,
        ):
            await expect(UsageError, asyncio.to_thread(_in_new_loop, make))
        await asyncio.to_thread(link.send_threadsafe, b"fine")
        assert (await link.receive()).data == b"fine"


def _in_new_loop(make: Callable[[], Awaitable[Any]]) -> None:
    async def main() -> None:
        await make()

    asyncio.run(main())


# ---- receiving --------------------------------------------------------------


async def check_receive(harness: Harness) -> None:
    """receive, receive_nowait, several receivers in order, and cancelling them."""
    async with harness.link() as link:
        expect_call(QueueEmpty, link.receive_nowait)
        first, second, third = (asyncio.ensure_future(link.receive()) for _ in range(3))
        await asyncio.sleep(0)
        expect_call(QueueEmpty, link.receive_nowait)
        second.cancel()
        for number in range(2):
            await link.send(numbered(number, 10))
        verify(await first, 0)
        verify(await third, 1)
        await expect(asyncio.CancelledError, second)
        await link.send(b"", type=STREAM, id=10, user_value=200)
        number = 0
        async for message in link:
            verify(message, number)
            number += 1
            if number == 200:
                break
        statistics = link.statistics()
        assert statistics.messages_received == 202
        assert statistics.messages_sent == 3
        assert statistics.bytes_sent == 20
        assert statistics.protocol_errors == 0
        assert link.rx_avail == 0
        assert link.rx_free == link.ring_size


async def check_cancel_storm(harness: Harness) -> None:
    """Cancelling send, receive, request and borrow at random loses and doubles nothing."""
    await cancel_storm(harness, 600)


async def cancel_storm(harness: Harness, rounds: int) -> None:
    """``rounds`` operations, about half of them cancelled at a random moment."""
    chance = random.Random(rounds)
    before = len(asyncio.all_tasks())
    async with harness.link(ring_size=1 << 14) as link:
        sent: list[int] = []
        received: list[int] = []

        async def send(number: int) -> None:
            await link.send(numbered(number, chance.randrange(200), ECHO))
            sent.append(number)

        async def receive() -> None:
            received.append((await link.receive()).id)

        async def borrow() -> None:
            async with link.borrow() as message:
                received.append(message.id)

        async def request() -> None:
            await link.request(b"question", type=REPLY)

        tasks: list[asyncio.Task[None]] = []
        for number in range(rounds):
            kinds: list[Callable[[], Coroutine[Any, Any, None]]] = [
                partial(send, number), receive, borrow, request,
            ]
            kind = chance.choice(kinds)
            tasks.append(asyncio.ensure_future(kind()))
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            if chance.random() < 0.5:
                chance.choice(tasks).cancel()
            if len(tasks) > 50:
                tasks.pop(0).cancel()
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result
        # What was sent must come back: as much as was not received in a task above.
        await link.send(b"", type=ECHO, id=2**63)
        while (message := await link.receive()).id != 2**63:
            received.append(message.id)
        assert received == sent, "a message was lost, doubled, or out of order"
        assert (await link.request(b"q", type=REPLY, timeout=PATIENCE)).data == b"q"
    assert len(asyncio.all_tasks()) <= before, "a task was left"


async def check_borrow(harness: Harness) -> None:
    """Messages in place: read-only, several at once, released in any order."""
    async with harness.link(ring_size=1 << 14) as link:
        for number in range(4):
            await link.send(numbered(number, 1000))
        one, two, three = link.borrow(), link.borrow(), link.borrow()
        messages = [await borrow.__aenter__() for borrow in (one, two, three)]
        for number, message in enumerate(messages):
            verify(message, number)
            assert isinstance(message.data, memoryview)
            assert message.data.readonly
        await two.__aexit__(None, None, None)
        await one.__aexit__(None, None, None)
        verify(messages[2], 2)
        await three.__aexit__(None, None, None)
        expect_call(ValueError, lambda: messages[2].data[0])  # the view is released
        verify(await link.receive(), 3)
        # the whole ring can be used again, many times over
        for number in range(100):
            await link.send(numbered(number, 1500))
            async with link.borrow() as message:
                verify(message, number)
                await link.send(message, type=SINK)


async def check_borrow_survivor(harness: Harness) -> None:
    """A slice that outlives its block is an error; its bytes stay until it dies."""
    async with harness.link(ring_size=1 << 12) as link:
        await link.send(b"a" * 2000)
        try:
            async with link.borrow() as message:
                survivor = message.data[1:3]
        except BufferError as error:
            assert link.url in str(error)
        else:
            raise AssertionError("the surviving slice was not noticed")
        # the echo of this does not fit behind the 2000 bytes that are still taken
        await link.send(b"b" * 2100)
        for _ in range(50):
            await asyncio.sleep(0)
        assert bytes(survivor) == b"aa"
        expect_call(QueueEmpty, link.receive_nowait)
        survivor.release()
        assert (await link.receive()).data == b"b" * 2100


async def check_loan(harness: Harness) -> None:
    """Messages written in place: committed in any order, discarded, too many."""
    async with harness.link(ring_size=1 << 14) as link:
        with link.loan(3, type=ECHO, id=7, user_value=8) as loan:
            loan.data[:] = b"abc"
        assert await link.receive() == Message(b"abc", type=0, id=7, user_value=8)
        try:
            with link.loan(3) as loan:
                loan.data[:] = b"bad"
                raise KeyError
        except KeyError:
            pass
        first, second = link.loan(1, id=1), link.loan(1, id=2)
        for loan in (first, second):
            loan.__enter__()
            loan.data[:] = b"x"
        await link.send(b"", id=3)
        second.__exit__(None, None, None)
        for _ in range(20):
            await asyncio.sleep(0)
        expect_call(QueueEmpty, link.receive_nowait)  # the first one is not finished
        first.__exit__(None, None, None)
        assert [(await link.receive()).id for _ in range(3)] == [1, 2, 3]
        with link.loan(0):
            pass
        assert (await link.receive()).data == b""
        loans = []
        try:
            while True:
                loan = link.loan(8)
                loan.__enter__()
                loans.append(loan)
        except QueueFull:
            pass
        for loan in loans:
            loan.__exit__(KeyError, KeyError(), None)
        await link.send(b"end")
        assert (await link.receive()).data == b"end"


async def check_loan_survivor(harness: Harness) -> None:
    """A slice of a loan that outlives its block: BufferError, and nothing was sent."""
    async with harness.link(ring_size=1 << 12) as link:
        try:
            with link.loan(1000) as loan:
                survivor = loan.data[10:20]
        except BufferError as error:
            assert link.url in str(error)
        else:
            raise AssertionError("the surviving slice was not noticed")
        for number in range(2):  # the survivor cannot spoil what comes later
            await link.send(numbered(number, 1000))
            survivor[:] = b"\xff" * 10
            verify(await link.receive(), number)
        expect_call(QueueFull, lambda: link.send_nowait(bytes(2000)))
        waiting = asyncio.ensure_future(link.send(numbered(0, link.max_message_size)))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waiting.done()
        survivor.release()  # nobody rings for this space
        await asyncio.wait_for(waiting, PATIENCE)
        verify(await link.receive(), 0)


# ---- requests ---------------------------------------------------------------


async def check_request(harness: Harness) -> None:
    """Replies find their requests, also out of order and beside other messages."""
    async with harness.link() as link:
        assert (await link.request(b"a", type=REPLY)).data == b"a"
        reply = await link.request(b"b", type=REPLY, id=77)
        assert (reply.data, reply.id, reply.type) == (b"b", 77, REPLY)
        slow = asyncio.ensure_future(link.request(b"slow", type=LATE))
        await asyncio.sleep(0)  # it is sent before what follows
        await link.send(numbered(5, 10))
        assert (await link.request(b"quick", type=REPLY)).data == b"quick"
        assert not slow.done()
        verify(await link.receive(), 5)
        await link.send(b"", type=LATE)
        assert (await slow).data == b"slow"
        many = await asyncio.gather(
            *(link.request(str(number).encode(), type=REPLY) for number in range(300))
        )
        assert [reply.data for reply in many] == [str(number).encode() for number in range(300)]


async def check_cancelled_receiver(harness: Harness) -> None:
    """A doorbell that meets a receiver which is cancelled still reaches the requests."""
    url = harness.new_url()
    async with harness.responder(url):
        for turns in range(12):
            async with kucomms.connect(url, timeout=PATIENCE) as link:
                receiver = asyncio.ensure_future(link.receive())
                asked = asyncio.ensure_future(link.request(b"r", type=REPLY))
                for _ in range(turns):
                    await asyncio.sleep(0)
                receiver.cancel()
                assert (await asyncio.wait_for(asked, PATIENCE)).data == b"r"
                await expect(asyncio.CancelledError, receiver)


async def check_request_timeout(harness: Harness) -> None:
    """A request that times out; its late reply is dropped and counted."""
    async with harness.link() as link:
        error = await expect(TimeoutError, link.request(b"x", type=LATE, timeout=0.05))
        assert link.url in str(error)
        pending = asyncio.ensure_future(link.request(b"y", type=LATE, id=9))
        await asyncio.sleep(0)
        await expect(UsageError, link.request(b"z", type=LATE, id=9))
        assert (await link.request(b"q", type=REPLY, timeout=PATIENCE)).data == b"q"
        assert link.statistics().late_replies == 1
        pending.cancel()
        await expect(asyncio.CancelledError, pending)
        await link.send(b"", type=LATE)
        assert (await link.request(b"q", type=REPLY, timeout=PATIENCE)).data == b"q"
        assert link.statistics().late_replies == 2
        expect_call(QueueEmpty, link.receive_nowait)


# ---- turns ------------------------------------------------------------------


async def _check_out_of_turn(link: Link) -> None:
    """Nothing can be sent, by any means."""
    sent = link.statistics().messages_sent
    await expect(OutOfTurnError, link.send(b"out"))
    expect_call(OutOfTurnError, lambda: link.send_nowait(b"out"))
    expect_call(OutOfTurnError, lambda: link.send_threadsafe(b"out"))
    await expect(OutOfTurnError, link.send_many([b"out"]))
    await expect(OutOfTurnError, link.send(Token()))
    await expect(OutOfTurnError, link.request(b"out"))
    error = expect_call(OutOfTurnError, lambda: link.loan(3).__enter__())
    assert link.url in str(error)
    assert link.statistics().messages_sent == sent


async def check_turns(harness: Harness) -> None:
    """We begin; a message takes the turn, the answer brings it when it is received."""
    if not harness.turns:
        return
    async with harness.link(turns=True) as link:
        assert link.turns
        for number in range(200):
            assert link.has_turn
            await link.send(numbered(number, number))
            assert not link.has_turn
            if not number % 50:
                await _check_out_of_turn(link)
                async with asyncio.timeout(PATIENCE):
                    while not link.rx_avail:
                        await asyncio.sleep(0)
                await _check_out_of_turn(link)
            verify(await link.receive(), number)
        reply = await link.request(b"reply", type=REPLY, timeout=PATIENCE)
        assert reply.data == b"reply"
        await link.send(Token(id=5))
        assert await link.receive() == Token(id=5)
        assert link.has_turn


# ---- handlers ---------------------------------------------------------------


async def check_handlers(harness: Harness) -> None:
    """The handlers of an endpoint get what they should, and never overlap."""
    url = harness.new_url()
    running = 0
    seen: list[str] = []
    done = asyncio.Event()

    @asynccontextmanager
    async def alone(name: str) -> Any:
        nonlocal running
        assert running == 0, f"{name} runs beside another handler"
        running += 1
        seen.append(name)
        try:
            await asyncio.sleep(0)
            yield
        finally:
            running -= 1  # also when leaving the endpoint cancels it
        if {"message", "work", "timer"} <= set(seen) and seen.count("message") >= 200:
            done.set()

    endpoint = Endpoint("handlers", work_hz=500.0, timer_hz=100.0)
    failures: list[BaseException] = []

    @endpoint.on_message
    async def message(message: Message, link: Link) -> None:
        async with alone("message"):
            reply = await link.request(b"r", type=REPLY, timeout=PATIENCE)
            assert (reply.data, reply.type) == (b"r", REPLY)

    @endpoint.on_work
    async def work() -> None:
        async with alone("work"):
            pass

    @endpoint.on_timer
    async def timer(now: float) -> None:
        assert abs(now - asyncio.get_running_loop().time()) < 1.0
        async with alone("timer"):
            pass

    @endpoint.on_link_open
    async def opened(link: Link) -> None:
        async with alone("open"):
            pass

    @endpoint.on_link_close
    async def closed(link: Link, error: BaseException | None) -> None:
        async with alone("close"):
            pass

    @endpoint.on_error
    async def failed(error: BaseException, name: str) -> None:
        failures.append(error)
        done.set()

    async with harness.responder(url):
        async with endpoint:
            link = await endpoint.connect(url, timeout=PATIENCE)
            other = await endpoint.connect(url, timeout=PATIENCE)
            for number in range(100):
                await link.send(numbered(number, 10))
                await other.send(numbered(number, 10))
            await asyncio.wait_for(done.wait(), PATIENCE)
            expect_call(UsageError, link.receive_nowait)
            await expect(UsageError, link.receive())
        assert not failures, failures
        assert seen.index("open") < seen.index("message")
        assert seen.count("open") == 2
        assert seen.count("close") == 2
        assert seen[-1] == "close"


async def check_failing_handler(harness: Harness) -> None:
    """What a handler raises is reported and counted, and the endpoint goes on."""
    url = harness.new_url()
    failures: list[tuple[str, str]] = []
    seen: list[int] = []
    endpoint = Endpoint("failing")
    done = asyncio.Event()

    @endpoint.on_message
    async def message(message: Message, link: Link) -> None:
        seen.append(message.id)
        if message.id == 9:
            done.set()
        if message.id % 3 == 0:
            raise KeyError(message.id)
        if message.id % 3 == 1:
            task = asyncio.ensure_future(asyncio.sleep(PATIENCE))
            asyncio.get_running_loop().call_soon(task.cancel)
            await task

    @endpoint.on_error
    def failed(error: BaseException, name: str) -> None:
        failures.append((type(error).__name__, name))

    async with harness.responder(url), endpoint:
        link = await endpoint.connect(url, timeout=PATIENCE)
        for number in range(10):
            await link.send(b"", id=number)
        await asyncio.wait_for(done.wait(), PATIENCE)
        assert seen == list(range(10))
    assert failures == [
        ("KeyError", "on_message") if number % 3 == 0 else ("CancelledError", "on_message")
        for number in range(10)
        if number % 3 != 2
    ]
    assert endpoint.statistics().handler_errors == 7
    assert endpoint.statistics().message_calls == 10


async def check_request_in_handler(harness: Harness) -> None:
    """A handler can await a request; messages that come meanwhile keep their order."""
    url = harness.new_url()
    seen: list[int] = []
    done = asyncio.Event()
    endpoint = Endpoint("asks")

    @endpoint.on_message
    async def message(message: Message, link: Link) -> None:
        reply = await link.request(message.data, type=REPLY, timeout=PATIENCE)
        assert reply.data == message.data
        verify(message, len(seen))
        seen.append(message.id)
        if len(seen) == 500:
            done.set()

    async with harness.responder(url, ring_size=1 << 14), endpoint:
        link = await endpoint.connect(url, timeout=PATIENCE)
        await link.send(b"", type=STREAM, id=300, user_value=500)
        await asyncio.wait_for(done.wait(), PATIENCE)
    assert endpoint.statistics().handler_errors == 0


async def check_mutual_flood(harness: Harness) -> None:
    """Endpoints that flood each other from their handlers do not deadlock.

    Far more than both rings hold is bounced to and fro between two message handlers.
    """
    url = harness.new_url()
    balls, bounces = 400, 10
    finished = 0
    failures: list[BaseException] = []
    done = asyncio.Event()
    endpoint = Endpoint("floods", backlog=1 << 22)

    @endpoint.on_message
    async def message(message: Message, link: Link) -> None:
        nonlocal finished
        if message.user_value == bounces:
            finished += 1
            if finished == balls:
                done.set()
        else:
            await link.send(message, user_value=message.user_value + 1)

    @endpoint.on_error
    def failed(error: BaseException, name: str) -> None:
        failures.append(error)
        done.set()

    async with harness.responder(url, handler=True, ring_size=1 << 12, backlog=1 << 22), endpoint:
        link = await endpoint.connect(url, timeout=PATIENCE)
        for number in range(balls):
            await link.send(bytes(300), id=number)
        await asyncio.wait_for(done.wait(), PATIENCE)
    assert not failures, failures
    assert finished == balls


async def check_backlog_full(harness: Harness) -> None:
    """When the backlog is full too, the handler that waits gets QueueFull, no deadlock."""
    url = harness.new_url()
    failures: list[BaseException] = []
    done = asyncio.Event()
    endpoint = Endpoint("full", backlog=2000, batch=8)

    @endpoint.on_message
    async def message(message: Message, link: Link) -> None:
        if not failures:
            await link.request(b"", type=LATE)  # nobody answers

    @endpoint.on_error
    def failed(error: BaseException, name: str) -> None:
        failures.append(error)
        done.set()

    async with harness.responder(url, ring_size=1 << 14), endpoint:
        link = await endpoint.connect(url, timeout=PATIENCE)
        await link.send(b"", type=STREAM, id=100, user_value=500)
        await asyncio.wait_for(done.wait(), PATIENCE)
        assert isinstance(failures[0], QueueFull)
        assert link.statistics().backlog_high_water <= 2000


async def check_borrowing_handler(harness: Harness) -> None:
    """on_message(borrow=True): data in place, released after each message."""
    url = harness.new_url()
    done = asyncio.Event()
    kept: list[memoryview] = []
    failures: list[BaseException] = []
    endpoint = Endpoint("borrows")
    seen = 0

    @endpoint.on_message(borrow=True)
    async def message(message: Message, link: Link) -> None:
        nonlocal seen
        assert isinstance(message.data, memoryview)
        verify(message, seen)
        if seen == 150:
            kept.append(message.data[:1])
        if seen % 50 == 49:
            assert (await link.request(b"r", type=REPLY, timeout=PATIENCE)).data == b"r"
        seen += 1
        if seen == 300:
            done.set()

    @endpoint.on_error
    def failed(error: BaseException, name: str) -> None:
        failures.append(error)

    async with harness.responder(url, ring_size=1 << 16), endpoint:
        link = await endpoint.connect(url, timeout=PATIENCE)
        await link.send(b"", type=STREAM, id=200, user_value=300)
        await asyncio.wait_for(done.wait(), PATIENCE)
        assert [type(error) for error in failures] == [BufferError]
        kept.clear()


async def check_borrowing_request(harness: Harness) -> None:
    """A borrowing handler waits for a reply, and the peer for what it has borrowed."""
    url = harness.new_url()
    failures: list[BaseException] = []
    done = asyncio.Event()
    endpoint = Endpoint("borrows")

    @endpoint.on_message(borrow=True)
    async def message(message: Message, link: Link) -> None:
        if not failures:
            await link.request(b"", type=REPLY)  # the responder streams first

    @endpoint.on_error
    def failed(error: BaseException, name: str) -> None:
        failures.append(error)

    @endpoint.on_link_close
    def closed(link: Link, error: BaseException | None) -> None:
        done.set()

    async with harness.responder(url, ring_size=1 << 12), endpoint:
        link = await endpoint.connect(url, timeout=PATIENCE)
        await link.send(b"", type=STREAM, id=500, user_value=500)
        await link.send(b"", type=CLOSE)
        await asyncio.wait_for(done.wait(), PATIENCE)
    assert [type(error) for error in failures] == [QueueFull]


async def check_borrowing_flood(harness: Harness) -> None:
    """Two borrowing handlers that flood each other: QueueFull, no deadlock."""
    url = harness.new_url()
    failures: list[BaseException] = []
    seen = 0
    endpoint = Endpoint("borrows")

    @endpoint.on_message(borrow=True)
    async def message(message: Message, link: Link) -> None:
        nonlocal seen
        seen += 1
        if seen == 1:
            for number in range(500):
                await link.send(numbered(number, 300, SINK))

    @endpoint.on_error
    def failed(error: BaseException, name: str) -> None:
        failures.append(error)

    options: dict[str, Any] = {"handler": True, "borrow": True}
    async with harness.responder(url, ring_size=1 << 12, **options), endpoint:
        link = await endpoint.connect(url, timeout=PATIENCE)
        await link.send(b"", type=STREAM, id=300, user_value=500)
        await link.request(b"", type=REPLY, timeout=PATIENCE)
        outcome = await report(link)
    # one of the two gave up, or both at once; what arrived is whole and in order
    assert [type(error) for error in failures] in ([], [QueueFull])
    assert seen
    assert not outcome.damaged
    assert not outcome.out_of_order


async def check_plain_functions(harness: Harness) -> None:
    """Plain functions as handlers, given to the constructor or registered later."""
    url = harness.new_url()
    done = asyncio.Event()
    counts = {"message": 0, "work": 0}

    def message(message: Message, link: Link) -> None:
        counts["message"] += 1

    def work() -> bool:
        counts["work"] += 1
        if counts["message"] >= 10 and counts["work"] >= 100:
            done.set()
            return False
        return True

    endpoint = Endpoint("plain", on_message=message, work_hz=10.0)
    async with harness.responder(url), endpoint:
        link = await endpoint.connect(url, timeout=PATIENCE)
        for number in range(10):
            await link.send(b"", id=number)
        endpoint.on_work(work)
        await asyncio.wait_for(done.wait(), PATIENCE)
    assert counts["message"] == 10


async def check_late_handler(harness: Harness) -> None:
    """A message handler that is registered late gets what has arrived before."""
    url = harness.new_url()
    seen: list[int] = []
    done = asyncio.Event()
    endpoint = Endpoint("late")
    async with harness.responder(url), endpoint:
        link = await endpoint.connect(url, timeout=PATIENCE)
        for number in range(5):
            await link.send(numbered(number, 10))
        verify(await link.receive(), 0)

        @endpoint.on_message
        def message(message: Message, link: Link) -> None:
            seen.append(message.id)
            if len(seen) == 4:
                done.set()

        await asyncio.wait_for(done.wait(), PATIENCE)
    assert seen == [1, 2, 3, 4]


async def check_tasks_of_handlers(harness: Harness) -> None:
    """Handlers that wait for tasks of theirs flood each other: QueueFull, no deadlock."""
    url = harness.new_url()
    failures: list[BaseException] = []
    seen = 0
    enough = asyncio.Event()
    endpoint = Endpoint("gathers", backlog=4000)

    @endpoint.on_message
    async def message(message: Message, link: Link) -> None:
        nonlocal seen
        seen += 1
        if seen > 2000:
            enough.set()
        await asyncio.gather(link.send(message), link.send(message))

    endpoint.on_error(lambda error, name: failures.append(error))
    async with harness.responder(url, handler=True, ring_size=1 << 12, backlog=4000), endpoint:
        link = await endpoint.connect(url, timeout=PATIENCE)
        for _ in range(4):
            await link.send(bytes(200))
        await asyncio.wait_for(enough.wait(), PATIENCE)
    assert {type(error) for error in failures} <= {QueueFull, ClosedError}


async def check_handler_connects(harness: Harness) -> None:
    """A handler can connect and wait, in a task, for a reply on the new link."""
    url = harness.new_url()
    replies: list[bytes] = []
    done = asyncio.Event()
    endpoint = Endpoint("connects")

    @endpoint.on_message
    async def message(message: Message, link: Link) -> None:
        new = await endpoint.connect(url, timeout=PATIENCE)
        reply = await asyncio.wait_for(new.request(b"r", type=REPLY), PATIENCE)
        replies.append(reply.data)
        done.set()

    async with harness.responder(url), endpoint:
        link = await endpoint.connect(url, timeout=PATIENCE)
        await link.send(b"")
        await asyncio.wait_for(done.wait(), PATIENCE)
    assert replies == [b"r"]


async def check_open_comes_first(harness: Harness) -> None:
    """The open handler runs before the first message, however late it can run."""
    url = harness.new_url()
    order: list[str] = []
    held, release, done = asyncio.Event(), asyncio.Event(), asyncio.Event()
    endpoint = Endpoint("order", work_hz=1000.0)

    @endpoint.on_work
    async def work() -> None:
        held.set()
        await release.wait()

    endpoint.on_message(lambda message, link: order.append("message"))
    endpoint.on_link_open(lambda link: order.append("open"))

    @endpoint.on_link_close
    def closed(link: Link, error: BaseException | None) -> None:
        order.append("close")
        done.set()

    async with harness.responder(url), endpoint:
        await asyncio.wait_for(held.wait(), PATIENCE)
        link = await endpoint.connect(url, timeout=PATIENCE)
        await link.send(b"", type=STREAM, id=1, user_value=2)
        await link.send(b"", type=CLOSE)
        while not link._peer_gone:
            await asyncio.sleep(0)
        release.set()
        await asyncio.wait_for(done.wait(), PATIENCE)
    assert order == ["open", "message", "message", "close"]


# ---- several links ----------------------------------------------------------


async def check_fairness(harness: Harness) -> None:
    """A link that floods does not keep the others, the ticks or the loop waiting."""
    url = harness.new_url()
    quiet_seen = asyncio.Event()
    ticked = asyncio.Event()
    flood_seen = 0
    quiet: Link | None = None
    endpoint = Endpoint("fair", batch=16)

    @endpoint.on_message
    def message(message: Message, link: Link) -> None:
        nonlocal flood_seen
        if link is quiet:
            quiet_seen.set()
        else:
            flood_seen += 1
            link.send_nowait(message)  # and so it goes on for ever

    @endpoint.on_work
    def work() -> None:
        if flood_seen > 100:
            ticked.set()

    async with harness.responder(url), endpoint:
        loud = await endpoint.connect(url, timeout=PATIENCE)
        quiet = await endpoint.connect(url, timeout=PATIENCE)
        for number in range(200):
            await loud.send(bytes(50), id=number)
        while flood_seen < 1000:
            await asyncio.sleep(0)  # the loop is alive
        await quiet.send(b"")
        await asyncio.wait_for(quiet_seen.wait(), PATIENCE)
        await asyncio.wait_for(ticked.wait(), PATIENCE)


async def check_one_backlog_for_two(harness: Harness) -> None:
    """Messages of one link that nobody receives do not hold up the reply of another."""
    url = harness.new_url()
    endpoint = Endpoint("two", backlog=5000)
    async with harness.responder(url, ring_size=1 << 16), endpoint:
        full = await endpoint.connect(url, timeout=PATIENCE)
        other = await endpoint.connect(url, timeout=PATIENCE)
        await full.send(b"", type=STREAM, id=1000, user_value=1000)
        verify(await full.receive(), 0)
        asked = asyncio.ensure_future(full.request(b"behind all that", type=REPLY))
        reply = await other.request(b"beside it", type=REPLY, timeout=PATIENCE)
        assert reply.data == b"beside it"
        for number in range(1, 1000):
            verify(await full.receive(), number)
        assert (await asyncio.wait_for(asked, PATIENCE)).data == b"behind all that"


async def check_awaited_flood(harness: Harness) -> None:
    """A task that receives without end, or sends so, lets the others have their turns."""
    async with harness.link() as link:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        task = asyncio.ensure_future(other())
        await link.send(b"", type=STREAM, id=50, user_value=2_000)
        for number in range(2_000):
            verify(await link.receive(), number)
        assert turns > 3, "receiving kept the loop"
        turns = 0
        for number in range(2_000):
            await link.send(numbered(number, 10, SINK))
        assert turns > 3, "sending kept the loop"
        task.cancel()


async def check_broadcast(harness: Harness) -> None:
    """A broadcast reaches every link that has room."""
    url = harness.new_url()
    endpoint = Endpoint("wide")
    async with harness.responder(url, ring_size=1 << 12), endpoint:
        links = [await endpoint.connect(url, timeout=PATIENCE) for _ in range(5)]
        assert set(endpoint.links) == set(links)
        assert endpoint.broadcast(b"all", id=1) == 5
        for link in links:
            assert (await link.receive()).data == b"all"
        await links[0].request(b"", type=HOLD, timeout=PATIENCE)
        with suppress(QueueFull):
            while True:
                links[0].send_nowait(bytes(4064), type=ECHO)
        reached = endpoint.broadcast(bytes(4000), type=SINK)
        assert reached >= 4
        await links[1].send(b"", type=RELEASE)
        await links[2].aclose()
        assert links[2] not in endpoint.links


# ---- the doorbell -----------------------------------------------------------


async def check_burst_rings_once(harness: Harness) -> None:
    """A burst to a peer that has parked rings once."""
    async with harness.link() as link:
        for _ in range(200):
            await link.send(b"")
            await link.receive()
            # it parks soon; whether it has already, we cannot see
            for _ in range(20):
                await asyncio.sleep(0)
            with harness.paused():
                before = link.statistics()
                for number in range(300):
                    link.send_nowait(b"burst", type=SINK, id=number)
                after = link.statistics()
            rung = after.doorbells_rung - before.doorbells_rung
            assert rung <= 1, f"a burst rang {rung} times"
            assert after.doorbells_suppressed - before.doorbells_suppressed == 300 - rung
            if rung == 1:
                break
        else:
            raise AssertionError("a parked peer was never rung for")
        assert (await report(link)).count % 300 == 0


async def check_idle(harness: Harness) -> None:
    """No tick handlers, nothing to do: the endpoint does not wake up."""
    url = harness.new_url()
    done = asyncio.Event()
    endpoint = Endpoint("idle", on_message=lambda message, link: done.set())
    async with harness.responder(url), endpoint:
        link = await endpoint.connect(url, timeout=PATIENCE)
        await link.send(b"")
        await asyncio.wait_for(done.wait(), PATIENCE)
        settled = False
        while not settled:
            before = endpoint.statistics().wakeups
            await asyncio.sleep(0.3)  # time is the subject
            settled = endpoint.statistics().wakeups == before
        assert settled


# ---- closing ----------------------------------------------------------------


async def check_peer_closes(harness: Harness) -> None:
    """An orderly close: all that was sent before it, then the end."""
    async with harness.link() as link:
        await link.send(b"", type=STREAM, id=100, user_value=500)
        await link.send(b"", type=CLOSE)
        number = 0
        async for message in link:
            verify(message, number)
            number += 1
        assert number == 500
        assert link.closed
        error = await expect(PeerClosedError, link.receive())
        assert link.url in str(error)
        for call in (link.receive_nowait, lambda: link.send_nowait(b"")):
            expect_call(PeerClosedError, call)
        await expect(PeerClosedError, link.send(b""))
        await expect(PeerClosedError, link.request(b""))
        await expect(PeerClosedError, asyncio.to_thread(link.send_threadsafe, b""))
        await link.wait_closed()
        await link.aclose()
        assert link.statistics().messages_received == 500


async def check_close_event(harness: Harness) -> None:
    """The close handler comes once, with None, after the last message."""
    url = harness.new_url()
    events: list[Any] = []
    done = asyncio.Event()
    endpoint = Endpoint("events")

    @endpoint.on_message
    async def message(message: Message, link: Link) -> None:
        await asyncio.sleep(0)
        events.append(message.id)

    @endpoint.on_link_close
    async def closed(link: Link, error: BaseException | None) -> None:
        events.append(error)
        done.set()

    async with harness.responder(url), endpoint:
        link = await endpoint.connect(url, timeout=PATIENCE)
        await link.send(b"", type=STREAM, id=10, user_value=300)
        await link.send(b"", type=CLOSE)
        await asyncio.wait_for(done.wait(), PATIENCE)
        assert link.closed
        assert link not in endpoint.links
    assert events == [*range(300), None]


async def check_we_close(harness: Harness) -> None:
    """What was sent before aclose arrives; afterwards everything is ClosedError."""
    url = harness.new_url()
    async with harness.responder(url), kucomms.connect(url, timeout=PATIENCE) as watcher:
        async with kucomms.connect(url, timeout=PATIENCE) as link:
            for number in range(1000):
                await link.send(numbered(number, 100, SINK))
            waiting = asyncio.ensure_future(link.receive())
            asked = asyncio.ensure_future(link.request(b"", type=LATE))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await link.aclose()
            await expect(ClosedError, waiting)
            await expect(ClosedError, asked)
            assert link.closed
            await link.aclose()
            await link.wait_closed()
            error = await expect(ClosedError, link.send(b""))
            assert link.url in str(error)
            for call in (
                lambda: link.send_nowait(b""), link.receive_nowait,
                lambda: link.send_threadsafe(b""), lambda: link.loan(1).__enter__(),
            ):
                expect_call(ClosedError, call)
            await expect(ClosedError, link.receive())
            await expect(ClosedError, link.request(b""))
            await expect(ClosedError, link.send_many([b""]))
            async for _message in link:
                raise AssertionError("a message after the close")
            assert (link.tx_avail, link.tx_free, link.rx_avail, link.rx_free) == (0, 0, 0, 0)
        async with asyncio.timeout(PATIENCE):  # it may not even have heard of the link yet
            while (seen := await report(watcher)).links > 1 or seen.count < 1000:
                await asyncio.sleep(0)
        assert (seen.count, seen.damaged, seen.out_of_order) == (1000, 0, 0)


async def check_view_after_close(harness: Harness) -> None:
    """A borrowed view stays readable after the link is closed, until it is released."""
    async with harness.link() as link:
        await link.send(b"remember")
        borrow = link.borrow()
        message = await borrow.__aenter__()
        await link.aclose()
        assert bytes(message.data) == b"remember"
        await borrow.__aexit__(None, None, None)


# ---- connecting -------------------------------------------------------------


async def check_connect(harness: Harness) -> None:
    """Nobody there: NotReadyError in time; somebody who comes later is found."""
    url = harness.new_url()
    for timeout in (0, 0.05):
        error = await expect(NotReadyError, _connect(url, timeout))
        assert isinstance(error, TimeoutError)
        assert url in str(error)
    early = asyncio.ensure_future(_connect(url, None))
    await asyncio.sleep(0)
    async with harness.responder(url):
        link = await asyncio.wait_for(early, PATIENCE)
        await link.send(b"found")
        assert (await link.receive()).data == b"found"
        await link.aclose()


async def _connect(url: str, timeout: float | None) -> Link:
    link: Link = await kucomms.connect(url, timeout=timeout)
    return link


async def check_ring_size(harness: Harness) -> None:
    """The connecting side may ask for a ring size; it sees what it got."""
    url = harness.new_url()
    async with harness.responder(url, ring_size=1 << 14, max_ring_size=1 << 16):
        for wanted, given in ((None, 1 << 14), (1, 4096), (5000, 8192), (1 << 20, 1 << 16)):
            async with kucomms.connect(url, ring_size=wanted, timeout=PATIENCE) as link:
                assert link.ring_size == given
                assert link.max_message_size == given - 32
                await link.send(bytes(link.max_message_size))
                assert len(await link.receive()) == link.max_message_size


CHECKS: list[Callable[[Harness], Awaitable[None]]] = [
    check for name, check in sorted(globals().items()) if name.startswith("check_")
]
"""Every check, to be run for each transport and loop."""
