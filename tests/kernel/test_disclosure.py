# SPDX-License-Identifier: MIT
"""What the kernel shows: nothing that was not meant for this user.

No bytes that nobody has written, no kernel pointers, nothing of another channel. That a mapping
does not reach beyond its channel is in test_hostile.py. The guest does not clear what the kernel
allocates (init_on_alloc=0, see tools/guest.py), so that what the module forgets would show.
"""

import contextlib
import ctypes
import errno
import os
import re
import struct
import subprocess
from pathlib import Path

import pytest

from tests.kernel.raw_device import (
    DATA,
    HEADER,
    PAGE,
    PATIENCE,
    SETUP,
    WAIT,
    RawDevice,
    Setup,
    counters,
    ioctl,
    open_device,
)
from tests.kernel.test_hostile import until
from tests.kernel.test_kernel_api import Do, test_module

LOOPS = ["asyncio"]  # what is tested is the kernel

RING = 4 * PAGE
SIDE = 3 * PAGE + RING
STALE = b"\xaa"
GEOMETRY = struct.pack(
    "<QII7Q", 0x736D6D6F63756B, 1, 0, 0, PAGE, RING, PAGE, 2 * PAGE, 3 * PAGE, HEADER
)
PARKED = 2 * PAGE + 128  # of the consumer, who parks at once
TRACING = Path("/sys/kernel/tracing")


@pytest.fixture(scope="module", autouse=True)
def module(load, unload):
    with test_module(load, unload):
        yield


@pytest.fixture(autouse=True)
def nothing_is_left(module):
    yield
    until(lambda: not counters()["channels"])


def raw(name="test_quiet"):
    return RawDevice(name, ring_size=RING)


def sides(device):
    """All bytes of the kernel's side, and of ours."""
    return (ctypes.string_at(device.kernel, SIDE), ctypes.string_at(device.own, SIDE))


def leave_stale_bytes():
    """In pages that are given back, in the runner's buffer, in what the allocators keep."""
    for _ in range(8):
        with raw() as device:
            for page in range(SIDE // PAGE):
                if page not in (1, 2):
                    device.write(page * PAGE, STALE * PAGE)
            device.send(STALE * 3000, type=Do.CHECKSUM)
            until(lambda: device.released == device.position)
        until(lambda: not counters()["channels"])
    for _ in range(64):  # in kmalloc's, of the size of struct kucomms_setup and others
        with contextlib.suppress(OSError):
            os.setxattr("/dev/null", "user.stale", STALE * 4000)


def pointers(data):
    """Words that look like addresses of the kernel. (The last page of all is errnos.)"""
    words = struct.unpack(f"<{len(data) // 8}Q", data)
    return [hex(word) for word in words if 0xFFFF800000000000 <= word < 2**64 - 4096]


def addresses(text):
    return re.findall(r"(?<![0-9a-f])(?:0x)?ffff[89a-f][0-9a-f]{11}(?![0-9a-f])", text)


# ---- bytes that nobody has written ----------------------------------------------


@pytest.mark.parametrize("name", ["test_quiet", "test_threads", "test_in_place"])
def test_fresh_pages_are_empty(name):
    """But for what uapi/linux/kucomms.h says of them."""
    leave_stale_bytes()
    with raw(name) as device:
        kernel, own = map(bytearray, sides(device))
        assert own == bytes(SIDE)
        assert kernel[: len(GEOMETRY)] == GEOMETRY
        kernel[: len(GEOMETRY)] = bytes(len(GEOMETRY))
        assert int.from_bytes(kernel[PARKED : PARKED + 8], "little") <= 2
        kernel[PARKED : PARKED + 8] = bytes(8)
        assert kernel == bytes(SIDE)


@pytest.mark.parametrize("what", [Do.ECHO, Do.ECHO_UNLOCKED, Do.ECHO_BEGUN])
def test_what_lies_around_messages(what):
    """Behind each, up to the next, and behind the last: as it was, which is zero."""
    leave_stale_bytes()
    sizes = [*range(41), 2047, 2048, 2049, 3001]
    with raw() as device:
        expected = b""
        for size in sizes:
            data = bytes([size % 251 + 1]) * size
            device.send(data, type=what, id=size, value=7)
            expected += struct.pack("<4Q", size, what, size, 7) + data + bytes(-size % 8)
        until(lambda: device.available == len(expected))
        kernel, _own = sides(device)
        assert kernel[3 * PAGE :] == expected.ljust(RING, b"\0")
        assert kernel[PAGE + 8 : PAGE + 128] == bytes(120)  # what is reserved, and what follows
        assert kernel[PAGE + 264 : 2 * PAGE] == bytes(PAGE - 264)
        assert kernel[2 * PAGE + 136 : 3 * PAGE] == bytes(PAGE - 136)


def guarded(data):
    """A buffer with stale bytes before and behind, and a check that they are untouched."""
    buffer = bytearray(STALE * 256 + data + STALE * 256)
    at = ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer)) + 256

    def answer():
        assert buffer[:256] == buffer[-256:] == STALE * 256
        return bytes(buffer[256:-256])

    return at, answer


