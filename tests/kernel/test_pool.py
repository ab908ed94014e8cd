# SPDX-License-Identifier: MIT
"""Pools of a channel, and buffers in messages: the user's side by hand, and by the package.

The other half is ``module/kucomms_buffers.c``.
"""

import asyncio
import contextlib
import ctypes
import errno
import itertools
import math
import mmap
import os
import random
import select
import struct
import subprocess
import sys
import threading
import time
from enum import IntEnum, auto
from pathlib import Path

import pytest

import kucomms
from tests.kernel import pool_io
from tests.kernel.lifecycle import Child
from tests.kernel.pool_device import (
    BUFFER,
    CONTIGUOUS,
    NEWS,
    NOTICE,
    POOLS,
    PoolDevice,
    carried,
    close_pool,
    open_pool,
)
from tests.kernel.raw_device import (
    EXEC,
    HEADER,
    PAGE,
    PATIENCE,
    PRIVATE,
    READ,
    SHARED,
    TURNS_FEATURE,
    WRITE,
    RawDevice,
    channel_counters,
    counters,
    map_memory,
    open_device,
    protect,
    remap,
    set_up,
    unmap,
)
from tests.transports.processes import in_child

LOOPS = ["asyncio"]  # what is tested is the kernel

ROOT = Path(__file__).resolve().parents[2]
SYSFS = Path("/sys/devices/virtual/kucomms/kucomms")
NAMES = ("buffers", "buffers_in_place")
MOST = 64
SENT = 1000
STORM_SECONDS = 3


class Do(IntEnum):
    """The types of messages that the module knows."""

    ECHO = 0
    NOTHING = auto()
    SUM = auto()
    TAKE = auto()
    FREE = auto()
    SEND_KEPT = auto()
    OPEN = auto()
    CLOSE = auto()
    ALLOCATE = auto()
    RETRY = auto()
    WRONG = auto()
    RETRY_TAKEN = auto()
    HOLD = auto()
    STATUS = auto()
    UNLOCKED = auto()
    WRITE = auto()
    FREE_OTHERS = auto()
    RETRY_BOTH = auto()


HERE, HARD, WORK = range(3)


@pytest.fixture(scope="module", autouse=True)
def module(load, unload):
    load("kucomms")
    for name in NAMES:
        (SYSFS / "create_device").write_text(f"kucomms_{name}")
    load("kucomms_buffers")
    yield
    unload("kucomms_buffers")
    for name in NAMES:
        (SYSFS / "remove_device").write_text(f"kucomms_{name}")
    unload("kucomms")


@pytest.fixture(autouse=True)
def nothing_is_left(module):
    """All memory comes back."""
    yield
    wait_until(lambda: (alive := counters())["channels"] == 0 and alive["pages"] == 0)


@pytest.fixture(params=NAMES)
def device(request):
    with PoolDevice(request.param) as device:
        yield device


def wait_until(condition):
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up, counters()
        os.sched_yield()


def runner(name="buffers"):
    """The process ID of the thread that calls the callbacks of the only channel there."""
    (pid,) = (
        path.parent.name
        for path in Path("/proc").glob("[0-9]*/comm")
        if path.read_text().strip() == f"kucomms_{name}"
        and not (path.parent / "cmdline").read_bytes()
    )
    return int(pid)


def until_it_sleeps(pid):
    """Who is kicked is awake before the kick has returned, until he has nothing more to do."""
    stat = Path(f"/proc/{pid}/stat")
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "I")


@contextlib.contextmanager
def refused(*numbers):
    with pytest.raises(OSError) as caught:  # noqa: PT011
        yield
    assert caught.value.errno in numbers


def pages_of(device):
    """Those of pools."""
    return counters()["pages"] - 2 * device.side_size // PAGE


def is_broken(device):
    """Whether the channel is shut for what we did, and no other one is disturbed."""
    events = device.poll()
    with PoolDevice() as other:
        pool = other.open_pool(PAGE)
        pool.write(0, b"\1\2")
        other.ask(Do.SUM, buffers=[pool.buffer(0, 2)])
        assert other.message()[0].numbers == (2, 3)
    return events & select.POLLERR and events & select.POLLHUP


def kernel_pool(device, size=4 * PAGE, flags=0):
    """A pool of the module, mapped here."""
    device.ask(Do.OPEN, size, flags)
    answer, (news,) = device.message()
    assert answer.numbers == (0,)
    return device.map(*news.news)


# ---- pools of the user ----------------------------------------------------------


def test_without_the_feature_there_are_no_pools():
    with RawDevice("buffers", ring_size=PAGE) as device:
        assert device.setup.features == 0
        assert device.read64(16) == 0
        assert open_pool(device.fd, PAGE)[0] == errno.EOPNOTSUPP
        assert close_pool(device.fd, 1) == errno.EOPNOTSUPP
        for number in range(4):
            with refused(errno.EINVAL):
                map_memory(device.fd, PAGE, number + 2 << 32)
        device.frame(carried((1, 0, 1)), kind=BUFFER, zero=1)
        device.publish()
        device.kick()
        assert is_broken(device)


def test_the_feature_is_in_force_when_both_know_it():
    with PoolDevice() as device:
        assert device.setup.features == POOLS
        assert device.read64(16) == POOLS
    fd = open_device("buffers")
    try:
        failed, told = set_up(fd, features=POOLS | 4)
        assert failed == errno.EPROTONOSUPPORT
        assert told.features == POOLS | TURNS_FEATURE
        assert open_pool(fd, PAGE)[0] == errno.ENOTCONN
        assert close_pool(fd, 1) == errno.ENOTCONN
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"size": size} for size in (0, 1, PAGE + 1, PAGE - 1, 2**32 + PAGE, 2**63, 2**64 - PAGE)),
        *({"flags": flags} for flags in (2, 3, 2**31)),
        {"number": 1},
        {"offset": PAGE},
        {"reserved": (0, 0, 0, 1)},
        {"flags": CONTIGUOUS, "size": 4 * 2**20 + PAGE},
    ],
    ids=str,
)
def test_open_pool_refuses_nonsense(wrong):
    with PoolDevice() as device:
        assert open_pool(device.fd, **{"size": PAGE} | wrong)[0] == errno.EINVAL
        assert pages_of(device) == 0


def test_close_pool_refuses_nonsense():
    with PoolDevice() as device:
        pool = device.open_pool(PAGE)
        for wrong in ({"size": PAGE}, {"flags": 1}, {"offset": 1}, {"reserved": (1, 0, 0, 0)}):
            assert close_pool(device.fd, pool.number, **wrong) == errno.EINVAL
        of_the_kernel = kernel_pool(device)
        for number in (0, 2, 3, 2**32 - 1, of_the_kernel.number):
            assert close_pool(device.fd, number) == errno.ENOENT
        assert close_pool(device.fd, pool.number) == 0
        assert close_pool(device.fd, pool.number) == errno.ENOENT


