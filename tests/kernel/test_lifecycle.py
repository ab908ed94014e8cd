# SPDX-License-Identifier: MIT
"""Links to the kernel: how they come, how many there can be, how they end, what idling costs."""

import asyncio
import errno
import json
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import kucomms
from kucomms import (
    AddressError,
    Endpoint,
    NotReadyError,
    TransportError,
    UsageError,
    VersionError,
)
from kucomms.testing import numbered, verify
from kucomms.transports import kernel
from tests.kernel.lifecycle import (
    DATA,
    PATIENCE,
    Child,
    Raw,
    alive,
    all_comes_back,
    channels,
    create,
    ends,
    failing,
    has_device,
    kernel_thread,
    remove,
    until,
    until_channels,
)

URL = "kernel://tutorial"
NOBODY = 65534
TICK = 10.0
"""Milliseconds between two work ticks, for which the original had a message wait."""


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


async def echo(link, number, size=100):
    await link.send(numbered(number, size))
    verify(await asyncio.wait_for(link.receive(), PATIENCE), number)


# ---- connect -------------------------------------------------------------------


@pytest.mark.asyncio
async def test_no_device():
    with pytest.raises(NotReadyError, match=r"kernel://none: .*'kucomms device create none'"):
        await kucomms.connect("kernel://none", timeout=0)


@pytest.mark.asyncio
async def test_no_endpoint(device):
    with pytest.raises(NotReadyError, match="no kernel module has registered its endpoint; load"):
        await kucomms.connect(URL, timeout=0)


def test_no_rights(tutorial):
    def program(talk):
        async def main():
            async with Endpoint("user") as endpoint:
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
                with pytest.raises(TransportError) as failure:
                    await endpoint.connect(URL, timeout=PATIENCE)
                talk.send(str(failure.value).encode())
                assert failure.value.errno == errno.EACCES

        asyncio.run(main())

    with Child(program) as child:
        text = child.hears()
        assert "no right to open /dev/kucomms_tutorial; let root set its mode and group" in text
        child.ends_well()


@pytest.mark.asyncio
async def test_foreign_version(tutorial, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "lib", SimpleNamespace(KUCOMMS_ABI_VERSION=99, KUCOMMS_FEATURES=0))
        with pytest.raises(VersionError, match=r"speaks version 1 .* this is version 99\. Use the"):
            await kucomms.connect(URL, timeout=60)
        patch.setattr(kernel, "lib", SimpleNamespace(KUCOMMS_ABI_VERSION=1, KUCOMMS_FEATURES=4))
        with pytest.raises(VersionError):
            await kucomms.connect(URL, timeout=60)
    async with kucomms.connect(URL, timeout=0) as link:
        await echo(link, 1)


@pytest.mark.asyncio
async def test_connect_waits_for_device_and_endpoint(load, unload, monkeypatch):
    tries = asyncio.Queue()
    once = kernel._connect_once

    async def noted(*arguments):
        try:
            return await once(*arguments)
        except NotReadyError as error:
            tries.put_nowait(str(error))
            raise

    monkeypatch.setattr(kernel, "_connect_once", noted)
    connecting = asyncio.ensure_future(kucomms.connect(URL, timeout=PATIENCE)._open())
    async with asyncio.timeout(PATIENCE):
        while "there is no device" not in await tries.get():
            pass
        create("tutorial")
        while "no kernel module has registered" not in await tries.get():
            pass
        assert not connecting.done()
        await asyncio.to_thread(load, "kucomms_tutorial")
        link = await connecting
        await echo(link, 1)
        await link.aclose()
    unload("kucomms_tutorial")
    remove("tutorial")


@pytest.mark.asyncio
@pytest.mark.parametrize("there", [False, True])
async def test_connect_gives_up(there):
    if there:
        create("tutorial")
    begin = time.monotonic()
    with pytest.raises(NotReadyError, match="no kernel module" if there else "no device"):
        await kucomms.connect(URL, timeout=0.2)
    assert 0.2 <= time.monotonic() - begin < PATIENCE
    if there:
        remove("tutorial")


