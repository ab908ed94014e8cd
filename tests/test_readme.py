# SPDX-License-Identifier: MIT
"""What the README says is so."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = re.findall(r"```sh\n(.*?)```", README + CONTRIBUTING, re.DOTALL)
COMMANDS = [line.split("#")[0].strip() for block in SHELL for line in block.splitlines()]


@pytest.mark.parametrize("url", ["inproc://sensor", "shm://sensor"])
def test_the_first_example_runs_as_pasted(tmp_path, url):
    program = tmp_path / "example.py"
    program.write_text(PYTHON[0].replace("inproc://sensor", url))
    result = subprocess.run(
        [sys.executable, program],
        capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path,
    )
    said = re.search(r"It prints `(.*?)`", README)[1]
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{said}\n", "")


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_every_example_is_python(number):
    # What is only shown, at a glance, has its await outside of a function.
    compile(PYTHON[number], f"README.md example {number}", "exec", flags=0x2000)


def test_what_the_examples_name_exists():
    import kucomms

    for name in re.findall(r"\bkucomms\.(\w+)", "".join(PYTHON)):
        assert hasattr(kucomms, name)
    for name in re.findall(r"endpoint\.(\w+)", "".join(PYTHON)):
        assert hasattr(kucomms.Endpoint, name)
    table = README.split("| on a link | |")[1].split("\n\n")[0]
    for name in re.findall(r"(\w+)\(|`(\w+)`", table):
        if (name := "".join(name)) != "QueueFull":
            assert hasattr(kucomms.Link, name)


@pytest.mark.parametrize(
    "line", sorted({line for line in COMMANDS if line.startswith("kucomms ")})
)
def test_every_command_line_is_understood(line):
    from kucomms.cli import group

    _, name, *arguments = line.split()
    command = group.commands[name]
    command.make_context(name, arguments)


def test_every_target_exists():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"\bmake ([a-z][\w-]*)", "\n".join(COMMANDS))
    assert named
    assert set(named) <= set(targets)


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_every_path_exists(text):
    paths = re.findall(r"`((?:kucomms|examples|tests|docs)/[^`]*)`", text)
    paths += re.findall(r"\]\(([^:)]+)\)", text)
    assert len(paths) > 5
    for path in paths:
        there = ROOT / path
        assert there.exists() or path == "kucomms/client.h", path
