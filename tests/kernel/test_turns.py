# SPDX-License-Identifier: MIT
"""Channels with turns: ``module/kucomms_kup.c`` is the other half.

What holds for every peer is in ``tests/transports/turns.py``.
"""

import errno
import os
import random
import select
from enum import IntEnum

import pytest

import kucomms
from kucomms import OutOfTurnError, PeerClosedError, ShutdownError, Token, UsageError
from tests.kernel.raw_device import (
    PATIENCE,
    REPLY,
    TOKEN,
    TURNS_FEATURE,
    RawDevice,
    channel_counters,
    open_device,
    set_up,
)
from tests.kernel.test_kup import (
    COUNTS,
    GAMES,
    IN_PLACE,
    THREADS,
    ask,
    awaiting,
    client,
    connect,
    module,
    nothing_is_left,
    numbers,
    until,
)
from tests.kernel.test_kup import Do as Kup
from tests.transports import turns

__all__ = ["client", "module", "nothing_is_left"]  # fixtures

pytestmark = pytest.mark.asyncio

FEATURES = 3
"""All that the module knows."""
TURNS = 8
"""The flag of an endpoint's options."""
PERM = -errno.EPERM
KINDS = {"shared": 0, "in_place": IN_PLACE, "threads": THREADS}


class Do(IntEnum):
    """More types of messages that the module knows."""

    TURNS = 9
    OTHERS = 10
    PASS = 11
    AGAIN = 12
    RACE = 13
    RACED = 14
    KEEP = 15


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kup(module, request):
    module.load(channels=0, flags=TURNS | request.param)
    return module


@pytest.fixture
def simple(module):
    module.load(channels=0, flags=TURNS)
    return module


# ---- the user's side ------------------------------------------------------------------


@pytest.mark.parametrize("check", turns.CHECKS, ids=lambda check: check.__name__)
async def test_check(kup, check):
    async with connect() as link:
        assert link.turns
        assert link.has_turn
        await check(link)


async def test_requests(kup):
    async with connect() as link:
        await turns.requests(link, Kup.STATUS)


async def test_a_handler_plays(simple):
    """The kernel sends back what it gets; the handler counts on."""
    async with kucomms.Endpoint("plays") as endpoint:
        seen = []

        @endpoint.on_message
        async def count(message, link):
            seen.append((message.id, link.has_turn))
            if message.id < turns.ROUNDS:
                await link.send(b"", id=message.id + 1)
                with pytest.raises(OutOfTurnError):
                    link.send_nowait(b"")

        link = await endpoint.connect("kernel://kup", timeout=PATIENCE)
        await link.send(b"", id=1)
        await until(lambda: len(seen) == turns.ROUNDS)
        assert seen == [(number, True) for number in range(1, turns.ROUNDS + 1)]


async def test_a_link_without_turns(module):
    """Of the same module; a token is refused, here and there."""
    module.load(channels=0)
    async with connect() as link:
        assert not link.turns
        assert await link.send_many([b"one", b"two"]) == 2
        assert link.has_turn
        with pytest.raises(UsageError, match="turns"):
            await link.send(Token())
        assert [(await awaiting(link)).data for _ in range(2)] == [b"one", b"two"]
        await link.send(b"", type=Do.PASS)
        assert (await ask(link, Kup.STATUS))[2] == 1  # the module's token was one thing wrong


async def test_a_c_program(kup, client):
    assert await client("turns", "kernel://kup") == (0, "")


# ---- the kernel's side ----------------------------------------------------------------


async def test_every_way_to_send(kup):
    async with connect() as link:
        for _ in range(3):
            # a token with data, one as a reply; a loan, another beside it, and it was dropped;
            # one that was begun and forgotten
            wrong = -errno.EINVAL
            assert await ask(link, Do.TURNS) == (1, wrong, wrong, 0, 0, PERM, 1, 0, 1)
            assert await ask(link, Do.OTHERS) == (0, *[PERM] * 6, 0)
        statistics = link.statistics()
        assert statistics.messages_received == statistics.messages_sent


async def test_the_kernel_passes_the_turn(kup):
    async with connect() as link:
        await link.send(b"", type=Do.PASS)
        assert await awaiting(link) == Token()
        assert link.has_turn


