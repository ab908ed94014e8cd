# SPDX-License-Identifier: MIT
"""The log of the library, which is structlog's.

It is imported when there is something to say: that takes as long as importing all the rest, and
most programs never say anything. Who wants no delay then imports structlog beforehand.
"""

from __future__ import annotations

import functools
import sys
import traceback
from typing import Any

to_stderr = False
"""For programs whose standard output is for what was asked for. Set before anything is logged."""


@functools.cache
def _logger() -> Any:
    import structlog

    if to_stderr:
        structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
    return structlog.get_logger("kucomms")


def _say(level: str, event: str, fields: dict[str, Any]) -> None:
    try:
        logger = _logger()
    except (ImportError, OSError, MemoryError):  # what is told may be just that: no descriptors
        error = fields.pop("exc_info", None)
        details = " ".join(f"{name}={value!r}" for name, value in fields.items())
        print(f"kucomms {level}: {event} {details}", file=sys.stderr)
        if error is not None:
            traceback.print_exception(error)
        return
    getattr(logger, level)(event, **fields)


def warning(event: str, **fields: Any) -> None:
    """Log what a user should look at."""
    _say("warning", event, fields)


def error(event: str, **fields: Any) -> None:
    """Log what went wrong; ``exc_info``: the exception."""
    _say("error", event, fields)
