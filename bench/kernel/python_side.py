# SPDX-License-Identifier: MIT
"""The user's side in Python; its arguments and its output are those of the C program.

``python-many`` sends a burst with ``send_many``, ``python`` each message with ``send``; both
receive in a handler.
"""

import asyncio
import ctypes
import fcntl
import json
import os
import statistics
import struct
import sys

import kucomms

# As in module/kbench.h.
SIZE = 1024
WORDS = SIZE // 8
KUCOMMS = 8
TO_KERNEL, TO_USER = 0, 1
START = struct.Struct("<IIIiII")
BURST = struct.Struct("<QQIIII")
URL = "kernel://kbench"
CONTROL = "/dev/kbench"
WARM_UP = 4

MASK = (1 << 64) - 1
STAMP = struct.Struct("<Q")
ALL = struct.Struct(f"<{WORDS}Q")


def _ioctl_number(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | ord("k") << 8 | number


IOC_START = _ioctl_number(1, 0, START.size)
IOC_ARM = _ioctl_number(1, 1, BURST.size)
IOC_FINISH = _ioctl_number(2, 3, BURST.size)


def pattern(number: int) -> bytes:
    """Every byte of a message."""
    base = (number + 1) * 0x9E3779B97F4A7C15
    words = [(base + i * 0xBF58476D1CE4E5B9) & MASK for i in range(WORDS)]
    words[0] = number
    words[-1] = number ^ MASK
    return ALL.pack(*words)


class Bench:
    """A run: the control device, and the cycles of each burst."""

    def __init__(self, direction: int, count: int, *, full: bool, counter: str):
        self.cycles = ctypes.CDLL(counter).cycles
        self.cycles.restype = ctypes.c_uint64
        self.count = count
        self.full = full
        self.direction = direction
        self.control = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
        self.user: list[float] = []
        self.kernel: list[float] = []

    def start(self) -> None:
        """Begin, when the link is there."""
        fcntl.ioctl(
            self.control, IOC_START, START.pack(KUCOMMS, self.direction, self.full, -1, 0, 0)
        )

    def arm(self, first: int) -> None:
        """Have the kernel's side wait for a burst, or send one when we sleep."""
        fcntl.ioctl(self.control, IOC_ARM, BURST.pack(first, 0, self.count, 0, 0, 0))

    def finish(self) -> None:
        """Wait for the kernel's side, and note what it took."""
        done = fcntl.ioctl(self.control, IOC_FINISH, bytes(BURST.size))
        _first, cycles, _count, timed, _inside, _reserved = BURST.unpack(done)
        if timed < self.count - 1:
            raise SystemExit("the kernel's side has not seen all messages")
        self.kernel.append(cycles / timed)

    def stamp(self, message: bytearray, number: int) -> None:
        """What is written to each message."""
        if self.full:
            message[:] = pattern(number)
            return
        STAMP.pack_into(message, 0, number)
        STAMP.pack_into(message, SIZE - 8, number ^ MASK)

    def check(self, data: bytes, number: int) -> None:
        """What is looked at in each message."""
        if self.full:
            good = data == pattern(number)
        else:
            good = (
                len(data) == SIZE
                and STAMP.unpack_from(data, 0)[0] == number
                and STAMP.unpack_from(data, SIZE - 8)[0] == number ^ MASK
            )
        if not good:
            raise SystemExit(f"message {number} is not as it was sent")

    def report(self) -> None:
        """A line of JSON."""
        user, kernel = self.user[WARM_UP:], self.kernel[WARM_UP:]
        print(
            json.dumps(
                {
                    "user_cycles": statistics.median(user),
                    "kernel_cycles": statistics.median(kernel),
                    "user_least": min(user),
                    "kernel_least": min(kernel),
                }
            )
        )


async def send_bursts(bench: Bench, bursts: int, *, many: bool) -> None:
    """Send to the kernel."""
    messages = [bytearray(pattern(0)) for _ in range(bench.count)]
    async with kucomms.connect(URL) as link:
        bench.start()
        for burst in range(bursts):
            first = burst * bench.count
            bench.arm(first)
            begin = bench.cycles()
            if many:
                for i, message in enumerate(messages):
                    bench.stamp(message, first + i)
                await link.send_many(messages)
            else:
                for i, message in enumerate(messages):
                    bench.stamp(message, first + i)
                    await link.send(message)
            taken = bench.cycles() - begin
            bench.finish()
            bench.user.append(taken / bench.count)


async def receive_bursts(bench: Bench, bursts: int) -> None:
    """Receive from the kernel, in a handler; timed from a burst's first message to its last."""
    endpoint = kucomms.Endpoint("bench")
    failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    seen = 0
    begin = 0
    done = asyncio.Event()

    @endpoint.on_message
    def message(message: kucomms.Message, _link: kucomms.Link) -> None:
        nonlocal seen, begin
        place = seen % bench.count
        if not place:
            bench.finish()
            begin = bench.cycles()
        elif place == bench.count - 1:
            bench.user.append((bench.cycles() - begin) / (bench.count - 1))
            done.set()
        bench.check(message.data, seen)
        seen += 1

    @endpoint.on_error
    def error(error: BaseException, _name: str) -> None:
        if not failed.done():
            failed.set_exception(error)

    async with endpoint:
        await endpoint.connect(URL, timeout=5.0)
        bench.start()
        for burst in range(bursts):
            done.clear()
            bench.arm(burst * bench.count)
            waiter = asyncio.ensure_future(done.wait())
            await asyncio.wait({waiter, failed}, return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                failed.result()


def main() -> None:
    """See the module."""
    mechanism, direction, bursts, count, how, counter = sys.argv[1:]
    to_user = direction == "to-user"
    os.sched_setaffinity(0, {0})
    bench = Bench(
        TO_USER if to_user else TO_KERNEL, int(count), full=how == "full", counter=counter
    )
    number = WARM_UP + int(bursts)
    if to_user:
        asyncio.run(receive_bursts(bench, number))
    else:
        asyncio.run(send_bursts(bench, number, many=mechanism == "python-many"))
    bench.report()


if __name__ == "__main__":
    main()
