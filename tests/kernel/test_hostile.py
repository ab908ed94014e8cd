# SPDX-License-Identifier: MIT
# ruff: noqa: ASYNC220, ASYNC222, ASYNC230
"""User programs that break the rules: of the device, of the ring, and at any time.

They harm their own channel only: it is shut, the kernel log stays clean, and whoever else is
on the device notices nothing. KUCOMMS_STORM_SECONDS: how long each storm lasts.
"""

import asyncio
import contextlib
import errno
import faulthandler
import itertools
import json
import operator
import os
import random
import select
import signal
import stat
import struct
import subprocess
import time
from pathlib import Path

import pytest

import kucomms
from tests.kernel.pool_device import close_pool, open_pool
from tests.kernel.raw_device import (
    BUSY,
    DATA,
    DISCARD,
    EXEC,
    HEADER,
    KICK,
    PAGE,
    PATIENCE,
    PRIVATE,
    READ,
    SETUP,
    SPACE,
    WAIT,
    WRITE,
    RawDevice,
    Setup,
    advise,
    counters,
    ioc,
    ioctl,
    map_memory,
    open_device,
    protect,
    remap,
    set_up,
    unmap,
    wait,
)
from tests.kernel.test_kernel_api import PARAMETERS, SHARED_RUNNERS, SYSFS, Do, test_module

LOOPS = ["asyncio"]  # what is tested is the kernel

ROOT = Path(__file__).resolve().parents[2]
STORM_SECONDS = int(os.environ.get("KUCOMMS_STORM_SECONDS", "1"))
STORMS = 20
RING = PAGE
NOBODY = "hostile_nobody"

# Of madvise(); the missing ones are not of this kind: remove, hwpoison, soft_offline.
DONTNEED, DOFORK = 4, 11
ADVICE = [0, 1, 2, 3, 8, 10, DOFORK, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 25, 77]


@pytest.fixture(scope="module", autouse=True)
def module(load, unload):
    with test_module(load, unload):
        yield


@pytest.fixture(autouse=True)
def nothing_is_left(module):
    """Not even of the worst."""
    yield
    give_up = time.monotonic() + PATIENCE
    while (alive := counters())["channels"] or alive["runners"] > SHARED_RUNNERS:
        assert time.monotonic() < give_up, alive
        os.sched_yield()
    assert alive["pages"] == 0


@contextlib.contextmanager
def refused(*numbers):
    with pytest.raises(OSError) as caught:  # noqa: PT011
        yield
    assert caught.value.errno in numbers


@contextlib.contextmanager
def closing_fd(fd):
    try:
        yield fd
    finally:
        os.close(fd)


def opened(name="test_quiet", flags=os.O_RDWR):
    return closing_fd(open_device(name, flags))


def raw(name="test_quiet", ring_size=RING):
    return RawDevice(name, ring_size=ring_size)


def echoes(device):
    """Whether an echo still comes."""
    before = device.available
    device.send(b"echo")
    give_up = time.monotonic() + PATIENCE
    while device.available != before + HEADER + 8:
        assert time.monotonic() < give_up
    device.consume()
    return True


# ---- mappings -------------------------------------------------------------------


def test_nothing_is_mapped_before_the_set_up():
    with opened() as fd:
        for prot, offset in itertools.product((READ, READ | WRITE), (0, 4 * PAGE)):
            with refused(errno.ENOTCONN):
                map_memory(fd, PAGE, offset, prot)


@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 9), (4, 5), (8, 1), (7, 2), (3, 2), (0, 8), (1, 4), (100, 1), (0, 2**30)],
)
def test_more_than_there_is_or_across_the_sides(first, count):
    with raw() as device:
        for prot in (READ, READ | WRITE):
            with refused(errno.EINVAL, errno.EACCES, errno.ENOMEM, errno.EOVERFLOW):
                map_memory(device.fd, count * PAGE, first * PAGE, prot)
        assert echoes(device)


@pytest.mark.parametrize("offset", [2**62, 2**63 - PAGE, 2**44, 100, -PAGE])
def test_offsets_that_are_none(offset):
    with raw() as device, refused(errno.EINVAL, errno.EOVERFLOW):
        map_memory(device.fd, PAGE, offset)


