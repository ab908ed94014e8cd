# SPDX-License-Identifier: MIT
"""How long to poll before going to sleep.

The rule is that of KVM's halt polling: who was woken soon after going to sleep would
have done better to wait awake, so the budget grows; who slept long should not have
waited at all, so it shrinks, down to nothing.

That alone would go on for ever where the message comes soon, but never to somebody who
polls: the peer runs in this very loop, or needs this processor. So polling also has to
earn its keep: hits raise its credit, misses lower it, and without credit it rests, for
twice as many sleeps each time.
"""

__all__ = ["AdaptivePolling"]

_FIRST = 50_000
"""Nanoseconds of the first budget: a peer that has to be woken itself answers in so long."""
_LEAST = 20_000
"""Nanoseconds; a smaller budget is none."""
_WAKING = 50e-6
"""Seconds that being woken takes by itself; it is part of every sleep."""
_START_CREDIT = 4
_MOST_CREDIT = 16
_LONGEST_REST = 256
"""Sleeps without a poll before them."""


class AdaptivePolling:
    """The budget of one endpoint.

    ``limit``: seconds to poll at most before a sleep; 0: never. Knows no clock and no
    channel: tell it what came of polling (``hit``, ``missed``) and of sleeping
    (``slept``). Belongs to one thread.
    """

    __slots__ = ("_credit", "_limit", "_rest", "_resting", "_soon", "budget", "hits", "misses",
                 "nanoseconds")

    budget: int
    """Nanoseconds to poll before the next sleep; 0 for going to sleep at once."""

    def __init__(self, limit: float) -> None:
        self._limit = int(limit * 1e9)
        self._soon = limit + _WAKING
        self._credit = _START_CREDIT
        self._rest = 1
        self._resting = 0
        self.budget = 0
        self.hits = 0
        self.misses = 0
        self.nanoseconds = 0

    def hit(self, nanoseconds: int) -> None:
        """Polling has found something after so long."""
        self.hits += 1
        self.nanoseconds += nanoseconds
        if self._credit < _MOST_CREDIT:
            self._credit += 1
            self.budget = min(2 * self.budget, self._limit)
            if self._credit == _MOST_CREDIT:
                self._rest = 1

    def spun(self, hits: int, nanoseconds: int) -> None:
        """In between, for moments that are not worth counting as missed."""
        self.nanoseconds += nanoseconds
        if hits:
            self.hits += hits - 1
            self.hit(0)

    def missed(self, nanoseconds: int) -> None:
        """Polling has found nothing in so long."""
        self.misses += 1
        self.nanoseconds += nanoseconds
        self._credit -= 1
        if not self._credit:
            self.budget = 0
            self._resting = self._rest
            self._rest = min(2 * self._rest, _LONGEST_REST)
            self._credit = _START_CREDIT

    def slept(self, seconds: float) -> None:
        """So long was the sleep that a message has ended."""
        if seconds > self._soon:
            self.budget //= 2
            if self.budget < _LEAST:
                self.budget = 0
        elif self._resting:
            self._resting -= 1
        else:
            self.budget = min(max(2 * self.budget, _FIRST), self._limit)
