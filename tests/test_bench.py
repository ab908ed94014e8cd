# SPDX-License-Identifier: MIT
"""The benchmark runs, verifies what it sends, and writes what it says. Never how fast it was."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTESTANTS = ("kucomms shm send", "kucomms shm send_many", "multiprocessing.Pipe", "asyncio.Queue")


def run(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_throughput_is_verified_and_written(tmp_path):
    file = tmp_path / "results.json"
    words = "shm send,Pipe,asyncio.Queue"
    output = run(
        "--quick", "--only", "throughput", "--contestants", words, "--sizes", "64,4096",
        "--seconds", "0.01", "--no-plots", "--json", str(file),
    )
    written = json.loads(file.read_text())
    results = {(result["name"], result["case"]): result for result in written["results"]}
    assert set(results) == {(name, size) for name in CONTESTANTS for size in ("64 B", "4096 B")}
    for result in results.values():
        assert "error" not in result
        assert result["verified"] is True
        assert result["samples"][0] > 0
        assert result["cpu"] > 0
    assert written["notes"] == []
    assert not written["interrupted"]
    assert written["machine"]["cores"] >= 1
    outcomes = {target["what"]: target["outcome"] for target in written["targets"]}
    assert outcomes["64 B: best peer / send_many"] in ("met", "missed")
    assert outcomes["idle: wake-ups"] == "unknown"
    for name in CONTESTANTS:
        assert name in output


def test_help_has_an_example():
    assert "python -m bench --quick" in run("--help")


def test_the_bench_of_pools_writes_its_page_and_keeps_the_notes(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("old\n\n<!-- notes -->\nwhat somebody wrote\n")
    subprocess.run(
        [sys.executable, "-m", "bench.pool", page, "--rounds", "1", "--mebibytes", "1",
         "--file-mebibytes", "4", "--samples", "2", "--directory", tmp_path],
        cwd=ROOT, check=True, capture_output=True, timeout=120,
    )
    text = page.read_text()
    for name in ("pool, submit", "pool, await, engine threads", "asyncio.to_thread"):
        assert text.count(f"| {name} |") == 3
    for name in ("inproc://, one loop", "shm://, two processes"):
        assert text.count(f"| {name} |") == 2
        outcome = rf"\| {re.escape(name)} \| at most 1\.2 x \| \S+ x \| (met|missed) \|"
        assert re.search(outcome, text)
    assert "old" not in text
    assert text.endswith("<!-- notes -->\nwhat somebody wrote\n")


def test_the_comparison_of_two_commits_tells_the_noise(tmp_path):
    page = tmp_path / "page.md"
    done = subprocess.run(
        [sys.executable, "-m", "bench.compare", "HEAD", "HEAD", page, "--rounds", "2",
         "--kernel-rounds", "0", "--json"],
        cwd=ROOT, check=False, capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    row = r"^\| (.+?) \| \S+ \| \S+ \| \d+\.\d\d \| \S+ to \S+ \|$"
    rows = re.findall(row, page.read_text(), re.MULTILINE)
    assert rows == list(values)
    assert {row.split(":")[0] for row in rows} == {"C", "Python"}
    for of_a_tree in values.values():
        assert {name: len(found) for name, found in of_a_tree.items()} == {
            "before": 2, "after": 2, "before, again": 2
        }
