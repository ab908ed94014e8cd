# SPDX-License-Identifier: MIT
"""kucomms over shared memory, under uvloop."""

import asyncio
import contextlib
import time
from typing import ClassVar

import kucomms
from bench.contestants.base import Contestant
from bench.messages import room_for

URL = "shm://bench"


class Shm(Contestant):
    """Sends with ``send``; the receiver is an endpoint with a coroutine handler."""

    name = "kucomms shm send"
    ours = True
    can_echo = False

    def send(self, meeting, _end, sending):
        """See the base; returns the counts of the link."""
        return kucomms.run(self._send(meeting, sending))

    async def _send(self, meeting, sending):
        meeting.wait_ready()
        async with kucomms.connect(URL, timeout=30) as link:
            for run in sending:
                await self.send_run(link, run)
            await meeting.until_finished()
            return _counts(link)

    async def send_run(self, link, run):
        """One message after the other."""
        send = link.send
        for data in run.messages():
            await send(data)

    def receive(self, meeting, _end, receiving):
        """See the base; returns the counts of the link."""
        return kucomms.run(self._receive(meeting, receiving))

    async def _receive(self, meeting, receiving):
        links = []
        failed = []
        over = asyncio.Event()
        receiving.done = over.set

        def on_error(error, _handler):
            failed.append(error)
            over.set()

        endpoint = kucomms.Endpoint(
            "receiver", on_message=receiving.handle, on_link_open=links.append, on_error=on_error
        )
        async with endpoint:
            await endpoint.listen(URL, ring_size=room_for(receiving.size))
            meeting.ready.set()
            await over.wait()
            if failed:
                raise failed[0]
            return _counts(links[0])


class ShmMany(Shm):
    """Sends with ``send_many``, in batches."""

    name = "kucomms shm send_many"

    async def send_run(self, link, run):
        """One batch after the other."""
        for batch in run.batches():
            await link.send_many(batch)


class ShmInPlace(Shm):
    """Copies into a loan, and out of a borrowed message.

    There is no waiting for room for a loan; where there is none, this message is sent
    with ``send``, which waits and copies just as often.
    """

    name = "kucomms shm loan+borrow"

    async def send_run(self, link, run):
        """One message after the other."""
        for data in run.messages():
            try:
                with link.loan(run.size) as loan:
                    loan.data[:] = data
            except kucomms.QueueFull:
                await link.send(data)

    async def _receive(self, meeting, receiving):
        opened = asyncio.get_running_loop().create_future()
        endpoint = kucomms.Endpoint("receiver", on_link_open=opened.set_result)
        async with endpoint:
            await endpoint.listen(URL, ring_size=room_for(receiving.size))
            meeting.ready.set()
            link = await opened
            take = receiving.take
            copy = memoryview(bytearray(receiving.size))
            for _ in range(receiving.total):
                async with link.borrow() as message:
                    copy[:] = message.data
                take(copy)
            return _counts(link)


class ShmTrips(Contestant):
    """Round trips between two endpoints with handlers.

    A trip ends when the client's handler has the reply. Back to back, the handler starts
    the next one; with a pause, it wakes the task that pauses.
    """

    name = "kucomms shm"
    ours = True
    can_stream = False
    options: ClassVar = {}

    def ping(self, meeting, _end, trips):
        """See the base."""
        kucomms.run(self._ping(meeting, trips))

    async def _ping(self, meeting, trips):
        left = trips.total
        begin = 0
        arrived = asyncio.Event()

        async def on_message(message, link):
            nonlocal left, begin
            trips.add(begin, message.data)
            left -= 1
            if trips.pause or not left:
                arrived.set()
            else:
                begin = time.perf_counter_ns()
                await link.send(trips.data)

        meeting.wait_ready()
        async with kucomms.Endpoint("client", on_message=on_message, **self.options) as endpoint:
            link = await endpoint.connect(URL, timeout=30)
            while left:
                if trips.pause:
                    await asyncio.sleep(trips.pause)
                arrived.clear()
                begin = time.perf_counter_ns()
                await link.send(trips.data)
                await arrived.wait()

    def pong(self, meeting, _end, trips):
        """See the base."""
        kucomms.run(self._pong(meeting, trips))

    async def answer(self, message, link):
        """The server's handler."""
        await link.send(message)

    async def _pong(self, meeting, _trips):
        over = asyncio.Event()
        endpoint = kucomms.Endpoint(
            "server",
            on_message=self.answer,
            on_link_close=lambda _link, _error: over.set(),
            **self.options,
        )
        async with endpoint:
            await endpoint.listen(URL)
            meeting.ready.set()
            await over.wait()


