# SPDX-License-Identifier: MIT
"""Machines where io_uring is forbidden, or may not pin memory. In processes of their own."""

import asyncio
import errno
import json
import os
import subprocess
import sys
import threading

import pytest

from kucomms import open_pool
from kucomms.transfers import io_uring
from tests.pool.conftest import ENGINES

pytestmark = pytest.mark.skipif("io_uring" not in ENGINES, reason="no io_uring here")

USE = """
import asyncio, json, kucomms, msgspec, os, sys

async def main():
    async with kucomms.open_pool(1 << 20) as pool:
        read, write = os.pipe()
        file = os.open("/proc/self/exe", os.O_RDONLY)
        with pool.allocate(5) as one, pool.allocate(5) as two:
            one.data[:] = b"hello"
            waiting = asyncio.create_task(pool.read(read, two))
            await asyncio.sleep(0)
            assert await pool.write(write, one) == 5
            assert await waiting == 5
            assert bytes(two.data) == b"hello"
            assert await pool.read(file, (one, 0, 4), 0) == 4
            assert bytes(one.data[:4]) == b"\\x7fELF"
        print(json.dumps(msgspec.to_builtins(pool.statistics())))
"""

SECCOMP = """
import ctypes, errno, struct
# What a container does: io_uring_setup answers with an errno, everything else works.
prctl = ctypes.CDLL(None, use_errno=True).prctl
code = [
    (0x20, 0, 0, 0),                                   # load the system call's number
    (0x15, 0, 1, 425),         # io_uring_setup?
    (0x06, 0, 0, 0x00050000 | ERRNO),                  # that errno
    (0x06, 0, 0, 0x7fff0000),                          # allowed
]
program = b"".join(struct.pack("=HBBI", *one) for one in code)
space = ctypes.create_string_buffer(program)
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
filter = Program(len(code), ctypes.addressof(space))
assert prctl(38, 1, 0, 0, 0) == 0
assert prctl(22, 2, ctypes.byref(filter), 0, 0) == 0
"""


SETUP_ENTER_REGISTER = (425, 426, 427)  # on all machines


def run(program, **environment):
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
        check=False, env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", ["EPERM", "ENOSYS", "EACCES"])
@pytest.mark.parametrize("call", SETUP_ENTER_REGISTER)
def test_where_io_uring_is_forbidden_threads_do_it(name, call):
    filter = SECCOMP.replace("ERRNO", f"errno.{name}").replace("425", str(call))
    program = filter + USE + "asyncio.run(main())"
    statistics = run(program)
    assert statistics["engine"] == "threads"
    assert statistics["engine_reason"].startswith("no io_uring: ")
    assert statistics["completed"] == 3


def test_io_uring_or_nothing():
    program = SECCOMP.replace("ERRNO", "errno.EPERM") + USE + """
try:
    asyncio.run(main())
except kucomms.TransportError as error:
    assert error.errno == errno.EPERM and "seccomp" in str(error), error
    print("{}")
"""
    assert run(program, KUCOMMS_IO="io_uring") == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody with a limit")
@pytest.mark.parametrize(
    ("limit", "engines"), [(64 << 10, {"io_uring"}), (0, {"io_uring", "threads"})]
)
def test_memory_that_may_not_be_locked_is_not_registered(limit, engines):
    """Some kernels count the ring itself, too."""
    program = USE + f"""
import resource
resource.setrlimit(resource.RLIMIT_MEMLOCK, ({limit}, {limit}))
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
asyncio.run(main())
"""
    statistics = run(program)
    assert statistics["engine"] in engines
    assert statistics["registered"] == 0
    assert "ulimit -l" in statistics["engine_reason"]
    assert statistics["completed"] == 3


@pytest.mark.asyncio
async def test_more_than_the_kernel_is_given_at_once(monkeypatch):
    """They wait here, in order, and can be cancelled here."""
    monkeypatch.setattr(io_uring, "_SIZES", ((8, 16),))
    read, write = os.pipe()
    async with open_pool(1 << 20) as pool:
        with pool.allocate(100) as buffer:
            transfers = [pool.submit_read(read, (buffer, at, 1), tag=at) for at in range(100)]
            for _ in range(50):
                await asyncio.sleep(0)
            assert len(pool._engine._in_kernel) == 12
            transfers[3].cancel()  # the kernel has it, and would have no room for more
            transfers[80].cancel()  # the kernel does not have it
            for _ in range(50):
                await asyncio.sleep(0)
            os.write(write, bytes(range(98)))
            found = [one async for one in pool.completions()]
            assert sorted(one.tag for one in found) == list(range(100))
            cancelled = {one.tag for one in found if one.errno == errno.ECANCELED}
            assert cancelled == {3, 80}
            assert sorted(buffer.data) == sorted([0, 0, *range(98)])
            for at in range(300):  # those that are done make room for others
                pool.submit_write(write, (buffer, at % 100, 1), tag=at)
            assert len({one.tag async for one in pool.completions()}) == 300
    os.close(read)
    os.close(write)


@pytest.mark.asyncio
async def test_a_thread_that_comes_late_does_not_write_into_another_file(monkeypatch, tmp_path):
    """The await was cancelled, its file closed, and the number stands for another one."""
    monkeypatch.setenv("KUCOMMS_IO", "threads")
    old = os.open(tmp_path / "old", os.O_WRONLY | os.O_CREAT)
    other = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)
    go_on = threading.Event()
    async with open_pool(1 << 20) as pool:
        engine = pool._engine
        for _ in range(engine._workers):  # no thread comes to it
            engine._threads.submit(go_on.wait)
        with pool.allocate(10) as buffer:
            buffer.data[:] = b"0123456789"
            task = asyncio.create_task(pool.write(old, buffer, 0))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            os.dup2(other, old)
            go_on.set()
    os.close(old)
    os.close(other)
    assert (tmp_path / "other").read_bytes() == b""
    assert (tmp_path / "old").read_bytes() == b"0123456789"
