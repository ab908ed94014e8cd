# SPDX-License-Identifier: MIT
"""Floors: what cannot be had for less, whatever the transport.

The eventfds, the floor of a round trip, are among the contestants, as they need the same
two processes.
"""

import mmap
import statistics
import time

import kucomms
from bench.messages import Receiving, Run, numbered

READY = 5000
"""Messages in the list."""


def handler_floor(size, repeats):
    """Nanoseconds for ``await handler(message, link)`` over a list of messages that are there.

    Wall time, the median of passes over the list, and CPU time. The handler is the one of
    the kucomms receivers in the group ``throughput``.
    """
    async def main():
        messages = [kucomms.Message(numbered(size, number)) for number in range(READY)]
        receiving = Receiving([Run(size, READY * (repeats + 2))])
        handler = receiving.handle
        for message in messages:
            await handler(message, None)
        times = []
        begin_cpu = time.process_time()
        for _ in range(repeats):
            begin = time.perf_counter()
            for message in messages:
                await handler(message, None)
            times.append(time.perf_counter() - begin)
        cpu = (time.process_time() - begin_cpu) / repeats
        return [seconds / READY * 1e9 for seconds in (statistics.median(times), cpu)]

    return kucomms.run(main())


def copy_through_shared_memory(size, repeats):
    """Nanoseconds for copying a message into shared memory and out of it, in Python.

    Wall time, the median of passes through a megabyte, and CPU time.
    """
    slots = (1 << 20) // size
    data = memoryview(bytes(size))
    copy = memoryview(bytearray(size))
    with mmap.mmap(-1, 1 << 20) as shared, memoryview(shared) as view:
        places = [view[slot * size : (slot + 1) * size] for slot in range(slots)]
        times = []
        begin_cpu = time.process_time()
        for _ in range(repeats):
            begin = time.perf_counter()
            for place in places:
                place[:] = data
                copy[:] = place
            times.append(time.perf_counter() - begin)
        cpu = (time.process_time() - begin_cpu) / repeats
        for place in places:
            place.release()
    return [seconds / slots * 1e9 for seconds in (statistics.median(times), cpu)]
