# SPDX-License-Identifier: MIT
# ruff: noqa: ASYNC110
"""The Python ends of the soak's lines: the peers, which come and go, and the hub, which stays.

Every session is a link of its own. Both ends send numbered messages, in bursts and in one of
four ways, and check what comes, in one of four ways. When the session is over, the end that was
left behind judges: all that the other had sent for certain must have come, in order and without
a gap, and then the error that tells how the other end went.
"""

import asyncio
import contextlib
import multiprocessing
import os
import random
import signal
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import uvloop

from kucomms import ClosedError, Endpoint, KucommsError, Message, PeerClosedError, QueueFull
from kucomms.transports import shm
from tests.soak.content import RING_SIZE, Content, key
from tests.soak.ledger import (
    ALL_STOP,
    DEATHS,
    ENDED,
    ENDS,
    HUB,
    HUB_CHECKED,
    HUB_JUDGED,
    HUB_SENT,
    HUB_WRONG,
    KILL,
    LATEST,
    OWNER,
    PEER,
    PEER_CHECKED,
    PEER_JUDGED,
    PEER_WRONG,
    RECENT,
    ROW,
    RUN,
    SENT,
    SESSION,
    Ledger,
)

PATIENCE = 120.0
BURST = 256
TOO_LATE = 300.0 if "KUCOMMS_MODULES" in os.environ else 30.0
"""Seconds after which the end of a peer was missed. What it had sent is handled before, turn by
turn of a loop that other flooded endpoints share: six seconds on a busy machine, thirty in an
emulated guest on one."""
_BEGIN = struct.Struct("<QQ")
_LOOK = 0.02


@dataclass(frozen=True)
class Line:
    """A hub's end and a peer's, and the transport between them."""

    number: int
    transport: str
    where: str
    """Where the peer runs: ``process``, ``thread`` or ``loop`` (of the hub)."""
    peer_listens: bool
    peer_sends: str
    peer_receives: str
    hub_sends: str
    hub_receives: str

    @property
    def name(self):
        ways = f"{self.peer_sends}/{self.hub_receives}, {self.hub_sends}/{self.peer_receives}"
        if self.transport == "kernel":
            ways = f"{self.peer_sends}/{self.peer_receives}"
        return f"{ways}{', peer listens' if self.peer_listens else ''}"


@dataclass(frozen=True)
class Soak:
    """What every process is told."""

    directory: str
    seed: int
    tag: str
    plant: tuple[str, ...] = ()
    """Faults to be made on purpose: ``corrupt``, ``memory``, ``descriptor``."""
    pause: float = 0.02
    """Seconds that a sender may rest after a burst."""

    def url(self, line):
        if line.transport == "kernel":
            return "kernel://tutorial"
        return f"{line.transport}://soak_{self.tag}_{line.number}"

    @property
    def ledger(self):
        return Path(self.directory, "ledger")

    @property
    def errors(self):
        return Path(self.directory, "errors")


