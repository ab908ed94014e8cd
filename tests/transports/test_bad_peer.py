# SPDX-License-Identifier: MIT
# ruff: noqa: ASYNC110, PT012, PLW0108, SIM105
"""Peers that break the rules: in the rendezvous, in the ring, on the socket."""

import asyncio
import errno
import itertools
import os
import random
import socket
import time
from contextlib import asynccontextmanager, suppress

import pytest
import structlog

from kucomms import (
    ClosedError,
    Endpoint,
    KucommsError,
    NotReadyError,
    PeerClosedError,
    ProtocolError,
    QueueFull,
    TransportError,
    VersionError,
)
from kucomms.transports import shm
from tests.transports import raw_peer
from tests.transports.processes import PATIENCE, descriptors
from tests.transports.raw_peer import (
    ATTACH,
    BUSY,
    DISCARD,
    EVENTFDS,
    HEADER,
    HELLO,
    PAGE,
    REFUSED_BUSY,
    REFUSED_MEMORY,
    REFUSED_USER,
    REFUSED_VERSION,
    SEALED,
    SETUP,
    RawListener,
    connect_by_hand,
    is_closed,
    memory,
    record,
    side_size,
)

pytestmark = pytest.mark.asyncio

_numbers = itertools.count()


@pytest.fixture
def name():
    return f"bad_{os.getpid()}_{next(_numbers)}"


