# SPDX-License-Identifier: MIT
# ruff: noqa: ASYNC110
"""What a program may cost the machine, and setting up a channel while others take their time.

Each limit of an endpoint and of a user: its errno, its error in Python, and that the count comes
back to nothing when channels and pools go, or the process is killed. A set-up that meets a slow
callback: with O_NONBLOCK, with a signal, and while the machine goes to sleep. And a program that
takes all it can get (``programs/hog.c``): it is refused or killed, and nobody else is.
"""

import asyncio
import contextlib
import errno
import os
import re
import resource
import select
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

import kucomms
from tests.kernel.lifecycle import Child, alive, create, remove, until
from tests.kernel.pool_device import POOLS, close_pool, open_pool
from tests.kernel.raw_device import _WAIT as WAIT_STRUCT
from tests.kernel.raw_device import (
    DATA,
    DEBUG,
    PAGE,
    PATIENCE,
    READ,
    WAIT,
    WRITE,
    RawDevice,
    ioctl,
    map_memory,
    open_device,
    set_up,
    unmap,
    wait,
)

LOOPS = ["asyncio"]  # what is tested is the kernel

PARAMETERS = Path("/sys/module/kucomms_limits/parameters")
POOLS_FLAG = 0x10
UNLIMITED = 2**32 - 1
USER, OTHER = 1000, 1001
MEGABYTE = 1 << 20
NAMES = ("limits", "limits_threads")


class Limits:
    """The module ``kucomms_limits``, loaded with some limits."""

    def __init__(self, load, unload):
        self._load, self._unload = load, unload
        self.loaded = False

    def load(self, **parameters):
        self._load("kucomms_limits", *(f"{name}={value}" for name, value in parameters.items()))
        self.loaded = True

    def unload(self):
        if self.loaded:
            self.loaded = False
            self._unload("kucomms_limits")

    def get(self, name):
        return int((PARAMETERS / name).read_text())

    def open_gate(self):
        (PARAMETERS / "gate").write_text("1")

    def shut_gate(self):
        (PARAMETERS / "gate").write_text("0")

    def began(self, opens):
        until(lambda: self.get("opens") == opens, "no open callback begins")


@pytest.fixture(scope="module", autouse=True)
def devices(load, unload):
    load("kucomms")
    for name in NAMES:
        create(name)
        os.chmod(f"/dev/kucomms_{name}", 0o666)
    yield
    for name in NAMES:
        remove(name)
    unload("kucomms")


@pytest.fixture
def limits(devices, load, unload):
    module = Limits(load, unload)
    before = alive()
    yield module
    if module.loaded:
        module.open_gate()
        until(
            lambda: alive()["channels"] == before["channels"],
            lambda: f"{alive()} is left of {before}",
        )
    module.unload()
    until(lambda: alive() == before, lambda: f"{before} before, {alive()} now")


