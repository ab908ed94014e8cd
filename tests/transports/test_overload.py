# SPDX-License-Identifier: MIT
# ruff: noqa: ASYNC110, PT012
"""More than anybody can take.

Whoever the overload comes from: the memory of this process stays bounded, the other links and
tasks have their turns, errors say what happened and what to do, and the loop lives. A full
/dev/shm is in test_rendezvous.py, where what a link needs is short.
"""

import asyncio
import errno
import itertools
import os
import time
from contextlib import asynccontextmanager, closing, suppress

import pytest
import structlog

import kucomms
from kucomms import Endpoint, NotReadyError, ProtocolError, QueueFull, TransportError
from tests.transports import raw_peer
from tests.transports.peer_programs import number
from tests.transports.processes import PATIENCE, Process, descriptors
from tests.transports.raw_peer import connect_by_hand
from tests.transports.test_rendezvous import descriptors_left

pytestmark = pytest.mark.asyncio

MIB = 1 << 20
RING = 1 << 16
BATCH = 128  # of an endpoint, unless it is told otherwise
FLOOD = 64 * MIB
"""Bytes that a peer tries to make us take."""
BOUND = 8 * MIB
"""Bytes by which this process may grow meanwhile."""

_numbers = itertools.count()


@pytest.fixture
def url():
    return f"shm://overload_{os.getpid()}_{next(_numbers)}"


def resident():
    """Bytes of memory that this process occupies."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")


@asynccontextmanager
async def bounded():
    """This process does not grow; and a task that wants every turn of the loop gets many.

    Yields a function that says how many turns it had.
    """
    turns = 0

    async def take_turns():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(take_turns())
    before = resident()
    try:
        async with asyncio.timeout(6 * PATIENCE):
            yield lambda: turns
        grown = resident() - before
        assert grown < BOUND, f"grown by {grown / MIB:.1f} MiB"
    finally:
        task.cancel()


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0)


async def ask(link):
    """A reply comes."""
    asked = os.urandom(8)
    assert (await link.request(asked, type=1)).data == asked


# ---- a peer that never reads ----------------------------------------------------


class InThisLoop:
    """The peer of an inproc:// link."""

    def __init__(self, link):
        self._link = link

    async def read(self, count):
        for value in range(count):
            assert (await self._link.receive()).data[:8] == number(value)


class Elsewhere:
    """The same in another process."""

    def __init__(self, process):
        self._process = process

    async def read(self, count):
        self._process.tell(str(count))
        await self._process.says(f"received {count}")


@asynccontextmanager
async def peer_that_never_reads(url):
    if url.startswith("inproc"):
        async with kucomms.connect(url) as link:
            yield InThisLoop(link)
    else:
        with Process("reads_nothing", url, 0) as process:
            await process.says("linked")
            yield Elsewhere(process)


