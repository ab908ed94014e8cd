# SPDX-License-Identifier: MIT
# ruff: noqa: ASYNC110, ASYNC230, ASYNC240
"""What ends while transfers are under way: tasks, buffers, pools, links, loops, processes."""

import asyncio
import errno
import gc
import mmap
import os
import random
import subprocess
import sys
import tempfile
from contextlib import suppress

import pytest
import uvloop

import kucomms
from kucomms import ClosedError, Completion, PeerClosedError, PoolFull, UsageError, open_pool
from tests.pool.conftest import of_pools, turns
from tests.transports.processes import in_child

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("engine")]

PAGE = mmap.PAGESIZE


async def nothing_in_flight(pool):
    async with asyncio.timeout(20):
        while pool.statistics().in_flight:
            await asyncio.sleep(0)


async def test_a_cancelled_await_ends_the_transfer(pipe):
    async with open_pool(PAGE) as pool:
        with pool.allocate(10) as buffer:
            task = asyncio.create_task(pool.read(pipe[0], buffer))
            await turns()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await nothing_in_flight(pool)
            statistics = pool.statistics()
            assert (statistics.completed, statistics.cancelled) == (1, 1)
            os.write(pipe[1], b"for the next one")
            assert await pool.read(pipe[0], buffer) == 10
            assert bytes(buffer.data) == b"for the ne"


async def test_cancelled_before_it_began(pipe):
    os.write(pipe[1], b"stays")
    async with open_pool(PAGE) as pool:
        with pool.allocate(10) as buffer:
            pool.submit_read(pipe[0], buffer, tag="never").cancel()
            found = [completion async for completion in pool.completions()]
            assert found == [Completion("never", 0, errno.ECANCELED)]
            assert await pool.read(pipe[0], buffer) == 5


async def test_cancelling_one_of_many_leaves_the_others(pipe):
    async with open_pool(PAGE) as pool:
        with pool.allocate(10) as buffer:
            transfers = [pool.submit_read(pipe[0], (buffer, at, 1), tag=at) for at in range(10)]
            await turns()
            for transfer in transfers[::2]:
                transfer.cancel()
                transfer.cancel()
            os.write(pipe[1], b"abcde")
            found = {one.tag: (one.result, one.errno) async for one in pool.completions()}
            assert len(found) == 10
            assert all(found[tag] == (0, errno.ECANCELED) for tag in range(0, 10, 2))
            assert all(found[tag] == (1, 0) for tag in range(1, 10, 2))
            transfers[1].cancel()  # too late, and fine


async def test_a_buffer_freed_in_flight_is_not_handed_out_before_the_end(pipe):
    async with open_pool(PAGE) as pool:
        with pool.allocate(10) as buffer:
            pool.submit_read(pipe[0], buffer)
            await turns()
        with pytest.raises(PoolFull):
            pool.allocate(1)
        waiting = asyncio.create_task(pool.allocate_when_room(1))
        await turns()
        assert not waiting.done()
        os.write(pipe[1], b"x")
        (await asyncio.wait_for(waiting, 10)).free()
        assert pool.statistics().in_flight == 0


async def test_a_cancelled_task_frees_its_buffer_but_not_before_the_end(pipe):
    async with open_pool(PAGE) as pool:

        async def read():
            with pool.allocate(PAGE) as buffer:
                await pool.read(pipe[0], buffer)

        task = asyncio.create_task(read())
        await turns()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while True:  # no turn between seeing it in flight and finding no room
            if not pool.statistics().in_flight:
                break
            with pytest.raises(PoolFull):
                pool.allocate(1)
            await asyncio.sleep(0)
        pool.allocate(PAGE).free()


async def test_a_buffer_nobody_refers_to_lives_as_long_as_its_transfer(pipe):
    async with open_pool(PAGE) as pool:
        with pool.allocate(10) as buffer:
            pool.submit_read(pipe[0], buffer, tag=1)
        del buffer
        gc.collect()
        os.write(pipe[1], b"x")
        assert [one.result async for one in pool.completions()] == [1]
        pool.allocate(PAGE).free()