@contextlib.contextmanager
def opened(name="limits", flags=os.O_RDWR):
    fd = open_device(name, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def ask(fd, hello=b"", **fields):
    """The errno of a set-up with the smallest rings."""
    return set_up(fd, ring_size=PAGE, hello=hello, **fields)[0]


def poll(fd, timeout=0.0):
    """Whether POLLPRI is told."""
    watch = select.poll()
    watch.register(fd, select.POLLPRI)
    return bool(watch.poll(timeout * 1000))


def become(uid):
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def as_user(uid, function):
    """A child that is this user."""

    def program(talk):
        become(uid)
        function(talk)

    return Child(program)


def take(count, name="limits"):
    """What a child does: it takes this many channels, tells the errno of the next, keeps them."""

    def program(talk):
        fds = [open_device(name) for _ in range(count + 1)]
        found = [ask(fd) for fd in fds]
        assert found[:-1] == [0] * count, found
        talk.sendall(errno.errorcode.get(found[-1], "0").encode())
        talk.recv(9)

    return program


# ---- how many channels -----------------------------------------------------------


def test_channels_of_a_user_and_of_all(limits):
    limits.load(max_channels=5, max_user_channels=2)
    with as_user(USER, take(2)) as user:
        user.says("EDQUOT")
        with as_user(OTHER, take(2)) as other:
            other.says("EDQUOT")
            with opened() as fd, opened() as one_more:
                assert ask(fd) == 0  # root is a user like others
                assert ask(one_more) == errno.EBUSY  # which of both: 5 of 5, and 1 of 2
                assert not poll(one_more)
                other.kill()
                assert poll(one_more, PATIENCE)
                until(lambda: ask(one_more) == 0, "no channel is free")
            user.kill()
    with as_user(USER, take(2)) as user:
        user.says("EDQUOT")
        user.tell()
        user.ends_well()


def test_channels_by_default(limits):
    """256 of a user, and 1024 in all; the fourth user meets both limits at once."""
    limits.load()
    with contextlib.ExitStack() as stack:
        users = []
        for n, errno_of_the_next in enumerate(["EDQUOT", "EDQUOT", "EDQUOT", "EBUSY"]):
            users.append(stack.enter_context(as_user(USER + n, take(256))))
            users[-1].says(errno_of_the_next)
        with opened() as fd:
            assert ask(fd) == errno.EBUSY
        users[0].kill()
        users[1].kill()
        again = stack.enter_context(as_user(USER, take(256)))
        again.says("EDQUOT")


def test_all_channels_are_one_users_if_there_are_few(limits):
    limits.load(max_channels=3)
    with as_user(USER, take(3)) as user:
        user.says("EBUSY")


def test_no_limits(limits):
    limits.load(max_channels=UNLIMITED, max_user_channels=UNLIMITED)
    with resource_limit(resource.RLIMIT_NOFILE, 4096), contextlib.ExitStack() as stack:
        fds = [stack.enter_context(opened()) for _ in range(1100)]
        assert {ask(fd) for fd in fds} == {0}


def test_a_channel_that_ends_is_waited_for(limits):
    """Closed and opened again at once, as often as one likes: nobody is told EDQUOT."""
    limits.load(max_user_channels=1)
    for _ in range(50):
        with opened() as fd:
            assert ask(fd) == 0


def test_a_channel_that_ends_is_waited_for_in_poll(limits):
    limits.load(max_user_channels=1)
    with opened() as fd:
        assert ask(fd, b"late") == 0
    with opened(flags=os.O_RDWR | os.O_NONBLOCK) as fd:
        for _ in range(3):
            assert ask(fd) == errno.EAGAIN
            assert not poll(fd)
        limits.open_gate()
        assert poll(fd, PATIENCE)
        until(lambda: ask(fd) in (0, errno.EALREADY), "no channel is free")


@pytest.mark.asyncio
async def test_channels_in_python(limits):
    limits.load(max_user_channels=1)
    async with kucomms.connect("kernel://limits"):
        with pytest.raises(kucomms.BusyError, match="this user has all the links"):
            async with kucomms.connect("kernel://limits", timeout=PATIENCE):
                pass
    async with kucomms.connect("kernel://limits", timeout=PATIENCE):
        pass


# ---- pools -----------------------------------------------------------------------


def pool(fd, size):
    """The errno."""
    return open_pool(fd, size)[0]


def test_pools_are_opted_into(limits):
    limits.load()
    with opened() as fd:
        number, told = set_up(fd, ring_size=PAGE, features=POOLS)
        assert (number, told.features) == (0, 0)
        assert pool(fd, PAGE) == errno.EOPNOTSUPP
        assert close_pool(fd, 1) == errno.EOPNOTSUPP


def test_a_size_of_pools_needs_pools(limits, load):
    with pytest.raises(pytest.fail.Exception, match="Invalid argument"):
        limits.load(max_pool_bytes=PAGE)


@pytest.mark.parametrize("most", [0, 16 * PAGE])
def test_bytes_of_pools(limits, most):
    limits.load(flags=POOLS_FLAG, max_pool_bytes=most)
    most = most or 64 * MEGABYTE
    with opened() as fd, opened() as other:
        assert ask(fd, features=POOLS) == ask(other, features=POOLS) == 0
        assert pool(fd, most + PAGE) == errno.EDQUOT
        failed, first, offset = open_pool(fd, most - PAGE)
        assert failed == 0
        assert pool(fd, 2 * PAGE) == errno.EDQUOT
        assert pool(fd, PAGE) == 0
        assert pool(fd, PAGE) == errno.EDQUOT
        assert pool(other, most) == 0  # each channel has its own
        at = map_memory(fd, PAGE, offset, READ | WRITE)
        assert close_pool(fd, first) == 0
        time.sleep(0.05)  # that nothing happens is the subject
        assert pool(fd, PAGE) == errno.EDQUOT  # its pages are still there
        unmap(at, PAGE)
        until(lambda: pool(fd, most - PAGE) == 0, "the bytes of the pool do not come back")


def memlock(size):
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (size, size))


