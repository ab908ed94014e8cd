# SPDX-License-Identifier: MIT
"""One way: nanoseconds per message, the receiver's clock, both processes' CPU time."""

from bench.messages import Receiving, Run, Sending
from bench.pair import meeting, run_together
from bench.plan import Job, Sample

VERIFIED = 300
FORMS = ("kucomms shm send", "kucomms shm send_many")
"""The contestants that other groups are about."""


def _sender(contestant, meet, end, runs, disturb):
    _spin(disturb)
    sending = Sending(runs)
    counts = contestant.send(meet, end, sending)
    meet.wait_finished()
    return {"cpu": sending.cpu, "counts": counts}


def _receiver(contestant, meet, end, runs, disturb):
    _spin(disturb)
    receiving = Receiving(runs)
    counts = contestant.receive(meet, end, receiving)
    meet.finished.set()
    return {"wall": receiving.wall, "cpu": receiving.cpu, "counts": counts}


def _both(contestant, meet, runs):
    sending, receiving = Sending(runs), Receiving(runs)
    meet.finished.set()
    contestant.both(meet, sending, receiving)
    return {"wall": receiving.wall, "cpu": receiving.cpu, "counts": None}


def _spin(disturb):
    """Start a thread that computes in Python for ever, if asked to."""
    if not disturb:
        return
    import threading

    def spin():
        number = 0
        while True:
            number += 1

    threading.Thread(target=spin, daemon=True).start()


def session(contestant, runs, timeout=60.0, disturb=()):
    """Send the runs from one process to another; what both sides report.

    ``disturb``: "sender" or "receiver" has a thread that computes.
    """
    with meeting() as meet:
        if contestant.solo:
            (both,) = run_together((_both, (contestant, meet, runs)), timeout=timeout)
            return {"cpu": [0.0] * len(runs), "counts": None}, both
        ends = contestant.open(meet, runs[0].size)
        try:
            return run_together(
                (_sender, (contestant, meet, ends[0], runs, "sender" in disturb)),
                (_receiver, (contestant, meet, ends[1], runs, "receiver" in disturb)),
                timeout=timeout,
            )
        finally:
            contestant.close(ends)


class Stream(Job):
    """One contestant and size."""

    def __init__(self, contestant, size, options, group="throughput", case=None, disturb=()):
        super().__init__(group, contestant.name, case or f"{size} B", ours=contestant.ours)
        self.contestant = contestant
        self.size = size
        self.seconds = options.run_seconds
        self.disturb = disturb

    def prepare(self):
        """Check that every byte arrives, and see how many messages make a good run."""
        guess = max(16, min(2000, (1 << 24) // self.size))
        runs = [
            Run(self.size, min(VERIFIED, guess), verify=True),
            Run(self.size, guess // 2),
            Run(self.size, guess),
        ]
        _sender, receiver = session(self.contestant, runs, disturb=self.disturb)
        self.verified = True
        count = int(guess * self.seconds / max(receiver["wall"][2], 1e-6))
        self.count = max(16, min(count, 5_000_000)) + 127 & ~127

    def sample(self):
        """A run after a warm-up of a fourth of it."""
        runs = [Run(self.size, self.count // 4), Run(self.size, self.count)]
        sender, receiver = session(self.contestant, runs, disturb=self.disturb)
        cpu = (sender["cpu"][1] + receiver["cpu"][1]) / self.count * 1e9
        if self.disturb:
            cpu = None  # mostly that of the other thread
        extra = {"messages": self.count}
        if sender["counts"]:
            sent = sum(run.count for run in runs)
            for side, counts in (("sender", sender["counts"]), ("receiver", receiver["counts"])):
                for what, number in counts.items():
                    extra[f"{side}_{what}_per_million"] = number / sent * 1e6
        return Sample(receiver["wall"][1] / self.count * 1e9, cpu, extra)


def jobs(options):
    """Each contestant with each size that it can do."""
    found, notes = [], []
    able = []
    for contestant in options.chosen():
        if not contestant.can_stream:
            continue
        missing = contestant.missing()
        if missing:
            notes.append(f"throughput: {contestant.name} left out, {missing}")
        else:
            able.append(contestant)
    for size in options.sizes:
        found += [
            Stream(contestant, size, options)
            for contestant in able if size <= contestant.max_size
        ]
    return found, notes
