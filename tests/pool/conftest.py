# SPDX-License-Identifier: MIT
"""Tests of the pool run with both engines, where the machine allows both."""

import asyncio
import ctypes
import gc
import os
import struct
from contextlib import suppress

import pytest

from kucomms import _extents


def _io_uring_works():
    """Asked of the kernel and not of the pool, whose mistakes would leave tests out."""
    setup, defer = 425, 1 << 12 | 1 << 13  # IORING_SETUP_SINGLE_ISSUER, _DEFER_TASKRUN
    parameters = struct.pack("<8I", 0, 0, defer, 0, 0, 0, 0, 0).ljust(120, b"\0")
    fd = ctypes.CDLL(None).syscall(setup, 1, ctypes.create_string_buffer(parameters, 120))
    if fd >= 0:
        os.close(fd)
    return fd >= 0


ENGINES = ["io_uring", "threads"] if _io_uring_works() else ["threads"]


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    monkeypatch.setenv("KUCOMMS_IO", request.param)
    return request.param


@pytest.fixture
def pipe():
    read, write = os.pipe()
    yield read, write
    os.close(read)
    os.close(write)


async def turns(number=20):
    """Let others do what they can do without waiting."""
    for _ in range(number):
        await asyncio.sleep(0)


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


@pytest.fixture
def collector_in_the_tables(monkeypatch):
    """The garbage collector runs whenever the tables of free pages are half updated."""
    class_of = _extents._class_of

    def collect_and_class_of(pages):
        gc.collect()
        return class_of(pages)

    gc.collect()
    gc.freeze()  # with all that is here already it would take its time
    monkeypatch.setattr(_extents, "_class_of", collect_and_class_of)


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    gc.collect()
    assert of_pools() == set()
