# SPDX-License-Identifier: MIT
"""One soak: its processes, whom to kill, and the report."""

import multiprocessing
import os
import random
import shutil
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

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
# In a guest, which may be emulated, everything takes longer.
PATIENCE = 450.0 if "KUCOMMS_MODULES" in os.environ else 90.0
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
            add("shm", "process", number == 3, 0)
    if "inproc" in transports:
        for number in range(count):
            add("inproc", ("thread", "loop")[number % 2], number == 2, 1)
    if "kernel" in transports:
        for _ in range(count):
            add("kernel", "process", False, 2)
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
        self._moved = {}
        Content(seed).write(Path(self.directory, "content"))
        self.hub = _processes.Process(target=hub_process, args=(self.soak, self.lines))
        self.hub.start()
        self.natives = [
            Native(number, transport, self.soak, program)
            for number, transport in enumerate(in_c, len(self.lines) + 1)
        ]
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
        # Not what the one before it had said: nobody is killed in a session that is to end well.
        self.ledger.words[line.number * ledger.ROW + ledger.ENDS] = ledger.PEER
        native = next((n for n in self.natives if n.line is line), None)
        if native:
            process = native.start_peer()
        else:
            process = _processes.Process(target=peer_process, args=(self.soak, line))
            process.start()
        self.peers[line] = process

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
        for line in self.all_lines:
            moved = self.of(line)["verified"]
            before, since = self._moved.get(line, (None, now))
            if moved != before:
                self._moved[line] = (moved, now)
            elif now - since > PATIENCE:
                self.problems.append(f"line {line.number} has stood still for {PATIENCE:g} s")

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
        able = [n for n in self.peers if self.ledger.word(n.number, ledger.ENDS) == ledger.KILL]
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

    def most(self):
        """Messages so far of the transport that has most of them."""
        return max(self.verified(line.transport) for line in self.all_lines)

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

    def report(self, interrupted):
        """Everything, for JSON."""
        verdicts = self.sampler.verdicts()
        silent = [line.number for line in self.all_lines if not self.of(line)["verified"]]
        problems = [*self.problems, *(f"nothing came through line {n}" for n in silent)]
        if not verdicts and not interrupted:
            problems.append("too short to tell whether anything grows")
        problems += [
            f"not flat: {v.what}: {v.first:.0f}, {v.last:.0f}" for v in verdicts if not v.ok
        ]
        return {
            "ok": not problems and not self.wrong and not self.errors,
            "interrupted": interrupted,
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
