# SPDX-License-Identifier: MIT
# ruff: noqa: ASYNC110, ASYNC240, PT012, PT017
"""Names, who gets them, and what is agreed on when two processes meet."""

import asyncio
import errno
import fcntl
import itertools
import json
import os
import resource
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog.testing

import kucomms
import kucomms.transports.shm  # for the tests without descriptors, which could not open it
from kucomms import (
    AddressError,
    AddressInUseError,
    BusyError,
    Endpoint,
    NotReadyError,
    TransportError,
    _core,
)
from kucomms.transports.base import Address
from tests.transports import raw_peer
from tests.transports.processes import PATIENCE, Process, descriptors, objects_in_shm
from tests.transports.raw_peer import PAGE

pytestmark = pytest.mark.asyncio

_numbers = itertools.count()

schemes = pytest.mark.parametrize("scheme", ["shm", "inproc"])


@pytest.fixture
def name():
    return f"rendezvous_{os.getpid()}_{next(_numbers)}"


@pytest.fixture
def url(name):
    return f"shm://{name}"


def echo(message, link):
    return link.send(message)


async def check(link):
    async with asyncio.timeout(PATIENCE):
        await link.send(b"there and back")
        assert (await link.receive()).data == b"there and back"


# ---- names ----------------------------------------------------------------------

BAD_URLS = [
    "nothing://x",
    "shm",
    "",
    "x",
    "shm:/x",
    "://x",
    "SHM://x",
    "shm://",
    "shm://../x",
    "shm://..",
    "shm://.",
    "shm:///x",
    "shm://x/y",
    "shm://x/",
    "shm://x?y",
    "shm://x?",
    "shm://x#y",
    "shm://x y",
    "shm://x\n",
    "\nshm://x",
    "shm://x\0",
    "shm://\0",
    "shm://x-y",
    "shm://ü",
    "shm://\udc80",
    "shm://٣",
    "shm://" + "x" * 49,
    "shm://" + "x" * 300,
    "shm://" + "../" * 100,
    "inproc://",
    "inproc://x\n",
    "inproc://" + "x" * 300,
    "shm://x/3",
    "inproc://x/0",
    *(f"kernel://x{end}" for end in ("/", "/-1", "/03", "/3/", "/3/4", "//3", "/x", "/\u0663")),
    f"kernel://x/{2**32}",
    None,
    7,
    b"shm://x",
    ["shm://x"],
]


@pytest.mark.parametrize("bad", BAD_URLS, ids=ascii)
async def test_bad_urls(bad, runtime_dir):
    async with Endpoint("endpoint") as endpoint:
        for attempt in (
            lambda: endpoint.listen(bad),
            lambda: endpoint.connect(bad, timeout=0),
            lambda: kucomms.connect(bad),
        ):
            with pytest.raises(AddressError) as caught:
                await attempt()
            assert repr(bad) in str(caught.value)
            assert isinstance(caught.value, ValueError)
    assert os.listdir(runtime_dir) == []


@pytest.mark.parametrize("channel", [None, 0, 3, 10, 2**32 - 1])
async def test_a_channel_of_a_kernel_endpoint(channel):
    url = "kernel://nobody" if channel is None else f"kernel://nobody/{channel}"
    address = Address.parse(url)
    assert (address.scheme, address.name, address.channel) == ("kernel", "nobody", channel)
    with pytest.raises(NotReadyError, match=f"{url}: there is no device /dev/kucomms_nobody"):
        await kucomms.connect(url, timeout=0)


@schemes
async def test_other_channels_have_no_numbers(scheme, runtime_dir):
    async with Endpoint("endpoint") as endpoint:
        await endpoint.listen(f"{scheme}://x")
        assert (await endpoint.connect(f"{scheme}://x")).channel_number is None
        with pytest.raises(AddressError, match=rf"{scheme}:// has no channels with numbers"):
            await endpoint.connect(f"{scheme}://x/0")


