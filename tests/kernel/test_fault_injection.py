# SPDX-License-Identifier: MIT
"""Every allocation fails once, wherever the module or the kernel for it asks for memory.

For kernels with fault injection, as tools/kernel-sanitized.sh builds one; ``tests/conftest.py``
leaves this file out elsewhere. A task's ``fail-nth`` makes the Nth allocation from now on fail,
so N = 1, 2, 3 ... walks through all of an operation: in the calling thread, in the endpoint's
and in the one that makes threads. After each the operation has failed as documented or went
without what was missing, nothing is left of it, and it succeeds when done again.

KUCOMMS_FAULT_POINTS: the most tried of an operation, 60; of the rest a random part, by
KUCOMMS_SEED.
"""

import asyncio
import contextlib
import ctypes
import errno
import os
import random
import select
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest

import kucomms
from kucomms import TransportError
from tests.kernel.lifecycle import create, kernel_thread, remove
from tests.kernel.pool_device import CONTIGUOUS, POOLS, PoolDevice, open_pool
from tests.kernel.raw_device import (
    DATA,
    PAGE,
    PATIENCE,
    READ,
    SPACE,
    WRITE,
    RawDevice,
    alive,
    counters,
    map_memory,
    open_device,
    set_up,
    unmap,
    wait,
)
from tests.kernel.test_kernel_api import SHARED_RUNNERS, SYSFS, test_module
from tests.kernel.test_pool import NAMES as BUFFERS
from tests.kernel.test_pool import Do

LOOPS = ["asyncio"]  # what is tested is the kernel

MOST = int(os.environ.get("KUCOMMS_FAULT_POINTS", "60"))
SEED = int(os.environ.get("KUCOMMS_SEED") or random.getrandbits(32))
STORM_SECONDS = 10
KINDS = ("failslab", "fail_page_alloc")
DEBUG = Path("/sys/kernel/debug")
JOIN = Path("/sys/module/kucomms_join/parameters")
NAME = "fault"
KTHREADD = 2
FAR = 10**9
LARGE = 1 << 23
_libc = ctypes.CDLL(None, use_errno=True)
_INIT_MODULE, _DELETE_MODULE = 175, 176  # no programs: that is a matter of seconds


# ---- the kernel's fault injection --------------------------------------------------


def configure(kind, **values):
    for name, value in values.items():
        (DEBUG / kind / name.replace("_", "-")).write_text(f"{value}\n")


def quiet():
    """Nothing fails, but by ``fail-nth``; that may be any allocation, and is not logged."""
    for kind in KINDS:
        configure(kind, probability=0, times=-1, verbose=0, ignore_gfp_wait="N")
        configure(kind, require_start=0, require_end=2**64 - 1, stacktrace_depth=32)
    configure("fail_page_alloc", min_order=0, ignore_gfp_highmem="N")


@pytest.fixture(scope="module", autouse=True)
def faults():
    quiet()
    yield
    quiet()
    for kind in KINDS:
        configure(kind, verbose=2, ignore_gfp_wait="Y")
    configure("fail_page_alloc", min_order=1, ignore_gfp_highmem="Y")


@contextmanager
def below(module="kucomms"):
    """Only allocations count that a function of the module has asked for."""
    lines = Path("/proc/kallsyms").read_text().splitlines()
    fields = [line.split() for line in lines if line.endswith(f"[{module}]")]
    text = [int(at, 16) for at, kind, *_name in fields if kind in "tT"]
    for kind in KINDS:
        configure(kind, require_start=hex(min(text)), require_end=hex(max(text) + PAGE))
    try:
        yield
    finally:
        quiet()


@contextmanager
def failing(*kinds, probability=100):
    """All of them fail that the module asks for, in whatever thread."""
    with below():
        for kind in kinds:
            configure(kind, probability=probability)
        yield


class FailNth:
    """The Nth allocation of a task, from when it is armed."""

    def __init__(self, task=None):
        where = f"{task}/task/{task}" if task else "thread-self"
        self._fd = os.open(f"/proc/{where}/fail-nth", os.O_RDWR | os.O_CLOEXEC)

    def during(self, n, operate):
        """The errno of ``operate``, and how many were still to go; 0: it failed."""
        armed, off = b"%d" % n, b"0"
        os.pwrite(self._fd, armed, 0)
        try:
            number = operate()
        finally:
            left = int(os.pread(self._fd, 20, 0))
            os.pwrite(self._fd, off, 0)
        return number, left

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        os.close(self._fd)