@pytest.mark.parametrize("page", range(8))
def test_rights_of_each_page(page):
    with raw() as device:
        at = page * PAGE
        for prot in (READ, READ | WRITE):
            with refused(errno.EINVAL):
                map_memory(device.fd, PAGE, at, prot, PRIVATE)
        found = map_memory(device.fd, PAGE, at, READ)
        with refused(errno.EACCES):
            protect(found, PAGE, READ | EXEC)
        if page < 4:
            for prot in (WRITE, READ | WRITE):
                with refused(errno.EACCES):
                    map_memory(device.fd, PAGE, at, prot)
                with refused(errno.EACCES):
                    protect(found, PAGE, prot)
        else:
            protect(found, PAGE, READ | WRITE)
            unmap(map_memory(device.fd, PAGE, at, READ | WRITE), PAGE)
        unmap(found, PAGE)
        assert echoes(device)


def test_kernel_side_is_not_written_through_proc():
    with raw() as device, open("/proc/self/mem", "r+b", buffering=0) as memory:
        for page in range(4):
            memory.seek(device.kernel + page * PAGE)
            with refused(errno.EIO, errno.EFAULT):
                memory.write(b"\xff" * 8)
        assert echoes(device)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY])
def test_rights_of_the_descriptor(flags):
    """Who cannot read and write gets nothing: no channel, and no pool."""
    with opened(flags=flags) as fd:
        assert set_up(fd, ring_size=RING)[0] == errno.EBADF
        assert open_pool(fd, PAGE)[0] == errno.EBADF
        assert close_pool(fd, 1) == errno.EBADF
        for prot in (READ, READ | WRITE):
            with refused(errno.ENOTCONN, errno.EACCES):
                map_memory(fd, PAGE, 4 * PAGE, prot)
        assert counters()["channels"] == 0


def test_never_executable(tmp_path):
    """Neither where files may be, nor where none may be, as /dev often is."""
    device = os.stat("/dev/kucomms_test_quiet")
    os.mknod(tmp_path / "device", 0o600 | stat.S_IFCHR, device.st_rdev)
    for path in (Path("/dev/kucomms_test_quiet"), tmp_path / "device"):
        mounted_noexec = os.statvfs(path.parent).f_flag & os.ST_NOEXEC
        wrong = errno.EPERM if mounted_noexec else errno.EACCES
        with closing_fd(os.open(path, os.O_RDWR)) as fd:
            number, _setup = set_up(fd, ring_size=RING)
            assert number == 0
            for page in range(8):
                for prot in (EXEC, READ | EXEC, READ | WRITE | EXEC):
                    with refused(wrong):
                        map_memory(fd, PAGE, page * PAGE, prot)
                    with refused(wrong, errno.EINVAL):
                        map_memory(fd, PAGE, page * PAGE, prot, PRIVATE)
            found = map_memory(fd, 4 * PAGE, 4 * PAGE, READ | WRITE)
            with refused(errno.EACCES):
                protect(found, PAGE, READ | EXEC)
            unmap(found, 4 * PAGE)


def test_mappings_do_not_grow():
    with raw() as device:
        for at in (device.own, device.kernel):
            for size in (device.side_size, PAGE):
                for flags in (0, 1):
                    with refused(errno.EFAULT, errno.EINVAL, errno.ENOMEM):
                        remap(at, size, size + PAGE, flags)
            with refused(errno.EFAULT, errno.EINVAL):
                remap(at, 0, PAGE)  # a second mapping of the same
        assert echoes(device)


def test_mappings_move_and_shrink():
    with raw() as device:
        second = map_memory(device.fd, device.side_size, device.side_size, READ | WRITE)
        assert remap(second, device.side_size, PAGE) == second
        unmap(second, PAGE)
        hole = map_memory(device.fd, device.side_size, device.side_size, READ | WRITE)
        unmap(hole + PAGE, PAGE)
        assert echoes(device)
        unmap(hole, PAGE)
        unmap(hole + 2 * PAGE, 2 * PAGE)
        assert echoes(device)


@pytest.mark.parametrize("advice", ADVICE)
def test_advice_is_harmless(advice):
    with raw() as device:
        for at in (device.own, device.kernel):
            with contextlib.suppress(OSError):
                advise(at, device.side_size, advice)
        child = os.fork()
        if not child:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert echoes(device)


