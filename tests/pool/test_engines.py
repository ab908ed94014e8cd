# SPDX-License-Identifier: MIT
"""Machines where io_uring is forbidden, or may not pin memory. In processes of their own."""

import json
import os
import subprocess
import sys

import pytest

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
import ctypes, errno, platform, struct
# What a container does: io_uring_setup answers with an errno, everything else works.
prctl = ctypes.CDLL(None, use_errno=True).prctl
numbers = {"x86_64": 425, "aarch64": 425}
code = [
    (0x20, 0, 0, 0),                                   # load the system call's number
    (0x15, 0, 1, numbers[platform.machine()]),         # io_uring_setup?
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


def run(program, **environment):
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60,
        check=False, env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("errno", ["EPERM", "ENOSYS", "EACCES"])
def test_where_io_uring_is_forbidden_threads_do_it(errno):
    program = SECCOMP.replace("ERRNO", f"errno.{errno}") + USE + "asyncio.run(main())"
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
