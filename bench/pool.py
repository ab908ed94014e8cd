# SPDX-License-Identifier: MIT
"""Pools beside threads: requests per second and CPU time, of reads and writes of a file.

And what it costs to hand a buffer to a peer with a message.

Each contestant does the same transfers, of blocks at random places of one file, with 64 in
flight, under uvloop::

    python -m bench.pool docs/bench-pool.md

Rounds are interleaved, every second one backwards; the table shows medians.
"""

import asyncio
import mmap
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

import kucomms
from bench.markdown import table

IN_FLIGHT = 64
SIZES = (4 << 10, 64 << 10, 1 << 20)
KINDS = {
    "read": ("Reads from the page cache", os.O_RDONLY),
    "write": ("Writes to the page cache", os.O_RDWR),
    "read direct": ("Reads with O_DIRECT", os.O_RDONLY | os.O_DIRECT),
}


async def pool_await(fd, offsets, size, write):
    """64 tasks that await ``pool.read`` or ``pool.write``."""
    places = iter(offsets)

    async def work(pool):
        transfer = pool.write if write else pool.read
        with pool.allocate(size) as buffer:
            for offset in places:
                assert await transfer(fd, buffer, offset) == size

    async with kucomms.open_pool(IN_FLIGHT * max(size, mmap.PAGESIZE)) as pool:
        yield
        await asyncio.gather(*(work(pool) for _ in range(IN_FLIGHT)))
        yield


async def pool_submit(fd, offsets, size, write):
    """One task that submits, with tags, and takes the completions."""
    places = iter(offsets)
    async with kucomms.open_pool(IN_FLIGHT * max(size, mmap.PAGESIZE)) as pool:
        submit = pool.submit_write if write else pool.submit_read
        buffers = [pool.allocate(size) for _ in range(IN_FLIGHT)]
        yield
        for number, offset in zip(range(IN_FLIGHT), places, strict=False):
            submit(fd, buffers[number], offset, tag=number)
        async for completion in pool.completions():
            assert completion.result == size
            offset = next(places, None)
            if offset is not None:
                submit(fd, buffers[completion.tag], offset, tag=completion.tag)
        yield
        for buffer in buffers:
            buffer.free()


async def to_thread(fd, offsets, size, write):
    """64 tasks that await ``asyncio.to_thread(os.preadv, ...)``."""
    places = iter(offsets)
    call = os.pwritev if write else os.preadv

    async def work():
        memory = mmap.mmap(-1, size)
        for offset in places:
            assert await asyncio.to_thread(call, fd, [memory], offset) == size
        memory.close()

    await asyncio.to_thread(int)
    yield
    await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
    yield


async def threads(fd, offsets, size, write):
    """As many threads as asyncio has, that call ``os.preadv`` in a loop, without a loop."""
    number = min(32, (os.cpu_count() or 1) + 4)
    call = os.pwritev if write else os.preadv

    def work(share):
        memory = mmap.mmap(-1, size)
        for offset in share:
            assert call(fd, [memory], offset) == size
        memory.close()

    with ThreadPoolExecutor(number) as executor:
        yield
        list(executor.map(work, [offsets[start::number] for start in range(number)]))
        yield


CONTESTANTS = {
    "pool, submit": (pool_submit, "io_uring"),
    "pool, await": (pool_await, "io_uring"),
    "pool, await, engine threads": (pool_await, "threads"),
    "asyncio.to_thread": (to_thread, None),
    "plain threads": (threads, None),
}


def sample(name, path, kind, size, number):
    """Requests per second, and CPU seconds per MiB, of one run."""
    contestant, engine = CONTESTANTS[name]
    if engine:
        os.environ["KUCOMMS_IO"] = engine
    rng = random.Random(1)  # noqa: S311
    blocks = os.path.getsize(path) // size
    offsets = [rng.randrange(blocks) * size for _ in range(number)]

    async def run():
        fd = os.open(path, KINDS[kind][1])
        try:
            steps = contestant(fd, offsets, size, kind == "write")
            await anext(steps)
            wall, cpu = time.perf_counter(), time.process_time()
            await anext(steps)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            await anext(steps, None)
        finally:
            os.close(fd)
        return number / wall, cpu / (number * size / (1 << 20))

    return kucomms.run(run())