def test_a_child_that_has_the_mappings_all_the_same():
    """MADV_DOFORK: then it is one more user of the channel, that is all."""
    device = raw()
    advise(device.own, device.side_size, DOFORK)
    ours, its = os.pipe()
    child = os.fork()
    if not child:
        os.close(its)
        os.read(ours, 1)
        os._exit(0 if echoes_elsewhere(device) else 1)
    os.close(ours)
    device.close()
    assert counters()["channels"] == 1
    os.close(its)
    assert os.waitpid(child, 0)[1] == 0


def echoes_elsewhere(device):
    device.send(b"echo")
    return device.kick() == 0


def test_pages_that_were_dropped():
    """Who drops its own pages has none; the channel ends with the process."""
    child = os.fork()
    if not child:
        faulthandler.disable()  # pytest's: it is meant to die
        device = raw()
        echoes(device)
        with contextlib.suppress(OSError):
            advise(device.own, device.side_size, DONTNEED)
        echoes(device)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFEXITED(status) or os.WTERMSIG(status) == signal.SIGBUS


def test_users_side_is_its_own():
    """Every byte can be written, and read back."""
    with raw() as device:
        patterns = [bytes([page + 1]) * PAGE for page in range(4)]
        for page in (0, 3):  # the others are the ring's positions
            device.write(page * PAGE, patterns[page])
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            for page in (0, 3):
                memory.seek(device.own + page * PAGE)
                assert memory.read(PAGE) == patterns[page]


def test_no_mapping_after_the_last_one_went():
    with opened() as fd:
        number, setup = set_up(fd, ring_size=RING)
        assert number == 0
        unmap(map_memory(fd, PAGE), PAGE)
        for offset in setup.side_offset:
            with refused(errno.ESHUTDOWN):
                map_memory(fd, PAGE, offset)


# ---- calls ----------------------------------------------------------------------


def test_unknown_ioctls():
    garbage = random.Random(1)
    known = {SETUP, KICK, WAIT}
    with opened() as fresh, raw() as device:
        memory = bytearray(garbage.randbytes(1 << 14))
        for number, direction in itertools.product(range(256), range(4)):
            for size in {0, 1, 8, 16, 200, 216, garbage.randrange(1 << 14), (1 << 14) - 1}:
                command = ioc(direction, number, size)
                if command not in known:
                    for fd in (fresh, device.fd):
                        value = garbage.choice([memory, 0, 2**64 - 1, garbage.getrandbits(64)])
                        assert ioctl(fd, command, value) == errno.ENOTTY, hex(command)
        for magic in (0xE6, 0xE8, 0xFF, 0x01, ord("k")):
            for number in range(256):
                command = ioc(3, number, 200, magic)
                assert ioctl(device.fd, command, memory) == errno.ENOTTY, hex(command)
        assert echoes(device)
        assert set_up(fresh)[0] == 0


@contextlib.contextmanager
def end_of_a_page():
    """The address behind the last byte that is mapped."""
    at = map_memory(-1, 2 * PAGE, 0, READ | WRITE, 0x22)
    unmap(at + PAGE, PAGE)
    yield at + PAGE
    unmap(at, PAGE)


def bad_pointers(size):
    with end_of_a_page() as end:
        for missing in (1, 8, size - 1, size):
            yield end - size + missing
    yield from (0, 1, PAGE - 1, 2**47 - PAGE, 2**47, 2**63, 2**64 - PAGE, 2**64 - 1)


def test_bad_pointers():
    with opened() as fd:
        for pointer in bad_pointers(len(Setup().pack())):
            assert ioctl(fd, SETUP, pointer) == errno.EFAULT
        # what cannot be answered is not done
        at = map_memory(-1, PAGE, 0, READ | WRITE, 0x22)
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(at)
            memory.write(Setup().pack())
        protect(at, PAGE, READ)
        assert ioctl(fd, SETUP, at) == errno.EFAULT
        unmap(at, PAGE)
        assert counters()["channels"] == 0
        assert set_up(fd)[0] == 0
    with raw() as device:
        for pointer in bad_pointers(16):
            assert ioctl(device.fd, WAIT, pointer) == errno.EFAULT
        assert ioctl(device.fd, KICK, 2**64 - 1) == 0


