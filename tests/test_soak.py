# SPDX-License-Identifier: MIT
"""A few seconds of the soak; and that it sees what it is there to see."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.soak.flatness import Sampler

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 300
FEW = ("--lines", "1", "--native", "0")


def soak(directory, *arguments, interrupt=False):
    """Exit code, report and output. ``interrupt``: control-C as soon as it runs."""
    report = directory / "report.json"
    with subprocess.Popen(
        [sys.executable, "-m", "tests.soak", "--seed", "1", "--json", report, *arguments],
        cwd=ROOT, env=os.environ | {"TMPDIR": str(directory)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:
        output = ""
        if interrupt:
            while " verified, " not in output:
                line = process.stdout.readline()
                assert line, output
                output += line
            process.send_signal(signal.SIGINT)
        try:
            output += process.communicate(timeout=DEADLINE)[0]
        finally:
            process.kill()
    assert report.exists(), output
    return process.returncode, json.loads(report.read_text()), output


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


def test_what_ends_does_not_end_the_sampling():
    """Neither a process that is a zombie, nor a name that is gone when it is looked at."""
    name = Path(f"/dev/shm/kucomms-gone-{os.getpid()}")
    name.symlink_to("nowhere")
    try:
        with subprocess.Popen(["true"]) as ended:
            os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
            sampler = Sampler()
            sampler.sample({"ended": ended.pid, "lives": os.getpid()})
    finally:
        name.unlink()
    assert {"lives: threads", "/dev/shm: entries"} <= sampler.series.keys()
    assert not any(what.startswith("ended") for what in sampler.series)


def test_growing_memory_and_descriptors_are_seen(tmp_path):
    faults = ("--plant", "memory", "--plant", "descriptor")
    code, report, output = soak(tmp_path, "--minutes", "0.04", *FEW, *faults)
    assert code == 1
    grown = {series["what"] for series in report["flatness"] if not series["ok"]}
    assert grown >= {"hub: private memory", "hub: descriptors"}, output


def test_one_wrong_byte_is_seen(tmp_path):
    code, report, output = soak(tmp_path, *FEW, "--plant", "corrupt")
    assert code == 1
    assert report["wrong"] >= 1, output
    assert "message 1000: got number 1000" in report["errors"][0]


def test_control_c_ends_it_in_order(tmp_path):
    code, report, output = soak(tmp_path, "--minutes", "10", *FEW, interrupt=True)
    assert code == 0, output
    assert report["interrupted"]
    assert all(line["verified"] for line in report["lines"])
    assert "ok: " in output