@pytest.mark.parametrize(("name", "hello"), [("test_quiet", b""), ("test_limited", b"limited")])
def test_the_answer_to_the_set_up(name, hello):
    """Every byte of it is told, and none behind it."""
    fd = open_device(name)
    at, answer = guarded(Setup(hello=STALE * 64, hello_length=1, ring_size=PAGE).pack())
    assert ioctl(fd, SETUP, at) == 0
    size = 4 * PAGE if name == "test_quiet" else 5 * PAGE
    assert answer() in {
        bytes(Setup(ring_size=side - 3 * PAGE, page_size=PAGE, side_size=side,
                    side_offset=(0, side), hello=hello).pack())
        for side in (4 * PAGE, size)
    }  # fmt: skip
    os.close(fd)


def test_answers_that_refuse():
    """What the user has sent, but for what it is told."""
    fd = open_device("test_quiet")
    given = bytes(Setup(version=9, features=5, hello=STALE * 64).pack())
    at, answer = guarded(given)
    assert ioctl(fd, SETUP, at) == errno.EPROTONOSUPPORT
    told = Setup.unpack(answer())
    assert (told.version, told.features) == (1, 3)
    assert answer()[16:] == given[16:]
    assert answer()[4:8] == given[4:8]
    for fields in ({"hello_length": 65}, {"page_size": 1}, {"reserved": (0,) * 6 + (1,)}):
        given = bytes(Setup(**fields).pack())
        at, answer = guarded(given)
        assert ioctl(fd, SETUP, at) == errno.EINVAL
        assert answer() == given
    os.close(fd)


def test_the_answer_to_a_wait():
    with raw() as device:
        given = struct.pack("<IIq", DATA | 2, 0, 1000)
        at, answer = guarded(given)
        assert ioctl(device.fd, WAIT, at) == errno.ETIMEDOUT
        assert answer() == given
        device.park(1)
        device.send(b"echo")
        at, answer = guarded(struct.pack("<IIq", DATA | 2, 0, int(PATIENCE * 1e9)))
        assert ioctl(device.fd, WAIT, at) == 0
        assert answer() == struct.pack("<IIq", DATA, 0, int(PATIENCE * 1e9))


# ---- pointers -------------------------------------------------------------------


def test_what_a_pointer_looks_like():
    """The control of what follows."""
    assert pointers(struct.pack("<2Q", 1, 0xFFFF888012345678))
    assert pointers(struct.pack("<Q", 0xFFFFFFFFC0123456))
    assert not pointers(struct.pack("<qQ", -110, 0x7FFFFFFFF000) + b"\xff" * 8)
    assert addresses("at ffff888012345678, at 0xffffffffc0123456") != []
    assert addresses("at 0000000012345678, ffffffff, deadffff888012345678") == []


def use(name):
    """All kinds of messages, with data that no pointer is like; the device, still open."""
    device = raw(name)
    for what in (Do.ECHO, Do.ECHO_UNLOCKED, Do.ECHO_BEGUN, Do.LOANS, Do.SIZES, Do.CHECKSUM):
        before = device.available
        device.send(struct.pack("<4Q", 1, 2, 3, 4), type=what)
        until(lambda: device.released == device.position)
        if what != Do.CHECKSUM:
            until(lambda: device.available > before)  # noqa: B023
        device.consume()
        device.park(1)
    return device


@pytest.mark.parametrize("name", ["test_quiet", "test", "test_threads", "test_polling"])
def test_no_pointers_in_the_pages(name):
    with use(name) as device:
        for side in sides(device):
            assert pointers(side) == []