def _begin_process():
    """Control-C is the supervisor's; its end is everybody's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Who is slow is not refused: in an emulated guest five seconds may pass before a process that
    # has just connected gets a turn.
    shm.HANDSHAKE_TIMEOUT = PATIENCE

    def end_with_supervisor():
        multiprocessing.parent_process().join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end_with_supervisor, daemon=True).start()


class End:
    """One end of a line, for all its sessions: an endpoint, and a flow for each link."""

    def __init__(self, soak, line, content, ledger, *, hub):
        self.soak = soak
        self.line = line
        self.content = content
        self.words = ledger.words
        self.base = line.number * ROW
        self.ledger = ledger
        self.hub = hub
        self.random = random.Random(f"{soak.seed} {line.number} {hub} {self.word(SESSION)}")
        self.sends = line.hub_sends if hub else line.peer_sends
        self.receives = line.hub_receives if hub else line.peer_receives
        self.checked = self.base + (HUB_CHECKED if hub else PEER_CHECKED)
        self.flows = {}
        self.opened = asyncio.Queue()
        self.endpoint = Endpoint(f"soak_{line.number}", on_link_close=self._closed)
        self.endpoint.on_link_open(self._opened)
        self.endpoint.on_error(lambda error, name: self.wrong(f"{name}: {error!r}"))
        if self.receives in ("handler", "borrowing handler"):
            borrow = self.receives != "handler"
            self.endpoint.on_message(borrow=borrow)(
                lambda message, link: self.flows[link].take(message)
            )

    def word(self, word):
        return self.words[self.base + word]

    def add(self, peer_word, hub_word):
        self.words[self.base + (hub_word if self.hub else peer_word)] += 1

    def wrong(self, what):
        """Count a fault, and say what it is."""
        self.add(PEER_WRONG, HUB_WRONG)
        side = "hub" if self.hub else "peer"
        with self.soak.errors.open("a") as file:
            file.write(f"line {self.line.number}, {self.line.transport}, {side}: {what}\n")

    def flow(self, link):
        """The flow of a link that has just been opened."""
        if link not in self.flows:
            self.flows[link] = Flow(self, link)
        return self.flows[link]

    def _opened(self, link):
        self.flow(link)
        if self.line.peer_listens and not self.hub:
            self.opened.put_nowait(link)

    def _closed(self, link, error):
        flow = self.flows.pop(link)
        flow.judge(error)
        flow.closed.set_result(error)


class Flow:
    """One end of one link: what it sends, what it has checked."""

    def __init__(self, end, link):
        self.end = end
        self.link = link
        self.closed = asyncio.get_running_loop().create_future()
        self.session = None
        self.ends = None
        self.received = 0
        self.sent = 0
        self.closing = False
        self._tasks = []
        if end.receives not in ("handler", "borrowing handler"):
            self._tasks.append(asyncio.ensure_future(self._receive()))

    def begin(self, session, ends):
        """From here on it is known which messages come, and which are to be sent."""
        end = self.end
        self.session, self.ends = session, ends
        number = end.line.number
        self._in = key(number, session, from_hub=not end.hub)
        self._out = key(number, session, from_hub=end.hub)
        if end.line.transport == "kernel":
            self._in = self._out
        self._note = end.base + (HUB_SENT if end.hub else SENT) + session % RECENT
        end.words[self._note] = 0

    # ---- receiving ------------------------------------------------------------

    async def _receive(self):
        link = self.link
        try:
            while self.end.receives == "receive":
                self.take(await link.receive())
            while True:
                async with link.borrow() as message:
                    self.take(message)
        except (PeerClosedError, ClosedError):
            pass  # judge() is told
        except Exception as error:
            self.end.wrong(f"session {self.session}: {error!r}")

    def take(self, message):
        """Check the next message; the first that the hub gets says what the others are."""
        if self.session is None:
            self.begin(*_BEGIN.unpack(message.data))
            self._tasks.append(asyncio.ensure_future(self._serve()))
            return
        number = self.received
        key = self._in
        expected = self.end.content.data(key, number)
        if (
            bytes(message.data) != expected
            or message.id != number
            or message.type != key
            or message.user_value != key + number
        ):
            self.end.wrong(
                f"session {self.session}, message {number}: got number {message.id} of "
                f"{message.type}, {len(message.data)} bytes, expected {len(expected)} of {key}"
            )
        else:
            self.end.words[self.end.checked] += 1
        self.received = number + 1

    # ---- sending --------------------------------------------------------------

    async def send_until(self, until):
        """Send in bursts; ends at that time of the loop, when all stops, or with the link."""
        end = self.end
        loop = asyncio.get_running_loop()
        burst = getattr(self, f"_{end.sends}")
        with contextlib.suppress(PeerClosedError, ClosedError):
            while loop.time() < until and not end.ledger.stopping:
                await burst(end.random.randrange(1, BURST))
                await asyncio.sleep(end.soak.pause * max(0, end.random.uniform(-1, 1)))

    def _message(self):
        number = self.sent
        key = self._out
        data = self.end.content.data(key, number)
        if "corrupt" in self.end.soak.plant and self.end.hub and number == 1000:
            data = data[:-1] + bytes([data[-1] ^ 1]) if data else b"?"
        return Message(data, key, number, key + number)

    def _count(self, more=1):
        self.sent += more
        self.end.words[self._note] = self.sent

    async def _send(self, count):
        for _ in range(count):
            await self.link.send(self._message())
            self._count()

    async def _send_many(self, count):
        first = self.sent
        messages = []
        for self.sent in range(first, first + count):
            messages.append(self._message())
        self.sent = first
        await self.link.send_many(messages)
        self._count(count)

    async def _loan(self, count):
        for _ in range(count):
            message = self._message()
            values = {"type": message.type, "id": message.id, "user_value": message.user_value}
            try:
                with self.link.loan(len(message.data), **values) as loan:
                    loan.data[:] = message.data
            except QueueFull:
                await self.link.send(message)
            self._count()

    async def _threadsafe(self, count):
        def send():
            for _ in range(count):
                self.link.send_threadsafe(self._message(), timeout=PATIENCE)
                self._count()

        await asyncio.to_thread(send)

    # ---- a session --------------------------------------------------------------

    async def _serve(self):
        """The hub's part: send; close when that is the plan."""
        end = self.end
        loop = asyncio.get_running_loop()
        ours = self.ends == HUB
        try:
            await self.send_until(loop.time() + _duration(end) if ours else float("inf"))
            if ours and not end.ledger.stopping and not self.closed.done():
                self.closing = True
                await self.link.aclose()
        except Exception as error:
            end.wrong(f"session {self.session}: {error!r}")

    async def run(self, ends):
        """The peer's part: begin the session, send, and end it as planned."""
        end = self.end
        loop = asyncio.get_running_loop()
        kernel = end.line.transport == "kernel"
        if not kernel:
            await self.link.send(_BEGIN.pack(self.session, ends))
        sending = asyncio.ensure_future(
            self.send_until(loop.time() + _duration(end) if ends == PEER else float("inf"))
        )
        await sending
        if ends == HUB and not end.ledger.stopping:
            await self.closed
        if kernel and not self.closed.done():
            async with asyncio.timeout(PATIENCE):
                while self.received < self.sent and not self.closed.done():
                    await asyncio.sleep(_LOOK)
        if not self.closed.done():
            self.closing = True
            await self.link.aclose()
            end.ledger.end(end.line.number, self.session)
        await self.closed

    def judge(self, error):
        """The link is over: was what came what had to come, and the end what it had to be?"""
        end = self.end
        if self.session is None:
            return  # killed before it said anything
        words, base, area = end.words, end.base, self.session % RECENT
        here = f"session {self.session}"
        if end.hub and words[base + OWNER + area] != self.session:
            end.wrong(f"{here} was judged too late")
        if self.closing and end.line.transport != "kernel":
            return  # what the other side had sent and we had not received yet is dropped
        if end.hub and words[base + ENDED + area]:
            late = time.monotonic_ns() - words[base + ENDED + area]
            words[base + LATEST] = max(words[base + LATEST], late)
            if late > TOO_LATE * 1e9:
                end.wrong(f"{here}: its end was judged after {late / 1e9:.1f} s")
        at_least = self.sent
        if end.line.transport != "kernel":
            at_least = words[base + (SENT if end.hub else HUB_SENT) + area]
        at_most = at_least
        stopped = end.ledger.stopping
        if error is not None:
            at_most += BURST
            if not isinstance(error, PeerClosedError):
                end.wrong(f"{here} ended with {error!r}")
            if not (end.hub and self.ends == KILL):
                end.wrong(f"{here}, which nobody killed, ended with {error!r}")
            words[base + DEATHS] += 1
        elif end.hub and self.ends == KILL and not stopped:
            end.wrong(f"{here} ended in order when its peer was killed")
        if not at_least <= self.received <= at_most:
            end.wrong(f"{here}: {at_least} messages sent for certain, {self.received} arrived")
        end.add(PEER_JUDGED, HUB_JUDGED)


