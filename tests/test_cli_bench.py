# SPDX-License-Identifier: MIT
"""``kucomms bench``, run as users run it: real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from kucomms.cli import group

KUCOMMS = [sys.executable, "-m", "kucomms"]
DEADLINE = 60


@pytest.fixture
def start():
    """Start a command; whatever still runs at the end of the test is killed."""
    processes = []

    def start(*arguments, **options):
        process = subprocess.Popen(
            [*KUCOMMS, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def end(process):
    """Its exit code, and what it said."""
    out, err = process.communicate(timeout=DEADLINE)
    return process.returncode, out, err


def seconds_of(pid):
    """The command lines of processes that a bench of this pid has started."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if f"shm://bench_{pid}_".encode() in line:
            found[int(path.name)] = line
    return found


def eventually(condition):
    deadline = time.monotonic() + DEADLINE
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return result


def check_trips(trips):
    for trip in trips:
        assert trip["size"] == 64
        assert trip["trips"] > 0
        times = [trip[f"{name}_us"] for name in ("p50", "p90", "p99", "p99_9", "max")]
        assert times[0] > 0
        assert times == sorted(times)


def test_help_has_an_example(start):
    code, out, err = end(start("bench", "--help"))
    assert (code, err) == (0, "")
    assert "kucomms bench" in out.split("Example")[1]
    assert "--peer" not in out


def test_json_has_all_measurements(start):
    bench = start("bench", "--json", "--seconds", "0.05")
    code, out, err = end(bench)
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert [(row["size"], row["method"]) for row in report["one_way"]] == [
        (size, method) for size in (64, 1024, 65536) for method in ("send", "send_many")
    ]
    for row in report["one_way"]:
        assert all(row[name] > 0 for name in row if name != "method")
        rate = row["messages_per_second"] * row["size"] / 1e6
        assert row["megabytes_per_second"] == pytest.approx(rate, abs=0.01)
    assert [trip["busy_poll"] for trip in report["round_trips"]] == [50e-6, 0]
    check_trips(report["round_trips"])
    assert not seconds_of(bench.pid)


def test_the_tables_and_the_options(start):
    arguments = ("--seconds", "0.02", "--size", "100", "--size", "1M", "--busy-poll", "0")
    code, out, err = end(start("bench", *arguments))
    assert (code, err) == (0, "")
    texts = ("100 B", "1024 KiB", "send_many", "64 KiB")
    assert [out.count(text) for text in texts] == [2, 2, 2, 0]
    assert "Round trip, 64 B" in out
    for line in out.splitlines():
        assert len(line) <= 80


def test_with_an_echo_that_is_there(start):
    url = f"shm://bench_echo_{os.getpid()}"
    echo = start("echo", url)
    assert echo.stderr.readline() == f"listening at {url}\n"
    code, out, err = end(start("bench", url, "--json", "--seconds", "0.05"))
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert (report["url"], report["one_way"]) == (url, [])
    assert len(report["round_trips"]) == 2
    check_trips(report["round_trips"])


@pytest.mark.parametrize(
    ("url", "said"),
    [("shm://nobody", "nobody listens"), ("nonsense", "not a URL")],
)
def test_an_error_is_one_line(start, url, said):
    code, out, err = end(start("bench", url, "--timeout", "0"))
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


def test_the_other_side_is_no_echo(start):
    url = f"shm://bench_other_{os.getpid()}"
    listener = start("longtest", "--listen", url)
    assert listener.stderr.readline() == f"listening at {url}\n"
    code, out, err = end(start("bench", url, "--seconds", "0.05"))
    assert (code, out) == (1, "")
    assert err == f"error: {url}: what comes back is no echo; is 'kucomms echo' there?\n"


@pytest.mark.parametrize(
    "arguments", [("shm://x", "--size", "64"), ("--size", "17M"), ("--seconds", "0")]
)
def test_what_cannot_be_measured_is_a_usage_error(arguments):
    with pytest.raises(click.UsageError):
        group.main(["bench", *arguments], standalone_mode=False)


@pytest.mark.parametrize("delay", [0, 0.5])
def test_control_c_leaves_no_process(start, delay):
    bench = start("bench", "--seconds", "5")
    eventually(lambda: seconds_of(bench.pid))
    time.sleep(delay)
    bench.send_signal(signal.SIGINT)
    code, out, err = end(bench)
    assert (code, out, err.strip()) == (130, "", "")
    assert not seconds_of(bench.pid)


def test_the_second_process_ends_with_the_first(start):
    bench = start("bench", "--seconds", "5")
    eventually(lambda: seconds_of(bench.pid))
    time.sleep(0.5)
    bench.kill()
    bench.wait()
    eventually(lambda: not seconds_of(bench.pid))
