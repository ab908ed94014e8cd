# SPDX-License-Identifier: MIT
"""The soak: every transport at once, links that come and go, processes that are killed.

One process, the hub, stays all the time and holds one end of every line; the other ends, the
peers, close their links, have theirs closed, or are killed. Every message is verified. What the
hub and the kernel use is sampled, and must be at the end what it was at the beginning.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

import kucomms
from tests.soak import ledger
from tests.soak.content import Content
from tests.soak.ends import Line, Soak, hub_process, peer_process
from tests.soak.flatness import Sampler, alive

ROOT = Path(__file__).resolve().parents[2]
TRANSPORTS = ("inproc", "shm", "kernel")
KERNEL_MODULE = "kucomms_tutorial"
SENDS = ("send", "send_many", "loan", "threadsafe")
RECEIVES = ("handler", "receive", "borrow", "borrowing handler")
PATIENCE = 180.0
SHOWN = 20

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.soak.ends", "uvloop"])


def lines_of(transports, count):
    """So many Python lines of each: every way to send and to receive, at either end."""
    lines = []

    def add(transport, where, listens, shift):
        at = len(lines)
        ways = (SENDS[at % 4], RECEIVES[(at + shift) % 4])
        back = (SENDS[(at + shift + 1) % 4], RECEIVES[(at + 2) % 4])
        lines.append(Line(at + 1, transport, where, listens, ways[0], ways[1], *back))

    if "shm" in transports:
        for number in range(count):
            add("shm", "process", number == 3, number)
    if "inproc" in transports:
        for number in range(count):
            add("inproc", ("thread", "loop")[number % 2], number == 2, number + 1)
    if "kernel" in transports:
        for number in range(count):
            add("kernel", "process", False, number + 2)
    return lines


class Native:
    """A line in C, ``native.c``: two processes, or with the kernel one."""

    def __init__(self, number, transport, soak, program):
        self.line = Line(number, transport, "process", False, "C", "C", "C", "C")
        self._soak = soak
        self._program = program
        self.hub = None if transport == "kernel" else self._start("hub")

    def _start(self, which):
        soak = self._soak
        where = f"/dev/{KERNEL_MODULE}" if which == "kernel" else soak.url(self.line)
        arguments = (where, Path(soak.directory, "content"), soak.ledger, soak.errors)
        return subprocess.Popen(
            [self._program, which, *arguments, str(self.line.number), str(soak.seed)]
        )

    def start_peer(self):
        return self._start("kernel" if self.line.transport == "kernel" else "peer")

    @staticmethod
    def build():
        """Compile it, unless that was done. The program's path.

        In a guest, where this takes long, the repository is read-only, and the program there.
        """
        source = Path(__file__).with_name("native.c")
        program = ROOT / "build" / "soak" / "native"
        headers = Path(kucomms.get_include()).rglob("*.h")
        newest = max(path.stat().st_mtime for path in [source, *headers])
        if program.exists() and program.stat().st_mtime > newest:
            return program
        program.parent.mkdir(parents=True, exist_ok=True)
        made = program.with_name(f"native.{os.getpid()}")
        flags = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Wshadow", "-pthread"]
        compiler = os.environ.get("CC", "cc")
        include = f"-I{kucomms.get_include()}"
        subprocess.run([compiler, *flags, include, source, "-o", made], check=True)
        return made.rename(program)


class Run:
    """One soak, from its first process to its report."""

    def __init__(self, transports, seed, lines, native, *, plant=(), pause=0.02, kill_every=0.5):
        self.seed = seed
        self.directory = tempfile.mkdtemp(prefix="kucomms-soak-")
        tag = f"{os.getpid()}_{seed % 10**6}"
        self.soak = Soak(self.directory, seed, tag, plant, pause)
        self.soak.errors.touch()
        self.lines = lines_of(transports, lines)
        in_c = native * [t for t in transports if t != "inproc"]
        program = Native.build() if in_c else None
        self.ledger = ledger.Ledger(self.soak.ledger, rows=1 + len(self.lines) + len(in_c))
        self.problems = []
        self.kills = {}
        self.random = random.Random(seed)
        self.seconds = 0.0
        self._kill_every = kill_every
        self._next_kill = 0.0
        self._rates = []
        Content(seed).write(Path(self.directory, "content"))
        self.hub = _processes.Process(target=hub_process, args=(self.soak, self.lines))
        self.hub.start()
        self.natives = [
            Native(number, transport, self.soak, program)
            for number, transport in enumerate(in_c, len(self.lines) + 1)
        ]
        self._started = {}
        self.peers = {}
        for line in self.all_lines:
            self.kills[line.number] = 0
            if line.where == "process":
                self._start_peer(line)
        self.sampler = Sampler()
        self.begin = time.monotonic()

    @property
    def all_lines(self):
        return [*self.lines, *(native.line for native in self.natives)]

    def _start_peer(self, line):
        native = next((n for n in self.natives if n.line is line), None)
        if native:
            process = native.start_peer()
        else:
            process = _processes.Process(target=peer_process, args=(self.soak, line))
            process.start()
        self.peers[line] = process
        self._started[line] = time.monotonic()

    def ready(self):
        """Whether something has come through every line; from then on it counts."""
        if all(self.of(line)["verified"] for line in self.all_lines):
            self.sampler = Sampler()
            self.begin = time.monotonic()
            return True
        self.seconds = time.monotonic() - self.begin
        if self.seconds > PATIENCE:
            self.problems.append(f"not every line had begun after {PATIENCE:g} s")
        self._check()
        return False

    # ---- while it runs ----------------------------------------------------------

    def step(self):
        """Kill whose turn it is, start again who was killed, notice who is not there."""
        now = time.monotonic()
        if now >= self._next_kill:
            self._next_kill = now + self.random.expovariate(1 / self._kill_every)
            self._kill_one()
        self.seconds = now - self.begin
        self._check()

    def _check(self):
        for name, process in self._lasting().items():
            if _exit_code(process) is not None:
                self.problems.append(f"{name} ended with code {_exit_code(process)}")
        for line, process in self.peers.items():
            if _exit_code(process) is not None:
                self.problems.append(
                    f"the peer of line {line.number} ended with code {_exit_code(process)}"
                )

    def _kill_one(self):
        """Only who is in a session that is to end so."""
        able = [line for line in self.peers if self.ledger.word(line.number, ledger.ENDS) == 2]
        if not able:
            return
        line = self.random.choice(able)
        process = self.peers[line]
        if self.ledger.word(line.number, ledger.SESSION) == 0:
            return
        process.kill()
        _join(process)
        self.ledger.end(line.number, self.ledger.word(line.number, ledger.SESSION))
        self.kills[line.number] += 1
        self._start_peer(line)

    def _lasting(self):
        found = {"the hub": self.hub}
        for native in self.natives:
            if native.hub:
                found[f"the hub in C of line {native.line.number}"] = native.hub
        return found

    def sample(self):
        pids = {name.removeprefix("the "): p.pid for name, p in self._lasting().items()}
        self.sampler.sample(pids | {"supervisor": os.getpid()})
        self._rates = [*self._rates, (time.monotonic(), self.verified())][-10:]

    @property
    def rate(self):
        (then, before), (now, after) = self._rates[0], self._rates[-1]
        return (after - before) / (now - then) if now > then else 0.0

    @property
    def wrong(self):
        words = (ledger.PEER_WRONG, ledger.HUB_WRONG)
        return sum(self.ledger.word(n, w) for n in self._numbers() for w in words)

    def _numbers(self):
        return [line.number for line in self.all_lines]

    def of(self, line):
        """What there is to say of a line."""

        def word(which):
            return self.ledger.word(line.number, which)

        return {
            "line": line.number,
            "transport": line.transport,
            "how": "in C" if line.hub_receives == "C" else line.name,
            "verified": word(ledger.PEER_CHECKED) + word(ledger.HUB_CHECKED),
            "sessions": word(ledger.SESSION),
            "judged": word(ledger.PEER_JUDGED) + word(ledger.HUB_JUDGED),
            "judged_after_ms": round(word(ledger.LATEST) / 1e6, 1),
            "kills": self.kills[line.number],
            "wrong": word(ledger.PEER_WRONG) + word(ledger.HUB_WRONG),
        }

    def verified(self, transport=None):
        """Messages so far."""
        words = (ledger.PEER_CHECKED, ledger.HUB_CHECKED)
        return sum(
            self.ledger.word(line.number, word)
            for line in self.all_lines
            for word in words
            if transport in (None, line.transport)
        )

    # ---- the end ------------------------------------------------------------------

    def stop(self):
        """End everybody in order; what does not end is a problem, and killed."""
        self.seconds = time.monotonic() - self.begin
        self.ledger.stop(ledger.PEERS_STOP)
        for line, process in self.peers.items():
            self._end(process, f"the peer of line {line.number}")
        self.ledger.stop(ledger.ALL_STOP)
        for name, process in self._lasting().items():
            self._end(process, name)
        give_up = time.monotonic() + PATIENCE
        while (left := alive().get("channels")) and time.monotonic() < give_up:
            time.sleep(0.02)
        if left:
            self.problems.append(f"{left} channels are left in the kernel")
        self.errors = self.soak.errors.read_text().splitlines()

    def _end(self, process, name):
        already = any(problem.startswith(f"{name} ended") for problem in self.problems)
        if not _join(process, PATIENCE):
            self.problems.append(f"{name} had not ended after {PATIENCE:g} s")
            process.kill()
            _join(process)
        elif _exit_code(process) and not already:
            self.problems.append(f"{name} ended with code {_exit_code(process)}")

    def close(self):
        """Kill what is left after an error, and remove the files."""
        for process in [*self.peers.values(), *self._lasting().values()]:
            process.kill()
            _join(process)
        shutil.rmtree(self.directory)

    def report(self):
        """Everything, for JSON."""
        verdicts = self.sampler.verdicts()
        silent = [line.number for line in self.all_lines if not self.of(line)["verified"]]
        problems = [*self.problems, *(f"nothing came through line {n}" for n in silent)]
        if not verdicts:
            problems.append("too short to tell whether anything grows")
        problems += [
            f"not flat: {v.what}: {v.first:.0f}, {v.last:.0f}" for v in verdicts if not v.ok
        ]
        return {
            "ok": not problems and not self.wrong and not self.errors,
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "verified": {
                t: self.verified(t)
                for t in TRANSPORTS
                if any(line.transport == t for line in self.all_lines)
            },
            "verified_in_c": sum(self.of(native.line)["verified"] for native in self.natives),
            "wrong": self.wrong,
            "problems": problems,
            "errors": self.errors[:SHOWN],
            "lines": [self.of(line) for line in self.all_lines],
            "flatness": [asdict(v) | {"ok": v.ok} for v in verdicts],
        }


def _exit_code(process):
    return process.poll() if isinstance(process, subprocess.Popen) else process.exitcode


def _join(process, timeout=None):
    """Wait for its end; whether it came."""
    if not isinstance(process, subprocess.Popen):
        process.join(timeout)
        return process.exitcode is not None
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        return False
    return True


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
        numbers = (what[name] for name in ("verified", "sessions", "kills", "wrong", "judged_after_ms"))
        table.add_row(
            str(line.number), line.transport, what["how"], *(f"{number:,}" for number in numbers)
        )
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
@click.option("--messages", type=float, help="End when so many are verified, instead.")
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
        report = run.report() | {"interrupted": bool(interrupted)}
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
        while run.seconds < length and run.verified() < messages and not interrupted:
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


if __name__ == "__main__":
    main()
