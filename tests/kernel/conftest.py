# SPDX-License-Identifier: MIT
"""What the tests inside the guest share. ``tools/guest.py`` boots it and runs them there."""

import contextlib
import ctypes
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.kernel.log import findings, is_within_race

_TAIL = 20
_FINIT_MODULE, _DELETE_MODULE = 313, 176  # of x86-64
_libc = ctypes.CDLL(None, use_errno=True)
_PATIENCE = 10.0  # seconds for the rest of a report


class KernelLog:
    """The kernel log from now on, line by line."""

    def __init__(self):
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._fd, 0, os.SEEK_END)

    def read(self) -> list[str]:
        """Return what is new since the last call, without waiting."""
        lines = []
        while True:
            try:
                record = os.read(self._fd, 8192)
            except BlockingIOError:
                return lines
            except BrokenPipeError:
                lines.append("printk messages dropped: the log was overwritten before it was read")
                continue
            # "level,number,microseconds,flags;text", then lines of context that start with a space
            lines.append(record.decode(errors="replace").split(";", 1)[1].split("\n")[0])

    def close(self):
        os.close(self._fd)


def _fail(what):
    log = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
    tail = "\n".join(log.splitlines()[-_TAIL:])
    pytest.fail(f"{what}\nthe end of the kernel log:\n{tail}")


def _modprobe(name, *parameters):
    command = ("modprobe", name, *parameters)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        _fail(f"{' '.join(command)}: exit code {result.returncode}\n{result.stderr}")


def _load(name, *parameters):
    """As modprobe, which is asked only where kucomms.ko is not there, or needed first.

    A process takes 30 times as long as the system call, and some hundred are loaded.
    """
    if not Path("/sys/module/kucomms").exists():
        _modprobe(name, *parameters)
        return
    path = Path("/lib/modules", os.uname().release, "updates", f"{name}.ko")
    with path.open("rb") as file:
        if _libc.syscall(_FINIT_MODULE, file.fileno(), " ".join(parameters).encode(), 0):
            _fail(f"{name} {parameters} cannot be loaded: {os.strerror(ctypes.get_errno())}")


def _unload(name):
    """As rmmod."""
    if _libc.syscall(_DELETE_MODULE, name.encode(), os.O_NONBLOCK):
        _fail(f"{name} cannot be unloaded: {os.strerror(ctypes.get_errno())}")


@pytest.fixture(scope="session")
def modules() -> Path:
    """The directory with what was built: kernel_module/, examples/kernel/, tests/kernel/module/."""
    return Path(os.environ["KUCOMMS_MODULES"])


@pytest.fixture(scope="session")
def programs(modules) -> Path:
    """The directory with what was made of ``programs/*.c``."""
    return modules / "tests/kernel/programs"


@pytest.fixture(scope="session")
def load():
    """``load(name, "parameter=value", ...)``: as modprobe; fails with the kernel log's end."""
    return _load


@pytest.fixture(scope="session")
def unload():
    """``unload(name)``: as rmmod, of this module alone; fails with the kernel log's end."""
    return _unload


@pytest.fixture(scope="session")
def _session_log():
    with contextlib.closing(KernelLog()) as log:
        yield log


@pytest.fixture(autouse=True)
def kernel_log(_session_log):
    """The kernel log; a test fails when a fault got there since the test before it."""
    seen: list[str] = []

    def new() -> list[str]:
        lines = _session_log.read()
        seen.extend(lines)
        return lines

    yield new
    new()
    give_up = time.monotonic() + _PATIENCE
    while is_within_race(seen) and time.monotonic() < give_up:
        new()
    if faults := findings(seen):
        pytest.fail("the kernel log has faults:\n" + "\n".join(faults))


@pytest.fixture(scope="module")
def main_module(load, unload):
    """kucomms.ko, for the tests of a file."""
    load("kucomms")
    yield
    unload("kucomms")


@pytest.fixture
def cgroup():
    """A memory cgroup of version 2."""
    mounted = next(
        (Path(line.split()[1]) for line in Path("/proc/mounts").read_text().splitlines()
         if line.split()[2] == "cgroup2"),
        None,
    )  # fmt: skip
    root = mounted or Path("/tmp/kucomms-cgroup")
    if mounted is None:
        root.mkdir()
        subprocess.run(["mount", "-t", "cgroup2", "cgroup2", root], check=True)
    (root / "cgroup.subtree_control").write_text("+memory")
    path = root / "kucomms-test"
    path.mkdir()
    yield path
    give_up = time.monotonic() + _PATIENCE
    while (path / "cgroup.procs").read_text():
        assert time.monotonic() < give_up, "a process is still in there"
        os.sched_yield()
    path.rmdir()
    if mounted is None:
        subprocess.run(["umount", root], check=True)
        root.rmdir()
