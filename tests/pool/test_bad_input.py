# SPDX-License-Identifier: MIT
"""What cannot work is an errno or an exception; nothing is lost, nobody else is disturbed."""

import asyncio
import errno
import mmap
import os
import socket

import pytest
import pytest_asyncio

from kucomms import ClosedError, Completion, Endpoint, TransportError, UsageError, open_pool

pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("engine")]

PAGE = mmap.PAGESIZE


@pytest.fixture
def file(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    fd = os.open(tmp_path / "file", os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.fixture
def closed():
    """A descriptor that is none any more."""
    fd = os.open("/dev/null", os.O_RDWR)
    high = os.dup2(fd, 900)  # a number that nobody else is given meanwhile
    os.close(fd)
    os.close(high)
    return high


@pytest_asyncio.fixture
async def pool(engine):
    """With one transfer under way, that has to come to its end whatever else happens."""
    read, write = os.pipe()
    async with open_pool(1 << 20) as opened:
        buffer = opened.allocate(8)
        neighbour = asyncio.create_task(opened.read(read, buffer))
        await asyncio.sleep(0)
        yield opened
        os.write(write, b"neighbor")
        assert await asyncio.wait_for(neighbour, 10) == 8
        assert bytes(buffer.data) == b"neighbor"
        buffer.free()
        statistics = opened.statistics()
        assert (statistics.in_flight, statistics.allocated) == (0, 0)
    os.close(read)
    os.close(write)


async def fails(number, awaitable):
    with pytest.raises(TransportError) as caught:
        await awaitable
    assert caught.value.errno == number
    assert os.strerror(number) in str(caught.value)


async def test_errors_say_where_and_what_to_do():
    async with Endpoint("a") as endpoint, Endpoint("b") as other:
        await endpoint.listen("inproc://bad_input")
        link = await other.connect("inproc://bad_input")
        pool = await link.open_pool(PAGE)
        read, write = os.pipe()
        with pool.allocate(10) as buffer:
            for transfer, advice in (
                (pool.read(-1, buffer), "has to be open"),
                (pool.read(read, buffer, 5), "have no offset"),
                (pool.receive(read, buffer), "no socket"),
            ):
                with pytest.raises(TransportError, match=rf"{link.url}: cannot .*{advice}"):
                    await transfer
        os.close(read)
        os.close(write)
        await pool.aclose()
        with pytest.raises(ClosedError, match=f"{link.url}: this pool was closed here"):
            pool.allocate(1)


async def test_closed_descriptors(pool, closed):
    with pool.allocate(10) as buffer:
        for offset in (None, 0):
            await fails(errno.EBADF, pool.read(closed, buffer, offset))
            await fails(errno.EBADF, pool.write(closed, buffer, offset))
        sock = socket.socket()
        sock.close()
        await fails(errno.EBADF, pool.receive(sock, buffer))
        await fails(errno.EBADF, pool.send(sock, buffer))
        for number in (-1, -100, 1 << 31, 1 << 80):
            await fails(errno.EBADF, pool.read(number, buffer))
        pool.submit_read(closed, buffer, 0, tag="tag")
        assert [one async for one in pool.completions()] == [Completion("tag", 0, errno.EBADF)]


async def test_descriptors_of_the_wrong_kind(pool, file, tmp_path):
    with pool.allocate(10) as buffer:
        for flags, call in ((os.O_WRONLY, pool.read), (os.O_RDONLY, pool.write)):
            fd = os.open(tmp_path / "file", flags)
            await fails(errno.EBADF, call(fd, buffer, 0))
            await fails(errno.EBADF, call(fd, buffer))
            os.close(fd)
        directory = os.open(tmp_path, os.O_RDONLY)
        await fails(errno.EISDIR, pool.read(directory, buffer, 0))
        os.close(directory)
        read, write = os.pipe()
        await fails(errno.EBADF, pool.read(write, buffer))
        await fails(errno.EBADF, pool.write(read, buffer))
        await fails(errno.ESPIPE, pool.read(read, buffer, 0))
        await fails(errno.ESPIPE, pool.write(write, buffer, 5))
        os.close(read)
        with socket.socket() as sock:
            await fails(errno.ENOTCONN, pool.receive(sock, buffer))
            await fails(errno.ESPIPE, pool.read(sock, buffer, 0))
        for call in (pool.send, pool.receive):
            await fails(errno.ENOTSOCK, call(file, buffer))
            await fails(errno.ENOTSOCK, call(write, buffer))
        os.close(write)
        with pytest.raises((TypeError, AttributeError)):
            await pool.read("file", buffer)


async def test_buffers_of_others(pool, file):
    async with open_pool(PAGE) as other:
        with other.allocate(10) as buffer:
            with pytest.raises(UsageError, match="another pool"):
                await pool.read(file, buffer, 0)
            with pytest.raises(UsageError, match="another pool"):
                pool.submit_write(file, [(buffer, 0, 1)], 0)
            assert other.statistics().in_flight == 0
    freed = pool.allocate(10)
    freed.free()
    with pool.allocate(10) as buffer:
        for bad in (freed, [buffer, freed], (freed, 0, 1)):
            with pytest.raises(UsageError, match="after it was freed"):
                await pool.read(file, bad, 0)
        for bad in (b"bytes", [buffer.data], [(buffer, 0)], [(buffer, 0, 1, 2)], [None], 7):
            with pytest.raises(TypeError):
                await pool.read(file, bad, 0)


async def test_the_same_bytes_twice_in_a_read(pool, file):
    with pool.allocate(10) as buffer:
        for bad in (
            [buffer, buffer], [buffer, (buffer, 9, 1)], [(buffer, 4, 3), (buffer, 0, 5)],
            [(buffer, 0, 2), (buffer, 8, 2), (buffer, 1, 1)],
        ):
            with pytest.raises(UsageError, match="twice"):
                await pool.read(file, bad, 0)
        assert await pool.read(file, [(buffer, 4, 6), (buffer, 4, 0), (buffer, 0, 4)], 0) == 7
        buffer.data[:] = b"0123456789"
        assert await pool.write(file, [buffer, buffer], 0) == 20  # of a write it is no matter
        assert os.pread(file, 20, 0) == b"0123456789" * 2


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 11), (10, 1), (-1, 1), (0, -1), (11, 0), (1 << 64, 1), (0, 1 << 64), (1 << 63, 1 << 63)],
)
async def test_parts_outside_of_the_buffer(pool, file, offset, length):
    with pool.allocate(10) as buffer, pytest.raises(UsageError, match="not inside"):
        await pool.write(file, (buffer, offset, length), 0)


