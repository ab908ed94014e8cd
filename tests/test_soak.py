# SPDX-License-Identifier: MIT
"""A few seconds of the soak; and that it sees what it is there to see."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 120


def soak(directory, *arguments):
    """Exit code and report."""
    report = directory / "report.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", "--seed", "1", "--json", report, *arguments],
        cwd=ROOT, env=os.environ | {"TMPDIR": str(directory)},
        capture_output=True, text=True, timeout=DEADLINE, check=False,
    )
    assert report.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(report.read_text()), done.stdout + done.stderr


def test_some_seconds_with_kills(tmp_path):
    code, report, output = soak(tmp_path, "--minutes", "0.06", "--kill-every", "0.1")
    assert code == 0, output
    assert report["ok"]
    assert report["wrong"] == 0
    assert report["errors"] == report["problems"] == []
    assert all(report["verified"][transport] for transport in ("inproc", "shm"))
    assert all(line["verified"] and line["sessions"] for line in report["lines"])
    assert sum(line["kills"] for line in report["lines"])
    assert sum(line["judged"] for line in report["lines"])
    assert "hub: descriptors" in {series["what"] for series in report["flatness"]}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]  # it removes its files


def test_growing_memory_and_descriptors_are_seen(tmp_path):
    faults = ("--plant", "memory", "--plant", "descriptor")
    code, report, output = soak(tmp_path, "--minutes", "0.04", "--native", "0", *faults)
    assert code == 1
    grown = {series["what"] for series in report["flatness"] if not series["ok"]}
    assert grown >= {"hub: private memory", "hub: descriptors"}, output


def test_one_wrong_byte_is_seen(tmp_path):
    code, report, output = soak(tmp_path, "--native", "0", "--plant", "corrupt")
    assert code == 1
    assert report["wrong"] >= 1, output
    assert "message 1000: got number 1000" in report["errors"][0]
