# SPDX-License-Identifier: MIT
"""multiprocessing.Pipe, with bytes: no pickling."""

import time

from bench.contestants.base import Contestant
from bench.pair import CONTEXT


class Pipe(Contestant):
    """A duplex connection, which is a Unix socket pair."""

    name = "multiprocessing.Pipe"

    def open(self, _meeting, _size):
        """Both ends are inherited."""
        return CONTEXT.Pipe()

    def close(self, ends):
        """Close our copies."""
        for end in ends:
            end.close()

    def send(self, _meeting, end, sending):
        """See the base."""
        for run in sending:
            for data in run.messages():
                end.send_bytes(data)

    def receive(self, _meeting, end, receiving):
        """See the base."""
        take = receiving.take
        for _ in range(receiving.total):
            take(end.recv_bytes())

    def ping(self, _meeting, end, trips):
        """See the base."""
        for _ in trips.times():
            if trips.pause:
                time.sleep(trips.pause)
            begin = time.perf_counter_ns()
            end.send_bytes(trips.data)
            trips.add(begin, end.recv_bytes())

    def pong(self, _meeting, end, trips):
        """See the base."""
        for _ in trips.times():
            end.send_bytes(end.recv_bytes())


CONTESTANTS = [Pipe()]
