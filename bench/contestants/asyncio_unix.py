# SPDX-License-Identifier: MIT
"""asyncio on a Unix stream socket under uvloop; each message after its length.

Streams are what the documentation shows first; a BufferedProtocol, which parses in its
own buffer, is what it recommends for speed.
"""

import asyncio
import time

import uvloop

from bench.contestants.base import Contestant
from bench.messages import room_for

DRAIN = 1 << 16
"""Bytes between two calls of drain()."""
HEADER = 4


def framed(data):
    """The length, then the message: one object, so that there is one write."""
    return len(data).to_bytes(HEADER, "little") + data


class Streams(Contestant):
    """StreamWriter.write with drain() every 64 KiB, StreamReader.readexactly."""

    name = "asyncio streams"

    def send(self, meeting, _end, sending):
        """See the base."""
        uvloop.run(self._send(meeting, sending))

    async def _send(self, meeting, sending):
        meeting.wait_ready()
        _reader, writer = await asyncio.open_unix_connection(meeting.path())
        for run in sending:
            written = 0
            for data in run.messages():
                writer.write(framed(data))
                written += len(data)
                if written >= DRAIN:
                    written = 0
                    await writer.drain()
            await writer.drain()
        await meeting.until_finished()
        writer.close()

    def receive(self, meeting, _end, receiving):
        """See the base."""
        uvloop.run(self._receive(meeting, receiving))

    async def _receive(self, meeting, receiving):
        over = asyncio.get_running_loop().create_future()

        async def take_all(reader, writer):
            take = receiving.take
            try:
                for _ in range(receiving.total):
                    size = int.from_bytes(await reader.readexactly(HEADER), "little")
                    take(await reader.readexactly(size))
                over.set_result(None)
            except BaseException as error:
                over.set_exception(error)
            writer.close()

        await self._serve(meeting, take_all, over, room_for(receiving.size))

    async def _serve(self, meeting, serve, over, limit=1 << 16):
        server = await asyncio.start_unix_server(serve, meeting.path(), limit=limit)
        meeting.ready.set()
        await over
        server.close()

    def ping(self, meeting, _end, trips):
        """See the base."""
        uvloop.run(self._ping(meeting, trips))

    async def _ping(self, meeting, trips):
        meeting.wait_ready()
        reader, writer = await asyncio.open_unix_connection(meeting.path())
        for _ in trips.times():
            if trips.pause:
                await asyncio.sleep(trips.pause)
            begin = time.perf_counter_ns()
            writer.write(framed(trips.data))
            await writer.drain()
            size = int.from_bytes(await reader.readexactly(HEADER), "little")
            trips.add(begin, await reader.readexactly(size))
        writer.close()

    def pong(self, meeting, _end, trips):
        """See the base."""
        uvloop.run(self._pong(meeting, trips))

    async def _pong(self, meeting, trips):
        over = asyncio.get_running_loop().create_future()

        async def answer(reader, writer):
            for _ in trips.times():
                size = int.from_bytes(await reader.readexactly(HEADER), "little")
                writer.write(framed(await reader.readexactly(size)))
                await writer.drain()
            over.set_result(None)

        await self._serve(meeting, answer, over)


class _Frames(asyncio.BufferedProtocol):
    """Cuts the stream into messages, in a buffer that is allocated once."""

    def __init__(self, take, largest):
        self._take = take
        self._buffer = bytearray(max(1 << 18, 2 * (largest + HEADER)))
        self._view = memoryview(self._buffer)
        self._filled = 0
        self._may_write = None
        self.failed = None
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport):
        self.transport = transport

    def connection_lost(self, error):
        if not self.lost.done():
            self.lost.set_result(error)

    def get_buffer(self, _hint):
        return self._view[self._filled :]

    def buffer_updated(self, count):
        end = self._filled + count
        start = 0
        view = self._view
        take = self._take
        while end - start >= HEADER:
            after = start + HEADER + int.from_bytes(view[start : start + HEADER], "little")
            if after > end:
                break
            take(bytes(view[start + HEADER : after]))
            start = after
        if start:
            view[: end - start] = view[start:end]
        self._filled = end - start

    def pause_writing(self):
        self._may_write = asyncio.get_running_loop().create_future()

    def resume_writing(self):
        waiting, self._may_write = self._may_write, None
        waiting.set_result(None)

    async def send_all(self, messages):
        """Write each, and wait whenever the transport asks for it."""
        write = self.transport.write
        for data in messages:
            write(framed(data))
            if self._may_write is not None:
                await self._may_write


class Protocol(Streams):
    """A BufferedProtocol at both ends; the sender heeds pause_writing."""

    name = "asyncio protocol"

    async def _send(self, meeting, sending):
        meeting.wait_ready()
        loop = asyncio.get_running_loop()
        _transport, protocol = await loop.create_unix_connection(
            lambda: _Frames(None, 64), meeting.path()
        )
        for run in sending:
            await protocol.send_all(run.messages())
        await meeting.until_finished()
        protocol.transport.close()

    async def _receive(self, meeting, receiving):
        loop = asyncio.get_running_loop()
        over = loop.create_future()
        loop.set_exception_handler(
            lambda _loop, context: over.done() or over.set_exception(context["exception"])
        )
        receiving.done = lambda: over.set_result(None)
        server = await loop.create_unix_server(
            lambda: _Frames(receiving.take, receiving.size), meeting.path()
        )
        meeting.ready.set()
        await over
        server.close()

    async def _ping(self, meeting, trips):
        meeting.wait_ready()
        loop = asyncio.get_running_loop()
        reply = loop.create_future()

        def heard(data):
            reply.set_result(data)

        transport, _protocol = await loop.create_unix_connection(
            lambda: _Frames(heard, 64), meeting.path()
        )
        message = framed(trips.data)
        for _ in trips.times():
            if trips.pause:
                await asyncio.sleep(trips.pause)
            reply = loop.create_future()
            begin = time.perf_counter_ns()
            transport.write(message)
            trips.add(begin, await reply)
        transport.close()

    async def _pong(self, meeting, _trips):
        loop = asyncio.get_running_loop()
        connected = loop.create_future()

        def protocol():
            frames = _Frames(lambda data: frames.transport.write(framed(data)), 64)
            connected.set_result(frames)
            return frames

        server = await loop.create_unix_server(protocol, meeting.path())
        meeting.ready.set()
        await (await connected).lost
        server.close()


CONTESTANTS = [Streams(), Protocol()]