@contextlib.contextmanager
def resource_limit(which, most):
    """This limit of this process, and then what it was: later tests start programs."""
    before = resource.getrlimit(which)
    resource.setrlimit(which, (most, most))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


def test_locked_memory(limits):
    """All channels of a user together, with what else it has locked; and exactly."""
    limits.load(flags=POOLS_FLAG)

    def program(talk):
        memlock(16 * PAGE)
        become(USER)
        with opened() as fd, opened() as other:
            assert ask(fd, features=POOLS) == ask(other, features=POOLS) == 0
            assert pool(fd, 17 * PAGE) == errno.EPERM
            failed, number, _offset = open_pool(fd, 9 * PAGE)
            assert failed == 0
            assert pool(other, 8 * PAGE) == errno.EPERM
            assert pool(other, 7 * PAGE) == 0
            assert pool(other, PAGE) == errno.EPERM
            assert close_pool(fd, number) == 0
            until(lambda: pool(other, 9 * PAGE) == 0, "what was locked does not come back")
            assert pool(other, PAGE) == errno.EPERM
            talk.send(b"full")
            talk.recv(9)

    for _ in range(3):
        # Of the one before, which was killed, the last pages may just be freed.
        until(lambda: not alive()["pages"], "pages are left")
        with Child(program) as child:
            child.says("full")
            with opened() as fd:
                assert ask(fd, features=POOLS) == 0
                with resource_limit(resource.RLIMIT_MEMLOCK, 16 * PAGE):
                    assert pool(fd, MEGABYTE) == 0  # CAP_IPC_LOCK
            child.kill()


def test_what_fails_is_not_charged(limits):
    limits.load(flags=POOLS_FLAG, max_pool_bytes=2**40)

    def program(talk):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (2**33, 2**33))
        become(USER)
        with opened() as fd:
            assert ask(fd, features=POOLS) == 0
            for _ in range(5):
                assert pool(fd, 2**32) == errno.ENOMEM
            assert pool(fd, MEGABYTE) == 0
            memlock(2 * MEGABYTE)
            assert pool(fd, MEGABYTE) == 0
            assert pool(fd, PAGE) == errno.EPERM

    with Child(program) as child:
        child.ends_well()


@pytest.mark.asyncio
async def test_pools_in_python(limits):
    limits.load(flags=POOLS_FLAG, max_pool_bytes=MEGABYTE)

    async def use(talk):
        async with kucomms.connect("kernel://limits") as link:
            with pytest.raises(kucomms.TransportError, match="max_pool_bytes") as caught:
                await link.open_pool(2 * MEGABYTE)
            assert caught.value.errno == errno.EDQUOT
            memlock(16 * PAGE)
            with pytest.raises(
                kucomms.TransportError, match=r"RLIMIT_MEMLOCK.*ulimit -l"
            ) as caught:
                await link.open_pool(17 * PAGE)
            assert caught.value.errno == errno.EPERM
            async with link.open_pool(16 * PAGE):
                pass

    with as_user(USER, lambda talk: asyncio.run(use(talk))) as child:
        await asyncio.to_thread(child.ends_well)


@pytest.mark.asyncio
async def test_no_pools_in_python(limits):
    """Then a link's pool is for transfers only, as over a link between users."""
    limits.load()
    async with kucomms.connect("kernel://limits") as link, link.open_pool(PAGE) as memory:
        buffer = memory.allocate(8)
        with pytest.raises(kucomms.UsageError, match="KUCOMMS_POOLS"):
            await link.send(b"", buffers=[buffer])
        buffer.free()


