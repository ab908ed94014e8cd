# SPDX-License-Identifier: MIT
"""Round trips of 64 B between two processes, with both asleep, and back to back.

Parked: the client sleeps for a millisecond before every trip, so that both sides have
nothing to do for long and are in epoll (or a futex) when it begins. Busy: one trip after
the other; who polls, finds its message while polling.

Each process is kept to a CPU of its own. Else the scheduler decides, anew in each run,
whether waking the other means to switch to it or to wake another CPU, which differ by a
factor of two to five, and polling needs the second CPU anyway.
"""

import os
import time
from pathlib import Path

from bench.messages import Trips
from bench.pair import meeting, run_together
from bench.percentiles import CURVE, POINTS, percentiles
from bench.plan import Job, Sample
from bench.proc import activity

SIZE = 64
PAUSE = 0.001


def _client(contestant, meet, end, trips):
    """Return the times, and the CPU time of both processes since the warm-up, in ns."""
    begun = []
    trips.warm = lambda: begun.append(_cpu_of_both(meet))
    trips.over = lambda: begun.append(_cpu_of_both(meet))
    contestant.ping(meet, end, trips)
    meet.finished.set()
    return trips.taken(), begun[1] - begun[0]


def _cpu_of_both(meet):
    server = int(Path(meet.path("pid")).read_text())
    return time.process_time_ns() + activity(server)[1]


def _server(contestant, meet, end, trips):
    Path(meet.path("pid")).write_text(str(os.getpid()))
    contestant.pong(meet, end, trips)
    meet.wait_finished()


class RoundTrip(Job):
    """One contestant, parked or busy."""

    def __init__(self, contestant, mode, options):
        super().__init__("latency", contestant.name, mode, ours=contestant.ours)
        self.contestant = contestant
        if mode == "parked":
            self.count, self.pause = (200 if options.quick else 1000), PAUSE
        else:
            self.count, self.pause = (2000 if options.quick else 10_000), 0.0
        self.all = []
        """The trips of every round, for the distribution."""

    def sample(self):
        """The median trip of this round, with the percentiles of this round."""
        trips = Trips(self.count, self.pause, SIZE)
        with meeting() as meet:
            ends = self.contestant.open(meet, SIZE)
            try:
                (taken, cpu), _nothing = run_together(
                    (_client, (self.contestant, meet, ends[0], trips)),
                    (_server, (self.contestant, meet, ends[1], trips)),
                    apart=True,
                )
            finally:
                self.contestant.close(ends)
        self.all += taken
        self.curve = percentiles(self.all, CURVE)
        at = percentiles(taken, POINTS)
        return Sample(at[50.0], cpu / trips.count, {f"p{point:g}": at[point] for point in POINTS})


def jobs(options):
    """Each contestant in each mode that it has."""
    found, notes = [], []
    for mode in ("parked", "busy"):
        for contestant in options.chosen():
            if not contestant.can_echo or mode not in contestant.echo_modes:
                continue
            missing = contestant.missing()
            if missing:
                notes.append(f"latency {mode}: {contestant.name} left out, {missing}")
            else:
                found.append(RoundTrip(contestant, mode, options))
    return found, notes
