# SPDX-License-Identifier: MIT
"""Opening a pool: what is refused, and how it is said."""

import errno
import mmap
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest

import kucomms
from kucomms import TransportError, UsageError
from kucomms._pool_memory import PoolMemory
from tests.pool.test_handing_over import linked, settled
from tests.transports.processes import descriptors
from tests.transports.test_rendezvous import descriptors_left

pytestmark = pytest.mark.asyncio

PAGE = mmap.PAGESIZE


@pytest.fixture(params=["inproc", "shm"])
def scheme(request):
    return request.param


@contextmanager
def limited(what, limit):
    limits = resource.getrlimit(what)
    resource.setrlimit(what, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, limits)


def address_space():
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE


async def test_no_memory_for_what_is_kept_of_the_peers_pool(scheme):
    """An errno for the peer, and the link goes on."""
    async with linked(scheme) as (link, other):
        memory = PoolMemory.create(1 << 44)
        connection = other._connection
        with limited(resource.RLIMIT_AS, address_space() + (1 << 30)):  # and 4 GiB are wanted
            assert connection.pool_opened(1 - connection.side, memory) == errno.ENOMEM
        memory.close()
        async with await link.open_pool(PAGE) as pool:
            await link.send(b"", buffers=pool.allocate(1))
            (buffer,) = (await other.receive()).buffers
            buffer.free()


async def problem_of(opening):
    """Why it cannot be opened, or None."""
    try:
        pool = await opening
    except Exception as error:
        return error
    await pool.aclose()
    return None


async def test_no_descriptors(engine, scheme):
    """Wherever they run out: what is wrong, at which link, what to do; and nothing is left."""
    async with linked(scheme) as (link, _other):
        assert await problem_of(link.open_pool(PAGE)) is None
        before = descriptors()
        for opener, name in ((link.open_pool, link.url), (kucomms.open_pool, "")):
            found = []
            for count in range(20):
                with descriptors_left(count):
                    found.append(await problem_of(opener(PAGE)))
                await settled(lambda: descriptors() == before)
            assert found[0] is not None
            assert found[-1] is None
            for error in filter(None, found):
                assert type(error) is TransportError
                assert error.errno == errno.EMFILE
                assert name in str(error)
                assert "ulimit -n" in str(error)
                assert "fewer" not in str(error)
        assert not link.closed


async def test_no_descriptors_for_transfers_with_the_peers_pool(scheme, pipe, monkeypatch):
    os.write(pipe[1], b"k")
    monkeypatch.setenv("KUCOMMS_IO", "threads")
    async with linked(scheme) as (link, other), await link.open_pool(PAGE) as pool:
        await link.send(b"", buffers=pool.allocate(1))
        with (await other.receive()).buffers[0] as buffer:
            with descriptors_left(0):
                error = await problem_of(buffer.pool.read(pipe[0], buffer))
            assert type(error) is TransportError
            assert "ulimit -n" in str(error)
            assert await buffer.pool.read(pipe[0], buffer) == 1


async def test_contiguous_memory_is_the_kernels(scheme):
    """(How it is had: kernel/test_pool.py.)"""
    async with linked(scheme) as (link, _other):
        with pytest.raises(UsageError, match=f"{link.url}: .* kernel://"):
            link.open_pool(PAGE, contiguous=True)


async def test_opened_once():
    opening = kucomms.open_pool(PAGE)
    async with opening as pool:
        with pytest.raises(UsageError, match="before"):
            await opening.__aenter__()
        with pytest.raises(UsageError, match="before"):
            await opening
        assert not pool.closed
    assert pool.closed


async def test_connected_once():
    async with kucomms.Endpoint("listener") as endpoint:
        await endpoint.listen("inproc://once")
        connecting = kucomms.connect("inproc://once")
        async with connecting as link:
            with pytest.raises(UsageError, match="before"):
                await connecting
            assert not link.closed
            assert len(endpoint.links) == 1
        assert link.closed
