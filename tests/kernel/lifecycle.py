# SPDX-License-Identifier: MIT
"""A channel of ``/dev/kucomms_NAME`` by hand, a child to do things to it, and what is left of it.

Knows the ABI of ``linux/kucomms.h`` and uses nothing of the package; so it can do in any order
what a program may do, and what the package never does.
"""

import ctypes
import errno
import gc
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import time
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

CONTROL = Path("/sys/devices/virtual/kucomms/kucomms")
ALIVE = Path("/sys/kernel/debug/kucomms/alive")
PATIENCE = 120.0
"""Seconds for anything that should take milliseconds: the guest may be emulated."""

PAGE = mmap.PAGESIZE
SETUP, KICK, WAIT = 0xC0B8E700, 0x0000E701, 0xC010E702
DATA, SPACE = 1, 2
SPAN = 64
"""Bytes of each message in the ring: the header and as much data. No message wraps."""

_SETUP = struct.Struct("<IIQQQQQQ64s64x")
_WAIT = struct.Struct("<IIq")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_ssize_t
_libc.mmap.argtypes = [ctypes.c_size_t, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
_libc.mremap.restype = ctypes.c_ssize_t
_libc.mremap.argtypes = [*[ctypes.c_size_t] * 3, ctypes.c_int]
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p]


def _checked(result):
    """What a function of libc returned, unless it is -1."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def munmap(address, size):
    _checked(_libc.munmap(address, size))


def mremap(address, size, new_size, flags):
    return _checked(_libc.mremap(address, size, new_size, flags))


@contextmanager
def failing(number):
    """The block has to fail with this errno."""
    found = None
    try:
        yield
    except OSError as error:
        found = error.errno
    assert found == number, f"{errno.errorcode.get(found)} instead of {errno.errorcode[number]}"


# ---- what is there -----------------------------------------------------------


def until(condition, what):
    """Wait until this is true; the kernel frees in a thread of its own."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what() if callable(what) else what
        os.sched_yield()


def alive():
    """The module's own count of what there is."""
    return {name: int(value) for name, value in map(str.split, ALIVE.read_text().splitlines())}


def channels(name="tutorial"):
    return int((CONTROL.parent / f"kucomms_{name}" / "channels").read_text())


def until_channels(count):
    until(lambda: channels() == count, lambda: f"{channels()} channels instead of {count}")


def create(name):
    (CONTROL / "create_device").write_text(f"kucomms_{name}\n")


def remove(name):
    (CONTROL / "remove_device").write_text(f"kucomms_{name}\n")


def descriptors(pid="self"):
    """What a process has open: {descriptor: what it is}."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:  # the directory's own
            continue
    return found


def has_device(pid):
    """Whether a process has our device open."""
    return "/dev/kucomms_tutorial" in descriptors(pid).values()


@contextmanager
def ends(pid):
    """A process, nobody's child here, that ends in here; after it nothing is open any more."""
    fd = os.pidfd_open(pid)
    try:
        yield
        assert select.select([fd], [], [], PATIENCE)[0], f"process {pid} is still there"
    finally:
        os.close(fd)


def mappings():
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "kucomms_" in line]


def names():
    """The devices, and the module that echoes when it is there."""
    found = {path.name for path in CONTROL.parent.glob("kucomms_*")}
    if Path("/sys/module/kucomms_tutorial").exists():
        found.add("module")
    return found


def _sweep(left):
    """What a test has left is not to be in the way of the next."""
    if "module" in left:
        subprocess.run(["rmmod", "kucomms_tutorial"], check=False)
    for name in left - {"module"}:
        with suppress(OSError):
            (CONTROL / "remove_device").write_text(name)


@contextmanager
def all_comes_back(*, all_descriptors=False):
    """The kernel's counts and this process's memory are in the end what they were before.

    Without ``all_descriptors``, only those of our devices count: a loop may come or go.
    """

    def here():
        found = descriptors()
        if not all_descriptors:
            found = {fd: what for fd, what in found.items() if "kucomms_" in what}
        return found, mappings()

    before, before_here, before_names = alive(), here(), names()
    yield
    gc.collect()
    left = names() - before_names
    _sweep(left)
    until(lambda: alive() == before, lambda: f"{before} before, {alive()} now")
    assert here() == before_here
    assert not left, f"the test has left {left}"


def kernel_thread(name="kucomms_tutorial"):
    """The process ID of an endpoint's thread."""
    (pid,) = (
        path.parent.name
        for path in Path("/proc").glob("[0-9]*/comm")
        if path.read_text().strip() in (name, name[:15])
        and not (path.parent / "cmdline").read_bytes()
    )
    return int(pid)


# ---- a child -----------------------------------------------------------------


class Child:
    """A forked process that runs ``function(talk)`` and ends; ``talk`` is its end of a socket.

    As a context manager it is killed in the end, whatever state it is in.
    """

    def __init__(self, function):
        self.socket, talk = socket.socketpair(type=socket.SOCK_STREAM)
        self.socket.settimeout(PATIENCE)
        self._status = None
        self.pid = os.fork()
        if not self.pid:
            status = 1
            try:
                self.socket.close()
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                function(talk)
                status = 0
            except BaseException:
                talk.sendall(traceback.format_exc().encode())
            finally:
                os._exit(status)
        talk.close()

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.kill()
        self.socket.close()

    def hears(self):
        """What it says next; '' when it has ended."""
        try:
            return self.socket.recv(65536).decode()
        except ConnectionResetError:  # it has ended with something unread
            return ""

    def says(self, expected):
        said = self.hears()
        assert said == expected, f"the child said {said!r} instead of {expected!r}"

    def tell(self, what="go on"):
        self.socket.sendall(what.encode())

    def kill(self):
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.ended()

    def ended(self):
        """Wait for its end; its status as of ``os.waitstatus_to_exitcode``."""
        if self._status is None:
            pidfd = os.pidfd_open(self.pid)
            try:
                assert select.select([pidfd], [], [], PATIENCE)[0], "the child does not end"
            finally:
                os.close(pidfd)
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def ends_well(self):
        status = self.ended()
        assert status == 0, self.hears()


