# SPDX-License-Identifier: MIT
# ruff: noqa: ASYNC110, PT012
"""The other process dies, closes, or stands still."""

import asyncio
import itertools
import os
import signal
import struct
from contextlib import asynccontextmanager
from time import monotonic

import pytest

from kucomms import AddressInUseError, Endpoint, NotReadyError, PeerClosedError, QueueFull
from tests.transports.peer_programs import IDLE, LOAN_AFTER
from tests.transports.processes import PATIENCE, Process, descriptors, objects_in_shm

pytestmark = pytest.mark.asyncio

SOON = 1.0
"""Ten times what is promised for the time between a death and its notice."""

_numbers = itertools.count()

both_sides = pytest.mark.parametrize(
    "victim_listens", [True, False], ids=["listener_dies", "connector_dies"]
)


def new_url():
    return f"shm://death_{os.getpid()}_{next(_numbers)}"


def numbers(count):
    return [struct.pack("<Q", value) for value in range(count)]


@asynccontextmanager
async def running(program, *arguments, victim_listens, url=None, **endpoint_options):
    """A survivor in this process, linked to a victim in another one.

    Yields the endpoint, the link, the process, and a future of the close handler's error.
    """
    url = url or new_url()
    loop = asyncio.get_running_loop()
    opened, closed = loop.create_future(), loop.create_future()
    async with Endpoint("survivor", **endpoint_options) as endpoint:
        endpoint.on_link_open(opened.set_result)
        endpoint.on_link_close(lambda _link, error: closed.set_result(error))
        if not victim_listens:
            await endpoint.listen(url)
        with Process(program, url, int(victim_listens), *arguments) as victim:
            if victim_listens:
                await victim.says("ready")
                await endpoint.connect(url)
            async with asyncio.timeout(PATIENCE):
                link = await opened
                yield endpoint, link, victim, closed


async def everything(link):
    """All messages until the link ends, and how it ended: None or the error."""
    received = []
    try:
        async for message in link:
            received.append(message.data)
    except PeerClosedError as error:
        return received, error
    return received, None


# ---- SIGKILL ------------------------------------------------------------------


@both_sides
@pytest.mark.parametrize("program", ["idle", "idle_with_child", "unfinished_loan"])
async def test_what_was_committed_is_received(program, victim_listens):
    async with running(program, victim_listens=victim_listens) as (_, link, victim, closed):
        await victim.says("sent")
        victim.kill()
        received, error = await everything(link)
        assert received == numbers(LOAN_AFTER if program == "unfinished_loan" else IDLE)
        assert type(error) is PeerClosedError
        assert type(await closed) is PeerClosedError
        assert link.closed
        with pytest.raises(PeerClosedError):
            await link.receive()
        with pytest.raises(PeerClosedError):
            await link.send(b"")
        with pytest.raises(PeerClosedError):
            link.send_nowait(b"")
        await link.wait_closed()


@both_sides
@pytest.mark.parametrize(
    ("receiving", "polling"),
    [("await", 0.0), ("handler", 0.0), ("handler", 0.01), ("borrowing", 0.0), ("borrowing", 0.01)],
)
async def test_flood_ends_with_the_last_message(tmp_path, receiving, polling, victim_listens):
    path = tmp_path / "count"
    path.write_bytes(bytes(8))
    received = []
    some = asyncio.Event()
    ended_after = None

    def handle(message, _link):
        received.append(bytes(message.data))
        if len(received) == 5000:
            some.set()

    running_flood = running("flood", path, victim_listens=victim_listens, busy_poll=polling)
    async with running_flood as (endpoint, link, victim, closed):

        def note_end(_future):
            nonlocal ended_after
            ended_after = len(received)

        closed.add_done_callback(note_end)
        if receiving == "await":
            while len(received) < 5000:
                handle(await link.receive(), link)
        elif receiving == "borrowing":
            endpoint.on_message(borrow=True)(handle)
        else:
            endpoint.on_message(handle)
        await some.wait()
        victim.kill()
        if receiving == "await":
            rest, error = await everything(link)
            received += rest
            assert type(error) is PeerClosedError
        assert type(await closed) is PeerClosedError
        sent = struct.unpack("<Q", path.read_bytes())[0]
        assert len(received) in (sent, sent + 1)
        assert received == numbers(len(received))
        assert link.statistics().messages_received == len(received)
        await asyncio.sleep(0)
        assert ended_after == len(received)