def test_a_number_is_used_once_and_so_many_at_a_time():
    with PoolDevice() as device:
        numbers = []
        for _ in range(MOST):
            failed, number, offset = open_pool(device.fd, PAGE)
            assert failed == 0
            assert offset % PAGE == 0
            numbers.append(number)
        assert open_pool(device.fd, PAGE)[0] == errno.EMFILE
        assert pages_of(device) == MOST
        gone = numbers[10]
        assert close_pool(device.fd, gone) == 0
        wait_until(lambda: pages_of(device) == MOST - 1)
        failed, number, _ = open_pool(device.fd, PAGE)
        assert failed == 0
        numbers.append(number)
        assert all(number % 2 for number in numbers)
        assert len(set(numbers)) == len(numbers)
        assert number > max(numbers[:-1])
        assert channel_counters("buffers")["pools"] == MOST


def test_a_closed_pool_stays_while_it_is_mapped():
    with PoolDevice() as device:
        pool = device.open_pool(4 * PAGE)
        pool.write(0, b"kept")
        assert close_pool(device.fd, pool.number) == 0
        # Another one makes sure that the runner has looked.
        kernel_pool(device, PAGE)
        assert pool.read(0, 4) == b"kept"
        assert pages_of(device) == 5
        unmap(pool.at, PAGE)
        assert pool.read(1, 4) == bytes(4)
        unmap(pool.at + PAGE, 3 * PAGE)
        pool.at = 0
        wait_until(lambda: pages_of(device) == 1)
        with refused(errno.ENOENT):
            map_memory(device.fd, PAGE, pool.offset)


def test_what_of_a_pool_can_be_mapped():
    with PoolDevice() as device:
        pool = device.open_pool(4 * PAGE)
        for first, count in ((0, 5), (4, 1), (3, 2), (2**20 - 1, 1), (0, 2**20 + 1)):
            with refused(errno.EINVAL, errno.ENOMEM):
                map_memory(device.fd, count * PAGE, pool.offset + first * PAGE)
        for prot in (EXEC, READ | EXEC, READ | WRITE | EXEC):
            with refused(errno.EACCES, errno.EPERM):
                map_memory(device.fd, PAGE, pool.offset, prot)
        for flags in (PRIVATE, PRIVATE | 0x2000):
            with refused(errno.EINVAL):
                map_memory(device.fd, PAGE, pool.offset, READ, flags)
        for offset in (2**63 - PAGE, (2**31 + 2) << 32):
            with refused(errno.EINVAL, errno.EOVERFLOW):
                map_memory(device.fd, PAGE, offset)
        for offset in (2**62, pool.offset + (2 << 32)):
            with refused(errno.ENOENT):
                map_memory(device.fd, PAGE, offset)
        again = map_memory(device.fd, 2 * PAGE, pool.offset + PAGE, READ | WRITE)
        with refused(errno.EACCES):
            protect(again, PAGE, READ | EXEC)
        with refused(errno.EFAULT, errno.EINVAL):
            remap(again, 2 * PAGE, 3 * PAGE)
        pool.write(2, b"both")
        assert ctypes.string_at(again + PAGE, 4) == b"both"
        unmap(again, 2 * PAGE)


def is_mapped(at):
    return f"{at:x}-" in Path("/proc/self/maps").read_text()


@pytest.mark.asyncio
async def test_a_forked_child_has_no_mapping():
    with PoolDevice() as device:
        pool = device.open_pool(PAGE)
        assert is_mapped(pool.at)

        def child():
            assert not is_mapped(pool.at)

        await in_child(child)


