# SPDX-License-Identifier: MIT
"""Much traffic between two processes: nothing lost, doubled, damaged or out of order."""

import asyncio
import os
import statistics
import sys
import threading
import time
from contextlib import asynccontextmanager

import pytest

import kucomms
from kucomms import Endpoint
from kucomms.testing import cancel_storm
from tests.transports.harnesses import HARNESSES, Shm
from tests.transports.volume import Checker, exchange


@asynccontextmanager
async def peer_process(url, *arguments):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.transports.volume", url, *map(str, arguments),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert await process.stdout.readline() == b"ready\n"
        yield
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.asyncio
async def test_a_million_each_way():
    await both_ways(1_000_000, 0)


@pytest.mark.asyncio(loop_factories=["uvloop"])  # for want of time
async def test_from_the_loop_and_two_threads_at_once():
    """With KUCOMMS_ALL=1 a million each way."""
    await both_ways(333_400 if os.environ.get("KUCOMMS_ALL") else 60_000, 2)


async def both_ways(count, threads):
    """Exchange messages at once with another process, which checks what it gets too."""
    url = Shm().new_url()
    checker = Checker(threads + 1, count)
    async with peer_process(url, count, threads):
        endpoint = Endpoint("volume", on_message=checker.message)
        async with endpoint:
            link = await endpoint.connect(url, timeout=30.0)
            await exchange(link, checker, count, threads)
            assert link.statistics().messages_sent == (threads + 1) * count + 1
    assert checker.wrong == 0
    assert checker.peer_wrong == 0
    assert checker.following == [count] * (threads + 1)


@pytest.mark.asyncio
@pytest.mark.parametrize("transport", HARNESSES)
async def test_ten_thousand_cancellations(transport):
    """Cancelling at random, 10,000 operations: nothing lost, nothing doubled, no task left."""
    await cancel_storm(HARNESSES[transport](), 10_000)


@pytest.mark.asyncio
async def test_beside_a_thread_that_holds_the_gil():
    """A busy Python thread takes its share of the time, and no more than that.

    The share of the loop's thread is measured, not assumed: the rate per second of
    processor time that the thread got must stay what it was.
    """
    url = Shm().new_url()
    busy = threading.Event()
    over = threading.Event()

    def spin():
        while not over.is_set():
            if busy.is_set():
                sum(range(1000))
            else:
                busy.wait(0.01)

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        async with Shm().responder(url), kucomms.connect(url, timeout=30.0) as link:

            async def rate():
                """Messages per second of this thread's processor time, and of time."""
                wall, cpu = time.monotonic(), time.thread_time()
                count = 0
                while time.monotonic() - wall < 0.5:
                    for _ in range(200):
                        await link.send(b"x" * 64, type=3)
                    count += 200
                return count / (time.thread_time() - cpu), count / (time.monotonic() - wall)

            alone, beside = [], []
            for _ in range(4):
                busy.clear()
                alone.append(await rate())
                busy.set()
                beside.append(await rate())
    finally:
        over.set()
        busy.set()
        thread.join()

    def median(values, index):
        return statistics.median(value[index] for value in values)

    # Per processor second nothing gets lost to the hand-over of the GIL ...
    assert median(beside, 0) > 0.7 * median(alone, 0)
    # ... and of the time, the share of one of two threads, not a thousandth of it.
    assert median(beside, 1) > 0.3 * median(alone, 1)
