# SPDX-License-Identifier: MIT
"""The kernel bench: cycles per message of each way between a program and the kernel.

Builds the bench's module and programs, boots one guest, measures all mechanisms there in the
same boot, in turns, and prints two tables. README.md says what is measured and by which rules.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools import guest  # noqa: E402

HERE = Path(__file__).resolve().parent
LOGS = ROOT / "build" / "guest-bench"
RESULT = ROOT / "build" / "bench" / "kernel.json"
TO_KERNEL, TO_USER = "to-kernel", "to-user"
DIRECTIONS = {TO_KERNEL: "user to kernel", TO_USER: "kernel to user"}
VERIFY_BURSTS = 4
LOSSY = 128  # messages of a burst of which some are certain to be lost in that run
PATIENCE = 300  # seconds for one sample
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"  # of a file with words of its own


@dataclass(frozen=True)
class Mechanism:
    """A row of the tables. ``impossible``: why a direction has no numbers."""

    name: str
    title: str
    python: bool = False
    recovers: bool = False
    titles: dict[str, str] = field(default_factory=dict)
    impossible: dict[str, str] = field(default_factory=dict)

    def title_for(self, direction: str) -> str:
        """The title, which a direction may have of its own."""
        return self.titles.get(direction, self.title)


MECHANISMS = (
    Mechanism("netlink", "netlink (simple)"),
    Mechanism("netlink-resync", "netlink with resynchronisation", recovers=True),
    Mechanism("genetlink", "generic netlink"),
    Mechanism("chardev", "character device, read/write"),
    Mechanism("mmap", "mmap device with a flag"),
    Mechanism(
        "relay",
        "relay",
        impossible={TO_KERNEL: "not possible: the kernel alone writes a relay buffer"},
    ),
    Mechanism("pipe", "pipe"),
    Mechanism("bpf", "BPF ring buffer", titles={TO_KERNEL: "BPF user ring buffer"}),
    Mechanism("kucomms-copied", "kucomms, C, copied"),
    Mechanism("kucomms", "kucomms, C"),
    Mechanism("kucomms-in-place", "kucomms, C, in place"),
    Mechanism(
        "python", "kucomms, Python", python=True, titles={TO_KERNEL: "kucomms, Python, send"}
    ),
    Mechanism(
        "python-many",
        "kucomms, Python, send_many",
        python=True,
        impossible={TO_USER: "not possible: a handler gets one message at a time"},
    ),
)

TARGETS = (
    # mechanism, at most this many times, another one
    ("kucomms", 0.1, "netlink"),
    ("kucomms", 0.2, "chardev"),
    ("kucomms", 1.25, "bpf"),
    ("kucomms-in-place", 1.0, "bpf"),
)


# ---- in the guest ------------------------------------------------------------


def check(command: list[str]) -> None:
    """Run a command; a ``click.ClickException`` with its last words when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)}: {done.stderr.strip() or done.stdout}")


def load(out: Path) -> None:
    """Load both modules and make the devices."""
    check(["modprobe", "kucomms"])
    check(["insmod", str(out / "module" / "kbench.ko")])
    for name in ("kucomms_kbench", "kucomms_kbench_in_place"):
        Path("/sys/devices/virtual/kucomms/kucomms/create_device").write_text(name)


def sample(
    mechanism: Mechanism, direction: str, out: Path, bursts: int, count: int, how: str
) -> dict[str, float]:
    """One run of a program. A ``click.ClickException`` when it failed, a wrong byte included."""
    program = [sys.executable, str(HERE / "python_side.py")] if mechanism.python else []
    program = program or [str(out / "kbench")]
    command = [*program, mechanism.name, direction, str(bursts), str(count), how]
    command.append(str(out / ("libcycles.so" if mechanism.python else "kbench.bpf.o")))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        raise click.ClickException(
            f"{mechanism.name}, {DIRECTIONS[direction]}: not done after {PATIENCE} s"
        ) from None
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        words = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise click.ClickException(f"{mechanism.name}, {DIRECTIONS[direction]}: {words}")
    result: dict[str, float] = json.loads(lines[-1])
    return result


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    info = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.*)$", info, re.MULTILINE)
    emulated = "hypervisor" in info and not guest.has_kvm()
    return {
        "processor": model[1] if model else platform.machine(),
        "processors": os.cpu_count(),
        "emulated": emulated or "TCG" in (model[1] if model else ""),
    }


