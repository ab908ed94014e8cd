# SPDX-License-Identifier: MIT
"""Opening a pool: what is refused, and how it is said."""

import asyncio
import errno
import mmap
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest

from kucomms._pool_memory import PoolMemory
from tests.pool.test_handing_over import linked

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


async def test_no_memory_for_what_is_kept_of_the_peers_pool(scheme):
    """An errno for the peer, and the link goes on."""
    async with linked(scheme) as (link, other):
        memory = PoolMemory.create(1 << 44)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
        with limited(resource.RLIMIT_AS, size + (1 << 30)):  # a byte for each page is 4 GiB
            assert other._connection.pool_opened(1 - other._connection.side, memory) == errno.ENOMEM
        memory.close()
        async with await link.open_pool(PAGE) as pool:
            await link.send(b"", buffers=pool.allocate(1))
            (buffer,) = (await other.receive()).buffers
            buffer.free()
