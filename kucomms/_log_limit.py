# SPDX-License-Identifier: MIT
"""What a peer can provoke as often as it likes must not fill the log, or cost the loop."""

from __future__ import annotations

import math
from time import monotonic

__all__ = ["LogLimit"]

_EVERY = 1.0
"""Seconds between two entries of a kind."""


class LogLimit:
    """Allows one entry a second. ``skipped``: how many there were beside it."""

    def __init__(self) -> None:
        self.skipped = 0
        self._last = -math.inf

    def due(self) -> bool:
        """Whether it may be logged; if not, it is counted."""
        if monotonic() - self._last >= _EVERY:
            return True
        self.skipped += 1
        return False

    def logged(self) -> None:
        """It was, which may have taken a while."""
        self._last = monotonic()
        self.skipped = 0
