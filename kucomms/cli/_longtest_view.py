# SPDX-License-Identifier: MIT
"""The longtest on a terminal, live."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from kucomms.cli.longtest import Longtest

__all__ = ["View"]

_PERIOD = 0.25
_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 48
_WIDEST = 100


class View:
    """Counters, rates, a curve of the throughput, and how full the rings are.

    ``seconds``: how long the run is to take, None when nobody knows.
    """

    def __init__(self, seconds: float | None, console: Console | None = None) -> None:
        self._seconds = seconds
        self._console = console or Console()
        self._test: Longtest
        self._now: dict[str, float] = {}
        self._then: tuple[float, dict[str, float]] | None = None
        self._rates: dict[str, float] = {}
        self._curve: deque[float] = deque(maxlen=_WIDTH)

    @contextmanager
    def watch(self, test: Longtest) -> Iterator[None]:
        """Inside, show ``test``; what was last shown stays on the screen."""
        self._test = test
        with Live(console=self._console, auto_refresh=False, screen=False) as live:
            task = asyncio.get_running_loop().create_task(self._refresh(live))
            try:
                yield
            finally:
                task.cancel()
                self._take_sample()
                live.update(self.render(), refresh=True)

    async def _refresh(self, live: Live) -> None:
        while True:
            self._take_sample()
            live.update(self.render(), refresh=True)
            await asyncio.sleep(_PERIOD)

    def _take_sample(self) -> None:
        """Rates over the last second or so, and one more bar."""
        test = self._test
        now = monotonic()
        counts = {
            "sent 0": test.sent[0],
            "sent 1": test.sent[1],
            "received 0": test.received[0],
            "received 1": test.received[1],
            "bytes": test.bytes_sent + test.bytes_received,
        }
        if self._then is None:
            self._then = (now, dict.fromkeys(counts, 0.0))
            return
        before, old = self._then
        if now - before < _PERIOD / 2 or test.link is None:
            return
        self._then = (now, {key: float(value) for key, value in counts.items()})
        self._rates = {key: (counts[key] - old[key]) / (now - before) for key in counts}
        if test.seconds and not test.stopping:
            self._curve.append(sum(v for k, v in self._rates.items() if k != "bytes"))

    # ---- drawing ------------------------------------------------------------

    def render(self) -> RenderableType:
        """What is on the screen now."""
        test = self._test
        if test.link is None:
            body: RenderableType = Text("waiting for the other side …", style="dim")
        else:
            body = Group(
                self._counters(), Text(), self._throughput(), Text(), Text(test.lines(), "dim")
            )
        errors = test.add_errors + test.compare_errors
        state = Text("no errors", "green") if not errors else Text(f"{errors} errors", "bold red")
        return Panel(
            body,
            title=f"[bold]kucomms longtest[/] {test.url} side {test.side}",
            subtitle=state if test.link is not None else None,
            border_style="red" if errors else "cyan",
            width=min(self._console.width, _WIDEST),
            padding=(0, 1),
        )

    def _counters(self) -> Table:
        test = self._test
        mine, theirs = test.own, test.other
        table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="bold")
        for name in ("", "messages", "messages/s"):
            table.add_column(name, justify="left" if not name else "right")
        rows = (
            (f"type {mine} sent", test.sent[mine], f"sent {mine}"),
            (f"type {mine} echoed to us", test.received[mine], f"received {mine}"),
            (f"type {theirs} received", test.received[theirs], f"received {theirs}"),
            (f"type {theirs} echoed by us", test.sent[theirs], f"sent {theirs}"),
        )
        for label, count, key in rows:
            table.add_row(label, f"{count:,}", f"{self._rates.get(key, 0):,.0f}")
        return table

    def _throughput(self) -> Table:
        test = self._test
        link = test.link
        assert link is not None
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold")
        table.add_column(width=_WIDTH)
        table.add_column(justify="right", no_wrap=True)
        total = sum(v for k, v in self._rates.items() if k != "bytes")
        megabytes = self._rates.get("bytes", 0) / 1e6
        table.add_row(
            "throughput", Text(bars(self._curve), "green"), f"{total:,.0f}/s {megabytes:,.0f} MB/s"
        )
        size = link.ring_size
        for label, used in (("to peer", test.tx_avail), ("from peer", self._rx_avail())):
            table.add_row(
                f"ring {label}",
                Text(bar(used / size), "yellow"),
                f"{100 * used / size:.0f} % of {size >> 10} KiB",
            )
        if self._seconds:
            table.add_row(
                "time",
                Text(bar(test.seconds / self._seconds), "cyan"),
                f"{test.seconds:.1f} of {self._seconds:g} s",
            )
        else:
            table.add_row("time", "control-C ends", f"{test.seconds:.1f} s")
        return table

    def _rx_avail(self) -> int:
        link = self._test.link
        return link.rx_avail if link is not None and not link.closed else 0


def bar(part: float) -> str:
    """A bar that is full for 1."""
    full = round(min(part, 1.0) * _WIDTH)
    return "█" * full + "░" * (_WIDTH - full)


def bars(values: deque[float]) -> str:
    """A curve of one character for each value."""
    top = max(values, default=0.0)
    if not top:
        return ""
    return "".join(_BARS[max(1, round(value / top * (len(_BARS) - 1)))] for value in values)