class ShmTripsRequest(ShmTrips):
    """A task that awaits ``request``, and a handler that replies."""

    name = "kucomms shm request"

    async def _ping(self, meeting, trips):
        meeting.wait_ready()
        async with kucomms.connect(URL, timeout=30) as link:
            for _ in trips.times():
                if trips.pause:
                    await asyncio.sleep(trips.pause)
                begin = time.perf_counter_ns()
                trips.add(begin, (await link.request(trips.data)).data)

    async def answer(self, message, link):
        """The server's handler."""
        await link.reply(message, message.data)


class ShmTripsFuture(ShmTrips):
    """A handler at the client that sets the result of a future, for which a task waits."""

    name = "kucomms shm future"
    echo_modes = ("busy",)

    async def _ping(self, meeting, trips):
        loop = asyncio.get_running_loop()
        reply = loop.create_future()

        async def on_message(message, _link):
            reply.set_result(message.data)

        meeting.wait_ready()
        async with kucomms.Endpoint("client", on_message=on_message, **self.options) as endpoint:
            link = await endpoint.connect(URL, timeout=30)
            for _ in trips.times():
                reply = loop.create_future()
                begin = time.perf_counter_ns()
                await link.send(trips.data)
                trips.add(begin, await reply)


class ShmTripsAwaited(ShmTrips):
    """The client awaits ``receive`` instead of a handler, the server likewise."""

    name = "kucomms shm receive"

    async def _ping(self, meeting, trips):
        meeting.wait_ready()
        async with kucomms.connect(URL, timeout=30) as link:
            for _ in trips.times():
                if trips.pause:
                    await asyncio.sleep(trips.pause)
                begin = time.perf_counter_ns()
                await link.send(trips.data)
                trips.add(begin, (await link.receive()).data)

    async def _pong(self, meeting, trips):
        opened = asyncio.get_running_loop().create_future()
        endpoint = kucomms.Endpoint("server", on_link_open=opened.set_result)
        async with endpoint:
            await endpoint.listen(URL)
            meeting.ready.set()
            link = await opened
            with contextlib.suppress(kucomms.PeerClosedError):
                for _ in trips.times():
                    await link.send(await link.receive())
                await link.wait_closed()


class ShmTripsPolling(ShmTrips):
    """Both endpoints may poll for a millisecond before they go to sleep."""

    name = "kucomms shm busy_poll"
    options: ClassVar = {"busy_poll": 0.001}
    echo_modes = ("busy",)


class ShmTripsSleeping(ShmTrips):
    """Neither endpoint polls."""

    name = "kucomms shm no polling"
    options: ClassVar = {"busy_poll": 0.0}


def _counts(link):
    counts = link.statistics()
    return {
        "doorbells": counts.doorbells_rung,
        "suppressed": counts.doorbells_suppressed,
        "full_waits": counts.full_waits,
    }


CONTESTANTS = [
    Shm(), ShmMany(), ShmInPlace(),
    ShmTrips(), ShmTripsAwaited(), ShmTripsRequest(), ShmTripsFuture(), ShmTripsPolling(),
    ShmTripsSleeping(),
]
