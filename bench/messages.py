# SPDX-License-Identifier: MIT
"""What is sent and how it is counted: the same in every contestant.

A session sends several *runs* one after the other over one connection, without a pause.
Both sides know them beforehand. The first is the warm-up: the receiver's clock for a run
starts when the last message of the run before was handled.
"""

import time
from dataclasses import dataclass
from itertools import repeat

BATCH = 128
"""Messages in a step of contestants that send many at once."""

_PATTERN = bytes(value * 167 % 251 for value in range(251))


def room_for(size):
    """Bytes between the two sides, for contestants whose queue has a size in bytes."""
    return max(1 << 20, 4 << (size + 32 - 1).bit_length())


def queue_length(size):
    """The same for those that count messages: as many as fit into kucomms' ring."""
    return room_for(size) // (size + 32)


def numbered(size, number):
    """The message of this number: number, then a pattern that depends on it."""
    shift = number % 251
    pattern = (_PATTERN * ((size + shift) // 251 + 1))[shift : shift + size - 8]
    return number.to_bytes(8, "little") + pattern


@dataclass(frozen=True)
class Run:
    """So many messages of a size; with ``verify`` each is another, and compared in full."""

    size: int
    count: int
    verify: bool = False

    def messages(self):
        """The messages one by one."""
        if self.verify:
            return (numbered(self.size, number) for number in range(self.count))
        return repeat(numbered(self.size, 0), self.count)

    def batches(self, length=BATCH):
        """The messages in lists."""
        if self.verify:
            for start in range(0, self.count, length):
                end = min(start + length, self.count)
                yield [numbered(self.size, number) for number in range(start, end)]
            return
        batch = [numbered(self.size, 0)] * length
        yield from repeat(batch, self.count // length)
        if self.count % length:
            yield batch[: self.count % length]


class Sending:
    """The sender's side: iterate over it for the runs; it notes the CPU time of each."""

    def __init__(self, runs):
        self.runs = runs
        self.cpu = []
        """Seconds for each run."""

    def __iter__(self):
        """Each run in turn; it counts as sent when the next one is asked for."""
        for run in self.runs:
            begin = time.process_time()
            yield run
            self.cpu.append(time.process_time() - begin)


class Receiving:
    """The receiver's side: counts, checks lengths, compares where asked, and takes times.

    ``take(data)`` is called for each message; ``handle`` does the same as a handler of a
    kucomms endpoint. After the last one ``done()`` is called, if a contestant sets it.
    """

    def __init__(self, runs):
        self.total = sum(run.count for run in runs)
        self.size = runs[0].size
        self.done = None
        self.wall = []
        self.cpu = []
        """Seconds for each run; those of the first mean nothing."""
        self.take, self.handle = self._takers(list(runs))

    def _takers(self, runs):
        run = runs.pop(0)
        size, left, verify = run.size, run.count, run.verify
        began = time.perf_counter(), time.process_time()

        def wrong(data):
            raise AssertionError(f"a message of {len(data)} bytes instead of {size}")

        def compare(data):
            if data != numbered(size, run.count - left):
                raise AssertionError(f"message {run.count - left} of {size} bytes differs")

        def next_run():
            nonlocal run, size, left, verify, began
            now = time.perf_counter(), time.process_time()
            self.wall.append(now[0] - began[0])
            self.cpu.append(now[1] - began[1])
            began = now
            if runs:
                run = runs.pop(0)
                size, left, verify = run.size, run.count, run.verify
            elif self.done is not None:
                self.done()

        def take(data):
            nonlocal left
            if len(data) != size:
                wrong(data)
            if verify:
                compare(data)
            left -= 1
            if not left:
                next_run()

        async def handle(message, _link):
            nonlocal left
            data = message.data
            if len(data) != size:
                wrong(data)
            if verify:
                compare(data)
            left -= 1
            if not left:
                next_run()

        return take, handle


class Trips:
    """The client's side of a round trip: how many, with what pause, and how long each took.

    The first tenth is the warm-up; ``warm`` is called at its end, ``over`` after the
    last trip, if they are set.
    """

    def __init__(self, count, pause, size=64):
        self.count = count
        self.pause = pause
        self.warm_up = count // 10
        self.total = self.count + self.warm_up
        self.data = numbered(size, 0)
        self.nanoseconds = []
        self.warm = self.over = None

    def times(self):
        """To iterate over: a number for each trip."""
        return range(self.total)

    def add(self, begin, reply):
        """Note the trip that began at ``begin`` (perf_counter_ns)."""
        now = time.perf_counter_ns()
        if len(reply) != len(self.data):
            raise AssertionError(f"a reply of {len(reply)} bytes")
        self.nanoseconds.append(now - begin)
        done = len(self.nanoseconds)
        if done == self.warm_up and self.warm is not None:
            self.warm()
        elif done == self.total and self.over is not None:
            self.over()

    def taken(self):
        """The times without those of the warm-up."""
        return self.nanoseconds[self.warm_up :]