async def test_a_message_that_is_retried_brings_the_turn_once(kup):
    async with connect() as link:
        for _ in range(3):
            assert await ask(link, Do.AGAIN) == (1, 1)
            # answered when it was handed out first
            assert await ask(link, Do.AGAIN, 1) == (-1, 1)
            assert await ask(link, Do.OTHERS) == (0, *[PERM] * 6, 0)


async def test_of_senders_in_every_context_one_has_the_turn(kup):
    chance = random.Random(5)
    async with connect() as link:
        for _ in range(200):
            await link.send(
                numbers(chance.randrange(20_000), chance.randrange(10_000)), type=Do.RACE
            )
            assert (await awaiting(link)).type == Do.RACE
            assert await ask(link, Do.RACED) == (1, 2)


@pytest.mark.parametrize("game", ["kernel_echoed_twice", "kernel_counts"])
async def test_the_kernel_begins(module, game):
    """The user begins, so he passes the turn first."""
    begin, hops, play = GAMES[game]
    module.load(channels=0, begin=begin, hops=hops, flags=TURNS)
    async with connect() as link:
        await link.send(Token())
        await play(link, awaiting)
        if begin == COUNTS:
            assert await awaiting(link) == Token()
        assert (await ask(link, Kup.STATUS))[2] == 0


async def test_the_user_begins(simple):
    _begin, _hops, play = GAMES["user_counts"]
    async with connect() as link:
        await play(link, awaiting)
        assert (await ask(link, Kup.STATUS))[2] == 0


async def test_the_end_with_the_turn_here_and_there(module):
    module.load(channels=0, flags=TURNS)
    for what in (None, Do.KEEP):
        async with connect() as link:
            if what is not None:
                await link.send(b"", type=what)
    link = await connect()
    other = await connect()
    await other.send(b"", type=Do.KEEP)
    await until(lambda: not other.tx_avail)
    module.unload()
    for each in (link, other):
        with pytest.raises(ShutdownError):
            await awaiting(each)
        with pytest.raises(ShutdownError):
            await each.send(b"x")
    module.load(channels=0, flags=TURNS)
    async with connect() as link:
        await turns.tokens(link)


async def test_the_kernel_closes(simple):
    async with connect() as link:
        await link.send(b"", type=Kup.END_WITH)
        with pytest.raises(PeerClosedError):
            await awaiting(link)


# ---- users that break the rules -------------------------------------------------------


BAD = {
    "twice": [{"type": Do.KEEP}, {"type": Do.KEEP}],
    "token_with_data": [{"data": b"x" * 8, "flags": TOKEN}],
    "token_as_a_reply": [{"flags": TOKEN | REPLY}],
}


@pytest.mark.parametrize("frames", BAD.values(), ids=BAD)
async def test_bad_users(kup, frames):
    with RawDevice("kup", features=TURNS_FEATURE) as device:
        assert device.setup.features == TURNS_FEATURE
        for frame in frames:
            device.frame(**frame)
        device.publish()
        device.kick()
        assert device.poll() & select.POLLERR
    async with connect() as link:
        await turns.tokens(link)


async def test_an_answer_that_nobody_has_sent_for(simple):
    """The kernel has the turn, and the user sends all the same, later."""
    with RawDevice("kup", features=TURNS_FEATURE) as device:
        device.send(b"", type=Do.KEEP)
        await until(lambda: device.released == device.position)
        assert channel_counters("kup")["has_turn"] == 1
        device.frame(type=Do.KEEP)
        device.publish()
        device.kick()
        assert device.poll() & select.POLLERR


async def test_a_token_where_there_are_no_turns(module):
    module.load(channels=0)
    with RawDevice("kup", features=TURNS_FEATURE) as device:
        assert device.setup.features == 0
        device.frame(flags=TOKEN)
        device.publish()
        device.kick()
        assert device.poll() & select.POLLERR


async def test_a_user_that_knows_no_turns(simple):
    """He is told what he would have to know, and can try again."""
    fd = open_device("kup")
    number, told = set_up(fd, features=0)
    assert (number, told.version, told.features) == (errno.EPROTONOSUPPORT, 1, FEATURES)
    assert told.side_size == 0
    number, told = set_up(fd, features=TURNS_FEATURE)
    assert (number, told.features) == (0, TURNS_FEATURE)
    os.close(fd)