def measure(
    chosen: list[Mechanism], out: Path, rounds: int, bursts: int, count: int
) -> dict[str, Any]:
    """All that is asked for, in turns. Progress goes to stdout, a line for each step."""
    todo = [
        (mechanism, direction)
        for direction in DIRECTIONS
        for mechanism in chosen
        if direction not in mechanism.impossible
    ]
    failed: dict[tuple[str, str], str] = {}
    taken: dict[tuple[str, str], list[dict[str, float]]] = {}
    for mechanism, direction in todo:
        try:
            got = sample(mechanism, direction, out, VERIFY_BURSTS, count, "full")
            if mechanism.recovers and count >= LOSSY and not got["recovered"]:
                raise click.ClickException(f"{mechanism.name}: nothing was lost on purpose")
            print(f"every byte: {mechanism.name}, {DIRECTIONS[direction]}: right", flush=True)
        except click.ClickException as failure:
            failed[mechanism.name, direction] = failure.message
            print(f"FAILED: {failure.message}", flush=True)
    for number in range(rounds):
        for mechanism, direction in todo:
            key = mechanism.name, direction
            if key in failed:
                continue
            try:
                got = sample(mechanism, direction, out, bursts, count, "stamps")
            except click.ClickException as failure:
                failed[key] = failure.message
                print(f"FAILED: {failure.message}", flush=True)
                continue
            taken.setdefault(key, []).append(got)
            print(
                f"round {number + 1} of {rounds}: {mechanism.name}, {DIRECTIONS[direction]}: "
                f"user {got['user_cycles']:.0f} (least {got['user_least']:.0f}), "
                f"kernel {got['kernel_cycles']:.0f} (least {got['kernel_least']:.0f})",
                flush=True,
            )
    rows = []
    for direction, words in DIRECTIONS.items():
        for mechanism in chosen:
            key = mechanism.name, direction
            row: dict[str, Any] = {
                "mechanism": mechanism.name,
                "title": mechanism.title_for(direction),
                "direction": words,
                "user_cycles": None,
                "kernel_cycles": None,
                "total": None,
                "least": None,
                "reason": mechanism.impossible.get(direction) or failed.get(key),
                "verified": key in taken and key not in failed,
            }
            if row["verified"]:
                samples = taken[key]
                row["user_cycles"] = spread([s["user_cycles"] for s in samples])
                row["kernel_cycles"] = spread([s["kernel_cycles"] for s in samples])
                row["total"] = spread([s["user_cycles"] + s["kernel_cycles"] for s in samples])
                row["least"] = min(s["user_least"] for s in samples) + min(
                    s["kernel_least"] for s in samples
                )
            rows.append(row)
    return {
        "machine": machine(),
        "kernel": os.uname().release,
        "rounds": rounds,
        "bursts": bursts,
        "messages_per_burst": count,
        "message_bytes": 1024,
        "rows": rows,
        "targets": targets(rows),
        "failed": sorted(failed.values()),
    }


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was wanted, and what came of it, in each direction."""
    measured = {(row["mechanism"], row["direction"]): row for row in rows if row["total"]}
    found = []
    for direction in DIRECTIONS.values():
        for name, most, other in TARGETS:
            ours, theirs = measured.get((name, direction)), measured.get((other, direction))
            if ours is None or theirs is None:
                continue
            ratio = ours["total"]["median"] / theirs["total"]["median"]
            found.append(
                {
                    "mechanism": name,
                    "direction": direction,
                    "compared_to": other,
                    "at_most": most,
                    "ratio": round(ratio, 3),
                    "ratio_of_least": round(ours["least"] / theirs["least"], 3),
                    "met": ratio <= most,
                }
            )
    return found


# ---- on the host ---------------------------------------------------------------


def make(kernel: guest.Kernel, logs: Path) -> Path:
    """Build what runs in the guest. Returns the directory."""
    out = ROOT / "build" / "bench-kernel" / kernel.version
    out.mkdir(parents=True, exist_ok=True)
    logs.mkdir(parents=True, exist_ok=True)
    tree = guest.build(kernel, logs / "build-kucomms.log")
    done = subprocess.run(
        [
            *("make", "-C", str(HERE), f"KDIR={kernel.kdir}", f"OUT={out}"),
            f"KUCOMMS={tree / 'kernel_module'}",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=os.environ | {"LC_ALL": "C"},
    )
    (logs / "build.log").write_text(done.stdout)
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-20:])
        raise click.ClickException(f"the build failed, see {logs / 'build.log'}:\n{tail}")
    return out


COLUMNS = {
    "user to kernel": (("user sending", "user_cycles"), ("kernel receiving", "kernel_cycles")),
    "kernel to user": (("kernel sending", "kernel_cycles"), ("user receiving", "user_cycles")),
}


def under(result: dict[str, Any]) -> list[str]:
    """What has to be said below the tables."""
    said = [
        f"Linux {result['kernel']}, {result['message_bytes']}-byte messages, medians of "
        f"{result['rounds']} rounds of {result['bursts']} bursts of "
        f"{result['messages_per_burst']}. Each mechanism has first passed a run in which every "
        "byte is written and checked."
    ]
    if result["machine"]["emulated"]:
        said.append(
            "The processor is emulated in software: a cycle here is no processor's cycle, and "
            "what costs little on one may cost much here. Only the ratios say something."
        )
    return said


def cells(row: dict[str, Any], columns: tuple[tuple[str, str], ...]) -> list[str]:
    """A row of a table behind its title."""
    if row["reason"]:
        short = "not possible" if row["reason"].startswith("not possible") else "failed"
        return [*[short] * 3, ""]
    total = row["total"]
    medians = [f"{row[key]['median']:,.0f}" for _heading, key in (*columns, ("", "total"))]
    return [*medians, f"{total['min']:,.0f} ... {total['max']:,.0f}"]


def markdown(result: dict[str, Any]) -> str:
    """What show() prints, as Markdown."""
    lines = []
    for direction, columns in COLUMNS.items():
        rows = [row for row in result["rows"] if row["direction"] == direction]
        headings = [heading for heading, _key in columns]
        lines += [f"**{direction.capitalize()}**, cycles per message:", ""]
        lines += [f"| mechanism | {' | '.join(headings)} | together | least ... most |"]
        lines += ["| --- | ---: | ---: | ---: | ---: |"]
        lines += [f"| {row['title']} | {' | '.join(cells(row, columns))} |" for row in rows]
        lines += [""]
        for row in rows:
            if row["reason"]:
                lines += [f"{row['title']}: {row['reason']}.", ""]
    lines += [f"{words}\n" for words in under(result)]
    if result["targets"]:
        lines += ["| direction | wanted | measured | |", "| --- | --- | ---: | --- |"]
    lines += [
        f"| {target['direction']} | `{target['mechanism']}` at most {target['at_most']:g} x "
        f"`{target['compared_to']}` | {target['ratio']:.2f} x | "
        f"{'met' if target['met'] else 'missed'} |"
        for target in result["targets"]
    ]
    return "\n".join(lines).strip() + "\n"


def keep(result: dict[str, Any], file: Path) -> None:
    """Write it to a file; between the two marks, when the file has them."""
    before, after = "", ""
    if file.exists():
        text = file.read_text()
        if BEGIN in text and END in text:
            before = text.partition(BEGIN)[0] + BEGIN + "\n\n"
            after = "\n" + END + text.partition(END)[2]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(before + markdown(result) + after)


def show(result: dict[str, Any], console: Console) -> None:
    """Print the tables and the targets."""
    for direction, columns in COLUMNS.items():
        title = f"{direction.capitalize()}: cycles per message"
        table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
        table.add_column("mechanism", no_wrap=True)
        for heading, _key in columns:
            table.add_column(heading, justify="right")
        table.add_column("together", justify="right")
        table.add_column("least ... most", justify="right", style="dim", no_wrap=True)
        for row in (row for row in result["rows"] if row["direction"] == direction):
            table.add_row(row["title"], *cells(row, columns))
        console.print(table)
        for row in (row for row in result["rows"] if row["direction"] == direction):
            if row["reason"]:
                console.print(f"{row['title']}: {row['reason']}", highlight=False, markup=False)
    for words in under(result):
        console.print(words, highlight=False)
    for target in result["targets"]:
        word = "[green]met   [/]" if target["met"] else "[red]missed[/]"
        console.print(
            f"{word} {target['direction']}: {target['mechanism']} is {target['ratio']:.2f} x "
            f"{target['compared_to']} ({target['ratio_of_least']:.2f} x by the least bursts); "
            f"wanted: at most {target['at_most']:g} x",
            highlight=False,
            soft_wrap=True,
        )


def select(names: tuple[str, ...]) -> list[Mechanism]:
    """The mechanisms that are named, or all."""
    known = {mechanism.name: mechanism for mechanism in MECHANISMS}
    for name in names:
        if name not in known:
            raise click.UsageError(f"no mechanism {name}; there are: {', '.join(known)}")
    return [m for m in MECHANISMS if not names or m.name in names]


@click.command()
@click.option("--kernel", "wanted", default="6.12", show_default=True, help="Version or series.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--bursts", type=click.IntRange(1), default=40, show_default=True, help="In each sample."
)
@click.option(
    "--count",
    type=click.IntRange(2, 256),
    default=256,
    show_default=True,
    help="Messages in each burst.",
)
@click.option("--only", multiple=True, metavar="MECHANISM", help="This one; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="The result on stdout; the rest on stderr.")
@click.option(
    "--markdown",
    "keep_in",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the tables there, as Markdown.",
)
@click.option("--here", type=click.Path(path_type=Path), hidden=True, help="In the guest.")
def main(
    wanted: str,
    rounds: int,
    bursts: int,
    count: int,
    only: tuple[str, ...],
    *,
    as_json: bool,
    keep_in: Path | None,
    here: Path | None,
) -> None:
    r"""Measure what a message between a program and the kernel costs, for each mechanism.

    Needs root's kernels: tools/install-kernel-packages.sh, and tools/install-bench-packages.sh.

    \b
    Example:
        python bench/kernel/run.py --kernel 6.1 --only kucomms --only bpf --rounds 3

    Exit code 0: all was measured, whether or not the targets are met; 1: something failed;
    130: interrupted.
    """
    chosen = select(only)
    if here:
        load(here)
        result = measure(chosen, here, rounds, bursts, count)
        (LOGS / os.environ["KUCOMMS_KERNEL"] / "kernel.json").write_text(json.dumps(result))
        sys.exit(bool(result["failed"]))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(stderr=as_json)
    if not console.is_terminal:
        console.width = 100
    try:
        version = guest.choose([wanted], guest.installed_kernels())[0]
        kernel = guest.Kernel(
            version, guest.BOOT / f"vmlinuz-{version}", guest.MODULES / version / "build"
        )
        console.print(f"building for {version}", highlight=False)
        out = make(kernel, LOGS)
        options = ["--rounds", rounds, "--bursts", bursts, "--count", count, "--here", out]
        options += [part for name in only for part in ("--only", name)]
        status = run_guest(version, [str(option) for option in options], as_json=as_json)
    except KeyboardInterrupt:
        console.print("interrupted")
        sys.exit(130)
    found = LOGS / version / "kernel.json"
    if not found.exists():
        sys.exit(status or 1)
    result = json.loads(found.read_text())
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(found, RESULT)
    show(result, console)
    if keep_in:
        keep(result, keep_in)
    console.print(f"result: {RESULT}", highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(result, indent=2))
    sys.exit(status)


def run_guest(version: str, options: list[str], *, as_json: bool) -> int:
    """Boot it and measure there. Returns the exit code; leaves nothing behind."""
    command = [sys.executable, str(ROOT / "tools" / "guest.py"), "--kernel", version]
    command += ["--log-dir", str(LOGS), "--", sys.executable, str(Path(__file__).resolve())]
    process = subprocess.Popen(
        command + options, cwd=ROOT, stdout=sys.stderr.fileno() if as_json else None
    )
    try:
        return process.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        process.wait()
        raise


if __name__ == "__main__":
    main()
