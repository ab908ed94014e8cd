# SPDX-License-Identifier: MIT
# ruff: noqa: ASYNC110
"""What holds for a link with turns whose peer sends every message of type 0 back.

Whatever that peer is: an endpoint in this process, in another, or in the kernel.
"""

import asyncio
import threading

import pytest

from kucomms import OutOfTurnError, Token, UsageError
from kucomms.testing import PATIENCE, numbered, verify

ROUNDS = 1000


async def until(condition):
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0)


async def receive(link):
    async with asyncio.timeout(PATIENCE):
        return await link.receive()


async def ping_pong(link):
    """The turn goes with what is sent and comes with what is received."""
    assert link.turns
    for number in range(ROUNDS):
        assert link.has_turn
        await link.send(numbered(number, number % 500))
        assert not link.has_turn
        verify(await receive(link), number)
    assert link.has_turn


async def borrowed_and_loaned(link):
    for number in range(ROUNDS):
        message = numbered(number, 100)
        with link.loan(100, id=number, user_value=message.user_value) as loan:
            loan.data[:] = message.data
            assert not link.has_turn
        assert not link.has_turn
        async with asyncio.timeout(PATIENCE), link.borrow() as answer:
            assert link.has_turn
            verify(answer, number)
    assert link.has_turn


def every_way(link):
    """To send; each gives what is to be awaited, or sends at once."""

    def loan():
        with link.loan(3) as loaned:
            loaned.data[:] = b"out"

    def in_a_thread(what):
        return asyncio.to_thread(link.send_threadsafe, what)

    return {
        "send": lambda: link.send(b"out"),
        "send_nowait": lambda: link.send_nowait(b"out"),
        "send_threadsafe": lambda: link.send_threadsafe(b"out"),
        "send_threadsafe elsewhere": lambda: in_a_thread(b"out"),
        "send_many": lambda: link.send_many([b"out"]),
        "send_many_nowait": lambda: link.send_many_nowait([b"out"]),
        "loan": loan,
        "request": lambda: link.request(b"out"),
        "reply": lambda: link.reply(numbered(1, 1), b"out"),
        "token": lambda: link.send(Token()),
        "token nowait": lambda: link.send_nowait(Token()),
        "token elsewhere": lambda: in_a_thread(Token()),
        "tokens": lambda: link.send_many([Token()]),
    }


async def made(way, *arguments):
    """Call it, and await what is to be awaited."""
    result = way(*arguments)
    return result if result is None or isinstance(result, int) else await result


async def nothing_can_be_sent(link):
    """And is not: neither now nor later."""
    before = link.statistics()
    for name, way in every_way(link).items():
        with pytest.raises(OutOfTurnError, match="turn") as raised:
            await made(way)
        assert link.url in str(raised.value), name
        assert "receive" in str(raised.value)
    after = link.statistics()
    assert after.messages_sent == before.messages_sent
    assert after.full_waits == before.full_waits
    assert issubclass(OutOfTurnError, UsageError)


async def out_of_turn(link):
    """Also when the answer has arrived long ago: it is the receiving that counts."""
    await link.send(b"one")
    await nothing_can_be_sent(link)
    await until(lambda: link.rx_avail)
    for _ in range(20):  # whatever the endpoint does with what has arrived
        await asyncio.sleep(0)
        assert not link.has_turn
    await nothing_can_be_sent(link)
    assert (await receive(link)).data == b"one"
    assert link.has_turn
    assert link.send_many_nowait([b"two"]) == 1
    assert (await receive(link)).data == b"two"


async def a_prefix_is_sent(link):
    for send_many in (link.send_many, link.send_many_nowait):
        before = link.statistics().messages_sent
        with pytest.raises(OutOfTurnError):
            await made(send_many, [b"first", b"second", b"third"])
        assert link.statistics().messages_sent == before + 1
        assert (await receive(link)).data == b"first"
        assert link.has_turn


async def tokens(link):
    """There and back, with a header or without; a token is no empty message."""
    await link.send(Token())
    assert not link.has_turn
    answer = await receive(link)
    assert (type(answer), answer) == (Token, Token())
    assert len(answer) == 0
    link.send_nowait(Token(id=7), user_value=8)
    assert await receive(link) == Token(id=7, user_value=8)
    assert await link.send_many([Token(id=1)]) == 1
    async with asyncio.timeout(PATIENCE), link.borrow() as borrowed:
        assert isinstance(borrowed, Token)
        assert (len(borrowed), borrowed.id) == (0, 1)
    await asyncio.to_thread(link.send_threadsafe, Token())
    assert isinstance(await receive(link), Token)
    await link.send(b"")
    assert not isinstance(await receive(link), Token)
    assert link.has_turn


async def what_is_no_token(link):
    for what in (Token(b"data"), Token(memoryview(b"data"))):
        with pytest.raises(UsageError, match="no data"):
            await link.send(what)
        with pytest.raises(UsageError, match="no data"):
            await link.send_many([what])
    with pytest.raises(UsageError, match="no reply"):
        await link.reply(numbered(1, 1), Token())
    assert link.has_turn
    await link.send(b"still works")
    assert (await receive(link)).data == b"still works"


async def a_loan_that_is_dropped_keeps_the_turn(link):

    def drop():
        with link.loan(8):
            assert not link.has_turn
            with pytest.raises(OutOfTurnError):
                link.loan(8).__enter__()
            with pytest.raises(OutOfTurnError):
                link.send_nowait(b"beside it")
            raise ZeroDivisionError

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            drop()
        assert link.has_turn
    with pytest.raises(BufferError), link.loan(8) as loan:
        survivor = loan.data[2:]
    assert link.has_turn
    survivor.release()
    await link.send(b"after them")
    assert (await receive(link)).data == b"after them"


async def threads(link):
    """Of many that send at once, one has the turn."""
    count = 4
    for number in range(50):
        barrier = threading.Barrier(count)

        def send(who, number=number, barrier=barrier):
            barrier.wait()
            try:
                link.send_threadsafe(b"", id=number, user_value=who)
            except OutOfTurnError:
                return None
            return who

        sent = await asyncio.gather(*(asyncio.to_thread(send, who) for who in range(count)))
        (winner,) = [who for who in sent if who is not None]
        assert not link.has_turn
        answer = await receive(link)
        assert (answer.id, answer.user_value) == (number, winner)
    assert link.has_turn


async def received_in_a_thread(link):
    def play():
        for number in range(50):
            link.send_threadsafe(numbered(number, 10))
            assert not link.has_turn
            verify(link.receive_threadsafe(PATIENCE), number)
            assert link.has_turn

    await asyncio.to_thread(play)


async def a_message_beside_a_request(link):
    """It is for the task that receives, which sleeps while the request looks for its reply."""
    for number in range(1, 51):
        receiving = asyncio.ensure_future(receive(link))
        await asyncio.sleep(0)
        request = asyncio.ensure_future(link.request(b"", id=number, timeout=PATIENCE))
        assert (await receiving).id == number
        assert link.has_turn
        assert not request.done()
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)


async def requests(link, type):
    """The reply brings the turn."""
    for _ in range(20):
        assert link.has_turn
        await link.request(b"", type=type, timeout=PATIENCE)
    assert link.has_turn
    await link.send(b"and then")
    assert (await receive(link)).data == b"and then"


CHECKS = [
    ping_pong,
    borrowed_and_loaned,
    out_of_turn,
    a_prefix_is_sent,
    tokens,
    what_is_no_token,
    a_loan_that_is_dropped_keeps_the_turn,
    threads,
    received_in_a_thread,
    a_message_beside_a_request,
]
