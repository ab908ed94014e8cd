# SPDX-License-Identifier: MIT
# ruff: noqa: ASYNC110, PLW0108, PT012
"""A peer that lies about buffers and pools: its link is broken, and nobody else's."""

import array
import asyncio
import errno
import fcntl
import itertools
import mmap
import os
import socket
import struct
from contextlib import asynccontextmanager, suppress

import pytest

from kucomms import Endpoint, KucommsError, ProtocolError, TransportError
from tests.transports import raw_peer
from tests.transports.raw_peer import (
    ATTACH,
    FEATURE_POOLS,
    HELLO,
    KIND_BUFFER,
    KIND_POOL,
    MAPPED,
    NOTICE,
    POOL,
    REPLY,
    connect_by_hand,
    record,
    sealed_memory,
)
from tests.transports.test_bad_peer import assert_closed_by_breach, attacked

pytestmark = pytest.mark.asyncio
LOOPS = ["asyncio"]  # what is tested is what is read

PAGE = mmap.PAGESIZE
_numbers = itertools.count()

roles = pytest.mark.parametrize("role", ["listener", "connector"])
ways = pytest.mark.parametrize("receiving", ["await", "handler", "borrowing"])


@pytest.fixture
def name():
    return f"partner_{os.getpid()}_{next(_numbers)}"


@asynccontextmanager
async def sharing(role, name, receiving="await"):
    """A link, the raw peer, its pool of four pages, and what it has of ours of two pages."""
    async with attacked(role, name, receiving, features=FEATURE_POOLS) as all_of_it:
        link, peer, received, closed = all_of_it
        os.close(peer.open_pool(peer.own, 4 * PAGE))
        answer, _ = await asyncio.to_thread(raw_peer.receive, peer.sock)
        assert (answer.step, answer.pool, answer.status) == (MAPPED, peer.own, 0)
        opening = asyncio.ensure_future(open_pool(link, 2 * PAGE))
        told = await asyncio.to_thread(peer.mapped)
        assert (told.pool, told.ring_size) == (1 - peer.own, 2 * PAGE)
        pool = await opening
        buffer = pool.allocate(100)
        buffer.data[:] = bytes(100)
        await link.send(b"yours", buffers=buffer)
        ((kind, flags, data),) = peer.frames()
        out = struct.unpack("<IIQ", data[:16])
        assert (kind, flags, data[16:]) == (KIND_BUFFER, 0, b"yours")
        assert out[0] == told.pool
        assert out[2] == 100
        yield link, peer, out, received, closed
        assert pool.closed


async def open_pool(link, size):
    return await link.open_pool(size)


def news(number, size=0, *, reserved=0, offset=0):
    return struct.pack("<IIQQ", number, reserved, size, offset)


@pytest.mark.parametrize("waits", [False, True])
@roles
async def test_who_allocates_finds_the_fault(role, name, waits):
    """There is room by then, but in a pool that is no more."""
    async with sharing(role, name) as (link, peer, out, _, _):
        (pool,) = link._connection.pools._ours.values()
        with pool.allocate(PAGE):
            peer.buffers(out, flags=NOTICE)
            peer.buffers((peer.own, 9, 1))
            peer.publish()
            with pytest.raises(ProtocolError, match=link.url):
                await pool.allocate_when_room(1) if waits else pool.allocate(1)