# ---- the runner's buffer ---------------------------------------------------------


def buffers():
    """Bytes of each mapping of the kernel for the copy of a message."""
    lines = Path("/proc/vmallocinfo").read_text().splitlines()
    return [
        int(line.split()[1]) for line in lines if "runner" in line or "open_channel" in line
    ]  # fmt: skip


def test_a_channel_that_is_refused_leaves_no_buffer(limits):
    limits.load()
    limits.open_gate()
    size = 16 * MEGABYTE
    with opened() as fd:
        assert set_up(fd, ring_size=size, hello=b"refuse")[0] == errno.EACCES
        assert not [found for found in buffers() if found >= size]
        assert set_up(fd, ring_size=size)[0] == 0
        assert [found for found in buffers() if found >= size]


# ---- setting up without waiting --------------------------------------------------


def in_set_up(thread):
    """Whether it sleeps in an ioctl."""
    call = Path(f"/proc/self/task/{thread.native_id}/syscall").read_text()
    return call.startswith("16 ")


NONBLOCKING = os.O_RDWR | os.O_NONBLOCK


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hello", [b"block", b"refuse"])
def test_without_waiting_for_the_endpoint(limits, name, hello):
    limits.load()
    with opened(name, NONBLOCKING) as fd:
        for _ in range(3):
            assert ask(fd, hello) == errno.EINPROGRESS
            assert not poll(fd)
        limits.began(1)
        assert ask(fd, b"another") == errno.EINPROGRESS
        limits.open_gate()
        assert poll(fd, PATIENCE)
        number, told = set_up(fd, ring_size=16 * PAGE, hello=b"another")
        assert number == (0 if hello == b"block" else errno.EACCES)
        if not number:
            assert (told.ring_size, told.side_size) == (PAGE, 4 * PAGE)  # as it was begun
            assert ask(fd) == errno.EALREADY
        assert not poll(fd)
        assert limits.get("opens") == 1


def test_the_answer_is_waited_for_if_one_likes(limits):
    limits.load()
    with opened(flags=NONBLOCKING) as fd:
        assert ask(fd, b"block") == errno.EINPROGRESS
        os.set_blocking(fd, True)
        found = []
        waiter = threading.Thread(target=lambda: found.append(ask(fd)))
        waiter.start()
        # The first set-up is the one that waits, and that has to be the thread's.
        until(lambda: in_set_up(waiter), "the thread does not wait")
        assert ask(fd) == errno.EALREADY
        limits.open_gate()
        waiter.join()
        assert found == [0]


def test_closing_gives_the_set_up_up(limits):
    limits.load(max_channels=1)
    with opened(flags=NONBLOCKING) as fd:
        assert ask(fd, b"block") == errno.EINPROGRESS
        limits.began(1)
    with opened(flags=NONBLOCKING) as fd:
        assert ask(fd) == errno.EAGAIN
        limits.open_gate()
        assert poll(fd, PATIENCE)
        until(lambda: ask(fd) in (0, errno.EALREADY), "no channel is free")
        until(lambda: limits.get("closes") == 1, "the channel that was given up is not closed")


def test_the_module_goes_while_an_answer_is_awaited(limits):
    limits.load()
    with opened(flags=NONBLOCKING) as fd, opened(flags=NONBLOCKING) as second:
        assert ask(fd, b"block") == errno.EINPROGRESS
        limits.began(1)
        assert ask(second) == errno.EINPROGRESS  # behind the other
        limits.unload()
        assert poll(fd, PATIENCE)
        assert poll(second, PATIENCE)
        assert ask(second) in (0, errno.ESHUTDOWN)
        assert ask(fd) in (0, errno.ESHUTDOWN)


