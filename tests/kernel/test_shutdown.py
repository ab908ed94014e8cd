# SPDX-License-Identifier: MIT
"""The modules go, at every moment, while they are used; and devices are removed."""

import asyncio
import errno
import itertools
import os
import re
import select
import subprocess
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

import kucomms
from kucomms import Endpoint, NotReadyError, ShutdownError
from kucomms.testing import numbered, verify
from tests.kernel.lifecycle import (
    PAGE,
    PATIENCE,
    SPAN,
    Child,
    Raw,
    alive,
    all_comes_back,
    create,
    failing,
    remove,
    until_channels,
)
from tests.kernel.raw_device import open_device, set_up

URL = "kernel://tutorial"
TRACING = Path("/sys/kernel/tracing")


@pytest.fixture(autouse=True)
def comes_back(main_module):
    with all_comes_back():
        yield


@pytest.fixture
def device(comes_back):
    create("tutorial")
    yield
    until_channels(0)
    remove("tutorial")


@pytest.fixture
def tutorial(device, load, unload):
    load("kucomms_tutorial")
    yield
    unload("kucomms_tutorial")


@pytest.fixture
def join(device, load, unload):
    """Registers an endpoint for the device, of some kind, and unregisters it."""
    load("kucomms_join")
    parameters = Path("/sys/module/kucomms_join/parameters")

    def register(flags, most=0):
        (parameters / "flags").write_text(str(flags))
        (parameters / "max_channels").write_text(str(most))
        (parameters / "register").write_text("kucomms_tutorial")
        return lambda: (parameters / "unregister").write_text("kucomms_tutorial")

    yield register
    unload("kucomms_join")


async def echo(link, number, size=100):
    await link.send(numbered(number, size))
    verify(await asyncio.wait_for(link.receive(), PATIENCE), number)


def rmmod(name):
    """What rmmod says: (exit code, standard error)."""
    result = subprocess.run(["rmmod", name], capture_output=True, text=True, check=False)
    return result.returncode, result.stderr


@contextmanager
def traced_sends():
    """What the kernel sends meanwhile: yields a function for the IDs of what it committed."""
    enable = TRACING / "events/kucomms/kucomms_send/enable"
    trace = TRACING / "trace"
    trace.write_text("")
    # The names of commands come from the scheduler's tracepoints, whose code would be rewritten
    # while it runs: an emulated processor can meet the breakpoint of that after it has gone.
    (TRACING / "options/record-cmd").write_text("0")
    enable.write_text("1")
    try:
        yield lambda: [int(n) for n in re.findall(r" id=(\d+) .* err=0\n", trace.read_text())]
    finally:
        enable.write_text("0")
        trace.write_text("")


@pytest.mark.asyncio
@pytest.mark.parametrize("moment", range(16))
async def test_rmmod_in_a_conversation(device, load, moment):
    removal = None

    async def send(link):
        for number in itertools.count():
            try:
                await link.send(numbered(number, number % 100))
            except ShutdownError:
                with pytest.raises(ShutdownError, match="going away"):
                    link.send_nowait(b"")
                return

    async def receive(link):
        nonlocal removal
        for number in itertools.count():
            if number == moment * moment:
                removal = await asyncio.create_subprocess_exec("rmmod", "kucomms_tutorial")
            try:
                verify(await link.receive(), number)
            except ShutdownError:
                return number
        raise AssertionError

    load("kucomms_tutorial")
    with traced_sends() as committed:
        async with asyncio.timeout(PATIENCE), Endpoint("user") as endpoint:
            busy = await endpoint.connect(URL, ring_size=PAGE << moment % 3, timeout=0)
            idle = await endpoint.connect(URL, timeout=0)
            waiting = asyncio.ensure_future(idle.receive())
            sender = asyncio.ensure_future(send(busy))
            received = await receive(busy)
            await sender
            with pytest.raises(ShutdownError):
                await waiting
            for link in (busy, idle):
                with pytest.raises(ShutdownError):
                    link.send_nowait(b"")
                with pytest.raises(ShutdownError):
                    await link.request(b"")
            assert await removal.wait() == 0
        assert committed() == list(range(received))
        assert received >= moment * moment
    with pytest.raises(NotReadyError, match="no kernel module has registered"):
        await kucomms.connect(URL, timeout=0)


