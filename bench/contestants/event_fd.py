# SPDX-License-Identifier: MIT
"""The floor of a round trip between two loops that sleep: two eventfds under uvloop.

No bytes are passed, only the wake-up itself.
"""

import asyncio
import os
import time

import uvloop

from bench.contestants.base import Contestant


class EventFds(Contestant):
    """An eventfd for each direction, read in ``loop.add_reader``."""

    name = "two eventfds, uvloop"
    can_stream = False
    reference = True

    def ping(self, meeting, _end, trips):
        """See the base."""
        uvloop.run(self._ping(meeting, trips))

    async def _ping(self, meeting, trips):
        there, back = self._connect(meeting)
        loop = asyncio.get_running_loop()
        rung = loop.create_future()

        def heard():
            os.eventfd_read(back)
            rung.set_result(None)

        loop.add_reader(back, heard)
        for _ in trips.times():
            if trips.pause:
                await asyncio.sleep(trips.pause)
            rung = loop.create_future()
            begin = time.perf_counter_ns()
            os.eventfd_write(there, 1)
            await rung
            trips.add(begin, trips.data)
        loop.remove_reader(back)

    def pong(self, meeting, _end, trips):
        """See the base."""
        uvloop.run(self._pong(meeting, trips))

    async def _pong(self, meeting, trips):
        there, back = self._listen(meeting)
        loop = asyncio.get_running_loop()
        over = loop.create_future()
        left = trips.total

        def heard():
            nonlocal left
            os.eventfd_read(there)
            os.eventfd_write(back, 1)
            left -= 1
            if not left:
                over.set_result(None)

        loop.add_reader(there, heard)
        await over
        loop.remove_reader(there)

    def _listen(self, meeting):
        import socket

        fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(meeting.path())
            listener.listen()
            meeting.ready.set()
            with listener.accept()[0] as connection:
                socket.send_fds(connection, [b"x"], fds)
        return fds

    def _connect(self, meeting):
        import socket

        meeting.wait_ready()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(meeting.path())
            return socket.recv_fds(connection, 1, 2)[1]


CONTESTANTS = [EventFds()]
