# SPDX-License-Identifier: MIT
"""Reading and writing: what comes back, in which order, and how often."""

import asyncio
import mmap
import os
import random
import socket
import struct
from contextlib import closing
from itertools import pairwise

import pytest

from kucomms import Completion, UsageError, open_pool
from tests.pool.conftest import turns

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("engine")]

PAGE = mmap.PAGESIZE


@pytest.fixture
def file(tmp_path):
    with open(tmp_path / "file", "w+b", buffering=0) as opened:
        yield opened


async def test_the_engine_is_the_one_asked_for(engine):
    async with open_pool(1 << 20) as pool:
        statistics = pool.statistics()
        assert statistics.engine == engine
        if engine == "threads":
            assert "KUCOMMS_IO" in statistics.engine_reason
            assert statistics.registered == 0
        else:
            assert statistics.engine_reason == ""
            assert statistics.registered == 1 << 20


async def test_an_engine_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("KUCOMMS_IO", "steam")
    with pytest.raises(UsageError, match="steam"):
        await open_pool(1)


async def test_write_and_read_at_offsets(file):
    async with open_pool(1 << 20) as pool:
        with pool.allocate(5000) as buffer:
            content = random.randbytes(5000)
            buffer.data[:] = content
            assert await pool.write(file, buffer, 10) == 5000
            assert file.tell() == 0
            buffer.data[:] = bytes(5000)
            assert await pool.read(file.fileno(), buffer, 10) == 5000
            assert bytes(buffer.data) == content
            assert await pool.read(file, buffer, 5000) == 10
            assert await pool.read(file, buffer, 6000) == 0
        statistics = pool.statistics()
        assert (statistics.bytes_written, statistics.bytes_read) == (5000, 5010)
        assert (statistics.completed, statistics.failed, statistics.in_flight) == (4, 0, 0)


async def test_without_offset_where_the_file_stands(file):
    async with open_pool(PAGE) as pool:
        with pool.allocate(4) as buffer:
            buffer.data[:] = b"abcd"
            assert await pool.write(file, buffer) == 4
            assert await pool.write(file, buffer) == 4
            assert file.tell() == 8
            file.seek(6)
            assert await pool.read(file, buffer) == 2
            assert bytes(buffer.data) == b"cdcd"


async def test_several_buffers_and_parts_of_them(file):
    async with open_pool(1 << 20) as pool:
        with pool.allocate(10) as one, pool.allocate(PAGE) as two:
            one.data[:] = b"0123456789"
            two.data[:5] = b"abcde"
            assert await pool.write(file, [(one, 8, 2), (two, 1, 3), (one, 0, 2)], 0) == 7
            assert await pool.read(file, [(two, PAGE - 1, 1), one], 0) == 7
            assert bytes(two.data[-1:]) + bytes(one.data) == b"89bcd016789"
            assert await pool.read(file, (one, 4, 3), 0) == 3
            assert bytes(one.data) == b"9bcd89b789"


async def test_as_many_buffers_as_the_system_takes(file):
    count = os.sysconf("SC_IOV_MAX")
    content = random.randbytes(count)
    async with open_pool(PAGE) as pool:
        with pool.allocate(count) as buffer:
            buffer.data[:] = content
            order = random.sample(range(count), count)
            assert await pool.write(file, [(buffer, at, 1) for at in order], 0) == count
            assert os.pread(file.fileno(), count, 0) == bytes(content[at] for at in order)


async def test_a_pipe_waits_without_a_thread(pipe, engine):
    async with open_pool(PAGE) as pool:
        with pool.allocate(10) as buffer:
            task = asyncio.create_task(pool.read(pipe[0], buffer))
            await turns()
            assert not task.done()
            os.write(pipe[1], b"xyz")
            assert await task == 3
            os.close(os.dup(pipe[1]))
            assert bytes(buffer.data[:3]) == b"xyz"