FAULTS = {
    # of its own pool
    "page_behind_the_end": lambda peer, _: peer.buffers((peer.own, 4, 1)),
    "longer_than_the_pool": lambda peer, _: peer.buffers((peer.own, 0, 4 * PAGE + 1)),
    "across_the_end": lambda peer, _: peer.buffers((peer.own, 3, PAGE + 1)),
    "longest": lambda peer, _: peer.buffers((peer.own, 0, 2**64 - 1)),
    "last_page": lambda peer, _: peer.buffers((peer.own, 2**32 - 1, 1)),
    "no_bytes": lambda peer, _: peer.buffers((peer.own, 0, 0)),
    "twice": lambda peer, _: peer.buffers((peer.own, 0, 1), (peer.own, 0, 1)),
    "overlapping": lambda peer, _: peer.buffers((peer.own, 0, 2 * PAGE), (peer.own, 1, 1)),
    "good_and_bad": lambda peer, _: peer.buffers((peer.own, 0, 1), (peer.own, 9, 1)),
    "unknown_pool": lambda peer, _: peer.buffers((peer.own + 2, 0, 1)),
    "far_pool": lambda peer, _: peer.buffers((2**32 - 2 + peer.own, 0, 1)),
    # of ours
    "never_handed_over": lambda peer, out: peer.buffers((out[0], 1 - out[1], 100)),
    "other_length": lambda peer, out: peer.buffers((*out[:2], 99)),
    "back_twice": lambda peer, out: peer.buffers(out, out),
    "back_in_two_messages": lambda peer, out: (peer.buffers(out), peer.buffers(out)),
    "unknown_pool_of_ours": lambda peer, out: peer.buffers((out[0] + 2, 0, 100)),
    "back_as_a_reply_and_wrong": lambda peer, _: peer.buffers((peer.own, 9, 1), flags=REPLY),
    # notices
    "gives_back_its_own": lambda peer, _: peer.buffers((peer.own, 0, 1), flags=NOTICE),
    "gives_back_twice": lambda peer, out: peer.buffers(out, out, flags=NOTICE),
    "gives_back_another_length": lambda peer, out: peer.buffers((*out[:2], 1), flags=NOTICE),
    "gives_back_what_it_never_had": lambda peer, out: peer.buffers(
        (out[0], 1 - out[1], 1), flags=NOTICE
    ),
    "gives_back_of_an_unknown_pool": lambda peer, out: peer.buffers(
        (out[0] + 2, 0, 100), flags=NOTICE
    ),
    "gives_back_with_data": lambda peer, out: peer.buffers(out, data=b"data", flags=NOTICE),
    "gives_back_in_a_reply": lambda peer, out: peer.buffers(out, flags=NOTICE | REPLY),
    # frames
    "more_than_there_are": lambda peer, out: peer.frame(
        struct.pack("<IIQ", *out), kind=KIND_BUFFER, zero=2
    ),
    "most_and_none": lambda peer, _: peer.frame(b"", kind=KIND_BUFFER, zero=255),
    "none": lambda peer, _: peer.frame(b"0123456789012345", kind=KIND_BUFFER),
    "number_with_a_plain_message": lambda peer, _: peer.frame(bytes(16), zero=1),
    "notice_without_buffers": lambda peer, _: peer.frame(bytes(16), flags=NOTICE),
    "unknown_kind": lambda peer, _: peer.frame(bytes(16), kind=3, zero=1),
    # pools in the ring
    "closes_an_unknown_pool": lambda peer, _: peer.frame(news(peer.own + 2), kind=KIND_POOL),
    "closes_ours": lambda peer, out: peer.frame(news(out[0]), kind=KIND_POOL),
    "closes_twice": lambda peer, _: [
        peer.frame(news(peer.own), kind=KIND_POOL) for _ in range(2)
    ],
    "uses_what_it_closed": lambda peer, _: (
        peer.frame(news(peer.own), kind=KIND_POOL),
        peer.buffers((peer.own, 0, 1)),
    ),
    "opens_one_in_the_ring": lambda peer, _: peer.frame(
        news(peer.own + 2, PAGE), kind=KIND_POOL
    ),
    "says_too_little": lambda peer, _: peer.frame(news(peer.own)[:-1], kind=KIND_POOL),
    "says_too_much": lambda peer, _: peer.frame(news(peer.own) + b"\0", kind=KIND_POOL),
    "not_zero": lambda peer, _: peer.frame(news(peer.own, reserved=1), kind=KIND_POOL),
    "number_of_pools": lambda peer, _: peer.frame(news(peer.own), kind=KIND_POOL, zero=1),
}


@roles
@ways
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_bad_claim(name, role, receiving, fault):
    """What came before it is received, and it is a breach of the rules."""
    async with sharing(role, name, receiving) as (link, peer, out, received, closed):
        peer.frame(b"good")
        fault(peer, out)
        peer.publish()
        peer.ring()
        if receiving == "await":
            assert (await link.receive()).data == b"good"
            with pytest.raises(ProtocolError, match=link.url):
                while True:  # what was good of the fault
                    await link.receive()
        error = await closed
        assert_closed_by_breach(link, error)
        assert receiving == "await" or received[0] == b"good"


@roles
@ways
async def test_good_claims(name, role, receiving):
    """The same by hand, and right."""
    async with sharing(role, name, receiving) as (link, peer, out, received, closed):
        peer.buffers((peer.own, 0, 1), (peer.own, 1, 3 * PAGE), data=b"two")
        peer.buffers(out, flags=NOTICE)
        peer.publish()
        peer.ring()
        if receiving == "await":
            message = await link.receive()
            assert [len(buffer) for buffer in message.buffers] == [1, 3 * PAGE]
            for buffer in message.buffers:
                buffer.free()
        else:
            while received != [b"two"]:
                await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        given = b"".join(data for kind, flags, data in peer.frames() if flags == NOTICE)
        assert sorted(struct.iter_unpack("<IIQ", given)) == [
            (peer.own, 0, 1),
            (peer.own, 1, 3 * PAGE),
        ]
        peer.buffers((peer.own, 0, 4 * PAGE), data=b"again")
        peer.frame(news(peer.own), kind=KIND_POOL)
        peer.publish()
        peer.set_state(1)
        peer.ring()
        if receiving == "await":
            assert (await link.receive()).data == b"again"
            await link.aclose()
        assert await closed is None


