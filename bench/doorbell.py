# SPDX-License-Identifier: MIT
"""Which doorbell, a byte on a Unix socket or an eventfd.

Measures, in C-speed Python calls: ringing a bell that nobody waits for, hearing it, and
the round trip between two processes that sleep in epoll on one or the other. Repeats,
interleaves the two, and prints medians::

    python bench/doorbell.py
"""

import os
import select
import socket
import statistics
import time

ROUNDS = 7
BELLS = 20_000
TRIPS = 3_000


class Socket:
    """A byte on a stream socket."""

    name = "socket byte"

    def __init__(self) -> None:
        self.ends = socket.socketpair()
        for end in self.ends:
            end.setblocking(False)

    def bells(self, side):
        """Return ring, hear and fd of one side."""
        end = self.ends[side]
        return (
            lambda: end.send(b"\1", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL),
            lambda: end.recv(4096),
            end.fileno(),
        )


class EventFd:
    """An eventfd for each direction."""

    name = "eventfd"

    def __init__(self) -> None:
        self.fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]

    def bells(self, side):
        """Return ring, hear and fd of one side."""
        mine, theirs = self.fds[side], self.fds[1 - side]
        return (lambda: os.eventfd_write(theirs, 1), lambda: os.eventfd_read(mine), mine)


def ring_and_hear(bell):
    """Nanoseconds for ringing and hearing, both in this process."""
    ring, _hear, _fd = bell.bells(0)
    _ring, hear, _fd = bell.bells(1)
    begin = time.perf_counter_ns()
    for _ in range(BELLS):
        ring()
        hear()
    return (time.perf_counter_ns() - begin) / BELLS


def round_trip(bell):
    """Nanoseconds for waking another process that sleeps, and being woken by it."""
    child = os.fork()
    ring, hear, fd = bell.bells(1 if child == 0 else 0)
    epoll = select.epoll()
    epoll.register(fd, select.EPOLLIN)
    if child == 0:
        for _ in range(TRIPS):
            epoll.poll()
            hear()
            ring()
        os._exit(0)
    begin = time.perf_counter_ns()
    for _ in range(TRIPS):
        ring()
        epoll.poll()
        hear()
    taken = (time.perf_counter_ns() - begin) / TRIPS
    os.waitpid(child, 0)
    return taken


def main() -> None:
    """Print the medians."""
    results = {}
    for _ in range(ROUNDS):
        for kind in (Socket, EventFd):
            for what, measure in (("ring + hear", ring_and_hear), ("round trip", round_trip)):
                results.setdefault((what, kind.name), []).append(measure(kind()))
    print(f"{'':14}{'median ns':>12}{'min':>10}{'max':>10}")
    for (what, name), values in sorted(results.items()):
        print(f"{what:12} {name:12}{statistics.median(values):>10.0f}"
              f"{min(values):>10.0f}{max(values):>10.0f}")


if __name__ == "__main__":
    main()
