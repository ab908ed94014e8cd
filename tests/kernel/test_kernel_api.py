# SPDX-License-Identifier: MIT
# ruff: noqa: ASYNC110
"""What kernel modules call, seen from Python: the other half of ``module/kucomms_test.c``."""

import asyncio
import errno
import itertools
import random
import struct
from contextlib import contextmanager
from enum import IntEnum, auto
from pathlib import Path

import pytest

import kucomms
from kucomms import BusyError, PeerClosedError, ShutdownError, TransportError
from tests.kernel.raw_device import PAGE, PATIENCE, RawDevice, channel_counters, counters

LOOPS = ["asyncio"]  # what is tested is the kernel

pytestmark = pytest.mark.asyncio

SYSFS = Path("/sys/devices/virtual/kucomms/kucomms")
PARAMETERS = Path("/sys/module/kucomms_test/parameters")
NAMES = (
    *("test", "test_threads", "test_quiet", "test_in_place", "test_limited"),
    *("test_polling", "test_polling_threads"),
)
TAME = ("test_tame", "test_tame_threads", "test_tame_in_place")  # which know few commands
SHARED_RUNNERS = sum("threads" not in name for name in (*NAMES, *TAME))
HEADER = 32


class Do(IntEnum):
    """The types of messages that the module knows."""

    ECHO = 0
    ECHO_UNLOCKED = auto()
    STORM = auto()
    LOANS = auto()
    SIZES = auto()
    FILL = auto()
    RETRY = auto()
    CLOSE = auto()
    UNREGISTER = auto()
    REGISTER = auto()
    KEEP = auto()
    STATUS = auto()
    RESET = auto()
    SLEEP = auto()
    WORK_TICKS = auto()
    TIMER_TICKS = auto()
    CHECKSUM = auto()
    MEET = auto()
    ECHO_BEGUN = auto()
    UNLOCKED = auto()
    LEND = auto()
    COMMITS = auto()
    BEGIN = auto()
    COMMIT_BEGUN = auto()
    PROBE = auto()


SENDER, LOAN, FILLED, ROOM, CLOSING, ALONE = 1000, 1100, 1200, 1201, 1300, 1400
LENT, BEGUN, PROBED = 1500, 1600, 1700
SENDERS = 4
AT_ONCE, HARD, SOFT, PROCESS = range(4)


@contextmanager
def test_module(load, unload):
    """The module ``kucomms_test``, with its devices."""
    load("kucomms")
    for name in (*NAMES, *TAME):
        (SYSFS / "create_device").write_text(f"kucomms_{name}")
    load("kucomms_test")
    yield
    unload("kucomms_test")
    for name in (*NAMES, *TAME):
        (SYSFS / "remove_device").write_text(f"kucomms_{name}")
    unload("kucomms")


test_module.__test__ = False


@pytest.fixture(scope="module", autouse=True)
def module(load, unload):
    with test_module(load, unload):
        yield


@pytest.fixture(autouse=True)
def nothing_is_left(module):
    """Channels end by themselves when the user has gone."""
    yield
    asyncio.run(all_gone())


async def all_gone():
    async with asyncio.timeout(PATIENCE):
        while (alive := counters())["channels"] or alive["runners"] > SHARED_RUNNERS:
            await asyncio.sleep(0)
    assert alive["pages"] == 0


def connect(name="test", **options):
    return kucomms.connect(f"kernel://{name}", timeout=PATIENCE, **options)


def numbers(*values):
    return struct.pack(f"<{len(values)}Q", *values)


async def ask(link, what, *arguments):
    """The numbers that the module answers."""
    reply = await link.request(numbers(*arguments), type=what, timeout=PATIENCE)
    return struct.unpack(f"<{len(reply) // 8}q", reply.data)


async def next_message(link):
    async with asyncio.timeout(PATIENCE):
        return await link.receive()