def _duration(end):
    return end.random.uniform(0.05, 2.0)


# ---- peers ------------------------------------------------------------------------


async def peer(soak, line, content, ledger):
    """Session after session, until all stops, or it is killed."""
    end = End(soak, line, content, ledger, hub=False)
    plans = [PEER]
    plans += [HUB] if line.transport != "kernel" else []
    plans += [KILL] if line.where == "process" else []
    url = soak.url(line)
    async with end.endpoint:
        if line.peer_listens:
            await end.endpoint.listen(url, ring_size=RING_SIZE)
        while not ledger.stopping:
            session = end.word(SESSION) + 1
            ends = end.random.choice(plans)
            for word, value in ((SENT, 0), (HUB_SENT, 0), (ENDED, 0), (OWNER, session)):
                end.words[end.base + word + session % RECENT] = value
            end.words[end.base + ENDS] = ends
            end.words[end.base + SESSION] = session
            if line.peer_listens:
                link = await end.opened.get()
            else:
                link = await end.endpoint.connect(url, timeout=PATIENCE, ring_size=RING_SIZE)
            flow = end.flow(link)
            flow.begin(session, ends)
            await flow.run(ends)


def peer_process(soak, line):
    """What ``multiprocessing`` runs."""
    _begin_process()
    _run(peer(soak, line, Content(soak.seed), Ledger(soak.ledger)), line.number % 2)