@schemes
@pytest.mark.parametrize("good", ["x", "A", "_", "0", "x" * 48, "Aa_0" * 12])
async def test_good_names(scheme, good, runtime_dir):
    async with Endpoint("endpoint") as endpoint:
        listener = await endpoint.listen(f"{scheme}://{good}")
        assert listener.url == f"{scheme}://{good}"
        link = await endpoint.connect(f"{scheme}://{good}", timeout=0)
        assert link.url == f"{scheme}://{good}"
        await listener.aclose()
        await listener.aclose()
    assert os.listdir(runtime_dir) == []


@schemes
@pytest.mark.parametrize("timeout", [0, 0.2])
async def test_nobody_is_there(scheme, name, timeout, runtime_dir):
    async with Endpoint("endpoint") as endpoint:
        before = descriptors()
        loop = asyncio.get_running_loop()
        begin = loop.time()
        with pytest.raises(NotReadyError, match=f"{scheme}://{name}: ") as caught:
            await endpoint.connect(f"{scheme}://{name}", timeout=timeout)
        assert isinstance(caught.value, TimeoutError)
        assert timeout - 0.01 <= loop.time() - begin < timeout + 2
        assert descriptors() == before
    assert os.listdir(runtime_dir) == []


@schemes
async def test_connecting_before_listening(scheme, name):
    async with Endpoint("early") as early, Endpoint("late") as late:
        late.on_message(echo)
        connecting = [
            asyncio.create_task(early.connect(f"{scheme}://{name}", timeout=timeout))
            for timeout in (None, PATIENCE)
        ]
        await asyncio.sleep(0)
        await late.listen(f"{scheme}://{name}")
        for link in await asyncio.gather(*connecting):
            await check(link)


@schemes
async def test_connecting_is_cancelled(scheme, name):
    async with Endpoint("endpoint") as endpoint:
        before = descriptors()
        connecting = asyncio.create_task(endpoint.connect(f"{scheme}://{name}"))
        await asyncio.sleep(0)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        assert descriptors() == before
        await endpoint.listen(f"{scheme}://{name}")
        assert endpoint.links == ()


# ---- who gets a name ------------------------------------------------------------


@schemes
async def test_second_listener_in_this_process(scheme, name):
    async with Endpoint("first") as first, Endpoint("second") as second:
        first.on_message(echo)
        listener = await first.listen(f"{scheme}://{name}")
        before = descriptors()
        for endpoint in (first, second):
            with pytest.raises(AddressInUseError, match=f"{scheme}://{name}: "):
                await endpoint.listen(f"{scheme}://{name}")
        assert descriptors() == before
        await check(await second.connect(f"{scheme}://{name}", timeout=0))
        await listener.aclose()
        await second.listen(f"{scheme}://{name}")


async def test_looking_for_a_listener_is_not_reported(url):
    """Who wants a name that is taken looks whether its holder is alive."""
    with structlog.testing.capture_logs() as logs:
        async with Endpoint("first") as first, Endpoint("second") as second:
            listener = await first.listen(url)
            with pytest.raises(AddressInUseError):
                await second.listen(url)
            await second.connect(url)  # comes after it
            await listener.aclose()
    assert logs == []


async def test_second_listener_in_another_process(url):
    with Process("echo", url) as process:
        await process.says("ready")
        async with Endpoint("second") as second:
            with pytest.raises(AddressInUseError):
                await second.listen(url)
            link = await second.connect(url, timeout=0)
            await check(link)
            assert link.peer.pid == process.pid
            process.tell()
            assert await process.ended() == 0
            await second.listen(url)


async def test_socket_of_a_killed_listener_is_taken_over(url, name, runtime_dir):
    with Process("echo", url) as process:
        await process.says("ready")
        process.kill()
        await process.ended()
    assert os.listdir(os.path.join(runtime_dir, "kucomms")) == [name]
    async with Endpoint("user") as user, Endpoint("next") as endpoint:
        with pytest.raises(NotReadyError):
            await user.connect(url, timeout=0)
        endpoint.on_message(echo)
        await endpoint.listen(url)
        await check(await user.connect(url, timeout=0))
    assert os.listdir(runtime_dir) == []