class Status:
    """What the module says of a channel."""

    def __init__(self, found):
        self.tx_avail, self.tx_free, self.rx_avail, self.rx_free, *found = found
        self.thread, self.overlaps, self.work_count, self.timer_count, *found = found
        self.errors = found[:SENDERS]
        self.filled, self.aligned, self.writable_count = found[SENDERS:]

    @classmethod
    async def of(cls, link):
        return cls(await ask(link, Do.STATUS))


# ---- sending --------------------------------------------------------------------


@pytest.mark.parametrize("tries", [False, True], ids=["send", "try_send"])
@pytest.mark.parametrize("ring_size", [PAGE, 1 << 20])
async def test_senders_in_every_context(ring_size, tries):
    """Hard interrupt, softirq, a thread, a callback: each message comes whole, once, in order."""
    count = 300
    expected = [0] * SENDERS
    async with connect(ring_size=ring_size) as link:
        await link.send(numbers(count, 0, tries), type=Do.STORM)
        for _ in range(SENDERS * count):
            message = await next_message(link)
            who = message.type - SENDER
            number = message.id
            assert number == expected[who]
            expected[who] += 1
            assert message.data == bytes([(number + 64 * who) % 256]) * ((number * 7 + who) % 256)
        assert expected == [count] * SENDERS
        status = await Status.of(link)
        assert status.errors == [0] * SENDERS
        assert status.overlaps == 0
        assert link.rx_avail == 0


async def test_a_storm_over_four_channels():
    """And who leaves in the middle of one disturbs nobody."""
    count = 100
    async with connect(ring_size=PAGE) as leaves:
        await leaves.send(numbers(10**9), type=Do.STORM)

        async def storm():
            async with connect(ring_size=PAGE) as link:
                await link.send(numbers(count), type=Do.STORM)
                expected = [0] * SENDERS
                for _ in range(SENDERS * count):
                    message = await next_message(link)
                    assert message.id == expected[message.type - SENDER]
                    expected[message.type - SENDER] += 1
                assert (await Status.of(link)).overlaps == 0

        await next_message(leaves)
        storms = asyncio.gather(storm(), storm(), storm())
        for _ in range(100):
            await next_message(leaves)
    await storms


PATTERN = bytes(number % 251 for number in range((1 << 16) + 256))


@pytest.mark.parametrize("ring_size", [PAGE, 1 << 16])
async def test_large_messages_from_every_context(ring_size):
    """What is published at once, what is reserved first, and what fills the ring, mixed."""
    count = 48
    sizes = (2048, 2049, ring_size - HEADER)
    expected = [0] * SENDERS
    async with connect(ring_size=ring_size) as link:
        await link.send(numbers(count, sizes[2]), type=Do.STORM)
        for _ in range(SENDERS * count):
            message = await next_message(link)
            who, number = message.type - SENDER, message.id
            assert number == expected[who]
            expected[who] += 1
            size = sizes[(number + who) % 3]
            start = (number * 7 + who) % 256
            assert message.data == PATTERN[start : start + size]
        assert (await Status.of(link)).errors == [0] * SENDERS


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ring_size", [PAGE, 1 << 20])
async def test_the_only_sender(name, ring_size):
    """Begun and committed, sent at once, begun and forgotten: what was sent comes, in order."""
    count = 200
    async with connect(name, ring_size=ring_size) as link:
        asked = asyncio.ensure_future(ask(link, Do.UNLOCKED, count))
        if link.ring_size == PAGE:
            async with asyncio.timeout(PATIENCE):
                while not channel_counters(name)["full"] and not asked.done():
                    await asyncio.sleep(0)
        for number in range(count):
            message = await next_message(link)
            assert (message.type, message.id) == (ALONE, number)
            assert message.user_value == 2**64 - 1 - number
            assert message.data == bytes([number % 256]) * (number * 13 % 256)
        sent, full, moved, *errors = await asked
        assert (sent, moved) == (count, 0)
        assert errors == [-errno.EMSGSIZE] * 2
        if link.ring_size == PAGE:
            assert full
        elif link.ring_size == 1 << 20:
            assert not full
        assert link.rx_avail == 0


