# SPDX-License-Identifier: MIT
"""Both halves of the volume tests: send and check numbered messages with checksums."""

import asyncio
import random
import sys
import threading
import zlib

import kucomms
from kucomms import Endpoint, Message

POOL = [random.Random(number).randbytes(number % 256) for number in range(1024)]
SUMS = [zlib.crc32(data) for data in POOL]
DONE = 99


def numbered(number, stream):
    index = number & 1023
    return Message(POOL[index], type=stream, id=number, user_value=SUMS[index])


class Checker:
    """Counts what comes in, per stream, and everything that is wrong with it."""

    def __init__(self, streams, count):
        self.following = [0] * streams
        self.wrong = 0
        self.total = streams * count
        self.seen = 0
        self.complete = asyncio.Event()
        self.peer_done = asyncio.Event()
        self.peer_wrong = -1

    def message(self, message, link):
        stream = message.type
        if stream == DONE:
            self.peer_wrong = message.id
            self.peer_done.set()
            return
        number = self.following[stream]
        self.following[stream] = number + 1
        if message.id != number or zlib.crc32(message.data) != message.user_value:
            self.wrong += 1
        self.seen += 1
        if self.seen == self.total:
            self.complete.set()


async def exchange(link, checker, count, threads):
    """Send ``count`` messages from the loop and from each thread; wait for the peer's."""

    def from_thread(stream):
        for number in range(count):
            link.send_threadsafe(numbered(number, stream))

    workers = [
        threading.Thread(target=from_thread, args=(stream,)) for stream in range(1, threads + 1)
    ]
    for worker in workers:
        worker.start()
    for start in range(0, count, 100):
        if start % 300:
            await link.send_many([numbered(number, 0) for number in range(start, start + 100)])
        else:
            for number in range(start, start + 100):
                await link.send(numbered(number, 0))
    await checker.complete.wait()
    for worker in workers:
        await asyncio.to_thread(worker.join)
    await link.send(b"", type=DONE, id=checker.wrong)
    await checker.peer_done.wait()


async def peer(url, count, threads):
    """The other process: listens, exchanges with the first link, ends."""
    checker = Checker(threads + 1, count)
    endpoint = Endpoint("peer", on_message=checker.message)
    opened = asyncio.get_running_loop().create_future()
    endpoint.on_link_open(opened.set_result)
    async with endpoint:
        await endpoint.listen(url, ring_size=1 << 18)
        print("ready", flush=True)
        await exchange(await opened, checker, count, threads)
    assert not checker.wrong, f"{checker.wrong} messages were wrong"


if __name__ == "__main__":
    kucomms.run(peer(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
