# SPDX-License-Identifier: MIT
"""What in a kernel log is a fault. Read by tools/guest.py and by the tests in the guest."""

import re

MARKER = "kucomms-guest: the command starts"
"""The line that tools/guest.py writes to the kernel log just before the command."""

# A panic counts wherever it is. The rest only counts after the marker: what the boot says about
# the virtual hardware is not ours.
_PANIC = re.compile(r"Kernel panic|not syncing")
_FAULT = re.compile(
    r"BUG:|WARNING:|Oops|Call Trace:|Kernel panic|not syncing"
    r"|KASAN|KCSAN|KFENCE|UBSAN|DEBUG_LOCKS_WARN_ON|ODEBUG:"
    r"|possible (?:circular locking|recursive locking|irq lock inversion)"
    r"|inconsistent lock state|bad unlock balance|held lock freed|lock held when returning"
    r"|suspicious RCU|[Ii]llegal context switch"
    r"|rcu.*(?:stall|starved)|soft lockup|hard LOCKUP"
    r"|INFO: task .* blocked|scheduling while atomic"
    r"|sleeping function called from invalid context"
    r"|general protection fault|[Uu]nable to handle|unchecked MSR|divide error|invalid opcode"
    r"|segfault at|stack guard page|double fault|Bad page state|Bad rss-counter"
    r"|kernel memory leak|suspected memory leak|unreferenced object"
    # A checker that has given up finds nothing any more.
    r"|Kernel memory leak detector disabled|turning off the locking correctness validator"
    r"|refcount_t:|list_(?:add|del) corruption|usercopy: Kernel memory"
    r"|Slab cache still has objects|Objects remaining in|page allocation failure"
    # Lines that were lost may have held any of the above.
    r"|printk messages dropped"
)


# What KCSAN says of one race: its first line, one before each stack, one near the end, and the
# end.
_RACE = re.compile(r"BUG: KCSAN:")
_ACCESS = re.compile(r"\b(?:read|write|read-write)(?: \(.*?\))? to 0x\w+ of \d+ bytes by .*:")
_REPORTED = "Reported by Kernel Concurrency Sanitizer"
_RULE = re.compile(r"={40,}\s*$")
_OURS = "kucomms"
_FRAMES = 2


def _is_ours(report: list[str]) -> bool:
    """Whether a race is about our data: our code touches it, or what that calls directly does.

    Further down every stack has us in it, and the data are the scheduler's, say.
    """
    accesses = [n for n, line in enumerate(report) if _ACCESS.search(line)]
    told = [report[0], *(x for n in accesses for x in report[n + 1 : n + 1 + _FRAMES])]
    return not accesses or any(_OURS in line for line in told)


def _races(lines: list[str]) -> list[tuple[int, bool, bool]]:
    """Return for each report of KCSAN: its first line, whether it is ours, whether it is whole.

    The rest of the kernel has races of its own, and strict rules find many.
    """
    found = []
    begin = None
    for n, line in enumerate([*lines, "=" * 66]):
        starts = n < len(lines) and bool(_RACE.search(line))
        if begin is not None and (starts or _RULE.search(line)):
            report = lines[begin:n]
            whole = n < len(lines) and any(_REPORTED in x for x in report)
            found.append((begin, _is_ours(report), whole))
            begin = None
        if starts:
            begin = n
    return found


def races_elsewhere(lines: list[str]) -> list[str]:
    """Return the first lines of the reports of data races that are about others' data."""
    return [lines[n] for n, ours, whole in _races(lines) if whole and not ours]


def is_within_race(lines: list[str]) -> bool:
    """Whether the last line belongs to a report of a data race that goes on."""
    races = _races(lines)
    return bool(races) and not any(_RULE.search(x) for x in lines[races[-1][0] :])


# No memory for the stack of a new thread, as test_fault_injection.py has it: the kernel's own
# thread says so, and from where.
_NO_STACK = re.compile(r"\bkthreadd: vmalloc error: ")
_FROM_WHERE = 4  # lines until the trace


# A memory cgroup at its limit kills one of its own, and says from where it was called.
_KILLS = re.compile(r"\binvoked oom-killer:")
_KILLED_IN_CGROUP = re.compile(r"\bMemory cgroup out of memory: Killed process")


def _cgroup_kills(lines: list[str]) -> set[int]:
    """The lines of such reports; not of those where the whole machine has no memory."""
    found: set[int] = set()
    begin = None
    for n, line in enumerate(lines):
        if _KILLS.search(line):
            begin = n
        elif begin is not None and _KILLED_IN_CGROUP.search(line):
            found.update(m for m in range(begin, n) if "Call Trace:" in lines[m])
            begin = None
    return found


def findings(lines: list[str]) -> list[str]:
    """Return the lines that report a fault, in order.

    But not ``races_elsewhere``, nor that there is no stack for a new thread, nor that a memory
    cgroup has killed one of its own. A report that is
    cut short, so that nobody knows, is ours.
    """
    elsewhere = {n for n, ours, whole in _races(lines) if whole and not ours}
    elsewhere |= _cgroup_kills(lines)
    for n, line in enumerate(lines):
        if "Call Trace:" in line and any(map(_NO_STACK.search, lines[max(0, n - _FROM_WHERE) : n])):
            elsewhere.add(n)
    return [line for n, line in enumerate(lines) if _FAULT.search(line) and n not in elsewhere]


def after_marker(log: str) -> tuple[list[str], list[str]]:
    """Split a whole console log into the lines before ``MARKER`` and those from there on.

    A log without the marker is the boot's alone.
    """
    lines = log.replace("\r", "").split("\n")
    start = next((n for n, line in enumerate(lines) if MARKER in line), len(lines))
    return lines[:start], lines[start:]


def findings_after_marker(log: str) -> list[str]:
    """Return the faults of a whole console log: panics anywhere, the rest after ``MARKER``."""
    before, after = after_marker(log)
    return [line for line in before if _PANIC.search(line)] + findings(after)
