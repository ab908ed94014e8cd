# SPDX-License-Identifier: MIT
"""Real second processes: started, listened to line by line, stopped, killed."""

import asyncio
import os
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path

__all__ = ["Process", "descriptors", "in_child", "objects_in_shm", "read_all"]

PATIENCE = 20.0
"""Seconds that a process may take for anything that should take milliseconds."""

_ROOT = Path(__file__).resolve().parents[2]


class Process:
    """A process that runs one of the functions of ``peer_programs``.

    As a context manager it is killed at the end, whatever state it is in. ``prefix``
    is a command that runs it. A child that it forked ends with its standard input.
    """

    def __init__(self, program, *arguments, prefix=(), env=None):
        self._popen = subprocess.Popen(
            [
                *prefix,
                sys.executable,
                "-m",
                "tests.transports.peer_programs",
                program,
                *map(str, arguments),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=_ROOT,
            env=None if env is None else {**os.environ, **env},
        )
        self.pid = self._popen.pid
        self._buffer = b""

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self._popen.kill()
        self.signal(signal.SIGCONT)
        self._popen.wait()
        self._popen.stdin.close()
        self._popen.stdout.close()

    async def line(self):
        """The next line that it printed, without its end; '' at the end of them."""
        stdout = self._popen.stdout.fileno()
        async with asyncio.timeout(PATIENCE):
            while b"\n" not in self._buffer:
                await _readable(stdout)
                data = os.read(stdout, 65536)
                if not data:
                    break
                self._buffer += data
        line, _newline, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    async def says(self, expected):
        """Wait for its next line, which has to be this."""
        line = await self.line()
        assert line == expected, f"process {self.pid} said {line!r} instead of {expected!r}"

    def does(self, told, expected):
        """Tell it, and wait until it says that it is done, with the loop standing still."""
        self.tell(told)
        stdout = self._popen.stdout.fileno()
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([stdout], [], [], PATIENCE)
            assert ready, f"process {self.pid} says nothing"
            data = os.read(stdout, 65536)
            assert data, f"process {self.pid} ended"
            self._buffer += data
        line, _newline, self._buffer = self._buffer.partition(b"\n")
        assert line.decode() == expected

    def tell(self, line=""):
        """Write a line to its standard input."""
        self._popen.stdin.write(line.encode() + b"\n")

    def signal(self, number):
        """Send a signal; a process that has ended already does not mind."""
        self._popen.send_signal(number)

    def kill(self):
        """SIGKILL it. It is a zombie until ``ended`` or the end of the block."""
        os.kill(self.pid, signal.SIGKILL)

    def stop(self):
        """SIGSTOP it, and wait until it stands still."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def go_on(self):
        os.kill(self.pid, signal.SIGCONT)

    async def ended(self):
        """Wait for its end; its exit status."""
        pidfd = os.pidfd_open(self.pid)
        try:
            async with asyncio.timeout(PATIENCE):
                await _readable(pidfd)
        finally:
            os.close(pidfd)
        return self._popen.wait()


async def _readable(fd):
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if poll.poll(0):
        return
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(fd, lambda: ready.done() or ready.set_result(None))
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def in_child(function):
    """Run this in a forked child; fail with what went wrong there."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            function()
        except BaseException:
            os.write(write, traceback.format_exc().encode())
            os._exit(1)
        os._exit(0)
    os.close(write)
    try:
        problem = await asyncio.to_thread(read_all, read)
    finally:
        os.close(read)
    _pid, status = os.waitpid(pid, 0)  # noqa: ASYNC222 - it has ended
    assert problem == b"", problem.decode()
    assert status == 0


def read_all(fd):
    """What comes from a descriptor, until its end."""
    data = b""
    while part := os.read(fd, 65536):
        data += part
    return data


def descriptors():
    """What this process has open: {descriptor: what it is}."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the directory's own
            continue
    return found


def objects_in_shm(*pids):
    """Names in /dev/shm that were made by these processes."""
    return [
        name
        for name in os.listdir("/dev/shm")
        for pid in pids
        if name.startswith(f"kucomms-{os.geteuid()}-{pid}-")
    ]