@pytest.mark.asyncio
async def test_cancelled_in_python(limits):
    """Nothing is left of a connect that is cancelled while a callback blocks: no thread either."""
    limits.load()
    before = set(threading.enumerate())
    tasks = [
        asyncio.ensure_future(kucomms.connect("kernel://limits", hello=b"block")._open())
        for _ in range(3)
    ]
    async with asyncio.timeout(PATIENCE):
        while limits.get("opens") != 1 or alive()["channels"] != 3:
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert all(task.cancelled() for task in tasks)
    # A set-up that has just begun returns at once. The loop's own threads stay, and wait for work.
    until(
        lambda: not [fd for fd in os.listdir("/proc/self/fd") if _is_device(fd)],
        "the device stays open",
    )
    until(
        lambda: not any(map(in_set_up, set(threading.enumerate()) - before)),
        "a thread stays in the set-up",
    )
    assert limits.get("opens") == 1
    with pytest.raises(kucomms.NotReadyError, match="does not answer"):
        await kucomms.connect("kernel://limits", timeout=0)._open()
    limits.open_gate()
    async with kucomms.connect("kernel://limits", timeout=PATIENCE) as link:
        await link.send(b"hello")
        assert (await link.receive()).data == b"hello"


def _is_device(fd):
    try:
        return "kucomms_limits" in os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return False


def test_a_program_ends_while_a_callback_blocks(limits):
    limits.load()

    def program(talk):
        async def main():
            opening = asyncio.ensure_future(
                kucomms.connect("kernel://limits", hello=b"block")._open()
            )
            while limits.get("opens") != 1:
                await asyncio.sleep(0)
            talk.send(b"waits")
            assert not opening.done()

        asyncio.run(main())

    with Child(program) as child:
        child.says("waits")
        child.ends_well()


# ---- signals, and suspending -----------------------------------------------------


def in_ioctl(pid):
    path = Path(f"/proc/{pid}")
    return (path / "stat").read_text().rpartition(")")[2].split()[0] in "SD" and (
        path / "syscall"
    ).read_text().startswith("16 ")


TOLD = 15
"""The exit status of a child that a signal has told to end."""


def waits_for(what, name="limits"):
    """A child that waits: for the open callback, or for a channel that ends."""

    def program(talk):
        signal.signal(signal.SIGTERM, lambda *_: os._exit(TOLD))  # not fatal before it runs
        with opened(name) as fd:
            talk.send(b"begins")
            talk.sendall(str(ask(fd, b"block" if what == "answer" else b"")).encode())

    return program


@contextlib.contextmanager
def one_who_waits(limits, what):
    """Yields the child, in its set-up."""
    limits.load(max_channels=1)
    if what == "end":
        with opened() as fd:
            assert ask(fd, b"late") == 0
        until(lambda: limits.get("closes") == 1, "the channel does not end")
    with Child(waits_for(what)) as child:
        child.says("begins")
        until(lambda: in_ioctl(child.pid), "the child does not wait")
        if what == "answer":
            limits.began(1)
        yield child


@pytest.mark.parametrize("what", ["answer", "end"])
def test_a_signal_ends_who_waits(limits, what):
    with one_who_waits(limits, what) as child:
        os.kill(child.pid, signal.SIGTERM)
        assert child.ended() == TOLD
        limits.open_gate()


def test_after_a_signal_the_set_up_begins_anew(limits):
    """With a handler: EINTR, or from the start; the channel before was given up."""
    limits.load()

    def program(talk):
        alarms = []
        signal.signal(signal.SIGALRM, lambda *_: alarms.append(0))
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        with opened() as fd:
            assert ask(fd, b"block") == errno.EINTR
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.set_blocking(fd, False)
            assert ask(fd, b"block") == errno.EINPROGRESS
            limits.open_gate()
            assert poll(fd, PATIENCE)
            assert ask(fd) == 0
            assert alarms
            until(lambda: limits.get("closes") == 1, "the first is not closed")

    with Child(program) as child:
        child.ends_well()


def test_what_is_left_of_a_wait(limits):
    limits.load()

    def program(talk):
        signal.signal(signal.SIGALRM, lambda *_: None)
        whole = int(PATIENCE * 1e9)
        with RawDevice("limits", ring_size=PAGE) as device:
            signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
            data = bytearray(WAIT_STRUCT.pack(DATA, 0, whole))
            assert ioctl(device.fd, WAIT, data) == errno.EINTR
            _events, _reserved, left = WAIT_STRUCT.unpack(data)
            assert 0 < left < whole
            # It goes on by itself where the handler says so, for the rest.
            signal.siginterrupt(signal.SIGALRM, False)
            before = time.monotonic()
            assert wait(device.fd, DATA, int(1e9))[0] == errno.ETIMEDOUT
            passed = time.monotonic() - before
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert 1 <= passed < PATIENCE

    with Child(program) as child:
        child.ends_well()


