# SPDX-License-Identifier: MIT
"""asyncio.Queue between two tasks of one uvloop: it passes references, nothing is copied."""

import asyncio

import uvloop

from bench.contestants.base import Contestant
from bench.messages import queue_length


class Queue(Contestant):
    """As long as kucomms' ring is for messages of that size."""

    name = "asyncio.Queue"
    solo = True
    can_echo = False

    def both(self, _meeting, sending, receiving):
        """See the base."""
        uvloop.run(self._both(sending, receiving))

    async def _both(self, sending, receiving):
        queue = asyncio.Queue(queue_length(receiving.size))

        async def produce():
            for run in sending:
                for data in run.messages():
                    await queue.put(data)

        producer = asyncio.create_task(produce())
        take = receiving.take
        for _ in range(receiving.total):
            take(await queue.get())
        await producer


CONTESTANTS = [Queue()]
