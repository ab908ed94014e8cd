# SPDX-License-Identifier: MIT
"""Links with turns: ping-pong by rule. What holds for every peer is in turns.py."""

import asyncio
import itertools
import os
import signal
import sys
from contextlib import asynccontextmanager

import pytest
import structlog

import kucomms
from kucomms import (
    Endpoint,
    Message,
    OutOfTurnError,
    PeerClosedError,
    ProtocolError,
    Token,
    UsageError,
    VersionError,
)
from kucomms.testing import PATIENCE, REPLY
from kucomms.transports import shm
from tests.transports import raw_peer, turns
from tests.transports.harnesses import HARNESSES
from tests.transports.turns import receive, until

pytestmark = pytest.mark.asyncio

_numbers = itertools.count()
FEATURE = 1
TOKEN = 8


def new_name():
    return f"turns_{os.getpid()}_{next(_numbers)}"


@pytest.fixture(params=["inproc", "shm"])
def url(request):
    return f"{request.param}://{new_name()}"


@asynccontextmanager
async def listening(url, *, with_turns=True, **options):
    """An endpoint that listens, and a queue of its links."""
    links = asyncio.Queue()
    async with Endpoint("listens", on_link_open=links.put_nowait, **options) as endpoint:
        await endpoint.listen(url, turns=with_turns)
        yield endpoint, links


@asynccontextmanager
async def pair(url, *, with_turns=True):
    """Both ends of a link, both awaited: who has connected, and who has listened."""
    async with (
        listening(url, with_turns=with_turns) as (_endpoint, links),
        kucomms.connect(url, timeout=PATIENCE) as link,
    ):
        yield link, await links.get()


# ---- whatever the peer is ------------------------------------------------------------