async def test_a_request_beside_a_receiver_wakes_it():
    """Parking for the reply takes the level of the bell back that told of a message."""
    async with connect() as link:
        receiver = asyncio.ensure_future(link.receive())
        await asyncio.sleep(0)
        link.send_nowait(b"echo", type=Do.ECHO)
        while not link.rx_avail:  # without a turn of the loop, which would hear the bell
            pass
        asked = asyncio.ensure_future(ask(link, Do.SLEEP, 1000))
        async with asyncio.timeout(PATIENCE):
            assert (await receiver).data == b"echo"
        assert not asked.done()
        await asked


@pytest.mark.parametrize("how", [Do.ECHO, Do.ECHO_UNLOCKED, Do.ECHO_BEGUN])
@pytest.mark.parametrize("name", NAMES)
async def test_echo_behind_a_full_ring(name, how):
    """The message that found no room comes again when there is some, without a tick."""
    count = 60
    async with connect(name, ring_size=PAGE) as link:

        async def send():
            for number in range(count):
                await link.send(bytes([number]) * (number * 37 % 2000), type=how, id=number)

        sender = asyncio.ensure_future(send())
        async with asyncio.timeout(PATIENCE):
            while link.rx_free >= 2100 or link.tx_free >= 2100:
                await asyncio.sleep(0)
        for number in range(count):
            message = await next_message(link)
            assert (message.id, message.type) == (number, how)
            assert message.data == bytes([number]) * (number * 37 % 2000)
        await sender


@pytest.mark.parametrize("seed", range(4))
async def test_loans_end_in_any_order(seed):
    async with connect(ring_size=1 << 15) as link:
        for turn in range(4):
            surplus, sent, error, _waiting = await ask(link, Do.LOANS, seed * 10 + turn)
            assert (surplus, error) == (-errno.ENOBUFS, 0)
            for number in range(64):
                if sent >> number & 1:
                    message = await next_message(link)
                    length = message.user_value
                    assert (message.type, message.id) == (LOAN, number)
                    assert message.data == bytes([(number + length) % 256]) * length
        assert link.rx_avail == 0


async def test_commits_that_come_too_late():
    """They are errors, and publish nothing."""
    async with connect() as link:
        assert await ask(link, Do.COMMITS) == (
            *(0, -errno.ESTALE, 0, -errno.ESTALE),
            *(0, -errno.EINVAL, -errno.EINVAL, -errno.EINVAL),
        )
        for number in (1, 2, 3):
            message = await next_message(link)
            assert (message.type, message.id, message.data) == (ALONE, number, b"")
        assert link.rx_avail == 0
        # Begun in one callback, and committed in a later one: with and without a message between.
        await link.send(numbers(16), type=Do.BEGIN)
        assert await ask(link, Do.COMMIT_BEGUN) == (0,)
        assert (await next_message(link)).data == b"\x5a" * 16
        await link.send(numbers(16), type=Do.BEGIN)
        await link.send(b"between")
        assert (await next_message(link)).data == b"between"
        assert await ask(link, Do.COMMIT_BEGUN) == (-errno.ESTALE,)
        await link.send(b"goes on")
        assert (await next_message(link)).data == b"goes on"


async def test_all_long_messages_come_before_the_end():
    """Those that are copied just when the channel is closed, too."""
    for turn in range(10):
        link = await connect(ring_size=1 << 20)
        await link.send(numbers(100_000, 1 << 16), type=Do.STORM)
        received, closing = 0, False
        async with asyncio.timeout(PATIENCE):
            while True:
                if received == 20 + turn and not closing:
                    closing = True
                    await link.send(numbers(0), type=Do.CLOSE)
                try:
                    message = await link.receive()
                except kucomms.PeerClosedError:
                    break
                if message.type == SENDER + PROCESS - 1:
                    assert message.id == received
                    received += 1
        await link.aclose()
        await all_gone()
        assert received == int((PARAMETERS / "long_sent").read_text())