@pytest.mark.asyncio
async def test_nobody_listens_but_a_module(device):
    async with Endpoint("user") as endpoint:
        with pytest.raises(AddressError, match="only a kernel module can listen there"):
            await endpoint.listen(URL)


@pytest.mark.asyncio
async def test_registered_before_the_device(load, unload):
    load("kucomms_tutorial")
    create("tutorial")
    async with kucomms.connect(URL, timeout=0) as link:
        await echo(link, 1)
    with failing(errno.EBUSY):
        remove("tutorial")
    unload("kucomms_tutorial")
    remove("tutorial")


# ---- many ----------------------------------------------------------------------


def converse(base, links, count, linked, go):
    """In a thread: so many links in a loop of their own, each with messages of its own."""

    async def stream(link, first):
        async def send():
            for number in range(first, first + count):
                await link.send(numbered(number, number % 500, type=first))

        sender = asyncio.ensure_future(send())
        for number in range(first, first + count):
            message = await link.receive()
            verify(message, number)
            assert (message.type, len(message)) == (first, number % 500)
        await sender

    async def main():
        async with Endpoint("user") as endpoint:
            mine = [await endpoint.connect(URL, ring_size=1 << 14) for _ in range(links)]
            linked.release()
            await asyncio.to_thread(go.wait)
            async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
                for number, link in enumerate(mine):
                    group.create_task(stream(link, (base + number) * 1_000_000))

    asyncio.run(main())


def test_64_channels_at_once(tutorial):
    processes, threads, links, count = 4, 4, 4, 150

    def program(process):
        def run(talk):
            linked, go, done = threading.Semaphore(0), threading.Event(), []

            def thread(number):
                converse((process * threads + number) * links, links, count, linked, go)
                done.append(number)

            all_threads = [threading.Thread(target=thread, args=(n,)) for n in range(threads)]
            for each in all_threads:
                each.start()
            for _ in all_threads:
                assert linked.acquire(timeout=PATIENCE)
            talk.send(b"linked")
            talk.recv(9)
            go.set()
            for each in all_threads:
                each.join()
            assert sorted(done) == list(range(threads))

        return run

    children = [Child(program(process)) for process in range(processes)]
    try:
        for child in children:
            child.says("linked")
        assert channels() == alive()["channels"] == 64
        for child in children:
            child.tell()
        for child in children:
            child.ends_well()
    finally:
        for child in children:
            child.__exit__()


def test_200_devices():
    names = [f"many_{number}" for number in range(200)]
    before = alive()["devices"]
    for name in names:
        create(name)
    assert alive()["devices"] == before + 200
    assert {path.name for path in Path("/dev").glob("kucomms_*")} == {f"kucomms_{n}" for n in names}
    listed = subprocess.run(
        [sys.executable, "-m", "kucomms", "device", "list", "--json"],
        capture_output=True, text=True, check=True, timeout=PATIENCE,
    )  # fmt: skip
    assert {each["url"] for each in json.loads(listed.stdout)["devices"]} == {
        f"kernel://{name}" for name in names
    }
    opened = [Raw(name) for name in names]
    with failing(errno.EBUSY):
        remove(names[100])
    for raw in opened:
        with failing(errno.ENOTCONN):
            raw.setup()
        raw.close()
    random.Random(1).shuffle(names)
    for name in names:
        remove(name)
    assert list(Path("/dev").glob("kucomms_*")) == []
    assert alive()["devices"] == before


# ---- fork ----------------------------------------------------------------------


@pytest.mark.asyncio
async def test_a_forked_child_cannot_use_the_link(tutorial):
    async with Endpoint("user") as endpoint:
        link = await endpoint.connect(URL)
        await echo(link, 1)

        def program(_talk):
            attempts = [
                lambda: link.send(b"x").send(None),
                lambda: link.send_nowait(b"x"),
                lambda: link.send_threadsafe(b"x"),
                lambda: link.loan(10).__enter__(),
                lambda: link.receive().send(None),
                link.receive_nowait,
                lambda: link.request(b"x").send(None),
                lambda: link.aclose().send(None),
                lambda: endpoint.connect(URL).send(None),
            ]
            for attempt in attempts:
                with pytest.raises(UsageError, match="fork"):
                    attempt()

            async def main():
                async with kucomms.connect(URL, timeout=0) as own:
                    await echo(own, 2)

            threading.Thread(target=asyncio.run, args=(main(),)).run()

        with Child(program) as child:
            await asyncio.to_thread(child.ends_well)
        await echo(link, 3)


