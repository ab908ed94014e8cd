# SPDX-License-Identifier: MIT
# ruff: noqa: ASYNC110, PT017
"""One fault at one point of one step, and all that has to hold after it.

A victim goes through the steps of a link's life (``victim.py``); somewhere in one of them
it is killed, stopped for a while, or a system call of it fails. The survivor is an
endpoint in this process. What it must have received is read from the victim's memory at
the moment of the fault.
"""

import asyncio
import errno
import itertools
import os
import shutil
import signal
import tempfile
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from kucomms import Endpoint, KucommsError, PeerClosedError, QueueFull, TransportError
from tests.faults.tracer import (
    AT_END,
    AT_MARK,
    Call,
    Seen,
    Tracer,
    Victims,
    build,
    mapping_of,
    seen,
)
from tests.faults.victim import AFTER, BEFORE, COUNT, DATA, END, RING_SIZE, STEPS, content
from tests.transports.processes import descriptors, objects_in_shm

__all__ = ["Fault", "Injector", "Row"]

PATIENCE = 20.0
SENT = 3  # messages of the survivor that are there from the beginning
WHOLE = tuple(content(number) for number in range(BEFORE + 3 + AFTER))
HALF_WRITTEN = BEFORE + 1
_CODE = "/_ring.abi3.so"
MEMORY = {"fallocate", "ftruncate", "madvise", "mmap", "openat"}
"""The system calls by which a listener gets what it needs for a link's rings."""

_numbers = itertools.count()


@dataclass(frozen=True)
class Row:
    """A step of one side."""

    language: str
    role: str
    step: str

    @property
    def linked(self):
        """Whether there is a link already when the step begins."""
        return STEPS.index(self.step) > STEPS.index("connect")

    def __str__(self):
        return f"{self.step}, {self.role} ({self.language})"


@dataclass(frozen=True)
class Fault:
    """``kind``: kill, stop, or the name of an errno. ``point``: a call, or instructions.

    ``nothing``: the call says that it has succeeded, but was never made.
    """

    row: Row
    kind: str
    point: Call | int

    def __str__(self):
        where = self.point if isinstance(self.point, Call) else f"instruction {self.point}"
        return f"{self.kind} in {self.row} at {where}"


class Injector:
    """As a context manager; has a directory for the sockets of its own."""

    async def __aenter__(self):
        self._stack = AsyncExitStack()
        stack = await self._stack.__aenter__()
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kucomms-faults-")))
        library, program = build(directory)
        self._runtime = directory / "run"
        self._runtime.mkdir(0o700)
        before = os.environ.get("XDG_RUNTIME_DIR")
        os.environ["XDG_RUNTIME_DIR"] = str(self._runtime)
        stack.callback(_restore, before)
        self._program = program
        self.tracer = Tracer(library)
        stack.callback(self.tracer.close)
        self._victims = {}
        self._entries = {}  # where a row's first instruction is
        return self

    async def __aexit__(self, *exception):
        await self._stack.__aexit__(*exception)

    async def _of(self, language):
        if language not in self._victims:
            victims = Victims(language, self._program)
            self._victims[language] = await self._stack.enter_async_context(victims)
        return self._victims[language]

    async def survey(self, row):
        """The system calls of a step, and how many instructions it has."""
        calls = []

        async def list_calls(victim):
            calls.extend(await self.tracer.calls(victim.pid))

        await self._run(row, list_calls)
        made = 0

        async def count(victim):
            nonlocal made
            place, made, entry = await self.tracer.step(victim.pid, 1 << 40, victim.code())
            assert place == AT_MARK, place
            if row.language != "C":
                self._entries[row] = entry

        if row.language == "C" or (row.linked and row.step not in ("close", "unlisten")):
            await self._run(row, count)
        return calls, made

    async def inject(self, fault):
        """Raises AssertionError when something is not as it has to be; whether it was reached."""
        reached = False

        async def act(victim):
            nonlocal reached
            if isinstance(fault.point, Call):
                place = await self.tracer.to_call(victim.pid, fault.point)
            else:
                entry = self._entries.get(fault.row, 0)
                place, *_ = await self.tracer.step(victim.pid, fault.point, victim.code(), entry)
            assert place != AT_END, "it died by itself"
            if place == AT_MARK:
                return
            reached = True
            if fault.kind == "kill":
                await victim.kill()
            elif fault.kind == "stop":
                await victim.stop()
            elif fault.kind == "nothing":
                await self.tracer.answer(victim.pid, 0)
            else:
                victim.fails_with = getattr(errno, fault.kind)
                victim.failed = fault.point.name
                await self.tracer.answer(victim.pid, -victim.fails_with)

        await self._run(fault.row, act)
        return reached

    async def _run(self, row, act):
        """A whole life, with ``act`` called at the beginning of the step."""
        victims = await self._of(row.language)
        before = descriptors()
        url = f"shm://faults_{os.getpid()}_{next(_numbers)}"
        victim = Case(self.tracer, victims, row, url)
        try:
            async with asyncio.timeout(PATIENCE):
                await victim.run(act)
            async with asyncio.timeout(PATIENCE):
                while descriptors() != before:
                    await asyncio.sleep(0)
            left = [*objects_in_shm(os.getpid(), victim.pid), *os.listdir(self._runtime)]
            assert left == [], left
        except TimeoutError as error:
            after = descriptors()
            raise AssertionError(
                f"it hangs; descriptors {set(after.items()) - set(before.items())}"
            ) from error
        except BaseException as error:
            if victims.log:
                error.add_note(victims.log.decode(errors="replace"))
            raise
        finally:
            await victim.clean_up()
            for left in self._runtime.iterdir():  # by one that has failed
                shutil.rmtree(left)
            for left in objects_in_shm(victim.pid):
                os.unlink(f"/dev/shm/{left}")


