# SPDX-License-Identifier: MIT
"""Periodic calls on absolute deadlines.

The n-th deadline of a ticker is ``start + n / hz``: late calls do not shift the
later ones, so there is no drift. When one or more deadlines pass while something
else runs, the call is made once, the others are counted as missed, and the next
deadline is the next one of the grid that still lies ahead: never a burst.
"""

import math
import time

__all__ = ["Scheduler", "Ticker"]


class Ticker:
    """One periodic deadline.

    ``hz``: calls per second, more than 0. Times are those of ``time.monotonic()``,
    in seconds. Belongs to one thread.
    """

    __slots__ = ("_index", "_start", "deadline", "jitter_max", "jitter_sum", "missed", "period",
                 "ticks")

    def __init__(self, hz: float, now: float) -> None:
        if not (hz > 0 and math.isfinite(hz)):
            raise ValueError(f"a rate must be a number above 0, not {hz!r}")
        self.period = 1.0 / hz
        self.ticks = 0
        self.missed = 0
        self.jitter_sum = 0.0
        self.jitter_max = 0.0
        self.restart(now)

    def restart(self, now: float) -> None:
        """Begin a new grid at ``now``; the first deadline is a period later."""
        self._start = now
        self._index = 1
        self.deadline = now + self.period

    def due(self, now: float) -> bool:
        """Whether the call is due; if so, it counts as made at ``now``."""
        late = now - self.deadline
        if late < 0:
            return False
        behind = math.floor(late / self.period)
        self._index += behind + 1
        self.deadline = self._start + self._index * self.period
        if self.deadline <= now:  # rounding of the division above
            self._index += 1
            behind += 1
            self.deadline = self._start + self._index * self.period
        self.missed += behind
        self.ticks += 1
        self.jitter_sum += late
        self.jitter_max = max(self.jitter_max, late)
        return True


class Scheduler:
    """Several tickers and the nearest of their deadlines.

    It calls nothing itself: ask ``next_deadline``, wait until then, and ask each
    ticker whether it is due. Belongs to one thread.
    """

    def __init__(self) -> None:
        self._tickers: dict[str, Ticker] = {}
        self.next_deadline = math.inf

    def start(self, name: str, hz: float) -> None:
        """Add the ticker ``name``, from now on. One that is there goes on."""
        if name not in self._tickers:
            self._tickers[name] = Ticker(hz, time.monotonic())
            self._update()

    def stop(self) -> None:
        """No more deadlines. The counts stay readable."""
        self.next_deadline = math.inf

    def due(self, now: float) -> list[str]:
        """The names of those that are due at ``now``, in the order they were added."""
        if now < self.next_deadline:
            return []
        names = [name for name, ticker in self._tickers.items() if ticker.due(now)]
        self._update()
        return names

    def ticker(self, name: str) -> Ticker | None:
        """The ticker ``name``, for its counts."""
        return self._tickers.get(name)

    def _update(self) -> None:
        self.next_deadline = min(ticker.deadline for ticker in self._tickers.values())
