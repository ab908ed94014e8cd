# SPDX-License-Identifier: MIT
"""What an endpoint with a link costs while nothing happens.

It is watched from outside, by /proc, so that watching does not wake it: context
switches of all its threads, and the time they ran.
"""

import asyncio
import time

import kucomms
from bench.pair import meeting, results, workers
from bench.plan import Job, Sample
from bench.proc import activity

URL = "shm://bench"
SETTLE = 0.3
SUBJECT = "kucomms shm"
NOTHING = "nothing to do"
TICKING = "work handler at 100 Hz"


def _watched(meet, ticking):
    async def main():
        endpoint = kucomms.Endpoint("watched", on_message=lambda _message, _link: None)
        if ticking:
            endpoint.on_work(lambda: None)
        async with endpoint:
            await endpoint.listen(URL)
            meet.ready.set()
            await endpoint.serve_forever()

    kucomms.run(main())


def _other(meet, watched, seconds):
    meet.wait_ready()

    async def main():
        async with kucomms.connect(URL, timeout=30):
            await asyncio.sleep(SETTLE)
            before = (*activity(watched), time.monotonic())
            await asyncio.sleep(seconds)
            after = (*activity(watched), time.monotonic())
            return [now - was for now, was in zip(after, before, strict=True)]

    return kucomms.run(main())


class Idle(Job):
    """With or without a work handler at 100 Hz."""

    def __init__(self, case, ticking, seconds):
        super().__init__("idle", SUBJECT, case, unit="switches", ours=True)
        self.ticking = ticking
        self.seconds = seconds

    def sample(self):
        """Context switches; CPU as a share of a core."""
        with meeting() as meet, workers((_watched, (meet, self.ticking))) as watched:
            pid = watched[0][0].pid
            with workers((_other, (meet, pid, self.seconds))) as other:
                ((switches, ran, seconds),) = results(other, 30)
        percent = ran / 1e9 / seconds * 100
        extra = {
            "seconds": seconds, "switches_per_second": switches / seconds,
            "percent_of_a_core": percent,
        }
        return Sample(switches, None, extra)


def jobs(options):
    """Both."""
    seconds = 1 if options.quick else 3
    return [
        Idle(NOTHING, False, seconds),
        Idle(TICKING, True, seconds),
    ], []
