# SPDX-License-Identifier: MIT
"""Build and run the fuzz targets; keep their corpus; measure what it covers."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "fuzz"
INCLUDE = ROOT / "kucomms" / "include"
CORPUS = HERE / "corpus"
TARGETS = ("consumer", "producer", "pair")
HEADERS = ("ring.h", "channel.h")

#: Bytes of an input at most: the first, and 33 operations.
LENGTH_MAX = 133
#: Seconds after which one input counts as a hang.
HANG = 20

_EXECUTED = re.compile(r"^stat::number_of_executed_units:\s+(\d+)", re.MULTILINE)


class BuildError(Exception):
    """The compiler's output."""


def make(*goals: str, build: Path = BUILD, include: Path = INCLUDE) -> None:
    """Build ``goals``, or all targets, into ``build``."""
    done = subprocess.run(
        ["make", "-j2", "-C", HERE, f"BUILD={build}", f"INCLUDE={include}", *goals],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise BuildError(done.stdout + done.stderr)


def unpack(target: str, folder: Path) -> Path:
    """Write the stored corpus of ``target`` into ``folder``, a file for each input."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, line in enumerate((CORPUS / f"{target}.hex").read_text().splitlines()):
        text = line.partition("#")[0]
        if text:
            (folder / f"stored-{number:04}").write_bytes(bytes.fromhex(text))
    return folder


@dataclass
class Outcome:
    """What one run of a target came to."""

    executed: int
    found: bool
    output: str


def outcome(returncode: int, output: str) -> Outcome:
    """Judge a target that has ended."""
    executed = _EXECUTED.search(output)
    return Outcome(int(executed[1]) if executed else 0, returncode != 0, output)


def arguments(program: Path, findings: Path, runs: int, seed: int) -> list[str]:
    """The command line for ``runs`` executions; folders of inputs are to be added."""
    findings.mkdir(parents=True, exist_ok=True)
    return [
        str(program),
        f"-runs={runs}",
        f"-seed={seed}",
        f"-max_len={LENGTH_MAX}",
        f"-timeout={HANG}",
        f"-artifact_prefix={findings}/{program.name}-",
        "-use_cmp=0",
        "-entropic=0",  # twice as fast
        "-print_final_stats=1",
    ]


def fuzz(program: Path, folder: Path, runs: int, seed: int) -> Outcome:
    """Fuzz from the inputs in ``folder``, to which what is new is added. 0 runs: replay."""
    done = subprocess.run(
        [*arguments(program, folder.parent / "findings", runs, seed), folder],
        check=False,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=3600,
    )
    return outcome(done.returncode, done.stderr)


def store(target: str, folders: list[Path], scratch: Path) -> tuple[int, int]:
    """Store the fewest of these inputs, and of those stored, that cover what all do.

    What is stored with a remark stays. Return: inputs and bytes stored.
    """
    path = CORPUS / f"{target}.hex"
    kept = [line for line in path.read_text().splitlines() if "#" in line] if path.exists() else []
    merged = scratch / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    merged.mkdir(parents=True)
    sources = [unpack(target, scratch / "stored"), *folders] if path.exists() else folders
    subprocess.run(
        [BUILD / target, "-set_cover_merge=1", f"-max_len={LENGTH_MAX}", merged, *sources],
        check=True,
        capture_output=True,
        timeout=3600,
    )
    plain = {file.read_bytes().hex() for file in merged.iterdir()}
    plain -= {line.partition(" ")[0] for line in kept}
    lines = kept + sorted(plain, key=lambda text: (len(text), text))
    path.write_text("".join(line + "\n" for line in lines))
    return len(lines), path.stat().st_size


def remember(target: str, data: bytes, remark: str) -> None:
    """Store one input that finds something, with a remark on what."""
    path = CORPUS / f"{target}.hex"
    path.write_text(f"{data.hex()} # {remark}\n" + path.read_text())


@dataclass
class Coverage:
    """How much of a header was run, by all programs together."""

    lines: int
    branches: int
    missed_lines: list[int]
    missed_branches: list[int]  # their lines; a condition has two

    @property
    def percent_of_lines(self) -> float:
        return 100 * (1 - len(self.missed_lines) / self.lines)

    @property
    def percent_of_branches(self) -> float:
        return 100 * (1 - len(self.missed_branches) / self.branches)


def _measured(build: Path) -> list[str | Path]:
    """Run all there is to be measured. Return: what llvm-cov wants to know."""
    make("coverage", build=build)
    folders = {target: unpack(target, build / "replay" / target) for target in TARGETS}
    replay = ["-runs=0", f"-artifact_prefix={build}/"]
    commands = {f"{target}_coverage": [*replay, folders[target]] for target in TARGETS}
    commands |= {"setup_coverage": [], "ring_test_coverage": []}
    for program, options in commands.items():
        subprocess.run(
            [build / program, *options],
            check=True,
            capture_output=True,
            timeout=600,
            env={"LLVM_PROFILE_FILE": str(build / f"{program}.profraw")},
        )
    merged = build / "coverage.profdata"
    profiles = [build / f"{program}.profraw" for program in commands]
    subprocess.run(["llvm-profdata", "merge", *profiles, "-o", merged], check=True)
    programs = [part for program in commands for part in ("-object", build / program)]
    return [*programs[1:], f"-instr-profile={merged}"]


def coverage(build: Path = BUILD) -> dict[str, Coverage]:
    """How much of each header the corpus and the C tests run.

    A function in a header exists once in each program; llvm-cov's own summary takes the best of
    them, this adds them up.
    """
    about = _measured(build)

    def export(form: str) -> str:
        command = ["llvm-cov", "export", f"-format={form}", *about]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    (data,) = json.loads(export("text"))["data"]
    records = export("lcov").split("end_of_record")
    found = {}
    for name in HEADERS:
        (record,) = (text for text in records if f"/kucomms/{name}\n" in text)
        lines = {int(at): int(runs) for at, runs in re.findall(r"^DA:(\d+),(\d+)", record, re.M)}
        # Where, and which way: times.
        branches: dict[tuple[int, ...], int] = {}
        (file,) = (file for file in data["files"] if file["filename"].endswith(f"/kucomms/{name}"))
        for *where, taken, skipped, _, _, _ in file["branches"]:
            for way, times in enumerate((taken, skipped)):
                key = (*where, way)
                branches[key] = branches.get(key, 0) + times
        found[name] = Coverage(
            len(lines),
            len(branches),
            [line for line, times in lines.items() if not times],
            [at[0] for at, times in branches.items() if not times],
        )
    return found
