# SPDX-License-Identifier: MIT
"""What is measured: jobs, samples, and the order in which they are taken.

A group module has ``jobs(options)``. A job is taken once per round; all jobs of a round
are done before the next begins, so that what disturbs the machine for a while does not
hit one contestant only.
"""

import statistics
from dataclasses import dataclass, field
from importlib import import_module

from bench.contestants import contestants
from bench.pair import SessionError

GROUPS = {
    "throughput": "one way, both sides busy",
    "latency": "round trips of 64 B",
    "polling": "busy_poll against the time that the peer takes",
    "floors": "what the work costs without any transport",
    "inproc": "two tasks of one loop, 64 B",
    "idle": "an endpoint with nothing to do",
    "links": "one endpoint with many links",
    "probe": "how long polling holds up the loop",
    "busy": "beside a thread that computes",
    "wakes": "doorbells in a steady stream",
    "core": "the ring in C",
}


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    quick: bool = False
    rounds: int = 5
    sizes: tuple = (16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
    only: tuple = ()
    contestants: tuple = ()
    run_seconds: float = 0.4

    def chosen(self):
        """The contestants whose name contains one of the words given; else all."""
        return [
            one for one in contestants()
            if not self.contestants or any(word in one.name for word in self.contestants)
        ]


@dataclass
class Sample:
    """One measurement; ``cpu`` in nanoseconds for the same amount of work."""

    value: float
    cpu: float | None = None
    extra: dict = field(default_factory=dict)


class Job:
    """One line of the results. ``prepare`` may calibrate and verify; it is not timed."""

    curve = None
    """Percentiles of all that was measured until now, for jobs that have them."""
    verified = None
    """True when ``prepare`` has compared every byte of what it sent, None if it does not."""

    def __init__(self, group, name, case, unit="ns", ours=False):
        self.group = group
        self.name = name
        self.case = case
        self.unit = unit
        self.ours = ours

    def prepare(self):
        """Whatever is needed once."""

    def sample(self):
        """Measure; returns a Sample, or several as a list of (name, case, unit, Sample)."""
        raise NotImplementedError


@dataclass
class Result:
    """All samples of one line."""

    group: str
    name: str
    case: str
    unit: str
    ours: bool = False
    verified: bool | None = None
    samples: list = field(default_factory=list)
    error: str | None = None
    curve: dict | None = None
    """Percentiles of single events, over all rounds."""

    @property
    def values(self):
        """The measured values."""
        return [sample.value for sample in self.samples]

    @property
    def median(self):
        """Of the rounds."""
        return statistics.median(self.values) if self.samples else None

    @property
    def cpu(self):
        """Median of the CPU times, or None."""
        times = [sample.cpu for sample in self.samples if sample.cpu is not None]
        return statistics.median(times) if times else None

    def further(self, key):
        """Median of one of the further numbers, or None."""
        values = [sample.extra[key] for sample in self.samples if key in sample.extra]
        return statistics.median(values) if values else None

    def plain(self):
        """For JSON."""
        plain = {
            "group": self.group, "name": self.name, "case": self.case, "unit": self.unit,
            "verified": self.verified, "median": self.median,
            "min": min(self.values, default=None), "max": max(self.values, default=None),
            "samples": self.values, "cpu": self.cpu,
            "cpu_samples": [sample.cpu for sample in self.samples],
        }
        keys = {key for sample in self.samples for key in sample.extra}
        plain["extra"] = {
            key: [sample.extra.get(key) for sample in self.samples] for key in sorted(keys)
        }
        if self.curve:
            plain["curve"] = self.curve
        if self.error:
            plain["error"] = self.error
        return plain


class Plan:
    """Takes every job of the chosen groups, round by round."""

    def __init__(self, options):
        self.options = options
        self.results = {}
        self.notes = []
        """What was left out, and why."""
        self.jobs = []
        for group in GROUPS:
            if not options.only or group in options.only:
                jobs, notes = import_module(f"bench.groups.{group}").jobs(options)
                self.jobs += jobs
                self.notes += notes

    @property
    def steps(self):
        """How often ``run`` will report."""
        return len(self.jobs) * (self.options.rounds + 1)

    def run(self, step):
        """Prepare and measure everything; call ``step(text)`` before each part."""
        good = []
        for job in self.jobs:
            if job.case is not None:
                self.result(job)
            step(f"prepare {job.group}: {job.name} {job.case or ''}")
            if self._try(job, job.prepare):
                good.append(job)
        for number in range(self.options.rounds):
            # another order in every round: who comes after whom is not always the same
            turned = good[::-1] if number % 2 else good
            for job in turned:
                step(f"round {number + 1} {job.group}: {job.name} {job.case or ''}")
                self._try(job, lambda job=job: self._take(job))

    def _take(self, job):
        taken = job.sample()
        if isinstance(taken, Sample):
            self.result(job).samples.append(taken)
            self.result(job).error = None
            return
        for name, case, unit, sample in taken:
            key = (job.group, name, case)
            result = self.results.setdefault(key, Result(*key, unit, job.ours))
            result.samples.append(sample)

    def result(self, job):
        """The line of a job."""
        key = (job.group, job.name, job.case)
        result = self.results.setdefault(key, Result(*key, job.unit, job.ours))
        result.verified = job.verified
        result.curve = job.curve
        return result

    def _try(self, job, action):
        try:
            action()
        except (SessionError, OSError) as error:
            text = str(error).strip()
            if job.case is not None:
                self.result(job).error = text
            reason = text.splitlines()[-1] if text else repr(error)
            self.notes.append(f"{job.group}: {job.name} {job.case or ''} failed: {reason}")
            return False
        return True
