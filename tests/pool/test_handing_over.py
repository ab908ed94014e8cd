# SPDX-License-Identifier: MIT
# ruff: noqa: ASYNC110, PT012
"""Buffers of a link's pool travel inside of messages: there, back, and what must not be."""

import asyncio
import gc
import itertools
import mmap
import os
import random
import socket
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
import pytest_asyncio

import kucomms
from kucomms import (
    ClosedError,
    Endpoint,
    HeaderValueError,
    Message,
    MessageTooLargeError,
    PeerClosedError,
    PoolFull,
    QueueFull,
    TransportError,
    UsageError,
)
from tests.pool.conftest import of_pools, turns
from tests.pool.partner import (
    CLOSE_POOL,
    DIE,
    FREE,
    GIVE,
    INVERT,
    KEEP,
    LET_GO,
    RETURN,
    WHAT_IS_OUT,
    partner_at,
)
from tests.transports.processes import PATIENCE, in_child

pytestmark = pytest.mark.asyncio

PAGE = mmap.PAGESIZE
MIB = 1 << 20

_numbers = itertools.count()


def new_url(scheme):
    return f"{scheme}://handing_{os.getpid()}_{next(_numbers)}"


async def settled(condition):
    """Wait until the loop has come to this."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0)


@asynccontextmanager
async def linked(scheme="inproc", *, on_message=None, other_options=None, **listen_options):
    """Both ends of a link in this loop; ``on_message``: of the second one."""
    url = new_url(scheme)
    opened = asyncio.get_running_loop().create_future()
    async with Endpoint("first") as first, Endpoint("second", **(other_options or {})) as second:
        second.on_link_open(opened.set_result)
        if on_message is not None:
            second.on_message(on_message)
        await second.listen(url, **listen_options)
        link = await first.connect(url, timeout=0)
        async with asyncio.timeout(PATIENCE):
            yield link, await opened


@pytest.fixture(params=["inproc", "shm"])
def scheme(request):
    return request.param


@pytest_asyncio.fixture(params=["loop", "thread", "process"])
async def link(request):
    """To a partner, somewhere."""
    scheme = "shm" if request.param == "process" else "inproc"
    url = new_url(scheme)
    async with partner_at(url, request.param), kucomms.connect(url, timeout=PATIENCE) as link:
        giving_up = asyncio.get_running_loop().call_later(PATIENCE, link._close_here)
        yield link
        giving_up.cancel()


# ---- there and back ------------------------------------------------------------


async def test_megabytes_there_and_back(link):
    """The same bytes: what the peer writes is there without having been copied."""
    rng = random.Random(5)
    async with await link.open_pool(16 * MIB) as pool:
        buffer = pool.allocate(4 * MIB)
        content = rng.randbytes(4 * MIB)
        buffer.data[:] = content
        for turn in range(3):
            await link.send(b"%d" % turn, type=INVERT, id=7, user_value=8, buffers=buffer)
            message = await link.receive()
            assert (message.data, message.id, message.user_value) == (b"%d" % turn, 7, 8)
            (buffer,) = message.buffers
            content = bytes(content).translate(bytes(255 - value for value in range(256)))
            assert buffer.data == content
            assert buffer.pool is pool
            assert len(buffer) == 4 * MIB
        buffer.free()
        assert pool.statistics().allocated == 0


async def test_a_buffer_of_the_peers_comes_and_goes_back(link):
    for size in (1, PAGE, MIB):
        await link.send(b"\x55", type=GIVE, id=size, user_value=2 * MIB)
        message = await link.receive()
        with message.buffers[0] as buffer:
            assert bytes(buffer.data) == b"\x55" * size
            await link.send(b"", type=WHAT_IS_OUT)
            out = await link.receive()
            assert (out.id, out.user_value) == (-(-size // PAGE) * PAGE,) * 2
        await link.send(b"", type=WHAT_IS_OUT)
        out = await link.receive()
        assert (out.id, out.user_value) == (0, 0)


async def test_freed_there_and_allocated_here(link):
    """A hundred times the size of the pool."""
    async with await link.open_pool(2 * MIB) as pool:
        for turn in range(200):
            buffer = await pool.allocate_when_room(MIB)
            buffer.data[:2] = turn.to_bytes(2, "little")
            await link.send(b"", type=FREE, buffers=buffer)
        await link.send(b"last", type=RETURN)
        await link.receive()
        assert pool.statistics().handed_over == 0
        pool.allocate(2 * MIB).free()


async def test_many_under_way_in_any_order(link):
    rng = random.Random(7)
    async with await link.open_pool(64 * PAGE) as pool:
        here, ids = {}, itertools.count(1)
        expected = {}
        there = {}
        for _ in range(600):
            if rng.random() < 0.5 and (here or there):
                if not there or (here and rng.random() < 0.6):
                    some = rng.sample(sorted(here), min(len(here), rng.randrange(1, 4)))
                    await link.send(
                        b"", type=RETURN, user_value=len(some), buffers=[here[one] for one in some]
                    )
                    there.update((one, here.pop(one)) for one in some)
                else:
                    message = await link.receive()
                    for buffer in message.buffers:
                        number = int.from_bytes(buffer.data[:8], "little")
                        assert len(buffer) == expected[number]
                        del there[number]
                        here[number] = buffer
            else:
                size = rng.randrange(8, 5 * PAGE)
                try:
                    buffer = pool.allocate(size)
                except PoolFull:
                    if here:
                        here.pop(rng.choice(sorted(here))).free()
                    continue
                number = next(ids)
                buffer.data[:8] = number.to_bytes(8, "little")
                here[number], expected[number] = buffer, size
        while there:
            for buffer in (await link.receive()).buffers:
                number = int.from_bytes(buffer.data[:8], "little")
                del there[number]
                here[number] = buffer
        for buffer in here.values():
            buffer.free()
        assert (pool.statistics().allocated, pool.statistics().handed_over) == (0, 0)


async def test_request_and_reply(link):
    async with await link.open_pool(PAGE) as pool:
        for turn in range(10):
            buffer = pool.allocate(5)
            buffer.data[:] = b"five!"
            reply = await link.request(
                b"%d" % turn, type=RETURN, buffers=buffer, timeout=PATIENCE
            )
            assert reply.data == b"%d" % turn
            with reply.buffers[0] as back:
                assert back.data == b"five!"


async def test_the_largest_number(link):
    async with await link.open_pool(255 * PAGE) as pool:
        buffers = [pool.allocate(PAGE) for _ in range(255)]
        with pytest.raises(UsageError, match="255 buffers at most"):
            await link.send(b"", buffers=[*buffers, buffers[0]])
        await link.send(b"all", type=RETURN, buffers=buffers)
        message = await link.receive()
        assert len(message.buffers) == 255
        for buffer in message.buffers:
            buffer.free()


async def test_messages_without_buffers_have_none(link):
    await link.send(b"plain", type=RETURN, buffers=[])
    message = await link.receive()
    assert message.buffers == ()
    assert type(message) is Message


async def test_statistics_count_what_the_peer_has(link):
    async with await link.open_pool(8 * PAGE, quota=6 * PAGE) as pool:
        await link.send(b"", type=KEEP, buffers=[pool.allocate(1), pool.allocate(PAGE + 1)])
        await link.receive()
        statistics = pool.statistics()
        assert (statistics.allocated, statistics.handed_over) == (3 * PAGE, 3 * PAGE)
        with pool.allocate(3 * PAGE), pytest.raises(PoolFull):
            pool.allocate(1)  # there is room, but no quota
        await link.send(b"", type=LET_GO)
        await link.receive()
        with pool.allocate(6 * PAGE):
            assert pool.statistics().handed_over == 0


async def test_messages_are_counted_and_notices_are_not(scheme):
    async with linked(scheme) as (link, other), await link.open_pool(PAGE) as pool:
        for _ in range(10):
            await link.send(b"12345", buffers=await pool.allocate_when_room(1))
            (await other.receive()).buffers[0].free()
        (await pool.allocate_when_room(1)).free()
        first, second = link.statistics(), other.statistics()
        assert (first.messages_sent, first.bytes_sent) == (10, 50)
        assert (second.messages_received, second.bytes_received) == (10, 50)
        assert (first.messages_received, second.messages_sent) == (0, 0)
        assert second.doorbells_suppressed >= 0
        with pytest.raises(kucomms.QueueEmpty):
            link.receive_nowait()


# ---- room that the peer gives ---------------------------------------------------


async def test_allocate_sees_what_was_freed_without_any_await(scheme):
    async with linked(scheme) as (link, other), await link.open_pool(PAGE) as pool:
        for _ in range(5):
            await link.send(b"", buffers=pool.allocate(9))
            message = await other.receive()
            with pytest.raises(PoolFull):
                pool.allocate(9)
            message.buffers[0].free()
        pool.allocate(9).free()


async def test_what_is_looked_past_is_received_in_order(scheme):
    """Messages before the notice, on a link with and without a message handler."""
    async with linked(scheme) as (link, other), await link.open_pool(PAGE) as pool:
        await link.send(b"", buffers=pool.allocate(9))
        message = await other.receive()
        for number in range(5):
            await other.send(b"%d" % number)
        message.buffers[0].free()
        await other.send(b"5")
        pool.allocate(9).free()
        assert [(await link.receive()).data for _ in range(6)] == [b"%d" % n for n in range(6)]


async def test_a_task_that_waits_for_room_is_woken(link):
    """Also when nobody receives."""
    async with await link.open_pool(4 * PAGE) as pool:
        await link.send(b"", type=KEEP, buffers=pool.allocate(4 * PAGE))
        await link.receive()
        waiting = [asyncio.create_task(pool.allocate_when_room(PAGE)) for _ in range(4)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        await link.send(b"", type=LET_GO)
        for task in waiting:
            (await task).free()
        assert (await link.receive()).data == b"let go"


async def test_a_handler_that_waits_for_room_is_woken(scheme):
    got = []

    async def handler(message, link):
        pool = await link.open_pool(PAGE)
        for number in range(3):
            await link.send(b"%d" % number, buffers=await pool.allocate_when_room(PAGE))
        got.append(message.data)

    async with linked(scheme, on_message=handler) as (link, _other):
        await link.send(b"go")
        for number in range(3):
            message = await link.receive()
            assert message.data == b"%d" % number
            message.buffers[0].free()
        await settled(lambda: got)


@pytest.mark.parametrize("full", ["before", "meanwhile"])
async def test_a_handler_whose_backlog_is_full_does_not_wait_for_ever(scheme, full):
    failed = asyncio.get_running_loop().create_future()
    all_sent = asyncio.Event()

    async def handler(_message, link):
        pool = await link.open_pool(PAGE)
        await link.send(b"", buffers=pool.allocate(PAGE))
        if full == "before":
            await all_sent.wait()
        try:
            (await pool.allocate_when_room(PAGE)).free()
        except QueueFull as error:
            if not failed.done():
                failed.set_result(error)

    async with linked(scheme, on_message=handler, other_options={"backlog": 100}) as (link, _):
        await link.send(b"go")
        message = await link.receive()
        for _ in range(10):
            await link.send(bytes(60))  # before the notice, and they do not fit
        message.buffers[0].free()
        all_sent.set()
        assert "backlog" in str(await failed)


async def test_what_the_collector_finds_while_pages_are_given_back(
    scheme, collector_in_the_tables
):
    """Buffers that came back, and that nobody kept."""
    async with linked(scheme) as (link, other), await link.open_pool(16 * PAGE) as pool:
        for number in range(16):
            await link.send(b"", buffers=pool.allocate(PAGE))
            await other.send(b"%d" % number, buffers=(await other.receive()).buffers)
        back = [(await link.receive()).buffers[0] for _ in range(16)]
        waiting = asyncio.create_task(pool.allocate_when_room(16 * PAGE))
        await asyncio.sleep(0)
        for at in range(1, 16, 2):
            cycle = [back[at]]
            cycle.append(cycle)
            back[at] = cycle = None
            back[at - 1].free()
        (await asyncio.wait_for(waiting, 10)).free()
        assert pool.statistics().allocated == 0
        assert pool._extents.runs() == [(0, 16)]


@pytest.mark.parametrize("what", ["room", "request"])
@pytest.mark.parametrize(
    "kind", ["on_timer", "on_work", "on_link_open", "on_link_close", "on_error"]
)
async def test_handlers_that_wait_where_nobody_handles_messages(scheme, kind, what):
    """They look for themselves at what comes."""
    done = asyncio.get_running_loop().create_future()

    async def answer(message, link):
        await turns()  # he waits by now
        if message.buffers:
            message.buffers[0].free()
        else:
            await link.reply(message, b"reply")

    async def wait(*_):
        if done.done():
            return
        try:
            async with asyncio.timeout(5):
                if what == "request":
                    await link.request(b"")
                else:
                    await link.send(b"", buffers=pool.allocate(PAGE))
                    (await pool.allocate_when_room(PAGE)).free()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    url = new_url(scheme)
    async with (
        Endpoint("answers", on_message=answer) as other,
        Endpoint("waits", timer_hz=100, busy_poll=0) as endpoint,
    ):
        await other.listen(url)
        link = await endpoint.connect(url)
        pool = await link.open_pool(PAGE)
        getattr(endpoint, kind)(wait)
        if kind == "on_error":
            endpoint.on_timer(lambda _: 1 / 0)
        if kind.startswith("on_link"):
            await (await endpoint.connect(url)).aclose()
        await done


async def test_no_request_has_the_id_of_those_who_wait_for_room(scheme):
    async with linked(scheme) as (link, other), await link.open_pool(PAGE) as pool:
        await link.send(b"", buffers=pool.allocate(1))
        waiting = asyncio.create_task(pool.allocate_when_room(1))
        await asyncio.sleep(0)
        with pytest.raises(HeaderValueError):
            await link.request(b"", id=-1)
        (await other.receive()).buffers[0].free()
        (await waiting).free()


async def test_waiting_for_room_ends_with_the_peer(scheme):
    """Also while there is something left to be received."""
    async with linked(scheme) as (link, other):
        pool = await link.open_pool(PAGE)
        await link.send(b"", buffers=pool.allocate(1))
        waiting = asyncio.create_task(pool.allocate_when_room(1))
        await other.send(b"last words")
        await other.aclose()
        with pytest.raises(PeerClosedError):
            await waiting
        assert (await link.receive()).data == b"last words"


async def test_waiting_for_room_can_be_cancelled(scheme):
    async with linked(scheme) as (link, other), await link.open_pool(PAGE) as pool:
        await link.send(b"", buffers=pool.allocate(1))
        task = asyncio.create_task(pool.allocate_when_room(1))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (await other.receive()).buffers[0].free()
        await link.send(b"x")
        assert (await other.receive()).data == b"x"
        pool.allocate(1).free()


async def test_a_full_ring_does_not_lose_what_is_given_back(scheme):
    """It goes before messages that wait, and those who send now wait behind it."""
    async with (
        linked(scheme, ring_size=PAGE) as (link, other),
        await link.open_pool(200 * PAGE) as pool,
    ):
        received = []
        for _ in range(50):
            await link.send(b"", buffers=[pool.allocate(1) for _ in range(4)])
            received.extend((await other.receive()).buffers)
        sent = 0
        with suppress(QueueFull):
            while True:
                other.send_nowait(bytes(100))
                sent += 1
        waiting = asyncio.create_task(other.send(b"waited"))
        await asyncio.sleep(0)
        for buffer in received:
            buffer.free()
        with pytest.raises(QueueFull):
            other.send_nowait(b"")
        for _ in range(sent):
            assert (await link.receive()).data == bytes(100)
        assert (await link.receive()).data == b"waited"
        await waiting
        assert pool.statistics().handed_over == 0
        pool.allocate(200 * PAGE).free()
        await other.send(b"afterwards")
        assert (await link.receive()).data == b"afterwards"


async def test_the_peer_hears_of_it_as_soon_as_there_is_room(scheme):
    """Also when nobody there sends."""
    async with (
        linked(scheme, ring_size=PAGE) as (link, other),
        await link.open_pool(PAGE) as pool,
    ):
        await link.send(b"", buffers=pool.allocate(1))
        buffer = (await other.receive()).buffers[0]
        with suppress(QueueFull):
            while True:
                other.send_nowait(bytes(100))
        buffer.free()
        waiting = asyncio.create_task(pool.allocate_when_room(1))
        (await waiting).free()


async def test_what_is_given_back_passes_those_who_wait(scheme):
    async with (
        linked(scheme, ring_size=PAGE) as (link, other),
        await link.open_pool(PAGE) as pool,
    ):
        await link.send(b"", buffers=pool.allocate(1))
        buffer = (await other.receive()).buffers[0]
        sent = 0
        with suppress(QueueFull):
            while True:
                other.send_nowait(bytes(100))
                sent += 1
        waiting = asyncio.create_task(other.send(bytes(other.max_message_size)))
        await asyncio.sleep(0)
        buffer.free()
        async with AsyncExitStack() as borrowed:
            async with link.borrow():
                pass  # room for what is given back, and no more
            for _ in range(sent - 1):
                await borrowed.enter_async_context(link.borrow())
            (await pool.allocate_when_room(1)).free()
            assert not waiting.done()
        await waiting


async def test_room_for_the_data_but_not_for_the_buffers(scheme):
    async with (
        linked(scheme, ring_size=PAGE) as (link, other),
        await link.open_pool(PAGE) as pool,
    ):
        link.send_nowait(bytes(PAGE - 40 - 100 * 40 - 32))
        for _ in range(100):
            link.send_nowait(bytes(8))
        assert link.tx_free == 40
        sending = asyncio.create_task(link.send(b"", buffers=pool.allocate(1)))
        await asyncio.sleep(0)
        assert not sending.done()
        while not (message := await other.receive()).buffers:
            pass
        message.buffers[0].free()
        await sending


async def test_a_full_ring_hands_nothing_over(scheme):
    async with (
        linked(scheme, ring_size=PAGE) as (link, other),
        await link.open_pool(PAGE) as pool,
    ):
        with suppress(QueueFull):
            while True:
                link.send_nowait(b"")
        buffer = pool.allocate(1)
        with pytest.raises(QueueFull):
            link.send_nowait(b"x", buffers=buffer)
        task = asyncio.create_task(link.send(b"x", buffers=buffer))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        buffer.data[:] = b"m"
        assert pool.statistics().handed_over == 0
        task = asyncio.create_task(link.send(b"y", buffers=buffer))
        await asyncio.sleep(0)
        while not (message := await other.receive()).buffers:
            pass
        await task
        assert (message.data, bytes(message.buffers[0].data)) == (b"y", b"m")


# ---- who no longer has it -------------------------------------------------------


async def test_what_was_handed_over_is_gone(scheme):
    async with linked(scheme) as (link, other), await link.open_pool(4 * PAGE) as pool:
        buffer = pool.allocate(10)
        link.send_nowait(b"", buffers=[buffer])
        assert "handed over" in repr(buffer)
        with pytest.raises(UsageError, match="handed over"):
            _ = buffer.data
        with pytest.raises(UsageError, match="handed over"):
            link.send_nowait(b"", buffers=buffer)
        with pytest.raises(UsageError, match="handed over"):
            await pool.read(0, buffer)
        buffer.free()
        with buffer:
            pass
        message = await other.receive()
        assert len(message.buffers[0].data) == 10  # freeing it there did nothing here
        del buffer
        gc.collect()


async def test_bad_buffers(scheme):
    """Refused, nothing was sent, and all that is left is ours."""
    async with linked(scheme) as (link, other), linked(scheme) as (third, _):
        pool, second = await link.open_pool(8 * PAGE), await link.open_pool(PAGE)
        foreign = await third.open_pool(PAGE)
        good, other_good = pool.allocate(1), second.allocate(1)
        freed = pool.allocate(1)
        freed.free()
        async with kucomms.open_pool(PAGE) as plain:
            with plain.allocate(1) as unshared, foreign.allocate(1) as of_another_link:
                for bad in (
                    [good, freed],
                    [good, other_good, good],
                    [unshared],
                    [good, of_another_link],
                ):
                    with pytest.raises(UsageError):
                        await link.send(b"", buffers=bad)
                    with pytest.raises(UsageError):
                        link.send_nowait(b"", buffers=bad)
                    with pytest.raises(UsageError):
                        await link.request(b"", buffers=bad, timeout=1)
                    with pytest.raises(UsageError):
                        await link.reply(Message(id=1), b"", buffers=bad)
        for bad in ([good, 7], b"bytes", 5, [None]):
            with pytest.raises(TypeError):
                await link.send(b"", buffers=bad)
        with pytest.raises(TypeError):
            await link.send("text", buffers=good)
        with pytest.raises(UsageError):
            await link.send(b"", type=-1, buffers=good)
        with pytest.raises(MessageTooLargeError):
            await link.send(bytes(link.max_message_size - 15), buffers=good)
        assert pool.statistics().handed_over == 0
        good.data[:] = b"g"
        await link.send(bytes(link.max_message_size - 16), buffers=good)
        message = await other.receive()
        assert message.buffers[0].data == b"g"
        assert link.statistics().messages_sent == 1
        message.buffers[0].free()


async def test_a_view_that_is_alive(scheme):
    async with linked(scheme) as (link, other):
        pool = await link.open_pool(PAGE)
        buffer = pool.allocate(100)
        buffer.data[:] = bytes(range(100))
        for view in (buffer.data[10:20], memoryview(buffer.data)):
            with pytest.raises(BufferError, match="view"):
                await link.send(b"", buffers=buffer)
            assert view[0] == buffer.data[view.nbytes % 100] or view[0] == 10
            assert bytes(buffer.data) == bytes(range(100))  # it is still ours
            with pytest.raises(BufferError, match="view"):
                link.send_nowait(b"", buffers=buffer)
            view.release()
        await link.send(b"", buffers=buffer)
        received = (await other.receive()).buffers[0]
        with pytest.raises(BufferError, match="view"):
            view = received.data[:1]
            await other.send(b"", buffers=received)
        del view
        await other.send(b"", buffers=received)
        (await link.receive()).buffers[0].free()


async def test_a_transfer_that_is_under_way(scheme, engine):
    async with linked(scheme) as (link, other):
        pool = await link.open_pool(PAGE)
        buffer = pool.allocate(10)
        a, b = socket.socketpair()
        with a, b:
            a.setblocking(False)
            task = asyncio.create_task(pool.receive(a, buffer))
            await asyncio.sleep(0)
            with pytest.raises(UsageError, match="under way"):
                await link.send(b"", buffers=buffer)
            b.send(b"0123456789")
            assert await task == 10
            await link.send(b"", buffers=buffer)
            received = (await other.receive()).buffers[0]
            assert received.data == b"0123456789"
            task = asyncio.create_task(received.pool.send(b, received))
            assert await task == 10
            assert a.recv(20) == b"0123456789"
            # Freed while a transfer is under way: the owner gets it when that has ended.
            task = asyncio.create_task(received.pool.receive(a, received))
            await asyncio.sleep(0)
            received.free()
            with pytest.raises(PoolFull):
                pool.allocate(10)
            b.send(b"end")
            await task
            (await pool.allocate_when_room(10)).free()


async def test_files_and_received_buffers(link, engine):
    """What a peer has handed over is written to a file, and read from one, as its own is."""
    await link.send(b"\x07", type=GIVE, id=MIB, user_value=2 * MIB)
    buffer = (await link.receive()).buffers[0]
    pool = buffer.pool
    assert pool.statistics().engine == "none"
    with tempfile.TemporaryFile() as file:
        assert await pool.write(file, buffer, 0) == MIB
        assert os.pread(file.fileno(), MIB + 1, 0) == b"\x07" * MIB
        os.pwrite(file.fileno(), b"\x08" * 100, 0)
        assert await pool.read(file, (buffer, 5, 100), 0) == 100
    assert bytes(buffer.data[4:106]) == b"\x07" + b"\x08" * 100 + b"\x07"
    statistics = pool.statistics()
    assert statistics.engine == engine
    assert (statistics.size, statistics.allocated, statistics.completed) == (2 * MIB, MIB, 2)
    with pytest.raises(UsageError, match="peer's"):
        pool.allocate(1)
    with pytest.raises(UsageError, match="peer's"):
        (await pool.allocate_when_room(1)).free()
    with pytest.raises(UsageError, match="peer's"):
        await pool.aclose()
    assert "peer's" in repr(pool)
    await link.send(b"", type=RETURN, buffers=buffer)
    (await link.receive()).buffers[0].free()


async def test_an_engine_that_cannot_be_had(scheme, monkeypatch):
    async with linked(scheme) as (link, other), await link.open_pool(PAGE) as pool:
        await link.send(b"", buffers=pool.allocate(1))
        with (await other.receive()).buffers[0] as buffer:
            monkeypatch.setenv("KUCOMMS_IO", "nonsense")
            with pytest.raises(UsageError, match="KUCOMMS_IO"):
                await buffer.pool.read(0, buffer)
            assert buffer.pool.statistics().in_flight == 0
        pool.allocate(1).free()


async def test_who_drops_a_message_gives_its_buffers_back(scheme):
    """Received and not kept, or never received, or a reply that comes too late."""
    async with linked(scheme) as (link, other):
        async with await link.open_pool(3 * PAGE) as pool:
            for _ in range(10):
                await link.send(b"", buffers=await pool.allocate_when_room(3 * PAGE))
                await other.receive()
            (await pool.allocate_when_room(3 * PAGE)).free()
        async with await link.open_pool(PAGE) as pool:
            await link.reply(Message(id=99), b"late", buffers=pool.allocate(1))
            await link.send(b"")
            await other.receive()
            assert other.statistics().late_replies == 1
            (await pool.allocate_when_room(1)).free()


async def test_freed_in_another_thread(scheme):
    async with linked(scheme) as (link, other), await link.open_pool(PAGE) as pool:
        for _ in range(20):
            await link.send(b"", buffers=await pool.allocate_when_room(1))
            buffer = (await other.receive()).buffers[0]
            await asyncio.to_thread(buffer.free)
        (await pool.allocate_when_room(1)).free()


async def test_freed_while_a_view_lives(scheme):
    async with linked(scheme) as (link, other), await link.open_pool(PAGE) as pool:
        buffer = pool.allocate(4)
        buffer.data[:] = b"view"
        await link.send(b"", buffers=buffer)
        received = (await other.receive()).buffers[0]
        view = received.data[1:]
        with pytest.raises(BufferError):
            received.free()
        with pytest.raises(PoolFull):
            pool.allocate(4)
        assert view == b"iew"
        del view
        (await pool.allocate_when_room(4)).free()


@pytest.mark.parametrize("borrowing", [False, True])
async def test_message_handlers(scheme, borrowing):
    """Borrowed or not: the buffers are kept as long as one likes."""
    kept = []

    async def handler(message, link):
        assert bytes(message.data) == b"data"
        kept.extend(message.buffers)
        if message.id:
            await link.reply(message, b"")

    async with linked(scheme) as (link, other):
        other._endpoint.on_message(borrow=borrowing)(handler)
        async with await link.open_pool(4 * PAGE) as pool:
            for value in range(4):
                buffer = pool.allocate(1)
                buffer.data[0] = value
                await link.send(b"data", buffers=buffer)
            await link.request(b"data", timeout=PATIENCE)
            assert [buffer.data[0] for buffer in kept] == [0, 1, 2, 3]
            for buffer in kept:
                buffer.free()
            kept.clear()
            pool.allocate(4 * PAGE).free()


async def test_borrowing(scheme):
    async with linked(scheme) as (link, other), await link.open_pool(PAGE) as pool:
        buffer = pool.allocate(3)
        buffer.data[:] = b"abc"
        await link.send(b"data", type=1, id=2, user_value=3, buffers=buffer)
        async with other.borrow() as message:
            assert (bytes(message.data), message.type, message.id) == (b"data", 1, 2)
            (received,) = message.buffers
        assert received.data == b"abc"
        received.free()
        await link.send(b"plain")
        async with other.borrow() as message:
            assert message.buffers == ()
        # Notices are nothing that a borrow could return.
        waiting = asyncio.create_task(link.borrow().__aenter__())
        await link.send(b"", buffers=pool.allocate(3))
        (await other.receive()).buffers[0].free()
        await settled(lambda: pool.statistics().handed_over == 0)
        assert not waiting.done()
        await other.send(b"message")
        assert bytes((await waiting).data) == b"message"


async def test_a_borrow_that_gets_a_reply_with_buffers(scheme):
    async with linked(scheme) as (link, other), await other.open_pool(PAGE) as pool:
        borrowing = asyncio.create_task(link.borrow().__aenter__())
        asking = asyncio.create_task(link.request(b"", timeout=PATIENCE))
        question = await other.receive()
        await other.reply(question, b"answer", buffers=pool.allocate(1))
        reply = await asking
        assert (reply.data, len(reply.buffers)) == (b"answer", 1)
        await other.send(b"for who borrows")
        assert bytes((await borrowing).data) == b"for who borrows"


# ---- the end ---------------------------------------------------------------------


async def test_closing_a_pool_whose_buffers_are_out(link):
    """What the peer has stays as it is for it, and may come back: as nothing."""
    pool = await link.open_pool(4 * PAGE)
    await link.send(b"", type=KEEP, buffers=[pool.allocate(1), pool.allocate(PAGE)])
    await link.receive()
    await link.send(b"", type=RETURN, buffers=pool.allocate(PAGE))
    await pool.aclose()
    with pytest.raises(ClosedError):
        pool.allocate(1)
    (returned,) = (await link.receive()).buffers
    with pytest.raises(UsageError, match="freed with its pool"):
        _ = returned.data
    returned.free()
    assert returned.pool is pool
    await link.send(b"", type=LET_GO)
    assert (await link.receive()).data == b"let go"
    async with await link.open_pool(PAGE) as another:  # the link is as good as before
        await link.send(b"", type=RETURN, buffers=another.allocate(1))
        (await link.receive()).buffers[0].free()


async def test_a_pool_that_the_peer_closes(scheme):
    """What is here of it can be read until it is freed; then it is unmapped."""
    async with linked(scheme) as (link, other):
        pool = await link.open_pool(2 * PAGE)
        for data in (b"one", b"two"):
            buffer = pool.allocate(3)
            buffer.data[:] = data
            await link.send(b"", buffers=buffer)
        one = (await other.receive()).buffers[0]
        await pool.aclose()
        two = (await other.receive()).buffers[0]  # sent before the end
        await link.send(b"after it")
        assert (await other.receive()).data == b"after it"
        assert (one.data, two.data) == (b"one", b"two")
        view = two.data[1:]
        await other.send(b"", buffers=one)
        with pytest.raises(BufferError):
            two.free()
        (back,) = (await link.receive()).buffers
        with pytest.raises(UsageError, match="freed with its pool"):
            _ = back.data
        assert of_pools() != set()
        del view
        await settled(lambda: of_pools() == set())
        await other.send(b"good")
        assert (await link.receive()).data == b"good"


async def test_the_partner_closes_its_pool(link):
    await link.send(b"p", type=GIVE, id=PAGE, user_value=4 * PAGE)
    buffer = (await link.receive()).buffers[0]
    await link.send(b"", type=CLOSE_POOL)
    assert (await link.receive()).data == b"closed"
    assert bytes(buffer.data) == b"p" * PAGE
    buffer.free()
    await link.send(b"q", type=GIVE, id=PAGE, user_value=4 * PAGE)
    assert bytes((await link.receive()).buffers[0].data) == b"q" * PAGE


@pytest.mark.parametrize("closes", ["owner", "other"])
async def test_closing_the_link(scheme, closes):
    async with linked(scheme) as (link, other):
        pool = await link.open_pool(4 * PAGE)
        mine = pool.allocate(5)
        mine.data[:] = b"mine!"
        out = pool.allocate(5)
        out.data[:] = b"yours"
        await link.send(b"", buffers=out)
        await link.send(b"", buffers=pool.allocate(1))  # never received
        received = (await other.receive()).buffers[0]
        view = mine.data[:]
        waiting = asyncio.create_task(pool.allocate_when_room(4 * PAGE))
        await asyncio.sleep(0)
        await (link if closes == "owner" else other).aclose()
        await other.aclose()
        over = ClosedError if closes == "owner" else PeerClosedError
        with pytest.raises(over, match=f"{link.url}: (this link|the other side)"):
            await waiting
        await settled(lambda: link.closed)
        await link.aclose()
        assert pool.closed
        with pytest.raises(over, match=link.url):
            pool.allocate(1)
        with pytest.raises(over, match=link.url):
            await pool.read(0, mine)
        assert received.data == b"yours"
        assert view == b"mine!"
        with pytest.raises(ClosedError, match=f"{other.url}: this link"):
            await received.pool.read(0, received)
        with pytest.raises(ClosedError, match=f"{other.url}: this link"):
            await other.send(b"", buffers=received)
        received.free()
        del view, mine
        gc.collect()
        assert of_pools() == set()


async def test_death_of_the_owner():
    """Its pages stay here as long as somebody looks at them."""
    url = new_url("shm")
    async with partner_at(url, "process"), kucomms.connect(url, timeout=PATIENCE) as link:
        await link.send(b"d", type=GIVE, id=MIB, user_value=2 * MIB)
        buffer = (await link.receive()).buffers[0]
        await link.send(b"", type=DIE)
        with pytest.raises(PeerClosedError):
            await link.receive()
        assert bytes(buffer.data) == b"d" * MIB
        with pytest.raises(PeerClosedError):
            await link.send(b"", buffers=buffer)
        buffer.free()
        await link.aclose()
        assert of_pools() == set()


async def test_death_of_who_has_the_buffers():
    url = new_url("shm")
    async with partner_at(url, "process"), kucomms.connect(url, timeout=PATIENCE) as link:
        pool = await link.open_pool(2 * PAGE)
        await link.send(b"", type=KEEP, buffers=pool.allocate(PAGE))
        await link.receive()
        waiting = asyncio.create_task(pool.allocate_when_room(2 * PAGE))
        await asyncio.sleep(0)
        await link.send(b"", type=DIE)
        with pytest.raises(PeerClosedError, match=url):
            await waiting
        with pytest.raises(PeerClosedError):
            await link.receive()
        assert pool.closed
        with pytest.raises(PeerClosedError):
            await link.open_pool(PAGE)


async def test_death_while_a_transfer_is_under_way(engine):
    """With a buffer of the dead peer's: it ends, and nothing is left."""
    url = new_url("shm")
    async with partner_at(url, "process"), kucomms.connect(url, timeout=PATIENCE) as link:
        await link.send(b"d", type=GIVE, id=PAGE, user_value=PAGE)
        buffer = (await link.receive()).buffers[0]
        a, b = socket.socketpair()
        with a, b:
            a.setblocking(False)
            task = asyncio.create_task(buffer.pool.receive(a, buffer))
            await link.send(b"", type=DIE)
            with pytest.raises(PeerClosedError, match=url):
                await task
            await link.aclose()
        buffer.free()
        assert of_pools() == set()


