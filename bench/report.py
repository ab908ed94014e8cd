# SPDX-License-Identifier: MIT
"""Tables on the terminal, and the JSON file."""

import datetime
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.table import Table
from rich.text import Text

from bench.contestants import contestants
from bench.plan import GROUPS

PACKAGES = (
    "kucomms", "uvloop", "pyzmq", "pynng", "faster-fifo", "iceoryx2", "hdrhistogram",
    "matplotlib", "numpy",
)


def machine():
    """Where this was measured."""
    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_json(path, where, options, plan, targets, interrupted):
    """Everything that was measured."""
    everything = {
        "machine": where,
        "options": {"quick": options.quick, "rounds": options.rounds, "sizes": options.sizes},
        "interrupted": interrupted,
        "results": [result.plain() for result in plan.results.values()],
        "notes": plan.notes,
        "targets": targets,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(everything, indent=1) + "\n")


def short(value):
    """A number with three digits or so."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude >= 100:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.1f}" if magnitude >= 10 else f"{value:.2f}"


def micro(nanoseconds):
    """The same, in microseconds, from nanoseconds; short enough for many columns."""
    if nanoseconds is None:
        return "-"
    value = nanoseconds / 1000
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def print_report(console, where, plan, targets):
    """All tables."""
    console.print(
        f"\n{where['cpu']}, {where['cores']} cores, Linux {where['kernel']}, "
        f"Python {where['python']}, {where['date']}, load before: {where['load']:.1f}"
    )
    versions = (f"{name} {number}" for name, number in where["versions"].items() if number)
    console.print(", ".join(versions), highlight=False)
    for group, title in GROUPS.items():
        results = [result for result in plan.results.values() if result.group == group]
        if not results:
            continue
        console.print()
        if group == "throughput":
            for table in _by_size(results):
                console.print(table)
        elif group == "latency":
            console.print(_percentiles(results))
        else:
            console.print(_lines(results, f"{group}: {title}"))
    for note in plan.notes:
        console.print(f"[yellow]note:[/] {note}", highlight=False)
    if targets:
        console.print(_targets(targets))


def _by_size(results):
    """A line for each contestant, a column for each size; one table of time, one of CPU."""
    sizes = list(dict.fromkeys(result.case for result in results))
    order = [one.name for one in contestants()]
    names = sorted({result.name for result in results}, key=order.index)
    cells = {(result.name, result.case): result for result in results}
    for title, cell in (
        ("throughput: µs per message, median, and min-max of the rounds", _spread),
        ("throughput: CPU µs per message, both sides, median", lambda one: micro(one.cpu)),
    ):
        table = Table(title=title, title_justify="left", row_styles=["", "dim"])
        table.add_column("", no_wrap=True)
        for size in sizes:
            table.add_column(size, justify="right", no_wrap=True)
        for name in names:
            texts = []
            for size in sizes:
                result = cells.get((name, size))
                texts.append("cannot" if result is None else cell(result))
            ours = any(result.ours for result in results if result.name == name)
            table.add_row(Text(name, style="bold" if ours else ""), *texts)
        yield table


def _spread(result):
    if result.error and not result.samples:
        return "failed"
    if len(result.values) < 2:
        return micro(result.median)
    return f"{micro(result.median)}\n{micro(min(result.values))}-{micro(max(result.values))}"


def _percentiles(results):
    """Round trips in microseconds: p50 of the rounds, the others of all trips together."""
    table = Table(title="latency: round trips of 64 B, microseconds", title_justify="left",
                  row_styles=["", "dim"])
    for column in ("", "mode"):
        table.add_column(column)
    for column in ("p50, median", "min", "max", "p90", "p99", "p99.9", "CPU"):
        table.add_column(column, justify="right")
    for result in results:
        if not result.samples:
            table.add_row(result.name, result.case, "failed")
            continue
        numbers = [result.median, min(result.values), max(result.values)]
        numbers += [result.curve[point] for point in (90, 99, 99.9)] + [result.cpu]
        table.add_row(
            Text(result.name, style="bold" if result.ours else ""), result.case,
            *(short(number / 1000) for number in numbers),
        )
    return table


def _lines(results, title):
    """A line for each result, with whatever further numbers the group has."""
    keys = list(dict.fromkeys(
        key for result in results for sample in result.samples for key in sample.extra
        if key != "messages" and not key.endswith("_per_million")
    ))
    table = Table(title=title, title_justify="left")
    for column in ("", "case"):
        table.add_column(column)
    for column in ("median", "min", "max", "unit", "CPU ns", *keys):
        table.add_column(column.replace("_", " "), justify="right")
    for result in results:
        values = result.values
        low, high = (min(values), max(values)) if values else (None, None)
        table.add_row(
            Text(result.name, style="bold" if result.ours else ""), result.case,
            "failed" if result.error and not values else short(result.median),
            short(low), short(high), result.unit, short(result.cpu),
            *(short(result.further(key)) for key in keys),
        )
    return table


def _targets(targets):
    table = Table(title="targets", title_justify="left")
    for column in ("what", "measured", "wanted", ""):
        table.add_column(column)
    styles = {"met": "green", "missed": "red", "unknown": "yellow"}
    for target in targets:
        outcome = target["outcome"]
        table.add_row(
            target["what"], short(target["measured"]) + target["note"], target["wanted"],
            Text(outcome, style=styles[outcome]),
        )
    return table
