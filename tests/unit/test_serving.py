# SPDX-License-Identifier: MIT
"""What the runner has in hand while handlers wait, raise, reply and close."""

import asyncio

import pytest

import kucomms
from kucomms import Endpoint, UsageError

PATIENCE = 20.0

pytestmark = pytest.mark.asyncio


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def linked(server, client, url, count=1, **options):
    """So many links of ``client`` to ``server``, all opened at both sides."""
    await server.listen(url, **options)
    links = [await client.connect(url) for _ in range(count)]
    await until(lambda: len(server.links) == count)
    return links


async def test_messages_around_a_reply_are_handled():
    received = []

    async def answer(message, link):
        link.send_nowait(b"before")
        await link.reply(message, b"reply")
        link.send_nowait(b"after")

    async with Endpoint("asks") as client, Endpoint("answers", on_message=answer) as server:
        client.on_message(lambda message, link: received.append(message.data))
        (link,) = await linked(server, client, "inproc://around")
        for _ in range(3):
            assert (await link.request(b"", timeout=PATIENCE)).data == b"reply"
        await until(lambda: len(received) == 6)
        assert received == [b"before", b"after"] * 3
        assert client.statistics().message_calls == 6


async def test_what_comes_while_another_links_handler_waits_is_handled():
    received = []

    async with Endpoint("sends") as client, Endpoint("handles") as server:

        @server.on_message
        async def handle(message, link):
            received.append(message.data)
            if message.data == b"a":
                second.send_nowait(b"more")
            elif message.data == b"more":
                first.send_nowait(b"late")  # its link was found empty before
                await asyncio.sleep(0.001)  # a turn of the loop or more

        first, second = await linked(server, client, "inproc://meanwhile", 2)
        first.send_nowait(b"early")
        second.send_nowait(b"a")
        await until(lambda: len(received) == 4)
        assert received == [b"early", b"a", b"more", b"late"]


async def test_space_is_told_of_before_a_handler_waits():
    """The sender sleeps, some space was given back lazily, and the handler waits for it."""
    sent = asyncio.Event()
    calls = 0

    async with Endpoint("sends") as client, Endpoint("borrows") as server:

        @server.on_message(borrow=True)
        async def handle(message, link):
            nonlocal calls
            calls += 1
            if calls == 2:
                async with asyncio.timeout(PATIENCE):
                    await sent.wait()

        (link,) = await linked(server, client, "inproc://space", ring_size=4096)
        for _ in range(17):  # one more than fits: 256 bytes each
            await link.send(bytes(224))
        sent.set()
        await until(lambda: calls == 17)
        assert server.statistics().handler_errors == 0


@pytest.mark.parametrize("how", ["raises", "returns", "waits"])
async def test_ticks_come_between_messages_whatever_handlers_do(how):
    """A batch whose handlers never end plainly: the timer, and other tasks, have their turn."""
    gaps, last = [], None
    turns = 0
    left = 3000 if how != "waits" else 60
    over = asyncio.Event()
    loop = asyncio.get_running_loop()

    def work():
        nonlocal left
        left -= 1
        if not left:
            over.set()
        begin = loop.time()
        while loop.time() < begin + 100e-6:
            pass

    def raises(message, link):
        work()
        raise ValueError("as planned")

    def returns(message, link):
        work()
        return 1

    async def waits(message, link):
        work()
        await asyncio.sleep(0.002)

    def tick(now):
        nonlocal last
        if last is not None:
            gaps.append(now - last)
        last = now

    endpoint = Endpoint("ticks", timer_hz=200.0, on_timer=tick, on_error=lambda error, name: None)
    async with Endpoint("sends") as client, endpoint as server:
        server.on_message({"raises": raises, "returns": returns, "waits": waits}[how])
        (link,) = await linked(server, client, "inproc://ticks")

        async def spin():
            nonlocal turns
            while not over.is_set():
                turns += 1
                await asyncio.sleep(0)

        spinning = asyncio.create_task(spin())
        await link.send_many([b""] * left)
        async with asyncio.timeout(PATIENCE):
            await over.wait()
        await spinning
        assert len(gaps) >= 5
        assert turns >= 20


async def test_a_handler_registered_while_a_task_polls_ends_the_task():
    received = []
    async with Endpoint("other") as other, Endpoint("polls", busy_poll=0.05) as endpoint:
        (link,) = await linked(other, endpoint, "inproc://registered")
        link._can_be_polled = True  # as with a peer in another process
        endpoint._polling.budget = 20_000_000
        receiving = asyncio.create_task(link.receive())
        await until(lambda: endpoint._is_polling)
        endpoint.on_message(lambda message, link: received.append(message.data))
        with pytest.raises(UsageError, match="message handler"):
            await receiving
        other.links[0].send_nowait(b"for the handler")
        await until(lambda: received == [b"for the handler"])


async def test_requests_that_poll_keep_to_the_backlog():
    async def answer(message, link):
        for _ in range(20):
            link.send_nowait(bytes(400))
        await link.reply(message, b"")

    async with Endpoint("answers", on_message=answer) as server:
        await server.listen("inproc://keeps")
        async with kucomms.connect("inproc://keeps", backlog=1 << 14) as link:
            link._can_be_polled = True  # as with a peer in another process
            for _ in range(20):
                link._endpoint._polling.budget = 50_000
                await link.request(b"", timeout=PATIENCE)
                assert link._endpoint._backlog_used <= 1 << 14
                for _ in range(20):
                    await link.receive()
