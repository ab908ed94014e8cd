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


@pytest.mark.parametrize("how", ["name", "symbolic link", "hard link"])
def test_a_file_onto_itself_is_left_alone(how, tmp_path):
    source = target = tmp_path / "source"
    source.write_bytes(b"content")
    if how != "name":
        target = tmp_path / "target"
        (target.symlink_to if how == "symbolic link" else target.hardlink_to)(source)
    result = subprocess.run(
        [sys.executable, EXAMPLE, source, target],
        capture_output=True, text=True, timeout=60, check=False,
    )
    problem = f"error: {source} and {target} are the same file\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", problem)
    assert source.read_bytes() == b"content"


def test_a_longer_target_is_replaced(tmp_path):
    (tmp_path / "source").write_bytes(b"short")
    (tmp_path / "target").write_bytes(b"much longer")
    subprocess.run([sys.executable, EXAMPLE, "source", "target"], cwd=tmp_path, check=True)
    assert (tmp_path / "target").read_bytes() == b"short"
