# SPDX-License-Identifier: MIT
"""How long another task of the loop is held up by an endpoint that polls.

The task goes round ``asyncio.sleep(0)`` and notes how long each turn of the loop took.
The other process sends nothing, or plays ping-pong. The same without an endpoint's
polling shows what the loop and the machine do by themselves.
"""

import asyncio
import contextlib
import time

import kucomms
from bench.pair import meeting, run_together
from bench.percentiles import percentiles
from bench.plan import Job, Sample

URL = "shm://bench"
POLL = 0.001
POINTS = (50.0, 99.0, 99.9)


def _probed(meet, busy_poll, seconds):
    turns = []

    async def main():
        opened = asyncio.Event()

        async def answer(message, link):
            await link.send(message)

        endpoint = kucomms.Endpoint(
            "probed", on_message=answer, on_link_open=lambda _link: opened.set(),
            busy_poll=busy_poll,
        )
        async with endpoint:
            await endpoint.listen(URL)
            meet.ready.set()
            await opened.wait()
            await asyncio.sleep(0.05)
            clock = time.perf_counter_ns
            now = clock()
            end = now + int(seconds * 1e9)
            while now < end:
                await asyncio.sleep(0)
                before, now = now, clock()
                turns.append(now - before)
            counts = endpoint.statistics()
            meet.finished.set()
            return counts.polls_hit + counts.polls_missed, counts.message_calls

    polls, messages = kucomms.run(main())
    at = percentiles(turns, POINTS)
    return at, max(turns), polls, messages


def _other(meet, playing):
    meet.wait_ready()

    async def main():
        async with kucomms.connect(URL, timeout=30) as link:
            with contextlib.suppress(kucomms.PeerClosedError):
                while playing:
                    await link.send(b"x" * 64)
                    await link.receive()
            await meet.until_finished()

    kucomms.run(main())


class Probe(Job):
    """With or without polling, with or without messages."""

    def __init__(self, case, busy_poll, playing, seconds):
        name = f"busy_poll={busy_poll:g}"
        super().__init__("probe", name, case, ours=True)
        self.busy_poll = busy_poll
        self.playing = playing
        self.seconds = seconds

    def sample(self):
        """The longest turn of the loop."""
        with meeting() as meet:
            (at, longest, polls, messages), _nothing = run_together(
                (_probed, (meet, self.busy_poll, self.seconds)), (_other, (meet, self.playing))
            )
        extra = {f"p{point:g}": at[point] for point in POINTS}
        return Sample(longest, None, {**extra, "polls": polls, "calls": messages})


def jobs(options):
    """Four cases."""
    seconds = 0.3 if options.quick else 1.0
    return [
        Probe(case, busy_poll, playing, seconds)
        for case, playing in (("nothing arrives", False), ("ping-pong", True))
        for busy_poll in (0.0, POLL)
    ], []