async def settled(condition):
    """Wait until the loop has come to this."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0)


BROADCAST = 99


class Bystander:
    """A good link of the same endpoint."""

    def __init__(self, link):
        self._link = link
        self._count = 0

    async def check(self):
        """It is there, undisturbed."""
        async with asyncio.timeout(PATIENCE):
            for _ in range(20):
                self._count += 1
                data = b"%d" % self._count
                await self._link.send(data)
                message = await self._link.receive()
                while message.type == BROADCAST:
                    message = await self._link.receive()
                assert message.data == data


@asynccontextmanager
async def listening(name, **options):
    """An endpoint that listens and echoes, and a good link to it."""
    url = f"shm://{name}"
    async with Endpoint("listener") as endpoint, Endpoint("bystander") as other:
        endpoint.on_message(lambda message, link: link.send(message))
        await endpoint.listen(url, **options)
        bystander = Bystander(await other.connect(url, timeout=0))
        await bystander.check()
        await asyncio.to_thread(lambda: None)
        yield endpoint, bystander
        await bystander.check()


# ---- the rendezvous: who connects -----------------------------------------------


def says_nothing(sock):
    pass


def sends(*parts):
    def act(sock):
        for part in parts:
            raw_peer.send(sock, part)

    return act


def sends_half(sock):
    raw_peer.send(sock, record(HELLO)[:50])
    sock.shutdown(socket.SHUT_WR)


def sends_too_soon(sock):
    raw_peer.send(sock, record(HELLO) + record(ATTACH) + b"\x01\x02")


def closes_after_greeting(sock):
    raw_peer.send(sock, record(HELLO))
    sock.shutdown(socket.SHUT_WR)


def greets_with_files(count):
    def act(sock):
        fd = os.open("/dev/null", os.O_RDONLY)
        try:
            raw_peer.send(sock, record(HELLO), [fd] * count)
        finally:
            os.close(fd)

    return act


def answers(answer, *, file=False):
    def act(sock):
        raw_peer.send(sock, record(HELLO, ring_size=PAGE))
        _setup, (fd,) = raw_peer.receive(sock)
        raw_peer.send(sock, answer, [fd] if file else [])
        os.close(fd)

    return act


def attaches_with(**wrong):
    def act(sock):
        raw_peer.send(sock, record(HELLO, ring_size=PAGE))
        _setup, (fd,) = raw_peer.receive(sock)
        os.pwrite(fd, raw_peer.geometry(1, PAGE, **wrong), side_size(PAGE))
        os.close(fd)
        raw_peer.send(sock, record(ATTACH))

    return act


WRONG_GEOMETRY = [
    {"magic": 0},
    {"version": 2},
    {"features": 4},
    {"features": 2},
    {"features": 1},
    {"side": 7},
    {"page_size": 2 * PAGE},
    {"ring_size": 2 * PAGE},
    {"ring_size": 0},
    {"producer_offset": 0},
    {"consumer_offset": PAGE},
    {"data_offset": 2**63},
    {"frame_size": 0},
    {"reserved": 1},
    {"last": 1},
]


def label(value):
    return "_".join(f"{key}_{item:#x}" for key, item in value.items())


BAD_CONNECTORS = {
    "garbage": sends(bytes(range(112))),
    "zeros": sends(bytes(112)),
    "endless_garbage": sends(b"\xff" * 100_000),
    "half_a_record": sends_half,
    "magic": sends(record(HELLO, magic=raw_peer.MAGIC + 1)),
    "version": sends(record(HELLO, version=2)),
    "version_0": sends(record(HELLO, version=0)),
    "features": sends(record(HELLO, features=2**63)),
    "step": sends(record(SETUP)),
    "step_0": sends(record(0)),
    "flags": sends(record(HELLO, flags=4)),
    "reserved": sends(record(HELLO, pool=1)),
    "hello_length": sends(record(HELLO, hello_length=65)),
    "hello_length_max": sends(record(HELLO, hello_length=2**32 - 1)),
    "ring_size_2_40": sends(record(HELLO, ring_size=2**40)),
    "ring_size_max": sends(record(HELLO, ring_size=2**64 - 1)),
    "one_file": greets_with_files(1),
    "many_files": greets_with_files(253),
    "closes_after_greeting": closes_after_greeting,
    "everything_at_once": sends_too_soon,
    "answer_with_file": answers(record(ATTACH), file=True),
    "answer_step": answers(record(HELLO)),
    "answer_garbage": answers(b"\xff" * 112),
    "answer_without_geometry": answers(record(ATTACH)),
    **{f"geometry_{label(wrong)}": attaches_with(**wrong) for wrong in WRONG_GEOMETRY},
}


@pytest.mark.parametrize("act", BAD_CONNECTORS.values(), ids=BAD_CONNECTORS)
async def test_bad_connector_is_dropped(name, act):
    async with listening(name) as (endpoint, bystander):
        before = descriptors()
        opened = []
        endpoint.on_link_open(opened.append)

        def connect():
            with raw_peer.connect(name) as sock:
                act(sock)
                # whatever it answers first, it ends
                try:
                    while sock.recv(1000):
                        pass
                except ConnectionResetError:
                    pass

        await asyncio.to_thread(connect)
        await settled(lambda: descriptors() == before)
        await bystander.check()
        assert opened == []
        assert len(endpoint.links) == 1


async def test_bad_connectors_do_not_fill_the_log(name):
    """Those that we let in as far as their greeting: a line a second, and their number."""
    count = 50

    def connect():
        for _ in range(count):
            with raw_peer.connect(name) as sock:
                raw_peer.send(sock, bytes(112))
                assert is_closed(sock)

    begin = time.monotonic()
    with structlog.testing.capture_logs() as logs:
        async with listening(name):
            await asyncio.to_thread(connect)
    lines = [entry for entry in logs if entry["event"] == "peer_refused"]
    assert "no kucomms" in lines[0]["error"]
    assert 1 <= len(lines) <= 1 + time.monotonic() - begin
    assert len(lines) + sum(entry.get("others", 0) for entry in logs) == count


@pytest.mark.parametrize("kind", ["version", "features"])
async def test_other_versions_are_told(name, kind):
    wrong = {"version": 2} if kind == "version" else {"features": 4}

    def connect():
        with raw_peer.connect(name) as sock:
            raw_peer.send(sock, record(HELLO, **wrong))
            setup, fds = raw_peer.receive(sock)
            assert is_closed(sock)
            return setup.step, setup.version, setup.status, fds

    async with listening(name):
        answer = await asyncio.to_thread(connect)
        assert answer == (SETUP, 1, REFUSED_VERSION, [])


@pytest.mark.parametrize("after", ["connecting", "half_a_record", "greeting"])
async def test_silent_connector_is_dropped_in_time(name, after, monkeypatch):
    monkeypatch.setattr(shm, "HANDSHAKE_TIMEOUT", 0.3)

    def connect():
        sock = raw_peer.connect(name)
        if after == "half_a_record":
            raw_peer.send(sock, record(HELLO)[:-1])
        elif after == "greeting":
            raw_peer.send(sock, record(HELLO))
            _setup, (fd,) = raw_peer.receive(sock)
            os.close(fd)
        return sock

    async with listening(name) as (_endpoint, bystander):
        before = descriptors()
        silent = await asyncio.to_thread(connect)
        async with Endpoint("meanwhile") as other:
            link = await other.connect(f"shm://{name}", timeout=0)
            await Bystander(link).check()
        with silent:
            assert await asyncio.to_thread(is_closed, silent)
        await settled(lambda: descriptors() == before)
        await bystander.check()


async def test_many_silent_connectors_do_not_keep_others_out(name, monkeypatch):
    monkeypatch.setattr(shm, "HANDSHAKE_TIMEOUT", 0.3)
    monkeypatch.setattr(shm, "HANDSHAKES", 4)
    async with listening(name) as (_endpoint, bystander):
        silent = [raw_peer.connect(name) for _ in range(20)]
        async with Endpoint("meanwhile") as other:
            link = await other.connect(f"shm://{name}", timeout=PATIENCE)
            await Bystander(link).check()
        await bystander.check()
        for sock in silent:
            sock.close()


@pytest.mark.parametrize("turns", range(10))
async def test_listener_closes_during_a_rendezvous(name, turns):
    """However far it has come; nothing is leaked, nothing complains."""
    async with Endpoint("listener") as endpoint:
        before = descriptors()
        listener = await endpoint.listen(f"shm://{name}")
        with raw_peer.connect(name) as sock:
            raw_peer.send(sock, record(HELLO))
            for _ in range(turns):
                await asyncio.sleep(0)
            await listener.aclose()
        await settled(lambda: descriptors() == before)
        assert endpoint.links == ()


@pytest.mark.parametrize(
    ("wanted", "agreed"),
    [(0, 2 * PAGE), (1, PAGE), (3, PAGE), (PAGE + 1, 2 * PAGE), (1 << 32, 4 * PAGE)],
)
async def test_odd_ring_sizes_are_rounded_and_clamped(name, wanted, agreed):
    options = {"ring_size": 2 * PAGE, "max_ring_size": 4 * PAGE}
    async with listening(name, **options) as (endpoint, _bystander):
        peer = await asyncio.to_thread(connect_by_hand, name, wanted)
        await settled(lambda: len(endpoint.links) == 2)
        assert peer.ring_size == agreed
        assert endpoint.links[1].ring_size == agreed
        peer.close()
        await settled(lambda: len(endpoint.links) == 1)


@pytest.mark.parametrize("turns", range(10))
async def test_rendezvous_is_cancelled(name, turns):
    """As at the end of asyncio.run(): wherever it is, its socket is closed."""
    async with Endpoint("listener") as endpoint:
        await endpoint.listen(f"shm://{name}")
        before = descriptors()
        with raw_peer.connect(name) as sock:
            raw_peer.send(sock, record(HELLO))
            for _ in range(turns):
                await asyncio.sleep(0)
            tasks = [t for t in asyncio.all_tasks() if t.get_name() == f"kucomms shm://{name}"]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
        await settled(lambda: descriptors() == before)


# ---- the rendezvous: who listens ------------------------------------------------


def setup_with(size=None, *, files=1, raw=None, **fields):
    """A listener's answer; the file has ``size`` bytes."""
    fields = {"ring_size": PAGE, **fields}
    size = 2 * side_size(PAGE) if size is None else size

    def act(sock):
        fds = [memory(size) for _ in range(files)]
        try:
            raw_peer.send(sock, record(SETUP, **fields) if raw is None else raw, fds)
        finally:
            for fd in fds:
                os.close(fd)

    return act


