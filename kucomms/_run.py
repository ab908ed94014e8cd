# SPDX-License-Identifier: MIT
"""Small helpers of the package's top."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["get_include", "run"]

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T], *, debug: bool | None = None) -> T:
    """As ``asyncio.run``, on uvloop."""
    import uvloop

    with asyncio.Runner(debug=debug, loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def get_include() -> str:
    """The directory to give to a C or C++ compiler with -I, for ``kucomms/client.h``."""
    return str(Path(__file__).resolve().parent / "include")