def test_a_child_outlives_its_parent(tutorial):
    def program(talk):
        async def main():
            async with kucomms.connect(URL, timeout=0) as link:
                await echo(link, 1)
                if not os.fork():
                    talk.send(str(os.getpid()).encode())
                    talk.recv(9)
                    os._exit(0)
                while True:
                    await echo(link, 2)

        asyncio.run(main())

    with Child(program) as parent:
        pid = int(parent.hears())
        assert channels() == 1
        parent.kill()
        until_channels(0)
        assert has_device(pid)
        with ends(pid):
            parent.tell()


# ---- idling ----------------------------------------------------------------------


def switches(pid):
    """How often a process went to sleep, and its state."""
    status = Path(f"/proc/{pid}/status").read_text()
    state = re.search(r"^State:\s+(\w)", status, re.MULTILINE)[1]
    return int(re.search(r"^voluntary_ctxt_switches:\s+(\d+)", status, re.MULTILINE)[1]), state


def asleep(pid):
    before = None

    def is_asleep():
        nonlocal before
        now = switches(pid)
        same, before = now == before, now
        return same and now[1] in "SI"

    until(is_asleep, f"process {pid} does not sleep: {before}")


def milliseconds(times):
    return statistics.median(times) / 1e6


def measure_pipe(count):
    """Round trips to a process that sleeps in read()."""
    there, back = os.pipe(), os.pipe()

    def program(_talk):
        while os.read(there[0], 1) == b"x":
            os.write(back[1], b"x")

    times = []
    with Child(program) as child:
        for _ in range(count):
            asleep(child.pid)
            begin = time.perf_counter_ns()
            os.write(there[1], b"x")
            os.read(back[0], 1)
            times.append(time.perf_counter_ns() - begin)
    for fd in (*there, *back):
        os.close(fd)
    return milliseconds(times)


def measure_device(count, thread):
    """Round trips of a program that blocks in the WAIT ioctl."""
    times = []
    with Raw.linked() as raw:
        for number in range(count):
            raw.park()
            asleep(thread)
            begin = time.perf_counter_ns()
            raw.send(number)
            assert raw.wait() == DATA
            times.append(time.perf_counter_ns() - begin)
            assert raw.receive() == number
    return milliseconds(times)


async def measure_link(count, thread):
    times = []
    async with kucomms.connect(URL, timeout=0) as link:
        for _ in range(count):
            await asyncio.to_thread(asleep, thread)
            begin = time.perf_counter_ns()
            link.send_nowait(b"x")
            await link.receive()
            times.append(time.perf_counter_ns() - begin)
    return milliseconds(times)


def test_idle_latency(tutorial, capsys):
    thread = kernel_thread()
    count = 50
    pipe = measure_pipe(count)
    device = measure_device(count, thread)
    link = asyncio.run(measure_link(count, thread))
    with capsys.disabled():
        print(
            f"\nmedian of {count} round trips to a sleeper: pipe {pipe:.3f} ms, "
            f"kernel endpoint {device:.3f} ms by ioctl, {link:.3f} ms by an asyncio link"
        )
    # A machine that is slow with a pipe, because others use it, is slow with this.
    assert device < max(TICK / 2, 3 * pipe)


@pytest.mark.asyncio
async def test_an_idle_link_wakes_nobody(tutorial):
    thread = kernel_thread()
    async with kucomms.connect(URL, timeout=0) as link:
        await echo(link, 1)
        await asyncio.to_thread(asleep, thread)
        before = switches(thread)
        await asyncio.sleep(2)  # time is the subject
        assert switches(thread) == before
        await echo(link, 2)
        await asyncio.to_thread(asleep, thread)  # it answers first
        assert switches(thread)[0] > before[0]
