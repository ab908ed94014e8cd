# SPDX-License-Identifier: MIT
"""Whether what the soak uses stays what it was: sampled all the time, judged at the end."""

import os
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ALIVE = Path("/sys/kernel/debug/kucomms/alive")


@dataclass(frozen=True)
class Tolerance:
    """By how much the last median may be above the first one: the larger of the two."""

    part: float
    amount: float

    def above(self, first):
        return max(self.part * first, self.amount)


MEMORY = Tolerance(0.10, 4 << 20)
COUNT = Tolerance(0.05, 4)
# What links hold that come and go all the time, so that now more of them are there, now fewer.
DESCRIPTORS = Tolerance(0.05, 24)
CHANNELS = Tolerance(0.05, 6)
PAGES = Tolerance(0.05, 6 * 134)
SLAB = Tolerance(0.05, 8 << 20)


@dataclass
class Verdict:
    """One series: medians of its first and last part, and whether the last is not above."""

    what: str
    first: float
    last: float
    most: float
    allowed: float
    samples: int

    @property
    def ok(self):
        return self.last <= self.first + self.allowed


class Sampler:
    """Samples, by what they are of."""

    def __init__(self):
        self._begin = time.monotonic()
        self.series = {}

    def sample(self, processes):
        """``processes``: by name, the process ids of those that live as long as the soak."""
        now = time.monotonic() - self._begin
        for name, pid in processes.items():
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended
                self._sample_process(name, pid, now)
        ours = []
        for entry in os.scandir("/dev/shm"):
            if entry.name.startswith("kucomms-"):
                with suppress(FileNotFoundError):  # gone meanwhile
                    ours.append(entry.stat().st_size)
        self._add("/dev/shm: entries", COUNT, now, len(ours))
        self._add("/dev/shm: bytes", MEMORY, now, sum(ours))
        if ALIVE.exists():
            meminfo = _numbers(Path("/proc/meminfo"), ":")
            self._add("kernel: slab, unreclaimable", SLAB, now, meminfo["SUnreclaim"] * 1024)
            self._add("kernel: slab, all", Tolerance(0.2, 32 << 20), now, meminfo["Slab"] * 1024)
            for what, value in alive().items():
                tolerance = {"channels": CHANNELS, "pages": PAGES}.get(what, COUNT)
                self._add(f"kucomms.ko: {what}", tolerance, now, value)

    def _sample_process(self, name, pid, now):
        status = _numbers(Path(f"/proc/{pid}/status"), ":")
        if "RssAnon" not in status:
            return  # it has ended, and nobody has looked after it yet
        self._add(f"{name}: private memory", MEMORY, now, status["RssAnon"] * 1024)
        self._add(f"{name}: threads", COUNT, now, status["Threads"])
        self._add(f"{name}: descriptors", DESCRIPTORS, now, len(os.listdir(f"/proc/{pid}/fd")))
        maps = Path(f"/proc/{pid}/maps").read_bytes()
        self._add(f"{name}: mappings", Tolerance(0.1, 40), now, maps.count(b"\n"))

    def _add(self, what, tolerance, now, value):
        self.series.setdefault(what, (tolerance, []))[1].append((now, value))

    def verdicts(self):
        """Compare the first minute after a warm-up with the last one.

        In runs of less than five minutes they are shorter: a quarter of it is the warm-up, a
        fifth each is compared.
        """
        length = max((s[-1][0] for _, s in self.series.values()), default=0.0)
        warm = min(60.0, 0.25 * length)
        window = min(60.0, 0.2 * length)
        found = []
        for what, (tolerance, samples) in self.series.items():
            first = [value for at, value in samples if warm <= at <= warm + window]
            last = [value for at, value in samples if at >= length - window]
            if first and last:
                median = statistics.median(first)
                found.append(
                    Verdict(
                        *(what, median, statistics.median(last)),
                        *(max(value for _, value in samples), tolerance.above(median)),
                        len(samples),
                    )
                )
        return found


def alive():
    """What ``kucomms.ko`` counts, by name; nothing where it is not loaded."""
    return _numbers(ALIVE, " ") if ALIVE.exists() else {}


def _numbers(path, separator):
    """The lines of "NAME: NUMBER ..." of a file."""
    found = {}
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(separator)
        with suppress(ValueError, IndexError):
            found[name] = int(rest.split()[0])
    return found
