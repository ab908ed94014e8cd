# SPDX-License-Identifier: MIT
"""The other side of the tests of buffers in messages: in this loop, another, or a process."""

import asyncio
import os
import signal
import threading
from contextlib import asynccontextmanager

from kucomms import Endpoint, run
from tests.transports.processes import Process

RETURN, INVERT, FREE, KEEP, LET_GO, GIVE, DIE, CLOSE_POOL, WHAT_IS_OUT = range(1, 10)
"""What a message asks for, as its type."""


class Partner:
    """An endpoint's message handler."""

    def __init__(self):
        self.kept = []
        self.pool = None

    async def __call__(self, message, link):
        match message.type:
            case 1:  # RETURN: everything, as a message or a reply
                if message.id:
                    await link.reply(message, message.data, buffers=message.buffers)
                else:
                    await link.send(message, buffers=message.buffers)
            case 2:  # INVERT: the bytes, and return them
                for buffer in message.buffers:
                    data = buffer.data
                    data[:] = bytes(data).translate(INVERTED)
                    del data
                await link.send(message, buffers=message.buffers)
            case 3:  # FREE: at once
                for buffer in message.buffers:
                    buffer.free()
            case 4:  # KEEP: until LET_GO
                self.kept.extend(message.buffers)
                await link.send(b"kept")
            case 5:
                for buffer in self.kept:
                    buffer.free()
                self.kept.clear()
                await link.send(b"let go")
            case 6:  # GIVE: one of a pool of its own
                if self.pool is None:
                    self.pool = await link.open_pool(message.user_value)
                buffer = await self.pool.allocate_when_room(message.id)
                buffer.data[:] = bytes(len(buffer)).replace(b"\0", message.data)
                await link.send(b"given", buffers=buffer)
            case 7:
                os.kill(os.getpid(), signal.SIGKILL)
            case 8:
                await self.pool.aclose()
                self.pool = None
                await link.send(b"closed")
            case 9:
                statistics = self.pool.statistics()
                await link.send(b"", id=statistics.handed_over, user_value=statistics.allocated)


INVERTED = bytes(255 - value for value in range(256))


@asynccontextmanager
async def partner_at(url, where, **options):
    """Somebody listens there: in this ``loop``, in another one's ``thread``, in a ``process``.

    Yields the process, or None.
    """
    if where == "loop":
        async with Endpoint("partner") as endpoint:
            endpoint.on_message(Partner())
            await endpoint.listen(url, **options)
            yield None
    elif where == "thread":
        ready, stop = threading.Event(), threading.Event()
        problems = []

        async def serve():
            async with Endpoint("partner") as endpoint:
                endpoint.on_message(Partner())
                endpoint.on_error(lambda error, _: problems.append(error))
                await endpoint.listen(url, **options)
                ready.set()
                await asyncio.to_thread(stop.wait)

        thread = threading.Thread(target=lambda: run(serve()))
        thread.start()
        try:
            await asyncio.to_thread(ready.wait)
            yield None
        finally:
            stop.set()
            await asyncio.to_thread(thread.join)
        assert problems == []
    else:
        with Process("partner", url) as process:
            await process.says("ready")
            yield process
