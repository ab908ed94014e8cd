# SPDX-License-Identifier: MIT
"""How long to poll before going to sleep: round trips to a server that thinks for a while.

As the round trips of ``latency``, back to back, but the server's handler spins for the
given time before it answers. The value is the median trip beyond that time; CPU time is
that of both processes, the thinking left out.
"""

import time

from bench.contestants.kucomms_shm import ShmTrips
from bench.groups.latency import RoundTrip
from bench.plan import Sample

THINKING = (0, 20, 50, 100, 200, 1000)
"""Microseconds."""
POLLING = (0, 25, 50, 100, 200, 1000)
"""Microseconds of busy_poll."""


class Thinker(ShmTrips):
    """A server that takes its time."""

    def __init__(self, busy_poll, thinking):
        self.name = f"busy_poll {busy_poll} µs"
        self.options = {"busy_poll": busy_poll * 1e-6}
        self.thinking = thinking * 1000

    async def answer(self, message, link):
        """The server's handler."""
        end = time.perf_counter_ns() + self.thinking
        while time.perf_counter_ns() < end:
            pass
        await link.send(message)


class Polling(RoundTrip):
    """One setting, one thinking time."""

    def __init__(self, busy_poll, thinking, options):
        super().__init__(Thinker(busy_poll, thinking), "busy", options)
        self.group, self.case = "polling", f"thinks {thinking} µs"
        self.count = 300 if options.quick else 2000

    def sample(self):
        """The median trip of this round, less the thinking."""
        trip, thinking = super().sample(), self.contestant.thinking
        extra = {key: value - thinking for key, value in trip.extra.items()}
        return Sample(trip.value - thinking, max(trip.cpu - thinking, 0), extra)


def jobs(options):
    """Every setting with every thinking time."""
    return [
        Polling(busy_poll, thinking, options)
        for thinking in (THINKING[:3] if options.quick else THINKING)
        for busy_poll in (POLLING[:3] if options.quick else POLLING)
    ], []
