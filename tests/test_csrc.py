# SPDX-License-Identifier: MIT
"""The C tests of the ring and the channel, plain and under the sanitizers.

Each of them is also known to be able to fail: built with a mistake in it, it does.
"""

import os
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent / "csrc"
PROGRAMS = ("ring_test", "client_test", "stress", "wake")
VARIANTS = ("plain", "asan", "tsan")
REPORTS = ("Sanitizer", "runtime error:", "data race")


def make(build, *targets, defines=""):
    """Build into ``build``; warnings are errors there."""
    done = subprocess.run(
        ["make", "-j2", "-C", SOURCES, f"BUILD={build}", f"DEFINES={defines}"]
        + [f"{build}/{target}" for target in targets],
        check=False,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run(program, *arguments):
    return subprocess.run(
        [program, *arguments], check=False, timeout=120, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    path = tmp_path_factory.mktemp("csrc")
    make(path, *(f"{program}_{variant}" for program in PROGRAMS for variant in VARIANTS))
    return path


@pytest.fixture(scope="module")
def client_tests(build, tmp_path_factory):
    """Running, all at once: most of the time each waits for a time-out to pass."""
    processes = {
        variant: subprocess.Popen(
            [build / f"client_test_{variant}"],
            env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path_factory.mktemp(variant))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for variant in VARIANTS
    }
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("variant", VARIANTS)
def test_client(client_tests, variant):
    stdout, stderr = client_tests[variant].communicate(timeout=120)
    check(client_tests[variant].returncode, stdout, stderr)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("program", [name for name in PROGRAMS if name != "client_test"])
def test_program(build, program, variant):
    done = run(build / f"{program}_{variant}")
    check(done.returncode, done.stdout, done.stderr)


def check(status, stdout, stderr):
    output = stdout + stderr
    assert status == 0, output
    assert not any(report in output for report in REPORTS), output
    assert not stderr


@pytest.mark.parametrize("seed", ["2", "3", "4"])
def test_stress_with_other_messages(build, seed):
    done = run(build / "stress_plain", "200000", seed)
    assert done.returncode == 0, done.stdout + done.stderr


def test_stress_finds_a_message_committed_before_it_is_written(tmp_path):
    make(tmp_path, "stress_plain", "stress_tsan", defines="-DKUCOMMS_TEST_COMMIT_EARLY")
    plain = run(tmp_path / "stress_plain")
    assert plain.returncode == 1
    assert "not so" in plain.stderr
    raced = run(tmp_path / "stress_tsan")
    assert raced.returncode != 0
    assert "not so" in raced.stderr or "data race" in raced.stderr


def test_wake_finds_missing_barriers(tmp_path):
    """On two processors; with only one there is nothing that could be missed."""
    make(tmp_path, "wake_plain", defines="-DKUCOMMS_TEST_NO_BARRIER -DFORGOTTEN=2")
    # It ends with the first; where others keep a processor busy the two threads meet rarely.
    done = run(tmp_path / "wake_plain", "120")
    assert done.returncode == 1, done.stdout
    assert "a wake-up was lost" in done.stderr
