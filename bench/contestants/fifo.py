# SPDX-License-Identifier: MIT
"""faster-fifo: a queue in shared memory with a lock; bytes as they are, not pickled."""

import time

from bench.contestants.base import Contestant
from bench.messages import BATCH, room_for


def _same(data):
    return data


class Fifo(Contestant):
    """put_many and get_many; a queue for each direction. It has no form for asyncio."""

    name = "faster-fifo"
    package = "faster_fifo"

    def open(self, _meeting, size):
        """The queues, in shared memory that both workers inherit."""
        import faster_fifo
        import faster_fifo_reduction  # noqa: F401  (lets queues be passed to workers)

        there, back = (
            faster_fifo.Queue(max_size_bytes=room_for(size), loads=bytes, dumps=_same)
            for _ in range(2)
        )
        return (there, back), (there, back)

    def send(self, _meeting, end, sending):
        """See the base; a batch has to fit into the queue."""
        put_many = end[0].put_many
        for run in sending:
            for batch in run.batches(max(1, min(BATCH, room_for(run.size) // 4 // run.size))):
                put_many(batch, timeout=60)

    def receive(self, _meeting, end, receiving):
        """See the base."""
        take = receiving.take
        get_many = end[0].get_many
        left = receiving.total
        while left:
            for data in get_many(timeout=60, max_messages_to_get=BATCH):
                take(data)
                left -= 1

    def ping(self, _meeting, end, trips):
        """See the base."""
        there, back = end
        for _ in trips.times():
            if trips.pause:
                time.sleep(trips.pause)
            begin = time.perf_counter_ns()
            there.put(trips.data)
            trips.add(begin, back.get())

    def pong(self, _meeting, end, trips):
        """See the base."""
        there, back = end
        for _ in trips.times():
            back.put(there.get())


CONTESTANTS = [Fifo()]
