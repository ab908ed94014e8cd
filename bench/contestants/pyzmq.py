# SPDX-License-Identifier: MIT
"""pyzmq over ipc://: PUSH/PULL one way, PAIR for round trips; blocking, and for asyncio.

High-water marks are the default of 1000 messages at each side; with these patterns the
sender then waits, so nothing is lost. Copies, as is the default.
"""

import asyncio
import time

from bench.contestants.base import Contestant


class Blocking(Contestant):
    """The plain sockets."""

    name = "pyzmq"
    package = "zmq"

    def _context(self):
        import zmq

        return zmq.Context.instance()

    def _socket(self, meeting, kind, listen):
        import zmq

        socket = self._context().socket(getattr(zmq, kind))
        url = "ipc://" + meeting.path()
        if listen:
            socket.bind(url)
            meeting.ready.set()
        else:
            meeting.wait_ready()
            socket.connect(url)
        return socket

    def send(self, meeting, _end, sending):
        """See the base."""
        socket = self._socket(meeting, "PUSH", listen=False)
        send = socket.send
        for run in sending:
            for data in run.messages():
                send(data)
        meeting.wait_finished()
        socket.close()

    def receive(self, meeting, _end, receiving):
        """See the base."""
        socket = self._socket(meeting, "PULL", listen=True)
        receive, take = socket.recv, receiving.take
        for _ in range(receiving.total):
            take(receive())
        socket.close()

    def ping(self, meeting, _end, trips):
        """See the base."""
        socket = self._socket(meeting, "PAIR", listen=False)
        for _ in trips.times():
            if trips.pause:
                time.sleep(trips.pause)
            begin = time.perf_counter_ns()
            socket.send(trips.data)
            trips.add(begin, socket.recv())
        socket.close()

    def pong(self, meeting, _end, trips):
        """See the base."""
        socket = self._socket(meeting, "PAIR", listen=True)
        for _ in trips.times():
            socket.send(socket.recv())
        meeting.wait_finished()
        socket.close()


class Asyncio(Blocking):
    """The sockets of zmq.asyncio, under uvloop."""

    name = "pyzmq asyncio"

    def _context(self):
        import zmq.asyncio

        return zmq.asyncio.Context.instance()

    def send(self, meeting, _end, sending):
        """See the base."""
        _run(self._send(meeting, sending))

    async def _send(self, meeting, sending):
        socket = self._socket(meeting, "PUSH", listen=False)
        send = socket.send
        for run in sending:
            for data in run.messages():
                await send(data)
        await meeting.until_finished()
        socket.close()

    def receive(self, meeting, _end, receiving):
        """See the base."""
        _run(self._receive(meeting, receiving))

    async def _receive(self, meeting, receiving):
        socket = self._socket(meeting, "PULL", listen=True)
        receive, take = socket.recv, receiving.take
        for _ in range(receiving.total):
            take(await receive())
        socket.close()

    def ping(self, meeting, _end, trips):
        """See the base."""
        _run(self._ping(meeting, trips))

    async def _ping(self, meeting, trips):
        socket = self._socket(meeting, "PAIR", listen=False)
        for _ in trips.times():
            if trips.pause:
                await asyncio.sleep(trips.pause)
            begin = time.perf_counter_ns()
            await socket.send(trips.data)
            trips.add(begin, await socket.recv())
        socket.close()

    def pong(self, meeting, _end, trips):
        """See the base."""
        _run(self._pong(meeting, trips))

    async def _pong(self, meeting, trips):
        socket = self._socket(meeting, "PAIR", listen=True)
        for _ in trips.times():
            await socket.send(await socket.recv())
        await meeting.until_finished()
        socket.close()


def _run(main):
    import uvloop

    uvloop.run(main)


CONTESTANTS = [Asyncio(), Blocking()]
