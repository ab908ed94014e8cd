# SPDX-License-Identifier: MIT
# ruff: noqa: ASYNC110
"""Numbered channels: who gets which, who waits for whom, and what is played over them.

``module/kucomms_kup.c`` is the other half, and ``kucomms_kup_other`` the same once more.
"""

import asyncio
import errno
import itertools
import os
import random
import select
import struct
import subprocess
import threading
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from enum import IntEnum, auto
from pathlib import Path

import pytest

import kucomms
from kucomms import (
    BusyError,
    ChannelTakenError,
    NoSuchChannelError,
    NotReadyError,
    PeerClosedError,
    QueueEmpty,
    QueueFull,
    ShutdownError,
    TransportError,
)
from kucomms.testing import numbered, verify
from kucomms.transports import kernel
from tests.conftest import SHORT
from tests.kernel.lifecycle import Child
from tests.kernel.lifecycle import channels as attached
from tests.kernel.raw_device import (
    DATA,
    NUMBER,
    PAGE,
    PATIENCE,
    RawDevice,
    alive,
    counters,
    open_device,
    set_up,
)

pytestmark = pytest.mark.asyncio

SYSFS = Path("/sys/devices/virtual/kucomms/kucomms")
MODULES = ("kup", "kup_other")
PRI = select.POLLPRI
ROUNDS = 20
NUMBERED, IN_PLACE, THREADS = 4, 2, 1
"""Flags of an endpoint's options."""
KEPT = 64
"""Messages that can be held at once."""
HEADER = 32


class Do(IntEnum):
    """The types of messages that the module knows."""

    ECHO = 0
    NONCE = auto()
    COUNT = auto()
    STATUS = auto()
    HOLD = auto()
    LET_GO = auto()
    END_WITH = auto()
    GREETING = auto()
    DONE = auto()


WAIT, NONCES, COUNTS = range(3)
CALLBACK, HARD, PROCESS = range(3)


# ---- the module ---------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_is_left(main_module):
    before = alive()
    yield
    asyncio.run(until(lambda: alive() == before))


@contextmanager
def device(name="kup"):
    (SYSFS / "create_device").write_text(f"kucomms_{name}")
    yield
    (SYSFS / "remove_device").write_text(f"kucomms_{name}")


class Module:
    """``kucomms_NAME``, loaded and unloaded when it is told, and unloaded in the end."""

    def __init__(self, load, unload, name="kup"):
        self._load = load
        self._unload = unload
        self.name = f"kucomms_{name}"
        self.loaded = False

    def load(self, **parameters):
        self._load(self.name, *(f"{name}={value}" for name, value in parameters.items()))
        self.loaded = True

    def unload(self):
        self._unload(self.name)
        self.loaded = False

    def set(self, parameter, value):
        Path(f"/sys/module/{self.name}/parameters/{parameter}").write_text(str(value))

    def counts(self):
        """How many channels it has seen opened, and closed."""
        text = Path(f"/sys/module/{self.name}/parameters/counts").read_text()
        return tuple(map(int, text.split()))


@contextmanager
def made(load, unload, *names):
    """Modules, not loaded yet, and their devices."""
    with ExitStack() as stack:
        modules = []
        for name in names or ("kup",):
            stack.enter_context(device(name))
            module = Module(load, unload, name)
            stack.callback(lambda module=module: module.unload() if module.loaded else None)
            modules.append(module)
        yield modules


@pytest.fixture
def module(load, unload, nothing_is_left):
    """The module with its device, not loaded yet."""
    with made(load, unload) as modules:
        yield modules[0]


def connect(channel=None, name="kup", timeout=PATIENCE, **options):
    url = f"kernel://{name}" if channel is None else f"kernel://{name}/{channel}"
    return kucomms.connect(url, timeout=timeout, **options)


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0)


def numbers(*values):
    return struct.pack(f"<{len(values)}Q", *values)


async def ask(link, what, *arguments):
    """The numbers that the module answers."""
    reply = await link.request(numbers(*arguments), type=what, timeout=PATIENCE)
    return struct.unpack(f"<{len(reply) // 8}q", reply.data)


class Status:
    """What the module says of a channel."""

    def __init__(self, number, right, wrong, rx_avail, rx_free):
        self.number = number
        self.right = right
        self.wrong = wrong
        self.rx_avail = rx_avail
        self.rx_free = rx_free

    @classmethod
    async def of(cls, link):
        return cls(*await ask(link, Do.STATUS))


