# SPDX-License-Identifier: MIT
"""Copies of files are identical, of whatever size, by both engines, buffered and O_DIRECT."""

import errno
import filecmp
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "copy_file.py"
SIZES = [0, 1, 4095, 4096, 4097, (1 << 18) + 1, (20 << 20) + 4095]
if os.environ.get("KUCOMMS_LARGE"):
    SIZES.append(1 << 30)


@pytest.fixture
def source(tmp_path, size):
    path = tmp_path / "source"
    rng = random.Random(size)
    with path.open("wb") as file:
        while file.tell() < size:
            file.write(rng.randbytes(min(1 << 20, size - file.tell())))
    yield path
    path.unlink()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", ["buffered", "direct"])
def test_copies_are_identical(engine, source, size, how, tmp_path):
    arguments = [source, tmp_path / "target"]
    if how == "direct":
        try:
            os.close(os.open(source, os.O_RDONLY | os.O_DIRECT))
        except OSError as error:
            if error.errno != errno.EINVAL:  # what a file system without it says
                raise
            pytest.skip("no O_DIRECT here")
        arguments.append("--direct")
    result = subprocess.run(
        [sys.executable, EXAMPLE, *arguments],
        capture_output=True, text=True, timeout=600, check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"copied {size} bytes with {engine}\n"
    assert filecmp.cmp(source, tmp_path / "target", shallow=False)
    assert os.path.getsize(tmp_path / "target") == size
    (tmp_path / "target").unlink()