def frames_of(at, count):
    """The numbers of the physical pages."""
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(at // PAGE * 8)
        entries = struct.unpack(f"<{count}Q", file.read(8 * count))
    assert all(entry >> 63 for entry in entries)
    return [entry & (1 << 55) - 1 for entry in entries]


@pytest.mark.parametrize("owner", ["user", "kernel"])
def test_a_contiguous_pool(owner):
    """Also one that is no power of two."""
    with PoolDevice() as device:
        for count in (1, 3, 100):
            if owner == "user":
                pool = device.open_pool(count * PAGE, CONTIGUOUS)
            else:
                pool = kernel_pool(device, count * PAGE, CONTIGUOUS)
            first, *_ = frames = frames_of(pool.at, count)
            assert frames == list(range(first, first + count))
            assert pool.read(0, count * PAGE) == bytes(count * PAGE)


def test_pools_are_charged_to_who_opens_them(cgroup):
    (cgroup / "memory.max").write_text(str(64 << 20))
    program = f"""
import errno, os
from pathlib import Path
Path("{cgroup}/cgroup.procs").write_text("0")
from tests.kernel.pool_device import PoolDevice, open_pool
with PoolDevice() as device:
    device.open_pool(4 << 20)
    assert open_pool(device.fd, 256 << 20)[0] == errno.ENOMEM
    device.open_pool(4 << 20)
    assert int(Path("{cgroup}/memory.current").read_text()) > 8 << 20
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=PATIENCE)
    assert "oom_kill 0" in (cgroup / "memory.events").read_text()


def test_no_room_for_the_list_of_a_pools_pages(cgroup):
    """That is an error, and kills nobody."""
    size = 1 << 30
    assert mem_available() > size
    program = f"""
import errno
from pathlib import Path
from tests.kernel.pool_device import PoolDevice, open_pool
cgroup = Path("{cgroup}")
(cgroup / "cgroup.procs").write_text("0")
with PoolDevice() as device:
    used = int((cgroup / "memory.current").read_text())
    (cgroup / "memory.max").write_text(str(used + {size // PAGE * 8 // 2}))
    assert open_pool(device.fd, {size})[0] == errno.ENOMEM
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=PATIENCE)
    assert "oom_kill 0" in (cgroup / "memory.events").read_text()


def test_a_pool_larger_than_the_memory_takes_none(cgroup):
    size = 4 << 30
    if mem_available() > size:
        pytest.skip("this machine has room for the largest pool")
    program = f"""
import errno
from pathlib import Path
from tests.kernel.pool_device import PoolDevice, open_pool
cgroup = Path("{cgroup}")
(cgroup / "cgroup.procs").write_text("0")
with PoolDevice() as device:
    assert open_pool(device.fd, {size})[0] == errno.ENOMEM
    assert int((cgroup / "memory.peak").read_text()) < 64 << 20
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=PATIENCE)


def mem_available():
    text = Path("/proc/meminfo").read_text()
    return int(text.split("MemAvailable:")[1].split()[0]) << 10


def test_all_memory_comes_back():
    before = mem_available()
    size = 32 << 20
    for _ in range(20):
        with PoolDevice() as device:
            pool = device.open_pool(size)
            pool.write(0, b"x" * size)
            device.open_pool(1 << 20, CONTIGUOUS)
    wait_until(lambda: counters()["pages"] == 0)
    wait_until(lambda: mem_available() > before - 10 * size)


# ---- buffers of the user --------------------------------------------------------


def test_a_buffer_is_seen_by_the_kernel_and_comes_back(device):
    pool = device.open_pool(8 * PAGE)
    pool.write(0, b"\1" * PAGE)
    pool.write(3, b"\2" * (2 * PAGE))
    buffers = [pool.buffer(3, PAGE + 1), pool.buffer(0, 10)]
    for _ in range(100):
        device.ask(Do.SUM, buffers=buffers)
        answer, before = device.message()
        assert answer.numbers == (PAGE + 1, 2 * (PAGE + 1), 10, 10)
        assert not before
        assert sorted(device.returned(2)) == sorted(buffers)


def test_an_echo_by_reference(device):
    pool = device.open_pool(4 * PAGE)
    buffers = [pool.buffer(1, PAGE), pool.buffer(0, 1)]
    for number, do in enumerate([Do.ECHO, Do.UNLOCKED] * 50):
        device.hand_over(do, *buffers, data=b"with data", id=number)
        echo, before = device.message()
        assert (echo.kind, echo.type, echo.id, echo.data) == (BUFFER, do, number, b"with data")
        assert echo.buffers == buffers
        assert not before


def test_the_kernel_writes_into_it(device):
    pool = device.open_pool(2 * PAGE)
    device.ask(Do.WRITE, 0xAB, buffers=[pool.buffer(0, PAGE + 5)])
    assert device.message()[0].buffers == [pool.buffer(0, PAGE + 5)]
    assert pool.read(0, PAGE + 6) == b"\xab" * (PAGE + 5) + b"\0"


@pytest.mark.parametrize("length", [0, 5000, 20000])
def test_kept_buffers_are_sent_in_one_message(device, length):
    """5000: more than is copied with interrupts off."""
    pool = device.open_pool(255 * PAGE)
    device.hand_over(Do.TAKE, *[pool.buffer(page, PAGE) for page in range(255)])
    device.ask(Do.STATUS)
    assert device.message()[0].numbers[0] == 255
    device.ask(Do.SEND_KEPT, length)
    message, before = device.message()
    assert message.type == SENT
    assert message.buffers == [pool.buffer(page, PAGE) for page in range(255)]
    assert message.data == bytes(length)
    assert not before


@pytest.mark.parametrize("context", [HERE, HARD, WORK])
def test_kept_buffers_are_freed_in_any_context(device, context):
    pool = device.open_pool(100 * PAGE)
    for _ in range(10):
        device.hand_over(Do.TAKE, *[pool.buffer(page, 1) for page in range(100)])
        device.ask(Do.FREE, context)
        assert sorted(device.returned(100)) == [pool.buffer(page, 1) for page in range(100)]


def test_a_message_in_the_ring_is_received_though_its_pool_was_closed(device):
    pool = device.open_pool(2 * PAGE)
    pool.write(0, b"\1")
    for page in range(2):
        device.hand_over(Do.SUM, pool.buffer(page, 1), publish=False)
    device.publish()
    assert close_pool(device.fd, pool.number) == 0
    device.kick()
    sums, back = [], []
    while len(sums) < 2 or len(back) < 2:
        frame = device.next_frame()
        if frame.is_notice:
            back += frame.buffers
        else:
            sums.append(frame.numbers)
    assert sums == [(1, 1), (1, 0)]
    assert sorted(back) == [pool.buffer(0, 1), pool.buffer(1, 1)]


def test_a_closed_pool_stays_while_the_kernel_has_of_it():
    with PoolDevice() as device:
        pool = device.open_pool(4 * PAGE)
        pool.write(2, b"\7")
        device.hand_over(Do.TAKE, pool.buffer(2, PAGE))
        assert close_pool(device.fd, pool.number) == 0
        pool.unmap()
        device.ask(Do.STATUS)
        device.message()
        assert pages_of(device) == 4
        device.ask(Do.FREE, HERE)
        assert device.returned(1) == [pool.buffer(2, PAGE)]
        wait_until(lambda: pages_of(device) == 0)


def test_what_the_module_does_wrong_is_refused():
    with PoolDevice() as other, PoolDevice() as device:
        pool = device.open_pool(PAGE)
        device.hand_over(Do.WRONG, pool.buffer(0, 1))
        answer, _ = device.message()
        invalid = -errno.EINVAL
        assert answer.numbers == (
            *(invalid, invalid, invalid, -errno.EMSGSIZE),
            *(invalid, invalid, invalid),
        )
        assert device.returned(1) == [pool.buffer(0, 1)]
        assert other.available == other.consumed


def test_a_taken_buffer_is_not_there_when_the_message_comes_again(device):
    pool = device.open_pool(3 * PAGE)
    device.hand_over(Do.RETRY_TAKEN, *[pool.buffer(page, 1) for page in range(3)])
    frames = [device.next_frame(), device.next_frame()]
    (answer,) = (frame for frame in frames if not frame.is_notice)
    (notice,) = (frame for frame in frames if frame.is_notice)
    assert answer.numbers == (3, 0)
    assert notice.buffers == [pool.buffer(2, 1)]
    device.ask(Do.FREE, HERE)
    assert sorted(device.returned(2)) == [pool.buffer(0, 1), pool.buffer(1, 1)]


def test_a_message_is_held_without_its_buffers():
    with PoolDevice("buffers_in_place") as device:
        pool = device.open_pool(PAGE)
        device.hand_over(Do.HOLD, pool.buffer(0, PAGE), data=b"x" * 9)
        assert device.returned(1) == [pool.buffer(0, PAGE)]
        device.ask(Do.HOLD)
        assert device.message()[0].numbers == (9, 0, ord("x"))


# ---- a full ring ----------------------------------------------------------------


def test_what_is_given_back_waits_for_room_and_goes_first():
    with PoolDevice(ring_size=PAGE) as device:
        pool = device.open_pool(500 * PAGE)
        pages = iter(range(500))
        filled = 0
        while device.available - device.consumed <= device.ring_size - HEADER - 96:
            before = device.available
            device.send(bytes(64), type=Do.ECHO)
            wait_until(lambda: device.available > before)  # noqa: B023
            filled += 1
        given = []
        for _ in range(4):
            buffers = [pool.buffer(page, 1) for page in itertools.islice(pages, 100)]
            device.hand_over(Do.NOTHING, *buffers)
            wait_until(lambda: device.released == device.position)
            given += buffers
        for _ in range(3):
            device.send(bytes(64), type=Do.ECHO)
        back, echoes, order = [], 0, []
        while len(back) < len(given) or echoes < filled + 3:
            frame = device.next_frame()
            if frame.is_notice:
                back += frame.buffers
            else:
                echoes += 1
                order.append(len(back))
        assert sorted(back) == given
        assert echoes == filled + 3
        # Not one of the last three has overtaken what was to be given back before them.
        assert order[-3:] == [len(given)] * 3


def test_what_was_freed_is_given_back_before_the_next_message(device):
    """Both by callbacks of one batch, after which all is given back that is left."""
    pool = device.open_pool(PAGE)
    buffer = pool.buffer(0, PAGE)
    device.hand_over(Do.TAKE, buffer)
    wait_until(lambda: device.released == device.position)
    device.hand_over(Do.FREE, data=bytes(8), publish=False)
    device.send(b"behind it", type=Do.ECHO)
    answer, before = device.message()
    assert answer.data == b"behind it"
    assert [frame.buffers for frame in before] == [[buffer]]


def test_buffers_come_and_go_through_a_full_ring(device):
    """Each comes back once, whatever the state of the ring."""
    pool = device.open_pool(64 * PAGE)
    free = [pool.buffer(page, PAGE) for page in range(64)]
    out = set()
    generator = random.Random(7)
    count = 0
    give_up = time.monotonic() + PATIENCE
    while count < 2000 or out:
        assert time.monotonic() < give_up, (count, len(out))
        while count < 2000 and free and device.position - device.released < 60_000:
            take = [free.pop() for _ in range(min(len(free), generator.randrange(1, 9)))]
            out.update(take)
            do = generator.choice([Do.ECHO, Do.NOTHING, Do.WRITE, Do.TAKE, Do.FREE])
            device.hand_over(do, *take, data=bytes(8 * generator.randrange(100)))
            count += 1
        if device.available != device.consumed:
            frame = device.next_frame()
            assert out.issuperset(frame.buffers)
            out.difference_update(frame.buffers)
            free += frame.buffers
        elif device.released == device.position:
            device.ask(Do.FREE, HERE)
        else:
            os.sched_yield()


# ---- pools of the kernel --------------------------------------------------------


def test_a_pool_of_the_kernel(device):
    pool = kernel_pool(device, 3 * PAGE + 1)
    assert (pool.number % 2, pool.size) == (0, 4 * PAGE)
    device.ask(Do.ALLOCATE, 0, PAGE + 1, 2)
    assert device.message()[0].numbers == (2,)
    device.ask(Do.ALLOCATE, 0, 1, 1)
    assert device.message()[0].numbers == (-errno.ENOBUFS,)
    device.ask(Do.ALLOCATE, 0, 4 * PAGE + 1, 1)
    assert device.message()[0].numbers == (-errno.EMSGSIZE,)
    device.ask(Do.ALLOCATE, 0, 0, 1)
    assert device.message()[0].numbers == (-errno.EINVAL,)
    device.ask(Do.SEND_KEPT)
    message, _ = device.message()
    buffers = [pool.buffer(0, PAGE + 1), pool.buffer(2, PAGE + 1)]
    assert (message.type, message.buffers) == (SENT, buffers)
    assert pool.read(0, PAGE + 1) == b"\1" * (PAGE + 1)
    assert pool.read(2, PAGE + 1) == b"\2" * (PAGE + 1)
    device.give_back(buffers[1])
    device.ask(Do.ALLOCATE, 0, 1, 9)
    assert device.message()[0].numbers == (2,)


def test_buffers_of_the_kernel_go_and_come_in_messages(device):
    pool = kernel_pool(device)
    device.ask(Do.ALLOCATE, 0, 100, 1)
    device.message()
    device.ask(Do.SEND_KEPT)
    assert device.message()[0].buffers == [pool.buffer(0, 100)]
    for _ in range(20):
        device.hand_over(Do.ECHO, pool.buffer(0, 100))
        assert device.message()[0].buffers == [pool.buffer(0, 100)]
    # Nobody takes it: it is free.
    device.hand_over(Do.NOTHING, pool.buffer(0, 100))
    device.ask(Do.ALLOCATE, 0, 4 * PAGE, 1)
    assert device.message()[0].numbers == (1,)


def test_a_closed_pool_of_the_kernel_stays_while_we_have_of_it():
    with PoolDevice() as device:
        pool = kernel_pool(device)
        device.ask(Do.ALLOCATE, 0, PAGE, 2)
        device.message()
        device.ask(Do.SEND_KEPT)
        buffers = device.message()[0].buffers
        device.ask(Do.ALLOCATE, 0, PAGE, 1)
        device.message()
        device.ask(Do.CLOSE, 0)
        assert device.pool_news() == (pool.number, 0, 0)
        device.ask(Do.SEND_KEPT)
        assert device.message()[0].numbers == (-errno.ESTALE,)
        device.ask(Do.FREE, HERE)
        pool.unmap()
        # In a message and by a notice.
        device.hand_over(Do.SUM, buffers[0])
        assert device.message()[0].numbers[0] == PAGE
        assert pages_of(device) == 4
        device.give_back(buffers[1])
        wait_until(lambda: pages_of(device) == 0)
        with refused(errno.ENOENT):
            map_memory(device.fd, PAGE, pool.offset)


def test_the_kernel_has_so_many_pools_at_a_time():
    with PoolDevice() as device:
        for _ in range(MOST):
            kernel_pool(device, PAGE)
        device.ask(Do.OPEN, PAGE, 0)
        assert device.message()[0].numbers == (-errno.EMFILE,)
        for wrong in ((0, 0), (PAGE, 2), (2**33, 0), (2**64 - 1, 0), (5 << 20, CONTIGUOUS)):
            device.ask(Do.OPEN, *wrong)
            assert device.message()[0].numbers[0] in (-errno.EINVAL, -errno.EMFILE)
        device.mappings.pop(5).unmap()
        device.ask(Do.CLOSE, 5)
        assert device.pool_news()[1] == 0
        wait_until(lambda: pages_of(device) == MOST - 1)
        kernel_pool(device, PAGE)


def test_without_the_feature_the_kernel_has_none():
    with PoolDevice(features=0) as device:
        device.ask(Do.OPEN, PAGE, 0)
        assert device.message()[0].numbers == (-errno.EOPNOTSUPP,)


def test_who_waits_for_a_buffer_gets_what_comes_back_behind_the_message(device):
    """The message that cannot be answered for want of a buffer is in front of the notice."""
    pool = kernel_pool(device, PAGE)
    device.ask(Do.ALLOCATE, 0, PAGE, 1)
    device.message()
    device.ask(Do.SEND_KEPT)
    assert device.message()[0].buffers == [pool.buffer(0, PAGE)]
    for _ in range(20):
        device.ask(Do.RETRY, 0, PAGE)
        device.send(b"behind", type=Do.ECHO)
        device.give_back(pool.buffer(0, PAGE))
        assert device.message()[0].buffers == [pool.buffer(0, PAGE)]
        assert device.message()[0].data == b"behind"
    device.ask(Do.STATUS)
    _kept, _works, tries, _woken = device.message()[0].numbers
    assert tries <= 3 * 20


def all_handed_over(device, pool, length=PAGE):
    """All buffers of a pool of the kernel, which we have now."""
    device.ask(Do.ALLOCATE, 0, length, pool.size // length)
    assert device.message()[0].numbers == (pool.size // length,)
    device.ask(Do.SEND_KEPT)
    return device.message()[0].buffers


def test_a_look_ahead_goes_on_where_the_last_one_has_ended():
    with PoolDevice() as device:
        pid = runner()
        pool = kernel_pool(device, PAGE)
        (out,) = all_handed_over(device, pool)
        for _ in range(2):
            device.ask(Do.RETRY, 0, PAGE)
            until_it_sleeps(pid)
            device.send(b"behind", type=Do.ECHO)
            until_it_sleeps(pid)
            assert device.kick() == 0
            until_it_sleeps(pid)
            device.give_back(out)
            assert device.message()[0].buffers == [out]
            assert device.message()[0].data == b"behind"


def test_what_came_back_before_does_not_suffice():
    """The user gives back one in a message, then asks for what needs two."""
    with PoolDevice() as device:
        pid = runner()
        pool = kernel_pool(device, 2 * PAGE)
        first, second = all_handed_over(device, pool)
        device.hand_over(Do.NOTHING, first, publish=False)
        device.ask(Do.RETRY, 0, 2 * PAGE)
        until_it_sleeps(pid)
        device.give_back(second)
        assert device.message()[0].buffers == [pool.buffer(0, 2 * PAGE)]


@pytest.mark.parametrize("context", [HERE, HARD, WORK])
def test_who_waits_for_a_buffer_gets_what_the_module_frees(context):
    """Its buffers_available callback is called, too, between the two and not some time later."""
    with PoolDevice() as device, PoolDevice() as other:
        pid = runner()
        pool = kernel_pool(device, PAGE)
        for _ in range(50):
            device.ask(Do.ALLOCATE, 0, PAGE, 1)
            assert device.message()[0].numbers == (1,)
            device.ask(Do.RETRY, 0, PAGE)
            until_it_sleeps(pid)
            other.ask(Do.FREE_OTHERS, context)
            (out,) = device.message()[0].buffers
            device.ask(Do.STATUS)
            kept, _works, _tries, woken = device.message()[0].numbers
            assert kept == 0
            assert woken >= 1
            device.give_back(out)
        assert pool.buffer(0, PAGE) == out


def test_who_frees_what_it_got_since_there_is_no_more_is_not_called_for_that():
    """It would go round for ever."""
    with PoolDevice() as device:
        pid = runner()
        pool = kernel_pool(device, 2 * PAGE)
        first, second = all_handed_over(device, pool)
        device.give_back(first)
        device.ask(Do.RETRY_BOTH, 0, PAGE)
        until_it_sleeps(pid)
        device.give_back(second)
        assert sorted(device.message()[0].buffers) == [first, second]
        device.ask(Do.STATUS)
        _kept, _works, tries, _woken = device.message()[0].numbers
        assert tries <= 3


def wait_for_a_buffer(device, name):
    """A message waits for a buffer, and all are here."""
    all_handed_over(device, kernel_pool(device, PAGE))
    device.ask(Do.RETRY, 0, PAGE)
    until_it_sleeps(runner(name))


@pytest.mark.parametrize("how", ["closed", "says so", "killed"])
@pytest.mark.parametrize("name", NAMES)
def test_who_waits_for_a_buffer_of_a_user_who_is_gone(name, how):
    if how == "killed":

        def wait_for_ever(talk):
            device = PoolDevice(name)
            wait_for_a_buffer(device, name)
            talk.sendall(b"waits")
            talk.recv(1)

        with Child(wait_for_ever) as child:
            child.says("waits")
    else:
        with PoolDevice(name) as device:
            wait_for_a_buffer(device, name)
            if how == "says so":
                device.set_state(1)
                assert device.kick() == 0
                assert device.poll() & select.POLLHUP
    wait_until(lambda: counters()["channels"] == 0)
    with PoolDevice(name) as device:
        device.send(b"next", type=Do.ECHO)
        assert device.message()[0].data == b"next"


# ---- who breaks the rules -------------------------------------------------------


@pytest.mark.parametrize("flags", [0, NOTICE])
@pytest.mark.parametrize(
    "wrong",
    [
        *((7, 0, 1), (0, 0, 1), (2, 0, 1), (2**32 - 1, 0, 1), (2**32 - 2, 0, 1)),
        *((1, 4, 1), (1, 0, 4 * PAGE + 1), (1, 3, PAGE + 1), (1, 0, 0), (1, 2**32 - 1, 1)),
        *((1, 1, 2**64 - 1), (1, 1, 2**63), (1, 0, 2**64 - PAGE)),
    ],
    ids=str,
)
def test_a_wrong_buffer_breaks_the_channel(wrong, flags):
    """Of pools that do not exist, or outside of them."""
    with PoolDevice() as device:
        pool = device.open_pool(4 * PAGE)
        assert pool.number == 1
        device.hand_over(Do.SUM, wrong, flags=flags)
        assert is_broken(device)
        assert pool.read(0, 1) == b"\0"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, 1), (0, 1)),
        ((0, 2 * PAGE), (1, 1)),
        ((1, 1), (0, 2 * PAGE)),
        ((1, PAGE), (0, 4 * PAGE)),
    ],
)
@pytest.mark.parametrize("at_once", [False, True])
def test_what_the_kernel_has_is_not_handed_over_again(first, second, at_once):
    with PoolDevice() as device:
        pool = device.open_pool(4 * PAGE)
        buffers = [pool.buffer(*first), pool.buffer(*second)]
        if at_once:
            device.hand_over(Do.NOTHING, *buffers)
        else:
            device.hand_over(Do.TAKE, buffers[0])
            device.hand_over(Do.NOTHING, buffers[1])
        assert is_broken(device)


# The kernel marks long buffers by chunks of so many pages.
CHUNK = 1024
EDGES = [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK - 1, 3 * CHUNK, 5 * CHUNK]


@pytest.mark.parametrize("first", EDGES[:-1])
def test_no_page_of_a_long_buffer_is_handed_over_again(first):
    """Of any, its neighbours are free, and each page of it is when it has come back."""
    size = EDGES[-1]
    with PoolDevice(ring_size=1 << 14) as device:
        pool = device.open_pool(size * PAGE)
        for end in EDGES[EDGES.index(first) + 1 :]:
            around = [(0, first), (end, size)] if end - first < size else []
            parts = [(first, end), *((a, b) for a, b in around if a < b)]
            buffers = [pool.buffer(a, (b - a) * PAGE) for a, b in parts]
            device.hand_over(Do.NOTHING, *buffers)
            assert sorted(device.returned(len(buffers))) == sorted(buffers)
        device.hand_over(Do.NOTHING, pool.buffer(0, size * PAGE))
        device.returned(1)


@pytest.mark.parametrize("end", [1, 2 * CHUNK, 3 * CHUNK - 1])
@pytest.mark.parametrize(
    ("first", "count"),
    [(0, 1), (-1, 1), (-1, CHUNK + 1), (-CHUNK, 2 * CHUNK), (-2 * CHUNK, 3 * CHUNK)],
)
def test_a_page_of_a_long_buffer_is_handed_over_again(first, count, end):
    """From ``first``, beside the end of another, ``count`` pages."""
    if end + first < 0:
        first = -end
    with PoolDevice(ring_size=1 << 14) as device:
        pool = device.open_pool(EDGES[-1] * PAGE)
        device.hand_over(Do.TAKE, pool.buffer(0, end * PAGE))
        device.hand_over(Do.NOTHING, pool.buffer(end + first, count * PAGE))
        if first < 0:
            assert is_broken(device)
        else:
            assert device.returned(1)


def test_a_pool_of_the_user_is_not_given_back_by_the_user():
    with PoolDevice() as device:
        pool = device.open_pool(PAGE)
        device.give_back(pool.buffer(0, 1))
        assert is_broken(device)


@pytest.mark.parametrize("flags", [0, NOTICE])
@pytest.mark.parametrize("what", ["page", "length", "free", "twice", "kept", "twice at once"])
def test_a_buffer_of_the_kernel_comes_back_as_it_went(what, flags):
    with PoolDevice() as device:
        pool = kernel_pool(device)
        device.ask(Do.ALLOCATE, 0, PAGE + 1, 1)
        device.message()
        buffer = pool.buffer(0, PAGE + 1)
        if what != "kept":
            device.ask(Do.SEND_KEPT)
            assert device.message()[0].buffers == [buffer]
        wrong = {
            "page": [pool.buffer(1, PAGE + 1)],
            "length": [pool.buffer(0, PAGE)],
            "free": [pool.buffer(2, PAGE)],
            "kept": [buffer],
            "twice": [buffer],
            "twice at once": [buffer, buffer],
        }[what]
        if what == "twice":
            device.hand_over(Do.TAKE, buffer, flags=flags)
        device.hand_over(Do.NOTHING, *wrong, flags=flags)
        assert is_broken(device)


def test_a_buffer_of_another_channel():
    with PoolDevice() as other, PoolDevice() as device:
        of_other = kernel_pool(other)
        other.ask(Do.ALLOCATE, 0, PAGE, 1)
        other.message()
        other.ask(Do.SEND_KEPT)
        (buffer,) = other.message()[0].buffers
        own = other.open_pool(PAGE)
        assert buffer[0] == of_other.number
        with refused(errno.ENOENT):
            map_memory(device.fd, PAGE, of_other.offset)
        device.hand_over(Do.ECHO, own.buffer(0, 1))
        assert is_broken(device)
        other.hand_over(Do.ECHO, buffer)
        assert other.message()[0].buffers == [buffer]


def test_a_pool_that_was_closed():
    with PoolDevice() as device:
        pool = device.open_pool(PAGE)
        device.hand_over(Do.TAKE, pool.buffer(0, 1))
        assert close_pool(device.fd, pool.number) == 0
        device.ask(Do.FREE, HERE)
        assert device.returned(1) == [pool.buffer(0, 1)]
        device.hand_over(Do.ECHO, pool.buffer(0, 1))
        assert is_broken(device)


def stay_for_room(device):
    """A message stays for want of room, and nothing looks at what we have sent."""
    pid = runner()
    for _ in range(device.ring_size // (HEADER + 64)):
        device.send(bytes(64), type=Do.ECHO)
        wait_until(lambda: device.released == device.position)
    device.send(bytes(64), type=Do.ECHO)
    until_it_sleeps(pid)
    assert device.released != device.position


def close_pool_at(device, pool, ahead):
    """Close it while the producer's page says that we are elsewhere."""
    device.publish(device.released + ahead)
    assert close_pool(device.fd, pool.number) == 0
    until_it_sleeps(runner())
    device.publish()


def test_a_pool_that_was_closed_half_a_world_ago():
    """It is let go, and later, by the same position, is not yet to be let go."""
    with PoolDevice(ring_size=PAGE) as device:
        pool = device.open_pool(2 * PAGE)
        device.hand_over(Do.TAKE, pool.buffer(1, 1))
        pool.unmap()
        stay_for_room(device)
        close_pool_at(device, pool, 64 - 2**63)
        # The last buffer of the pool is given back in the midst of this.
        device.ask(Do.FREE, HERE)
        device.ask(Do.STATUS)
        device.hand_over(Do.ECHO, pool.buffer(0, 1))
        device.consume()
        device.kick()
        assert is_broken(device)


def test_a_pool_that_was_closed_in_the_far_future():
    """It goes when all has come that can have been in the ring."""
    with PoolDevice(ring_size=PAGE) as device:
        pool = device.open_pool(2 * PAGE)
        pool.unmap()
        stay_for_room(device)
        close_pool_at(device, pool, 2**62)
        device.consume()
        assert device.kick() == 0
        end = device.position + device.ring_size
        while device.position < end:
            device.send(bytes(64), type=Do.NOTHING)
            wait_until(lambda: device.released == device.position)
        wait_until(lambda: pages_of(device) == 0)


@pytest.mark.parametrize(
    "frame",
    [
        {"kind": NEWS, "data": struct.pack("<IIQQ", 1, 0, PAGE, 0)},
        {"kind": BUFFER, "zero": 0, "data": bytes(16)},
        {"kind": BUFFER, "zero": 1, "data": bytes(8)},
        {"kind": BUFFER, "zero": 255, "data": bytes(254 * 16)},
        {"kind": 0, "zero": 1, "data": bytes(16)},
        {"kind": 0, "flags": NOTICE, "data": bytes(16)},
        {"kind": BUFFER, "zero": 1, "flags": 0x20, "data": bytes(16)},
    ],
    ids=["news", "no buffers", "half a buffer", "255 buffers", "plain", "plain notice", "flags"],
)
def test_a_wrong_frame_breaks_the_channel(frame):
    with PoolDevice() as device:
        device.open_pool(PAGE)
        data = frame.pop("data")
        device.frame(data, **frame)
        device.publish()
        device.kick()
        assert is_broken(device)


def test_a_message_that_stays_and_is_made_another():
    """It waits with its buffers for a buffer; meanwhile the user takes them out of it."""
    with PoolDevice() as device:
        pool = device.open_pool(2 * PAGE)
        of_the_kernel = kernel_pool(device, PAGE)
        device.ask(Do.ALLOCATE, 0, PAGE, 1)
        device.message()
        device.ask(Do.SEND_KEPT)
        (out,) = device.message()[0].buffers
        at = device.position
        device.ask(Do.RETRY, 0, PAGE, buffers=[pool.buffer(0, 1)])
        device.ask(Do.STATUS)
        wait_until(lambda: channel_counters("buffers")["buffers_received"] == 1)
        control = struct.pack("<Q", 32)
        device.write_data(at, control)
        device.give_back(out)
        assert of_the_kernel.buffer(0, PAGE) == out
        assert is_broken(device)


def test_whoever_writes_anything_harms_himself(device):
    """Random lists, and a thread that changes them, and all that lies in the pools."""
    generator = random.Random(11)
    end = time.monotonic() + STORM_SECONDS
    broken = 0
    while time.monotonic() < end:
        with PoolDevice() as hostile:
            pools = [hostile.open_pool(8 * PAGE) for _ in range(3)]
            pools.append(kernel_pool(hostile, 8 * PAGE))
            numbers = [pool.number for pool in pools]
            stop = threading.Event()

            def change(hostile=hostile, pools=pools, stop=stop):
                own = random.Random(13)
                while not stop.is_set():
                    at = own.randrange(max(hostile.position, 8))
                    hostile.write_data(at & ~7, own.randbytes(8))
                    own.choice(pools).write(own.randrange(8), own.randbytes(64))

            thread = threading.Thread(target=change)
            thread.start()
            try:
                for _ in range(generator.randrange(200)):
                    if hostile.position - hostile.released > 40_000:
                        break
                    count = generator.randrange(1, 6)
                    lists = [
                        (
                            generator.choice(numbers),
                            generator.randrange(8),
                            generator.randrange(1, PAGE),
                        )
                        for _ in range(count)
                    ]
                    hostile.frame(
                        carried(*lists) + struct.pack("<3Q", 0, PAGE, 2),
                        kind=BUFFER,
                        zero=count,
                        flags=NOTICE * (generator.random() < 0.1),
                        type=generator.choice(list(Do)),
                    )
                    hostile.publish()
                    if generator.random() < 0.3:
                        close_pool(hostile.fd, generator.choice(numbers))
                    if hostile.kick():
                        break
                    hostile.consume()
                broken += bool(hostile.poll(timeout=0))
            finally:
                stop.set()
                thread.join()
    assert broken
    pool = device.open_pool(PAGE)
    device.hand_over(Do.ECHO, pool.buffer(0, 1))
    assert device.message()[0].buffers == [pool.buffer(0, 1)]


def test_pools_opened_mapped_and_closed_by_many_threads():
    """One of them closes those that are just being opened: it can guess their numbers."""
    with PoolDevice() as device:
        end = time.monotonic() + STORM_SECONDS
        numbers = [1]
        guessed = 0

        def churn(seed):
            generator = random.Random(seed)
            while time.monotonic() < end:
                failed, number, offset = open_pool(device.fd, 4 * PAGE)
                assert failed in (0, errno.EMFILE)
                if failed:
                    continue
                numbers.append(number)
                if generator.random() < 0.5:
                    with contextlib.suppress(FileNotFoundError):
                        at = map_memory(device.fd, 4 * PAGE, offset, READ | WRITE, SHARED)
                        ctypes.memset(at, seed, 4 * PAGE)
                        unmap(at, 4 * PAGE)
                with contextlib.suppress(OSError):
                    unmap(map_memory(device.fd, PAGE, offset + (2 << 32)), PAGE)
                assert close_pool(device.fd, number) in (0, errno.ENOENT)

        def guess():
            nonlocal guessed
            while time.monotonic() < end:
                for ahead in range(2, 12, 2):
                    guessed += not close_pool(device.fd, numbers[-1] + ahead)

        threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(4)]
        threads.append(threading.Thread(target=guess))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: pages_of(device) == 0)
        assert guessed
        assert len(set(numbers[1:])) == len(numbers[1:])


def test_the_channel_ends_with_everything_in_use():
    """The kernel has buffers of ours, we have some of it, notices wait; then we are gone."""
    for _ in range(20):
        with PoolDevice(ring_size=PAGE) as device:
            pool = device.open_pool(64 * PAGE)
            kernel_pool(device, 64 * PAGE)
            device.ask(Do.ALLOCATE, 0, PAGE, 8)
            device.message()
            device.ask(Do.SEND_KEPT)
            device.message()
            device.hand_over(Do.TAKE, *[pool.buffer(page, 1) for page in range(32)])
            device.hand_over(Do.NOTHING, *[pool.buffer(page, 1) for page in range(32, 64)])
            device.ask(Do.OPEN, PAGE, 0)


# ---- a process dies while its I/O is under way ----------------------------------


@pytest.fixture(scope="module")
def slow_device():
    """A block device that keeps what it is given until it is told to go on.

    udev would look at it, too, and wait for what it reads.
    """
    with no_udev():
        yield from _slow_device()


@contextlib.contextmanager
def no_udev():
    if not Path("/run/udev/control").exists():
        yield
        return
    subprocess.run(["udevadm", "settle"], check=True)
    subprocess.run(["udevadm", "control", "--stop-exec-queue"], check=True)
    try:
        yield
    finally:
        subprocess.run(["udevadm", "control", "--start-exec-queue"], check=True)


def _slow_device():
    for name, parameters in (("brd", ("rd_nr=1", "rd_size=16384")), ("dm_delay", ())):
        subprocess.run(["modprobe", name, *parameters], check=False, stderr=subprocess.DEVNULL)
    environment = os.environ | {"DM_DISABLE_UDEV": "1"}

    def dmsetup(*arguments):
        subprocess.run(["dmsetup", *arguments], check=True, env=environment, timeout=PATIENCE)

    if not Path("/dev/ram0").exists():
        pytest.skip("this kernel has no brd, neither built in nor as a module")
    sectors = pool_io.SIZE // 512
    try:
        dmsetup("create", "kucomms_slow", "--table", f"0 {sectors} delay /dev/ram0 0 3600000")
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("this kernel has no dm-delay, or there is no dmsetup")

    def let_go():
        dmsetup("suspend", "--nolockfs", "kucomms_slow")
        dmsetup("resume", "kucomms_slow")

    yield let_go
    dmsetup("remove", "--retry", "kucomms_slow")


def on_disk(call, data):
    """Write or read the first bytes of the device below, past all caches."""
    with mmap.mmap(-1, len(data)) as memory:
        memory[:] = data
        fd = os.open("/dev/ram0", os.O_RDWR | os.O_DIRECT)
        try:
            assert call(fd, [memory], 0) == len(data)
        finally:
            os.close(fd)
        return memory[:]


@pytest.mark.parametrize("engine", ["threads", "uring"])
@pytest.mark.parametrize("how", ["held", "let_go"])
def test_io_under_way_when_the_process_dies(slow_device, engine, how):
    """What it had begun ends on the pages that it had; nobody else has got them before that."""
    path = "/dev/mapper/kucomms_slow"
    on_disk(os.pwritev, pool_io.DISK * pool_io.SIZE)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.kernel.pool_io", path, engine, how],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "under way\n"
        if how == "let_go":
            # Of the module, nothing is left; the pages are those of the I/O alone.
            wait_until(lambda: counters()["pages"] == 0)
        process.kill()
        assert pool_io.in_flight(path) == 2 * pool_io.PAGES
        with contextlib.ExitStack() as stack:
            new = []
            for _ in range(4):
                device = stack.enter_context(PoolDevice(ring_size=PAGE))
                new += [device.open_pool(128 * PAGE) for _ in range(8)]
            for pool in new:
                assert pool.read(0, pool.size) == bytes(pool.size)
                pool.write(0, b"n" * pool.size)
            assert pool_io.in_flight(path) == 2 * pool_io.PAGES
            slow_device()
            process.wait(PATIENCE)
            wait_until(lambda: not pool_io.in_flight(path))
            for pool in new:
                assert pool.read(0, pool.size) == b"n" * pool.size
    finally:
        process.kill()
        slow_device()
        process.wait(PATIENCE)
        process.stdout.close()
    assert on_disk(os.preadv, bytes(pool_io.SIZE)) == (
        pool_io.OLD * pool_io.WRITTEN + pool_io.DISK * pool_io.WRITTEN
    )


@pytest.mark.parametrize("owner", ["user", "kernel"])
def test_direct_io_on_the_pages(slow_device, owner):
    """What is read from a disk is seen by the kernel, and what that writes can be written there."""
    on_disk(os.pwritev, b"\5" * PAGE)
    with PoolDevice() as device:
        pool = device.open_pool(4 * PAGE) if owner == "user" else kernel_pool(device)
        buffer = pool.buffer(0, PAGE)
        if owner == "kernel":
            device.ask(Do.ALLOCATE, 0, PAGE, 1)
            device.message()
            device.ask(Do.SEND_KEPT)
            assert device.message()[0].buffers == [buffer]
        fd = os.open("/dev/ram0", os.O_RDWR | os.O_DIRECT)
        try:
            assert os.preadv(fd, [pool.view(0, PAGE)], 0) == PAGE
            device.ask(Do.SUM, buffers=[buffer])
            answer, _ = device.message()
            assert answer.numbers == (PAGE, 5 * PAGE)
            if owner == "user":
                assert device.returned(1) == [buffer]
                device.ask(Do.WRITE, 9, buffers=[buffer])
                device.message()
                assert os.pwritev(fd, [pool.view(0, PAGE)], 0) == PAGE
                assert os.preadv(fd, [pool.view(1, PAGE)], 0) == PAGE
                assert pool.read(1, PAGE) == b"\x09" * PAGE
        finally:
            os.close(fd)


# ---- through the package --------------------------------------------------------


def connect(name="buffers", **options):
    return kucomms.connect(f"kernel://{name}", timeout=PATIENCE, **options)


def numbers(*values):
    return struct.pack(f"<{len(values)}Q", *values)


async def ask(link, what, *arguments, **options):
    """The numbers that the module answers."""
    reply = await link.request(numbers(*arguments), type=what, timeout=PATIENCE, **options)
    return struct.unpack(f"<{len(reply) // 8}q", reply.data)


async def next_message(link):
    async with asyncio.timeout(PATIENCE):
        return await link.receive()


@pytest.mark.asyncio
@pytest.mark.parametrize("name", NAMES)
async def test_python_hands_over_and_gets_back(name):
    async with connect(name) as link, link.open_pool(8 * PAGE) as pool:
        for number in range(100):
            buffer = pool.allocate(PAGE + 1)
            buffer.data[:] = bytes([number]) * (PAGE + 1)
            await link.send(b"data", type=Do.ECHO, id=number, buffers=buffer)
            with pytest.raises(kucomms.UsageError):
                buffer.data  # noqa: B018
            message = await next_message(link)
            assert (message.data, message.id) == (b"data", number)
            (back,) = message.buffers
            assert back.data == bytes([number]) * (PAGE + 1)
            back.free()
        buffers = [pool.allocate(PAGE) for _ in range(8)]
        assert await ask(link, Do.SUM, buffers=buffers)
        # All of them come back, and are waited for.
        async with asyncio.timeout(PATIENCE):
            (await pool.allocate_when_room(8 * PAGE)).free()
        assert pool.statistics().handed_over == 0


@pytest.mark.asyncio
async def test_a_mebibyte_costs_what_64_bytes_cost(capsys):
    """There and back; the least of many, taken in turn: what else runs only adds to that."""
    sizes = 64, 1 << 20
    least = dict.fromkeys(sizes, math.inf)
    async with connect() as link, link.open_pool(4 << 20) as pool:
        for _ in range(100):
            for size in sizes:
                begin = time.perf_counter()
                for _ in range(10):
                    await link.send(b"", type=Do.ECHO, buffers=pool.allocate(size))
                    (await next_message(link)).buffers[0].free()
                least[size] = min(least[size], time.perf_counter() - begin)
    small, large = least.values()
    with capsys.disabled():
        print(f"\nbuffers there and back: 64 B {small * 1e5:.0f} us, 1 MiB {large / small:.2f} x")
    assert large <= 1.2 * small


@pytest.mark.asyncio
async def test_python_gets_buffers_of_the_kernel(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"r" * PAGE)
    async with connect() as link:
        assert await ask(link, Do.OPEN, 4 * PAGE, 0) == (0,)
        for _ in range(50):
            assert await ask(link, Do.ALLOCATE, 0, 2 * PAGE, 2) == (2,)
            await link.send(numbers(0), type=Do.SEND_KEPT)
            message = await next_message(link)
            first, second = message.buffers
            assert first.data == b"\1" * (2 * PAGE)
            assert second.data == b"\2" * (2 * PAGE)
            with pytest.raises(kucomms.UsageError):
                first.pool.allocate(1)
            with path.open("rb") as file:
                assert await first.pool.read(file, (first, PAGE, PAGE)) == PAGE
            assert await ask(link, Do.SUM, buffers=first) == (2 * PAGE, PAGE * (1 + ord("r")))
            second.free()
        del message


@pytest.mark.asyncio
async def test_python_hears_of_a_pool_that_is_closed_already():
    async with connect() as link:
        for number in range(3):
            await link.send(numbers(PAGE, 0), type=Do.OPEN)
            await link.send(numbers(number), type=Do.CLOSE)
        assert await ask(link, Do.STATUS)


@pytest.mark.asyncio
async def test_views_outlive_the_link():
    async with connect() as link:
        assert await ask(link, Do.OPEN, PAGE, 0) == (0,)
        assert await ask(link, Do.ALLOCATE, 0, PAGE, 1) == (1,)
        await link.send(numbers(0), type=Do.SEND_KEPT)
        (buffer,) = (await next_message(link)).buffers
        view = buffer.data
        pool = link.open_pool(PAGE)
        own = (await pool).allocate(PAGE)
        own.data[:] = b"v" * PAGE
        mine = own.data[:]
    assert view == b"\1" * PAGE
    assert mine == b"v" * PAGE
    view.release()
    mine.release()
    buffer.free()


@pytest.mark.asyncio
async def test_python_opens_a_contiguous_pool():
    most = 4 << 20
    async with connect() as link:
        for count in (1, 3, 100):
            async with link.open_pool(count * PAGE, contiguous=True) as pool:
                first, *_ = frames = frames_of(pool._memory.address, count)
                assert frames == list(range(first, first + count))
                buffer = pool.allocate(count * PAGE)
                buffer.data[:] = bytes([count]) * (count * PAGE)
                answer = await ask(link, Do.SUM, buffers=buffer)
                assert answer == (count * PAGE, count * count * PAGE)
        with pytest.raises(ValueError, match=f"{most} bytes at most"):
            link.open_pool(most + 1, contiguous=True)


@pytest.mark.asyncio
async def test_python_is_told_that_there_is_no_memory():
    async with connect() as link:
        for size in (4 << 30, 1 << 40):
            with pytest.raises(kucomms.TransportError) as caught:
                await link.open_pool(size)
            assert caught.value.errno == errno.ENOMEM
        assert await ask(link, Do.STATUS)


@pytest.mark.asyncio
async def test_a_module_that_goes_while_buffers_are_everywhere(load, unload):
    async with connect() as link:
        pool = await link.open_pool(8 * PAGE)
        assert await ask(link, Do.OPEN, PAGE, 0) == (0,)
        assert await ask(link, Do.ALLOCATE, 0, PAGE, 1) == (1,)
        await link.send(numbers(0), type=Do.SEND_KEPT)
        await link.send(b"", type=Do.TAKE, buffers=[pool.allocate(PAGE), pool.allocate(1)])
        await ask(link, Do.STATUS)
        await asyncio.to_thread(unload, "kucomms_buffers")
        try:
            message = await next_message(link)
            assert message.buffers[0].data == b"\1" * PAGE
            with pytest.raises(kucomms.ShutdownError):
                await next_message(link)
            del message
        finally:
            await asyncio.to_thread(load, "kucomms_buffers")