async def test_fork(scheme):
    async with linked(scheme) as (link, other), await link.open_pool(2 * PAGE) as pool:
        mine = pool.allocate(4)
        await link.send(b"", buffers=pool.allocate(4))
        received = (await other.receive()).buffers[0]
        received.data[:] = b"here"

        def child():
            for buffer, end in ((mine, link), (received, other)):
                with pytest.raises(UsageError):
                    _ = buffer.data
                with pytest.raises(UsageError):
                    end.send_nowait(b"", buffers=buffer)
                buffer.free()
            gc.collect()
            assert of_pools() == set()

        await in_child(child)
        assert received.data == b"here"
        await other.send(b"", buffers=received)
        assert (await link.receive()).buffers[0].data == b"here"


# ---- pools ------------------------------------------------------------------------


async def test_pools_of_both_sides_and_their_number(scheme):
    async with linked(scheme) as (link, other):
        pools = await asyncio.gather(*(link.open_pool(PAGE) for _ in range(64)))
        with pytest.raises(TransportError, match="64 pools"):
            await link.open_pool(PAGE)
        theirs = await other.open_pool(PAGE)
        await pools[3].aclose()
        pools[3] = await link.open_pool(PAGE)
        for pool in pools:
            await link.send(b"", buffers=pool.allocate(1))
        await other.send(b"", buffers=theirs.allocate(1))
        await other.send(b"", buffers=[(await other.receive()).buffers[0] for _ in pools])
        assert len((await link.receive()).buffers) == 1
        assert {buffer.pool for buffer in (await link.receive()).buffers} == set(pools)


