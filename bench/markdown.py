# SPDX-License-Identifier: MIT
"""``python -m bench.markdown RESULTS.json PAGE.md``: the results as a page with plots."""

import json
import shutil
from pathlib import Path

import click

from bench.plan import GROUPS
from bench.report import micro, short

PLOTS = ("throughput", "latency", "links")
SHOWN = ("64 B", "1024 B", "4096 B", "65536 B", "1048576 B")
"""Sizes in the table; the plot has all."""


def table(head, rows):
    """Lines of a table whose first column is text."""
    yield "| " + " | ".join(head) + " |"
    yield "| --- |" + " ---: |" * (len(head) - 1)
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"
    yield ""


def throughput(results):
    """Microseconds per message by size, and CPU time."""
    sizes = [size for size in SHOWN if any(one["case"] == size for one in results)]
    cells = {(one["name"], one["case"]): one for one in results}
    names = list(dict.fromkeys(one["name"] for one in results))
    for key, what in (("median", "Microseconds per message"),
                      ("cpu", "CPU microseconds per message, sender and receiver together")):
        yield f"{what}, median of the rounds:"
        yield ""
        rows = [
            [name, *(micro((cells.get((name, size)) or {}).get(key)) for size in sizes)]
            for name in names
        ]
        yield from table(["", *sizes], rows)


def latency(results):
    """Percentiles."""
    rows = [
        [one["name"], one["case"], short(one["median"] / 1000),
         *(short(one["curve"][point] / 1000) for point in ("90", "99", "99.9")),
         short(one["cpu"] / 1000)]
        for one in results if one["median"] is not None
    ]
    yield "Microseconds; CPU of both processes per trip."
    yield ""
    yield from table(["", "mode", "p50", "p90", "p99", "p99.9", "CPU"], rows)


def lines(results):
    """A line for each result."""
    rows = [
        [one["name"], one["case"] or "", short(one["median"]), short(one["min"]),
         short(one["max"]), one["unit"], short(one["cpu"])]
        for one in results
    ]
    yield from table(["", "case", "median", "least", "most", "unit", "CPU ns"], rows)


def page(everything):
    """The lines of the page, but for the plots' files."""
    where = everything["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items() if number)
    yield "# Beside other ways between two Python processes"
    yield ""
    yield (f"{where['cpu']}, {where['cores']} cores of a virtual machine, Linux {where['kernel']}, "
           f"Python {where['python']}, {where['date'][:10]}; {versions}. "
           f"{everything['options']['rounds']} rounds, interleaved; load before: "
           f"{where['load']:.1f}. What is measured and what is fair: "
           "[bench/README.md](../bench/README.md). How to repeat it:")
    yield ""
    yield "```sh"
    yield "make bench-user"
    yield ".venv/bin/python -m bench.markdown build/bench/bench.json docs/bench.md"
    yield "```"
    yield ""
    yield "The machine is shared and noisy. Read the ratios; times are illustrations."
    yield ""
    yield "## Targets"
    yield ""
    rows = [
        [one["what"], short(one["measured"]) + one["note"], one["wanted"], one["outcome"]]
        for one in everything["targets"]
    ]
    yield from table(["", "measured", "wanted", ""], rows)
    for group, title in GROUPS.items():
        results = [one for one in everything["results"] if one["group"] == group]
        if not results:
            continue
        yield f"## {group.capitalize()}: {title}"
        yield ""
        yield from {"throughput": throughput, "latency": latency}.get(group, lines)(results)
        if group in PLOTS:
            yield f"![{title}](bench/{group}.png)"
            yield ""
    for note in everything["notes"]:
        yield f"- {note}"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("results", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
def main(results, target):
    r"""Write a page of what ``python -m bench`` has measured, with the plots beside RESULTS.

    \b
    Example:
        python -m bench.markdown build/bench/bench.json docs/bench.md
    """
    text = "\n".join(page(json.loads(results.read_text()))).rstrip() + "\n"
    target.write_text(text)
    plots = target.parent / "bench"
    plots.mkdir(exist_ok=True)
    for name in PLOTS:
        if (results.parent / f"{name}.png").exists():
            shutil.copyfile(results.parent / f"{name}.png", plots / f"{name}.png")


if __name__ == "__main__":
    main(prog_name="python -m bench.markdown")