def points(count, most):
    """1 to ``count``, or some of them: the first, the last, and of the others a random part."""
    if count <= most:
        return list(range(1, count + 1))
    first, last = most // 2, most // 6
    middle = range(first + 1, count - last + 1)
    some = random.Random(SEED).sample(middle, most - first - last)
    return [*range(1, first + 1), *sorted(some), *range(count - last + 1, count + 1)]


class Operation:
    """Something that allocates. The base does nothing before and after it."""

    errors = (errno.ENOMEM,)
    slow = False

    def prepare(self):
        """What comes before it; no allocation fails in there."""

    def operate(self):
        """Returns the errno."""
        raise NotImplementedError

    def undo(self):
        """What takes it back when it has succeeded."""

    def clean_up(self):
        """What takes ``prepare`` back."""

    def task(self):
        """Whose allocations fail, if not the caller's."""

    def attempt(self, n=FAR):
        """The errno, and how many allocations were left of ``n``."""
        self.prepare()
        try:
            with FailNth(self.task()) as nth:
                number, left = nth.during(n, self.operate)
            if not number:
                self.undo()
        finally:
            self.clean_up()
        return number, left


def until_alive(before):
    """The kernel frees in threads of its own."""
    give_up = time.monotonic() + PATIENCE
    while (now := alive()) != before:
        assert time.monotonic() < give_up, f"{before} before, {now} now"
        os.sched_yield()


def sweep(operation, count=alive, settle=until_alive):
    """Let each allocation fail once. Returns how many there are, and how often which errno."""
    before = count()
    assert operation.attempt()[0] == 0
    settle(before)
    number, left = operation.attempt()
    assert number == 0
    settle(before)
    found = Counter()
    most = FAR - left
    for n in points(most, MOST // 3 if operation.slow or most > 1000 else MOST):
        number, left = operation.attempt(n)
        assert number in (0, *operation.errors), f"{n} of {most}: {errno.errorcode[number]}"
        found["not reached" if left else errno.errorcode.get(number, "went without")] += 1
        settle(before)
        number, _left = operation.attempt()
        assert number == 0, f"after {n} of {most}: {errno.errorcode[number]}"
        settle(before)
    return most, found


@pytest.fixture
def tell(capsys, request):
    """Print what a sweep has found, whatever pytest captures."""

    def show(most, found, what=""):
        text = ", ".join(f"{count} {name}" for name, count in sorted(found.items()))
        name = request.node.name.removeprefix("test_")
        with capsys.disabled():
            print(f"\n{name}{what}: {most} allocations, seed {SEED}: {text or 'none'}", end="")

    return show


@pytest.fixture(params=["kernel", "module"])
def whose(request):
    """All allocations of the operation, or those alone of which the module knows."""
    with below() if request.param == "module" else contextlib.nullcontext():
        yield request.param


# ---- loading ---------------------------------------------------------------------------


def is_loaded(name="kucomms"):
    return Path("/sys/module", name).exists()


class Load(Operation):
    """The module itself."""

    slow = True

    def __init__(self, path):
        self._data = path.read_bytes()

    def operate(self):
        size = ctypes.c_ulong(len(self._data))
        result = _libc.syscall(_INIT_MODULE, self._data, size, b"")
        return ctypes.get_errno() if result else 0

    def undo(self):
        assert not _libc.syscall(_DELETE_MODULE, b"kucomms", os.O_NONBLOCK)


def modules_left():
    return [
        path.exists() for path in (Path("/sys/module/kucomms"), SYSFS.parent, DEBUG / "kucomms")
    ]


def test_load(modules, tell, request):
    """Loading kucomms.ko, its own beginning and what the kernel does for it."""
    assert not is_loaded()
    operation = Load(modules / "kernel_module/kucomms.ko")

    def settle(before):
        assert modules_left() == before

    most, found = sweep(operation, modules_left, settle)
    assert found["ENOMEM"]
    tell(most, found)


# ---- in the calling thread -----------------------------------------------------------


@pytest.fixture(scope="module")
def modules_loaded(load, unload):
    with test_module(load, unload):
        load("kucomms_join")
        for name in BUFFERS:
            create(name)
        load("kucomms_buffers")
        yield
        unload("kucomms_buffers")
        for name in BUFFERS:
            remove(name)
        unload("kucomms_join")


@pytest.fixture
def loaded(modules_loaded):
    yield
    give_up = time.monotonic() + PATIENCE
    shared = SHARED_RUNNERS + 2  # and those of kucomms_join and kucomms_buffers
    while (now := counters())["channels"] or now["runners"] > shared:
        assert time.monotonic() < give_up, now
        os.sched_yield()
    assert now["pages"] == 0


class Write(Operation):
    """A write to a file of sysfs."""

    def __init__(self, path, text):
        self._path, self._text = path, text.encode()
        self._fd = -1

    def prepare(self):
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC)

    def operate(self):
        try:
            os.pwrite(self._fd, self._text, 0)
        except OSError as error:
            return error.errno
        return 0

    def clean_up(self):
        os.close(self._fd)