async def test_closing_cancels_and_waits(pipe):
    pool = await open_pool(1 << 20)
    buffer = pool.allocate(100)
    awaited = asyncio.create_task(pool.read(pipe[0], (buffer, 0, 10)))
    for tag in range(3):
        pool.submit_read(pipe[0], (buffer, 10 + tag, 1), tag=tag)
    await turns()
    await pool.aclose()
    assert pool.statistics().in_flight == 0
    with pytest.raises(ClosedError):
        await awaited
    found = [completion async for completion in pool.completions()]
    assert sorted(one.tag for one in found) == [0, 1, 2]
    assert {one.errno for one in found} == {errno.ECANCELED}
    with pytest.raises(ClosedError):
        await pool.read(pipe[0], buffer)
    os.write(pipe[1], b"nobody reads this into memory that is gone")
    assert os.read(pipe[0], 6) == b"nobody"


async def test_closing_waits_for_what_cannot_be_cancelled(tmp_path):
    """Writes to a file, as many as are needed so that some are under way."""
    size = 4 << 20
    with open(tmp_path / "file", "wb") as file:
        async with open_pool(size) as pool:
            buffer = pool.allocate(size)
            buffer.data[:] = b"x" * size
            for number in range(16):
                pool.submit_write(file, buffer, number * size, tag=number)
            await turns(2)
        assert pool.statistics().in_flight == 0
        found = {one.tag: one async for one in pool.completions()}
        assert len(found) == 16
        for number, one in found.items():
            written = os.path.getsize(file.name) >= (number + 1) * size
            assert (one.result, one.errno) == (size, 0) or one.errno == errno.ECANCELED
            assert written or one.errno


async def test_closing_goes_on_when_its_await_is_cancelled(pipe):
    pool = await open_pool(PAGE)
    with pool.allocate(1) as buffer:
        pool.submit_read(pipe[0], buffer)
    closing = asyncio.create_task(pool.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.gather(closing, return_exceptions=True)
    await pool.aclose()
    assert pool.statistics().in_flight == 0


async def test_a_link_closes_its_pools(pipe):
    async with kucomms.Endpoint("server") as server:
        await server.listen("inproc://pool")
        async with kucomms.connect("inproc://pool") as link:
            other = await link.open_pool(PAGE)
            await other.aclose()
            pool = await link.open_pool(PAGE, quota=PAGE)
            with pool.allocate(1) as buffer:
                pool.submit_read(pipe[0], buffer)
                await turns()
                await link.aclose()
                assert pool.closed
                assert pool.statistics().in_flight == 0
            with pytest.raises(ClosedError):
                await link.open_pool(PAGE)


async def test_a_peer_that_leaves_closes_the_pools_of_the_link():
    async with kucomms.Endpoint("server") as server:
        await server.listen("inproc://pool")
        async with kucomms.connect("inproc://pool") as link, link.open_pool(PAGE) as pool:
            await server.aclose()
            await link.wait_closed()
            with pytest.raises(PeerClosedError, match=link.url):
                pool.allocate(1)


async def test_an_endpoint_that_closes_waits_for_its_links_pools(tmp_path):
    size = 4 << 20
    with open(tmp_path / "file", "wb") as file:
        async with kucomms.Endpoint("server") as server:
            await server.listen("inproc://pool")
            async with kucomms.Endpoint("client") as client:
                link = await client.connect("inproc://pool")
                pool = await link.open_pool(size)
                with pool.allocate(size) as buffer:
                    for number in range(16):
                        pool.submit_write(file, buffer, number * size)
                await turns(2)
            assert pool.statistics().in_flight == 0


async def test_a_forked_child_gets_errors_and_harms_nobody(pipe):
    before = of_pools("io_uring")
    async with open_pool(PAGE) as pool:
        with pool.allocate(10) as buffer:
            buffer.data[:5] = b"ours!"
            view, part = buffer.data, buffer.data[:]
            reading = asyncio.create_task(pool.read(pipe[0], (buffer, 5, 5)))
            await turns()

            def child():
                assert bytes(part) == bytes(10)
                part[0] = 1  # its own
                for use in (
                    lambda: pool.allocate(1),
                    lambda: buffer.data,
                    lambda: pool.submit_read(pipe[0], buffer),
                    lambda: pool.aclose().send(None),
                ):
                    with pytest.raises(UsageError, match="fork"):
                        use()
                with pytest.raises(ValueError, match="released"):
                    view[0]
                assert of_pools("io_uring") <= before

            await in_child(child)
            part.release()
            os.write(pipe[1], b"after")
            assert await asyncio.wait_for(reading, 10) == 5
            assert bytes(buffer.data) == b"ours!after"


PROGRAM = """
import asyncio, gc, os, sys, uvloop, warnings
import kucomms
warnings.simplefilter("ignore", ResourceWarning)
views = []

async def main():
    pool = await kucomms.open_pool(1 << 20)
    buffer = pool.allocate(100)
    views.append(buffer.data[:])
    read, write = os.pipe()
    if "in flight" in sys.argv:
        pool.submit_read(read, buffer, tag=1)
        pool.submit_write(os.open("/dev/null", os.O_WRONLY), buffer, tag=2)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    return write

loop = uvloop.new_event_loop() if "uvloop" in sys.argv else asyncio.new_event_loop()
write = loop.run_until_complete(main())
loop.close()
del loop
gc.collect()
views[0][:5] = b"alive"
os.write(write, b"x" * 100)
assert bytes(views[0][:5]) in (b"alive", b"xxxxx")
if "no views" in sys.argv:
    views.clear()
gc.collect()
print("fine")
"""


@pytest.mark.parametrize("what", ["idle", "in flight"])
@pytest.mark.parametrize("views", ["views", "no views"])
async def test_a_loop_that_ends_without_closing(engine, what, views):
    loop = "uvloop" if isinstance(asyncio.get_running_loop(), uvloop.Loop) else "asyncio"
    result = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-X", "dev", "-c", PROGRAM, what, views, loop],
        capture_output=True, text=True, timeout=60, check=False,
    )
    assert (result.returncode, result.stdout) == (0, "fine\n"), result.stderr
    assert "Error" not in result.stderr


