# SPDX-License-Identifier: MIT
"""The command, and what it shows."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from tests.soak.run import KERNEL_MODULE, TRANSPORTS, Native, Run

# ---- showing it ---------------------------------------------------------------------


def lines_table(run):
    table = Table(title=f"{run.seconds:.0f} s, {run.verified():,} messages verified, "
                  f"{run.rate:,.0f}/s, {run.wrong} wrong, seed {run.seed}")
    for column in ("line", "transport", "ways"):
        table.add_column(column)
    for column in ("verified", "sessions", "kills", "wrong", "end judged after (ms)"):
        table.add_column(column, justify="right")
    for line in run.all_lines:
        what = run.of(line)
        names = ("verified", "sessions", "kills", "wrong", "judged_after_ms")
        numbers = (f"{what[name]:,}" for name in names)
        table.add_row(str(line.number), line.transport, what["how"], *numbers)
    return table


def flatness_table(report):
    table = Table("median of", "first", "last", "most", "may grow by", "flat")
    for v in report["flatness"]:
        numbers = (f"{v[name]:,.0f}" for name in ("first", "last", "most", "allowed"))
        table.add_row(v["what"], *numbers, "yes" if v["ok"] else "[red]NO[/]")
    return table


def plot(series, path):
    """One small picture for each series."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2 * ((len(series) + 2) // 3)), layout="constrained")
    for number, (what, (_tolerance, samples)) in enumerate(series.items(), 1):
        axes = figure.add_subplot((len(series) + 2) // 3, 3, number)
        axes.plot([at for at, _ in samples], [value for _, value in samples], linewidth=1)
        axes.set_title(what, fontsize=8)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=7)
    figure.savefig(path)


def load_modules():
    """Only in a guest of ``tools/guest.py``: no test loads a module into this machine."""
    if "KUCOMMS_MODULES" not in os.environ:
        raise click.ClickException("kernel:// runs in a guest; see 'make soak-kernel'")
    sysfs = Path("/sys/devices/virtual/kucomms/kucomms")
    subprocess.run(["modprobe", "kucomms"], check=True)
    if not Path("/dev", KERNEL_MODULE).exists():
        (sysfs / "create_device").write_text(KERNEL_MODULE)
    subprocess.run(["modprobe", KERNEL_MODULE], check=True)


@click.command(
    help="""Send verified messages over all transports for a long time, and kill at random.

    \b
    Example:
      python -m tests.soak --minutes 1 --json soak.json

    Each line is a hub's end, which stays, and a peer's, whose links come and go: closed by
    either end, or the process killed. Whoever is left behind verifies that all came, in order,
    that the other had sent for certain, and then the right error. Memory, descriptors, mappings,
    /dev/shm, and in a guest the kernel's slabs and what the module counts, must be in the last
    minute what they were in the first.

    Exit code: 0 when all was well, else 1. Control-C ends it in order, with the figures so far.
    """
)
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="How long.  [default: 10]")
@click.option("--messages", type=float, help="End when so many are verified over one transport.")
@click.option("--transports", default="inproc,shm", show_default=True, metavar="LIST",
              help="Of inproc, shm, kernel; the last only in a guest.")
@click.option("--lines", type=click.IntRange(0), default=4, show_default=True,
              help="Lines in Python of each transport.")
@click.option("--native", type=click.IntRange(0), default=1, show_default=True,
              help="Lines of shm:// and of kernel:// with C programs.")
@click.option("--seed", type=int, help="For everything random.  [default: drawn]")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path),
              help="Write the figures there.")
@click.option("--plot", "plot_file", type=click.Path(dir_okay=False, path_type=Path),
              help="Draw the samples there; needs matplotlib.")
@click.option("--pause", default=0.02, show_default=True,
              help="Seconds that Python senders rest between bursts, at most.")
@click.option("--kill-every", default=0.5, show_default=True, help="Seconds, on average.")
@click.option("--build", is_flag=True, help="Only compile the C program, for a guest to come.")
@click.option("--plant", multiple=True, hidden=True)
def main(minutes, messages, transports, lines, native, seed, json_file, plot_file, build, **how):
    if build:
        Native.build()
        return
    chosen = transports.split(",")
    if unknown := set(chosen) - set(TRANSPORTS):
        raise click.UsageError(f"no such transport: {', '.join(unknown)}")
    if "kernel" in chosen:
        load_modules()
    if seed is None:
        seed = random.SystemRandom().randrange(2**31)
    length = float("inf") if messages and not minutes else 60 * (minutes or 10)
    console = Console()
    console.print(f"seed {seed}")
    interrupted = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupted.append(True))
    run = Run(chosen, seed, lines, native, **how)
    try:
        _watch(run, console, length, messages or float("inf"), interrupted)
        run.stop()
        report = run.report(bool(interrupted))
    finally:
        run.close()
    console.print(lines_table(run))
    console.print(flatness_table(report))
    for line in [*report["errors"], *report["problems"]]:
        console.print(line, style="red", markup=False)
    totals = ", ".join(f"{count:,} over {t}://" for t, count in report["verified"].items())
    console.print(
        f"{'ok' if report['ok'] else 'FAILED'}: {totals} "
        f"({report['verified_in_c']:,} of them in C) in {report['seconds']:.0f} s; "
        f"seed {seed}",
        highlight=False,
    )
    if json_file:
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    if plot_file:
        plot(run.sampler.series, plot_file)
    sys.exit(not report["ok"])


def _watch(run, console, length, messages, interrupted):
    """Until it is long enough, enough messages, something is wrong, or control-C."""
    while not (run.ready() or interrupted or run.problems or run.wrong):
        time.sleep(0.02)
    every = max(0.1, min(2.0, length / 100))
    next_sample = next_line = 0.0
    with Live(console=console, auto_refresh=False) if console.is_terminal else _Quiet() as live:
        while run.seconds < length and run.most() < messages and not interrupted:
            run.step()
            if run.seconds >= next_sample:
                run.sample()
                next_sample = run.seconds + every
                if console.is_terminal:
                    live.update(lines_table(run), refresh=True)
                elif run.seconds >= next_line:
                    next_line = run.seconds + 15
                    print(f"{run.seconds:.0f} s: {run.verified():,} verified, {run.rate:,.0f}/s, "
                          f"{run.wrong} wrong", flush=True)
            if run.problems or run.wrong:
                break
            time.sleep(0.02)


class _Quiet:
    def __enter__(self):
        return None

    def __exit__(self, *_):
        return None