class Create(Write):
    def __init__(self):
        super().__init__(SYSFS / "create_device", f"kucomms_{NAME}")

    def undo(self):
        remove(NAME)


class Remove(Write):
    def __init__(self):
        super().__init__(SYSFS / "remove_device", f"kucomms_{NAME}")

    def prepare(self):
        create(NAME)
        super().prepare()

    def clean_up(self):
        super().clean_up()
        with contextlib.suppress(OSError):
            remove(NAME)


def register():
    (JOIN / "register").write_text(f"kucomms_{NAME}")


def unregister():
    (JOIN / "unregister").write_text(f"kucomms_{NAME}")


class Register(Write):
    def __init__(self, numbered=0):
        super().__init__(JOIN / "register", f"kucomms_{NAME}")
        self._numbered = numbered

    def prepare(self):
        (JOIN / "numbered").write_text(str(self._numbered))
        super().prepare()

    def undo(self):
        unregister()

    def clean_up(self):
        super().clean_up()
        (JOIN / "numbered").write_text("0")


class Unregister(Write):
    def __init__(self):
        super().__init__(JOIN / "unregister", f"kucomms_{NAME}")

    def prepare(self):
        register()
        super().prepare()

    def clean_up(self):
        super().clean_up()
        with contextlib.suppress(OSError):
            unregister()


class Open(Operation):
    def __init__(self, name="test_quiet"):
        self._name, self.fd = name, -1

    def operate(self):
        try:
            self.fd = open_device(self._name)
        except OSError as error:
            return error.errno
        return 0

    def undo(self):
        os.close(self.fd)


class OnOpen(Operation):
    """Something on an open device."""

    def __init__(self, name="test_quiet"):
        self._name, self.fd = name, -1

    def prepare(self):
        self.fd = open_device(self._name)

    def clean_up(self):
        os.close(self.fd)


class SetUp(OnOpen):
    """With all that there can be."""

    def __init__(self, name, ring_size, hello=b""):
        super().__init__(name)
        self._fields = {"ring_size": ring_size, "hello": hello, "features": POOLS}

    def operate(self):
        return set_up(self.fd, **self._fields)[0]

    def undo(self):
        """There is all that was promised."""
        assert open_pool(self.fd, PAGE)[0] == 0


class Map(OnOpen):
    def __init__(self, name, ring_size, side):
        super().__init__(name)
        self._ring_size, self._side = ring_size, side
        self._at = self._size = self._offset = 0

    def prepare(self):
        super().prepare()
        number, told = set_up(self.fd, ring_size=self._ring_size)
        assert number == 0
        self._size, self._offset = told.side_size, told.side_offset[self._side]

    def operate(self):
        try:
            prot = READ | WRITE if self._side else READ
            self._at = map_memory(self.fd, self._size, self._offset, prot)
        except OSError as error:
            return error.errno
        return 0

    def undo(self):
        unmap(self._at, self._size)


class OnLink(Operation):
    """Something with a channel, both sides mapped."""

    def __init__(self, act, name="test_quiet"):
        self._act, self._name = act, name
        self._device = None

    def prepare(self):
        self._device = RawDevice(self._name, ring_size=PAGE)

    def operate(self):
        return self._act(self._device)

    def clean_up(self):
        self._device.close()


class OpenPool(Operation):
    """A pool of the user's, and a mapping of it."""

    def __init__(self, size, flags):
        self._size, self._flags = size, flags
        self._device = None

    def prepare(self):
        self._device = PoolDevice("test_quiet", ring_size=PAGE)

    def operate(self):
        try:
            self._device.open_pool(self._size, self._flags)
        except OSError as error:
            return error.errno
        return 0

    def clean_up(self):
        self._device.close()


class OnKernelPool(Operation):
    """Something with a pool of the module's."""

    def __init__(self, size):
        self._size = size
        self.device = None
        self.offset = 0

    def prepare(self):
        self.device = PoolDevice(BUFFERS[0], ring_size=PAGE)

    def open_pool(self, flags=0):
        self.device.ask(Do.OPEN, self._size, flags)
        answer, before = self.device.message()
        for frame in before:
            *_, self.offset = frame.news
        return -answer.numbers[0]

    def clean_up(self):
        self.device.close()


