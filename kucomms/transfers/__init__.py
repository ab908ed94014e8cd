# SPDX-License-Identifier: MIT
"""Engines: how the bytes of a pool get to descriptors and back."""

from __future__ import annotations

import errno
import os

from kucomms._pool_memory import PoolMemory
from kucomms.exceptions import UsageError
from kucomms.transfers.base import Complete, Engine
from kucomms.transfers.io_uring import UringEngine
from kucomms.transfers.threads import ThreadEngine

__all__ = ["open_engine"]

_WHY = {
    errno.EPERM: " (a container's seccomp profile, or sysctl kernel.io_uring_disabled)",
    errno.ENOSYS: " (the kernel has none, or a container's seccomp profile)",
    errno.ENOMEM: " (perhaps the limit of locked memory, ulimit -l)",
    errno.EINVAL: " (this needs Linux 6.1)",
}


def open_engine(memory: PoolMemory, complete: Complete) -> Engine:
    """An engine for the running loop: io_uring where it is allowed, or threads.

    ``KUCOMMS_IO=threads`` in the environment chooses threads; ``KUCOMMS_IO=io_uring``
    makes it an error when that cannot be had. Raises OSError.
    """
    wanted = os.environ.get("KUCOMMS_IO", "")
    if wanted not in ("", "io_uring", "threads"):
        raise UsageError(f"KUCOMMS_IO is io_uring, threads or not set at all, not {wanted!r}")
    reason = "KUCOMMS_IO says so"
    if wanted != "threads":
        try:
            return UringEngine(memory, complete)
        except OSError as error:
            number = error.errno or 0
            reason = f"no io_uring: {os.strerror(number)}{_WHY.get(number, '')}"
            if wanted:
                raise OSError(number, reason) from error
    return ThreadEngine(memory, complete, reason)