def file_of(size):
    fd = os.open("/tmp", os.O_TMPFILE | os.O_RDWR, 0o600)
    os.ftruncate(fd, size)
    return fd


def sends(data, *fds):
    def act(peer):
        raw_peer.send(peer.sock, data, fds)
        for fd in fds:
            os.close(fd)

    return act


def pool_record(peer, number=None, size=PAGE, fds=None, **fields):
    fds = [sealed_memory(size)] if fds is None else fds
    number = peer.own if number is None else number
    raw_peer.send(peer.sock, record(POOL, pool=number, ring_size=size, **fields), fds)
    for fd in fds:
        os.close(fd)


BAD_RECORDS = {
    "our_number": lambda peer: pool_record(peer, 3 - peer.own),
    "number_twice": lambda peer: [pool_record(peer) for _ in range(2)],
    "number_goes_back": lambda peer: [pool_record(peer, peer.own + n) for n in (4, 2)],
    "no_file": lambda peer: pool_record(peer, fds=[]),
    "two_files": lambda peer: pool_record(peer, fds=[sealed_memory(PAGE) for _ in range(2)]),
    "no_size": lambda peer: pool_record(peer, size=0),
    "half_a_page": lambda peer: pool_record(peer, size=PAGE // 2),
    "too_small": lambda peer: pool_record(peer, size=2 * PAGE, fds=[sealed_memory(PAGE)]),
    "too_large": lambda peer: pool_record(peer, size=PAGE, fds=[sealed_memory(2 * PAGE)]),
    "largest": lambda peer: pool_record(peer, size=-PAGE % 2**64, fds=[sealed_memory(PAGE)]),
    "not_sealed": lambda peer: pool_record(peer, fds=[raw_peer.memory(PAGE)]),
    "can_be_shrunk": lambda peer: pool_record(peer, fds=[sealed_memory(PAGE, 4)]),
    "can_grow": lambda peer: pool_record(peer, fds=[sealed_memory(PAGE, 2)]),
    "no_memory": lambda peer: pool_record(peer, fds=[file_of(PAGE)]),
    "magic": lambda peer: pool_record(peer, magic=1),
    "version": lambda peer: pool_record(peer, version=2),
    "features": lambda peer: pool_record(peer, features=1 << 40),
    "nobody_asked": lambda peer: sends(record(MAPPED, pool=1 - peer.own))(peer),
    "answers_itself": lambda peer: sends(record(MAPPED, pool=peer.own))(peer),
    "answers_with_a_file": lambda peer: sends(record(MAPPED), sealed_memory(PAGE))(peer),
    "hello_again": sends(record(HELLO)),
    "attach_again": sends(record(ATTACH)),
    "half_a_record": sends(record(POOL)[:50]),
    "garbage": sends(b"k" * 200),
    "garbage_with_a_file": lambda peer: sends(b"\2", sealed_memory(PAGE))(peer),
    "bells_with_files": lambda peer: sends(b"\1\1\2", *(sealed_memory(PAGE) for _ in range(9)))(
        peer
    ),
}


@roles
@pytest.mark.parametrize("fault", BAD_RECORDS.values(), ids=BAD_RECORDS)
async def test_bad_record(name, role, fault):
    async with attacked(role, name, features=FEATURE_POOLS) as (link, peer, _, closed):
        peer.send(b"good")
        fault(peer)
        assert (await link.receive()).data == b"good"
        with pytest.raises(ProtocolError):
            await link.receive()
        assert isinstance(await closed, ProtocolError)


@roles
async def test_more_pools_than_there_may_be(name, role):
    """Refused, and else as good as before; one that is closed makes room."""
    async with attacked(role, name, features=FEATURE_POOLS) as (link, peer, _, closed):
        for number in range(66):
            pool_record(peer, peer.own + 2 * number)
            answer, _fds = await asyncio.to_thread(raw_peer.receive, peer.sock)
            assert answer.status == (errno.ENOBUFS if number >= 64 else 0)
        peer.frame(news(peer.own), kind=KIND_POOL)
        peer.publish()
        pool_record(peer, peer.own + 200)
        answer, _fds = await asyncio.to_thread(raw_peer.receive, peer.sock)
        assert answer.status == 0
        peer.set_state(1)
        peer.ring()
        assert await closed is None
        assert link.closed


@roles
@pytest.mark.parametrize(
    ("size", "there"), [(2 * PAGE, 0), (2 * PAGE, PAGE), (1 << 36, PAGE), (1 << 46, 0)]
)
async def test_memory_that_is_not_all_there(name, role, size, there):
    """Holes cost who passes them nothing: refused, before anything is kept for their pages."""
    problems = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: problems.append(what))
    async with attacked(role, name, features=FEATURE_POOLS) as (link, peer, _, closed):
        fd = raw_peer.memory(size, seals=True)
        if there:
            os.posix_fallocate(fd, 0, there)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        pool_record(peer, size=size, fds=[fd])
        answer, _fds = await asyncio.to_thread(raw_peer.receive, peer.sock)
        assert (answer.step, answer.pool, answer.status) == (MAPPED, peer.own, errno.ENOMEM)
        pool_record(peer, peer.own + 2)
        answer, _fds = await asyncio.to_thread(raw_peer.receive, peer.sock)
        assert (answer.pool, answer.status) == (peer.own + 2, 0)
        peer.set_state(1)
        peer.ring()
        assert await closed is None
        assert link.closed
    assert problems == []