@pytest.mark.parametrize(
    ("fields", "number"),
    [
        *[({"version": v}, errno.EPROTONOSUPPORT) for v in (0, 2, 2**31, 2**32 - 1)],
        *[({"features": 1 << bit}, errno.EPROTONOSUPPORT) for bit in (2, 31, 32, 63)],
        ({"version": 2, "hello_length": 99}, errno.EPROTONOSUPPORT),
        *[({"hello_length": n}, errno.EINVAL) for n in (65, 2**31, 2**32 - 1)],
        *[({f: n}, errno.EINVAL) for f in ("page_size", "side_size") for n in (1, PAGE, 2**63)],
        ({"side_offset": (1, 0)}, errno.EINVAL),
        ({"side_offset": (0, 2**63)}, errno.EINVAL),
        *[
            ({"reserved": tuple(1 << 56 if n == m else 0 for n in range(7))}, errno.EINVAL)
            for m in range(7)
        ],
        *[({"flags": n}, errno.EINVAL) for n in (2, 3, 2**31, 2**32 - 1)],
        ({"channel": 1}, errno.EINVAL),
        *[({"flags": 1, "channel": n}, errno.ECHRNG) for n in (0, 1, 2**31, 2**32 - 1)],
    ],
    ids=str,
)
def test_set_up_with_nonsense(fields, number):
    with opened() as fd:
        found, told = set_up(fd, **fields)
        assert found == number
        if number == errno.EPROTONOSUPPORT:
            assert (told.version, told.features) == (1, 3)
        assert counters()["channels"] == 0
        found, told = set_up(fd, hello=b"h" * 64)
        assert (found, told.version, told.page_size) == (0, 1, PAGE)
        assert set_up(fd)[0] == errno.EALREADY


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (0, 1 << 20),
        *[(n, PAGE) for n in (1, 7, PAGE - 1, PAGE)],
        *[(n, 2 * PAGE) for n in (PAGE + 1, 5000, 2 * PAGE)],
        *[(n, 1 << 24) for n in (2**23 + 1, 2**24, 2**24 + 1, 2**31, 2**40, 2**63, 2**64 - 1)],
    ],
)
def test_ring_sizes(asked, given):
    with opened() as fd:
        number, told = set_up(fd, ring_size=asked)
        assert (number, told.ring_size, told.side_size) == (0, given, 3 * PAGE + given)
        assert told.side_offset == (0, told.side_size)
        assert counters()["pages"] == 2 * told.side_size // PAGE


def test_a_device_without_endpoint():
    (SYSFS / "create_device").write_text(f"kucomms_{NOBODY}")
    try:
        with opened(NOBODY) as fd:
            assert set_up(fd)[0] == errno.ENOTCONN
            assert ioctl(fd, KICK) == errno.ENOTCONN
            assert wait(fd, DATA, 0)[0] == errno.ENOTCONN
    finally:
        (SYSFS / "remove_device").write_text(f"kucomms_{NOBODY}")


def test_bells_before_the_set_up():
    with opened() as fd:
        assert ioctl(fd, KICK) == errno.ENOTCONN
        for events in (0, DATA, 2**32 - 1):
            assert wait(fd, events, 0)[0] == errno.ENOTCONN


def test_waits():
    with raw() as device:
        for events in (0, 4, DATA | 4, 2**31, 2**32 - 1):
            assert wait(device.fd, events, 0)[0] == errno.EINVAL
        for timeout in (-2, -(2**63), -(10**9)):
            assert wait(device.fd, DATA, timeout)[0] == errno.EINVAL
        assert wait(device.fd, DATA, 0, reserved=1)[0] == errno.EINVAL
        for timeout in (0, 1, 1_000_000):
            assert wait(device.fd, DATA | SPACE, timeout)[0] == errno.ETIMEDOUT
        os.set_blocking(device.fd, False)
        for timeout in (-1, 0, 2**63 - 1):
            assert wait(device.fd, DATA, timeout)[0] == errno.EAGAIN
        os.set_blocking(device.fd, True)
        device.park(7)
        device.send(b"echo")
        for timeout in (-1, 2**63 - 1, 0):
            assert wait(device.fd, DATA | SPACE, timeout) == (0, DATA)


@pytest.mark.parametrize("timeout", [-1, 2**63 - 1, int(PATIENCE * 1e9)])
def test_a_wait_is_interrupted(timeout):
    with raw() as device:
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
        try:
            assert wait(device.fd, DATA, timeout)[0] == errno.EINTR
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def test_other_calls():
    with opened() as fresh, raw() as device:
        for fd in (fresh, device.fd):
            for size in (0, 1, 100):
                with refused(errno.EINVAL):
                    os.read(fd, size)
                with refused(errno.EINVAL):
                    os.write(fd, bytes(size))
            for whence in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END, os.SEEK_DATA):
                with refused(errno.ESPIPE):
                    os.lseek(fd, 0, whence)
            with refused(errno.ESPIPE, errno.EINVAL):
                os.pread(fd, 1, 0)
            with refused(errno.EINVAL):
                os.ftruncate(fd, 0)
            with refused(errno.ENODEV, errno.EOPNOTSUPP, errno.EINVAL):
                os.posix_fallocate(fd, 0, PAGE)
            with refused(errno.EINVAL):
                os.fsync(fd)
            with refused(errno.EINVAL, errno.ESPIPE):
                os.sendfile(fd, fd, None, 10)
        assert echoes(device)