def setup_with_geometry(**wrong):
    def act(sock):
        fd = memory(2 * side_size(PAGE))
        os.pwrite(fd, raw_peer.geometry(0, PAGE, **wrong), 0)
        raw_peer.send(sock, record(SETUP, ring_size=PAGE), [fd])
        os.close(fd)

    return act


def refuses_with(status):
    return setup_with(files=0, status=status, ring_size=0)


def wrong_kind_of_file(sock):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        raw_peer.send(sock, record(SETUP, ring_size=PAGE), [ours.fileno()])


def read_only_file(sock):
    fd = memory(2 * side_size(PAGE))
    os.pwrite(fd, raw_peer.geometry(0, PAGE), 0)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    raw_peer.send(sock, record(SETUP, ring_size=PAGE), [again])
    os.close(again)
    os.close(fd)


def passes_files(parts):
    """So many with each byte of a record, which is never whole."""

    def act(sock):
        with open("/dev/null") as file:
            for count in parts:
                raw_peer.send(sock, record(SETUP)[:1], [file.fileno()] * count)

    return act


TOO_MANY_FILES = [[4], [3, 1], [1, 1, 1, 1], [0, 253], [1, 3], [3, 0, 253]]
BAD_LISTENERS = {
    "garbage": (setup_with(raw=b"\xff" * 112), ProtocolError),
    "magic": (setup_with(magic=1), ProtocolError),
    "version": (setup_with(version=2), VersionError),
    "features": (setup_with(features=4), VersionError),
    "refused_version": (refuses_with(REFUSED_VERSION), VersionError),
    "refused_memory": (refuses_with(REFUSED_MEMORY), TransportError),
    "refused_user": (refuses_with(REFUSED_USER), TransportError),
    "refused_busy": (refuses_with(REFUSED_BUSY), KucommsError),
    "unknown_status": (refuses_with(77), ProtocolError),
    "step": (setup_with(raw=record(HELLO)), ProtocolError),
    "flags": (setup_with(flags=4), ProtocolError),
    "no_eventfds": (setup_with(flags=EVENTFDS), ProtocolError),
    "one_eventfd": (setup_with(files=2, flags=EVENTFDS), ProtocolError),
    "eventfds_are_files": (setup_with(files=3, flags=EVENTFDS), ProtocolError),
    "three_eventfds": (setup_with(files=4, flags=EVENTFDS), ProtocolError),
    "reserved": (setup_with(pool=9), ProtocolError),
    "hello_length": (setup_with(hello_length=2**31), ProtocolError),
    "ring_size_0": (setup_with(ring_size=0), ProtocolError),
    "ring_size_3": (setup_with(ring_size=3), ProtocolError),
    "ring_size_odd": (setup_with(ring_size=PAGE + 8), ProtocolError),
    "ring_size_2_40": (setup_with(ring_size=2**40), ProtocolError),
    "ring_size_max": (setup_with(ring_size=2**64 - 1), ProtocolError),
    "no_file": (setup_with(files=0), ProtocolError),
    "two_files": (setup_with(files=2), ProtocolError),
    "many_files": (setup_with(files=253), ProtocolError),
    **{f"files_{parts}": (passes_files(parts), ProtocolError) for parts in TOO_MANY_FILES},
    "small_file": (setup_with(2 * side_size(PAGE) - 1), ProtocolError),
    "empty_file": (setup_with(0), ProtocolError),
    "large_file": (setup_with(2 * side_size(PAGE) + 1), ProtocolError),
    "wrong_kind_of_file": (wrong_kind_of_file, ProtocolError),
    "read_only_file": (read_only_file, TransportError),
    "not_sealed": (setup_with(side_size(PAGE), flags=SEALED), ProtocolError),
    "no_geometry": (setup_with(), ProtocolError),
    **{
        f"geometry_{label(wrong)}": (
            setup_with_geometry(**wrong),
            # one that we know, and that was not agreed on, is no matter of versions
            VersionError if "version" in wrong or wrong.get("features") == 4 else ProtocolError,
        )
        for wrong in WRONG_GEOMETRY
    },
}