async def test_a_pool_that_is_forgotten_warns(engine):
    program = """
import asyncio, gc, kucomms
async def main():
    await kucomms.open_pool(1)
asyncio.run(main())
gc.collect()
"""
    result = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-W", "always", "-c", program],
        capture_output=True, text=True, timeout=60, check=False,
    )
    assert result.returncode == 0
    assert "<Pool of 4096 bytes> was never closed" in result.stderr


async def test_killed_in_flight_all_memory_comes_back(engine):
    """What the machine has as shared memory is the same after a hundred that were killed."""
    program = """
import asyncio, os, sys
import kucomms
async def main():
    async with kucomms.open_pool(16 << 20) as pool:
        buffer = pool.allocate(16 << 20)
        read, write = os.pipe()
        pool.submit_read(read, buffer)
        fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
        for number in range(8):
            pool.submit_write(fd, buffer, number << 24)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        os.kill(os.getpid(), 9)
asyncio.run(main())
"""

    def shared():
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":") for line in lines)
        return int(fields["Shmem"].split()[0]) << 10

    before = shared()
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(4):
            result = await asyncio.to_thread(
                subprocess.run,
                [sys.executable, "-c", program, f"{directory}/file"],
                timeout=60, check=False,
            )
            assert result.returncode == -9
    async with asyncio.timeout(60):
        while shared() - before > 32 << 20:  # others on the machine may have a little
            await asyncio.sleep(0)


async def test_no_buffer_is_written_by_the_transfer_of_another(pipe):
    """Random reads that are cancelled, freed or awaited, among buffers that must not change."""
    rng = random.Random(7)
    os.set_blocking(pipe[1], False)
    async with open_pool(12 * PAGE) as pool:

        async def bystander():
            stamp = rng.randbytes(PAGE)
            with await pool.allocate_when_room(PAGE) as buffer:
                buffer.data[:] = stamp
                await turns(rng.randrange(8))
                assert buffer.data == stamp

        async def reader():
            with await pool.allocate_when_room(PAGE) as buffer:
                what = rng.randrange(3)
                if what == 0:
                    pool.submit_read(pipe[0], buffer)
                elif what == 1:
                    transfer = pool.submit_read(pipe[0], buffer)
                    await turns(rng.randrange(3))
                    transfer.cancel()
                else:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(rng.random() / 1000):
                            await pool.read(pipe[0], buffer)

        async def feed():
            while True:
                with suppress(BlockingIOError):
                    os.write(pipe[1], bytes(rng.randrange(1, 2 * PAGE)))
                await asyncio.sleep(0)

        feeding = asyncio.create_task(feed())
        for _ in range(100):
            async with asyncio.TaskGroup() as group:
                for _ in range(20):
                    group.create_task(rng.choice([bystander, reader])())
        async for _ in pool.completions():
            pass
        feeding.cancel()
        await nothing_in_flight(pool)
        assert pool.statistics().allocated == 0