async def test_a_cancelled_opening_leaves_nothing(scheme):
    async with linked(scheme) as (link, other):
        for turns in range(6):
            opening = asyncio.ensure_future(_open(link, 3 * MIB))
            for _ in range(turns):
                await asyncio.sleep(0)
            opening.cancel()
            with suppress(asyncio.CancelledError):
                await (await opening).aclose()
        pool = await link.open_pool(PAGE)
        await link.send(b"", buffers=pool.allocate(1))
        (await other.receive()).buffers[0].free()
        await pool.aclose()
        await link.send(b"")
        await other.receive()
        await settled(lambda: of_pools() == set())


async def _open(link, size):
    return await link.open_pool(size)


async def test_a_peer_that_cannot_map(scheme, monkeypatch):
    async with linked(scheme) as (link, other):
        peers = other._connection
        monkeypatch.setattr(peers, "pool_opened", lambda _number, _memory: 12)
        with pytest.raises(TransportError, match="cannot map the pool") as caught:
            await link.open_pool(PAGE)
        assert caught.value.errno == 12
        assert of_pools() == set()
        await link.send(b"good")
        assert (await other.receive()).data == b"good"


async def test_closing_while_a_pool_is_opened(scheme):
    async with linked(scheme) as (link, other):
        opening = asyncio.create_task(_open(link, MIB))
        await asyncio.sleep(0)
        await other.aclose()
        await link.aclose()
        with pytest.raises((ClosedError, PeerClosedError), match=link.url):
            await opening
        assert of_pools() == set()


async def test_a_link_that_cannot_hand_over_says_so(monkeypatch):
    """Its pool is for transfers only."""
    async with linked("inproc") as (link, _other):
        link._connection.carries_buffers = False
        async with await link.open_pool(PAGE) as pool:
            with pool.allocate(1) as buffer, pytest.raises(UsageError, match="POOLS, or shm://"):
                await link.send(b"", buffers=buffer)