@pytest.mark.parametrize("moment", range(10))
def test_rmmod_under_several_processes(device, load, moment):
    """All that the kernel has committed is there, whole, in the ring of each of them."""

    def program(talk):
        with Raw.linked(ring_size=PAGE << moment % 4) as raw:
            sent = received = 0

            def drain():
                nonlocal received
                while (number := raw.receive()) is not None:
                    assert number == received
                    received += 1
                    if received == moment * 10 + 1:
                        talk.send(b"converses")

            with suppress(BrokenPipeError):  # ESHUTDOWN
                while True:
                    while raw.has_room():
                        sent += 1  # also if the kick behind it comes too late
                        raw.send(sent - 1, kick=sent % 7 == 0)
                    raw.kick()
                    drain()
            drain()
            position = raw.producer(0).position
            assert raw.producer(0).state == 2
            assert raw.consumer(1).position == position == received * SPAN
            assert received <= sent

    load("kucomms_tutorial")
    children = [Child(program) for _ in range(3)]
    try:
        for child in children:
            child.says("converses")
        assert rmmod("kucomms_tutorial") == (0, "")
        for child in children:
            child.ends_well()
    finally:
        for child in children:
            child.__exit__()


@pytest.mark.asyncio
async def test_rmmod_of_the_main_module_in_use(tutorial):
    async with kucomms.connect(URL, timeout=0) as link:
        await echo(link, 1)
        for _ in range(3):
            code, said = await asyncio.to_thread(rmmod, "kucomms")
            assert code != 0
            assert "kucomms is in use" in said
        await echo(link, 2)


def test_rmmod_of_the_main_module_with_a_device_open(device, load):
    """No module uses it: the open file alone keeps it, and what is mapped after that."""
    load("kucomms_tutorial")
    with Raw.linked() as raw:
        assert rmmod("kucomms_tutorial") == (0, "")
        for let_go in (raw.close, lambda: raw.unmap(0), lambda: raw.unmap(1)):
            code, said = rmmod("kucomms")
            assert code != 0
            assert "kucomms is in use" in said
            let_go()


def test_remove_device_in_use(device, load):
    for number in range(10):
        load("kucomms_tutorial")
        with Raw.linked() as raw:
            with failing(errno.EBUSY):
                remove("tutorial")
            raw.echo(number)
            assert rmmod("kucomms_tutorial") == (0, "")
            with failing(errno.EBUSY):
                remove("tutorial")
            raw.close()
            with failing(errno.EBUSY):  # the mappings hold the file
                remove("tutorial")
        remove("tutorial")
        create("tutorial")
    with Raw(), failing(errno.EBUSY):
        remove("tutorial")
    remove("tutorial")
    create("tutorial")


# ---- endpoints that go, and others that come -------------------------------------

THREAD_PER_CHANNEL, IN_PLACE = 1, 2
KINDS = (0, THREAD_PER_CHANNEL, IN_PLACE, THREAD_PER_CHANNEL | IN_PLACE)


def test_set_ups_while_endpoints_come_and_go(join):
    """What a set-up has prepared for one endpoint is of no use to the next, of another kind."""

    def program(talk):
        talk.setblocking(False)
        found = Counter()
        told = b""
        while not told:
            fd = open_device("tutorial")
            number, _told = set_up(fd, ring_size=PAGE << found.total() % 10, hello=b"listen")
            os.close(fd)
            found[errno.errorcode.get(number, "set up")] += 1
            if found["set up"] == 1:
                talk.send(b"set up")
                found["set up"] += 1
            with suppress(BlockingIOError):
                told = talk.recv(16)
        assert set(found) <= {"set up", "ENOTCONN", "EBUSY", "ESHUTDOWN"}, found

    with ExitStack() as stack:
        children = [stack.enter_context(Child(program)) for _ in range(3)]
        waiting = list(children)
        for turn in itertools.count():
            unregister = join(KINDS[turn % len(KINDS)], most=turn % 3)
            ready = select.select([child.socket for child in waiting], [], [], 0)[0]
            waiting = [child for child in waiting if child.socket not in ready]
            unregister()
            if turn >= 300 and not waiting:
                break
        for child in children:
            child.says("set up")
            child.tell("stop")
        for child in children:
            child.ends_well()


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_channels_leave_nothing(join, kind):
    """Above all no thread, where each channel has one."""
    unregister = join(kind, most=2)
    first, second = (open_device("tutorial") for _ in range(2))
    try:
        assert set_up(first, hello=b"listen")[0] == set_up(second, hello=b"listen")[0] == 0
        before = alive()
        for _ in range(20):
            fd = open_device("tutorial")
            assert set_up(fd)[0] == errno.EBUSY
            os.close(fd)
        assert alive() == before
    finally:
        os.close(first)
        os.close(second)
        unregister()
