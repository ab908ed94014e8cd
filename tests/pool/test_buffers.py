# SPDX-License-Identifier: MIT
"""Allocating and freeing buffers."""

import asyncio
import ctypes
import errno
import mmap
import os
import threading

import pytest

import kucomms
from kucomms import ClosedError, PoolFull, TransportError, UsageError, _pool_memory, open_pool
from tests.pool.conftest import of_pools

pytestmark = pytest.mark.asyncio

PAGE = mmap.PAGESIZE


def address_of(buffer):
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer.data))


async def test_a_buffer_is_writable_memory_of_its_size():
    async with open_pool(100_000) as pool:
        assert pool.size % PAGE == 0
        assert pool.size >= 100_000
        with pool.allocate(5) as buffer:
            assert len(buffer) == len(buffer.data) == 5
            buffer.data[:] = b"hello"
            assert bytes(buffer.data) == b"hello"
            assert (buffer.data.format, buffer.data.readonly) == ("B", False)
            assert pool.statistics().allocated == PAGE
        assert pool.statistics().allocated == 0


async def test_no_page_belongs_to_two_buffers():
    async with open_pool(16 * PAGE) as pool:
        buffers = [pool.allocate(size) for size in (1, PAGE, PAGE + 1, 3)]
        pages = [
            page
            for buffer in buffers
            for page in range(
                address_of(buffer) // PAGE, (address_of(buffer) + len(buffer) - 1) // PAGE + 1
            )
        ]
        assert all(address_of(buffer) % PAGE == 0 for buffer in buffers)
        assert len(set(pages)) == len(pages) == 5
        for buffer in buffers:
            buffer.free()


async def test_open_pool_can_be_awaited():
    pool = await open_pool(1)
    assert (pool.size, pool.closed) == (PAGE, False)
    await pool.aclose()
    await pool.aclose()
    assert pool.closed
    with pytest.raises(ClosedError, match="open another"):
        pool.allocate(1)


async def test_full_and_room_again():
    async with open_pool(4 * PAGE) as pool:
        first, second = pool.allocate(3 * PAGE), pool.allocate(PAGE)
        with pytest.raises(PoolFull, match="allocate_when_room") as caught:
            pool.allocate(1)
        assert isinstance(caught.value, kucomms.QueueFull)
        second.free()
        with pytest.raises(PoolFull):
            pool.allocate(PAGE + 1)
        first.free()
        pool.allocate(4 * PAGE).free()


async def test_a_quota_bounds_what_is_allocated():
    async with open_pool(8 * PAGE, quota=2 * PAGE) as pool:
        assert pool.quota == 2 * PAGE
        with pool.allocate(1), pool.allocate(PAGE), pytest.raises(PoolFull):
            pool.allocate(1)
        with pytest.raises(ValueError, match="larger pool"):
            pool.allocate(2 * PAGE + 1)


@pytest.mark.parametrize("size", [0, -1, 4 * PAGE + 1, 1 << 70])
async def test_sizes_that_can_never_be(size):
    async with open_pool(4 * PAGE) as pool:
        with pytest.raises(ValueError, match="not"):
            pool.allocate(size)
        with pytest.raises(ValueError, match="not"):
            await pool.allocate_when_room(size)


@pytest.mark.parametrize(("size", "quota"), [(0, None), (-5, None), (PAGE, 0), (PAGE, 2 * PAGE)])
async def test_pools_that_can_never_be(size, quota):
    with pytest.raises(ValueError, match="not"):
        open_pool(size, quota=quota)


async def test_waiting_for_room_is_first_come_first_served():
    async with open_pool(2 * PAGE) as pool:
        held = [pool.allocate(PAGE), pool.allocate(PAGE)]
        order = []

        async def wait(name, size):
            with await pool.allocate_when_room(size):
                order.append(name)
                await asyncio.sleep(0)

        tasks = [
            asyncio.create_task(wait("large", 2 * PAGE)), asyncio.create_task(wait("small", 1)),
            asyncio.create_task(wait("cancelled", 1)), asyncio.create_task(wait("last", 1)),
        ]
        await asyncio.sleep(0)
        tasks[2].cancel()
        held[0].free()  # room for the small ones, but the large one was first
        for _ in range(5):
            await asyncio.sleep(0)
        assert order == []
        with pytest.raises(PoolFull):
            pool.allocate(1)
        held[1].free()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == ["large", "small", "last"]


async def test_waiting_ends_when_the_pool_is_closed():
    pool = await open_pool(PAGE)
    held = pool.allocate(1)
    task = asyncio.create_task(pool.allocate_when_room(1))
    await asyncio.sleep(0)
    await pool.aclose()
    with pytest.raises(ClosedError):
        await task
    held.free()


async def test_room_made_by_another_thread_is_heard_of():
    async with open_pool(PAGE) as pool:
        buffer = pool.allocate(1)
        task = asyncio.create_task(pool.allocate_when_room(1))
        await asyncio.sleep(0)
        thread = threading.Thread(target=buffer.free)
        thread.start()
        (await asyncio.wait_for(task, 10)).free()
        thread.join()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("what", ["buffer", "view"])
