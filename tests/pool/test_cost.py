# SPDX-License-Identifier: MIT
"""What handing over a buffer costs does not depend on its size.

How long it takes is measured by bench/pool.py; here is counted what that is made of.
"""

import gc
import sys
from contextlib import contextmanager

import pytest

from tests.pool.test_handing_over import linked

pytestmark = pytest.mark.asyncio

MIB = 1 << 20
HEADER, NAMED = 32, 16
"""Bytes of a frame, and of what names one buffer in it."""


@pytest.fixture(params=["inproc", "shm"])
def scheme(request):
    return request.param


@contextmanager
def counted(calls):
    """Append how often anything is called."""
    found = 0

    def count(_frame, event, _argument):
        nonlocal found
        found += event in ("call", "c_call")

    gc.disable()
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)
        gc.enable()
        calls.append(found)


async def test_the_size_costs_nothing(scheme):
    """There, back in a message, there again and given back: frames, their bytes, calls."""
    async with linked(scheme) as (link, other), await link.open_pool(2 * MIB) as pool:
        calls = []
        for size in (64, 64, MIB):  # what is the first of its kind costs more
            with counted(calls):
                buffer = pool.allocate(size)
                link.send_nowait(b"", buffers=buffer)
                there = link.tx_avail
                message = other.receive_nowait()
                other.send_nowait(b"", buffers=message.buffers)
                back = other.tx_avail
                link.send_nowait(b"", buffers=link.receive_nowait().buffers)
                again = link.tx_avail
                other.receive_nowait().buffers[0].free()
                given_back = other.tx_avail
            assert [there, back, again, given_back] == [HEADER + NAMED] * 4
            pool.allocate(2 * MIB).free()  # which sees what was given back
        assert calls[1] == calls[2] > 20
