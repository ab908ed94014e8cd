# SPDX-License-Identifier: MIT
"""The bugs of tests/kernel/plants.py can still be planted: finding them takes an hour in guests."""

import re
import shlex
from collections import Counter

import pytest

from tests.kernel.plants import PLANTS, ROOT


@pytest.mark.parametrize("plant", PLANTS, ids=[plant.name for plant in PLANTS])
def test_its_place_is_there_once(plant):
    assert (ROOT / "kernel_module" / plant.file).read_text().count(plant.old) == 1
    assert plant.new != plant.old


@pytest.mark.parametrize("plant", PLANTS, ids=[plant.name for plant in PLANTS])
def test_the_tests_that_find_it_are_there(plant):
    file, *selected = shlex.split(plant.tests)
    text = (ROOT / "tests/kernel" / file).read_text()
    for word in re.findall(r"\w+", " ".join(selected[1:])):
        assert word in {"and", "or", "not"} or word in text


def test_each_has_a_name_of_its_own():
    assert [name for name, count in Counter(p.name for p in PLANTS).items() if count > 1] == []
