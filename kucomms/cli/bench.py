# SPDX-License-Identifier: MIT
"""``kucomms bench``: how fast kucomms is on this machine.

Two processes go through the same list of jobs, each job with endpoints and a link of its
own. One way, the second process sends and the first one measures; in a round trip the
second one echoes, and each is kept to a CPU of its own: whether the scheduler puts both
on one changes the time by a factor. The first quarter of each job is not counted.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from subprocess import DEVNULL, Popen
from time import monotonic, perf_counter, perf_counter_ns, process_time_ns
from typing import Any

import click
import msgspec

import kucomms
from kucomms import Endpoint, KucommsError, Link, Message, NotReadyError, PeerClosedError
from kucomms.cli import _common as common

__all__ = ["command"]

SIZES, LARGEST = (64, 1 << 10, 64 << 10), 16 << 20
METHODS, ROUND_TRIP, TRIP_SIZE = ("send", "send_many"), "round trip", 64
POINTS = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99_9": 0.999, "max": 1.0}
BATCH = 128  # messages in a send_many, and between two looks at the clock; at most 8 MiB
WARM_UP = 0.25
TYPE_WARM, TYPE_OVER = 1, 2
POLL: float = inspect.signature(Endpoint).parameters["busy_poll"].default
GRACE = 5.0  # seconds that a job may take longer than it should
Row = dict[str, Any]
Second = Popen[bytes] | None  # our second process; None where an echo is there already


class Job(msgspec.Struct, frozen=True):
    """What is measured: send, send_many or round trip."""

    method: str
    size: int
    busy_poll: float


class _Side:
    """One process's side of one job."""

    def __init__(self, job: Job, on_message: Callable[..., Any]) -> None:
        self.job = job
        self.stop = common.Stop()
        self.opened = asyncio.Event()
        self.done = asyncio.Event()
        self.endpoint = Endpoint(
            "bench",
            on_message=on_message,
            on_link_open=lambda _link: self.opened.set(),
            on_link_close=self._closed,
            on_error=self.stop.fail,
            busy_poll=job.busy_poll,
        )

    def _closed(self, _link: Link, error: KucommsError | None) -> None:
        self.stop.error = self.stop.error or error
        self.stop.set()

    async def measure(self, url: str, seconds: float, timeout: float, second: Second) -> None:
        """Connect or be connected to, begin, and wait until all is measured."""
        async with self.endpoint:
            if second is None:
                await self.endpoint.connect(url, timeout=timeout)
            else:
                room = max(1 << 20, 4 * (self.job.size + 32))  # for four messages
                await self.endpoint.listen(url, ring_size=room, max_links=1)
                end = monotonic() + timeout
                while not self.opened.is_set() and not self.stop.asked:
                    if second.poll() is not None or monotonic() > end:  # it has said why
                        raise NotReadyError(f"{url}: the second process did not connect")
                    await self.stop.until(self.opened, 0.1)
            for link in self.endpoint.links if self.job.method == ROUND_TRIP else ():
                await link.send(bytes(self.job.size))
            await self.stop.until(self.done, seconds + GRACE)
            if not self.done.is_set():
                self.stop.raise_error()
                raise NotReadyError(f"{url}: nothing comes back; is 'kucomms echo' there?")