@pytest.mark.parametrize(("act", "error"), BAD_LISTENERS.values(), ids=BAD_LISTENERS)
async def test_bad_listener_is_refused(name, act, error):
    def accept():
        sock, _hello = fake.accept()
        with sock:
            act(sock)
            assert is_closed(sock)

    async with Endpoint("connector") as endpoint:
        with RawListener(name) as fake:
            await asyncio.to_thread(lambda: None)
            before = descriptors()
            accepting = asyncio.create_task(asyncio.to_thread(accept))
            with pytest.raises(error, match=f"shm://{name}: ") as caught:
                await endpoint.connect(f"shm://{name}", timeout=PATIENCE)
            if error in (ProtocolError, TransportError):
                assert type(caught.value) is error
            await accepting
            assert descriptors() == before
        assert endpoint.links == ()


@pytest.mark.parametrize(("asked", "answered"), [(1, 2), (2, 4), (3, 8)])
async def test_listener_that_wants_more_memory_than_was_asked_for(name, asked, answered):
    """Also when it is all there, and all else is right."""
    async with Endpoint("connector") as endpoint:
        with RawListener(name) as fake:
            accepting = asyncio.create_task(
                asyncio.to_thread(fake.accept_by_hand, answered * PAGE)
            )
            with pytest.raises(ProtocolError, match=f"shm://{name}: .*{answered * PAGE} bytes"):
                await endpoint.connect(f"shm://{name}", ring_size=asked * PAGE, timeout=0)
            with pytest.raises((EOFError, ConnectionResetError)):
                await accepting


@pytest.mark.parametrize("asked", [None, 3 * PAGE, 4 * PAGE, 8 * PAGE])
async def test_listener_may_give_what_was_asked_for_or_less(name, asked):
    """Rounded; and who asks for nothing leaves it to a listener of the same user."""
    async with Endpoint("connector") as endpoint:
        with RawListener(name) as fake:
            accepting = asyncio.create_task(asyncio.to_thread(fake.accept_by_hand, 4 * PAGE))
            link = await endpoint.connect(f"shm://{name}", ring_size=asked, timeout=0)
            assert link.ring_size == 4 * PAGE
            (await accepting).close()


@pytest.mark.parametrize("says", ["nothing", "half_a_record"])
async def test_silent_listener(name, says):
    """Accepts, or does not even that, and never answers."""

    def accept():
        sock, _hello = fake.accept()
        if says == "half_a_record":
            raw_peer.send(sock, record(SETUP)[:50])
        return sock

    async with Endpoint("connector") as endpoint:
        with RawListener(name) as fake:
            await asyncio.to_thread(lambda: None)
            before = descriptors()
            accepting = asyncio.create_task(asyncio.to_thread(accept))
            loop = asyncio.get_running_loop()
            begin = loop.time()
            with pytest.raises(NotReadyError, match=f"shm://{name}: .*says nothing"):
                await endpoint.connect(f"shm://{name}", timeout=0.3)
            assert 0.25 < loop.time() - begin < 3
            (await accepting).close()
            await settled(lambda: descriptors() == before)


async def test_refusal_before_the_greeting(name):
    """It is heard, though the listener has closed before it was greeted."""

    def refuse():
        sock, _address = fake.sock.accept()
        raw_peer.send(sock, record(SETUP, status=REFUSED_USER))
        sock.close()

    async with Endpoint("connector") as endpoint:
        with RawListener(name) as fake:
            connect_socket = shm.connect_socket

            def connect_slowly(*arguments):
                sock = connect_socket(*arguments)
                refuse()
                return sock

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(shm, "connect_socket", connect_slowly)
                with pytest.raises(TransportError) as caught:
                    await endpoint.connect(f"shm://{name}", timeout=0)
            assert caught.value.errno == errno.EACCES


async def test_listener_that_drops_everybody(name):
    """It may be closing: so another one is waited for, as long as there is time."""

    def drop():
        for _ in range(3):
            sock, _address = fake.sock.accept()
            sock.close()
        fake.close()

    async with Endpoint("connector") as endpoint, Endpoint("listener") as listener:
        fake = RawListener(name)
        dropping = asyncio.create_task(asyncio.to_thread(drop))
        with pytest.raises(NotReadyError):
            await endpoint.connect(f"shm://{name}", timeout=0)
        connecting = asyncio.create_task(endpoint.connect(f"shm://{name}", timeout=PATIENCE))
        await dropping
        await listener.listen(f"shm://{name}")
        await connecting