async def test_race_for_a_stale_name(url, name):
    """Two processes find what a dead listener left: exactly one gets the name."""
    with Process("race", url) as one, Process("race", url) as two:
        await one.says("ready")
        await two.says("ready")
        wins = [0, 0]
        for turn in range(20):
            raw_peer.RawListener(name).close(leave_socket=True)
            racers = [one, two] if turn % 2 else [two, one]
            for racer in racers:
                racer.tell("go")
            results = [await one.line(), await two.line()]
            assert sorted(results) == ["lost", "won"]
            wins[results.index("won")] += 1
            async with kucomms.connect(url, timeout=0) as link:
                assert link.peer.pid == [one, two][results.index("won")].pid
                await check(link)
            for racer in racers:
                racer.tell("close")
                await racer.says("done")
        assert sum(wins) == 20
        with pytest.raises(NotReadyError):
            await kucomms.connect(url, timeout=0)


async def test_directory_that_comes_and_goes(url, runtime_dir):
    """Several processes take and give up names in it at once."""
    times = 300
    with (
        Process("comes_and_goes", f"{url}_one", times) as one,
        Process("comes_and_goes", f"{url}_two", times) as two,
    ):
        for process in (one, two):
            await process.says("ready")
        for process in (one, two):
            process.tell("go")
        async with Endpoint("third") as endpoint:
            for _ in range(times):
                listener = await endpoint.listen(url)
                await listener.aclose()
                await asyncio.sleep(0)
        for process in (one, two):
            await process.says("done")
            assert await process.ended() == 0
    assert os.listdir(runtime_dir) == []


async def test_closing_a_listener_leaves_nothing_but_its_links(url, name, runtime_dir):
    directory = os.path.join(runtime_dir, "kucomms")
    async with Endpoint("listener") as endpoint, Endpoint("user") as user:
        endpoint.on_message(echo)
        before = descriptors()
        listener = await endpoint.listen(url)
        other = await endpoint.listen(f"{url}_other")
        assert sorted(os.listdir(directory)) == [name, f"{name}_other"]
        link = await user.connect(url)
        await listener.aclose()
        assert os.listdir(directory) == [f"{name}_other"]
        with pytest.raises(NotReadyError):
            await user.connect(url, timeout=0)
        await check(link)
        await other.aclose()
        assert os.listdir(runtime_dir) == []
        await check(link)
        await link.aclose()
        async with asyncio.timeout(PATIENCE):
            while endpoint.links:
                await asyncio.sleep(0)
        assert descriptors() == before


async def test_name_that_was_removed_and_taken_by_another(url, name, runtime_dir):
    """Who closes removes his own socket only."""
    path = os.path.join(runtime_dir, "kucomms", name)
    async with Endpoint("first") as first, Endpoint("second") as second:
        listener = await first.listen(url)
        os.unlink(path)
        await second.listen(url)
        second.on_message(echo)
        await listener.aclose()
        assert os.path.exists(path)
        await check(await first.connect(url, timeout=0))


async def test_directory_that_was_removed(url, runtime_dir):
    async with Endpoint("first") as first, Endpoint("second") as second:
        listener = await first.listen(url)
        os.unlink(os.path.join(runtime_dir, "kucomms", url.removeprefix("shm://")))
        os.rmdir(os.path.join(runtime_dir, "kucomms"))
        with pytest.raises(NotReadyError):
            await second.connect(url, timeout=0)
        await listener.aclose()
        await second.listen(url)
    assert os.listdir(runtime_dir) == []


async def test_memory_of_the_dead_is_swept(url):
    """What a SIGKILL between making and unlinking leaves in /dev/shm."""
    with Process("echo", url) as process:
        pass
    left = f"kucomms-{os.geteuid()}-{process.pid}-0123456789abcdef"
    other = f"kucomms-{os.geteuid() + 1}-{process.pid}-0123456789abcdef"
    for each in (left, other):
        os.close(_core.shm_create(f"/{each}"))
    try:
        async with Endpoint("next") as endpoint:
            await endpoint.listen(url)
            assert objects_in_shm(process.pid) == []
            assert other in os.listdir("/dev/shm")
    finally:
        _core.shm_unlink(f"/{other}")


