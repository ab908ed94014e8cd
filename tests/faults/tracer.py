# SPDX-License-Identifier: MIT
# ruff: noqa: ASYNC110
"""Processes that are stopped at an exact point: ``inject.c`` from Python, and its victims."""

import asyncio
import ctypes
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import kucomms
from tests.faults.victim import RING_SIZE
from tests.transports import raw_peer

__all__ = [
    "AT_END",
    "AT_MARK",
    "AT_POINT",
    "Call",
    "Seen",
    "Tracer",
    "Victims",
    "build",
    "mapping_of",
    "seen",
]

AT_END, AT_MARK, AT_POINT = range(3)
_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_ROOM = 4096
_MAP_SHARED = 1
_OPERATIONS = ["", " add", " del", " mod"]  # of epoll_ctl


def build(directory):
    """Compile both C files; the paths of the library and of the C victim."""
    library, victim = directory / "inject.so", directory / "victim"
    flags = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*flags, "-shared", "-fPIC", _HERE / "inject.c", "-o", library], check=True)
    include = f"-I{kucomms.get_include()}"
    # Bound at once: no step of the victim goes through the dynamic linker.
    flags += ["-pthread", "-Wl,-z,now", include]
    subprocess.run([*flags, _HERE / "victim.c", "-o", victim], check=True)
    return library, victim