# ---- the ring -------------------------------------------------------------------


@asynccontextmanager
async def attacked(role, name, receiving="await", features=0):
    """A link whose other side is written by hand, and a good link of the same endpoint.

    ``role``: what the endpoint is. ``receiving``: how it gets its messages.
    """
    loop = asyncio.get_running_loop()
    closed = loop.create_future()
    received = []
    async with Endpoint("attacked") as endpoint, Endpoint("bystander") as other:
        bystander_url = f"shm://{name}_bystander"
        await other.listen(bystander_url)
        opened = loop.create_future()
        other.on_link_open(opened.set_result)
        to_other = await endpoint.connect(bystander_url, timeout=0)
        bystander = Bystander(await opened)

        def handle(message, link):
            if link is to_other:
                return link.send(message)
            received.append(bytes(message.data))
            return None

        async def echo_by_hand():
            async for message in to_other:
                await to_other.send(message)

        echoing = None
        if receiving == "handler":
            endpoint.on_message(handle)
        elif receiving == "borrowing":
            endpoint.on_message(borrow=True)(handle)
        else:
            echoing = asyncio.create_task(echo_by_hand())
        await bystander.check()
        await asyncio.to_thread(lambda: None)
        before = descriptors()
        if role == "listener":
            listener = await endpoint.listen(f"shm://{name}", ring_size=PAGE)
            peer = await asyncio.to_thread(connect_by_hand, name, features=features)
            await settled(lambda: len(endpoint.links) == 2)
            await listener.aclose()
        else:
            with RawListener(name) as fake:
                accepting = asyncio.create_task(
                    asyncio.to_thread(fake.accept_by_hand, features=features)
                )
                await endpoint.connect(f"shm://{name}", timeout=0)
                peer = await accepting
        link = endpoint.links[1]
        endpoint.on_link_close(
            lambda which, error: closed.set_result(error) if which is link else None
        )
        try:
            async with asyncio.timeout(PATIENCE):
                yield link, peer, received, closed
                await closed
        finally:
            if peer.sock.fileno() >= 0:
                peer.close()
        await bystander.check()
        assert descriptors() == before
        assert endpoint.links == (to_other,)
        if echoing is not None:
            echoing.cancel()
            await asyncio.wait([echoing])


roles = pytest.mark.parametrize("role", ["listener", "connector"])
ways = pytest.mark.parametrize("receiving", ["await", "handler", "borrowing"])
GOOD = [b"", b"1", b"two", bytes(100), b"five"]


def bad_frame(*data, **fields):
    return lambda peer: peer.frame(*data, **fields)


def behind_the_end(peer):
    """A length that lies within the ring, but behind what is published."""
    peer.frame(b"x" * 8, length=9)


def whole_ring_and_more(peer):
    peer.frame(b"", length=PAGE)


BAD_FRAMES = {
    "longer_than_published": behind_the_end,
    "longer_than_the_ring": whole_ring_and_more,
    "longest": bad_frame(length=2**32 - 1),
    "overflowing": bad_frame(length=2**32 - HEADER),
    "unknown_flag": bad_frame(flags=16),
    "token_without_turns": bad_frame(flags=8),
    "all_flags": bad_frame(flags=0xFFFF),
    "busy_with_unknown_flag": bad_frame(flags=BUSY | 0x8000),
    "discarded_too_long": bad_frame(flags=DISCARD, length=2**31),
    "busy_too_long": bad_frame(flags=BUSY, length=2**31),
    "control_kind": bad_frame(kind=1),
    "buffer_kind": bad_frame(kind=2),
    "unknown_kind": bad_frame(kind=255),
    "last_byte": bad_frame(zero=1),
}


async def assert_broken(link, closed, expected=()):
    """Awaited messages come first; then it is a breach of the rules for everybody."""
    for data in expected:
        assert (await link.receive()).data == data
    with pytest.raises(ProtocolError, match=link.url):
        await link.receive()
    assert_closed_by_breach(link, await closed)
    with pytest.raises(ProtocolError):
        await anext(link)
    with pytest.raises(ProtocolError):
        await link.borrow().__aenter__()


def assert_closed_by_breach(link, error):
    assert type(error) is ProtocolError
    assert link.url in str(error)
    assert link.closed
    with pytest.raises(ProtocolError):
        link.send_nowait(b"")
    with pytest.raises(ProtocolError), link.loan(8):
        pass
    assert link.statistics().protocol_errors == 1


@roles
@ways
@pytest.mark.parametrize("fault", BAD_FRAMES.values(), ids=BAD_FRAMES)
async def test_bad_frame(name, role, receiving, fault):
    async with attacked(role, name, receiving) as (link, peer, received, closed):
        for data in GOOD:
            peer.frame(data)
        fault(peer)
        peer.publish()
        peer.ring()
        if receiving == "await":
            await assert_broken(link, closed, GOOD)
        else:
            assert_closed_by_breach(link, await closed)
            assert received == GOOD