async def test_a_probe_that_has_interrupted_a_send():
    """It is told that the channel is busy; any other way to send would wait for ever there."""
    count = 50
    async with connect("test_quiet") as link:
        error, *_ = await ask(link, Do.PROBE, 1)
        if error == -errno.EOPNOTSUPP:
            pytest.skip("this kernel has no kprobes")
        assert error == 0
        for number in range(count):
            await link.send(b"echo", id=number)
        _error, sent, busy, failed = await ask(link, Do.PROBE, 0)
        assert busy >= count
        assert sent > 0
        assert failed == 0
        received = [link.receive_nowait() for _ in range(count + sent)]
        assert [m.id for m in received if m.type != PROBED] == [*range(count)]
        assert sum(m.type == PROBED for m in received) == sent
        assert link.rx_avail == 0


async def test_a_loan_that_is_committed_after_the_end():
    """The module is told that nobody gets it."""
    link = await connect()
    await link.send(numbers(100), type=Do.LEND)
    await until(lambda: link.rx_avail > HEADER + 100)  # it is out, so nothing can be received
    await link.aclose()
    await all_gone()
    lent = (PARAMETERS / "lent").read_text().split()
    assert lent == ["differ", "0", "commit", str(-errno.ESHUTDOWN), "again", str(-errno.EINVAL)]


@pytest.mark.parametrize("ring_size", [PAGE, 1 << 16])
async def test_messages_that_never_fit(ring_size):
    async with connect(ring_size=ring_size) as link:
        *errors, taken, size = await ask(link, Do.SIZES)
        assert errors == [-errno.EMSGSIZE] * 6
        assert (taken, size) == (0, ring_size)


@pytest.mark.parametrize("name", ["test", "test_quiet"])
async def test_the_module_is_told_when_there_is_room(name):
    """Once, and also one that has no ticks, which does not get any by it."""
    async with connect(name, ring_size=PAGE) as link:
        await link.send(numbers(100), type=Do.FILL)
        async with asyncio.timeout(PATIENCE):
            while link.rx_free >= HEADER + 104:
                await asyncio.sleep(0)
        for number in itertools.count():
            message = await next_message(link)
            assert message.id == number
            if message.type == ROOM:
                break
            assert message.type == FILLED
        assert number == PAGE // (HEADER + 104)
        found = await Status.of(link)
        assert found.writable_count == 1
        if name == "test_quiet":
            assert (found.work_count, found.timer_count) == (0, 0)


async def test_what_the_rings_hold():
    with RawDevice("test_quiet", ring_size=PAGE) as raw:
        raw.send(*[bytes(1000)] * 3)
        await until(lambda: raw.available == 3 * 1032)
        raw.frame(type=Do.STATUS)
        raw.frame(bytes(100))
        raw.send(bytes(100))
        await until(lambda: raw.available == 3 * 1032 + HEADER + 15 * 8 + 2 * 136)
        at = 3 * PAGE + 3 * 1032 + HEADER
        found = Status(tuple(raw.read64(at + 8 * n) for n in range(15)))
        assert (found.tx_avail, found.tx_free) == (3 * 1032, PAGE - 3 * 1032)
        # with or without the message that was just handed out
        assert found.rx_avail in (2 * 136, 2 * 136 + HEADER)
        assert found.rx_avail + found.rx_free == PAGE


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0)


# ---- receiving ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test", "test_quiet", "test_in_place"])
@pytest.mark.parametrize(
    ("how", "after_ns", "sleep_ms"),
    [
        pytest.param(AT_ONCE, 0, 0, id="in_the_callback"),
        pytest.param(HARD, 100_000, 0, id="hard_interrupt"),
        pytest.param(HARD, 10_000, 5, id="hard_interrupt_during_the_callback"),
        pytest.param(SOFT, 0, 0, id="softirq"),
        pytest.param(SOFT, 0, 30, id="softirq_during_the_callback"),
        pytest.param(PROCESS, 0, 0, id="thread"),
        pytest.param(PROCESS, 0, 20, id="thread_during_the_callback"),
    ],
)
async def test_a_message_is_handed_again(name, how, after_ns, sleep_ms):
    """Nothing is lost, doubled or overtaken."""
    times = 5
    async with connect(name) as link:
        for number in range(3):
            await link.send(b"before", type=Do.ECHO, id=2 * number)
            await link.send(
                numbers(times, how, after_ns, sleep_ms), type=Do.RETRY, id=2 * number + 1
            )
        await link.send(b"after", type=Do.ECHO, id=6)
        for number in range(7):
            message = await next_message(link)
            assert message.id == number
            if number % 2:
                assert struct.unpack("<Q", message.data) == (times,)