@both_sides
async def test_nothing_is_left_behind(victim_listens):
    url = new_url()
    options = {"victim_listens": victim_listens, "url": url}
    async with running("idle_with_child", **options) as (endpoint, link, victim, closed):
        await victim.says("sent")
        before = descriptors()
        victim.kill()
        received, _error = await everything(link)
        await closed
        assert len(received) == IDLE
        assert objects_in_shm(os.getpid(), victim.pid) == []
        assert endpoint.links == ()
        after = descriptors()
        assert set(after) < set(before)
        gone = [before[fd].split(":")[0] for fd in set(before) - set(after)]
        # the pidfd, two eventfds, and the link's socket
        assert sorted(gone) == ["anon_inode"] * 3 + ["socket"]


@both_sides
@pytest.mark.parametrize("program", ["idle", "idle_with_child"])
async def test_sends_fail_soon(program, victim_listens):
    async with running(program, victim_listens=victim_listens) as (_, link, victim, _closed):
        await victim.says("sent")
        link.send_nowait(b"is read by nobody")
        begin = monotonic()
        victim.kill()
        with pytest.raises(PeerClosedError, match=r"shm://death_.*connect again"):
            while True:
                link.send_nowait(b"")
                await asyncio.sleep(0)
        assert monotonic() - begin < SOON


@both_sides
async def test_waiting_senders_are_told(victim_listens):
    running_victim = running("reads_nothing", victim_listens=victim_listens)
    async with running_victim as (_, link, victim, _closed):
        await victim.says("linked")
        with pytest.raises(QueueFull):
            while True:
                link.send_nowait(bytes(10000))
        waiting = [
            asyncio.create_task(link.send(bytes(20000))),
            asyncio.create_task(link.send_many([bytes(20000)] * 3)),
            asyncio.create_task(asyncio.to_thread(link.send_threadsafe, bytes(20000))),
            asyncio.create_task(link.request(bytes(20000), timeout=PATIENCE)),
        ]
        while len(link._send_queue) < len(waiting):
            await asyncio.sleep(0)
        begin = monotonic()
        victim.kill()
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(error) for error in errors] == [PeerClosedError] * len(waiting)
        assert monotonic() - begin < SOON


@both_sides
async def test_waiting_receivers_are_told(victim_listens):
    async with running("idle", victim_listens=victim_listens) as (_, link, victim, _closed):
        await victim.says("sent")
        for data in numbers(IDLE):
            assert (await link.receive()).data == data
        waiting = [asyncio.create_task(link.receive()) for _ in range(3)]
        waiting.append(asyncio.create_task(link.request(b"", timeout=PATIENCE)))
        waiting.append(asyncio.create_task(link.borrow().__aenter__()))
        await asyncio.sleep(0)
        victim.kill()
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(error) for error in errors] == [PeerClosedError] * len(waiting)


@both_sides
async def test_requests_end_while_messages_wait(victim_listens):
    """Nobody receives, so the link is not over; the request is all the same."""
    async with running("idle", victim_listens=victim_listens) as (_, link, victim, closed):
        await victim.says("sent")
        requests = [asyncio.create_task(link.request(b"")) for _ in range(3)]
        await asyncio.sleep(0)
        victim.kill()
        errors = await asyncio.gather(*requests, return_exceptions=True)
        assert [type(error) for error in errors] == [PeerClosedError] * 3
        assert not closed.done()
        received, _error = await everything(link)
        assert received == numbers(IDLE)


