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
    r"|refcount_t:|list_(?:add|del) corruption|usercopy: Kernel memory"
    r"|Slab cache still has objects|Objects remaining in|page allocation failure"
    # Lines that were lost may have held any of the above.
    r"|printk messages dropped"
)


def findings(lines: list[str]) -> list[str]:
    """Return the lines that report a fault, in order."""
    return [line for line in lines if _FAULT.search(line)]


def findings_after_marker(log: str) -> list[str]:
    """Return the faults of a whole console log: panics anywhere, the rest after ``MARKER``.

    A log without the marker is the boot's alone, where only panics count.
    """
    lines = log.replace("\r", "").split("\n")
    start = next((n for n, line in enumerate(lines) if MARKER in line), len(lines))
    return [line for line in lines[:start] if _PANIC.search(line)] + findings(lines[start:])