@pytest.mark.parametrize("name", NAMES)
async def test_user_leaves_while_an_echo_waits_for_room(name):
    """The channel ends though there will never be room."""
    async with connect(name, ring_size=PAGE) as link:
        for _ in range(6):
            await link.send(bytes(1000))
        async with asyncio.timeout(PATIENCE):
            while link.rx_free >= 1032:
                await asyncio.sleep(0)
    await all_gone()


# ---- the life of a channel ------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 20])
async def test_close_by_the_module(count):
    """What was sent before comes first; then it is an orderly end."""
    async with connect() as link:
        await link.send(numbers(count), type=Do.CLOSE)
        for number in range(count):
            message = await next_message(link)
            assert (message.type, message.id) == (CLOSING, number)
        with pytest.raises(PeerClosedError) as caught:
            await next_message(link)
        assert not isinstance(caught.value, ShutdownError)
        with pytest.raises(PeerClosedError):
            await link.send(b"")


@pytest.mark.parametrize(
    ("returned", "seen"),
    [
        (-errno.EACCES, errno.EACCES),
        (-errno.ENOSPC, errno.ENOSPC),
        (-errno.ENODATA, errno.ENODATA),
        (1, errno.EIO),
        (7, errno.EIO),
        (2**31 - 1, errno.EIO),
        (-4096, errno.EIO),
        (-(2**31), errno.EIO),
    ],
)
@pytest.mark.parametrize("name", ["test", "test_threads"])
async def test_open_refuses(name, returned, seen):
    with pytest.raises(TransportError, match=f"kernel://{name}: ") as caught:
        async with connect(name, hello=b"errno %d" % returned):
            pass
    assert caught.value.errno == seen
    await all_gone()


async def test_most_channels():
    async with connect("test_limited") as first:
        assert first.peer.hello == b"limited"
        assert first.ring_size == 8192
        async with connect("test_limited", ring_size=1 << 20) as second:
            assert second.ring_size == 16384
            for _ in range(3):
                with pytest.raises(BusyError, match="kernel://test_limited"):
                    async with connect("test_limited"):
                        pass
            await second.send(b"still there")
            assert (await next_message(second)).data == b"still there"
        for attempt in itertools.count():
            try:
                async with connect("test_limited") as third:
                    await third.send(b"x")
                    await next_message(third)
                break
            except BusyError:
                assert attempt < 10000


async def test_a_refused_open_takes_no_place():
    for _ in range(5):
        with pytest.raises(TransportError):
            async with connect("test_limited", hello=b"errno -13"):
                pass
    async with connect("test_limited"), connect("test_limited"):
        pass


async def test_a_thread_for_each_channel():
    async with connect("test_threads") as one, connect("test_threads") as other:
        assert counters()["runners"] == SHARED_RUNNERS + 2
        # both callbacks wait until both have begun
        met = await asyncio.gather(ask(one, Do.MEET), ask(other, Do.MEET))
        assert met == [(1,), (1,)]
        first, second = await Status.of(one), await Status.of(other)
        assert first.thread != second.thread
        assert first.overlaps == second.overlaps == 0


async def test_one_thread_for_all_channels():
    async with connect() as one, connect() as other:
        assert counters()["runners"] == SHARED_RUNNERS
        assert (await Status.of(one)).thread == (await Status.of(other)).thread


async def test_in_place():
    sizes = random.Random(1)
    async with connect("test_in_place", ring_size=1 << 14) as link:
        assert (await Status.of(link)).aligned
        for number in range(100):
            data = sizes.randbytes(sizes.randrange(link.max_message_size + 1))
            await link.send(data, id=number, user_value=2**64 - 1)
            message = await next_message(link)
            assert (message.id, message.user_value, message.data) == (number, 2**64 - 1, data)


