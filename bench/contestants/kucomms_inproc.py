# SPDX-License-Identifier: MIT
"""kucomms inside one loop, under uvloop."""

import asyncio

import kucomms
from bench.contestants.base import Contestant
from bench.messages import room_for

URL = "inproc://bench"


class Inproc(Contestant):
    """A producer task that sends, and a message handler."""

    name = "kucomms inproc handler"
    ours = True
    solo = True
    can_echo = False

    def both(self, _meeting, sending, receiving):
        """See the base."""
        kucomms.run(self._both(sending, receiving))

    async def _both(self, sending, receiving):
        over = asyncio.Event()
        receiving.done = over.set
        endpoint = kucomms.Endpoint("receiver", on_message=receiving.handle)
        async with endpoint:
            await endpoint.listen(URL, ring_size=room_for(receiving.size))
            async with kucomms.connect(URL) as link:
                producer = asyncio.create_task(self.produce(link, sending))
                await over.wait()
                await producer

    async def produce(self, link, sending):
        """One message after the other."""
        for run in sending:
            for data in run.messages():
                await link.send(data)


class InprocMany(Inproc):
    """The same with ``send_many``."""

    name = "kucomms inproc send_many"

    async def produce(self, link, sending):
        """One batch after the other."""
        for run in sending:
            for batch in run.batches():
                await link.send_many(batch)


class InprocReceive(Inproc):
    """A producer task that sends, and a consumer task that awaits ``receive``."""

    name = "kucomms inproc receive"

    async def _both(self, sending, receiving):
        opened = asyncio.get_running_loop().create_future()
        endpoint = kucomms.Endpoint("receiver", on_link_open=opened.set_result)
        async with endpoint:
            await endpoint.listen(URL, ring_size=room_for(receiving.size))
            async with kucomms.connect(URL) as link:
                producer = asyncio.create_task(self.produce(link, sending))
                theirs = await opened
                take = receiving.take
                for _ in range(receiving.total):
                    take((await theirs.receive()).data)
                await producer


CONTESTANTS = [Inproc(), InprocMany(), InprocReceive()]
