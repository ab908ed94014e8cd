# SPDX-License-Identifier: MIT
"""A producer and a consumer task in one loop, 64 B: kucomms' inproc links and asyncio.Queue."""

from bench.groups.throughput import Stream


def jobs(options):
    """Every contestant that has both sides in one process."""
    return [
        Stream(contestant, 64, options, group="inproc")
        for contestant in options.chosen() if contestant.solo
    ], []