@pytest.mark.skipif(not Path("/sys/power/pm_test").exists(), reason="no pm_test in this kernel")
@pytest.mark.parametrize("what", ["answer", "end", "wait"])
def test_the_machine_can_be_suspended(limits, what):
    """And then they go on waiting."""

    def rung(talk):
        with RawDevice("limits", ring_size=PAGE) as device:
            device.park(1)
            talk.send(b"begins")
            assert talk.recv(9) == b"go on"
            begin = time.monotonic()
            assert device.wait(DATA, int(2e9)) == errno.ETIMEDOUT
            assert time.monotonic() - begin >= 2
            talk.send(b"0")

    delay = Path("/sys/module/suspend/parameters/pm_test_delay")
    if delay.exists():
        delay.write_text("1")
    with contextlib.ExitStack() as stack:
        if what == "wait":
            limits.load()
            child = stack.enter_context(Child(rung))
            child.says("begins")
            child.tell()
            until(lambda: in_ioctl(child.pid), "the child does not wait")
        else:
            child = stack.enter_context(one_who_waits(limits, what))
        Path("/sys/power/pm_test").write_text("freezer")
        try:
            Path("/sys/power/state").write_text("freeze")
        finally:
            Path("/sys/power/pm_test").write_text("none")
        if what != "wait":
            assert in_ioctl(child.pid)
        limits.open_gate()
        child.says("0")
        child.ends_well()
        if what == "answer":
            assert limits.get("opens") == 1


# ---- who asks --------------------------------------------------------------------


def test_the_opener_counts(limits):
    """And not the process that sets the file up, nor the one that has it now."""
    limits.load(max_user_channels=1)

    def opens(talk):
        fd = open_device("limits")
        socket.send_fds(talk, [b"file"], [fd])
        os.close(fd)
        talk.recv(9)

    fds = []
    with as_user(USER, opens) as child, as_user(USER, opens) as second:
        for each in (child, second):
            _data, (fd,), _flags, _address = socket.recv_fds(each.socket, 9, 1)
            fds.append(fd)
        assert ask(fds[0]) == 0
        assert (limits.get("peer_pid"), limits.get("peer_uid")) == (child.pid, USER)
        told = next(DEBUG.glob("kucomms_limits.*")).read_text().splitlines()
        assert told[:2] == [f"pid {child.pid}", f"uid {USER}"]
        assert ask(fds[1]) == errno.EDQUOT
        with opened() as own:
            assert ask(own) == 0
            assert (limits.get("peer_pid"), limits.get("peer_uid")) == (os.getpid(), 0)
    for fd in fds:
        os.close(fd)


def test_minors_are_not_given_again_at_once():
    create("limits_1")
    first = os.stat("/dev/kucomms_limits_1").st_rdev
    remove("limits_1")
    create("limits_1")
    second = os.stat("/dev/kucomms_limits_1").st_rdev
    remove("limits_1")
    assert first != second


# ---- a program that takes all it can get -----------------------------------------


KILLED = re.compile(r"\bOut of memory|oom-kill:.*global_oom")
BYSTANDER = 200 * MEGABYTE