def _call_names():
    text = subprocess.run(
        ["gcc", "-E", "-dM", "-include", "asm/unistd.h", "-xc", "/dev/null"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return {int(number): name for name, number in re.findall(r"#define __NR_(\w+) (\d+)", text)}


def _state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class _RawCall(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int64), ("arguments", ctypes.c_uint64 * 6))


@dataclass(frozen=True)
class Call:
    """The ``count``-th system call of this kind after the mark: see ``inject.c``."""

    number: int
    name: str
    count: int
    arguments: tuple[int, ...]

    @property
    def shared_memory(self):
        """Of mmap: not memory of the process's own."""
        return bool(self.arguments[3] & _MAP_SHARED or not self.arguments[2])

    @property
    def creates(self):
        """Of openat."""
        return bool(self.arguments[2] & os.O_CREAT)

    def __str__(self):
        return f"{self.name} #{self.count}"


class Tracer:
    """Stops processes; one at a time. All of it in one thread, as ptrace wants it."""

    def __init__(self, library):
        self._library = ctypes.CDLL(str(library))
        self._thread = ThreadPoolExecutor(1, "tracer")
        self._names = _call_names()

    def close(self):
        self._thread.shutdown()

    async def _in_thread(self, function, *arguments):
        loop = asyncio.get_running_loop()
        result = await loop.run_in_executor(self._thread, function, *arguments)
        if result < 0:
            raise OSError(-result, f"{function.__name__}: {os.strerror(-result)}")
        return result

    async def seize(self, pid):
        await self._in_thread(self._library.faults_seize, pid)

    async def to_mark(self, pid):
        return await self._in_thread(self._library.faults_run, pid)

    async def calls(self, pid):
        """All system calls until the next mark."""
        raw = (_RawCall * _ROOM)()
        seen = ctypes.c_int64()
        minus_one, never = ctypes.c_int64(-1), ctypes.c_int64(0)
        place = await self._in_thread(
            self._library.faults_to_call, pid, minus_one, never, raw, ctypes.c_int64(_ROOM),
            ctypes.byref(seen),
        )
        assert place == AT_MARK, place
        assert seen.value < _ROOM
        counts = {}
        result = []
        for call in raw[: seen.value]:
            counts[call.number] = counts.get(call.number, 0) + 1
            name = self._names.get(call.number & 0xFFFFFFFF, str(call.number))
            name += _OPERATIONS[call.number >> 32]
            result.append(Call(call.number, name, counts[call.number], tuple(call.arguments)))
        return result

    async def to_call(self, pid, call):
        """To its entry: it has not been made yet."""
        return await self._in_thread(
            self._library.faults_to_call, pid, ctypes.c_int64(call.number),
            ctypes.c_int64(call.count), None, ctypes.c_int64(0), ctypes.byref(ctypes.c_int64()),
        )

    async def step(self, pid, count, within=(0, 0), entry=0):
        """Make so many instructions, in this range of addresses; ``entry``: the first of them.

        Returns the place, how many, and ``entry``.
        """
        first, made = ctypes.c_uint64(entry), ctypes.c_int64()
        place = await self._in_thread(
            self._library.faults_step, pid, ctypes.c_int64(count), ctypes.c_uint64(within[0]),
            ctypes.c_uint64(within[1]), ctypes.byref(first), ctypes.byref(made),
        )
        return place, made.value, first.value

    async def answer(self, pid, result):
        """The system call at whose entry it stands gives this instead of being made."""
        return await self._in_thread(self._library.faults_answer, pid, ctypes.c_int64(result))

    async def kill(self, pid):
        os.kill(pid, signal.SIGKILL)
        await self._in_thread(self._library.faults_reap, pid)

    async def stop(self, pid):
        """SIGSTOP it for real, and leave it alone."""
        os.kill(pid, signal.SIGSTOP)
        await self.let_go(pid)
        while _state_of(pid) != "T":
            await asyncio.sleep(0)

    async def let_go(self, pid):
        await self._in_thread(self._library.faults_let_go, pid)


class Victims:
    """A process that forks victims, in C or in Python on asyncio or uvloop."""

    def __init__(self, language, program):
        self.language = language
        self._command = (
            [program] if language == "C" else [sys.executable, "-m", "tests.faults.victim",
            "uvloop" if language == "uvloop" else "asyncio"]
        )

    async def __aenter__(self):
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            cwd=_ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        self.log = b""
        self._logging = asyncio.create_task(self._read_log())
        return self

    async def __aexit__(self, *_exception):
        self._process.stdin.close()
        await self._process.wait()
        await self._logging

    async def _read_log(self):
        while data := await self._process.stderr.read(65536):
            self.log = (self.log + data)[-65536:]

    async def start(self, role, url, step):
        """A new victim, which waits for ``go``; its pid."""
        self.log = b""
        self._process.stdin.write(f"{role} {url} {step}\n".encode())
        line = (await self._process.stdout.readline()).decode()
        assert line.startswith("pid "), line
        return int(line.removeprefix("pid "))

    def go(self):
        self._process.stdin.write(b"g")

    async def ended(self):
        """What the victim said, and its exit status, negative after a signal."""
        said = []
        while (line := (await self._process.stdout.readline()).decode().rstrip()):
            if line.startswith("status "):
                return said, int(line.removeprefix("status "))
            said.append(line)
        raise AssertionError(f"the {self.language} victims' own process died: {said} {self.log}")


@dataclass(frozen=True)
class Seen:
    """What a victim had told by its memory when it was stopped."""

    messages: tuple[bytes, ...]
    closed: bool
    ready: int = 0
    """How many of the messages are not behind one that is half-written."""


def mapping_of(pid, name):
    """The addresses at which a process may execute a file."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if name in line and line.split()[1].startswith("r-x"):
            low, high = line.split()[0].split("-")
            return int(low, 16), int(high, 16)
    raise AssertionError(f"process {pid} does not map {name}")


def seen(pid, role, before=None):
    """Read a stopped victim's own pages. ``before``: for when they are not mapped any more."""
    areas = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, access, offset, *_rest = line.split()
        if access == "rw-s" and "/dev/shm/kucomms-" in line:
            low, high = (int(address, 16) for address in addresses.split("-"))
            areas.append((int(offset, 16), low, high - low))
    own = 0 if role == "listener" else raw_peer.side_size(RING_SIZE)

    def read(offset, length):
        for start, low, size in areas:
            if start <= own + offset < start + size:
                return os.pread(memory, length, low + own + offset - start)
        return None

    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        producer = read(raw_peer.PAGE, 260)
        data = read(3 * raw_peer.PAGE, RING_SIZE)
    finally:
        os.close(memory)
    if producer is None or data is None:
        assert before is not None
        return Seen(before.messages, closed=True)
    position = int.from_bytes(producer[:8], "little")
    state = int.from_bytes(producer[256:260], "little")
    messages = []
    ready = None
    at = 0
    while at < position:
        length = int.from_bytes(data[at : at + 4], "little")
        flags = int.from_bytes(data[at + 4 : at + 6], "little")
        if not flags & (raw_peer.BUSY | raw_peer.DISCARD):
            messages.append(data[at + raw_peer.HEADER : at + raw_peer.HEADER + length])
        elif flags & raw_peer.BUSY and ready is None:
            ready = len(messages)
        at += raw_peer.HEADER + (length + 7) // 8 * 8
    ready = len(messages) if ready is None else ready
    return Seen(tuple(messages), closed=state != 0, ready=ready)
