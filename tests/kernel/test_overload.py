# SPDX-License-Identifier: MIT
# ruff: noqa: ASYNC110, PT012, ASYNC240
"""More than a kernel endpoint can take, from one of many channels.

The rings bound what is taken, the other channels have their turns, and a callback that blocks
keeps nobody but its own endpoint. Memory limits are in test_waiting.py.
"""

import asyncio
import contextlib
import errno
import re
import struct
from pathlib import Path

import pytest

import kucomms
from kucomms import Endpoint, NotReadyError, QueueFull
from tests.kernel.lifecycle import Child
from tests.kernel.raw_device import PAGE, PATIENCE, RawDevice, counters, open_device, set_up
from tests.kernel.test_hostile import until
from tests.kernel.test_kernel_api import Do, connect, numbers, test_module

LOOPS = ["asyncio"]  # what is tested is the kernel

pytestmark = pytest.mark.asyncio

MIB = 1 << 20
LINKS = 60
BATCH = 64  # KUCOMMS_BATCH


@pytest.fixture(scope="module", autouse=True)
def module(load, unload):
    with test_module(load, unload):
        yield


@pytest.fixture(autouse=True)
def nothing_is_left(module):
    yield
    until(lambda: not counters()["channels"])
    assert counters()["pages"] == 0


def unreclaimable():
    """Bytes of the kernel's own memory that is not a cache."""
    text = Path("/proc/meminfo").read_text()
    return sum(
        int(re.search(rf"^{name}: +(\d+) kB", text, re.MULTILINE)[1]) << 10
        for name in ("SUnreclaim", "KernelStack", "PageTables")
    )


@contextlib.asynccontextmanager
async def many(name):
    """Links to one endpoint; yields a function that asks each for a reply."""
    async with Endpoint("many") as endpoint:
        url = f"kernel://{name}"
        links = [
            await endpoint.connect(url, ring_size=PAGE, timeout=PATIENCE) for _ in range(LINKS)
        ]

        async def all_are_served():
            async with asyncio.timeout(PATIENCE):
                for number, link in enumerate(links):
                    await link.send(b"", id=number)
                for number, link in enumerate(links):
                    assert (await link.receive()).id == number

        await all_are_served()
        pages = counters()["pages"]
        memory = unreclaimable()
        yield all_are_served
        await all_are_served()
        until(lambda: counters()["pages"] == pages)
        assert unreclaimable() - memory < 8 * MIB


@pytest.mark.parametrize("name", ["test_quiet", "test_polling", "test_threads"])
async def test_one_channel_floods(name):
    """As much as it can; those beside it wait for a batch of it, not for its end."""
    flooded, stop = 0, False

    async def flood():
        nonlocal flooded
        async with connect(name, ring_size=1 << 18) as link:
            # No answer, and 100 us of work: the thread never comes to an end of it.
            batch = [kucomms.Message(bytes(100), Do.CHECKSUM, 0, 100)] * 100
            while not stop:
                flooded += await link.send_many(batch)

    async with many(name) as all_are_served:
        flooding = asyncio.create_task(flood())
        async with asyncio.timeout(PATIENCE):
            while flooded < 3000:  # more than its ring holds
                await asyncio.sleep(0)
        for _ in range(5):
            before = flooded
            await all_are_served()
            # Each of the others has had to wait for some batches at most.
            assert flooded - before <= LINKS * 4 * BATCH
        stop = True
        await flooding


async def test_one_channel_has_to_skip_without_end():
    """Half a million frames that are no messages: others have their turns among them."""
    among = 0
    async with many("test_quiet") as all_are_served, connect("test_quiet") as link:
        with RawDevice("test_quiet", ring_size=16 * MIB) as bad:
            bad.fill_with_discarded()
            for number in range(100):
                bad.refill()
                assert bad.kick() == 0
                await link.send(b"", id=number)
                assert (await link.receive()).id == number
                # Seen late, it may have skipped all of them meanwhile; but not each time.
                among += bad.released < bad.position
                until(lambda: bad.released == bad.position)
            assert among

            async def refill():
                while True:
                    bad.refill()
                    assert bad.kick() == 0
                    await asyncio.sleep(0)

            refilling = asyncio.create_task(refill())
            before = bad.released
            while bad.released - before < 64 * MIB:
                await all_are_served()
            refilling.cancel()
            # A message behind them comes: it is echoed.
            until(lambda: bad.released == bad.position)
            bad.send(b"in the end")
            until(lambda: bad.available)


async def test_one_channel_is_never_read():
    """The thread does not wait for it, whether it is sent to or echoes."""
    with RawDevice("test_quiet", ring_size=PAGE) as stuck:
        async with many("test_quiet") as all_are_served:
            stuck.send(struct.pack("<Q", 100), type=Do.FILL)
            for _ in range(20):
                stuck.send(bytes(100))
            until(lambda: stuck.available > PAGE - 200)
            at = stuck.available
            for _ in range(5):
                await all_are_served()
            assert stuck.available == at  # not overrun
            assert stuck.released < stuck.position  # back-pressure
            while stuck.released < stuck.position:
                stuck.consume()
                stuck.kick()


async def test_bad_channels_among_many():
    """One after the other breaks the rules; each is shut, and no other."""
    async with many("test_quiet") as all_are_served:
        before = counters()["protocol_errors"]
        for number in range(20):
            with RawDevice("test_quiet", ring_size=PAGE) as bad:
                bad.frame(b"", kind=number + 1)
                bad.publish()
                bad.kick()
                await all_are_served()
                until(lambda: bad.kick() == errno.EPROTO)
        assert counters()["protocol_errors"] == before + 20


async def test_a_callback_that_blocks():
    """Its endpoint stands still; the loop, other endpoints, and all that was sent do not suffer."""
    blocking, count = 4000, 0  # milliseconds: longer than a connect waits for an answer

    async with (
        connect("test") as link,
        connect("test", ring_size=PAGE) as beside,
        connect("test_threads") as elsewhere,
    ):
        asked = asyncio.create_task(
            link.request(numbers(blocking), type=Do.SLEEP, timeout=PATIENCE)
        )
        while not link.statistics().messages_sent:
            await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="kernel://test: "):
            while True:
                beside.send_nowait(bytes(100), id=count)
                count += 1
        with pytest.raises(NotReadyError, match=r"kernel://test: .*does one of its callb"):
            await kucomms.connect("kernel://test", timeout=0)
        for number in range(20):
            await elsewhere.send(b"", id=number)
            assert (await elsewhere.receive()).id == number
        assert not asked.done()
        async with asyncio.timeout(PATIENCE):
            await asked
            for number in range(count):
                assert (await beside.receive()).id == number
    async with connect("test") as again:
        await again.send(b"", id=1)
        assert (await again.receive()).id == 1


async def test_no_more_threads():
    """Who wants a channel with a thread of its own is told; nothing waits for one."""

    def ask_for_two(talk):
        fd = open_device("test_threads")
        talk.send(b"open")
        for _ in range(2):
            talk.recv(9)
            talk.send(errno.errorcode.get(set_up(fd, ring_size=PAGE)[0], "made").encode())

    most = Path("/proc/sys/kernel/threads-max")
    before = most.read_text()
    with Child(ask_for_two) as child:
        child.says("open")
        most.write_text("20")
        try:
            child.tell()
            child.says("ENOMEM")
        finally:
            most.write_text(before)
        child.tell()
        child.says("made")