@both_sides
@pytest.mark.parametrize("program", ["idle", "closes"])
async def test_request_in_a_handler_ends(program, victim_listens):
    """The handler that waits for it keeps the endpoint from anything else."""
    arguments = ["link"] if program == "closes" else []
    failed = asyncio.get_running_loop().create_future()
    received = []

    async def handle(message, link):
        received.append(message.data)
        if len(received) == 1:
            try:
                await link.request(b"is not answered")
            except PeerClosedError as error:
                failed.set_result(error)

    async with running(program, *arguments, victim_listens=victim_listens) as (
        endpoint,
        _link,
        victim,
        closed,
    ):
        endpoint.on_message(handle)
        while not received:
            await asyncio.sleep(0)
        if program == "idle":
            await victim.says("sent")
            victim.kill()
        assert type(await failed) is PeerClosedError
        error = await closed
        assert error is None if program == "closes" else type(error) is PeerClosedError
        assert received == numbers(IDLE)


@both_sides
async def test_leaving_without_a_word_is_a_death(victim_listens):
    async with running("leaves", victim_listens=victim_listens) as (_, link, victim, closed):
        received, error = await everything(link)
        assert received == numbers(IDLE)
        assert type(error) is PeerClosedError
        assert type(await closed) is PeerClosedError
        assert await victim.ended() == 0


async def test_borrowed_data_outlives_the_peer():
    async with running("idle", victim_listens=True) as (_, link, victim, closed):
        await victim.says("sent")
        async with link.borrow() as message:
            victim.kill()
            assert message.data == numbers(1)[0]
            received, _error = await everything(link)
            assert received == numbers(IDLE)[1:]
            await closed
            assert message.data == numbers(1)[0]


@pytest.mark.parametrize("with_child", [False, True])
async def test_name_of_a_killed_listener_is_free(with_child):
    url = new_url()
    with Process("listens_with_child" if with_child else "echo", url) as victim:
        await victim.says("ready")
        async with Endpoint("next") as endpoint:
            endpoint.on_message(lambda message, link: link.send(message))
            victim.kill()
            assert await_zombie(victim.pid)
            await endpoint.listen(url)
            async with Endpoint("user") as user:
                link = await user.connect(url, timeout=0)
                await link.send(b"to the new one")
                assert (await link.receive()).data == b"to the new one"
                assert link.peer.pid == os.getpid()


