# SPDX-License-Identifier: MIT
"""The protocol's models, see tests/models/README.md: whole they hold, broken they do not.

spin searches each of them exhaustively. A barrier that can be taken out without an error would
be one that the model does not need, or does not understand.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODELS = Path(__file__).parent / "models"
LITMUS = sorted((MODELS / "litmus").glob("*.litmus"))
RING = ROOT / "kernel_module/include/kucomms/ring.h"
CHANNEL = ROOT / "kernel_module/channel.c"
BARRIER = re.compile(r"\b(smp_mb|smp_store_release|smp_load_acquire)\(")
NAMED = re.compile(r"model: (\w+\.pml) (WITHOUT_\w+)")

WHOLE = (
    ("close",),
    ("held",),
    ("lazy",),
    ("park",),
    ("senders",),
    ("senders", "KERNEL"),
    ("starve",),
    ("transfer",),
)

RACE = "assertion violated (view"  # of the data of a message
LATE = "assertion violated (rx_position==tx_position)"  # closed, and not all was read
ASLEEP = "invalid end state"  # though there is something to do

# The barriers, each in one model at least; below them mistakes of other kinds.
BROKEN = (
    ("transfer", RACE, "WITHOUT_MOVE_RELEASE"),
    ("transfer", RACE, "WITHOUT_AVAILABLE_ACQUIRE"),
    ("transfer", RACE, "WITHOUT_FINISH_RELEASE"),
    ("transfer", RACE, "WITHOUT_PEEK_ACQUIRE"),
    ("transfer", RACE, "WITHOUT_GIVE_BACK_RELEASE"),
    ("transfer", RACE, "WITHOUT_CONSUMED_ACQUIRE"),
    ("held", RACE, "WITHOUT_FORGET_ACQUIRE"),
    ("held", RACE, "WITHOUT_FINISH_RELEASE"),
    ("close", LATE, "WITHOUT_SET_STATE_RELEASE"),
    ("close", LATE, "WITHOUT_PEER_STATE_ACQUIRE"),
    ("park", ASLEEP, "WITHOUT_WAKE_CONSUMER_MB"),
    ("park", ASLEEP, "WITHOUT_PARK_FOR_DATA_MB"),
    ("park", ASLEEP, "WITHOUT_PARK_FOR_SPACE_MB"),
    ("park", ASLEEP, "WITHOUT_WAKE_PRODUCER_MB"),
    ("lazy", ASLEEP, "WITHOUT_RELEASE_LAZILY_MB"),
    ("starve", ASLEEP, "WITHOUT_WAKE_CONSUMER_MB"),
    ("starve", ASLEEP, "WITHOUT_PARK_FOR_DATA_MB"),
    ("senders", ASLEEP, "KERNEL", "WITHOUT_MUST_RING_MB"),
    ("senders", ASLEEP, "KERNEL", "WITHOUT_CMPXCHG"),
    ("held", RACE, "WITHOUT_RULE"),
    ("close", LATE, "STATE_AFTER"),
    ("close", LATE, "SKIPPED_IS_ALL"),
    ("close", LATE, "LAST_LOOK_EARLY"),
    ("close", ASLEEP, "WITHOUT_BELL_ORDER"),
    ("lazy", ASLEEP, "WITHOUT_DUTY"),
    ("park", ASLEEP, "WITHOUT_SKIPPED"),
    ("starve", ASLEEP, "WITHOUT_RINGING"),
)


def search(build, model, *defines):
    """What spin's verifier says of a model, which ends with its first error."""
    for source in (*MODELS.glob("*.pml"), *MODELS.glob("*.h")):
        shutil.copy(source, build)
    # To optimise takes longer than it saves.
    verifier = ["gcc", "-O0", "-w", "-DSAFETY", "-DCOLLAPSE", "-DVECTORSZ=1024", "pan.c"]
    for command in (
        ["spin", *(f"-D{define}" for define in defines), "-a", f"{model}.pml"],
        [*verifier, "-o", "pan"],
        ["./pan", "-m10000", "-w22"],
    ):
        done = subprocess.run(
            command, cwd=build, check=False, timeout=300, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def barriers(source, function=""):
    """Each barrier of a file, or of one function of it, and the comment above it or nothing."""
    text = source.read_text()
    if function:
        begin = text.index(f"{function}(")
        text = text[begin : text.index("\n}", begin)]
    # A comment that speaks of a barrier is none.
    code = re.sub(r"/\*.*?\*/", lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.S)
    for found in BARRIER.finditer(code):
        above = text[: found.start()].rpartition("\n")[0]
        yield found[1], above[above.rindex("/*") :] if above.endswith("*/") else ""


ALL_BARRIERS = [*barriers(RING), *barriers(CHANNEL, "bool must_ring")]


@pytest.mark.parametrize("model", WHOLE, ids="-".join)
def test_model_holds(tmp_path, model):
    report = search(tmp_path, *model)
    assert re.search(r"errors: 0$", report, re.M), report
    for incomplete in ("not completed", "max search depth too small", "BITSTATE", "hash-compact"):
        assert incomplete not in report, report


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: "-".join((broken[0], *broken[2:])))
def test_model_without_it_fails(tmp_path, broken):
    model, error, *defines = broken
    report = search(tmp_path, model, *defines)
    assert re.search(r"errors: 1$", report, re.M), report
    assert f"pan:1: {error}" in report, report