@pytest.mark.parametrize("blocking", [True, False])
async def test_a_full_pipe_takes_more_when_it_is_read(pipe, blocking):
    os.set_blocking(pipe[0], blocking)
    os.set_blocking(pipe[1], blocking)
    content = random.randbytes(300_000)
    async with open_pool(1 << 20) as pool:
        with pool.allocate(len(content)) as source, pool.allocate(len(content)) as sink:
            source.data[:] = content

            async def write():
                done = 0
                while done < len(content):
                    done += await pool.write(pipe[1], (source, done, len(content) - done))

            async def read():
                done = 0
                while done < len(content):
                    done += await pool.read(pipe[0], (sink, done, len(content) - done))

            await asyncio.wait_for(asyncio.gather(write(), read()), 20)
            assert sink.data == content


async def test_the_end_of_a_pipe():
    read, write = os.pipe()
    async with open_pool(PAGE) as pool:
        with pool.allocate(10) as buffer:
            task = asyncio.create_task(pool.read(read, buffer))
            await turns()
            os.close(write)
            assert await asyncio.wait_for(task, 10) == 0
    os.close(read)


async def test_completions_say_which_and_how(file, pipe):
    async with open_pool(1 << 20) as pool:
        with pool.allocate(100) as buffer:
            tag = object()
            pool.submit_write(file, buffer, 0, tag=tag)
            pool.submit_write(pipe[0], buffer, tag="not writable")
            found = [completion async for completion in pool.completions()]
            assert sorted(found, key=lambda one: one.errno) == [
                Completion(tag, 100, 0), Completion("not writable", 0, 9)
            ]
            assert [one async for one in pool.completions()] == []


async def test_each_completion_comes_once_whoever_iterates(file):
    async with open_pool(1 << 20) as pool:
        with pool.allocate(PAGE) as buffer:
            found = []

            async def collect():
                async for completion in pool.completions():
                    found.append(completion.tag)
                    if len(found) % 7 == 0:
                        await asyncio.sleep(0)

            for tag in range(100):
                pool.submit_write(file, buffer, 0, tag=tag)
            tasks = [asyncio.create_task(collect()) for _ in range(5)]
            await turns(2)
            tasks[0].cancel()
            for tag in range(100, 200):
                pool.submit_write(file, buffer, 0, tag=tag)
            await asyncio.gather(*tasks, return_exceptions=True)
            # the cancelled one may have taken one and not told anybody
            assert sorted(found) == list(range(200))


async def test_ten_thousand_in_flight(engine):
    """On eventfds that nobody has counted up yet; each read takes one."""
    files, each = 100, 100
    number = files * each
    events = [os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_CLOEXEC) for _ in range(files)]
    try:
        async with open_pool(1 << 20) as pool:
            with pool.allocate(8 * number) as buffer:
                for tag in range(number):
                    pool.submit_read(events[tag % files], (buffer, 8 * tag, 8), tag=tag)
                await turns(200)
                assert pool.statistics().in_flight == number
                for event in random.sample(events, files):
                    os.eventfd_write(event, each)
                seen = [completion async for completion in pool.completions()]
                assert sorted(completion.tag for completion in seen) == list(range(number))
                assert {(one.result, one.errno) for one in seen} == {(8, 0)}
                assert buffer.data == struct.pack("=Q", 1) * number
            statistics = pool.statistics()
            assert (statistics.in_flight, statistics.completed) == (0, number)
    finally:
        for event in events:
            os.close(event)


async def test_many_transfers_are_one_system_call(file, engine):
    async with open_pool(1 << 20) as pool:
        with pool.allocate(PAGE) as buffer:
            await pool.write(file, buffer, 0)  # so that they find it in the page cache
            before = pool.statistics().system_calls
            for tag in range(64):
                pool.submit_read(file, buffer, tag, tag=tag)
            assert len([one async for one in pool.completions()]) == 64
            calls = pool.statistics().system_calls - before
            # one that starts and ends them all, and one that resets the bell
            assert calls == (2 if engine == "io_uring" else 0)


