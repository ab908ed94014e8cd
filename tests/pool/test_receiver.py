# SPDX-License-Identifier: MIT
"""Datagrams for which no buffer is posted wait or are dropped, and drops are counted."""

import asyncio
import socket
from contextlib import suppress

import pytest

from kucomms import ClosedError, UsageError, open_pool

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("engine")]


@pytest.fixture(params=["unix", "udp"])
def pair(request):
    if request.param == "unix":
        one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    else:
        one, two = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        two.bind(("127.0.0.1", 0))
        one.connect(two.getsockname())
    with one, two:
        yield one, two


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def test_waiting(pair):
    one, two = pair
    async with open_pool(1 << 20) as pool:
        with pool.receiver(two) as receiver, pool.allocate(100) as buffer:
            one.send(b"first")
            one.send(b"second!")
            for _ in range(20):
                await asyncio.sleep(0)
            assert await receiver.receive(buffer) == 5
            assert await receiver.receive(buffer) == 7
            assert bytes(buffer.data[:7]) == b"second!"
            assert receiver.dropped == pool.statistics().dropped == 0


async def test_dropping(pair):
    one, two = pair
    async with open_pool(1 << 20) as pool:
        with pool.allocate(100) as buffer:
            with pool.receiver(two, on_no_buffer="drop") as receiver:
                for size in (5, 0, 100):
                    one.send(bytes(size))
                await until(lambda: receiver.dropped == 3)
                waiting = asyncio.create_task(receiver.receive(buffer))
                await asyncio.sleep(0)
                one.send(b"posted")
                assert await waiting == 6
                one.send(b"too late")
                await until(lambda: receiver.dropped == 4)
            one.send(b"stays")  # it leaves the socket alone now
            for _ in range(20):
                await asyncio.sleep(0)
            assert await pool.receive(two, buffer) == 5
            assert pool.statistics().dropped == 4
            with pytest.raises(ClosedError):
                await receiver.receive(buffer)


async def test_a_flood_does_not_hold_up_the_loop(pair):
    one, two = pair
    one.setblocking(False)
    sent = 0
    with suppress(BlockingIOError):
        while sent < 200:
            one.send(b"x")
            sent += 1
    async with open_pool(1 << 20) as pool:
        with pool.receiver(two, on_no_buffer="drop") as receiver:
            before = 0
            async with asyncio.timeout(20):
                while before < sent:
                    await asyncio.sleep(0)
                    assert receiver.dropped - before <= 64
                    before = receiver.dropped


async def test_closing_the_pool_ends_it(pair):
    _, two = pair
    async with open_pool(1 << 20) as pool:
        receiver = pool.receiver(two, on_no_buffer="drop")
    with pytest.raises(ClosedError):
        await receiver.receive(None)
    assert not asyncio.get_running_loop().remove_reader(two.fileno())


async def test_bad_options():
    one, two = socket.socketpair()
    with one, two:
        async with open_pool(1 << 20) as pool:
            with pytest.raises(UsageError, match="datagrams"):
                pool.receiver(one)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        async with open_pool(1 << 20) as pool:
            with pytest.raises(UsageError, match="burn"):
                pool.receiver(sock, on_no_buffer="burn")