def _restore(runtime):
    if runtime is None:
        del os.environ["XDG_RUNTIME_DIR"]
    else:
        os.environ["XDG_RUNTIME_DIR"] = runtime


class Case:
    """One victim and its survivor."""

    def __init__(self, tracer, victims, row, url):
        self._tracer = tracer
        self._victims = victims
        self._row = row
        self._url = url
        self.pid = 0
        self.fails_with = 0
        self.failed = None  # the system call that does
        self._ended = False
        self._killed = False
        self._stopped = False
        self._attached = False
        self._expected = None
        self._links = asyncio.Queue()  # of the survivor with the victim
        self._others = asyncio.Queue()  # and with somebody else
        self._link = None
        self._linked = asyncio.Event()  # and what is there from the beginning was sent
        self._closed = {}
        self._received = []
        self._sent = 0

    # ---- what is done to it ----------------------------------------------------

    def code(self):
        """What of it is stepped through: all of C, and of Python the compiled part."""
        return (0, 0) if self._row.language == "C" else mapping_of(self.pid, _CODE)

    async def kill(self):
        if self._row.linked and self._row.step != "unlisten":
            self._expected = seen(self.pid, self._row.role, self._expected)
        self._killed = True
        self._attached = False
        await self._tracer.kill(self.pid)

    async def stop(self):
        self._stopped = True
        self._attached = False
        await self._tracer.stop(self.pid)

    async def clean_up(self):
        """After a failure: the next case begins with a clean slate."""
        if self.pid and not self._ended:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            if self._attached:
                with suppress(OSError):
                    await self._tracer.kill(self.pid)
            async with asyncio.timeout(PATIENCE):
                await self._victims.ended()

    # ---- its life --------------------------------------------------------------

    async def run(self, act):
        row = self._row
        self.pid = await self._victims.start(row.role, self._url, row.step)
        async with AsyncExitStack() as stack:
            survivor = await stack.enter_async_context(Endpoint("survivor", busy_poll=0))
            survivor.on_link_open(self._opened)
            survivor.on_link_close(self._closed.__setitem__)
            await self._tracer.seize(self.pid)
            self._attached = True
            connecting = None
            if row.role == "connector":
                await survivor.listen(self._url, ring_size=RING_SIZE)
            else:
                connecting = asyncio.create_task(self._connect(survivor))
                stack.callback(connecting.cancel)
            talking = asyncio.create_task(self._talk(survivor))
            stack.callback(talking.cancel)
            self._victims.go()
            place = await self._tracer.to_mark(self.pid)
            assert place == AT_MARK, "it died before the step"
            if row.step == "unlisten":
                self._expected = Seen((*WHOLE, b""), closed=True)
            elif row.linked:
                await self._linked.wait()
                self._expected = seen(self.pid, row.role)
                while len(self._received) < self._expected.ready:
                    await asyncio.sleep(0)
                for _ in range(3):  # the survivor sleeps: it has to be rung for
                    await asyncio.sleep(0)
            await act(self)
            if self._killed:
                await self._is_dead(talking)
            else:
                await self._goes_on(survivor, talking)
                self._has_cleaned_up()
            await self._name_works(survivor, connecting)
            if self._killed and self._link is not None and not row.linked:
                await self._ends(talking, (), orderly=False)

    def _opened(self, link):
        (self._links if link.peer.pid == self.pid else self._others).put_nowait(link)

    async def _connect(self, survivor):
        while True:
            try:
                return await survivor.connect(self._url)
            except KucommsError as error:
                # The victim refuses what it has no memory for; all else is tried again.
                assert self.failed in MEMORY, error
                assert (type(error), error.errno) == (TransportError, errno.ENOSPC)

    async def _talk(self, survivor):
        """Send some, then receive until the link ends: all that came, and the error."""
        while True:
            self._link = link = await self._links.get()
            self._sent = 0
            for _ in range(SENT):
                self._send_nowait()
            if not self._row.linked or self._row.step in ("close", "unlisten"):
                with suppress(PeerClosedError):
                    link.send_nowait(b"", type=END)
            self._linked.set()
            self._received = received = []
            error = None
            try:
                async for message in link:
                    received.append(message)
            except PeerClosedError as raised:
                error = raised
            if received or not self.fails_with:
                return received, error
            self._linked.clear()  # its first attempt has failed late
            if self._row.role == "listener":
                await self._connect(survivor)

    def _send_nowait(self):
        with suppress(PeerClosedError):
            self._link.send_nowait(content(self._sent), type=DATA, id=self._sent)
            self._sent += 1

    async def _is_dead(self, talking):
        said, status = await self._victims.ended()
        self._ended = True
        assert (said, status) == ([], -signal.SIGKILL)
        if self._row.linked:
            await self._ends(talking, self._expected.messages, self._expected.closed)

    async def _ends(self, talking, messages, orderly):
        """The survivor gets these messages and nothing more, then the right error."""
        sent = [*enumerate(WHOLE), (len(WHOLE), b"")]
        if len(messages) > HALF_WRITTEN and messages[HALF_WRITTEN] != WHOLE[HALF_WRITTEN]:
            del sent[HALF_WRITTEN]
        del sent[len(messages) :]
        assert list(messages) == [data for _id, data in sent]
        received, error = await talking
        link = self._link
        assert [message.data for message in received] == list(messages)
        ids = [message.id for message in received if message.type == DATA]
        assert ids == [number for number, data in sent if data]
        assert type(error) is (type(None) if orderly else PeerClosedError)
        while link not in self._closed:
            await asyncio.sleep(0)
        assert type(self._closed[link]) is type(error)
        assert link.closed
        with suppress(PeerClosedError):
            await link.send(b"")
            raise AssertionError("a send to the dead")
        return received

    async def _goes_on(self, survivor, talking):
        """It was only stopped, or only one system call of it has failed."""
        waiting = []
        if self._stopped:
            waiting = await self._press(survivor)
            os.kill(self.pid, signal.SIGCONT)
        else:
            self._attached = False
            await self._tracer.let_go(self.pid)
        ended = asyncio.create_task(self._victims.ended())
        ending = asyncio.create_task(self._ends_talk(waiting))
        try:
            await asyncio.wait({ended, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                await ending
            said, status = await ended
        finally:
            ending.cancel()
            self._ended = ended.done() and not ended.cancelled()
            ended.cancel()
        assert status == 0, (said, status)
        await ending
        leaked = said.pop()
        assert leaked == "leaked 0", (leaked, said)
        if self.fails_with and said:
            step, name, number = said.pop().removeprefix("error ").split()
            assert step == self._row.step
            assert name in ("TransportError", "errno")
            assert int(number) == self.fails_with, f"{name} {errno.errorcode.get(int(number))}"
        assert said == []
        received = await self._ends(talking, (*WHOLE, b""), orderly=True)
        assert received[-1].type == COUNT
        assert received[-1].user_value == self._sent

    async def _ends_talk(self, waiting):
        await asyncio.gather(*waiting)
        if self._row.linked and self._row.step not in ("close", "unlisten"):
            await self._linked.wait()
            await self._link.send(b"", type=END)

    async def _press(self, survivor):
        """While it is stopped: sends that wait, or somebody else's link."""
        if self._row.step in ("close", "unlisten"):
            return []
        if not self._row.linked:
            if self._row.role == "connector":
                await self._exchange_with(survivor)
            return []
        link = self._link
        with suppress(QueueFull):
            while True:
                link.send_nowait(content(self._sent), type=DATA, id=self._sent)
                self._sent += 1
        waiting = []
        for _ in range(2):
            send = link.send(content(self._sent), type=DATA, id=self._sent)
            self._sent += 1
            waiting.append(asyncio.create_task(send))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not any(send.done() for send in waiting)
        assert not link.closed
        assert link not in self._closed
        return waiting

    def _has_cleaned_up(self):
        """One that was not killed leaves nothing, not even for the next to sweep."""
        left = objects_in_shm(self.pid)
        if self._row.role == "listener":
            left += list(Path(os.environ["XDG_RUNTIME_DIR"]).rglob("*"))
        assert left == [], f"left behind: {left}"

    # ---- after it --------------------------------------------------------------

    async def _name_works(self, survivor, connecting):
        """The same URL, for whoever has it now."""
        if connecting is None:
            await self._exchange_with(survivor)
            return
        async with Endpoint("successor") as successor:
            successor.on_message(lambda message, link: link.send(message))
            await successor.listen(self._url, ring_size=RING_SIZE)
            link = await connecting
            if link.peer.pid == self.pid:
                link = await survivor.connect(self._url)
            await link.send(b"to the next")
            assert (await link.receive()).data == b"to the next"

    async def _exchange_with(self, survivor):
        """Connect to the survivor, which listens."""
        async with Endpoint("other") as other:
            link = await other.connect(self._url, timeout=0)
            theirs = await self._others.get()
            await link.send(b"there")
            assert (await theirs.receive()).data == b"there"
            await theirs.send(b"and back")
            assert (await link.receive()).data == b"and back"