class OpenKernelPool(OnKernelPool):
    def __init__(self, size, flags):
        super().__init__(size)
        self._flags = flags

    def operate(self):
        return self.open_pool(self._flags)

    def task(self):
        return kernel_thread(f"kucomms_{BUFFERS[0]}")


class MapKernelPool(OnKernelPool):
    def __init__(self, size):
        super().__init__(size)
        self._at = 0

    def prepare(self):
        super().prepare()
        assert self.open_pool() == 0

    def operate(self):
        try:
            self._at = map_memory(self.device.fd, self._size, self.offset, READ | WRITE)
        except OSError as error:
            return error.errno
        return 0

    def undo(self):
        unmap(self._at, self._size)


def ask_poll(device):
    poll = select.poll()
    poll.register(device.fd, select.POLLIN)
    try:
        poll.poll(0)
    except OSError as error:
        return error.errno
    return 0


def watch(device):
    """By an epoll."""
    try:
        with select.epoll() as epoll:
            epoll.register(device.fd, select.EPOLLIN | select.EPOLLET)
            epoll.poll(0)
    except OSError as error:
        return error.errno
    return 0


def echo(device):
    device.send(b"echo")
    give_up = time.monotonic() + PATIENCE
    while device.available != device.position:
        assert time.monotonic() < give_up
    device.consume()
    return 0


def wait_until_over(device):
    number = wait(device.fd, DATA | SPACE, 1_000_000)[0]
    return 0 if number == errno.ETIMEDOUT else number


ACTS = {
    "kick": lambda device: device.kick(),
    "wait": wait_until_over,
    "poll": ask_poll,
    "epoll": watch,
    "echo": echo,
}


def test_create_device(loaded, whose, tell):
    operation = Create()
    before = sorted(os.listdir(SYSFS.parent))
    most, found = sweep(operation)
    assert found["ENOMEM"]
    assert sorted(os.listdir(SYSFS.parent)) == before
    tell(most, found)


def test_remove_device(loaded, whose, tell):
    tell(*sweep(Remove()))


@pytest.mark.parametrize("numbered", [0, 200])
def test_register(loaded, whose, tell, numbered):
    most, found = sweep(Register(numbered))
    assert found["ENOMEM"]
    tell(most, found)


def test_unregister(loaded, whose, tell):
    tell(*sweep(Unregister()))


def test_open(loaded, whose, tell):
    most, found = sweep(Open())
    assert found["ENOMEM"]
    tell(most, found)


@pytest.mark.parametrize("ring_size", [PAGE, 16 * PAGE, LARGE])
@pytest.mark.parametrize("name", ["test_quiet", "test_in_place", "test_threads"])
def test_set_up(loaded, whose, tell, name, ring_size):
    most, found = sweep(SetUp(name, ring_size))
    assert most > 2 * ring_size / PAGE
    assert found["ENOMEM"]
    tell(most, found)


@pytest.mark.parametrize("flags", [0, CONTIGUOUS])
def test_open_pool(loaded, whose, tell, flags):
    most, found = sweep(OpenPool(64 * PAGE, flags))
    assert found["ENOMEM"]
    tell(most, found)


def test_map_a_pool_of_the_kernel(loaded, whose, tell):
    """Large enough for tables of its own."""
    most, found = sweep(MapKernelPool(LARGE))
    assert most == 0 or whose == "module" or found["ENOMEM"]
    tell(most, found)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("ring_size", [PAGE, LARGE])
def test_map(loaded, whose, tell, side, ring_size):
    most, found = sweep(Map("test_quiet", ring_size, side))
    tell(most, found)


@pytest.mark.parametrize("what", ACTS)
def test_on_a_link(loaded, whose, tell, what):
    tell(*sweep(OnLink(ACTS[what])))


# ---- in other threads ------------------------------------------------------------------


class InRunner(SetUp):
    """A new endpoint's first channel; it opens it, and has no buffer for messages yet."""

    def __init__(self, ring_size):
        super().__init__(NAME, ring_size, b"listen")

    def prepare(self):
        create(NAME)
        register()
        super().prepare()

    def task(self):
        return kernel_thread(f"kucomms_{NAME}")

    def clean_up(self):
        super().clean_up()
        unregister()
        remove(NAME)