def measure(directory, rounds, amount, file_mebibytes):
    """(kind, size, name): list of samples."""
    cases = [(kind, size, name) for kind in KINDS for size in SIZES for name in CONTESTANTS]
    found = {case: [] for case in cases}
    with tempfile.TemporaryDirectory(dir=directory) as inside:
        path = Path(inside, "file")
        with path.open("wb") as file:
            for _ in range(file_mebibytes):
                file.write(os.urandom(1 << 20))
            os.fsync(file.fileno())
        for number in range(rounds):
            for kind, size, name in cases if number % 2 == 0 else reversed(cases):
                count = max(amount // size, 4 * IN_FLIGHT)
                try:
                    found[kind, size, name].append(sample(name, path, kind, size, count))
                except OSError as error:
                    click.echo(f"{kind}, {name}: left out: {error}")
            click.echo(f"round {number + 1} of {rounds}")
    return found


# ---- by reference -------------------------------------------------------------

LOADS = {
    "message of 64 B": (64, 0),
    "message of 1 MiB": (1 << 20, 0),
    "buffer of 64 B": (0, 64),
    "buffer of 1 MiB": (0, 1 << 20),
}
LINKS = {"inproc://, one loop": "inproc", "shm://, two processes": "shm"}
RING_SIZE = 1 << 22
IN_A_ROW = 100
AT_MOST = 1.2
"""Handing over 1 MiB is to cost so much of what handing over 64 bytes costs."""


async def serve(url, ready):
    """Sends everything back, until the other side closes."""
    async with kucomms.Endpoint("echo") as endpoint:
        over = asyncio.get_running_loop().create_future()
        endpoint.on_link_close(lambda _link, _error: over.done() or over.set_result(None))
        endpoint.on_message(lambda message, link: link.send(message, buffers=message.buffers))
        await endpoint.listen(url, ring_size=RING_SIZE)
        ready()
        await over


async def there_and_back(link, pool, message, buffer_size):
    """Microseconds of a round trip; a buffer is allocated for each, and freed after it."""
    begin = time.perf_counter()
    for _ in range(IN_A_ROW):
        if buffer_size:
            await link.send(message, buffers=pool.allocate(buffer_size))
            (await link.receive()).buffers[0].free()
        else:
            await link.send(message)
            await link.receive()
    return (time.perf_counter() - begin) / IN_A_ROW * 1e6


async def handing(scheme, samples):
    """Samples of each load, in turn, over one link."""
    url = f"{scheme}://bench_pool_{os.getpid()}"
    echo = process = None
    if scheme == "inproc":
        listening = asyncio.Event()
        echo = asyncio.create_task(serve(url, listening.set))
        await listening.wait()
    else:
        process = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-c", f"import bench.pool; bench.pool.echo({url!r})"]
        )
    try:
        found = {load: [] for load in LOADS}
        async with kucomms.connect(url, timeout=30) as link:
            pool = await link.open_pool(8 << 20)
            for turn in range(samples):
                for load in LOADS if turn % 2 == 0 else reversed(LOADS):
                    data, buffer_size = LOADS[load]
                    sample = await there_and_back(link, pool, bytes(data), buffer_size)
                    found[load].append(sample)
        return found
    finally:
        if echo is not None:
            await echo
        if process is not None:
            process.wait()


def echo(url):
    """The second process."""
    kucomms.run(serve(url, lambda: None))


def measure_handing(rounds, samples):
    """(link, load): list of samples."""
    found = {(link, load): [] for link in LINKS for load in LOADS}
    for _ in range(rounds):
        for link, scheme in LINKS.items():
            for load, some in kucomms.run(handing(scheme, samples)).items():
                found[link, load].extend(some)
    return found