@roles
@ways
async def test_nothing_after_a_fault_is_read(name, role, receiving):
    """Not even when the peer mends it."""
    async with attacked(role, name, receiving) as (link, peer, received, closed):
        for data in GOOD:
            peer.frame(data)
        start = peer.position
        peer.frame(b"bad", kind=7)
        peer.publish()
        peer.ring()
        if receiving == "await":
            assert (await link.receive()).data == GOOD[0]
        else:
            await closed
        peer.write_data(start, (3).to_bytes(8, "little"))  # the bad frame is a good one now
        peer.frame(b"after")
        peer.publish()
        if receiving == "await":
            await assert_broken(link, closed, GOOD[1:])
        else:
            assert_closed_by_breach(link, await closed)
            assert received == GOOD


BAD_PRODUCER_POSITIONS = {
    "backwards": lambda peer: peer.publish(0),
    "a_frame_back": lambda peer: peer.publish(peer.position - 40),
    "ahead_of_the_ring": lambda peer: peer.publish(peer.position + PAGE + 8),
    "far_ahead": lambda peer: peer.publish(peer.position + 2**63),
    "below_zero": lambda peer: peer.publish(-8),
    "misaligned": lambda peer: peer.publish(peer.position + 4),
    "odd": lambda peer: peer.publish(peer.position + 1),
    "whole_page": lambda peer: peer.write(peer.offset(1), b"\xff" * PAGE),
}


@roles
@ways
@pytest.mark.parametrize("fault", BAD_PRODUCER_POSITIONS.values(), ids=BAD_PRODUCER_POSITIONS)
async def test_bad_producer_position(name, role, receiving, fault):
    async with attacked(role, name, receiving) as (link, peer, received, closed):
        peer.send(*GOOD)
        if receiving == "await":
            for data in GOOD:
                assert (await link.receive()).data == data
        else:
            await settled(lambda: received == GOOD)
        fault(peer)
        peer.ring()
        if receiving == "await":
            await assert_broken(link, closed)
        else:
            assert_closed_by_breach(link, await closed)
            assert received == GOOD


BAD_CONSUMER_POSITIONS = {
    "backwards": lambda peer: peer.consume(0),
    "a_frame_back": lambda peer: peer.consume(peer.consumed - 40),
    "ahead": lambda peer: peer.consume(peer.available + 8),
    "far_ahead": lambda peer: peer.consume(peer.available + 2**63),
    "below_zero": lambda peer: peer.consume(-8),
    "misaligned": lambda peer: peer.consume(peer.consumed + 4),
    "odd": lambda peer: peer.consume(peer.available - 1),
    "whole_page": lambda peer: peer.write(peer.offset(2), b"\xff" * PAGE),
}


def fill(link):
    with pytest.raises(QueueFull):
        while True:
            link.send_nowait(bytes(8))


@roles
@ways
@pytest.mark.parametrize("fault", BAD_CONSUMER_POSITIONS.values(), ids=BAD_CONSUMER_POSITIONS)
async def test_bad_consumer_position(name, role, receiving, fault):
    """A sender notices, when the ring seems full. What the peer had sent is delivered."""
    async with attacked(role, name, receiving) as (link, peer, received, closed):
        fill(link)
        peer.consume()
        fill(link)
        fault(peer)
        for data in GOOD:
            peer.frame(data)
        peer.publish()
        with pytest.raises(ProtocolError, match=link.url):
            await link.send(bytes(8))
        with pytest.raises(ProtocolError):
            link.send_nowait(bytes(8))
        if receiving == "await":
            await assert_broken(link, closed, GOOD)
        else:
            assert_closed_by_breach(link, await closed)
            assert received == GOOD


@roles
async def test_bad_consumer_position_under_waiting_senders(name, role):
    async with attacked(role, name) as (link, peer, _received, closed):
        fill(link)
        waiting = [
            asyncio.create_task(link.send(bytes(8))),
            asyncio.create_task(link.send_many([bytes(8)])),
            asyncio.create_task(asyncio.to_thread(link.send_threadsafe, bytes(8))),
        ]
        await settled(lambda: len(link._send_queue) == len(waiting))
        peer.consume(peer.available + 8)
        peer.ring()
        errors = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(error) for error in errors] == [ProtocolError] * len(waiting)
        await assert_broken(link, closed)


@roles
async def test_bad_consumer_position_seen_by_a_thread(name, role):
    """It is told; what has to be done about the link is done in the loop's thread."""
    async with attacked(role, name) as (link, peer, _received, closed):
        fill(link)
        peer.consume(peer.available + 8)
        peer.send(*GOOD)
        with pytest.raises(ProtocolError, match=link.url):
            await asyncio.to_thread(link.send_threadsafe, bytes(8), timeout=PATIENCE)
        await assert_broken(link, closed, GOOD)


@roles
async def test_broadcast_passes_over_a_broken_link(name, role):
    async with attacked(role, name) as (link, peer, _received, closed):
        fill(link)
        peer.consume(peer.available + 8)
        opened = asyncio.get_running_loop().create_future()
        async with Endpoint("listener") as listener:
            await listener.listen(f"shm://{name}_another")
            listener.on_link_open(opened.set_result)
            another = await link._endpoint.connect(f"shm://{name}_another")
            # first to the bystander, whose echo of it comes back there
            assert link._endpoint.broadcast(b"1" * 40, type=BROADCAST) == 2
            assert (await (await opened).receive()).data == b"1" * 40
            await another.aclose()
        await assert_broken(link, closed)