# ---- what is agreed on ----------------------------------------------------------


@schemes
@pytest.mark.parametrize(
    ("listens", "asks", "agreed"),
    [
        ({}, None, 1 << 20),
        ({"ring_size": 5000}, None, 8192),
        ({"ring_size": 1}, None, PAGE),
        ({}, 1, PAGE),
        ({}, 100_000, 1 << 17),
        ({"ring_size": PAGE}, 1 << 20, 1 << 20),
        ({"ring_size": PAGE, "max_ring_size": 10_000}, 1 << 20, 16384),
        ({"ring_size": PAGE, "max_ring_size": 1}, 1 << 20, PAGE),
    ],
)
async def test_ring_size(scheme, name, listens, asks, agreed):
    async with Endpoint("listener") as endpoint, Endpoint("user") as user:
        endpoint.on_message(echo)
        await endpoint.listen(f"{scheme}://{name}", **listens)
        link = await user.connect(f"{scheme}://{name}", ring_size=asks)
        while not endpoint.links:
            await asyncio.sleep(0)
        assert link.ring_size == agreed
        assert link.max_message_size == agreed - 32
        assert endpoint.links[0].ring_size == agreed
        largest = os.urandom(link.max_message_size)
        async with asyncio.timeout(PATIENCE):
            await link.send(largest)
            assert (await link.receive()).data == largest
        with pytest.raises(kucomms.MessageTooLargeError):
            await link.send(largest + b"x")


@schemes
@pytest.mark.parametrize("wrong", [0, -1, 2**32 + 1, 2**40, 2**64])
async def test_nonsense_ring_size(scheme, name, wrong):
    async with Endpoint("listener") as endpoint:
        with pytest.raises(ValueError, match="ring_size"):
            await endpoint.listen(f"{scheme}://{name}", ring_size=wrong)
        await endpoint.listen(f"{scheme}://{name}")
        with pytest.raises(ValueError, match="ring_size"):
            await endpoint.connect(f"{scheme}://{name}", ring_size=wrong)


@schemes
@pytest.mark.parametrize("hello", [b"", b"x", bytes(range(64))])
async def test_hello(scheme, name, hello):
    async with Endpoint("listener") as endpoint, Endpoint("user") as user:
        await endpoint.listen(f"{scheme}://{name}", hello=hello[::-1])
        link = await user.connect(f"{scheme}://{name}", hello=hello)
        while not endpoint.links:
            await asyncio.sleep(0)
        assert link.peer.hello == hello[::-1]
        assert endpoint.links[0].peer.hello == hello
        for peer in (link.peer, endpoint.links[0].peer):
            assert (peer.pid, peer.uid, peer.kernel) == (os.getpid(), os.geteuid(), False)


@schemes
async def test_hello_that_is_too_long(scheme, name):
    async with Endpoint("listener") as endpoint:
        with pytest.raises(ValueError, match="hello"):
            await endpoint.listen(f"{scheme}://{name}", hello=bytes(65))
        with pytest.raises(ValueError, match="hello"):
            await endpoint.connect(f"{scheme}://{name}", hello=bytes(65))


async def test_between_processes(url):
    options = json.dumps({"ring_size": 9000, "hello": "from afar"})
    with Process("echo", url, options) as process:
        await process.says("ready")
        async with kucomms.connect(url, hello=b"from here") as link:
            await process.says(f"open {os.geteuid()}")
            assert link.ring_size == 16384
            assert (link.peer.pid, link.peer.uid) == (process.pid, os.geteuid())
            assert link.peer.hello == b"from afar"
            await check(link)
        await process.says("close in order")


