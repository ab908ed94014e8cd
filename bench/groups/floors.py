# SPDX-License-Identifier: MIT
"""What the work costs without a transport. See ``bench.floors``."""

from bench.floors import copy_through_shared_memory, handler_floor
from bench.pair import run_together
from bench.plan import Job, Sample

HANDLER = "await handler(message)"
COPY = "memoryview copy through shared memory"


class Floor(Job):
    """One function, in a process of its own."""

    def __init__(self, name, case, function, *arguments):
        super().__init__("floors", name, case)
        self._task = (function, arguments)

    def sample(self):
        """Nanoseconds per message, and CPU time."""
        ((wall, cpu),) = run_together(self._task)
        return Sample(wall, cpu)


def jobs(options):
    """The handler for two sizes, the copy for big ones."""
    repeat = 20 if options.quick else 100
    found = [
        Floor(HANDLER, f"{size} B", handler_floor, size, repeat)
        for size in (64, 1024)
    ]
    found.append(Floor(COPY, "65536 B", copy_through_shared_memory, 65536, repeat * 20))
    return found, []
