# SPDX-License-Identifier: MIT
"""One module for each peer; ``contestants()`` has them all in the order of the tables."""

from importlib import import_module

MODULES = (
    "kucomms_shm",
    "kucomms_inproc",
    "asyncio_queue",
    "asyncio_unix",
    "pyzmq",
    "pynng_pair",
    "mp_pipe",
    "fifo",
    "iceoryx",
    "event_fd",
)


def contestants():
    """Every contestant, an object each. Does not import the peers."""
    found = []
    for module in MODULES:
        found += import_module(f"bench.contestants.{module}").CONTESTANTS
    return found