@roles
@pytest.mark.parametrize("kind", ["request", "late_request"])
async def test_requests_end_with_a_breach(name, role, kind):
    """Also when messages that came before it were not received yet."""
    async with attacked(role, name) as (link, peer, _received, closed):
        if kind == "late_request":
            peer.send(*GOOD)
        requests = [asyncio.create_task(link.request(b"")) for _ in range(3)]
        await settled(lambda: link.statistics().messages_sent == 3)
        peer.frame(b"", kind=9)
        peer.publish()
        peer.ring()
        errors = await asyncio.gather(*requests, return_exceptions=True)
        assert [type(error) for error in errors] == [ProtocolError] * 3
        await assert_broken(link, closed, GOOD if kind == "late_request" else ())


@roles
@ways
async def test_polling_does_not_stop_at_an_unfinished_frame(name, role, receiving):
    """A peer that never commits must not keep the loop from its other tasks."""
    async with attacked(role, name, receiving) as (link, peer, received, closed):
        link._endpoint._busy_poll = link._endpoint._poll_budget = 0.01
        peer.send(b"before")
        start = peer.position
        peer.frame(b"unfinished", flags=BUSY)
        peer.send(b"after")
        async with asyncio.timeout(PATIENCE):
            for _ in range(100):
                await asyncio.sleep(0)
            if receiving == "await":
                assert (await link.receive()).data == b"before"
            else:
                await settled(lambda: received == [b"before"])
            for _ in range(100):
                await asyncio.sleep(0.0001)  # its subject is that timers run
        peer.write_data(start, (10).to_bytes(8, "little"))
        peer.ring()
        if receiving == "await":
            assert (await link.receive()).data == b"unfinished"
            assert (await link.receive()).data == b"after"
        else:
            await settled(lambda: received == [b"before", b"unfinished", b"after"])
        peer.set_state(1)
        peer.ring()
        assert await closed is None


@roles
async def test_loan_survives_a_breach(name, role):
    """The memory of a loan or a borrow stays until it is given back."""
    async with attacked(role, name) as (link, peer, _received, closed):
        peer.send(b"borrowed", b"second")
        borrow = link.borrow()
        message = await borrow.__aenter__()
        with pytest.raises(ProtocolError), link.loan(64) as loan:
            peer.publish(peer.position + 3)
            peer.ring()
            assert (await link.receive()).data == b"second"
            await assert_broken(link, closed)
            loan.data[:] = bytes(64)
            assert message.data == b"borrowed"
        peer.write_data(HEADER, b"CHANGED!")
        assert message.data == b"CHANGED!"
        await borrow.__aexit__(None, None, None)


@roles
@pytest.mark.parametrize("state", [3, 77, 2**31, 2**32 - 1])
async def test_unknown_state(name, role, state):
    async with attacked(role, name) as (link, peer, _received, closed):
        for data in GOOD:
            peer.frame(data)
        peer.publish()
        peer.set_state(state)
        peer.ring()
        await assert_broken(link, closed, GOOD)


# ---- the socket -----------------------------------------------------------------


@roles
@ways
@pytest.mark.parametrize("garbage", [b"\x00", b"\x01\x01\x02", b"\xff" * 5000, b"hello"])
async def test_garbage_on_the_socket(name, role, receiving, garbage):
    async with attacked(role, name, receiving) as (link, peer, received, closed):
        for data in GOOD:
            peer.frame(data)
        peer.publish()
        peer.ring(garbage)
        if receiving == "await":
            await assert_broken(link, closed, GOOD)
        else:
            assert_closed_by_breach(link, await closed)
            assert received == GOOD


@roles
@ways
@pytest.mark.parametrize("state", [0, 1])
@pytest.mark.parametrize("bells", [0, 1, 5000, 400_000])
async def test_socket_is_closed_with_unread_doorbells(name, role, receiving, state, bells):
    """The system calls that an error of the socket, not only its end."""
    async with attacked(role, name, receiving) as (link, peer, received, closed):
        peer.park_for_data(1)
        link.send_nowait(b"rings")
        assert link.statistics().doorbells_rung == 1
        for data in GOOD:
            peer.frame(data)
        peer.publish()
        peer.set_state(state)
        peer.sock.setblocking(False)
        peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, bells)
        with suppress(BlockingIOError):
            peer.ring(b"\x01" * bells)
        peer.close()
        if receiving == "await":
            for data in GOOD:
                assert (await link.receive()).data == data
            with pytest.raises(PeerClosedError):
                await link.receive()
        error = await closed
        assert error is None if state else type(error) is PeerClosedError
        assert link.closed
        if receiving != "await":
            assert received == GOOD