def await_zombie(pid):
    """Wait until the process has ended, without reaping it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


async def test_connect_waits_on_while_an_orphan_holds_the_socket():
    """Somebody accepts connections, but the process that listened is dead."""
    url = new_url()
    with Process("listens_with_child", url) as victim:
        await victim.says("ready")
        victim.kill()
        assert await_zombie(victim.pid)
        async with Endpoint("user") as user, Endpoint("next") as endpoint:
            endpoint.on_message(lambda message, link: link.send(message))
            connecting = asyncio.create_task(user.connect(url))
            await asyncio.to_thread(lambda: None)
            await endpoint.listen(url)
            async with asyncio.timeout(PATIENCE):
                link = await connecting
                await link.send(b"x")
                assert (await link.receive()).data == b"x"


# ---- SIGKILL while the link is set up -------------------------------------------


async def test_connector_killed_in_mid_rendezvous():
    url = new_url()
    opened = []
    async with Endpoint("listener") as endpoint:
        endpoint.on_message(lambda message, link: link.send(message))
        endpoint.on_link_open(opened.append)
        await endpoint.listen(url)
        before = descriptors()
        with Process("dies_while_connecting", url.removeprefix("shm://")) as victim:
            await victim.says("halfway")
            assert len(descriptors()) > len(before)
            victim.kill()
            await victim.ended()
        async with Endpoint("good") as good:
            link = await good.connect(url, timeout=0)
            await link.send(b"x")
            assert (await link.receive()).data == b"x"
        while endpoint.links:
            await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE):
            while descriptors() != before:
                await asyncio.sleep(0)
        assert len(opened) == 1
        assert objects_in_shm(os.getpid(), victim.pid) == []


@pytest.mark.parametrize("with_child", [False, True])
async def test_listener_killed_in_mid_rendezvous(with_child):
    """A connector that waits for ever gets the next listener."""
    url = new_url()
    async with Endpoint("next") as endpoint, Endpoint("user") as user:
        endpoint.on_message(lambda message, link: link.send(message))
        name = url.removeprefix("shm://")
        with Process("dies_while_accepting", name, int(with_child)) as victim:
            await victim.says("ready")
            before = descriptors()
            connecting = asyncio.create_task(user.connect(url))
            await victim.says("halfway")
            victim.kill()
            async with asyncio.timeout(PATIENCE):
                assert await_zombie(victim.pid)
                listener = await endpoint.listen(url)
                link = await connecting
                await link.send(b"x")
                assert (await link.receive()).data == b"x"
            await link.aclose()
            await listener.aclose()
            while endpoint.links:
                await asyncio.sleep(0)
            assert descriptors() == before
            assert objects_in_shm(os.getpid(), victim.pid) == []


# ---- closing in order -----------------------------------------------------------


@both_sides
@pytest.mark.parametrize("how", ["link", "endpoint"])
async def test_orderly_close_delivers_everything(how, victim_listens):
    async with running("closes", how, victim_listens=victim_listens) as (_, link, victim, closed):
        if how == "link":
            await victim.says("closed")
        else:
            assert await victim.ended() == 0
        received, error = await everything(link)
        assert received == numbers(IDLE)
        assert error is None
        assert await closed is None
        assert link.closed
        with pytest.raises(PeerClosedError, match="the other side closed the link"):
            await link.receive()
        with pytest.raises(PeerClosedError):
            await link.send(b"")
        received, error = await everything(link)
        assert (received, error) == ([], None)


@both_sides
async def test_orderly_close_with_a_message_handler(victim_listens):
    received = []
    async with running("closes", "link", victim_listens=victim_listens) as (
        endpoint,
        link,
        victim,
        closed,
    ):
        await victim.says("closed")
        endpoint.on_message(lambda message, _link: received.append(message.data))
        assert await closed is None
        assert received == numbers(IDLE)
        assert link.closed


# ---- SIGSTOP --------------------------------------------------------------------


@both_sides
async def test_stopped_peer_is_back_pressure(victim_listens):
    running_victim = running("reads_nothing", victim_listens=victim_listens)
    async with running_victim as (endpoint, link, victim, closed):
        await victim.says("linked")
        victim.stop()
        count = 0
        with pytest.raises(QueueFull):
            while True:
                link.send_nowait(struct.pack("<Q", count) + bytes(1000))
                count += 1
        more = [
            asyncio.create_task(link.send(struct.pack("<Q", count + n) + bytes(1000)))
            for n in range(20)
        ]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):  # its subject is that nothing happens
                await asyncio.wait(more, return_when=asyncio.FIRST_COMPLETED)
        assert not closed.done()
        assert not link.closed
        assert endpoint.links == (link,)
        victim.tell(str(count + len(more)))
        victim.go_on()
        await asyncio.gather(*more)
        await victim.says(f"received {count + len(more)}")
        assert not closed.done()


async def test_listener_that_is_stopped_keeps_its_name():
    url = new_url()
    with Process("echo", url) as other:
        await other.says("ready")
        other.stop()
        async with Endpoint("late") as endpoint:
            with pytest.raises(AddressInUseError):
                await endpoint.listen(url)
            with pytest.raises(NotReadyError):
                await endpoint.connect(url, timeout=0.2)
            connecting = asyncio.create_task(endpoint.connect(url, timeout=PATIENCE))
            other.signal(signal.SIGCONT)
            link = await connecting
            await link.send(b"x")
            assert (await link.receive()).data == b"x"