@pytest.mark.parametrize("scheme", ["inproc", "shm"])
async def test_a_peer_that_never_reads(scheme):
    url = f"{scheme}://overload_{os.getpid()}_{next(_numbers)}"
    filler = bytes(1000)
    sent = refused = 0
    async with Endpoint("sends") as endpoint, bounded() as turns:
        endpoint.on_message(lambda message, link: link.reply(message, message.data))
        await endpoint.listen(url, ring_size=RING)
        async with peer_that_never_reads(url) as peer, kucomms.connect(url) as good:
            await until(lambda: len(endpoint.links) == 2)
            stuck = endpoint.links[0]
            for attempt in range(FLOOD // 1000):
                try:
                    stuck.send_nowait(number(sent) + filler)
                    sent += 1
                except QueueFull:
                    refused += 1
                if attempt % 1000 == 0:
                    await ask(good)
            assert sent <= RING // 1000
            with pytest.raises(QueueFull, match=rf"{url}: .*'await link\.send\(\.\.\.\)' waits"):
                stuck.send_nowait(filler)
            with pytest.raises(QueueFull, match=f"{url}: .*the peer does not read fast enough"):
                await asyncio.to_thread(stuck.send_threadsafe, filler, timeout=0.01)

            # Those who wait do not hold up the others, and who gives up has sent nothing.
            waiting = [asyncio.create_task(stuck.send(number(sent + n))) for n in range(10)]
            before = turns()
            for _ in range(10):
                await ask(good)
            assert turns() > before + 10
            assert not any(task.done() for task in waiting)
            for task in waiting[5:]:
                task.cancel()
            await peer.read(sent + 5)
            await asyncio.wait(waiting)
            assert [task.cancelled() for task in waiting] == [False] * 5 + [True] * 5


# ---- a peer that floods ---------------------------------------------------------


async def test_a_flood_that_is_handled(url):
    """As much as is taken comes in; what is not taken yet waits at who sends it."""
    flooded = 0
    between = []  # messages of the flood, between two of the other link

    async with Endpoint("flooded") as endpoint, bounded() as turns:

        @endpoint.on_message
        async def handle(message, link):
            nonlocal flooded
            if message.type:
                between.append(flooded)
                await link.reply(message, message.data)
            else:
                flooded += 1

        await endpoint.listen(url, ring_size=RING)
        with Process("floods", url, 4000) as flooder:
            before = turns()
            await flooder.says("floods")
            async with kucomms.connect(url) as link:
                while flooded < FLOOD // 4000 or len(between) < 100:
                    await ask(link)
                assert turns() > before + flooded // (10 * BATCH)
                most = max(b - a for a, b in itertools.pairwise(between))
                assert most < 50 * BATCH, f"{most} messages of the flood before one of another"


async def test_a_flood_that_nobody_receives(url):
    """Not taken out of the ring, so the ring bounds it; other links are received from."""
    async with Endpoint("flooded") as endpoint, bounded():
        await endpoint.listen(url, ring_size=RING)
        with Process("floods", url, 1000) as flooder:
            await flooder.says("floods")
            await until(lambda: endpoint.links)
            (flooding,) = endpoint.links
            await until(lambda: flooding.rx_free < 2000)
            async with kucomms.connect(url) as link:
                await until(lambda: len(endpoint.links) == 2)
                for value in range(1000):
                    await link.send(number(value))
                    assert (await endpoint.links[1].receive()).data == number(value)
            assert flooding.rx_avail <= RING
            for value in range(3000):  # the rest of it, when somebody does
                assert (await flooding.receive()).data[:8] == number(value % 1000)


async def test_a_flood_while_the_handler_waits(url):
    """The backlog bounds what is taken out of the ring; nothing is lost, and others go on."""
    backlog = 1 << 17
    go_on = asyncio.Event()
    values = []

    async with (
        Endpoint("flooded", backlog=backlog) as endpoint,
        Endpoint("other") as other,
        bounded() as turns,
    ):

        @endpoint.on_message
        async def handle(message, link):
            values.append(message.data[:8])
            await go_on.wait()

        other.on_message(lambda message, link: link.reply(message, message.data))
        await endpoint.listen(url, ring_size=RING)
        await other.listen(f"{url}_other")
        with Process("floods", url, 500) as flooder:
            await flooder.says("floods")
            await until(lambda: endpoint.links and endpoint.links[0].rx_avail > backlog)
            (flooding,) = endpoint.links
            await until(lambda: flooding.rx_free < 1000)
            before = turns()
            async with kucomms.connect(f"{url}_other") as link:
                for _ in range(1000):
                    await ask(link)
            assert turns() > before + 1000
            assert len(values) == 1
            assert flooding.rx_avail <= RING + backlog
            assert flooding.statistics().backlog_high_water <= backlog
            go_on.set()
            await until(lambda: len(values) > 20_000)
        assert values == [number(index % 1000) for index in range(len(values))]


async def test_a_flood_of_replies(url):
    """That nobody has asked for: each is dropped and counted, and requests are answered."""
    async with Endpoint("flooded") as endpoint, bounded() as turns:
        endpoint.on_message(lambda message, link: link.reply(message, message.data))
        await endpoint.listen(url, ring_size=RING)
        with Process("floods_with_replies", url) as flooder:
            before = turns()
            await flooder.says("floods")
            await until(lambda: endpoint.links)
            (flooding,) = endpoint.links
            async with kucomms.connect(url) as link:
                while flooding.statistics().late_replies < FLOOD // 1000 // 4:
                    await ask(link)
                assert turns() > before + 100


@pytest.mark.parametrize("taken_by", ["handler", "borrower", "receive", "borrow", "request"])
async def test_a_flood_of_what_has_to_be_skipped(url, taken_by):
    """Half a million frames that are no messages, again and again by one store each time."""
    ring = 1 << 24
    most = 0  # bytes of them between two turns of the loop
    received = []
    waiting = None
    async with Endpoint("flooded") as endpoint:
        if taken_by in ("handler", "borrower"):

            @endpoint.on_message(borrow=taken_by == "borrower")
            async def handle(message, link):
                if message.type:
                    await link.reply(message, bytes(message.data))
                else:
                    received.append(bytes(message.data))

        async def receive(link):
            if taken_by == "borrow":
                async with link.borrow() as message:
                    received.append(bytes(message.data))
            else:
                received.append((await link.receive()).data)

        await endpoint.listen(url, ring_size=RING)
        with Process("discards", url, ring) as discarder:
            await discarder.says("discards")
            await until(lambda: endpoint.links)
            (flooding,) = endpoint.links

            def skipped():
                return flooding._channel.rx_position

            async def take_turns():
                nonlocal most
                before = skipped()
                while True:
                    await asyncio.sleep(0)
                    most = max(most, skipped() - before)
                    before = skipped()

            turns = asyncio.create_task(take_turns())
            if taken_by == "request":
                waiting = asyncio.create_task(flooding.request(b""))
            elif taken_by in ("receive", "borrow"):
                waiting = asyncio.create_task(receive(flooding))
            async with kucomms.connect(url) as link:
                await until(lambda: len(endpoint.links) == 2)
                while skipped() < 4 * ring:
                    if taken_by in ("handler", "borrower"):
                        await ask(link)
                    else:
                        await link.send(b"served")
                        assert (await endpoint.links[1].receive()).data == b"served"
            assert most < ring // 4
            # Behind all of it there is a message, and nobody sleeps before it came.
            discarder.tell()
            if taken_by == "request":
                waiting.cancel()
                await receive(flooding)
            await until(lambda: received == [b"in the end"])
            turns.cancel()


# ---- peers that ask for much memory ---------------------------------------------


def memory_of_links():
    """Bytes that the shared memory occupies which this process holds open."""
    held = {}
    for fd, what in descriptors().items():
        if what.startswith("/dev/shm/kucomms-"):
            with suppress(OSError):  # another thread has closed it meanwhile
                about = os.fstat(fd)
                held[about.st_ino] = about.st_blocks * 512
    return sum(held.values())


@pytest.mark.parametrize("gone", ["at_once", "halfway", "at_the_end"])
async def test_peers_that_ask_for_much_memory_and_hang_up(url, gone):
    """It is taken bit by bit, given back, and nobody waits for it; who is gone gets nothing."""
    name = url.removeprefix("shm://")
    ring, count = 16 * MIB, 8
    most = held = peak = 0

    async def watch():
        nonlocal most, held, peak
        while True:
            before, held = held, memory_of_links()
            most, peak = max(most, held - before), max(peak, held)
            await asyncio.sleep(0)

    def knock():
        """Greet, and say no more."""
        sock = raw_peer.connect(name)
        raw_peer.send(sock, raw_peer.record(raw_peer.HELLO, ring_size=ring))
        return sock

    async with Endpoint("asked") as endpoint, bounded() as turns:
        endpoint.on_message(lambda message, link: link.reply(message, message.data))
        await endpoint.listen(url)
        async with kucomms.connect(url) as good:
            await until(lambda: endpoint.links)
            await asyncio.to_thread(lambda: None)
            before = descriptors()
            watching = asyncio.create_task(watch())
            for _ in range(2):
                knocking = [knock() for _ in range(count)]
                began = turns()
                if gone == "halfway":
                    await until(lambda: held > count * ring // 4)
                elif gone == "at_the_end":
                    for sock in knocking:
                        setup, fds = await asyncio.to_thread(raw_peer.receive, sock)
                        os.close(*fds)
                        assert setup.ring_size == ring
                        await ask(good)
                    assert turns() > began + count * 2 * ring // (5 * MIB)
                for sock in knocking:
                    sock.close()
                await until(lambda: descriptors() == before)
                await ask(good)
            watching.cancel()
        assert most <= 6 * MIB, f"{most / MIB:.1f} MiB between two turns of the loop"
        assert (peak < MIB) == (gone == "at_once")
        assert len(endpoint.links) <= 1


# ---- many links, and a bad one --------------------------------------------------


async def test_a_thousand_links_and_a_bad_one(url):
    """One that floods, one that breaks the rules, one that never reads: 999 do not notice."""
    count = 999
    flooded = 0
    closed = []
    async with Endpoint("serves") as endpoint:

        @endpoint.on_message
        async def handle(message, link):
            nonlocal flooded
            if message.type:
                await link.reply(message, message.data)
            else:
                flooded += 1

        endpoint.on_link_close(lambda link, error: closed.append(error))
        await endpoint.listen(url, ring_size=4096)
        with Process("many_links", url, count) as good:
            for linked in range(111, count + 1, 111):
                await good.says(f"linked {linked}")

            async def all_are_served():
                good.tell("again")
                await good.says("all replied")

            for _ in range(3):  # the rings' pages are there then
                await all_are_served()
            async with bounded():
                with Process("floods", url) as flooder:
                    await flooder.says("floods")
                    await until(lambda: flooded)
                    before, most = flooded, 0
                    for _ in range(3):
                        at = flooded
                        await all_are_served()
                        most = max(most, flooded - at)
                    assert flooded > before
                    # as many as of all others together, if it is let: a batch for each message
                    assert most < 50 * BATCH * count
                await until(lambda: len(closed) == 1)

                bad = await asyncio.to_thread(
                    connect_by_hand, url.removeprefix("shm://")
                )
                with closing(bad):
                    await until(lambda: len(endpoint.links) == count + 1)
                    bad.frame(b"", kind=1)
                    bad.publish()
                    # Who is awake has seen it before the bell, and hung up.
                    with suppress(BrokenPipeError):
                        await asyncio.to_thread(bad.ring)
                    await until(lambda: len(closed) == 2)
                    assert type(closed[1]) is ProtocolError
                await all_are_served()

                with Process("reads_nothing", url, 0) as stuck:
                    await stuck.says("linked")
                    await until(lambda: len(endpoint.links) == count + 1)
                    link = endpoint.links[-1]
                    with pytest.raises(QueueFull):
                        while True:
                            link.send_nowait(bytes(100))
                    waiting = asyncio.create_task(link.send(bytes(100)))
                    await all_are_served()
                    assert endpoint.broadcast(bytes(8), type=2) == count
                    assert not waiting.done()
                    waiting.cancel()
                await until(lambda: len(closed) == 3)
                await all_are_served()
            assert len(endpoint.links) == count


# ---- handlers -------------------------------------------------------------------


async def test_a_handler_that_blocks_the_loop(url):
    """Its peers wait, and nothing else: everything comes, the ticks that it held up do not."""
    blocked = False
    values, ticks_between = [], []

    async with Endpoint("blocks") as endpoint, bounded():

        @endpoint.on_message
        def handle(message, link):
            nonlocal blocked
            if message.type:
                return link.reply(message, message.data)
            values.append(message.data[:8])
            if not blocked:
                blocked = True
                end = time.monotonic() + 0.3  # 30 ticks; time is what is tested
                while link.rx_free > 2000 or time.monotonic() < end:
                    time.sleep(0.01)
            return None

        endpoint.on_work(lambda: ticks_between.append(len(values)))
        await endpoint.listen(url, ring_size=RING)
        with Process("floods", url, 1000) as flooder:
            await flooder.says("floods")
            await until(lambda: blocked)
            async with kucomms.connect(url, timeout=PATIENCE) as link:
                await ask(link)
            await until(lambda: len(values) > 5000)
            assert len(endpoint.links) >= 1
        assert values == [number(index % 1000) for index in range(len(values))]
        assert endpoint.statistics().work_missed >= 25
        assert ticks_between.count(1) <= 2, "ticks that were missed came in a burst"


@pytest.mark.parametrize("borrow", [False, True])
async def test_a_handler_that_raises(url, borrow):
    """For each message of a flood: reported one by one, and nothing of it is kept."""
    raised = reported = 0

    async with Endpoint("raises") as endpoint, bounded() as turns:

        @endpoint.on_message(borrow=borrow)
        async def handle(message, link):
            nonlocal raised
            if message.type:
                return await link.reply(message, bytes(message.data))
            raised += 1
            view = memoryview(message.data)[10:]
            raise RuntimeError(f"no use for {len(view)} bytes")

        @endpoint.on_error
        def failed(error, name):
            nonlocal reported
            reported += 1
            assert (type(error), name) == (RuntimeError, "on_message")

        await endpoint.listen(url, ring_size=RING)
        with Process("floods", url, 1000) as flooder:
            before = turns()
            await flooder.says("floods")
            async with kucomms.connect(url) as link:
                while raised < 20_000:
                    await ask(link)
                assert turns() > before + raised // (10 * BATCH)
        assert reported == raised == endpoint.statistics().handler_errors


@pytest.mark.parametrize("report", [None, "raises"])
async def test_a_handler_that_raises_is_logged(url, report):
    """Each error, but with few tracebacks: printing one can take a tenth of a second."""
    raised = 0

    with structlog.testing.capture_logs() as logs:
        async with Endpoint("raises") as endpoint:

            @endpoint.on_message
            def handle(message, link):
                nonlocal raised
                if message.type:
                    return link.reply(message, message.data)
                raised += 1
                raise RuntimeError(f"number {raised}")

            if report:

                @endpoint.on_error
                def failed(error, name):
                    raise ValueError("reported in vain")

            begin = time.monotonic()
            await endpoint.listen(url, ring_size=RING)
            with Process("floods", url) as flooder:
                await flooder.says("floods")
                async with kucomms.connect(url) as link:
                    while raised < 3000:
                        await ask(link)
        assert endpoint.statistics().handler_errors == raised
    seconds = time.monotonic() - begin
    of_message = [entry for entry in logs if entry.get("handler") == "on_message"]
    assert len(of_message) == raised
    assert isinstance(of_message[0]["exc_info"], RuntimeError)
    assert of_message[1]["error"] == "RuntimeError('number 2')"
    assert 1 <= sum("exc_info" in entry for entry in of_message) <= 1 + seconds
    if report:
        of_error = [entry for entry in logs if entry.get("handler") == "on_error"]
        assert len(of_error) == raised
        assert 1 <= sum("exc_info" in entry for entry in of_error) <= 1 + seconds


# ---- limits of the process ------------------------------------------------------


async def test_too_few_descriptors_for_all_links(url):
    """Some get in and are served; the others wait until somebody goes, or give up."""
    with Process("echo_in_want", url, prefix=("prlimit", "--nofile=64:64")) as process:
        await process.says("ready")
        async with Endpoint("users") as endpoint:
            links = []
            while True:
                waiting = asyncio.create_task(endpoint.connect(url, timeout=PATIENCE))
                if await process.line() == "out of descriptors":
                    break
                links.append(await waiting)  # that line was "open ..."
            assert 5 < len(links) < 64
            with pytest.raises(NotReadyError, match=f"{url}: "):
                await endpoint.connect(url, timeout=0.1)
            for link in links:
                await link.send(b"served")
                assert (await link.receive()).data == b"served"
            assert not waiting.done()
            await links.pop().aclose()
            links.append(await waiting)
            await links[-1].send(b"served")
            assert (await links[-1].receive()).data == b"served"


@pytest.mark.parametrize("scheme", ["inproc", "shm"])
async def test_errors_for_want_of_descriptors_say_what_to_do(scheme):
    """To who connects, to who listens, and in the log of who cannot accept."""
    url = f"{scheme}://overload_{os.getpid()}_{next(_numbers)}"
    async with Endpoint("poor") as endpoint:
        await endpoint.listen(url)
        with descriptors_left(0):
            with pytest.raises(TransportError, match=f"{url}: .*ulimit -n") as caught:
                await endpoint.connect(url, timeout=0)
            assert caught.value.errno == errno.EMFILE
            if scheme == "shm":
                with pytest.raises(TransportError, match=rf"{url}_2: .*ulimit -n"):
                    await endpoint.listen(f"{url}_2")
        link = await endpoint.connect(url, timeout=0)
        await link.aclose()


async def test_listener_without_descriptors_says_so_once(url):
    with structlog.testing.capture_logs() as logs:
        async with Endpoint("poor") as endpoint:
            await endpoint.listen(url)
            for _ in range(2):
                with Process("connects", url):
                    with descriptors_left(0):
                        await until(lambda: len(logs) % 2)
                        await asyncio.wait([asyncio.create_task(asyncio.sleep(0.5))])  # retries
                    await until(lambda: endpoint.links)
                    logs.append("accepted")
                    await endpoint.links[0].aclose()
    assert [entry["event"] for entry in logs[::2]] == ["cannot_accept"] * 2
    assert url in logs[0]["error"]
    assert "ulimit -n" in logs[0]["error"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_no_memory_may_be_locked(url):
    """None is. (A user who is not root, whom RLIMIT_MEMLOCK does not bind.)"""
    environment = {"XDG_RUNTIME_DIR": ""}
    prefix = ("prlimit", "--memlock=0:0")
    with Process(
        "echo_as_another", url, '{"allow": [0]}', prefix=prefix, env=environment
    ) as process:
        await process.says("ready")
        with Process("connects_as_another", url, prefix=prefix, env=environment) as user:
            await process.says("open 65534")
            await user.says("echoed 65534 ")
        async with kucomms.connect(url, owner=65534, timeout=PATIENCE) as link:
            await link.send(bytes(100_000))
            assert len(await link.receive()) == 100_000


@pytest.mark.parametrize("limit", ["as", "fsize"])
async def test_no_address_space_or_file_size_for_the_rings(url, limit):
    """A ring that is too large for a limit is an error of this link only, for both."""
    # more than the interpreter needs, less than the large ring
    prefix = ("prlimit", f"--{limit}={512 * MIB if limit == 'as' else 16 * MIB}")
    with Process("echo", url, '{"max_ring_size": 4294967296}', prefix=prefix) as process:
        await process.says("ready")
        async with Endpoint("user") as endpoint:
            for _ in range(3):
                with pytest.raises(TransportError, match=f"{url}: .*smaller ring_size"):
                    await endpoint.connect(url, ring_size=1 << 28, timeout=PATIENCE)
            link = await endpoint.connect(url, timeout=PATIENCE)
            await link.send(b"goes on")
            assert (await link.receive()).data == b"goes on"
