# SPDX-License-Identifier: MIT
"""Sending from threads: link.send_threadsafe, while the loop receives.

    python threads.py

Four threads send 1000 messages each through one link. They block while its ring is
full, the loop does not. Each thread's messages arrive in the order in which it sent them.
"""

import asyncio

import kucomms

THREADS, MESSAGES = 4, 1000
URL = "inproc://threads"


def work(link: kucomms.Link, number: int) -> None:
    """What runs in a thread: no await, no loop."""
    for count in range(MESSAGES):
        link.send_threadsafe(b"x" * 100, type=number, id=count, timeout=10)


async def main() -> None:
    received = [0] * THREADS
    everything = asyncio.Event()

    def message(message: kucomms.Message, link: kucomms.Link) -> None:
        assert message.id == received[message.type], "out of order"
        received[message.type] += 1
        if sum(received) == THREADS * MESSAGES:
            everything.set()

    async with kucomms.Endpoint("receiver", on_message=message) as receiver:
        await receiver.listen(URL, ring_size=16 << 10)  # small, so that it fills
        async with kucomms.connect(URL) as link:
            await asyncio.gather(
                *(asyncio.to_thread(work, link, number) for number in range(THREADS))
            )
            await everything.wait()
            print(f"{sum(received)} messages from {THREADS} threads, all in order")
            print(f"{link.statistics().full_waits} times a sender found the ring full")


kucomms.run(main())
