# SPDX-License-Identifier: MIT
# ruff: noqa: ASYNC110
"""The option ``busy_poll_ns``: the endpoint's thread looks for more before it sleeps.

And how seldom a program that has filled the ring is rung for.
"""

import asyncio
import os
import re
import time
from contextlib import suppress
from pathlib import Path

import pytest

import kucomms
from kucomms import PeerClosedError
from tests.kernel.lifecycle import Child
from tests.kernel.raw_device import PAGE, PATIENCE, RawDevice, channel_counters, counters
from tests.kernel.test_kernel_api import SHARED_RUNNERS, Do, Status, numbers, test_module

LOOPS = ["asyncio"]  # what is tested is the kernel

POLLING = ("test_polling", "test_polling_threads")
PARKED = 2 * PAGE + 128  # in the kernel's side


@pytest.fixture(scope="module", autouse=True)
def module(load, unload):
    with test_module(load, unload):
        yield


@pytest.fixture(autouse=True)
def nothing_is_left(module):
    yield
    all_gone()


def until(condition, what):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        os.sched_yield()


def all_gone():
    until(
        lambda: not counters()["channels"] and counters()["runners"] == SHARED_RUNNERS,
        f"something is left: {counters()}",
    )
    assert counters()["pages"] == 0


class Pinger:
    """Has messages echoed, and spins for them; kicks only when the thread has parked."""

    def __init__(self, name):
        self.raw = RawDevice(name, ring_size=1 << 16)
        self.rung = 0
        self.kicks = 0

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.raw.close()

    def kick(self):
        parked = self.raw.read64(PARKED)
        if parked != self.rung:
            self.rung = parked
            self.kicks += 1
            return self.raw.kick()
        return 0

    def ping(self, count=1, data=bytes(64)):
        """Whether all of them came back; if not, the channel has ended."""
        raw = self.raw
        for _ in range(count):
            raw.frame(data)
            raw.publish()
            if self.kick():
                return False
            deadline = time.monotonic() + PATIENCE
            while raw.available == raw.consumed:
                if self.kick() or raw.kernel_state:
                    return False
                assert time.monotonic() < deadline, "no echo"
            raw.consume(raw.consumed + 32 + len(data))
        return True


def thread_of(name):
    """The thread that serves the only channel of a device."""

    async def ask():
        async with kucomms.connect(f"kernel://{name}", timeout=PATIENCE) as link:
            return (await Status.of(link)).thread

    return asyncio.run(ask())


def apart(thread):
    """Keep a kernel thread, and us, each on a processor of its own."""
    assert os.cpu_count() >= 2  # with one the thread could not poll while we run
    os.sched_setaffinity(thread, {1})
    os.sched_setaffinity(0, {0})


@pytest.fixture
def undo_affinity():
    before = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, before)


# ---- when messages come in quick succession --------------------------------------


def test_a_ping_pong_rings_seldom(undo_affinity):
    """When both have a processor; on a busy machine they do at some time."""
    count = 2000
    apart(thread_of("test_polling"))
    for _ in range(10):
        with Pinger("test_polling") as pinger:
            assert pinger.ping(count)
            found = channel_counters("test_polling")
            assert found["messages_received"] == found["messages_sent"] == count
            assert found["doorbells_heard"] == pinger.kicks
            assert found["poll_ns"] > 0
            # A kick each, if the thread slept between two.
            if found["polls_hit"] > count // 4 and pinger.kicks < count // 2:
                return
        until(lambda: counters()["channels"] == 0, "the channel does not end")
    pytest.fail(f"{pinger.kicks} kicks in the last {count} round trips")


@pytest.mark.parametrize("name", ["test", "test_threads", "test_quiet", "test_in_place"])
def test_nothing_is_polled_without_the_option(name):
    with Pinger(name) as pinger:
        assert pinger.ping(300)
        found = channel_counters(name)
        assert found["messages_received"] == 300
        assert [found[key] for key in ("polls_hit", "polls_missed", "poll_ns")] == [0, 0, 0]


