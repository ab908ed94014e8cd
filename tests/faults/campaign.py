# SPDX-License-Identifier: MIT
"""Which faults are injected where, and the table of what came of it."""

import random
from collections import Counter
from dataclasses import dataclass, field, replace

from rich.table import Table
from rich.text import Text

from tests.faults.injector import Fault, Row
from tests.faults.tracer import Call
from tests.faults.victim import STEPS

__all__ = ["COLUMNS", "LANGUAGES", "Campaign", "rows"]

LANGUAGES = ("python", "uvloop", "C")
ROLES = ("listener", "connector")
ERRNOS = {
    "ENOMEM": {
        "accept4", "bind", "connect", "epoll_ctl add", "eventfd2", "fallocate", "ftruncate",
        "getdents64", "getsockopt", "madvise", "mkdir", "mmap", "newfstatat", "openat",
        "pidfd_open", "recvfrom", "recvmsg", "sendmsg", "sendto", "socket",
    },
    "EMFILE": {"accept4", "eventfd2", "getsockopt", "openat", "pidfd_open", "socket"},
    "EINTR": {
        "accept4", "connect", "epoll_wait", "fallocate", "flock", "ftruncate", "openat", "poll",
        "preadv2", "recvfrom", "recvmsg", "sendmsg", "sendto", "write",
    },
    "ENOSPC": {"bind", "epoll_ctl add", "fallocate", "ftruncate", "mkdir", "openat"},
}  # fmt: skip
"""The system calls that may give it: each errno is one that its manual page has."""
ALWAYS = {("ENOSPC", "fallocate")}
"""What is in each sample: a full /dev/shm, which in life is the first of them."""
COLUMNS = {
    "kill": "kill",
    "kill+": "kill\nanywhere",
    "stop": "stop",
    "stop+": "stop\nanywhere",
    **{name: name for name in ERRNOS},
}


def rows():
    """All steps of both sides."""
    for step in STEPS:
        for role in ROLES:
            if role == "listener" or step not in ("listen", "unlisten"):
                for language in LANGUAGES:
                    yield Row(language, role, step)


def _may_give(row, call, name):
    if row.language == "uvloop" and call.name.startswith("epoll"):
        return False  # libuv calls abort()
    if call.name not in ERRNOS[name]:
        return False
    if row.step == "unlisten" and name != "EINTR":
        return False  # the name is left to the next listen; a descriptor is kept for it
    if call.name == "mmap":  # of the process's own memory is the interpreter's business
        return call.shared_memory
    return name != "ENOSPC" or call.name != "openat" or call.creates


def column(fault):
    """Of the table."""
    return fault.kind + ("" if isinstance(fault.point, Call) else "+")


def faults_of(row, calls, instructions, most, rng):
    """All faults of a row; of each column ``most`` at random, when there are more."""

    def some(points):
        return points if len(points) <= most else sorted(rng.sample(points, most), key=str)

    for kind in ("kill", "stop"):
        for point in some(calls):
            yield Fault(row, kind, point)
        for point in some(range(1, instructions)):
            yield Fault(row, kind, point)
    for name in ERRNOS:
        able = [call for call in calls if _may_give(row, call, name)]
        always = [call for call in able if (name, call.name) in ALWAYS]
        for point in always + some([call for call in able if call not in always]):
            yield Fault(row, name, point)


def _attempts(planned, calls):
    """How often a step waits depends on the survivor: it may be shorter than when surveyed.

    So a point that is not reached is looked for nearer to the beginning, down to the first.
    """
    if planned.kind in ERRNOS:
        yield from [planned] * 3
        return
    at_call = isinstance(planned.point, Call)
    place = calls.index(planned.point) if at_call else planned.point - 1
    while True:
        yield replace(planned, point=calls[place] if at_call else place + 1)
        if not place:
            return
        place //= 2


@dataclass
class Campaign:
    """Faults in all rows, at most ``most`` for each cell of the table."""

    most: int
    seed: int
    tried: Counter = field(default_factory=Counter)
    missed: Counter = field(default_factory=Counter)
    met: set = field(default_factory=set)  # (errno, system call) that could be injected
    failures: list = field(default_factory=list)

    async def run(
        self, injector, wanted, progress=lambda row, done, count: None, failed=lambda *_: None
    ):
        """Inject; a failure is noted and told, and the next one tried."""
        for row in wanted:
            calls, instructions = await injector.survey(row)
            self.met |= {(n, c.name) for n in ERRNOS for c in calls if _may_give(row, c, n)}
            rng = random.Random(f"{self.seed} {row}")
            faults = list(faults_of(row, calls, instructions, self.most, rng))
            for done, planned in enumerate(faults):
                progress(row, done, len(faults))
                cell = (str(row), column(planned))
                try:
                    for fault in _attempts(planned, calls):
                        reached = await injector.inject(fault)
                        if reached:
                            break
                except AssertionError as error:
                    self.failures.append((fault, error))
                    failed(fault, error)
                    self.tried[cell] += 1
                else:
                    (self.tried if reached else self.missed)[cell] += 1

    def table(self, wanted):
        """Steps and faults: how many points were tried, and how many of them failed."""
        table = Table(title=f"faults (seed {self.seed})", title_justify="left")
        table.add_column("step, victim", no_wrap=True)
        for title in COLUMNS.values():
            table.add_column(title, justify="right")
        for row in wanted:
            cells = []
            for name in COLUMNS:
                tried = self.tried[str(row), name]
                failed = sum(
                    fault.row == row and column(fault) == name for fault, _ in self.failures
                )
                text = Text(f"{tried - failed} of {tried}", "red") if failed else str(tried or "")
                cells.append(text)
            table.add_row(str(row), *cells)
        totals = [
            str(sum(count for (_row, name), count in self.tried.items() if name == wanted_name))
            for wanted_name in COLUMNS
        ]
        table.add_section()
        table.add_row("all", *totals)
        return table
