# SPDX-License-Identifier: MIT
"""``python -m tests.fuzz``: attack the ring, for as long as you like.

\b
    python -m tests.fuzz run --runs 100000000
    python -m tests.fuzz coverage
    python -m tests.fuzz stress --seconds 600
"""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import harness
from .plants import PLANTS, build

#: Executions after which a target is started again, with another seed.
ROUND = 2_000_000
ROOT = harness.ROOT
console = Console(stderr=True)


@click.group(help=__doc__)
def main() -> None:
    """The group."""


@contextmanager
def stopping() -> Iterator[list[bool]]:
    """Control-C says stop; what is running is ended by who reads it."""
    stop: list[bool] = []
    before = signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        console=console,
    )


class Campaign:
    """Rounds of all targets in turn, ``jobs`` at a time, until enough was executed."""

    def __init__(self, seed: int) -> None:
        self.work = harness.BUILD / "work"
        self.findings = harness.BUILD / "findings"
        self.seed = seed
        self.rounds = 0
        self.executed = dict.fromkeys(harness.TARGETS, 0)
        self.outputs: list[str] = []
        self.running: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
        for target in harness.TARGETS:
            harness.unpack(target, self.work / target)

    def start(self, target: str, runs: int) -> None:
        log = self.work / f"{target}.log"
        seed = self.seed + self.rounds
        self.rounds += 1
        command = harness.arguments(harness.BUILD / target, self.findings, runs, seed)
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, str(self.work / target)],
                stdout=output,
                stderr=output,
                start_new_session=True,  # control-C is for us
            )
        self.running[target] = (process, log)

    def collect(self, stopped: bool) -> None:
        """Note what has ended; end what runs when ``stopped``."""
        for target, (process, log) in list(self.running.items()):
            if stopped:
                process.send_signal(signal.SIGINT)
                process.wait()
            if process.poll() is None:
                continue
            del self.running[target]
            result = harness.outcome(process.returncode, log.read_text(errors="replace"))
            self.executed[target] += result.executed
            if result.found and not stopped:
                self.outputs.append(result.output)

    def under_way(self) -> int:
        """Executions of what runs now, as far as it has said."""
        said = (log.read_text(errors="replace") for _, log in self.running.values())
        counts = (re.findall(r"^#(\d+)", text, re.MULTILINE) for text in said)
        return sum(int(count[-1]) for count in counts if count)

    def next_target(self) -> str:
        """The one of those not running that has been executed least."""
        idle = [target for target in harness.TARGETS if target not in self.running]
        return min(idle, key=lambda target: self.executed[target])