async def test_what_the_collector_finds_while_pages_are_given_back(collector_in_the_tables, what):
    """Somebody waits for room: he gets it later, and the tables stay whole."""
    async with open_pool(16 * PAGE) as pool:
        buffers = [pool.allocate(PAGE) for _ in range(16)]
        waiting = asyncio.create_task(pool.allocate_when_room(16 * PAGE))
        await asyncio.sleep(0)
        for at in range(1, 16, 2):
            cycle = [buffers[at]] if what == "buffer" else [buffers[at].data[1:]]
            cycle.append(cycle)
            if what == "view":
                with pytest.raises(BufferError):
                    buffers[at].free()
            buffers[at] = cycle = None
            buffers[at - 1].free()
        (await asyncio.wait_for(waiting, 10)).free()
        assert pool.statistics().allocated == 0
        assert pool._extents.runs() == [(0, 16)]


async def test_what_the_collector_finds_in_a_pool_that_is_closed(collector_in_the_tables):
    pool = await open_pool(4 * PAGE)
    buffers = [pool.allocate(PAGE) for _ in range(4)]
    views = [buffer.data[1:] for buffer in buffers]
    await pool.aclose()
    for at in (1, 3):
        cycle = [views[at]]
        cycle.append(cycle)
        views[at] = cycle = None
        views[at - 1] = None
    assert of_pools() == set()


async def test_freed_twice_is_fine_and_used_after_it_is_not():
    async with open_pool(PAGE) as pool:
        buffer = pool.allocate(10)
        data = buffer.data
        buffer.free()
        buffer.free()
        with pytest.raises(UsageError, match="after it was freed"):
            buffer.data  # noqa: B018
        with pytest.raises(ValueError, match="released"):
            data[0]
        with pool.allocate(PAGE):
            buffer.free()  # not the one that has its bytes now
            assert pool.statistics().allocated == PAGE


async def test_a_slice_that_survives_keeps_the_bytes():
    async with open_pool(PAGE) as pool:
        with pytest.raises(BufferError, match="outlived"), pool.allocate(10) as buffer:
            survivor = buffer.data[2:4]
        with pytest.raises(PoolFull):
            pool.allocate(1)
        survivor[:] = b"ok"
        survivor.release()
        pool.allocate(PAGE).free()


async def test_an_exception_hides_that_a_slice_survives():
    async with open_pool(PAGE) as pool:
        with pytest.raises(ZeroDivisionError), pool.allocate(10) as buffer:  # noqa: PT012
            survivor = memoryview(buffer.data)
            raise ZeroDivisionError
        with pytest.raises(PoolFull):
            pool.allocate(1)
        del survivor
        pool.allocate(1).free()


async def test_a_forgotten_buffer_is_freed_with_a_warning():
    async with open_pool(PAGE) as pool:
        buffer = pool.allocate(7)
        with pytest.warns(ResourceWarning, match="7 bytes> was never freed"):
            del buffer
        pool.allocate(PAGE).free()


async def test_views_outlive_the_pool():
    pool = await open_pool(PAGE)
    buffer = pool.allocate(10)
    survivor = buffer.data[:5]
    await pool.aclose()
    survivor[:] = b"alive"
    assert bytes(survivor) == b"alive"
    with pytest.raises(ClosedError):
        buffer.data  # noqa: B018
    del survivor  # and now it is unmapped, see conftest.py


async def test_a_view_that_dies_in_another_thread_unmaps_the_pool():
    pool = await open_pool(PAGE)
    buffer = pool.allocate(10)
    survivors = [buffer.data[:5]]
    await pool.aclose()
    thread = threading.Thread(target=survivors.clear)
    thread.start()
    await asyncio.to_thread(thread.join)


async def test_more_than_the_machine_has():
    with pytest.raises(TransportError, match="ask for fewer") as caught:
        await open_pool(1 << 50)
    assert caught.value.errno == errno.ENOMEM


async def test_more_than_the_cgroup_has(tmp_path, monkeypatch):
    """The files of a cgroup, as the kernel writes them; a real one would need root."""
    group = tmp_path / "outer" / "inner"
    group.mkdir(parents=True)
    for directory, limit, used in ((group, "max", 0), (group.parent, "1000000", 700000)):
        (directory / "memory.max").write_text(f"{limit}\n")
        (directory / "memory.current").write_text(f"{used}\n")
        (directory / "memory.stat").write_text(
            "anon 500000\ninactive_file 60000\nactive_file 40000\n"
        )
    own = tmp_path / "own"
    own.write_text("0::/outer/inner\n")
    assert _pool_memory._room_of_cgroup(tmp_path, own) == 400000
    own.write_text("1:name=systemd:/outer\n")
    assert _pool_memory._room_of_cgroup(tmp_path, own) == 1 << 63


async def test_memory_is_there_when_the_pool_is():
    async with open_pool(1 << 20) as pool:
        fd = pool._memory.fd
        assert os.fstat(fd).st_blocks * 512 >= 1 << 20
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)  # which would make each touch a SIGBUS


async def test_opening_a_large_pool_does_not_hold_up_the_loop():
    turns = 0

    async def others():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    async with open_pool(64 << 20):
        assert turns >= 63
    task.cancel()


async def test_other_threads_are_refused():
    async with open_pool(PAGE) as pool:
        with pytest.raises(UsageError, match="thread"):
            await asyncio.to_thread(pool.allocate, 1)


async def test_statistics_after_the_end():
    async with open_pool(PAGE) as pool:
        pool.allocate(1).free()
    statistics = pool.statistics()
    assert (statistics.allocated, statistics.size, statistics.in_flight) == (0, PAGE, 0)
