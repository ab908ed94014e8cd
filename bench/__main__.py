# SPDX-License-Identifier: MIT
"""``python -m bench``: measure, print, write JSON, draw."""

import signal
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import pair, report
from bench.plan import GROUPS, Options, Plan
from bench.targets import targets

QUICK_SIZES = (64, 1024, 65536)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--quick", is_flag=True, help="One round, three sizes, short runs: a minute.")
@click.option("--rounds", type=click.IntRange(1), help="How often everything is measured.  [5]")
@click.option("--only", multiple=True, type=click.Choice(list(GROUPS)), help="Only this group.")
@click.option("--contestants", default="", help="Only those whose name has one of these words.")
@click.option("--sizes", default="", help="Message sizes for throughput.")
@click.option("--seconds", type=float, help="How long one throughput run takes.  [0.4]")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path),
              help="Where to write the results.  [OUT/bench.json]")
@click.option("--out", default="build/bench", show_default=True,
              type=click.Path(file_okay=False, path_type=Path), help="Where plots go.")
@click.option("--no-plots", is_flag=True, help="Draw nothing.")
def main(quick, rounds, only, contestants, sizes, seconds, json_file, out, no_plots):
    r"""Measure kucomms and its peers on this machine.

    Prints tables, and writes a JSON file and plots. What is measured and how is in
    bench/README.md.

    \b
    Example:
        python -m bench --quick --only throughput --contestants "kucomms,Pipe"
    """
    options = Options(
        quick=quick,
        rounds=rounds or (1 if quick else 5),
        sizes=tuple(int(size) for size in sizes.split(",") if size)
        or (QUICK_SIZES if quick else Options.sizes),
        only=only,
        contestants=tuple(word.strip() for word in contestants.split(",") if word.strip()),
        run_seconds=seconds or (0.08 if quick else Options.run_seconds),
    )
    console = Console(width=None if sys.stdout.isatty() else 160)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    where = report.machine()
    plan = Plan(options)
    interrupted = False
    try:
        _measure(plan, console)
    except KeyboardInterrupt:
        interrupted = True
    reached = targets(plan.results)
    report.print_report(console, where, plan, reached)
    json_file = json_file or out / "bench.json"
    report.write_json(json_file, where, options, plan, reached, interrupted)
    console.print(f"results: {json_file}")
    if not no_plots and not interrupted:
        from bench.plots import draw

        files = draw(plan, out)
        if files is None:
            console.print("plots: left out, matplotlib is not installed")
        for path in files or ():
            console.print(f"plot: {path}")
    if interrupted:
        console.print("interrupted; these are the results until then")
        sys.exit(130)


def _measure(plan, console):
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("start", total=plan.steps)
        stage = ""

        def step(text):
            nonlocal stage
            progress.update(task, advance=1, description=f"{text:60.60}")
            before, stage = stage, text.partition(":")[0]
            if stage != before and not console.is_terminal:
                console.print(stage)

        pair.prepare()
        plan.run(step)


if __name__ == "__main__":
    main(prog_name="python -m bench")