def readable_files(*roots):
    for root in roots:
        for directory, names, files in os.walk(root):
            # Where a module lies is for root to see, in every module's directory.
            names[:] = [n for n in names if n not in ("sections", "notes", "subsystem", "driver")]
            for name in files:
                yield Path(directory, name)


def text_of(path):
    with contextlib.suppress(OSError):
        return path.read_bytes().decode(errors="replace")
    return ""


def test_no_pointers_in_files():
    """Of sysfs, debugfs and proc."""
    with use("test") as device:
        found = {}
        paths = [
            *readable_files(
                "/sys/devices/virtual/kucomms", "/sys/class/kucomms", "/sys/module/kucomms",
                "/sys/kernel/debug/kucomms",
            ),
            *map(Path, ("/proc/devices", "/proc/self/maps", f"/proc/self/fdinfo/{device.fd}")),
        ]  # fmt: skip
        for path in paths:
            text = text_of(path)
            if path.name == "maps":
                text = "".join(line for line in text.splitlines(True) if "kucomms" in line)
                assert text
            found[path] = addresses(text)
        assert len(found) > 20
        assert {path: seen for path, seen in found.items() if seen} == {}


def test_debugfs_is_for_root():
    """It tells who talks how much."""
    with use("test"):
        files = list(readable_files("/sys/kernel/debug/kucomms"))
        assert len(files) == 2
        for path in files:
            assert path.stat().st_mode & 0o077 == 0, path
        assert Path("/sys/kernel/debug").stat().st_mode & 0o077 == 0


def test_no_pointers_are_printed(modules):
    """Neither by tracepoints nor elsewhere: the module has no format for one."""
    image = next(modules.rglob("kucomms.ko"))
    sections = (".rodata", ".rodata.str1.1", ".rodata.str1.8", ".data", "__tracepoints_strings")
    command = ["readelf", "--wide", *(f"--string-dump={name}" for name in sections), image]
    strings = subprocess.run(command, check=True, capture_output=True).stdout.decode(
        errors="replace"
    )
    assert "channel=%llu" in strings  # as tracepoints print
    assert [line for line in strings.splitlines() if "%p" in line] == []


def test_no_pointers_in_traces():
    if not (TRACING / "events").exists():
        os.system(f"mount -t tracefs tracefs {TRACING}")
    (TRACING / "trace").write_text("")
    (TRACING / "events/kucomms/enable").write_text("1")
    try:
        with use("test"):
            pass
        until(lambda: not counters()["channels"])
        lines = [line for line in text_of(TRACING / "trace").splitlines() if "kucomms_" in line]
    finally:
        (TRACING / "events/kucomms/enable").write_text("0")
    assert any("kucomms_send" in line for line in lines)
    assert [line for line in lines if addresses(line)] == []


def test_no_pointers_in_the_log(kernel_log):
    with use("test"):
        pass
    assert [line for line in kernel_log() if addresses(line)] == []


# ---- other channels -------------------------------------------------------------


def frames_of(at, size):
    """The numbers of the page frames behind an address."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(at // PAGE * 8)
        words = struct.unpack(f"<{size // PAGE}Q", pagemap.read(size // PAGE * 8))
    assert all(word >> 63 for word in words), "not present"
    return [word & (1 << 55) - 1 for word in words]


def test_channels_share_no_page():
    """Of one endpoint or of two; nor do the sides of one."""
    with contextlib.ExitStack() as stack:
        names = ["test_quiet", "test_quiet", "test_threads", "test_threads", "test"]
        devices = [stack.enter_context(raw(name)) for name in names]
        frames = [
            frame
            for device in devices
            for at in (device.kernel, device.own)
            for frame in frames_of(at, SIDE)
        ]
        assert 0 not in frames  # root is told; others are not
        assert len(set(frames)) == len(frames) == len(devices) * 2 * SIDE // PAGE


def test_nothing_of_one_channel_is_seen_in_another():
    with raw() as one, raw() as other:
        for page in (0, 3, 4, 5, 6):
            one.write(page * PAGE, STALE * PAGE)
        one.position = 0
        one.send(STALE * 2000, type=Do.ECHO)
        until(lambda: one.available > 2000)
        assert all(STALE * 8 not in side for side in sides(other))