async def test_waiting_costs_nothing(pipe):
    async with open_pool(PAGE) as pool:
        with pool.allocate(1) as buffer:
            task = asyncio.create_task(pool.read(pipe[0], buffer))
            await turns()
            before = pool.statistics().system_calls
            await turns()
            assert pool.statistics().system_calls == before
            os.write(pipe[1], b"x")
            assert await task == 1


async def test_sockets(engine):
    one, two = socket.socketpair()
    with one, two:
        async with open_pool(1 << 20) as pool:
            with pool.allocate(100) as buffer, pool.allocate(100) as other:
                task = asyncio.create_task(pool.receive(two, [(other, 0, 2), (other, 10, 90)]))
                await turns()
                assert not task.done()
                buffer.data[:5] = b"hello"
                assert await pool.send(one, (buffer, 0, 5)) == 5
                assert await task == 5
                assert bytes(other.data[:2]) + bytes(other.data[10:13]) == b"hello"
                assert await pool.send(one, [(buffer, 0, 1), (buffer, 4, 1)]) == 2
                assert await pool.read(two, other) == 2
                assert bytes(other.data[:2]) == b"ho"
                assert await pool.write(two, (buffer, 1, 3)) == 3
                assert await pool.receive(one, other) == 3
                assert bytes(other.data[:3]) == b"ell"


async def test_the_timeout_of_a_socket_does_not_hold_up_the_loop(engine):
    one, two = socket.socketpair()
    two.settimeout(20)
    with one, two:
        async with open_pool(PAGE) as pool:
            with pool.allocate(10) as buffer:
                task = asyncio.create_task(pool.receive(two, buffer))
                asyncio.get_running_loop().call_later(0.01, one.send, b"x")
                async with asyncio.timeout(10):
                    assert await task == 1


async def test_datagrams_stay_whole(engine):
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with one, two:
        async with open_pool(1 << 20) as pool:
            with pool.allocate(100) as buffer:
                for size in (5, 0, 7):
                    assert await pool.send(one, (buffer, 0, size)) == size
                for size in (5, 0, 7):
                    assert await pool.receive(two, buffer) == size


async def test_a_peer_that_is_gone_is_an_errno_and_no_signal(engine):
    import signal

    caught = []
    old = signal.signal(signal.SIGPIPE, lambda *_: caught.append(1))
    try:
        one, two = socket.socketpair()
        with one, closing(two):
            async with open_pool(PAGE) as pool:
                with pool.allocate(10) as buffer:
                    two.close()
                    with pytest.raises(OSError, match="Broken pipe"):
                        await pool.send(one, buffer)
                    assert await pool.receive(one, buffer) == 0
        assert caught == []
    finally:
        signal.signal(signal.SIGPIPE, old)


async def test_random_transfers_leave_the_right_bytes(file):
    """Against a bytearray; those under way at once do not overlap."""
    rng = random.Random(1)
    size, slots = 1 << 18, 16
    model = bytearray(size)
    os.ftruncate(file.fileno(), size)
    async with open_pool(4 << 20) as pool:
        for _ in range(60):
            checks = []
            for slot in range(slots):
                start = slot * (size // slots)
                offset = start + rng.randrange(1000)
                buffer = pool.allocate(rng.randrange(1, size // slots - 1000))
                cuts = sorted(rng.randrange(len(buffer)) for _ in range(rng.randrange(3)))
                edges = [0, *cuts, len(buffer)]
                pieces = [(buffer, a, b - a) for a, b in pairwise(edges)]
                if rng.random() < 0.5:
                    buffer.data[:] = rng.randbytes(len(buffer))
                    model[offset : offset + len(buffer)] = buffer.data
                    pool.submit_write(file, pieces, offset, tag=len(buffer))
                else:
                    expected = bytes(model[offset : offset + len(buffer)])
                    pool.submit_read(file, pieces, offset, tag=len(buffer))
                    checks.append((buffer, expected))
                    continue
                checks.append((buffer, None))
            async for completion in pool.completions():
                assert (completion.result, completion.errno) == (completion.tag, 0)
            for buffer, expected in checks:
                assert expected is None or buffer.data == expected
                buffer.free()
    assert os.pread(file.fileno(), size, 0) == model