def test_ring_has_the_barriers_that_the_models_know():
    assert sorted(kind for kind, _ in ALL_BARRIERS) == (
        ["smp_load_acquire"] * 5 + ["smp_mb"] * 6 + ["smp_store_release"] * 4
    )


@pytest.mark.parametrize(("kind", "comment"), ALL_BARRIERS)
def test_barrier_names_a_model_that_needs_it(kind, comment):
    named = NAMED.search(comment)
    assert named, f"{kind}(): {comment}"
    model, define = named.groups()
    assert define in {wanted[-1] for wanted in BROKEN if f"{wanted[0]}.pml" == model}
    assert define.endswith(kind.rpartition("_")[2].upper())
    texts = [(MODELS / name).read_text() for name in (model, "ring_model.h")]
    assert any(define in text for text in texts)


def test_no_two_barriers_name_the_same():
    named = [name for _, comment in ALL_BARRIERS for _, name in NAMED.findall(comment)]
    assert len(set(named)) == len(named)


@pytest.mark.parametrize("path", LITMUS, ids=lambda path: path.stem)
def test_litmus(path):
    """Well formed; with herd7 on the PATH, and in LKMM its tools/memory-model, run as well."""
    text = path.read_text()
    assert text.startswith(f"C {path.stem}\n")
    threads = re.findall(r"^P(\d)\((?:\w+ \*\w+(?:, )?)+\)\n\{\n(?:\t.*\n)+\}$", text, re.M)
    assert threads == [str(number) for number in range(len(threads))]
    assert len(threads) >= 2
    assert text.count("{") == text.count("}")
    shared = set(re.findall(r"\*(\w+)", text))
    final = re.search(r"^exists \((.*)\)\n\Z", text, re.M)
    assert final, "no exists clause"
    for thread, register in re.findall(r"(\d):(\w+)=", final[1]):
        body = text.split(f"P{thread}(")[1].split("\n}")[0]
        assert re.search(rf"^\tint {register};$", body, re.M), register
    assert shared
    if shutil.which("herd7") and "LKMM" in os.environ:
        done = subprocess.run(
            ["herd7", "-conf", "linux-kernel.cfg", path],
            cwd=os.environ["LKMM"],
            check=True,
            timeout=60,
            capture_output=True,
            text=True,
        )
        assert f"Observation {path.stem} Never" in done.stdout, done.stdout
        assert "Flag" not in done.stdout, done.stdout


def test_each_barrier_has_a_litmus_test():
    texts = "".join(path.read_text() for path in LITMUS)
    for _, comment in ALL_BARRIERS:
        for _, define in NAMED.findall(comment):
            assert define in texts