def _pin(index: int) -> None:
    """Keep to the first CPU, or the last; there may be but one."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[index]})


async def _be_second(url: str, jobs: list[Job], seconds: float) -> None:
    async def echo(message: Message, link: Link) -> None:
        await link.send(message)

    for number, job in enumerate(jobs):
        side = _Side(job, echo)
        async with side.endpoint:
            link = await side.endpoint.connect(f"{url}_{number}", timeout=common.CONNECT_TIMEOUT)
            if job.method == ROUND_TRIP:
                _pin(-1)
                await side.stop.wait()
                side.stop.raise_error()
            else:
                await _send(link, job, seconds)


async def _send(link: Link, job: Job, seconds: float) -> None:
    batch = [bytes(job.size)] * max(1, min(BATCH, (8 << 20) // job.size))

    async def send_until(end: float) -> None:
        now = 0.0
        while now < end:
            if job.method == "send_many":
                await link.send_many(batch)
            else:
                for data in batch:
                    await link.send(data)
            now = perf_counter()

    begin = perf_counter()
    await send_until(begin + seconds * WARM_UP)
    await link.send(b"", type=TYPE_WARM)
    cpu = process_time_ns()
    await send_until(begin + seconds)
    await link.send(b"%d" % (process_time_ns() - cpu), type=TYPE_OVER)


async def _one_way(url: str, job: Job, seconds: float, timeout: float, second: Second) -> Row:
    count = sender_cpu = 0
    marks: list[tuple[int, int, int]] = []

    async def on_message(message: Message, _link: Link) -> None:
        nonlocal count, sender_cpu
        if not message.type:
            count += len(message.data) == job.size
            return
        marks.append((count, perf_counter_ns(), process_time_ns()))
        if message.type == TYPE_OVER:
            sender_cpu = int(message.data)
            side.done.set()

    side = _Side(job, on_message)
    await side.measure(url, seconds, timeout, second)
    messages, wall, cpu = (end - begin for begin, end in zip(*marks, strict=True))
    rate = messages / wall * 1e9
    return {
        "method": job.method, "size": job.size, "messages": messages,
        "messages_per_second": round(rate, 1),
        "megabytes_per_second": round(rate * job.size / 1e6, 3),
        "sender_cpu_us": round(sender_cpu / messages / 1e3, 4),
        "receiver_cpu_us": round(cpu / messages / 1e3, 4),
    }


async def _trips(url: str, job: Job, seconds: float, timeout: float, second: Second) -> Row:
    data = bytes(job.size)
    times: list[int] = []
    begin = warm = end = 0

    async def on_message(message: Message, link: Link) -> None:
        nonlocal begin, warm, end
        now = perf_counter_ns()
        if message.data != data:
            raise NotReadyError(f"{url}: what comes back is no echo; is 'kucomms echo' there?")
        if not end:
            warm, end = (now + int(seconds * part * 1e9) for part in (WARM_UP, 1))
        if begin >= warm:
            times.append(now - begin)
        if now >= end and times:
            side.done.set()
        else:
            begin = perf_counter_ns()
            await link.send(data)

    side = _Side(job, on_message)
    if second:
        _pin(0)
    await side.measure(url, seconds, timeout, second)
    times.sort()
    ranks = {name: min(int(len(times) * part), len(times) - 1) for name, part in POINTS.items()}
    return {"size": job.size, "busy_poll": job.busy_poll, "trips": len(times)} | {
        f"{name}_us": round(times[rank] / 1e3, 3) for name, rank in ranks.items()
    }


async def _run(second: Second, url: str, jobs: list[Job], seconds: float, timeout: float) -> Row:
    from rich.console import Console
    from rich.live import Live

    report: Row = {"url": url, "seconds": seconds, "one_way": [], "round_trips": []}
    console = Console(stderr=True, quiet=not common.is_live(sys.stderr))
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for number, job in enumerate(jobs):
            done = f"{number + 1} of {len(jobs)}"
            live.update(f"{done}: {job.method}, {_bytes(job.size)}", refresh=True)
            where = url if second is None else f"{url}_{number}"
            trips = job.method == ROUND_TRIP
            row = await (_trips if trips else _one_way)(where, job, seconds, timeout, second)
            report["round_trips" if trips else "one_way"].append(row)
    return report


async def _with_second(start: list[str], *arguments: Any) -> Row:
    # In a session of its own, so that control-C at the terminal is for us only.
    with Popen(start, stdin=DEVNULL, stdout=DEVNULL, start_new_session=True) as second:  # noqa: ASYNC220
        try:
            return await _run(second, *arguments)
        finally:
            second.kill()


def _bytes(size: int) -> str:
    return f"{size} B" if size % 1024 else f"{size >> 10} KiB"


def _show(report: Row) -> None:
    from rich.console import Console
    from rich.table import Table

    one_way = Table("size", "method", "messages/s", "MB/s", "CPU sender", "CPU receiver")
    one_way.title, one_way.caption = "One way", "CPU time per message in µs, of each side"
    for row in report["one_way"]:
        rates = [f"{row[f'{name}_per_second']:,.0f}" for name in ("messages", "megabytes")]
        times = [f"{row[f'{name}_cpu_us']:.2f}" for name in ("sender", "receiver")]
        one_way.add_row(_bytes(row["size"]), row["method"], *rates, *times)
    trips = Table("busy_poll", "trips", *(name.replace("_", ".") for name in POINTS))
    trips.title, trips.caption = f"Round trip, {_bytes(TRIP_SIZE)}", "times in µs"
    for row in report["round_trips"]:
        times = [f"{row[f'{name}_us']:,.1f}" for name in POINTS]
        trips.add_row(f"{row['busy_poll'] * 1e6:g}", f"{row['trips']:,}", *times)
    for column in one_way.columns[2:] + trips.columns:
        column.justify = "right"
    Console().print(*(table for table in (one_way, trips) if table.row_count))


EPILOG = """\b
Examples:
  kucomms bench
  kucomms bench --size 4K --size 1M --seconds 1
  kucomms echo shm://lab & kucomms bench shm://lab