def test_every_message_comes_from_many_channels():
    """One thread polls for several, of which each sends when it likes."""
    count = 200

    async def talk(number):
        async with kucomms.connect(
            "kernel://test_polling", timeout=PATIENCE, ring_size=PAGE
        ) as link:
            for turn in range(count):
                await link.send(b"%d of %d" % (turn, number), id=turn)
                if turn % 5 == number:
                    await asyncio.sleep(0.001 * number)
                message = await asyncio.wait_for(link.receive(), PATIENCE)
                assert (message.id, message.data) == (turn, b"%d of %d" % (turn, number))

    async def main():
        await asyncio.gather(*map(talk, range(5)))

    asyncio.run(main())


def test_pauses_as_long_as_the_budget():
    """Just before, when and just after the thread gives up: nothing is missed."""
    with Pinger("test_polling") as pinger:
        for turn in range(200):
            assert pinger.ping(3)
            time.sleep(0.0002 * (turn % 150))  # 0 to 30 ms; the thread polls for 20


# ---- when none come ----------------------------------------------------------------


def spent(pid):
    """The switches and the processor time of a thread."""
    status = Path(f"/proc/{pid}/status").read_text()
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return re.findall(r"ctxt_switches:\s+(\d+)", status), stat[11:13]


def test_at_idle_nothing_runs():
    thread = thread_of("test_polling")
    with Pinger("test_polling") as pinger:
        assert pinger.ping(500)

        def quiet():
            before = channel_counters("test_polling"), spent(thread)
            time.sleep(0.1)
            return before == (channel_counters("test_polling"), spent(thread))

        until(quiet, "the thread does not rest")
        before = channel_counters("test_polling"), spent(thread)
        time.sleep(1)  # that nothing happens is the subject
        assert (channel_counters("test_polling"), spent(thread)) == before
        assert before[0]["polls_missed"] > 0
        assert pinger.ping(10)


def test_seldom_messages_are_not_polled_for():
    """One each 60 ms, to whom polling for 20 is no use: it is given up."""
    with Pinger("test_polling") as pinger:
        for _ in range(20):
            assert pinger.ping()
            time.sleep(0.06)
        before = channel_counters("test_polling")
        for _ in range(20):
            assert pinger.ping()
            time.sleep(0.06)
        after = channel_counters("test_polling")
        assert after["messages_received"] == 40
        assert after["polls_missed"] - before["polls_missed"] <= 10