def _run(main, plain):
    with asyncio.Runner(loop_factory=None if plain else uvloop.new_event_loop) as runner:
        runner.run(main)


# ---- the hub ------------------------------------------------------------------------


async def hub_line(soak, line, content, ledger, own_peers):
    """The hub's end of a line, until all peers have ended, those in this process too."""
    if line.transport == "kernel":
        await _until_all_stops(ledger)
        return
    end = End(soak, line, content, ledger, hub=True)
    url = soak.url(line)
    async with end.endpoint:
        if not line.peer_listens:
            await end.endpoint.listen(url, ring_size=RING_SIZE)
        connecting = asyncio.ensure_future(_connect_again(end, url)) if line.peer_listens else None
        await _until_all_stops(ledger)
        await asyncio.wait([own_peers])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TOO_LATE):
                while end.flows:
                    await asyncio.sleep(_LOOK)
        if connecting is not None:
            connecting.cancel()
            await asyncio.gather(connecting, return_exceptions=True)
        for flow in list(end.flows.values()):
            end.wrong(f"session {flow.session} was still open when all peers had ended")


async def _until_all_stops(ledger):
    while ledger.words[RUN] != ALL_STOP:
        await asyncio.sleep(_LOOK)


async def _connect_again(end, url):
    while True:
        try:
            link = await end.endpoint.connect(url, timeout=None, ring_size=RING_SIZE)
        except KucommsError as error:
            end.wrong(f"connecting again: {error!r}")
            await asyncio.sleep(_LOOK)
            continue
        if not link.closed:
            await end.flow(link).closed


async def hub(soak, lines, content, ledger):
    """All lines of the hub, and the peers that run in it."""

    async def peers():
        here = [peer(soak, line, content, ledger) for line in lines if line.where == "loop"]
        ends = [asyncio.to_thread(thread.join) for thread in threads]
        await asyncio.gather(*here, *ends)

    threads = [
        threading.Thread(target=_run, args=(peer(soak, line, content, ledger), line.number % 2))
        for line in lines
        if line.where == "thread"
    ]
    for thread in threads:
        thread.start()
    leak = asyncio.ensure_future(_leak(soak.plant))
    own = asyncio.ensure_future(peers())
    ends = [hub_line(soak, line, content, ledger, own) for line in lines]
    await asyncio.gather(own, *ends)
    leak.cancel()


async def _leak(what):
    """The planted faults that grow."""
    kept = []
    while what:
        if "memory" in what:
            kept.append(bytearray(b"x") * (1 << 20))
        if "descriptor" in what:
            kept.extend(os.dup(1) for _ in range(5))
        await asyncio.sleep(0.05)


def hub_process(soak, lines):
    """What ``multiprocessing`` runs."""
    _begin_process()
    uvloop.run(hub(soak, lines, Content(soak.seed), Ledger(soak.ledger)))