def bystander(talk):
    """Has memory, touches all of it again and again, and echoes."""
    memory = bytearray(BYSTANDER)
    with RawDevice("limits", ring_size=PAGE) as device:
        talk.setblocking(False)
        rounds = 0
        while True:
            memory[::PAGE] = bytes([rounds % 256]) * (BYSTANDER // PAGE)
            before = device.available
            device.send(b"echo")
            until(lambda: device.available > before, "no echo")  # noqa: B023
            device.consume()
            rounds += 1
            with contextlib.suppress(BlockingIOError):
                if talk.recv(9):
                    talk.sendall(str(rounds).encode())


def rounds_of(child):
    child.tell()
    return int(child.hears())


def available():
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = dict(line.split(":") for line in lines)
    return {name: int(fields[name].split()[0]) << 10 for name in ("MemAvailable", "MemTotal")}


class Hog:
    """``programs/hog.c``, as a user and in a cgroup."""

    def __init__(self, program, uid, group, *arguments):
        def before():
            most = 1 << 20
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
            memlock(8 * MEGABYTE)
            if group is not None:
                (group / "cgroup.procs").write_text("0")
            if uid:
                become(uid)

        self.process = subprocess.Popen(
            [program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=before,  # noqa: PLW1509
        )
        self.found = {}

    def takes(self):
        """All that it can: {letter: (how many, errno)}, until it is killed."""
        for line in self.process.stdout:
            if line == "all\n":
                break
            letter, count, number = line.split()
            self.found[letter] = int(count), int(number)
        return self.found

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


ALL = ("r", "/dev/kucomms_limits", "p", "/dev/kucomms_limits", "t", "/dev/kucomms_limits_threads")
"""Channels with large rings, then pools, then threads."""
THREADS = (*ALL[4:], *ALL[:4])
"""The threads first."""


@pytest.fixture
def hogged(limits, programs, kernel_log):
    """Runs a hog beside a bystander; returns what it found and whether it lives."""

    def run(uid, group, *arguments, **parameters):
        if not limits.loaded:
            limits.load(flags=POOLS_FLAG, **parameters)
        with Child(bystander) as beside:
            assert rounds_of(beside) > 0
            pages = alive()["pages"]
            with Hog(programs / "hog", uid, group, *arguments) as hog:
                found = hog.takes()
                before = rounds_of(beside)
                room = available()
                lives = hog.process.poll() is None
                assert rounds_of(beside) > before  # a bystander is not disturbed
            until(lambda: alive()["pages"] == pages, lambda: f"{alive()}, not {pages} pages")
            assert rounds_of(beside) > before
        assert not [line for line in kernel_log() if KILLED.search(line)]
        return found, lives, room

    return run


FREE = {"max_channels": UNLIMITED, "max_user_channels": UNLIMITED, "max_pool_bytes": 2**63}


def test_root_without_a_cgroup(hogged):
    """Whatever the module allows: something is left for others."""
    found, lives, room = hogged(0, None, *ALL, **FREE)
    assert lives
    assert {number for _count, number in found.values()} == {errno.ENOMEM}
    assert found["r"][0] >= 10
    # Others may have taken of it since.
    assert room["MemAvailable"] > room["MemTotal"] / 32


def test_root_with_the_defaults(hogged):
    found, lives, _room = hogged(0, None, *THREADS)
    assert lives
    assert found["t"] == (256, errno.EDQUOT)
    assert found["r"][1] == errno.ENOMEM


def test_a_user_without_a_cgroup(hogged):
    pools = "p", "/dev/kucomms_limits"
    found, lives, room = hogged(USER, None, *pools, *ALL[:2], *ALL[4:], **FREE)
    assert lives
    assert found["p"][1] == errno.EPERM
    assert found["r"][1] == found["t"][1] == errno.ENOMEM
    assert room["MemAvailable"] > room["MemTotal"] / 32
    # And of what it had locked nothing is left: another of this user gets as much.
    again, lives, _room = hogged(USER, None, *pools, **FREE)
    assert lives
    assert again["p"] == found["p"]


@pytest.mark.parametrize("uid", [0, USER])
@pytest.mark.parametrize("arguments", [ALL, THREADS], ids=["rings_first", "threads_first"])
def test_in_a_cgroup(hogged, cgroup, uid, arguments):
    """It is refused, or killed by its cgroup: the others have room."""
    (cgroup / "memory.max").write_text(str(96 * MEGABYTE))
    before = available()["MemAvailable"]
    found, lives, room = hogged(uid, cgroup, *arguments, **FREE)
    assert not lives or {number for _count, number in found.values()} <= {
        errno.ENOMEM,
        errno.EPERM,
        errno.EMFILE,
    }
    # Threads have stacks that are charged to nobody: they are bounded by the channels' rings.
    assert before - room["MemAvailable"] < 512 * MEGABYTE
