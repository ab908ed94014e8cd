# SPDX-License-Identifier: MIT
"""pynng, a pair over ipc://, awaited under uvloop."""

import asyncio
import time

import uvloop

from bench.contestants.base import Contestant


class Pair(Contestant):
    """Pair0 with asend and arecv, and buffers of 128 messages at each side."""

    name = "pynng"
    package = "pynng"

    def _socket(self, meeting, listen):
        import pynng

        url = "ipc://" + meeting.path()
        # recv_max_size: 0 is without limit, the default would be a megabyte
        options = {"send_buffer_size": 128, "recv_buffer_size": 128, "recv_max_size": 0}
        if listen:
            socket = pynng.Pair0(listen=url, **options)
            meeting.ready.set()
            return socket
        meeting.wait_ready()
        return pynng.Pair0(dial=url, **options)

    def send(self, meeting, _end, sending):
        """See the base."""
        uvloop.run(self._send(meeting, sending))

    async def _send(self, meeting, sending):
        with self._socket(meeting, listen=False) as socket:
            for run in sending:
                for data in run.messages():
                    await socket.asend(data)
            await meeting.until_finished()

    def receive(self, meeting, _end, receiving):
        """See the base."""
        uvloop.run(self._receive(meeting, receiving))

    async def _receive(self, meeting, receiving):
        take = receiving.take
        with self._socket(meeting, listen=True) as socket:
            for _ in range(receiving.total):
                take(await socket.arecv())

    def ping(self, meeting, _end, trips):
        """See the base."""
        uvloop.run(self._ping(meeting, trips))

    async def _ping(self, meeting, trips):
        with self._socket(meeting, listen=False) as socket:
            for _ in trips.times():
                if trips.pause:
                    await asyncio.sleep(trips.pause)
                begin = time.perf_counter_ns()
                await socket.asend(trips.data)
                trips.add(begin, await socket.arecv())

    def pong(self, meeting, _end, trips):
        """See the base."""
        uvloop.run(self._pong(meeting, trips))

    async def _pong(self, meeting, trips):
        with self._socket(meeting, listen=True) as socket:
            for _ in trips.times():
                await socket.asend(await socket.arecv())
            await meeting.until_finished()


CONTESTANTS = [Pair()]