def test_program_of_32_bits(programs):
    done = subprocess.run([programs / "program_32"], check=False, timeout=PATIENCE)
    assert done.returncode == 0


# ---- the ring -------------------------------------------------------------------


class Bystander:
    """A good link of the same endpoint."""

    def __init__(self, link):
        self._link = link
        self._count = 0

    async def check(self):
        """It is there, undisturbed."""
        async with asyncio.timeout(PATIENCE):
            for _ in range(20):
                self._count += 1
                await self._link.send(b"%d" % self._count, id=self._count)
                message = await self._link.receive()
                assert (message.id, message.data) == (self._count, b"%d" % self._count)


@contextlib.asynccontextmanager
async def bystander(name):
    async with kucomms.connect(f"kernel://{name}", timeout=PATIENCE) as link:
        good = Bystander(link)
        await good.check()
        yield good
        await good.check()


def attacker(name, attack):
    """In a process of its own: what became of a channel after ``attack``."""
    with raw(name) as device:
        expected = attack(device)
        device.kick()
        if expected == "alive":
            return {"alive": echoes(device) and device.kick() == 0}
        events = device.poll()
        return {
            "events": events,
            "kick": device.kick(),
            "wait": [device.wait(DATA), device.wait(SPACE, 0), device.wait(DATA, -1)],
            "state": device.kernel_state,
        }


async def attacked(name, attack):
    """Run it in a child, while somebody else uses the device."""
    async with bystander(name) as good:
        before = counters()["protocol_errors"]
        ours, its = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.write(its, json.dumps(attacker(name, attack)).encode())
            except BaseException as error:
                os.write(its, json.dumps(repr(error)).encode())
            os._exit(0)
        os.close(its)
        while not select.select([ours], [], [], 0)[0]:
            await good.check()
        with open(ours) as file:
            found = json.load(file)
        os.waitpid(child, 0)
    return found, counters()["protocol_errors"] - before


GOOD = [b"", b"1", b"two", bytes(100), b"five"]
SHUT = errno.ESHUTDOWN


def until(condition):
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up


def bad_frame(*data, published=None, **fields):
    def attack(device):
        for message in GOOD:
            device.frame(message)
        device.frame(*data, **fields)
        device.publish(None if published is None else device.position + published)

    return attack


def bad_position(change):
    def attack(device):
        device.send(*GOOD)
        until(lambda: device.released == device.position)
        device.publish(change(device.position))

    return attack


def bad_consumer(change, good_turns=0):
    """The kernel looks for room only when it needs some."""

    def attack(device):
        for _ in range(good_turns):
            device.send(*[bytes(1000)] * 3)
            until(lambda: device.released == device.position)
            device.consume()
        device.consume(change(device.consumed))
        device.send(*[bytes(1000)] * 3)
        until(lambda: device.released == device.position or device.poll(timeout=0))
        device.frame(bytes(1000))
        device.publish()

    return attack


PROVOKED = {
    "send": (Do.FILL, (256,)),
    "send_unlocked": (Do.UNLOCKED, (200,)),
    "reserve": (Do.LOANS, (7,)),
    "long_send": (Do.ECHO, (0,) * 400),
    "long_send_unlocked": (Do.ECHO_UNLOCKED, (0,) * 400),
}
LENT = 256