# ---- what is played ------------------------------------------------------------------


async def awaiting(link):
    async with asyncio.timeout(PATIENCE):
        return await link.receive()


async def looking(link):
    """Without waiting, over and over."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                return link.receive_nowait()
            except QueueEmpty:
                await asyncio.sleep(0)


async def blocking(link):
    """In a thread that waits."""
    return await asyncio.to_thread(link.receive_threadsafe, PATIENCE)


async def our_nonces(link, receive, hops):
    """Random numbers that the kernel echoes, as often as there are hops."""
    for turn in range(ROUNDS):
        nonce = os.urandom(8)
        for _ in range(hops):
            await link.send(nonce, type=Do.ECHO, id=turn)
            message = await receive(link)
            assert (message.type, message.id) == (Do.ECHO, turn)
            assert message.data == nonce
            nonce = message.data


async def their_nonces(link, receive, hops):
    """Random numbers of the kernel, which it wants back."""
    for _ in range(ROUNDS):
        seen = set()
        for hop in range(hops):
            message = await receive(link)
            assert (message.type, message.id) == (Do.NONCE, hop)
            seen.add(message.data)
            await link.send(message)
        assert len(seen) == 1
    message = await receive(link)
    assert message.type == Do.DONE
    assert struct.unpack("<Q", message.data) == (ROUNDS * hops,)


async def counting(link, receive, first):
    """Numbers in turn, 20 of each side."""
    if not first:
        number = struct.unpack("<Q", (await receive(link)).data)[0]
        assert number == 0
    for number in range(0 if first else 1, 2 * ROUNDS, 2):
        await link.send(numbers(number), type=Do.COUNT)
        if number + 1 < 2 * ROUNDS:
            message = await receive(link)
            assert message.type == Do.COUNT
            assert struct.unpack("<Q", message.data) == (number + 1,)


GAMES = {
    "user_echoed_once": (WAIT, 1, lambda link, receive: our_nonces(link, receive, 1)),
    "user_echoed_twice": (WAIT, 1, lambda link, receive: our_nonces(link, receive, 2)),
    "user_counts": (WAIT, 1, lambda link, receive: counting(link, receive, True)),
    "kernel_echoed_once": (NONCES, 1, lambda link, receive: their_nonces(link, receive, 1)),
    "kernel_echoed_twice": (NONCES, 2, lambda link, receive: their_nonces(link, receive, 2)),
    "kernel_counts": (COUNTS, 1, lambda link, receive: counting(link, receive, False)),
}


async def play(game, receive, links):
    """The same on all links at once; then the kernel has counted nothing that was wrong."""
    await asyncio.gather(*(game(link, receive) for link in links))
    for link in links:
        status = await Status.of(link)
        assert status.wrong == 0
        assert status.number == link.channel_number == link.peer.channel


@pytest.mark.parametrize("modules", [1, 2], ids=["one_module", "two_modules"])
@pytest.mark.parametrize("user_first", [False, True], ids=["kernel_first", "user_first"])
@pytest.mark.parametrize("game", GAMES)
async def test_games(load, unload, monkeypatch, game, user_first, modules):
    """Over one channel and two at once, of one module or two, received in three ways.

    Whoever is there first; the user takes each channel by its number. Where the user is
    first, modules are loaded for each time: for want of time that is one of the three ways for
    each number of channels, another one in each game.
    """
    begin, hops, function = GAMES[game]
    names = MODULES[:modules]
    tried = set()
    once = kernel._try_set_up

    async def noted(address, *arguments):
        try:
            return await once(address, *arguments)
        finally:
            tried.add(address.url)

    monkeypatch.setattr(kernel, "_try_set_up", noted)
    with made(load, unload, *names) as those:

        def load_all():
            for module in those:
                module.load(channels=2, begin=begin, hops=hops)

        def unload_all():
            for module in those:
                module.unload()

        if not user_first:
            load_all()
        ways = [awaiting, looking, blocking]
        rounds = list(itertools.product([1, 2], ways))
        if user_first and SHORT:
            first = list(GAMES).index(game)
            rounds = [(1, ways[first % 3]), (2, ways[(first + 1 + first // 3) % 3])]
        for channels, receive in rounds:
            tried.clear()
            connecting = [
                asyncio.ensure_future(connect(number, name)._open())
                for name, number in itertools.product(names, range(channels))
            ]
            if user_first:
                await until(lambda: len(tried) == len(connecting))  # noqa: B023
                assert not any(task.done() for task in connecting)
                await asyncio.to_thread(load_all)
            links = await asyncio.gather(*connecting)
            try:
                await play(function, receive, links)
            finally:
                for link in links:
                    await link.aclose()
            if user_first:
                await asyncio.to_thread(unload_all)


@pytest.mark.parametrize("flags", [0, THREADS, IN_PLACE], ids=["shared", "threads", "in_place"])
async def test_128_channels(module, flags):
    """All at once, each with its number; one more is refused; numbers are given again."""
    module.load(channels=128, flags=flags)
    async with kucomms.Endpoint("user") as endpoint:
        options = {"timeout": PATIENCE, "ring_size": PAGE}
        chosen = random.Random(1).sample(range(128), 64)
        links = {n: await endpoint.connect(f"kernel://kup/{n}", **options) for n in chosen}
        free = [number for number in range(128) if number not in links]
        for number in free:
            link = await endpoint.connect("kernel://kup", **options)
            assert link.channel_number == number  # the lowest
            links[number] = link
        with pytest.raises(BusyError, match=r"kernel://kup: .*all the links that") as busy:
            await endpoint.connect("kernel://kup", **options)
        assert not isinstance(busy.value, ChannelTakenError)
        assert {number: link.channel_number for number, link in links.items()} == {
            number: number for number in range(128)
        }
        await play(lambda link, receive: our_nonces(link, receive, 2), awaiting, links.values())
        for number in (77, 5, 100):
            await links[number].aclose()
        await until(lambda: module.counts() == (128, 3))
        for number in (5, 77, 100):
            again = await endpoint.connect("kernel://kup", **options)
            assert again.channel_number == number
            await our_nonces(again, awaiting, 1)


async def test_messages_of_many_pages(module):
    """Up to what the ring takes, over two channels at once."""
    module.load(channels=2)
    sizes = [0, 1, PAGE - HEADER, PAGE, PAGE + 1, 10 * PAGE, 100 * PAGE, (1 << 20) - HEADER]

    async def echo(link):
        assert link.max_message_size == sizes[-1]
        for number, size in enumerate(sizes * 2):
            await link.send(numbered(number, size))
            message = await awaiting(link)
            verify(message, number)
            assert len(message) == size

    async with connect(0) as first, connect(1) as second:
        await asyncio.gather(echo(first), echo(second))


async def test_channels_in_threads(module):
    """Each thread has a loop and a channel of its own; nothing is shared on the way."""
    module.load(channels=4, flags=THREADS)
    failures = []
    meet = threading.Barrier(4)

    async def talk(number):
        async with connect(number) as link:
            meet.wait(PATIENCE)
            for count in range(300):
                await link.send(numbered(count, count % 100, Do.ECHO))
                verify(await awaiting(link), count)
            meet.wait(PATIENCE)
            assert (await Status.of(link)).number == number

    def run(number):
        try:
            asyncio.run(talk(number))
        except BaseException as failure:
            failures.append(failure)
            meet.abort()
            raise

    threads = [asyncio.to_thread(run, number) for number in range(4)]
    await asyncio.gather(*threads, return_exceptions=True)
    assert failures == []


# ---- errors ----------------------------------------------------------------------------


async def test_each_has_an_error_of_its_own(module):
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(NotReadyError, match="kernel://nobody/0: there is no device"):
            await connect(0, "nobody", timeout=0)
        with pytest.raises(NotReadyError, match="no kernel module has registered") as not_ready:
            await connect(0, timeout=0)
        assert not isinstance(not_ready.value, NoSuchChannelError)
        module.load(channels=2)
        for timeout in (0, 0.05):
            with pytest.raises(NoSuchChannelError, match=r"kernel://kup/2: .*no channel 2"):
                await connect(2, timeout=timeout)
        with pytest.raises(NoSuchChannelError):
            await connect(2**32 - 1, timeout=0)
        async with connect(1), connect():
            for timeout in (0, PATIENCE):
                with pytest.raises(ChannelTakenError, match="kernel://kup/1: somebody else has"):
                    await connect(1, timeout=timeout)
            with pytest.raises(BusyError, match=r"kernel://kup: .*all the links"):
                await connect(timeout=0)


async def test_shutting_down(module):
    """Who waits for the open callback while the module goes."""
    module.load(channels=2)
    sleeper = asyncio.ensure_future(connect(0, hello=b"sleep")._open())
    await until(lambda: attached("kup") == 1)
    refused = asyncio.ensure_future(connect(1, timeout=0)._open())
    await until(lambda: attached("kup") == 2)
    await asyncio.to_thread(module.unload)
    with pytest.raises(ShutdownError, match="kernel://kup/1: the kernel module went away"):
        await refused
    with pytest.raises(ShutdownError):
        await (await sleeper).receive()


async def test_who_has_time_waits_for_the_module_to_come_back(module):
    module.load(channels=2)
    sleeper = asyncio.ensure_future(connect(0, hello=b"sleep")._open())
    await until(lambda: attached("kup") == 1)
    patient = asyncio.ensure_future(connect(1)._open())
    await until(lambda: attached("kup") == 2)
    await asyncio.to_thread(module.unload)
    await (await sleeper).aclose()
    assert not patient.done()
    module.load(channels=2)
    link = await patient
    await our_nonces(link, awaiting, 1)
    await link.aclose()


async def test_refused_by_the_module(module):
    """Its number is free at once."""
    module.load(channels=1)
    for _ in range(20):
        with pytest.raises(TransportError, match="kernel://kup/0: the kernel endpoint refused"):
            await connect(0, hello=b"refuse", timeout=0)
        async with connect(0, timeout=0) as link:
            assert link.channel_number == 0


@pytest.mark.parametrize("flags", [0, NUMBERED], ids=["nameless", "none_yet"])
async def test_no_channel_has_a_number(module, flags):
    module.load(channels=0, flags=flags)
    with pytest.raises(NoSuchChannelError):
        await connect(0, timeout=0)
    if flags:
        with pytest.raises(BusyError):
            await connect(timeout=0)
        module.set("announce", 1)
        async with connect() as link:
            assert link.channel_number == 0
        return
    async with connect() as link, connect() as other:
        assert link.channel_number is other.channel_number is None
        assert (await Status.of(link)).number == -errno.ENOENT
    with pytest.raises(OSError, match="Invalid argument"):
        module.set("announce", 1)


# ---- channels that are announced later -----------------------------------------------


async def test_waiting_for_a_channel(module, monkeypatch):
    """Who waits is woken, and does not look every few milliseconds."""
    tries = 0
    once = kernel._try_set_up

    async def noted(*arguments):
        nonlocal tries
        tries += 1
        return await once(*arguments)

    monkeypatch.setattr(kernel, "_try_set_up", noted)
    module.load(channels=1)
    waiting = {number: asyncio.ensure_future(connect(number)._open()) for number in (1, 2, 5)}
    await until(lambda: tries == 3)
    await asyncio.sleep(0.3)  # that time passes is the subject
    assert tries == 3
    module.set("announce", 3)
    links = [await waiting[1], await waiting[2]]
    assert [link.channel_number for link in links] == [1, 2]
    assert not waiting[5].done()
    module.set("announce", 10)
    links.append(await waiting[5])
    assert tries == 3 + 3 + 1
    for link in links:
        await our_nonces(link, awaiting, 1)
        await link.aclose()
    for bad, why in ((9, "Invalid argument"), (2**20 + 1, "list too long")):
        with pytest.raises(OSError, match=why):
            module.set("announce", bad)
    module.set("announce", 10)


async def test_the_module_goes_while_a_channel_is_waited_for(module):
    """The device is not kept open then: it can be removed."""
    module.load(channels=1)
    waiting = asyncio.ensure_future(connect(3)._open())
    await asyncio.sleep(0.05)
    assert not waiting.done()
    module.unload()
    removed = False
    async with asyncio.timeout(PATIENCE):
        while not removed:
            try:
                (SYSFS / "remove_device").write_text("kucomms_kup")
                removed = True
            except OSError:
                await asyncio.sleep(0.001)
    (SYSFS / "create_device").write_text("kucomms_kup")
    module.load(channels=4)
    await (await waiting).aclose()


async def test_cancelled_while_it_waits_for_a_channel(module):
    module.load(channels=1)
    for _ in range(5):
        waiting = asyncio.ensure_future(connect(3)._open())
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    module.unload()
    # nothing has it open, or the end of this test would not be able to remove it


def poll(fd, timeout=0.0):
    """What poll() says of a device before its set-up, of POLLPRI alone."""
    poller = select.poll()
    poller.register(fd, PRI)
    return dict(poller.poll(timeout * 1000)).get(fd, 0)


@contextmanager
def opened():
    fd = open_device("kup")
    try:
        yield fd
    finally:
        os.close(fd)


async def test_what_poll_tells(module):
    """POLLPRI: since a set-up of this file has failed for want of a channel, there is news."""
    with opened() as fd:
        assert set_up(fd)[0] == errno.ENOTCONN
        module.load(channels=1)
        assert poll(fd) == 0
        assert set_up(fd, flags=NUMBER, channel=1)[0] == errno.ECHRNG
        for _ in range(2):
            assert poll(fd) == 0
            module.set("announce", 1)  # as many as before: news all the same
            assert poll(fd) == PRI
            assert set_up(fd, flags=NUMBER, channel=1)[0] == errno.ECHRNG
        poller = threading.Thread(target=lambda: found.append(poll(fd, PATIENCE)))
        found = []
        poller.start()
        module.set("announce", 2)
        poller.join(PATIENCE)
        assert found == [PRI]
        number, told = set_up(fd, flags=NUMBER, channel=1)
        assert (number, told.flags, told.channel, told.reserved) == (0, NUMBER, 1, (0,) * 7)
        with opened() as other:
            assert set_up(other, flags=NUMBER, channel=1)[0] == errno.EADDRINUSE
            with RawDevice("kup") as raw:
                assert (raw.setup.flags, raw.setup.channel) == (NUMBER, 0)
                assert set_up(other)[0] == errno.EBUSY
                assert poll(other) == 0
            assert poll(other, PATIENCE) == PRI
            number, told = set_up(other)
            assert (number, told.flags, told.channel) == (0, NUMBER, 0)
    with opened() as fd:
        await until(lambda: counters()["channels"] == 0)
        assert set_up(fd, flags=NUMBER, channel=7)[0] == errno.ECHRNG
        module.unload()
        assert poll(fd) == PRI
        assert set_up(fd, flags=NUMBER, channel=7)[0] == errno.ENOTCONN


# ---- the kernel waits ------------------------------------------------------------------


async def test_the_kernel_waits_for_a_channel(module):
    module.load(channels=2)

    def greet(number, milliseconds):
        try:
            module.set("greet", f"{number} {milliseconds}")
        except OSError as error:
            return error.errno
        return 0

    for milliseconds in (0, 20):
        assert greet(1, milliseconds) == errno.ETIMEDOUT
    assert greet(2, 0) == errno.ECHRNG
    waiting = asyncio.ensure_future(asyncio.to_thread(greet, 1, 60_000))
    async with connect(0) as other:
        await our_nonces(other, awaiting, 1)  # which is not what it waits for
        assert not waiting.done()
        async with connect(1) as link:
            message = await awaiting(link)
            assert (message.type, message.id) == (Do.GREETING, 1)
            assert await waiting == 0
            assert greet(1, 0) == 0
            assert (await awaiting(link)).type == Do.GREETING
        await until(lambda: module.counts() == (2, 1))
        assert greet(1, 0) == errno.ETIMEDOUT


# ---- one goes, and another comes ---------------------------------------------------------


@pytest.mark.parametrize("flags", [0, THREADS], ids=["shared", "threads"])
async def test_a_number_again_and_again(module, flags):
    """Closed and taken again at once: it is not taken by who is gone."""
    module.load(channels=2, flags=flags)
    for count in range(1, 51):
        async with connect(1, timeout=0) as link:
            await our_nonces(link, awaiting, 1)
        assert module.counts()[0] == count
    await until(lambda: module.counts() == (50, 50))


async def test_the_only_channel_again_and_again(module):
    """The same for any that is free, whichever side has closed it."""
    module.load(channels=1)
    for count in range(1, 51):
        async with connect(0 if count % 3 else None, timeout=0) as link:
            await our_nonces(link, awaiting, 1)
            if count % 3 == 1:
                await link.send(b"", type=Do.END_WITH)
                with pytest.raises(PeerClosedError):
                    await awaiting(link)
                async with connect(0, timeout=0) as again:
                    await our_nonces(again, awaiting, 1)
    await until(lambda: len(set(module.counts())) == 1)


async def test_a_number_of_a_process_that_was_killed(module):
    module.load(channels=1)

    def program(talk):
        with RawDevice("kup", flags=NUMBER, channel=0) as raw:
            raw.send(b"echo", type=Do.ECHO)
            talk.send(b"open")
            talk.recv(9)

    for count in range(1, 11):
        with Child(program) as child:
            child.says("open")
            with pytest.raises(ChannelTakenError):
                await connect(0, timeout=0)
            child.kill()
        async with connect(0, timeout=0) as link:
            assert link.channel_number == 0
        await until(lambda count=count: module.counts() == (2 * count, 2 * count))


# ---- messages that are held -----------------------------------------------------------------


@asynccontextmanager
async def holding(module, flags=IN_PLACE, ring_size=1 << 16):
    module.load(channels=1, flags=flags)
    async with connect(0, ring_size=ring_size) as link:
        yield link


async def hold(link, number, size):
    """Where the module keeps it, or an errno."""
    data = bytes([number % 256]) * size
    reply = await link.request(data, type=Do.HOLD, id=number, timeout=PATIENCE)
    return struct.unpack("<q", reply.data)[0]


async def let_go(link, where, how=CALLBACK):
    """What the module has read there last."""
    reply = await link.request(numbers(where, how), type=Do.LET_GO, timeout=PATIENCE)
    return reply.data


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("flags", [IN_PLACE, IN_PLACE | THREADS], ids=["shared", "threads"])
async def test_held_and_let_go_in_any_order(module, flags, seed):
    """Each is what it was, whatever came after it."""
    chance = random.Random(seed)
    async with holding(module, flags) as link:
        kept = {}
        for number in range(1, 400):
            if kept and (len(kept) == 40 or chance.random() < 0.45):
                where = chance.choice(list(kept))
                assert await let_go(link, where, chance.randrange(3)) == kept.pop(where)
            else:
                size = chance.randrange(1000)
                where = await hold(link, number, size)
                assert where not in kept
                kept[where] = bytes([number % 256]) * size
            while kept and link.tx_free < 8192:  # the oldest is in the way
                where = next(iter(kept))
                assert await let_go(link, where, chance.randrange(3)) == kept.pop(where)
        for where in list(kept):
            assert await let_go(link, where, chance.randrange(3)) == kept.pop(where)
        await until(lambda: link.tx_free == link.ring_size)
        assert (await Status.of(link)).wrong == 0


async def test_so_many_can_be_held(module):
    async with holding(module) as link:
        for number in range(KEPT):
            assert await hold(link, number, 8) == number
        for number in range(3):
            assert await hold(link, number, 8) == -errno.ENOBUFS
        assert await let_go(link, 5) == bytes([5]) * 8
        assert await hold(link, 99, 8) == 5
        assert await hold(link, 100, 8) == -errno.ENOBUFS


async def test_what_is_held_is_no_room(module):
    """Though all that came after it was taken."""
    async with holding(module, ring_size=PAGE) as link:
        assert await hold(link, 1, 1000) == 0
        status = await Status.of(link)
        assert status.rx_free <= PAGE - 1000 - HEADER - status.rx_avail
        with suppress(QueueFull):
            while True:
                link.send_nowait(b"nobody", type=99)
        sender = asyncio.ensure_future(link.send(b"no room"))
        await asyncio.sleep(0.05)  # that nothing happens is the subject
        assert not sender.done()
        sender.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sender


@pytest.mark.parametrize("how", [HARD, PROCESS])
async def test_a_user_that_waits_for_room_is_woken(module, how):
    async with holding(module, ring_size=PAGE) as link:
        assert await hold(link, 1, 1000) == 0
        # behind it, in the ring, is what lets it go; and a sender that waits for room
        await link.send(numbers(0, how), type=Do.LET_GO, id=77)
        async with asyncio.timeout(PATIENCE):
            for _ in range(50):
                await link.send(bytes(1500), type=99)
        assert (await Status.of(link)).wrong == 0


@pytest.mark.parametrize("by_kernel", [False, True], ids=["user", "kernel"])
async def test_the_end_with_messages_held(module, by_kernel):
    """The close callback still reads them; letting go then, or not, does no harm."""
    async with holding(module) as link:
        for number in range(10):
            assert await hold(link, number, 100) == number
        if by_kernel:
            await link.send(b"", type=Do.END_WITH)
            with pytest.raises(PeerClosedError):
                await awaiting(link)
    await until(lambda: module.counts() == (1, 1))


async def test_only_in_place(module):
    async with holding(module, 0) as link:
        assert await hold(link, 1, 100) == -errno.EINVAL


# ---- in C ------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def client(programs):
    """Run ``programs/kup_client.c ARGUMENT...``; its exit code and what it says are returned."""
    program = programs / "kup_client"

    async def run(*arguments, begun=None):
        process = await asyncio.create_subprocess_exec(
            program, *map(str, arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            async with asyncio.timeout(2 * PATIENCE):
                said = b""
                if begun is not None:
                    said = await process.stdout.readline()
                    await begun()
                said += await process.stdout.read()
                complaint = await process.stderr.read()
                await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
        assert complaint == b""
        return process.returncode, said.decode().strip()

    return run


@pytest.mark.parametrize("flags", [0, THREADS, IN_PLACE], ids=["shared", "threads", "in_place"])
@pytest.mark.parametrize("how", ["blocking", "looking", "polling"])
async def test_in_c(module, client, how, flags):
    """Nonces echoed once and twice, and counters, that the user begins; on two channels."""
    module.load(channels=2, flags=flags)
    assert await client(how, "kernel://kup/1") == (0, "")
    assert await asyncio.gather(*[client(how, f"kernel://kup/{n}") for n in range(2)]) == [
        (0, "")
    ] * 2


@pytest.mark.parametrize("hops", [1, 2])
async def test_in_c_when_the_kernel_begins(module, client, hops):
    user_first = asyncio.ensure_future(client("kernel", "kernel://kup/1", hops))
    await asyncio.sleep(0.2)
    assert not user_first.done()
    module.load(channels=2, begin=NONCES, hops=hops)
    assert await user_first == (0, "")
    assert await client("kernel", "kernel://kup", hops) == (0, "")


async def test_threads_in_c(module, client):
    module.load(channels=4, flags=THREADS)
    assert await client("threads", *(f"kernel://kup/{n}" for n in range(4))) == (0, "")


async def test_back_pressure_in_c(module, client):
    module.load(channels=1)
    assert await client("full", "kernel://kup/0") == (0, "")


async def test_what_connecting_says_in_c(module, client):
    async def says(url, milliseconds=0):
        return await client("connect", f"kernel://{url}", milliseconds)

    for milliseconds, number in ((0, errno.EAGAIN), (50, errno.ETIMEDOUT)):
        assert await says("nobody", milliseconds) == (number, "")
        assert await says("kup/1", milliseconds) == (number, "")
    module.load(channels=2)
    for milliseconds in (0, 50):
        assert await says("kup/2", milliseconds) == (errno.ECHRNG, "")
    assert await says("kup/1") == (0, "1")
    assert await says("kup") == (0, "0")
    async with connect(0), connect(1):
        assert await says("kup/1", 50) == (errno.EADDRINUSE, "")
        assert await says("kup", 50) == (errno.EBUSY, "")
        waiting = asyncio.ensure_future(says("kup/9", 60_000))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        module.set("announce", 10)
        assert await waiting == (0, "9")


async def test_the_module_goes_in_c(module, client):
    module.load(channels=1)

    async def begun():
        module.unload()

    assert await client("end", "kernel://kup/0", begun=begun) == (0, "open")


# ---- in user space without the package -------------------------------------------------


async def test_by_the_wait_ioctl(module):
    """Blocking, by hand."""
    module.load(channels=2)
    with RawDevice("kup", flags=NUMBER, channel=1) as raw:
        for count in range(ROUNDS):
            raw.park(count + 1)
            raw.send(numbers(count), type=Do.ECHO, id=count)
            assert raw.wait(DATA) == 0
            assert raw.read64(3 * PAGE + raw.consumed % raw.ring_size + HEADER) == count
            raw.consume()