async def test_a_channel_that_is_kept_beyond_its_end():
    async with connect("test_quiet") as link:
        await ask(link, Do.KEEP)
    gone = -errno.ESHUTDOWN
    result = await asyncio.to_thread((PARAMETERS / "kept").read_text)
    assert result == f"send {gone} unlocked {gone} reply {gone} reserve {gone} free 1\n"


# ---- the endpoint ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["test", "test_threads"])
async def test_unregister_from_a_callback(name):
    async with connect(name) as link:
        for _ in range(3):
            assert await ask(link, Do.UNREGISTER) == (-errno.EDEADLK,)
        await link.send(b"still there")
        assert (await next_message(link)).data == b"still there"


async def test_register_with_wrong_arguments():
    async with connect() as link:
        before = counters()
        found = await ask(link, Do.REGISTER)
        assert found[:11] == (-errno.EINVAL,) * 11  # names
        assert found[11:20] == (-errno.EINVAL,) * 9  # callbacks and options
        assert found[20:22] == (-errno.ENAMETOOLONG, -errno.EEXIST)
        assert found[22:] == (0,) * 5
        assert counters() == before


async def test_wait_open():
    def wait(name, milliseconds):
        (PARAMETERS / "wait_open").write_text(f"{name} {milliseconds}")

    for milliseconds in (0, 20):
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(wait, "kucomms_test_quiet", milliseconds)
    waiting = asyncio.ensure_future(asyncio.to_thread(wait, "kucomms_test_quiet", -1))
    await asyncio.sleep(0.05)  # that time passes is the subject
    assert not waiting.done()
    async with connect("test_quiet"):
        await asyncio.wait_for(waiting, PATIENCE)
        await asyncio.to_thread(wait, "kucomms_test_quiet", 0)
        await asyncio.to_thread(wait, "kucomms_test_quiet", -1)


# ---- ticks ----------------------------------------------------------------------


def most_within(times, window):
    """The most ticks of any such window."""
    end = 0
    most = 0
    for start, first in enumerate(times):
        while end < len(times) and times[end] < first + window:
            end += 1
        most = max(most, end - start)
    return most


async def test_ticks():
    """None too many; how many too few, the emulation decides."""
    async with connect() as link:
        (begin,) = await ask(link, Do.RESET)
        timer = ()
        while len(timer) < 5:
            await asyncio.sleep(0.5)  # time is the subject
            timer = await ask(link, Do.TIMER_TICKS)
        work = await ask(link, Do.WORK_TICKS)
        assert len(work) < 1024
        seconds = (timer[-1] - begin) / 1e9
        assert 4 < seconds < 15
        assert list(work) == sorted(work)
        assert list(timer) == sorted(timer)
        during = sum(tick <= timer[-1] for tick in work)
        assert 10 * seconds < during <= 100 * seconds + 2
        assert most_within(work, 100_000_000) <= 12
        assert most_within(timer, 2_000_000_000) <= 3


async def test_missed_ticks_are_left_out():
    async with connect() as link:
        await ask(link, Do.RESET)
        (awake,) = await ask(link, Do.SLEEP, 300)
        work = ()
        while not work or work[-1] < awake + 200_000_000:
            await asyncio.sleep(0.05)  # time is the subject
            work = await ask(link, Do.WORK_TICKS)
        assert not [tick for tick in work if awake - 290_000_000 < tick < awake]
        after = [tick for tick in work if tick >= awake]
        assert most_within(after, 100_000_000) <= 12
        assert sum(tick < awake + 15_000_000 for tick in after) <= 3
        assert (await Status.of(link)).overlaps == 0


async def test_callbacks_do_not_overlap():
    """Messages of two channels all the time, while both tick."""
    async with connect() as one, connect() as other:
        for turn in range(60):
            await asyncio.gather(ask(one, Do.SLEEP, turn % 4), ask(other, Do.SLEEP, turn % 3))
        for link in (one, other):
            status = await Status.of(link)
            assert status.overlaps == 0
            assert status.work_count > 5