def beyond_a_loan(how, lie):
    """Move the consumer over a loan that is out, and have the kernel look for room.

    Not one of its bytes may become another message's, for whoever has the loan reads it, too.
    """
    what, arguments = PROVOKED[how]

    def attack(device):
        device.send(struct.pack("<Q", LENT), type=Do.LEND)
        until(lambda: device.available == 2 * HEADER + LENT + 2 * 8)
        device.consume(lie(device))
        # Until it sees that, or has gone round the ring.
        for _ in range(4 * RING // 1000):
            device.send_if_alive(struct.pack(f"<{len(arguments)}Q", *arguments), type=what)
            until(lambda: device.released == device.position or device.poll(timeout=0))
        loan = device.kernel_data(HEADER, LENT)
        assert loan == b"\xa5" * LENT, loan

    return attack


LIES = {
    "all": lambda device: device.available,
    "a_part": lambda device: 8,
    "the_loan": lambda device: HEADER + LENT,
}


def bad_state(state):
    def attack(device):
        device.send(*GOOD)
        device.set_state(state)

    return attack


BREACHES = {
    "frame_longer_than_published": bad_frame(b"x" * 8, length=9),
    "frame_longer_than_the_ring": bad_frame(b"", length=RING),
    "frame_half_published": bad_frame(b"x" * 64, published=-64),
    "frame_header_half_published": bad_frame(b"", published=-24),
    "frame_longest": bad_frame(length=2**32 - 1),
    "frame_overflowing": bad_frame(length=2**32 - HEADER),
    "frame_unknown_flag": bad_frame(flags=16),
    "frame_token_without_turns": bad_frame(flags=8),
    "frame_all_flags": bad_frame(flags=0xFFFF),
    "frame_busy_with_unknown_flag": bad_frame(flags=BUSY | 0x8000),
    "frame_discarded_too_long": bad_frame(flags=DISCARD, length=2**31),
    "frame_busy_too_long": bad_frame(flags=BUSY, length=2**31),
    "frame_control_kind": bad_frame(kind=1),
    "frame_buffer_kind": bad_frame(kind=2),
    "frame_unknown_kind": bad_frame(kind=255),
    "frame_last_byte": bad_frame(zero=1),
    "producer_back_to_0": bad_position(lambda at: 0),
    "producer_a_frame_back": bad_position(lambda at: at - 40),
    "producer_ahead_of_the_ring": bad_position(lambda at: at + RING + 8),
    "producer_far_ahead": bad_position(lambda at: at + 2**63),
    "producer_below_zero": bad_position(lambda at: -8),
    "producer_misaligned": bad_position(lambda at: at + 4),
    "producer_odd": bad_position(lambda at: at + 1),
    "producer_page": lambda device: device.write(PAGE, b"\xff" * PAGE),
    "consumer_ahead": bad_consumer(lambda at: at + RING),
    "consumer_far_ahead": bad_consumer(lambda at: at + 2**63),
    "consumer_back": bad_consumer(lambda at: 0, good_turns=3),
    "consumer_a_frame_back": bad_consumer(lambda at: at - 4 * 1032, good_turns=3),
    "consumer_misaligned": bad_consumer(lambda at: at + 4),
    "consumer_below_zero": bad_consumer(lambda at: -8),
    **{
        f"consumer_beyond_a_loan_{how}_{lie}": beyond_a_loan(how, LIES[lie])
        for how, lie in itertools.product(PROVOKED, LIES)
    },
    "state_3": bad_state(3),
    "state_most": bad_state(2**32 - 1),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["test", "test_quiet", "test_threads", "test_in_place"])
@pytest.mark.parametrize("attack", BREACHES.values(), ids=BREACHES)
async def test_breach_of_the_rules(name, attack):
    found, errors = await attacked(name, attack)
    assert errors == 1
    broken = errno.EPROTO
    assert found["events"] & (select.POLLERR | select.POLLHUP) == select.POLLERR | select.POLLHUP
    assert (found["kick"], found["wait"]) == (broken, [broken] * 3)
    assert found["state"] == 0


def strange_words(device):
    """Epochs and wishes may be anything: they only ring bells."""
    for value in (1, 2**64 - 1, 2**63, 0, 12345):
        device.write64(PAGE + 128, value)
        device.write64(PAGE + 136, 2**64 - value)
        device.park(value)
        assert device.kick() == 0
        assert echoes(device)
    for at in (8, 120, 144, 264, 2400):  # reserved words, and what follows them
        device.write64(PAGE + at, 2**64 - 1)
        device.write64(2 * PAGE + at, 2**64 - 1)
    device.write(0, b"\xff" * PAGE)  # the geometry is ours, nobody reads it
    return "alive"


def busy_for_ever(device):
    """The messages behind it do not come, that is all."""
    at = device.position
    device.frame(b"x", flags=BUSY)
    device.send(*GOOD)
    assert device.kick() == 0
    before = device.available  # from the first kick on it may be seen at any time
    device.write_data(at, (1).to_bytes(8, "little"))
    assert device.kick() == 0
    until(lambda: device.available - before >= HEADER * 6)
    until(lambda: device.released == device.position)
    device.consume()
    return "alive"


def discarded_for_ever(device):
    """Nothing to be handed out, round and round."""
    for _ in range(50):
        for _ in range(100):
            device.frame(flags=DISCARD)
        device.publish()
        device.kick()
        until(lambda: device.released == device.position)
    return "alive"


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["test", "test_quiet"])
@pytest.mark.parametrize("attack", [strange_words, busy_for_ever, discarded_for_ever])
async def test_strange_but_allowed(name, attack):
    found, errors = await attacked(name, attack)
    assert (found, errors) == ({"alive": True}, 0)


