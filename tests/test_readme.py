# SPDX-License-Identifier: MIT
"""What the README says is so."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kucomms

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


def example(text):
    """The one with this in it, as the code of a coroutine."""
    (found,) = (code for code in PYTHON if text in code)
    return compile(found, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.asyncio
async def test_the_example_of_the_pool_runs(tmp_path, capsys):
    (tmp_path / "file").write_bytes(bytes(4096) + b"0123456789" * 7000)
    with (tmp_path / "file").open("rb") as file, (tmp_path / "other").open("wb") as other:
        await eval(example("kucomms.open_pool("), globals(), locals())
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["b'0123456789'", "first 65536 0"]
    assert (tmp_path / "other").read_bytes() == (b"0123456789" * 7000)[: (64 << 10) - 10]


@pytest.mark.asyncio
@pytest.mark.parametrize("scheme", ["inproc", "shm"])
async def test_the_example_of_buffers_in_messages_runs(tmp_path, scheme):
    """With a peer that hands back what it gets."""
    url = f"{scheme}://readme_{os.getpid()}"
    got = []

    async def hand_back(message, link):
        got.append(message.data)
        await link.send(message, buffers=message.buffers)

    async with kucomms.Endpoint("peer") as peer:
        peer.on_message(hand_back)
        await peer.listen(url)
        async with kucomms.connect(url) as link:
            with (tmp_path / "file").open("wb") as file:
                await eval(example("link.open_pool(64"), globals(), locals())
            assert (await link.receive()).data == b"done"
    assert got == [b"a frame", b"done"]
    assert (tmp_path / "file").read_bytes() == b"hello".ljust(1 << 20, b"\0")


def test_what_the_examples_name_exists():
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