@pytest.mark.parametrize("ring_size", [PAGE, 64 * PAGE, LARGE])
def test_open_callback(loaded, tell, ring_size):
    most, found = sweep(InRunner(ring_size))
    # Of a large buffer in large pages, nothing is missed: there are small ones.
    assert found["ENOMEM"] or (found["went without"] and ring_size == LARGE)
    tell(most, found)


@pytest.mark.parametrize("flags", [0, CONTIGUOUS])
def test_open_pool_of_the_kernel(loaded, tell, flags):
    most, found = sweep(OpenKernelPool(64 * PAGE, flags))
    assert found["ENOMEM"]
    tell(most, found)


class Echo(OnLink):
    def __init__(self, name):
        super().__init__(echo, name)

    def task(self):
        return kernel_thread(f"kucomms_{self._name}")


@pytest.mark.parametrize("name", ["test", "test_quiet"])
def test_callbacks(loaded, tell, name):
    """Receiving and sending need no memory."""
    most, found = sweep(Echo(name))
    assert most == 0
    tell(most, found)


class InKthreadd(Operation):
    """Making a thread; other parts of the kernel do, too, and then it is theirs that fails."""

    errors = (errno.ENOMEM, errno.EAGAIN)

    def task(self):
        return KTHREADD


class RegisterThread(InKthreadd, Register):
    pass


class SetUpThread(InKthreadd, SetUp):
    pass


@pytest.mark.parametrize("what", ["register", "test_threads"])
def test_new_thread(loaded, tell, what):
    most, found = sweep(RegisterThread() if what == "register" else SetUpThread(what, PAGE))
    assert found["ENOMEM"] or found["EAGAIN"]
    tell(most, found)


# ---- more than one -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_can_be_allocated(loaded, kind):
    """Each operation fails on its own, and in the log is nothing of it."""
    before = alive()
    setups = [SetUp(n, s) for n in ("test_quiet", "test_threads") for s in (PAGE, LARGE)]
    operations = [Create(), Register(), Open()] if kind == "failslab" else []
    for operation in [*operations, *setups]:
        operation.prepare()
        try:
            with failing(kind):
                assert operation.operate() == errno.ENOMEM
        finally:
            operation.clean_up()
        until_alive(before)
        assert operation.attempt()[0] == 0
        until_alive(before)


def test_half_of_all_fails(loaded, tell):
    """So that what comes instead of what has failed fails as well: vmalloc() for kmalloc()."""
    found = Counter()
    operation = SetUp("test_quiet", LARGE)
    with failing("failslab", probability=50):
        for _ in range(200):
            try:
                operation.prepare()
            except OSError as error:
                found[errno.errorcode[error.errno]] += 1
                continue
            number = operation.operate()
            operation.clean_up()
            found[errno.errorcode.get(number, "set up")] += 1
    tell(0, found)
    assert set(found) <= {"ENOMEM", "set up"}


async def echoes(link):
    """It works; closes it."""
    async with asyncio.timeout(PATIENCE):
        await link.send(b"x")
        assert (await link.receive()).data == b"x"
    await link.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("kind", "text"), [("failslab", "cannot open /dev/kucomms_test"), (KINDS[1], "no memory for")]
)
async def test_connect(loaded, kind, text):
    """What a Python program is told."""
    with failing(kind), pytest.raises(TransportError, match=text) as caught:
        await kucomms.connect("kernel://test", timeout=PATIENCE)
    assert caught.value.errno == errno.ENOMEM
    assert "kernel://test: " in str(caught.value)
    await echoes(await kucomms.connect("kernel://test", timeout=PATIENCE))


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["test", "test_threads"])
async def test_now_and_then(loaded, name, tell):
    """A program that connects all the time; some allocations fail, in whatever thread."""
    found = Counter()
    choice = random.Random(SEED)
    end = time.monotonic() + STORM_SECONDS
    give_up = end + 10 * STORM_SECONDS  # a few of each, on a slow machine, too
    while time.monotonic() < end or min(found["ENOMEM"], found["connected"]) < 3:
        assert time.monotonic() < give_up, found
        probability = choice.choice([1, 3, 10])
        ring_size = PAGE << choice.randrange(6)
        with failing(*KINDS, probability=probability):
            try:
                link = await kucomms.connect(
                    f"kernel://{name}", timeout=PATIENCE, ring_size=ring_size
                )
            except TransportError as error:
                found[errno.errorcode[error.errno]] += 1
            else:
                await echoes(link)
                found["connected"] += 1
    tell(0, found)
    assert set(found) == {"ENOMEM", "connected"}