# ---- a channel ---------------------------------------------------------------


class _Words:
    """The 64-bit words of a producer's or a consumer's page."""

    _indices = {"position": 0, "parked": 16, "wanted": 17, "state": 32}  # noqa: RUF012

    def __init__(self, address):
        object.__setattr__(self, "_words", (ctypes.c_uint64 * 64).from_address(address))

    def __getattr__(self, name):
        return self._words[self._indices[name]]

    def __setattr__(self, name, value):
        self._words[self._indices[name]] = value


class Raw:
    """An open device, and what is done to it, step by step.

    ``sides`` holds the addresses at which the two sides are mapped, 0 for not.
    """

    def __init__(self, name="tutorial", flags=os.O_CLOEXEC):
        self.fd = os.open(f"/dev/kucomms_{name}", os.O_RDWR | flags)
        os.set_inheritable(self.fd, not flags & os.O_CLOEXEC)  # or Python sees to it
        self.sides = [0, 0]

    @classmethod
    def adopted(cls, fd, ring_size):
        """The same of a descriptor that came from elsewhere, set up already."""
        self = cls.__new__(cls)
        self.fd = fd
        self.sides = [0, 0]
        self._know(ring_size)
        return self

    @classmethod
    def linked(cls, *, ring_size=PAGE, **how):
        """One that is set up and mapped."""
        self = cls(**how)
        try:
            self.setup(ring_size=ring_size)
            self.map(0)
            self.map(1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.close()
        for side, address in enumerate(self.sides):
            if address:
                self.unmap(side)

    def close(self):
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    # ---- what the device can do

    def ioctl(self, command, argument=None):
        """The bytes of the argument, after it; an error has them, too."""
        buffer = None if argument is None else ctypes.create_string_buffer(argument, len(argument))
        try:
            _checked(_libc.ioctl(self.fd, command, buffer))
        except OSError as error:
            error.argument = buffer and buffer.raw
            raise
        return buffer and buffer.raw

    def setup(self, *, version=1, features=0, ring_size=PAGE):
        argument = _SETUP.pack(version, 0, features, ring_size, 0, 0, 0, 0, b"")
        answer = _SETUP.unpack(self.ioctl(SETUP, argument))
        assert answer[0] == 1
        assert answer[4] == PAGE
        assert answer[5] == answer[7] == answer[3] + 3 * PAGE
        assert answer[6] == 0
        self._know(answer[3])

    def _know(self, ring_size):
        self.ring_size = ring_size
        self.side_size = ring_size + 3 * PAGE

    def kick(self):
        self.ioctl(KICK)

    def wait(self, events=DATA, timeout=PATIENCE):
        """The events that have come; ``timeout`` in seconds, None for ever."""
        nanoseconds = -1 if timeout is None else int(timeout * 1e9)
        return _WAIT.unpack(self.ioctl(WAIT, _WAIT.pack(events, 0, nanoseconds)))[0]

    def poll(self, timeout=0.0):
        """What ``poll()`` tells, 0 for nothing within ``timeout`` seconds."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN | select.POLLOUT)
        return dict(poll.poll(int(timeout * 1000))).get(self.fd, 0)

    def map_pages(self, first, count, protection=mmap.PROT_READ):
        return _checked(
            _libc.mmap(0, count * PAGE, protection, mmap.MAP_SHARED, self.fd, first * PAGE)
        )

    def map(self, side):
        pages = self.side_size // PAGE
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if side else 0)
        self.sides[side] = self.map_pages(side * pages, pages, protection)

    def unmap(self, side):
        address, self.sides[side] = self.sides[side], 0
        munmap(address, self.side_size)

    # ---- messages, each of SPAN bytes

    def producer(self, side):
        return _Words(self.sides[side] + PAGE)

    def consumer(self, side):
        return _Words(self.sides[side] + 2 * PAGE)

    def _frame(self, side, position):
        return self.sides[side] + 3 * PAGE + position % self.ring_size

    def has_room(self):
        return self.producer(1).position - self.consumer(0).position < self.ring_size

    def send(self, number, *, kick=True):
        """Send message ``number``, for which there is room."""
        producer = self.producer(1)
        frame = struct.pack("<8Q", SPAN // 2, 0, number, 0, *[number] * 4)
        ctypes.memmove(self._frame(1, producer.position), frame, SPAN)
        producer.position += SPAN
        if kick:
            self.kick()

    def receive(self):
        """The number of the next message, whole; None when there is none."""
        consumer = self.consumer(1)
        if self.producer(0).position == consumer.position:
            return None
        frame = ctypes.string_at(self._frame(0, consumer.position), SPAN)
        control, _type, number, _value, *data = struct.unpack("<8Q", frame)
        if control >> 32 & 1:
            return None  # not committed yet
        assert (control, data) == (SPAN // 2, [number] * 4)
        consumer.position += SPAN
        return number

    def park(self):
        """Ask for the doorbell when the next message comes; there is none now."""
        self.consumer(1).parked += 1

    def echo(self, number):
        """Message ``number`` goes there and comes back."""
        assert self.receive() is None
        self.park()
        self.send(number)
        assert self.wait() == DATA
        assert self.receive() == number
