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


def _of_pools():
    """What the process has of pools: descriptors and mappings."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            target = os.readlink(f"/proc/self/fd/{fd}")
            if "kucomms_pool" in target or "io_uring" in target:
                found.add((fd, target))
    with open("/proc/self/maps") as maps:
        return found | {line for line in maps if "kucomms_pool" in line or "io_uring" in line}


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    gc.collect()
    assert _of_pools() == set()