def handing_section(found):
    """Its part of the page."""
    yield ""
    yield "## Buffers in messages"
    yield ""
    yield (
        "Microseconds of a round trip: sent, and sent back by a message handler. A buffer is "
        "allocated before it and freed after it; nobody touches its bytes. A message has its "
        f"data copied four times. The least of many samples of {IN_A_ROW} round trips each, "
        "taken in turn: what else runs on the machine only adds to that."
    )
    yield ""
    rows = []
    outcomes = []
    for link in LINKS:
        cost = {load: min(found[link, load]) for load in LOADS}
        ratio = cost["buffer of 1 MiB"] / cost["buffer of 64 B"]
        outcome = "met" if ratio <= AT_MOST else "missed"
        outcomes.append([link, f"at most {AT_MOST} x", f"{ratio:.2f} x", outcome])
        rows.append(
            [link]
            + [f"{cost[load]:,.1f}" for load in LOADS]
            + [
                f"{ratio:.2f}",
                f"{cost['buffer of 1 MiB'] / cost['message of 64 B']:.2f}",
            ]
        )
    head = ["", *LOADS, "buffer 1 MiB / 64 B", "buffer 1 MiB / message 64 B"]
    yield from table(head, rows)
    head = ["a buffer of 1 MiB, to one of 64 B", "wanted", "measured", ""]
    yield from list(table(head, outcomes))[:-1]


def page(found, rounds, file_mebibytes, handed):
    """The lines of the page."""
    yield "# Pools beside threads"
    yield ""
    yield (
        f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, "
        f"medians of {rounds} rounds, interleaved. Blocks at random places of a file of "
        f"{file_mebibytes} MiB, {IN_FLIGHT} in flight (plain threads: "
        "one for each thread). "
        "CPU time is that of the process, the kernel's threads for its io_uring included. The "
        "machine is shared and was busy: read the ratios. How to repeat it:"
    )
    yield ""
    yield "```sh"
    yield "make bench-pool"
    yield "```"
    for kind, (title, _) in KINDS.items():
        yield ""
        yield f"## {title}"
        yield ""
        head = [""]
        for size in SIZES:
            head += [f"{size >> 10} KiB: requests/s", "CPU ms per MiB"]
        rows = []
        for name in CONTESTANTS:
            row = [name]
            for size in SIZES:
                samples = found[kind, size, name]
                if samples:
                    rate, cpu = (statistics.median(values) for values in zip(*samples, strict=True))
                    row += [f"{rate:,.0f}", f"{cpu * 1000:.2f}"]
                else:
                    row += ["-", "-"]
            rows.append(row)
        yield from list(table(head, rows))[:-1]
    yield from handing_section(handed)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--file-mebibytes", type=click.IntRange(1), default=256, show_default=True)
@click.option("--mebibytes", type=click.IntRange(1), default=64, show_default=True,
              help="Moved in each sample, but at least 256 requests.")
@click.option("--samples", type=click.IntRange(1), default=20, show_default=True,
              help="Of each kind of message with and without buffers, in each round.")
@click.option("--directory", type=click.Path(file_okay=False), default=".", show_default=True,
              help="Where the file is made: the disk that is measured.")
def main(target, rounds, file_mebibytes, mebibytes, samples, directory):
    """Measure pools and threads, and write the page TARGET."""
    found = measure(directory, rounds, mebibytes << 20, file_mebibytes)
    handed = measure_handing(rounds, samples)
    notes = target.read_text().partition("\n<!-- notes -->\n")[2] if target.exists() else ""
    text = "\n".join(page(found, rounds, file_mebibytes, handed)) + "\n"
    target.write_text(text + (f"\n<!-- notes -->\n{notes}" if notes else ""))


if __name__ == "__main__":
    main(prog_name="python -m bench.pool")
