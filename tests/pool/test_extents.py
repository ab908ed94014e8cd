# SPDX-License-Identifier: MIT
"""The allocator of a pool's pages, against one that is simple and slow."""

import random

import pytest

from kucomms._extents import Extents


class Slow:
    """A flag for each page."""

    def __init__(self, pages):
        self.free = [True] * pages

    def runs(self):
        found, start = [], None
        for page, free in enumerate([*self.free, False]):
            if free and start is None:
                start = page
            elif not free and start is not None:
                found.append((start, page - start))
                start = None
        return found

    def mark(self, start, pages, free):
        assert self.free[start : start + pages] == [not free] * pages
        self.free[start : start + pages] = [free] * pages


@pytest.mark.parametrize("seed", range(20))
def test_agrees_with_a_map_of_pages(seed):
    rng = random.Random(seed)
    pages = rng.choice([1, 2, 17, 64, 1000])
    fast, slow = Extents(pages), Slow(pages)
    taken = []
    for _ in range(2000):
        if taken and rng.random() < 0.5:
            start, length = taken.pop(rng.randrange(len(taken)))
            fast.give(start, length)
            slow.mark(start, length, True)
        else:
            length = min(int(rng.expovariate(1 / rng.choice([1, 4, 60]))) + 1, pages)
            start = fast.take(length)
            fits = any(run >= length for _, run in slow.runs())
            assert (start is not None) == fits
            if start is not None:
                slow.mark(start, length, False)
                taken.append((start, length))
        assert fast.runs() == slow.runs()
    for start, length in taken:
        fast.give(start, length)
    assert fast.runs() == [(0, pages)]


def test_what_fits_exactly_is_found_among_much_that_does_not():
    # 33 to 34 pages are of one class: a run of 34 hides among runs of 33.
    extents = Extents(50 * 35)
    runs = [(extents.take(34 if number == 25 else 33), extents.take(1)) for number in range(50)]
    while extents.take(1) is not None:
        pass
    for number, (start, _) in enumerate(runs):
        extents.give(start, 34 if number == 25 else 33)
    assert extents.take(34) == runs[25][0]
    assert extents.take(34) is None


def test_costs_the_same_however_many_runs_there_are():
    """Counts steps of the interpreter, which do not depend on the machine."""
    import sys

    def steps(runs):
        extents = Extents(4 * runs)
        for start in [extents.take(2) for _ in range(2 * runs)][::2]:
            extents.give(start, 2)
        lines = 0

        def count(frame, event, arg):
            nonlocal lines
            lines += event == "line"
            return count

        old = sys.gettrace()
        sys.settrace(count)
        try:
            start = extents.take(1)
            extents.give(start, 1)
        finally:
            sys.settrace(old)
        return lines

    assert steps(10_000) <= steps(10) + 5
