# SPDX-License-Identifier: MIT
"""Free pages of pools, against a model and by the clock: ``module/kucomms_extents.c`` is half.

As a program it prints the figures up to 4 GiB, the largest pool there can be: ``make extents``.
"""

import os
import random
import subprocess
import sys
import time
from enum import IntEnum, auto
from pathlib import Path

import pytest

from tests.kernel.pool_device import PoolDevice
from tests.kernel.raw_device import PAGE, PATIENCE, counters

SYSFS = Path("/sys/devices/virtual/kucomms/kucomms")
SEED = int(os.environ.get("KUCOMMS_SEED") or random.getrandbits(32))
SMALL, LARGE = 64 << 20, 1 << 30
FACTOR = 4
"""A pool 16 times as large may take this many times as long: a tree has four levels more."""
LIMIT = 50.0
"""Microseconds with interrupts off, on a processor that is not emulated."""


class Do(IntEnum):
    """The types of messages that the module knows."""

    RANDOM = 0
    TIME = auto()


class Pattern(IntEnum):
    """How a pool is fragmented."""

    EVERY_SECOND = 0
    SOME = auto()
    ALL = auto()


class Wrong(IntEnum):
    """What the model says."""

    NOTHING = 0
    NOT_FOUND = auto()
    FOUND_ANYWAY = auto()
    OVERLAPS = auto()
    NOT_THE_BEST = auto()
    NOT_JOINED = auto()
    NO_MEMORY = auto()


@pytest.fixture(scope="module", autouse=True)
def module(load, unload):
    load("kucomms")
    (SYSFS / "create_device").write_text("kucomms_extents")
    load("kucomms_extents")
    yield
    unload("kucomms_extents")
    (SYSFS / "remove_device").write_text("kucomms_extents")
    unload("kucomms")


@pytest.fixture
def device():
    with PoolDevice("extents") as device:
        yield device


def wait_until(condition):
    """Emulated, a pool of a million pages takes a minute to fill."""
    give_up = time.monotonic() + 10 * PATIENCE
    while not condition():
        assert time.monotonic() < give_up
        os.sched_yield()


def longest(device, size, pattern, batches=20):
    """Microseconds of an allocation, of one that fails, and of a free."""
    device.ask(Do.TIME, size // PAGE, pattern, batches)
    wait_until(lambda: device.available != device.consumed)
    times = [number / 1000 for number in device.message()[0].numbers]
    # So that there is memory for the next pool.
    wait_until(lambda: counters()["pages"] <= 2 * device.side_size // PAGE)
    return times


@pytest.mark.parametrize("pages", [1, 2, 3, 64, 1000])
def test_free_pages_are_as_in_a_model(device, pages):
    """Nothing overlaps, what fits is found, the best fit is taken, and all is joined again."""
    steps = 20_000
    device.ask(Do.RANDOM, pages, steps, SEED)
    wrong, step = device.message()[0].numbers
    assert (Wrong(wrong), step) == (Wrong.NOTHING, steps), f"KUCOMMS_SEED={SEED}"


@pytest.mark.parametrize("pattern", Pattern)
def test_the_time_does_not_grow_with_the_pages(device, pattern, capsys):
    small = longest(device, SMALL, pattern)
    large = longest(device, LARGE, pattern)
    with capsys.disabled():
        print(f"\n{pattern.name}: {small} and {large} µs, allocation, failure, free")
    assert all(times > 0 for times in small + large)
    for few, many in zip(small, large, strict=True):
        assert many < FACTOR * few, (small, large)


def main():
    """Print the figures. Exit code 1: one is too long even where the guest is not emulated."""
    subprocess.run(["modprobe", "kucomms"], check=True)
    (SYSFS / "create_device").write_text("kucomms_extents")
    subprocess.run(["modprobe", "kucomms_extents"], check=True)
    failed = False
    with PoolDevice("extents") as device:
        for size in (SMALL, LARGE, 4 * LARGE):
            for pattern in Pattern:
                times = longest(device, size, pattern, batches=200)
                allocate, fail, free = times
                print(
                    f"{size >> 20} MiB, {pattern.name:12}: allocation {allocate:.1f} µs, "
                    f"failure {fail:.1f} µs, free {free:.1f} µs",
                    flush=True,
                )
                failed |= max(times) > LIMIT
    sys.exit(failed)


if __name__ == "__main__":
    main()
