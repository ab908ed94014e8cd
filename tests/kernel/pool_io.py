# SPDX-License-Identifier: MIT
"""A process with I/O under way on pages of pools; the tests kill it, see test_pool.py.

``python -m tests.kernel.pool_io DEVICE ENGINE HOW``: writes OLD from a pool to the block device,
and reads from it into the pool, both with O_DIRECT, and never sees the end of either. HOW:
``held`` the pool and the channel stay open; ``let_go`` all is unmapped and closed at once, so
nothing but the I/O holds the pages.
"""

import os
import struct
import subprocess
import sys
import threading
import time

from kucomms._core import Uring, lib
from tests.kernel.pool_device import PoolDevice, close_pool
from tests.kernel.raw_device import PAGE, PATIENCE

PAGES = 16
"""Of the device, first those that are written, then those that are read."""
OLD, DISK = b"o", b"d"
WRITTEN = PAGES * PAGE
SIZE = 2 * WRITTEN

_ENTRY = struct.Struct("=BBHiQQIIQHHiQQ")  # struct io_uring_sqe


def transfers(pool):
    """(whether it writes, address, offset) of each."""
    for page in range(PAGES):
        yield True, pool.at + page * PAGE, page * PAGE
        yield False, pool.at + (PAGES + page) * PAGE, (PAGES + page) * PAGE


def by_threads(fd, pool):
    views = []
    for writes, at, offset in transfers(pool):
        view = pool.view((at - pool.at) // PAGE, PAGE)
        call = os.pwritev if writes else os.preadv
        thread = threading.Thread(target=call, args=(fd, [view], offset), daemon=True)
        thread.start()
        views.append(view)
    return views


def by_uring(fd, pool):
    ring = Uring(2 * PAGES, 4 * PAGES)
    entries = b"".join(
        _ENTRY.pack(
            lib.IORING_OP_WRITE if writes else lib.IORING_OP_READ,
            *(0, 0, fd, offset, at, PAGE, 0, 0, 0, 0, 0, 0, 0),
        )
        for writes, at, offset in transfers(pool)
    )
    completions = bytearray(16 * 4 * PAGES)
    done, _ = ring.turn(entries, 2 * PAGES, completions, 4 * PAGES)
    assert done == 0, completions[:16]
    return ring


def in_flight(device):
    """Transfers that dm-delay keeps: as it counts them, and not the block layer, see its status."""
    status = subprocess.run(["dmsetup", "status", device], check=True, capture_output=True)
    _begin, _length, target, *counts = status.stdout.split()
    assert target == b"delay"
    return sum(map(int, counts))


def main():
    device, engine, how = sys.argv[1:]
    fd = os.open(device, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    channel = PoolDevice()
    pool = channel.open_pool(SIZE)
    pool.write(0, OLD * SIZE)
    keep = (by_uring if engine == "uring" else by_threads)(fd, pool)
    give_up = time.monotonic() + PATIENCE
    while in_flight(device) < 2 * PAGES:
        assert time.monotonic() < give_up, in_flight(device)
        os.sched_yield()
    if how == "let_go":
        assert close_pool(channel.fd, pool.number) == 0
        channel.close()
    print("under way", flush=True)
    threading.Event().wait()
    del keep


if __name__ == "__main__":
    main()