@roles
async def test_asks_and_never_reads_the_answers(name, role):
    async with attacked(role, name, features=FEATURE_POOLS) as (_link, peer, _, closed):
        peer.sock.setblocking(False)
        fd = sealed_memory(PAGE)
        files = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        number = peer.own
        with suppress(BrokenPipeError, ConnectionResetError):
            while not closed.done():
                with suppress(BlockingIOError):
                    peer.sock.sendmsg([record(POOL, pool=number, ring_size=PAGE)], files)
                    number += 2
                await asyncio.sleep(0)
        os.close(fd)
        assert type(await closed) is ProtocolError


@roles
async def test_a_peer_that_does_not_map(name, role):
    async with attacked(role, name, features=FEATURE_POOLS) as (link, peer, _, closed):
        opening = asyncio.ensure_future(open_pool(link, PAGE))
        await asyncio.to_thread(peer.mapped, errno.ENOMEM)
        with pytest.raises(TransportError, match="cannot map the pool") as caught:
            await opening
        assert caught.value.errno == errno.ENOMEM
        peer.set_state(1)
        peer.ring()
        assert await closed is None


@roles
async def test_a_peer_that_never_answers(name, role):
    """Opening ends with the link."""
    async with attacked(role, name, features=FEATURE_POOLS) as (link, peer, _, closed):
        opening = asyncio.ensure_future(open_pool(link, PAGE))
        told, fds = await asyncio.to_thread(raw_peer.receive, peer.sock)
        assert (told.step, told.ring_size) == (POOL, PAGE)
        for fd in fds:
            os.close(fd)
        await link.aclose()
        with pytest.raises(KucommsError):
            await opening
        assert await closed is None


@roles
async def test_bells_around_records(name, role):
    """Whoever rings by bytes rings between records, too."""
    async with attacked(role, name, features=FEATURE_POOLS) as (link, peer, _, closed):
        for number in range(10):
            peer.sock.send(b"\1" * number)
            pool_record(peer, peer.own + 2 * number)
            peer.sock.send(b"\1")
        for number in range(10):
            answer, _fds = await asyncio.to_thread(raw_peer.receive, peer.sock)
            assert (answer.pool, answer.status) == (peer.own + 2 * number, 0)
        peer.buffers((peer.own + 6, 0, 5))
        peer.publish()
        peer.ring()
        assert len((await link.receive()).buffers) == 1
        peer.set_state(1)
        peer.ring()
        assert await closed is None


async def test_a_pool_right_behind_the_rendezvous(name):
    """Its record is there before the last one of the rendezvous was read."""
    async with Endpoint("listener") as endpoint:
        opened = asyncio.get_running_loop().create_future()
        endpoint.on_link_open(opened.set_result)
        await endpoint.listen(f"shm://{name}", ring_size=PAGE)
        peer = await asyncio.to_thread(
            connect_by_hand, name, attach=b"", features=FEATURE_POOLS
        )
        raw_peer.send(peer.sock, record(ATTACH))
        pool_record(peer)
        answer, _ = await asyncio.to_thread(raw_peer.receive, peer.sock)
        assert (answer.step, answer.status) == (MAPPED, 0)
        link = await opened
        peer.buffers((peer.own, 0, 5))
        peer.publish()
        peer.ring()
        assert len((await link.receive()).buffers[0]) == 5
        peer.close()
