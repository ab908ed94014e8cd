# SPDX-License-Identifier: MIT
"""Extents: which pages of a pool are free."""

from __future__ import annotations

__all__ = ["Extents"]

_FINE = 4
"""Each power of two is divided into 2**_FINE classes of size."""


class Extents:
    """Hands out runs of pages, and joins them again when they come back.

    Two-level segregated fit: the free runs are sorted by size into classes, sixteen for
    each power of two, and a bit for each class says whether it has any. So taking and
    giving back take a few steps, however many runs there are. Only when nothing larger is
    left, the class that a run of this size would itself be in is searched: it may have one
    that fits, and a run that fits is always found.
    """

    def __init__(self, pages: int) -> None:
        self._length: dict[int, int] = {}  # of each free run, by its first page
        self._start: dict[int, int] = {}  # by the page behind it
        self._classes: dict[int, dict[int, None]] = {}  # first pages of the runs in each
        self._filled = 0  # a bit for each class that is not empty
        if pages:
            self._add(0, pages)

    def take(self, pages: int) -> int | None:
        """The first of so many pages in a row; None when there are none."""
        own = _class_of(pages)
        # in any class above, and in its own if that begins with this size, every run fits
        first = own if _least_of(own) == pages else own + 1
        larger = self._filled >> first
        if larger:
            found = first + (larger & -larger).bit_length() - 1
            start, _ = self._classes[found].popitem()  # not iter(): that steps over what was
        else:
            fitting = (run for run in self._classes.get(own, ()) if self._length[run] >= pages)
            candidate = next(fitting, None)
            if candidate is None:
                return None
            start = candidate
        length = self._remove(start)
        if length > pages:
            self._add(start + pages, length - pages)
        return start

    def give(self, start: int, pages: int) -> None:
        """These are free again."""
        before = self._start.get(start)
        if before is not None:
            pages += self._remove(before)
            start = before
        if start + pages in self._length:
            pages += self._remove(start + pages)
        self._add(start, pages)

    def runs(self) -> list[tuple[int, int]]:
        """First page and length of each free run, in order."""
        return sorted(self._length.items())

    def _add(self, start: int, pages: int) -> None:
        self._length[start] = pages
        self._start[start + pages] = start
        number = _class_of(pages)
        self._classes.setdefault(number, {})[start] = None
        self._filled |= 1 << number

    def _remove(self, start: int) -> int:
        pages = self._length.pop(start)
        del self._start[start + pages]
        number = _class_of(pages)
        members = self._classes[number]
        members.pop(start, None)
        if not members:
            del self._classes[number]
            self._filled &= ~(1 << number)
        return pages


def _class_of(pages: int) -> int:
    """Number of the class that runs of this length are in; longer runs, higher numbers."""
    shift = max(pages.bit_length() - 1 - _FINE, 0)
    return (shift << _FINE) + (pages >> shift)


def _least_of(number: int) -> int:
    """The shortest length in a class."""
    shift = max((number >> _FINE) - 1, 0)
    return (number - (shift << _FINE)) << shift