@pytest.mark.parametrize("offset", [-1, -(1 << 63), (1 << 63) - 9, 1 << 63, (1 << 64) - 1, 1 << 90])
async def test_offsets_that_no_file_has(pool, file, offset):
    with pool.allocate(10) as buffer:
        with pytest.raises(UsageError, match="beyond"):
            await pool.write(file, buffer, offset)
        with pytest.raises(UsageError, match="beyond"):
            await pool.read(file, buffer, offset)
    assert os.fstat(file).st_size == 7


async def test_the_last_offset_is_for_the_system_to_judge(pool, file):
    with pool.allocate(10) as buffer:
        await fails(errno.EFBIG, pool.write(file, buffer, (1 << 63) - 11))
        assert await pool.read(file, buffer, (1 << 63) - 11) == 0


async def test_numbers_that_are_none(pool, file):
    for bad in (1.5, "1", None):
        with pytest.raises(TypeError):
            pool.allocate(bad)
        with pytest.raises(TypeError):
            open_pool(bad)
        with pool.allocate(10) as buffer:
            with pytest.raises(TypeError):
                await pool.read(file, [(buffer, 0, bad or 1.0)], 0)
            with pytest.raises(TypeError):
                await pool.read(file, buffer, bad or 1.0)


async def test_transfers_of_other_threads(pool, file):
    read, write = os.pipe()
    with pool.allocate(10) as buffer:
        transfer = pool.submit_read(read, buffer, tag=1)
        for call in (transfer.cancel, lambda: pool.submit_read(read, buffer)):
            with pytest.raises(UsageError, match="thread"):
                await asyncio.to_thread(call)
        os.write(write, b"x")
        assert [one async for one in pool.completions()] == [Completion(1, 1, 0)]
    os.close(read)
    os.close(write)


async def test_no_buffers_and_too_many(pool, file):
    with pool.allocate(10) as buffer:
        for bad in ([], (), [(buffer, 0, 1)] * 100_000, [(buffer, 0, 1)] * 1025):
            with pytest.raises(UsageError, match="from 1 to 1024 buffers"):
                await pool.write(file, bad, 0)
        with pytest.raises(UsageError, match="end of the file"):
            await pool.read(file, (buffer, 0, 0), 0)
        assert await pool.write(file, (buffer, 0, 0), 0) == 0


async def test_o_direct_says_what_it_wants(pool, tmp_path):
    try:
        fd = os.open(tmp_path / "direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what a file system without it says
            raise
        pytest.skip("no O_DIRECT here")
    with pool.allocate(PAGE) as buffer:
        assert await pool.write(fd, buffer, 0) == PAGE
        with pytest.raises(TransportError, match="O_DIRECT") as caught:
            await pool.write(fd, (buffer, 0, 100), 0)
        assert caught.value.errno == errno.EINVAL
    os.close(fd)