@schemes
async def test_max_links(scheme, name):
    async with Endpoint("listener") as endpoint, Endpoint("user") as user:
        endpoint.on_message(echo)
        await endpoint.listen(f"{scheme}://{name}", max_links=2)
        first = await user.connect(f"{scheme}://{name}")
        await user.connect(f"{scheme}://{name}")
        await check(first)
        before = descriptors()
        for timeout in (0, None):
            with pytest.raises(BusyError, match=f"{scheme}://{name}: "):
                await user.connect(f"{scheme}://{name}", timeout=timeout)
        async with asyncio.timeout(PATIENCE):
            while descriptors() != before:
                await asyncio.sleep(0)
        await check(first)
        await first.aclose()
        async with asyncio.timeout(PATIENCE):
            while len(endpoint.links) > 1:
                await asyncio.sleep(0)
        await check(await user.connect(f"{scheme}://{name}"))


@schemes
async def test_max_links_when_many_come_at_once(scheme, name):
    async with Endpoint("listener") as endpoint, Endpoint("user") as user:
        endpoint.on_message(echo)
        await endpoint.listen(f"{scheme}://{name}", max_links=3)
        results = await asyncio.gather(
            *(user.connect(f"{scheme}://{name}") for _ in range(20)), return_exceptions=True
        )
        links = [result for result in results if isinstance(result, kucomms.Link)]
        assert [type(result) for result in results if result not in links] == [BusyError] * 17
        for link in links:
            await check(link)
        assert len(endpoint.links) == len(links) == 3


@schemes
async def test_endpoint_closes_while_it_connects(scheme, name):
    """The listener sees an orderly close, if it sees anything."""
    closed = []
    async with Endpoint("listener") as endpoint:
        endpoint.on_link_close(lambda link, error: closed.append(error))
        await endpoint.listen(f"{scheme}://{name}")
        before = descriptors()
        for turns in range(12):
            async with Endpoint("user") as user:
                connecting = asyncio.create_task(user.connect(f"{scheme}://{name}"))
                for _ in range(turns):
                    await asyncio.sleep(0)
            try:
                link = await connecting
            except kucomms.ClosedError:
                pass
            else:
                assert link.closed
        async with asyncio.timeout(PATIENCE):
            while endpoint.links or descriptors() != before:
                await asyncio.sleep(0)
        assert set(closed) <= {None}


# ---- nothing left ---------------------------------------------------------------


@contextmanager
def descriptors_left(count):
    """So many can be opened, and no more."""
    fillers = []
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        end = max(descriptors()) + 1
        while not fillers or fillers[-1] < end:
            fillers.append(os.open("/dev/null", os.O_RDONLY))
        resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1] + 1 + count, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in fillers:
            os.close(fd)


async def test_no_descriptors_to_connect(url):
    with Process("echo", url) as process:
        await process.says("ready")
        async with Endpoint("poor") as endpoint:
            before = descriptors()
            count = 0
            while True:
                with descriptors_left(count):
                    try:
                        link = await endpoint.connect(url, timeout=PATIENCE)
                    except TransportError as error:
                        assert error.errno == errno.EMFILE, error
                        assert url in str(error)
                    else:
                        break
                assert descriptors() == before
                count += 1
            assert 2 < count < 10
            await check(link)
            await link.aclose()
            assert descriptors() == before


async def test_no_descriptors_to_listen(url, runtime_dir):
    async with Endpoint("poor") as endpoint:
        before = descriptors()
        count = 0
        while True:
            with descriptors_left(count):
                try:
                    listener = await endpoint.listen(url)
                except TransportError as error:
                    assert error.errno == errno.EMFILE, error
                else:
                    break
            assert descriptors() == before
            count += 1
        assert 0 < count < 10
        await listener.aclose()
        assert os.listdir(runtime_dir) == []


async def test_no_descriptors_to_stop_listening(url, runtime_dir):
    """What the closing of the name needs has been kept."""
    async with Endpoint("poor") as endpoint:
        listener = await endpoint.listen(url)
        with descriptors_left(0):
            await listener.aclose()
        assert os.listdir(runtime_dir) == []