@pytest.mark.asyncio
@pytest.mark.parametrize("state", [1, 2])
async def test_end_by_hand(state):
    found, errors = await attacked("test", bad_state(state))
    assert errors == 0
    assert found["events"] & (select.POLLERR | select.POLLHUP) == select.POLLHUP
    assert (found["kick"], found["wait"]) == (SHUT, [SHUT] * 3)


# ---- at any time: programs/storm.c -----------------------------------------------


MODES = {
    "data": "d",
    "numbers": "t",
    "lengths": "l",
    "flags": "f",
    "producer": "p",
    "consumer": "c",
    "epochs": "e",
    "states": "s",
    "anything": "r",
    "all": "a",
}
HARMLESS = ("data", "numbers", "epochs")


@pytest.fixture(scope="session")
def storm(programs):
    return programs / "storm"


async def run_storm(storm, name, *arguments):
    """Meanwhile somebody else uses the device; the numbers it prints."""
    async with bystander(name) as good:
        process = subprocess.Popen(
            [storm, f"/dev/kucomms_{name}", *map(str, arguments)], stdout=subprocess.PIPE
        )
        try:
            while process.poll() is None:
                await good.check()
            assert process.returncode == 0
            return json.loads(process.stdout.read())
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


async def run_storms(storm, name, mode):
    """Storms until the module has closed a channel for it; on a slow machine chance takes long."""
    total = (0, 0, 0, 0)
    for storms in range(1, STORMS + 1):
        seed = random.getrandbits(32)
        found = await run_storm(storm, name, MODES[mode], STORM_SECONDS, seed)
        total = tuple(map(operator.add, total, found))
        _channels, broken, shut, _read = total
        if broken or (mode == "states" and shut):
            return storms, *total
    pytest.fail(f"the module has found nothing wrong: {total}")


@pytest.mark.asyncio
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in HARMLESS])
async def test_everything_is_rewritten_all_the_time(storm, mode):
    """Also between the kernel's check and its use."""
    before = counters()["protocol_errors"]
    storms, channels, broken, shut, read = await run_storms(storm, "test", mode)
    assert read > 0
    assert broken <= counters()["protocol_errors"] - before <= channels
    assert broken + shut >= channels - storms


@pytest.mark.asyncio
@pytest.mark.parametrize("mode", HARMLESS)
async def test_what_is_the_peers_own_is_rewritten_all_the_time(storm, mode):
    before = counters()["protocol_errors"]
    found = await run_storm(storm, "test", MODES[mode], STORM_SECONDS, random.getrandbits(32))
    channels, broken, shut, read = found
    assert read > 0
    assert (channels, broken, shut, counters()["protocol_errors"] - before) == (1, 0, 0, 0)


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["test_threads", "test_in_place"])
async def test_other_endpoints_are_rewritten_all_the_time(storm, name):
    before = counters()["protocol_errors"]
    _storms, channels, broken, _shut, _read = await run_storms(storm, name, "all")
    assert 0 < broken <= counters()["protocol_errors"] - before <= channels


CHECKSUM = 16


def checksums():
    return tuple(map(int, (PARAMETERS / "checksums").read_text().split()))


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["test", "test_in_place"])
async def test_what_a_handler_gets_is_its_own(storm, name):
    """It reads its message twice; in place it is told that this can happen."""
    before = checksums()
    await run_storm(storm, name, "d", STORM_SECONDS, random.getrandbits(32), CHECKSUM)
    made, different = (b - a for a, b in zip(before, checksums(), strict=True))
    assert made > 50
    if name == "test":
        assert different == 0
    else:
        assert different > 0
