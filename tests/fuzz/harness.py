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


def coverage(build: Path = BUILD) -> dict[str, dict[str, dict[str, float]]]:
    """Lines and branches of the headers that the corpus and the C tests reach.

    Return: for each header, for "lines" and "branches", llvm-cov's "count", "covered", "percent".
    """
    make("coverage", build=build)
    profiles = []
    programs = [build / f"{target}_coverage" for target in TARGETS]
    commands = [
        [program, "-runs=0", unpack(target, build / "replay" / target)]
        for program, target in zip(programs, TARGETS, strict=True)
    ]
    for name in ("setup_coverage", "ring_test_coverage"):
        programs.append(build / name)
        commands.append([build / name])
    for program, command in zip(programs, commands, strict=True):
        profiles.append(program.with_suffix(".profraw"))
        subprocess.run(
            command,
            check=True,
            capture_output=True,
            timeout=600,
            env={"LLVM_PROFILE_FILE": str(profiles[-1])},
        )
    merged = build / "coverage.profdata"
    subprocess.run(["llvm-profdata", "merge", *profiles, "-o", merged], check=True)
    objects = [part for program in programs[1:] for part in ("-object", program)]
    exported = subprocess.run(
        ["llvm-cov", "export", programs[0], *objects, f"-instr-profile={merged}"],
        check=True,
        capture_output=True,
        timeout=600,
    )
    files = json.loads(exported.stdout)["data"][0]["files"]
    return {
        name: file["summary"]
        for name in HEADERS
        for file in files
        if file["filename"].endswith(f"/kucomms/{name}")
    }