@pytest.mark.parametrize("count", range(7))
async def test_listener_without_descriptors_recovers(url, count):
    opened = asyncio.get_running_loop().create_future()
    async with Endpoint("poor") as endpoint:
        endpoint.on_message(echo)
        endpoint.on_link_open(opened.set_result)
        await endpoint.listen(url)
        await asyncio.to_thread(lambda: None)
        with Process("connects", url, json.dumps({"timeout": PATIENCE})) as process:
            before = descriptors()
            with descriptors_left(count):
                enough = count >= 5  # socket, pidfd, memory, two eventfds
                await asyncio.wait([opened], timeout=PATIENCE if enough else 0.4)
                assert opened.done() == enough  # it tries and tries
            async with asyncio.timeout(PATIENCE):
                await opened
            await process.says(f"echoed {os.geteuid()} ")
            process.tell()
            assert await process.ended() == 0
            async with asyncio.timeout(PATIENCE):
                while endpoint.links:
                    await asyncio.sleep(0)
            assert descriptors() == before


TINY_SHM = (
    "unshare",
    "-m",
    "sh",
    "-ec",
    'mount -t tmpfs -o size=256k tmpfs /dev/shm; exec "$@"',
    "sh",
)


def can_have_tiny_shm():
    if os.geteuid():
        return False
    return subprocess.run([*TINY_SHM, "true"], check=False, capture_output=True).returncode == 0


async def test_full_memory_at_the_listener(url):
    if not can_have_tiny_shm():
        pytest.skip("cannot mount a /dev/shm of its own")
    with Process("echo", url, prefix=TINY_SHM) as process:
        await process.says("ready")
        async with Endpoint("user") as endpoint:
            before = descriptors()
            for _ in range(3):
                with pytest.raises(TransportError, match=f"{url}: ") as caught:
                    await endpoint.connect(url, timeout=PATIENCE)
                assert caught.value.errno == errno.ENOSPC
            assert descriptors() == before
            links = []
            with pytest.raises(TransportError) as caught:
                while True:
                    links.append(await endpoint.connect(url, ring_size=16384, timeout=0))
            assert caught.value.errno == errno.ENOSPC
            assert len(links) == 256 // (2 * (16 + 12))
            for link in links:  # to the last byte of it, without a SIGBUS
                for _ in range(10):
                    await link.send(os.urandom(link.max_message_size))
                    assert len(await link.receive()) == link.max_message_size
            await links.pop().aclose()
            async with asyncio.timeout(PATIENCE):
                for _ in range(len(links) + 1):
                    assert (await process.line()).startswith("open")
                await process.says("close in order")
            await check(await endpoint.connect(url, ring_size=16384, timeout=0))


# ---- a process that stands still in the middle of it ----------------------------------


@contextmanager
def locked(runtime_dir):
    """As by a process that was stopped while it took or gave up a name."""
    directory = Path(runtime_dir, "kucomms")
    directory.mkdir(mode=0o700, exist_ok=True)
    fd = os.open(directory, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(fd)


async def test_listen_waits_for_who_takes_a_name_and_the_loop_goes_on(url, runtime_dir):
    async with Endpoint(on_message=echo) as endpoint:
        with locked(runtime_dir):
            listening = asyncio.ensure_future(endpoint.listen(url))
            for _ in range(3):  # each a turn of the loop that a blocking lock would not give
                await asyncio.sleep(0.03)
            assert not listening.done()
        await listening
        async with kucomms.connect(url) as link:
            await check(link)


async def test_listen_gives_up_on_who_never_goes_on(url, runtime_dir, monkeypatch):
    monkeypatch.setattr(kucomms.transports.shm, "LOCK_TIMEOUT", 0.1)
    async with Endpoint() as endpoint:
        with locked(runtime_dir), pytest.raises(TransportError, match=f"{url}.*locked") as told:
            await endpoint.listen(url)
        assert told.value.errno == errno.EWOULDBLOCK
        await endpoint.listen(url)


async def test_closing_beside_who_stands_still_leaves_the_name_to_be_taken_over(url, runtime_dir):
    async with Endpoint() as endpoint:
        await endpoint.listen(url)
        with locked(runtime_dir):
            await endpoint.aclose()
    async with Endpoint(on_message=echo) as endpoint:
        await endpoint.listen(url)
        async with kucomms.connect(url) as link:
            await check(link)
    assert os.listdir(runtime_dir) == []