# ---- a full ring -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_quiet", "test_in_place", "test_polling"])
def test_a_flood_is_rung_for_seldom(name):
    """The thread is slower than who sends: it rings when a quarter of the ring is free."""
    count, ring_size, data = 8192, 1 << 18, bytes(96)
    microseconds = 300

    async def flood():
        url = f"kernel://{name}"
        async with kucomms.connect(url, timeout=PATIENCE, ring_size=ring_size) as link:
            for _ in range(count // 64):
                for _ in range(64):
                    await link.send(data, type=Do.CHECKSUM, user_value=microseconds)
            async with asyncio.timeout(PATIENCE):
                while channel_counters(name)["messages_received"] < count:
                    await asyncio.sleep(0.01)
            found = channel_counters(name)
            assert found["doorbells_rung"] > 0
            assert found["doorbells_rung"] < count // 64 // 4
            assert (await Status.of(link)).rx_avail <= 32

    asyncio.run(flood())


def test_a_busy_channel_leaves_one_that_was_drained_its_turn():
    """Who was found empty beside one that never is has to be parked: it is not polled."""

    async def main():
        url = "kernel://test_polling"
        async with (
            kucomms.connect(url, timeout=PATIENCE, ring_size=1 << 16) as busy,
            kucomms.connect(url, timeout=PATIENCE, ring_size=1 << 16) as other,
        ):

            async def ping(count):
                for turn in range(count):
                    await other.send(b"", id=turn)
                    assert (await asyncio.wait_for(other.receive(), PATIENCE)).id == turn

            async def flood():
                for _ in range(10_000):
                    await busy.send(bytes(64), type=Do.CHECKSUM, user_value=200)

            await ping(200)  # so that the thread polls
            flooding = asyncio.create_task(flood())
            while busy.tx_free > 1 << 14:
                await asyncio.sleep(0)
            await ping(10)
            assert not flooding.done()
            flooding.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("name", ["test_quiet", "test_polling"])
def test_large_messages_through_a_small_ring(name):
    """Each needs more than the quarter that is waited for, down to a ring that one fills."""

    async def flood(size):
        async with kucomms.connect(
            f"kernel://{name}", timeout=PATIENCE, ring_size=2 * PAGE
        ) as link:

            async def send():
                for number in range(100):
                    await link.send(bytes([number]) * size, id=number)

            sender = asyncio.ensure_future(send())
            for number in range(100):
                message = await asyncio.wait_for(link.receive(), PATIENCE)
                assert message.id == number
                assert message.data == bytes([number]) * size
            await sender

    for size in (1000, 2048, 2049, 4064, 5000, 2 * PAGE - 32):
        asyncio.run(flood(size))


# ---- the end, while the thread polls ------------------------------------------------


@pytest.mark.parametrize("name", POLLING)
def test_closing(name):
    for turn in range(60):
        with Pinger(name) as pinger:
            assert pinger.ping(20 + turn % 7)
        all_gone()


@pytest.mark.parametrize("name", POLLING)
def test_closing_by_the_module(name):
    async def main():
        async with kucomms.connect(f"kernel://{name}", timeout=PATIENCE) as link:
            for number in range(30):
                await link.send(b"again", id=number)
                await asyncio.wait_for(link.receive(), PATIENCE)
            await link.send(numbers(1), type=Do.CLOSE)
            await asyncio.wait_for(link.receive(), PATIENCE)
            with pytest.raises(PeerClosedError):
                await asyncio.wait_for(link.receive(), PATIENCE)

    for _ in range(10):
        asyncio.run(main())


def test_one_of_two_leaves():
    """The thread polls for both; the other goes on."""
    with Pinger("test_polling") as stays:
        for _ in range(30):
            with Pinger("test_polling") as leaves:
                for _ in range(10):
                    assert leaves.ping(2)
                    assert stays.ping(2)
            assert stays.ping(5)


@pytest.mark.parametrize("name", POLLING)
@pytest.mark.parametrize("after", [0, 0.003, 0.05])
def test_killed(name, after):
    def program(talk):
        with Pinger(name) as pinger:
            pinger.ping(50)
            talk.send(b"it polls")
            while pinger.ping():
                pass

    for _ in range(5):
        with Child(program) as child:
            child.says("it polls")
            time.sleep(after)
            child.kill()
        all_gone()


@pytest.mark.parametrize("name", POLLING)
def test_unregistered(name, load, unload):
    """The module goes while its thread polls: nobody waits for long, and the program sees it."""

    def program(talk):
        with Pinger(name) as pinger:
            pinger.ping(50)
            talk.send(b"it polls")
            while pinger.ping():
                pass
            talk.send(b"it is over")
            talk.recv(1)

    for _ in range(5):
        with Child(program) as child:
            child.says("it polls")
            begin = time.monotonic()
            unload("kucomms_test")
            assert time.monotonic() - begin < PATIENCE / 4
            child.says("it is over")
            with suppress(BrokenPipeError):
                child.tell("x")
            child.ends_well()
        load("kucomms_test")


def test_nonsense_while_it_polls():
    """A position that cannot be, without a kick: the thread that polls finds it."""
    with Pinger("test_polling") as pinger:
        assert pinger.ping(100)
        broken = counters()["protocol_errors"]
        pinger.raw.publish(pinger.raw.position + (1 << 40))
        pinger.kick()
        until(lambda: counters()["protocol_errors"] == broken + 1, "nothing was noticed")
    all_gone()


def test_a_frame_that_is_held_for_ever():
    """What is busy is nothing to poll for: the thread sleeps."""
    thread = thread_of("test_polling")
    with Pinger("test_polling") as pinger:
        assert pinger.ping(100)
        pinger.raw.frame(bytes(8), flags=1)
        pinger.raw.publish()
        pinger.kick()

        def quiet():
            before = spent(thread)
            time.sleep(0.1)
            return spent(thread) == before

        until(quiet, "the thread does not rest")
