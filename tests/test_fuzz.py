# SPDX-License-Identifier: MIT
"""The ring under attack, in short: what ``make fuzz`` found is replayed, and a little added.

That the targets find what there is to find is seen by planting bugs: see fuzz/plants.py.
"""

import secrets
import subprocess

import pytest

from tests.fuzz import harness
from tests.fuzz.plants import PLANTS, Plant, build

FOUND_BY = ("not so:", "ERROR: AddressSanitizer", "runtime error:", "ERROR: libFuzzer")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz")
    harness.make(build=path)
    return path


@pytest.mark.parametrize("target", harness.TARGETS)
def test_corpus(programs, tmp_path, target):
    corpus = harness.unpack(target, tmp_path / "corpus")
    replayed = harness.fuzz(programs / target, corpus, runs=0, seed=1)
    assert not replayed.found, replayed.output
    assert replayed.executed >= len(list(corpus.iterdir())) > 100


@pytest.mark.parametrize("target", harness.TARGETS)
def test_something_new(programs, tmp_path, target):
    """The output on failure has the seed, and the input that did it."""
    corpus = harness.unpack(target, tmp_path / "corpus")
    fuzzed = harness.fuzz(programs / target, corpus, 20_000, 1 + secrets.randbelow(1 << 30))
    assert not fuzzed.found, fuzzed.output
    assert fuzzed.executed >= 20_000


def test_setup_when_the_system_says_no(programs):
    done = subprocess.run(
        [programs / "setup"], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_coverage(tmp_path):
    found = harness.coverage(tmp_path)
    assert set(found) == {"ring.h", "channel.h"}
    for header, figures in found.items():
        assert figures.lines > 200, header
        assert figures.percent_of_lines >= 95, f"{header}: not {figures.missed_lines}"
        assert figures.percent_of_branches >= 95, f"{header}: not {figures.missed_branches}"


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_planted_bug_is_found(tmp_path, plant):
    """By the stored corpus, which finds nothing without it, or soon after."""
    program = build(plant, tmp_path)
    corpus = harness.unpack(plant.target, tmp_path / "corpus")
    attacked = harness.fuzz(program, corpus, runs=0, seed=1)
    if not attacked.found:
        attacked = harness.fuzz(program, corpus, runs=1_000_000, seed=1)
    assert attacked.found
    assert any(text in attacked.output for text in FOUND_BY), attacked.output


def test_a_plant_has_to_fit(tmp_path):
    with pytest.raises(LookupError, match="not once"):
        build(Plant("nowhere", "consumer", "no such text", ""), tmp_path)