@main.command()
@click.option("--runs", type=int, default=10_000_000, show_default=True, help="In all.")
@click.option("--seconds", type=float, default=None, help="Stop after that long at the latest.")
@click.option("--jobs", type=click.IntRange(1, len(harness.TARGETS)), default=2, show_default=True)
@click.option("--seed", type=int, default=None, help="Of the first round.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def run(runs: int, seconds: float | None, jobs: int, seed: int | None, as_json: bool) -> None:
    """Fuzz all targets, from the stored inputs and those of earlier runs.

    Each exit code but 0 says that something was found. The summary is also written to
    build/fuzz/summary.json.
    """
    harness.make()
    campaign = Campaign(secrets.randbelow(1 << 30) if seed is None else seed)
    started = time.monotonic()
    with stopping() as stop, progress_bar() as progress:
        bar = progress.add_task("fuzzing", total=runs, state="")
        while not campaign.outputs:
            late = seconds is not None and time.monotonic() - started >= seconds
            done = sum(campaign.executed.values())
            if stop or late or (done >= runs and not campaign.running):
                break
            planned = done + len(campaign.running) * ROUND
            if len(campaign.running) < jobs and planned < runs:
                campaign.start(campaign.next_target(), min(ROUND, runs - done))
                continue
            done += campaign.under_way()
            rate = done / (time.monotonic() - started)
            progress.update(bar, completed=done, state=f"{done:,} of {runs:,}, {rate:,.0f}/s")
            time.sleep(0.5)
            campaign.collect(stopped=False)
        campaign.collect(stopped=True)
    summary: dict[str, Any] = {
        "executions": sum(campaign.executed.values()),
        "seconds": round(time.monotonic() - started, 1),
        "seed": campaign.seed,
        "findings": len(campaign.outputs),
        "targets": {
            target: {
                "executions": executed,
                "inputs": sum(1 for _ in (campaign.work / target).iterdir()),
            }
            for target, executed in campaign.executed.items()
        },
    }
    (harness.BUILD / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for output in campaign.outputs:
        click.echo(output[-8000:], err=True)
    if campaign.outputs:
        click.echo(f"The inputs are in {campaign.findings}; give one to a target.", err=True)
    if as_json:
        click.echo(json.dumps(summary))
    else:
        click.echo(
            f"{summary['executions']:,} executions in {summary['seconds']} s from seed "
            f"{summary['seed']}, {summary['findings']} findings"
        )
    sys.exit(bool(campaign.outputs))


@main.command()
def store() -> None:
    """Add to the stored corpus what earlier runs found new, and make it small again."""
    harness.make()
    for target in harness.TARGETS:
        folder = harness.BUILD / "work" / target
        count, size = harness.store(target, [folder] if folder.exists() else [], harness.BUILD)
        click.echo(f"{target}: {count} inputs, {size:,} bytes")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print all figures as JSON.")
def coverage(as_json: bool) -> None:
    """Say what of ring.h and channel.h the corpus and the C tests reach."""
    found = harness.coverage()
    if as_json:
        click.echo(json.dumps({header: asdict(figures) for header, figures in found.items()}))
        return
    for header, figures in found.items():
        for kind, count, missed, percent in (
            ("lines", figures.lines, figures.missed_lines, figures.percent_of_lines),
            ("branches", figures.branches, figures.missed_branches, figures.percent_of_branches),
        ):
            where = f"  but for {', '.join(map(str, missed))}" if missed else ""
            click.echo(f"{header:10} {percent:6.2f} % of {count} {kind}{where}")


@main.command()
@click.option("--runs", type=int, default=1_000_000, show_default=True, help="At most, for each.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON line for each.")
@click.option("--keep", is_flag=True, help="Store the inputs that find what the corpus does not.")
def plants(runs: int, seed: int, as_json: bool, keep: bool) -> None:
    """Plant bugs, one after the other, and see that the fuzzer finds each."""
    missed = 0
    for plant in PLANTS:
        folder = harness.BUILD / "plants" / plant.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        program = build(plant, folder)
        corpus = harness.unpack(plant.target, folder / "corpus")
        result = harness.fuzz(program, corpus, 0, seed)
        how = "by the stored corpus"
        if not result.found:
            result = harness.fuzz(program, corpus, runs, seed)
            how = f"within {result.executed:,} runs"
            if result.found and keep:
                inputs = sorted((folder / "findings").iterdir())
                harness.remember(plant.target, inputs[-1].read_bytes(), plant.name)
        missed += not result.found
        if as_json:
            record = {"plant": plant.name, "target": plant.target, "found": result.found}
            click.echo(json.dumps(record | {"how": how}))
        else:
            said = "found" if result.found else "NOT FOUND"
            click.echo(f"{plant.name:36} {plant.target:9} {said} {how}")
    sys.exit(bool(missed))


@main.command()
@click.option("--seconds", type=float, default=600, show_default=True)
@click.option("--messages", type=int, default=200_000, show_default=True, help="Of each sender.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the first round.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def stress(seconds: float, messages: int, seed: int, as_json: bool) -> None:
    """Run tests/csrc/stress.c under the thread sanitizer, again and again."""
    folder = ROOT / "build" / "csrc"
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "stress_tsan"
    subprocess.run(
        ["make", "-s", "-C", ROOT / "tests" / "csrc", f"BUILD={folder}", program], check=True
    )
    started = time.monotonic()
    rounds = 0
    with stopping() as stop, progress_bar() as progress:
        bar = progress.add_task("thread sanitizer", total=seconds, state="")
        while not stop and (spent := time.monotonic() - started) < seconds:
            progress.update(bar, completed=spent, state=f"seed {seed + rounds}")
            command = [program, str(messages), str(seed + rounds)]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if stop:
                break
            if done.returncode or done.stderr:
                click.echo(f"{done.stdout}{done.stderr}", err=True)
                sys.exit(f"found with: {' '.join(map(os.fspath, command))}")
            rounds += 1
    # Two senders each way.
    summary = {
        "rounds": rounds,
        "messages": rounds * messages * 4,
        "seconds": round(time.monotonic() - started, 1),
        "seed": seed,
    }
    if as_json:
        click.echo(json.dumps(summary))
    else:
        click.echo("{rounds} rounds, {messages:,} messages in {seconds} s".format(**summary))


main()