"""


@click.command("bench", epilog=EPILOG)
@click.argument("url", required=False)
@click.option(
    "--seconds", type=click.FloatRange(0.01, 10), default=0.5, show_default=True, metavar="N",
    help="Seconds of each measurement.",
)
@click.option(
    "--size", "sizes", type=common.SIZE, multiple=True,
    help="Bytes of a message one way; can be repeated.  [default: 64, 1K and 64K]",
)
@click.option(
    "--busy-poll", type=click.FloatRange(0, 1), default=POLL, show_default=f"{POLL:f}",
    metavar="SECONDS", help="The endpoints' busy_poll; round trips are measured with 0 too.",
)
@click.option("--peer", hidden=True)
@common.timeout_option
@common.json_option("Print nothing but one JSON object; its keys say the units.")
def command(
    *, url: str | None, seconds: float, sizes: tuple[int, ...], busy_poll: float,
    peer: str | None, timeout: float | None, as_json: bool,
) -> int:
    """Measure kucomms on this machine, between two processes, in a few seconds.

    Starts the second process itself. With URL, shm://NAME or kernel://NAME, it measures
    round trips only, with the echo that is there: 'kucomms echo URL' without --reply, or
    a kernel module such as kucomms_tutorial. Without URL, each process is kept to a CPU of
    its own in round trips. The first quarter of each measurement is not counted.
    """
    if url and sizes:
        raise click.UsageError("--size is for one way, and with URL there are round trips only")
    if max(sizes, default=0) > LARGEST:
        raise click.UsageError(f"--size must be at most {LARGEST >> 20}M")
    timeout = common.CONNECT_TIMEOUT if timeout is None else timeout
    jobs = [] if url else [Job(m, s, busy_poll) for s in sizes or SIZES for m in METHODS]
    jobs += [Job(ROUND_TRIP, TRIP_SIZE, poll) for poll in dict.fromkeys((busy_poll, 0.0))]
    if peer is not None:
        with suppress(PeerClosedError):  # the first one was stopped, or says itself what is wrong
            kucomms.run(_be_second(peer, jobs, seconds))
        return 0
    if url is not None:
        report = kucomms.run(_run(None, url, jobs, seconds, timeout))
    else:
        own = f"shm://bench_{os.getpid()}_{secrets.token_hex(4)}"
        start = [sys.executable, "-m", "kucomms", "bench", "--peer", own, f"--seconds={seconds}"]
        start += [f"--busy-poll={busy_poll}", *(f"--size={size}" for size in sizes)]
        report = kucomms.run(_with_second(start, own, jobs, seconds, timeout))
    (common.print_json if as_json else _show)(report)
    return 0