@pytest.mark.parametrize("check", turns.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("handler", [{}, {"handler": True}, {"handler": True, "borrow": True}])
@pytest.mark.parametrize("transport", HARNESSES)
async def test_check(transport, handler, check):
    async with HARNESSES[transport]().link(turns=True, **handler) as link:
        await check(link)


@pytest.mark.parametrize("transport", HARNESSES)
async def test_requests(transport):
    async with HARNESSES[transport]().link(turns=True) as link:
        await turns.requests(link, REPLY)


# ---- both ends ------------------------------------------------------------------------


async def test_who_connects_begins(url):
    async with pair(url) as (user, owner):
        assert user.turns
        assert owner.turns
        assert user.has_turn
        assert not owner.has_turn
        await turns.nothing_can_be_sent(owner)
        await user.send(Token())  # whoever wants the other one to begin
        assert isinstance(await receive(owner), Token)
        assert owner.has_turn
        assert not user.has_turn


async def test_counting_both_ways(url):
    async with pair(url) as (user, owner):
        for number in range(0, 2 * turns.ROUNDS, 2):
            await user.send(b"", id=number)
            assert (await receive(owner)).id == number
            await owner.send(b"", id=number + 1)
            assert (await receive(user)).id == number + 1
            assert user.has_turn != owner.has_turn


async def test_without_turns(url):
    """Nothing of it."""
    async with pair(url, with_turns=False) as (user, owner):
        assert not user.turns
        assert user.has_turn
        assert owner.has_turn
        assert await user.send_many([b"one", b"two"]) == 2
        assert user.has_turn
        before = user.statistics().messages_sent
        for send in (user.send, user.send_many_nowait, user.send_nowait, user.send_threadsafe):
            with pytest.raises(UsageError, match=r"listen\(\.\.\., turns=True\)"):
                await send([Token()] if send == user.send_many_nowait else Token())
        assert user.statistics().messages_sent == before
        assert [(await receive(owner)).data for _ in range(2)] == [b"one", b"two"]


async def test_handlers_play(url):
    """Each side counts on in its handler; sending twice there is out of turn."""
    done = asyncio.get_running_loop().create_future()
    refused = []

    async def count(message, link):
        assert link.has_turn
        if message.id == 2 * turns.ROUNDS:
            done.set_result(None)
            return
        await link.send(b"", id=message.id + 1)
        assert not link.has_turn
        try:
            link.send_nowait(b"", id=0)
        except OutOfTurnError:
            refused.append(message.id)

    def failed(error, _name):
        if not done.done():
            done.set_exception(error)

    async with (
        listening(url, on_message=count, on_error=failed),
        Endpoint("plays", on_message=count, on_error=failed) as other,
    ):
        link = await other.connect(url, timeout=PATIENCE)
        await link.send(b"", id=1)
        async with asyncio.timeout(PATIENCE):
            await done
        assert refused == list(range(1, 2 * turns.ROUNDS))


@pytest.mark.parametrize("borrow", [False, True])
async def test_the_turn_waits_for_the_handler(url, borrow):
    """While a handler awaits something, what arrives stays: nobody has received it."""
    events = []
    go_on = asyncio.Event()
    begun = asyncio.Event()

    async with Endpoint("plays") as endpoint:

        @endpoint.on_message(borrow=borrow)
        async def handle(message, link):
            events.append((message.id, link.has_turn))
            if message.id == 1:
                await link.send(b"", id=2)
                begun.set()
                await go_on.wait()
                events.append(("waited", link.has_turn))

        async with listening(url) as (_owner, links):
            link = await endpoint.connect(url, timeout=PATIENCE)
            owner = await links.get()
            await link.send(Token(id=9))
            assert (await receive(owner)).id == 9
            await owner.send(b"", id=1)
            await begun.wait()
            assert (await receive(owner)).id == 2
            await owner.send(b"", id=3)
            await until(lambda: link.rx_avail)
            for _ in range(50):
                await asyncio.sleep(0)
                assert not link.has_turn
            assert link.statistics().backlog_high_water == 0
            go_on.set()
            await until(lambda: len(events) == 3)
        assert events == [(1, True), ("waited", False), (3, True)]


async def test_the_turn_waits_for_a_handler_of_another_link(url):
    """Which may take all its time; then it comes."""
    go_on, begun = asyncio.Event(), asyncio.Event()
    received = []

    async with Endpoint("plays") as endpoint:

        @endpoint.on_message
        async def handle(message, link):
            received.append((message.id, link.has_turn))
            if message.id == 1:
                begun.set()
                await go_on.wait()

        async with listening(url) as (_owner, links):
            first = await endpoint.connect(url, timeout=PATIENCE)
            other_first = await links.get()
            second = await endpoint.connect(url, timeout=PATIENCE)
            other_second = await links.get()
            for link, other in ((first, other_first), (second, other_second)):
                await link.send(Token())
                await receive(other)
            await other_first.send(b"", id=1)
            await begun.wait()
            await other_second.send(b"", id=2)
            await until(lambda: second.rx_avail)
            for _ in range(50):
                await asyncio.sleep(0)
                assert not second.has_turn
                assert first.has_turn
            go_on.set()
            await until(lambda: len(received) == 2)
            assert received == [(1, True), (2, True)]


async def test_a_message_left_where_it_is_fills_no_backlog(url):
    """A handler that waits for a reply goes on waiting, whatever other links have to say."""
    results = asyncio.Queue()

    async with Endpoint("plays", on_error=lambda error, _: results.put_nowait(error)) as endpoint:

        @endpoint.on_message
        async def handle(message, link):
            if message.id == 1:
                results.put_nowait(await link.request(b"", id=5, timeout=PATIENCE))
            else:
                results.put_nowait(message)

        async with listening(url) as (_owner, links):
            first = await endpoint.connect(url, timeout=PATIENCE)
            other_first = await links.get()
            second = await endpoint.connect(url, timeout=PATIENCE)
            other_second = await links.get()
            for link, other in ((first, other_first), (second, other_second)):
                await link.send(Token())
                await receive(other)
            await other_first.send(b"", id=1)
            asked = await receive(other_first)
            await other_second.send(b"", id=2)
            await until(lambda: second.rx_avail)
            for _ in range(50):
                await asyncio.sleep(0)
            await other_first.reply(asked, b"at last")
            async with asyncio.timeout(PATIENCE):
                assert await results.get() == Message(b"at last", id=5)
                assert await results.get() == Message(b"", id=2)


async def test_requests_in_handlers(url):
    """The handler's request takes the turn, the reply brings it back, its answer ends it."""

    async def ask_back(message, link):
        if message.type == 1:
            reply = await link.request(b"who?", type=2, timeout=PATIENCE)
            assert link.has_turn
            await link.reply(message, b"you are " + reply.data)

    async def tell(message, link):
        if message.type == 2:
            await link.reply(message, b"me")

    async with (
        listening(url, on_message=ask_back),
        Endpoint("asks", on_message=tell) as endpoint,
    ):
        link = await endpoint.connect(url, timeout=PATIENCE)
        for _ in range(20):
            reply = await link.request(b"", type=1, timeout=PATIENCE)
            assert reply.data == b"you are me"
            assert link.has_turn


async def test_one_request_at_a_time(url):
    async with pair(url) as (user, owner):
        request = asyncio.ensure_future(user.request(b"", timeout=PATIENCE))
        asked = await receive(owner)
        with pytest.raises(OutOfTurnError):
            await user.request(b"")
        await owner.reply(asked, b"here")
        async with asyncio.timeout(PATIENCE):
            assert (await request).data == b"here"
        assert user.has_turn


@pytest.mark.parametrize("wake", ["receiver", "receiver later"])
async def test_a_message_instead_of_the_reply(url, wake):
    """It is left for who receives, and the request goes on waiting."""
    async with pair(url) as (user, owner):
        waiting = None
        if wake == "receiver":
            waiting = asyncio.ensure_future(user.receive())
            await asyncio.sleep(0)
        request = asyncio.ensure_future(user.request(b"", timeout=PATIENCE))
        asked = await receive(owner)
        await owner.send(b"first this", id=asked.id)
        if waiting is None:
            await until(lambda: user.rx_avail)
            for _ in range(50):
                await asyncio.sleep(0)
                assert not user.has_turn
            waiting = asyncio.ensure_future(user.receive())
        async with asyncio.timeout(PATIENCE):
            assert (await waiting).data == b"first this"
        assert user.has_turn
        assert not request.done()
        await user.send(Token())
        await receive(owner)
        await owner.reply(asked, b"then that")
        async with asyncio.timeout(PATIENCE):
            assert (await request).data == b"then that"
        assert user.has_turn


@pytest.mark.parametrize("borrow", [False, True])
async def test_a_late_reply_brings_the_turn(url, borrow):
    """Nobody waits for it any more; dropped, it would take the turn with it."""
    async with pair(url) as (user, owner):
        with pytest.raises(TimeoutError):
            await user.request(b"", timeout=0)
        asked = await receive(owner)
        await owner.reply(asked, b"late")
        await until(lambda: user.rx_avail)
        assert not user.has_turn
        if borrow:
            async with user.borrow() as message:
                assert bytes(message.data) == b"late"
        else:
            message = await receive(user)
            assert message == Message(b"late", id=asked.id)
        assert user.has_turn
        assert user.statistics().late_replies == 0


async def test_a_late_reply_at_the_moment_of_the_timeout(url):
    """Given up when the reply is taken out of the ring, in the same turn of the loop."""
    async with pair(url) as (user, owner):
        request = asyncio.ensure_future(user.request(b""))
        asked = await receive(owner)
        request.cancel()  # the future is cancelled with it, the task has not heard of it yet
        await owner.reply(asked, b"late")
        user._look()
        assert not user.has_turn
        with pytest.raises(OutOfTurnError):
            user.send_nowait(b"")
        with pytest.raises(OutOfTurnError):
            await asyncio.to_thread(user.send_threadsafe, b"")
        assert (await receive(user)).data == b"late"
        with pytest.raises(asyncio.CancelledError):
            await request
        assert user.has_turn


async def test_broadcast_leaves_out_who_has_the_turn(url):
    async with listening(url) as (endpoint, links), Endpoint("connects") as other:
        ours = [await other.connect(url, timeout=PATIENCE) for _ in range(3)]
        theirs = [await links.get() for _ in range(3)]
        assert other.broadcast(b"all") == 3
        assert other.broadcast(b"none") == 0
        assert endpoint.broadcast(b"none") == 0
        await receive(theirs[1])
        assert endpoint.broadcast(b"one") == 1
        assert [(await receive(link)).data for link in ours if link.rx_avail] == [b"one"]


async def test_waiting_for_room_keeps_the_turn(url):
    async with (
        listening(url) as (_endpoint, links),
        kucomms.connect(url, timeout=PATIENCE, ring_size=4096) as user,
    ):
        owner = await links.get()
        await user.send(bytes(4000))
        async with owner.borrow():  # so there is no room
            await owner.send(Token())
            await receive(user)
            with pytest.raises(kucomms.QueueFull):
                user.send_nowait(bytes(100))
            assert user.has_turn
            waiting = [asyncio.ensure_future(user.send(bytes(100))) for _ in range(3)]
            await asyncio.sleep(0)
            assert user.has_turn
        async with asyncio.timeout(PATIENCE):
            results = await asyncio.gather(*waiting, return_exceptions=True)
        assert results[0] is None
        assert [type(result) for result in results[1:]] == [OutOfTurnError] * 2
        assert len(await receive(owner)) == 100


async def test_a_link_keeps_its_attributes_apart_from_others(url):
    """See Link.__init__."""
    async with pair(url) as (user, _owner):
        assert len(vars(user)) <= 29


# ---- the end of it --------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["ours", "theirs", "on its way"])
async def test_closing(url, whose):
    async with pair(url) as (user, owner):
        if whose != "ours":
            await user.send(b"last words")
        if whose == "theirs":
            assert (await receive(owner)).data == b"last words"
        await user.aclose()
        if whose == "on its way":
            await until(lambda: owner._peer_gone)
            assert not owner.has_turn
            assert (await receive(owner)).data == b"last words"
        with pytest.raises(PeerClosedError):
            await receive(owner)
        with pytest.raises(PeerClosedError):
            await owner.send(b"x")
        with pytest.raises(PeerClosedError):
            await owner.send(Token())


@pytest.mark.parametrize("whose", ["ours", "theirs"])
async def test_death_and_a_new_link(whose):
    """The turn dies with the link; the next one begins as each does."""
    url = f"shm://{new_name()}"
    program = (
        "import asyncio, sys, kucomms\n"
        "async def main():\n"
        "    async with kucomms.connect(sys.argv[1], timeout=60) as link:\n"
        "        await link.send(b'mine')\n"
        "        print(await link.receive() if sys.argv[2] == 'theirs' else 'sent', flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    async with listening(url) as (_endpoint, links):
        for _ in range(2):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", program, url, whose, stdout=asyncio.subprocess.PIPE
            )
            owner = await links.get()
            assert not owner.has_turn
            assert (await receive(owner)).data == b"mine"
            if whose == "theirs":
                await owner.send(b"yours")
            assert await process.stdout.readline()
            assert owner.has_turn == (whose == "ours")
            process.send_signal(signal.SIGKILL)
            await process.wait()
            with pytest.raises(PeerClosedError):
                await receive(owner)
            with pytest.raises(PeerClosedError):
                await owner.send(b"x")


# ---- peers that break the rules -------------------------------------------------------


@asynccontextmanager
async def raw_user(*, with_turns=True):
    """A peer by hand that has connected, and our end."""
    name = new_name()
    async with listening(f"shm://{name}", with_turns=with_turns) as (_endpoint, links):
        features = raw_peer.TURNS if with_turns else 0
        peer = await asyncio.to_thread(raw_peer.connect_by_hand, name, features=features)
        try:
            yield peer, await links.get()
        finally:
            peer.close()


async def test_a_peer_that_sends_twice():
    """The first is received, the second is none."""
    async with raw_user() as (peer, owner):
        peer.send(b"one", b"two")
        assert (await receive(owner)).data == b"one"
        with pytest.raises(ProtocolError):
            await receive(owner)
        with pytest.raises(ProtocolError):
            await owner.send(b"x")
        assert owner.statistics().protocol_errors == 1


async def test_a_peer_that_does_not_wait_for_our_answer():
    async with raw_user() as (peer, owner):
        peer.send(b"one")
        assert (await receive(owner)).data == b"one"
        peer.send(b"two")
        with pytest.raises(ProtocolError):
            await receive(owner)


async def test_a_listener_that_begins():
    name = new_name()
    with raw_peer.RawListener(name) as fake:
        by_hand = asyncio.to_thread(fake.accept_by_hand, features=raw_peer.TURNS)
        accepting = asyncio.create_task(by_hand)
        async with kucomms.connect(f"shm://{name}", timeout=PATIENCE) as link:
            peer = await accepting
            assert link.turns
            peer.send(b"too early")
            with pytest.raises(ProtocolError):
                await receive(link)
            peer.close()


TOKENS = {
    "with_data": {"data": b"x", "flags": TOKEN},
    "as_a_reply": {"flags": TOKEN | raw_peer.REPLY},
    "too_long": {"flags": TOKEN, "length": 2**31},
}


@pytest.mark.parametrize("frame", TOKENS.values(), ids=TOKENS)
async def test_bad_tokens(frame):
    async with raw_user() as (peer, owner):
        peer.frame(**frame)
        peer.publish()
        peer.ring()
        with pytest.raises(ProtocolError):
            await receive(owner)


async def test_a_good_token_by_hand():
    async with raw_user() as (peer, owner):
        peer.frame(flags=TOKEN, id=5)
        peer.publish()
        peer.ring()
        assert await receive(owner) == Token(id=5)
        assert owner.has_turn


async def test_a_token_where_there_are_no_turns():
    async with raw_user(with_turns=False) as (peer, owner):
        peer.frame(flags=TOKEN)
        peer.publish()
        peer.ring()
        with pytest.raises(ProtocolError):
            await receive(owner)


async def test_a_peer_that_knows_no_turns():
    """It is told at once, and the log here says why."""
    name = new_name()

    def connect():
        with raw_peer.connect(name) as sock:
            raw_peer.send(sock, raw_peer.record(raw_peer.HELLO))
            answer, fds = raw_peer.receive(sock)
            assert raw_peer.is_closed(sock)
            return answer.status, answer.features & FEATURE, fds

    with structlog.testing.capture_logs() as logs:
        async with listening(f"shm://{name}") as (endpoint, _links):
            refused = (raw_peer.REFUSED_VERSION, FEATURE, [])
            assert await asyncio.to_thread(connect) == refused
            assert endpoint.links == ()
    (line,) = [entry for entry in logs if entry["event"] == "peer_refused"]
    assert "turns" in line["error"]


async def test_we_know_no_turns(monkeypatch):
    """As an older version of us would be told."""
    record = shm._record

    def without(step, **fields):
        return record(step, **(fields | {"features": 0} if step == raw_peer.HELLO else fields))

    url = f"shm://{new_name()}"
    async with listening(url):
        monkeypatch.setattr(shm, "_record", without)
        with pytest.raises(VersionError, match="features that this side does not know"):
            await kucomms.connect(url, timeout=PATIENCE)


async def test_turns_that_were_not_agreed_on():
    """The memory says otherwise than the rendezvous."""
    name = new_name()
    async with listening(f"shm://{name}") as (endpoint, _links):

        def connect():
            peer = raw_peer.connect_by_hand(name, features=raw_peer.TURNS, shown=0)
            try:
                return raw_peer.is_closed(peer.sock)
            finally:
                peer.close()

        assert await asyncio.to_thread(connect)
        assert endpoint.links == ()


# ---- and buffers ----------------------------------------------------------------------


async def test_a_message_with_buffers_passes_the_turn(url):
    """What is given back does not need it, and does not bring it."""

    async def hand_over():
        async with asyncio.timeout(PATIENCE):
            buffer = await pool.allocate_when_room(100)
        buffer.data[:5] = b"hello"
        await user.send(b"", buffers=buffer)
        assert not user.has_turn
        (theirs,) = (await receive(owner)).buffers
        assert owner.has_turn
        assert bytes(theirs.data[:5]) == b"hello"
        return theirs

    async with pair(url) as (user, owner), user.open_pool(100) as pool:
        (await hand_over()).free()
        async with asyncio.timeout(PATIENCE):
            (await pool.allocate_when_room(100)).free()
        assert owner.has_turn
        assert not user.has_turn
        await owner.send(Token())
        await receive(user)
        theirs = await hand_over()
        await owner.send(b"")
        theirs.free()  # out of turn
        async with asyncio.timeout(PATIENCE):
            (await pool.allocate_when_room(100)).free()
        await turns.nothing_can_be_sent(user)
        assert not user.has_turn
        await receive(user)
        assert user.has_turn
        assert not owner.has_turn


@pytest.mark.parametrize("how", ["at once", "task", "meanwhile", "handler"])
async def test_room_behind_a_message_that_nobody_has_received(url, how):
    """It is looked past; the turn comes when it is received."""
    got = asyncio.get_running_loop().create_future()

    async def handle(message, link):
        if message.data == b"answer":
            got.set_result(link.has_turn)
            return
        pool = await link.open_pool(100)
        await link.send(b"", buffers=pool.allocate(100))
        async with asyncio.timeout(5):
            (await pool.allocate_when_room(100)).free()
        with pytest.raises(OutOfTurnError):
            link.send_nowait(b"")

    async def answer(link):
        message = await receive(link)
        if how == "meanwhile":
            for _ in range(50):
                await asyncio.sleep(0)
        await link.send(b"answer")
        message.buffers[0].free()

    if how == "handler":
        async with Endpoint("handles", on_message=handle) as endpoint:
            endpoint.on_error(lambda error, _: got.set_exception(error))
            async with listening(url) as (_owner, links):
                link = await endpoint.connect(url, timeout=PATIENCE)
                owner = await links.get()
                await link.send(b"")
                await receive(owner)
                await owner.send(b"go")
                await answer(owner)
                assert await got
        return
    async with pair(url) as (user, owner), user.open_pool(100) as pool:
        await user.send(b"", buffers=pool.allocate(100))
        answering = asyncio.ensure_future(answer(owner))
        if how != "meanwhile":
            await answering
        async with asyncio.timeout(5):
            (pool.allocate(100) if how == "at once" else await pool.allocate_when_room(100)).free()
        await turns.nothing_can_be_sent(user)
        assert (await receive(user)).data == b"answer"
        await user.send(b"next")
        assert (await receive(owner)).data == b"next"
        await answering


async def test_a_loan_has_the_turn(url):
    async with pair(url) as (user, _owner):
        with user.loan(1), pytest.raises(OutOfTurnError, match="finish the loan first"):
            user.send_nowait(b"")


async def test_buffers_out_of_turn_stay_here(url):
    async with pair(url) as (user, owner), user.open_pool(1 << 16) as pool:
        await user.send(b"")
        buffer = pool.allocate(100)
        with pytest.raises(OutOfTurnError):
            await user.send(b"", buffers=buffer)
        with pytest.raises(OutOfTurnError):
            user.send_nowait(b"", buffers=[buffer])
        buffer.data[:5] = b"still"
        with pytest.raises(UsageError):  # a token has none, whoever's turn it is
            await user.send(Token(), buffers=buffer)
        await receive(owner)
        await owner.send(b"")
        await receive(user)
        with pytest.raises(UsageError):
            await user.send(Token(), buffers=buffer)
        assert user.has_turn
        await user.send(b"", buffers=buffer)
        (theirs,) = (await receive(owner)).buffers
        with theirs:
            assert bytes(theirs.data[:5]) == b"still"


async def test_a_reply_with_buffers_that_comes_too_late_brings_the_turn(url):
    async with pair(url) as (user, owner), owner.open_pool(1 << 16) as pool:
        with pytest.raises(TimeoutError):
            await user.request(b"", timeout=0.01)
        asked = await receive(owner)
        await owner.reply(asked, b"late", buffers=pool.allocate(100))
        assert not user.has_turn
        message = await receive(user)
        assert (message.data, len(message.buffers)) == (b"late", 1)
        assert user.has_turn
        message.buffers[0].free()