@roles
async def test_files_on_the_socket_break_the_rules(name, role):
    """None is taken, and what came before it is received."""
    async with attacked(role, name) as (link, peer, _received, closed):
        before = descriptors()
        peer.send(b"x")
        assert (await link.receive()).data == b"x"
        peer.send(b"y")
        with socket.socket() as extra, suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(50):
                raw_peer.send(peer.sock, b"\x01", [extra.fileno()] * 20)
        assert (await link.receive()).data == b"y"
        with pytest.raises(ProtocolError):
            await link.receive()
        assert type(await closed) is ProtocolError
        assert descriptors().items() <= before.items()


@roles
@ways
async def test_doorbell_flood(name, role, receiving):
    """Rings without a reason: costs time, and nothing else."""
    async with attacked(role, name, receiving) as (link, peer, received, closed):
        stop = False

        def flood():
            peer.sock.setblocking(False)
            count = 0
            while not stop:
                try:
                    count += peer.sock.send(b"\x01" * 100_000)
                except BlockingIOError:
                    pass
            return count

        flooding = asyncio.create_task(asyncio.to_thread(flood))
        async with Endpoint("friend") as friend, Endpoint("other friend") as other:
            await friend.listen(f"shm://{name}_friend")
            friend.on_message(lambda message, link: link.send(message))
            good = Bystander(await other.connect(f"shm://{name}_friend"))
            for _ in range(20):
                await good.check()
        for data in GOOD:
            peer.frame(data)
        peer.publish()
        if receiving == "await":
            for data in GOOD:
                assert (await link.receive()).data == data
        else:
            await settled(lambda: received == GOOD)
        stop = True
        assert await flooding > 0
        assert link.statistics().doorbells_heard > 0
        assert link.statistics().protocol_errors == 0
        peer.set_state(1)
        peer.sock.setblocking(True)
        with suppress(BrokenPipeError):  # a bell of the flood was enough
            await asyncio.to_thread(peer.ring)
        assert await closed is None


# ---- anything -------------------------------------------------------------------


@pytest.mark.parametrize("receiving", ["await", "handler", "borrowing"])
@pytest.mark.parametrize("seed", range(3))
async def test_random_garbage(name, receiving, seed):
    """Whatever a peer writes: the link ends, the endpoint and its other link do not."""
    rounds = 300
    chance = random.Random(seed)
    async with (
        Endpoint("attacked", busy_poll=0.0005 if seed == 2 else 0.0) as endpoint,
        Endpoint("bystander") as other,
    ):
        loop = asyncio.get_running_loop()
        opened, closed = loop.create_future(), loop.create_future()
        sizes = []
        endpoint.on_link_open(lambda link: opened.set_result(link))
        endpoint.on_link_close(lambda link, error: closed.set_result(error))

        async def use(link):
            """All that can be done with a link, until it is over."""
            try:
                while not link.closed:
                    link.statistics()
                    assert 0 <= link.tx_avail <= PAGE
                    assert 0 <= link.tx_free <= PAGE
                    assert link.rx_avail >= 0
                    try:
                        link.send_nowait(bytes(chance.randrange(200)))
                        with link.loan(chance.randrange(200)):
                            pass
                    except QueueFull:
                        pass
                    if receiving == "await":
                        async with link.borrow() as message:
                            sizes.append(len(message))
                        sizes.append(len(await link.receive()))
                    else:
                        await asyncio.sleep(0)
            except (PeerClosedError, ProtocolError, ClosedError):
                pass
            try:
                while receiving == "await":
                    sizes.append(len(await link.receive()))
            except (PeerClosedError, ProtocolError):
                pass

        def handle(message, link):
            sizes.append(len(message))
            try:
                link.send_nowait(message)
            except KucommsError:
                pass

        if receiving == "handler":
            endpoint.on_message(handle)
        elif receiving == "borrowing":
            endpoint.on_message(borrow=True)(handle)
        await endpoint.listen(f"shm://{name}", ring_size=PAGE)
        good = await other.connect(f"shm://{name}")
        to_good = await opened
        bystander = Bystander(good)

        async def echo_by_hand():
            async for message in to_good:
                await to_good.send(message)

        if receiving == "await":
            echoing = asyncio.create_task(echo_by_hand())
        await bystander.check()
        await asyncio.to_thread(lambda: None)
        before = descriptors()
        ends = []

        def attack(peer):
            raw_peer.garbage(peer, chance)

        async with asyncio.timeout(10 * PATIENCE):
            for turn in range(rounds):
                opened, closed = loop.create_future(), loop.create_future()
                peer = await asyncio.to_thread(connect_by_hand, name)
                link = await opened
                using = asyncio.create_task(use(link))
                for _ in range(chance.randrange(1, 4)):
                    attack(peer)
                    await asyncio.sleep(0)
                peer.close()
                await using
                ends.append(await closed)
                if turn % 10 == 0:
                    await bystander.check()
        assert descriptors() == before
        assert {type(end) for end in ends} >= {ProtocolError, PeerClosedError}
        assert all(isinstance(end, KucommsError | None) for end in ends)
        assert max(sizes) <= PAGE - HEADER
        assert endpoint.statistics().handler_errors == 0
        opened, closed = loop.create_future(), loop.create_future()
        if receiving == "await":
            echoing.cancel()
            await asyncio.wait([echoing])
