# SPDX-License-Identifier: MIT
"""Tests of the pool run with both engines, where the machine allows both."""

import asyncio
import gc
import os
from contextlib import suppress

import pytest

import kucomms


def _io_uring_works():
    async def try_it():
        async with kucomms.open_pool(1) as pool:
            return pool.statistics().engine == "io_uring"

    return asyncio.run(try_it())


ENGINES = ["io_uring", "threads"] if _io_uring_works() else ["threads"]


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    monkeypatch.setenv("KUCOMMS_IO", request.param)
    return request.param


def of_pools(*names):
    """What the process has of pools: descriptors and mappings.

    "io_uring" among the names counts those of uvloop, too.
    """
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
    with open("/proc/self/maps") as maps:
        found |= {tuple(line.split(maxsplit=5)) for line in maps}
    return {one for one in found if any(name in one[-1] for name in ("kucomms_pool", *names))}


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    gc.collect()
    assert of_pools() == set()
